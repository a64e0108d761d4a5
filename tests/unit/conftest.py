"""The tier that computes only: no process may be started, no root is needed."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

from imageos import log
from imageos.sandbox import GuestDisk
from imageos.target import Target, opened

# The same examples in each run, no timing (a busy machine is no fault), and nothing left in the checkout.
hypothesis.settings.register_profile("unit", derandomize=True, deadline=None, max_examples=40, database=None)
hypothesis.settings.load_profile("unit")

STARTERS = ("fork", "forkpty", "system", "popen", "posix_spawn", "posix_spawnp", "execv", "execve", "execvp", "execvpe")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a unit test started a process")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for name in STARTERS:
        monkeypatch.setattr(os, name, refuse)


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """What a command sets for its whole process is as before for the next test."""
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)
    log.set_debug(False)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """An empty root of a guest."""
    root = tmp_path / "guest"
    root.mkdir()
    return root


@pytest.fixture
def target(guest: Path) -> Iterator[Target]:
    """`guest`, opened as a command does it."""
    with opened(str(guest), "inst1", GuestDisk([], []), 5) as root:
        yield root
