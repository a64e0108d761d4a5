"""Find the guest's system on an attached disk, and where the guest mounts what else is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from imageos import log
from imageos.disks import btrfs, filesystem, fstab, mounting, partitions
from imageos.disks.blockdev import LoopDevice
from imageos.disks.filesystem import FILESYSTEMS, Volume
from imageos.disks.layout import GPT_TYPES, ROOT_TYPES, USR_TYPES
from imageos.disks.partitions import PHYSICAL, NoSystem, Part, Table
from imageos.errors import Failure
from imageos.guests import distribution, target

ESP_TYPES = (GPT_TYPES["esp"], "ef")
XBOOTLDR = "BC13C2FF-59E6-4262-A352-B275FD6F7172"  # /boot in the Discoverable Partitions Specification
ROLES = {"/": "root", "/boot": "boot", "/boot/efi": "esp", "/efi": "esp", "/usr": "usr", "/var": "var"}
MOST_MOUNTED = 64  # filesystems of a guest; those of an installer are a dozen at most
MOUNTED = ("/boot", "/usr", "/var")  # partitions of these, and what is below them, are part of the system
LACKS = "no /etc, or neither /usr nor /bin"
NOTHING = "nothing that is known"
UNSEEN = "cannot see whether the disk holds a system: {}"
UNSEEN_HINT = "NOMOUNT=yes deploys a disk image, and leaves a disk, without looking into it"
READ_ONLY_HINT = "stop the instance, and look at it without --read-only: its journal is replayed then"
# What a message says of a partition that is none of ours to read
UNREADABLE = {
    PHYSICAL: "LVM",
    "linux_raid_member": "a RAID member, which imageos does not read",
    "crypto_LUKS": "encrypted",
    "squashfs": "squashfs, which is read-only",
    "erofs": "erofs, which is read-only",
    "swap": "swap",
}


class NotSeen(Failure):
    """A filesystem or logical volume could not be looked at: it may hold a system, or a part of it."""


class NotReplayed(NotSeen):
    """A filesystem could not be looked at in its last state, since nothing may be written to its disk."""


class Found(NamedTuple):
    table: Table
    root: Part  # of several devices of one btrfs, that which can grow: the last on the disk
    volumes: tuple[Volume, ...]  # the root first
    is_whole: bool = True  # False: its programs are not on this disk
    is_replayed: bool = True  # False: the root's journal was not replayed, so all this may be outdated


class _System(NamedTuple):
    """A partition (or subvolume) that holds a system, with its fstab."""

    part: Part
    options: str
    entries: tuple[fstab.Entry, ...]  # of its fstab
    is_replayed: bool = True
    lacks_usr: bool = False  # its programs are not in its root
    is_whole: bool = True  # they are on this disk


def find(loop: LoopDevice, mounted: tuple[str, ...] = MOUNTED) -> Found:
    """Return the system on a disk, its partition nodes made; NoSystem lists what was seen if there is none.

    Of its other filesystems, those to be mounted at or below the directories `mounted`. On a disk that may be written
    to, what is looked at has its journal replayed.
    """
    return find_on(partitions.read(loop), mounted)


def find_on(table: Table, mounted: tuple[str, ...] = MOUNTED) -> Found:
    """As `find`, on partitions that have been read."""
    table = table._replace(parts=tuple(_replayed(part) for part in table.parts))
    system = _find_system(table)
    try:
        volumes = tuple(_volumes(table, system, mounted))
    except NotSeen as failure:
        if system.is_replayed:
            raise
        raise NotReplayed(str(failure), READ_ONLY_HINT) from None  # its fstab may be another
    for part in table.parts:
        if part.obstacle:
            log.info(f"{part} is left out: {part.obstacle}")
    if table.unread:
        log.info(table.unread)
    devices = filesystem.devices_of(system.part.device, system.part.kind)
    root = max((part for part in table.parts if part.device in devices), key=lambda part: part.start)
    return Found(table, root, volumes, system.is_whole, system.is_replayed)


def find_if_any(loop: LoopDevice, otherwise: str) -> Found | None:
    """As `find`; without a system return None, and log what was seen and, in `otherwise`, what that means."""
    try:
        return find(loop)
    except NoSystem as failure:
        for line in (*failure.details, f"{otherwise}: {failure}"):
            log.info(line)
        return None


def _replayed(part: Part) -> Part:
    """Return `part` as it is with its journal replayed: a label may be only there."""
    try:
        done = part.kind in FILESYSTEMS and mounting.replay(part.device, part.kind)
    except Failure as failure:
        log.debug(f"{part}: {failure}")  # who looks at it, or mounts it, gets the same and decides
        return part
    return partitions.probe([part])[0] if done else part


def describe(found: Found) -> list[str]:
    """Return what was found, for a message: `/ on partition 1 (ext4)`, `swap on partition 2`."""
    part_of = {part.device: part for part in found.table.parts}
    lines = []
    for volume in found.volumes:
        what = volume.mount_point or volume.role
        kind = ", ".join(word for word in (volume.kind, volume.options) if word not in ("", what))
        lines.append(f"{what} on {part_of[volume.device]}" + (f" ({kind})" if kind else ""))
    return lines


# --- the system ------------------------------------------------------------------------------------------


def _find_system(table: Table) -> _System:
    """Return the partition that a guest boots from: by its type in a gpt, or else by what it holds."""
    typed = [part for part in table.parts if part.type in ROOT_TYPES.values()]
    others = [part for part in table.parts if part not in typed]
    seen: dict[Part, str] = {}
    doubts: list[NotSeen] = []
    for candidates in (typed, others):
        systems: list[_System] = []
        for part in candidates:
            if any(_is_same(part, system.part) for system in systems):
                continue
            system = _look(part, seen, doubts)
            if system:
                systems.append(system._replace(is_whole=not system.lacks_usr or _has_usr(table, system)))
        if systems:
            return _choose(systems, table.parts)
        if doubts:  # whatever the other partitions hold, this may be the root
            break
    raise _no_root(table, seen, doubts)


def _choose(systems: Sequence[_System], parts: Sequence[Part]) -> _System:
    """Choose one of several that is no part of another: a whole one, then its own root, then the largest."""

    def rank(system: _System) -> tuple[bool, bool, int]:
        names = fstab.names_of_disk(system.entries, system.part)
        own = [fstab.resolve(entry.source, parts, names) for entry in system.entries if entry.mount_point == "/"]
        return system.is_whole, any(part and _is_same(part, system.part) for part in own), system.part.size

    if len(systems) > 1:
        devices = {system: filesystem.devices_of(system.part.device, system.part.kind) for system in systems}
        systems = [
            system
            for system in systems
            if not any(system.part.device in devices[other] for other in systems if other is not system)
        ]
    chosen = max(systems, key=rank)
    others = [str(system.part) for system in systems if system is not chosen]
    if others:
        log.warning(f"{chosen.part} is taken for the root; there is a system on {', '.join(others)}, too")
    return chosen


def _is_same(part: Part, other: Part) -> bool:
    """Return whether both hold one filesystem: a btrfs may have several devices."""
    return part is other or (part.kind == "btrfs" and (part.kind, part.uuid) == (other.kind, other.uuid))


def _look(part: Part, seen: dict[Part, str], doubts: list[NotSeen]) -> _System | None:
    """Return the system on a partition, or None, and note in `seen` what is there instead; in `doubts`, if that is not
    certain, why."""
    if part.kind not in FILESYSTEMS:
        seen[part] = part.obstacle or UNREADABLE.get(part.kind, part.kind or NOTHING)
        return None
    for options in _places_of_root(part):
        try:
            mount = mounting.mounted_somewhere(part.device, part.kind, read_only=True, options=options)
            with mount as (directory, is_replayed), target.opened(directory) as root:
                is_system = distribution.is_system(root)
                if is_system or (root.is_dir("/etc") and root.is_dir("/usr")):
                    entries = fstab.parse(root.read("/etc/fstab") or "")
                    return _System(part, options, entries, is_replayed, lacks_usr=not is_system)
                lacks = "OSTree makes its root when it boots" if root.is_dir("/ostree") else LACKS
                seen[part] = f"{part.kind} without a system ({lacks})"
                if not is_replayed:
                    seen[part] += f"; it {mounting.NOT_REPLAYED}"
                    why = f"the {part.kind} on {part} {mounting.NOT_REPLAYED}"
                    doubts.append(NotReplayed(UNSEEN.format(why), READ_ONLY_HINT))
        except btrfs.MountedTwice:
            raise
        except Failure as failure:
            seen.setdefault(part, f"{part.kind}: {failure}")
            if not options:  # a subvolume that is not there cannot be mounted either
                doubts.append(NotSeen(UNSEEN.format(f"{part}: {failure}"), failure.hint))
    return None


def _places_of_root(part: Part) -> Iterator[str]:
    """Yield the options that mount what may be the root: the default subvolume, usual ones, then any other."""
    usual = FILESYSTEMS[part.kind].subvolumes
    yield from ("", *usual)
    if usual:
        names: list[str] = []
        with (
            suppress(Failure),
            mounting.mounted_somewhere(part.device, part.kind, read_only=True, options="subvolid=5") as (top, _),
        ):
            names = btrfs.subvolumes(top)
        yield from (option for option in map("subvol={}".format, names) if option not in usual)


def _has_usr(table: Table, system: _System) -> bool:
    """Return whether the guest's /usr, which has all of its programs, is on this disk, too."""
    for volume in _volumes(table, system):
        if volume.mount_point == "/usr":
            mount = mounting.mounted_somewhere(volume.device, volume.kind, read_only=True, options=volume.options)
            with mount as (directory, _), target.opened(directory) as usr:
                return usr.is_dir("/bin")
    return False


def _no_root(table: Table, seen: dict[Part, str], doubts: Sequence[NotSeen]) -> Failure:
    why = _unseen(table)
    kind, hint = (NotSeen, table.remedy or UNSEEN_HINT) if why else (NoSystem, None)
    if len(table.parts) == 1 and not (table.kind or doubts):
        why = why or seen[table.parts[0]]
        return kind(f"no root filesystem found on the disk, which has no partition table: {why}", hint)
    lines = []
    for part in table.parts[:12]:
        label = f", label {part.label}" if part.label else ""
        size = f" {log.size(part.size)}{label}:" if part.size else ""
        lines.append(f"{part}:{size} {seen.get(part, part.kind or NOTHING)}")
    if len(table.parts) > len(lines):
        lines.append(f"and {len(table.parts) - len(lines)} more")
    if doubts:
        doubt = next((doubt for doubt in doubts if isinstance(doubt, NotReplayed)), doubts[0])  # the others are known
        doubt.details = tuple(lines)
        return doubt
    count = len(table.partitions)
    what = f"{count} partition{'s' * (count != 1)}" if table.kind else "no partition table"
    count = len(table.parts) - count
    what += f" and {count} logical volume{'s' * (count != 1)}" if count else ""
    message = f"no root filesystem found on the disk ({what}, listed above)"
    return kind(f"{message}: {why}" if why else message, hint, lines)


def _unseen(table: Table) -> str:
    """Return why something may be on a logical volume that is not seen; empty if all of them are."""
    odd = next((part for part in table.parts if part.obstacle), None)
    return f"{odd} cannot be read: {odd.obstacle}" if odd else table.unread


def _volumes(table: Table, system: _System, mounted: tuple[str, ...] = MOUNTED) -> Iterator[Volume]:
    """Yield the root, then what else the guest mounts or boots from."""
    root = system.part
    yield _volume(root, "/", system.options)
    taken = {"/"}
    used = [root]
    count = 1
    names = fstab.names_of_disk(system.entries, root)
    unknown: list[str] = []
    for entry in system.entries:
        part = fstab.resolve(entry.source, table.parts, names)
        part = root if part and _is_same(part, root) else part
        if entry.mount_point in taken or entry.kind == "swap":
            continue
        role = ROLES.get(entry.mount_point)
        row = FILESYSTEMS.get(part.kind) if part else None
        volume = None
        if part and row and (row.subvolumes if part is root else entry.mount_point.startswith(mounted)):
            options = entry.options if row.subvolumes else ()
            subvolume = ",".join(option for option in options if option.startswith("subvol"))
            volume = _volume(part, entry.mount_point, subvolume)
        elif fstab.disk_of(entry.source) and not part:
            unknown += [f"{entry.source} at {entry.mount_point}"] if entry.mount_point.startswith(mounted) else []
        elif role in ("boot", "usr", "var") and not (part and part.device):
            _check_elsewhere(table, entry, part)
        if volume:
            if count == MOST_MOUNTED:
                log.warning(f"the guest has more than {count} filesystems: {entry.mount_point} and on are left out")
                break
            count += 1
            used += [part] if part else []
            yield volume
        taken.add(entry.mount_point)
    if unknown:
        log.warning(f"left out, as they may be on another disk: the guest mounts {log.few(unknown)}")
    for part in table.parts:
        if part.kind == "swap":
            yield Volume("swap", "swap", part.device, part.uuid)
        elif part.kind == "vfat" and part.type in ESP_TYPES:
            yield Volume("esp", "vfat", part.device, part.uuid)  # never mounted: a node may have no FAT driver
        elif part.type == XBOOTLDR and part.kind in FILESYSTEMS and "/boot" not in taken:
            yield _volume(part, "/boot", "")
        elif part.type in USR_TYPES and part.kind in FILESYSTEMS and system.lacks_usr and "/usr" not in taken:
            taken.add("/usr")
            yield _volume(part, "/usr", "")
        elif part not in used and any(_is_same(part, other) for other in used):
            yield Volume("member", part.kind, part.device, part.uuid)


def _check_elsewhere(table: Table, entry: fstab.Entry, part: Part | None) -> None:
    """Fail if a filesystem that the system needs is, or may be, on a logical volume that cannot be mounted."""
    why = f"{part} cannot be read: {part.obstacle}" if part else _unseen(table)
    if part or (why and entry.source.count("/") != 2):  # unlike /dev/sdb1
        why = f"the guest's {entry.mount_point} ({entry.source}) is not found: {why}"
        raise NotSeen(why, table.remedy or UNSEEN_HINT)
    log.warning(f"the guest mounts {entry.source} at {entry.mount_point}, which is not on this disk")


def _volume(part: Part, mount_point: str, options: str) -> Volume:
    return Volume(ROLES.get(mount_point, "data"), part.kind, part.device, part.uuid, mount_point, options)
