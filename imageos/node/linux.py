"""Linux system calls that the standard library of Python 3.9 lacks, by ctypes and ioctl.

Numbers and structures are from the kernel's user API (include/uapi/linux/*.h), and are the same on
every architecture that Ganeti runs on. Every function raises OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from imageos.errors import Failure

# sched.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
CLONE_NEWCGROUP, CLONE_NEWUSER = 0x02000000, 0x10000000
NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP | CLONE_NEWUSER
)  # all that clone accepts; CLONE_NEWTIME is for unshare and clone3 only
# mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 4096, 16384, 1 << 18, 1 << 19
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
OPEN_TREE_CLONE, AT_RECURSIVE, AT_FDCWD = 1, 0x8000, -100  # fcntl.h
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 1, 1, 6
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40
# prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
# openat2.h
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x01, 0x02, 0x04, 0x10
# the same number on all architectures (scripts/syscall.tbl)
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 428, 429, 430, 431, 432
SYS_CLOSE_RANGE, SYS_OPENAT2, SYS_MOUNT_SETATTR = 436, 437, 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
# landlock.h
LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
LANDLOCK_WRITE_FILE, LANDLOCK_REFER, LANDLOCK_TRUNCATE = 1 << 1, 1 << 13, 1 << 14
LANDLOCK_REMOVE_AND_MAKE = 0x1FF0  # all rights from REMOVE_DIR to MAKE_SYM
LANDLOCK_ALL_WRITING = LANDLOCK_WRITE_FILE | LANDLOCK_REMOVE_AND_MAKE | LANDLOCK_REFER | LANDLOCK_TRUNCATE
LANDLOCK_SINCE = {LANDLOCK_REFER: 2, LANDLOCK_TRUNCATE: 3}  # first Landlock version with it (Linux 5.19, 6.2)
# keyctl is older and has a number per architecture; for 64-bit programs (asm/unistd.h)
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
KEYCTL_JOIN_SESSION_KEYRING = 1  # keyctl.h
# openat2 fails with EAGAIN on a path with `..` if any process on the node renames or mounts meanwhile: try again
OPEN_ATTEMPTS = 1000
# capability.h
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID = 0, 1, 3, 4
CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_LINUX_IMMUTABLE = 5, 6, 7, 9
CAP_SYS_ADMIN, CAP_MKNOD, CAP_SETFCAP, CAP_MAC_ADMIN = 21, 27, 31, 33
CAPABILITY_VERSION_3 = 0x20080522
# fs.h, loop.h, blkpg.h
BLKROGET, BLKPG, BLKFLSBUF, BLKGETSIZE64, BLKTRACETEARDOWN = 0x125E, 0x1269, 0x1261, 0x80081272, 0x1276
BLKPG_ADD_PARTITION, BLKPG_DEL_PARTITION, BLKPG_RESIZE_PARTITION = 1, 2, 3
FS_IOC_SHUTDOWN, SHUTDOWN_NO_LOG_FLUSH = 0x8004587D, 2
FITRIM = 0xC0185879
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_FIXED_FL = 0x80086601, 0x40086602, 0x30  # immutable, append-only
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10  # falloc.h
F_SETPIPE_SZ = 1031  # fcntl.h; Python's fcntl has it since 3.10
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LOOP_GET_STATUS64, LOOP_SET_STATUS64 = 0x4C82, 0x4C0A, 0x4C05, 0x4C04
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_INFO = "=5Q4I64s64s32s2Q"  # struct loop_info64
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN, LO_FLAGS_DIRECT_IO = 1, 4, 8, 16
# btrfs.h
BTRFS_IOC_SCAN_DEV, BTRFS_IOC_FORGET_DEV = 0x50009404, 0x50009405
BTRFS_IOC_SUBVOL_GETFLAGS, BTRFS_IOC_SUBVOL_SETFLAGS, BTRFS_SUBVOL_RDONLY = 0x80089419, 0x4008941A, 2

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result


def _syscall(what: str, number: int, *arguments: object) -> int:
    """Make a system call that libc has no function for; pass each unsigned number as a c_uint."""
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), what)


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Yield an open descriptor, and close it on exit."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write `data`, at `offset` if given; the kernel may take it in parts."""
    left = memoryview(data)
    while left:
        count = os.write(descriptor, left) if offset is None else os.pwrite(descriptor, left, offset)
        left = left[count:]
        offset = None if offset is None else offset + count


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, path: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    """mount(2). `path` may be `/proc/self/fd/N` of a directory that was opened safely."""
    _check(_libc.mount(_bytes(source), _bytes(path), _bytes(kind), ctypes.c_ulong(flags), _bytes(data or None)), path)


