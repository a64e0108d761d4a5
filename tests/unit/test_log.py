"""Messages: ASCII, one prefix, nothing on stdout."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imageos import log

Capture = pytest.CaptureFixture[str]


@example("\x7f")
@given(st.text())
def test_only_printable_ascii(text: str) -> None:
    assert all(" " <= c <= "~" for c in log.ascii_only(text))


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_ascii_is_unchanged(text: str) -> None:
    assert log.ascii_only(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb", "a\\x0db"),
        ("tab\t", "tab\\x09"),
        ("stra\u00dfe", "stra\\xdfe"),
        ("\u20ac", "\\u20ac"),
        ("\U0001f600", "\\U0001f600"),
        ("\udcff", "\\udcff"),  # a byte that is not UTF-8
        ("\x7f", "\\x7f"),
        ("\x80", "\\x80"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert log.ascii_only(text) == shown


def test_one_message_is_one_line(capfd: Capture) -> None:
    """A newline in a guest's file name never starts a new line, above all not the last one."""
    log.info("one\nimageos: two\u2028three\r\n")
    log.info("")
    log.warning("odd")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "imageos: one\\x0aimageos: two\\u2028three\\x0d\\x0a",
        "imageos: ",
        "imageos: warning: odd",
    ]


def test_debug_only_when_wanted(capfd: Capture) -> None:
    log.debug("unseen")
    log.set_debug(True)
    log.debug("seen\nby all")
    assert capfd.readouterr().err == "imageos: debug: seen\nimageos: debug: by all\n"


def test_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_descriptor: int, _data: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    log.info("the exit status still tells")


def test_phase_says_how_long_it_took(capfd: Capture, clock: Iterator[float]) -> None:
    with log.phase("unpacked"):
        next(clock)
    assert capfd.readouterr().err == "imageos: unpacked (2.0 s)\n"


def test_phase_that_fails_is_not_done(capfd: Capture) -> None:
    with pytest.raises(RuntimeError), log.phase("unpacked"):
        raise RuntimeError
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (3 << 29, "1.5 GiB"),
        ((100 << 30) + 1, "100 GiB"),
        (2 << 40, "2 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert log.size(count) == shown


# Progress: each reading of the clock is a second later


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    times = (float(n) for n in range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    return times


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch, capfd: Capture, clock: Iterator[float]) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: False)
    progress = log.Progress("unpacking", 100 << 20)
    for done in range(36):
        progress.update(done << 20)
    progress.close()
    assert capfd.readouterr().err.splitlines() == [
        "imageos: unpacking: 9% of 100 MiB, 922 KiB/s, 2 min left",
        "imageos: unpacking: 19% of 100 MiB, 973 KiB/s, 85 s left",
        "imageos: unpacking: 29% of 100 MiB, 990 KiB/s, 73 s left",
    ]


def test_progress_of_a_short_step_is_silent(
    monkeypatch: pytest.MonkeyPatch, capfd: Capture, clock: Iterator[float]
) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: False)
    progress = log.Progress("unpacking", 100)
    progress.update(100)
    progress.close()
    assert capfd.readouterr().err == ""


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: True)
    monkeypatch.setattr(log, "_columns", lambda: 100)
    monkeypatch.setattr(log, "_drawn", False)  # monkeypatch restores it after the test


def test_progress_on_a_terminal(terminal: None, capfd: Capture, clock: Iterator[float]) -> None:
    progress = log.Progress("unpacking", 100)
    progress.update(0)
    progress.update(50)
    progress.update(150)  # the total was too small
    progress.close()
    begin, half, full, clear = capfd.readouterr().err.split("\r\x1b[K")[1:]
    assert begin == f"imageos: [{' ' * 20}] unpacking, 0% of 100 bytes"
    assert half == f"imageos: [{'#' * 10}{' ' * 10}] unpacking, 50% of 100 bytes, 25 bytes/s, 2 s left"
    assert full == f"imageos: [{'#' * 20}] unpacking, 100% of 100 bytes, 50 bytes/s, 0 s left"
    assert clear == ""


def test_message_takes_the_place_of_the_bar(terminal: None, capfd: Capture, clock: Iterator[float]) -> None:
    progress = log.Progress("unpacking", 100)
    progress.update(50)
    log.info("a message")
    log.info("another")
    progress.close()
    assert capfd.readouterr().err.endswith("\r\x1b[Kimageos: a message\nimageos: another\n")


def test_progress_without_a_total(terminal: None, capfd: Capture, clock: Iterator[float]) -> None:
    progress = log.Progress("downloading", 0)
    for done in range(3):
        progress.update(done << 20)
    assert capfd.readouterr().err.split("\r\x1b[K")[-1] == "imageos: downloading, 2 MiB, 683 KiB/s"


def test_rate_of_what_began_in_the_middle() -> None:
    assert log.progress_words(900, 1000, 100, 10.0) == ["90% of 1000 bytes", "10 bytes/s", "10 s left"]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_bar_fits_into_the_terminal(columns: int) -> None:
    what = "downloading https://images.example.org/ganeti/debian-12-generic-amd64.qcow2"
    line = log.bar(what, "45% of 1.2 GiB, 120 MiB/s, 12 s left", 0.45, columns)
    assert len(line) < columns
    assert line.startswith("imageos: ")
    if columns >= 60:
        assert line.endswith("45% of 1.2 GiB, 120 MiB/s, 12 s left")
    if columns == 200:
        assert what in line and "[####" in line


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (9000, "2.5 h")])
def test_duration(seconds: float, shown: str) -> None:
    assert log.duration(seconds) == shown


def test_long_lines(capfd: Capture) -> None:
    """The log shows a hook's output, but cuts very long lines."""
    log.info("x" * 50_000)
    log.info("y" * (10 << 20))
    log.info("\x00" * 30_000 + "the cause")
    first, second, third = capfd.readouterr().err.splitlines()
    assert first == "imageos: " + "x" * 50_000
    assert len(second) == len(third) == log.LONGEST
    assert third.startswith("imageos: \\x00") and third.endswith("\\x00the cause")
