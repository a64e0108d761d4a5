"""Wrong calls, and calls by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trees
from support import HANGS, PATH, Name, Node


def call(*argv: Name, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [os.fspath(word) for word in argv],
        env={"PATH": PATH, **environment},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="ascii",
        timeout=HANGS,
    )


def last(text: str) -> str:
    lines = text.splitlines()
    return lines[-1] if lines else ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["--frobnicate"],
        ["create", "--frobnicate"],
        ["install", "--frobnicate"],
        ["create", "extra"],
    ],
)
def test_wrong_arguments(arguments: list[str], imageos: Path) -> None:
    done = call(imageos, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    if arguments:
        assert arguments[-1] in done.stderr


def test_unknown_command_names_the_known(imageos: Path) -> None:
    assert "create" in call(imageos, "creat").stderr


def test_called_by_another_name(imageos: Path, tmp_path: Path) -> None:
    """It runs from any directory under any name."""
    for name in ("imageos-1.0", "image os", "-odd"):
        copy = tmp_path / name
        shutil.copy2(imageos, copy)
        assert call(copy, "--version").stdout == call(imageos, "--version").stdout != ""


@pytest.mark.parametrize("name", ["create", "import", "export", "rename"])
def test_by_hand_without_ganetis_environment(name: str, node: Node) -> None:
    done = call(node.os_dir / name)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert "Ganeti" in done.stderr or "INSTANCE_NAME" in done.stderr
    assert last(done.stderr).startswith("imageos: ")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_descriptors(closed: str, node: Node, images: Path, disk: Callable[..., Path]) -> None:
    """What is opened next takes their place: the disk must not get messages."""
    node.image(images / "small.tar.zst", f"small-{trees.ARCH}.tar.zst")
    target = disk()
    environment = node.environment(target, OSP_IMAGE_NAME="small")
    done = call("sh", "-c", f'exec "$0" {closed}', node.os_dir / "create", **environment)
    assert done.returncode == 0, done.stderr
    assert b"imageos: " not in target.read_bytes()


def test_stdout_is_closed(node: Node) -> None:
    for command in ("--version", "doctor", "variants"):
        done = call("sh", "-c", f'exec "$0" {command} >&-', node.os_dir / "imageos")
        assert (done.returncode, last(done.stderr)) == (1, "imageos: cannot print: Bad file descriptor"), command


def test_from_a_directory_that_is_gone(imageos: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = call("sh", "-c", 'cd "$1" && rmdir "$1" && exec "$0" install --root here', imageos, gone)
    assert done.returncode == 1
    assert last(done.stderr) == "imageos: the current directory is not there any more: No such file or directory"


def test_as_a_command(node: Node, imageos: Path) -> None:
    """`imageos create` is the same as the link `create`."""
    assert call(imageos, "create").stderr == call(node.os_dir / "create").stderr != ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["create", "--help"], ["install", "--help"]])
def test_help_and_version_for_everybody(arguments: Sequence[str], imageos: Path, tmp_path: Path) -> None:
    public = Path("/tmp/imageos-for-everybody")
    shutil.copy2(imageos, public)
    public.chmod(0o755)
    try:
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(public), *arguments],
            env={"PATH": PATH},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="ascii",
        )
    finally:
        public.unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr
