"""The built file runs anywhere, under any name, for any user, and leaves nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkouts import CHECKOUT, pythons

GANETI_PATH = {"PATH": "/sbin:/bin:/usr/sbin:/usr/bin"}
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]


def output(*command: str | Path, **options: object) -> str:
    """Return the stdout of a command that must succeed and print nothing on stderr."""
    options = {"env": GANETI_PATH, "stdin": subprocess.DEVNULL, **options}
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return str(done.stdout)


@pytest.fixture
def version(imageos: Path) -> str:
    shown = output(imageos, "--version")
    assert re.fullmatch(r"imageos [0-9][0-9.]*\S*\n", shown)
    return shown


@pytest.fixture
def public(imageos: Path, tmp_path: Path) -> Path:
    """Copy the file to where an ordinary user can reach it: basetemp is for root only."""
    directory = Path("/var/tmp", f"imageos-public-{os.getpid()}")
    directory.mkdir(mode=0o755)
    shutil.copy2(imageos, directory / "imageos")
    yield directory / "imageos"
    shutil.rmtree(directory)


# Paths and names


def test_any_place_and_name(imageos: Path, version: str, tmp_path: Path) -> None:
    for name in ("imageos", "renamed.pyz", "odd näme, with 'quotes'"):
        directory = tmp_path / f"in {name}"
        directory.mkdir()
        shutil.copy2(imageos, directory / name)
        assert output(directory / name, "--version") == version
        assert output(f"./{name}", "--version", cwd=directory) == version
        shutil.rmtree(directory)


def test_found_in_path(imageos: Path, version: str) -> None:
    path = {"PATH": f"{imageos.parent}:{GANETI_PATH['PATH']}"}
    assert output("sh", "-c", "imageos --version", env=path) == version
    relative = {"PATH": f"{imageos.parent.name}:{GANETI_PATH['PATH']}"}
    here = imageos.parent.parent
    assert output("sh", "-c", "imageos --version", env=relative, cwd=here) == version


def test_symlinks(imageos: Path, version: str, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(os.path.relpath(imageos, tmp_path))
    (tmp_path / "two").symlink_to("one")
    assert output("./two", "--version", cwd=tmp_path) == version


def test_survives_a_change_of_directory(imageos: Path, tmp_path: Path) -> None:
    """Called by a relative name, it imports by an absolute path."""
    (tmp_path / "link").symlink_to(imageos)
    script = """
import os, runpy, sys
os._exit = sys.exit
sys.argv = ["link", "--version"]
try:
    runpy.run_path("link", run_name="__main__")
except SystemExit:
    print(sys.modules["imageos"].__file__)
"""
    shown = output(sys.executable, "-ISc", script, cwd=tmp_path)
    assert shown.splitlines()[-1] == f"{imageos}/site-packages/imageos/__init__.py"


@pytest.mark.parametrize("command", ["create", "verify"])
def test_symlink_is_the_command(imageos: Path, tmp_path: Path, command: str) -> None:
    """The result is the same as with the command as argument, including errors without Ganeti's variables."""
    (tmp_path / command).symlink_to(imageos)
    results = [
        subprocess.run(argv, env=GANETI_PATH, capture_output=True, text=True, cwd=tmp_path)
        for argv in ([f"./{command}"], [str(imageos), command])
    ]
    assert results[0].returncode == results[1].returncode != 0
    assert results[0].stderr.splitlines()[-1] == results[1].stderr.splitlines()[-1]
    assert results[0].stderr.splitlines()[-1].startswith("imageos: ")
    assert "Traceback" not in results[0].stderr


# Users


@pytest.mark.parametrize("option", ["--version", "--help"])
@pytest.mark.parametrize("home", [None, "/nonexistent", "/proc"])
def test_ordinary_user(public: Path, option: str, home: str | None) -> None:
    env = {**GANETI_PATH, **({} if home is None else {"HOME": home})}
    assert output(*AS_NOBODY, public, option, env=env, cwd="/") == output(public, option)


def test_read_only_machine(imageos: Path, version: str) -> None:
    """No directory is writable."""
    script = (
        "for place in $(findmnt --noheadings --raw --output TARGET); do"
        ' mount -o remount,bind,ro "$place" 2>/dev/null || :; done;'
        ' ! touch /tmp/x /var/tmp/x /root/x 2>/dev/null && exec "$0" --version'
    )
    assert output("unshare", "--mount", "sh", "-c", script, imageos) == version


