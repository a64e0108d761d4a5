"""Open image files, recognise their compression, and unpack them: the part that all image types share."""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import cached_property
from typing import NamedTuple

from imageos import log
from imageos.errors import Failure, explained
from imageos.node import limits
from imageos.node.confinement import Room
from imageos.node.linux import CAP_DAC_OVERRIDE
from imageos.node.programs import available
from imageos.run import Command, Finished, output_of, pipeline

SECTOR = 512
AGAIN = "copy or download it again"  # a hint
START = 1 << 20  # bytes by which the content of an image is judged


# A frame of zstd may look back 2 GiB; zstd gives it the memory only if it is told to. Many threads of xz, each with its
# own block, would take more than all that a program may have (confinement.MEMORY); its largest dictionary has 1.5 GiB.
XZ = ("xz", "-dcq", "-T0", "--memlimit-decompress=3GiB")
SKIPPABLE = tuple(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))  # RFC 8878; pzstd begins so
# The beginnings by which a compression is recognised, and the commands that undo it, the fastest first
COMPRESSIONS = {
    "gzip": ((b"\x1f\x8b",), (("pigz", "-dc"), ("gzip", "-dc"))),
    "zstd": ((b"\x28\xb5\x2f\xfd", *SKIPPABLE), (("zstd", "-dcq", "--long=31"),)),
    "xz": ((b"\xfd7zXZ\0",), (XZ,)),
    "bzip2": ((b"BZh",), (("lbzip2", "-dc"), ("bzip2", "-dc"))),
    "lz4": ((b"\x04\x22\x4d\x18",), (("lz4", "-dcq"),)),
}


class _Opened(NamedTuple):
    path: str
    descriptor: int
    size: int  # bytes of the file
    compression: str  # a key of COMPRESSIONS, or an empty string
    boot: Image | None = None  # of a dump: what goes onto /boot
    layers: Sequence[Sequence[str]] = ()  # commands that unpack what the compression holds
    known_size: int | None = None  # bytes of the content, where what holds it says so
    whole: bool = True  # False: only its beginning is here yet; `size` is at least what it will have


