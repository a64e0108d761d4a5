"""Superblocks that are refused before the kernel reads them. tests/faults shows that the kernel would obey them."""

from __future__ import annotations

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageos.disks import superblock
from imageos.disks.ext import MAGIC
from imageos.disks.filesystem import FILESYSTEMS


def ext(**fields: object) -> bytearray:
    """Return the beginning of an ext4 filesystem with 4 KiB blocks, whose mmp block is the second one."""
    disk = bytearray(8192)
    struct.pack_into("<H", disk, 1024 + 0x38, MAGIC)
    struct.pack_into("<I", disk, 1024 + 0x18, 2)
    struct.pack_into("<II", disk, 1024 + 0x5C, fields.get("compat", 4), fields.get("incompat", 0))
    struct.pack_into("<I", disk, 1024 + 0xE0, fields.get("journal", 8))
    struct.pack_into("<Q", disk, 1024 + 0x168, 1)
    disk[1024 + 0x200 : 1024 + 0x240] = bytes(fields.get("options", b"")).ljust(64, b"\0")  # type: ignore[call-overload]
    struct.pack_into("<II", disk, 4096, superblock.MMP_MAGIC, fields.get("sequence", superblock.MMP_CLEAN))
    return disk


def xfs(log: int, realtime: int) -> bytearray:
    return bytearray(struct.pack(">4sIQQ24xQ", b"XFSB", 4096, 1000, realtime, log))


def btrfs(devices: int, flags: int = 1) -> bytearray:
    disk = bytearray(superblock.BTRFS_SUPERBLOCK + 4096)
    for offset, form, value in (
        *((32, "16s", bytes(range(16))), (56, "Q", flags), (64, "8s", superblock.BTRFS_MAGIC)),
        *((136, "Q", devices), (201, "Q", 7)),
    ):
        struct.pack_into(f"<{form}", disk, superblock.BTRFS_SUPERBLOCK + offset, value)
    return disk


def objection(disk: bytes | bytearray, kind: str, writable: bool = True) -> str:
    return FILESYSTEMS[kind].objection(lambda offset, count: bytes(disk[offset : offset + count]), writable)


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_sound_ext(kind: str) -> None:
    assert objection(ext(), kind) == ""
    assert objection(ext(compat=0, journal=0), kind) == ""
    assert objection(ext(incompat=superblock.INCOMPAT_MMP), kind) == ""


def test_ext_that_names_another_device() -> None:
    assert objection(ext(journal=0), "ext4") == "its journal is on another device"
    assert "journal of another" in objection(ext(incompat=superblock.INCOMPAT_JOURNAL_DEV), "ext4")


def test_mount_options_of_a_superblock() -> None:
    assert objection(ext(options=b"journal_path=/dev/\xff\n"), "ext4") == (
        "its superblock demands mount options (journal_path=/dev/\\xff\n)"
    )


def test_armed_mmp() -> None:
    armed = ext(incompat=superblock.INCOMPAT_MMP, sequence=7)
    assert "mmp" in objection(armed, "ext4")
    assert objection(armed, "ext4", writable=False) == "", "the kernel waits only to write"
    far = ext(incompat=superblock.INCOMPAT_MMP, sequence=7)
    struct.pack_into("<Q", far, 1024 + 0x168, 1 << 60)
    assert objection(far, "ext4") == "", "the kernel refuses a block beyond the end"


@pytest.mark.parametrize(("superblocks", "own", "wait"), [(0, 0, 11), (5, 300, 601), (65535, 5, 131071)])
def test_how_long_programs_wait(superblocks: int, own: int, wait: int) -> None:
    """As e2fsck 1.47 was seen to do."""
    disk = ext(incompat=superblock.INCOMPAT_MMP)
    struct.pack_into("<H", disk, 1024 + 0x166, superblocks)
    struct.pack_into("<H", disk, 4096 + 112, own)
    assert superblock.check_wait(lambda offset, count: bytes(disk[offset : offset + count])) == wait
    assert superblock.check_wait(lambda offset, count: bytes(ext()[offset : offset + count])) == 0


def test_ext_that_is_read_only() -> None:
    for feature in (0x1000, 0x4000):
        disk = ext()
        struct.pack_into("<I", disk, 1024 + 0x64, feature)
        assert objection(disk, "ext4") == "its superblock marks it read-only"
        assert objection(disk, "ext4", writable=False) == ""


@pytest.mark.parametrize(("disk", "expected"), [(ext(), False), (ext(incompat=4), True), (xfs(9, 0), False)])
def test_dirty_ext(disk: bytearray, expected: bool) -> None:
    assert superblock.is_dirty_ext(lambda offset, count: bytes(disk[offset : offset + count])) == expected


def test_xfs() -> None:
    assert objection(xfs(log=9, realtime=0), "xfs") == ""
    assert objection(xfs(log=0, realtime=0), "xfs") == "its log is on another device"
    assert objection(xfs(log=9, realtime=1), "xfs") == "its realtime part is on another device"


def test_btrfs() -> None:
    assert objection(btrfs(1), "btrfs") == ""
    seed = btrfs(2, superblock.BTRFS_SEEDING | 1)
    assert objection(seed, "btrfs") == "it is a seed of other filesystems, and read-only"
    assert objection(seed, "btrfs", writable=False) == ""
    facts = superblock.btrfs_device(lambda offset, count: bytes(seed[offset : offset + count]))
    assert facts == superblock.BtrfsDevice(uuid.UUID(bytes=bytes(range(16))), 2, 7, 0, True)


@given(st.sampled_from(sorted(FILESYSTEMS)), st.sampled_from([b"", bytes(ext()), b"XFSB"]), st.binary(max_size=3000))
def test_any_bytes(kind: str, start: bytes, rest: bytes) -> None:
    assert objection(start[:1100] + rest, kind).isascii()
    assert 0 <= superblock.check_wait(lambda offset, count: (start[:1100] + rest)[offset : offset + count]) < 1 << 18
