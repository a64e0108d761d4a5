"""Fixtures for tests that only compute: they must start no process and need no root."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis
import hypothesis.configuration
import pytest

from imageos import log
from imageos.guests.sandbox import GuestDisk
from imageos.guests.target import Target, opened
from imageos.node.children import SIGNALS

# The same examples in each run, no timing (a busy machine is no error), and no new files in the checkout.
hypothesis.configuration.set_hypothesis_home_dir(Path(__file__).parents[2] / ".cache/hypothesis")
hypothesis.settings.register_profile("unit", derandomize=True, deadline=None, max_examples=20, database=None)
hypothesis.settings.load_profile("unit")


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which took a sixth of this tier's time."""
    gc.freeze()


SHM = "/dev/shm"
ROOM = 512 << 20  # bytes; all tests together write 90 MiB
STARTERS = ("fork", "system", "posix_spawn")


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """Return a directory in memory if there is enough: on a disk, directories take a third of this tier's time."""
    has_room = os.access(SHM, os.W_OK) and os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize > ROOM
    with tempfile.TemporaryDirectory(prefix="imageos-tests.", dir=SHM if has_room else None) as top:
        yield Path(top)


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", refuse)
    for name in STARTERS:
        monkeypatch.setattr(os, name, refuse)


def refuse(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a unit test started a process")


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Restore the state that a command sets for its whole process."""
    umask = os.umask(0o022)
    os.umask(umask)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.umask(umask)
    log.set_debug(False)


NOBODY = 65534
CAP_DAC_READ_SEARCH = 1 << 2  # linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[None]:
    """Drop root's privileges for one test, in a directory that then belongs to it.

    The tested code removes whole trees. A bug in it must not remove the machine's.
    """
    if os.geteuid() != 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    for directory in (tmp_path.parent, tmp_path):
        directory.chmod(0o711)
    os.chown(tmp_path, NOBODY, NOBODY)
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        may_read_everything()
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def may_read_everything() -> None:
    """Let Python still import from a checkout that only root can read, such as one in root's home."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    # effective, permitted, inheritable of the low 32, then of the high 32 capabilities
    data = ctypes.create_string_buffer(struct.calcsize("=6I"))
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    struct.pack_into("=I", data, 0, CAP_DAC_READ_SEARCH)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


@pytest.fixture
def guest(unprivileged: None, tmp_path: Path) -> Path:
    """Return an empty root of a guest."""
    root = tmp_path / "guest"
    root.mkdir()
    return root


@pytest.fixture
def target(guest: Path, tmp_path: Path) -> Iterator[Target]:
    """Open `guest` as a command does."""
    with opened(str(guest), "inst1", GuestDisk([], []), 5) as root:
        check_confined(root, guest, tmp_path / "outside")
        yield root


def check_confined(root: Target, guest: Path, outside: Path) -> None:
    """Abort the whole run if a path leads out of the guest: no test may change files through such a Target.

    This only reads, and changes no files but its own.
    """
    outside.mkdir()
    (outside / "file").write_text("the node's own")
    (guest / "link").symlink_to(outside)
    for directory in (str(outside), "/../outside", "/link"):
        path = f"{directory}/file"
        if root.exists(path) or root.read(path) is not None or root.glob(f"{directory}/*"):
            pytest.exit(f"a guest's path leads to the node: {path}", returncode=3)
    (guest / "link").unlink()
    (outside / "file").unlink()
    outside.rmdir()
