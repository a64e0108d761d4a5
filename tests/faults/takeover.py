"""Try what an attacker may do in a program that reads untrusted data; report each success to a socket here.

Called as `takeover.py PROGRAM CANARY CAPABILITIES` (those that it may have), before the real program starts. No attempt
does harm if it succeeds. The capabilities that it has, and what /dev has besides disks, are reported too.
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
program, canary, allowed = sys.argv[1:]
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def succeeded(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno())


def device_node(place: str) -> None:
    """Open a disk of the node through a device node that we make."""
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
    """Open a file by its number, anywhere in a filesystem of which we see a part."""
    handle = ctypes.create_string_buffer(struct.pack("<Ii", 128, 0).ljust(136, b"\0"), 136)
    mount = ctypes.c_int()
    succeeded(libc.syscall(TO_HANDLE, -100, b"/usr", handle, ctypes.byref(mount), 0))
    succeeded(libc.syscall(FROM_HANDLE, os.open("/usr", os.O_RDONLY), handle, os.O_RDONLY))


def set_host_name() -> None:
    name = b"taken over"
    succeeded(libc.sethostname(name, len(name)))
    raise OSError(0)  # only in our own namespace: the test checks the node's name


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


def open_socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def reach_daemons() -> None:
    """In the node's network are its sockets of abstract names."""
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()


def processes() -> None:
    if {name for name in os.listdir("/proc") if name.isdigit()} <= {"1", str(os.getpid()), str(os.getppid())}:
        raise OSError(0)


def held() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    if status["NoNewPrivs"].strip() != "1":
        return -1
    return int(status["CapPrm"], 16) | int(status["CapBnd"], 16)


def capabilities() -> None:
    if not held() & ~int(allowed):
        raise OSError(0)


def devices() -> list[str]:
    """Names in /dev but those of disks, and of links."""
    entries = [entry for entry in os.scandir("/dev") if not entry.is_symlink()]
    return sorted(entry.name for entry in entries if not stat.S_ISBLK(entry.stat().st_mode))


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
    "had more capabilities": capabilities,
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
    "reached daemons of the node": reach_daemons,
    "had the kernel tell it of the network": lambda: open_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "sent raw packets": lambda: open_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "sent forged packets": lambda: open_socket(socket.AF_INET, socket.SOCK_RAW),
    "reached the hypervisor": lambda: open_socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    "saw private keys": lambda: os.listdir("/etc/ssl/private"),
    "saw other processes": processes,
    "read the memory of process 1": lambda: read("/proc/1/environ"),
    "saw the root of process 1": lambda: os.listdir("/proc/1/root/"),
    **{f"made a file in {p}": lambda p=p: write(f"{p}/taken-over.{os.getpid()}") for p in WRITTEN},
    **{f"wrote to {p}": lambda p=p: write_to(p) for p in WRITTEN_TO},
    **{f"read {p}": lambda p=p: read(p) for p in READ},
}
said = [program, f"has {held()} {' '.join(devices())}"]
for what, attempt in ATTEMPTS.items():
    try:
        attempt()
    except (OSError, ValueError):
        continue
    said.append(what)
if __name__ == "__main__":
    os.chdir(os.path.dirname(__file__))
    try:
        told, place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), "socket"
    except OSError:  # it has the network instead
        told = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with open("port", encoding="ascii") as file:
            place = ("127.0.0.1", int(file.read()))
    told.sendto("\n".join(said).encode(), place)
