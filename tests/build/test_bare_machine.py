"""A Debian 12 with python3, sudo and nothing else: no venv module, no pip, no compiler, no git."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import readme
from bare import NETWORK, inside, unpack_bare
from checkouts import copied


@pytest.fixture(scope="module")
def bare(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = unpack_bare(tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("debootstrap"))
    copied(root / "home/builder/imageos", with_tools=False)
    inside(root, "useradd", "builder")
    inside(root, "chown", "-R", "builder:", "/home/builder")
    keep = " ".join([*NETWORK, "PIP_CERT"])
    (root / "etc/sudoers.d/builder").write_text(f'builder ALL=(ALL) NOPASSWD: ALL\nDefaults env_keep += "{keep}"\n')
    return root


def as_builder(root: Path, line: str) -> subprocess.CompletedProcess[str]:
    return inside(root, "su", "builder", "-c", f"cd /home/builder/imageos && {line}")


def test_bare_machine(bare: Path, imageos: Path) -> None:
    """In the order in which somebody would meet it."""
    told = as_builder(bare, "./build.py")
    assert told.returncode == 1
    command = "sudo apt-get install --yes --no-install-recommends python3-venv"
    assert told.stdout.splitlines()[-1].endswith(f": sudo apt-get update && {command}"), told.stdout

    built = inside(bare, "/home/builder/imageos/build.py")
    assert built.returncode == 0, built.stdout
    assert "--no-install-recommends python3-venv" in built.stdout
    assert (bare / "home/builder/imageos/dist/imageos").read_bytes() == imageos.read_bytes()
    assert not (bare / "usr/sbin/policy-rc.d").exists()

    again = as_builder(bare, "./build.py")
    assert again.returncode == 0, again.stdout
    assert "installing" not in again.stdout

    demo = as_builder(bare, readme.block("sudo ./build.py demo").splitlines()[0])
    assert demo.returncode == 0, demo.stdout
    assert "inst1.example.org was made from busybox" in demo.stdout

    ran = as_builder(bare, "dist/imageos --version")
    assert ran.stdout.startswith("imageos "), ran.stdout
