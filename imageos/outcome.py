"""How a command or hook ends: what it raises becomes messages, the cause last, and an exit status."""

from __future__ import annotations

import os
from collections.abc import Callable
from zipimport import ZipImportError

from imageos import log
from imageos.errors import Failure, Interrupted, Usage, signal_name

LONGEST = 1900  # characters of a hint and of a cause: Ganeti shows the last 4 KiB of the log


def guard(call: Callable[[], int]) -> int:
    """The exit status of `call`; for what it raises, messages with the cause on the last line."""
    # Ganeti's umask is 077: what is made for a guest must be readable to its users.
    os.umask(0o022)
    try:
        return call()
    except Failure as failure:
        for line in failure.details:
            _say(f"| {line}")  # a program's words, or a guest's, that nobody takes for ours
        if failure.hint:
            _say(f"hint: {failure.hint}")
        _say(str(failure))
        return 2 if isinstance(failure, Usage) else 1
    except Interrupted as interrupted:
        log.info(f"ended by {signal_name(interrupted.signum)}")
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        log.info("ended by SIGINT")
        return 130
    except OSError as error:
        log.debug(_traceback())
        if isinstance(error, PermissionError) and os.geteuid():
            log.info("hint: run it with sudo")
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}")
        return 1
    except ZipImportError:  # its modules are where the other version has something else
        log.info("imageos was replaced by another version while it started: call it again")
        return 1
    except Exception as error:
        for line in _traceback().splitlines():
            _say(f"| {line}")
        _say(f"internal error, please report it with the lines above: {type(error).__name__}: {error}")
        return 1


def _say(line: str) -> None:
    log.info(log.bounded(line, LONGEST))


def _traceback() -> str:
    import traceback

    return traceback.format_exc()
