"""The code blocks of README.rst, for tests that execute them: `block(START)` returns the block that begins so.

tests/unit/test_readme.py fails on a block that no test asks for.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
TEXT = (CHECKOUT / "README.rst").read_text()
CONTRIBUTING = (CHECKOUT / "CONTRIBUTING.rst").read_text()


def blocks() -> Iterator[str]:
    """Yield each literal block: the indented lines after a paragraph that ends with `::`."""
    parts = re.split(r"(?m)^(?!\.\. ).*::\n\n", TEXT)
    for part in parts[1:]:
        yield textwrap.dedent(re.match(r"(?: .*\n|\n)*", part)[0]).strip("\n") + "\n"  # type: ignore[index]


def block(start: str) -> str:
    """Return the only block that begins with `start`."""
    (text,) = (text for text in blocks() if text.startswith(start))
    return text


def rows(title: str) -> list[list[str]]:
    """Return the cells of the list-table of CONTRIBUTING.rst whose first one is `title`, row by row."""
    tables = CONTRIBUTING.split(".. list-table::\n   :header-rows: 1\n\n")
    (table,) = (part for part in tables if part.startswith(f"   * - {title}\n"))
    table = re.match(r"(?: .*\n|\n)*", table)[0]  # type: ignore[index]
    return [
        [" ".join(cell.split()) for cell in re.split(r"(?m)^     - ", row)]
        for row in re.split(r"(?m)^   \* - ", table)[2:]
    ]


@dataclass(frozen=True)
class Rights:
    """A program's rights according to CONTRIBUTING.rst."""

    who: str
    capabilities: int  # as in /proc/PID/status
    devices: frozenset[str]  # by name, without disks

    @property
    def programs(self) -> set[str]:
        """Return the programs that the row names; none if it is about all others."""
        return set(re.findall(r"``([^` ]+)``", self.who))


def rights(numbers: Mapping[str, int]) -> list[Rights]:
    """Return the rows of programs that have fewer rights than root, from CONTRIBUTING.rst.

    `numbers` are those of capabilities, by name without CAP_.
    """
    return [
        Rights(who, sum(1 << numbers[name] for name in quoted(held)), frozenset(quoted(devices)) | in_every_dev())
        for who, held, devices in rows("program")
        if held != "all that root has"
    ]


def in_every_dev() -> frozenset[str]:
    """Return what the sentence above the table says of every program's /dev."""
    (devices,) = re.findall(r"in /dev besides ``([^`]+)``:\n", CONTRIBUTING)
    return frozenset(devices.split())


def quoted(text: str) -> list[str]:
    return [word for words in re.findall(r"``(.*?)``", text) for word in words.split()]
