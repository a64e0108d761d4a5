"""The streams that import restores besides its own: those of ganeti-instance-image, and bare disks.

They carry no checksums: what can be checked is that they are complete.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from imageos import log, run
from imageos.backups.stream import Source, damaged, truncated
from imageos.disks import discovery
from imageos.disks.disk import Attached
from imageos.disks.layout import MIB, SECTOR
from imageos.errors import Failure
from imageos.images import dump, qcow2
from imageos.images.imagefile import COMPRESSIONS, Image
from imageos.node import space
from imageos.node.confinement import Room, unpacking

BLOCK = 512
HUGE = 1 << 50  # bytes: a size that no partition table exceeds
BACKUP_TABLE = 33 * SECTOR  # of a GPT, behind the last partition
DUMPS = ("root.dump", "boot.dump")  # the members that are backups of filesystems
IMAGE = "disk.img"


@dataclass(frozen=True)
class Member:
    name: str
    size: int
    place: int  # of its header in the stream


def compression(begin: bytes) -> str:
    """The name of the compression of a stream that begins so, or an empty string."""
    return next((name for name, one in COMPRESSIONS.items() if begin.startswith(one.magic)), "")


@contextmanager
def decompressed(source: Source, name: str) -> Iterator[Source]:
    """What comes out of the rest of `source`."""
    commands = COMPRESSIONS[name].commands
    command = next((one for one in commands if run.available(one[0])), commands[-1])
    run.require(command[0])
    with source.replayed() as (ahead, descriptor):
        stages = [["cat", f"/dev/fd/{ahead}", "-"], command]
        with run.output_of(stages, descriptor, keep=[ahead]) as (output, check_stages):

            def check() -> None:
                try:
                    check_stages()
                except Failure as failure:
                    raise Failure(f"the backup stream is damaged or truncated: {failure}") from None

            yield Source(output, check)


def is_archive(begin: bytes) -> bool:
    """Whether a tar archive begins so: the checksum of its first header is right (POSIX.1-2017, ustar)."""
    return _octal(begin[148:156]) == sum(begin[:148] + b" " * 8 + begin[156:BLOCK]) if len(begin) >= BLOCK else False


def members(source: Source) -> Iterator[Member]:
    """The regular files of a tar archive; the caller reads the content of each before it goes on."""
    while True:
        place = source.position
        header = source.exactly(BLOCK)
        if not header.strip(b"\0"):
            break
        if not is_archive(header):
            raise damaged(place, "no header of a tar archive is there")
        name, size = header[:100].rstrip(b"\0").decode("ascii", "replace"), _size(header[124:136])
        if size < 0:
            raise damaged(place, f"the size of {name!r} makes no sense")
        if header[156:157] in (b"0", b"\0"):
            yield Member(os.path.normpath(name), size, place)
        elif header[156:157] != b"5" or size:
            raise damaged(place, f"{name!r} is no regular file")
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
            follower.give_up()
            progress.update(_used(directory) - before)

        finished = run.pipeline(
            [["head", "-c", str(member.size)], follower.stage, dump.RESTORE],
            stdin=descriptor,
            room=unpacking(directory),
            # a pipe has no place: what has arrived tells
            tick=tick,
            on_line=dump.watch(what),
            keep_upstream=follower.keep,
            on_start=follower.start,
        )
        progress.close()
        dump.judge(Image(what, descriptor, member.size, ""), directory, finished, follower)


def _used(directory: str) -> int:
    """Bytes that are in use on a filesystem."""
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def disk_size(source: Source, member: Member, device_size: int) -> int | None:
    """Bytes of the disk that a member, which comes next, is a qcow2 of; None if it is none.

    Failure if it is none for a disk of `device_size`, as far as its beginning tells. Nothing of it has been stored yet.
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
            f"{member.name} of the backup has {log.size(member.size)} ({member.size} bytes): it cannot be "
            f"the image of a disk of {log.size(size)} alone"
        )
    return size


@contextmanager
def staged(source: Source, member: Member, directory: str) -> Iterator[Image]:
    """A member as a file in EXPORT_DIR, without a name: it is gone with us, however we end."""

    def check_room(need: int) -> None:
        why = space.lacking(directory, need)
        if why:
            raise OSError(errno.ENOSPC, why)

    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            progress = log.Progress(f"receiving {member.name}", member.size)
            left = member.size
            check_room(left)
            while left:
                data = source.exactly(min(left, MIB))
                check_room(len(data))  # others write there, too
                file.write(data)
                left -= len(data)
                progress.update(member.size - left)
            progress.close()
            file.flush()
            yield Image(f"{member.name} of the backup", file.fileno(), member.size, "")
    except OSError as error:
        raise Failure(
            f"cannot keep {log.size(member.size)} of {member.name} in EXPORT_DIR {directory}: {error.strerror}",
            hint="set EXPORT_DIR to a directory with enough room",
        ) from None


def other_mounts(fstab: str, ours: Sequence[str]) -> list[str]:
    """The lines of an fstab that are not about swap nor about one of the mount points `ours`."""
    lines = []
    for line in fstab.splitlines():
        fields = line.split()
        if len(fields) >= 3 and not line.startswith("#") and fields[1] not in ours and fields[2] != "swap":
            lines.append(line)
    return lines


def read_table(begin: bytes, size: int = HUGE) -> discovery.Table | None:
    """The partition table in the first MiB of a disk, which has `size` bytes; None if nothing that is known begins so.

    Judged by blkid(8), so that all that it knows is recognised; zeroes are an empty disk.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(begin)
        file.truncate(size)
        file.flush()
        probe = ["blkid", "--probe", file.name]
        done = run.pipeline([probe], timeout=discovery.PROBE_TIMEOUT, room=Room([file.name]))[0]
        if done.status not in (0, 2, 8):
            raise done.failure()
        if done.status == 2 and begin.strip(b"\0"):  # nothing found; 8: several things at once
            return None
        try:
            return discovery.read_table(Attached(file.name, file.fileno(), size))
        except discovery.NoSystem:
            return discovery.Table("", (), size)


def least_size(table: discovery.Table) -> int:
    """Bytes that a disk with this table has at least."""
    last = max((part.end for part in (*table.parts, *table.extended) if part.number), default=0)
    return last + BACKUP_TABLE if table.kind == "gpt" and last else last


def printable(begin: bytes) -> str:
    """How a stream begins, for a message."""
    return re.sub(rb"[^ -~]", b".", begin[:16]).decode()


def check_complete(received: int, table: discovery.Table) -> None:
    if received < least_size(table):
        raise truncated(received)


def _size(field: bytes) -> int:
    if field[0] & 0x80:  # GNU tar: more than 8 GiB in base 256
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
