"""Programs in PATH that are recorded, or fail at a given call."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import PATH, wait_until

# What the wrappers and imageos itself are run by
INTERPRETERS = ("env", "sh", "dash", "bash", "python3", "busybox")

# Counts the calls of all processes: a file is created by one of them only.
COUNT = """#!/bin/sh
set -C
n=1
until true 2>/dev/null >"{record}/${{0##*/}} $n"; do n=$((n + 1)); done
"""
MODES = {
    "fails": 'echo "{name}: broken on purpose" >&2; exit 1',
    "fails at its end": '{real} "$@"; echo "{name}: broken on purpose" >&2; exit 1',
    "killed": "kill -9 $$",
    "killed at its end": '{real} "$@"; kill -9 $$',
    "hangs": "exec sleep 1000",
}


@dataclass(frozen=True, order=True)
class Fault:
    program: str
    nth: int
    mode: str

    def __str__(self) -> str:
        return f"{self.program} {self.mode} at call {self.nth}"


def programs() -> Iterator[Path]:
    """Every program that Ganeti's PATH leads to."""
    seen: set[str] = set()
    for directory in PATH.split(":"):
        for name in sorted(os.listdir(directory)):
            if name not in seen and os.access(f"{directory}/{name}", os.X_OK):
                seen.add(name)
                yield Path(directory, name)


def recording(work: Path) -> tuple[str, Path]:
    """A PATH whose programs are recorded, and the directory of the records."""
    record, path = work / "record", work / "path"
    record.mkdir()
    path.mkdir()
    wrapper = work / "wrapper"
    write(wrapper, COUNT.format(record=record) + f'PATH={PATH} exec "${{0##*/}}" "$@"\n')
    for program in programs():
        if program.name not in INTERPRETERS and not program.name.startswith("python"):
            (path / program.name).symlink_to(wrapper)
    return f"{path}:{PATH}", record


def calls(record: Path) -> dict[str, int]:
    """Program -> how often it was called."""
    found: dict[str, int] = {}
    for entry in record.iterdir():
        name, _, nth = entry.name.rpartition(" ")
        found[name] = max(found.get(name, 0), int(nth))
    return found


def failing(work: Path, fault: Fault) -> str:
    """A PATH in which `fault` happens."""
    record, path = work / "record", work / "path"
    record.mkdir()
    path.mkdir()
    real = next(program for program in programs() if program.name == fault.program)
    action = MODES[fault.mode].format(name=fault.program, real=real)
    wrapper = path / fault.program
    write(wrapper, COUNT.format(record=record) + f'if [ $n = {fault.nth} ]; then {action}; fi\nexec {real} "$@"\n')
    return f"{path}:{PATH}"


def write(program: Path, text: str) -> None:
    """Make a program that can be executed from now on.

    While a child that another thread has just forked still has it open for writing, it could not be (ETXTBSY), and the
    next one in PATH would be taken. Nobody gets a lease then (fcntl(2)).
    """
    program.write_text(text)
    program.chmod(0o755)
    with program.open() as file:
        wait_until(lambda: leased(file.fileno()), f"{program} is closed")


def leased(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def without(work: Path, missing: str) -> str:
    """A PATH with every program but this."""
    path = work / "path"
    path.mkdir()
    for program in programs():
        if program.name != missing:
            (path / program.name).symlink_to(program)
    return str(path)