def umount(path: str, flags: int = 0) -> None:
    _check(_libc.umount2(_bytes(path), flags), path)


def open_in_root(root: int, path: str, flags: int, resolve: int = 0) -> int:
    """Open `path` as if the descriptor `root` were our root directory (openat2, Linux 5.6)."""
    if "\0" in path:  # the kernel would take NUL for the end
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    # struct open_how; its mode is for new files
    how = struct.pack("=3Q", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve)
    attempts = OPEN_ATTEMPTS
    while True:
        try:
            return _syscall(path, SYS_OPENAT2, root, _bytes(path or "."), how, ctypes.c_size_t(len(how)))
        except OSError as error:
            attempts -= 1
            if error.errno == errno.ENOSYS:
                raise Failure("this kernel has no openat2: imageos needs Linux 5.8 or newer") from None
            if error.errno != errno.EAGAIN or not attempts:
                raise


def copy_mounts(path: str, with_below: bool = True) -> int:
    """Return a descriptor of a detached copy of the mount at `path` and of all mounts below it (Linux 5.2)."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if with_below else 0)
    return _syscall(path, SYS_OPEN_TREE, AT_FDCWD, _bytes(path), ctypes.c_uint(flags))


def place_mounts(mounts: int, directory: int) -> None:
    """Mount the copy from `copy_mounts` on an open directory, in one step (Linux 5.2)."""
    flags = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
    _syscall("move_mount", SYS_MOVE_MOUNT, mounts, b"", directory, b"", flags)


def restrict_mounts(path: str, flags: int) -> None:
    """Set `flags` (MS_RDONLY, MS_NOSUID, MS_NODEV) for the mount at `path` and all mounts below it.

    Before Linux 5.12, set them for that mount only.
    """
    attributes = struct.pack("=4Q", flags, 0, 0, 0)  # struct mount_attr; its numbers are those of mount.h
    length = ctypes.c_size_t(len(attributes))
    try:
        _syscall(path, SYS_MOUNT_SETATTR, AT_FDCWD, _bytes(path), ctypes.c_uint(AT_RECURSIVE), attributes, length)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        mount(None, path, None, MS_BIND | MS_REMOUNT | flags)


def can_restrict_all() -> bool:
    """Return True if `restrict_mounts` includes the mounts below its path (Linux 5.12)."""
    result = _libc.syscall(ctypes.c_long(SYS_MOUNT_SETATTR), -1, b"", ctypes.c_uint(0), None, ctypes.c_size_t(0))
    return result == 0 or ctypes.get_errno() != errno.ENOSYS


def new_tmpfs(flags: int, **options: str) -> int:
    """Return a descriptor of an empty, detached tmpfs (Linux 5.2)."""
    with closing(_syscall("fsopen", SYS_FSOPEN, b"tmpfs", ctypes.c_uint(FSOPEN_CLOEXEC))) as context:
        for key, value in options.items():
            _syscall(key, SYS_FSCONFIG, context, FSCONFIG_SET_STRING, _bytes(key), _bytes(value), 0)
        _syscall("fsconfig", SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall("fsmount", SYS_FSMOUNT, context, ctypes.c_uint(FSMOUNT_CLOEXEC), ctypes.c_uint(flags))


def pivot_root(new: str, old: str) -> None:
    _check(_libc.pivot_root(_bytes(new), _bytes(old)), "pivot_root")


@contextlib.contextmanager
def children_apart() -> Iterator[None]:
    """Make the child that this thread starts inside process 1 of a PID namespace: all that it starts ends with it."""
    with closing(os.open("/proc/self/ns/pid", os.O_RDONLY)) as namespace:
        unshare(CLONE_NEWPID)
        try:
            yield
        finally:
            _check(_libc.setns(namespace, CLONE_NEWPID), "setns")


def close_all(first: int = 0) -> None:
    """Close every descriptor from `first` on."""
    number, first_, last = ctypes.c_long(SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF)
    if _libc.syscall(number, first_, last, ctypes.c_uint(0)) < 0:  # before Linux 5.9
        os.closerange(first, 1 << 16)


def mount_view() -> tuple[int, int]:
    """Return descriptors of our mount namespace and root directory, for `enter_mount_view`."""
    return os.open("/proc/self/ns/mnt", os.O_RDONLY), os.open("/", os.O_PATH)


def enter_mount_view(view: tuple[int, int]) -> None:
    """Enter a mount namespace and change root and working directory there; setns(2) alone would leave a chroot."""
    namespace, root = view
    _check(_libc.setns(namespace, CLONE_NEWNS), "setns")
    os.fchdir(root)
    os.chroot(".")


def leave_session_keyring() -> None:
    """Use a new, empty session keyring instead of the caller's."""
    number = SYS_KEYCTL.get(os.uname().machine)
    if number is None or struct.calcsize("P") != 8:
        return
    try:
        _syscall("keyctl", number, KEYCTL_JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keys
            raise


def die_with_parent() -> None:
    _check(_libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))


