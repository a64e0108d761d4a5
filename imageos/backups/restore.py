"""A disk while a backup is written to it, from its beginning to its end.

What the backup leaves out reads as zero afterwards. The first MiB, without which a disk cannot boot nor be taken for
anything, is written last: however the import ends before, not even by SIGKILL is there a disk that looks whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from imageos import log
from imageos.backups.stream import Source
from imageos.disks import disk, usage
from imageos.disks.disk import Device
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.node import linux
from imageos.run import signals_held

HEAD = disk.SIGNATURES
UNIT = 64 << 10  # bytes: zeroes of a plain disk are looked for in such units


class Writer:
    """Writes ascending runs; use `writing`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._head = bytearray(min(HEAD, device.size))
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
        """What is left of the disk, and last of all its beginning, once the rest is on the disk."""
        self._zero_until(self._device.size)
        disk.flush(self._device, self._device.descriptor)
        if any(self._head):
            self._put(0, memoryview(self._head))
        disk.flush(self._device, self._device.descriptor)

    def _put(self, offset: int, data: memoryview) -> None:
        try:
            while data:
                done = os.pwrite(self._device.descriptor, data, offset)
                offset, data = offset + done, data[done:]
        except OSError as error:
            raise Failure(f"disk {self._device.path}: cannot write at byte {offset}: {error.strerror}") from None

    def _zero_until(self, end: int) -> None:
        start = max(self._reached, len(self._head))  # the head is zero already
        for first, last in usage.data_ranges(self._device, start, end):
            for offset in range(first, last, MIB):
                self._zero(offset, min(MIB, last - offset))

    def _zero(self, offset: int, length: int) -> None:
        # Reading first: most disks are zero, and a thin volume gets no larger.
        if not self._device.is_file:
            data = bytearray(length)
            usage.read_into(self._device, offset, memoryview(data))
            if data == bytes(length):
                return
        zero = linux.punch_hole if self._device.is_file else linux.zero_device
        try:
            zero(self._device.descriptor, offset, length)
        except OSError:  # not every filesystem and device can
            self._put(offset, memoryview(bytes(length)))


@contextmanager
def writing(device: Device, volumes: Iterable[tuple[int, int]] = ()) -> Iterator[Writer]:
    """Write `device` anew; on a failure it is disarmed, and so are its `volumes` (start, size)."""
    ends = [(0, device.size), *volumes]
    disk.wipe(device.descriptor, ends)
    writer = Writer(device)
    try:
        yield writer
        writer.finish()
    except BaseException:
        try:
            disk.wipe(device.descriptor, ends)
            disk.flush(device, device.descriptor)
        except (Failure, OSError) as error:
            log.warning(f"disk {device.path} may still look whole: {error}")
        raise


@contextmanager
def write_behind(writer: Writer) -> Iterator[Callable[[int, memoryview], None]]:
    """`writer.write` in another thread; what a call is given has to stay as it is until the next call has returned.

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
    """Write the whole disk that comes from `source`, but its zeroes; how many bytes came.

    It has `expected` bytes, or without that as many as come; Failure if there is no `room` for them.
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
            progress.close()
            return offset
