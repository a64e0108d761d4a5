"""The partitions and logical volumes of an attached disk, and what each of them holds.

sfdisk(8) alone reads the table, and what it says is checked against the disk. Nothing is written here, and
nothing of LVM, RAID or encryption inside a guest is ever activated: see imageos.disks.lvm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from imageos import log
from imageos.disks import blockdev, lvm, superblock
from imageos.disks.blockdev import LoopDevice
from imageos.disks.ends import EXTENDED, MOST_PARTITIONS, PROTECTIVE
from imageos.disks.layout import SECTOR
from imageos.errors import Failure
from imageos.node.confinement import Room
from imageos.run import Command, Finished, at_once, pipeline

PROGRAMS = ("sfdisk", "blkid")
PHYSICAL = superblock.LVM
UUID = re.compile(r"[0-9A-Za-z-]{1,64}")  # of any kind of filesystem
PROBE_TIMEOUT = 60.0  # seconds; a hostile table must not keep a reader busy


class NoSystem(Failure):
    """The disk holds no system that is known here, or not certainly; nothing went wrong."""


class Part(NamedTuple):
    """A partition, a logical volume, or the whole disk where there is no partition table, and what it holds."""

    number: int  # 0: the whole disk, or a logical volume
    start: int  # bytes
    size: int  # bytes
    type: str  # as the table says: a GUID in upper case, or in an msdos table one byte in hex
    partuuid: str
    name: str  # in a gpt
    device: str
    kind: str = ""  # what blkid(8) calls it: ext4, swap, vfat, LVM2_member, ...; empty: unknown
    uuid: str = ""
    label: str = ""
    volume: str = ""  # GROUP/NAME of a logical volume
    volume_id: str = ""  # the UUIDs of both
    obstacle: str = ""  # why a logical volume has no device
    free: tuple[tuple[int, int], ...] = ()  # (start, end) of what is unallocated in a physical volume

    @property
    def end(self) -> int:
        return self.start + self.size

    def __str__(self) -> str:
        if self.volume:
            return f"logical volume {self.volume}"
        return f"partition {self.number}" if self.number else "the disk"


class Table(NamedTuple):
    kind: str  # gpt, dos or, where there is none, an empty string
    parts: tuple[Part, ...]  # in the order of their numbers, then the logical volumes
    end: int  # bytes: where the last partition may end
    extended: tuple[Part, ...] = ()  # of an msdos table: what only holds logical partitions
    groups: tuple[lvm.Group, ...] = ()
    unread: str = ""  # why there may be logical volumes that are not in `parts`
    remedy: str | None = None  # what to do about that

    @property
    def partitions(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not part.volume)


def read(loop: LoopDevice) -> Table:
    """Return the partition table, checked, its partition nodes made and probed. Also right for data disks."""
    table = read_table(loop.path, loop.size)
    if not table.parts:
        table = _whole(loop.path, loop.size)
    blockdev.set_partitions(loop, [(part.number, part.start, part.size) for part in table.parts if part.number])
    table = table._replace(parts=tuple(probe(table.parts)))
    return with_volumes(loop, table) if any(part.kind == PHYSICAL for part in table.parts) else table


def with_volumes(loop: LoopDevice, table: Table) -> Table:
    """Return `table` with the logical volumes on its partitions, each with a loop device unless it has an obstacle."""
    holders = {part.device: part for part in table.partitions if part.kind == PHYSICAL}
    groups, problem = lvm.read({device: part.uuid for device, part in holders.items()})
    unread = re.sub(r"/dev/\w+", lambda node: str(holders.get(node[0], node[0])), str(problem or ""))
    placed = [_place(group, volume, holders) for group in groups for volume in group.volumes]
    attached = [
        part._replace(device=blockdev.attach_range(loop, part.start, part.size)) for part in placed if not part.obstacle
    ]
    probed = iter(probe(attached))
    volumes = [part if part.obstacle else next(probed) for part in placed]
    for group in groups:
        for extents in group.free:
            holder = holders[extents.device]
            start, size = group.position(extents)
            free = (holder.start + start, min(holder.start + start + size, holder.end))
            holders[extents.device] = holder._replace(free=(*holder.free, free))
    partitions = [holders.get(part.device, part) for part in table.partitions]
    hide_physical(loop, table)
    return table._replace(
        parts=(*partitions, *volumes), groups=groups, unread=unread, remedy=problem.hint if problem else None
    )


def hide_physical(loop: LoopDevice, table: Table) -> None:
    """Take the nodes of physical volumes away: a guest's volume group may have the name of the node's."""
    blockdev.hide_partitions(loop, [part.number for part in table.partitions if part.kind == PHYSICAL])


def _place(group: lvm.Group, volume: lvm.LogicalVolume, holders: Mapping[str, Part]) -> Part:
    """Return where a logical volume is on the disk."""
    name = f"{group.name}/{volume.name}"
    if not volume.extents:
        return Part(0, 0, 0, "", "", "", "", volume=name, volume_id=volume.id, obstacle=volume.obstacle)
    holder = holders[volume.extents.device]
    start, size = group.position(volume.extents)
    obstacle = "" if start + size <= holder.size else f"it ends behind {holder}"
    return Part(0, holder.start + start, size, "", "", "", "", volume=name, volume_id=volume.id, obstacle=obstacle)


def read_table(path: str, size: int) -> Table:
    """Return the partition table of a disk of `size` bytes, checked; without one, a single part that is all of it."""
    done = pipeline(Command(["sfdisk", "--json", path], Room([path])), timeout=PROBE_TIMEOUT)[0]
    if done.status == 0:
        return parse_table(done.stdout.decode("utf-8", "replace"), path, size)
    if "does not contain a recognized partition table" in done.stderr:
        return _whole(path, size)
    failure = done.failure()
    # 1 is what it says of a table that it cannot read
    raise NoSystem(str(failure), failure.hint, failure.details) if done.status == 1 else failure


def _whole(path: str, size: int) -> Table:
    return Table("", (Part(0, 0, size, "", "", "", path),), size)


def probe(parts: Sequence[Part]) -> list[Part]:
    """Return `parts` with what blkid(8) finds on their devices, each of its own."""
    looks = [Command(["blkid", "--probe", "--output", "export", part.device], Room([part.device])) for part in parts]
    return [_seen(part, done) for part, done in zip(parts, at_once(looks, PROBE_TIMEOUT))]


def _seen(part: Part, done: Finished) -> Part:
    if done.status not in (0, 2, 8):  # 2: nothing found, 8: several things, so nobody can tell
        raise done.failure()
    seen = parse_probe(done.stdout.decode("utf-8", "replace"))
    kind = superblock.SEVERAL if done.status == 8 else seen.get("TYPE", "")
    return part._replace(kind=kind, uuid=seen.get("UUID", ""), label=seen.get("LABEL", ""))


# --- pure ------------------------------------------------------------------------------------------------


def parse_table(text: str, device: str, disk_size: int) -> Table:
    """Return the table in the output of `sfdisk --json`; fail unless it makes sense on a disk of this size."""
    try:
        table = json.loads(text, strict=False)["partitiontable"]
        kind, entries = str(table["label"]), table.get("partitions", [])
        if kind not in ("gpt", "dos"):
            raise NoSystem(f"the disk has a partition table of type {kind}: only msdos and gpt are understood")
        if table["unit"] != "sectors" or int(table.get("sectorsize", SECTOR)) != SECTOR:
            raise ValueError("unexpected units")
        parts = [_part(entry, device, str(table.get("id", ""))) for entry in entries]
        end = (int(table["lastlba"]) + 1) * SECTOR if kind == "gpt" else min(disk_size, ((1 << 32) - 1) * SECTOR)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise NoSystem(f"cannot understand the disk's partition table: {error}") from None
    extended = tuple(part for part in parts if kind == "dos" and part.type in map("{:x}".format, EXTENDED))
    table = Table(kind, tuple(part for part in parts if part not in extended), end, extended)
    check_table(table, disk_size)
    return table


def check_table(table: Table, disk_size: int) -> None:
    """Fail if partitions overlap, lie outside of the disk, or are more than anybody has."""
    parts = table.parts
    if len(parts) > MOST_PARTITIONS or any(part.number > MOST_PARTITIONS for part in parts):
        raise NoSystem(f"the partition table has {len(parts)} partitions, or numbers over {MOST_PARTITIONS}")
    if table.kind == "dos" and any(part.type == f"{PROTECTIVE:x}" for part in parts):
        raise NoSystem(
            "the partition table is a GPT that cannot be read here",
            hint="it is damaged, or was made for sectors of another size than 512 bytes",
        )
    for part in (*parts, *table.extended):
        if part.start < SECTOR or part.size <= 0:
            raise NoSystem(f"the partition table is damaged: {part} begins at {part.start} and has {part.size} bytes")
        if part.end > disk_size:
            raise NoSystem(
                f"the partition table is not for this disk: {part} ends at {part.end} bytes, "
                f"the disk of {log.size(disk_size)} at {disk_size}"
            )
    by_start = sorted(parts, key=lambda part: part.start)
    for part, following in zip(by_start, by_start[1:]):
        if part.end > following.start:
            raise NoSystem(f"the partition table is damaged: partitions {part.number} and {following.number} overlap")


def parse_probe(text: str) -> dict[str, str]:
    """Return NAME -> value of the output of `blkid --output export`, where a backslash quotes a character.

    A UUID becomes the name of a file (guests.sandbox): what has not the form of one is left out.
    """
    pairs = (line.partition("=") for line in text.splitlines())
    found = {name: re.sub(r"\\(.)", r"\1", value) for name, _, value in pairs}
    return {name: value for name, value in found.items() if name != "UUID" or UUID.fullmatch(value)}


def _part(entry: Any, device: str, disk_id: str) -> Part:
    match = re.fullmatch(re.escape(device) + r"p?(\d+)", str(entry["node"]))
    if not match:
        raise ValueError(f"no partition number in {entry['node']!r}")
    number = int(match[1])
    # the kernel makes up a PARTUUID for partitions of an msdos table
    partuuid = str(entry.get("uuid", "")) or f"{disk_id.replace('0x', '')}-{number:02x}"
    return Part(
        number,
        int(entry["start"]) * SECTOR,
        int(entry["size"]) * SECTOR,
        str(entry["type"]),
        partuuid,
        str(entry.get("name", "")),
        f"{device}p{number}",
    )
