"""Linux system calls that the standard library of Python 3.9 lacks, through ctypes and ioctl.

Numbers and structures are the kernel's user API (include/uapi/linux/*.h), the same on every
architecture that Ganeti runs on. Every function raises OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator

from imageos.errors import Failure

# sched.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
CLONE_NEWCGROUP, CLONE_NEWUSER = 0x02000000, 0x10000000
NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP | CLONE_NEWUSER
)  # a process in new ones; CLONE_NEWTIME is for unshare and clone3 alone
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
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x02, 0x04, 0x10
# one number on all architectures (scripts/syscall.tbl)
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 428, 429, 430, 431, 432
SYS_CLOSE_RANGE, SYS_OPENAT2, SYS_MOUNT_SETATTR = 436, 437, 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
# landlock.h
LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
LANDLOCK_WRITE_FILE, LANDLOCK_REFER, LANDLOCK_TRUNCATE = 1 << 1, 1 << 13, 1 << 14
LANDLOCK_REMOVE_AND_MAKE = 0x1FF0  # remove_dir to make_sym
LANDLOCK_ALL_WRITING = LANDLOCK_WRITE_FILE | LANDLOCK_REMOVE_AND_MAKE | LANDLOCK_REFER | LANDLOCK_TRUNCATE
LANDLOCK_SINCE = {LANDLOCK_REFER: 2, LANDLOCK_TRUNCATE: 3}  # version that knows it (Linux 5.19, 6.2)
# keyctl is older than that; of 64-bit programs (asm/unistd.h)
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
KEYCTL_JOIN_SESSION_KEYRING = 1  # keyctl.h
# A rename or mount by anybody on the node meanwhile makes openat2 give up on a path with `..` (EAGAIN): try again
OPEN_ATTEMPTS = 1000
# capability.h
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID = 0, 1, 2, 3, 4
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
F_SETPIPE_SZ = 1031  # fcntl.h; in Python's fcntl since 3.10
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LOOP_GET_STATUS64, LOOP_SET_STATUS64 = 0x4C82, 0x4C0A, 0x4C05, 0x4C04
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_INFO = "=5Q4I64s64s32s2Q"  # struct loop_info64
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN, LO_FLAGS_DIRECT_IO = 1, 4, 8, 16
# btrfs.h
BTRFS_IOC_FORGET_DEV = 0x50009405

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, path: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    """mount(2). `path` may be `/proc/self/fd/N` of a directory that was resolved with care."""
    _check(_libc.mount(_bytes(source), _bytes(path), _bytes(kind), ctypes.c_ulong(flags), _bytes(data or None)), path)


def umount(path: str, flags: int = 0) -> None:
    _check(_libc.umount2(_bytes(path), flags), path)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_in_root(root: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """Open `path` as a process whose root directory is the descriptor `root` would (openat2, Linux 5.6)."""
    if "\0" in path:  # the kernel would take it for the end
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    how = _OpenHow(flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve)
    for attempt in range(OPEN_ATTEMPTS, 0, -1):
        try:
            return _check(
                _libc.syscall(
                    ctypes.c_long(SYS_OPENAT2),
                    ctypes.c_int(root),
                    _bytes(path or "."),
                    ctypes.byref(how),
                    ctypes.c_size_t(ctypes.sizeof(how)),
                ),
                path,
            )
        except OSError as error:
            if error.errno == errno.ENOSYS:
                raise Failure("this kernel has no openat2: imageos needs Linux 5.8 or newer") from None
            if error.errno != errno.EAGAIN or attempt == 1:
                raise
    raise AssertionError("not reached")


def copy_mounts(path: str, with_below: bool = True) -> int:
    """A descriptor of a copy of the mount at `path` and all below it, which nobody sees yet (Linux 5.2)."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if with_below else 0)
    return _check(_libc.syscall(ctypes.c_long(SYS_OPEN_TREE), AT_FDCWD, _bytes(path), ctypes.c_uint(flags)), path)


def place_mounts(mounts: int, directory: int) -> None:
    """Put what `copy_mounts` gave over an open directory, all at once (Linux 5.2)."""
    flags = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
    _check(_libc.syscall(ctypes.c_long(SYS_MOVE_MOUNT), mounts, b"", directory, b"", flags), "move_mount")