class Image(_Opened):  # a class of its own, because a NamedTuple itself has no room for a cached property
    """An image file, opened once: what was checked is what is deployed."""

    @property
    def decompress(self) -> Sequence[str]:
        """Return the command that undoes the compression; empty if there is none."""
        return decompressor(self.compression) if self.compression else ()

    @property
    def stages(self) -> list[Command]:
        """Return the commands that unpack it, each to be fed by the one before."""
        return [*map(Command, [self.decompress] if self.compression else []), *map(Command, self.layers)]

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of its content, fewer at its end; if it has to be unpacked, only of its `start`."""
        if self.stages:
            return self.start[offset : offset + length]
        return os.pread(self.descriptor, length, offset) if offset < self.size else b""

    @cached_property
    def start(self) -> bytes:
        """The first MiB of its content, unpacked once."""
        try:
            if not self.stages:
                return os.pread(self.descriptor, START, 0)
            data = b""
            with closing(unpacked(self)) as chunks:  # Python loses a signal that comes while it ends a generator itself
                for chunk in chunks:
                    data += chunk
                    if len(data) >= START:
                        break
            return data[:START]
        except Failure as failure:
            raise Failure(f"image {self.path} cannot be unpacked: {failure}", failure.hint, failure.details) from None
        except OSError as error:
            raise Failure(f"cannot read image {self.path}: {error.strerror}") from None

    @cached_property
    def unpacked_size(self) -> tuple[int, bool]:
        """The size of its content as far as it is told, and whether that is exact; else a lower bound."""
        if self.layers:
            return self.known_size or 0, self.known_size is not None
        if self.compression == "zstd":
            return zstd_frame_size(os.pread(self.descriptor, 18, 0)), False
        if self.compression == "xz" and self.whole:
            command = ["xz", "--robot", "--list", "--force", "/proc/self/fd/0"]
            listed = pipeline(Command(command, Room(capabilities=[CAP_DAC_OVERRIDE])), stdin=self.descriptor)
            check_stages(self, listed)
            totals = re.search(rb"^totals\t\d+\t\d+\t\d+\t(\d{1,19})\b", listed[0].stdout, re.MULTILINE)
            return (int(totals[1]), True) if totals else (0, False)
        return 0, False

    @property
    def gzip_size(self) -> int:
        """The size modulo 4 GiB of the last member, as gzip writes it at the end. No proof: other data may follow."""
        return int.from_bytes(os.pread(self.descriptor, 4, max(0, self.size - 4)), "little")


def compression_of(begin: bytes) -> str:
    """Return the key in COMPRESSIONS of what begins so, or an empty string."""
    return next((name for name, (magic, _) in COMPRESSIONS.items() if begin.startswith(magic)), "")


def decompressor(compression: str) -> Sequence[str]:
    _, commands = COMPRESSIONS[compression]
    return next((command for command in commands if available(command[0])), commands[-1])


def open_image(path: str, descriptor: int | None = None) -> Image:
    """Return the image `path`, which may be open already."""
    with explained(f"cannot read image {path}"):
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Failure(f"image {path} is not a regular file")
        begin = os.pread(descriptor, 16, 0)
    if not begin:
        raise Failure(f"image {path} is empty")
    # content counts, whatever the name says
    return Image(path, descriptor, status.st_size, compression_of(begin))


def unpacked(image: Image) -> Generator[bytes, None, None]:
    """Yield the content of an image that has to be unpacked; Failed at its end if a stage has failed."""
    os.lseek(image.descriptor, 0, os.SEEK_SET)
    with output_of(*image.stages, stdin=image.descriptor) as (output, check):
        while chunk := os.read(output, START):
            yield chunk
        check()


def zstd_frame_size(header: bytes) -> int:
    """Return the size of the content of a zstd frame (RFC 8878, 3.1.1.1), 0 if its header does not say.

    Skippable frames, which may come first, have none.
    """
    if len(header) < 18 or header.startswith(SKIPPABLE):
        return 0
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    offset = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(header[offset : offset + width], "little")
    return size + 256 if width == 2 else size


def feed(
    image: Image,
    program: Command,
    what: str,
    *,
    between: Sequence[Command] = (),
    on_line: Callable[[str], None] | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> list[Finished]:
    """Run `program` with the unpacked image as its stdin, and show the progress of `what` it does; judge nothing.

    `between`: commands before it that pass everything on. The others are as in run.pipeline.
    """
    os.lseek(image.descriptor, 0, os.SEEK_SET)
    progress = log.Progress(what, image.size)

    def tick() -> None:
        on_tick()
        progress.update(os.lseek(image.descriptor, 0, os.SEEK_CUR))

    # the children read through our descriptor: its offset tells how far they are
    finished = pipeline(*image.stages, *between, program, stdin=image.descriptor, tick=tick, on_line=on_line)
    progress.close()
    return finished


def check_stages(image: Image, finished: Sequence[Finished]) -> None:
    """Fail if a stage of unpacking failed; accept garbage behind the end, and stages that nobody read any more."""
    *upstream, last = finished
    for stage in upstream:
        # gzip says 2 for a warning: garbage behind the end, which does no harm
        garbage = stage.status == 2 and "trailing garbage" in stage.stderr and not last.status
        # a stage that stops because nobody reads any more is not at fault: the reader is
        stopped = stage.status == -signal.SIGPIPE and last.status
        if garbage:
            log.warning(f"image {image.path}: trailing garbage ignored")
        elif stage.status and not stopped:
            raise damaged(image, stage)
    if last.status:
        raise damaged(image, last)


def damaged(image: Image, stage: Finished) -> Failure:
    return not_unpacked(f"image {image.path}", stage.failure())


def not_unpacked(what: str, failure: Failure) -> Failure:
    """Return the failure of a program that unpacks `what`: mostly that is damaged, but a limit may be the cause."""
    is_limited = "memory" in str(failure).lower() or limits.cause(str(failure))
    how = "cannot be unpacked" if is_limited else "is damaged or truncated"
    return Failure(f"{what} {how}: {failure}", details=failure.details)


def truncated(image: Image, reason: str) -> Failure:
    return Failure(f"image {image.path} is truncated: {reason}", hint=AGAIN)


def exact(count: int) -> str:
    """Return a number of bytes as people read it, and as programs do."""
    return f"{log.size(count)} ({count} bytes)"


def is_full(directory: str) -> bool:
    return os.statvfs(directory).f_bavail == 0


def too_large(image: Image, directory: str) -> Failure:
    """Return the failure for a full filesystem, the guest's root or its /boot, that is mounted at `directory`."""
    filesystem, is_boot = os.statvfs(directory), directory.endswith("/boot")
    total = log.size(filesystem.f_blocks * filesystem.f_frsize)
    return Failure(
        f"image {image.path} does not fit: {'/boot' if is_boot else 'the root filesystem'} of {total} is full",
        hint="make BOOT_SIZE larger" if is_boot else "make the disk larger, or SWAP_SIZE smaller",
    )
