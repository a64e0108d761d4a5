"""Tell from the first MiB of a disk how large it is at least, and where its partitions begin. Pure.

A smaller image of it is truncated.

Sources: UEFI specification 5.3 (GPT), ECMA-119 8.4.8 (ISO 9660), lib/label/label.h and format_text/layout.h of LVM2,
include/linux/swap.h of the kernel, and for the filesystems those of disks.superblock. What makes no sense demands
nothing.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence

from imageos.disks import superblock
from imageos.disks.ext import Read
from imageos.disks.layout import SECTOR

GPT_SECTORS = (SECTOR, 4096)  # bytes; a disk of 4 KiB sectors has its table elsewhere
GPT_HEADER = struct.Struct("<8s4sII4xQQQQ16sQIII")  # 92 bytes
MOST_ENTRIES = 1024  # of a GPT, each of
LARGEST_ENTRY = 4096  # bytes
PROTECTIVE = 0xEE
# Boot sectors of filesystems, which end like a partition table: offset, text
BOOT_SECTORS = ((3, b"NTFS    "), (3, b"EXFAT   "), (0x36, b"FAT1"), (0x36, b"FAT     "), (0x52, b"FAT32   "))
ISO_DESCRIPTOR = 16 * 2048
SWAP_MAGIC = b"SWAPSPACE2"  # at the end of the first page
SWAP_PAGES = (4096, 8192, 16384, 65536)  # bytes, as kernels have them
EXTENDED = (0x05, 0x0F, 0x85)  # types that only hold logical partitions
MOST_LOGICAL = 64
MOST_PARTITIONS = 128  # as many as a usual GPT has room for


def least_size(begin: bytes) -> int:
    """Return the bytes that a disk which begins so has at least; 0 if that cannot be told.

    A GPT demands room for its partitions, but not for its backup: growing makes a new one.
    """
    # An ISO image that boots from a USB stick has partition tables, too, often rounded up.
    size = _of_iso(begin) or max((end for _, end in (*_of_gpt(begin),) or _of_msdos(begin)), default=0)
    return size or max(size_of(lambda offset, count: begin[offset : offset + count]) for size_of in FILESYSTEMS)


def places(read: Read, begin: bytes) -> list[tuple[int, int]]:
    """Return where each partition of a disk that begins so starts and ends, logical ones, too; none without a table."""
    found = [*_of_gpt(begin)]
    for kind, start, end in [] if found else _msdos(begin):
        found += _logical(read, start) if kind in EXTENDED else [(start, end)]
    return found


def is_odd(places: Sequence[tuple[int, int]], begin: bytes, size: int) -> bool:
    """Return whether these partitions of a disk of `size` bytes may be refused: they overlap, or the table is odd."""
    in_order = sorted(places)
    overlap = any(end > following for (_, end), (following, _) in zip(in_order, in_order[1:]))
    large_sectors = bool(places) and begin.startswith(b"EFI PART", GPT_SECTORS[1])
    outside = any(not SECTOR <= start < end <= size for start, end in places)
    return overlap or outside or large_sectors or len(places) > MOST_PARTITIONS


def _logical(read: Read, first: int) -> Iterator[tuple[int, int]]:
    """Follow the chain of tables in an extended partition: each has a partition, and where the next table is.

    Yield what no partition can be for a chain without an end. It may go back: an installer puts new ones at its end.
    """
    table, seen = first, set[int]()
    while table not in seen and len(seen) < MOST_LOGICAL:
        seen.add(table)
        following = 0
        for kind, start, end in _msdos(read(table, SECTOR)):
            if kind in EXTENDED:
                following = first + start
            else:
                yield table + start, table + end
        if not following:
            return
        table = following
    yield table, table


def _of_iso(begin: bytes) -> int:
    descriptor = begin[ISO_DESCRIPTOR : ISO_DESCRIPTOR + 2048]
    if descriptor[:6] != b"\1CD001" or len(descriptor) < 2048:
        return 0
    blocks, block = struct.unpack_from("<I", descriptor, 80)[0], struct.unpack_from("<H", descriptor, 128)[0]
    return int(blocks * block)


def _entries(begin: bytes) -> list[tuple[int, int, int, int]]:
    """Return the four entries of an msdos table: boot indicator, type, start and count of sectors."""
    if begin[510:512] != b"\x55\xaa":
        return []
    return [struct.unpack_from("<B3xB3xII", begin, 446 + 16 * number) for number in range(4)]


def _of_gpt(begin: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each partition begins and ends."""
    if not any(kind == PROTECTIVE for _, kind, *_ in _entries(begin)):
        return  # what is left of an older table
    for sector in GPT_SECTORS:
        block = begin[sector : sector + sector]
        if not block.startswith(b"EFI PART") or len(block) < sector:
            continue
        _, _, length, checksum, _, _, _, _, _, table, count, entry_size, _ = GPT_HEADER.unpack_from(block)
        zeroed = block[:16] + bytes(4) + block[20:length]
        if not GPT_HEADER.size <= length <= sector or zlib.crc32(zeroed) != checksum:
            continue
        if count > MOST_ENTRIES or not 128 <= entry_size <= LARGEST_ENTRY:
            continue
        for offset in range(table * sector, table * sector + count * entry_size, entry_size):
            entry = begin[offset : offset + 48]
            if len(entry) == 48 and any(entry[:16]):
                first, last = struct.unpack_from("<QQ", entry, 32)
                yield first * sector, (last + 1) * sector


def _of_msdos(begin: bytes) -> Iterator[tuple[int, int]]:
    yield from ((start, end) for _, start, end in _msdos(begin))


def _msdos(begin: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the type of each partition, and where it begins and ends."""
    entries = _entries(begin)
    if any(begin.startswith(text, offset) for offset, text in BOOT_SECTORS):
        return
    if any(boot not in (0, 0x80) for boot, *_ in entries) or any(kind == PROTECTIVE for _, kind, *_ in entries):
        return
    for _, kind, start, count in entries:
        if kind and count:
            yield kind, start * SECTOR, (start + count) * SECTOR


def _of_lvm(read: Read) -> int:
    for sector in range(4):
        label = read(sector * SECTOR, SECTOR)
        if label.startswith(b"LABELONE") and label[24:32] == b"LVM2 001":
            return int(struct.unpack_from("<Q", label.ljust(SECTOR, b"\0"), 32 + 32)[0])
    return 0


def _of_ntfs(read: Read) -> int:
    begin = read(0, SECTOR)
    if begin[3:11] != b"NTFS    " or len(begin) < SECTOR:
        return 0
    return int((struct.unpack_from("<Q", begin, 0x28)[0] + 1) * struct.unpack_from("<H", begin, 11)[0])


def _of_swap(read: Read) -> int:
    for page in SWAP_PAGES:
        if read(page - len(SWAP_MAGIC), len(SWAP_MAGIC)) == SWAP_MAGIC:
            return int((struct.unpack("<I", read(1024 + 4, 4))[0] + 1) * page)
    return 0


FILESYSTEMS: tuple[Callable[[Read], int], ...] = (
    *(superblock.ext_size, superblock.xfs_size, superblock.btrfs_size),
    *(_of_lvm, _of_ntfs, _of_swap),
)
