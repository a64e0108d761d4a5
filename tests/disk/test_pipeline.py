"""The processes of one pipeline: every stage's end counts."""

from __future__ import annotations

from imageos.run import pipeline


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
