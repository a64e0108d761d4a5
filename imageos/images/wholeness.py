"""Detect a truncated image before the disk is touched. All that deploys or examines images asks here.

What is compressed shows its end only when it is unpacked: diskimage, dump and tarball compare what came out then.
"""

from __future__ import annotations

import os

from imageos.disks import ends
from imageos.errors import Failure
from imageos.images import dumpfile, formats, tarball
from imageos.images.imagefile import AGAIN, SECTOR, Image, exact, not_unpacked, truncated, unpacked
from imageos.images.words import Cut
from imageos.node import limits
from imageos.node.programs import available
from imageos.run import Failed

MOST_UNPACKED = 64 << 30  # bytes that are unpacked only to look at them
# Marks the end of a bzip2 stream. It may begin at any bit; 32 bits of CRC and the padding follow.
BZIP2_END = 0x177245385090
ZSTD_MAGIC, ZSTD_SKIPPABLE = 0xFD2FB528, 0x184D2A50
ZSTD_REPEATED = 1  # a kind of block: one byte stands for all


def check_packed(image: Image) -> None:
    """Fail if a compressed image is truncated.

    If its end looks wrong, unpack it: garbage behind the end does no harm. A bomb is left to the disk, which ends it.
    """
    if not image.whole or not image.compression or not available(image.decompress[0]):
        return
    if _looks_wrong(image):
        left = MOST_UNPACKED
        try:
            for chunk in unpacked(image):
                left -= len(chunk)
                if left < 0:
                    return
        except Failed as failure:
            if limits.cause(str(failure)):
                raise not_unpacked(f"image {image.path}", failure) from None
            raise Failure(
                f"image {image.path} of {exact(image.size)} is truncated or damaged at its end: {failure}",
                hint=AGAIN,
                details=failure.details,
            ) from None


def check(image: Image) -> None:
    """Fail if an image is truncated, as far as can be seen without unpacking it."""
    if not image.whole:
        return

    if not image.start.strip(b"\0"):
        raise Failure(f"image {image.path} begins with nothing but zeroes: it holds no disk", hint=AGAIN)
    if tarball.is_header(image.start[: tarball.BLOCK]):
        end = image.size - 2 * tarball.BLOCK
        if not image.stages and image.read(max(0, end), 2 * tarball.BLOCK).strip(b"\0"):
            raise truncated(image, "a tar archive ends with zeroes")
    elif dumpfile.order_of(image.start[: dumpfile.RECORD]):
        if not image.stages:
            _check_dump(image)
    elif image.stages:
        size, is_exact = image.unpacked_size
        if is_exact and not formats.recognise(image.read, len(image.start)):
            check_disk(image, size, image.start)
    else:
        form = formats.recognise(image.read, image.size)
        try:
            least = (
                form.least_size(image.read, image.size) if form and form.least_size else ends.least_size(image.start)
            )
        except Cut as cut:
            least = cut.needed
        except Failure as failure:
            raise Failure(f"image {image.path} cannot be deployed: {failure}", hint=failure.hint) from None
        check_size(image, image.size, least)


def check_disk(image: Image, size: int, start: bytes) -> None:
    """Fail if the disk in an image, of `size` bytes, is smaller than its own `start` says."""
    check_size(image, size, ends.least_size(start), "the disk in it has")


def check_size(image: Image, size: int, least: int, has: str = "it has") -> None:
    """Fail unless `size`, the bytes of an image or of the disk in it, is enough."""
    if size < least:
        raise truncated(image, f"{has} {exact(size)} of at least {exact(least)}")


def _looks_wrong(image: Image) -> bool:
    tail = os.pread(image.descriptor, 16, max(0, image.size - 16))
    if image.compression == "gzip":
        # RFC 1952: the last 4 bytes are the unpacked size. Tar archives, dumps and disks consist of whole sectors.
        return bool(int.from_bytes(tail[-4:], "little") % SECTOR)
    if image.compression == "xz":
        return not tail.rstrip(b"\0").endswith(b"YZ")
    if image.compression == "bzip2":
        bits = int.from_bytes(tail, "big")
        return not any(bits >> 32 + shift & (1 << 48) - 1 == BZIP2_END for shift in range(8))
    if image.compression == "lz4":
        # the end mark, then an optional checksum
        return bytes(4) not in (tail[-4:], tail[-8:-4])
    return not _has_whole_frames(image)


def _has_whole_frames(image: Image) -> bool:
    """Follow the headers of a zstd file's frames and blocks to its end (RFC 8878, 3.1)."""
    offset = 0
    while offset < image.size:
        header = os.pread(image.descriptor, 9, offset)
        magic, length = int.from_bytes(header[:4], "little"), int.from_bytes(header[4:8], "little")
        if magic & ~0xF == ZSTD_SKIPPABLE:
            offset += 8 + length
            continue
        if magic != ZSTD_MAGIC or len(header) < 9:
            return False
        descriptor = header[4]
        single_segment = descriptor >> 5 & 1
        offset += 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + (single_segment, 2, 4, 8)[descriptor >> 6]
        is_last = False
        while not is_last:
            block = os.pread(image.descriptor, 3, offset)
            if len(block) < 3:
                return False
            word = int.from_bytes(block, "little")
            is_last = bool(word & 1)
            offset += 3 + (1 if word >> 1 & 3 == ZSTD_REPEATED else word >> 3)
        offset += 4 if descriptor & 4 else 0  # a checksum
    return offset == image.size


def _check_dump(image: Image) -> None:
    """Follow the headers of a dump only if its last record is not its end: a tape may go on behind it."""
    last = os.pread(image.descriptor, dumpfile.RECORD, max(0, image.size - dumpfile.RECORD))
    if dumpfile.is_packed(image.start[: dumpfile.RECORD]) or dumpfile.is_end(last):
        return
    with os.fdopen(os.open(f"/proc/self/fd/{image.descriptor}", os.O_RDONLY), "rb") as file:
        dumpfile.Dump(image.path).read(file)
