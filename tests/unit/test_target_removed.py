"""Looking for files of a hostile guest, and removing them, however deep they are."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from escapes import USES, alarm
from escapes import node as node

from imageos.errors import Failure
from imageos.guests.target import NAMES_TOTAL, Target
from imageos.node.confinement import Room
from imageos.run import Command, Outside

# Inspection


def test_kinds(guest: Path, target: Target) -> None:
    (guest / "directory").mkdir()
    (guest / "file").touch()
    (guest / "to-directory").symlink_to("/directory")
    (guest / "to-file").symlink_to("/file")
    (guest / "dangling").symlink_to("/nowhere")
    os.mkfifo(guest / "fifo")
    names = ("directory", "file", "to-directory", "to-file", "dangling", "fifo", "missing")
    kinds = {name: (target.exists(name), target.is_file(name), target.is_dir(name)) for name in names}
    assert kinds == {
        "directory": (True, False, True),
        "file": (True, True, False),
        "to-directory": (True, False, True),
        "to-file": (True, True, False),
        "dangling": (False, False, False),
        "fifo": (True, False, False),
        "missing": (False, False, False),
    }


def test_which(guest: Path, target: Target) -> None:
    for directory in ("usr/local/bin", "usr/sbin", "usr/bin"):
        (guest / directory).mkdir(parents=True)
    (guest / "bin").symlink_to("usr/bin")
    (guest / "usr/sbin/tool").touch(0o644)
    (guest / "usr/bin/tool").touch(0o755)
    (guest / "usr/local/bin/linked").symlink_to("/bin/tool")
    (guest / "usr/bin/directory").mkdir()
    assert target.which("tool") == "/usr/bin/tool"
    assert target.which("linked") == "/usr/local/bin/linked"
    assert target.which("directory") is None
    assert target.which("missing") is None


def test_directory_without_end(guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imageos.guests.target.MOST_NAMES", 3)
    (guest / "etc/many").mkdir(parents=True)
    for number in range(4):
        assert len(target.glob("/etc/many/*")) == number
        (guest / f"etc/many/{number}").touch()
    with pytest.raises(Failure, match="the guest's /etc/many holds more than 3 names"):
        target.glob("/etc/many/*.cfg")


def test_directories_without_end(guest: Path, target: Target) -> None:
    """A directory may have a million names, and a million links may lead to it."""
    for number in range(2000):
        target.write(f"/many/{number}.wants", "")
    with pytest.raises(Failure, match="more than 20000000 names"):
        for _ in range(NAMES_TOTAL // 2000 + 1):
            target.glob("/many/*.x")


def test_a_name_is_looked_for_without_a_listing(guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        target.write(f"/etc/{name}", "")
    target.symlink("nowhere", "/etc/link")
    assert [name for name in ("", ".", "..") if target.glob(f"/etc/{name}")] == []
    monkeypatch.setattr("imageos.guests.target.MOST_NAMES", 1)
    names = ("a", "link", "c", "a/b", "none/a", "n" * 256)
    assert [name for name in names if target.glob(f"/etc/{name}")] == ["a", "link"]


def test_rename(guest: Path, target: Target) -> None:
    for name in ("old", "empty", "full"):
        (guest / name).mkdir()
    (guest / "full/file").touch()
    (guest / "old/file").touch()
    with pytest.raises(Failure, match="cannot replace the guest's /full"):
        target.rename("/old", "/full")
    target.rename("/old", "/empty")
    assert (guest / "empty/file").exists() and not (guest / "old").exists()


def test_glob(guest: Path, target: Target) -> None:
    (guest / "etc/ssh").mkdir(parents=True)
    for name in ("ssh_host_b", "ssh_host_a", "sshd_config", ".ssh_host_c", "new\nline"):
        (guest / "etc/ssh" / name).touch()
    assert target.glob("/etc/ssh/ssh_host_*") == ["/etc/ssh/ssh_host_a", "/etc/ssh/ssh_host_b"]
    assert target.glob("/etc/ssh/*") == [
        f"/etc/ssh/{name}" for name in (".ssh_host_c", "new\nline", "ssh_host_a", "ssh_host_b", "sshd_config")
    ]
    assert target.glob("/etc/ssh/sshd_config") == ["/etc/ssh/sshd_config"]
    assert target.glob("/etc/nowhere/*") == []
    assert target.glob("/etc/ssh/sshd_config/*") == []
    assert target.glob("/etc/*/ssh_host_a") == [], "only the name is a pattern"


@pytest.mark.parametrize("pattern", ["*a" * 500_000, "[z-a]", "["], ids=["long", "range", "open"])
def test_pattern_of_a_guest(pattern: str, target: Target) -> None:
    target.write("/etc/x", "")
    begin = time.process_time()
    assert target.glob(f"/etc/{pattern}") == []
    assert time.process_time() - begin < 5


# Removing


def test_remove(guest: Path, target: Target) -> None:
    (guest / "d/sub/subsub").mkdir(parents=True)
    (guest / "d/sub/file").touch()
    (guest / "kept").mkdir()
    (guest / "kept/file").touch()
    (guest / "d/to-directory").symlink_to("/kept")
    (guest / "d/sub/to-file").symlink_to("../../kept/file")
    (guest / "d/dangling").symlink_to("nowhere")
    os.mkfifo(guest / "d/sub/fifo")
    target.remove("/d")
    target.remove("/missing*")
    target.remove("/missing/missing")
    assert sorted(os.listdir(guest)) == ["kept"]
    assert os.listdir(guest / "kept") == ["file"]


def test_removes_a_link_not_what_it_leads_to(guest: Path, node: Path, target: Target) -> None:
    (guest / "a").symlink_to(node)
    (guest / "b").symlink_to("/c")
    (guest / "c").mkdir()
    (guest / "c/file").touch()
    (guest / "tree").mkdir()
    (guest / "tree/a").symlink_to(node)
    (guest / "tree/sub").mkdir()
    (guest / "tree/sub/b").symlink_to("../../../node/sub")
    for name in ("a", "b", "tree"):
        target.remove(f"/{name}")
    assert os.listdir(guest) == ["c"]
    assert os.listdir(guest / "c") == ["file"]


def test_pattern_characters_in_names_are_not_patterns(guest: Path, target: Target) -> None:
    (guest / "unit-names").mkdir()
    for name in ("*", "[a]", "a", "b"):
        (guest / "unit-names" / name).touch()
    target.remove("/unit-names/[[]a]")
    assert sorted(os.listdir(guest / "unit-names")) == ["*", "a", "b"]
    target.clear("/unit-names", keep=["a", "b"])
    assert sorted(os.listdir(guest / "unit-names")) == ["a", "b"]


def test_clear(guest: Path, target: Target) -> None:
    for name in ("seed/x", "instances/i-1/obj.pkl", "data"):
        (guest / "cloud" / name).mkdir(parents=True)
    (guest / "cloud/instance").symlink_to("instances/i-1")
    (guest / "cloud/.hidden").touch()
    target.clear("/cloud", keep=["seed"])
    assert os.listdir(guest / "cloud") == ["seed"]
    assert os.listdir(guest / "cloud/seed") == ["x"]
    target.clear("/missing")


def test_empty_files(guest: Path, node: Path, target: Target) -> None:
    """Empty only regular files, at any depth, and never through a link."""
    for name in ("log/a", "log/sub/deep/b", "kept/c"):
        (guest / name).parent.mkdir(parents=True, exist_ok=True)
        (guest / name).write_text("text")
    (guest / "log/a").chmod(0o640)
    (guest / "log/to-node").symlink_to(node / "canary")
    (guest / "log/to-nodes-directory").symlink_to(node)
    (guest / "log/sub/to-kept").symlink_to("/kept")
    os.mkfifo(guest / "log/fifo")
    target.empty_files("/log")
    assert (guest / "log/a").read_text() == (guest / "log/sub/deep/b").read_text() == ""
    assert stat.S_IMODE((guest / "log/a").stat().st_mode) == 0o640
    assert (guest / "kept/c").read_text() == "text"
    target.empty_files("/missing")
    (guest / "linked").symlink_to("/kept")
    target.empty_files("/linked")
    assert (guest / "kept/c").read_text() == "text"


@pytest.mark.parametrize("read", [True, False])
def test_a_file_that_becomes_a_fifo(read: bool, guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes between the check and the opening: return an error or nothing, but do not wait for a reader."""
    (guest / "log").mkdir()
    os.mkfifo(guest / "log/a")
    (guest / "file").touch()
    looked = os.stat(guest / "file")
    monkeypatch.setattr("imageos.guests.target.os.stat", lambda *_, **__: looked)
    reader = os.open(guest / "log/a", os.O_RDONLY | os.O_NONBLOCK) if read else None
    try:
        with alarm():
            if read:
                target.empty_files("/log")
            else:
                with pytest.raises(Failure, match="^cannot empty the guest's /log: No such device"):
                    target.empty_files("/log")
    finally:
        if reader is not None:
            os.close(reader)


