"""Where a disk must end, by its first MiB; tests/disk compares with what sfdisk and mkfs make."""

from __future__ import annotations

import struct
import zlib

import pytest

from imageos.disks.ends import MOST_LOGICAL, is_odd, least_size, places

MIB = 1 << 20


def msdos(*entries: tuple[int, int, int], boot: int = 0) -> bytes:
    """Return a first sector with partitions (type, start, count)."""
    table = b"".join(struct.pack("<B3xB3xII", boot, *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt(*ends: int, sector: int = 512, count: int = 128, size: int = 128, checksum: int | None = None) -> bytes:
    """Return two sectors and a table: partitions that end with these sectors."""
    header = struct.pack(
        "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 999, 34, 900, bytes(16), 2, count, size, 0
    )
    crc = zlib.crc32(header) if checksum is None else checksum
    header = header[:16] + struct.pack("<I", crc) + header[20:]
    table = b"".join((bytes([1]) * 32 + struct.pack("<QQ", 40, end)).ljust(128, b"\0") for end in ends)
    return msdos((0xEE, 1, 0xFFFFFFFF)).ljust(sector, b"\0") + header.ljust(sector, b"\0") + table


@pytest.mark.parametrize(
    ("begin", "least"),
    [
        (b"", 0),
        (bytes(MIB), 0),
        (msdos(), 0),
        (msdos((0x83, 2048, 4096)), (2048 + 4096) * 512),
        (msdos((0x83, 6144, 4096), (0x5, 2048, 100), boot=0x80), (6144 + 4096) * 512),
        (msdos((0x83, 2048, 4096), boot=0x55), 0),
        (msdos((0xEE, 1, 0xFFFFFFFF)), 0),
        (msdos((0xEE, 1, 0xFFFFFFFF), (0x83, 2048, 4096)), 0),
        (gpt(), 0),
        (gpt(2047), 2048 * 512),
        (gpt(8191, 2047), 8192 * 512),
        (gpt(2047, sector=4096), 2048 * 4096),
        (gpt(2047, checksum=7), 0),
        (gpt(2047, count=1 << 31), 0),
        (gpt(2047, size=0), 0),
        (gpt((1 << 64) - 1), 1 << 73),
        (msdos((0x83, 2048, 4096)) + gpt(8191)[512:], (2048 + 4096) * 512),  # what is left of an older GPT
        (bytes(3) + b"NTFS    " + msdos((0x83, 2048, 4096))[11:], 512 * 0),
    ],
)
def test_least_size(begin: bytes, least: int) -> None:
    assert least_size(begin) == least
    assert least_size(begin.ljust(MIB, b"\0")) == least


def test_places() -> None:
    def of(*pieces: tuple[int, bytes]) -> list[tuple[int, int]]:
        disk = bytearray(MIB)
        for sector, piece in pieces:
            disk[sector * 512 : sector * 512 + len(piece)] = piece
        found = places(lambda offset, count: bytes(disk[offset : offset + count]), bytes(disk))
        return [(start // 512, end // 512) for start, end in found]

    assert of() == []
    assert of((0, gpt(2047, 8191))) == [(40, 2048), (40, 8192)]
    first = msdos((0x83, 64, 64), (0x5, 512, 1000))
    assert of((0, first)) == [(64, 128)]
    back = [(512, msdos((0x83, 2, 8), (0x5, 200, 50))), (712, msdos((0x83, 2, 8), (0x5, 100, 50)))]
    assert of((0, first), *back, (612, msdos((0x8E, 2, 8)))) == [(64, 128), (514, 522), (714, 722), (614, 622)]
    chain = [(512, msdos((0x83, 2, 8), (0x5, 100, 50))), (612, msdos((0x8E, 2, 8)))]
    assert of((0, first), *chain) == [(64, 128), (514, 522), (614, 622)]
    to_itself = (512, msdos((0x83, 2, 8), (0x5, 0, 50)))
    assert of((0, first), to_itself) == [(64, 128), (514, 522), (512, 512)]
    endless = [(512 + number, msdos((0x83, 1, 1), (0x5, number + 1, 1))) for number in range(200)]
    assert len(of((0, first), *endless)) == 1 + MOST_LOGICAL + 1


@pytest.mark.parametrize(
    ("found", "begin", "odd"),
    [
        ([], b"", False),
        ([(MIB, 2 * MIB), (2 * MIB, 3 * MIB)], b"", False),
        ([(2 * MIB, 3 * MIB), (MIB, 2 * MIB + 1)], b"", True),
        ([(MIB, 9 * MIB)], b"", True),
        ([(0, MIB)], b"", True),
        ([(MIB, MIB)], b"", True),
        ([(MIB, 2 * MIB)], gpt(sector=4096), True),
        ([(MIB + 512 * number, MIB + 512 * number + 512) for number in range(129)], b"", True),
    ],
)
def test_is_odd(found: list[tuple[int, int]], begin: bytes, odd: bool) -> None:
    assert is_odd(found, begin, 8 * MIB) == odd
