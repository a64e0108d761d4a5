"""The disk then contains the image, and zeroes after it; NOMOUNT shows it without changes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import guestdisks
import pytest
import trees
from support import MIB, Node, run

from imageos.disks import blockdev

MakeDisk = Callable[..., Path]
SIZE, DISK = 24 * MIB + 512, 40  # bytes of the image, MiB of the disk
ODD = b"not a table, not a filesystem"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an image with holes, stored zeroes and data, up to the last sector."""
    path = tmp_path_factory.mktemp("content") / "disk.raw"
    with path.open("wb") as file:
        file.write(ODD.ljust(512, b"\1") * 2)
        file.write(bytes(5 * MIB))
        file.write(os.urandom(MIB) + b"text\n" * MIB)
        file.truncate(SIZE)
        file.seek(SIZE - 512)
        file.write(b"the end".ljust(512, b"\2"))
    return path


FORMS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "qemu .img raw": ("qemu", lambda source, path: run("cp", source, path.with_suffix(".img"))),
    "qemu .img qcow2": ("qemu", lambda source, path: guestdisks.qcow2(source, path.with_suffix(".img"))),
    "qemu .qcow2": ("qemu", lambda source, path: guestdisks.qcow2(source, path.with_suffix(".qcow2"))),
    "qcow2": ("qcow2", lambda source, path: guestdisks.qcow2(source, path.with_suffix(".qcow2"))),
    "qcow2 -c": ("qcow2", lambda source, path: guestdisks.qcow2(source, path.with_suffix(".qcow2"), "-c")),
    "qcow2 zstd": (
        "qcow2",
        lambda source, path: guestdisks.qcow2(
            source,
            path.with_suffix(".qcow2"),
            *("-c", "-o", f"compression_type={guestdisks.best_compression(path.parent)}"),
        ),
    ),
    "qcow2 v2": (
        "qcow2",
        lambda source, path: guestdisks.qcow2(source, path.with_suffix(".qcow2"), "-o", "compat=0.10"),
    ),
    "raw": ("raw", lambda source, path: run("cp", source, path.with_suffix(".raw"))),
    "raw .img": ("raw", lambda source, path: run("cp", source, path.with_suffix(".img"))),
    "raw.gz": ("raw", lambda source, path: guestdisks.compress(source, path.with_suffix(".raw.gz"), "gzip", "-1")),
    "raw.zst": ("raw", lambda source, path: run("zstd", "-q", "-1", source, "-o", path.with_suffix(".raw.zst"))),
    "raw.xz": ("raw", lambda source, path: guestdisks.compress(source, path.with_suffix(".raw.xz"), "xz", "-0")),
    "raw with zst in it": ("raw", lambda source, path: guestdisks.compress(source, path.with_suffix(".raw"), "zstd")),
}


def stock(node: Node, form: str, source: Path) -> str:
    image_type, write = FORMS[form]
    for old in node.images.iterdir():
        old.unlink()
    write(source, node.images / f"win-{trees.ARCH}.x")
    return image_type


@pytest.mark.parametrize("form", FORMS)
def test_file_disk(form: str, node: Node, disk: MakeDisk, content: Path) -> None:
    target = guestdisks.soiled(disk(DISK), DISK)
    image_type = stock(node, form, content)
    node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE=image_type, OSP_NOMOUNT="yes").ok()
    assert target.read_bytes() == content.read_bytes().ljust(DISK * MIB, b"\0")
    assert target.stat().st_blocks * 512 < 10 * MIB, "not sparse"


@pytest.mark.parametrize("form", ["qcow2", "raw", "raw.gz"])
def test_block_device(form: str, node: Node, block_disk: MakeDisk, content: Path) -> None:
    target = guestdisks.soiled(block_disk(DISK), DISK)
    image_type = stock(node, form, content)
    node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE=image_type, OSP_NOMOUNT="yes").ok()
    assert target.read_bytes() == content.read_bytes().ljust(DISK * MIB, b"\0")


