"""What every module raises when it cannot go on."""

from __future__ import annotations

from collections.abc import Sequence


class Failure(Exception):
    """The command cannot succeed: the message is the last line that the user sees.

    `hint` says what to do about it, `details` are lines (a tool's last words) printed before both.
    """

    def __init__(self, message: str, hint: str | None = None, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.hint = hint
        self.details = tuple(details)


class TimedOut(Failure):
    """A program has taken longer than it may, and was ended."""


class Usage(Failure):
    """The command line is wrong (exit status 2)."""


class Interrupted(BaseException):
    """A signal asked us to stop: no `except Exception` may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def signal_name(number: int) -> str:
    import signal  # only on the way out

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
