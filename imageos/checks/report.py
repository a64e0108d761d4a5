"""The findings of the checks, and how they are shown."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from imageos import __version__, log
from imageos.errors import Failure

OK, NOTE, ERROR, UNKNOWN = "ok", "note", "error", "unknown"
MARKS = {OK: ("ok", "32"), NOTE: ("note", "33"), ERROR: ("ERROR", "1;31"), UNKNOWN: ("?", "2")}  # and colours


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    area: str
    level: str
    what: str
    hint: str = ""


@dataclass(frozen=True)
class Report:
    """The findings so far; a new finding belongs to `area`."""

    area: str = ""
    findings: list[Finding] = field(default_factory=list)

    def on(self, area: str) -> Report:
        """Return the same report for the checks of another area."""
        return dataclasses.replace(self, area=area)

    def say(self, level: str, what: str, hint: str | None = "") -> None:
        self.findings.append(Finding(self.area, level, log.ascii_only(what), log.ascii_only(hint or "")))

    def say_version(self, what: str, version: str, least: tuple[int, int], hint: str) -> None:
        """Report an error if `version` is older than `least`."""
        is_old = tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < least
        self.say(ERROR if is_old else OK, f"{what} {version}", hint if is_old else "")

    def failure(self, failure: Failure, of: str = "") -> None:
        """Report an error; without root, a denied permission is UNKNOWN instead."""
        denied = os.geteuid() != 0 and "Permission denied" in str(failure)
        self.say(UNKNOWN if denied else ERROR, f"{of}{failure}", "run it as root" if denied else failure.hint)

    @contextmanager
    def looking(self) -> Iterator[Report]:
        """Have a check that cannot look, for want of /sys or the like, end with a finding that says so."""
        try:
            yield self
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            self.say(UNKNOWN, f"{where}{error.strerror or error}: not all was looked at")

    @property
    def errors(self) -> int:
        return sum(finding.level == ERROR for finding in self.findings)


def as_json(report: Report) -> str:
    document = {
        "imageos": __version__,
        "node": socket.gethostname(),
        "can_deploy": not report.errors,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
    }
    return json.dumps(document, indent=2) + "\n"


def as_text(report: Report, colour: bool) -> str:
    lines = [f"imageos {__version__} on {socket.gethostname()}"]
    for area in dict.fromkeys(finding.area for finding in report.findings):
        lines += ["", area]
        for finding in join_short([finding for finding in report.findings if finding.area == area]):
            mark, number = MARKS[finding.level]
            first, *rest = textwrap.wrap(finding.what, 90, break_on_hyphens=False, break_long_words=False)
            lines.append(f"  \x1b[{number}m{mark:<5}\x1b[0m  {first}" if colour else f"  {mark:<5}  {first}")
            lines += [f"         {line}" for line in [*rest, *([f"-> {finding.hint}"] if finding.hint else [])]]
    return "\n".join([*lines, "", verdict(report)]) + "\n"


def join_short(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield the findings as they are shown: the short good ones as a single one, first."""
    short = [finding for finding in findings if finding.level == OK and re.fullmatch(r"[^/].{0,28}", finding.what)]
    if short:
        yield dataclasses.replace(short[0], what=", ".join(finding.what for finding in short))
    yield from (finding for finding in findings if finding not in short)


def verdict(report: Report) -> str:
    unknown = any(finding.level == UNKNOWN for finding in report.findings)
    if report.errors:
        errors = "1 error" if report.errors == 1 else f"{report.errors} errors"
        return f"{errors}: this node cannot deploy all its variants"
    return "this node can deploy its variants" + (", as far as could be seen" if unknown else "")
