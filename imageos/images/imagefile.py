"""One image file: opened once, its compression recognised; what unpacking it has in common."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imageos import log
from imageos.errors import Failure
from imageos.node.confinement import Room
from imageos.run import Finished, available, head, pipeline


@dataclass(frozen=True)
class Compression:
    """How a compression is recognised (by one of these beginnings) and undone, the fastest program first."""

    magic: tuple[bytes, ...]
    commands: Sequence[Sequence[str]]


SKIPPABLE = tuple(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))  # RFC 8878; pzstd begins so
COMPRESSIONS = {
    "gzip": Compression((b"\x1f\x8b",), (("pigz", "-dc"), ("gzip", "-dc"))),
    "zstd": Compression((b"\x28\xb5\x2f\xfd", *SKIPPABLE), (("zstd", "-dcq"),)),
    "xz": Compression((b"\xfd7zXZ\0",), (("xz", "-dcq", "-T0"),)),
    "bzip2": Compression((b"BZh",), (("lbzip2", "-dc"), ("bzip2", "-dc"))),
    "lz4": Compression((b"\x04\x22\x4d\x18",), (("lz4", "-dcq"),)),
}


@dataclass(frozen=True)
class Image:
    """An image file, opened once: what was checked is what is deployed."""

    path: str
    descriptor: int
    size: int  # bytes of the file
    compression: str  # a key of COMPRESSIONS, or an empty string
    boot: Image | None = None  # of a dump: what goes onto /boot

    @property
    def decompress(self) -> Sequence[str]:
        """The command that undoes the compression; empty if there is none."""
        if not self.compression:
            return ()
        commands = COMPRESSIONS[self.compression].commands
        return next((command for command in commands if available(command[0])), commands[-1])


def open_image(path: str, descriptor: int | None = None) -> Image:
    """The image `path`, which may be open already."""
    try:
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Failure(f"image {path} is not a regular file")
        begin = os.pread(descriptor, 16, 0)
    except OSError as error:
        raise Failure(f"cannot read image {path}: {error.strerror}") from None
    if not begin:
        raise Failure(f"image {path} is empty")
    # content counts, whatever the name says
    compression = next((name for name, one in COMPRESSIONS.items() if begin.startswith(one.magic)), "")
    return Image(path, descriptor, status.st_size, compression)


def beginning(image: Image, count: int) -> bytes:
    """The first `count` bytes of an image, uncompressed; fewer if it has fewer."""
    try:
        if not image.compression:
            return os.pread(image.descriptor, count, 0)
        os.lseek(image.descriptor, 0, os.SEEK_SET)
        return head(image.decompress, image.descriptor, count)
    except Failure as failure:
        raise Failure(f"image {image.path} cannot be unpacked: {failure}", failure.hint, failure.details) from None
    except OSError as error:
        raise Failure(f"cannot read image {image.path}: {error.strerror}") from None


def feed(
    image: Image,
    program: Sequence[str],
    what: str,
    *,
    room: Room,
    on_line: Callable[[str], None] | None = None,
    between: Sequence[Sequence[str]] = (),
    keep_upstream: Sequence[int] = (),
    on_start: Callable[[], None] | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> list[Finished]:
    """Run `program` with the image, uncompressed, as its stdin, and show the progress of `what` it does; judge nothing.

    `between`: stages before it that pass everything on. `room` and the others as in run.pipeline.
    """
    os.lseek(image.descriptor, 0, os.SEEK_SET)
    progress = log.Progress(what, image.size)

    def tick() -> None:
        on_tick()
        progress.update(os.lseek(image.descriptor, 0, os.SEEK_CUR))

    finished = pipeline(
        [*([image.decompress] if image.compression else []), *between, program],
        stdin=image.descriptor,
        room=room,
        # the children read through our descriptor: its offset tells how far they are
        tick=tick,
        on_line=on_line,
        keep_upstream=keep_upstream,
        on_start=on_start,
    )
    progress.close()
    return finished


def check_stages(image: Image, finished: Sequence[Finished]) -> None:
    """Fail if a stage of unpacking failed; of the decompressor, only for what matters."""
    *upstream, last = finished
    for stage in upstream:
        # gzip says 2 for a warning: garbage behind the end, which does no harm
        garbage = stage.status == 2 and "trailing garbage" in stage.stderr and not last.status
        # what stops because nobody reads any more is not at fault: who should have read is
        stopped = stage.status == -signal.SIGPIPE and last.status
        if garbage:
            log.warning(f"image {image.path}: trailing garbage ignored")
        elif stage.status and not stopped:
            raise damaged(image, stage)
    if last.status:
        raise damaged(image, last)


def damaged(image: Image, stage: Finished) -> Failure:
    failure = stage.failure()
    return Failure(f"image {image.path} is damaged or truncated: {failure}", details=failure.details)


def is_full(directory: str) -> bool:
    return os.statvfs(directory).f_bavail == 0


def too_large(image: Image, directory: str) -> Failure:
    """What to say when the filesystem mounted at `directory`, the guest's root or its /boot, is full."""
    filesystem, is_boot = os.statvfs(directory), directory.endswith("/boot")
    total = log.size(filesystem.f_blocks * filesystem.f_frsize)
    return Failure(
        f"image {image.path} does not fit: {'/boot' if is_boot else 'the root filesystem'} of {total} is full",
        hint="make BOOT_SIZE larger" if is_boot else "make the disk larger, or SWAP_SIZE smaller",
    )
