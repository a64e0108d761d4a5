"""Disks of guests that crashed: everything is only in a journal or log, and every command sees it all the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import backups
import guestdisks
import pytest
import trees
from guestdisks import UUID, place
from support import MIB, Node, Result, attached, digest, left_dirty, mounted, probe, run

MakeDisk = Callable[..., Path]
NAME = "inst1.example.org"
KINDS = ("ext4", "xfs", "btrfs")
SIZES = {"xfs": 310, "btrfs": 200}  # MiB of the root
HOOK = """#!/bin/sh
echo "boot is ${BOOT_DEV##*p}"
cat $TARGET/boot/config-*
"""


@pytest.fixture(scope="module")
def dirty(small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a disk: 1 is /boot (ext4), 2 the root, both as after a crash."""
    top = tmp_path_factory.mktemp("dirty")

    def write(image: Path, kind: str) -> None:
        size = SIZES.get(kind, 80)
        guestdisks.blank(image, size + 42, f"label: gpt\n1 : size=40M\n2 : size={size}M\n")
        for number, filesystem in ((1, "ext4"), (2, kind)):
            guestdisks.make(image, number, filesystem)
        with left_dirty(image, top / "crashing", place(image, 1)) as boot:
            run("cp", "--archive", f"{small_tree}/boot/.", boot)
            (boot / "config-6.1").write_text("found\n")
        guestdisks.fill(image, 2, bare, top)
        with left_dirty(image, top / "crashing", place(image, 2)) as root:
            run("cp", "--archive", small_tree / "etc", root)
            (root / "etc/hostname").write_text("inst2\n")
            (root / "etc/fstab").write_text(f"UUID={UUID.format(1)} /boot ext4\nUUID={UUID.format(2)} / {kind}\n")

    def make(kind: str) -> Path:
        image = top / kind
        if not image.exists():
            write(image, kind)
            if seen_without_replay(image, kind, top):  # a sync(2) of some other program came in between
                image.unlink()
                write(image, kind)
        return image

    bare = top / "tree"
    run("cp", "--archive", small_tree, bare)
    run("rm", "-r", bare / "boot", bare / "etc")
    (bare / "boot").mkdir()
    return make


@pytest.fixture
def copied(dirty: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        run("cp", "--sparse=always", dirty(kind), tmp_path / "disk")
        return tmp_path / "disk"

    return copy


def seen_without_replay(disk: Path, kind: str, work: Path) -> bool:
    options = {"xfs": "ro,nouuid,norecovery", "btrfs": "ro,rescue=nologreplay"}.get(kind, "ro,noload")
    with mounted(disk, work / "look", place(disk, 2), options) as root:
        return (root / "etc").exists()


def hostname(disk: Path, work: Path) -> str:
    with mounted(disk, work / "look", place(disk, 2)) as root:
        return (root / "etc/hostname").read_text()


def root_size(disk: Path, work: Path) -> int:
    with mounted(disk, work / "look", place(disk, 2)) as root:
        status = os.statvfs(root)
        return status.f_blocks * status.f_frsize


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_there_without_replay(kind: str, dirty: Callable[[str], Path], tmp_path: Path) -> None:
    """The other tests would prove nothing otherwise."""
    assert not seen_without_replay(dirty(kind), kind, tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, "ext3"])
def test_create(kind: str, node: Node, disk: MakeDisk, dirty: Callable[[str], Path], tmp_path: Path) -> None:
    node.image(dirty(kind), f"dirty-{trees.ARCH}.raw")
    node.hook("look", HOOK)
    target = disk(600)
    log = node.create(target, OSP_IMAGE_NAME="dirty", OSP_IMAGE_TYPE="raw").ok().log
    assert "boot is 1" in log and "found" in log
    assert hostname(target, tmp_path) == "inst1\n"
    assert root_size(target, tmp_path) > 400 * MIB


