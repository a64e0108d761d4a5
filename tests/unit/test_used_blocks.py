"""Compare the map of used blocks with the simplest equivalent: a set."""

from __future__ import annotations

import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageos.disks import ext, usage
from imageos.disks.usage import Map

SIZE = 300 * 1024 + 700  # the last block is partial
BLOCKS = 301

changes = st.lists(st.tuples(st.booleans(), st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12)


@given(changes)
def test_map(made: list[tuple[bool, int, int]]) -> None:
    used, expected = Map(SIZE), set()
    for mark, first, other in made:
        start, end = sorted((first, other))
        if mark:
            used.mark(start, end)
            expected |= set(range(start // 1024, -(-end // 1024)))
        else:
            used.clear(start, end)
            expected -= set(range(-(-start // 1024), BLOCKS if end >= SIZE else end // 1024))
    blocks: list[int] = []
    reached = -1
    for offset, length in used.extents(longest=64 * 1024):
        assert offset >= reached and 0 < length <= 64 * 1024 and offset + length <= SIZE
        reached = offset + length
        blocks += range(offset // 1024, -(-reached // 1024))
    assert blocks == sorted(expected - {number for number in expected if number * 1024 >= SIZE})


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 1 << 20, (1 << 20) + 1])
def test_whole_disk(size: int) -> None:
    used = Map(size)
    used.mark(0, size)
    assert sum(length for _, length in used.extents()) == size
    used.clear(0, size)
    assert not list(used.extents())


def test_huge_disk() -> None:
    """The map stays small, and no range grows longer."""
    used = Map(1 << 50)
    assert used.block >= 8 << 20
    used.mark(1 << 49, (1 << 49) + 1)
    runs = list(used.extents())
    assert max(length for _, length in runs) <= usage.LONGEST
    assert runs[0][0] == 1 << 49 and sum(length for _, length in runs) == used.block


# --- ext: the disk tier tests real filesystems -----------------------------------------------------------


def superblock(**fields: int) -> bytes:
    values = {
        "blocks": 20000, "first": 0, "log_block": 2, "group": 32768, "inodes": 128, "magic": 0xEF53, "state": 1,
        "revision": 1, "inode_size": 256, "compat": 0, "incompat": 0x242, "ro": 0x3, **fields,
    }  # fmt: skip
    data = bytearray(1024)
    for offset, kind, name in [
        (0x4, "I", "blocks"), (0x14, "I", "first"), (0x18, "I", "log_block"), (0x20, "I", "group"),
        (0x28, "I", "inodes"), (0x38, "H", "magic"), (0x3A, "H", "state"), (0x4C, "I", "revision"),
        (0x58, "H", "inode_size"), (0x5C, "I", "compat"), (0x60, "I", "incompat"), (0x64, "I", "ro"),
    ]:  # fmt: skip
        struct.pack_into("<" + kind, data, offset, values[name])
    return bytes(data)


def test_superblock() -> None:
    found = ext.parse_superblock(superblock())
    assert (found.blocks, found.block_size, found.groups, found.inode_table) == (20000, 4096, 1, 8)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"magic": 0}, "no superblock"),
        ({"incompat": 0x246}, "journal"),
        ({"state": 0}, "cleanly"),
        ({"state": 3}, "errors"),
        ({"incompat": 0x1}, "features"),
        ({"incompat": 1 << 31}, "features"),
        ({"ro": 0x200}, "features"),
        ({"log_block": 7}, "no sense"),
        ({"log_block": 4_000_000_000}, "no sense"),
        ({"group": 0}, "no sense"),
        ({"group": 1}, "no sense"),
        ({"group": 1 << 31}, "no sense"),
        ({"first": 1}, "no sense"),
        ({"blocks": 0}, "no sense"),
        ({"incompat": 0x2C2}, "no sense"),  # 64bit, but descriptors of 0 bytes
    ],
)
def test_superblock_in_doubt(fields: dict[str, int], why: str) -> None:
    with pytest.raises(ext.Doubtful, match=why):
        ext.parse_superblock(superblock(**fields))


@given(st.integers())
def test_hostile_numbers(seed: int) -> None:
    """For any descriptors, it ends, and raises only Doubtful."""
    random = Random(seed)
    data = bytearray(superblock(blocks=4000))
    data[0xCE:0x100] = random.randbytes(0x32)
    table = random.randbytes(4096)
    content = bytes(1024) + bytes(data) + bytes(2048) + table

    def read(offset: int, count: int) -> bytes:
        return content[offset : offset + count].ljust(count, b"\0")

    try:
        for start, end in ext.used(read, 4096 * 4096):
            assert 0 <= start <= end <= 4096 * 4096
    except ext.Doubtful:
        pass
