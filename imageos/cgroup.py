"""Bounds on what a group of processes takes of the node: a control group of version 2 or 1, where the kernel has them.

The kernel does not take a group away with its last process: the directory of a run that was killed is removed by the
next one, which finds it unlocked.
"""

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Callable

from imageos import log

PREFIX = "imageos."
PROCESSES = 1024
MEMORY = 2 << 30  # bytes
DEADLINE = 5.0  # seconds for killed processes to be gone
# Where each hierarchy is mounted (of version 2 there is one) -> file -> limit
HIERARCHIES: Mapping[str, Mapping[str, int]] = {
    "/sys/fs/cgroup": {"pids.max": PROCESSES, "memory.max": MEMORY},
    "/sys/fs/cgroup/pids": {"pids.max": PROCESSES},
    "/sys/fs/cgroup/memory": {"memory.limit_in_bytes": MEMORY},
}


@contextmanager
def limited() -> Iterator[Callable[[], None]]:
    """A group with these limits; gives the function by which a process joins it. Without control groups, nothing."""
    with ExitStack() as stack:
        groups = []
        for top, limits in HIERARCHIES.items():
            if os.path.exists(f"{top}/cgroup.procs"):
                try:
                    groups.append(stack.enter_context(_group(top, limits)))
                except OSError as error:  # read-only, in a container
                    log.debug(f"no control group in {top}: {error.strerror}")

        def join() -> None:
            for group in groups:
                _write(f"{group}/cgroup.procs", 0)  # 0: who writes

        yield join


@contextmanager
def _group(top: str, limits: Mapping[str, int]) -> Iterator[str]:
    _remove_stale(top)
    path, lock = _locked(top)
    try:
        try:
            for name, limit in limits.items():
                if os.path.exists(f"{path}/{name}"):  # of version 2, only what is enabled for groups below the top
                    _write(f"{path}/{name}", limit)
            yield path
        finally:
            os.close(lock)
    finally:
        _remove(path)


def _locked(top: str) -> tuple[str, int]:
    """A new group, and the descriptor that keeps it from being taken for stale."""
    while True:
        path = f"{top}/{PREFIX}{secrets.token_hex(6)}"
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


def _write(path: str, value: int) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{value}\n")