# Very deep

DEPTH = 1500  # more than Python's recursion limit and the limit of open files


def remove_deep(top: Path, name: str) -> None:
    """Remove a chain of directories of one name that is too deep for other means."""
    while (top / name).exists():
        below = (top / name / name).exists()
        if below:
            os.rename(top / name / name, top / "below")
        for entry in os.listdir(top / name):
            os.unlink(top / name / entry)
        os.rmdir(top / name)
        if below:
            os.rename(top / "below", top / name)


def test_deep_tree_is_removed_or_refused(guest: Path, target: Target) -> None:
    parent = os.open(guest, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=parent)
        child = os.open("d", os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(parent)
    try:
        target.remove("/d")
        assert not (guest / "d").exists()
    except Failure as failure:
        assert "the guest's /d" in str(failure)
    finally:
        remove_deep(guest, "d")


def test_link_through_many_directories(guest: Path, target: Target) -> None:
    (guest / "etc").mkdir()
    (guest / "etc/hostname").symlink_to("d/" * 400 + "x")
    try:
        target.write("/etc/hostname", "inst1\n")
    except Failure as failure:
        assert "the guest's" in str(failure)
    finally:
        remove_deep(guest / "etc", "d")


# The root itself


def test_descriptors_are_closed(guest: Path, target: Target) -> None:
    """An open descriptor would keep the filesystem busy."""
    (guest / "unit").mkdir()
    before = sorted(os.listdir("/proc/self/fd"))
    for use in USES.values():
        for name in ("file", "loop", "missing/x", "file/x", "new"):
            (guest / "unit").mkdir(exist_ok=True)
            if not os.path.lexists(guest / "unit/loop"):
                (guest / "unit/loop").symlink_to("loop")
            try:
                use(target, f"/unit/{name}")
            except Failure:
                continue
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_program_runs_in_the_sandbox(target: Target, guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(command: Command, **options: object) -> str:
        calls.append((command, options))
        return "output"

    monkeypatch.setattr("imageos.guests.target.run", fake)
    assert target.run(["update-grub"], input="yes\n") == "output"
    ((command, options),) = calls
    assert command.argv == ["update-grub"]
    assert options == {"input": "yes\n", "timeout": 5}
    assert not isinstance(command.room, (Room, Outside))
    assert command.env == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C",
        "TERM": "dumb",
        "DEBIAN_FRONTEND": "noninteractive",
    }
