"""The kinds of disks that Ganeti passes, and their earlier contents."""

from __future__ import annotations

import binascii
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support import MIB, Node, attached, digest, mounted, partitions, recorded, run, signatures

MakeDisk = Callable[..., Path]


def assert_deployed(target: Path, work: Path) -> None:
    parts = partitions(target)
    with mounted(target, work / "root", parts[-1]) as guest:
        assert (guest / "usr/share/doc/copyright").read_text() == "free\n"
        assert f"UUID={parts[-1].content['UUID']}" in (guest / "etc/fstab").read_text()
    with attached(target, parts[-1].start, parts[-1].size, read_only=True) as device:
        run("e2fsck", "-f", "-n", device)


def test_file(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk()
    node.create(target).ok()
    assert target.stat().st_size == 160 * MIB
    assert target.stat().st_blocks * 512 < 80 * MIB, "the file is not sparse any more"
    assert_deployed(target, tmp_path)


def test_block_device(node: Node, block_disk: MakeDisk, tmp_path: Path) -> None:
    target = block_disk()
    node.create(target).ok()
    assert_deployed(target, tmp_path)
    # it is free at once, because Ganeti deactivates it next; and the data is on the device, not only in its cache
    os.close(os.open(target, os.O_RDWR | os.O_EXCL))
    assert digest(target) == digest_direct(target)


@pytest.mark.parametrize("sector", [512, 4096])
def test_cache_is_used_once(sector: int, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The loop device over the disk bypasses the cache if possible; so do the partitions."""
    node.hook("look", f"#!/bin/sh\ncat /sys/block/$(basename $DISK_DEV)/loop/dio >{tmp_path}/direct\n")
    target = disk()
    device = run("losetup", "--find", "--show", "--sector-size", str(sector), target).strip()
    try:
        node.create(device).ok()
    finally:
        run("losetup", "--detach", device)
    assert (tmp_path / "direct").read_text() == f"{int(sector == 512)}\n"
    assert_deployed(target, tmp_path)


def digest_direct(device: Path) -> str:
    """Return the hash of the disk as a reader without page cache sees it, such as a guest with cache=none."""
    copy = run("sh", "-c", f"dd if={device} iflag=direct bs=1M status=none | sha256sum")
    cached = run("sh", "-c", f"dd if={device} bs=1M status=none | sha256sum")
    assert copy == cached
    return digest(device)


def test_link_to_a_block_device(node: Node, block_disk: MakeDisk, tmp_path: Path) -> None:
    """Ganeti passes a link for disks of most storage types (/run/ganeti/instance-disks, /dev/vg/lv)."""
    device = block_disk()
    link = tmp_path / "inst1.example.org:0"
    link.symlink_to(device)
    node.create(link, DISK_0_SIZE=160).ok()
    assert link.is_symlink()
    assert_deployed(device, tmp_path)


def test_size_that_is_no_multiple_of_anything(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk()
    with target.open("r+b") as file:
        file.truncate(160 * MIB + 512 * 3)
    node.create(target).ok()
    assert_deployed(target, tmp_path)


def test_second_disk_is_not_touched(node: Node, disk: MakeDisk, block_disk: MakeDisk) -> None:
    others = [disk(32), block_disk(32)]
    for other in others:
        with attached(other) as device:
            run("mkfs.ext4", "-q", device)
    before = [digest(other) for other in others]
    node.create(disk(), *others).ok()
    assert [digest(other) for other in others] == before


@pytest.mark.parametrize("count", [None, "1"])
def test_more_disks_named_than_counted(count: object, node: Node, disk: MakeDisk) -> None:
    """A DISK_1_PATH beyond DISK_COUNT and a missing second disk are ignored."""
    first = disk()
    node.create(first, DISK_COUNT=count or "2", DISK_1_PATH="/nonexistent", DISK_1_SIZE="10").ok()
    assert len(partitions(first)) == 3


def lvm_label() -> bytes:
    """Return a physical volume's label sector as pvcreate writes it (format: lib/format_text/layout.h of LVM2)."""
    body = struct.pack("<I8s", 32, b"LVM2 001") + b"uuid-of-a-physical-volume-000000" + bytes(448)
    sector = struct.pack("<8sQI", b"LABELONE", 1, 0) + body
    crc = binascii.crc32(sector[20:512], 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return sector[:16] + struct.pack("<I", crc) + sector[20:512]


def raid_superblock(sector: int) -> bytes:
    """Return a superblock of Linux RAID, version 1.0, for an offset on the disk (struct mdp_superblock_1 in md_p.h)."""
    block = bytearray(256)
    struct.pack_into("<4I16s32s", block, 0, 0xA92B4EFC, 1, 0, 0, b"identifier of it", b"node:0")
    struct.pack_into("<Q", block, 144, sector)
    total = sum(struct.unpack("<64I", block))
    struct.pack_into("<I", block, 216, (total & 0xFFFFFFFF) + (total >> 32))
    return bytes(block)


def old_lvm(path: Path) -> None:
    put(path, 512, lvm_label())


def old_raid(path: Path) -> None:
    sector = (path.stat().st_size // 512 - 16) & ~7
    put(path, sector * 512, raid_superblock(sector))


def old_btrfs(path: Path) -> None:
    run("mkfs.btrfs", "-q", path)


def old_gpt(path: Path) -> None:
    run("sfdisk", "--quiet", path, text="label: gpt\n,20M\n,30M\n,\n")
    put(path, 1024 * 1024 + 0x438, b"\x53\xef")


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    "old, seen",
    [(old_lvm, "LVM2_member"), (old_raid, "linux_raid_member"), (old_btrfs, "btrfs"), (old_gpt, "gpt")],
)
@pytest.mark.parametrize("table", ["msdos", "gpt"])
def test_signatures_of_the_last_tenant(
    old: Callable[[Path], None], seen: str, table: str, node: Node, disk: MakeDisk, tmp_path: Path
) -> None:
    target = disk(256)
    old(target)
    assert seen in signatures(target), "the test's own signature is not one"
    node.create(target, OSP_PARTITION_TABLE=table).ok()
    assert_only_the_new(target, table)
    assert_deployed(target, tmp_path)


def assert_only_the_new(target: Path, table: str) -> None:
    assert sorted(signatures(target)) == {"msdos": ["dos"], "gpt": ["PMBR", "gpt", "gpt"]}[table]
    for part in partitions(target):
        with attached(target, part.start, part.size, read_only=True) as device:
            found = [one for one in signatures(device) if one not in ("dos", "vfat")]
            assert found == [part.content["TYPE"]] if part.content.get("TYPE") not in (None, "vfat") else not found


def test_signatures_inside_the_new_partitions(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The last tenant's volumes began and ended exactly at the borders of the new partitions."""
    target = disk(256)
    node.create(target).ok()
    for part in partitions(target):
        sector = (part.size // 512 - 16) & ~7
        put(target, part.start + 512, lvm_label())
        put(target, part.start + sector * 512, raid_superblock(sector))
        with attached(target, part.start, part.size, read_only=True) as device:
            assert {"LVM2_member", "linux_raid_member"} <= set(signatures(device)), "the test's own are not seen"
    node.create(target).ok()
    assert_only_the_new(target, "msdos")
    assert_deployed(target, tmp_path)


@pytest.mark.parametrize(
    "first, second",
    [
        ({"OSP_PARTITION_TABLE": "gpt", "OSP_FILESYSTEM": "btrfs"}, {"OSP_FILESYSTEM": "ext3", "OSP_SWAP": "no"}),
        ({"OSP_FILESYSTEM": "xfs", "OSP_SWAP": "no"}, {"OSP_PARTITION_TABLE": "gpt"}),
        ({}, {}),
    ],
    ids=["gpt-msdos", "msdos-gpt", "same"],
)
def test_reinstall(first: dict, second: dict, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk(448)
    node.create(target, **first).ok()
    before = partitions(target)[-1].content["UUID"]
    assert recorded("create-reinstall")["INSTANCE_REINSTALL"] == "1"
    node.create(target, env="create-reinstall", **second).ok()
    assert_only_the_new(target, second.get("OSP_PARTITION_TABLE", "msdos"))
    assert partitions(target)[-1].content["UUID"] != before
    assert_deployed(target, tmp_path)


def test_recorded_kvm_environments(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk()
    for env in ("create-kvm-network", "create-kvm-network-reinstall"):
        node.create(target, env=env).ok()
        assert_deployed(target, tmp_path)
        with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
            assert os.path.lexists(guest / "etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service")


def test_cdinstall_leaves_the_disk_alone(node: Node, disk: MakeDisk) -> None:
    target = disk()
    before = digest(target)
    node.create(target, OSP_CDINSTALL="yes", OSP_IMAGE_NAME=None).ok()
    assert digest(target) == before


def test_what_ganeti_has_written_itself_is_left_alone(node: Node, disk: MakeDisk) -> None:
    """Ganeti writes the disk when it reinstalls. When it creates, it ignores the parameter of the OS and calls us."""
    target = disk()
    before = digest(target)
    log = node.create(target, OSP_OS_IMAGE="/srv/x.img", INSTANCE_REINSTALL=1).ok().log
    assert "os-image='/srv/x.img': Ganeti has written that to the first disk itself" in log
    node.create(target, OSP_OS_IMAGE="/srv/x.img").failed("os-image='/srv/x.img'", "no image was written")
    assert digest(target) == before
