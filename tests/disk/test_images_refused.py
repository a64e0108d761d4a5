"""Images that would bring files of the node into the guest, or that nobody can deploy, made by qemu-img."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import guestdisks
import pytest
import trees
from support import MIB, Node, digest, run

MakeDisk = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    path.write_bytes(b"data" * (MIB // 2))
    return path


def create_image(path: Path, *options: str) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "4M")


def backing(source: Path, path: Path) -> None:
    create_image(path, "-b", str(source), "-F", "raw")


def backing_of_the_node(source: Path, path: Path) -> None:
    create_image(path, "-u", "-b", "/etc/shadow", "-F", "raw")


def backing_json(source: Path, path: Path) -> None:
    create_image(
        path, "-u", "-b", 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}', "-F", "raw"
    )


def data_file(source: Path, path: Path) -> None:
    create_image(path, "-o", f"data_file={source.parent}/data,data_file_raw=on")


def encrypted(source: Path, path: Path) -> None:
    secret = ["--object", "secret,id=s,data=secret"]
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2",
        "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "4M")  # fmt: skip


def snapshots_only(source: Path, path: Path) -> None:
    create_image(path)
    run("qemu-img", "snapshot", "-c", "first", path)


def marked_corrupt(source: Path, path: Path) -> None:
    guestdisks.qcow2(source, path)
    set_features(path, 2)


def unknown_feature(source: Path, path: Path) -> None:
    guestdisks.qcow2(source, path)
    set_features(path, 1 << 40)


def unknown_compression(source: Path, path: Path) -> None:
    """Return the error of Debian 11's qemu-img, which was built without zstd."""
    guestdisks.qcow2(source, path)
    set_features(path, 8)
    with path.open("r+b") as file:
        file.seek(104)
        file.write(b"\xc8")


def set_features(path: Path, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", bits))


def version_1(source: Path, path: Path) -> None:
    run("qemu-img", "convert", "-O", "qcow", source, path)


REFUSED = {
    backing: "backing file", backing_of_the_node: "backing file", backing_json: "backing file",
    data_file: "external data file", encrypted: "encrypted", snapshots_only: "snapshots only",
    marked_corrupt: "corrupt", unknown_feature: "0x10000000000", version_1: "version 1",
    unknown_compression: "cannot be read by this node's qemu-img: qcow2: unknown compression type: 200",
}  # fmt: skip


def attempt(node: Node, target: Path, image_type: str = "qemu", **settings: object) -> str:
    """Return the log of a create that must not change the disk; its last line names the image."""
    before = digest(target)
    result = node.create(target, OSP_IMAGE_NAME="bad", OSP_IMAGE_TYPE=image_type, OSP_NOMOUNT="yes", **settings)
    result.failed("bad-")
    assert digest(target) == before
    return result.log


@pytest.mark.parametrize("image_type, suffix", [("qcow2", "qcow2"), ("qemu", "img")])
@pytest.mark.parametrize("how", REFUSED)
def test_header(how: Callable[[Path, Path], None], image_type: str, suffix: str, node: Node, disk: MakeDisk,
                source: Path) -> None:  # fmt: skip
    how(source, node.images / f"bad-{trees.ARCH}.{suffix}")
    assert REFUSED[how] in attempt(node, disk(16), image_type).splitlines()[-1]


@pytest.mark.parametrize("driver, options", [("vmdk", ["-o", "subformat=monolithicFlat"]), ("qed", [])])
def test_other_formats(driver: str, options: list[str], node: Node, disk: MakeDisk, source: Path) -> None:
    path = node.images / f"bad-{trees.ARCH}.img"
    run("qemu-img", "convert", "-O", driver, *options, source, path)
    log = attempt(node, disk(16))
    command = next(line for line in log.splitlines() if "hint: qemu-img convert" in line).partition("hint: ")[2]
    assert "only raw, qcow2, VMDK, VDI, VHDX, VHD are deployed" in log.splitlines()[-1]
    run(*command.replace("NAME-ARCH.qcow2", str(node.images / f"good-{trees.ARCH}.qcow2")).split())
    node.create(disk(16), OSP_IMAGE_NAME="good", OSP_IMAGE_TYPE="qcow2", OSP_NOMOUNT="yes").ok()


@pytest.mark.parametrize("image_type, suffix, other", [("raw", "raw", "qcow2"), ("qcow2", "qcow2", "raw")])
def test_content_is_not_what_the_type_says(image_type: str, suffix: str, other: str, node: Node, disk: MakeDisk,
                                           source: Path) -> None:  # fmt: skip
    run("qemu-img", "convert", "-O", other, source, node.images / f"bad-{trees.ARCH}.{suffix}")
    assert f"IMAGE_TYPE={other}" in attempt(node, disk(16), image_type)


def test_raw_image_that_becomes_a_qcow2(node: Node, disk: MakeDisk, source: Path) -> None:
    """A guest may write a qcow2 header to its disk: a raw image of it must stay raw."""
    secret = source.with_name("secret")
    secret.write_bytes(b"the node's secret" * 4096)
    backing(secret, node.images / f"bad-{trees.ARCH}.raw")
    target = disk(16)
    attempt(node, target, "raw")
    attempt(node, target, "qemu")
    assert b"secret" not in target.read_bytes()


@pytest.mark.parametrize("image_type", ["qemu", "raw", "qcow2", "dump"])
def test_missing(image_type: str, node: Node, disk: MakeDisk) -> None:
    log = attempt(node, disk(16), image_type)
    assert "cannot find image" in log.splitlines()[-1]


@pytest.mark.parametrize("image_type, name", [("qemu", ".img"), ("qcow2", ".qcow2"), ("dump", "-root.dump")])
def test_empty(image_type: str, name: str, node: Node, disk: MakeDisk) -> None:
    (node.images / f"bad-{trees.ARCH}{name}").touch()
    assert "is empty" in attempt(node, disk(16), image_type)


def test_missing_program(node: Node, disk: MakeDisk, source: Path, tmp_path: Path) -> None:
    """It is detected before the first write, and named with its package."""
    guestdisks.qcow2(source, node.images / f"bad-{trees.ARCH}.qcow2")
    tools = tmp_path / "tools"
    tools.mkdir()
    for directory in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        for tool in Path(directory).iterdir():
            if tool.name != "qemu-img" and not os.path.lexists(tools / tool.name):
                (tools / tool.name).symlink_to(tool)
    target = disk(16)
    result = node.create(target, OSP_IMAGE_NAME="bad", OSP_IMAGE_TYPE="qcow2", PATH=str(tools))
    result.failed("qemu-img")
    assert "qemu-utils" in result.log
    assert digest(target) == digest(disk(16))
