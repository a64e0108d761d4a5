"""Reasons to refuse an image, and content that an image would lack."""

from __future__ import annotations

from pathlib import Path

import pytest

from imageos.errors import Failure
from imageos.guests import cloudinit, sealing
from imageos.guests.target import Target
from imageos.images.capture import CAPTURED, Destination, check_free
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.network import backends


def in_the_way(directory: Path, kind: str, replace: bool = False) -> str:
    try:
        check_free(Destination(str(directory), "made-x86_64", replace), CAPTURED[kind])
    except Failure as failure:
        return str(failure).partition(f"{directory}/made-x86_64")[2].partition(" ")[0].rstrip(",")
    return ""


@pytest.mark.parametrize("kind", CAPTURED)
def test_every_file_that_create_would_find_is_in_the_way(kind: str, tmp_path: Path) -> None:
    """Also a file that the new image would hide; --force replaces a file of the same name.

    Not a tarball of that name, in which a disk image might be, too.
    """
    tarballs = IMAGE_TYPES["tarball"].suffixes if kind != "tarball" else ()
    known = [suffix for suffix in IMAGE_TYPES[CAPTURED[kind].image_type].suffixes if suffix not in tarballs]
    ours = CAPTURED[kind].suffixes()
    assert ours[0] in known
    for suffix in known:
        path = tmp_path / f"made-x86_64{suffix}"
        path.touch()
        assert in_the_way(tmp_path, kind) == suffix
        hides_ours = known.index(suffix) < known.index(ours[0])
        assert in_the_way(tmp_path, kind, replace=True) == (suffix if hides_ours else "")
        path.unlink()


def test_what_is_not_in_the_way(tmp_path: Path) -> None:
    for name in ("made-x86.qcow2", "made-x86_64.tar.zst", "made-x86_64.qcow2.sha256", "ade-x86_64.qcow2"):
        (tmp_path / name).touch()
    assert in_the_way(tmp_path, "qemu-img") == ""


def test_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=f"IMAGE_DIR {tmp_path}/x: No such file"):
        check_free(Destination(f"{tmp_path}/x", "made-x86_64"), CAPTURED["dump"])


def test_sealing_removes_what_hooks_made_of_the_instance(guest: Path, target: Target) -> None:
    """Names of interfaces by its MAC, and the order to read the seed's network at every boot."""
    for path in (*backends.NAMES, cloudinit.UPDATES, cloudinit.USERS, f"{cloudinit.CONFIG}.d/10_site.cfg"):
        (guest / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (guest / path[1:]).write_text("x")
    sealing.seal(target)
    assert [path.name for path in guest.rglob("*") if path.is_file()] == ["10_site.cfg"]


def test_sealing_finds_every_home(guest: Path, target: Target) -> None:
    for home in ("root", "home/a", "home/with [brackets]*"):
        (guest / home).mkdir(parents=True)
        for name in (".bash_history", ".python_history", ".lesshst", ".bashrc"):
            (guest / home / name).write_text("x")
    (guest / "home/file").write_text("not a home")
    sealing.seal(target)
    left = sorted(str(path.relative_to(guest)) for path in guest.rglob("*") if path.is_file())
    assert left == ["home/a/.bashrc", "home/file", "home/with [brackets]*/.bashrc", "root/.bashrc"]


def test_sealing_delivers_no_mail(guest: Path, target: Target) -> None:
    for path in ("spool/postfix/deferred/A/A1", "spool/exim4/input/1-D", "mail/root", "spool/postfix/pid/master.pid"):
        (guest / "var" / path).parent.mkdir(parents=True)
        (guest / "var" / path).write_text("x")
    sealing.seal(target)
    assert [path.name for path in guest.rglob("*") if path.is_file()] == ["master.pid"]
