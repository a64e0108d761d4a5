"""Disks that are mounted on the node: told by the kernel's numbers, whatever names users give to their own mounts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import guestdisks
import pytest
from support import Node, run

MakeDisk = Callable[..., Path]


@pytest.fixture
def name() -> Iterator[str]:
    """An instance whose place in /tmp is taken away again."""
    yield f"inst{os.getpid()}.example.org"
    place = Path(f"/tmp/inst{os.getpid()}.example.org_root")
    if place.is_mount():
        run("umount", "--recursive", place)
    if place.is_dir():
        place.rmdir()


@pytest.mark.parametrize("layout", ["cloud", "btrfs"])
def test_a_mount_with_the_name_of_a_loop_device(
    layout: str, name: str, node: Node, block_disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    """It is no disk, and what that loop device is of is not waited for (a tmpfs here, as FUSE is for users)."""
    loop = block_disk()
    place = Path(f"/tmp/{name}_root")
    place.mkdir(0o700)
    run("mount", "-t", "tmpfs", loop, place)
    node.tool("umount-disks", "--here", name).ok()
    assert run("losetup", loop), "it is attached still"
    assert not place.exists()

    guest = guestdisks.LAYOUTS[layout](tmp_path / "guest.raw", small_tree, tmp_path)
    node.tool("mount-disks", name, "--disk", str(guest.path)).ok()
    (place / "written").touch()
    assert f"it is mounted at {place}" in node.create(guest.path).failed().last
    node.tool("umount-disks", "--here", name).ok()
    assert run("losetup", "--associated", guest.path) == ""


def test_what_the_operator_has_mounted_below(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """As one does before chroot(8): files and directories of the node, a tmpfs, and once more a part of the guest."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    place = Path(f"/tmp/{name}_root")
    node.tool("mount-disks", name, "--disk", str(guest.path)).ok()
    own = tmp_path / "resolv.conf"
    own.write_text("nameserver 192.0.2.1\n")
    (place / "etc/resolv.conf").touch()
    run("mount", "--bind", own, place / "etc/resolv.conf")
    run("mount", "--bind", "/usr/share", place / "mnt")
    run("mount", "-t", "tmpfs", "none", place / "run")
    run("mount", "--bind", place / "etc", place / "home")
    run("mount", "--bind", place / "etc/hostname", place / "etc/hosts")
    node.tool("umount-disks", "--here", name).ok()
    assert not place.exists()
    assert own.read_text() == "nameserver 192.0.2.1\n"


def test_in_a_chroot(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """What is mounted appears in there, and not outside, where its name may be somebody else's."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    root, place = tmp_path / "root", f"/tmp/{name}_root"
    root.mkdir()
    steps = [
        'mount --rbind / "$1"',
        'chroot "$1" "$2" "$3" --disk "$4" >&2',
        'ls "$1$5"',
        'echo outside:; ls "$5"',
    ]
    tool = node.os_dir / "tools/mount-disks"
    output = run("unshare", "--mount", "sh", "-ec", "\n".join(steps), "sh", root, tool, name, guest.path, place)
    inside, outside = output.split("outside:\n")
    assert "etc" in inside.split()
    assert outside == ""
