"""What is said of processes. None is started here."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from imageos import run
from imageos.errors import Failure
from imageos.run import Finished

# How a process failed


def failure(status: int, stderr: str = "", *argv: str) -> Failure:
    return Finished(argv or ("tar", "--extract"), status, b"", stderr).failure()


def test_last_line_is_the_cause() -> None:
    told = failure(2, "first\n\nsecond\nlast\n \n")
    assert str(told) == "tar failed (exit status 2): last"
    assert told.details == ("$ tar --extract", "first", "second")
    assert told.hint is None


def test_silent_failure() -> None:
    told = failure(1)
    assert str(told) == "tar failed (exit status 1)"
    assert told.details == ("$ tar --extract",)


def test_killed() -> None:
    assert str(failure(-9, "x")) == "tar failed (killed by SIGKILL): x"
    assert str(failure(-250)) == "tar failed (killed by signal 250)"


def test_command_can_be_pasted() -> None:
    assert failure(1, "", "mkfs.ext4", "-L", "a b", "it's").details == ("$ mkfs.ext4 -L 'a b' 'it'\"'\"'s'",)


def test_long_output_is_cut() -> None:
    told = failure(1, "".join(f"line {n}\n" for n in range(100)))
    assert str(told).endswith(": line 99")
    assert told.details == ("$ tar --extract", *(f"line {n}" for n in range(90, 99)))


# What is there


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory of PATH: has `tar`, and a `zstd` that cannot be executed."""
    for name, mode in (("tar", 0o755), ("zstd", 0o644)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "xz").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_available(tools: Path) -> None:
    assert run.available("tar")
    assert run.available(f"{tools}/tar")
    assert not run.available("zstd")
    assert not run.available("xz")
    assert not run.available("sh")


def test_require(tools: Path) -> None:
    run.require()
    run.require("tar", "tar")


def test_all_that_is_missing_is_named_with_its_package(tools: Path) -> None:
    with pytest.raises(Failure) as raised:
        run.require("mkfs.xfs", "tar", "xz", "mkfs.ext4", "mkfs.ext3", "some-tool")
    assert str(raised.value) == "missing on this node: mkfs.xfs xz mkfs.ext4 mkfs.ext3 some-tool"
    assert str(raised.value.hint).startswith("install e2fsprogs some-tool xfsprogs xz-utils ")


def test_without_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    assert run.available("sh")
    assert run.environment()["PATH"] == run.DEFAULT_PATH


def test_tools_get_nothing_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "OSP_USER_DATA", "PYTHONPATH", "SHIV_INTERPRETER", "LANG", "IFS"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("TMPDIR", "/run/imageos/tmp")
    assert run.environment() == {"PATH": "/bin", "LC_ALL": "C", "HOME": "/root", "TMPDIR": "/run/imageos/tmp"}
    monkeypatch.delenv("TMPDIR")
    assert run.environment() == {"PATH": "/bin", "LC_ALL": "C", "HOME": "/root"}


def test_nothing_is_started_here() -> None:
    """The tier's own rule, on the module that would start something."""
    with pytest.raises(AssertionError, match="started a process"):
        run.run(["true"])


# What could not be started


@pytest.mark.parametrize(("number", "is_there"), [(errno.ENOENT, True), (errno.ENOEXEC, True), (errno.ENOENT, False)])
def test_script_without_an_interpreter(number: int, is_there: bool, tmp_path: Path) -> None:
    script = tmp_path / "hook"
    if is_there:
        script.touch()
    told = run._missing(str(script), OSError(number, os.strerror(number)))
    assert str(told) == f"{script} cannot be run: {os.strerror(number)}"
    assert told.hint == ("its first line has to name an interpreter, as #!/bin/sh does" if is_there else None)


def test_program_that_is_missing() -> None:
    told = run._missing("mkfs.xfs", FileNotFoundError(errno.ENOENT, "No such file or directory"))
    assert (str(told), told.hint) == ("mkfs.xfs: not found", "install xfsprogs on this node")
    told = run._missing("mkfs.xfs", PermissionError(errno.EACCES, "Permission denied"))
    assert (str(told), told.hint) == ("mkfs.xfs: Permission denied", None)
