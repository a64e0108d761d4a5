"""The processes of one pipeline: every stage's end counts."""

from __future__ import annotations

import pytest

from imageos.errors import Failure
from imageos.run import Command, output_of, pipeline, run


def shell(script: str) -> Command:
    return Command(["/bin/sh", "-c", script])


def statuses(*stages: str) -> list[int]:
    return [stage_result.status for stage_result in pipeline(*map(shell, stages))]


def test_verdict_of_the_first_is_awaited_when_the_second_has_enough() -> None:
    """A decompressor checks its output at the end, long after tar has stopped reading at the end of the archive."""
    assert statuses("printf x; sleep 0.2; printf 'the rest'; exit 7", "head -c 1 >/dev/null") == [7, 0]


def test_first_is_stopped_when_the_second_fails() -> None:
    assert [stage_result.status for stage_result in pipeline(Command(["yes"]), Command(["false"]))] == [-13, 1]


def test_much_output_after_the_end_of_the_second() -> None:
    """The first stage writes more than a pipe holds."""
    assert statuses("head -c 300000 /dev/zero", "exit 0") == [0, 0]


def test_third_of_three() -> None:
    done = pipeline(*map(shell, ["echo one; exit 4", "cat", "cat"]))
    assert [stage_result.status for stage_result in done] == [4, 0, 0]
    assert done[-1].stdout == b"one\n"


@pytest.mark.parametrize(
    ("stages", "cause"),
    [
        (["echo good"], ""),
        (["echo good; exit 3"], "exit status 3"),
        (["echo good", "cat; exit 3"], "exit status 3"),
        (["exec yes", "echo good; exit 3"], "exit status 3"),  # yes is stopped because nobody reads its output
        (["kill -PIPE $$"], "killed by SIGPIPE"),
    ],
)
def test_output_of_stages(stages: list[str], cause: str) -> None:
    with output_of(*map(shell, stages)) as (output, check):
        with open(output, "rb", closefd=False) as file:
            assert file.read() == (b"" if "kill" in stages[0] else b"good\n")
        if not cause:
            check()
            return
        with pytest.raises(Failure, match=cause):
            check()


def test_input_is_more_than_a_pipe_holds() -> None:
    """The program may end before it has read any of it."""
    text = "0123456789\n" * 20_000
    assert run(Command(["cat"]), input=text) == text
    assert run(Command(["true"]), input=text) == ""
