"""Run in a chroot made by hand: an ordinary directory with some mounts in it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Node, partitions, run

MakeDisk = Callable[..., Path]

MOUNTS = ("proc", "sys", "dev", "etc", "usr", "bin", "sbin", "lib", "lib64", "var")


@pytest.fixture
def chroot(node: Node, tmp_path: Path) -> Iterator[Path]:
    """Make a directory that contains everything of this machine."""
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


def test_plain(node: Node, chroot: Path, disk: MakeDisk, images: Path) -> None:
    """Its root is no mount point, but still nobody sees the mounts of create."""
    node.image(images / "small.tar.gz", "tiny-x86_64.tar.gz")
    target = disk()
    before = mounts()
    done = call(chroot, str(node.imageos), "create", **node.environment(target, OSP_IMAGE_TYPE="tarball"))
    assert done.returncode == 0, done.stdout
    assert len(partitions(target)) == 3
    assert mounts() == before
    report = call(chroot, str(node.imageos), "doctor")
    assert "namespaces: mount, pid, net, ipc, uts" in report.stdout


def mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()
