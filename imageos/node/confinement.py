"""A root of its own for every program of the node that may read what a stranger has made.

In it are programs and libraries, read-only; a /dev with what is harmless and its own disk; what it is given, read-only;
one directory that it works in, if it is given one, and a small /tmp. It has no network unless it downloads, no
process but its own, few capabilities, no way to gain more, and writes only where Landlock lets it. Who takes such a
program over has no more.

bubblewrap does most of this, but not all, and what it leaves open is open to root. It shows the node's own /dev/null,
whose mode root may change without any capability; it moves the root (pivot_root) where a chroot has the kernel refuse
user namespaces; it cannot work in a root that is no mount point, nor enter a directory that is mounted nowhere, nor
bound a tmpfs on Debian 11; Landlock, once set, forbids it to mount, and nothing comes between it and the program; and
it tells a signal that has ended the program as a status. With own code for all that, nothing is left for it to do.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from imageos.node import limits, linux, seccomp

MEMORY = 4 << 30  # bytes of address space that a program may take, whatever an archive claims
KVM = "/dev/kvm"
TEMPORARY = "/tmp"  # in there
TEMPORARY_LIMITS = "mode=0700,size=1g,nr_inodes=1k"  # restore keeps all directories of a dump there
# Directories of programs and libraries; of those at the top, most are links on most nodes
PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# For the loader, for programs that are links, and for the defaults of mkfs.ext4
CONFIGURATION = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/mke2fs.conf")
# To find a server by its name and judge its certificate: of Debian, then of Fedora. No private key is in there.
NETWORK = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"),
    *("/etc/ssl/certs", "/etc/ssl/openssl.cnf"),
    *("/etc/pki/tls/certs", "/etc/pki/tls/cert.pem", "/etc/pki/tls/openssl.cnf", "/etc/pki/tls/openssl.d"),
    *("/etc/pki/ca-trust/extracted", "/etc/crypto-policies"),
)
PASSWD = b"root:x:0:0:root:/root:/bin/sh\n"  # ssh-keygen asks who it is
# Name -> major, minor (Documentation/admin-guide/devices.txt)
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}
LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}
PLAIN = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC


# What makes the files of an archive: with any owner, mode, flag, device number (of nodes that cannot be opened: all
# that it can write to is mounted nodev), ACL, and the attributes user.*, security.capability and, where the kernel runs
# SELinux, security.selinux. The other security.* and trusted.* take CAP_SYS_ADMIN, which mounts: they are left out.
UNPACKING = (
    linux.CAP_CHOWN,
    linux.CAP_DAC_OVERRIDE,
    linux.CAP_FOWNER,
    linux.CAP_FSETID,
    linux.CAP_LINUX_IMMUTABLE,
    linux.CAP_MAC_ADMIN,
    linux.CAP_MKNOD,
    linux.CAP_SETFCAP,
)


class Room(NamedTuple):
    """The surroundings of a program, in addition to programs and libraries."""

    sees: Sequence[str] = ()  # devices, to read and to write; files and directories, to read
    mount: str = ""  # of its filesystem, which it is to grow: to be found in /proc, and writable
    work: str = ""  # the directory that it works in, which has no `..`, and where it may write
    capabilities: Sequence[int] = ()
    memory: int = MEMORY
    network: bool = False  # that of the node, and what NETWORK names


NOTHING = Room()  # but programs and libraries


def unpacking(directory: str) -> Room:
    """Return a room to make the guest's files in `directory`, where one of its filesystems is mounted."""
    return Room(work=directory, capabilities=UNPACKING)


