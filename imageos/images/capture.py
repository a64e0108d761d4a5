"""Capture: make an image of an instance's first disk.

The used blocks are copied to a file without a name in the images' directory, and everything else happens to that copy:
journals are replayed, it is sealed, its free blocks are dropped. The instance's disk is only read, and is free again
as soon as it is copied. The image has no name either until it is complete, so that not even SIGKILL leaves anything.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple

from imageos import log
from imageos.disks import blockdev, discovery, ext, mounting, partitions, usage
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.discovery import Found
from imageos.disks.filesystem import FILESYSTEMS, Volume
from imageos.disks.layout import MIB
from imageos.disks.partitions import Table
from imageos.disks.usage import Map
from imageos.errors import Failure, explained
from imageos.guests import sealing, target
from imageos.images.checksums import digests_of
from imageos.images.diskimage import qemu_img_progress
from imageos.images.dump import PACKED, version
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.node import confinement, isolation, linux, space
from imageos.node.children import signals_held
from imageos.node.confinement import Room
from imageos.node.programs import available, require
from imageos.run import Command, output_of, pipeline, run

SHOWN = 10  # of the names of attributes
HEADROOM = 16 * MIB  # that sealing and replayed journals may add to the copy
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


class Destination(NamedTuple):
    """Where the image goes, and what it is called."""

    directory: str
    name: str  # NAME-ARCH
    replace: bool = False
    opened: int = -1  # descriptor of the directory

    @property
    def here(self) -> str:
        """Return a path to the directory that was opened. A user may own it, and give its name to another one."""
        return f"/proc/self/fd/{self.opened}"

    def path(self, suffix: str) -> str:
        return f"{self.directory}/{self.name}{suffix}"


class DiskCopy(NamedTuple):
    """The copy of the disk, complete and settled."""

    loop: LoopDevice
    found: Found | None  # the system on it
    used: int  # bytes


class ImageFile(NamedTuple):
    """A file of the image, without a name yet."""

    suffix: str
    descriptor: int
    sha256: str


class CaptureFormat(NamedTuple):
    """A type of image as it is captured."""

    image_type: str  # a key of IMAGE_TYPES
    description: str
    programs: Sequence[str]
    suffixes: Callable[[], Sequence[str]]  # of the files that may be made, the one that `create` looks for first
    check: Callable[[Found], None] | None  # None: the disk need not hold a system
    write: Callable[[ExitStack, DiskCopy, Destination], Iterator[ImageFile]]


def capture(source: str, capture_format: CaptureFormat, destination: Destination, seal: bool = False) -> None:
    """Make an image of the disk `source`, which nobody may be using."""
    require(*capture_format.programs)
    check_free(destination, capture_format)
    with ExitStack() as stack:
        with writing_to(destination):
            directory = os.open(destination.directory, os.O_RDONLY | os.O_DIRECTORY)
        destination = destination._replace(opened=stack.enter_context(linux.closing(directory)))
        with blockdev.claimed(source, read_only=True) as disk:
            before = blockdev.last_write(disk)
            with log.phase(f"looked at the disk of {log.size(disk.size)}"):
                is_system, used = survey(disk, capture_format, seal)
            total = sum(length for _, length in used.extents())
            with writing_to(destination):
                space.check(destination.here, total + HEADROOM)
            with log.phase(f"copied {log.size(total)} of it"):
                copied = copy(disk, used, total, open_unnamed(stack, destination), destination)
            if blockdev.last_write(disk) != before:
                raise Failure(f"disk {source} was written to while it was copied", hint="stop the instance first")
        with blockdev.attached(copied) as loop:
            found = None
            if is_system is not False:
                with as_it_is(capture_format, seal or bool(is_system)):
                    found = find_system(partitions.read(loop), capture_format)
            if found:
                settle(found, seal)
            files = list(capture_format.write(stack, DiskCopy(loop, found, total), destination))
        publish(destination, capture_format, files)


def check_free(destination: Destination, capture_format: CaptureFormat) -> None:
    """Fail if an image of this name is there, or one that `create` would take for it."""
    with explained(f"IMAGE_DIR {destination.directory}", f"mkdir -p {destination.directory}"):
        names = set(os.listdir(destination.directory))
    ours = capture_format.suffixes()
    suffixes = IMAGE_TYPES[capture_format.image_type].suffixes
    if capture_format.image_type != "tarball":  # a tarball of the same name is another image
        suffixes = tuple(suffix for suffix in suffixes if suffix not in IMAGE_TYPES["tarball"].suffixes)
    before = suffixes[: suffixes.index(ours[0])]
    for suffix in (suffix for suffix in (*before, *ours, *suffixes) if destination.name + suffix in names):
        there = f"there is an image {destination.path(suffix)}"
        if suffix in before and suffix not in ours:
            hint = "move it away, or give the new one another name"
            raise Failure(f"{there}, which would be deployed instead of the new one", hint)
        if not destination.replace:
            raise Failure(f"{there} already", hint="--force replaces it; or give the new one another name")


# --- the copy --------------------------------------------------------------------------------------------


def survey(disk: Disk, capture_format: CaptureFormat, seal: bool) -> tuple[bool | None, Map]:
    """Return whether there is a system on the disk, and what is in use; fail if this cannot be made an image of.

    Nothing is written to the disk. None: it was not cleanly unmounted, and only the copy can tell.
    """
    table = Table("", (), disk.size)
    is_system: bool | None = False
    with blockdev.attached(disk, read_only=True) as loop:
        try:
            with as_it_is(capture_format, seal):
                table = partitions.read(loop)
                is_system = bool(find_system(table, capture_format))
        except discovery.NotReplayed as failure:
            log.info(f"the copy will tell: {failure}")
            is_system = None
    return is_system, usage.find(disk, table.parts)


def find_system(table: Table, capture_format: CaptureFormat) -> Found:
    """Return the system on a disk; fail if there is none, or one that makes no such image."""
    found = discovery.find_on(table, EVERYWHERE)
    if capture_format.check and found.is_replayed:
        capture_format.check(found)
    return found


@contextmanager
def as_it_is(capture_format: CaptureFormat, needed: bool) -> Iterator[None]:
    """Take a disk as it is on which no system is found, unless the format, or something else, needs one."""
    try:
        yield
    except discovery.NotReplayed:
        raise
    except Failure as failure:
        if capture_format.check or needed:
            failure.hint = failure.hint or "make-qemu-img, without --seal, takes a disk as it is"
            raise
        for line in (*failure.details, f"no system is seen on the disk, which is taken as it is: {failure}"):
            log.info(line)


def copy(disk: Disk, used: Map, total: int, descriptor: int, destination: Destination) -> Disk:
    """Copy the used blocks of the disk to a file, which reads as zero elsewhere."""
    progress = log.Progress("copying", total)
    buffer = bytearray(usage.LONGEST)
    done = 0
    with writing_to(destination):
        os.ftruncate(descriptor, disk.size)
        for offset, length in used.extents():
            view = memoryview(buffer)[:length]
            usage.read_into(disk, offset, view)
            space.check(destination.here, length)  # others write there, too
            linux.write_all(descriptor, view, offset)
            done += length
            progress.update(done)
    return Disk(f"{disk.path} (copy)", descriptor, disk.size, is_file=True)


def settle(found: Found, seal: bool) -> None:
    """Mount the copy once, so that its journals are replayed; and seal it."""
    done = "sealed the copy" if seal else "replayed what its journals held"
    with log.phase(done), mounting.mounted_all(found.volumes):
        if seal:
            with target.opened(isolation.TARGET) as root:
                sealing.seal(root)


# --- the types -------------------------------------------------------------------------------------------


def write_tarball(stack: ExitStack, copied: DiskCopy, destination: Destination) -> Iterator[ImageFile]:
    assert copied.found
    suffix, compress = compression()
    tar = ["tar", "--create", "--file=-", "--format=posix", "--numeric-owner", "--acls", "--xattrs",
           "--xattrs-include=*", "--sparse", "--warning=no-file-ignored",
           "."]  # fmt: skip
    with log.phase("packed all files"), mounting.mounted_all(copied.found.volumes, read_only=True):
        warn_of_hidden_attributes()
        yield write_output(stack, copied, destination, suffix, Command(tar, READING), Command(compress))


def warn_of_hidden_attributes() -> None:
    """tar would have to have CAP_SYS_ADMIN to see them."""
    with target.opened(isolation.TARGET) as root:
        names = target.hidden_attributes(root, SHOWN + 1)
    if names:
        shown = ", ".join(names[:SHOWN]) + (" ..." if names[SHOWN:] else "")
        log.warning(f"attributes that nobody but root may see are left out, which a dump would keep: {shown}")


def write_dumps(stack: ExitStack, copied: DiskCopy, destination: Destination) -> Iterator[ImageFile]:
    assert copied.found
    check_names(copied.found)
    drop_preallocated(copied.found)
    ours = version("dump")
    if ours and ours >= PACKED:
        log.info(f"dump is 0.4b{ours}: older ones (before Debian 13) cannot restore what it makes")
    for volume in sorted(copied.found.volumes, key=lambda volume: volume.role):
        if volume.role in ("root", "boot"):
            suffix = f"-{volume.role}.dump"
            # a block that cannot be read is an error (-I 1), not a question (-q)
            dump = ["dump", "-0", "-q", "-I", "1", "-z", "-f", "-", volume.device]
            with log.phase(f"dumped {volume.mount_point}"):
                yield write_output(stack, copied, destination, suffix, Command(dump, Room([volume.device])))


def write_qcow2(stack: ExitStack, copied: DiskCopy, destination: Destination) -> Iterator[ImageFile]:
    if copied.found:
        drop_free(copied, copied.found)
    output = open_unnamed(stack, destination)
    progress = log.Progress("compressing", copied.used)
    convert = ["qemu-img", "convert", "-p", "-c", "-f", "raw", "-O", "qcow2", *qcow2_options(),
               "/proc/self/fd/0", f"/proc/self/fd/{output}"]  # fmt: skip
    with log.phase("compressed the copy"), writing_to(destination):
        done = pipeline(
            Command(convert, keep=[output]),
            stdin=copied.loop.disk.descriptor,
            on_line=qemu_img_progress(progress, copied.used),
            tick=lambda: space.check(destination.here, 0),  # it writes by itself
        )[0]
        if done.status:
            if "No space left" in done.stderr:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise done.failure()
        yield ImageFile(".qcow2", output, digests_of(f"/proc/self/fd/{output}", ["sha256"])["sha256"])


def check_dump(found: Found) -> None:
    """Fail if dump(8) would lose something."""
    for reason in (why_not_dumped(volume) for volume in found.volumes if volume.mount_point):
        if reason:
            raise Failure(f"the guest {reason}", hint=OTHER_THAN_DUMP)


def why_not_dumped(volume: Volume) -> str:
    if volume.role not in ("root", "boot"):
        return f"has {volume.mount_point} apart: a dump is of / and /boot only"
    if not FILESYSTEMS[volume.kind].is_dumped:
        return f"has {volume.mount_point} on {volume.kind}: dump(8) knows ext only"
    superblock = blockdev.ask(volume.device, lambda read: read(ext.SUPERBLOCK, ext.SUPERBLOCK))
    words = {offset: int.from_bytes(superblock[offset : offset + 4], "little") for offset, _ in NOT_DUMPED}
    features = " and ".join(name for (offset, bit), name in NOT_DUMPED.items() if words[offset] & bit)
    lost = f"has the feature {features} on {volume.mount_point}: dump(8) would lose files without a word"
    return lost if features else ""


def check_names(found: Found) -> None:
    """Fail if there is a name that is as long as names can be: restore(8) stumbles over it, and loses others."""
    with mounting.mounted_all(found.volumes, read_only=True):
        find = ["find", ".", "-regextype", "posix-extended", "-regex", ".*/[^/]{255}", "-print", "-quit"]
        longest = run(Command(find, READING)).strip()
    if longest:
        raise Failure(
            f"the guest has a name of 255 bytes ({os.path.basename(longest)[:30]}...): dump(8) cannot keep it",
            hint=OTHER_THAN_DUMP,
        )


def drop_preallocated(found: Found) -> None:
    """dump before 0.4b48 takes what once was in blocks that are only reserved for the content of the file."""
    with mounting.mounted_all(found.volumes), target.opened(isolation.TARGET) as root:
        target.drop_preallocated(root)


def compression() -> tuple[str, Sequence[str]]:
    """Return the suffix and the command of the fastest compression that this node has."""
    if available("zstd"):
        return ".tar.zst", ["zstd", "-q", "-T0"]
    return ".tar.gz", ["pigz"] if available("pigz") else ["gzip"]


def qcow2_options() -> Sequence[str]:
    """Return the options for zstd, which is better and quicker than zlib, if this qemu-img was built with it."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", TRIAL, "1M"]
    return () if pipeline(Command(create))[0].status else ("-o", "compression_type=zstd")


