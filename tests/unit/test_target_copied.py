"""A tree of the node, copied into a hostile guest."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from escapes import ESCAPES, Escape, temporary_files
from escapes import node as node

from imageos.errors import Failure
from imageos.guests.target import Target


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
    """What the link leads to is made, in the guest."""
    (tmp_path / "overlay/x").mkdir(parents=True)
    (tmp_path / "overlay/x/file").write_text("")
    (guest / "x").symlink_to("/nowhere")
    target.copy_tree(f"{tmp_path}/overlay")
    assert (guest / "nowhere/file").is_file()


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
