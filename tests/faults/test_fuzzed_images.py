"""Hundreds of hostile dumps and archives on a node to throw away do not change that node (tests/fuzz/fuzz.py)."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz/fuzz.py"


def fuzz(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, FUZZ, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout.decode(errors="backslashreplace")


@pytest.mark.parametrize("seed", ["1", ""], ids=["fixed", "another"])
def test_nothing_of_the_node_is_touched(seed: str) -> None:
    """The output shows the random seed."""
    status, said = fuzz("30", seed or str(time.time_ns() % 1_000_000))
    assert status == 0, said
    count = Counter({what: int(number) for what, number in re.findall(r"((?:dump|tarball) [a-z ]+): (\d+)", said)})
    for kind in ("dump", "tarball"):  # not all images are refused at once
        deep = count[f"{kind} deployed"] + count[f"{kind} refused after files were made"]
        assert deep > count[f"{kind} refused before"] / 2, said
    assert count["dump deployed"] + count["tarball deployed"], said


def test_it_would_be_seen() -> None:
    """Without their own roots, restore and tar change files of the node."""
    status, said = fuzz("300", "1", "--weakened")
    assert status == 1, said
    for kind in ("dump", "tarball"):
        assert re.search(rf"\({kind}\): (/upper/|/dev/|beside the target).* (was|\[)", said), said
