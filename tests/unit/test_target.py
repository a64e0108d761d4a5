"""The files of a hostile guest: no path ever leads to the node."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from escapes import ESCAPES, USES, Escape, absolute, alarm, dot_dot, link_to_link, temporary_files
from escapes import node as node
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from imageos.errors import Failure
from imageos.guests.sandbox import GuestDisk
from imageos.guests.target import READ_LIMIT, READ_TOTAL, Target, opened
from imageos.node import linux


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.__name__)
def test_no_way_out(escape: Escape, use: str, guest: Path, node: Path, target: Target) -> None:
    path = escape(guest, node)
    try:
        assert USES[use](target, path) is None
    except Failure as failure:
        assert "the guest's" in str(failure)
    assert temporary_files(guest) == []


@pytest.mark.parametrize("escape", [absolute, dot_dot, link_to_link], ids=lambda escape: escape.__name__)
def test_written_where_the_guest_would_see_it(escape: Escape, guest: Path, node: Path, target: Target) -> None:
    path = escape(guest, node)
    target.write(path, "guest\n")
    assert target.read(path) == "guest\n"
    assert (guest / "unit-etc/x").is_symlink()


def test_parent_link_written_where_the_guest_would_see_it(guest: Path, target: Target) -> None:
    (guest / "private/etc").mkdir(parents=True)
    (guest / "etc").symlink_to("/private/etc")
    target.write("/etc/hostname", "inst1\n")
    assert (guest / "private/etc/hostname").read_text() == "inst1\n"


def test_usual_links_are_usable(guest: Path, target: Target) -> None:
    """A merged /usr works, and so does Debian's resolv.conf, whose directory is only made at boot."""
    (guest / "usr/bin").mkdir(parents=True)
    (guest / "usr/bin/tool").touch()
    (guest / "bin").symlink_to("usr/bin")
    (guest / "etc").mkdir()
    (guest / "etc/resolv.conf").symlink_to("../run/resolve/stub.conf")
    assert target.is_file("/bin/tool")
    target.write("/etc/resolv.conf", "nameserver 192.0.2.1\n")
    assert (guest / "run/resolve/stub.conf").read_text() == "nameserver 192.0.2.1\n"
    assert (guest / "etc/resolv.conf").is_symlink()


@pytest.mark.parametrize("loop", ["x", "./x", "y", "/unit-etc/x", "../unit-etc/x"])
def test_endless_links(loop: str, guest: Path, target: Target) -> None:
    (guest / "unit-etc").mkdir()
    (guest / "unit-etc/y").symlink_to("x")
    for name, use in USES.items():
        if not (guest / "unit-etc/x").is_symlink():
            (guest / "unit-etc/x").unlink(missing_ok=True)
            (guest / "unit-etc/x").symlink_to(loop)
        try:
            assert not use(target, "/unit-etc/x") or name == "glob", name
        except Failure as failure:
            assert "the guest's" in str(failure), name
        assert temporary_files(guest) == [], name


@pytest.mark.parametrize("text", ["..", ".", "/", "../..", "sub/", "/sub/.."])
def test_links_to_directories_are_not_written(text: str, guest: Path, target: Target) -> None:
    (guest / "etc/sub").mkdir(parents=True)
    (guest / "etc/x").symlink_to(text)
    with pytest.raises(Failure):
        target.write("/etc/x", "text")
    assert (guest / "etc/x").is_symlink()
    assert temporary_files(guest) == []


@pytest.mark.parametrize("path", ["/self/root/etc/passwd", "/self/cwd/setup.cfg", "/self/exe", "/thread-self/root"])
def test_magic_links(path: str) -> None:
    """The kernel's own links, in a /proc that is mounted in a guest."""
    with opened("/proc", "inst1", GuestDisk([], []), 5) as target:
        assert not target.exists(path)
        with pytest.raises(Failure):
            target.read(path)


def test_magic_link_to_an_open_file(node: Path) -> None:
    with (node / "canary").open() as file, opened("/proc", "inst1", GuestDisk([], []), 5) as target:
        assert not target.exists(f"/self/fd/{file.fileno()}")
        with pytest.raises(Failure):
            target.read(f"/self/fd/{file.fileno()}")


# Reading


def test_read(guest: Path, target: Target) -> None:
    (guest / "file").write_text("text\n")
    assert target.read("/file") == target.read("file") == "text\n"
    assert target.read("/missing") is None
    assert target.read("/missing/missing") is None
    assert target.read("/file/below") is None


def test_bytes_that_are_not_utf_8_survive(guest: Path, target: Target) -> None:
    (guest / "file").write_bytes(b"\xff\xfe caf\xe9 \xe2\x82\xac\r\n")
    target.append_line("/file", "more")
    assert (guest / "file").read_bytes() == b"\xff\xfe caf\xe9 \xe2\x82\xac\r\nmore\n"


@given(data=st.binary(max_size=200))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_any_bytes_survive(data: bytes, guest: Path, target: Target) -> None:
    (guest / "file").write_bytes(data)
    text = target.read("/file")
    assert text is not None
    target.write("/copy", text)
    assert (guest / "copy").read_bytes() == data


def test_fifo_does_not_stop_us(guest: Path, target: Target) -> None:
    os.mkfifo(guest / "fifo")
    with alarm(), pytest.raises(Failure, match="^the guest's /fifo is not a regular file$"):
        target.read("/fifo")
    target.write("/fifo", "text")
    assert (guest / "fifo").read_text() == "text"


def test_directory_instead_of_a_file(guest: Path, target: Target) -> None:
    (guest / "etc").mkdir()
    with pytest.raises(Failure, match="the guest's /etc is not a regular file"):
        target.read("/etc")
    with pytest.raises(Failure, match="the guest's /etc is a directory, not a file"):
        target.write("/etc", "text")
    assert temporary_files(guest) == []


def test_file_that_is_too_large(guest: Path, target: Target) -> None:
    (guest / "file").write_bytes(bytes(2 << 20))
    with pytest.raises(Failure, match="the guest's /file has 2097152 bytes, more than the 1048576"):
        target.read("/file")
    (guest / "limit").write_bytes(b"x" * READ_LIMIT)
    assert target.read("/limit") == "x" * READ_LIMIT
    target.write("/file", "small")
    assert (guest / "file").read_text() == "small"


def test_bytes(guest: Path, target: Target) -> None:
    (guest / "file").write_bytes(b"\xff\0x")
    assert target.read_bytes("/file", 3) == b"\xff\0x"
    assert target.read_bytes("/none", 3) is None
    with pytest.raises(Failure, match="the guest's /file has 3 bytes, more than the 2 that"):
        target.read_bytes("/file", 2)


def test_edit(guest: Path, target: Target) -> None:
    (guest / "file").write_text("a\n")
    before = (guest / "file").stat().st_ino
    assert not target.edit("/file", lambda text: text)
    assert (guest / "file").stat().st_ino == before, "nothing to write"
    assert target.edit("/file", lambda text: text + "b\n")
    assert (guest / "file").read_text() == "a\nb\n"
    target.edit("/none", lambda text: text)
    assert not (guest / "none").exists()
    target.edit("/new", lambda text: text + "c")
    assert (guest / "new").read_text() == "c"


