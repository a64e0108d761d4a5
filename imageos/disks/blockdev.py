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
from typing import NamedTuple, TypeVar

from imageos import log
from imageos.disks.layout import MIB, SECTOR, Layout, sfdisk_script
from imageos.errors import Failure, explained
from imageos.node import linux, mounts, sysfs
from imageos.node.confinement import Room
from imageos.node.mounts import Mount
from imageos.run import Command, run

T = TypeVar("T")

DEADLINE = 10.0  # seconds to wait for the kernel or udev
# Seconds. udev and others look at a disk that has just appeared, or been written to or let go: udev locks it meanwhile,
# and a loop device over it stays until the last of them has closed it.
BUSY_TIMEOUT = 1.0
# Both ends of a disk or partition hold everything that a tool could recognise: partition tables and
# their backups, superblocks of filesystems (btrfs at 64 KiB), LVM and RAID metadata.
SIGNATURES = MIB
ZERO_STEP = 256 * MIB


class Disk(NamedTuple):
    """A disk of the instance while it is ours."""

    path: str  # as Ganeti names it
    descriptor: int
    size: int  # bytes
    is_file: bool


class LoopDevice(NamedTuple):
    """The loop device over a disk, with the kernel's nodes for its partitions, and more of them over parts of it."""

    path: str  # /dev/loopN
    descriptor: int
    disk: Disk
    ranges: list[Range]  # they go before it
    hidden: set[tuple[int, int]]  # (start, size) of partitions without a node

    @property
    def size(self) -> int:
        return self.disk.size

    def partition(self, number: int) -> str:
        return f"{self.path}p{number}"


class Range(NamedTuple):
    """A loop device over a part of a disk, for what has no partition of its own: a logical volume."""

    path: str
    descriptor: int
    start: int  # bytes
    size: int


@contextmanager
def claimed(path: str, read_only: bool = False, shared: bool = False) -> Iterator[Disk]:
    """Open the disk `path` for us alone; fail if it is not a disk or, unless `shared`, is in use.

    On exit, wait until it is free again, since Ganeti deactivates it next.
    """
    with explained(f"disk {path}"):
        mode = os.stat(path).st_mode
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise Failure(f"disk {path} is neither a block device nor a regular file")
    is_file = stat.S_ISREG(mode)
    if not shared:
        _check_not_mounted(path)
    with ExitStack() as stack:
        descriptor = stack.enter_context(linux.closing(_open_exclusively(path, read_only, is_file)))
        if not (is_file or read_only) and linux.is_read_only(descriptor):
            raise Failure(f"disk {path} is read-only")
        lock = fcntl.LOCK_SH if read_only else fcntl.LOCK_EX
        _wait(lambda: _is_locked(descriptor, lock), _in_use(path, "another process has locked it"), BUSY_TIMEOUT)
        if not shared:
            _check_unused(path, descriptor)
        size = os.fstat(descriptor).st_size if is_file else linux.device_size(descriptor)
        if not size:
            raise Failure(f"disk {path} has 0 bytes: that is no disk", hint="gnt-cluster verify-disks checks all")
        yield Disk(path, descriptor, size, is_file)
        stack.close()
    if not (is_file or read_only):
        _wait(lambda: _is_free(path), Failure(f"disk {path} is still in use after {DEADLINE:.0f} s"))


@contextmanager
def attached(disk: Disk, read_only: bool = False, direct: bool = False) -> Iterator[LoopDevice]:
    """Yield a loop device over `disk`; whoever writes has to `flush` before leaving.

    `direct`, for large writes: they bypass the cache, until `use_cache`.

    The kernel takes the loop device away with its last user (autoclear), even after SIGKILL.
    """
    with ExitStack() as stack:
        flags = linux.LO_FLAGS_PARTSCAN | (linux.LO_FLAGS_READ_ONLY if read_only else 0)
        flags |= linux.LO_FLAGS_DIRECT_IO if direct and _may_be_direct(disk) else 0
        descriptor, path = _attach(disk.path, disk.descriptor, flags)
        stack.callback(os.close, descriptor)
        backing = _attribute(path, "backing_file")
        loop = LoopDevice(path, descriptor, disk, [], set())
        stack.callback(_detach_ranges, loop)
        if not read_only:
            stack.callback(_restore, loop)
        yield loop
    _await_detached(path, backing)


