"""Restore dumps, as ganeti-instance-image made them, onto root and /boot."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import guestdisks
import pytest
import trees
from support import MIB, PATH, Node, attached, describe, mounted, partitions, run

MakeDisk = Callable[..., Path]
CHANGED = {b"etc/fstab", b"etc/hostname", b"etc/hosts", b"etc/machine-id", b"etc", b"etc/ssh"}
REMOVED = (b"etc/ssh/ssh_host_", b"var/lib/dbus/machine-id", b"var/lib/cloud/", b"lost+found")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = trees.guest(tmp_path_factory.mktemp("dumped") / "tree", trees.SYSTEMD)
    odd = top / "odd"
    odd.mkdir()
    for name in ("sp ace", "new\nline", "-rf", "*", "n" * 200):
        (odd / name).write_text(name)
    (odd / "dangling").symlink_to("nowhere")
    (odd / "absolute").symlink_to("/etc/passwd")
    os.link(odd / "-rf", odd / "hard")
    (odd / "capable").write_text("x")
    run("setcap", "cap_net_raw+ep", odd / "capable")
    os.setxattr(odd / "capable", "user.comment", b"\0binary")
    run("setfacl", "-m", "u:4321:rw", odd / "sp ace")
    run("setcap", "cap_chown+ep", odd / "-rf")
    (odd / "shared").mkdir()
    os.chown(odd / "shared", 33, 44)
    (odd / "shared").chmod(0o2775)
    run("setfacl", "-m", "u:4321:rwx,d:u:4321:rwx", odd / "shared")
    for number in range(9):  # more attributes than fit into an inode
        os.setxattr(odd / "shared", f"user.{number}", b"x" * 30)
    os.chown(odd / "*", 54321, 12345)
    (odd / "*").chmod(0o4755)
    with (odd / "sparse").open("wb") as file:
        file.truncate(20 * MIB)
        file.seek(9 * MIB)
        file.write(b"an island")
    return top


@pytest.fixture(scope="module")
def dumps(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make root.dump and boot.dump, also with compression inside as .z (zlib) and .y (LZO), and whole.dump of both."""
    top = tmp_path_factory.mktemp("dumps")
    disk = guestdisks.ancestor(top / "disk", tree, top).path
    for name, number in (("boot", 1), ("root", 3)):
        part = guestdisks.place(disk, number)
        assert part
        with attached(disk, part.start, part.size) as device:
            run("dump", "-0", "-q", "-f", top / f"{name}.dump", device)
            run("dump", "-0", "-z9", "-q", "-f", top / f"{name}.z", device)
            run("dump", "-0", "-y", "-q", "-f", top / f"{name}.y", device)
    whole = guestdisks.mbr(top / "whole", tree, top).path
    part = guestdisks.place(whole, 1)
    assert part
    with attached(whole, part.start, part.size) as device:
        run("dump", "-0", "-q", "-f", top / "whole.dump", device)
        run("dump", "-1", "-q", "-T", "Thu Jan  1 00:00:00 2015 +0000", "-f", top / "incremental.dump", device)
    return top


def stock(node: Node, root: Path | None, boot: Path | None, suffix: str = "") -> None:
    for source, part in ((root, "root"), (boot, "boot")):
        if source:
            shutil.copy(source, node.images / f"old-{trees.ARCH}-{part}.dump{suffix}")


def create(node: Node, target: Path, **settings: object) -> object:
    return node.create(target, OSP_IMAGE_NAME="old", OSP_IMAGE_TYPE="dump", **settings)


