"""Look into a disk image before it is written: what its disk would be refused for costs no disk then.

Most images need a look at how their filesystems begin, and no more. Where that leaves doubt, the disk is looked into as
it is once it is written: a raw image itself, of any other first the beginnings of its partitions, and then, where those
do not tell, a copy. What has to be unpacked to be read shows all this only on the disk.
"""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, NamedTuple

from imageos import log
from imageos.disks import blockdev, btrfs, discovery, ends, mounting, partitions, superblock
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.btrfs import MountedTwice
from imageos.disks.discovery import Found, NotReplayed, NotSeen
from imageos.disks.ext import Read
from imageos.disks.filesystem import FILESYSTEMS
from imageos.disks.layout import MIB, SECTOR
from imageos.disks.partitions import NoSystem, Table
from imageos.errors import Failure
from imageos.images import archive, diskimage, scratch, wholeness
from imageos.images.formats import Format
from imageos.images.imagefile import START, Image
from imageos.node import linux, space
from imageos.node.programs import available
from imageos.settings import Settings

NODE = re.compile(r"/dev/loop\d+(?:p(\d+))?")  # it is gone when the message is read
MOST = 128  # MiB of beginnings
WRITING = "error while writing"  # says qemu-img if it is not the image that is at fault
HINT = "set NOMOUNT=yes if this is not Linux, or cannot be read (encrypted, RAID)"


class _Unknown(Failure):
    """The content of an image cannot be judged before it is on the disk."""


def find(loop: LoopDevice) -> Found:
    """Return the system on a disk that a disk image was written to."""
    try:
        found = discovery.find(loop)
        if not found.is_whole:
            kind = NoSystem if found.is_replayed else NotReplayed
            raise kind(f"{found.root} has /etc, but neither /bin nor /usr/bin, and its /usr is not on this disk")
        return found
    except (NoSystem, NotSeen) as failure:
        failure.hint = failure.hint or HINT
        raise


def check(settings: Settings, image: Image, *, now: bool = False) -> None:
    """Fail if a disk with this image is certain to be refused once it is written, or `now`, as the node is at present.

    `diskimage.check` comes before. For root, in a mount namespace of its own.
    """
    if image.stages or archive.is_archive(image) or not all(map(available, partitions.PROGRAMS)):
        return
    content = diskimage.inspect(image)
    if content.size < SECTOR:
        raise Failure(f"image {image.path} is of {content.size} bytes: that is no disk")
    with _beginnings(image, content.format, content.size) as disk:
        start = disk.read(0, START)
        wholeness.check_disk(image, disk.size, start)
        if settings.nomount:
            return
        try:
            for identity in _btrfs(disk, start) if now else ():
                btrfs.check_no_twin(identity)
            if not _is_plain(disk, start):
                _look(settings, disk)
        except (_Unknown, NotReplayed) as unknown:
            log.debug(f"image {image.path} cannot be looked into before it is written: {unknown}")
        except MountedTwice as twin:
            if now:
                raise MountedTwice(f"image {image.path}: {twin}", twin.hint) from None
            log.debug(f"image {image.path} cannot be looked into at present: {twin}")
        except (NoSystem, NotSeen, mounting.NotMountable) as failure:
            failure.hint = failure.hint or HINT
            failure.args = (f"image {image.path}: {NODE.sub(_name, str(failure))}",)
            raise


def _name(node: re.Match[str]) -> str:
    return f"partition {node[1]}" if node[1] else "it"


def _look(settings: Settings, disk: _Beginnings) -> None:
    """Fail as `find` and mounting would. Anything else of a disk than its beginnings is copied only if it has to be."""
    with blockdev.attached(Disk(disk.image.path, disk.descriptor, disk.size, is_file=True), read_only=True) as loop:
        if not disk.format:
            _check_system(loop)
            return
        table = _read(loop, disk)
        may_hold_one = any(part.kind in FILESYSTEMS or (part.volume and not part.obstacle) for part in table.parts)
        if not (may_hold_one or table.unread):  # the metadata of a group may lie elsewhere, too
            _check_system(loop)
            return
    is_odd = table.unread or any(part.obstacle for part in table.parts)
    others = [(part.start, part.end) for part in table.parts if part.kind not in (superblock.LVM, "swap")]
    if is_odd or not _is_readable(disk, others):
        with _copied(disk, settings.cache_dir) as copy:
            _check_system(copy)


def _check_system(loop: LoopDevice) -> None:
    with log.muted():  # what is found is told when it is written
        mounting.check_all(find(loop).volumes)


# How partitions begin


class _Beginnings(NamedTuple):
    """A file that reads as the disk in an image where that was fetched, and else as zero; a raw image is one itself."""

    image: Image
    format: Format | None
    descriptor: int
    size: int
    fetched: set[int]  # numbers of MiB

    def read(self, offset: int, length: int) -> bytes:
        if offset >= self.size:
            return b""
        self._fetch(range(offset // MIB, (offset + length - 1) // MIB + 1))
        return os.pread(self.descriptor, min(length, self.size - offset), offset)

    def fetch(self, starts: Iterable[int]) -> None:
        """Fetch a MiB or more from each of these on."""
        self._fetch(number for start in starts for number in (start // MIB, (start + MIB - 1) // MIB))

    def _fetch(self, numbers: Iterable[int]) -> None:
        wanted = sorted({number for number in numbers if number * MIB < self.size} - self.fetched)
        if not (self.format and wanted):
            return
        self.fetched.update(wanted)
        if len(self.fetched) > MOST:
            raise _Unknown("it has too many partitions")
        sizes = {number * MIB: min(MIB, self.size - number * MIB) for number in wanted}
        with ExitStack() as stack:
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="preview.", dir=os.environ.get("TMPDIR"))
            )
            made = os.open(f"{directory}/beginnings", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            descriptor = stack.enter_context(linux.closing(made))
            os.ftruncate(descriptor, sum(sizes.values()))
            diskimage.extract(self.image, self.format, sizes, directory, "beginnings")
            place = 0
            for offset, size in sizes.items():
                scratch.write(self.descriptor, os.pread(descriptor, size, place), offset)
                place += size


@contextmanager
def _beginnings(image: Image, form: Format | None, size: int) -> Iterator[_Beginnings]:
    if not form:
        yield _Beginnings(image, None, image.descriptor, size // SECTOR * SECTOR, set())
        return
    with linux.closing(os.memfd_create("imageos")) as descriptor:
        os.ftruncate(descriptor, size)
        yield _Beginnings(image, form, descriptor, size, set())


def _read(loop: LoopDevice, disk: _Beginnings) -> Table:
    """Return the partitions of a disk, the beginnings of all of them fetched."""
    disk.fetch([max(0, disk.size - MIB)])  # the other copy of a GPT
    while True:
        fetched = len(disk.fetched)
        linux.flush_buffers(loop.descriptor)
        table = partitions.read_table(loop.path, loop.size)
        # those in an extended partition are found one after the other
        disk.fetch(part.start for part in (*table.parts, *table.extended))
        if len(disk.fetched) == fetched:
            return partitions.read(loop)


def _btrfs(disk: _Beginnings, begin: bytes) -> set[uuid.UUID]:
    starts = [start for start, _ in _places(disk, begin)]
    disk.fetch(starts)
    devices = (superblock.btrfs_device(_from(disk, start)) for start in starts)
    return {device.filesystem for device in devices if device}


def _places(disk: _Beginnings, begin: bytes) -> list[tuple[int, int]]:
    """Return where the partitions start and end; without a table the disk is one."""
    return ends.places(disk.read, begin) or [(0, disk.size)]


def _is_plain(disk: _Beginnings, begin: bytes) -> bool:
    """Return whether all that may be the root is a filesystem that can be mounted, and nothing is in a volume group."""
    if ends.is_odd(ends.places(disk.read, begin), begin, disk.size):
        return False
    places = _places(disk, begin)
    return superblock.LVM not in _kinds(disk, places).values() and _is_readable(disk, places)


def _is_readable(disk: _Beginnings, places: Sequence[tuple[int, int]]) -> bool:
    """Return whether there are filesystems that can be mounted, and no others that the root may be on.

    The largest may be the root, whatever it is.
    """
    if not places:  # swap only
        return False
    kinds = _kinds(disk, places)
    unreadable = {*kinds.values()} - {*FILESYSTEMS, ""}
    largest = max(places, key=lambda place: place[1] - place[0])
    return kinds[largest] in FILESYSTEMS and not unreadable and not _obstructed(disk, places)


def _kinds(disk: _Beginnings, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
    disk.fetch(start for start, _ in places)
    return {(start, end): superblock.kind(_from(disk, start), end - start) for start, end in places}


def _obstructed(disk: _Beginnings, places: Sequence[tuple[int, int]]) -> bool:
    """Return whether one of the filesystems there cannot be mounted, or not without another device."""
    numbers: dict[uuid.UUID, set[int]] = {}
    needed: dict[uuid.UUID, int] = {}
    for (start, end), kind in _kinds(disk, places).items():
        read = _from(disk, start)
        if kind in FILESYSTEMS and not _can_be_mounted(kind, read, end - start):
            return True
        device = superblock.btrfs_device(read)
        if device:
            numbers.setdefault(device.filesystem, set()).add(device.number)
            needed[device.filesystem] = device.devices
    return any(len(numbers[identity]) < count for identity, count in needed.items())


def _can_be_mounted(kind: str, read: Read, size: int) -> bool:
    major, minor = os.uname().release.split(".")[:2]
    linux_version = int(major), int(re.sub(r"\D.*", "", minor) or 0)
    return superblock.is_usual(kind, read, linux_version) and not mounting.why_not(kind, read, size, writable=True)


def _from(disk: _Beginnings, start: int) -> Read:
    return lambda offset, length: disk.read(start + offset, length)


# All of it


@contextmanager
def _copied(disk: _Beginnings, cache: str) -> Iterator[LoopDevice]:
    """Yield a disk that the image was written to, in a file that vanishes with us, in CACHE_DIR or beside the image."""
    assert disk.format
    need = diskimage.measure(disk.image, disk.format)
    with _file_of([cache, os.path.dirname(disk.image.path)], need, disk.size) as file:
        copy = Disk(f"of image {disk.image.path}", file.fileno(), disk.size, is_file=True)
        with blockdev.attached(copy, direct=True) as loop:
            try:
                with log.phase(f"copied {disk.image.path}, to see what there is beside what cannot be read"):
                    diskimage.write(disk.image, loop)
                    blockdev.use_cache(loop)
            except Failure as failure:
                if WRITING in f"{failure} {failure.details}":  # others have filled the directory
                    raise _Unknown(f"it cannot be copied: {failure}") from None
                raise
            yield loop


def _file_of(directories: Sequence[str], need: int, size: int) -> IO[bytes]:
    """Return a sparse file of `size` bytes, without a name, in the first directory that has room for `need` of them."""
    why = ""
    for directory in directories:
        try:
            space.check(directory, need)
            with ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))
                file.truncate(size)  # not every filesystem has files as large as a disk
                stack.pop_all()
                return file
        except OSError as error:
            why = str(error.strerror)
    raise _Unknown(f"it cannot be copied to {' or '.join(directories)}: {why}")
