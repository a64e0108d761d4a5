"""Judge the headers of VMDK, VDI, VHD and VHDX images before qemu-img(1) sees the file, and find where they must end.

All of these formats let an image name other files, which qemu-img would open on the node and copy into the guest.
Formats: Virtual Disk Format 5.0 of VMware, VDICore.h of VirtualBox, Virtual Hard Disk Image Format Specification and
[MS-VHDX] of Microsoft; and what qemu-img makes of them, in block/ of QEMU.
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Iterable
from typing import NamedTuple

from imageos.errors import Failure
from imageos.images.words import Cut, Read, words

SECTOR, MIB = 512, 1 << 20
LARGEST = 1 << 60  # bytes of a disk, or of an offset: sums with it stay harmless
DAMAGED = "its header is damaged"
FLATTEN = "qemu-img convert -O qcow2 OLD NEW makes an image that stands on its own"


class Unit(NamedTuple):
    """A table's entry: where in the file a unit of the disk begins, in bytes, and which unit that is."""

    offset: int
    number: int


def _end(units: Iterable[Unit], unit_size: int, disk_size: int) -> int:
    """Return where the last unit ends in the file; the last one of the disk need not be whole."""
    return max((unit.offset + max(0, min(unit_size, disk_size - unit.number * unit_size)) for unit in units), default=0)


def _fields(layout: str, read: Read, offset: int) -> tuple[int, ...]:
    """Return the integers at an offset; Cut if the file ends before."""
    size = struct.calcsize(layout)
    data = read(offset, size) if offset < LARGEST else b""
    if len(data) < size:
        raise Cut(offset + size)
    return struct.unpack(layout, data)


def _sound(is_sound: bool) -> None:
    if not is_sound:
        raise Failure(DAMAGED)


# VMDK

VMDK_MAGIC = b"KDMV"
VMDK_AT_END = (1 << 64) - 1  # of the grain directory: a copy of the header behind the data says where it is
VMDK_COMPRESSED, VMDK_MARKERS = 1 << 16, 1 << 17
VMDK_TYPES = ("monolithicSparse", "streamOptimized")
VMDK_DESCRIPTOR = SECTOR  # its place
LONGEST_DESCRIPTOR = 1 << 20  # bytes
MOST_TABLE_ENTRIES = 512  # as QEMU


class Vmdk(NamedTuple):
    flags: int
    size: int  # of the disk, as all below in bytes
    grain: int
    descriptor: int
    entries: int  # of a grain table
    directory: int


