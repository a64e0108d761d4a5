"""Find the blocks of a disk that hold something: an export sends them, a capture copies them.

Left out are holes of a file, zeroes, what a clean ext filesystem calls free, the pages of a swap area, and what LVM has
not allocated.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from imageos import log
from imageos.disks import ext
from imageos.disks.blockdev import Disk
from imageos.disks.filesystem import FILESYSTEMS
from imageos.disks.layout import MIB
from imageos.disks.partitions import Part
from imageos.errors import Failure, explained
from imageos.node import linux

LONGEST = MIB  # bytes of the longest extent
AHEAD = 8  # extents that are being read before they are asked for
ZERO_UNIT = 16 << 10  # bytes; a shorter stretch of zeroes costs more to leave out than to keep
SMALLEST_BLOCK = 1024  # bytes, of the map, and of an ext filesystem
MAP_BITS = 1 << 26  # 8 MiB of memory; a disk of more than 64 GiB has larger blocks
STEP = 1 << 16  # bits that are changed at once
SWAP_HEADER = 1 << 16  # the first page, on any architecture
_SOMETHING, _NOTHING = re.compile(rb"[^\0]"), bytes(4096)


class Map:
    """One bit for each block of a disk, set if it is in use. Takes at most 8 MiB, whatever the disk."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.block = SMALLEST_BLOCK
        while size > self.block * MAP_BITS:
            self.block *= 2
        self._bits = bytearray(-(-size // (8 * self.block)))

    def mark(self, start: int, end: int) -> None:
        """Mark the blocks that a range of bytes touches as used."""
        self._fill(start // self.block, -(-min(end, self.size) // self.block), True)

    def clear(self, start: int, end: int) -> None:
        """Mark the blocks that lie within a range of bytes as free."""
        end = end if end < self.size else self.size + self.block - 1  # the last block may be short
        self._fill(-(-start // self.block), end // self.block, False)

    def extents(self, longest: int = LONGEST) -> Iterator[tuple[int, int]]:
        """Yield ranges (offset, length) of used bytes, ascending, none longer than `longest`."""
        window = longest // self.block // 8 or 1  # bytes of the map
        position = 0
        while found := self._something(position):
            position = found.start() // window * window
            number = int.from_bytes(self._bits[position : position + window], "little")
            for first, last in ext.runs(f"{number:b}"[::-1]):
                start = (position * 8 + first) * self.block
                end = min((position * 8 + last) * self.block, self.size)
                for offset in range(start, end, longest):
                    yield offset, min(longest, end - offset)
            position += window

    def _something(self, position: int) -> re.Match[bytes] | None:
        """Find the next byte of the map that is not zero; to compare many is 20 times as fast as a pattern."""
        while self._bits.startswith(_NOTHING, position):
            position += len(_NOTHING)
        return _SOMETHING.search(self._bits, position)

    def _fill(self, first: int, last: int, used: bool) -> None:
        for start in range(first, last, STEP):
            end = min(start + STEP, last)
            head, tail = start // 8, -(-end // 8)  # bytes
            mask = (1 << end - 8 * head) - (1 << start - 8 * head)
            bits = int.from_bytes(self._bits[head:tail], "little")
            self._bits[head:tail] = (bits | mask if used else bits & ~mask).to_bytes(tail - head, "little")


def not_free(disk: Disk, parts: Iterable[Part]) -> Map:
    """Return all that filesystems and swap areas on `disk` do not call free, zeroes or not."""
    used = Map(disk.size)
    used.mark(0, disk.size)
    for part in parts:
        _leave_out_free(used, disk, part)
    return used


def find(disk: Disk, parts: Iterable[Part]) -> Map:
    """Return what is used on `disk`. Reads what may be in use, to find the zeroes."""
    used = not_free(disk, parts)
    for start, end in linux.gaps(data_ranges(disk, 0, disk.size), disk.size):
        used.clear(start, end)
    progress = log.Progress("looking for zeroes", disk.size)
    buffer = bytearray(LONGEST)
    for offset, length in read_ahead(disk, used.extents()):
        read_into(disk, offset, memoryview(buffer)[:length])
        for start, end in _zeroes(buffer, length, max(ZERO_UNIT, used.block)):
            used.clear(offset + start, offset + end)
        progress.update(offset)
    return used


def read_ahead(disk: Disk, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield `extents`, and tell the kernel of each well before it is read: by itself it looks ahead by 128 KiB only."""
    waiting: deque[tuple[int, int]] = deque()
    for offset, length in extents:
        os.posix_fadvise(disk.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        waiting.append((offset, length))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def read_into(disk: Disk, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from the disk."""
    done = 0
    while done < len(buffer):
        with explained(f"disk {disk.path}: cannot read at byte {offset + done}"):
            count = os.preadv(disk.descriptor, [buffer[done:]], offset + done)
        if not count:
            raise Failure(f"disk {disk.path} ends at byte {offset + done}, it had {disk.size} bytes")
        done += count


def is_zero(buffer: bytearray, start: int, end: int) -> bool:
    return buffer.startswith(bytes(end - start), start)  # the quickest that there is: it copies nothing


def data_ranges(disk: Disk, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that may hold something: all of a block device; of a file, what is no hole."""
    return linux.data_ranges(disk.descriptor, start, end) if disk.is_file else iter([(start, end)])


def _leave_out_free(used: Map, disk: Disk, part: Part) -> None:
    filesystem = FILESYSTEMS.get(part.kind)
    for start, end in part.free:
        used.clear(start, end)
    if part.kind == "swap":
        used.clear(part.start + SWAP_HEADER, part.end)
    elif filesystem and filesystem.used:
        used.clear(part.start, part.end)
        try:
            for first, last in filesystem.used(_reader(disk, part), part.size):
                used.mark(part.start + first, part.start + last)
        except ext.Doubtful as doubt:
            log.info(f"{part} is taken with the free blocks of its {part.kind}: {doubt}")
            used.mark(part.start, part.end)


def _reader(disk: Disk, part: Part) -> Callable[[int, int], bytes]:
    def read(offset: int, count: int) -> bytes:
        if offset + count > part.size:
            raise ext.Doubtful("it ends too early")
        data = bytearray(count)
        read_into(disk, part.start + offset, memoryview(data))
        return bytes(data)

    return read


def _zeroes(buffer: bytearray, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Yield the units of the first `length` bytes that are all zero; the last may be short."""
    for start in range(0, length, unit):
        end = min(start + unit, length)
        if is_zero(buffer, start, end):
            yield start, end
