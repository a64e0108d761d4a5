"""The sandbox for programs of the guest: the guest's root, and nothing of the node.

Its own mount, PID, network, IPC and UTS namespaces, a private /dev with its own disk only, read-only /proc
and /sys, few capabilities, no way to gain more, bounds on processes and memory. A chroot rather than pivot_root: the
kernel refuses user namespaces, and with them new mounts, to a process in a chroot.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from imageos.errors import explained
from imageos.node import limits, linux, seccomp
from imageos.node.confinement import DEVICES, LINKS, exit_as, leave_first_process_behind, take_own_null

CAPABILITIES = (
    linux.CAP_CHOWN,
    linux.CAP_DAC_OVERRIDE,
    linux.CAP_FOWNER,
    linux.CAP_FSETID,
    linux.CAP_KILL,
    linux.CAP_SETUID,
    linux.CAP_SETGID,
)
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
}
GUEST_DEVICES = {**DEVICES, "tty": (5, 0)}
# Of each process; no program of a guest has reason to take more. The limits of all together: node.cgroup.
LIMITS = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 8 << 30,  # bytes
    resource.RLIMIT_AS: 4 << 30,
    resource.RLIMIT_SIGPENDING: 1024,  # queued signals and timers, of which root has a number for the whole node
}


class GuestDisk(NamedTuple):
    """The guest's own disk as it may see it: device nodes, and UUID -> node of its filesystems."""

    nodes: Sequence[str]
    uuids: Sequence[tuple[str, str]]


NO_DISK = GuestDisk((), ())


def entering(path: str, hostname: str, disk: GuestDisk, join: Callable[[], None]) -> Callable[[], None]:
    """Return the function by which a child enters the sandbox of the guest mounted at `path`, before exec.

    `join` enters its control group.
    """
    # Looked up here: the child must not depend on the state of its parent's /dev.
    nodes = {os.path.basename(node): os.stat(node).st_rdev for node in disk.nodes}
    nodes.update((name, os.makedev(*number)) for name, number in GUEST_DEVICES.items())
    calls, have = linux.filter_of(seccomp.guest()), linux.capabilities()

    def enter() -> None:
        try:
            join()
            _enter(path, hostname, nodes, disk.uuids, have)
            linux.load_filter(calls)  # last: nothing of the above is allowed any more
        except OSError as error:
            # this is all that anybody is told
            os.write(2, f"cannot enter the sandbox: {error}\n".encode("ascii", "backslashreplace"))
            os._exit(126)

    return enter


@contextmanager
def devices(path: str) -> Iterator[None]:
    """Mount harmless devices on the /dev of the guest at `path`, for hooks that start its programs.

    The guest's own devices cannot be opened (nodev), and `>/dev/null` would make a file there.
    """
    with ExitStack() as stack:
        with linux.closing(os.open(path, os.O_PATH | os.O_DIRECTORY)) as root:
            with explained("cannot mount devices at the guest's /dev"):
                _mount_over(root, "dev", "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC, "mode=0755,size=64k")
            stack.callback(linux.umount, f"{path}/dev", linux.MNT_DETACH)
            _make_devices(root, {name: os.makedev(*number) for name, number in GUEST_DEVICES.items()}, ())
        yield


def _enter(path: str, hostname: str, nodes: dict[str, int], uuids: Sequence[tuple[str, str]], have: int) -> None:
    take_own_null()
    os.setsid()  # no terminal of the node's
    linux.leave_session_keyring()
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # when the node runs out of memory, this is the one to go
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    _become_first_process()
    # Open it only now: a descriptor from another mount namespace leads to a place where nothing can be mounted.
    root = os.open(path, os.O_PATH | os.O_DIRECTORY)
    socket.sethostname(hostname)
    plain = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    _mount_over(root, "dev", "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC, "mode=0755,size=64k,nr_inodes=1k")
    _make_devices(root, nodes, uuids)
    _mount_over(root, "proc", "proc", plain | linux.MS_RDONLY)
    _mount_over(root, "sys", "sysfs", plain | linux.MS_RDONLY)
    _mount_over(root, "run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=64m,nr_inodes=16k")
    os.fchdir(root)
    os.chroot(".")
    os.umask(0o022)
    leave_first_process_behind()
    for limit, value in LIMITS.items():
        limits.lower(limit, value)
    linux.limit_capabilities(CAPABILITIES, have)


def _become_first_process() -> None:
    """Continue as process 1 of the new PID namespace: all that it starts ends with it."""
    parent = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        linux.die_with_parent()
        linux.close_all(3)
        exit_as(child)
    linux.die_with_parent()
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)  # it was ended before
    os.close(parent)


def _make_devices(root: int, nodes: dict[str, int], uuids: Sequence[tuple[str, str]]) -> None:
    directory = _directory(root, "dev")
    for name, number in nodes.items():
        kind, mode = (stat.S_IFCHR, 0o666) if name in GUEST_DEVICES else (stat.S_IFBLK, 0o660)
        os.mknod(name, kind | mode, number, dir_fd=directory)
        os.chmod(name, mode, dir_fd=directory)  # whatever the umask
    for name, target in LINKS.items():
        os.symlink(target, name, dir_fd=directory)
    os.mkdir("disk", dir_fd=directory)
    os.mkdir("disk/by-uuid", dir_fd=directory)
    for uuid, node in uuids:
        # grub-mkconfig writes root=UUID= only if it finds these
        os.symlink(f"../../{os.path.basename(node)}", f"disk/by-uuid/{uuid}", dir_fd=directory)
    os.close(directory)


def _mount_over(root: int, name: str, kind: str, flags: int, data: str = "") -> None:
    directory = _directory(root, name)
    linux.mount(kind, f"/proc/self/fd/{directory}", kind, flags, data)
    os.close(directory)


def _directory(root: int, name: str) -> int:
    """Open the guest's top directory `name`; refuse a link, which could lead our mount astray."""
    return linux.open_in_root(root, name, os.O_PATH | os.O_DIRECTORY, resolve=linux.RESOLVE_NO_SYMLINKS)
