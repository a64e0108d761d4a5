"""Write a backup to a disk, from its beginning to its end.

What the backup leaves out reads as zero afterwards. The first MiB, without which a disk cannot boot nor be taken for
anything, is written last: however the import ends before, not even by SIGKILL is there a disk that looks whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from imageos import log
from imageos.backups.stream import Source
from imageos.disks import blockdev, usage
from imageos.disks.blockdev import Disk
from imageos.disks.layout import MIB
from imageos.errors import Failure, explained
from imageos.node import linux
from imageos.node.children import signals_held

HEAD = blockdev.SIGNATURES
UNIT = 64 << 10  # bytes: zeroes of a plain disk are looked for in such units


class Writer:
    """Writes ascending runs; use `writing`."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._head = bytearray(min(HEAD, disk.size))
        self._reached = 0

    def write(self, offset: int, data: memoryview) -> None:
        self._zero_until(offset)
        self._reached = offset + len(data)
        if offset < len(self._head):
            count = min(len(data), len(self._head) - offset)
            self._head[offset : offset + count] = data[:count]
            offset, data = offset + count, data[count:]
        self._put(offset, data)

    def finish(self) -> None:
        """Write what is left of the disk, and last of all its beginning, once the rest is on the disk."""
        self._zero_until(self._disk.size)
        blockdev.flush(self._disk)
        if any(self._head):
            self._put(0, memoryview(self._head))
        blockdev.flush(self._disk)

    def _put(self, offset: int, data: memoryview) -> None:
        with explained(f"disk {self._disk.path}: cannot write at byte {offset}"):
            linux.write_all(self._disk.descriptor, data, offset)

    def _zero_until(self, end: int) -> None:
        start = max(self._reached, len(self._head))  # the head is zero already
        for first, last in usage.data_ranges(self._disk, start, end):
            for offset in range(first, last, MIB):
                self._zero(offset, min(MIB, last - offset))

    def _zero(self, offset: int, length: int) -> None:
        # Reading first: most disks are zero, and a thin volume gets no larger.
        if not self._disk.is_file:
            data = bytearray(length)
            usage.read_into(self._disk, offset, memoryview(data))
            if data == bytes(length):
                return
        zero = linux.punch_hole if self._disk.is_file else linux.zero_device
        try:
            zero(self._disk.descriptor, offset, length)
        except OSError:  # not every filesystem and device can
            self._put(offset, memoryview(bytes(length)))


@contextmanager
def writing(disk: Disk, volumes: Iterable[tuple[int, int]] = ()) -> Iterator[Writer]:
    """Write `disk` anew; on a failure it is disarmed, and so are its `volumes` (start, size)."""
    ends = [(0, disk.size), *volumes]
    blockdev.wipe(disk.descriptor, ends)
    writer = Writer(disk)
    try:
        yield writer
        writer.finish()
    except BaseException:
        try:
            blockdev.wipe(disk.descriptor, ends)
            blockdev.flush(disk)
        except (Failure, OSError) as error:
            log.warning(f"disk {disk.path} may still look whole: {error}")
        raise


@contextmanager
def write_behind(writer: Writer) -> Iterator[Callable[[int, memoryview], None]]:
    """Yield `writer.write` in another thread; what a call is given must stay as it is until the next call has returned.

    Meanwhile the caller receives and checks what comes next, which takes as long as the writing.
    """
    thread = ThreadPoolExecutor(1)
    pending: list[Future[None]] = []  # one at most

    def write(offset: int, data: memoryview) -> None:
        finish()
        pending.append(thread.submit(writer.write, offset, data))

    def finish() -> None:
        if pending:
            pending.pop().result()

    try:
        yield write
        finish()
    finally:
        with signals_held():  # after a failure the disk is disarmed: no write may come later
            thread.shutdown()


def copy_plain(source: Source, writer: Writer, room: int, expected: int | None) -> int:
    """Write the whole disk that comes from `source`, without its zeroes; return how many bytes came.

    It has `expected` bytes, or without that as many as come; fail if there is no `room` for them.
    """
    buffer = bytearray(MIB)
    progress = log.Progress("restoring", expected or room)
    offset = 0
    while True:
        wanted = MIB if expected is None else min(MIB, expected - offset)
        count = source.fill(memoryview(buffer)[:wanted])
        if offset + count > room:
            raise Failure(f"the disk in the stream is larger than this one of {log.size(room)} ({room} bytes)")
        for start in range(0, count, UNIT):
            end = min(start + UNIT, count)
            if not usage.is_zero(buffer, start, end):
                writer.write(offset + start, memoryview(buffer)[start:end])
        offset += count
        progress.update(offset)
        if count < wanted or not wanted:
            return offset
