"""Copy the checkout for builds, so that no test changes the one that it runs from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = ("build.py", "manual.py", "imageos", "hooks.d", "defaults", "tests")


def copied(place: Path, with_tools: bool = True, umask: int = 0o022) -> Path:
    """Make a second checkout; with_tools: copy .venv, too."""
    before = os.umask(umask)
    try:
        for name in [*SOURCES, *([".venv"] if with_tools else [])]:
            copy(CHECKOUT / name, place / name, modes=name == ".venv")
        (place / "build.py").chmod(0o755)
    finally:
        os.umask(before)
    return place


def copy(source: Path, target: Path, modes: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        shutil.copyfile(source, target)
        return
    function = shutil.copy2 if modes else shutil.copyfile
    # skip files that Python is writing now, which would vanish during the copy
    ignore = shutil.ignore_patterns("*.pyc.*" if modes else "__pycache__")
    shutil.copytree(source, target, symlinks=True, copy_function=function, ignore=ignore)


def pythons() -> list[str]:
    """Return one Python of each usable version on this machine, our own first."""
    by_version = {sys.version_info[:2]: sys.executable}
    names = [f"python3.{minor}" for minor in range(9, 20)]
    directories = [*os.get_exec_path(), "/usr/local/bin", "/usr/bin"]
    directories += [str(path) for path in Path.home().glob(".pyenv/versions/*/bin")]
    for path in (Path(directory, name) for directory in directories for name in names):
        version = version_of(path)
        if version is not None:
            by_version.setdefault(version, str(path))
    return list(by_version.values())


def version_of(python: Path) -> tuple[int, int] | None:
    """Return the version; None if it is no Python or cannot make a virtual environment."""
    if not python.exists():
        return None
    check = "import sys, ensurepip, zipfile; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", check], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)