def attach_range(loop: LoopDevice, start: int, size: int) -> str:
    """Return a loop device over a part of the disk (in bytes), which is there as long as that of the disk.

    Writes to it bypass its own cache: those of the disk and of the filesystem on it are enough.
    """
    found = next((partial for partial in loop.ranges if (partial.start, partial.size) == (start, size)), None)
    if not found:
        flags = linux.LO_FLAGS_READ_ONLY if linux.is_read_only(loop.descriptor) else 0
        descriptor, path = _attach(loop.disk.path, loop.descriptor, flags | linux.LO_FLAGS_DIRECT_IO, start, size)
        found = Range(path, descriptor, start, size)
        loop.ranges.append(found)
    return found.path


def grow_range(loop: LoopDevice, path: str, size: int) -> None:
    """Give the loop device `path`, one of `attach_range`, another size."""
    number, found = next(pair for pair in enumerate(loop.ranges) if pair[1].path == path)
    linux.set_loop_range(found.descriptor, found.start, size)
    loop.ranges[number] = found._replace(size=size)


def _detach_ranges(loop: LoopDevice) -> None:
    while loop.ranges:
        os.close(loop.ranges.pop().descriptor)


def _restore(loop: LoopDevice) -> None:
    """Undo what a hook, or a guest's program without a filter, may have done through the nodes of loop devices."""
    ranges = [(partial.descriptor, partial.start, partial.size) for partial in loop.ranges]
    for descriptor, start, size in [(loop.descriptor, 0, 0), *ranges]:
        with suppress(OSError):
            linux.end_trace(descriptor)
        with suppress(OSError):
            linux.set_loop_range(descriptor, start, size)


def use_cache(loop: LoopDevice) -> None:
    """Stop bypassing the cache: a bypassing write that fails is known to the guest's filesystem, but not to `flush`.

    XFS writes its metadata when it is unmounted, which reports no error.
    """
    with suppress(OSError):  # it was not direct
        linux.use_cache(loop.descriptor)


@contextmanager
def let_go(path: str) -> Iterator[None]:
    """Meanwhile take away the last mounts of the loop device `path`; on exit all is written, and the disk is free."""
    with ExitStack() as stack:
        nodes = [path, *sorted(glob.glob(f"{path}p*")), *_ranges_over(path)]
        descriptors = [stack.enter_context(linux.closing(os.open(node, os.O_RDONLY))) for node in nodes]
        number = linux.loop_status(descriptors[0]).number
        backing = _attribute(path, "backing_file")
        read_only = linux.is_read_only(descriptors[0])
        yield
        for node, descriptor in zip(nodes, descriptors):
            # an error of a partition is reported to those who have that open
            with explained(f"{node}: what was written last is lost", "see the kernel's log (dmesg)"):
                os.fsync(descriptor)
            linux.forget_btrfs(node)
    _await_detached(path, backing)
    if number and not read_only:
        name = os.path.basename(sysfs.device_directory(number))
        node = f"/dev/{name.replace('!', '/')}"
        _wait(lambda: _is_free(node), Failure(f"disk {node} is still in use after {DEADLINE:.0f} s"))


def ask(device: str, question: Callable[[Callable[[int, int], bytes]], T]) -> T:
    """Return the answer of a function that reads a superblock."""
    with open(device, "rb") as file:
        return question(lambda offset, count: os.pread(file.fileno(), count, offset))


def last_write(disk: Disk) -> int:
    """Return a number that changes when somebody writes to the disk."""
    status = os.fstat(disk.descriptor)
    if disk.is_file:
        return status.st_mtime_ns
    return sysfs.statistics(status.st_rdev)[1]


def bytes_read(loop: LoopDevice) -> int:
    """Return how much has been read from it since it was attached."""
    return sysfs.statistics(os.fstat(loop.descriptor).st_rdev)[0]


def flush(written: Disk | LoopDevice) -> None:
    """Bring everything down to the device: closing is not enough, and the guest may bypass the cache."""
    disk = written.disk if isinstance(written, LoopDevice) else written
    ranges = written.ranges if isinstance(written, LoopDevice) else []
    with explained(f"disk {disk.path}: cannot write everything to it"):
        for descriptor in (*(partial.descriptor for partial in ranges), written.descriptor, disk.descriptor):
            os.fsync(descriptor)
        if not disk.is_file:
            linux.flush_buffers(disk.descriptor)
    if disk.is_file and written is not disk and _allocated(disk) < disk.size and _space_left(disk) < MIB:
        # a loop device takes a write that was cut short for a whole one: no error tells of it
        raise Failure(
            f"disk {disk.path}: its filesystem is full: what was written last may be lost",
            hint="free space there, and try again",
        )


