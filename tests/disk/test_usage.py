"""Wrong calls, and calls by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import HANGS, PATH, Name, Node


def call(*argv: Name, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [os.fspath(word) for word in argv],
        env={"PATH": PATH, **environment},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="ascii",
        timeout=HANGS,
    )


def last(text: str) -> str:
    lines = text.splitlines()
    return lines[-1] if lines else ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["--frobnicate"],
        ["create", "--frobnicate"],
        ["install", "--frobnicate"],
        ["create", "extra"],
    ],
)
def test_wrong_arguments(arguments: list[str], imageos: Path) -> None:
    done = call(imageos, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    if arguments:
        assert arguments[-1] in done.stderr


def test_unknown_command_names_the_known(imageos: Path) -> None:
    assert "create" in call(imageos, "creat").stderr


def test_called_by_another_name(imageos: Path, tmp_path: Path) -> None:
    """It runs from any directory under any name."""
    for name in ("imageos-1.0", "image os", "-odd"):
        copy = tmp_path / name
        shutil.copy2(imageos, copy)
        assert call(copy, "--version").stdout == call(imageos, "--version").stdout != ""


@pytest.mark.parametrize("name", ["create", "import", "export", "rename"])
def test_by_hand_without_ganetis_environment(name: str, node: Node) -> None:
    done = call(node.os_dir / name)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert "Ganeti" in done.stderr or "INSTANCE_NAME" in done.stderr
    assert last(done.stderr).startswith("imageos: ")


def test_as_a_command(node: Node, imageos: Path) -> None:
    """`imageos create` is the same as the link `create`."""
    assert call(imageos, "create").stderr == call(node.os_dir / "create").stderr != ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["create", "--help"], ["install", "--help"]])
def test_help_and_version_for_everybody(arguments: Sequence[str], imageos: Path, tmp_path: Path) -> None:
    public = Path("/tmp/imageos-for-everybody")
    shutil.copy2(imageos, public)
    public.chmod(0o755)
    try:
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(public), *arguments],
            env={"PATH": PATH},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="ascii",
        )
    finally:
        public.unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr
