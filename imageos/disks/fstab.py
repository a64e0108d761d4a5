"""fstab(5): that of a guest on volumes that we made, and what a guest's own means on its disk."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from imageos.disks.filesystem import FILESYSTEMS, MADE, Volume
from imageos.disks.partitions import Part
from imageos.node.mounts import unescape

# udev's links to a partition: a name of its disk, and its number
PARTITION_LINK = re.compile(r"/dev/disk/by-((?:id|path)/.+)-part(\d{1,3})")
SYSTEM = ("/boot", "/boot/efi", "/usr")
# On the image's disk, too, or of its hypervisor: a boot would end where it cannot be mounted
OF_MACHINE = ("zfs", "9p", "virtiofs", "vboxsf", "fuse.vmhgfs-fuse")
MOST_IDS = 64  # each is looked for in many files


class Entry(NamedTuple):
    source: str
    mount_point: str
    kind: str
    options: tuple[str, ...]


def render(volumes: Iterable[Volume]) -> str:
    rows = [("# <filesystem>", "<mount point>", "<type>", "<options>", "<dump>", "<pass>")]
    order = ["root", "boot", "esp", "swap"]
    for volume in sorted(volumes, key=lambda volume: order.index(volume.role)):
        source = f"UUID={volume.uuid}"
        if volume.role == "swap":
            rows.append((source, "none", "swap", "sw", "0", "0"))
        elif volume.role == "esp":
            # nofail: a guest without a FAT driver still boots (from BIOS)
            rows.append((source, "/boot/efi", "vfat", "umask=0077,nofail", "0", "1"))
        else:
            filesystem = FILESYSTEMS[volume.kind]
            is_root = volume.role == "root"
            options = filesystem.root_options if is_root else "defaults"
            check = "0" if not filesystem.check_pass else "1" if is_root else "2"
            rows.append((source, MADE[volume.role], volume.kind, options, "0", check))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["".join(cell.ljust(width + 1) for cell, width in zip(row, widths)) + row[5] for row in rows]
    return "\n".join(["# /etc/fstab: written by imageos", *lines]) + "\n"


def others(text: str) -> Iterator[tuple[str, str]]:
    """Yield (line, first field) of what any machine has: tmpfs, network, a swap file."""
    for line in text.splitlines():
        source, mount_point, kind, *_ = (*line.split(), "", "", "")
        is_entry = kind and not source.startswith("#")
        if is_entry and not names_device(source) and mount_point != "/" and kind not in OF_MACHINE:
            yield line, unescape(source)


def names_device(source: str) -> bool:
    """Return whether the first field of an fstab line names a device, not a server, a file or nothing real."""
    return source.startswith("/dev/") or "=" in source


def names_file(source: str) -> bool:
    """Return whether it names a file or directory of the guest: swap in a file, a bind mount."""
    return source.startswith("/") and not source.startswith(("/dev/", "//"))


def ids(entries: Iterable[Entry]) -> list[str]:
    """Return what entries call their devices by, where that is no name that other machines have as well."""
    uuids = [entry.source.partition("=")[2].strip("\"'") for entry in entries if "UUID=" in entry.source]
    links = [
        os.path.basename(entry.source) for entry in entries if re.match("/dev/disk/by-(part)?(uu)?id/", entry.source)
    ]
    return [name for name in dict.fromkeys((*uuids, *links)) if len(name) > 7][:MOST_IDS]


def parse(text: str) -> tuple[Entry, ...]:
    """Return the entries of an fstab(5) that mount something, in its order, without those that make no sense."""
    entries = []
    for line in text.splitlines():
        fields = [unescape(field) for field in line.split()]
        if len(fields) < 3 or fields[0].startswith("#") or any("\0" in field for field in fields):
            continue
        source, mount_point, kind = fields[:3]
        if mount_point.startswith("/") and not {".", ".."} & set(mount_point.split("/")):
            options = fields[3].split(",") if len(fields) > 3 else []
            entries.append(Entry(source, os.path.normpath("/" + mount_point.strip("/")), kind, tuple(options)))
    return tuple(entries)


def disk_of(source: str) -> str:
    """Return which disk a link to a partition names, as `id/NAME` or `path/NAME`; empty if it is no such link."""
    link = PARTITION_LINK.fullmatch(source)
    return link[1] if link else ""


def names_of_disk(entries: Iterable[Entry], root: Part) -> set[str]:
    """Return the names, as `disk_of` does, of the disk that the partition `root` is on.

    Nothing on the disk says what they are. So that of the root counts, and one by which a part of the system is named
    where links of its kind (by-id, by-path) name no other disk.
    """
    links = {entry.mount_point: entry.source for entry in entries if disk_of(entry.source)}
    of_root = links.get("/", "")
    if of_root and not of_root.endswith(f"-part{root.number}"):
        return set()  # this fstab is of another disk
    disks = {disk_of(source) for source in links.values()}
    of_system = {disk_of(links[point]) for point in SYSTEM if point in links}
    alone = {name for name in of_system if sum(name[:2] == disk[:2] for disk in disks) == 1}
    return alone | ({disk_of(of_root)} if of_root else set())


def resolve(source: str, parts: Sequence[Part], names: Collection[str] = ()) -> Part | None:
    """Return the partition that the first field of an fstab line means; None if it is not on this disk.

    `names` are those of the disk in links to its partitions.

    Of kernel names (/dev/vda1, /dev/sda1, /dev/nvme0n1p1) only the number counts: the disk changes its name.
    """
    volume = next((part for part in parts if part.volume and source in _volume_nodes(part)), None)
    if volume:
        return volume
    link = re.fullmatch(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.*)", source)
    tag, separator, value = source.partition("=")
    if link:
        tag, separator, value = link[1].upper(), "=", link[2]
    if separator:
        attribute = {"UUID": "uuid", "LABEL": "label", "PARTUUID": "partuuid", "PARTLABEL": "name"}.get(tag)
        value = value.strip("\"'")
        folded = str.lower if tag in ("UUID", "PARTUUID") else str
        matching = (part for part in parts if attribute and folded(getattr(part, attribute)) == folded(value))
        return next(matching, None) if value else None
    node = re.fullmatch(r"/dev/(?:(?:[shv]d|xvd)a|(?:nvme0n1|mmcblk0|(?:cciss|ida|rd)/c0d0)p)(\d{1,3})", source)
    to_partition = PARTITION_LINK.fullmatch(source)
    number = node[1] if node else to_partition[2] if to_partition and to_partition[1] in names else "0"
    return next((part for part in parts if part.number == int(number) > 0), None)


def _volume_nodes(part: Part) -> tuple[str, ...]:
    """Return the nodes of a logical volume in the guest's /dev; device-mapper joins both names, and both UUIDs.

    Ubuntu's installer writes that of the UUIDs.
    """
    mapped = "-".join(name.replace("-", "--") for name in part.volume.split("/"))
    by_id = (f"/dev/disk/by-id/dm-{identity}" for identity in (f"name-{mapped}", f"uuid-LVM-{part.volume_id}"))
    return f"/dev/{part.volume}", f"/dev/mapper/{mapped}", *by_id
