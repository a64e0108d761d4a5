"""The check after each test finds what a test leaves, and removes it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftovers import Leftovers
from support import MIB, run, wait_until


@pytest.fixture
def base(request: pytest.FixtureRequest) -> str:
    return str(request.config.option.basetemp)


@pytest.fixture
def before(machine: list[Path], base: str) -> Iterator[Leftovers]:
    yield Leftovers(machine, base)


@pytest.mark.parametrize("kind", ["orphan", "mount", "bind mount", "loop device", "loop over a loop", "file"])
def test_is_seen_and_removed(kind: str, machine: list[Path], before: Leftovers, base: str, tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(MIB)
    if kind == "orphan":
        subprocess.run(["sh", "-c", "setsid sleep 1000 & exit 0"], check=True)
        # wait until it is neither the shell that starts it nor setsid
        wait_until(
            lambda: str(Leftovers(machine, base).minus(before).describe()).endswith(": sleep 1000']"), "it is sleep"
        )
    elif kind == "mount":
        run("mount", "-t", "tmpfs", "left", tmp_path / "here")
    elif kind == "bind mount":
        run("mount", "--bind", tmp_path / "there", tmp_path / "here")
    elif kind == "file":
        Path("/tmp/left").write_text("")
        Path("/var/tmp/left").mkdir()
    else:
        device = run("losetup", "--find", "--show", tmp_path / "disk").strip()
        if kind == "loop over a loop":
            run("losetup", "--find", device)
    left = Leftovers(machine, base).minus(before)
    expected = {"orphan": 1, "mount": 1, "bind mount": 1, "loop device": 1, "loop over a loop": 2, "file": 2}
    assert len(left.describe()) == expected[kind], left.describe()
    assert {"orphan": "sleep 1000", "file": "/tmp/left"}.get(kind, str(tmp_path)) in "\n".join(left.describe())
    left.remove()
    wait_until(lambda: not Leftovers(machine, base).minus(before), "nothing is left")


def test_nothing_is_nothing(machine: list[Path], before: Leftovers, base: str) -> None:
    subprocess.run(["sh", "-c", "sleep 0.1 & exit 0"], check=True)
    wait_until(lambda: not Leftovers(machine, base).minus(before), "it has ended")
