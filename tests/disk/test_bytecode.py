"""install compiles the program for the node's Python. What is not of this program, this Python and root is not used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import run

OS_DIR = "usr/share/ganeti/os/image"


@pytest.fixture
def os_dir(installed: Path, tmp_path: Path) -> Path:
    shutil.copytree(installed / OS_DIR, tmp_path / "image", symlinks=True)
    return tmp_path / "image"


def rewrite(archive: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(archive) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in members.items():
            new.writestr(name, change(name, data))


def mark(name: str, data: bytes) -> bytes:
    """Change the version in the bytecode alone."""
    return data.replace(b"1.1", b"9.9") if name.endswith("/imageos/__init__.pyc") else data


def version(os_dir: Path) -> str:
    return run(os_dir / "imageos", "--version").split()[1]


def test_it_is_used(os_dir: Path) -> None:
    rewrite(os_dir / "imageos.compiled", mark)
    assert version(os_dir).startswith("9.9")


def other_python(name: str, data: bytes) -> bytes:
    return b"\0\0\r\n" + mark(name, data)[4:] if name.endswith(".pyc") else data


def other_build(os_dir: Path) -> None:
    data = bytearray((os_dir / "imageos").read_bytes())
    data[data.index(b'BUILD = "') + len('BUILD = "')] ^= 1  # another digit
    (os_dir / "imageos").write_bytes(data)


def missing(os_dir: Path) -> None:
    (os_dir / "imageos.compiled").unlink()


def damaged(os_dir: Path) -> None:
    os.truncate(os_dir / "imageos.compiled", 1000)


def directory(os_dir: Path) -> None:
    missing(os_dir)
    (os_dir / "imageos.compiled").mkdir()


@pytest.mark.parametrize(
    "change",
    [
        lambda os_dir: rewrite(os_dir / "imageos.compiled", other_python),
        other_build,
        missing,
        damaged,
        directory,
        lambda os_dir: os_dir.chmod(0o1777),
        lambda os_dir: os_dir.chmod(0o775),
        lambda os_dir: os.chown(os_dir, 1000, 0),
    ],
    ids=["python", "build", "missing", "damaged", "directory", "anybody", "group", "owner"],
)
def test_it_is_not_used(change: Callable[[Path], None], os_dir: Path) -> None:
    rewrite(os_dir / "imageos.compiled", mark)
    change(os_dir)
    assert version(os_dir).startswith("1.1")


def test_install_renews_it(os_dir: Path, tmp_path: Path) -> None:
    """Also from the installed program itself, which runs from the archive that it replaces."""
    root = tmp_path / "root"
    (root / OS_DIR).parent.mkdir(parents=True)
    os_dir.rename(root / OS_DIR)
    program = root / OS_DIR / "imageos"
    whole = (root / OS_DIR / "imageos.compiled").read_bytes()
    rewrite(root / OS_DIR / "imageos.compiled", other_python)
    run(program, "install", "--root", root)
    assert (root / OS_DIR / "imageos.compiled").read_bytes() == whole
    assert not list((root / OS_DIR).glob(".*"))


def test_a_program_that_is_cut_off(os_dir: Path, imageos: Path) -> None:
    """A copy that was interrupted says so itself, and doctor of another one finds it."""
    os.truncate(os_dir / "imageos", 300_000)
    ended = subprocess.run([os_dir / "create"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode and "this-file-is-cut-off-copy-it-again" in ended.stderr.splitlines()[-1]
    found = json.loads(run(imageos, "doctor", "--json", "--os-dir", os_dir, check=False))["findings"]
    assert {"level": "error", "what": f"{os_dir}/imageos is cut off, or no program"}.items() <= found[0].items()


def test_a_program_without_the_x_bit(os_dir: Path, imageos: Path) -> None:
    (os_dir / "imageos").chmod(0o644)
    found = json.loads(run(imageos, "doctor", "--json", "--os-dir", os_dir, check=False))["findings"]
    assert found[0]["what"] == f"{os_dir}/imageos cannot be executed" and "is not imageos" not in str(found)
    assert os.system(found[0]["hint"]) == 0 and version(os_dir)


def test_doctor_says_where_it_is_missing(os_dir: Path) -> None:
    words = "is compiled anew at each start"
    assert words not in run(os_dir / "imageos", "doctor", "--json", "--os-dir", os_dir, check=False)
    rewrite(os_dir / "imageos.compiled", other_python)
    assert words in run(os_dir / "imageos", "doctor", "--json", "--os-dir", os_dir, check=False)
