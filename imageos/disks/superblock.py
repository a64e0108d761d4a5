"""Judge a stranger's superblock before the kernel mounts it.

Pure. Fields: ext4's are in Documentation/filesystems/ext4, those of xfs in fs/xfs/libxfs/xfs_format.h, those of btrfs
in include/uapi/linux/btrfs_tree.h of the kernel.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from typing import NamedTuple

from imageos.disks.ext import INCOMPAT_64BIT, INCOMPAT_RECOVER, MAGIC, SUPERBLOCK, Read
from imageos.disks.layout import SECTOR

# Returns why a filesystem, to be `writable` or not, must not be mounted; empty if it may be. It must not make the
# kernel use another device, wait for minutes, or take mount options from the image.
Objection = Callable[[Read, bool], str]

COMPAT_HAS_JOURNAL, COMPAT_ORPHAN_FILE = 0x4, 0x1000
INCOMPAT_JOURNAL_DEV, INCOMPAT_MMP = 0x8, 0x100
RO_COMPAT_READ_ONLY = 0x1000 | 0x4000  # readonly, shared_blocks
MMP_MAGIC, MMP_CLEAN = 0x004D4D50, 0xFF4D4D50
MMP_LEAST = 5  # seconds between two looks (EXT4_MMP_MIN_CHECK_INTERVAL)
MMP_STRUCT = 114  # bytes, to the end of the last field that counts here
BTRFS_SUPERBLOCK = 0x10000  # bytes from the beginning
BTRFS_MAGIC = b"_BHRfS_M"
BTRFS_SEEDING = 1 << 32
SEVERAL = "several filesystems at once, which wipefs(8) lists"  # all but one are what is left of older ones
LVM = "LVM2_member"  # a physical volume, as blkid(8) calls it
RAID, RAID_MAGIC = "linux_raid_member", b"\xfc\x4e\x2b\xa9"
# What may have a root that is not read here: offset, magic number, and what blkid(8) calls it
UNREADABLE = (
    (0, b"LUKS\xba\xbe", "crypto_LUKS"),
    (0, RAID_MAGIC, RAID),
    (4096, RAID_MAGIC, RAID),
    (0, b"hsqs", "squashfs"),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
)
# Where the superblock of each is, and its size
SUPERBLOCKS = dict.fromkeys(("ext2", "ext3", "ext4"), (SUPERBLOCK, SUPERBLOCK))
SUPERBLOCKS |= {"xfs": (0, SECTOR), "btrfs": (BTRFS_SUPERBLOCK, SECTOR)}
XFS_VERSION = 5  # many kernels know no other any more
OLDEST = (5, 8)  # Linux that imageos runs on
# Fields of features without which a kernel does not mount it, or does not write to it: form, offset, and bits, each
# by the Linux that knows it. Left out is what a kernel need not be built with.
_EXT = (
    ("<I", 0x60, {OLDEST: 0xE7D6}),  # not compression, journal_dev, dirdata, encrypt, casefold
    ("<I", 0x64, {OLDEST: 0x077B, (5, 15): 0x10000}),  # not project, verity; the last: a list of orphans is in use
)
FEATURES: dict[str, tuple[tuple[str, int, dict[tuple[int, int], int]], ...]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), _EXT),
    "xfs": (
        (">I", 216, {OLDEST: 0x7, (5, 10): 0x8, (5, 19): 0x20, (6, 10): 0xC0}),  # bigtime, nrext64, exchange and parent
        (">I", 212, {OLDEST: 0x7, (5, 10): 0x8}),  # inobtcount
    ),
    "btrfs": (
        ("<Q", 188, {OLDEST: 0xFFF}),
        ("<Q", 180, {OLDEST: 0x3, (6, 1): 0x8}),  # block_group_tree
    ),
}
MAGICS = (
    (BTRFS_SUPERBLOCK + 64, BTRFS_MAGIC, "btrfs"),
    (0, b"XFSB", "xfs"),
    (SUPERBLOCK + 0x38, MAGIC.to_bytes(2, "little"), "ext4"),
    *UNREADABLE,
)


def kind(read: Read, size: int) -> str:
    """Return what is on a partition of `size` bytes: a filesystem that may be mounted, LVM, one of UNREADABLE, or
    SEVERAL; empty if it is none.

    blkid(8) looks closer.
    """
    found = _kind(read)
    covered = {"ext4": ext_size, "xfs": xfs_size, "btrfs": btrfs_size}.get(found)
    # RAID of version 0.90 or 1.0 has its superblock behind a filesystem that begins as any other
    if covered and any(read(place, 4) == RAID_MAGIC for place in raid_places(size) if covered(read) <= place):
        return RAID
    return found


def raid_places(size: int) -> tuple[int, int]:
    """Return where on a device of `size` bytes md(4) has the superblocks of its versions 1.0 and 0.90."""
    return max(0, size - 8192) // 4096 * 4096, max(0, size // 65536 - 1) * 65536


def _kind(read: Read) -> str:
    begin = read(0, SUPERBLOCK + 1024)
    found = [name for offset, magic, name in MAGICS if read(offset, len(magic)) == magic]
    if any(begin.startswith(b"LABELONE", sector * SECTOR) for sector in range(4)):
        found.append(LVM)
    return SEVERAL if len(found) > 1 else "".join(found)


def is_usual(kind: str, read: Read, linux: tuple[int, int]) -> bool:
    """Return whether every kernel of a version, (6, 1) for example, can mount such a filesystem.

    Others may, too, if they are built for it: they have to be asked.
    """
    block = read(*SUPERBLOCKS[kind])
    if kind == "xfs" and struct.unpack_from(">H", block.ljust(102, b"\0"), 100)[0] & 0xF != XFS_VERSION:
        return False
    for form, offset, features in FEATURES[kind]:
        known = sum(bits for since, bits in features.items() if since <= linux)
        (used,) = struct.unpack_from(form, block.ljust(offset + 8, b"\0"), offset)
        if used & ~known:
            return False
    return True


class BtrfsDevice(NamedTuple):
    filesystem: uuid.UUID
    devices: int  # of the filesystem, this one included
    number: int  # of this one, unique in the filesystem
    size: int  # bytes that the filesystem uses of this one
    is_seed: bool  # other filesystems may be based on this one


def btrfs_device(read: Read) -> BtrfsDevice | None:
    """Return None if it is no device of a btrfs."""
    block = read(BTRFS_SUPERBLOCK, 217)
    if block[64:72] != BTRFS_MAGIC or len(block) < 217:
        return None
    flags, devices, number, size = (struct.unpack_from("<Q", block, offset)[0] for offset in (56, 136, 201, 209))
    return BtrfsDevice(uuid.UUID(bytes=block[32:48]), devices, number, size, bool(flags & BTRFS_SEEDING))


def btrfs_size(read: Read) -> int:
    """Return the bytes that a btrfs covers on this device; 0 if there is none."""
    device = btrfs_device(read)
    return device.size if device else 0


def of_ext(read: Read, writable: bool) -> str:
    block = _ext_block(read)
    if not block:
        return ""  # the kernel will say what it is
    compat, incompat = _u32(block, 0x5C), _u32(block, 0x60)
    if incompat & INCOMPAT_JOURNAL_DEV:
        return "it is the journal of another filesystem"
    if compat & COMPAT_HAS_JOURNAL and not _u32(block, 0xE0):
        return "its journal is on another device"
    options = block[0x200:0x240].rstrip(b"\0")
    if options:
        return f"its superblock demands mount options ({options.decode('ascii', 'backslashreplace')})"
    if writable and _u32(block, 0x64) & RO_COMPAT_READ_ONLY:
        return "its superblock marks it read-only"
    return _of_mmp(read, block) if writable and incompat & INCOMPAT_MMP else ""


def _of_mmp(read: Read, block: bytes) -> str:
    """Object where the kernel would wait, for up to six minutes, to see if somebody else writes (fs/ext4/mmp.c)."""
    mmp = _mmp(read, block)
    if len(mmp) < MMP_STRUCT or struct.unpack_from("<II", mmp) == (MMP_MAGIC, MMP_CLEAN):
        return ""
    return "it is protected against being mounted twice (mmp), and was not unmounted"


def _mmp(read: Read, block: bytes) -> bytes:
    size = 1024 << min(_u32(block, 0x18), 6)
    (number,) = struct.unpack_from("<Q", block, 0x168)
    return read(number * size, MMP_STRUCT) if number < 1 << 48 else b""


def is_dirty_ext(read: Read) -> bool:
    """Return whether its journal is to be replayed, which may change the superblock: the label, for example."""
    block = _ext_block(read)
    return bool(block and _u32(block, 0x60) & INCOMPAT_RECOVER)


def check_wait(read: Read) -> int:
    """Return the seconds that a program of e2fsprogs waits before it changes a filesystem, even an unmounted one.

    Only those that are protected against being mounted twice (mmp) have a wait (lib/ext2fs/mmp.c).
    """
    block = _ext_block(read)
    if not (block and _u32(block, 0x60) & INCOMPAT_MMP):
        return 0
    mmp = _mmp(read, block).ljust(MMP_STRUCT, b"\0")
    return 2 * max(_u16(block, 0x166), _u16(mmp, 112), MMP_LEAST) + 1


def ext_size(read: Read) -> int:
    """Return the bytes that an ext filesystem covers; 0 if there is none."""
    block = _ext_block(read)
    if not block or _u32(block, 0x18) > 6:
        return 0
    blocks = _u32(block, 0x4) + (_u32(block, 0x150) << 32 if _u32(block, 0x60) & INCOMPAT_64BIT else 0)
    return blocks << 10 + _u32(block, 0x18)


def has_orphan_file(read: Read) -> bool:
    """Return whether an ext4 filesystem lists in a file what is to be deleted."""
    block = _ext_block(read)
    return bool(block and _u32(block, 0x5C) & COMPAT_ORPHAN_FILE)


def of_xfs(read: Read, _writable: bool) -> str:
    block = read(0, 56)
    if block[:4] != b"XFSB" or len(block) < 56:
        return ""
    (realtime,) = struct.unpack_from(">Q", block, 16)  # blocks
    (log,) = struct.unpack_from(">Q", block, 48)  # where it starts
    return "its log is on another device" if not log else "its realtime part is on another device" if realtime else ""


def xfs_size(read: Read) -> int:
    """Return the bytes that an xfs covers; 0 if there is none."""
    block = read(0, 16).ljust(16, b"\0")
    size, blocks = struct.unpack_from(">IQ", block, 4)
    return int(size * blocks) if block.startswith(b"XFSB") else 0


def of_btrfs(read: Read, writable: bool) -> str:
    """Which devices the kernel takes for this filesystem is seen to when it is mounted."""
    device = btrfs_device(read)
    return "it is a seed of other filesystems, and read-only" if device and device.is_seed and writable else ""


def _ext_block(read: Read) -> bytes:
    """Return the superblock of an ext filesystem; empty if there is none."""
    block = read(SUPERBLOCK, 1024)
    return block if len(block) == 1024 and _u16(block, 0x38) == MAGIC else b""


def _u16(block: bytes, offset: int) -> int:
    return int(struct.unpack_from("<H", block, offset)[0])


def _u32(block: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", block, offset)[0])
