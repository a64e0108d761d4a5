"""What the checks have found, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from imageos import __version__, log
from imageos.errors import Failure

OK, NOTE, ERROR, UNKNOWN = "ok", "note", "error", "unknown"
COLOURS = {OK: "32", NOTE: "33", ERROR: "1;31", UNKNOWN: "2"}
SHOWN = {OK: "ok", NOTE: "note", ERROR: "ERROR", UNKNOWN: "?"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    level: str
    what: str
    hint: str = ""


@dataclass(frozen=True)
class Report:
    """What was found so far; `area` is what is being looked at."""

    area: str = ""
    findings: list[Finding] = field(default_factory=list)

    def on(self, area: str) -> Report:
        """The same report, for the checks of an area."""
        return dataclasses.replace(self, area=area)

    def say(self, level: str, what: str, hint: str | None = "") -> None:
        self.findings.append(Finding(self.area, level, log.ascii_only(what), log.ascii_only(hint or "")))

    def say_version(self, what: str, version: str, least: tuple[int, int], hint: str) -> None:
        """An error if `version` is older than `least`."""
        is_old = tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < least
        self.say(ERROR if is_old else OK, f"{what} {version}", hint if is_old else "")

    def failure(self, failure: Failure, of: str = "") -> None:
        """A problem; without root only a thing that could not be looked at, if that was the reason."""
        denied = os.geteuid() != 0 and "Permission denied" in str(failure)
        self.say(UNKNOWN if denied else ERROR, f"{of}{failure}", "run it as root" if denied else failure.hint)

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
        for finding in joined([one for one in report.findings if one.area == area]):
            mark = painted(f"{SHOWN[finding.level]:<5}", COLOURS[finding.level], colour)
            first, *rest = wrapped(finding.what)
            lines += [f"  {mark}  {first}", *(f"         {line}" for line in rest)]
            lines += [f"         -> {finding.hint}"] if finding.hint else []
    return "\n".join([*lines, "", verdict(report)]) + "\n"


def wrapped(text: str) -> list[str]:
    """Lines of it; a number stays with what it is a number of."""
    kept = re.sub(r" (?=\d)|(?<=\d) (?=[KMGT]iB|bytes)", "\0", text)
    lines = textwrap.wrap(kept, 90, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\0", " ") for line in lines]


def joined(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Findings as they are shown: the good ones that are a word or two each, together."""
    short = [one for one in findings if one.level == OK and len(one.what) < 30 and not one.what.startswith("/")]
    if short:
        yield dataclasses.replace(short[0], what=", ".join(one.what for one in short))
    yield from (one for one in findings if one not in short)


def verdict(report: Report) -> str:
    unknown = any(finding.level == UNKNOWN for finding in report.findings)
    if report.errors:
        return (
            f"{report.errors} {'error' if report.errors == 1 else 'errors'}: this node cannot deploy all its variants"
        )
    return "this node can deploy its variants" + (", as far as could be seen" if unknown else "")


def painted(text: str, colour: str, enabled: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if enabled else text
