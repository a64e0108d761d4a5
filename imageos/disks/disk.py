"""The disk that Ganeti hands over: claimed, attached through a loop device, wiped, partitioned, let go."""

from __future__ import annotations

import errno
import fcntl
import glob
import mmap
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from imageos import log
from imageos.disks.layout import MIB, SECTOR, Layout, sfdisk_script
from imageos.errors import Failure
from imageos.node import linux, mounts
from imageos.node.confinement import Room
from imageos.node.mounts import Mount
from imageos.run import run

DEADLINE = 10.0  # seconds to wait for the kernel or udev
# Seconds that others may look at a disk which has just appeared, or been written to or let go: udev has it locked then,
# and a loop device stays over it until the last of them has closed that
GLANCE = 1.0
# Both ends of a disk or partition hold everything that a tool could recognise: partition tables and
# their backups, superblocks of filesystems (btrfs at 64 KiB), LVM and RAID metadata.
SIGNATURES = MIB
ZERO_STEP = 256 * MIB
F_OFD_GETLK = 36  # fcntl.h


@dataclass(frozen=True)
class Device:
    """A disk of the instance while it is ours."""

    path: str  # as Ganeti names it
    descriptor: int
    size: int  # bytes
    is_file: bool


@dataclass(frozen=True)
class Attached:
    """The loop device over a Device, with the kernel's nodes for its partitions."""

    path: str  # /dev/loopN
    descriptor: int
    size: int

    def partition(self, number: int) -> str:
        return f"{self.path}p{number}"


@contextmanager
def claimed(path: str, read_only: bool = False, shared: bool = False) -> Iterator[Device]:
    """Open the disk `path` so that nobody else does: Failure if it is not a disk or is in use (unless `shared`).

    Left only when the disk is really free again, since Ganeti deactivates it next.
    """
    path_shown = f"disk {path}"
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise Failure(f"{path_shown}: {error.strerror}") from None
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise Failure(f"{path_shown} is neither a block device nor a regular file")
    is_file = stat.S_ISREG(mode)
    if not shared:
        _check_not_mounted(path)
    with ExitStack() as stack:
        descriptor = _open_exclusively(path, read_only, is_file)
        stack.callback(os.close, descriptor)
        if not shared:
            _check_unused(path, descriptor)
        size = os.fstat(descriptor).st_size if is_file else linux.device_size(descriptor)
        yield Device(path, descriptor, size, is_file)
        stack.close()
    if not (is_file or read_only):
        _wait(lambda: _is_free(path), f"{path_shown} is still in use after {DEADLINE:.0f} s")


@contextmanager
def attached(device: Device, read_only: bool = False, direct: bool = False) -> Iterator[Attached]:
    """A loop device over `device`; whoever writes has to `flush` before leaving.

    `direct`, for much: what is written does not go through the cache a second time, until `use_cache`.

    The kernel takes the loop device away with its last user (autoclear), even after SIGKILL.
    """
    with ExitStack() as stack:
        descriptor, path = _attach(device, read_only, direct and _may_be_direct(device))
        stack.callback(os.close, descriptor)
        backing = _backing(path)
        # udev leaves a locked disk alone: without this, partition nodes vanish for a moment whenever
        # somebody closes the disk after writing
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not read_only:
            stack.callback(_restore, descriptor)
        yield Attached(path, descriptor, device.size)
    _await_detached(path, backing)


def _restore(loop: int) -> None:
    """Undo what a hook, or a guest's program without a filter, may have done to the loop device, whose node it has."""
    for undo in (linux.end_trace, linux.restore_loop):
        with suppress(OSError):
            undo(loop)


def use_cache(disk: Attached) -> None:
    """No longer write past the cache: of what fails then `flush` knows, and not only the guest's filesystem.

    XFS writes its metadata when it is unmounted, which tells of no error.
    """
    with suppress(OSError):  # it was not direct
        linux.use_cache(disk.descriptor)


@contextmanager
def let_go(path: str) -> Iterator[None]:
    """While the last mounts of the loop device `path` are taken away: in the end all is written, and the disk free."""
    with ExitStack() as stack:
        nodes = [path, *sorted(glob.glob(f"{path}p*"))]
        descriptors = [os.open(node, os.O_RDONLY | os.O_CLOEXEC) for node in nodes]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        _, _, number = linux.loop_backing(descriptors[0])
        backing = _backing(path)
        read_only = linux.is_read_only(descriptors[0])
        yield
        for node, descriptor in zip(nodes, descriptors):  # an error of a partition is told to who has that open
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise Failure(
                    f"{node}: what was written last is lost: {error.strerror}", hint="see the kernel's log (dmesg)"
                ) from None
    _await_detached(path, backing)
    if number and not read_only:
        name = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"))
        node = f"/dev/{name.replace('!', '/')}"
        _wait(lambda: _is_free(node), f"disk {node} is still in use after {DEADLINE:.0f} s")


def last_write(device: Device) -> int:
    """A number that changes when somebody writes to the disk."""
    status = os.fstat(device.descriptor)
    if device.is_file:
        return status.st_mtime_ns
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    with open(f"/sys/dev/block/{number}/stat", encoding="ascii") as file:
        return int(file.read().split()[6])  # sectors


def bytes_read(disk: Attached) -> int:
    """How much has been read from it since it was attached (Documentation/block/stat of the kernel)."""
    with open(f"/sys/block/{os.path.basename(disk.path)}/stat", encoding="ascii") as file:
        return int(file.read().split()[2]) * SECTOR


def flush(device: Device, loop: int) -> None:
    """Bring everything down to the device: closing is not enough, and the guest may bypass the cache."""
    try:
        os.fsync(loop)
        os.fsync(device.descriptor)
        if not device.is_file:
            linux.flush_buffers(device.descriptor)
    except OSError as error:
        raise Failure(f"disk {device.path}: cannot write everything to it: {error.strerror}") from None
    if device.is_file and loop != device.descriptor and _allocated(device) < device.size and _space_left(device) < MIB:
        # a loop device takes a write that was cut short for a whole one: no error tells of it
        raise Failure(
            f"disk {device.path}: its filesystem is full: what was written last may be lost",
            hint="free space there, and try again",
        )


def _allocated(device: Device) -> int:
    """Bytes that a file has on its filesystem."""
    return os.fstat(device.descriptor).st_blocks * SECTOR


def _space_left(device: Device) -> int:
    """Bytes that the filesystem of a file still has for root."""
    filesystem = os.fstatvfs(device.descriptor)
    return filesystem.f_bfree * filesystem.f_frsize


