"""The files of a hostile guest: no path ever leads to the node."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from imageos.errors import Failure
from imageos.guests.sandbox import GuestDisk
from imageos.guests.target import READ_LIMIT, READ_TOTAL, Target, opened
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.run import Command, Outside

SECRET = "the node's own\n"

Snapshot = dict[str, tuple[object, ...]]


def snapshot(top: Path) -> Snapshot:
    """Return attributes below `top` that a write, a removal or a change of mode alters."""
    found: Snapshot = {}
    for directory, directories, files in os.walk(top):
        for name in (".", *directories, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            found[path] = (status.st_mode, status.st_uid, status.st_ino, status.st_mtime_ns, status.st_nlink)
    return found


def temporary_files(top: Path) -> list[str]:
    return [name for _, _, files in os.walk(top) for name in files if name.startswith(".")]


@contextmanager
def alarm() -> Iterator[None]:
    """Fail the test if it waits, as no other process could wake it."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def node(unprivileged: None, tmp_path: Path) -> Iterator[Path]:
    """Make a directory of the node beside the guest's; no test may change it."""
    outside = tmp_path / "node"
    (outside / "sub").mkdir(parents=True)
    (outside / "canary").write_text(SECRET)
    (outside / "sub/canary").write_text(SECRET)
    before = snapshot(outside)
    yield outside
    assert snapshot(outside) == before
    assert (outside / "canary").read_text() == SECRET


# Links that lead outside. Each is made at /unit-etc in the guest or below it; the second value is the path to use.


def absolute(guest: Path, node: Path) -> str:
    (guest / "unit-etc").mkdir()
    (guest / "unit-etc/x").symlink_to(node / "canary")
    return "/unit-etc/x"


def dot_dot(guest: Path, node: Path) -> str:
    (guest / "unit-etc").mkdir()
    (guest / "unit-etc/x").symlink_to("../../node/canary")
    return "/unit-etc/x"


def many_dot_dots(guest: Path, node: Path) -> str:
    (guest / "unit-etc").mkdir()
    (guest / "unit-etc/x").symlink_to("../" * 30 + str(node / "canary").lstrip("/"))
    return "/unit-etc/x"


def absolute_directory(guest: Path, node: Path) -> str:
    (guest / "unit-etc").symlink_to(node)
    return "/unit-etc/canary"


def relative_directory(guest: Path, node: Path) -> str:
    (guest / "unit-etc").symlink_to("../node")
    return "/unit-etc/sub/canary"


def chain(guest: Path, node: Path) -> str:
    (guest / "unit-etc").symlink_to("/unit-usr/etc")
    (guest / "unit-usr").symlink_to("usr2")
    (guest / "usr2").mkdir()
    (guest / "usr2/etc").symlink_to("../../node")
    return "unit-etc/canary"


def link_to_link(guest: Path, node: Path) -> str:
    (guest / "unit-etc").mkdir()
    (guest / "unit-etc/x").symlink_to("y")
    (guest / "unit-etc/y").symlink_to("/../node/canary")
    return "/unit-etc/x"


def path_with_dot_dots(guest: Path, node: Path) -> str:
    (guest / "unit-etc").mkdir()
    return "/unit-etc/../../node/canary"


def plain_path_to_the_node(guest: Path, node: Path) -> str:
    return str(node / "canary")


ESCAPES = [
    absolute,
    dot_dot,
    many_dot_dots,
    absolute_directory,
    relative_directory,
    chain,
    link_to_link,
    path_with_dot_dots,
    plain_path_to_the_node,
]
Escape = Callable[[Path, Path], str]
USES: dict[str, Callable[[Target, str], object]] = {
    "read": lambda target, path: target.read(path),
    "exists": lambda target, path: target.exists(path) or None,
    "is_file": lambda target, path: target.is_file(path) or None,
    "is_dir": lambda target, path: target.is_dir(os.path.dirname(path) + "/sub") or None,
    "glob": lambda target, path: [match for match in target.glob(f"{path}*") if os.path.basename(match) != "x"] or None,
    "write": lambda target, path: target.write(path, "guest\n"),
    "append_line": lambda target, path: target.append_line(path, "guest"),
    "touch": lambda target, path: target.touch(path),
    "mkdir": lambda target, path: target.mkdir(path),
    "mkdir below": lambda target, path: target.mkdir(f"{path}/a/b"),
    "symlink": lambda target, path: target.symlink("/guest", path),
    "remove": lambda target, path: target.remove(path),
    "remove all": lambda target, path: target.remove(f"{os.path.dirname(path)}/*"),
    "clear": lambda target, path: target.clear(os.path.dirname(path)),
    "clear it": lambda target, path: target.clear(path),
}


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


# Copying a tree of the node


@pytest.fixture
def overlay(unprivileged: None, tmp_path: Path) -> Path:
    """Make a tree to copy into the guest: a file in /unit-etc, where the tests put their links."""
    source = tmp_path / "overlay"
    (source / "unit-etc/sub").mkdir(parents=True)
    for name in ("unit-etc/x", "unit-etc/canary", "unit-etc/sub/canary"):
        (source / name).write_text("of the overlay\n")
    return source


@pytest.mark.parametrize("escape", ESCAPES[:-2], ids=lambda escape: escape.__name__)
def test_copy_finds_no_way_out(escape: Escape, guest: Path, node: Path, target: Target, overlay: Path) -> None:
    escape(guest, node)
    try:
        target.copy_tree(str(overlay))
        assert target.read("/unit-etc/canary") == "of the overlay\n"
    except Failure as failure:
        assert "the guest's" in str(failure)
    assert temporary_files(guest) == []


