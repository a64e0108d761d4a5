"""What is kept of the last trial of each variant on this node, as one small file of JSON for each.

It is about one image as it was then: whoever shows it says of which date that was.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from imageos import log
from imageos.installation import TRIALS, content


class Trial(NamedTuple):
    """The result of `imageos variants try`; times are seconds since 1970."""

    tried: float
    image: str = ""  # path or URL, without secrets; empty: it was not found
    image_time: float | None = None  # of the last change of the image's file
    firmware: str = "bios"  # or uefi
    problem: str = ""  # one line; empty: the guest came up

    @property
    def is_ok(self) -> bool:
        return not self.problem

    def is_of_other(self, image_time: float | None) -> bool:
        """Return True if the image, whose file was last changed then, is another one now; None: it is not there."""
        return None not in (image_time, self.image_time) and image_time != self.image_time

    def __str__(self) -> str:
        of = f" with the image of {day(self.image_time)}" if self.image_time is not None else ""
        firmware = "" if self.firmware == "bios" else f" by {self.firmware.upper()}"
        return f"tried{firmware} on {day(self.tried)}{of}: {self.problem or 'ok'}"


def day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def last_trial(name: str) -> Trial | None:
    """Return what is known of the last trial of the variant `name`; None if there was none, or nobody can read it."""
    try:
        trial = Trial(**json.loads(content(_path(name)) or b""))
        str(trial)  # fails for values of other types
        return trial
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def keep(name: str, trial: Trial) -> None:
    """Keep the result of the last trial of the variant `name`, in the place of the one before."""
    path = _path(name)
    try:
        os.makedirs(TRIALS, exist_ok=True)
        with replacing(path) as new, open(new, "x", encoding="utf-8") as file:
            json.dump(trial._asdict(), file, indent=1)
    except OSError as error:  # which is no fault of the variant
        log.warning(f"the result is not kept in {path}: {error.strerror}")


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield the name of a new file, which then takes the place of `path`; others may do so now, too."""
    new = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        yield new
        os.rename(new, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(new)
        raise


def _path(name: str) -> str:
    return f"{TRIALS}/{name}.json"
