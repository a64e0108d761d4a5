"""The processes of one pipeline: every stage's end counts."""

from __future__ import annotations

import signal
import subprocess

import pytest

from imageos.errors import Failure, Interrupted
from imageos.run import output_of, pipeline, run


def statuses(*stages: str) -> list[int]:
    return [one.status for one in pipeline([["/bin/sh", "-c", stage] for stage in stages])]


def test_verdict_of_the_first_is_awaited_when_the_second_has_enough() -> None:
    """A decompressor checks all that it gave at its end; tar has long stopped reading at the archive's."""
    assert statuses("printf x; sleep 0.2; printf 'the rest'; exit 7", "head -c 1 >/dev/null") == [7, 0]


def test_first_is_stopped_when_the_second_fails() -> None:
    assert [one.status for one in pipeline([["yes"], ["false"]])] == [-13, 1]


def test_much_output_after_the_end_of_the_second() -> None:
    """More than a pipe holds."""
    assert statuses("head -c 300000 /dev/zero", "exit 0") == [0, 0]


def test_third_of_three() -> None:
    done = pipeline([["/bin/sh", "-c", "echo one; exit 4"], ["cat"], ["cat"]])
    assert [one.status for one in done] == [4, 0, 0]
    assert done[-1].stdout == b"one\n"


@pytest.mark.parametrize(
    ("stages", "cause"),
    [
        (["echo good"], ""),
        (["echo good; exit 3"], "exit status 3"),
        (["echo good", "cat; exit 3"], "exit status 3"),
        (["exec yes", "echo good; exit 3"], "exit status 3"),  # yes is stopped because nobody reads any more
        (["kill -PIPE $$"], "killed by SIGPIPE"),
    ],
)
def test_output_of_stages(stages: list[str], cause: str) -> None:
    with output_of([["/bin/sh", "-c", stage] for stage in stages]) as (output, check):
        with open(output, "rb", closefd=False) as file:
            assert file.read() == (b"" if "kill" in stages[0] else b"good\n")
        if not cause:
            check()
            return
        with pytest.raises(Failure, match=cause):
            check()


def test_signal_while_a_program_is_told_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has not been told yet is of no interest; why it was ended is."""

    def feed(process: subprocess.Popen[bytes], text: str) -> None:
        assert process.stdin
        process.stdin.write(text.encode())  # into a buffer
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("imageos.run._feed", feed)
    with pytest.raises(Interrupted):
        run(["sleep", "1000"], input="start=1\n")
