"""The streams that import restores besides its own: those of ganeti-instance-image, and bare disks.

They carry no checksums: what can be checked is that they are complete.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from imageos import log
from imageos.backups.stream import Source, damaged
from imageos.disks import ends, partitions
from imageos.disks.layout import GPT_BACKUP, MIB
from imageos.errors import Failure
from imageos.images import dump, dumpfile, formats, qcow2, scratch
from imageos.images.imagefile import Image, decompressor, exact, not_unpacked
from imageos.images.tarball import BLOCK, is_header, octal
from imageos.node import linux
from imageos.node.confinement import Room, unpacking
from imageos.node.programs import require
from imageos.run import Command, output_of, pipeline

HUGE = 1 << 50  # bytes: a size that no partition table exceeds
DUMPS = ("root.dump", "boot.dump")  # the members that are backups of filesystems
IMAGE = "disk.img"
# What else is piped into an import, by its beginning -> what it is, and what to do with it
FOREIGN = {
    b"\x89LZO\0\r\n\x1a\n": ("compressed by lzop", "unpack it before: lzop -dc"),
    b"LZIP": ("compressed by lzip", "unpack it before: lzip -dc"),
    b"LRZI": ("compressed by lrzip", "unpack it before: lrzip -d"),
    b"\x5d\0\0": ("compressed by lzma", "unpack it before: xz --format=lzma -dc"),
    b"\x1f\x9d": ("compressed by compress", "unpack it before: gzip -dc"),
    b"PK\3\4": ("a zip archive", "unpack it before: unzip -p"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it before: 7z x -so"),
    b"Salted__": ("encrypted by openssl", "decrypt it before: openssl enc -d"),
    b"-----BEGIN PGP": ("encrypted by gpg", "decrypt it before: gpg -d"),
    b"partclone-image": ("an image of partclone", "restore it with partclone"),
    b"070701": ("a cpio archive", "make a tarball of what is in it: an image of IMAGE_TYPE=tarball"),
}


class Member(NamedTuple):
    name: str
    size: int


@contextmanager
def decompressed(source: Source, compression: str) -> Iterator[Source]:
    """Yield the rest of `source`, uncompressed."""
    command = decompressor(compression)
    require(command[0])
    with source.replayed() as (ahead, descriptor):
        joined = Command(["cat", f"/dev/fd/{ahead}", "-"], keep=[ahead])
        with output_of(joined, Command(command), stdin=descriptor) as (output, check_stages):

            def check() -> None:
                try:
                    check_stages()
                except Failure as failure:
                    raise not_unpacked("the backup stream", failure) from None

            yield Source(output, check)


def members(source: Source) -> Iterator[Member]:
    """Yield the regular files of a tar archive; the caller reads the content of each before it goes on."""
    while True:
        position = source.position
        header = source.exactly(BLOCK)
        if not header.strip(b"\0"):
            break
        if not is_header(header):
            raise damaged(position, "no header of a tar archive is there")
        name, size = header[:100].rstrip(b"\0").decode("ascii", "replace"), octal(header[124:136])
        if size < 0:
            raise damaged(position, f"the size of {name!r} makes no sense")
        if header[156:157] in (b"0", b"\0"):
            yield Member(os.path.normpath(name), size)
        elif header[156:157] != b"5" or size:
            raise damaged(position, f"{name!r} is no regular file")
        source.exactly(-size % BLOCK)
    source.end()


def unpack_dump(source: Source, member: Member, directory: str) -> None:
    """Restore a dump(8) into a mounted filesystem; `restore` reads from the stream itself."""
    what = f"{member.name} of the backup"
    descriptor = source.handed_over(member.size)
    progress = log.Progress(f"restoring {member.name}", member.size)
    before = _used(directory)
    # TMPDIR, where restore keeps a list of all directories, is its alone
    with dump.following(what) as follower:

        def tick() -> None:
            follower.tick()
            progress.update(_used(directory) - before)

        finished = pipeline(
            Command(["head", "-c", str(member.size)]),
            *follower.stages,
            Command(dump.RESTORE, unpacking(directory)),
            stdin=descriptor,
            # a pipe has no offset: what has arrived tells
            tick=tick,
            on_line=dump.watch(what),
        )
        dump.judge(Image(what, descriptor, member.size, ""), directory, finished, follower)


def _used(directory: str) -> int:
    """Return the bytes that are in use on a filesystem."""
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def disk_size(source: Source, member: Member, device_size: int) -> int | None:
    """Return the bytes of the disk in a qcow2, if that is what `member`, which comes next, is; else None.

    Fail if its beginning shows that it is not one for a disk of `device_size`. Nothing of it has been stored yet.
    """
    begin = source.peek(min(qcow2.LONGEST_HEADER, member.size))
    if not begin.startswith(qcow2.MAGIC):
        return None
    try:
        size = qcow2.read_header(lambda offset, length: begin[offset : offset + length]).size
    except Failure as failure:
        raise Failure(f"{member.name} of the backup cannot be restored: {failure}", hint=failure.hint) from None
    if size <= device_size and member.size > qcow2.largest_file(device_size):
        raise Failure(
            f"{member.name} of the backup has {exact(member.size)}: it cannot be the image of a disk of "
            f"{log.size(size)} alone"
        )
    return size


@contextmanager
def staged(source: Source, member: Member, directory: str) -> Iterator[Image]:
    """Yield a member as a file in EXPORT_DIR; it has no name, so it vanishes with us, however we end."""

    def chunks() -> Iterator[bytes]:
        progress = log.Progress(f"receiving {member.name}", member.size)
        left = member.size
        while left:
            data = source.exactly(min(left, MIB))
            left -= len(data)
            yield data
            progress.update(member.size - left)

    descriptor, size = scratch.stored(chunks(), directory, member.name, "EXPORT_DIR", member.size)
    with linux.closing(descriptor):
        yield Image(f"{member.name} of the backup", descriptor, size, "")


def other_mounts(fstab: str, ours: Sequence[str]) -> list[str]:
    """Return the lines of an fstab that are neither for swap nor for one of the mount points `ours`."""
    rows = [(line, line.split()) for line in fstab.splitlines() if not line.startswith("#")]
    return [line for line, row in rows if len(row) >= 3 and row[1] not in ours and row[2] != "swap"]


def read_table(begin: bytes, size: int = HUGE) -> partitions.Table | None:
    """Return the partition table in the first MiB of a disk of `size` bytes; None if nothing that is known begins so.

    blkid(8) judges, so that all that it knows is recognised; zeroes are an empty disk.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(begin)
        file.truncate(size)
        file.flush()
        probe = Command(["blkid", "--probe", file.name], Room([file.name]))
        done = pipeline(probe, timeout=partitions.PROBE_TIMEOUT)[0]
        if done.status not in (0, 2, 8):
            raise done.failure()
        if done.status == 2 and begin.strip(b"\0"):  # nothing found; 8: several things at once
            return None
        try:
            return partitions.read_table(file.name, size)
        except partitions.NoSystem:
            return partitions.Table("", (), size)


def least_size(table: partitions.Table, begin: bytes) -> int:
    """Return the bytes that a disk with this table, and this beginning, has at least."""
    last = max((part.end for part in (*table.parts, *table.extended) if part.number), default=0)
    # of a backup the end of a GPT is demanded, too, unlike of an image: the disk had it
    return last + GPT_BACKUP if table.kind == "gpt" and last else max(last, ends.least_size(begin))


def foreign(begin: bytes) -> tuple[str, str | None]:
    """Return what a stream is that begins so and is no backup, for a message; and what to do with it."""
    image = "it is an image, no backup: make it one of a variant, and add the instance with that"
    if dumpfile.order_of(begin[: dumpfile.RECORD]):
        return "is a dump of one filesystem", image
    form = formats.recognise(lambda offset, length: begin[offset : offset + length], HUGE)
    if form:
        return f"is a disk image ({form.name})", f"{image}; or convert it: qemu-img convert -O raw"
    for mark, (what, hint) in FOREIGN.items():
        if begin.startswith(mark):
            return f"is {what}", hint
    return f"begins with '{re.sub(rb'[^ -~]', b'.', begin[:16]).decode()}'", None
