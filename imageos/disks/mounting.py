"""Mounting the guest's filesystems: what is written reaches the disk, and no link leads to the node."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress

from imageos import log
from imageos.disks import blockdev
from imageos.disks.btrfs import MountedTwice
from imageos.disks.ext import Read
from imageos.disks.filesystem import FILESYSTEMS, Volume
from imageos.errors import DAMAGED, Failure, explained
from imageos.node import isolation, linux
from imageos.node.children import meanwhile

NOT_REPLAYED = "is in use, or was not cleanly unmounted: what only its journal holds is not seen"


class NotWritten(Failure):
    """Not all that was written to a filesystem is on its device."""


class NotMountable(Failure):
    """The superblock of a filesystem forbids to mount it."""


@contextmanager
def mounted(device: str, path: str, kind: str, read_only: bool = False, options: str = "") -> Iterator[bool]:
    """Mount `device`; what the guest's filesystem holds gets no power on the node (nosuid, nodev).

    The journal of a filesystem that was not cleanly unmounted is replayed, even if it is mounted `read_only`: what is
    seen is what the guest will see. Yield False where the device is read-only, and the journal's content is not seen.
    """
    flags = linux.MS_NOSUID | linux.MS_NODEV | (linux.MS_RDONLY if read_only else 0)
    _check_superblock(device, kind, writable=not read_only)
    # the metadata is written after unmounting
    with nullcontext() if read_only else _written(device, device, os.fsync), FILESYSTEMS[kind].alone(device):
        is_replayed = _mount_replayed(device, path, kind, flags, options)
        try:
            with nullcontext() if read_only else _writable(device, path, kind):
                yield is_replayed
        except BaseException as failure:
            # What was written is lost anyway: writing it back would only delay the end, by minutes on a slow disk.
            if not (read_only or isinstance(failure, NotWritten)):
                with suppress(OSError):
                    linux.shut_down_filesystem(path)
            try:
                _unmount(path, device)
            except Failure as another:
                log.warning(str(another))  # the last line belongs to the real cause
            raise
        _unmount(path, device)


@contextmanager
def _writable(device: str, path: str, kind: str) -> Iterator[None]:
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise _cannot_mount(device, kind, "this kernel can only read it")
    with _written(device, path, linux.sync_filesystem), FILESYSTEMS[kind].writable(path):
        yield


def _mount_replayed(device: str, path: str, kind: str, flags: int, options: str) -> bool:
    """Mount it with its journal replayed; return False if that is left out, since nothing may be written to it."""
    row = FILESYSTEMS[kind]
    looks = bool(flags & linux.MS_RDONLY and row.look_data)

    def mount(*words: str) -> None:
        data = ",".join(filter(None, [options, *words, row.forced]))  # the last one counts
        try:
            (row.mount or linux.mount)(device, path, kind, flags, data)
        except OSError as error:
            raise Failure(f"cannot mount {device} as {kind}: {error.strerror}", _remedy(kind, error.errno)) from None

    if looks and not _is_read_only(device) and _objection(device, kind, writable=True):  # a replay would write, too
        mount(row.look_data)
        return False
    try:
        mount()
        return True
    except MountedTwice:
        raise
    except Failure as failure:
        if not looks:
            raise
        try:
            mount(row.look_data)
        except Failure:
            raise failure from None
        if not _is_read_only(device):
            _unmount(path, device)
            raise Failure(
                f"{failure}: its journal cannot be replayed",
                hint="repair it in the guest or the image; NOMOUNT=yes leaves a disk as it is",
            ) from None
    return False


@contextmanager
def _written(device: str, path: str, sync: Callable[[int], None]) -> Iterator[None]:
    """On exit, call `sync` with a descriptor of `path`, and fail on write errors, which umount(2) does not report.

    `path` is opened first: some kernels forget an error when the last descriptor is closed.
    """
    with linux.closing(os.open(path, os.O_RDONLY)) as descriptor:
        try:
            yield
        except NotWritten:  # of another filesystem of the guest: this one may be well
            with suppress(OSError):
                sync(descriptor)
            raise
        try:
            sync(descriptor)
        except OSError as error:
            raise NotWritten(f"cannot write everything to {device}: {error.strerror}") from None


@contextmanager
def mounted_somewhere(device: str, kind: str, read_only: bool = False, options: str = "") -> Iterator[tuple[str, bool]]:
    """As `mounted`, at a directory of its own; yield that, and what `mounted` yields."""
    directory = tempfile.mkdtemp(prefix="mount.", dir=os.environ.get("TMPDIR"))
    try:
        with mounted(device, directory, kind, read_only, options) as is_replayed:
            yield directory, is_replayed
    finally:
        with suppress(OSError):  # still mounted: that is being reported
            os.rmdir(directory)


@contextmanager
def alone(directory: str) -> Iterator[str]:
    """Yield a directory that shows the filesystem at `directory` without what is mounted below it."""
    path = tempfile.mkdtemp(prefix="alone.", dir=os.environ.get("TMPDIR"))
    try:
        linux.mount(directory, path, None, linux.MS_BIND)
        try:
            yield path
        finally:
            linux.umount(path)
    finally:
        os.rmdir(path)


def replay(device: str, kind: str) -> bool:
    """Replay the journal, if that may change the UUID or label, and return whether it was done."""
    is_dirty = FILESYSTEMS[kind].is_dirty
    if not (is_dirty and blockdev.ask(device, is_dirty)):
        return False
    with mounted_somewhere(device, kind, read_only=True) as (_, is_replayed):
        return is_replayed


@contextmanager
def mounted_all(volumes: Iterable[Volume], read_only: bool = False) -> Iterator[None]:
    """Mount the volumes of a guest, its root at isolation.TARGET."""
    with ExitStack() as stack:
        for volume in sorted(volumes, key=lambda volume: volume.mount_point):
            if volume.mount_point:
                _mount_volume(stack, volume, read_only)
        yield


def _mount_volume(stack: ExitStack, volume: Volume, read_only: bool) -> None:
    """Mount it until `stack` is left; if the guest can do without it, only warn where that fails."""
    try:
        path = _inside(isolation.TARGET, volume.mount_point, make=not read_only)
        if not stack.enter_context(mounted(volume.device, path, volume.kind, read_only, volume.options)):
            log.warning(f"the guest's {volume.mount_point} {NOT_REPLAYED}")
    except Failure as failure:
        if volume.role != "data":
            failure.args = (f"the guest's {volume.mount_point}: {failure}",)
            raise
        log.warning(f"the guest's {volume.mount_point} is left out: {failure}")


def check_all(volumes: Iterable[Volume]) -> None:
    """Fail if `mounted_all` would, as far as that shows without mounting them."""
    for volume in volumes:
        if volume.mount_point and volume.role != "data":
            try:
                _check_superblock(volume.device, volume.kind, writable=True)
            except NotMountable as failure:
                failure.args = (f"the guest's {volume.mount_point}: {failure}",)
                raise


@contextmanager
def writing_back(path: str) -> Iterator[None]:
    """Meanwhile, write to the disk what has been written below `path` so far; `mounted` writes the rest.

    The guest's programs (ssh-keygen, update-grub) keep a processor busy, while the disk would be idle.
    """
    with linux.closing(os.open(path, os.O_RDONLY)) as top, meanwhile(lambda: linux.sync_filesystem(top)) as finish:
        try:
            yield
            with explained("cannot write everything to the disk"):
                finish()
        except BaseException:
            with suppress(OSError):
                linux.shut_down_filesystem(path)  # nobody waits for what is lost anyway
            raise


def trim(path: str) -> None:
    """Have the device below a mounted filesystem drop the free blocks, if both can."""
    with linux.closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        try:
            linux.trim(directory)
        except OSError as error:
            log.debug(f"free blocks of {path} are kept: {error.strerror}")


def _is_read_only(device: str) -> bool:
    with linux.closing(os.open(device, os.O_RDONLY)) as descriptor:
        return linux.is_read_only(descriptor)


def _objection(device: str, kind: str, writable: bool) -> str:
    with open(device, "rb") as file:
        size = file.seek(0, os.SEEK_END)
    return blockdev.ask(device, lambda read: why_not(kind, read, size, writable))


def why_not(kind: str, read: Read, size: int, writable: bool) -> str:
    """Return why a filesystem on a device of `size` bytes must not, or cannot, be mounted; empty if it can be."""
    row = FILESYSTEMS[kind]
    covered = row.size(read)
    if covered > size:
        return f"it is of {log.size(covered)}, and its device has only {log.size(size)}"
    return row.objection(read, writable)


def _check_superblock(device: str, kind: str, writable: bool) -> None:
    reason = _objection(device, kind, writable)
    if reason:
        raise _cannot_mount(device, kind, reason)


def _remedy(kind: str, error: int | None) -> str:
    if error == errno.ENODEV:
        return f"this kernel has no {kind}: modprobe {kind}"
    if error in DAMAGED:
        return f"repair it with {FILESYSTEMS[kind].repair}; dmesg has more"
    features = f"Linux {os.uname().release} may not know its features: " if error == errno.EINVAL else ""
    return f"{features}dmesg has more; NOMOUNT=yes deploys a disk image, and leaves a disk, without looking into it"


def _cannot_mount(device: str, kind: str, reason: str) -> Failure:
    return NotMountable(
        f"cannot mount {device} as {kind}: {reason}",
        hint="correct that in the guest or the image; NOMOUNT=yes deploys a disk image without looking into it",
    )


def _inside(top: str, path: str, make: bool) -> str:
    """Return the node's path of the guest's directory `path`; no link of the guest leads out of `top`."""
    if path == "/":
        return top
    with explained("nothing can be mounted there"), linux.closing(os.open(top, os.O_PATH | os.O_DIRECTORY)) as root:
        if make:
            above, name = os.path.split(path)
            directory = linux.open_in_root(root, above, os.O_PATH | os.O_DIRECTORY)
            with linux.closing(directory), suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=directory)
        found = _real_path(root, path)
        if found == _real_path(root, "/"):
            raise Failure("nothing can be mounted there: it is the root directory")
        return found


def _real_path(root: int, path: str) -> str:
    with linux.closing(linux.open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)) as descriptor:
        return os.readlink(f"/proc/self/fd/{descriptor}")


def _unmount(path: str, device: str) -> None:
    with explained(f"cannot unmount {device}"):
        linux.umount(path)
