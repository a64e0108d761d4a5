"""What is mounted, as the kernel tells it: /proc/self/mountinfo (proc(5)) as values."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mount:
    place: str
    source: str


def current(mountinfo: str = "/proc/self/mountinfo") -> list[Mount]:
    """All mounts of this mount namespace, in the order in which they were made."""
    # newline: the kernel does not escape a carriage return in a path, and it ends no line
    with open(mountinfo, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse(file.read())


def parse(text: str) -> list[Mount]:
    return [_mount(line) for line in text.split("\n") if line]


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    return Mount(_unescape(before.split(" ")[4]), _unescape(after.split(" ")[1]))


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
