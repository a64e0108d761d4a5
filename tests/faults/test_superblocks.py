"""What a guest's superblock demands of the kernel that mounts it: overruled, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import guestdisks
import pytest
import trees
from backups import is_disarmed
from support import Node, Partition, Result, attached, run

MakeDisk = Callable[..., Path]
OPTIONS = """#!/bin/sh
cat "/proc/fs/ext4/${ROOT_DEV##*/}/options"
"""


def deployed(node: Node, disk: MakeDisk, guest: guestdisks.Guest, **more: str) -> tuple[Path, Result]:
    node.image(guest.path, f"odd-{trees.ARCH}.raw")
    target = disk(450)
    return target, node.create(target, OSP_IMAGE_NAME="odd", OSP_IMAGE_TYPE="raw", **more)


def root_of(guest: guestdisks.Guest) -> Partition:
    part = guestdisks.place(guest.path, guest.root)
    assert part
    return part


def test_errors_do_not_panic_the_node(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The kernel is asked what it does on an error, not made to meet one: it would be this one."""
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    part = root_of(guest)
    with attached(guest.path, part.start, part.size) as device:
        run("tune2fs", "-e", "panic", device)
    node.hook("options", OPTIONS)
    target, result = deployed(node, disk, guest)
    result.ok()
    assert "options: errors=remount-ro" in result.log
    assert "errors=panic" not in result.log
    with attached(target, part.start, part.size, read_only=True) as device:
        assert "Panic" in run("dumpe2fs", "-h", device), "it is the guest's own affair"


DEMANDS = {
    "journal elsewhere": (
        ("debugfs", "-w", "-R", "set_super_value journal_inum 0"),
        "its journal is on another device",
    ),
    "options": (("tune2fs", "-E", "mount_opts=data=journal"), "demands mount options (data=journal)"),
}


@pytest.mark.parametrize("demand", DEMANDS)
def test_demands(demand: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    command, reason = DEMANDS[demand]
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    part = root_of(guest)
    with attached(guest.path, part.start, part.size) as device:
        run(*command, device)
    target, result = deployed(node, disk, guest, OSP_GROW="no")
    result.failed()
    assert reason in result.log
    assert is_disarmed(target, [])
    result = node.create(target, OSP_IMAGE_NAME="odd", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes")
    result.ok()


def test_mounted_elsewhere(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The kernel would wait for as long as the superblock says, to see whether somebody else writes."""
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    part = root_of(guest)
    with attached(guest.path, part.start, part.size) as device:
        run("tune2fs", "-O", "mmp", "-E", "mmp_update_interval=300", device)
        facts = dict(line.split(":", 1) for line in run("dumpe2fs", "-h", device).splitlines() if ":" in line)
        with device.open("r+b") as file:
            file.seek(int(facts["MMP block number"]) * int(facts["Block size"]) + 4)
            file.write(bytes([7, 0, 0, 0]))  # the sequence number of a filesystem that is in use
    target, result = deployed(node, disk, guest, OSP_GROW="no")
    result.failed("mmp")
    assert is_disarmed(target, [])


def test_xfs_with_its_log_elsewhere(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.xfs(tmp_path / "image", small_tree, tmp_path)
    log = guestdisks.blank(tmp_path / "log", 100)
    part = root_of(guest)
    with attached(guest.path, part.start, part.size) as device, attached(log) as journal:
        run("mkfs.xfs", "-q", "-f", "-l", f"logdev={journal}", device)
    _, result = deployed(node, disk, guest, OSP_GROW="no")
    result.failed()
    assert "its log is on another device" in result.log


def test_btrfs_on_several_devices(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Which others the kernel would take is for whoever has scanned disks to say, not for us."""
    guest = guestdisks.btrfs(tmp_path / "image", small_tree, tmp_path)
    second = guestdisks.blank(tmp_path / "second", 252)
    part = root_of(guest)
    with attached(guest.path, part.start, part.size) as device, attached(second) as other:
        run("mkfs.btrfs", "-q", "-f", "-d", "single", "-m", "raid1", device, other)
        run("btrfs", "device", "scan", "--forget", check=False)
    target = disk(400)
    node.image(guest.path, f"odd-{trees.ARCH}.raw")
    result = node.create(target, OSP_IMAGE_NAME="odd", OSP_IMAGE_TYPE="raw", OSP_GROW="no")
    result.failed()
    assert "it is one of the 2 devices of its filesystem" in result.log
