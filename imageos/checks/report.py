"""The findings of the checks, and how they are shown."""

from __future__ import annotations

import json
import os
import re
import socket
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from imageos import __version__, log
from imageos.errors import Failure

OK, NOTE, ERROR, UNKNOWN = "ok", "note", "error", "unknown"
MARKS = {OK: ("ok", "32"), NOTE: ("note", "33"), ERROR: ("ERROR", "1;31"), UNKNOWN: ("?", "2")}  # and colours


class Finding(NamedTuple):
    level: str
    what: str
    hint: str


Report = Mapping[str, Sequence[Finding]]  # by area, as they are shown


def finding(level: str, what: str, hint: str | None = "") -> Finding:
    return Finding(level, log.ascii_only(what), log.ascii_only(hint or ""))


ok, note, error, unknown = (partial(finding, level) for level in (OK, NOTE, ERROR, UNKNOWN))


def version(what: str, found: str, least: tuple[int, int], hint: str) -> Finding:
    """Return an error if the version `found` is older than `least`."""
    is_old = tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < least
    return error(f"{what} {found}", hint) if is_old else ok(f"{what} {found}")


def failed(failure: Failure, of: str = "") -> Finding:
    """Return an error; without root, a denied permission is UNKNOWN instead."""
    denied = os.geteuid() != 0 and "Permission denied" in str(failure)
    return unknown(f"{of}{failure}", "run it as root") if denied else error(f"{of}{failure}", failure.hint)


def findings(checks: Iterable[Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of all checks; one that cannot go on, for want of /sys or the like, ends with why."""
    for check in checks:
        try:
            yield from check
        except Failure as failure:
            yield failed(failure)
        except OSError as problem:
            where = f"{os.fsdecode(problem.filename)}: " if problem.filename else ""
            yield unknown(f"{where}{problem.strerror or problem}: not all was looked at")


def levels(report: Report) -> list[str]:
    return [found.level for area in report.values() for found in area]


def as_json(report: Report) -> str:
    document = {
        "imageos": __version__,
        "node": socket.gethostname(),
        "can_deploy": ERROR not in levels(report),
        "findings": [{"area": area, **found._asdict()} for area in report for found in report[area]],
    }
    return json.dumps(document, indent=2) + "\n"


def as_text(report: Report, colour: bool) -> str:
    lines = [f"imageos {__version__} on {socket.gethostname()}"]
    for area, found in report.items():
        lines += ["", area] if found else []
        for shown in join_short(found):
            mark, number = MARKS[shown.level]
            first, *rest = textwrap.wrap(shown.what, 90, break_on_hyphens=False, break_long_words=False)
            lines.append(f"  \x1b[{number}m{mark:<5}\x1b[0m  {first}" if colour else f"  {mark:<5}  {first}")
            lines += [f"         {line}" for line in [*rest, *([f"-> {shown.hint}"] if shown.hint else [])]]
    return "\n".join([*lines, "", verdict(report)]) + "\n"


def join_short(found: Sequence[Finding]) -> Iterator[Finding]:
    """Yield the findings as they are shown: the short good ones as a single one, first."""
    short = [each for each in found if each.level == OK and re.fullmatch(r"[^/].{0,28}", each.what)]
    if short:
        yield ok(", ".join(each.what for each in short))
    yield from (each for each in found if each not in short)


def verdict(report: Report) -> str:
    errors = levels(report).count(ERROR)
    if errors:
        return f"{errors} error{'s' * (errors != 1)}: this node cannot deploy all its variants"
    return "this node can deploy its variants" + (", as far as could be seen" if UNKNOWN in levels(report) else "")