def entering(room: Room, path: str, kept: Iterable[int] = ()) -> Callable[[], None]:
    """Return the function by which a child, process 1 of a PID namespace (linux.children_apart), enters `room`.

    `path` is its PATH: what that names outside /usr is there, too. `kept` are descriptors that it is handed.
    """
    if os.geteuid() != 0:  # doctor may be anybody's: nothing that root alone could do is done
        return lambda: limits.lower(resource.RLIMIT_AS, room.memory)
    # Looked up here: the child must not depend on the state of its parent's /dev.
    nodes = {f"/dev/{name}": (stat.S_IFCHR | 0o666, os.makedev(*number)) for name, number in DEVICES.items()}
    shown = [*_programs(path), *filter(os.path.exists, CONFIGURATION)]
    for seen in (*room.sees, *(filter(os.path.exists, NETWORK) if room.network else ())):
        status = os.stat(seen)
        if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            nodes[seen] = (stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
        else:
            # a link needs the file that it leads to
            shown += [place for place in dict.fromkeys((seen, os.path.realpath(seen))) if not _is_beneath(place, shown)]
    if room.mount:
        shown.append(room.mount)
    calls = linux.filter_of(seccomp.helper(room.network, KVM in room.sees))
    have, with_below = linux.capabilities(), linux.can_restrict_all()
    files = [descriptor for descriptor in kept if stat.S_ISREG(os.fstat(descriptor).st_mode)]

    def enter() -> None:
        try:
            work = _enter(room, shown, nodes, with_below)
            leave_first_process_behind()
            limits.lower(resource.RLIMIT_AS, room.memory)
            linux.limit_capabilities(room.capabilities, have)
            linux.forbid_writing(_writable(work, files))
            linux.load_filter(calls)  # last: nothing of the above is allowed any more
        except OSError as error:
            # this is all that anybody is told
            os.write(2, f"cannot give up privileges: {error}\n".encode("ascii", "backslashreplace"))
            os._exit(126)

    return enter


def _programs(path: str) -> Iterator[str]:
    """Yield the directories of programs and libraries that are no links, and those of PATH that lie elsewhere."""
    yield from (place for place in PROGRAMS if os.path.isdir(place) and not os.path.islink(place))
    for place in dict.fromkeys(path.split(":")):
        is_other = place.startswith("/") and os.path.normpath(place) != "/" and not _is_beneath(place, PROGRAMS)
        if is_other and os.path.isdir(place):
            yield place


def _is_beneath(path: str, places: Iterable[str]) -> bool:
    """Return True if `path` is in one of `places`, or one of them itself."""
    return f"{os.path.normpath(path)}/".startswith(tuple(f"{os.path.normpath(place)}/" for place in places))


def _enter(room: Room, shown: Iterable[str], nodes: dict[str, tuple[int, int]], with_below: bool) -> int | None:
    """Make the room and go there; return a descriptor of the directory to work in."""
    # A copy that is mounted nowhere has nothing above it: restore(8) follows a `..` that a hostile dump has for a name
    working = linux.copy_mounts(room.work) if room.work else None
    copies = [(place, linux.copy_mounts(place, with_below)) for place in shown]
    take_own_null()
    os.setsid()  # no terminal of the node's
    linux.leave_session_keyring()
    network = 0 if room.network else linux.CLONE_NEWNET
    linux.unshare(linux.CLONE_NEWNS | network | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    umask = os.umask(0o022)
    # /proc is a mount even where the root is none; nobody but us sees the mount over it
    linux.mount(None, "/proc", None, linux.MS_PRIVATE)
    top = linux.new_tmpfs(linux.MS_NOSUID | linux.MS_NOEXEC, mode="0755", size="1m", nr_inodes="1k")
    linux.place_mounts(top, os.open("/proc", os.O_PATH))
    os.fchdir(top)
    os.mkdir("room")
    os.chdir("room")
    _furnish(copies, nodes)
    os.fchdir(top)
    linux.mount(None, ".", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NOEXEC)
    _drop_all_else()
    os.chdir("room")
    # Not the top of the namespace: to a process in a chroot the kernel refuses user namespaces, and with them mounts
    os.chroot(".")
    for place, _ in copies:
        read_only = 0 if place == room.mount else linux.MS_RDONLY
        linux.restrict_mounts(place, read_only | linux.MS_NOSUID | linux.MS_NODEV)
    os.umask(umask)
    if working is None:
        os.chdir("/")
    else:
        os.fchdir(working)
    return working


def _furnish(copies: Iterable[tuple[str, int]], nodes: dict[str, tuple[int, int]]) -> None:
    """Fill the working directory, the root to be."""
    for name in ("dev", "etc", "proc", "tmp"):
        os.mkdir(name)
    linux.mount("proc", "proc", "proc", PLAIN | linux.MS_RDONLY, "subset=pid")
    linux.mount("tmpfs", "tmp", "tmpfs", PLAIN, TEMPORARY_LIMITS)
    for name in PROGRAMS:
        if os.path.islink(name):
            os.symlink(os.readlink(name), name[1:])
    for name, target in LINKS.items():
        os.symlink(target, f"dev/{name}")
    for name, (mode, number) in nodes.items():
        os.makedirs(os.path.dirname(name[1:]), exist_ok=True)
        os.mknod(name[1:], mode, number)
        os.chmod(name[1:], stat.S_IMODE(mode))  # whatever the umask
    os.symlink("/proc/self/mounts", "etc/mtab")  # resize2fs wants to know what is mounted
    with linux.closing(os.open("etc/passwd", os.O_CREAT | os.O_WRONLY, 0o644)) as passwd:
        os.write(passwd, PASSWD)
    for place, copy in copies:
        place = os.path.normpath(place)[1:]
        os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        if stat.S_ISDIR(os.fstat(copy).st_mode):
            os.makedirs(place, exist_ok=True)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600))
        directory = os.open(place, os.O_PATH)
        linux.place_mounts(copy, directory)
        os.close(directory)


def _drop_all_else() -> None:
    """Let go of every mount of the node: one that is unmounted meanwhile would stay with us, and keep its disk busy."""
    try:
        linux.pivot_root(".", ".")
        linux.umount(".", linux.MNT_DETACH)
    except OSError as error:
        if (
            error.errno != errno.EINVAL
        ):  # the root is no mount point, or one that others share: out of reach all the same
            raise


def take_own_null() -> None:
    """Have another /dev/null for stdin than the node's, whose mode and owner whoever has it open could change."""
    status = os.fstat(0)
    if stat.S_ISCHR(status.st_mode):
        read, write = os.pipe()
        os.close(write)
        os.dup2(read, 0)  # at its end at once, as /dev/null is
        os.close(read)


def leave_first_process_behind() -> None:
    """Continue in a child, so that process 1 stays ours.

    A program that is process 1 cannot end by a signal of its own, as many do; and it could prevent its end with its
    parent's (prctl). It can do nothing to our process 1, which has more capabilities.
    """
    linux.die_with_parent()
    linux.forbid_dumps()
    child = os.fork()
    if child:
        linux.close_all()
        exit_as(child)


def exit_as(child: int) -> NoReturn:
    """Exit like `child` when it ends; bury the orphans until then."""
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _writable(work: int | None, files: Iterable[int]) -> Iterator[tuple[int, bool]]:
    """Yield the exceptions for linux.forbid_writing."""
    yield os.open(TEMPORARY, os.O_PATH), True
    yield os.open("/dev", os.O_PATH), False
    yield from ((file, False) for file in files)  # opened again by way of /proc
    if work is not None:
        yield work, True