def _vmdk(read: Read, offset: int = 0) -> Vmdk:
    (magic, _, flags, capacity, grain, descriptor, _, entries, _, directory,
     *_) = _fields("<IIIQQQQIQQQ", read, offset)  # fmt: skip
    _sound(magic == int.from_bytes(VMDK_MAGIC, "little"))
    _sound(max(capacity, grain, descriptor) < LARGEST // SECTOR)
    _sound(0 < grain * SECTOR <= 64 << 20 and 0 < entries <= MOST_TABLE_ENTRIES)
    return Vmdk(
        flags,
        capacity * SECTOR,
        grain * SECTOR,
        descriptor * SECTOR,
        entries,
        directory if directory == VMDK_AT_END else directory * SECTOR,
    )


def vmdk_size(read: Read, _file_size: int) -> int:
    header = _vmdk(read)
    # Without a capacity the descriptor alone counts, and may name any file.
    _sound(header.size > 0)
    if header.descriptor != VMDK_DESCRIPTOR:
        raise Failure("it has no descriptor of its own behind its header")
    # Where, and how long, QEMU takes it to be, whatever the header says
    text = read(VMDK_DESCRIPTOR, LONGEST_DESCRIPTOR).partition(b"\0")[0]
    lines = text.decode("utf-8", "replace").splitlines()
    pairs = (line.partition("=") for line in lines)
    values = {key.strip(): value.strip().removeprefix('"').removesuffix('"') for key, _, value in pairs}
    extents = [line.split() for line in lines if re.match(r"\s*(RW|RDONLY|NOACCESS)\b", line)]
    # QEMU does not mind what is before the name of the parent.
    if values.get("parentCID", "ffffffff").lower() != "ffffffff" or b"parentFileNameHint" in text:
        raise Failure("it is only the difference to another file (it has a parent)", hint=FLATTEN)
    kind = values.get("createType", "")
    if kind not in VMDK_TYPES or len(extents) != 1 or extents[0][2:3] != ["SPARSE"]:
        raise Failure(f"its data may be in other files (a VMDK of type {kind!r})", hint=FLATTEN)
    return header.size


def vmdk_end(read: Read, file_size: int) -> int:
    header = _vmdk(read)
    if header.directory == VMDK_AT_END:
        footer = file_size - 2 * SECTOR  # the mark of the end follows
        if read(footer, 4) != VMDK_MAGIC:
            raise Cut(file_size + 1)
        header = _vmdk(read, footer)
    tables = -(-header.size // (header.entries * header.grain))
    units: list[Unit] = []
    seen, least = set(), 0
    for number, sector in words(read, header.directory, tables, 4, "little"):
        if sector in seen:
            continue
        seen.add(sector)
        # 1 stands for zeroes
        least = max(least, sector * SECTOR + 4 * header.entries)
        grains = words(read, sector * SECTOR, header.entries, 4, "little")
        units += sorted(Unit(at * SECTOR, number * header.entries + index) for index, at in grains if at > 1)[-1:]
    if not header.flags & VMDK_COMPRESSED:
        return max(least, _end(units, header.grain, header.size))
    last = max(units, default=None)
    if not last:
        return least
    if not header.flags & VMDK_MARKERS:
        return max(least, last.offset + 1)
    _, length = _fields("<QI", read, last.offset)
    return max(least, last.offset + 12 + length)


# VDI

VDI_MAGIC = b"\x7f\x10\xda\xbe"
VDI_PLACE = 0x40
VDI_UNUSED, VDI_ZEROES = 0xFFFFFFFF, 0xFFFFFFFE  # in the place of a block's number
VDI_DYNAMIC, VDI_STATIC = 1, 2


def _vdi(read: Read) -> tuple[int, ...]:
    """Return the offsets of the map and of the data, the sizes of disk and block, and the number of blocks."""
    (kind,) = _fields("<I", read, 0x4C)
    table, data = _fields("<II", read, 0x154)
    size, block, extra, count = _fields("<QIII", read, 0x170)
    if kind not in (VDI_DYNAMIC, VDI_STATIC) or any(read(0x1A8, 32)):  # uuidLink and uuidParent
        raise Failure("it is only the difference to another file (it has a parent)", hint=FLATTEN)
    _sound(block >= SECTOR and not extra and size <= LARGEST and size <= count * block)
    return table, data, size, block, count


def vdi_size(read: Read, _file_size: int) -> int:
    return _vdi(read)[2]


def vdi_end(read: Read, _file_size: int) -> int:
    table, data, size, block, _ = _vdi(read)
    count = -(-size // block)
    numbers = words(read, table, count, 4, "little", VDI_UNUSED)
    units = (Unit(data + number * block, index) for index, number in numbers if number != VDI_ZEROES)
    return max(table + 4 * count, _end(units, block, size))


# VHD

VHD_MAGIC = b"conectix"
VHD_FIXED, VHD_DYNAMIC = 2, 3
VHD_UNUSED = 0xFFFFFFFF


def _vhd(read: Read, file_size: int) -> tuple[int, ...]:
    """Return where the dynamic header is, the bytes of the disk, and the kind."""
    # the footer; of a dynamic image a copy of it comes first
    offset = 0 if read(0, len(VHD_MAGIC)) == VHD_MAGIC else max(0, file_size - SECTOR)
    header, size, kind = _fields(">Q24xQ4xI", read, offset + 16)
    if kind not in (VHD_FIXED, VHD_DYNAMIC):
        raise Failure("it is only the difference to another file (it has a parent)", hint=FLATTEN)
    _sound(size <= LARGEST)
    return header, size, kind


def vhd_size(read: Read, file_size: int) -> int:
    return _vhd(read, file_size)[1]


def vhd_end(read: Read, file_size: int) -> int:
    header, size, kind = _vhd(read, file_size)
    if kind == VHD_FIXED:
        return size + SECTOR
    table, _, entries, block = _fields(">QIII", read, header + 16)
    _sound(SECTOR <= block <= LARGEST and block % SECTOR == 0 and table < LARGEST and entries * block >= size)
    count = -(-size // block)
    bitmap = -(-(block // SECTOR) // 8 // SECTOR) * SECTOR
    last = max((at for _, at in words(read, table, count, 4, "big", VHD_UNUSED)), default=0)
    end = last * SECTOR + bitmap + block if last else table + 4 * count
    return end + SECTOR  # the footer


# VHDX

VHDX_MAGIC = b"vhdxfile"
VHDX_REGIONS = 0x30000
VHDX_BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le
VHDX_METADATA = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
VHDX_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
VHDX_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
VHDX_SECTOR = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F").bytes_le
VHDX_PRESENT = (6, 7)  # states of a block
VHDX_HAS_PARENT = 2
MOST_ITEMS = 2047


def _vhdx_items(read: Read, offset: int, head: str, magic: bytes) -> dict[bytes, int]:
    """Return where each region, or item of metadata, is: its identifier -> offset."""
    _sound(read(offset, len(magic)) == magic)
    (count,) = _fields(head, read, offset)
    _sound(count <= MOST_ITEMS)
    layout = "<16sQ" if magic == b"regi" else "<16sI"
    first = offset + (16 if magic == b"regi" else 32)
    items = {}
    for number in range(count):
        data = read(first + 32 * number, struct.calcsize(layout))
        if len(data) < struct.calcsize(layout):
            raise Cut(first + 32 * count)
        identifier, place = struct.unpack(layout, data)
        _sound(place < LARGEST)
        items[identifier] = place
    return items


def _vhdx(read: Read) -> tuple[int, int, int, int]:
    """Return where the table of blocks is, the sizes of disk and block, and how many blocks a chunk has."""
    regions = _vhdx_items(read, VHDX_REGIONS, "<8xI", b"regi")
    _sound(VHDX_BAT in regions and VHDX_METADATA in regions)
    metadata = regions[VHDX_METADATA]
    items = _vhdx_items(read, metadata, "<10xH", b"metadata")
    _sound(all(item in items for item in (VHDX_PARAMETERS, VHDX_SIZE, VHDX_SECTOR)))
    block, flags = _fields("<II", read, metadata + items[VHDX_PARAMETERS])
    (size,) = _fields("<Q", read, metadata + items[VHDX_SIZE])
    (sector,) = _fields("<I", read, metadata + items[VHDX_SECTOR])
    if flags & VHDX_HAS_PARENT:
        raise Failure("it is only the difference to another file (it has a parent)", hint=FLATTEN)
    _sound(MIB <= block <= 256 * MIB and block % MIB == 0 and size <= LARGEST and sector in (512, 4096))
    return regions[VHDX_BAT], size, block, (sector << 23) // block


def vhdx_size(read: Read, _file_size: int) -> int:
    return _vhdx(read)[1]


def vhdx_end(read: Read, _file_size: int) -> int:
    table, size, block, chunk = _vhdx(read)
    count = -(-size // block)
    count += (count - 1) // chunk if count else 0  # behind each chunk is the entry of its bitmap
    units = (
        Unit(value >> 20 << 20, index - index // (chunk + 1))
        for index, value in words(read, table, count, 8, "little")
        if index % (chunk + 1) != chunk and value & 7 in VHDX_PRESENT
    )
    return max(table + 8 * count, _end(units, block, size))
