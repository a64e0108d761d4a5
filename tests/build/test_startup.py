"""`--version` takes at most 1.5 times what an empty zipapp by the same shiv takes."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from checkouts import CHECKOUT

from build import SHEBANG

ROUNDS = 40
LIMIT = 1.5


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return empty_zipapp(tmp_path)


def empty_zipapp(directory: Path) -> Path:
    """Return an empty zipapp by shiv, which the same interpreter starts with the same options."""
    (directory / "site").mkdir()
    (directory / "site/empty.py").write_text("def main():\n    pass\n")
    zipapp = directory / "empty"
    shiv = [CHECKOUT / ".venv/bin/python3", "-Im", "shiv", "--site-packages", directory / "site"]
    options = ["--root", directory / "unpacked", "-e", "empty:main", "-p", SHEBANG, "-o", zipapp]
    subprocess.run([*shiv, *options], check=True)
    return zipapp


def seconds_of(*command: str | Path) -> float:
    environment = {"PATH": "/sbin:/bin:/usr/sbin:/usr/bin"}
    start = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def test_start_up(imageos: Path, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved, because other load varies; the first round only warms the caches."""
    rounds = [(seconds_of(imageos, "--version"), seconds_of(empty)) for _ in range(ROUNDS + 1)][1:]
    ours, theirs = (statistics.median(times) for times in zip(*rounds))
    with capsys.disabled():
        print(f" {1000 * ours:.1f} ms, empty zipapp {1000 * theirs:.1f} ms ", end="")
    assert ours <= LIMIT * theirs, f"{ours:.4f} s, empty: {theirs:.4f} s ({os.getloadavg()})"