def _allocated(disk: Disk) -> int:
    """Return the bytes that a file has on its filesystem."""
    return os.fstat(disk.descriptor).st_blocks * SECTOR


def _space_left(disk: Disk) -> int:
    """Return the bytes that the filesystem of a file still has for root."""
    filesystem = os.fstatvfs(disk.descriptor)
    return filesystem.f_bfree * filesystem.f_frsize


def wipe(descriptor: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Zero both ends of each range (start, size in bytes)."""
    zeroes = bytes(SIGNATURES)
    for start, size in ranges:
        for offset in {start, max(start, start + size - SIGNATURES)}:
            os.pwrite(descriptor, zeroes[: min(SIGNATURES, size)], offset)


def clear(loop: LoopDevice) -> None:
    """Make the whole disk read as zero, so that nothing of the last tenant shows through what is not written."""
    disk = loop.disk
    if disk.is_file and not any(linux.data_ranges(disk.descriptor, 0, disk.size)):
        return
    try:
        linux.punch_hole(disk.descriptor, 0, disk.size)
    except OSError:  # it cannot, and nothing less than that is a promise
        _write_zeroes(loop.descriptor if disk.is_file else disk.descriptor, disk.size // SECTOR * SECTOR)
    linux.flush_buffers(loop.descriptor)  # the cache may still have what was there


def _write_zeroes(descriptor: int, size: int) -> None:
    progress = log.Progress("zeroing the disk", size)
    for start in range(0, size, ZERO_STEP):
        linux.zero_device(descriptor, start, min(ZERO_STEP, size - start))
        progress.update(start)


@contextmanager
def disarmed_on_failure(loop: LoopDevice) -> Iterator[None]:
    """On a failure, wipe the disk: a half-made instance must not boot, nor be taken for a whole one."""
    try:
        yield
    except BaseException:
        try:
            _restore(loop)
            _drop_mounts(loop)
            ranges = [(partial.start, partial.size) for partial in loop.ranges]
            _wipe_all(loop, [*_kernel_partitions(loop).values(), *ranges, *loop.hidden])
            flush(loop)
        except (Failure, OSError) as error:
            log.warning(f"disk {loop.disk.path} may still look bootable: {error}")
        raise


def _wipe_all(loop: LoopDevice, partitions: Iterable[tuple[int, int]]) -> None:
    wipe(loop.descriptor, [(0, loop.size), *partitions])
    os.fsync(loop.descriptor)


def write_table(loop: LoopDevice, layout: Layout) -> None:
    """Replace whatever is on the disk by `layout`, and make the partition nodes."""
    _wipe_all(loop, [(part.start, part.size) for part in layout.partitions])
    # The kernel is told by ourselves, below: it may have no parser for this table.
    write = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe", "never", loop.path]
    run(Command(write, Room([loop.path])), input=sfdisk_script(layout))
    set_partitions(loop, [(part.number, part.start, part.size) for part in layout.partitions])


def set_partitions(loop: LoopDevice, wanted: list[tuple[int, int, int]]) -> None:
    """Make the kernel's partitions of the disk exactly these (number, start, size in bytes).

    One whose start stays is resized: it could not be deleted while anybody looks at it, as LVM does at every disk.
    """
    existing = _kernel_partitions(loop)
    starts = {number: start for number, start, _ in wanted}
    for number, (start, _) in existing.items():
        if starts.get(number) != start:
            _delete_partition(loop, number)
    for number, start, size in wanted:
        have = existing.get(number, (None, None))
        with explained(f"cannot make {loop.partition(number)}"):
            if have[0] != start:
                linux.change_partition(loop.descriptor, linux.BLKPG_ADD_PARTITION, number, start, size)
            elif have[1] != size:
                linux.change_partition(loop.descriptor, linux.BLKPG_RESIZE_PARTITION, number, start, size)
        _await_node(loop.partition(number))


def hide_partitions(loop: LoopDevice, numbers: Iterable[int]) -> None:
    """Take the nodes of partitions away, which stay in the table, so that lvm2 of the node does not see them.

    `set_partitions` makes them again. One that somebody has open stays.
    """
    existing = _kernel_partitions(loop)
    for number in existing.keys() & {*numbers}:
        with suppress(Failure):
            _delete_partition(loop, number)
            loop.hidden.add(existing[number])


def _delete_partition(loop: LoopDevice, number: int) -> None:
    """Delete it once nobody has it open."""

    def is_gone() -> bool:
        try:
            linux.change_partition(loop.descriptor, linux.BLKPG_DEL_PARTITION, number)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise Failure(f"cannot take away {loop.partition(number)}: {error.strerror}") from None
        return True

    _wait(is_gone, Failure(f"{loop.partition(number)} is still in use after {DEADLINE:.0f} s"))


def _kernel_partitions(loop: LoopDevice) -> dict[int, tuple[int, int]]:
    return sysfs.partitions(os.path.basename(loop.path))


def _open_exclusively(path: str, read_only: bool, is_file: bool) -> int:
    # O_EXCL on a block device: refused while it is mounted, or a part of something (device-mapper, RAID)
    flags = os.O_RDONLY if read_only else os.O_RDWR | (0 if is_file else os.O_EXCL)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _in_use(path, "it is mounted, part of another device, or another process has it") from None
        raise Failure(f"disk {path}: {error.strerror}") from None


def _is_locked(descriptor: int, lock: int) -> bool:
    """Return whether we have the lock now."""
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_not_mounted(path: str) -> None:
    """Failure that says where, if it is mounted through a loop device, as mount-disks does it."""
    loop = _loop_over(os.stat(path))
    for mount in _mounts_of(loop) if loop else []:
        hint = f"umount-disks {mount.instance}" if mount.instance else f"umount {mount.path}"
        raise _in_use(path, f"it is mounted at {mount.path}", hint)


def _mounts_of(loop: str) -> list[Mount]:
    return [mount for mount in mounts.current() if loop_below(mount) == loop]


def loop_below(mount: Mount) -> str:
    """Return the loop device over a disk that a mounted filesystem is on, or on a part of; empty if it is on none."""
    return _loop_of(mounts.block_device(mount))


def parts_beside(device: str) -> list[str]:
    """Return `device`, and all other partitions and ranges of the disk that it is a part of."""
    loop = _loop_of(os.stat(device).st_rdev)
    return list(dict.fromkeys([device, *(sorted([*glob.glob(f"{loop}p*"), *_ranges_over(loop)]) if loop else [])]))


def _loop_of(number: int) -> str:
    loop = ""
    while True:
        match = re.search(r"/block/(loop\d+)(/|$)", sysfs.device_directory(number))
        if not match:
            return loop
        loop = f"/dev/{match[1]}"
        seen = _status(loop)
        if not seen or seen.covers_all:  # what it is over is the instance's disk
            return loop
        number = seen.number


def _drop_mounts(loop: LoopDevice) -> None:
    """Unmount all of the disk: a signal may have come before a mount was entered in our books, and what the kernel
    writes back later must not undo the wiping."""
    for mount in reversed(_mounts_of(loop.path)):
        with suppress(OSError):
            linux.shut_down_filesystem(mount.path)
        linux.umount(mount.path, linux.MNT_DETACH)


def _check_unused(path: str, descriptor: int) -> None:
    loop = _loop_that_stays(os.fstat(descriptor))
    if loop:
        raise _in_use(path, f"{loop} is attached to it", f"see losetup --list; losetup --detach {loop} if it is stale")
    # qemu holds open-file-description locks on the images that it uses
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query)
    except OSError:
        return  # some filesystems have no such locks
    if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
        raise _in_use(path, "an instance, or another program that locks it, is using it")


def _loop_that_stays(backing: os.stat_result) -> str | None:
    """Return the loop device over a file or device, if there is one; wait a moment for one that is going away.

    Such a one was detached while somebody had it open, if only to look (loop_clr_fd of drivers/block/loop.c).
    """
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        loop = _loop_over(backing)
        # "1": it goes with its last user; empty: it has gone
        if not loop or _attribute(loop, "autoclear") == "0" or time.monotonic() > deadline:
            return loop
        time.sleep(0.005)


def _loop_over(backing: os.stat_result) -> str | None:
    """Return the loop device over a file or device, if there is one (O_EXCL does not see it).

    Ask the kernel by number: the path in its backing_file is wrong once the namespace that attached it is gone.
    """
    for loop, seen in _attached_loops():
        same_file = (seen.device, seen.inode) == (backing.st_dev, backing.st_ino)
        if same_file or (stat.S_ISBLK(backing.st_mode) and seen.number == backing.st_rdev):
            return loop
    return None


def _ranges_over(path: str) -> list[str]:
    """Return the loop devices over parts of the device `path`."""
    number = os.stat(path).st_rdev
    return [loop for loop, seen in _attached_loops() if seen.number == number and not seen.covers_all]


def _attached_loops() -> Iterator[tuple[str, linux.LoopStatus]]:
    for name in sysfs.backing_files():
        seen = _status(f"/dev/{name}")
        if seen:
            yield f"/dev/{name}", seen


def _status(loop: str) -> linux.LoopStatus | None:
    """Return what the loop device covers; None if it is just going away."""
    try:
        with linux.closing(os.open(loop, os.O_RDONLY)) as descriptor:
            return linux.loop_status(descriptor)
    except OSError:
        return None


def _may_be_direct(disk: Disk) -> bool:
    """Return whether single sectors can bypass the cache (O_DIRECT, open(2)), and a file has room for all of them.

    The first is tried, since not every kernel knows it of what a loop device is over: disks with sectors of 4 KiB, ZFS.
    The second, because the kernel takes a direct write that was cut short by a full filesystem for a whole one
    (lo_complete_rq of drivers/block/loop.c).
    """
    if disk.is_file and _space_left(disk) < disk.size - _allocated(disk):
        return False
    path, memory = f"/proc/self/fd/{disk.descriptor}", memoryview(mmap.mmap(-1, mmap.PAGESIZE))
    try:
        with linux.closing(os.open(path, os.O_RDONLY | os.O_DIRECT)) as direct:
            return os.preadv(direct, [memory[SECTOR : 2 * SECTOR]], SECTOR) == SECTOR
    except OSError:
        return False


def _attach(name: str, backing: int, flags: int, start: int = 0, size: int = 0) -> tuple[int, str]:
    """Return a descriptor and the path of a loop device over the open disk `name`, or over a part of it, locked.

    udev leaves a locked disk alone. Without that, partition nodes vanish for a moment whenever somebody closes the disk
    after writing. It is locked before it is a disk: else the rules of lvm2 could activate a volume group on it.
    """
    deadline = time.monotonic() + DEADLINE
    while True:
        with explained("no loop device to be had", "modprobe loop"):
            path = f"/dev/loop{linux.free_loop()}"
            _await_node(path)
            descriptor = os.open(path, os.O_RDONLY if flags & linux.LO_FLAGS_READ_ONLY else os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            linux.configure_loop(descriptor, backing, flags | linux.LO_FLAGS_AUTOCLEAR, start, size)
            return descriptor, path
        except OSError as error:
            os.close(descriptor)
            # somebody took it between our steps, or just looks at it: take the next
            if error.errno not in (errno.EBUSY, errno.EWOULDBLOCK) or time.monotonic() > deadline:
                raise Failure(f"disk {name}: cannot attach {path}: {error.strerror}") from None
            time.sleep(0.002)


def _attribute(loop: str, name: str) -> str:
    """Return what sysfs says of a loop device; empty if it is attached to nothing."""
    return sysfs.attribute(f"{sysfs.BLOCK}/{os.path.basename(loop)}/loop/{name}")


def _await_detached(loop: str, backing: str) -> None:
    """Wait until the loop device is not attached to `backing`; another process may have attached it to another disk."""
    complaint = Failure(f"{loop} is still attached to its disk after {DEADLINE:.0f} s")
    _wait(lambda: not backing or _attribute(loop, "backing_file") != backing, complaint)


def _is_free(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def _wait(condition: Callable[[], bool], otherwise: Failure, seconds: float = DEADLINE) -> None:
    """Poll until `condition`: neither udev nor the kernel notifies us."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise otherwise
        time.sleep(0.005)


def _await_node(path: str) -> None:
    _wait(lambda: os.path.exists(path), Failure(f"{path} did not appear within {DEADLINE:.0f} s"))


def _in_use(path: str, how: str, hint: str | None = None) -> Failure:
    return Failure(f"disk {path} is in use: {how}", hint=hint or "stop the instance first; fuser -v shows who has it")
