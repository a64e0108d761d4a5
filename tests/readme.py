"""The code blocks of README.rst, for the tests that do what they say: `block(START)` is the one that starts so.

tests/unit/test_readme.py fails on a block that no test asks for.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
TEXT = (CHECKOUT / "README.rst").read_text()


def blocks() -> Iterator[str]:
    """Each literal block: the indented lines behind a paragraph that ends with `::`."""
    parts = re.split(r"(?m)^(?!\.\. ).*::\n\n", TEXT)
    for part in parts[1:]:
        yield textwrap.dedent(re.match(r"(?: .*\n|\n)*", part)[0]).strip("\n") + "\n"  # type: ignore[index]


def block(start: str) -> str:
    """The only block that begins with `start`."""
    (found,) = (text for text in blocks() if text.startswith(start))
    return found