def check(target: Path, tree: Path, tmp_path: Path) -> None:
    """Fail unless all files exist, those of /boot on its own partition if there is one."""
    parts = [part for part in partitions(target) if part.content.get("TYPE") in ("ext3", "ext4", "xfs")]
    boot, root = parts if len(parts) == 2 else (None, parts[0])
    with mounted(target, tmp_path / "root", root) as where:
        found = describe(where)
        assert not os.path.lexists(where / "restoresymtable")
        assert (where / "etc/hostname").read_text() == "inst1\n"
        assert f"UUID={root.content['UUID']}" in (where / "etc/fstab").read_text()
        assert (where / "odd/sparse").stat().st_blocks * 512 < MIB
    if boot:
        with mounted(target, tmp_path / "boot", boot) as where:
            assert (where / "vmlinuz-1").read_text() == "not a kernel\n"
            assert not os.path.lexists(where / "restoresymtable")
    for path, expected in describe(tree).items():
        if path in CHANGED or path.startswith(REMOVED) or (boot and path.startswith(b"boot")):
            continue
        if root.content["TYPE"] == "xfs":  # xfs keeps meaningless fields of an ACL as restore writes them
            for entry in (found[path], expected):
                for attribute in ("system.posix_acl_access", "trusted.SGI_ACL_FILE"):
                    entry[5].pop(attribute, None)
        assert found[path] == expected, path


@pytest.mark.parametrize(
    ("name", "filesystem"),
    [*((name, filesystem) for name in ("dump", "z") for filesystem in ("ext3", "ext4", "xfs")), ("y", "ext4")],
)
def test_root_and_boot(name: str, filesystem: str, node: Node, disk: MakeDisk, dumps: Path, tree: Path,
                       tmp_path: Path) -> None:  # fmt: skip
    stock(node, dumps / f"root.{name}", dumps / f"boot.{name}")
    target = disk(400)
    result = create(node, target, OSP_FILESYSTEM=filesystem).ok()  # type: ignore
    assert "warning" not in result.log
    check(target, tree, tmp_path)


@pytest.mark.parametrize("suffix, command", [("", "gzip"), (".gz", "gzip"), ("", "zstd"), (".zst", "zstd")])
def test_compressed(suffix: str, command: str, node: Node, disk: MakeDisk, dumps: Path, tree: Path,
                    tmp_path: Path) -> None:  # fmt: skip
    for part in ("root", "boot"):
        guestdisks.compress(dumps / f"{part}.dump", node.images / f"old-{trees.ARCH}-{part}.dump{suffix}", command)
    target = disk()
    create(node, target).ok()  # type: ignore
    check(target, tree, tmp_path)


def test_without_a_boot_partition(node: Node, disk: MakeDisk, dumps: Path, tree: Path, tmp_path: Path) -> None:
    """kernel_path is set, so the image of /boot is not needed."""
    stock(node, dumps / "root.dump", None)
    target = disk()
    create(node, target, INSTANCE_HV_kernel_path="/boot/vmlinuz").ok()  # type: ignore
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as where:
        assert (where / "usr/share/doc/copyright").read_text() == "free\n"


def test_one_dump_with_everything(node: Node, disk: MakeDisk, dumps: Path, tree: Path, tmp_path: Path) -> None:
    stock(node, dumps / "whole.dump", None)
    target = disk()
    create(node, target).ok()  # type: ignore
    check(target, tree, tmp_path)


def test_boot_is_missing(node: Node, disk: MakeDisk, dumps: Path) -> None:
    stock(node, dumps / "root.dump", None)
    target = disk()
    create(node, target).failed("nothing for /boot", "-boot.dump")  # type: ignore
    assert target.read_bytes()[:512] == bytes(512), "still armed"


def without_a_header(data: bytes) -> bytes:
    """Overwrite the last inode's header (the content of files has no checksum), or that offset in a compressed dump."""
    headers = (at for at in range(0, len(data) - 1024, 1024) if struct.unpack_from("<i20xi", data, at) == (2, 60012))
    at = max(headers, default=len(data) - 60_000)
    return data[:at] + bytes(1024) + data[at + 1024 :]


