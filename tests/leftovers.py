"""What a test may have left on the machine, and how it is taken away."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from support import TESTS, run, wait_until

PRIVATE = ("/run", "/tmp", "/var/tmp")  # for each test run a layer of its own
# Directories of /run that belong to tools of the system, and the one that imageos keeps (empty).
ALLOWED = {Path("/run", name) for name in ("imageos", "mount", "blkid", "lock", "lvm", "ganeti")}


class Leftovers:
    """What exists now and might have been left by a test."""

    def __init__(self, uppers: list[Path], base: str) -> None:
        reap()
        self.processes = descendants(os.getpid())
        self.mounts = own_mounts(base)
        self.loops = own_loops(base)
        self.files = {str(path) for path in [Path("/root/.shiv")] if os.path.lexists(path)}
        for upper, top in zip(uppers, PRIVATE):
            found = {Path(top, path.relative_to(upper)) for path in (*upper.glob("*"), *upper.glob("imageos/*"))}
            self.files |= {str(path) for path in found - ALLOWED if path not in TESTS.parents}

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
    """Bury the orphans that were given to us and have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def process_table() -> dict[int, tuple]:
    """pid -> (parent, state, command)"""
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
    found: dict[int, str] = {}
    family = {pid}
    while family:
        family = {child for child, (parent, _, _) in table.items() if parent in family}
        found.update({child: table[child][2] for child in family})
    return found


def own_mounts(base: str) -> list[str]:
    """`PLACE TYPE SOURCE` of the mounts made in this namespace; those of the machine arrive as slaves."""
    ours = (base or "/run/imageos", "/run/imageos")
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields = mount.split()
        if fields[4].startswith(ours) or not any(option.startswith("master:") for option in fields[6:]):
            found.append(" ".join([fields[4], *filesystem.split()[:2]]))
    return found


def whole(backing: str, base: str) -> str:
    """The path of a loop device's file: opened in a mount namespace that is gone, it is shown from its mount's root."""
    for top in [base, *map(str, Path(base).parents)]:
        path = top + backing
        if path.startswith(f"{base}/") and os.path.lexists(path):
            return path
    return backing


def own_loops(base: str) -> dict[str, str]:
    """Loop devices over files of this run, or over such loop devices."""
    over = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            over[f"/dev/{backing.parts[3]}"] = whole(backing.read_text().strip(), base)
        except OSError:  # detached meanwhile
            continue
    ours = {name for name, back in over.items() if base and back.startswith(base + "/")}
    while True:
        more = {name for name, back in over.items() if back in ours} - ours
        if not more:
            return {name: over[name] for name in ours}
        ours |= more