def test_writes_no_file(imageos: Path, version: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    home = {**GANETI_PATH, "HOME": str(tmp_path)}
    command = ["strace", "-f", "-o", trace, "-e", "trace=%file", imageos, "--version"]
    assert output(*command, env=home) == version
    changing = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|^\d+ +(mkdir|rename|link|symlink|unlink|chmod)")
    lines = [line for line in trace.read_text().splitlines() if changing.search(line)]
    assert [line for line in lines if '"/dev/' not in line] == []
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_deaf_to_the_surroundings(imageos: Path, version: str, tmp_path: Path) -> None:
    """The current directory, PYTHON* variables and shiv's own variables have no effect."""
    (tmp_path / "imageos").mkdir()
    for name in ("imageos/__init__.py", "os.py", "sitecustomize.py", "argparse.py", "re.py"):
        (tmp_path / name).write_text("raise SystemExit('taken over')\n")
    variables = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "SHIV_ROOT")
    env = {**GANETI_PATH, **{name: str(tmp_path) for name in variables}}
    env["SHIV_INTERPRETER"] = env["SHIV_ENTRY_POINT"] = "1"
    assert output(imageos, "--version", env=env, cwd=tmp_path) == version


# Pythons


def test_runs_under_every_python(imageos: Path, version: str) -> None:
    for python in pythons():
        assert output(python, "-IS", imageos, "--version") == version, python


def test_compiles_each_module_once(imageos: Path) -> None:
    script = f"""
import collections, runpy, sys
compiled = collections.Counter()
sys.addaudithook(lambda event, facts: compiled.update([str(facts[1])] if event == "compile" else []))
sys.argv = ["imageos", "doctor", "--help"]
try:
    runpy.run_path({str(imageos)!r}, run_name="__main__")
except SystemExit:
    print({{name: times for name, times in compiled.items() if times > 1 and "/site-packages/" in name}})
    print(sum("/site-packages/" in name for name in compiled) > 20)
"""
    for python in pythons():
        assert output(python, "-ISc", script).splitlines()[-2:] == ["{}", "True"], python


def test_old_python_is_told(imageos: Path) -> None:
    """Run the start code under a version that only claims to be old."""
    script = f"""
import os, runpy, sys
os._exit = sys.exit
sys.version_info = (3, 8, 2)
runpy.run_path({str(imageos)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "imageos: needs Python 3.9 or later; python3 in PATH is 3.8\n"


# Content


def sources(name: str) -> dict[str, bytes]:
    top = CHECKOUT / name
    paths = [path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(top)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", ["hooks.d", "defaults"])
def test_carries_hooks_and_defaults(imageos: Path, name: str) -> None:
    prefix = f"site-packages/imageos/{name}/"
    with zipfile.ZipFile(imageos) as archive:
        names = [member for member in archive.namelist() if member.startswith(prefix)]
        packed = {member[len(prefix) :]: archive.read(member) for member in names}
    assert packed == sources(name)
    assert packed


@pytest.mark.parametrize("name", ["hooks.d", "defaults"])
def test_importlib_finds_them(imageos: Path, name: str) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(imageos / "site-packages")!r})
from importlib.resources import files
for entry in sorted(one.name for one in (files("imageos") / {name!r}).iterdir()):
    print(entry)
"""
    expected = sorted(path.name for path in (CHECKOUT / name).iterdir() if path.name[0] not in "_.")
    for python in pythons():
        assert output(python, "-ISc", script).splitlines() == expected, python


def test_nothing_else_is_inside(imageos: Path) -> None:
    with zipfile.ZipFile(imageos) as archive:
        assert archive.testzip() is None
        members = archive.infolist()
    names = [member.filename for member in members]
    assert names == sorted(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"__main__.py", "environment.json", "site-packages"}
    assert {name.split("/")[1] for name in names if "/" in name} == {"imageos"}
    assert {member.external_attr >> 16 for member in members} == {0o100644}
    assert not [name for name in names if name.endswith((".pyc", "~")) or "__pycache__" in name]


def test_built_by_shiv(imageos: Path) -> None:
    with zipfile.ZipFile(imageos) as archive:
        assert b'"shiv_version": "1.0.8"' in archive.read("environment.json")
