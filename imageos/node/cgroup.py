"""Bounds on what a group of processes takes of the node: a control group of version 2 or 1, where the kernel has them.

The kernel does not take a group away with its last process: the directory of a run that was killed is removed by the
next one, which finds it unlocked. In version 2 ours are at the top, which alone may give controllers to groups below it
while it has processes of its own (Documentation/admin-guide/cgroup-v2.rst, No Internal Process Constraint).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache

from imageos import log

PREFIX = "imageos."
PROCESSES = 1024
MEMORY = 2 << 30  # bytes
DEADLINE = 5.0  # seconds for killed processes to be gone
VERSION_2 = {"pids.max": PROCESSES, "memory.max": MEMORY, "memory.swap.max": 0}
# Where each hierarchy is mounted -> file (its name begins with the controller's) -> limit
HIERARCHIES: Mapping[str, Mapping[str, int]] = {
    "/sys/fs/cgroup": VERSION_2,
    "/sys/fs/cgroup/unified": VERSION_2,
    "/sys/fs/cgroup/pids": {"pids.max": PROCESSES},
    "/sys/fs/cgroup/memory": {"memory.limit_in_bytes": MEMORY},
}
MAY_BE_MISSING = ("memory.swap.max",)  # in a kernel without swap
BOUNDS = {"pids": "number", "memory": "memory"}  # controller -> what it bounds


@contextmanager
def limited() -> Iterator[Callable[[], None]]:
    """A group with these limits; gives the function by which a process joins it. Without control groups, nothing."""
    with ExitStack() as stack:
        groups, unbounded = _groups(stack)
        for complaint in unbounded:
            _warn(complaint)

        def join() -> None:
            for group in groups:
                _write(f"{group}/cgroup.procs", "0")  # 0: who writes

        yield join


def unbounded() -> list[str]:
    """In what the programs of a guest cannot be bounded here, and why."""
    with ExitStack() as stack:
        return _groups(stack)[1]


@cache  # once, however many programs are run
def _warn(complaint: str) -> None:
    log.warning(complaint)


def _groups(stack: ExitStack) -> tuple[list[str], list[str]]:
    """The new groups, until `stack` is left, and complaints of the bounds that are missing."""
    groups: list[str] = []
    why = dict.fromkeys(BOUNDS, "there is no such control group on this node")
    for top, limits in HIERARCHIES.items():
        try:
            limits = {name: limit for name, limit in limits.items() if _has(top, _controller(name))}
            if not limits:
                continue
            groups.append(stack.enter_context(_group(top)))
        except OSError as error:  # read-only, in a container
            why.update((_controller(name), f"{top}: {error.strerror}") for name in limits)
            continue
        for name, limit in limits.items():
            try:
                _enable(top, _controller(name))
                _write(f"{groups[-1]}/{name}", str(limit))
                if name not in MAY_BE_MISSING:
                    del why[_controller(name)]
            except OSError as error:
                if name not in MAY_BE_MISSING:
                    why[_controller(name)] = f"{top}: {error.strerror}"
    return groups, [f"the guest's programs are not bounded in their {BOUNDS[one]}: {why[one]}" for one in why]


def _controller(name: str) -> str:
    return name.partition(".")[0]


def _has(top: str, controller: str) -> bool:
    """Whether this hierarchy is there and has the controller; only version 2 tells, of version 1 its place does."""
    if os.path.exists(f"{top}/cgroup.controllers"):
        return controller in _read(f"{top}/cgroup.controllers").split()
    return os.path.exists(f"{top}/cgroup.procs")


def _enable(top: str, controller: str) -> None:
    """In version 2 a group has the controllers that the one above gives to all below it."""
    switch = f"{top}/cgroup.subtree_control"
    if os.path.exists(switch) and controller not in _read(switch).split():
        _write(switch, f"+{controller}")


@contextmanager
def _group(top: str) -> Iterator[str]:
    _remove_stale(top)
    path, lock = _locked(top)
    try:
        try:
            yield path
        finally:
            os.close(lock)
    finally:
        _remove(path)


def _locked(top: str) -> tuple[str, int]:
    """A new group, and the descriptor that keeps it from being taken for stale."""
    while True:
        path = f"{top}/{PREFIX}{os.urandom(6).hex()}"
        os.mkdir(path, 0o700)  # root's: whoever can open it can lock it, and have us wait for ever
        with suppress(FileNotFoundError):  # another run has removed it already
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.path.exists(path):
                return path, lock
            os.close(lock)


def _remove(path: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            with suppress(OSError):  # version 2 has it since Linux 5.14
                _write(f"{path}/cgroup.kill", "1")
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                log.debug(f"cannot remove the control group {path}: {error.strerror}")
                return
        time.sleep(0.01)


def _remove_stale(top: str) -> None:
    for name in os.listdir(top):
        if name.startswith(PREFIX):
            with suppress(OSError):  # in use, or another run was quicker
                lock = os.open(f"{top}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.rmdir(f"{top}/{name}")
                finally:
                    os.close(lock)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode()


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)
