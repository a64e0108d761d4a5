"""What a program that reads a stranger's work may try once it is taken over; what succeeds is told to a socket here.

Called as `takeover.py PROGRAM CANARY`, before the real program starts. Nothing of it does harm where it succeeds.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
BPF, PERF, FROM_HANDLE, TO_HANDLE = (321, 298, 304, 303) if X86 else (280, 241, 265, 264)
program, canary = sys.argv[1:]
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def succeeded(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno())


def device_node(place: str) -> None:
    """A disk of the node's, opened through a node of our own."""
    path = f"{place}/other.{os.getpid()}"
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 0))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    finally:
        os.unlink(path)


def other_disks() -> None:
    names = [entry.path for entry in os.scandir("/dev") if stat.S_ISBLK(os.stat(entry.path).st_mode)]
    disks = {name.partition("p")[0] if name.startswith("/dev/loop") else name for name in names}
    if len(disks) < 2 and not os.path.exists("/dev/loop-control"):
        raise OSError(0)


def bpf_program() -> None:
    code = ctypes.create_string_buffer(struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    values = struct.pack("<IIQQIIQII", 2, 2, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0, 0, 0)
    succeeded(libc.syscall(BPF, 5, ctypes.create_string_buffer(values.ljust(128, b"\0"), 128), 128))


def perf() -> None:
    attributes = ctypes.create_string_buffer(struct.pack("<IIQ", 1, 112, 0).ljust(112, b"\0"), 112)
    succeeded(libc.syscall(PERF, attributes, -1, 0, -1, 0))


def by_handle() -> None:
    """A file by its number, wherever it lies in a filesystem that we have a part of."""
    handle = ctypes.create_string_buffer(struct.pack("<Ii", 128, 0).ljust(136, b"\0"), 136)
    mount = ctypes.c_int()
    succeeded(libc.syscall(TO_HANDLE, -100, b"/usr", handle, ctypes.byref(mount), 0))
    succeeded(libc.syscall(FROM_HANDLE, os.open("/usr", os.O_RDONLY), handle, os.O_RDONLY))


def set_host_name() -> None:
    name = b"taken over"
    succeeded(libc.sethostname(name, len(name)))
    raise OSError(0)  # of our own namespace: the test looks at the node's


def change_null(path: str) -> None:
    os.chmod(path, 0o666)


def change_stdin() -> None:
    if not stat.S_ISCHR(os.fstat(0).st_mode):
        raise OSError(0)


def mount() -> None:
    succeeded(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))


def write(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(path)


def write_to(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def network() -> None:
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        raise OSError(0)


def processes() -> None:
    if {name for name in os.listdir("/proc") if name.isdigit()} <= {"1", str(os.getpid()), str(os.getppid())}:
        raise OSError(0)


def capabilities(allowed: int) -> None:
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    held = int(status["CapPrm"], 16) | int(status["CapBnd"], 16)
    if not held & ~allowed and status["NoNewPrivs"].strip() == "1":
        raise OSError(0)


# chown, dac_override, fowner, fsetid, linux_immutable, mknod, setfcap, mac_admin; sys_admin (linux/capability.h)
UNPACKING, SYS_ADMIN = 0x28800021B, 1 << 21
ALLOWED = {
    **dict.fromkeys(("tar", "restore", "find", "qemu-img", "xz", "zstd", "gpgv"), UNPACKING),
    **dict.fromkeys(("mkfs.xfs", "xfs_growfs", "btrfs"), SYS_ADMIN),
}
WRITTEN = (
    "/",
    "/etc",
    "/usr",
    "/usr/bin",
    "/home",
    "/mnt",
    "/root",
    "/run",
    "/srv",
    "/var/cache",
    "/var/lib",
    "/var/log",
)
READ = ("/etc/shadow", "/etc/hosts", "/var/lib/ganeti/config.data", "/proc/kcore", "/dev/mem", "/dev/kmsg", canary)
WRITTEN_TO = ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/power/state", "/usr/bin/env", canary)
ATTEMPTS = {
    "had more capabilities": lambda: capabilities(ALLOWED.get(program, 0)),
    **{f"opened another disk in {p}": lambda p=p: device_node(p) for p in ("/dev", "/tmp", ".")},
    "saw another disk": other_disks,
    "set the host name": set_host_name,
    "loaded a BPF program": bpf_program,
    "saw all of the system with perf": perf,
    "opened a file by its number": by_handle,
    "made a user namespace": lambda: succeeded(libc.unshare(CLONE_NEWUSER)),
    "made a mount namespace": lambda: succeeded(libc.unshare(CLONE_NEWNS)),
    "entered a namespace": lambda: succeeded(libc.setns(os.open("/proc/1/ns/mnt", os.O_RDONLY), 0)),
    "mounted": mount,
    "unmounted": lambda: succeeded(libc.umount2(b"/usr", 2)),
    "mounted again": lambda: succeeded(libc.mount(None, b"/usr", None, 4096 | 32, None)),
    "changed the root": lambda: os.chroot("/tmp"),
    "changed /dev/null": lambda: change_null("/dev/null"),
    "had a device of the node as stdin": change_stdin,
    "saw the network": network,
    "saw other processes": processes,
    "read the memory of process 1": lambda: read("/proc/1/environ"),
    "saw the root of process 1": lambda: os.listdir("/proc/1/root/"),
    **{f"made a file in {p}": lambda p=p: write(f"{p}/taken-over.{os.getpid()}") for p in WRITTEN},
    **{f"wrote to {p}": lambda p=p: write_to(p) for p in WRITTEN_TO},
    **{f"read {p}": lambda p=p: read(p) for p in READ},
}
said = [program]
for what, attempt in ATTEMPTS.items():
    try:
        attempt()
    except (OSError, ValueError):
        continue
    said.append(what)
os.chdir(os.path.dirname(__file__))
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto("\n".join(said).encode(), "socket")
