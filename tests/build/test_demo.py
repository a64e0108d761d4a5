"""`sudo ./build.py demo` does what README says, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import CHECKOUT, copied
from debian import INSIDE, cached
from support import listing


@pytest.fixture
def checkout(imageos: Path, tmp_path: Path) -> Path:
    return copied(tmp_path / "checkout")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Return the directory for the demonstration's files, which must be empty afterwards. /etc must not change."""
    place = tmp_path / "scratch"
    place.mkdir()
    etc = listing(Path("/etc"))
    yield place
    assert listing(Path("/etc")) == etc
    assert list(place.iterdir()) == []


def start(checkout: Path, scratch: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "build.py", *arguments],
        cwd=checkout,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    shown, _ = process.communicate(timeout=3600)
    assert process.returncode == status, shown
    return shown


def test_demo(checkout: Path, scratch: Path) -> None:
    shown = finished(start(checkout, scratch, "demo"))
    assert "Disklabel type: dos" in shown
    assert re.search(r"^UUID=\S+\s+/\s+ext4\s", shown, re.MULTILINE), "fstab"
    assert re.search(r"^UUID=\S+\s+/boot\s+ext\d\s", shown, re.MULTILINE), "fstab"
    assert re.search(r"/etc/hostname of the guest\ninst1", shown)
    assert re.search(r"inst1.example.org was made from busybox; its root is on /dev/\S+", shown)
    assert re.search(r"^build: created in [0-9.]+ s$", shown, re.MULTILINE)


def test_demo_debian_boots(checkout: Path, scratch: Path) -> None:
    (CHECKOUT / ".cache").mkdir(exist_ok=True)
    (checkout / ".cache").symlink_to(CHECKOUT / ".cache")
    shown = finished(start(checkout, scratch, "demo", "--debian"))
    assert "inst1 login:" in shown
    assert re.search(r"^build: login prompt after [0-9]+ s$", shown, re.MULTILINE)


def test_recipe_sees_no_space(tmp_path: Path) -> None:
    """debootstrap fails in a checkout with a space in its path."""
    cache = tmp_path / "a checkout/.cache"
    made = cached(cache / "systems/thing-1", 'echo "$@" >"$1/seen"', f"{cache}/image.tar", "word")
    scratch, image, word = (made / "seen").read_text().split()
    assert (Path(scratch).parent, image, word) == (Path(INSIDE, "systems"), f"{INSIDE}/image.tar", "word")


def test_failed_create_fails_the_demo(checkout: Path, scratch: Path) -> None:
    with open(checkout / "imageos/commands/create.py", "a") as module:
        module.write("\n\ndef main(arguments):\n    raise SystemExit(7)\n")
    shown = finished(start(checkout, scratch, "demo"), status=1)
    assert shown.splitlines()[-1] == "build: create ended with status 7"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["build: built", "create, as Ganeti", "partitioned"])
def test_interrupted(checkout: Path, scratch: Path, number: signal.Signals, moment: str) -> None:
    build = checkout / "build.py"
    build.write_text(build.read_text().replace("\nset -eu\n", "\nset -eu\nsleep 1000\n", 1))  # in the demo's hook
    assert "sleep 1000" in build.read_text(), "it could end before the signal"
    process = start(checkout, scratch, "demo")
    assert process.stdout is not None
    for line in process.stdout:
        if moment in line:
            break
    process.send_signal(number)
    finished(process, status=128 + number)
