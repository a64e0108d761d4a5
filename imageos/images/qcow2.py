"""The header of a qcow2 image, judged before qemu-img(1) sees the file; and the formats that are none of ours.

qcow2 lets an image name other files, which qemu-img would open on the node and copy into the guest.
Format: docs/interop/qcow2.txt of QEMU. All integers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from imageos.errors import Failure

MAGIC = b"QFI\xfb"
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # 72 bytes: all of version 2
FEATURES = struct.Struct(">QQQII")  # 32 bytes more in version 3
LONGEST_HEADER = HEADER.size + FEATURES.size
LARGEST_SIZE = 1 << 60  # bytes; nobody has such a disk, and sums with it stay harmless
MARGIN = 16 << 20  # bytes
LARGEST_L1 = 32 << 20  # bytes, as in QEMU
# Incompatible features
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16
HARMLESS = DIRTY | COMPRESSION | EXTENDED_L2
NOT_IN_ALL = COMPRESSION | EXTENDED_L2  # new in QEMU 5.1 (zstd, with which Debian 11's is not built) and 5.2

Read = Callable[[int, int], bytes]  # offset, length -> bytes, fewer at the end of the file


@dataclass(frozen=True)
class Foreign:
    """A disk image format that is recognised in order to say how to convert it."""

    name: str
    driver: str  # qemu-img's name
    offset: int  # bytes from the beginning, or negative: from the end
    magic: bytes


FOREIGN = (
    Foreign("VMDK", "vmdk", 0, b"KDMV"),
    Foreign("VMDK", "vmdk", 0, b"COWD"),
    Foreign("VMDK", "vmdk", 0, b"# Disk DescriptorFile"),
    Foreign("VDI", "vdi", 0x40, b"\x7f\x10\xda\xbe"),
    Foreign("VHDX", "vhdx", 0, b"vhdxfile"),
    Foreign("VHD", "vpc", 0, b"conectix"),
    Foreign("VHD", "vpc", -512, b"conectix"),  # of fixed size: a footer behind the data
    Foreign("QED", "qed", 0, b"QED\0"),
    Foreign("Parallels", "parallels", 0, b"WithoutFreeSpace"),
    Foreign("Parallels", "parallels", 0, b"WithouFreSpacExt"),
    Foreign("DMG", "dmg", -512, b"koly"),
    Foreign("LUKS", "luks", 0, b"LUKS\xba\xbe"),
)


def foreign(read: Read, size: int) -> Foreign | None:
    """The format of a file of `size` bytes, if it is one that cannot be deployed."""
    for one in FOREIGN:
        offset = one.offset if one.offset >= 0 else size + one.offset
        if offset >= 0 and read(offset, len(one.magic)) == one.magic:
            return one
    return None


def virtual_size(read: Read) -> int:
    """Bytes of the disk that a qcow2 is an image of; Failure if it is not one that stands on its own."""
    header = read_header(read)
    if header.has_snapshots and not any(read(header.l1_offset, header.l1_size)):
        raise Failure("it holds snapshots only, and no disk", hint="qemu-img convert -l SNAPSHOT -O qcow2 OLD NEW")
    return header.size


@dataclass(frozen=True)
class Header:
    """What the first bytes say, all in bytes."""

    size: int  # of the disk
    l1_offset: int
    l1_size: int
    has_snapshots: bool


def read_header(read: Read) -> Header:
    """What can be known of a qcow2 by its first LONGEST_HEADER bytes; Failure as in `virtual_size`."""
    header = read(0, HEADER.size)
    if len(header) < HEADER.size or header[:4] != MAGIC:
        raise Failure("it is not a qcow2 image")
    (_, version, backing, _, cluster_bits, size, encryption, l1_entries, l1_offset, _, _,
     snapshots, _) = HEADER.unpack(header)  # fmt: skip
    if version == 1:
        raise Failure("it is of version 1, qcow", hint="qemu-img convert -f qcow -O qcow2 OLD NEW")
    if version not in (2, 3):
        raise Failure(f"it is a qcow2 of version {version}: 2 and 3 are known")
    if backing:
        raise Failure("it is only the difference to another file (it has a backing file)", hint=_FLATTEN)
    if encryption:
        raise Failure("it is encrypted")
    if version == 3:
        _check_features(read(HEADER.size, FEATURES.size))
    if not 9 <= cluster_bits <= 21 or size > LARGEST_SIZE or l1_entries * 8 > LARGEST_L1:
        raise Failure("its header is damaged")
    return Header(size, l1_offset, l1_entries * 8, bool(snapshots))


def largest_file(size: int) -> int:
    """Bytes of the largest qcow2 that holds one disk of `size`, without snapshots of it.

    Its tables take up to 24 bytes for each cluster, which has 512 or more.
    """
    return size + size // 8 + MARGIN


def is_for_some(read: Read) -> bool:
    """Whether a qcow2 has what not every qemu-img can read."""
    header = read(0, HEADER.size + FEATURES.size)
    return header[4:8] == b"\0\0\0\3" and bool(FEATURES.unpack_from(header, HEADER.size)[0] & NOT_IN_ALL)


_FLATTEN = "qemu-img convert -O qcow2 OLD NEW makes an image that stands on its own"


def _check_features(header: bytes) -> None:
    if len(header) < FEATURES.size:
        raise Failure("its header is damaged")
    incompatible, *_ = FEATURES.unpack(header)
    if incompatible & DATA_FILE:
        raise Failure("its data is in another file (external data file)", hint=_FLATTEN)
    if incompatible & CORRUPT:
        raise Failure("it is marked as corrupt", hint="qemu-img check -r all IMAGE")
    if incompatible & ~HARMLESS:
        raise Failure(f"it has features that are not known here (incompatible bits {incompatible & ~HARMLESS:#x})")
