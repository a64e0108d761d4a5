"""Control groups, on a directory in the place of a hierarchy."""

import fcntl
import os
from pathlib import Path

import pytest

from imageos import cgroup


def test_a_group_that_another_run_takes_for_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.procs").touch()
    monkeypatch.setattr(cgroup, "HIERARCHIES", {str(tmp_path): {}})
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
