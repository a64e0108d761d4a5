"""A guest's root partition and filesystem, grown to the end of the disk; every identifier is kept."""

from __future__ import annotations

import resource
from dataclasses import replace

from imageos import log
from imageos.disks import discovery, filesystem
from imageos.disks import disk as disks
from imageos.disks.discovery import Found, Part, Table
from imageos.disks.disk import Attached
from imageos.disks.layout import MIB, SECTOR
from imageos.errors import Failure
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.run import available, pipeline, run

E2FSCK_CORRECTED = 1  # status: errors, all of them corrected
BTRFS_SMALLEST = 256 * MIB  # that a btrfs may be resized to (fs/btrfs/ioctl.c)


def grow(disk: Attached, found: Found) -> None:
    """Grow the root to the end of the disk, if nothing lies behind it. Nothing of the disk may be mounted."""
    table = found.table
    if table.kind == "gpt":
        _move_backup_header(disk)
        table = replace(table, end=discovery.read_table(disk).end)
    obstacle = why_not(table, found.root)
    if obstacle:
        log.info(f"the root filesystem is not grown: {obstacle}")
        return
    size = found.root.size
    if table.kind:
        size = new_size(table, found.root)
        _grow_partition(disk, table, found.root, size)
    _grow_filesystem(found.root, size)


def why_not(table: Table, root: Part) -> str:
    """What keeps the root from growing; empty if nothing does. Numbers say nothing about the order on the disk."""
    behind = [part for part in table.parts if part.start > root.start]
    if behind:
        kinds = ", ".join(f"{part} ({part.kind or 'unknown'})" for part in behind)
        return f"behind {root} lies {kinds}"
    return ""


def new_size(table: Table, root: Part) -> int:
    """Bytes of the root partition when it reaches the last whole MiB that it may use; never less than it has."""
    return max(root.size, table.end // MIB * MIB - root.start)


def _move_backup_header(disk: Attached) -> None:
    linux.flush_buffers(disk.descriptor)
    move = ["sfdisk", "--relocate", "gpt-bak-std", "--no-reread", "--no-tell-kernel", disk.path]
    moved = pipeline([move], room=Room([disk.path]))[0]
    if moved.status and not available("sgdisk"):
        raise moved.failure()
    if moved.status:  # before util-linux 2.36
        run(["sgdisk", "--move-second-header", disk.path], room=Room([disk.path]))


def _grow_partition(disk: Attached, table: Table, root: Part, size: int) -> None:
    if size == root.size:
        return
    for extended in table.extended:
        if extended.start < root.start < extended.end:  # the root is a logical one
            _resize(disk, extended, max(extended.size, root.start + size - extended.start))
    _resize(disk, root, size)
    parts = [(part.number, part.start, size if part is root else part.size) for part in table.parts]
    disks.set_partitions(disk, parts)


def _resize(disk: Attached, part: Part, size: int) -> None:
    # What is not given here stays: start, type, name, attributes and the identifiers.
    run(
        ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe", "never", "--wipe-partitions", "never",
         "--partno", str(part.number), disk.path],
        input=f", {size // SECTOR}\n",
        room=Room([disk.path]),
    )  # fmt: skip


def _grow_filesystem(root: Part, size: int) -> None:
    if root.kind.startswith("ext"):
        _check_ext(root.device)
        run(["resize2fs", root.device], room=Room([root.device], memory=resource.RLIM_INFINITY))
        return
    if root.kind == "btrfs" and size < BTRFS_SMALLEST:
        log.info(f"the btrfs on {root} is not grown: Linux refuses to below {log.size(BTRFS_SMALLEST)}")
        return
    with filesystem.mounted_somewhere(root.device, root.kind) as directory:
        command = ["xfs_growfs", "-d"] if root.kind == "xfs" else ["btrfs", "filesystem", "resize", "max"]
        # they but hand on the kernel's answers and our wish, for which the kernel wants that
        room = Room([root.device], mount=directory, capabilities=[linux.CAP_SYS_ADMIN])
        run([*command, directory], room=room)


def _check_ext(device: str) -> None:
    """What resize2fs insists on."""
    # what they take grows with the disk
    room = Room([device], memory=resource.RLIM_INFINITY)
    checked = pipeline([["e2fsck", "-f", "-p", device]], room=room)[0]
    if checked.status not in (0, E2FSCK_CORRECTED):
        said = [
            line for line in (checked.stdout.decode("utf-8", "backslashreplace") + checked.stderr).splitlines() if line
        ]
        raise Failure(
            f"the root filesystem cannot be grown: e2fsck failed (exit status {checked.status}): {' '.join(said[-1:])}",
            hint="repair the image, or leave growing to the guest: GROW=no",
            details=said[:-1],
        )
