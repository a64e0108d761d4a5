"""Two builds are byte-identical, and need no network if everything is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkouts import copied, pythons


def built(checkout: Path, python: str = sys.executable, umask: int = 0o022) -> bytes:
    subprocess.run([python, "build.py"], cwd=checkout, check=True, umask=umask)
    return (checkout / "dist/imageos").read_bytes()


def test_another_umask_and_directory(imageos: Path, tmp_path: Path) -> None:
    checkout = copied(tmp_path / "another place", umask=0o077)
    assert built(checkout, umask=0o077) == imageos.read_bytes()
    assert (checkout / "dist/imageos").stat().st_mode & 0o7777 == 0o755


def test_executable_sources_and_strays(imageos: Path, tmp_path: Path) -> None:
    """Modes, times and files of editors have no effect."""
    checkout = copied(tmp_path / "checkout", umask=0)
    for path in checkout.glob("hooks.d/*"):
        path.chmod(0o755)
        os.utime(path, (1e9, 1e9))
    for stray in ("imageos/cli.py.orig", "hooks.d/grub~", "hooks.d/.grub.swp", "defaults/#x#"):
        (checkout / stray).write_text("stray")
    (checkout / "hooks.d/__pycache__").mkdir()
    (checkout / "hooks.d/__pycache__/grub.pyc").write_text("stray")
    assert built(checkout) == imageos.read_bytes()


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago"])
def test_other_environments(imageos: Path, tmp_path: Path, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("LC_ALL", "C")
    assert built(copied(tmp_path / "checkout")) == imageos.read_bytes()


def test_every_python_of_this_machine(imageos: Path, tmp_path: Path) -> None:
    """From nothing: this Python also makes .venv."""
    for number, python in enumerate(pythons()):
        checkout = copied(tmp_path / str(number), with_tools=False)
        assert built(checkout, python) == imageos.read_bytes(), python
        shutil.rmtree(checkout)


def test_changed_source_changes_the_file(imageos: Path, tmp_path: Path) -> None:
    checkout = copied(tmp_path / "checkout")
    with open(checkout / "imageos/cli.py", "a") as module:
        module.write("# changed\n")
    assert built(checkout) != imageos.read_bytes()


def test_without_network(imageos: Path, tmp_path: Path) -> None:
    checkout = copied(tmp_path / "checkout")
    subprocess.run(["unshare", "--net", sys.executable, "build.py"], cwd=checkout, check=True)
    assert (checkout / "dist/imageos").read_bytes() == imageos.read_bytes()


def test_broken_environment_is_made_anew(imageos: Path, tmp_path: Path) -> None:
    """As after an upgrade of the distribution: the Python of .venv is gone."""
    checkout = copied(tmp_path / "checkout")
    for name in ("python3", "python"):
        (checkout / ".venv/bin" / name).unlink()
    (checkout / ".venv/bin/python3").symlink_to("/nonexistent/python3")
    assert built(checkout) == imageos.read_bytes()


def test_failed_build_leaves_the_file_of_the_last(imageos: Path, tmp_path: Path) -> None:
    checkout = copied(tmp_path / "checkout")
    (checkout / "dist").mkdir()
    (checkout / "dist/imageos").write_text("of the last build")
    (checkout / ".venv/bin/python3").unlink()
    (checkout / ".venv/bin/python3").write_text(
        "#!/bin/sh\ncase $* in *shiv.cli*) exit 0 ;; esac\necho shiv is broken\nexit 3\n"
    )
    (checkout / ".venv/bin/python3").chmod(0o755)
    done = subprocess.run([sys.executable, "build.py"], cwd=checkout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    *_, printed, cause = done.stderr.splitlines()
    assert printed == "build: | shiv is broken"
    assert cause.startswith("build: failed with status 3: ")
    assert (checkout / "dist/imageos").read_text() == "of the last build"
    assert [path.name for path in (checkout / "dist").iterdir()] == ["imageos"]