@pytest.mark.parametrize("damage, reason", [
    (lambda data: data[: len(data) // 2], "damaged or truncated"),
    (without_a_header, "damaged or truncated"),
    (lambda data: data[:500], "not a dump"),
    (lambda data: b"\1" + data[1:], ""),
    (lambda data: bytes(len(data)), "not a dump"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["root.dump", "root.z"])
def test_damaged(damage: Callable[[bytes], bytes], reason: str, name: str, node: Node, disk: MakeDisk, dumps: Path,
                 tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "bad").write_bytes(damage((dumps / name).read_bytes()))
    stock(node, tmp_path / "bad", dumps / "boot.dump")
    if reason:
        create(node, disk()).failed("old-", reason)  # type: ignore


def test_cut_off_anywhere(node: Node, disk: MakeDisk, dumps: Path, tmp_path: Path) -> None:
    whole = (dumps / "root.dump").read_bytes()
    target = disk()
    for place in range(1, 20):
        (tmp_path / "bad").write_bytes(whole[: len(whole) * place // 20 // 512 * 512])
        stock(node, tmp_path / "bad", dumps / "boot.dump")
        create(node, target).failed("old-")  # type: ignore


@pytest.mark.parametrize("text", ["not at beginning of a file", "anything"])
def test_restore_that_never_ends(text: str, node: Node, disk: MakeDisk, dumps: Path, tmp_path: Path) -> None:
    """Cut off at 3 of 100 offsets (which depend on the dump), it makes restore look for the next file for ever."""
    stock(node, dumps / "root.dump", dumps / "boot.dump")
    (tmp_path / "restore").write_text(f"#!/bin/sh\nexec yes '{text}' >&2\n")
    (tmp_path / "restore").chmod(0o755)
    create(node, disk(), PATH=f"{tmp_path}:{PATH}").failed("old-", text)  # type: ignore


def test_incremental(node: Node, disk: MakeDisk, dumps: Path) -> None:
    stock(node, dumps / "incremental.dump", dumps / "boot.dump")
    create(node, disk()).failed("level 1")  # type: ignore


def test_full_of_zeroes(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """From an ext4 with inline_data, restore before 0.4b48 makes files of zeroes: refuse, or be right."""
    inline = guestdisks.blank(tmp_path / "inline", 40)
    with attached(inline) as device:
        run("mkfs.ext4", "-q", "-O", "inline_data", "-I", "256", device)
    with mounted(inline, tmp_path / "fill", None, "rw") as where:
        for directory in ("etc", "bin", "boot"):
            (where / directory).mkdir()
        for number in range(20):
            (where / f"etc/small{number}").write_text(f"inline {number}\n" * 8)
    with attached(inline) as device:
        run("dump", "-0", "-q", "-f", tmp_path / "dump", device)
    stock(node, tmp_path / "dump", None)
    target = disk()
    result = create(node, target, INSTANCE_HV_kernel_path="/boot/vmlinuz")
    if int(run("sh", "-c", "restore 2>&1 || :").partition("0.4b")[2][:2]) < 48:
        result.failed("old-", "damaged", "inline_data")  # type: ignore
        assert target.read_bytes()[:512] == bytes(512), "still armed"
        return
    result.ok()  # type: ignore
    with mounted(target, tmp_path / "made", partitions(target)[-1]) as where:
        for number in range(20):
            assert (where / f"etc/small{number}").read_text() == f"inline {number}\n" * 8


def test_does_not_fit(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    large = guestdisks.blank(tmp_path / "large", 120)
    guestdisks.make(large, 0, "ext4")
    with mounted(large, tmp_path / "fill", None, "rw") as where:
        (where / "etc").mkdir()
        (where / "etc/large").write_bytes(os.urandom(80 * MIB))
    with attached(large) as device:
        run("dump", "-0", "-q", "-f", tmp_path / "dump", device)
    stock(node, tmp_path / "dump", None)
    create(node, disk(64), INSTANCE_HV_kernel_path="/boot/vmlinuz").failed("does not fit")  # type: ignore