@pytest.mark.parametrize("form", ["qcow2", "raw", "raw.gz"])
def test_fresh_sparse_file(form: str, node: Node, disk: MakeDisk, content: Path) -> None:
    target = disk(DISK)
    image_type = stock(node, form, content)
    node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE=image_type, OSP_NOMOUNT="yes").ok()
    assert target.read_bytes() == content.read_bytes().ljust(DISK * MIB, b"\0")


def test_disk_of_exactly_the_size(node: Node, disk: MakeDisk, content: Path) -> None:
    for form in ("qcow2", "raw.zst"):
        target = disk(DISK)
        with target.open("r+b") as file:
            file.write(b"\xff" * SIZE)
            file.truncate(SIZE)
        image_type = stock(node, form, content)
        node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE=image_type, OSP_NOMOUNT="yes").ok()
        assert target.read_bytes() == content.read_bytes()


def test_nomount_runs_no_hooks_and_reads_nothing(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    stock(node, "raw", content)
    node.hook("mark", f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    result = node.create(disk(DISK), OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes").ok()
    assert "NOMOUNT=yes" in result.log
    assert not (tmp_path / "ran").exists()


# Larger than the disk


@pytest.mark.parametrize("form", ["qcow2", "qcow2 -c", "raw", "raw.gz", "raw.zst", "raw.xz", "qemu .img raw"])
def test_larger_than_the_disk(form: str, node: Node, disk: MakeDisk, content: Path) -> None:
    target = guestdisks.soiled(disk(24), 24)
    before = target.read_bytes()
    image_type = stock(node, form, content)
    result = node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE=image_type, OSP_NOMOUNT="yes")
    result.failed(str(SIZE), str(24 * MIB))
    assert "hint: make the disk at least 25m" in result.log
    assert target.read_bytes() == before


def test_larger_than_the_disk_is_seen_at_the_overflow(node: Node, disk: MakeDisk, content: Path) -> None:
    """zstd does not know the size of its output when it reads a pipe."""
    path = node.images / f"win-{trees.ARCH}.raw.zst"
    run("sh", "-c", 'cat "$0" | zstd -q -1 >"$1"', content, path)
    target = disk(24)
    result = node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes")
    result.failed("larger disk", str(24 * MIB))
    assert target.read_bytes()[:512] == bytes(512), "still armed"


# Damaged


@pytest.mark.parametrize("form", ["raw.gz", "raw.zst", "raw.xz"])
def test_truncated_stream(form: str, node: Node, disk: MakeDisk, content: Path) -> None:
    stock(node, form, content)
    path = next(node.images.glob("win-*"))
    os.truncate(path, path.stat().st_size // 2)
    target = disk(DISK)
    node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes").failed(str(path))
    assert target.read_bytes()[:512] == bytes(512), "still armed"


def test_damaged_qcow2(node: Node, disk: MakeDisk, content: Path) -> None:
    stock(node, "qcow2 -c", content)
    path = next(node.images.glob("win-*"))
    with path.open("r+b") as file:
        file.seek(0x50000)
        file.write(b"\xff" * (path.stat().st_size - 0x50000))
    target = disk(DISK)
    result = node.create(target, OSP_IMAGE_NAME="win", OSP_IMAGE_TYPE="qcow2", OSP_NOMOUNT="yes")
    result.failed(str(path), "damaged")
    assert target.read_bytes()[:512] == bytes(512), "still armed"


# Disks that cannot discard blocks to zero


@pytest.mark.parametrize("kind", ["file", "block"])
def test_zeroes_are_written_where_no_hole_can_be_punched(
    kind: str, disk: MakeDisk, block_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("imageos.node.linux.punch_hole", refuse)
    target = guestdisks.soiled((disk if kind == "file" else block_disk)(DISK), DISK)
    with blockdev.claimed(str(target)) as device, blockdev.attached(device) as attached:
        os.pread(attached.descriptor, MIB, 0)
        blockdev.clear(attached)
        assert os.pread(attached.descriptor, MIB, 0) == bytes(MIB)
        blockdev.flush(attached)
    assert target.read_bytes() == bytes(DISK * MIB)
