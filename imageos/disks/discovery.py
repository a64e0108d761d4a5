"""What is on an attached disk: its partition table, what each partition holds, and where the guest mounts it.

sfdisk(8) alone reads the table, and what it says is checked against the disk. Nothing is written here, and
nothing of LVM, RAID or encryption inside a guest is ever activated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from imageos import log
from imageos.disks import disk as disks
from imageos.disks import filesystem
from imageos.disks.disk import Attached
from imageos.disks.filesystem import FILESYSTEMS, Volume
from imageos.disks.layout import GPT_TYPES, ROOT_TYPES, SECTOR
from imageos.errors import Failure
from imageos.guests import target
from imageos.guests.sandbox import GuestDisk
from imageos.guests.target import Target
from imageos.node.confinement import Room
from imageos.node.mounts import unescape
from imageos.run import pipeline

PROGRAMS = ("sfdisk", "blkid")
MOST_PARTITIONS = 128  # as many as a usual GPT has room for
PROBE_TIMEOUT = 60.0  # seconds; a hostile table must not keep a reader busy
EXTENDED = ("5", "f", "85")  # partition types of an msdos table that only hold others
PROTECTIVE = "ee"
ESP_TYPES = (GPT_TYPES["esp"], "ef")
XBOOTLDR = "BC13C2FF-59E6-4262-A352-B275FD6F7172"  # /boot in the Discoverable Partitions Specification
# Subvolumes of a btrfs that may be the root, after the default one: Ubuntu and others, Debian's installer, Fedora
ROOT_SUBVOLUMES = ("", "subvol=@", "subvol=@rootfs", "subvol=root")
ROLES = {"/": "root", "/boot": "boot", "/boot/efi": "esp", "/efi": "esp", "/usr": "usr", "/var": "var"}
MOST_MOUNTED = 64  # filesystems of a guest; those of an installer are a dozen at most
MOUNTED = ("/boot", "/usr", "/var")  # partitions of these, and what is below them, are part of the system
# What a message says of a partition that is none of ours to read
SEALED = {
    "LVM2_member": "LVM, which imageos does not read",
    "linux_raid_member": "a RAID member, which imageos does not read",
    "crypto_LUKS": "encrypted",
    "swap": "swap",
}


class NoSystem(Failure):
    """What is on the disk is not, or not certainly, a system that is known here; nothing went wrong."""


@dataclass(frozen=True)
class Part:
    """A partition, or the whole disk where there is no partition table, and what it holds."""

    number: int  # 0: the whole disk
    start: int  # bytes
    size: int  # bytes
    type: str  # as the table says: a GUID in upper case, or in an msdos table one byte in hex
    partuuid: str
    name: str  # in a gpt
    device: str
    kind: str = ""  # what blkid(8) calls it: ext4, swap, vfat, LVM2_member, ...; empty: unknown
    uuid: str = ""
    label: str = ""

    @property
    def end(self) -> int:
        return self.start + self.size

    def __str__(self) -> str:
        return f"partition {self.number}" if self.number else "the disk"


@dataclass(frozen=True)
class Table:
    kind: str  # gpt, dos or, where there is none, an empty string
    parts: tuple[Part, ...]  # in the order of their numbers
    end: int  # bytes: where the last partition may end
    extended: tuple[Part, ...] = ()  # of an msdos table: what only holds logical partitions


@dataclass(frozen=True)
class Found:
    """A guest's system on a disk."""

    table: Table
    root: Part
    volumes: tuple[Volume, ...]  # the root first


class FstabEntry(NamedTuple):
    source: str
    mount_point: str
    kind: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class _System:
    """A partition (or subvolume) that holds a system, with its fstab."""

    part: Part
    options: str
    fstab: tuple[FstabEntry, ...]


