"""Messages to the operator: stderr, ASCII (Ganeti cannot show anything else), one prefix.

stdout is never written: on export it is the backup.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PREFIX = "imageos: "
LONGEST = 1 << 16  # characters of a line: a guest may have much to say
CUT = " [...] "
# Whether `debug` prints; set once by the settings. As global as stderr itself.
_debug = False
# Whether the terminal's line has a bar in it.
_drawn = False


def set_debug(enabled: bool) -> None:
    global _debug
    _debug = enabled


def info(message: str) -> None:
    """Print `message` as one line, whatever is in it: names of a guest's files may hold a newline."""
    _write(f"{PREFIX}{message}")


def warning(message: str) -> None:
    info(f"warning: {message}")


def debug(message: str) -> None:
    if _debug:
        for line in message.splitlines():
            _write(f"{PREFIX}debug: {line}")


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say what was done and how long it took, once it is done."""
    start = time.monotonic()
    debug(f"begin: {what}")
    yield
    info(f"{what} ({time.monotonic() - start:.1f} s)")


class Progress:
    """How far a long step is: a bar on a terminal, else a line every 10 seconds."""

    INTERVAL = 10.0  # seconds between lines in a log
    WIDTH = 20  # characters of the bar
    WORDS = len("100% of 1023 MiB, 1023 MiB/s, 99 min left")

    def __init__(self, what: str, total: int) -> None:
        """`total` in bytes, 0 if it is not known."""
        self._what = what
        self._total = total
        self._terminal = os.isatty(2)
        self._start = time.monotonic()
        self._first: int | None = None  # a download may begin in the middle
        self._next = self._start + (0.0 if self._terminal else self.INTERVAL)

    def update(self, done: int) -> None:
        """`done` of the total in bytes; may be called often."""
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
        _clear()


def progress_words(done: int, total: int, moved: int, seconds: float) -> list[str]:
    """How far a step is that has `moved` so many bytes in so many seconds."""
    rate = moved / seconds if seconds >= 1 else 0.0
    words = [f"{min(done / total, 1.0):.0%} of {size(total)}" if total else size(done)]
    if rate:
        words.append(f"{size(round(rate))}/s")
    if rate and total:
        words.append(f"{duration(max(0.0, (total - done) / rate))} left")
    return words


def bar(what: str, words: str, share: float | None, columns: int) -> str:
    """One line that fits into a terminal: what it is gives way first, then the bar. It does not move about."""
    drawn = f"[{'#' * round(share * Progress.WIDTH):<{Progress.WIDTH}}] " if share is not None else ""
    if columns < len(f"imageos: {drawn}") + Progress.WORDS:
        drawn = ""
    room = columns - 1 - len(f"imageos: {drawn}, ") - Progress.WORDS
    name = what if len(what) <= room else f"{what[: room - 3]}..." if room > 10 else ""
    return f"imageos: {drawn}{name}{', ' if name else ''}{words}"[: columns - 1]


def duration(seconds: float) -> str:
    """`40 s`, `5 min`, `2.5 h`."""
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
    """Take the bar away, so that a line can be written in its place."""
    global _drawn
    if _drawn:
        _drawn = False
        with suppress(OSError):
            os.write(2, b"\r\x1b[K")


def ascii_only(text: str) -> str:
    """`text` with everything but printable ASCII escaped, so that no guest can forge a line."""
    return "".join(c if " " <= c <= "~" else _escaped(c) for c in text)


def bounded(text: str, longest: int) -> str:
    """`text` as ASCII of at most so many characters; what is left out is in the middle: the end may be the cause."""
    end = longest // 4
    if len(text) > 2 * longest:  # escaping is slow
        text = text[:longest] + text[-longest:]
    text = ascii_only(text)
    return text if len(text) <= longest else f"{text[: longest - end - len(CUT)]}{CUT}{text[-end:]}"


def _escaped(character: str) -> str:
    if ord(character) < 0x80:
        return f"\\x{ord(character):02x}"
    return character.encode("ascii", "backslashreplace").decode()


def size(count: int) -> str:
    """A number of bytes as people read it: `512 MiB`, `1.5 GiB`."""
    value = float(min(count, 1 << 80))
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def _write(line: str) -> None:
    # One write per line: the lines of concurrent processes do not mix in Ganeti's log.
    text = bounded(line, LONGEST) + "\n"
    _clear()
    with suppress(OSError):  # nobody reads any more? The exit status still tells.
        os.write(2, text.encode("ascii"))