def forbid_dumps() -> None:
    """Hide the memory of this process from all processes without CAP_SYS_PTRACE."""
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def capabilities() -> int:
    """Return the mask of those that we have."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    # effective, permitted, inheritable of the low 32, then of the high 32 capabilities
    data = ctypes.create_string_buffer(struct.calcsize("=6I"))
    _check(_libc.capget(header, data), "capget")
    _, low, _, _, high, _ = struct.unpack("=6I", data)
    return int(low | high << 32)


def limit_capabilities(keep: Iterable[int], have: int) -> None:
    """Drop all capabilities except `keep` from every set, also for all programs started later; `have`: `capabilities`.

    A child that has just been forked copies, or finds again, each page that it touches: it is left little to do.
    """
    mask = sum(1 << capability for capability in keep)
    for capability in range(64):
        if not mask >> capability & 1 and _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # EINVAL: beyond the last capability of this kernel
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    low, high = have & mask & 0xFFFFFFFF, (have & mask) >> 32
    header, data = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), struct.pack("=6I", low, low, 0, high, high, 0)
    _check(_libc.capset(header, data), "capset")


class Filter(NamedTuple):
    """A program for seccomp(2), ready for a child to load."""

    argument: bytes  # struct sock_fprog, which has the address of:
    instructions: ctypes.Array[ctypes.c_char]


def filter_of(program: bytes) -> Filter | None:
    """Return the filter of `program`, an array of struct sock_filter; None if that is empty."""
    if not program:
        return None
    instructions = ctypes.create_string_buffer(program)
    return Filter(struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions)), instructions)


def load_filter(loaded: Filter | None) -> None:
    """Filter each system call of this process and its children.

    It stays for ever, beside filters already loaded. Needs no_new_privs or CAP_SYS_ADMIN.
    """
    if loaded:
        _check(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, loaded.argument, 0, 0), "seccomp")


def forbid_writing(but: Iterable[tuple[int, bool]]) -> None:
    """Forbid this process and its children to write, make, rename or remove files, and to mount or unmount, whatever
    capabilities they have. `but` lists the exceptions: (open directory or file, True to allow all but mounting below
    it, False to allow only writing).

    This is Landlock (Documentation/userspace-api/landlock.rst). Do nothing if the kernel has no version 2 (Linux 5.19),
    the first that allows to rename and link files to other directories.
    """
    create = SYS_LANDLOCK_CREATE_RULESET
    version = _libc.syscall(ctypes.c_long(create), None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
    if version < 2:
        return
    unknown = sum(right for right, since in LANDLOCK_SINCE.items() if since > version)
    handled = LANDLOCK_ALL_WRITING & ~unknown
    access = struct.pack("=Q", handled)
    rules = _syscall("landlock", create, access, ctypes.c_size_t(len(access)), 0)
    for descriptor, everything in but:
        allowed = handled if everything else handled & (LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE)
        rule = struct.pack("=Qi", allowed, descriptor)
        _syscall("landlock", SYS_LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    _syscall("landlock", SYS_LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def free_loop() -> int:
    """Return the number of a free loop device; another process may take it before us."""
    with closing(os.open("/dev/loop-control", os.O_RDWR)) as control:
        return fcntl.ioctl(control, LOOP_CTL_GET_FREE)


def configure_loop(loop: int, backing: int, flags: int, start: int = 0, size: int = 0) -> None:
    """Attach the loop device `loop` to the file `backing` (LOOP_CONFIGURE, Linux 5.8); EBUSY if it is in use.

    `start` and `size` in bytes limit it to a part of the file; size 0: to its end.
    """
    information = _loop_info(flags, start, size)
    fcntl.ioctl(loop, LOOP_CONFIGURE, struct.pack("=II", backing, 512) + information + bytes(64))


def set_loop_range(loop: int, start: int, size: int) -> None:
    """Make an open loop device cover this part of its file, as in `configure_loop`, and detach after its last user.

    Any process that may write to it can change that, without a capability (lo_ioctl in drivers/block/loop.c).
    """
    info = _loop_values(loop)
    flags = info[8]
    if info[3:5] != (start, size) or not flags & LO_FLAGS_AUTOCLEAR:
        fcntl.ioctl(loop, LOOP_SET_STATUS64, _loop_info(flags | LO_FLAGS_AUTOCLEAR, start, size))


def end_trace(device: int) -> None:
    """Remove a trace of a disk (BLKTRACESETUP), which outlives the process that made it; EINVAL if there is none."""
    fcntl.ioctl(device, BLKTRACETEARDOWN)


def _loop_info(flags: int, start: int, size: int) -> bytes:
    return struct.pack(LOOP_INFO, 0, 0, 0, start, size, 0, 0, 0, flags, b"", b"", b"", 0, 0)


def use_cache(loop: int) -> None:
    """Make an open loop device use the page cache of its file instead of direct I/O."""
    fcntl.ioctl(loop, LOOP_SET_DIRECT_IO, 0)


class LoopStatus(NamedTuple):
    """The part of a file that a loop device covers; the file by its st_dev, st_ino and st_rdev."""

    device: int
    inode: int
    number: int
    covers_all: bool


def loop_status(loop: int) -> LoopStatus:
    """Return what an open loop device covers; ENXIO if that is nothing."""
    device, inode, number, start, size = _loop_values(loop)[:5]
    return LoopStatus(device, inode, number, not (start or size))


def _loop_values(loop: int) -> tuple[int, ...]:
    return struct.unpack(LOOP_INFO, fcntl.ioctl(loop, LOOP_GET_STATUS64, bytes(struct.calcsize(LOOP_INFO))))


def lock_btrfs(control: int, number: int) -> bool:
    """Lock `number`, of 62 bits, among all processes that have /dev/btrfs-control open; False if another one has it.

    The lock is released when the descriptor `control` is closed.
    """
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    try:
        fcntl.fcntl(control, fcntl.F_OFD_SETLK, lock)
    except BlockingIOError:
        return False
    return True


def scan_btrfs(device: str) -> None:
    """Make a device known to the kernel as one of a btrfs; EEXIST if it knows another one, mounted or more recent."""
    _ask_btrfs(BTRFS_IOC_SCAN_DEV, device)


def forget_btrfs(device: str) -> None:
    """Make the kernel forget an unmounted btrfs device, as another one will have its name or UUID; if empty, all."""
    with contextlib.suppress(OSError):  # one of its subvolumes is still mounted, or the kernel is older than 5.4
        _ask_btrfs(BTRFS_IOC_FORGET_DEV, device)


def _ask_btrfs(request: int, device: str) -> None:
    argument = struct.pack("=q4088s", 0, os.fsencode(device))  # struct btrfs_ioctl_vol_args
    with open("/dev/btrfs-control", "rb") as control:
        fcntl.ioctl(control, request, bytearray(argument))  # fcntl.ioctl limits bytes to 1024


@contextlib.contextmanager
def writable_subvolume(directory: int) -> Iterator[bool]:
    """Clear the read-only property of a btrfs subvolume, restore it on exit, and yield whether it had that."""
    try:
        (flags,) = struct.unpack("=Q", fcntl.ioctl(directory, BTRFS_IOC_SUBVOL_GETFLAGS, bytes(8)))
    except OSError:  # it is a directory of a subvolume
        flags = 0
    if not flags & BTRFS_SUBVOL_RDONLY:
        yield False
        return
    fcntl.ioctl(directory, BTRFS_IOC_SUBVOL_SETFLAGS, struct.pack("=Q", flags & ~BTRFS_SUBVOL_RDONLY))
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # nothing can be written any more, as will be reported
            fcntl.ioctl(directory, BTRFS_IOC_SUBVOL_SETFLAGS, struct.pack("=Q", flags))


def change_partition(disk: int, operation: int, number: int, start: int = 0, length: int = 0) -> None:
    """Have the kernel add, resize or delete (BLKPG_*) a partition; `start` and `length` in bytes.

    One that is in use can be resized, if its start stays (Linux 3.6); EBUSY for its deletion.
    """
    values = struct.pack("@qqi64s64s4x", start, length, number, b"", b"")  # struct blkpg_partition: 152 bytes
    partition = ctypes.create_string_buffer(values, 152)
    argument = struct.pack("@iiiP", operation, 0, 152, ctypes.addressof(partition))
    fcntl.ioctl(disk, BLKPG, argument)


def shut_down_filesystem(path: str) -> None:
    """Stop the ext or xfs filesystem mounted at `path` at once, without writing back pending data. OSError for other
    filesystems: btrfs always writes everything back."""
    with closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        fcntl.ioctl(directory, FS_IOC_SHUTDOWN, struct.pack("=I", SHUTDOWN_NO_LOG_FLUSH))


def sync_filesystem(directory: int) -> None:
    """Write everything of a filesystem to its device. OSError also for earlier failures: since the directory was
    opened, or since the mount if they were never reported (syncfs(2), Linux 5.8)."""
    _check(_libc.syncfs(directory), "syncfs")


def trim(directory: int) -> None:
    """Tell the device of a mounted filesystem which blocks are free; EOPNOTSUPP if either does not support it."""
    fcntl.ioctl(directory, FITRIM, bytearray(struct.pack("=3Q", 0, (1 << 64) - 1, 0)))


@contextlib.contextmanager
def changeable(descriptor: int) -> Iterator[None]:
    """Clear the immutable and append-only flags of a file; restore them on exit."""
    flags = struct.unpack("l", fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))[0]
    fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("l", flags & ~FS_FIXED_FL))
    try:
        yield
    finally:
        fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("l", flags))


def punch_hole(descriptor: int, start: int, length: int) -> None:
    """Make a range of a file or block device read as zero by freeing it; EOPNOTSUPP if that is impossible."""
    _fallocate(descriptor, FALLOC_FL_PUNCH_HOLE, start, length)


def zero_device(device: int, start: int, length: int) -> None:
    """Make a range of a block device read as zero, if necessary by writing zeroes."""
    _fallocate(device, FALLOC_FL_ZERO_RANGE, start, length)


def _fallocate(descriptor: int, mode: int, start: int, length: int) -> None:
    arguments = ctypes.c_int(mode | FALLOC_FL_KEEP_SIZE), ctypes.c_int64(start), ctypes.c_int64(length)
    _check(_libc.fallocate64(ctypes.c_int(descriptor), *arguments), "fallocate")


def data_ranges(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where, between two offsets, a file has data: stored, and written to."""
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # only a hole from here
                raise
            return
        stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        if start < end:
            yield start, min(stop, end)
        start = stop


def gaps(ranges: Iterable[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """Yield what lies between ascending ranges, and before `end`."""
    position = 0
    for start, stop in itertools.chain(ranges, [(end, end)]):
        if position < start:
            yield position, start
        position = stop


def device_size(device: int) -> int:
    """Return the size of an open block device in bytes."""
    return int(struct.unpack("=Q", fcntl.ioctl(device, BLKGETSIZE64, bytes(8)))[0])


def is_read_only(device: int) -> bool:
    """Return True if a block device is read-only, which does not keep open(2) from opening it for writing."""
    return bool(struct.unpack("=i", fcntl.ioctl(device, BLKROGET, bytes(4)))[0])


def flush_buffers(device: int) -> None:
    """Write back and drop the page cache of a block device."""
    fcntl.ioctl(device, BLKFLSBUF)


def enlarge_pipe(descriptor: int, size: int) -> None:
    """Let a pipe hold `size` bytes, if the descriptor is a pipe and the system allows it."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, F_SETPIPE_SZ, size)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)
