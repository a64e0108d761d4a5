"""Limit the memory and the number of a guest's processes by a control group of version 2 or 1, if the kernel has them.

The kernel keeps a group when its last process ends. The next run removes the directory of a killed run, because it
finds it unlocked. In version 2 our groups are at the top: only the root group may give controllers to its children
while it has processes itself (Documentation/admin-guide/cgroup-v2.rst, No Internal Process Constraint).
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
from imageos.node import linux

PREFIX = "imageos."
PROCESSES = 1024
MEMORY = 2 << 30  # bytes
DEADLINE = 5.0  # seconds to wait until killed processes are gone
VERSION_2 = {"pids.max": PROCESSES, "memory.max": MEMORY, "memory.swap.max": 0}
# Mount point of a hierarchy -> file (its name begins with that of the controller) -> limit
HIERARCHIES: Mapping[str, Mapping[str, int]] = {
    "/sys/fs/cgroup": VERSION_2,
    "/sys/fs/cgroup/unified": VERSION_2,
    "/sys/fs/cgroup/pids": {"pids.max": PROCESSES},
    "/sys/fs/cgroup/memory": {"memory.limit_in_bytes": MEMORY},
}
MAY_BE_MISSING = ("memory.swap.max",)  # in a kernel without swap
BOUNDS = {"pids": "number", "memory": "memory"}  # controller -> what it limits, for messages


@contextmanager
def limited() -> Iterator[Callable[[], None]]:
    """Make a group with these limits; yield the function by which a process joins it. Warn if a limit is missing."""
    with ExitStack() as stack:
        groups, missing_limits = _groups(stack)
        for complaint in missing_limits:
            _warn(complaint)

        def join() -> None:
            for group in groups:
                _write(f"{group}/cgroup.procs", "0")  # 0: the process that writes

        yield join


def missing_limits() -> list[str]:
    """Return a complaint, with its reason, for each limit that this node cannot set."""
    with ExitStack() as stack:
        return _groups(stack)[1]


@cache  # warn once, however many programs run
def _warn(complaint: str) -> None:
    log.warning(complaint)


def _groups(stack: ExitStack) -> tuple[list[str], list[str]]:
    """Return the new groups, which `stack` removes, and a complaint for each missing limit."""
    groups: list[str] = []
    reasons = dict.fromkeys(BOUNDS, "there is no such control group on this node")
    for top, limits in HIERARCHIES.items():
        group = ""
        for name, limit in limits.items():
            controller, reason = name.partition(".")[0], ""
            try:
                if not _has(top, controller):
                    continue
                group = group or stack.enter_context(_group(top))
                _enable(top, controller)
                _write(f"{group}/{name}", str(limit))
            except OSError as error:  # read-only, in a container
                reason = f"{top}: {error.strerror}"
            if name not in MAY_BE_MISSING:
                reasons[controller] = reason
        groups += [group] if group else []
    complaint = "the guest's programs are not bounded in their"
    return groups, [f"{complaint} {BOUNDS[controller]}: {reason}" for controller, reason in reasons.items() if reason]


def _has(top: str, controller: str) -> bool:
    """Return True if this hierarchy exists and has the controller. In version 1, a hierarchy has one by definition."""
    if os.path.exists(f"{top}/cgroup.controllers"):
        return controller in _read(f"{top}/cgroup.controllers").split()
    return os.path.exists(f"{top}/cgroup.procs")


def _enable(top: str, controller: str) -> None:
    """Give the groups below `top` this controller; only version 2 needs that."""
    switch = f"{top}/cgroup.subtree_control"
    if os.path.exists(switch) and controller not in _read(switch).split():
        _write(switch, f"+{controller}")


@contextmanager
def _group(top: str) -> Iterator[str]:
    _remove_stale(top)
    path, lock = _make_locked(top)
    try:
        with linux.closing(lock):
            yield path
    finally:
        _remove(path)


def _make_locked(top: str) -> tuple[str, int]:
    """Return the path of a new group, and a descriptor whose lock shows other runs that it is in use."""
    while True:
        path = f"{top}/{PREFIX}{os.urandom(6).hex()}"
        os.mkdir(path, 0o700)  # for root only: another user's lock on it could make us wait for ever
        with suppress(FileNotFoundError):  # another run removed it before we locked it
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
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
            with suppress(OSError):  # only version 2 has it, since Linux 5.14
                _write(f"{path}/cgroup.kill", "1")
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                log.debug(f"cannot remove the control group {path}: {error.strerror}")
                return
        time.sleep(0.01)


def _remove_stale(top: str) -> None:
    for name in os.listdir(top):
        if name.startswith(PREFIX):
            path = f"{top}/{name}"
            # suppressed: it is in use, or another run removed it first
            with suppress(OSError), linux.closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rmdir(path)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode()


def _write(path: str, value: str) -> None:
    with linux.closing(os.open(path, os.O_WRONLY)) as descriptor:
        os.write(descriptor, value.encode())