CAPTURED = {
    "tarball": CaptureFormat("tarball", "NAME-ARCH.tar.zst: the files, for any layout and filesystem", ["tar"],
                             lambda: [compression()[0]], lambda found: None, write_tarball),  # it holds everything
    "dump": CaptureFormat("dump", "NAME-ARCH-root.dump and -boot.dump, by dump(8): ext filesystems only", ["dump"],
                          lambda: ["-root.dump", "-boot.dump"], check_dump, write_dumps),
    "qemu-img": CaptureFormat("qemu", "NAME-ARCH.qcow2: the whole disk, compressed", ["qemu-img"],
                              lambda: [".qcow2"], None, write_qcow2),
}  # fmt: skip


# --- writing ---------------------------------------------------------------------------------------------


def drop_free(copied: DiskCopy, found: Found) -> None:
    """Make holes in the copy where its filesystems have nothing any more: what was removed is not in the image."""
    for device, kind in {volume.device: volume.kind for volume in found.volumes if volume.mount_point}.items():
        with mounting.mounted_somewhere(device, kind) as (directory, _):
            mounting.trim(directory)
    blockdev.flush(copied.loop)
    disk = copied.loop.disk
    kept = ((offset, offset + length) for offset, length in usage.not_free(disk, found.table.parts).extents())
    for start, end in linux.gaps(kept, disk.size):
        linux.punch_hole(disk.descriptor, start, end - start)


