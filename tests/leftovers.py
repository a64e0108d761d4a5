"""Find what a test has left on the machine, and remove it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from support import TESTS, run, wait_until

PRIVATE = ("/run", "/tmp", "/var/tmp")  # each test run has its own layer over them
# Directories of /run that belong to tools of the system, and imageos's own, which stays (empty).
ALLOWED = {Path("/run", name) for name in ("imageos", "mount", "blkid", "lock", "lvm", "ganeti")}


class Leftovers:
    """All that exists now and may be left by a test."""

    def __init__(self, uppers: list[Path], base: str) -> None:
        reap()
        self.processes = descendants(os.getpid())
        self.mounts = own_mounts(base)
        self.loops = own_loops(base)
        self.files = {str(path) for path in [Path("/root/.shiv")] if os.path.lexists(path)}
        for upper, top in zip(uppers, PRIVATE):
            written = {Path(top, path.relative_to(upper)) for path in (*upper.glob("*"), *upper.glob("imageos/*"))}
            self.files |= {str(path) for path in written - ALLOWED if path not in TESTS.parents}

    def minus(self, other: Leftovers) -> Leftovers:
        self.processes = {pid: name for pid, name in self.processes.items() if pid not in other.processes}
        self.mounts = [mount for mount in self.mounts if mount not in other.mounts]
        self.loops = {name: back for name, back in self.loops.items() if name not in other.loops}
        self.files -= other.files
        return self

    def __bool__(self) -> bool:
        return bool(self.processes or self.mounts or self.loops or self.files)

    def describe(self) -> list[str]:
        return [
            *(f"process {pid}: {name}" for pid, name in self.processes.items()),
            *(f"mount {mount}" for mount in self.mounts),
            *(f"loop device {name} over {back}" for name, back in self.loops.items()),
            *(f"file {path}" for path in sorted(self.files)),
        ]

    def remove(self) -> None:
        for pid in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(self.are_ended, f"these are gone: {self.processes}")
        for mount in reversed(self.mounts):
            run("umount", "--lazy", mount.split(" ")[0], check=False)
        for name in self.loops:
            run("losetup", "--detach", name, check=False)
        for path in self.files:
            run("rm", "-rf", "--one-file-system", path, check=False)

    def are_ended(self) -> bool:
        reap()
        return not self.processes.keys() & descendants(os.getpid()).keys()


def reap() -> None:
    """Wait for adopted orphans that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def process_table() -> dict[int, tuple]:
    """Return PID -> (parent, state, command)."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path("/proc", name, "stat").read_text(errors="replace")
                words = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
            command, _, rest = text.partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            table[int(name)] = (int(parent), state, words.strip() or command)
    return table


def descendants(pid: int) -> dict[int, str]:
    table = process_table()
    commands: dict[int, str] = {}
    family = {pid}
    while family:
        family = {child for child, (parent, _, _) in table.items() if parent in family}
        commands.update({child: table[child][2] for child in family})
    return commands


def own_mounts(base: str) -> list[str]:
    """Return `PATH TYPE SOURCE` of the mounts made in this namespace; those of the machine are slaves."""
    directories = (base or "/run/imageos", "/run/imageos")
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields = mount.split()
        if fields[4].startswith(directories) or not any(option.startswith("master:") for option in fields[6:]):
            mounts.append(" ".join([fields[4], *filesystem.split()[:2]]))
    return mounts


def whole(backing: str, base: str) -> str:
    """Return the path of a loop device's file. If its mount namespace is gone, sysfs omits the mount point."""
    for top in [base, *map(str, Path(base).parents)]:
        path = top + backing
        if path.startswith(f"{base}/") and os.path.lexists(path):
            return path
    return backing


def own_loops(base: str) -> dict[str, str]:
    """Return loop device -> file, for files of this run and for loop devices over such loop devices."""
    over = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            over[f"/dev/{backing.parts[3]}"] = whole(backing.read_text().strip(), base)
        except OSError:  # it was detached meanwhile
            continue
    ours = {name for name, back in over.items() if base and back.startswith(base + "/")}
    while True:
        more = {name for name, back in over.items() if back in ours} - ours
        if not more:
            return {name: over[name] for name in ours}
        ours |= more
