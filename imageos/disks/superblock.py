"""What a stranger's superblock asks of the kernel that mounts it, judged before the kernel reads it.

Pure. Fields: ext4's are in Documentation/filesystems/ext4, those of xfs in fs/xfs/libxfs/xfs_format.h, those of btrfs
in include/uapi/linux/btrfs_tree.h of the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

Read = Callable[[int, int], bytes]  # offset within the filesystem, count

EXT_SUPERBLOCK = 1024  # bytes from the beginning
EXT_MAGIC = 0xEF53
COMPAT_HAS_JOURNAL = 0x4
INCOMPAT_JOURNAL_DEV, INCOMPAT_MMP = 0x8, 0x100
MMP_MAGIC, MMP_CLEAN = 0x004D4D50, 0xFF4D4D50
BTRFS_SUPERBLOCK = 0x10000  # bytes from the beginning
BTRFS_MAGIC = b"_BHRfS_M"


def objection(read: Read, kind: str, writable: bool) -> str:
    """Why a filesystem of this `kind` must not be mounted; empty if nothing speaks against it.

    It must not make the kernel use another device, wait for minutes, or take mount options from the image.
    """
    if kind.startswith("ext"):
        return _of_ext(read, writable)
    return {"xfs": _of_xfs, "btrfs": _of_btrfs}[kind](read)


def btrfs_id(read: Read) -> bytes:
    """The 16 bytes of a btrfs's UUID."""
    return read(BTRFS_SUPERBLOCK + 32, 16)


def _of_ext(read: Read, writable: bool) -> str:
    block = read(EXT_SUPERBLOCK, 1024)
    if len(block) < 1024 or _u16(block, 0x38) != EXT_MAGIC:
        return ""  # the kernel will say what it is
    compat, incompat = _u32(block, 0x5C), _u32(block, 0x60)
    if incompat & INCOMPAT_JOURNAL_DEV:
        return "it is the journal of another filesystem"
    if compat & COMPAT_HAS_JOURNAL and not _u32(block, 0xE0):
        return "its journal is on another device"
    options = block[0x200:0x240].rstrip(b"\0")
    if options:
        return f"its superblock demands mount options ({options.decode('ascii', 'backslashreplace')})"
    if writable and incompat & INCOMPAT_MMP and _is_armed(read, block):
        return "it is protected against being mounted twice (mmp), and was not unmounted"
    return ""


def _is_armed(read: Read, block: bytes) -> bool:
    """Whether the kernel would first wait, for up to six minutes, to see if somebody else writes (fs/ext4/mmp.c)."""
    size = 1024 << min(_u32(block, 0x18), 6)
    (number,) = struct.unpack_from("<Q", block, 0x168)
    mmp = read(number * size, 8) if number < 1 << 48 else b""
    return len(mmp) == 8 and struct.unpack("<II", mmp) != (MMP_MAGIC, MMP_CLEAN)


def _of_xfs(read: Read) -> str:
    block = read(0, 56)
    if block[:4] != b"XFSB" or len(block) < 56:
        return ""
    (realtime,) = struct.unpack_from(">Q", block, 16)  # blocks
    (log,) = struct.unpack_from(">Q", block, 48)  # where it starts
    return "its log is on another device" if not log else "its realtime part is on another device" if realtime else ""


def _of_btrfs(read: Read) -> str:
    block = read(BTRFS_SUPERBLOCK, 144)
    if block[64:72] != BTRFS_MAGIC or len(block) < 144:
        return ""
    (devices,) = struct.unpack_from("<Q", block, 136)
    return f"it is one of the {devices} devices of its filesystem" if devices > 1 else ""


def _u16(block: bytes, offset: int) -> int:
    return int(struct.unpack_from("<H", block, offset)[0])


def _u32(block: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", block, offset)[0])
