"""Read the blocks that an ext2, ext3 or ext4 filesystem calls used from its bitmaps.

Pure, and without a program of e2fsprogs: the filesystem is somebody else's, and what is read here is plain numbers.
Layout: Documentation/filesystems/ext4 of the kernel. What is not understood, or does not add up, is `Doubtful`: then
the caller has to take every block for used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

SUPERBLOCK = 1024  # its offset and its size
MAGIC = 0xEF53
VALID, ERRORS = 1, 2  # s_state

COMPAT_SPARSE_SUPER2 = 0x200
INCOMPAT_RECOVER, INCOMPAT_META_BG, INCOMPAT_64BIT = 0x4, 0x10, 0x80
# filetype, extents, mmp, flex_bg, ea_inode, dirdata, csum_seed, largedir, inline_data, encrypt, casefold
INCOMPAT_KNOWN = INCOMPAT_META_BG | INCOMPAT_64BIT | 0x2 | 0x40 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x3E000
RO_SPARSE_SUPER, RO_GDT_CSUM, RO_METADATA_CSUM = 0x1, 0x10, 0x400
# large_file, btree_dir, huge_file, dir_nlink, extra_isize, quota, readonly, project, verity, orphan_present;
# not bigalloc, whose bitmaps count clusters, nor snapshot, replica and shared_blocks
RO_KNOWN = RO_SPARSE_SUPER | RO_GDT_CSUM | RO_METADATA_CSUM | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x100 | 0x1B000
BG_BLOCK_UNINIT = 0x2
_LOW, _HIGH = struct.Struct("<IIIHHHH"), struct.Struct("<IIIH")  # of a group's descriptor; the second is at 0x20
LEAST_GROUP = 8192  # blocks: what mke2fs makes of the smallest blocks

Read = Callable[[int, int], bytes]  # offset within the filesystem, count


class Doubtful(Exception):
    """The bitmaps cannot be trusted; the message says why."""


class Superblock(NamedTuple):
    blocks: int
    first: int  # block number of the first group
    block_size: int
    group_size: int  # blocks
    inode_table: int  # blocks of one group's
    descriptor_size: int
    first_meta_group: int  # from this block of descriptors on they are spread over the disk
    reserved: int  # blocks for more descriptors
    has_flags: bool  # whether flags of a group mean anything
    sparse: bool
    backups: tuple[int, int] | None

    @property
    def groups(self) -> int:
        return -(-(self.blocks - self.first) // self.group_size)

    def group_start(self, group: int) -> int:
        return self.first + group * self.group_size

    def group_length(self, group: int) -> int:
        return min(self.group_size, self.blocks - self.group_start(group))

    def has_backup(self, group: int) -> bool:
        """Return whether a copy of the superblock and of the descriptors begins this group."""
        if group == 0:
            return True
        if self.backups is not None:
            return group in self.backups
        return not self.sparse or any(_is_power(group, base) for base in (3, 5, 7))


def used(read: Read, size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, end) in bytes, in no order and perhaps overlapping, that hold everything in use.

    `size` of the volume in bytes; what lies behind the filesystem's end is in use too. Raises Doubtful, perhaps
    after some ranges.
    """
    superblock = parse_superblock(read(SUPERBLOCK, SUPERBLOCK))
    block = superblock.block_size
    if superblock.blocks * block > size:
        raise Doubtful("it is larger than its partition")
    yield 0, max(4096, (superblock.first + 1) * block)
    yield superblock.blocks * block, size
    for first, end in _used_blocks(read, superblock):
        if not 0 <= first <= end <= superblock.blocks:
            raise Doubtful("a group descriptor points outside of it")
        yield first * block, end * block


