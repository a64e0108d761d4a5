"""Partitions as values: what we intend, and the sfdisk script that makes it so. Pure.

Sizes and offsets are bytes, aligned to 1 MiB.
"""

from __future__ import annotations

import uuid
from typing import NamedTuple

from imageos.errors import Failure
from imageos.log import size as readable

MIB = 1 << 20
SECTOR = 512  # what the guest sees under KVM and Xen, and what our loop devices have

# Role -> partition type: one byte in an msdos table, a GUID in a gpt (UEFI specification, and the
# Discoverable Partitions Specification of systemd for the root).
MSDOS_TYPES = {"boot": "83", "swap": "82", "root": "83"}
GPT_TYPES = {
    "bios": "21686148-6449-6E6F-744E-656564454649",
    "esp": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "boot": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "swap": "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F",
    "root": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
}
ROOT_TYPES = {
    "x86_64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "x86": "44479540-F297-41B2-9AF7-D131D5F0458A",
    "aarch64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
}
USR_TYPES = (
    "8484680C-9521-48C6-9C11-B0720656F69E",  # x86_64
    "75250D76-8CC6-458E-BD66-BD47CC81A812",  # x86
    "B0E01050-EE5F-4390-949A-9101B17104E9",  # aarch64
)
GPT_BACKUP = 33 * SECTOR  # bytes of the second gpt, at the end of a disk, as sfdisk(8) makes it
BIOS_SIZE = 1 * MIB
ESP_SIZE = 128 * MIB  # the least that every mkfs.vfat makes a FAT32 of with room for two loaders


class Partition(NamedTuple):
    number: int
    role: str  # bios, esp, boot, swap or root
    start: int
    size: int
    type: str
    bootable: bool = False


class Layout(NamedTuple):
    table: str  # msdos or gpt
    disk_id: str
    partitions: tuple[Partition, ...]

    def find(self, role: str) -> Partition | None:
        return next((partition for partition in self.partitions if partition.role == role), None)


def plan(table: str, disk_size: int, *, boot: int, swap: int, arch: str, smallest_root: int) -> Layout:
    """Return the layout for a disk of `disk_size` bytes; `boot` and `swap` are 0 for none.

    Fail if less than `smallest_root` is left for the root filesystem, or if the table cannot address the disk.
    """
    sizes = {"boot": _align_up(boot), "swap": _align_up(swap)}
    if table == "gpt":
        sizes = {"bios": BIOS_SIZE, "esp": ESP_SIZE, **sizes}
    sizes = {role: size for role, size in sizes.items() if size}
    end = (disk_size - (GPT_BACKUP if table == "gpt" else 0)) // MIB * MIB
    start = MIB
    root = end - start - sum(sizes.values())
    if root < smallest_root:
        raise _too_small(disk_size, sizes, root, smallest_root)
    if table == "msdos" and end > (1 << 32) * SECTOR:
        raise Failure(
            f"an msdos partition table cannot address a disk of {readable(disk_size)}", hint="set PARTITION_TABLE=gpt"
        )
    types = MSDOS_TYPES if table == "msdos" else {**GPT_TYPES, "root": ROOT_TYPES.get(arch, GPT_TYPES["root"])}
    active = "boot" if "boot" in sizes else "root"
    partitions = []
    for number, (role, size) in enumerate([*sizes.items(), ("root", root)], 1):
        partitions.append(
            Partition(number, role, start, size, types[role], bootable=table == "msdos" and role == active)
        )
        start += size
    return Layout(table, _disk_id(table), tuple(partitions))


def sfdisk_script(layout: Layout) -> str:
    """Return the input of sfdisk(8) that makes `layout`."""
    label = "dos" if layout.table == "msdos" else "gpt"
    lines = [f"label: {label}", f"label-id: {layout.disk_id}", "unit: sectors"]
    for part in layout.partitions:
        bootable = ", bootable" if part.bootable else ""
        lines.append(
            f"{part.number} : start={part.start // SECTOR}, size={part.size // SECTOR}, type={part.type}{bootable}"
        )
    return "\n".join(lines) + "\n"


def _too_small(disk_size: int, sizes: dict[str, int], root: int, smallest_root: int) -> Failure:
    others = " + ".join(f"{role} {readable(size)}" for role, size in sizes.items())
    return Failure(
        f"the disk of {readable(disk_size)} is too small: {others or 'the partition table'} leaves "
        f"{readable(max(root, 0))} for /, which needs {readable(smallest_root)}",
        hint="make the disk larger, or set a smaller SWAP_SIZE (default: the instance's memory) or SWAP=no",
    )


def _disk_id(table: str) -> str:
    unique = uuid.uuid4()
    return str(unique).upper() if table == "gpt" else f"0x{unique.int & 0xFFFFFFFF or 1:08x}"


def _align_up(count: int) -> int:
    return -(-count // MIB) * MIB
