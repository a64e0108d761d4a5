"""What is kept of the last trial of each variant on this node, as one small file of JSON for each.

It is about one image as it was then: whoever shows it says of which date that was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time

from imageos import log
from imageos.installation import SITE_RECORD

DIRECTORY = f"{os.path.dirname(SITE_RECORD)}/trials"


@dataclasses.dataclass(frozen=True)
class Trial:
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
        with open(_path(name), encoding="utf-8") as file:
            values = json.load(file)
        trial = Trial(**values)
        str(trial)  # fails for values of other types
        return trial
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def keep(name: str, trial: Trial) -> None:
    """Keep the result of the last trial of the variant `name`, in the place of the one before."""
    path = _path(name)
    try:
        os.makedirs(DIRECTORY, exist_ok=True)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(trial), file, indent=1)
        os.rename(f"{path}.new", path)
    except OSError as error:  # which is no fault of the variant
        log.warning(f"the result is not kept in {path}: {error.strerror}")


def _path(name: str) -> str:
    return f"{DIRECTORY}/{name}.json"
