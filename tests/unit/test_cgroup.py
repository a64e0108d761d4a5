"""Control groups, on a directory instead of a hierarchy."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imageos import log
from imageos.node import cgroup

NEEDED = {"pids.max": "1024", "memory.max": str(2 << 30)}


@pytest.fixture(autouse=True)
def no_warning_yet() -> Iterator[None]:
    cgroup._warn.cache_clear()
    yield
    cgroup._warn.cache_clear()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    return said


def take_away(group: str, rmdir: Callable[[str], None] = os.rmdir) -> None:
    """Remove the kernel's files in a group with the group."""
    for path in Path(group).iterdir():
        path.unlink()
    rmdir(group)


@pytest.fixture
def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the top of a hierarchy of version 2: `cgroup.subtree_control` decides on the files of a new group."""
    top = tmp_path / "cgroup"
    top.mkdir()
    (top / "cgroup.procs").touch()
    (top / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (top / "cgroup.subtree_control").write_text("")
    mkdir, write = os.mkdir, cgroup._write

    def fill(group: Path) -> None:
        given = (top / "cgroup.subtree_control").read_text().replace("+", " ").split()
        for name in ("pids.max", "memory.max", "memory.swap.max"):
            if name.split(".")[0] in given:
                (group / name).touch()
        for name in ("cgroup.procs", "cgroup.kill"):
            (group / name).touch()

    def make(path: str, mode: int) -> None:
        mkdir(path, mode)
        fill(Path(path))

    def written(path: str, value: str) -> None:
        if path.endswith("subtree_control"):
            value = Path(path).read_text() + value
        write(path, value)
        for group in top.glob("imageos.*"):
            fill(group)

    monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setattr(os, "rmdir", take_away)
    monkeypatch.setattr(cgroup, "_write", written)
    monkeypatch.setattr(cgroup, "HIERARCHIES", {str(top): cgroup.VERSION_2})
    return top


def limits(top: Path) -> dict[str, str]:
    (group,) = top.glob("imageos.*")
    return {path.name: path.read_text() for path in group.glob("*.max")}


def test_version_2(version_2: Path, warnings: list[str]) -> None:
    """The group gets its controllers and all limits, and a process can join it."""
    with cgroup.limited() as join:
        assert limits(version_2) == {**NEEDED, "memory.swap.max": "0"}
        join()
        (group,) = version_2.glob("imageos.*")
        assert (group / "cgroup.procs").read_text() == "0"
    assert list(version_2.glob("imageos.*")) == []
    assert warnings == cgroup.missing_limits() == []


def test_version_2_as_systemd_has_it(version_2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that is already on is left alone, as the file may be read-only."""
    (version_2 / "cgroup.subtree_control").write_text("cpu memory pids\n")
    with cgroup.limited():
        assert limits(version_2).keys() >= NEEDED.keys()
    assert (version_2 / "cgroup.subtree_control").read_text() == "cpu memory pids\n"


def test_without_a_controller(version_2: Path, warnings: list[str]) -> None:
    """One limit is set; a warning names the other, once for any number of programs."""
    (version_2 / "cgroup.controllers").write_text("cpu pids\n")
    for _ in range(3):
        with cgroup.limited():
            assert limits(version_2) == {"pids.max": "1024"}
    assert warnings == [
        "the guest's programs are not bounded in their memory: there is no such control group on this node"
    ]


def test_controllers_that_cannot_be_had(version_2: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    """The top of a container's hierarchy has processes, so that the kernel gives no controllers to groups below."""
    write = cgroup._write

    def busy(path: str, value: str) -> None:
        if path.endswith("subtree_control"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        write(path, value)

    monkeypatch.setattr(cgroup, "_write", busy)
    with cgroup.limited() as join:
        join()
    assert [warning.split(" in their ")[1] for warning in warnings] == [
        f"number: {version_2}: Device or resource busy",
        f"memory: {version_2}: Device or resource busy",
    ]
    assert cgroup.missing_limits() == warnings


def test_read_only(version_2: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    with cgroup.limited() as join:
        join()
    assert [warning.split(": ", 1)[1] for warning in warnings] == [f"{version_2}: Read-only file system"] * 2


def test_no_control_groups_at_all(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setattr(cgroup, "HIERARCHIES", {"/nowhere": cgroup.VERSION_2})
    with cgroup.limited() as join:
        join()
    assert len(warnings) == 2


def test_a_group_that_does_not_end_is_killed(version_2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: str) -> None:
        if (Path(path) / "cgroup.kill").read_text() != "1":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        take_away(path)

    monkeypatch.setattr(os, "rmdir", busy)
    monkeypatch.setattr(cgroup, "DEADLINE", 0.2)
    with cgroup.limited():
        pass
    assert list(version_2.glob("imageos.*")) == []


def test_a_group_that_another_run_takes_for_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.procs").touch()
    monkeypatch.setattr(cgroup, "HIERARCHIES", {str(tmp_path): {"pids.max": 1}})
    flock = fcntl.flock
    removed: list[str] = []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.rmdir(removed[0])
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with cgroup.limited():
        (group,) = tmp_path.glob("imageos.*")
        assert removed != [str(group)]
        assert group.stat().st_mode & 0o777 == 0o700, "nobody else can lock it"
    assert list(tmp_path.glob("imageos.*")) == []
