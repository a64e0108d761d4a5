"""Demands of a guest's superblock on the kernel that mounts it: overruled, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import backups
import guestdisks
import pytest
import trees
from backups import is_disarmed
from support import Node, Partition, Result, attached, digest, left_dirty, partitions, run

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
    """Ask the kernel how it would react to an error; do not cause one, as it would hit this kernel."""
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


def protect(guest: guestdisks.Guest, interval: int, sequence: bytes = b"") -> None:
    """Protect the root (mmp); a `sequence` marks it as in use, or as left so by a power failure."""
    part = root_of(guest)
    with attached(guest.path, part.start, part.size) as device:
        run("tune2fs", "-O", "mmp", "-E", f"mmp_update_interval={interval}", device)
        facts = dict(line.split(":", 1) for line in run("dumpe2fs", "-h", device).splitlines() if ":" in line)
        with device.open("r+b") as file:
            file.seek(int(facts["MMP block number"]) * int(facts["Block size"]) + 4)
            file.write(sequence)


def commands(node: Node, path: Path) -> dict[str, Result]:
    """Call every command but create with an instance's disk; import gets the export, on a larger disk."""
    name = "inst1.example.org"
    sent = backups.export(node, path)
    called = {"export": sent.result}
    called["import"] = backups.restore(node, sent.stream, guestdisks.blank(node.work / "larger", 500))
    called["rename"] = node.call("rename", node.environment(path, env="rename"))
    for options in ([], ["--read-only"]):
        called[f"mount-disks {' '.join(options)}".strip()] = node.tool(
            "mount-disks", *options, name, "--disk", str(path)
        )
        node.tool("umount-disks", "--here", name).ok()
    for kind in ("tarball", "dump", "qemu-img"):
        called[kind] = node.tool("ganeti-image", "-t", kind, "-i", name, "-n", kind, "--disk", str(path))
    return called


SOON = 60  # seconds; waiting would take ten minutes


def test_a_protected_filesystem(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """After a clean unmount all commands work; only e2fsck and resize2fs wait a little, with a message."""
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    protect(guest, 5)
    target, result = deployed(node, disk, guest)
    waits = "e2fsck and resize2fs wait 22 s: partition 1 is protected against being mounted twice (mmp)"
    assert waits in result.ok().log
    assert partitions(target)[-1].size > root_of(guest).size

    guest = guestdisks.mbr(tmp_path / "slow", small_tree, tmp_path)
    protect(guest, 300)
    target, result = deployed(node, disk, guest)
    assert "not grown: it is protected against being mounted twice (mmp)" in result.ok().log
    assert result.seconds < SOON
    for name, called in commands(node, target).items():
        assert called.seconds < SOON, f"{name}: {called.log}"
        if called.status:
            assert name == "dump", called.log
            assert "Unsupported feature(s) 0x100 in filesystem" in called.log, "dump(8) of Debian 12 does not know mmp"


def test_mounted_elsewhere(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The kernel would wait as long as the superblock says, for another node that might write."""
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    protect(guest, 300, bytes([7, 0, 0, 0]))  # the sequence number of a filesystem in use
    target, result = deployed(node, disk, guest)
    result.failed("mmp")
    assert result.seconds < SOON
    assert is_disarmed(target, [])
    for name, called in commands(node, guest.path).items():
        assert called.seconds < SOON, f"{name}: {called.log}"
        if name in ("export", "import", "mount-disks --read-only"):
            called.ok()
        else:
            called.failed("mmp")


def test_a_journal_of_another_node(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """A protected filesystem that was not unmounted may be in use elsewhere: its journal is not replayed, either."""
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    protect(guest, 5)
    with left_dirty(guest.path, tmp_path / "crashing", root_of(guest)) as root:
        (root / "written").touch()
    before = digest(guest.path)
    node.call("rename", node.environment(guest.path, env="rename")).failed("mmp")
    assert digest(guest.path) == before


def test_xfs_with_its_log_elsewhere(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.xfs(tmp_path / "image", small_tree, tmp_path)
    log = guestdisks.blank(tmp_path / "log", 100)
    part = root_of(guest)
    with attached(guest.path, part.start, part.size) as device, attached(log) as journal:
        run("mkfs.xfs", "-q", "-f", "-l", f"logdev={journal}", device)
    _, result = deployed(node, disk, guest, OSP_GROW="no")
    result.failed()
    assert "its log is on another device" in result.log
