"""Capture: make an image of an instance's first disk.

The used blocks are copied to a file without a name in the images' directory, and everything else happens to that copy:
journals are replayed, it is sealed, its free blocks are dropped. The instance's disk is only read, and is free again
as soon as it is copied. The image has no name either until it is complete, so that not even SIGKILL leaves anything.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from imageos import log
from imageos.disks import discovery, disk, ext, filesystem, usage
from imageos.disks.discovery import Found, Table
from imageos.disks.disk import Attached, Device
from imageos.disks.filesystem import Volume
from imageos.disks.layout import MIB
from imageos.disks.usage import Map
from imageos.errors import Failure
from imageos.guests import sealing, target
from imageos.guests.sandbox import GuestDisk
from imageos.images.checksums import digests_of
from imageos.images.dump import PACKED, version
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.node import confinement, isolation, linux, space
from imageos.node.confinement import Room
from imageos.run import available, output_of, pipeline, require, run, signals_held

SPARE = 16 * MIB  # that sealing and replayed journals may add to the copy
CHUNK = MIB
OTHER_THAN_DUMP = "make a tarball (ganeti-image -t tarball) or a disk image (make-qemu-img) of it"
READING = Room(work=isolation.TARGET, capabilities=[linux.CAP_DAC_OVERRIDE])  # whose mounts are read-only
TRIAL = f"{confinement.TEMPORARY}/trial.qcow2"
EVERYWHERE = ("/",)  # all that the guest mounts is part of the image
# Features (offset in the superblock, bit) whose files dump(8) loses or fills with zeroes without a word
NOT_DUMPED = {
    (0x60, 0x1): "compression",
    (0x60, 0x400): "ea_inode",
    (0x60, 0x1000): "dirdata",
    (0x60, 0x8000): "inline_data",
    (0x60, 0x10000): "encrypt",
    (0x60, 0x20000): "casefold",
    (0x64, 0x200): "bigalloc",
    (0x64, 0x8000): "verity",
}


@dataclass(frozen=True)
class Place:
    """Where the image goes, and what it is called."""

    directory: str
    name: str  # NAME-ARCH
    replace: bool = False

    def path(self, suffix: str) -> str:
        return f"{self.directory}/{self.name}{suffix}"


@dataclass(frozen=True)
class Copy:
    """The copy of the disk, complete and settled."""

    device: Device
    attached: Attached
    found: Found | None  # the system on it
    used: int  # bytes


@dataclass(frozen=True)
class New:
    """A file of the image, without a name yet."""

    suffix: str
    descriptor: int
    sha256: str


@dataclass(frozen=True)
class Kind:
    """A type of image as it is captured."""

    image_type: str  # a key of IMAGE_TYPES
    programs: Sequence[str]
    suffixes: Callable[[], Sequence[str]]  # of the files that may be made, the one that `create` looks for first
    check: Callable[[Found], None] | None  # None: the disk need not hold a system
    write: Callable[[ExitStack, Copy, Place], Iterator[New]]


def capture(source: str, kind: Kind, place: Place, seal: bool = False) -> None:
    """Make an image of the disk `source`, which nobody may be using."""
    require(*kind.programs)
    check_place(place, kind)
    with ExitStack() as stack:
        with disk.claimed(source, read_only=True) as device:
            before = disk.last_write(device)
            with log.phase(f"looked at the disk of {log.size(device.size)}"):
                is_system, used = survey(device, kind, seal)
            total = sum(length for _, length in used.runs())
            check_space(place.directory, total)
            with log.phase(f"copied {log.size(total)} of it"):
                copied = copy(device, used, total, unnamed(stack, place.directory), place.directory)
            if disk.last_write(device) != before:
                raise Failure(f"disk {source} was written to while it was copied", hint="stop the instance first")
        with disk.attached(copied) as attached:
            found = discovery.find(attached, EVERYWHERE) if is_system else None
            if found:
                settle(found, seal)
            news = list(kind.write(stack, Copy(copied, attached, found, total), place))
        publish(place, kind, news)


def check_place(place: Place, kind: Kind) -> None:
    """Fail if an image of this name is there, or one that `create` would take for it."""
    try:
        names = set(os.listdir(place.directory))
    except OSError as error:
        raise Failure(f"IMAGE_DIR {place.directory}: {error.strerror}", hint=f"mkdir -p {place.directory}") from None
    ours = kind.suffixes()
    known = IMAGE_TYPES[kind.image_type].suffixes
    before = known[: known.index(ours[0])]
    for suffix in (*before, *ours, *known):
        if place.name + suffix in names and suffix in before and suffix not in ours:
            raise Failure(
                f"there is an image {place.path(suffix)}, which would be deployed instead of the new one",
                hint="move it away, or give the new one another name",
            )
        if place.name + suffix in names and not place.replace:
            raise Failure(
                f"there is an image {place.path(suffix)} already",
                hint="--force replaces it; or give the new one another name",
            )


def check_space(directory: str, needed: int) -> None:
    why = space.lacking(directory, needed + SPARE)
    if why:
        raise Failure(
            f"the copy of the disk alone takes more room than {directory} has: {why}",
            hint="make room there, or name another directory",
        )


# --- the copy --------------------------------------------------------------------------------------------


def survey(device: Device, kind: Kind, seal: bool) -> tuple[bool, Map]:
    """Whether there is a system on the disk, and what is in use; Failure if this cannot be made an image of."""
    table = Table("", (), device.size)
    with disk.attached(device, read_only=True) as attached:
        try:
            table = discovery.read(attached)
            found = discovery.find(attached, EVERYWHERE)
        except Failure as failure:
            if kind.check or seal:
                failure.hint = failure.hint or "make-qemu-img, without --seal, takes a disk as it is"
                raise
            for line in (*failure.details, f"no system is seen on the disk, which is taken as it is: {failure}"):
                log.info(line)
            found = None
        if found and kind.check:
            kind.check(found)
    return bool(found), usage.find(device, table.parts)


def copy(device: Device, used: Map, total: int, descriptor: int, directory: str) -> Device:
    """The used blocks of the disk, in a file that reads as zero elsewhere."""
    progress = log.Progress("copying", total)
    buffer = bytearray(usage.RUN)
    done = 0
    with writing_to(directory):
        os.ftruncate(descriptor, device.size)
        for offset, length in used.runs():
            view = memoryview(buffer)[:length]
            usage.read_into(device, offset, view)
            check_room(directory, length)
            write_all(descriptor, view, offset)
            done += length
            progress.update(done)
    progress.close()
    return Device(f"{device.path} (copy)", descriptor, device.size, is_file=True)


def settle(found: Found, seal: bool) -> None:
    """Mount the copy once, so that its journals are replayed; and seal it."""
    with log.phase("sealed the copy" if seal else "replayed what its journals held"), ExitStack() as stack:
        filesystem.mount_all(stack, found.volumes, isolation.TARGET)
        if seal:
            with target.opened(isolation.TARGET, "", GuestDisk([], []), 0) as root:
                sealing.seal(root)


# --- the types -------------------------------------------------------------------------------------------


def write_tarball(stack: ExitStack, copied: Copy, place: Place) -> Iterator[New]:
    assert copied.found
    suffix, compress = compression()
    tar = ["tar", "--create", "--file=-", "--format=posix", "--numeric-owner", "--acls", "--xattrs",
           "--xattrs-include=*", "--sparse", "--warning=no-file-ignored",
           "."]  # fmt: skip
    with log.phase("packed all files"), ExitStack() as mounts:
        filesystem.mount_all(mounts, copied.found.volumes, isolation.TARGET, read_only=True)
        yield written(stack, copied, place, suffix, [tar, compress], READING)


def write_dumps(stack: ExitStack, copied: Copy, place: Place) -> Iterator[New]:
    assert copied.found
    check_names(copied.found)
    drop_preallocated(copied.found)
    ours = version("dump")
    if ours and ours >= PACKED:
        log.info(f"dump is 0.4b{ours}: older ones (before Debian 13) cannot restore what it makes")
    for volume in sorted(copied.found.volumes, key=lambda one: one.role):
        if volume.role in ("root", "boot"):
            suffix = f"-{volume.role}.dump"
            # a block that cannot be read is an error (-I 1), not a question (-q)
            dump = ["dump", "-0", "-q", "-I", "1", "-z", "-f", "-", volume.device]
            with log.phase(f"dumped {volume.mount_point}"):
                yield written(stack, copied, place, suffix, [dump], Room([volume.device]))


def write_qcow2(stack: ExitStack, copied: Copy, place: Place) -> Iterator[New]:
    if copied.found:
        drop_free(copied, copied.found)
    output = unnamed(stack, place.directory)
    progress = log.Progress("compressing", copied.used)

    def report(line: str) -> None:
        percentage = re.search(r"\((\d+\.\d+)/100%\)", line)
        if percentage:
            progress.update(int(copied.used * float(percentage[1]) / 100))

    convert = ["qemu-img", "convert", "-p", "-c", "-f", "raw", "-O", "qcow2", *qcow2_options(),
               "/proc/self/fd/0", f"/proc/self/fd/{output}"]  # fmt: skip
    with log.phase("compressed the copy"):
        done = pipeline(
            [convert],
            stdin=copied.device.descriptor,
            keep=[output],
            on_line=report,
            tick=lambda: check_room(place.directory, 0),  # it writes by itself
        )[0]
        progress.close()
        if done.status:
            if "No space left" in done.stderr:
                raise no_space(place.directory)
            raise done.failure()
        yield New(".qcow2", output, digests_of(f"/proc/self/fd/{output}", ["sha256"])["sha256"])


def nothing_to_check(_found: Found) -> None:
    """A tarball holds everything."""


def check_dump(found: Found) -> None:
    """Fail if dump(8) would lose something."""
    for volume in found.volumes:
        if not volume.mount_point:
            continue
        if volume.role not in ("root", "boot"):
            raise Failure(
                f"the guest has {volume.mount_point} apart: a dump is of / and /boot only", hint=OTHER_THAN_DUMP
            )
        if not volume.kind.startswith("ext"):
            raise Failure(
                f"the guest's {volume.mount_point} is {volume.kind}: dump(8) knows ext only", hint=OTHER_THAN_DUMP
            )
        features = not_dumped(volume)
        if features:
            raise Failure(
                f"the guest's {volume.mount_point} has the feature {' and '.join(features)}: "
                "dump(8) would lose files without a word",
                hint=OTHER_THAN_DUMP,
            )


def not_dumped(volume: Volume) -> list[str]:
    with open(volume.device, "rb") as file:
        superblock = os.pread(file.fileno(), ext.SUPERBLOCK, ext.SUPERBLOCK)
    return [
        name
        for (offset, bit), name in NOT_DUMPED.items()
        if int.from_bytes(superblock[offset : offset + 4], "little") & bit
    ]


def check_names(found: Found) -> None:
    """Fail if there is a name that is as long as names can be: restore(8) stumbles over it, and loses others."""
    with ExitStack() as mounts:
        filesystem.mount_all(mounts, found.volumes, isolation.TARGET, read_only=True)
        find = ["find", ".", "-regextype", "posix-extended", "-regex", ".*/[^/]{255}", "-print", "-quit"]
        longest = run(find, room=READING).strip()
    if longest:
        raise Failure(
            f"the guest has a name of 255 bytes ({os.path.basename(longest)[:30]}...): dump(8) cannot keep it",
            hint=OTHER_THAN_DUMP,
        )


def drop_preallocated(found: Found) -> None:
    """dump before 0.4b48 takes what once was in blocks that are only reserved for the content of the file."""
    with ExitStack() as mounts:
        filesystem.mount_all(mounts, found.volumes, isolation.TARGET)
        with target.opened(isolation.TARGET, "", GuestDisk([], []), 0) as root:
            target.drop_preallocated(root)


def compression() -> tuple[str, Sequence[str]]:
    """The fastest that this node has."""
    if available("zstd"):
        return ".tar.zst", ["zstd", "-q", "-T0"]
    return ".tar.gz", ["pigz"] if available("pigz") else ["gzip"]


def qcow2_options() -> Sequence[str]:
    """zstd where this qemu-img was built with it: better and quicker than zlib."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", TRIAL, "1M"]
    return () if pipeline([create])[0].status else ("-o", "compression_type=zstd")


