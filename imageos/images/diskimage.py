"""Inspect images of whole disks, unpack them where that is needed, and write them to the instance's disk."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import NamedTuple

from imageos import log
from imageos.disks import blockdev
from imageos.disks.blockdev import LoopDevice
from imageos.disks.layout import MIB
from imageos.errors import Failure, explained
from imageos.images import archive, formats, qcow2, scratch, wholeness
from imageos.images.formats import Format
from imageos.images.imagefile import START, Image, check_stages, exact, feed, not_unpacked, truncated, unpacked
from imageos.images.words import Cut
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.node.programs import available, require
from imageos.run import Command, Failed, Finished, pipeline

# In the order in which they are looked for
COMPRESSED = ("", ".zst", ".gz", ".xz", ".bz2", ".lz4")
RAW_SUFFIXES = (".raw", ".raw.zst", ".raw.gz", ".raw.xz", ".img")
QCOW2_SUFFIXES = (".qcow2", ".img")
ANY_SUFFIXES = (".img", ".qcow2", ".raw", ".raw.zst", ".raw.gz", ".raw.xz")
PACKED = (".tgz", ".txz")  # that say a compression already
ARCHIVES = (".ova", ".tar", *PACKED)
OTHERS = (".vmdk", ".vdi", ".vhdx", ".vhd", *ARCHIVES)
# At the end of a URL; of formats that are refused, too: `inspect` says what is wrong with those.
URL_ENDS = (
    *("img", "qcow", "qcow2", "raw", "vmdk", "ova", "vdi", "vhd", "vhdx", "tar", "tgz", "txz", "zip", "7z", "rar"),
    *("wic", "bin", "dd", "box", "vma"),  # of Yocto, Flatcar, Vagrant, Proxmox
)
VHD_NAME = re.compile(r"\.vhd(\.|$)", re.IGNORECASE)
# Bytes of an image for each of the disk, with snapshots, and more that are no disk's; a bomb has more than any
MOST_FOR_DISK, MARGIN = 4, 1 << 30
COPY_BLOCK = "128K"  # what dd reads, and leaves out if it is zero


def suffixes(first: Sequence[str], more: Sequence[str] = ()) -> tuple[str, ...]:
    """Return `first`, then each of them and of `more` with each compression."""
    plain = [suffix for suffix in (*first, *more) if suffix.count(".") == 1 and suffix not in PACKED]
    return tuple(dict.fromkeys([*first, *more, *(suffix + packed for packed in COMPRESSED for suffix in plain)]))


class Content(NamedTuple):
    format: Format | None  # None: raw
    size: int  # bytes of the disk; if it has to be unpacked, or has not arrived, at least so many


def check(image: Image) -> None:
    """Fail unless it is an image that may be deployed."""
    if _is_hidden(image):
        return
    if archive.is_archive(image):
        require("tar")
        if image.layers or (image.whole and not image.compression):  # else it had to be unpacked to be listed
            check(archive.opened(image))
        return
    inspect(image)


def check_readable(image: Image) -> None:
    """Fail unless this node's qemu-img can read the image; qcow2 is asked about only if it has new features."""
    form = format_of(image)
    if not form or not image.whole or image.stages or (form.driver == "qcow2" and not qcow2.is_for_some(image.read)):
        return
    look = ["qemu-img", "info", *_source(form)]
    room = Room(capabilities=[linux.CAP_DAC_OVERRIDE])
    looked = pipeline(Command(look, room), stdin=image.descriptor)[0]
    if looked.status:
        said = looked.stderr.strip().rpartition("/proc/self/fd/0': ")[2]
        raise Failure(
            f"image {image.path} cannot be read by this node's qemu-img: {said}",
            hint="on a node whose qemu-img can: qemu-img convert -c -O qcow2 -o compression_type=zlib OLD NEW",
        )


def check_qcow2(image: Image) -> None:
    found = format_of(image)
    if not (found and found.driver == "qcow2") and not _is_hidden(image) and not archive.is_archive(image):
        raise Failure(f"image {image.path} is not a qcow2 image", hint="set IMAGE_TYPE=raw, or qemu for any")
    check(image)


def check_raw(image: Image) -> None:
    found = format_of(image)
    if found and found.virtual_size:
        other = found.driver if found.driver == "qcow2" else "qemu"
        raise Failure(
            f"image {image.path} is a {found.name} image, not raw", hint=f"set IMAGE_TYPE={other}, or qemu for any"
        )
    check(image)