def wipe(descriptor: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Zero both ends of each range (start, size in bytes)."""
    zeroes = bytes(SIGNATURES)
    for start, size in ranges:
        for offset in {start, max(start, start + size - SIGNATURES)}:
            os.pwrite(descriptor, zeroes[: min(SIGNATURES, size)], offset)


def clear(device: Device, disk: Attached) -> None:
    """Make the whole disk read as zero, so that nothing of the last tenant shows through what is not written."""
    if device.is_file and not _has_data(device.descriptor):
        return
    try:
        linux.punch_hole(device.descriptor, 0, device.size)
    except OSError:  # it cannot, and nothing less than that is a promise
        _write_zeroes(disk.descriptor if device.is_file else device.descriptor, device.size // SECTOR * SECTOR)
    linux.flush_buffers(disk.descriptor)  # the cache may still have what was there


def _has_data(descriptor: int) -> bool:
    try:
        os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno != errno.ENXIO  # no data from here to the end
    return True


def _write_zeroes(descriptor: int, size: int) -> None:
    progress = log.Progress("zeroing the disk", size)
    for start in range(0, size, ZERO_STEP):
        linux.zero_device(descriptor, start, min(ZERO_STEP, size - start))
        progress.update(start)
    progress.close()


@contextmanager
def disarmed_on_failure(device: Device, disk: Attached) -> Iterator[None]:
    """Make sure that a half-made instance cannot boot, nor be taken for a whole one."""
    try:
        yield
    except BaseException:
        try:
            _restore(disk.descriptor)
            _drop_mounts(disk)
            _wipe_all(disk, _kernel_partitions(disk).values())
            flush(device, disk.descriptor)
        except (Failure, OSError) as error:
            log.warning(f"disk {device.path} may still look bootable: {error}")
        raise


def _wipe_all(disk: Attached, partitions: Iterable[tuple[int, int]]) -> None:
    wipe(disk.descriptor, [(0, disk.size), *partitions])
    os.fsync(disk.descriptor)


def write_table(disk: Attached, layout: Layout) -> None:
    """Replace whatever is on the disk by `layout`, and make the partition nodes."""
    _wipe_all(disk, [(part.start, part.size) for part in layout.partitions])
    # The kernel is told by ourselves, below: it may have no parser for this table.
    run(
        ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe", "never", disk.path],
        input=sfdisk_script(layout),
        room=Room([disk.path]),
    )
    set_partitions(disk, [(part.number, part.start, part.size) for part in layout.partitions])


def set_partitions(disk: Attached, wanted: list[tuple[int, int, int]]) -> None:
    """Make the kernel's partitions of the disk exactly these (number, start, size in bytes).

    One whose start stays is resized: it could not be deleted while anybody looks at it, as LVM does at every disk.
    """
    existing = _kernel_partitions(disk)
    starts = {number: start for number, start, _ in wanted}
    for number, (start, _) in existing.items():
        if starts.get(number) != start:
            _delete_partition(disk, number)
    for number, start, size in wanted:
        have = existing.get(number, (None, None))
        try:
            if have[0] != start:
                linux.add_partition(disk.descriptor, number, start, size)
            elif have[1] != size:
                linux.resize_partition(disk.descriptor, number, start, size)
        except OSError as error:
            raise Failure(f"cannot make {disk.partition(number)}: {error.strerror}") from None
        _await_node(disk.partition(number))


def _delete_partition(disk: Attached, number: int) -> None:
    """Once nobody has it open any more."""

    def is_gone() -> bool:
        try:
            linux.delete_partition(disk.descriptor, number)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise Failure(f"cannot take away {disk.partition(number)}: {error.strerror}") from None
        return True

    _wait(is_gone, f"{disk.partition(number)} is still in use after {DEADLINE:.0f} s")


def _kernel_partitions(disk: Attached) -> dict[int, tuple[int, int]]:
    """number -> (start, size in bytes), as the kernel has them; its sysfs counts 512-byte sectors."""
    name = os.path.basename(disk.path)
    found = {}
    for entry in os.listdir(f"/sys/block/{name}"):
        if entry.startswith(name + "p"):
            values = []
            for attribute in ("partition", "start", "size"):
                with open(f"/sys/block/{name}/{entry}/{attribute}", encoding="ascii") as file:
                    values.append(int(file.read()))
            found[values[0]] = (values[1] * SECTOR, values[2] * SECTOR)
    return found


def _open_exclusively(path: str, read_only: bool, is_file: bool) -> int:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    # O_EXCL on a block device: refused while it is mounted, or a part of something (device-mapper, RAID)
    exclusive = 0 if is_file or read_only else os.O_EXCL
    try:
        descriptor = os.open(path, flags | exclusive)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _in_use(path, "it is mounted, part of another device, or another process has it") from None
        raise Failure(f"disk {path}: {error.strerror}") from None
    if not (is_file or read_only) and linux.is_read_only(descriptor):
        os.close(descriptor)
        raise Failure(f"disk {path} is read-only")
    deadline = time.monotonic() + GLANCE
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise _in_use(path, "another process has locked it") from None
        time.sleep(0.005)


def _check_not_mounted(path: str) -> None:
    """Failure that says where, if it is mounted through a loop device, as mount-disks does it."""
    loop = _loop_over(os.stat(path))
    for mount in _mounts_of(loop) if loop else []:
        hint = f"umount-disks {mount.instance}" if mount.instance else f"umount {mount.place}"
        raise _in_use(path, f"it is mounted at {mount.place}", hint)


def _mounts_of(loop: str) -> list[Mount]:
    return [mount for mount in mounts.current() if loop_below(mount) == loop]


def loop_below(mount: Mount) -> str:
    """The loop device that a mounted filesystem is on, or on a partition of; empty if it is on none."""
    number = mounts.block_device(mount)
    place = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    match = re.search(r"/block/(loop\d+)(/|$)", place)
    return f"/dev/{match[1]}" if match else ""


def _drop_mounts(disk: Attached) -> None:
    """Have nothing of the disk mounted any more: a signal may have come before a mount was entered in our books, and
    what the kernel writes back later must not undo the wiping."""
    for mount in reversed(_mounts_of(disk.path)):
        with suppress(OSError):
            linux.shut_down_filesystem(mount.place)
        linux.umount(mount.place, linux.MNT_DETACH)


def _check_unused(path: str, descriptor: int) -> None:
    loop = _loop_that_stays(os.fstat(descriptor))
    if loop:
        raise _in_use(path, f"{loop} is attached to it", f"see losetup --list; losetup --detach {loop} if it is stale")
    # qemu holds open-file-description locks on the images that it uses
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(descriptor, F_OFD_GETLK, query)
    except OSError:
        return  # some filesystems have no such locks
    if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
        raise _in_use(path, "an instance, or another program that locks it, is using it")


def _loop_that_stays(backing: os.stat_result) -> str | None:
    """The loop device over a file or device, if there is one; one on its way out is given a moment.

    That is one which was detached while somebody had it open, if only to look (loop_clr_fd of drivers/block/loop.c).
    """
    deadline = time.monotonic() + GLANCE
    while True:
        loop = _loop_over(backing)
        if not loop or not _goes_with_its_last_user(loop) or time.monotonic() > deadline:
            return loop
        time.sleep(0.005)


def _goes_with_its_last_user(loop: str) -> bool:
    try:
        with open(f"/sys/block/{os.path.basename(loop)}/loop/autoclear", "rb") as file:
            return file.read(1) == b"1"
    except OSError:
        return True  # it has gone


def _loop_over(backing: os.stat_result) -> str | None:
    """The loop device over a file or device, if there is one (O_EXCL does not see it).

    Asked of the kernel by number: the path in its backing_file is wrong once the namespace that attached it is gone.
    """
    for name in os.listdir("/sys/block"):
        if not (name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop/backing_file")):
            continue
        try:
            descriptor = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # just going away
        try:
            device, inode, number = linux.loop_backing(descriptor)
        except OSError:
            continue
        finally:
            os.close(descriptor)
        same_file = (device, inode) == (backing.st_dev, backing.st_ino)
        if same_file or (stat.S_ISBLK(backing.st_mode) and number == backing.st_rdev):
            return f"/dev/{name}"
    return None


def _may_be_direct(device: Device) -> bool:
    """Whether single sectors can be written past the cache (O_DIRECT, open(2)), and a file has room for all of them.

    The first is tried, since not every kernel knows it of what a loop device is over: disks with sectors of 4 KiB, ZFS.
    The second, because the kernel takes a direct write that was cut short by a full filesystem for a whole one
    (lo_complete_rq of drivers/block/loop.c).
    """
    if device.is_file and _space_left(device) < device.size - _allocated(device):
        return False
    try:
        direct = os.open(f"/proc/self/fd/{device.descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        return os.preadv(direct, [memory[SECTOR : 2 * SECTOR]], SECTOR) == SECTOR
    except OSError:
        return False
    finally:
        os.close(direct)


def _attach(device: Device, read_only: bool, direct: bool) -> tuple[int, str]:
    flags = linux.LO_FLAGS_AUTOCLEAR | linux.LO_FLAGS_PARTSCAN
    flags |= linux.LO_FLAGS_READ_ONLY if read_only else 0
    flags |= linux.LO_FLAGS_DIRECT_IO if direct else 0
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            number = linux.free_loop()
            path = f"/dev/loop{number}"
            _await_node(path)
            descriptor = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise Failure(f"no loop device to be had: {error.strerror}", hint="modprobe loop") from None
        try:
            linux.configure_loop(descriptor, device.descriptor, flags)
            return descriptor, path
        except OSError as error:
            os.close(descriptor)
            # somebody took it between our two steps: take the next
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise Failure(f"disk {device.path}: cannot attach {path}: {error.strerror}") from None


def _backing(loop: str) -> str:
    """What sysfs says that a loop device is attached to; empty if it is not."""
    try:
        with open(f"/sys/block/{os.path.basename(loop)}/loop/backing_file", "rb") as file:
            return os.fsdecode(file.read())
    except OSError:
        return ""


def _await_detached(loop: str, backing: str) -> None:
    """Until the loop device is not attached to `backing`; to another disk it may be, by whoever was quicker."""
    _wait(
        lambda: not backing or _backing(loop) != backing, f"{loop} is still attached to its disk after {DEADLINE:.0f} s"
    )


def _is_free(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def _wait(condition: Callable[[], bool], complaint: str) -> None:
    """Until `condition`; polled, since neither udev nor the kernel tells."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(complaint)
        time.sleep(0.005)


def _await_node(path: str) -> None:
    _wait(lambda: os.path.exists(path), f"{path} did not appear within {DEADLINE:.0f} s")


def _in_use(path: str, how: str, hint: str | None = None) -> Failure:
    return Failure(f"disk {path} is in use: {how}", hint=hint or "stop the instance first; fuser -v shows who has it")