def test_label(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The name by which the fstab calls /boot is only in the journal."""
    image = guestdisks.blank(tmp_path / "image", 130, "label: gpt\n1 : size=40M\n2 : size=80M\n")
    for number in (1, 2):
        guestdisks.make(image, number, "ext4")
    guestdisks.fill(image, 2, small_tree, tmp_path, "LABEL=later /boot ext4\n")
    with left_dirty(image, tmp_path / "crashing", place(image, 1)) as boot:
        (boot / "config-6.1").write_text("found\n")
        run("e2label", run("findmnt", "--noheadings", "--output", "SOURCE", boot).strip(), "later")
    node.image(image, f"dirty-{trees.ARCH}.raw")
    node.hook("look", HOOK)
    log = node.create(disk(200), OSP_IMAGE_NAME="dirty", OSP_IMAGE_TYPE="raw").ok().log
    assert "boot is 1" in log and "found" in log


@pytest.mark.parametrize("kind", KINDS)
def test_rename(kind: str, node: Node, copied: Callable[[str], Path], tmp_path: Path) -> None:
    node.hook("look", HOOK)
    node.defaults("RENAME_HOOKS=look")
    target = copied(kind)
    log = node.call("rename", node.environment(target, env="rename")).ok().log
    assert "boot is 1" in log and "found" in log
    assert hostname(target, tmp_path) == "inst1\n"


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import(kind: str, node: Node, disk: MakeDisk, dirty: Callable[[str], Path], tmp_path: Path) -> None:
    """An export writes nothing to the disk, and loses nothing of it."""
    node.hook("look", HOOK)
    node.defaults("IMPORT_HOOKS=look")
    before = digest(dirty(kind))
    stream = backups.exported(node, dirty(kind))
    assert digest(dirty(kind)) == before
    target = disk(600)
    log = backups.restore(node, stream, target).ok().log
    assert "boot is 1" in log and "found" in log
    assert hostname(target, tmp_path) == "inst2\n"
    assert root_size(target, tmp_path) > 400 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_mount_disks(kind: str, node: Node, copied: Callable[[str], Path]) -> None:
    """Read-only, the disk stays as it is, and the message says what cannot be seen."""
    target = copied(kind)
    before = digest(target)
    result = node.tool("mount-disks", "--read-only", NAME, "--disk", str(target))
    result.failed("cannot see whether the disk holds a system", "was not cleanly unmounted")
    assert "without --read-only" in result.log
    assert digest(target) == before

    node.tool("mount-disks", NAME, "--disk", str(target)).ok()
    top = Path(f"/tmp/{NAME}_root")
    try:
        assert (top / "etc/hostname").read_text() == "inst2\n"
        assert (top / "boot/config-6.1").read_text() == "found\n"
    finally:
        node.tool("umount-disks", "--here", NAME).ok()
    node.tool("mount-disks", "--read-only", NAME, "--disk", str(target)).ok()
    node.tool("umount-disks", "--here", NAME).ok()


def capture(node: Node, disk: Path, kind: str, *options: str) -> Result:
    return node.tool("ganeti-image", "-t", kind, "-i", NAME, "-n", kind, "--disk", str(disk), *options)


@pytest.mark.parametrize("kind", KINDS)
def test_capture(kind: str, node: Node, disk: MakeDisk, dirty: Callable[[str], Path], tmp_path: Path) -> None:
    """The disk stays as it is; what is missing in it without its journal is seen in the copy."""
    before = digest(dirty(kind))
    for image_type in ("tarball", "qemu-img"):
        capture(node, dirty(kind), image_type, "--seal").ok()
    if kind == "ext4":
        capture(node, dirty(kind), "dump").ok()
    else:
        capture(node, dirty(kind), "dump").failed("dump(8) knows ext only")
    assert digest(dirty(kind)) == before
    target = disk(600)
    node.create(target, OSP_IMAGE_NAME="tarball", OSP_IMAGE_TYPE="tarball").ok()
    node.create(target, OSP_IMAGE_NAME="qemu-img", OSP_IMAGE_TYPE="qemu").ok()
    assert hostname(target, tmp_path) == "inst1\n"


def test_boot_beside_a_clean_root(node: Node, copied: Callable[[str], Path]) -> None:
    """mount-disks shows what it can, and says what is missing."""
    target = copied("ext4")
    part = place(target, 2)
    assert part
    with attached(target, part.start, part.size) as device:
        run("e2fsck", "-p", device, check=False)
    result = node.tool("mount-disks", "--read-only", NAME, "--disk", str(target)).ok()
    node.tool("umount-disks", "--here", NAME).ok()
    assert "warning: the guest's /boot is in use, or was not cleanly unmounted" in result.log


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_journal_that_cannot_be_replayed(kind: str, node: Node, disk: MakeDisk, copied: Callable[[str], Path]) -> None:
    """rename and import fail, as nobody knows whom they left out; the disk is as it was in the backup."""
    image = copied(kind)
    part = place(image, 2)
    assert part
    with attached(image, part.start, part.size) as device:
        spoil(kind, device)
    node.image(image, f"dirty-{trees.ARCH}.raw")
    stream = backups.exported(node, image)
    target = disk(600)
    why = "its journal cannot be replayed"
    result = node.create(target, OSP_IMAGE_NAME="dirty", OSP_IMAGE_TYPE="raw").failed(why)
    assert "hint: " in result.log
    assert backups.is_disarmed(target, [])
    node.call("rename", node.environment(image, env="rename")).failed(why)
    backups.restore(node, stream, target).failed(why)
    assert probe(target, part.start, part.size)["UUID"] == part.content["UUID"]


def test_journal_of_boot_that_cannot_be_replayed(node: Node, disk: MakeDisk, copied: Callable[[str], Path]) -> None:
    """The last line says which filesystem it is, as a loop device that is gone tells nobody."""
    image = copied("ext4")
    part = place(image, 1)
    assert part
    with attached(image, part.start, part.size) as device:
        spoil("ext4", device)
    node.image(image, f"dirty-{trees.ARCH}.raw")
    result = node.create(disk(600), OSP_IMAGE_NAME="dirty", OSP_IMAGE_TYPE="raw").failed(
        "the guest's /boot: cannot mount"
    )
    assert "dmesg" in result.lines[-2]
    node.call("rename", node.environment(image, env="rename")).failed("the guest's /boot: cannot mount")


def spoil(kind: str, device: Path) -> None:
    """Give the journal a version, or features, that no kernel knows."""
    data = device.read_bytes()
    sector, begin, field, unknown = {
        "ext4": (1024, b"\xc0\x3b\x39\x98\0\0\0\4", 0x28, b"\x40\0\0\0"),  # its superblock, h_blocktype 4
        "xfs": (512, b"\xfe\xed\xba\xbe", 8, b"\0\0\0\x40"),  # every record's header
    }[kind]
    found = [offset for offset in range(0, len(data), sector) if data.startswith(begin, offset)]
    assert found
    with device.open("r+b") as file:
        for offset in found:
            file.seek(offset + field)
            file.write(unknown)
