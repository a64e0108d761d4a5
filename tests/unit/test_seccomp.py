"""The filters of system calls, run in a small interpreter like the kernel's: every call, request and family."""

from __future__ import annotations

import errno
import socket
import struct
from functools import cache

import pytest

from imageos.node import linux, seccomp, syscalls

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
BLKTRACESETUP, LOOP_SET_STATUS64, TIOCSTI, SG_IO = 0xC0481273, 0x4C04, 0x5412, 0x2285
# For files, disks, terminals: fs.h, fd.h, hdreg.h, md_u.h, sg.h, loop.h, nvme_ioctl.h, cdrom.h, ioctls.h, dm-ioctl.h
KINDS = (0, 2, 3, 9, 0x12, 0x22, 0x4C, 0x4E, 0x53, 0x54, 0xFD)
ABIS = [
    ("x86_64", "x86_64"),
    ("x86_64", "i386"),
    ("i686", "i386"),
    ("aarch64", "aarch64"),
    ("aarch64", "arm"),
    ("armv7l", "arm"),
]
HELPERS = [("x86_64", "x86_64"), ("aarch64", "aarch64")]
# These must never be allowed
NEVER = {
    *("bpf", "perf_event_open", "keyctl", "add_key", "request_key", "userfaultfd", "open_by_handle_at", "clone3"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "io_setup", "inotify_init", "inotify_init1"),
    *("mount", "umount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "pivot_root", "chroot", "setns", "unshare", "ptrace", "kcmp", "pidfd_getfd", "acct"),
    *("process_vm_readv", "process_vm_writev", "kexec_load", "kexec_file_load", "init_module", "finit_module"),
    *("delete_module", "swapon", "swapoff", "reboot", "quotactl", "quotactl_fd", "sethostname", "setdomainname"),
    *("settimeofday", "clock_settime", "clock_settime64", "adjtimex", "clock_adjtime", "clock_adjtime64", "stime"),
    *("syslog", "iopl", "ioperm", "vhangup", "modify_ldt", "vm86", "fanotify_init", "fanotify_mark", "uselib"),
}


@cache
def decoded(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("=HBBI", program))


def answer(program: bytes, abi: str, number: int, *arguments: int) -> int:
    """Return 0 if the call is allowed, otherwise its error (Documentation/networking/filter.rst)."""
    data = struct.pack(
        "=iIQ6Q", number - (number >> 31 << 32), seccomp.AUDIT[abi], 0, *[*arguments, 0, 0][:2], 0, 0, 0, 0
    )
    code = decoded(program)
    place, accumulator = 0, 0
    while True:
        operation, yes, no, operand = code[place]
        place += 1
        if operation == seccomp.LOAD:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif operation == seccomp.JUMP:
            place += operand
        elif operation == seccomp.EQUAL_OR_MORE:
            place += yes if accumulator >= operand else no
        elif operation == seccomp.AND:
            accumulator &= operand
        elif operation == seccomp.EQUAL:
            place += yes if accumulator == operand else no
        elif operation == seccomp.ANY_BIT:
            place += yes if accumulator & operand else no
        else:
            assert operation == seccomp.RETURN
            assert operand == ALLOW or operand & ~0xFFF == ERRNO
            return 0 if operand == ALLOW else operand & 0xFFF


def programs() -> list[tuple[str, str, bytes]]:
    return [
        *(("guest", abi, seccomp.guest(machine)) for machine, abi in ABIS),
        *(("helper", abi, seccomp.helper(machine=machine)) for machine, abi in HELPERS),
        *(("network", abi, seccomp.helper(network=True, machine=machine)) for machine, abi in HELPERS),
    ]


@pytest.fixture(params=programs(), ids=lambda case: "-".join(case[:2]))
def program(request: pytest.FixtureRequest) -> tuple[str, str, bytes]:
    found: tuple[str, str, bytes] = request.param
    return found


def test_what_is_not_named_does_not_exist(program: tuple[str, str, bytes]) -> None:
    kind, abi, code = program
    left_out = seccomp.NOT_OF_GUESTS if kind == "guest" else ()
    allowed = {number for name, number in syscalls.numbers(abi).items() if name not in left_out}
    tried = [*range(1024), *allowed, 0x0F0001, 0x900000, 1 << 31, (1 << 32) - 1, *range(0x40000000, 0x40000400)]
    assert {number for number in tried if answer(code, abi, number, 0) != errno.ENOSYS} == allowed
    assert len(code) // 8 <= 4096  # BPF_MAXINSNS


def test_others_abis_do_not_exist() -> None:
    """Neither do other ABIs of the kernel for a helper, which has ours."""
    assert answer(seccomp.guest("x86_64"), "aarch64", 64) == errno.ENOSYS
    assert answer(seccomp.helper(machine="x86_64"), "i386", 4) == errno.ENOSYS
    assert answer(seccomp.guest("x86_64"), "i386", 4) == 0


@pytest.mark.parametrize("abi", syscalls.ABIS)
def test_never(abi: str) -> None:
    calls = syscalls.numbers(abi)
    assert not NEVER & set(calls)
    assert len(set(calls.values())) == len(calls), "two have one number"


def test_requests(program: tuple[str, str, bytes]) -> None:
    kind, abi, code = program
    ioctl = syscalls.numbers(abi)["ioctl"]
    allowed = set(seccomp._values(seccomp.IOCTLS))
    if kind != "guest":
        allowed |= seccomp._values(seccomp.DISK_IOCTLS)
    tried = {
        *(kind << 8 | number for kind in KINDS for number in range(256)),
        *(number + more for number in allowed for more in (0, 1, -1, 0x10000)),
        *(BLKTRACESETUP, 0xC0401273, 1 << 31, (1 << 32) - 1),
    }
    assert {number for number in tried if answer(code, abi, ioctl, 3, number) != errno.ENOTTY} == allowed
    assert not allowed & {BLKTRACESETUP, LOOP_SET_STATUS64, TIOCSTI, SG_IO, *range(0x1273, 0x1277)}
    # the kernel uses the low half
    assert answer(code, abi, ioctl, 3, 1 << 32 | BLKTRACESETUP) == errno.ENOTTY
    assert answer(code, abi, ioctl, 3, BLKTRACESETUP << 32 | 0x541B) == 0


def test_families(program: tuple[str, str, bytes]) -> None:
    kind, abi, code = program
    calls = syscalls.numbers(abi)
    families = {socket.AF_INET, socket.AF_INET6} if kind == "network" else {socket.AF_UNIX}
    tried = [*range(64), 1 << 31, 1 << 32 | socket.AF_VSOCK]
    assert {arg for arg in tried if answer(code, abi, calls["socket"], arg) != errno.EAFNOSUPPORT} == families
    assert {arg for arg in tried if answer(code, abi, calls["socketpair"], arg) != errno.EAFNOSUPPORT} == {1}
    if "socketcall" in calls:  # the families of socketcall are in memory: socket and socketpair
        assert [arg for arg in range(32) if answer(code, abi, calls["socketcall"], arg) == errno.EAFNOSUPPORT] == [1, 8]


def test_namespaces_and_personalities(program: tuple[str, str, bytes]) -> None:
    _, abi, code = program
    calls = syscalls.numbers(abi)
    new = [bit for bit in range(8, 32) if answer(code, abi, calls["clone"], 1 << bit | 17) == errno.EPERM]
    assert sum(1 << bit for bit in new) == linux.NAMESPACES == 0x7E020000
    assert answer(code, abi, calls["clone"], 0x3D0F00) == 0  # a thread
    assert answer(code, abi, calls["personality"], 0x8) == 0
    assert answer(code, abi, calls["personality"], 0x0400000) == errno.EPERM  # READ_IMPLIES_EXEC


def test_other_machines_have_none() -> None:
    assert seccomp.guest("s390x") == seccomp.helper(machine="s390x") == b""


def test_kvm_is_for_those_that_make_virtual_machines() -> None:
    """And it opens nothing else: all requests for files and disks are answered as without it."""
    call = syscalls.numbers("x86_64")["ioctl"]
    plain, virtual = seccomp.helper(machine="x86_64"), seccomp.helper(kvm=True, machine="x86_64")
    for request in (0xAE00, 0xAE01, 0xAE41, 0xAE80, 0x4020AE46, 0x8138AE83, 0xC008AE05):  # kvm.h
        assert answer(plain, "x86_64", call, 3, request) == errno.ENOTTY
        assert answer(virtual, "x86_64", call, 3, request) == 0
    for kind in KINDS:
        for number in range(256):
            request = kind << 8 | number
            assert answer(virtual, "x86_64", call, 3, request) == answer(plain, "x86_64", call, 3, request)
    assert answer(virtual, "x86_64", call, 3, TIOCSTI) == errno.ENOTTY
    assert answer(virtual, "x86_64", call, 3, 0xAE005412) == errno.ENOTTY
