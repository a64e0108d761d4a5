"""Judge the header of a qcow2 image before qemu-img(1) sees the file, and find where it must end.

qcow2 lets an image name other files, which qemu-img would open on the node and copy into the guest.
Format: docs/interop/qcow2.txt of QEMU. All integers are big-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from imageos.errors import Failure
from imageos.images.containers import FLATTEN, LARGEST, SECTOR
from imageos.images.words import Read, words

MAGIC = b"QFI\xfb"
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # 72 bytes: all of version 2
FEATURES = struct.Struct(">QQQII")  # 32 bytes more in version 3
LONGEST_HEADER = HEADER.size + FEATURES.size
MARGIN = 16 << 20  # bytes
LARGEST_L1 = 32 << 20  # bytes, as in QEMU
LARGEST_REFCOUNTS = 8 << 20  # bytes, as in QEMU
# Incompatible features
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16
HARMLESS = DIRTY | COMPRESSION | EXTENDED_L2
NOT_IN_ALL = COMPRESSION | EXTENDED_L2  # new in QEMU 5.1 (zstd, with which Debian 11's is not built) and 5.2
# Of an entry in a table
OFFSET = 0x00FFFFFFFFFFFE00
COMPRESSED, ZERO = 1 << 62, 1
ALLOCATED = 0xFFFFFFFF  # of the bitmap of subclusters


def virtual_size(read: Read, _file_size: int = 0) -> int:
    """Return the bytes of the disk in a qcow2; fail unless it stands on its own."""
    header = read_header(read)
    if header.has_snapshots and not any(read(header.l1_offset, header.l1_size)):
        raise Failure("it holds snapshots only, and no disk", hint="qemu-img convert -l SNAPSHOT -O qcow2 OLD NEW")
    return header.size


class Header(NamedTuple):
    """The content of the first bytes; sizes and offsets in bytes."""

    size: int  # of the disk
    cluster_size: int
    l1_offset: int
    l1_size: int
    refcounts_offset: int
    refcounts_size: int
    has_snapshots: bool
    has_subclusters: bool


def read_header(read: Read) -> Header:
    """Return what the first LONGEST_HEADER bytes of a qcow2 say; fail as `virtual_size` does."""
    header = read(0, HEADER.size)
    if len(header) < HEADER.size or header[:4] != MAGIC:
        raise Failure("it is not a qcow2 image")
    (_, version, backing, _, cluster_bits, size, encryption, l1_entries, l1_offset, refcounts_offset,
     refcount_clusters, snapshots, _) = HEADER.unpack(header)  # fmt: skip
    if version == 1:
        raise Failure("it is of version 1, qcow", hint="qemu-img convert -f qcow -O qcow2 OLD NEW")
    if version not in (2, 3):
        raise Failure(f"it is a qcow2 of version {version}: 2 and 3 are known")
    if backing:
        raise Failure("it is only the difference to another file (it has a backing file)", hint=FLATTEN)
    if encryption:
        raise Failure("it is encrypted")
    features = _features(read(HEADER.size, FEATURES.size)) if version == 3 else 0
    is_sound = 9 <= cluster_bits <= 21 and size <= LARGEST and l1_entries * 8 <= LARGEST_L1
    if not is_sound or refcount_clusters << cluster_bits > LARGEST_REFCOUNTS:
        raise Failure("its header is damaged")
    return Header(
        size,
        1 << cluster_bits,
        l1_offset,
        l1_entries * 8,
        refcounts_offset,
        refcount_clusters << cluster_bits,
        bool(snapshots),
        bool(features & EXTENDED_L2),
    )


def least_size(read: Read, _file_size: int = 0) -> int:
    """Return the bytes that the file has at least, as its tables say; Cut if a table itself is missing.

    Past the end of the file qemu-img reads zeroes, and says nothing. `qemu-img check` does not count what lacks less
    than a cluster, and refuses images whose content is all there.
    """
    header = read_header(read)
    width, cluster = 16 if header.has_subclusters else 8, header.cluster_size
    per_table = cluster // width
    tables = min(header.l1_size // 8, -(-header.size // (cluster * per_table)))
    least, place, seen = 0, 0, set()
    for number, entry in words(read, header.l1_offset, tables, 8, "big"):
        table = entry & OFFSET
        if not table or table in seen:
            continue
        seen.add(table)
        least = max(least, table + cluster)
        for index, value in words(read, table, cluster // 8, 8, "big"):
            # the last cluster of a disk need not be whole
            rest = max(0, header.size - (number * per_table + index * 8 // width) * cluster)
            if width == 16 and index % 2:  # the bitmap of the subclusters: what is behind the last need not be there
                used = (value & ALLOCATED).bit_length() * cluster // 32
                least = max(least, place + min(used, rest) if place else 0)
                place = 0
            elif value & COMPRESSED:
                least, place = max(least, _end_of_compressed(value, cluster)), 0
            elif width == 16:
                place = value & OFFSET
            elif value & OFFSET and not value & ZERO:
                least = max(least, (value & OFFSET) + min(cluster, rest))
    refcounts = words(read, header.refcounts_offset, header.refcounts_size // 8, 8, "big")
    return max(least, max((block + 1 for _, block in refcounts), default=0))


def _end_of_compressed(entry: int, cluster: int) -> int:
    """Return the least end of a compressed cluster, whose last sector need not be whole."""
    shift = 62 - (cluster.bit_length() - 1 - 8)
    offset, sectors = entry & ((1 << shift) - 1), (entry & (COMPRESSED - 1)) >> shift
    return (offset // SECTOR + sectors) * SECTOR + 1


def largest_file(size: int) -> int:
    """Return the bytes of the largest qcow2 that holds one disk of `size`, without snapshots of it.

    Its tables take up to 24 bytes for each cluster, which has 512 or more.
    """
    return size + size // 8 + MARGIN


def is_for_some(read: Read) -> bool:
    """Return whether a qcow2 uses a feature that not every qemu-img can read."""
    header = read(0, HEADER.size + FEATURES.size)
    return header[4:8] == b"\0\0\0\3" and bool(FEATURES.unpack_from(header, HEADER.size)[0] & NOT_IN_ALL)


def _features(header: bytes) -> int:
    if len(header) < FEATURES.size:
        raise Failure("its header is damaged")
    incompatible, *_ = FEATURES.unpack(header)
    if incompatible & DATA_FILE:
        raise Failure("its data is in another file (external data file)", hint=FLATTEN)
    if incompatible & CORRUPT:
        raise Failure("it is marked as corrupt", hint="qemu-img check -r all IMAGE")
    if incompatible & ~HARMLESS:
        raise Failure(f"it has features that are not known here (incompatible bits {incompatible & ~HARMLESS:#x})")
    return int(incompatible)
