"""Images: found by name, checked before the disk is touched, deployed."""

import os
import resource
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from imageos import log
from imageos.errors import Failure
from imageos.run import Finished, available, head, pipeline, require
from imageos.settings import Settings

BLOCK = 512  # bytes of a tar header
MEMORY = 4 << 30  # bytes of address space that unpacking may take, whatever an archive claims

TARBALL_SUFFIXES = (".tar.gz", ".tar", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")


@dataclass(frozen=True)
class Compression:
    """How a compression is recognised (by its first bytes) and undone, the fastest program first."""

    magic: bytes
    commands: Sequence[Sequence[str]]


COMPRESSIONS = {
    "gzip": Compression(b"\x1f\x8b", (("pigz", "-dc"), ("gzip", "-dc"))),
    "zstd": Compression(b"\x28\xb5\x2f\xfd", (("zstd", "-dcq"),)),
    "xz": Compression(b"\xfd7zXZ\0", (("xz", "-dcq", "-T0"),)),
    "bzip2": Compression(b"BZh", (("lbzip2", "-dc"), ("bzip2", "-dc"))),
    "lz4": Compression(b"\x04\x22\x4d\x18", (("lz4", "-dcq"),)),
}


@dataclass(frozen=True)
class Image:
    """An image file, opened once: what was checked is what is deployed."""

    path: str
    descriptor: int
    size: int  # bytes of the file
    decompress: Sequence[str]  # command; empty if it is not compressed


def find(settings: Settings) -> Image:
    """The image that the settings name, opened; Failure says which files were looked for."""
    if not settings.image_name:
        raise Failure("IMAGE_NAME is not set", hint="set it in the variant's file, or as the OS parameter image_name")
    if settings.image_type != "tarball":
        raise Failure(
            f"IMAGE_TYPE={settings.image_type}: this version of imageos deploys tarballs only",
            hint="set IMAGE_TYPE=tarball",
        )
    if settings.image_url:
        raise Failure(
            "IMAGE_URL: this version of imageos does not download images",
            hint="put the image into IMAGE_DIR and leave IMAGE_URL empty",
        )
    stem = f"{settings.image_dir}/{settings.image_name}-{settings.arch}"
    path = next((stem + suffix for suffix in TARBALL_SUFFIXES if os.path.lexists(stem + suffix)), None)
    if path is None:
        raise Failure(
            f"cannot find image {stem}{TARBALL_SUFFIXES[0]} (nor {', '.join(TARBALL_SUFFIXES[1:])})",
            hint=_others(settings),
        )
    return _open(path)


def check(image: Image) -> None:
    """Look at the beginning of a tarball: Failure unless it is one that this node can unpack."""
    require("tar", *image.decompress[:1])
    block = _first_block(image)
    if len(block) < BLOCK or not _is_tar_header(block):
        raise Failure(f"image {image.path} is not a tarball, or damaged at its beginning")
    if not image.decompress and os.pread(image.descriptor, 2 * BLOCK, max(0, image.size - 2 * BLOCK)).strip(b"\0"):
        raise Failure(f"image {image.path} is truncated: a tar archive ends with zeroes")


def deploy(image: Image, directory: str) -> None:
    """Unpack a tarball with everything it holds: owners by number, modes, ACLs, attributes, sparse files."""
    os.lseek(image.descriptor, 0, os.SEEK_SET)
    tar = [
        "tar",
        "--extract",
        "--file=-",
        f"--directory={directory}",
        "--numeric-owner",
        "--same-owner",
        "--preserve-permissions",
        "--acls",
        "--xattrs",
        "--xattrs-include=*",
        "--warning=no-timestamp",
    ]
    stages: list[Sequence[str]] = [image.decompress, tar] if image.decompress else [tar]
    progress = log.Progress("unpacking", image.size)
    # The children read through our descriptor: its offset tells how far they are.
    finished = pipeline(
        stages,
        stdin=image.descriptor,
        prepare=_limit_memory,
        tick=lambda: progress.update(os.lseek(image.descriptor, 0, os.SEEK_CUR)),
    )
    progress.close()
    _check_unpacked(image, directory, finished)


def _check_unpacked(image: Image, directory: str, finished: Sequence[Finished]) -> None:
    *upstream, tar = finished
    filesystem = os.statvfs(directory)
    if tar.status and (filesystem.f_bavail == 0 or "No space left" in tar.stderr):
        total = log.size(filesystem.f_blocks * filesystem.f_frsize)
        raise Failure(
            f"image {image.path} does not fit: the root filesystem of {total} is full",
            hint="make the disk larger, or SWAP_SIZE smaller",
        )
    for stage in upstream:
        # gzip says 2 for a warning: garbage behind the end, which does no harm
        garbage = stage.status == 2 and "trailing garbage" in stage.stderr and not tar.status
        # tar stops reading at the archive's end: a SIGPIPE then is no fault
        stopped = stage.status == -13
        if garbage:
            log.warning(f"image {image.path}: trailing garbage ignored")
        elif stage.status and not stopped:
            raise _damaged(image, stage)
    if tar.status:
        raise _damaged(image, tar)


def _damaged(image: Image, stage: Finished) -> Failure:
    failure = stage.failure()
    return Failure(f"image {image.path} is damaged or truncated: {failure}", details=failure.details)


def _open(path: str) -> Image:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Failure(f"image {path} is not a regular file")
        begin = os.pread(descriptor, 16, 0)
    except OSError as error:
        raise Failure(f"cannot read image {path}: {error.strerror}") from None
    if not begin:
        raise Failure(f"image {path} is empty")
    return Image(path, descriptor, status.st_size, _decompressor(begin))


def _decompressor(begin: bytes) -> Sequence[str]:
    """The command for content that begins so; content counts, whatever the name says."""
    for compression in COMPRESSIONS.values():
        if begin.startswith(compression.magic):
            commands = compression.commands
            return next((command for command in commands if available(command[0])), commands[-1])
    return ()


def _first_block(image: Image) -> bytes:
    try:
        if not image.decompress:
            return os.pread(image.descriptor, BLOCK, 0)
        os.lseek(image.descriptor, 0, os.SEEK_SET)
        return head(image.decompress, image.descriptor, BLOCK)
    except OSError as error:
        raise Failure(f"cannot read image {image.path}: {error.strerror}") from None


def _is_tar_header(block: bytes) -> bool:
    """Whether the checksum of a tar header (POSIX.1-2017, ustar) is right; unsigned or, in old ones, signed."""
    try:
        expected = int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    summed = block[:148] + b" " * 8 + block[156:]
    return expected in (sum(summed), sum(byte - 256 if byte > 127 else byte for byte in summed))


def _others(settings: Settings) -> str:
    """A hint that lists what is there instead."""
    try:
        names: list[str] = sorted(os.listdir(settings.image_dir))
    except OSError as error:
        return f"IMAGE_DIR {settings.image_dir}: {error.strerror}"
    there = ", ".join(_shown(names)) or "nothing"
    return f"set IMAGE_NAME, ARCH, IMAGE_TYPE or IMAGE_DIR; {settings.image_dir} holds {there}"


def _shown(names: list[str], most: int = 8) -> tuple[str, ...]:
    return (*names[:most], f"and {len(names) - most} more") if len(names) > most else tuple(names)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
