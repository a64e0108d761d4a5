"""The functions of build.py. These tests build nothing and start no process."""

from __future__ import annotations

import ast
import io
import sys
import zipfile
from pathlib import Path, PurePath

import pytest

import build
import packages
from imageos.node import programs


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.run", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)


# Arguments


@pytest.mark.parametrize(
    "arguments",
    [["deploy"], ["--debian"], ["demo", "--fedora"], ["demo", "--debian", "x"], ["--version"]],
)
def test_unknown_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: ./build.py")
    assert output.err.splitlines()[-1].startswith("build: unknown arguments: ")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([option]) == 0
    shown = capsys.readouterr().out
    for command in ("./build.py demo", "./build.py demo --debian", "./build.py test"):
        assert command in shown


@pytest.mark.parametrize("arguments", [["demo"], ["demo", "--debian"], ["test"], ["bench"]])
def test_what_needs_root_says_so(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    command = " ".join(arguments)
    assert build.main(arguments) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"build: hint: sudo ./build.py {command}",
        f"build: {command} needs root",
    ]


def test_errors_of_the_system_are_no_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "/checkout/dist/imageos")

    monkeypatch.setattr(build, "build", fail)
    assert build.main([]) == 1
    hint, cause = capsys.readouterr().err.splitlines()
    assert hint.startswith("build: hint: ")
    assert cause == "build: /checkout/dist/imageos: Permission denied"


# Needs


def test_tools_are_pinned() -> None:
    for tool in build.TEST_TOOLS:
        assert tool.count("==") == 1
    assert set(build.BUILD_TOOLS) < set(build.TEST_TOOLS)


def only(monkeypatch: pytest.MonkeyPatch, *commands: str) -> None:
    """Pretend that the machine has these commands and no other."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name in commands else None)


NEEDS = {"mkfs.xfs": "xfsprogs", "gnt-x": "ganeti"}


def test_packages_on_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "apt-get")
    assert build.install_commands(["xfsprogs", "ganeti", "ganeti"]) == [
        ["apt-get", "update"],
        ["apt-get", "install", "--yes", "--no-install-recommends", "ganeti", "xfsprogs"],
    ]


def test_packages_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    with pytest.raises(build.BuildError, match="no apt-get here; install what Debian has in ganeti, xfsprogs"):
        build.install_packages(NEEDS)


def test_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, "apt-get")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(build.BuildError) as raised:
        build.install_packages(NEEDS)
    line = "sudo apt-get update && sudo apt-get install --yes --no-install-recommends"
    assert str(raised.value).endswith(f": {line} ganeti xfsprogs")
    assert "missing: mkfs.xfs" in capsys.readouterr().err


def test_nothing_is_installed_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "mkfs.xfs", "gnt-x")
    build.install_packages(NEEDS)


def test_present(tmp_path: Path) -> None:
    assert build.present("sh")
    assert not build.present("no-such-command")
    assert build.present(str(tmp_path))
    assert not build.present(str(tmp_path / "absent"))
    assert build.present("python:zipfile")
    assert not build.present("python:no_such_module")


# The archive


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imageos/cli.py", True),
        ("imageos/commands/create.py", True),
        ("imageos/__pycache__/cli.cpython-311.pyc", False),
        ("imageos/cli.py~", False),
        ("imageos/.#cli.py", False),
        ("hooks.d/grub", True),
        ("hooks.d/grub~", False),
        ("hooks.d/.grub.swp", False),
        ("hooks.d/__pycache__/grub.cpython-311.pyc", False),
        ("defaults/variants/default.conf", True),
        ("defaults/.git/config", False),
    ],
)
def test_what_is_packed(name: str, expected: bool) -> None:
    assert build.is_source(PurePath(name)) is expected


def test_where_it_is_packed() -> None:
    assert build.staged_name(PurePath("imageos/cli.py")) == PurePath("imageos/cli.py")
    assert build.staged_name(PurePath("hooks.d/grub")) == PurePath("imageos/hooks.d/grub")


def test_members_do_not_depend_on_the_builder(tmp_path: Path) -> None:
    header = build.member_header("a")
    assert header.date_time == (1980, 1, 1, 0, 0, 0)
    assert header.create_system == 3
    assert header.external_attr >> 16 == 0o100644
    assert header.compress_type == zipfile.ZIP_STORED


def test_start_replaces_the_bootstrap(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("_bootstrap/__init__.py", "")
        archive.writestr("__main__.py", "import _bootstrap")
        archive.writestr("site-packages/imageos/cli.py", "x = 1")
    (tmp_path / "shiv").write_bytes(packed.getvalue())
    members = build.archive_members(tmp_path / "shiv")
    start = members.pop("__main__.py").decode()
    assert members == {"site-packages/imageos/cli.py": b"x = 1"}
    assert start == build.MAIN.replace("@BUILD@", build.build_name(members))


def test_another_build_has_another_name() -> None:
    names = [
        build.build_name(members) for members in ({}, {"a": b"1"}, {"a": b"2"}, {"b": b"2"}, {"a": b"1", "b": b""})
    ]
    assert len(set(names)) == len(names)


def test_old_python_can_read_the_start() -> None:
    tree = ast.parse(build.MAIN, feature_version=(3, 5))
    first = next(node for node in tree.body if not isinstance(node, ast.Import))
    assert isinstance(first, ast.If), "the version is checked before anything of ours is imported"
    assert "version_info" in ast.dump(first.test)


# The demonstration


def test_helper_that_fails_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(build.BuildError, match="status 1"), build.helpers_of_the_tests():
        raise AssertionError("tar: status 1")


# The packages


def test_package_wants_every_program_that_imageos_runs() -> None:
    """A new program in programs.PACKAGES needs a line, with the reason, in DEPENDENCIES of packages.py."""
    always_there = {"util-linux", "coreutils", "tar", "gzip"}  # Essential: yes
    kinds = packages.STRENGTHS
    wanted = {name.split()[0] for kind in kinds for name in packages.requirements(kind, "deb")}
    assert set(programs.PACKAGES.values()) <= wanted | always_there
    for dependency in packages.DEPENDENCIES:
        assert dependency.why


def test_rpm_wants_what_the_deb_wants() -> None:
    assert packages.requirements("Depends", "rpm") == [
        "coreutils",
        "e2fsprogs",
        "gzip",
        "python3 >= 3.9",
        "tar",
        "util-linux",
    ]
    for dependency in packages.DEPENDENCIES:
        assert dependency.rpm


def test_version_of_the_packages() -> None:
    """dpkg and rpm sort a development version before the release."""
    assert packages.package_version("1.0.dev0") == "1.0~dev0"
    assert packages.package_version("1.0") == "1.0"
