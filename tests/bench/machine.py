"""The environment of the benchmark: its own node, new disks, and timed commands."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support import PATH, Call, Node, private_mounts, run

GIB = 1 << 30
Step = Callable[[], float]  # does the work once; returns seconds


@contextmanager
def own_node(imageos: Path, work: Path) -> Iterator[Node]:
    """Yield a node with imageos installed. Only this process and its children see its /etc."""
    private_mounts()
    root, layer = work / "root", work / "etc"
    run(imageos, "install", "--root", root)
    run("mkdir", layer)
    run("mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", layer)
    for name in ("upper", "work"):
        (layer / name).mkdir()
    options = f"lowerdir={root}/etc:/etc,upperdir={layer}/upper,workdir={layer}/work"
    run("mount", "-t", "overlay", "-o", options, "overlay", "/etc")
    try:
        yield Node(imageos, root, work, layer / "upper")
    finally:
        run("umount", "/etc")
        run("umount", layer)


def disk(work: Path, size: int) -> Path:
    """Replace the disk by a new sparse file, and sync, so that earlier writes do not disturb the measurement."""
    path = work / "disk"
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.truncate(size)
    os.sync()
    return path


def forget_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def by_hand(work: Path, script: str, **variables: object) -> float:
    """Return the seconds of a shell script, started as Ganeti starts it; `disk` is attached at $loop."""
    path = work / "by-hand"
    path.write_text(f"#!/bin/bash\nset -euo pipefail\n{script}\n")
    path.chmod(0o755)
    environment = {"PATH": PATH, "LC_ALL": "C"}
    environment.update((name, value) for name, value in os.environ.items() if name.startswith("LIBGUESTFS_"))
    environment.update((name, str(value)) for name, value in variables.items())
    return Call(path, environment, work / "by-hand.log").result().ok().seconds


def seconds(call: Call) -> float:
    return call.result().ok().seconds


def pipe(argv: Sequence[str], environment: dict[str, str], source: Path, sink: Path) -> float:
    """Return the seconds of export or import, with files (or /dev/null) as their streams."""
    start = time.monotonic()
    with source.open("rb") as stdin, sink.open("wb") as stdout:
        done = subprocess.run(argv, env=environment, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return time.monotonic() - start


def timed(*argv: object, **environment: str) -> float:
    """Return the seconds of a command that needs no disk."""
    start = time.monotonic()
    command = [str(word) for word in argv]
    environment = {"PATH": PATH, **environment}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "doctor" in argv, done.stderr  # doctor may find this machine wanting
    return time.monotonic() - start


# --- measuring -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    ours: float  # seconds, median
    other: float
    peak: int  # bytes, of the largest process of imageos itself, without other programs

    @property
    def ratio(self) -> float:
        return self.ours / self.other


def compare(ours: Step, other: Step, rounds: int) -> Measured:
    """Return medians of interleaved rounds. An extra first round warms the caches and measures memory."""
    with peak_memory() as peak:
        ours()
    other()
    pairs = [(ours(), other()) for _ in range(rounds)]
    medians = [statistics.median(times) for times in zip(*pairs)]
    return Measured(*medians, peak=peak[0])


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Watch the processes of imageos; yield [bytes of the largest so far]."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max([peak[0], *map(_resident, _ours())])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _ours() -> list[int]:
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if b"-IS\0" in Path("/proc", name, "cmdline").read_bytes():
                pids.append(int(name))
        except OSError:
            continue  # it has ended
    return pids


def _resident(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