def parse_superblock(data: bytes) -> Superblock:
    def number(offset: int, kind: str = "I") -> int:
        return int(struct.unpack_from("<" + kind, data, offset)[0])

    if len(data) < SUPERBLOCK or number(0x38, "H") != MAGIC:
        raise Doubtful("it has no superblock")
    compat, incompat, ro_compat = number(0x5C), number(0x60), number(0x64)
    if incompat & INCOMPAT_RECOVER:
        raise Doubtful("its journal has not been replayed")
    if number(0x3A, "H") & (VALID | ERRORS) != VALID:
        raise Doubtful("it was not unmounted cleanly, or has errors")
    if incompat & ~INCOMPAT_KNOWN or ro_compat & ~RO_KNOWN:
        raise Doubtful(f"it has features that imageos does not know (incompat {incompat:#x}, ro_compat {ro_compat:#x})")
    is_64bit = bool(incompat & INCOMPAT_64BIT)
    block_size = 1024 << min(number(0x18), 32)
    inode_size = number(0x58, "H") if number(0x4C) else 128
    found = Superblock(
        blocks=number(0x4) + (number(0x150) << 32 if is_64bit else 0),
        first=number(0x14),
        block_size=block_size,
        group_size=number(0x20),
        inode_table=-(-number(0x28) * inode_size // block_size),
        descriptor_size=number(0xFE, "H") if is_64bit else 32,
        first_meta_group=number(0x104) if incompat & INCOMPAT_META_BG else 1 << 32,
        reserved=number(0xCE, "H"),
        has_flags=bool(ro_compat & (RO_GDT_CSUM | RO_METADATA_CSUM)),
        sparse=bool(ro_compat & RO_SPARSE_SUPER),
        backups=(number(0x24C), number(0x250)) if compat & COMPAT_SPARSE_SUPER2 else None,
    )
    if not (
        block_size <= 1 << 16
        and found.descriptor_size in (32, 64, 128, 256, 512, 1024)
        and LEAST_GROUP <= found.group_size <= 8 * block_size
        and found.first == (1 if block_size == 1024 else 0)
        and found.blocks > found.first
    ):
        raise Doubtful("its superblock makes no sense")
    return found


def _used_blocks(read: Read, superblock: Superblock) -> Iterator[tuple[int, int]]:
    per_block = superblock.block_size // superblock.descriptor_size
    lengths = (1, 1, superblock.inode_table)
    # of each kind what follows each other: with flex_bg those of many groups do, and a large disk has many groups
    spans = [(0, 0)] * len(lengths)
    for number in range(-(-superblock.groups // per_block)):
        first = number * per_block
        block = superblock.first + 1 + number
        if number >= superblock.first_meta_group:
            block = superblock.group_start(first) + superblock.has_backup(first)
        yield block, block + 1
        table = _block(read, superblock, block)
        for group in range(first, min(first + per_block, superblock.groups)):
            places, free, flags = _descriptor(table, (group - first) * superblock.descriptor_size, superblock)
            # Wherever these are: with flex_bg in other groups, even in such as have no bitmap themselves.
            for kind, (place, length) in enumerate(zip(places, lengths)):
                start, end = spans[kind]
                if place != end:
                    yield start, end
                    start = place
                spans[kind] = start, place + length
            if superblock.has_flags and flags & BG_BLOCK_UNINIT:
                count = _uninitialised(superblock, group)
                if count:
                    yield superblock.group_start(group), superblock.group_start(group) + count
            else:
                yield from _used_in_group(read, superblock, group, places[0], free)
    yield from spans


def _descriptor(table: bytes, offset: int, superblock: Superblock) -> tuple[tuple[int, int, int], int, int]:
    """Return the blocks of a group's bitmaps and inodes, the number of its free blocks, and its flags."""
    bitmap, inode_bitmap, inode_table, free, _, _, flags = _LOW.unpack_from(table, offset)
    high = _HIGH.unpack_from(table, offset + 0x20) if superblock.descriptor_size >= 64 else (0, 0, 0, 0)
    places = bitmap + (high[0] << 32), inode_bitmap + (high[1] << 32), inode_table + (high[2] << 32)
    return places, free + (high[3] << 16), flags


def _used_in_group(read: Read, superblock: Superblock, group: int, bitmap: int, free: int) -> Iterator[tuple[int, int]]:
    bits = _bits(_block(read, superblock, bitmap), superblock.group_length(group))
    start = superblock.group_start(group)
    if bits.count("0") != free:
        raise Doubtful(f"the bitmap of group {group} says {bits.count('0')} free blocks, its descriptor {free}")
    for first, end in runs(bits):
        yield start + first, start + end


def _uninitialised(superblock: Superblock, group: int) -> int:
    """Return how many blocks at the beginning of a group without bitmap are in use: copies of those in the first."""
    per_block = superblock.block_size // superblock.descriptor_size
    found = 1 if superblock.has_backup(group) else 0
    if group // per_block >= superblock.first_meta_group:
        found += group % per_block in (0, 1, per_block - 1)
    elif found:
        descriptors = -(-superblock.groups // per_block)
        found += min(descriptors, superblock.first_meta_group) + superblock.reserved
    return min(superblock.group_length(group), found)


def _block(read: Read, superblock: Superblock, number: int) -> bytes:
    if not superblock.first <= number < superblock.blocks:
        raise Doubtful("a group descriptor points outside of it")
    return read(number * superblock.block_size, superblock.block_size)


def runs(bits: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of `1` in a text; a hundred times as fast as a regular expression where they are few."""
    end = 0
    bits += "0"
    while (start := bits.find("1", end)) >= 0:
        end = bits.find("0", start)
        yield start, end


def _bits(bitmap: bytes, count: int) -> str:
    """Return the first `count` bits, lowest first, as text."""
    number = int.from_bytes(bitmap, "little")
    return f"{number:0{len(bitmap) * 8}b}"[::-1][:count]


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
