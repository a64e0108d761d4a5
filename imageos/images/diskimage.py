"""Images of whole disks, raw or qcow2: inspected, and written onto the instance's disk."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from imageos import log
from imageos.disks import disk as disks
from imageos.disks.disk import Attached, Device
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.images import qcow2
from imageos.images.imagefile import Image, beginning, check_stages, feed
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.run import Finished, pipeline, require

QCOW2_SUFFIXES = (".qcow2", ".img")
RAW_SUFFIXES = (".raw", ".raw.zst", ".raw.gz", ".raw.xz", ".img")
ANY_SUFFIXES = (".img", ".qcow2", ".raw", ".raw.zst", ".raw.gz", ".raw.xz")
COPY_BLOCK = "128K"  # what dd reads, and leaves out if it is zero


@dataclass(frozen=True)
class Content:
    """What an image file holds."""

    format: str  # raw or qcow2
    size: int  # bytes of the disk; of a compressed file at least so many
    exact: bool  # whether `size` is all


def check(image: Image) -> None:
    """Fail unless it is an image that may be deployed, and this node's qemu-img can read it."""
    if inspect(image).format == "qcow2" and qcow2.is_for_some(
        lambda start, size: os.pread(image.descriptor, size, start)
    ):
        _check_qemu_img(image)


def check_qcow2(image: Image) -> None:
    if inspect(image).format != "qcow2":
        raise Failure(f"image {image.path} is not a qcow2 image", hint="set IMAGE_TYPE=raw, or qemu for either")
    check(image)


def check_raw(image: Image) -> None:
    if inspect(image).format != "raw":
        raise Failure(f"image {image.path} is a qcow2 image, not raw", hint="set IMAGE_TYPE=qcow2, or qemu for either")


def _check_qemu_img(image: Image) -> None:
    look = ["qemu-img", "info", "-f", "qcow2", "/proc/self/fd/0"]
    looked = pipeline([look], stdin=image.descriptor, room=Room(capabilities=[linux.CAP_DAC_OVERRIDE]))[0]
    if looked.status:
        said = looked.stderr.strip().rpartition("/proc/self/fd/0': ")[2]
        raise Failure(
            f"image {image.path} cannot be read by this node's qemu-img: {said}",
            hint="on a node whose qemu-img can: qemu-img convert -c -O qcow2 -o compression_type=zlib OLD NEW",
        )


def check_size(image: Image, disk_size: int) -> None:
    """Fail if the image is known to be larger than the disk."""
    content = inspect(image)
    if content.size > disk_size:
        least = "" if content.exact else "at least "
        raise Failure(
            f"image {image.path} is of a disk of {least}{log.size(content.size)} ({content.size} bytes), "
            f"the instance's disk has {log.size(disk_size)} ({disk_size} bytes)",
            hint=f"make the disk at least {-(-content.size // MIB)}m",
        )


def inspect(image: Image) -> Content:
    """What the image is; Failure for what must not be, or cannot be, written to a disk."""
    start = beginning(image, 1 << 16) if image.compression else b""

    def read(offset: int, length: int) -> bytes:
        return start[offset : offset + length] if start else os.pread(image.descriptor, length, offset)

    foreign = qcow2.foreign(read, len(start) or image.size)
    if foreign:
        raise Failure(
            f"image {image.path} is in the format {foreign.name}: only raw and qcow2 are deployed",
            hint=f"qemu-img convert -f {foreign.driver} -O qcow2 {image.path} NAME-ARCH.qcow2",
        )
    is_qcow2 = read(0, 4) == qcow2.MAGIC
    if image.compression:
        require("dd", *image.decompress[:1])
        if is_qcow2:
            raise Failure(f"image {image.path} is a compressed qcow2 image", hint="uncompress it")
        return Content("raw", *_unpacked_size(image))
    if not is_qcow2:
        require("dd")
        return Content("raw", image.size, True)
    require("qemu-img")
    try:
        return Content("qcow2", qcow2.virtual_size(read), True)
    except Failure as failure:
        raise Failure(f"image {image.path} cannot be deployed: {failure}", hint=failure.hint) from None


def write(image: Image, device: Device, disk: Attached) -> None:
    """Put the image onto the disk; what it leaves out reads as zero, whatever was there before."""
    content = inspect(image)
    disks.set_partitions(disk, [])
    disks.clear(device, disk)
    if content.format == "qcow2":
        _convert(image, content, disk)
    else:
        _copy(image, disk)
    linux.flush_buffers(disk.descriptor)  # nothing that was read before may be seen in the partitions


def _convert(image: Image, content: Content, disk: Attached) -> None:
    progress = log.Progress("writing", content.size)

    def report(line: str) -> None:
        percentage = re.search(r"\((\d+\.\d+)/100%\)", line)
        if percentage:
            progress.update(int(content.size * float(percentage[1]) / 100))

    # O_DIRECT on the disk's side only: measured the fastest. No format is left to be guessed.
    convert = ["qemu-img", "convert", "-n", "-p", "--target-is-zero", "-W", "-m", "16", "-t", "none",
               "-f", "qcow2", "-O", "raw", "/proc/self/fd/0", disk.path]  # fmt: skip
    # all it needs is to read the image file, whoever owns it
    room = Room([disk.path], capabilities=[linux.CAP_DAC_OVERRIDE])
    finished = pipeline([convert], stdin=image.descriptor, room=room, on_line=report)
    progress.close()
    check_stages(image, finished)


def _copy(image: Image, disk: Attached) -> None:
    dd = ["dd", f"of={disk.path}", f"bs={COPY_BLOCK}", "iflag=fullblock", "oflag=direct",
          "conv=sparse,notrunc,nocreat", "status=none"]  # fmt: skip
    finished = feed(image, dd, "writing", room=Room([disk.path]))
    _check_overflow(image, disk, finished)
    check_stages(image, finished)


def _check_overflow(image: Image, disk: Attached, finished: Sequence[Finished]) -> None:
    if finished[-1].status and "No space left" in finished[-1].stderr:
        raise Failure(
            f"image {image.path} is of a larger disk than the instance's, which has {log.size(disk.size)} "
            f"({disk.size} bytes)",
            hint="make the disk larger",
        )


def _unpacked_size(image: Image) -> tuple[int, bool]:
    """The size of a compressed image as far as it can be known, and whether that is all of it."""
    if image.compression == "xz":
        command = ["xz", "--robot", "--list", "--force", "/proc/self/fd/0"]
        listed = pipeline([command], stdin=image.descriptor, room=Room(capabilities=[linux.CAP_DAC_OVERRIDE]))
        check_stages(image, listed)
        totals = re.search(rb"^totals\t\d+\t\d+\t\d+\t(\d+)", listed[0].stdout, re.MULTILINE)
        return (int(totals[1]), True) if totals else (0, False)
    if image.compression == "gzip":
        # RFC 1952: the size modulo 4 GiB of the last member
        return struct.unpack("<I", os.pread(image.descriptor, 4, max(0, image.size - 4)).ljust(4, b"\0"))[0], False
    if image.compression == "zstd":
        return zstd_frame_size(os.pread(image.descriptor, 18, 0)), False
    return 0, False


def zstd_frame_size(header: bytes) -> int:
    """The size of the content of a zstd frame (RFC 8878, 3.1.1.1), 0 if its header does not say."""
    descriptor = header[4] if len(header) == 18 else 0
    single_segment = descriptor >> 5 & 1
    place = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(header[place : place + width], "little")
    return size + 256 if width == 2 else size
