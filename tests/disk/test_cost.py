"""The processes, syncs and sleeps of one create, which must not grow. `./build.py bench` measures seconds."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from support import SITE, Node

MakeDisk = Callable[..., Path]
PROGRAMS = {
    "create": 1,
    "python3": 1,
    "bash": 3,  # for the settings: one evaluates both files, and another checks the syntax of each first
    "pigz": 2,  # one reads the beginning of the image, one unpacks it
    "tar": 1,
    "sfdisk": 1,
    "mkfs.ext4": 2,
    "mkswap": 1,
    "ssh-keygen": 1,  # makes the slowest key in the background
}
SYNCS = {
    "fsync": 5,  # after wiping old signatures; for both partitions, the loop device and the disk
    "syncfs": 3,  # starts to write back the unpacked files; / and /boot: unmounting does not report write errors
}
SYNCING = ("sync", "syncfs", "fsync", "fdatasync", "msync")
SLEEPING = ("nanosleep", "clock_nanosleep", "select", "pselect6")  # before 3.11, Python sleeps by select
CALLS = ",".join(["execve", *SYNCING, *(f"?{call}" for call in SLEEPING)])  # not every processor has all of these


def test_processes_syncs_and_sleeps_of_one_create(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    programs, ours, sleeps = traced(node, disk(), tmp_path)
    assert programs == PROGRAMS
    assert ours == SYNCS
    assert max(sleeps, default=0) < 0.006, "the loop device goes in the background: polled every 5 ms"


def test_a_bundled_hook_starts_no_python(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """It is a child of the command. One that the site has changed is a program, and so is the site's own."""
    for name in ("overlays", "ssh", "zz_ddns"):
        (SITE / "hooks" / name).chmod(0o755)
    with (SITE / "hooks/ssh").open("a") as file:
        file.write("# ours\n")
    programs, _, _ = traced(node, disk(), tmp_path)
    assert programs == {**PROGRAMS, "ssh": 1, "python3": PROGRAMS["python3"] + 1}


def traced(node: Node, disk: Path, tmp_path: Path) -> tuple[Counter[str], Counter[str], list[float]]:
    """Create; return how often each program was run and each call made by processes of ours; the seconds they slept."""
    trace, create = tmp_path / "trace", node.os_dir / "create"
    started = time.time() - time.monotonic()  # boot time of the machine
    subprocess.run(
        ["strace", "--follow-forks", "--output-separately", "-ttt", "--output", trace, "--trace", CALLS, create],
        env=node.environment(disk),
        cwd=node.os_dir,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    programs: Counter[str] = Counter()
    ours: Counter[str] = Counter()  # calls of our own processes; those of mkfs do not count
    others = set()  # processes that run another program now
    sleeps = []  # seconds
    lines = [
        (file.suffix, *found)
        for file in tmp_path.glob("trace.*")
        for found in re.findall(r"^([\d.]+) (\w+)\((.*)", file.read_text(), re.MULTILINE)
    ]
    for process, moment, call, rest in lines:
        if call == "execve":
            if "ENOENT" not in rest:
                name = os.path.basename(rest.split('"')[1])
                programs[name] += 1
                others |= {process} - ({process} if name in ("create", "python3") else set())
        elif process not in others and call in SLEEPING:
            for seconds, unit, fraction in re.findall(r"tv_sec=(\d+), tv_([nu])sec=(\d+)", rest)[:1]:
                since = float(moment) - started if "TIMER_ABSTIME" in rest else 0
                sleeps.append(int(seconds) + int(fraction) / {"n": 1e9, "u": 1e6}[unit] - since)
        elif process not in others and call in SYNCING:  # old versions of strace also show unknown calls
            ours[call] += 1
    return programs, ours, sleeps
