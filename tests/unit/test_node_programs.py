"""The programs of the node. These tests start none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from imageos.errors import Failure
from imageos.node import programs

# Available programs


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the only directory in PATH, with `tar`, and a `zstd` that cannot be executed."""
    for name, mode in (("tar", 0o755), ("zstd", 0o644)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "xz").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_available(tools: Path) -> None:
    assert programs.available("tar")
    assert programs.available(f"{tools}/tar")
    assert not programs.available("zstd")
    assert not programs.available("xz")
    assert not programs.available("sh")


def test_require(tools: Path) -> None:
    programs.require()
    programs.require("tar", "tar")


def test_all_that_is_missing_is_named_with_its_package(tools: Path) -> None:
    with pytest.raises(Failure) as raised:
        programs.require("mkfs.xfs", "tar", "xz", "mkfs.ext4", "mkfs.ext3", "some-tool")
    assert str(raised.value) == "missing on this node: mkfs.xfs xz mkfs.ext4 mkfs.ext3 some-tool"
    assert str(raised.value.hint).startswith("install e2fsprogs some-tool xfsprogs xz-utils ")


def test_without_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    assert programs.available("sh")
    assert programs.environment()["PATH"] == programs.DEFAULT_PATH


def test_tools_get_nothing_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "OSP_USER_DATA", "PYTHONPATH", "SHIV_INTERPRETER", "LANG", "IFS"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("TMPDIR", "/run/imageos/tmp")
    assert programs.environment() == {"PATH": "/bin", "LC_ALL": "C", "HOME": "/root", "TMPDIR": "/run/imageos/tmp"}
    monkeypatch.delenv("TMPDIR")
    assert programs.environment() == {"PATH": "/bin", "LC_ALL": "C", "HOME": "/root"}


# Programs that cannot be started


# its content -> why it cannot be run, and the hint
SCRIPTS = {
    b"": ("it names no interpreter", "its first line has to do so"),
    b"echo done\n": ("it names no interpreter", "its first line has to do so"),
    b"#!\n": ("it names no interpreter", "its first line has to do so"),
    b"#!/bin/sh\r\necho done\r\n": ("its lines end in CRLF", "sed -i 's/\\r$//' "),
    b"#!/usr/bin/env python3\r\n": ("its lines end in CRLF", "sed -i"),
    b"#!/nowhere/perl -w\n": ("its interpreter /nowhere/perl is not on this node", "install that"),
    b"#!/usr/bin/env -S nosuch -u\n": ("its interpreter nosuch is not on this node", "install that"),
    b"#! /bin/sh -e\necho done\n": ("", ""),
    b"\xef\xbb\xbf#!/bin/sh\n": ("it begins with a byte order mark", "sed -i '1s/^\\xef"),
    b"#!/usr/bin/env -S A=b sh\n": ("", ""),
    # what only env can tell is not judged
    b"#!/usr/bin/env -S -u NOSUCH sh\n": ("", ""),
    b"#!/usr/bin/env -S -C /nosuch 'sh' -e\n": ("", ""),
    b"#!/usr/bin/env -S 'sh' -e\n": ("", ""),
    b"#!/usr/bin/env -S ${SHELL} -e\n": ("", ""),
    b"\x7fELF\2\1\1\0": ("", ""),
}


@pytest.mark.parametrize("content", SCRIPTS)
def test_scripts_that_the_kernel_does_not_run(content: bytes, tmp_path: Path) -> None:
    script = tmp_path / "hook"
    script.write_bytes(content)
    what, hint = SCRIPTS[content]
    said, advice = programs.script_fault(str(script))
    assert (said[: len(what) or None], bool(said)) == (what, bool(what))
    assert (advice or "").startswith(hint) and bool(advice) == bool(hint)
    told = programs.cannot_start(str(script), OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
    assert f"{script} cannot be run: {what or os.strerror(errno.ENOENT)}" in str(told)
    assert (told.hint or "").startswith(hint)


def test_program_that_is_missing() -> None:
    told = programs.cannot_start("mkfs.xfs", FileNotFoundError(errno.ENOENT, "No such file or directory"))
    assert (str(told), told.hint) == ("mkfs.xfs: not found", "install xfsprogs on this node")
    told = programs.cannot_start("mkfs.xfs", PermissionError(errno.EACCES, "Permission denied"))
    assert (str(told), told.hint) == ("mkfs.xfs: Permission denied", None)