def test_copy_keeps_everything(guest: Path, target: Target, tmp_path: Path) -> None:
    source = tmp_path / "overlay"
    (source / "new/.dot").mkdir(parents=True, mode=0o750)
    (source / "new/.dot/big").write_bytes(b"\0" * (3 << 20) + b"end")
    for name, mode in (("secret", 0o600), ("set-user-ID", 0o4755), ("none", 0o444), ("\udcff", 0o640)):
        (source / "new" / name).write_text(name.encode("utf-8", "backslashreplace").decode())
        (source / "new" / name).chmod(mode)
    (source / "new").chmod(0o2711)
    (source / "new/link").symlink_to("/etc/nowhere")
    (source / "new/to-directory").symlink_to(".dot")
    os.utime(source / "new/secret", (315532800, 315532800))
    os.utime(source / "new/link", (1e9, 1e9), follow_symlinks=False)
    os.setxattr(source / "new/secret", "user.note", b"\0kept\xff")
    os.setxattr(source / "new", "user.note", b"of a directory")
    os.umask(0o077)
    for _ in range(2):
        target.copy_tree(str(source))
        assert described(guest) == described(source)


def described(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        time_kept = None if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
        attributes = {name: os.getxattr(path, name) for name in os.listxattr(path, follow_symlinks=False)}
        found[str(path.relative_to(top))] = (status.st_mode, status.st_uid, content, time_kept, attributes)
    return found


def test_copy_follows_the_guests_directory_links(guest: Path, target: Target, tmp_path: Path) -> None:
    source = tmp_path / "overlay"
    for name in ("lib", "etc/conf.d"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text("new")
    (guest / "usr/lib").mkdir(parents=True)
    (guest / "lib").symlink_to("usr/lib")
    (guest / "data/etc").mkdir(parents=True)
    (guest / "etc").symlink_to("/data/etc")
    target.copy_tree(str(source))
    assert (guest / "lib").is_symlink() and (guest / "etc").is_symlink()
    assert (guest / "usr/lib/file").read_text() == (guest / "data/etc/conf.d/file").read_text() == "new"


def test_copy_leaves_the_guests_directories_as_they_are(guest: Path, target: Target, tmp_path: Path) -> None:
    (guest / "root").mkdir(mode=0o700)
    (tmp_path / "overlay/root").mkdir(parents=True)
    (tmp_path / "overlay/root/file").touch()
    target.copy_tree(f"{tmp_path}/overlay")
    assert stat.S_IMODE((guest / "root").stat().st_mode) == 0o700


def test_copy_replaces_files_and_links(guest: Path, target: Target, tmp_path: Path) -> None:
    source = tmp_path / "overlay"
    source.mkdir()
    (source / "resolv.conf").write_text("new")
    (source / "link").symlink_to("new")
    (source / "fifo").write_text("new")
    (guest / "stub").write_text("old")
    (guest / "resolv.conf").symlink_to("stub")
    (guest / "link").write_text("old")
    os.mkfifo(guest / "fifo")
    target.copy_tree(str(source))
    assert not (guest / "resolv.conf").is_symlink()
    assert [(guest / name).read_text() for name in ("resolv.conf", "stub", "fifo")] == ["new", "old", "new"]
    assert os.readlink(guest / "link") == "new"


@pytest.mark.parametrize("there", ["directory", "file"])
@pytest.mark.parametrize("new", ["directory", "file", "link"])
def test_copy_confuses_no_directory_with_a_file(
    new: str, there: str, guest: Path, target: Target, tmp_path: Path
) -> None:
    for top, kind in ((guest, there), (tmp_path / "overlay", new)):
        top.mkdir(exist_ok=True)
        if kind == "directory":
            (top / "x").mkdir()
        elif kind == "file":
            (top / "x").touch()
        else:
            (top / "x").symlink_to("y")
    if (new == "directory") == (there == "directory"):
        target.copy_tree(f"{tmp_path}/overlay")
        return
    with pytest.raises(Failure) as raised:
        target.copy_tree(f"{tmp_path}/overlay")
    assert f"{tmp_path}/overlay/x" in str(raised.value)
    assert "the guest's /x is " in str(raised.value)
    assert temporary_files(guest) == []


def test_copy_of_a_directory_onto_a_link_to_nowhere(guest: Path, target: Target, tmp_path: Path) -> None:
    (tmp_path / "overlay/x").mkdir(parents=True)
    (guest / "x").symlink_to("nowhere")
    with pytest.raises(Failure, match="the guest's /x"):
        target.copy_tree(f"{tmp_path}/overlay")


def test_copy_of_a_special_file(guest: Path, target: Target, tmp_path: Path) -> None:
    (tmp_path / "overlay").mkdir()
    os.mkfifo(tmp_path / "overlay/fifo")
    with pytest.raises(Failure, match=f"^{tmp_path}/overlay/fifo is neither a file nor a directory nor a link"):
        target.copy_tree(f"{tmp_path}/overlay")


def test_copy_of_what_is_no_directory(guest: Path, target: Target, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match=f"^cannot read {tmp_path}/file: Not a directory$"):
        target.copy_tree(f"{tmp_path}/file")


def test_copy_follows_a_link_to_the_tree(guest: Path, target: Target, tmp_path: Path) -> None:
    (tmp_path / "version-2").mkdir()
    (tmp_path / "version-2/file").touch()
    (tmp_path / "current").symlink_to("version-2")
    target.copy_tree(f"{tmp_path}/current")
    assert (guest / "file").exists()