def test_kernel_without_openat2(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldKernel:
        @staticmethod
        def syscall(*_: object) -> int:
            ctypes.set_errno(errno.ENOSYS)
            return -1

    monkeypatch.setattr(linux, "_libc", OldKernel)
    with pytest.raises(Failure, match="Linux 5.8 or newer"):
        target.read("/etc/hostname")


def test_what_happens_on_the_node_does_not_keep_a_file_from_being_opened(
    guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openat2 fails on a path with `..` while any process renames files, anywhere."""
    (guest / "unit-etc").mkdir()
    (guest / "unit-etc/file").write_text("x")
    libc, left = linux._libc, [20]

    class Busy:
        @staticmethod
        def syscall(*arguments: object) -> int:
            if left[0]:
                left[0] -= 1
                ctypes.set_errno(errno.EAGAIN)
                return -1
            return int(libc.syscall(*arguments))

    monkeypatch.setattr(linux, "_libc", Busy)
    assert target.read("/unit-etc/../unit-etc/file") == "x"
    left[0] = 1 << 30
    with pytest.raises(Failure, match="temporarily unavailable"):
        target.read("/unit-etc/../unit-etc/file")


def test_one_file_under_many_names(guest: Path, target: Target) -> None:
    (guest / "unit-etc").mkdir()
    with (guest / "unit-etc/0").open("wb") as file:
        file.truncate(READ_LIMIT)
    for number in range(1, READ_TOTAL // READ_LIMIT + 1):
        os.link(guest / "unit-etc/0", guest / f"unit-etc/{number}")
    with pytest.raises(Failure, match="bytes of its files"):
        for path in target.glob("/unit-etc/*"):
            target.read(path)


# Writing


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_new_files_and_directories(umask: int, guest: Path, target: Target) -> None:
    os.umask(umask)
    target.write("/a/b/file", "text")
    target.write("/secret", "text", mode=0o600)
    target.mkdir("/c/d", mode=0o700)
    modes = {
        path: stat.S_IMODE((guest / path).stat().st_mode) for path in ("a", "a/b", "a/b/file", "secret", "c", "c/d")
    }
    assert modes == {"a": 0o755, "a/b": 0o755, "a/b/file": 0o644, "secret": 0o600, "c": 0o755, "c/d": 0o700}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o4755, 0o2755])
def test_mode_and_owner_stay(mode: int, guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    file = guest / "file"
    file.write_text("old")
    file.chmod(mode)
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _, user, group: given.append((user, group)))
    target.write("/file", "new")
    assert file.read_text() == "new"
    assert given == [(file.stat().st_uid, file.stat().st_gid)]
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert os.listdir(guest) == ["file"]


def test_attributes_stay(guest: Path, target: Target) -> None:
    (guest / "file").write_text("old")
    os.setxattr(guest / "file", "user.note", b"kept")
    target.write("/file", "new")
    assert os.getxattr(guest / "file", "user.note") == b"kept"


def test_other_names_of_a_file_keep_the_old_content(guest: Path, target: Target) -> None:
    (guest / "file").write_text("old")
    os.link(guest / "file", guest / "other")
    target.write("/file", "new")
    assert (guest / "other").read_text() == "old"


def test_failed_write_leaves_the_old_file(guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (guest / "file").write_text("old")
    for step in ("rename", "fchmod"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(Failure, match="^cannot write the guest's /file: No space left on device$"):
                target.write("/file", "new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(Failure, match="^cannot link the guest's /file: "):
            target.symlink("text", "/file")
    assert (guest / "file").read_text() == "old"
    assert os.listdir(guest) == ["file"]


@pytest.mark.parametrize("path", ["", "/", "/etc/", "/etc/..", ".."])
def test_paths_that_name_no_file(path: str, guest: Path, target: Target) -> None:
    (guest / "etc").mkdir()
    with pytest.raises(Failure):
        target.write(path, "text")


def test_path_with_nul(target: Target) -> None:
    """As a guest's own files and programs may name one; to the kernel it would be the end."""
    for path in ("/a\0b", "/a\0b/c", "/c\0/"):
        for use in USES.values():
            with suppress(Failure):
                assert not use(target, path)


def test_longest_name(guest: Path, target: Target) -> None:
    target.write("/" + "n" * 255, "text")
    target.symlink("x", "/" + "l" * 255)
    with pytest.raises(Failure, match="File name too long"):
        target.write("/" + "n" * 256, "text")


def test_name_that_is_not_utf_8(guest: Path, target: Target) -> None:
    name = os.fsdecode(b"caf\xe9")
    target.write(f"/etc/{name}", "text")
    assert os.listdir(os.fsencode(guest / "etc")) == [b"caf\xe9"]
    assert target.read(f"/etc/{name}") == "text"
    assert target.glob("/etc/caf*") == [f"/etc/{name}"]
    target.remove("/etc/caf*")
    assert os.listdir(guest / "etc") == []


def test_append_line(guest: Path, target: Target) -> None:
    target.append_line("/etc/securetty", "tty1")
    target.append_line("/etc/securetty", "ttyS0")
    target.append_line("/etc/securetty", "tty1")
    assert (guest / "etc/securetty").read_text() == "tty1\nttyS0\n"
    (guest / "file").write_text("no newline at the end, ttyS0")
    target.append_line("/file", "ttyS0")
    assert (guest / "file").read_text() == "no newline at the end, ttyS0\nttyS0\n"


def test_touch(guest: Path, target: Target) -> None:
    (guest / "file").write_text("old")
    target.touch("/file")
    target.touch("/new")
    assert ((guest / "file").read_text(), (guest / "new").read_text()) == ("old", "")


def test_mkdir(guest: Path, target: Target) -> None:
    target.mkdir("/a/b/c/")
    target.mkdir("/a/b")
    assert (guest / "a/b/c").is_dir()
    (guest / "file").touch()
    for path in ("/file", "/file/below"):
        with pytest.raises(Failure, match="the guest's"):
            target.mkdir(path)


def test_symlink_takes_the_place_of_a_link_or_file(guest: Path, target: Target) -> None:
    (guest / "file").write_text("old")
    (guest / "link").symlink_to("file")
    target.symlink("/elsewhere", "/link")
    assert os.readlink(guest / "link") == "/elsewhere"
    assert (guest / "file").read_text() == "old"
    target.symlink("/elsewhere", "/file")
    assert os.readlink(guest / "file") == "/elsewhere"
    target.symlink("../x", "/made/for/it")
    assert os.readlink(guest / "made/for/it") == "../x"
    (guest / "directory").mkdir()
    with pytest.raises(Failure, match="cannot link the guest's /directory"):
        target.symlink("x", "/directory")
    assert temporary_files(guest) == []
