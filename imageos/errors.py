"""The exceptions that modules raise when they cannot go on."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

DAMAGED = (errno.EUCLEAN, errno.EBADMSG, errno.EIO)  # the kernel's answers where a filesystem makes no sense


class Failure(Exception):
    """The command cannot succeed. The message is the last line that the user sees.

    `hint` says what to do about it. `details` are lines (the last output of a tool) printed before both.
    """

    def __init__(self, message: str, hint: str | None = None, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.hint = hint
        self.details = tuple(details)


@contextmanager
def explained(what: str, hint: str | None = None) -> Iterator[None]:
    """Turn an OSError into a Failure that says what could not be done, and the kernel's reason."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{what}: {error.strerror}", hint) from None


class TimedOut(Failure):
    """A program took longer than allowed and was killed."""


class Usage(Failure):
    """The command line is wrong (exit status 2)."""


class Interrupted(BaseException):
    """A signal asked us to stop. A BaseException, so that no `except Exception` catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def repair_hint(error: OSError) -> str | None:
    """Return what to do about an error in a file, if it is the fault of its filesystem."""
    if error.errno not in DAMAGED:
        return None
    return "a filesystem is damaged, or its disk fails: dmesg says which; repair the guest's in the guest or the image"


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ` (did you mean OTHER?)` for a message about a mistyped word; empty if none of `words` is near."""
    import difflib  # late: only a failure or a warning needs it

    near = difflib.get_close_matches(word, [*words], 1)
    return f" (did you mean {near[0]}?)" if near else ""


def signal_name(number: int) -> str:
    import signal  # late: only a failure needs it

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
