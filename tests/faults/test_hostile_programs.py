"""Programs of a guest that try to escape or to use up everything: refused, ended, bounded; the canary is unchanged."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trees
from backups import is_disarmed
from leftovers import descendants
from support import MIB, Call, Node, run, wait_until
from test_sandbox import HOOK

from imageos import log, outcome
from imageos.node import cgroup

MakeDisk = Callable[..., Path]

# Numbers of system calls: x86_64, aarch64 (asm/unistd.h)
NUMBERS = {
    "mount": (165, 40),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "ptrace": (101, 117),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "clock_settime": (227, 112),
    "bpf": (321, 280),
    "mknodat": (259, 33),
    "prctl": (157, 167),
    "mprotect": (10, 226),
    "keyctl": (250, 219),
    "epoll_create1": (291, 20),
    "rt_sigprocmask": (14, 135),
    "rt_sigqueueinfo": (129, 138),
}
# NAME -> condition in Perl, true if it succeeded; $n{...} are the numbers, $canary a file of the node
ATTEMPTS = {
    "mount": 'syscall($n{mount}, t("none"), t("/mnt"), t("tmpfs"), 0, 0) == 0',
    "bind mount": 'syscall($n{mount}, t("/etc"), t("/mnt"), 0, 4096, 0) == 0',
    "fsopen": 'syscall($n{fsopen}, t("tmpfs"), 0) >= 0',
    "open_tree": 'syscall($n{open_tree}, -100, t("/"), 1) >= 0',
    "pivot_root": 'syscall($n{pivot_root}, t("/"), t("/mnt")) == 0',
    "chroot": 'syscall($n{chroot}, t("/mnt")) == 0',
    "user namespace": "syscall($n{unshare}, 0x10000000) == 0",
    "mount namespace": "syscall($n{unshare}, 0x20000) == 0",
    "trace process 1": "syscall($n{ptrace}, 16, 1, 0, 0) == 0",
    "file handle": 'syscall($n{open_by_handle_at}, 0, t(pack("LlQ", 8, 1, 2)), 0) >= 0',
    "module": 'syscall($n{init_module}, t("x"), 1, t("")) == 0',
    "kexec": "syscall($n{kexec_load}, 0, 0, 0, 0) == 0",
    "reboot": "syscall($n{reboot}, 0xfee1dead, 672274793, 0x89abcdef, 0) == 0",  # harmless: enables Ctrl-Alt-Del
    "swap": 'syscall($n{swapon}, t("/etc/passwd"), 0) == 0',
    "clock": 'syscall($n{clock_settime}, 0, t(pack("QQ", time, 0))) == 0',
    "bpf": 'syscall($n{bpf}, 0, t(pack("LLLLx112", 2, 4, 4, 1)), 128) >= 0',
    "device node in /dev": 'syscall($n{mknodat}, -100, t("/dev/mem"), 0x2180, 0x101) == 0',
    "device node in /run": 'syscall($n{mknodat}, -100, t("/run/mem"), 0x2180, 0x101) == 0',
    "memory of process 1": 'open($f, "<", "/proc/1/mem")',
    "environment of process 1": 'open($f, "<", "/proc/1/environ")',
    "root of process 1": "-e '/proc/1/root/etc'",
    "descriptors of process 1": "-e '/proc/1/fd/1'",
    "canary": '-e $canary || -e "/proc/self/root/$canary" || -e "/../../..$canary"',
    "sysctl": 'open($f, ">", "/proc/sys/kernel/core_pattern")',
    "oom": 'open($f, ">", "/proc/1/oom_score_adj")',
    "abstract socket": 'socket($s, 1, 1, 0) && connect($s, pack("Sa*", 1, "\\0$abstract"))',
    "network": 'socket($s, 2, 1, 0) && connect($s, pack("SnC4x8", 2, $port, 127, 0, 0, 1))',
    "netlink": 'socket($s, 16, 3, 9) && bind($s, pack("SxxLL", 16, 0, 1))',  # the audit log
    "kill process 1": "kill(9, 1) && !kill(0, 1)",
    "device node of the image": 'open($f, "<", "/node")',
    "kill of the node": "kill(0, $pid)",
    # KEYCTL_SEARCH in the session keyring for a key of the command's caller
    "session keyring": 'syscall($n{keyctl}, 10, -3, t("user"), t("imageos-canary"), 0) >= 0',
    # of both root has a number for the whole node
    "watches": "syscall($n{epoll_create1}, 0) >= 0",
    "signals": """do {
        my $n = syscall($n{rt_sigprocmask}, 0, t(pack("Q", 1 << 39)), 0, 8);
        $n++ while $n < 9000 && syscall($n{rt_sigqueueinfo}, $$ + 0, 40, t(pack("iiix116", 40, 0, -1))) == 0;
        $n == 9000 }""",
}
# How the kernel refuses; 0: a signal to process 1 is no error
REFUSED = {str(code) for code in (0, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ESRCH, errno.EROFS, errno.ENOSYS,
                                  errno.EAGAIN, errno.ECONNREFUSED, errno.EAFNOSUPPORT)}  # fmt: skip


@pytest.fixture(scope="session")
def perl_tree(small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a guest that has Perl, for its system calls."""
    tree = tmp_path_factory.mktemp("perl") / "tree"
    shutil.copytree(small_tree, tree, symlinks=True)
    perl = os.path.realpath(shutil.which("perl") or "/usr/bin/perl")
    libraries = [word for word in run("ldd", perl).split() if word.startswith("/")]
    for path in [perl, *libraries]:
        (tree / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / path.lstrip("/"))
    os.mknod(tree / "node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    if perl != "/usr/bin/perl":
        (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
        shutil.copy(perl, tree / "usr/bin/perl")
    return tree


@pytest.fixture(scope="session")
def perl_image(perl_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.tarball(perl_tree, tmp_path_factory.mktemp("perl-image") / "perl.tar", "tar")


@pytest.fixture
def perl_node(node: Node, perl_image: Path) -> Node:
    (node.images / f"tiny-{trees.ARCH}.tar.gz").unlink()
    (node.images / f"tiny-{trees.ARCH}.tar").symlink_to(perl_image)
    return node


def numbers() -> str:
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    return (
        "sub t { my $copy = shift; $copy }\nmy %n = ("
        + ", ".join(f"{name} => {both[column]}" for name, both in NUMBERS.items())
        + ");\n"
    )


def hostile(node: Node, disk: Path, script: str, timeout: int = 60) -> Call:
    """Start a create whose hook runs this Perl script as a program of the guest."""
    path = node.work / "probe"
    path.write_text(script)
    node.defaults(f"GUEST_TIMEOUT={timeout}\n")
    hook = HOOK.format(probe=path).replace('"/bin/busybox", "sh", "/probe"', '"/usr/bin/perl", "/probe"')
    node.hook("hostile", hook)
    return node.start("create", node.environment(disk, IMAGE_DEBUG=None))


def said(log: str) -> list[str]:
    return [line.partition("guest: ")[2] for line in log.splitlines() if "guest: " in line]


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process of the node that is not involved."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        assert process.poll() is None, "a process of the node was killed"
        process.kill()


@pytest.fixture
def session_key() -> Iterator[None]:
    """Put a key of the node into the session keyring that our children inherit."""
    add_key, keyctl = {"x86_64": (248, 250), "aarch64": (217, 219)}[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    key = libc.syscall(add_key, b"user", b"imageos-canary", b"x", ctypes.c_size_t(1), -3)
    assert key > 0, os.strerror(ctypes.get_errno())
    yield
    assert libc.syscall(keyctl, 9, key, -3) == 0, os.strerror(ctypes.get_errno())  # KEYCTL_UNLINK


def test_no_way_out(
    perl_node: Node, disk: MakeDisk, tmp_path: Path, bystander: subprocess.Popen[bytes], session_key: None
) -> None:
    canary = tmp_path / "canary"
    canary.write_text("of the node\n")
    abstract = f"imageos-canary-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as local, socket.socket() as network:
        local.bind(f"\0{abstract}")
        local.listen()
        network.bind(("127.0.0.1", 0))
        network.listen()
        script = numbers() + (
            f'my ($canary, $abstract, $port, $pid) = ("{canary}", "{abstract}", {network.getsockname()[1]}, '
            f"{bystander.pid});\n"
        )
        script += "".join(
            f'{{ my ($s, $f, $d); $! = 0; my $done = {condition}; print "{name}: ", $done ? "DONE" : 0 + $!, "\\n" }}\n'
            for name, condition in ATTEMPTS.items()
        )
        script += "kill(9, -1);\n"  # all processes that it can see
        result = hostile(perl_node, disk(), script).result()
    answers = dict(line.split(": ") for line in said(result.log))
    assert list(answers) == list(ATTEMPTS), result.log
    assert {
        name: errno.errorcode.get(int(code), code) if code.isdigit() else code
        for name, code in answers.items()
        if code not in REFUSED
    } == {}


def test_end_is_not_to_be_escaped(perl_node: Node, disk: MakeDisk) -> None:
    """A program that disables its end with its parent's (prctl), leaves its session and ignores signals."""
    script = (
        numbers()
        + """
        $SIG{$_} = "IGNORE" for qw(TERM INT HUP);
        syscall($n{prctl}, 1, 0, 0, 0, 0);
        fork; fork;
        sleep 1 while 1;
    """
    )
    result = hostile(perl_node, disk(), script, timeout=2).result().failed("hook hostile", "2 s")
    assert "left" not in result.log, result.log


def test_many_processes(perl_node: Node, disk: MakeDisk) -> None:
    script = (
        "my $n = 0; for (1..3000) { my $p = fork; last unless defined $p; if (!$p) { sleep 100; exit } $n++ } print $n"
    )
    assert 100 < int(said(hostile(perl_node, disk(), script).result().ok().log)[0]) < cgroup.PROCESSES


def test_forks_for_ever(perl_node: Node, disk: MakeDisk) -> None:
    started = hostile(perl_node, disk(), "fork while 1", timeout=2)
    started.result().failed("hook hostile", "2 s")


# Changes that any process with write access to a loop device can make, without a capability
CHANGES = """#!/usr/bin/env python3
import fcntl, os, struct
from imageos.hook import Failure, Hook


def main(hook):
    loop = os.open(hook.disk, os.O_RDWR)
    fcntl.ioctl(loop, 0xC0481273, bytearray(struct.pack("=32xH2xII28x", 0xFFFF, 4096, 2)))  # BLKTRACESETUP
    info = bytearray(fcntl.ioctl(loop, 0x4C05, bytes(232)))  # struct loop_info64 of linux/loop.h
    info[24:32] = struct.pack("=Q", 16 << 20)  # lo_offset
    info[52] &= ~4  # without LO_FLAGS_AUTOCLEAR
    fcntl.ioctl(loop, 0x4C04, bytes(info))
    print("changed", hook.disk, flush=True)
    if {fails}:
        raise Failure("it fails")


Hook.run(main)
"""
BLKTRACETEARDOWN = 0x1276


def test_loop_device_is_changed(node: Node, disk: MakeDisk) -> None:
    """It goes with the command all the same (which is looked at after each test), and another disk is not harmed.

    A guest's program is refused all of it (test_system_calls.py), but for a machine for which we have no filter.
    """
    node.hook("changes", CHANGES.format(fails=False))
    result = node.create(disk())
    if result.status:  # ext4 has met an error, and is read-only now
        result.failed("cannot write everything", "Read-only file system")
    assert not is_traced(result.log)
    node.hook("changes", CHANGES.format(fails=True))
    target = disk()
    result = node.create(target).failed("hook changes", "it fails")
    assert not is_traced(result.log)
    assert is_disarmed(target, [(MIB, 24 * MIB), (33 * MIB, 127 * MIB)])


def is_traced(log: str) -> bool:
    """Return True if the trace of the loop device that the command reports has outlived it."""
    (loop,) = re.findall(r"changed (/dev/loop\d+)$", log, re.MULTILINE)
    descriptor = os.open(loop, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, BLKTRACETEARDOWN)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_much_memory(perl_node: Node, disk: MakeDisk) -> None:
    """In one process, and in many."""
    hostile(perl_node, disk(), 'my $n = 5 << 30; my $x = "x" x $n; print "got it"').result().failed(
        "hook hostile", "emory"
    )
    # without a common limit, nothing would end them
    script = """my $n = 300 << 20; for (1..10) { if (!fork) { my $x = "x" x $n; sleep 100; exit } }
                wait for 1..3; print "three are gone";"""
    result = hostile(perl_node, disk(), script).result().ok()
    assert said(result.log) == ["three are gone"], result.log


@pytest.mark.parametrize(
    "where, text", [("STDOUT", "no end of line "), ("STDERR", "\\0\\xff\\e[2J\\r"), ("STDERR", "\\n")]
)
def test_prints_for_ever(where: str, text: str, perl_node: Node, disk: MakeDisk) -> None:
    script = f'my $x = "{text}" x 1000; print {where} $x while 1;'
    call = hostile(perl_node, disk(), script, timeout=1)
    result = call.result().failed("hook hostile", "1 s")
    assert len(result.log) < 100_000


def test_last_words(perl_node: Node, disk: MakeDisk) -> None:
    """The last line is for the cause, however much a program prints."""
    script = 'print STDERR "x" x (3 << 20), "\\n"; exit 1'
    result = hostile(perl_node, disk(), script).result().failed("hook hostile")
    assert len(result.last) <= len(log.PREFIX) + outcome.LONGEST and len(result.log) < 300_000


def test_disk_is_filled(perl_node: Node, disk: MakeDisk) -> None:
    script = 'open(my $f, ">", "/fill"); 1 while syswrite($f, "x" x 1048576); print 0 + $!'
    result = hostile(perl_node, disk(), script).result()
    assert said(result.log) == [str(errno.ENOSPC)], result.log


def test_no_group_is_left(perl_node: Node, disk: MakeDisk) -> None:
    """Not even by a killed run, after the next run."""
    call = hostile(perl_node, disk(), "sleep 1000", 1000)

    def inside() -> list[Path]:
        family = descendants(call.process.pid)
        return [path for path in groups() if any(int(pid) in family for pid in members(path))]

    call.wait_for(inside, "a program of the guest runs")
    assert stale(inside()) == []
    call.kill(9)
    call.result()
    hostile(perl_node, disk(), "print 1").result().ok()
    wait_until(lambda: not stale(groups()), "no group is left that nobody uses")


def groups() -> list[Path]:
    return [path for top in cgroup.HIERARCHIES for path in Path(top).glob(f"{cgroup.PREFIX}*")]


def members(group: Path) -> list[str]:
    with suppress(OSError):  # it was removed
        return (group / "cgroup.procs").read_text().split()
    return []


def stale(found: list[Path]) -> list[Path]:
    """Return the groups that no run uses: a run holds a lock on its own."""
    left = []
    for path in found:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.append(path)
            finally:
                os.close(descriptor)
    return left
