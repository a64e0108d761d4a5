"""In a chroot: what is not a mount point cannot keep its mounts from the node."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Node, run

MOUNTS = ("proc", "sys", "dev", "etc", "usr", "bin", "sbin", "lib", "lib64", "var")


@pytest.fixture
def chroot(node: Node, tmp_path: Path) -> Iterator[Path]:
    """A directory in which everything of this machine is."""
    root = tmp_path / "root"
    places = [root / name for name in MOUNTS if Path("/", name).is_dir()]
    try:
        for place in places:
            place.mkdir(parents=True)
            run("mount", "--rbind", "--make-rslave", Path("/", place.name), place)
        for name in ("tmp", "run"):
            (root / name).mkdir()
        yield root
    finally:
        for place in places:
            run("umount", "--recursive", "--lazy", place, check=False)


def call(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["chroot", root, *command],
        env={"PATH": "/sbin:/bin:/usr/sbin:/usr/bin", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_plain(node: Node, chroot: Path) -> None:
    """Told before anything is mounted or written, with what to do."""
    disk = node.work / "disk0"
    disk.write_bytes(bytes(1 << 20))
    done = call(chroot, str(node.imageos), "create", **node.environment(disk))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == [
        "imageos: hint: outside, make it one before chroot: mount --bind DIRECTORY DIRECTORY",
        "imageos: the root directory is not a mount point, as in a plain chroot",
    ]
    report = call(chroot, str(node.imageos), "doctor")
    assert "ERROR  the root directory is not a mount point" in report.stdout


def test_with_a_mount_point(node: Node, chroot: Path) -> None:
    run("mount", "--rbind", "--make-rslave", chroot, chroot)
    try:
        report = call(chroot, str(node.imageos), "doctor")
    finally:
        run("umount", "--recursive", "--lazy", chroot)
    assert "namespaces: mount, pid, net, ipc, uts" in report.stdout
