"""A root to install into, and a program to install."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import build
from imageos import installation
from imageos.commands import install, uninstall

OS_DIR = "/usr/share/ganeti/os/image"
SITE_DIR = "/etc/ganeti/instance-image"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    directory.mkdir()
    return directory


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the package as in the built file, with defaults and hooks."""
    build.stage_sources(tmp_path / "stage")
    package = tmp_path / "stage/imageos"
    program = tmp_path / "imageos"
    with zipfile.ZipFile(program, "w") as archive:
        archive.writestr("__main__.py", f'BUILD = "{32 * "0"}"')
        archive.writestr("site-packages/imageos/cli.py", "")
    monkeypatch.setattr("importlib.resources.files", lambda _: package)
    monkeypatch.setattr(installation, "program_file", lambda: str(program))
    return package


def call(command: str, root: Path) -> int:
    main = {"install": install.main, "uninstall": uninstall.main}[command]
    return main(["--root", str(root)])