CAPTURED = {
    "tarball": Kind("tarball", ["tar"], lambda: [compression()[0]], nothing_to_check, write_tarball),
    "dump": Kind("dump", ["dump"], lambda: ["-root.dump", "-boot.dump"], check_dump, write_dumps),
    "qemu-img": Kind("qemu", ["qemu-img"], lambda: [".qcow2"], None, write_qcow2),
}


# --- writing ---------------------------------------------------------------------------------------------


def drop_free(copied: Copy, found: Found) -> None:
    """Make holes in the copy where its filesystems have nothing any more: what was removed is not in the image."""
    for device, kind in {volume.device: volume.kind for volume in found.volumes if volume.mount_point}.items():
        with filesystem.mounted_somewhere(device, kind) as directory:
            filesystem.trim(directory)
    disk.flush(copied.device, copied.attached.descriptor)
    position = 0
    for offset, length in usage.not_free(copied.device, found.table.parts).runs():
        if offset > position:
            linux.punch_hole(copied.device.descriptor, position, offset - position)
        position = offset + length


def written(
    stack: ExitStack,
    copied: Copy,
    place: Place,
    suffix: str,
    stages: Sequence[Sequence[str]],
    room: Room,
) -> New:
    """What the last of the stages prints, in a new file; `room` as in run.output_of."""
    output = unnamed(stack, place.directory)
    digest = hashlib.sha256()
    progress = log.Progress(f"reading for {suffix.lstrip('-.')}", copied.used)
    before = disk.bytes_read(copied.attached)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, nothing)
    with output_of(stages, nothing, room=room) as (source, check), writing_to(place.directory):
        while data := os.read(source, CHUNK):
            check_room(place.directory, len(data))
            write_all(output, memoryview(data))
            digest.update(data)
            progress.update(disk.bytes_read(copied.attached) - before)
        check()
    progress.close()
    return New(suffix, output, digest.hexdigest())


