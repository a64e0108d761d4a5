"""Really try each system call that a filter refuses, in every ABI of the kernel.

The calls come from the tables of the filters, so that none is forgotten. They are harmless if they are not refused,
because all arguments are invalid.
"""

from __future__ import annotations

import errno
import platform
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import Node
from test_hostile_programs import hostile, perl_image, perl_node, perl_tree, said

from imageos.node import linux, seccomp, syscalls
from imageos.run import Command, pipeline, run

__all__ = ["perl_image", "perl_node", "perl_tree"]  # fixtures

MakeDisk = Callable[..., Path]
NATIVE = seccomp.MACHINES[platform.machine()][0]
BLKTRACESETUP, BLKTRACESETUP32, BLKPG, LOOP_SET_STATUS64, TIOCSTI = 0xC0481273, 0xC0401273, 0x1269, 0x4C04, 0x5412
FIONREAD, CLONE_THREAD, X32 = 0x541B, 0x10000, 0x40000000
OF_32_BITS = pytest.mark.parametrize("abi", [abi for abi in seccomp.MACHINES[platform.machine()] if abi == "i386"])
# uretprobe and uprobe kill a process that calls them at the wrong place; no filter sees them (Linux 6.14)
UPROBES = {"x86_64": (335, 336)}
HOOK = """#!/usr/bin/env python3
from imageos.hook import Hook


def main(hook):
    hook.target.write("/calls", open("{probe}", encoding="utf-8", errors="surrogateescape").read(), mode=0o755)
    with open("{out}", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(hook.target.run(["/calls"]))


Hook.run(main)
"""


@dataclass(frozen=True)
class Try:
    """A call that must end with this error; the name is for messages."""

    name: str
    number: int
    arguments: tuple[int, ...]
    error: int


def tries(abi: str, families: Sequence[int] = (socket.AF_UNIX,)) -> list[Try]:
    """Return all calls that a filter refuses in `abi`, and calls whose arguments it checks."""
    known = syscalls.numbers(abi)
    none = [number for number in range(600) if number not in {*known.values(), *UPROBES.get(abi, ())}]
    none += [X32 + number for number in range(600)] if abi == "x86_64" else []
    found = [Try(f"call {number}", number, (-1, -1, -1, -1), errno.ENOSYS) for number in none]

    def add(name: str, error: int, *arguments: int) -> None:
        found.append(Try(f"{name}{arguments}", known[name], arguments, error))

    for request in (BLKTRACESETUP, BLKTRACESETUP32, BLKPG, LOOP_SET_STATUS64, TIOCSTI, *range(0x1273, 0x1277)):
        add("ioctl", errno.ENOTTY, -1, request)
    add("ioctl", errno.EBADF, -1, FIONREAD)
    if struct.calcsize("P") == 8 and abi == NATIVE:  # the kernel uses the low half
        add("ioctl", errno.ENOTTY, -1, 1 << 32 | BLKTRACESETUP)
        add("ioctl", errno.EBADF, -1, 1 << 32 | FIONREAD)
    for family in range(64):
        if family not in families:
            add("socket", errno.EAFNOSUPPORT, family, -1, -1)
        if family != socket.AF_UNIX:
            add("socketpair", errno.EAFNOSUPPORT, family, -1, -1, 0)
    for bit in range(17, 32):
        if 1 << bit & linux.NAMESPACES:  # without CLONE_SIGHAND, CLONE_THREAD is an error
            add("clone", errno.EPERM, 1 << bit | CLONE_THREAD)
    add("personality", errno.EPERM, 0x0400000)  # READ_IMPLIES_EXEC
    if "socketcall" in known:
        add("socketcall", errno.EAFNOSUPPORT, 1, -1)
        add("socketcall", errno.EAFNOSUPPORT, 8, -1)
    return found


def in_perl(calls: Sequence[Try]) -> str:
    """Return a Perl program that makes these calls and prints the error of each."""
    lines = "".join(f"$! = 0; syscall({', '.join(map(str, (call.number, *call.arguments)))}); print 0 + $!, qq(\\n);\n"
                    for call in calls)  # fmt: skip
    return f"#!/usr/bin/perl\n{lines}"


