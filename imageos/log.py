"""Messages to the operator: stderr, ASCII (Ganeti cannot show anything else), one prefix.

stdout is never written: on export it is the backup.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PREFIX = "imageos: "
# Whether `debug` prints; set once by the settings. As global as stderr itself.
_debug = False


def set_debug(enabled: bool) -> None:
    global _debug
    _debug = enabled


def info(message: str) -> None:
    """Print `message`, every line of it with the prefix."""
    for line in message.splitlines() or [""]:
        _write(f"{PREFIX}{line}\n")


def warning(message: str) -> None:
    info(f"warning: {message}")


def debug(message: str) -> None:
    if _debug:
        for line in message.splitlines():
            _write(f"{PREFIX}debug: {line}\n")


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
    WIDTH = 30  # characters of the bar

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._start = time.monotonic()
        self._terminal = os.isatty(2)
        self._next = self._start + (0.0 if self._terminal else self.INTERVAL)

    def update(self, done: int) -> None:
        """`done` of the total in bytes; may be called often."""
        now = time.monotonic()
        if now < self._next or not self._total:
            return
        self._next = now + (0.2 if self._terminal else self.INTERVAL)
        share = min(done / self._total, 1.0)
        elapsed = now - self._start
        left = f", {elapsed / share - elapsed:.0f} s left" if share > 0.01 and elapsed > 1 else ""
        text = f"{self._what}: {share:4.0%} of {size(self._total)}{left}"
        if self._terminal:
            bar = "#" * round(share * self.WIDTH)
            os.write(2, f"\r\x1b[Kimageos: [{bar:<{self.WIDTH}}] {ascii_only(text)}".encode("ascii"))
        else:
            info(text)

    def close(self) -> None:
        if self._terminal:
            os.write(2, b"\r\x1b[K")


def ascii_only(text: str) -> str:
    """`text` with everything but printable ASCII escaped, so that no guest can forge a line."""
    return "".join(c if " " <= c <= "~" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if ord(character) < 0x80:
        return f"\\x{ord(character):02x}"
    return character.encode("ascii", "backslashreplace").decode()


def size(count: int) -> str:
    """A number of bytes as people read it: `512 MiB`, `1.5 GiB`."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def _write(line: str) -> None:
    # One write per line: the lines of concurrent processes do not mix in Ganeti's log.
    text = ascii_only(line.rstrip("\n")) + "\n"
    with suppress(OSError):  # nobody reads any more? The exit status still tells.
        os.write(2, text.encode("ascii"))
