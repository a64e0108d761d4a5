"""Messages to the operator: on stderr, in ASCII (Ganeti cannot show anything else), with one prefix.

Never write to stdout: during export it carries the backup.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

PREFIX = "imageos: "
LONGEST = 1 << 16  # characters of a line; a guest may print more
CUT = " [...] "
# `debug` prints if True; set once from the settings. Global, as stderr is.
_debug = False
# `info` prints nothing if True.
_muted = False
# True while the terminal's line shows a progress bar.
_drawn = False


def set_debug(enabled: bool) -> None:
    global _debug
    _debug = enabled


def info(message: str) -> None:
    """Print `message` as one line, even if it contains a newline, as names of a guest's files may."""
    if _muted:
        _clear()
    else:
        _write(f"{PREFIX}{message}")


@contextmanager
def muted() -> Iterator[None]:
    """Meanwhile, print nothing but what is for debugging."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def warning(message: str) -> None:
    info(f"warning: {message}")


def debug(message: str | Callable[[], str]) -> None:
    """Print a message for debugging, or what a function returns that is called for that alone."""
    if _debug:
        for line in (message if isinstance(message, str) else message()).splitlines():
            _write(f"{PREFIX}debug: {line}")


@contextmanager
def phase(what: str) -> Iterator[None]:
    """On success, log `what` was done and how long it took."""
    start = time.monotonic()
    debug(f"begin: {what}")
    yield
    info(f"{what} ({time.monotonic() - start:.1f} s)")


class Progress:
    """Progress of a long step: a bar on a terminal, otherwise a line every 10 seconds."""

    INTERVAL = 10.0  # seconds between lines in a log
    WIDTH = 20  # characters of the bar
    WORDS = len("100% of 1023 MiB, 1023 MiB/s, 99 min left")

    def __init__(self, what: str, total: int) -> None:
        """`total` is in bytes; 0 if unknown."""
        self._what = what
        self._total = total
        self._terminal = os.isatty(2)
        self._start = time.monotonic()
        self._first: int | None = None  # a download may begin in the middle
        self._next = self._start + (0.0 if self._terminal else self.INTERVAL)

    def update(self, done: int) -> None:
        """Show that `done` bytes of the total are done. Calling this often is cheap."""
        if self._first is None:
            self._first = done
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._terminal else self.INTERVAL)
        words = progress_words(done, self._total, done - self._first, now - self._start)
        if self._terminal:
            share = min(done / self._total, 1.0) if self._total else None
            _draw(bar(self._what, ", ".join(words), share, _columns()))
        else:
            info(f"{self._what}: {', '.join(words)}")

    def close(self) -> None:
        """Erase the bar, where no line of the log and no end of a phase does so."""
        _clear()


def progress_words(done: int, total: int, moved: int, seconds: float) -> list[str]:
    """Return the progress as words; `done`, `total` and `moved` (in these `seconds`) are in bytes."""
    rate = moved / seconds if seconds >= 1 else 0.0
    words = [f"{min(done / total, 1.0):.0%} of {size(total)}" if total else size(done)]
    if rate:
        words.append(f"{size(round(rate))}/s")
    if rate and total:
        words.append(f"{duration(max(0.0, (total - done) / rate))} left")
    return words


def bar(what: str, words: str, share: float | None, columns: int) -> str:
    """Return one line that fits into the terminal: shorten the name first, then drop the bar. Fixed layout."""
    drawn = f"[{'#' * round(share * Progress.WIDTH):<{Progress.WIDTH}}] " if share is not None else ""
    if columns < len(f"imageos: {drawn}") + Progress.WORDS:
        drawn = ""
    room = columns - 1 - len(f"imageos: {drawn}, ") - Progress.WORDS
    name = what if len(what) <= room else f"{what[: room - 3]}..." if room > 10 else ""
    return f"imageos: {drawn}{name}{', ' if name else ''}{words}"[: columns - 1]


def duration(seconds: float) -> str:
    """Return `seconds` as people read them: `40 s`, `5 min`, `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _columns() -> int:
    try:
        return os.get_terminal_size(2).columns or 80
    except OSError:
        return 80


def _draw(line: str) -> None:
    global _drawn
    _drawn = True
    with suppress(OSError):
        os.write(2, f"\r\x1b[K{ascii_only(line)}".encode("ascii"))


def _clear() -> None:
    """Erase the bar, so that a line can take its place."""
    global _drawn
    if _drawn:
        _drawn = False
        with suppress(OSError):
            os.write(2, b"\r\x1b[K")


def ascii_only(text: str) -> str:
    """Escape everything but printable ASCII, so that no guest can forge a line of the log."""
    return "".join(c if " " <= c <= "~" else _escape(c) for c in text)


def few(names: Sequence[str], most: int = 8) -> str:
    """Return `names` for a message: the first of them, and how many more there are."""
    return ", ".join([*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])])


def shorten(text: str, longest: int) -> str:
    """Return `text` in ASCII with at most `longest` characters. Cut in the middle, as the end may name the cause."""
    end = longest // 4
    if len(text) > 2 * longest:  # escaping is slow
        text = text[:longest] + text[-longest:]
    text = ascii_only(text)
    return text if len(text) <= longest else f"{text[: longest - end - len(CUT)]}{CUT}{text[-end:]}"


def _escape(character: str) -> str:
    if ord(character) < 0x80:
        return f"\\x{ord(character):02x}"
    return character.encode("ascii", "backslashreplace").decode()


def size(count: int) -> str:
    """Return a number of bytes as people read it: `512 MiB`, `1.5 GiB`."""
    value = float(min(count, 1 << 80))
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def _write(line: str) -> None:
    # One write per line, so that lines of concurrent processes do not mix in Ganeti's log.
    text = shorten(line, LONGEST) + "\n"
    _clear()
    with suppress(OSError):  # if nobody reads stderr, the exit status still reports the failure
        os.write(2, text.encode("ascii"))