def unnamed(stack: ExitStack, directory: str) -> int:
    """A file in `directory` that vanishes with its last user unless it gets a name."""
    try:
        # of root alone: images hold password hashes and keys
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        unable = error.errno in (errno.EOPNOTSUPP, errno.EISDIR)
        raise Failure(
            f"cannot write to IMAGE_DIR {directory}: {error.strerror}",
            hint="its filesystem has no O_TMPFILE: name a local directory, then copy the image" if unable else None,
        ) from None
    stack.callback(os.close, descriptor)
    return descriptor


def write_all(descriptor: int, data: memoryview, offset: int | None = None) -> None:
    while data:
        count = os.write(descriptor, data) if offset is None else os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset = None if offset is None else offset + count


@contextmanager
def writing_to(directory: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise no_space(directory) from None
        raise Failure(f"cannot write to {directory}: {error.strerror}") from None


def check_room(directory: str, need: int) -> None:
    """Others write there, too, while the image is made."""
    why = space.lacking(directory, need)
    if why:
        raise no_space(directory, f": {why}")


def no_space(directory: str, why: str = "") -> Failure:
    return Failure(f"{directory} is full: no image was made{why}", hint="make room there, or name another directory")


def publish(place: Place, kind: Kind, news: Sequence[New]) -> None:
    """Give the files their names, that by which `create` finds the image last."""
    main = kind.suffixes()[0]
    with writing_to(place.directory), ExitStack() as stack, ExitStack() as undo:
        directory = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        for new in sorted(news, key=lambda new: new.suffix == main):
            checksum = unnamed(stack, place.directory)
            os.fchmod(checksum, 0o644)
            write_all(checksum, memoryview(f"{new.sha256}  {place.name}{new.suffix}\n".encode()))
            for descriptor, name in ((checksum, f"{new.suffix}.sha256"), (new.descriptor, new.suffix)):
                os.fsync(descriptor)
                name_it(undo, directory, descriptor, place.name + name, place.replace)
        for suffix in set(kind.suffixes()) - {new.suffix for new in news}:  # of an older image, which is replaced
            for name in (suffix, f"{suffix}.sha256"):
                with suppress(FileNotFoundError):
                    os.unlink(place.path(name))
        os.fsync(directory)
        undo.pop_all()
    for new in news:
        log.info(f"made {place.path(new.suffix)}: {log.size(os.fstat(new.descriptor).st_size)}")


def name_it(undo: ExitStack, directory: int, descriptor: int, name: str, replace: bool) -> None:
    """Let an unnamed file appear, whole; unless it may replace one, never in the place of another."""
    link = partial(
        os.link, f"/proc/self/fd/{descriptor}", src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=True
    )
    if replace:
        temporary = f".{name}.{secrets.token_hex(4)}"
        try:
            link(temporary)
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
            raise
    else:
        with signals_held():
            link(name)
            undo.callback(os.unlink, name, dir_fd=directory)