def restrict_mounts(path: str, flags: int) -> None:
    """Have `flags` (MS_RDONLY, MS_NOSUID, MS_NODEV) for the mount at `path` and all below it.

    Before Linux 5.12 for that mount alone.
    """
    attributes = struct.pack("=4Q", flags, 0, 0, 0)  # struct mount_attr; its numbers are those of mount.h
    number, recursive = ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_uint(AT_RECURSIVE)
    try:
        _check(_libc.syscall(number, AT_FDCWD, _bytes(path), recursive, attributes, len(attributes)), path)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        mount(None, path, None, MS_BIND | MS_REMOUNT | flags)


def can_restrict_all() -> bool:
    """Whether `restrict_mounts` reaches what is mounted below, too (Linux 5.12)."""
    result = _libc.syscall(ctypes.c_long(SYS_MOUNT_SETATTR), -1, b"", ctypes.c_uint(0), None, ctypes.c_size_t(0))
    return result == 0 or ctypes.get_errno() != errno.ENOSYS


def new_tmpfs(flags: int, **options: str) -> int:
    """A descriptor of an empty tmpfs that is mounted nowhere yet (Linux 5.2)."""
    context = _check(_libc.syscall(ctypes.c_long(SYS_FSOPEN), b"tmpfs", ctypes.c_uint(FSOPEN_CLOEXEC)), "fsopen")
    try:
        number = ctypes.c_long(SYS_FSCONFIG)
        for key, value in options.items():
            _check(_libc.syscall(number, context, FSCONFIG_SET_STRING, _bytes(key), _bytes(value), 0), key)
        _check(_libc.syscall(number, context, FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig")
        return _check(
            _libc.syscall(ctypes.c_long(SYS_FSMOUNT), context, ctypes.c_uint(FSMOUNT_CLOEXEC), ctypes.c_uint(flags))
        )
    finally:
        os.close(context)


def pivot_root(new: str, old: str) -> None:
    _check(_libc.pivot_root(_bytes(new), _bytes(old)), "pivot_root")


@contextlib.contextmanager
def children_apart() -> Iterator[None]:
    """Meanwhile, the one child of this thread is process 1 of its own PID namespace: what it starts ends with it."""
    ours = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWPID)
        try:
            yield
        finally:
            _check(_libc.setns(ours, CLONE_NEWPID), "setns")
    finally:
        os.close(ours)


def close_all(first: int = 0) -> None:
    """Close every descriptor from `first` on."""
    number, first_, last = ctypes.c_long(SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF)
    if _libc.syscall(number, first_, last, ctypes.c_uint(0)) < 0:  # before Linux 5.9
        os.closerange(first, 1 << 16)


def mount_view() -> tuple[int, int]:
    """What this process sees of mounts, for `enter_mount_view`: descriptors of its mount namespace and of its root."""
    return os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), os.open("/", os.O_PATH | os.O_CLOEXEC)


def enter_mount_view(view: tuple[int, int]) -> None:
    """Go to a mount namespace and, as root and working directory, to a root in it; setns(2) alone leaves a chroot."""
    namespace, root = view
    _check(_libc.setns(namespace, CLONE_NEWNS), "setns")
    os.fchdir(root)
    os.chroot(".")


def leave_session_keyring() -> None:
    """Have an empty session keyring from now on, instead of that of who called us."""
    number = SYS_KEYCTL.get(os.uname().machine)
    if number is None or struct.calcsize("P") != 8:
        return
    try:
        _check(_libc.syscall(ctypes.c_long(number), KEYCTL_JOIN_SESSION_KEYRING, None), "keyctl")
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keys
            raise


def die_with_parent() -> None:
    _check(_libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))


def forbid_dumps() -> None:
    """Keep what this process has in memory from every process that may not trace all (CAP_SYS_PTRACE)."""
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def limit_capabilities(keep: Iterable[int]) -> None:
    """Keep only the capabilities `keep`, as far as we have them, in every set and for every program started later."""
    keep = frozenset(keep)
    for capability in range(64):
        if capability not in keep and _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # EINVAL: beyond the last one that this kernel knows
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITY_VERSION_3, 0))
    # effective, permitted, inheritable of the low 32, then of the high 32 capabilities
    data = ctypes.create_string_buffer(struct.calcsize("=6I"))
    _check(_libc.capget(header, data), "capget")
    _, low, _, _, high, _ = struct.unpack("=6I", data)
    mask = sum(1 << capability for capability in keep)
    low, high = low & mask, high & mask >> 32
    struct.pack_into("=6I", data, 0, low, low, 0, high, high, 0)
    _check(_libc.capset(header, data), "capset")


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def load_filter(program: bytes) -> None:
    """Have this process and all that it starts ask `program` (an array of struct sock_filter) about each system call.

    For good, beside those that are loaded already. An empty one is none. Needs no_new_privs or CAP_SYS_ADMIN.
    """
    if program:
        argument = _FilterProgram(len(program) // 8, program)
        _check(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0), "seccomp")


