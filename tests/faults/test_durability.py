"""When create or import has returned, its data is on the device: no page of it waits to be written."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import backups
from support import MIB, Node

MakeDisk = Callable[..., Path]
PAGE = mmap.PAGESIZE
DIRTY, WRITEBACK = 1 << 4, 1 << 8  # include/uapi/linux/kernel-page-flags.h


def waiting(path: Path) -> int:
    """Return the number of pages of a file that are in memory only (proc(5): pagemap, kpageflags)."""
    count = 0
    with (
        path.open("rb") as file,
        open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
        open("/proc/kpageflags", "rb", buffering=0) as kpageflags,
    ):
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as content:
            address = start_of(path)
            end = 0
            while end < size:
                try:
                    start = os.lseek(file.fileno(), end, os.SEEK_DATA) // PAGE * PAGE
                except OSError:  # the rest is a hole
                    break
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                for place in range(start, min(end, size), PAGE):
                    content[place]  # map the page
                    (entry,) = struct.unpack("=Q", os.pread(pagemap.fileno(), 8, (address + place) // PAGE * 8))
                    frame = entry & ((1 << 55) - 1)
                    (flags,) = struct.unpack("=Q", os.pread(kpageflags.fileno(), 8, frame * 8))
                    count += bool(flags & (DIRTY | WRITEBACK))
    return count


def start_of(path: Path) -> int:
    """Return the address of a file's mapping in this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            return int(line.partition("-")[0], 16)
    raise AssertionError(f"{path} is not mapped")


def test_waiting_pages_are_seen(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"x" * MIB)
        file.flush()
        assert waiting(path) > MIB // PAGE // 2
        os.fsync(file.fileno())
        assert waiting(path) == 0


def test_file_disks(node: Node, sources: Path, disk: MakeDisk) -> None:
    for call in (
        lambda target: node.create(target, OSP_IMAGE_NAME="small"),
        lambda target: node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="raw"),
        lambda target: node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="qcow2"),
        lambda target: backups.restore(node, sources / "stream", target),
        lambda target: backups.restore(node, sources / "dumps.tar", target),
    ):
        target = disk()
        call(target).ok()
        assert waiting(target) == 0


def test_block_devices(node: Node, sources: Path, block_disk: MakeDisk, tmp_path: Path) -> None:
    """For a loop device, check the file below it."""
    for number, call in enumerate(
        (
            lambda target: node.create(target, OSP_IMAGE_NAME="small"),
            lambda target: backups.restore(node, sources / "stream", target),
        )
    ):
        target = block_disk()
        call(target).ok()
        assert waiting(tmp_path / f"disk{number}") == 0
