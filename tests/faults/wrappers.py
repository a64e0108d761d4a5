"""Wrap the programs in PATH: record them, or let one fail at a given call."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support import PATH, wait_until

# These run the wrappers and imageos itself
INTERPRETERS = ("env", "sh", "dash", "bash", "python3", "busybox")

# A confined program can write nowhere, so it reads the number of its call from a FIFO beside it, one call at a time
COUNT = """#!/bin/sh
exec 9<"$0"
flock 9
read -r n <"$0.calls"
exec 9<&-
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
    """Yield every program in Ganeti's PATH."""
    seen: set[str] = set()
    for directory in PATH.split(":"):
        for name in sorted(os.listdir(directory)):
            if name not in seen and os.access(f"{directory}/{name}", os.X_OK):
                seen.add(name)
                yield Path(directory, name)


# Reports its call to a socket in {path}, or to a UDP port (curl has no sockets of files), then runs the real program
TELL = """#!/bin/sh
/usr/bin/python3 -BISc '
import os, socket
os.chdir("{path}")
try:
    told, place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), "socket"
except OSError:
    told, place = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", int(open("port").read()))
told.sendto(b"'"${{0##*/}}"'", place)'
PATH={PATH} exec "${{0##*/}}" "$@"
"""


@contextmanager
def recording(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a PATH whose programs are recorded, and a list that receives the name of each call."""
    path.mkdir()
    for program in programs():
        if program.name not in INTERPRETERS and not program.name.startswith("python"):
            (path / program.name).write_text(TELL.format(path=path, PATH=PATH))
            (path / program.name).chmod(0o755)
    with listening(path) as told:
        yield f"{path}:{PATH}", told


@contextmanager
def listening(directory: Path) -> Iterator[list[str]]:
    """Yield a list that receives the messages to a socket in `directory`, and to the UDP port that is noted there."""
    told: list[str] = []
    descriptor = os.open(directory, os.O_PATH)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as internet,
    ):
        ours.bind(f"/proc/self/fd/{descriptor}/socket")  # a short name
        internet.bind(("127.0.0.1", 0))
        (directory / "port").write_text(str(internet.getsockname()[1]))

        def listen() -> None:
            while True:
                for ready in select.select([ours, internet], [], [])[0]:
                    said = ready.recv(1 << 16)
                    if not said:
                        return
                    told.append(said.decode())

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield told
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"", f"/proc/self/fd/{descriptor}/socket")
            thread.join()
            os.close(descriptor)


@contextmanager
def failing(work: Path, fault: Fault) -> Iterator[str]:
    """Yield a PATH in which `fault` happens."""
    path = work / "path"
    path.mkdir()
    real = next(program for program in programs() if program.name == fault.program)
    action = MODES[fault.mode].format(name=fault.program, real=real)
    wrapper = path / fault.program
    write(wrapper, COUNT + f'if [ "$n" = {fault.nth} ]; then {action}; fi\nexec {real} "$@"\n')
    with counting(path / f"{fault.program}.calls"):
        yield f"{path}:{PATH}"


@contextmanager
def counting(fifo: Path) -> Iterator[None]:
    """Give the first reader of `fifo` 1, the next one 2, and so on: a shell reads a line, and not a byte more."""
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    os.write(descriptor, "".join(f"{number}\n" for number in range(1, 10000)).encode())  # fits into a pipe
    try:
        yield
    finally:
        os.close(descriptor)


def write(program: Path, text: str) -> None:
    """Make a program, and wait until it can be executed.

    A child that another thread has just forked may still have it open for writing. Executing it would then fail
    (ETXTBSY), and the shell would take the next one in PATH. A lease (fcntl(2)) is refused as long.
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
    """Return a PATH with every program except `missing`."""
    path = work / "path"
    path.mkdir()
    for program in programs():
        if program.name != missing:
            (path / program.name).symlink_to(program)
    return str(path)