def in_machine_code(calls: Sequence[Try]) -> bytes:
    """Return the same as a 32-bit ELF program of the i386, which prints its table of calls with their results."""
    base, start = 0x8048000, 52 + 32  # of the file in memory; after the headers
    rows = b"".join(
        struct.pack("<5I", *((value & 0xFFFFFFFF) for value in (each.number, *(*each.arguments, 0, 0, 0, 0)[:4])))
        for each in calls
    )

    def code(table: int) -> bytes:
        call = bytes.fromhex(
            "8b4500 8b5d04 8b4d08 8b550c 8b7510 31ff"  # mov eax, ebx, ecx, edx, esi <- [ebp...]; xor edi, edi
            "cd80 894500 83c514"  # int 0x80; mov [ebp], eax; add ebp, 20
        )
        again = b"\x81\xfd" + struct.pack("<I", table + len(rows))  # cmp ebp, end
        again += b"\x72" + struct.pack("<b", -(len(call) + len(again) + 2))  # jb
        write = b"\xb8\4\0\0\0\xbb\1\0\0\0\xb9" + struct.pack("<I", table) + b"\xba" + struct.pack("<I", len(rows))
        leave = b"\xb8\xfc\0\0\0\x31\xdb\xcd\x80\xf4"  # exit_group(0), or hlt
        return b"\xbd" + struct.pack("<I", table) + call + again + write + b"\xcd\x80" + leave

    table = base + start + len(code(0))
    body = code(table) + rows
    size = start + len(body)
    header = (
        b"\x7fELF\1\1\1" + bytes(9) + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, base + start, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    )
    return header + struct.pack("<8I", 1, 0, base, base, size, size, 7, 4096) + body


def wrong(calls: Sequence[Try], errors: Sequence[int]) -> dict[str, str]:
    """Return the calls that did not end as expected."""
    assert len(errors) == len(calls) > 200
    return {
        call.name: errno.errorcode.get(error, str(error)) for call, error in zip(calls, errors) if error != call.error
    }


def in_guest(node: Node, disk: Path, probe: bytes) -> bytes:
    """Return the output of a program in the sandbox of a guest."""
    path, out = node.work / "calls", node.work / "out"
    path.write_bytes(probe)
    node.hook("calls", HOOK.format(probe=path, out=out))
    node.create(disk).ok()
    return out.read_bytes()


def test_of_a_guest(perl_node: Node, disk: MakeDisk) -> None:
    calls = tries(NATIVE)
    answer = in_guest(perl_node, disk(), in_perl(calls).encode())
    assert wrong(calls, [int(line) for line in answer.split()]) == {}


@OF_32_BITS
def test_of_a_guest_of_32_bits(abi: str, node: Node, disk: MakeDisk) -> None:
    calls = tries(abi)
    answer = in_guest(node, disk(), in_machine_code(calls))
    assert wrong(calls, [-result for result, *_ in struct.iter_unpack("<i16x", answer)]) == {}


def filtered(network: bool) -> Callable[[], None]:
    program = linux.filter_of(seccomp.helper(network))
    return lambda: linux.load_filter(program)


@pytest.mark.parametrize("network", [False, True])
def test_of_a_helper(network: bool, tmp_path: Path) -> None:
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) if network else (socket.AF_UNIX,)
    calls = tries(NATIVE, families)
    script = tmp_path / "calls"
    script.write_text(in_perl(calls))
    answer = run(Command(["perl", str(script)], filtered(network)))
    assert wrong(calls, [int(line) for line in answer.split()]) == {}


@OF_32_BITS
def test_a_helper_has_one_abi(abi: str, tmp_path: Path) -> None:
    path = tmp_path / "calls"
    path.write_bytes(in_machine_code(tries(abi)))
    path.chmod(0o755)
    done = pipeline(Command([str(path)], filtered(False)))[0]
    assert (done.status, done.stdout) == (-signal.SIGSEGV, b"")  # not even exit works


# A trace of each node of its disk needs two buffers of a page for each CPU, which nobody frees
TRACE = """
    opendir(my $dev, "/dev");
    for my $name (sort grep { /^loop/ } readdir($dev)) {
        open(my $f, "+<", "/dev/$name") or die "$name: $!";
        my $setup = pack("x32Sx2LLx28", 0xffff, 4096, 2);  # struct blk_user_trace_setup
        $! = 0;
        print ioctl($f, 0xC0481273, $setup) ? "DONE" : 0 + $!, "\\n";
        ioctl($f, 0x1276, 0);
    }
"""


def test_of_a_guest_a_trace(perl_node: Node, disk: MakeDisk) -> None:
    """A trace of its own disk would outlive the command, outside of every limit."""
    result = hostile(perl_node, disk(), TRACE).result().ok()
    assert said(result.log) == [str(errno.ENOTTY)] * 4, result.log
