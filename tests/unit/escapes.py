"""Links of a hostile guest that lead to the node, and a directory of the node that no test may change."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imageos.guests.target import Target

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