def find(disk: Attached, mounted: tuple[str, ...] = MOUNTED) -> Found:
    """The system on a disk, its partition nodes made; NoSystem lists what was seen if there is none.

    Of its other filesystems, those to be mounted at or below the directories `mounted`.
    """
    table = read(disk)
    system = _find_system(table)
    return Found(table, system.part, tuple(_volumes(table, system, mounted)))


def find_if_any(disk: Attached, otherwise: str) -> Found | None:
    """As `find`; where there is no system, None, and in the log what was seen and what that means: `otherwise`."""
    try:
        return find(disk)
    except NoSystem as failure:
        for line in (*failure.details, f"{otherwise}: {failure}"):
            log.info(line)
        return None


def read(disk: Attached) -> Table:
    """The partition table, checked, its partition nodes made and probed. Also right for data disks."""
    table = read_table(disk)
    if not table.parts:
        table = _whole(disk)
    disks.set_partitions(disk, [(part.number, part.start, part.size) for part in table.parts if part.number])
    return replace(table, parts=tuple(probe(part) for part in table.parts))


def read_table(disk: Attached) -> Table:
    """The partition table of the disk, checked; without one, a single part that is the whole disk."""
    done = pipeline([["sfdisk", "--json", disk.path]], timeout=PROBE_TIMEOUT, room=Room([disk.path]))[0]
    if done.status == 0:
        return parse_table(done.stdout.decode("utf-8", "replace"), disk.path, disk.size)
    if "does not contain a recognized partition table" in done.stderr:
        return _whole(disk)
    failure = done.failure()
    # 1 is what it says of a table that it cannot read
    raise NoSystem(str(failure), failure.hint, failure.details) if done.status == 1 else failure


def _whole(disk: Attached) -> Table:
    return Table("", (Part(0, 0, disk.size, "", "", "", disk.path),), disk.size)


def probe(part: Part) -> Part:
    """`part` with what blkid(8) finds on its device."""
    command = ["blkid", "--probe", "--output", "export", part.device]
    done = pipeline([command], timeout=PROBE_TIMEOUT, room=Room([part.device]))[0]
    if done.status not in (0, 2, 8):  # 2: nothing found, 8: several things, so nobody can tell
        raise done.failure()
    seen = parse_probe(done.stdout.decode("utf-8", "replace"))
    kind = "several filesystems at once" if done.status == 8 else seen.get("TYPE", "")
    return replace(part, kind=kind, uuid=seen.get("UUID", ""), label=seen.get("LABEL", ""))


def describe(found: Found) -> list[str]:
    """What was found, for a message: `/ on partition 1 (ext4)`, `swap on partition 2`."""
    part_of = {part.device: part for part in found.table.parts}
    lines = []
    for volume in found.volumes:
        what = volume.mount_point or volume.role
        kind = ", ".join(word for word in (volume.kind, volume.options) if word not in ("", what))
        lines.append(f"{what} on {part_of[volume.device]}" + (f" ({kind})" if kind else ""))
    return lines


# --- pure ------------------------------------------------------------------------------------------------


def parse_table(text: str, device: str, disk_size: int) -> Table:
    """The table in the output of `sfdisk --json`; Failure unless it makes sense on a disk of this size."""
    try:
        table = json.loads(text, strict=False)["partitiontable"]
        kind, entries = str(table["label"]), table.get("partitions", [])
        if kind not in ("gpt", "dos"):
            raise NoSystem(f"the disk has a partition table of type {kind}: only msdos and gpt are understood")
        if table["unit"] != "sectors" or int(table.get("sectorsize", SECTOR)) != SECTOR:
            raise ValueError("unexpected units")
        parts = [_part(entry, device, str(table.get("id", ""))) for entry in entries]
        end = (int(table["lastlba"]) + 1) * SECTOR if kind == "gpt" else min(disk_size, ((1 << 32) - 1) * SECTOR)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoSystem(f"cannot understand the disk's partition table: {error}") from None
    extended = tuple(part for part in parts if kind == "dos" and part.type in EXTENDED)
    table = Table(kind, tuple(part for part in parts if part not in extended), end, extended)
    check_table(table, disk_size)
    return table