def _source(form: Format) -> list[str]:
    """Return the arguments by which qemu-img reads stdin; no format is left to be guessed."""
    file = "/proc/self/fd/0"
    if not form.options:
        return ["-f", form.driver, file]
    return ["--image-opts", f"driver={form.driver}{form.options},file.driver=file,file.filename={file}"]


def extract(image: Image, form: Format, ranges: Mapping[int, int], directory: str, name: str) -> None:
    """Write these ranges of the disk in an image (offset -> size in bytes), one behind the other, to a file."""
    options = form.options.replace(",", ",file.")
    opened = f"file.driver={form.driver}{options},file.file.driver=file,file.file.filename=/proc/self/fd/0"
    parts = [f"driver=raw,offset={offset},size={size},{opened}" for offset, size in ranges.items()]
    command = ["qemu-img", "convert", "-n", "--image-opts", *parts, "-O", "raw", name]
    room = Room(work=directory, capabilities=[linux.CAP_DAC_OVERRIDE])
    extracted = pipeline(Command(command, room), stdin=image.descriptor)[0]
    if extracted.status:
        raise _unreadable(image, extracted)


def _unreadable(image: Image, finished: Finished) -> Failure:
    """Return the failure of a qemu-img that, if it cannot open an image, says so with all its arguments."""
    _, opened, said = finished.stderr.strip().rpartition("/proc/self/fd/0': ")
    why = said if opened and finished.status > 0 else str(finished.failure())
    return Failure(f"image {image.path} is damaged: {why}", hint="copy or download it again; qemu-img check has more")


def measure(image: Image, form: Format) -> int:
    """Return about how many bytes of the disk in an image are not zero."""
    look = ["qemu-img", "measure", "-O", "qcow2", "--output", "json", *_source(form)]
    looked = pipeline(Command(look, Room(capabilities=[linux.CAP_DAC_OVERRIDE])), stdin=image.descriptor)
    check_stages(image, looked)
    required = re.search(rb'"required": (\d{1,19})\b', looked[0].stdout)
    return int(required[1]) if required else image.size


def ready(image: Image, directory: str, disk_size: int) -> Image:
    """Return the disk image as `write` takes it: found in its archive, and unpacked into `directory` if need be.

    qemu-img has to seek. A VHD of fixed size is raw with a footer, which only its end shows.
    """
    most = MOST_FOR_DISK * disk_size + MARGIN
    if archive.is_archive(image):
        with log.phase(f"listed {image.path}"):
            image = archive.opened(image, most)
    if not image.stages or not (format_of(image) or VHD_NAME.search(image.path)):
        return image
    with explained(f"CACHE_DIR {directory}"):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    with log.phase(f"unpacked {image.path}"):
        size, _ = image.unpacked_size
        try:
            descriptor, size = scratch.stored(
                _unpacking(image), directory, f"image {image.path}", "CACHE_DIR", size, most
            )
        except Failed as failure:
            raise not_unpacked(f"image {image.path}", failure) from None
    return Image(image.path, descriptor, size, "")


def _unpacking(image: Image) -> Iterator[bytes]:
    progress = log.Progress("unpacking", image.size)
    for chunk in unpacked(image):
        yield chunk
        progress.update(os.lseek(image.descriptor, 0, os.SEEK_CUR))


def format_of(image: Image) -> Format | None:
    """Return the format of an image, as far as it shows without unpacking all of it; None for raw."""
    if _is_hidden(image):
        return None
    return formats.recognise(image.read, len(image.start) if image.stages else image.size)


def check_size(image: Image, disk_size: int) -> None:
    """Fail if the image is known to be larger than the disk."""
    if not image.whole and (VHD_NAME.search(image.path) or (not image.stages and archive.is_archive(image))):
        return  # the size of the file is not that of the disk in it
    content = inspect(image)
    size, is_exact = image.unpacked_size if image.stages else (content.size, image.whole)
    if image.compression == "gzip" and not image.layers and image.whole and (told := image.gzip_size) > disk_size:
        size, is_exact = _counted(image, told)
    if size > disk_size:
        least = "" if is_exact or content.format else "at least "
        raise Failure(
            f"image {image.path} is of a disk of {least}{exact(size)}, the instance's disk has {exact(disk_size)}",
            hint=f"make the disk at least {-(-size // MIB)}m",
        )