def write_output(
    stack: ExitStack, copied: DiskCopy, destination: Destination, suffix: str, *commands: Command
) -> ImageFile:
    output = open_unnamed(stack, destination)
    digest = hashlib.sha256()
    progress = log.Progress(f"reading for {suffix.lstrip('-.')}", copied.used)
    before = blockdev.bytes_read(copied.loop)
    with output_of(*commands) as (source, check), writing_to(destination):
        while data := os.read(source, CHUNK):
            space.check(destination.here, len(data))
            linux.write_all(output, data)
            digest.update(data)
            progress.update(blockdev.bytes_read(copied.loop) - before)
        check()
    return ImageFile(suffix, output, digest.hexdigest())


def open_unnamed(stack: ExitStack, destination: Destination) -> int:
    """Return a new file in that directory, which vanishes with its last user unless it gets a name."""
    try:
        # of root alone: images hold password hashes and keys
        descriptor = os.open(destination.here, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        unable = error.errno in (errno.EOPNOTSUPP, errno.EISDIR)
        raise Failure(
            f"cannot write to IMAGE_DIR {destination.directory}: {error.strerror}",
            hint="its filesystem has no O_TMPFILE: name a local directory, then copy the image" if unable else None,
        ) from None
    stack.callback(os.close, descriptor)
    return descriptor


@contextmanager
def writing_to(destination: Destination) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Failure(
                f"{destination.directory} is full: no image was made: {error.strerror}",
                hint="make room there, or name another directory",
            ) from None
        raise Failure(f"cannot write to {destination.directory}: {error.strerror}") from None


def publish(destination: Destination, capture_format: CaptureFormat, files: Sequence[ImageFile]) -> None:
    """Give the files their names, that by which `create` finds the image last."""
    main = capture_format.suffixes()[0]
    with writing_to(destination), ExitStack() as stack, ExitStack() as undo:
        for file in sorted(files, key=lambda file: file.suffix == main):
            checksum = open_unnamed(stack, destination)
            os.fchmod(checksum, 0o644)
            linux.write_all(checksum, f"{file.sha256}  {destination.name}{file.suffix}\n".encode())
            for descriptor, name in ((checksum, f"{file.suffix}.sha256"), (file.descriptor, file.suffix)):
                os.fsync(descriptor)
                link_file(undo, destination.opened, descriptor, destination.name + name, destination.replace)
        replaced = set(capture_format.suffixes()) - {file.suffix for file in files}  # of an older image
        for name in (f"{suffix}{end}" for suffix in replaced for end in ("", ".sha256")):
            with suppress(FileNotFoundError):
                os.unlink(destination.name + name, dir_fd=destination.opened)
        os.fsync(destination.opened)
        undo.pop_all()
    for file in files:
        log.info(f"made {destination.path(file.suffix)}: {log.size(os.fstat(file.descriptor).st_size)}")


def link_file(undo: ExitStack, directory: int, descriptor: int, name: str, replace: bool) -> None:
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