def check_table(table: Table, disk_size: int) -> None:
    """Fail if partitions overlap, lie outside of the disk, or are more than anybody has."""
    parts = table.parts
    if len(parts) > MOST_PARTITIONS or any(part.number > MOST_PARTITIONS for part in parts):
        raise NoSystem(f"the partition table has {len(parts)} partitions, or numbers over {MOST_PARTITIONS}")
    if table.kind == "dos" and any(part.type == PROTECTIVE for part in parts):
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
    for one, other in zip(by_start, by_start[1:]):
        if one.end > other.start:
            raise NoSystem(f"the partition table is damaged: partitions {one.number} and {other.number} overlap")


def parse_probe(text: str) -> dict[str, str]:
    """NAME -> value of the output of `blkid --output export`, where a backslash quotes a character."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name: re.sub(r"\\(.)", r"\1", value) for name, _, value in pairs}


def parse_fstab(text: str) -> tuple[FstabEntry, ...]:
    """The entries of an fstab(5) that mount something, in its order; what cannot be understood is left out."""
    entries = []
    for line in text.splitlines():
        fields = [unescape(field) for field in line.split()]
        if len(fields) < 3 or fields[0].startswith("#") or any("\0" in field for field in fields):
            continue
        source, mount_point, kind = fields[:3]
        if mount_point.startswith("/") and not {".", ".."} & set(mount_point.split("/")):
            options = fields[3].split(",") if len(fields) > 3 else []
            entries.append(FstabEntry(source, os.path.normpath("/" + mount_point.strip("/")), kind, tuple(options)))
    return tuple(entries)


def resolve(source: str, parts: Iterable[Part]) -> Part | None:
    """The partition that the first field of an fstab line means; None if it is not on this disk.

    Of kernel names (/dev/vda1, /dev/sda1, /dev/nvme0n1p1) only the number counts: the disk changes its name.
    """
    link = re.fullmatch(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.*)", source)
    tag, separator, value = source.partition("=")
    if link:
        tag, separator, value = link[1].upper(), "=", link[2]
    if separator:
        attribute = {"UUID": "uuid", "LABEL": "label", "PARTUUID": "partuuid", "PARTLABEL": "name"}.get(tag)
        value = value.strip("\"'")
        ignore_case = tag in ("UUID", "PARTUUID")
        return next(
            (part for part in parts if attribute and value and _same(getattr(part, attribute), value, ignore_case)),
            None,
        )
    node = re.fullmatch(r"/dev/(?:(?:[shv]d|xvd)a|(?:nvme0n1|mmcblk0)p)(\d{1,3})", source)
    return next((part for part in parts if node and part.number == int(node[1])), None)


def _same(one: str, other: str, ignore_case: bool) -> bool:
    return one.lower() == other.lower() if ignore_case else one == other


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


# --- the system ------------------------------------------------------------------------------------------


def _find_system(table: Table) -> _System:
    """The partition that a guest boots from: by its type in a gpt, or else by what it holds."""
    typed = [part for part in table.parts if part.type in ROOT_TYPES.values()]
    others = [part for part in table.parts if part not in typed]
    seen: dict[int, str] = {}
    for candidates in (typed, others):
        systems = []
        for part in candidates:
            system = _look(part, seen)
            if system:
                systems.append(system)
        if systems:
            return _choose(systems, table.parts)
    raise _no_root(table, seen)


def _choose(systems: Sequence[_System], parts: Sequence[Part]) -> _System:
    """One of several: that which mounts itself as its root, then the largest."""

    def rank(system: _System) -> tuple[bool, int]:
        own = [resolve(entry.source, parts) for entry in system.fstab if entry.mount_point == "/"]
        return system.part in own, system.part.size

    chosen = max(systems, key=rank)
    others = [str(system.part) for system in systems if system is not chosen]
    if others:
        log.warning(f"{chosen.part} is taken for the root; there is a system on {', '.join(others)}, too")
    return chosen


def _look(part: Part, seen: dict[int, str]) -> _System | None:
    """The system on a partition, or None and a note in `seen` what it is instead."""
    if part.kind not in FILESYSTEMS:
        seen[part.number] = SEALED.get(part.kind, part.kind or "nothing that is known")
        return None
    for options in ROOT_SUBVOLUMES if part.kind == "btrfs" else ("",):
        try:
            with _looked_into(part, options) as root:
                if _is_system(root):
                    return _System(part, options, parse_fstab(root.read("/etc/fstab") or ""))
                seen[part.number] = f"{part.kind} without a system (no /etc, or neither /usr nor /bin)"
        except filesystem.MountedTwice:
            raise
        except Failure as failure:
            # a subvolume that is not there cannot be mounted either
            seen.setdefault(part.number, f"{part.kind}: {failure}")
    return None


@contextmanager
def _looked_into(part: Part, options: str) -> Iterator[Target]:
    mount = filesystem.mounted_somewhere(part.device, part.kind, read_only=True, options=options)
    with mount as directory, target.opened(directory, "", GuestDisk([], []), 0) as root:
        yield root


def _is_system(root: Target) -> bool:
    release = root.exists("/etc/os-release") or root.exists("/usr/lib/os-release")
    return root.is_dir("/etc") and (release or root.exists("/bin") or root.exists("/usr"))


def _no_root(table: Table, seen: dict[int, str]) -> NoSystem:
    if not table.kind:
        return NoSystem(f"no root filesystem found on the disk, which has no partition table: {seen[0]}")
    lines = []
    for part in table.parts[:12]:
        label = f", label {part.label}" if part.label else ""
        lines.append(f"{part}: {log.size(part.size)}{label}: {seen[part.number]}")
    if len(table.parts) > len(lines):
        lines.append(f"and {len(table.parts) - len(lines)} more")
    what = f"{len(table.parts)} partition{'s' * (len(table.parts) != 1)}"
    return NoSystem(f"no root filesystem found on the disk ({what}, listed above)", details=lines)


def _volumes(table: Table, system: _System, mounted: tuple[str, ...] = MOUNTED) -> Iterator[Volume]:
    """The root, then what else the guest mounts or boots from."""
    root = system.part
    yield _volume(root, "/", system.options)
    taken = {"/"}
    count = 1
    for entry in system.fstab:
        part = resolve(entry.source, table.parts)
        if entry.mount_point in taken or entry.kind == "swap":
            continue
        role = ROLES.get(entry.mount_point)
        volume = None
        if part is root and root.kind == "btrfs":
            subvolume = ",".join(option for option in entry.options if option.startswith("subvol"))
            volume = _volume(root, entry.mount_point, subvolume)
        elif part and part is not root and part.kind in FILESYSTEMS and entry.mount_point.startswith(mounted):
            volume = _volume(part, entry.mount_point, "")
        elif not part and role in ("boot", "usr", "var"):
            log.warning(f"the guest mounts {entry.source} at {entry.mount_point}, which is not on this disk")
        if volume:
            if count == MOST_MOUNTED:
                log.warning(f"the guest has more than {count} filesystems: {entry.mount_point} and on are left out")
                break
            count += 1
            yield volume
        taken.add(entry.mount_point)
    for part in table.parts:
        if part.kind == "swap":
            yield Volume("swap", "swap", part.device, part.uuid)
        elif part.kind == "vfat" and part.type in ESP_TYPES:
            yield Volume("esp", "vfat", part.device, part.uuid)  # never mounted: a node may have no FAT driver
        elif part.type == XBOOTLDR and part.kind in FILESYSTEMS and "/boot" not in taken:
            yield _volume(part, "/boot", "")


def _volume(part: Part, mount_point: str, options: str) -> Volume:
    return Volume(ROLES.get(mount_point, "data"), part.kind, part.device, part.uuid, mount_point, options)