def _counted(image: Image, most: int) -> tuple[int, bool]:
    """Return how many bytes the image unpacks to, if those are not more than `most`, and whether that is exact."""
    size = 0
    with closing(unpacked(image)) as chunks, suppress(Failed):  # who writes it says what is wrong with it
        for chunk in chunks:
            size += len(chunk)
            if size > most:
                return size, False
    return size, True


def programs(image: Image | None) -> Sequence[str]:
    """Return the program that writes an image; none if the image is not there to tell."""
    if not image or not all(available(stage.argv[0]) for stage in image.stages):
        return ()
    return ["qemu-img"] if format_of(image) or archive.is_archive(image) else ["dd"]


def _is_hidden(image: Image) -> bool:
    """Return whether a compression hides the content: nothing can be unpacked of a beginning."""
    return bool(image.stages) and not image.whole


def inspect(image: Image) -> Content:
    """Return the format and size of an image; fail for what must not be, or cannot be, written to a disk."""
    form = format_of(image)
    if not form:
        require("dd")
        return Content(None, 0 if image.stages else image.size)
    if not form.virtual_size:
        deployed = ", ".join(other.name for other in formats.FORMATS if other.virtual_size)
        raise Failure(
            f"image {image.path} is in the format {form.name}: only raw, {deployed} are deployed",
            hint=f"qemu-img convert -f {form.driver} -O qcow2 {image.path} NAME-ARCH.qcow2",
        )
    require("qemu-img")
    try:
        if form.driver == "qcow2" and not image.whole:
            return Content(form, qcow2.read_header(image.read).size)
        is_there = image.whole and not image.stages  # else there is not enough of it to judge
        return Content(form, form.virtual_size(image.read, image.size) if is_there else 0)
    except Failure as failure:
        raise Failure(f"image {image.path} cannot be deployed: {failure}", hint=failure.hint) from None
    except Cut as cut:
        raise truncated(image, f"it has {exact(image.size)} of at least {exact(cut.needed)}") from None


def write(image: Image, loop: LoopDevice) -> None:
    """Write the image to the disk; what it leaves out reads as zero, whatever was there before."""
    content = inspect(image)
    blockdev.set_partitions(loop, [])
    blockdev.clear(loop)
    if content.format:
        _convert(image, content.format, content.size, loop)
        size = content.size
    else:
        size = _copy(image, loop)
    linux.flush_buffers(loop.descriptor)  # nothing that was read before may be seen in the partitions
    wholeness.check_disk(image, size, os.pread(loop.descriptor, START, 0))


def _convert(image: Image, form: Format, size: int, loop: LoopDevice) -> None:
    progress = log.Progress("writing", size)
    # O_DIRECT on the disk's side only: measured the fastest
    convert = ["qemu-img", "convert", "-n", "-p", "--target-is-zero", "-W", "-m", "16", "-t", "none",
               "-O", "raw", *_source(form), loop.path]  # fmt: skip
    # all it needs is to read the image file, whoever owns it
    room = Room([loop.path], capabilities=[linux.CAP_DAC_OVERRIDE])
    finished = pipeline(Command(convert, room), stdin=image.descriptor, on_line=qemu_img_progress(progress, size))
    check_stages(image, finished)


def qemu_img_progress(progress: log.Progress, total: int) -> Callable[[str], None]:
    """Return a function that shows the lines of `qemu-img convert -p` as progress in `total` bytes."""

    def report(line: str) -> None:
        percentage = re.search(r"\((\d{1,3}\.\d{1,9})/100%\)", line)
        if percentage:
            progress.update(int(total * float(percentage[1]) / 100))

    return report


def _copy(image: Image, loop: LoopDevice) -> int:
    """Return how many bytes the image has, unpacked."""
    dd = ["dd", f"of={loop.path}", f"bs={COPY_BLOCK}", "iflag=fullblock", "oflag=direct",
          "conv=sparse,notrunc,nocreat"]  # fmt: skip
    finished = feed(image, Command(dd, Room([loop.path])), "writing")
    if finished[-1].status and "No space left" in finished[-1].stderr:
        raise Failure(
            f"image {image.path} is of a larger disk than the instance's, which has {exact(loop.size)}",
            hint="make the disk larger",
        )
    check_stages(image, finished)
    copied = re.search(r"^(\d{1,19}) bytes? ", finished[-1].stderr, re.MULTILINE)
    if not copied:
        raise Failure(f"dd does not say how much of image {image.path} it has written", details=[finished[-1].stderr])
    return int(copied[1])
