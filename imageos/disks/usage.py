"""Which blocks of a disk hold something: what an export has to send, and what an import has to zero.

Left out are holes of a file, zeroes, what a clean ext filesystem calls free, and the pages of a swap area.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from imageos import log
from imageos.disks import ext
from imageos.disks.discovery import Part
from imageos.disks.disk import Device
from imageos.disks.layout import MIB
from imageos.errors import Failure

RUN = MIB  # bytes of the longest run
AHEAD = 8  # runs that are being read before they are asked for
ZERO_UNIT = 16 << 10  # bytes; a shorter stretch of zeroes costs more to leave out than to keep
SMALLEST_BLOCK = 1024  # of the map, and of an ext filesystem
MAP_BITS = 1 << 26  # 8 MiB of memory; a disk of more than 64 GiB has larger blocks
SWAP_HEADER = 1 << 16  # the first page, on any architecture
_SOMETHING = re.compile(rb"[^\0]")


class Map:
    """One bit for each block of a disk: whether it is in use. Takes at most 8 MiB, whatever the disk."""

    def __init__(self, size: int, smallest_block: int = SMALLEST_BLOCK) -> None:
        self.size = size
        self.block = smallest_block
        while size > self.block * MAP_BITS:
            self.block *= 2
        self._bits = bytearray(-(-size // (8 * self.block)))

    def mark(self, start: int, end: int) -> None:
        """Blocks that the range of bytes touches are in use."""
        self._fill(start // self.block, -(-min(end, self.size) // self.block), True)

    def clear(self, start: int, end: int) -> None:
        """Blocks that lie within the range of bytes are free."""
        last = self._blocks if end >= self.size else end // self.block
        self._fill(-(-start // self.block), last, False)

    def runs(self, longest: int = RUN) -> Iterator[tuple[int, int]]:
        """Ranges (offset, length) of used bytes, ascending, none longer than `longest`."""
        window = longest // self.block // 8 or 1  # bytes of the map
        position = 0
        while True:
            found = _SOMETHING.search(self._bits, position)
            if not found:
                return
            position = found.start() // window * window
            number = int.from_bytes(self._bits[position : position + window], "little")
            for run in re.finditer("1+", f"{number:b}"[::-1]):
                start = (position * 8 + run.start()) * self.block
                end = min((position * 8 + run.end()) * self.block, self.size)
                for offset in range(start, end, longest):
                    yield offset, min(longest, end - offset)
            position += window

    @property
    def _blocks(self) -> int:
        return -(-self.size // self.block)

    def _fill(self, first: int, last: int, used: bool) -> None:
        if first >= last:
            return
        head, tail = first // 8, last // 8
        if head == tail:
            self._change(head, (1 << last % 8) - (1 << first % 8), used)
            return
        self._change(head, 0x100 - (1 << first % 8), used)
        self._bits[head + 1 : tail] = (b"\xff" if used else b"\0") * (tail - head - 1)
        if last % 8:
            self._change(tail, (1 << last % 8) - 1, used)

    def _change(self, byte: int, mask: int, used: bool) -> None:
        self._bits[byte] = self._bits[byte] | mask if used else self._bits[byte] & ~mask


def not_free(device: Device, parts: Iterable[Part]) -> Map:
    """What the filesystems and swap areas on `device` do not call free, zeroes or not."""
    used = Map(device.size)
    used.mark(0, device.size)
    for part in parts:
        _leave_out_free(used, device, part)
    return used


def find(device: Device, parts: Iterable[Part]) -> Map:
    """What is used on `device`. Reads what may be in use, to find the zeroes."""
    used = not_free(device, parts)
    for start, end in _holes(device):
        used.clear(start, end)
    progress = log.Progress("looking for zeroes", device.size)
    buffer = bytearray(RUN)
    for offset, length in read_ahead(device, used.runs()):
        read_into(device, offset, memoryview(buffer)[:length])
        for start, end in _zeroes(buffer, length, max(ZERO_UNIT, used.block)):
            used.clear(offset + start, offset + end)
        progress.update(offset)
    progress.close()
    return used


def read_ahead(device: Device, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same runs, while the kernel is told of each one well before it is read: it looks ahead by 128 KiB only."""
    waiting: deque[tuple[int, int]] = deque()
    for offset, length in runs:
        os.posix_fadvise(device.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        waiting.append((offset, length))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def read_into(device: Device, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from the disk."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(device.descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise Failure(f"disk {device.path}: cannot read at byte {offset + done}: {error.strerror}") from None
        if not count:
            raise Failure(f"disk {device.path} ends at byte {offset + done}, it had {device.size} bytes")
        done += count


def is_zero(buffer: bytearray, start: int, end: int) -> bool:
    return buffer.startswith(bytes(end - start), start)  # the quickest that there is: it copies nothing


def data_ranges(device: Device, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that may hold something: all of a block device, what is no hole in a file."""
    if not device.is_file:
        yield start, end
        return
    while start < end:
        try:
            start = os.lseek(device.descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole from here
            raise
        stop = os.lseek(device.descriptor, start, os.SEEK_HOLE)
        if start < end:
            yield start, min(stop, end)
        start = stop


def _leave_out_free(used: Map, device: Device, part: Part) -> None:
    if part.kind == "swap":
        used.clear(part.start + SWAP_HEADER, part.end)
    elif part.kind in ("ext2", "ext3", "ext4"):
        used.clear(part.start, part.end)
        try:
            for first, last in ext.used(_reader(device, part), part.size):
                used.mark(part.start + first, part.start + last)
        except ext.Doubtful as doubt:
            log.info(f"{part} is taken with the free blocks of its {part.kind}: {doubt}")
            used.mark(part.start, part.end)


def _reader(device: Device, part: Part) -> Callable[[int, int], bytes]:
    def read(offset: int, count: int) -> bytes:
        if offset + count > part.size:
            raise ext.Doubtful("it ends too early")
        data = bytearray(count)
        read_into(device, part.start + offset, memoryview(data))
        return bytes(data)

    return read


def _holes(device: Device) -> Iterator[tuple[int, int]]:
    position = 0
    for start, end in data_ranges(device, 0, device.size):
        yield position, start
        position = end
    yield position, device.size


def _zeroes(buffer: bytearray, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """The units of the first `length` bytes that are all zero; the last may be short."""
    for start in range(0, length, unit):
        end = min(start + unit, length)
        if is_zero(buffer, start, end):
            yield start, end
