"""Turn the exception that ends a command or hook into messages, the cause last, and an exit status."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from zipimport import ZipImportError

from imageos import log
from imageos.errors import Failure, Interrupted, Usage, repair_hint, signal_name
from imageos.node import limits

_reserve: list[bytes] = []  # freed at a failure: where no memory is left, its cause can be said nevertheless
with suppress(MemoryError):
    _reserve.append(bytes(4 << 20))  # a bytearray would write its zeroes, and so take the memory
LONGEST = 1900  # characters of a hint or cause; Ganeti shows the last 4 KiB of the log


def guard(call: Callable[[], int]) -> int:
    """Return the exit status of `call`. Log what it raises, with the cause on the last line."""
    # Ganeti's umask is 077, but a guest's users must be able to read its files.
    os.umask(0o022)
    try:
        return call()
    except Failure as failure:
        for line in failure.details:
            _say(f"| {line}")  # `|` marks the output of programs, also the guest's, as not ours
        if failure.hint:
            _say(f"hint: {failure.hint}")
        _say_cause(str(failure))
        return 2 if isinstance(failure, Usage) else 1
    except Interrupted as interrupted:
        log.info(f"ended by {signal_name(interrupted.signum)}")
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        log.info("ended by SIGINT")
        return 130
    except OSError as error:
        _reserve.clear()
        log.debug(_traceback)
        hint = "run it with sudo" if isinstance(error, PermissionError) and os.geteuid() else repair_hint(error)
        if hint:
            log.info(f"hint: {hint}")
        _say_cause(f"{_where(error)}{error.strerror or error}")
        return 1
    except ZipImportError:  # the new file has other data at the offsets of our modules
        log.info("imageos was replaced by another version while it started: call it again")
        return 1
    except Exception as error:
        _reserve.clear()
        if _is_want_of_memory(error):
            limit, _ = resource.getrlimit(resource.RLIMIT_AS)
            bound = "the node has" if limit == resource.RLIM_INFINITY else f"its limit of {log.size(limit)}"
            _say_cause(f"imageos needs more memory than {bound}")
            return 1
        if isinstance(error, RuntimeError) and limits.cause(str(error)):  # of Python's own: no thread can be started
            _say_cause(str(error))
            return 1
        for line in _traceback().splitlines():
            _say(f"| {line}")
        _say(f"internal error, please report it with the lines above: {type(error).__name__}: {error}")
        return 1


def _is_want_of_memory(error: Exception) -> bool:
    """Return whether memory is all that was missing: Python has other errors for that where it loads a module."""
    _, limit = resource.getrlimit(resource.RLIMIT_AS)
    is_of_python = isinstance(error, SystemError) or "failed to map segment" in str(error)
    return isinstance(error, MemoryError) or (is_of_python and limit != resource.RLIM_INFINITY)


def _where(error: OSError) -> str:
    if error.filename and not isinstance(error.filename, int):  # it may be a descriptor
        return f"{os.fsdecode(error.filename)}: "
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current directory is not there any more: "
    return ""


def _say_cause(what: str) -> None:
    """Say `what` has happened, and the limit that is the cause of it, if one is."""
    limit = limits.cause(what)
    _say(f"{log.shorten(what, LONGEST - len(limit) - 2)}: {limit}" if limit else what)


def _say(line: str) -> None:
    log.info(log.shorten(line, LONGEST))


def _traceback() -> str:
    import traceback

    return traceback.format_exc()
