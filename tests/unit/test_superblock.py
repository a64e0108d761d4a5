"""What is refused before the kernel reads it. That the kernel would obey is shown in tests/faults."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageos.disks import superblock
from imageos.disks.filesystem import FILESYSTEMS


def ext(**fields: object) -> bytearray:
    """The beginning of an ext4 filesystem with 4 KiB blocks, its mmp block being the second one."""
    disk = bytearray(8192)
    struct.pack_into("<H", disk, 1024 + 0x38, superblock.EXT_MAGIC)
    struct.pack_into("<I", disk, 1024 + 0x18, 2)
    struct.pack_into("<II", disk, 1024 + 0x5C, fields.get("compat", 4), fields.get("incompat", 0))
    struct.pack_into("<I", disk, 1024 + 0xE0, fields.get("journal", 8))
    struct.pack_into("<Q", disk, 1024 + 0x168, 1)
    disk[1024 + 0x200 : 1024 + 0x240] = bytes(fields.get("options", b"")).ljust(64, b"\0")  # type: ignore[call-overload]
    struct.pack_into("<II", disk, 4096, superblock.MMP_MAGIC, fields.get("sequence", superblock.MMP_CLEAN))
    return disk


def xfs(log: int, realtime: int) -> bytearray:
    return bytearray(struct.pack(">4sIQQ24xQ", b"XFSB", 4096, 1000, realtime, log))


def btrfs(devices: int) -> bytearray:
    disk = bytearray(superblock.BTRFS_SUPERBLOCK + 4096)
    struct.pack_into("<8s", disk, superblock.BTRFS_SUPERBLOCK + 64, superblock.BTRFS_MAGIC)
    struct.pack_into("<Q", disk, superblock.BTRFS_SUPERBLOCK + 136, devices)
    return disk


def objection(disk: bytes | bytearray, kind: str, writable: bool = True) -> str:
    return superblock.objection(lambda offset, count: bytes(disk[offset : offset + count]), kind, writable)


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


def test_xfs() -> None:
    assert objection(xfs(log=9, realtime=0), "xfs") == ""
    assert objection(xfs(log=0, realtime=0), "xfs") == "its log is on another device"
    assert objection(xfs(log=9, realtime=1), "xfs") == "its realtime part is on another device"


def test_btrfs() -> None:
    assert objection(btrfs(1), "btrfs") == ""
    assert objection(btrfs(2), "btrfs") == "it is one of the 2 devices of its filesystem"


@given(st.sampled_from(sorted(FILESYSTEMS)), st.sampled_from([b"", bytes(ext()), b"XFSB"]), st.binary(max_size=3000))
def test_any_bytes(kind: str, start: bytes, rest: bytes) -> None:
    assert objection(start[:1100] + rest, kind).isascii()
