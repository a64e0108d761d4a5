"""Disks to make images of, and the tools that do so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import guestdisks
import pytest
from support import PATH, Call, Name, Node, Result, run

MakeDisk = Callable[..., Path]
TYPES = {"tarball": "tarball", "dump": "dump", "qemu-img": "qemu"}  # ganeti-image's -> IMAGE_TYPE
FILES = {
    "tarball": ["made-x86_64.tar.zst", "made-x86_64.tar.zst.sha256"],
    "dump": ["made-x86_64-root.dump", "made-x86_64-root.dump.sha256"],
    "qemu-img": ["made-x86_64.qcow2", "made-x86_64.qcow2.sha256"],
}
BOOT = ["made-x86_64-boot.dump", "made-x86_64-boot.dump.sha256"]


@pytest.fixture(scope="module")
def disks(odd_tree: Path, small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, guestdisks.Guest]:
    """Make one disk of each layout; `ancestor` contains files that are hard to keep. Tests must not write to them."""
    top = tmp_path_factory.mktemp("guests")
    tree = {"ancestor": odd_tree}
    return {name: make(top / name, tree.get(name, small_tree), top) for name, make in guestdisks.LAYOUTS.items()}


@pytest.fixture
def node(node: Node) -> Node:
    """Return a node without images."""
    for path in node.images.iterdir():
        path.unlink()
    return node


def start(node: Node, disk: Path, kind: str, *options: str, directory: Name = "", path: str = PATH) -> Call:
    """Start the command on the node that has the disk, without a cluster."""
    node.calls += 1
    command = ["ganeti-image", "-i", "inst1.example.org", "--disk", str(disk), "-t", kind, "-n", "made"]
    command += ["-a", "x86_64", "-d", str(directory or node.images), *options]
    return Call(node.imageos, {"PATH": path}, node.work / f"capture-{node.calls}.log", command)


def capture(node: Node, disk: Path, kind: str, *options: str, directory: Name = "", path: str = PATH) -> Result:
    return start(node, disk, kind, *options, directory=directory, path=path).result()


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    before = [(run("sha256sum", path), path.stat().st_mtime_ns) for path in paths]
    yield
    assert [(run("sha256sum", path), path.stat().st_mtime_ns) for path in paths] == before
