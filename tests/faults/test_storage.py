"""Disks and streams that fail: ENOSPC and EIO at any system call, a full filesystem below a disk, a full pipe.

strace(1) makes the Nth system call of each process of a command fail, for N in turn; IMAGEOS_FAULTS=all tries all.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import backups
import pytest
import wrappers
from backups import is_disarmed
from cases import CASES, Case, apart
from support import MIB, PATH, Node, attached, digest, mounted, partitions, run, signatures

MakeDisk = Callable[..., Path]
AT_ONCE = 3
SAMPLE = 24  # number of faults for each command
# system call -> error; calls of imageos and of its programs fail
ERRORS = {
    "mount": "EIO",
    "umount2": "EBUSY",
    "fsync": "EIO",
    "fdatasync": "EIO",
    "pwrite64": "ENOSPC",
    "write": "ENOSPC",
    "fallocate": "EIO",
    "openat2": "EMFILE",
    "mkdirat": "ENOSPC",
    "mkdir": "ENOSPC",
    "renameat": "EIO",
    "rename": "EIO",
    "symlinkat": "ENOSPC",
    "unlinkat": "EIO",
    "fchmod": "EIO",
    "unshare": "ENOSPC",
    "flock": "EINTR",
    "ioctl": "EIO",
}
COMMANDS = {
    "create": "create tarball",
    "import": "import",
    "export": "export",
    "rename": "rename",
    "ganeti-image": "capture tarball",
    "mount-disks": "mount-disks",
}


@dataclass(frozen=True)
class Fault:
    call: str
    nth: int

    @property
    def options(self) -> list[str]:
        return [f"--inject={self.call}:error={ERRORS[self.call]}:when={self.nth}"]


def traced(node: Node, work: Path, options: list[str]) -> Node:
    """Return the same node with its commands under strace."""
    here = apart(node, work)
    real, here.os_dir = here.os_dir, work / "os"
    (here.os_dir / "tools").mkdir(parents=True)
    (here.os_dir / "tools/umount-disks").symlink_to(real / "tools/umount-disks")
    for name in ("create", "import", "export", "rename", "tools/ganeti-image", "tools/mount-disks"):
        wrappers.write(
            here.os_dir / name,
            f"#!/bin/sh\nexec strace --follow-forks -qq --seccomp-bpf --output={work}/trace "
            f'--trace={",".join(ERRORS)} {" ".join(options)} {real}/{name} "$@"\n',
        )
    return here


@pytest.mark.parametrize("command", COMMANDS)
def test_system_calls_fail(command: str, node: Node, sources: Path, tmp_path: Path) -> None:
    case = CASES[COMMANDS[command]]
    learnt = traced(node, tmp_path / "learn", [])
    disk = case.disk(tmp_path / "learn/disk", sources)
    case.call(learnt, disk, PATH).ok()
    places = [(part.start, part.size) for part in partitions(disk)]
    faults = [
        Fault(call, nth) for call, most in counted(tmp_path / "learn/trace").items() for nth in range(1, most + 1)
    ]
    if os.environ.get("IMAGEOS_FAULTS") != "all":
        # each keeps its place, however often a run polls for the end of something
        faults = sorted(faults, key=lambda fault: sha256(f"{command} {fault}".encode()).digest())[:SAMPLE]

    def attempt(number: int) -> str:
        work = tmp_path / str(number)
        problem = judged(case, traced(node, work, faults[number].options), work, sources, places)
        run("rm", "-r", work)
        return f"{faults[number]}: {problem}" if problem else ""

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [text for text in pool.map(attempt, range(len(faults))) if text]
    print(f"{command}: {len(faults)} system calls")
    assert not found, "\n".join(found)


def counted(trace: Path) -> dict[str, int]:
    """Return system call -> the largest number of calls by one process."""
    each: dict[tuple[str, str], int] = {}
    for line in trace.read_text(errors="replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match:
            each[match.group(1, 2)] = each.get(match.group(1, 2), 0) + 1
    most: dict[str, int] = {}
    for (_, call), count in each.items():
        most[call] = max(most.get(call, 0), count)
    return {call: min(count, 40) for call, count in most.items() if call in ERRORS}


def judged(case: Case, node: Node, work: Path, sources: Path, places: list[tuple[int, int]]) -> str:
    """Return what is wrong with the result of a call."""
    disk = case.disk(work / "disk", sources)
    before = digest(disk)
    result = case.call(node, disk, PATH)
    if "internal error" in result.log or result.status not in (0, 1):
        return f"status {result.status}\n{result.log}"
    if result.status == 1 and digest(disk) != before and not is_whole(result.log):
        if case.source and not case.reads_only:
            ok = [(part.start, part.size) for part in partitions(disk)] == places  # rename changes files only
        else:
            ok = not case.reads_only and ("may still look" in result.log or is_disarmed(disk, places))
        if not ok:
            return f"the disk is neither disarmed nor as it was\n{result.log}"
    if result.status == 0 and not case.reads_only:
        is_left = "the disk is left as it was in the backup" in result.log
        if not is_left and [(part.start, part.size) for part in partitions(disk)] != places:
            return f"status 0, but the disk is not as it should be\n{result.log}"
        start, size = places[-1]
        with attached(disk, start, size, read_only=True) as device:
            run("e2fsck", "-f", "-n", device)
    return ""


def is_whole(log: str) -> bool:
    return "restored disk" in log or "ready to boot" in log


@pytest.mark.parametrize("command", ["create", "import"])
def test_full_filesystem_below_the_disk(command: str, node: Node, sources: Path, tmp_path: Path) -> None:
    """A file disk cannot get its promised blocks, from the first block on or from any later one."""
    case = CASES[COMMANDS[command]]
    room = tmp_path / "room"
    room.mkdir()
    for kib in (0, 64, 1024, 1500, 3000, 4500):
        run("mount", "-t", "tmpfs", "-o", f"size={max(kib, 4)}k", "tmpfs", room)
        try:
            disk = room / "disk"
            disk.touch()
            os.truncate(disk, 160 * MIB)
            here = apart(node, tmp_path / f"{command}{kib}")
            result = case.call(here, disk, PATH)
            assert result.status == 1 and "internal error" not in result.log, f"{kib} KiB: {result.log}"
            assert signatures(disk) == [], f"{kib} KiB: {result.log}"
            run("mount", "-o", "remount,size=200m", room)
            case.call(here, disk, PATH).ok()
        finally:
            run("umount", room)


def test_stream_that_cannot_be_written(node: Node, sources: Path, tmp_path: Path) -> None:
    """It stops at any offset."""
    whole = (sources / "stream").stat().st_size
    room = tmp_path / "room"
    room.mkdir()
    environment = backups.environment(node, "export", sources / "guest.raw")
    for kib in (4, 8, 500, whole // 1024 - 4):
        run("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", room)
        try:
            with (room / "stream").open("wb") as output:
                call = backups.Running(node, "export", environment, subprocess.DEVNULL, output)
                call.result().failed("No space left on device")
                call.announced()
        finally:
            run("umount", room)
    with open("/dev/full", "wb") as full:
        call = backups.Running(node, "export", environment, subprocess.DEVNULL, full)
        call.result().failed("No space left on device")
        call.announced()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_full_filesystem_below_what_a_hook_writes(kind: str, node: Node, sources: Path, tmp_path: Path) -> None:
    """Late writes are written back when the filesystem is unmounted, and umount does not report an error.

    At 24000 KiB of ext4 a write is cut short, and a loop device takes it for a complete one.
    """
    room, content = tmp_path / "room", b"x" * (8 * MIB)
    room.mkdir()
    node.hook("big", "#!/bin/sh\nset -e\nmkdir $TARGET/many; cd $TARGET/many; seq 3000 | xargs touch\n"
                     "head -c 8M /dev/zero | tr '\\0' x >$TARGET/big\n")  # fmt: skip
    statuses = []
    for kib in (12000, 18000, 21000, 23800, 24000, 26000, 400000):
        with space(room, kib, 500) as disk:
            here = apart(node, tmp_path / str(kib))
            result = here.call("create", here.environment(disk, OSP_IMAGE_NAME="plain", OSP_FILESYSTEM=kind))
            statuses.append(result.status)
            assert "internal error" not in result.log, f"{kib} KiB: {result.log}"
            run("mount", "-o", "remount,size=500m", room)
            if result.status == 0:
                with mounted(disk, tmp_path / "root", partitions(disk)[-1], options="rw") as root:
                    assert len(os.listdir(root / "many")) == 3000, f"{kib} KiB: {result.log}"
                    assert (root / "big").read_bytes() == content, f"{kib} KiB: {result.log}"
    assert statuses[0] == 1 and statuses[-1] == 0


def test_full_filesystem_below_what_is_mounted(node: Node, sources: Path, tmp_path: Path) -> None:
    name = f"inst{os.getpid()}.example.org"
    room = tmp_path / "room"
    room.mkdir()
    with space(room, 64 << 10) as disk:
        run("cp", "--sparse=always", sources / "guest.raw", disk)
        node.tool("mount-disks", name, "--disk", str(disk)).ok()
        run("mount", "-o", f"remount,size={disk.stat().st_blocks // 2 + 2048}k", room)
        run("sh", "-c", f"head -c 20M /dev/urandom >/tmp/{name}_root/big")
        result = node.tool("umount-disks", "--here", name)
        assert result.status == 1 and "what was written last" in result.lines[-1], result.log
        assert "is lost" in result.lines[-1], result.log
        assert not Path(f"/tmp/{name}_root").is_mount()


@contextmanager
def space(room: Path, kib: int, mib: int = 160) -> Iterator[Path]:
    """Make a sparse disk of `mib` MiB on a filesystem of `kib` KiB."""
    run("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", room)
    try:
        disk = room / "disk"
        disk.touch()
        os.truncate(disk, mib * MIB)
        yield disk
    finally:
        run("umount", room)
