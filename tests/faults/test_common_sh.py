"""The results of common.sh for a site's shell hooks, whatever a hostile guest puts at the paths that it reads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TESTS

ASK = """. "$1"
get_os_type "$2"; get_os "$2"; get_os_release "$2"
echo "$OS_TYPE|$OPERATING_SYSTEM|$OS_RELEASE"
"""
DEBIAN = {"etc/os-release": 'ID=debian\nVERSION_ID="12"\n', "etc/debian_version": "12.5\n"}
CENTOS = {"etc/redhat-release": "CentOS release 6.10 (Final)\n"}


def ask(imageos: Path, root: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-uc", ASK, "bash", TESTS.parent / "defaults/common.sh", root],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "IMAGEOS": str(imageos)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def told(imageos: Path, root: Path) -> str:
    done = ask(imageos, root)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "guest/etc").mkdir(parents=True)
    return tmp_path / "guest"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "answer"),
    [
        (DEBIAN, "debian|debian|12"),
        ({"etc/debian_version": "trixie/sid\n"}, "debian|debian|trixie/sid"),
        (CENTOS, "redhat|centos|6.10"),
        ({"etc/redhat-release": "Fedora release 40\n", "etc/fedora-release": "x\n"}, "redhat|fedora|40"),
        ({"etc/redhat-release": "x", "etc/os-release": "ID=rhel\nVERSION_ID='9.4'\n"}, "redhat|redhat|9.4"),
        ({"usr/lib/os-release": 'ID="opensuse-leap"\nID_LIKE="suse opensuse"\n'}, "suse|opensuse-leap|"),
        ({"etc/gentoo-release": "Gentoo\n"}, "gentoo|gentoo|"),
        ({}, "||"),
    ],
)
def test_distributions(files: dict[str, str], answer: str, imageos: Path, root: Path) -> None:
    write(root, files)
    assert told(imageos, root) == answer


def fifo(root: Path) -> None:
    os.mkfifo(root / "etc/redhat-release")


def endless(root: Path) -> None:
    (root / "etc/redhat-release").symlink_to("/dev/zero")


def outside(root: Path) -> None:
    """Make the guest's /etc a link to the node's."""
    shutil.rmtree(root / "etc")
    (root / "etc").symlink_to("/etc")


def climbing(root: Path) -> None:
    (root / "etc/os-release").symlink_to("../../../../../../../../etc/os-release")
    (root / "etc/debian_version").symlink_to("/etc/debian_version")


def command(root: Path) -> None:
    (root / "etc/os-release").write_text("ID=$(touch /tmp/taken)\nVERSION_ID=`id`\nID_LIKE=x;id\n")


def large(root: Path) -> None:
    with (root / "etc/os-release").open("wb") as file:
        file.truncate(1 << 40)


def directory(root: Path) -> None:
    (root / "etc/redhat-release").mkdir()


HOSTILE = {
    fifo: "redhat|redhat|",
    endless: "||",
    outside: "||",
    climbing: "||",
    command: "||",
    large: "||",
    directory: "redhat|redhat|",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile_guests(make: Callable[[Path], None], imageos: Path, root: Path) -> None:
    """common.sh returns at once, without data of the node, and runs no command."""
    make(root)
    assert told(imageos, root) == HOSTILE[make]
    assert not Path("/tmp/taken").exists()


def test_no_guest(imageos: Path, tmp_path: Path) -> None:
    without = ask(imageos, "")
    assert without.returncode == 1 and "target is not set in get_os_type" in without.stderr
    missing = ask(imageos, tmp_path / "missing")
    assert missing.returncode == 1 and "missing: No such file or directory" in missing.stderr