def forbid_writing(but: Iterable[tuple[int, bool]]) -> None:
    """Have this process and its children write, make, rename and remove nothing any more but in the open directories
    and files `but` (of which True goes with those where all of that is allowed, False with writing only), and never
    mount or unmount again, whatever capabilities they have.

    It is Landlock that forbids (Documentation/userspace-api/landlock.rst). Version 2 (Linux 5.19) is the first that
    lets files be renamed and linked to other directories; an older kernel does nothing.
    """
    create = ctypes.c_long(SYS_LANDLOCK_CREATE_RULESET)
    version = _libc.syscall(create, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    if version < 2:
        return
    unknown = sum(right for right, since in LANDLOCK_SINCE.items() if since > version)
    handled = LANDLOCK_ALL_WRITING & ~unknown
    access = struct.pack("=Q", handled)
    rules = _check(_libc.syscall(create, access, len(access), 0), "landlock")
    for descriptor, everything in but:
        allowed = handled if everything else handled & (LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE)
        rule = struct.pack("=Qi", allowed, descriptor)
        add = ctypes.c_long(SYS_LANDLOCK_ADD_RULE)
        _check(_libc.syscall(add, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0), "landlock")
    _check(_libc.syscall(ctypes.c_long(SYS_LANDLOCK_RESTRICT_SELF), rules, 0), "landlock")
    os.close(rules)


def free_loop() -> int:
    """The number of a loop device that is free now; somebody else may take it before us."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    finally:
        os.close(control)


def configure_loop(loop: int, backing: int, flags: int, block_size: int = 512) -> None:
    """Put the loop device `loop` over the file `backing` (LOOP_CONFIGURE, Linux 5.8); EBUSY if taken."""
    fcntl.ioctl(loop, LOOP_CONFIGURE, struct.pack("=II", backing, block_size) + _loop_info(flags) + bytes(64))


def restore_loop(loop: int) -> None:
    """Make an open loop device what it was again: over all of its file, gone with its last user.

    Whoever may write to it may change that, without any capability (lo_ioctl in drivers/block/loop.c).
    """
    info = struct.unpack(LOOP_INFO, fcntl.ioctl(loop, LOOP_GET_STATUS64, bytes(struct.calcsize(LOOP_INFO))))
    offset, limit, flags = info[3], info[4], info[8]
    if offset or limit or not flags & LO_FLAGS_AUTOCLEAR:
        fcntl.ioctl(loop, LOOP_SET_STATUS64, _loop_info(flags | LO_FLAGS_AUTOCLEAR))


def end_trace(device: int) -> None:
    """Give back what a trace of a disk has (BLKTRACESETUP), which outlives who made it; EINVAL if there is none."""
    fcntl.ioctl(device, BLKTRACETEARDOWN)


def _loop_info(flags: int) -> bytes:
    return struct.pack(LOOP_INFO, 0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0)


def use_cache(loop: int) -> None:
    """Have an open loop device use the cache of what it is over, and no longer direct I/O."""
    fcntl.ioctl(loop, LOOP_SET_DIRECT_IO, 0)


def loop_backing(loop: int) -> tuple[int, int, int]:
    """st_dev, st_ino and st_rdev of the file that an open loop device is over; ENXIO if it is over none."""
    device, inode, rdevice = struct.unpack_from(
        "=3Q", fcntl.ioctl(loop, LOOP_GET_STATUS64, bytes(struct.calcsize(LOOP_INFO)))
    )
    return device, inode, rdevice


def add_partition(disk: int, number: int, start: int, length: int) -> None:
    """Tell the kernel of a partition; `start` and `length` in bytes."""
    _blkpg(disk, BLKPG_ADD_PARTITION, number, start, length)


def resize_partition(disk: int, number: int, start: int, length: int) -> None:
    """Tell the kernel of the new length of a partition, which may be in use; `start` is as it was (Linux 3.6)."""
    _blkpg(disk, BLKPG_RESIZE_PARTITION, number, start, length)


def forget_btrfs(device: str) -> None:
    """Have the kernel forget a btrfs device that is not mounted: its name and UUID will be another's."""
    try:
        with open("/dev/btrfs-control", "rb") as control:
            argument = struct.pack("=q4088s", 0, os.fsencode(device))  # struct btrfs_ioctl_vol_args
            fcntl.ioctl(control, BTRFS_IOC_FORGET_DEV, bytearray(argument))  # bytes may have 1024 at most
    except OSError:
        pass  # another of its subvolumes is still mounted, or this kernel (before 5.4) remembers


def delete_partition(disk: int, number: int) -> None:
    """Have the kernel forget a partition; EBUSY while anybody has it open."""
    _blkpg(disk, BLKPG_DEL_PARTITION, number, 0, 0)


def _blkpg(disk: int, operation: int, number: int, start: int, length: int) -> None:
    values = struct.pack("@qqi64s64s4x", start, length, number, b"", b"")  # struct blkpg_partition: 152 bytes
    partition = ctypes.create_string_buffer(values, 152)
    argument = struct.pack("@iiiP", operation, 0, 152, ctypes.addressof(partition))
    fcntl.ioctl(disk, BLKPG, argument)


def shut_down_filesystem(path: str) -> None:
    """Stop the ext or xfs filesystem that is mounted at `path` at once, without writing back what it has not written
    yet. OSError for others: btrfs cannot, and writes everything back."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(directory, FS_IOC_SHUTDOWN, struct.pack("=I", SHUTDOWN_NO_LOG_FLUSH))
    finally:
        os.close(directory)


def sync_filesystem(directory: int) -> None:
    """Write everything of a filesystem to its device; OSError also for what could not be written before, since the
    directory was opened or, if nobody has been told of it, since the mount (syncfs(2), Linux 5.8)."""
    _check(_libc.syncfs(directory), "syncfs")


def trim(directory: int) -> None:
    """Tell the device below a mounted filesystem which blocks are free; EOPNOTSUPP if one of them cannot."""
    fcntl.ioctl(directory, FITRIM, bytearray(struct.pack("=3Q", 0, (1 << 64) - 1, 0)))


@contextlib.contextmanager
def changeable(descriptor: int) -> Iterator[None]:
    """A file that is immutable or append-only is neither for a moment."""
    flags = struct.unpack("l", fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))[0]
    fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("l", flags & ~FS_FIXED_FL))
    try:
        yield
    finally:
        fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("l", flags))


def punch_hole(descriptor: int, start: int, length: int) -> None:
    """Make a range of a file or block device read as zero without storing zeroes; EOPNOTSUPP if it cannot."""
    _fallocate(descriptor, FALLOC_FL_PUNCH_HOLE, start, length)


def zero_device(device: int, start: int, length: int) -> None:
    """Make a range of a block device read as zero, if need be by writing zeroes."""
    _fallocate(device, FALLOC_FL_ZERO_RANGE, start, length)


def _fallocate(descriptor: int, mode: int, start: int, length: int) -> None:
    arguments = ctypes.c_int(mode | FALLOC_FL_KEEP_SIZE), ctypes.c_int64(start), ctypes.c_int64(length)
    _check(_libc.fallocate64(ctypes.c_int(descriptor), *arguments), "fallocate")


def device_size(device: int) -> int:
    """Bytes of an open block device."""
    return int(struct.unpack("=Q", fcntl.ioctl(device, BLKGETSIZE64, bytes(8)))[0])


def is_read_only(device: int) -> bool:
    """Whether an open block device refuses to be written, though it could be opened for it."""
    return bool(struct.unpack("=i", fcntl.ioctl(device, BLKROGET, bytes(4)))[0])


def flush_buffers(device: int) -> None:
    """Write back and forget what the page cache holds of a block device."""
    fcntl.ioctl(device, BLKFLSBUF)


def enlarge_pipe(descriptor: int, size: int) -> None:
    """Let a pipe hold `size` bytes, if it is one and the system allows it."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, F_SETPIPE_SZ, size)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)
