"""Messages about processes. These tests start none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from imageos import log, run
from imageos.errors import Failure
from imageos.run import Command, Finished

# Reasons of a failure


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


def test_debug_log_of_who_says_much(capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever may set OS parameters may have that log, and a guest's program says what it likes."""
    log.set_debug(True)
    ended = SimpleNamespace(status=lambda: 0)
    run._finished(Command(["x"]), ended, b"\n" * run.OUTPUT_LIMIT, "\n" * run.OUTPUT_LIMIT)  # type: ignore[arg-type]
    assert 0 < len(capfd.readouterr().err) < 4 << 20


def test_nothing_is_started_here() -> None:
    """The tier's own rule, tested on the module that would start a process."""
    with pytest.raises(AssertionError, match="started a process"):
        run.run(Command(["true"]))
