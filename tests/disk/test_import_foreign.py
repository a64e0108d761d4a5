"""import of streams of other programs: bare disks, compressed ones, and backups of ganeti-instance-image."""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path

import backups
import guestdisks
import pytest
from backups import exported, is_disarmed, restore, same
from guestdisks import blank, make, place
from streams import MakeDisk, archive, soil
from streams import backup as backup
from support import MIB, Node, attached, digest, mounted, partitions, run


def compressed(data: Path, *command: str) -> Path:
    return guestdisks.compress(data, data.with_suffix(".compressed"), *command)


@pytest.mark.parametrize("command", [["cat"], ["zstd", "-q", "-c"], ["gzip", "-1", "-c"]], ids=lambda one: one[0])
def test_bare_disk(command: list[str], node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)
    target = soil(disk(110))
    restore(node, compressed(guest.path, *command), target, index=1).ok()
    assert same(guest.path, target)
    short = tmp_path / "short"
    short.write_bytes(compressed(guest.path, *command).read_bytes()[:-400_000])
    restore(node, short, target, index=1).failed("truncated")
    assert is_disarmed(target, [(part.start, part.size) for part in partitions(guest.path)])
    small = soil(disk(90))
    before = digest(small)
    restore(node, compressed(guest.path, *command), small, index=1).failed("smaller")
    assert digest(small) == before


@pytest.mark.parametrize("command", [["zstd", "-q", "-c", "--check"], ["gzip", "-1", "-c"]], ids=lambda one: one[0])
def test_checksum_of_the_compression(command: list[str], node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The checksum comes last: everything is already written, and must not remain."""
    source = disk(32)
    make(source, 0, "ext4")
    stream = compressed(source, *command)
    data = bytearray(stream.read_bytes())
    data[-4 if command[0] == "zstd" else -8] ^= 1
    stream.write_bytes(data)
    target = disk(32)
    restore(node, stream, target, index=1).failed("damaged or truncated")
    assert is_disarmed(target, [])


def test_compressed_backup(
    node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]], tmp_path: Path
) -> None:
    stream, one, other = tmp_path / "backup", disk(32), disk(32)
    stream.write_bytes(backup[0])
    restore(node, stream, one, index=1).ok()
    restore(node, compressed(stream, "gzip", "-1", "-c"), other, index=1).ok()
    assert same(one, other)


def test_compressed_again_and_again(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """A stream of few bytes could start a process for each of hundreds of layers."""
    stream, target = tmp_path / "backup", disk(32)
    stream.write_bytes(gzip.compress(gzip.compress(os.urandom(4096))))
    before = digest(target)
    restore(node, stream, target, index=1).failed("compressed with gzip twice")
    assert digest(target) == before


@pytest.mark.parametrize("count", [512, 1000, 10240, MIB - 1])
def test_backup_of_nothing(count: int, node: Node, disk: MakeDisk) -> None:
    """tar writes this for no files; it must not become a disk of zeroes."""
    target = disk(32)
    target.write_bytes(b"a system" + bytes(32 * MIB - 8))
    restore(node, bytes(count), target, index=1).failed("holds nothing", f"{count} bytes")
    assert target.read_bytes()[:8] == b"a system"


@pytest.mark.parametrize("version", ["10", "15"])
def test_older_interfaces(version: str, node: Node, disk: MakeDisk) -> None:
    """API 10 has no variants."""
    source, target = disk(8), disk(8)
    source.write_bytes(os.urandom(8 * MIB))
    more = {"OS_API_VERSION": version, "OS_VARIANT": None if version == "10" else "default"}
    restore(node, exported(node, source, **more), target, **more).ok()
    assert same(source, target)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "swap", "vfat"])
def test_bare_filesystem(kind: str, node: Node, tmp_path: Path) -> None:
    source = blank(tmp_path / "source", 340)
    make(source, 0, kind)
    target = blank(tmp_path / "target", 350)
    restore(node, source, target, index=1).ok()
    assert same(source, target)


def test_bare_disk_that_turns_out_larger(node: Node, disk: MakeDisk) -> None:
    source = disk(40)
    run("sfdisk", "--quiet", source, text="label: dos\n,20M\n")
    with source.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    target = disk(39)
    restore(node, source, target, index=1).failed("larger")
    assert is_disarmed(target, [])


@pytest.fixture
def ancestor(small_tree: Path, tmp_path: Path) -> Path:
    """Make a directory as ganeti-instance-image staged it: with dumps of both filesystems."""
    guest = guestdisks.ancestor(tmp_path / "ancestor.img", small_tree, tmp_path)
    stage = tmp_path / "stage"
    stage.mkdir()
    for name, number in (("boot", 1), ("root", 3)):
        part = place(guest.path, number)
        assert part
        with attached(guest.path, part.start, part.size, read_only=True) as device:
            run("dump", "-0", "-q", "-z9", "-f", stage / f"{name}.dump", device)
    return stage


@pytest.mark.parametrize("order", [["boot.dump", "root.dump"], ["root.dump", "boot.dump"]])
@pytest.mark.parametrize("kernel_path", [None, "/boot/vmlinuz"])
def test_dumps(
    order: list[str], kernel_path: str | None, node: Node, disk: MakeDisk, ancestor: Path, tmp_path: Path
) -> None:
    target = soil(disk(160))
    restore(node, archive(ancestor, *order), target, INSTANCE_HV_kernel_path=kernel_path).ok()
    parts = partitions(target)
    assert [part.content["TYPE"] for part in parts] == (["swap", "ext4"] if kernel_path else ["ext4", "swap", "ext4"])
    with mounted(target, tmp_path / "mnt", parts[-1]) as top:
        assert (top / "usr/share/doc/copyright").read_text() == "free\n"
        assert f"UUID={parts[-1].content['UUID']}" in (top / "etc/fstab").read_text()
        assert "/dev/sda" not in (top / "etc/fstab").read_text()
        assert not (top / "restoresymtable").exists()
        boot = sorted(entry.name for entry in (top / "boot").iterdir())
    if not kernel_path:
        with mounted(target, tmp_path / "mnt", parts[0]) as top:
            boot = sorted(entry.name for entry in top.iterdir())
    assert "vmlinuz-1" in boot and "restoresymtable" not in boot


def test_root_dump_alone(node: Node, disk: MakeDisk, ancestor: Path, tmp_path: Path) -> None:
    target = disk(160)
    restore(node, archive(ancestor, "root.dump"), target).ok()
    with mounted(target, tmp_path / "mnt", partitions(target)[-1]) as top:
        assert (top / "usr/share/doc/copyright").read_text() == "free\n"


def test_dumps_that_are_not_whole(node: Node, disk: MakeDisk, ancestor: Path) -> None:
    whole = archive(ancestor, "boot.dump", "root.dump").read_bytes()
    target = disk(160)
    restore(node, archive(ancestor, "boot.dump"), target).failed("no root.dump")
    assert is_disarmed(target, [])
    for end in (600, 2000, len(whole) // 2, len(whole) - 15000):
        restore(node, whole[:end], target).failed("truncated")
        assert is_disarmed(target, [])


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_disk_img(image_format: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)
    stage = tmp_path / "stage"
    stage.mkdir()
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, guest.path, stage / "disk.img")
    whole = archive(stage, "disk.img")
    target = soil(disk(110))
    restore(node, whole, target, index=1).ok()
    assert same(guest.path, target)
    small = soil(disk(100))
    before = digest(small)
    restore(node, whole, small, index=1).failed(str(100 * MIB))
    assert digest(small) == before
    for end in (-10240, -200_000):
        restore(node, whole.read_bytes()[:end], target, index=1).failed("truncated")
        assert is_disarmed(target, []) or image_format == "qcow2"  # qcow2 is written only after all data has arrived


def test_disk_img_with_a_backing_file(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """It would make qemu-img copy files of the node into the guest."""
    stage = tmp_path / "stage"
    stage.mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", stage / "disk.img", "8M")
    target = soil(disk(32))
    before = digest(target)
    restore(node, archive(stage, "disk.img"), target).failed("backing file")
    assert digest(target) == before


# what is piped into import -> what the message calls it, and a word of the hint
FOREIGN: dict[str, tuple[list[str], str, str]] = {
    "lzop": (["printf", r"\211LZO\0\r\n\032\n"], "compressed by lzop", "lzop -dc"),
    "zip": (["printf", r"PK\3\4"], "a zip archive", "unzip"),
    "dump": (["dump", "-0", "-q", "-f", "-", "{device}"], "a dump of one filesystem", "it is an image"),
    "qcow2": (["cat", "{qcow2}"], "a disk image (qcow2)", "qemu-img convert -O raw"),
    "qcow2, packed": (["gzip", "-c", "{qcow2}"], "a disk image (qcow2)", "qemu-img convert -O raw"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_backup(what: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """It is named, with what to do, before anything is written."""
    command, name, word = FOREIGN[what]
    source, qcow2 = blank(tmp_path / "source", 32), tmp_path / "qcow2"
    make(source, 0, "ext4")
    run("qemu-img", "convert", "-O", "qcow2", source, qcow2)
    with attached(source) as device:
        argv = [word.format(device=device, qcow2=qcow2) for word in command]
        stream = subprocess.run(argv, capture_output=True, check=True).stdout
    target = disk()
    before = digest(target)
    result = restore(node, stream, target).failed("is no backup and no disk: it is", name)
    assert word in result.lines[-2], result.log
    assert digest(target) == before


@pytest.mark.parametrize("command", ["export", "import"])
def test_disk_of_no_bytes(command: str, node: Node, disk: MakeDisk) -> None:
    empty = disk(0)
    done = backups.export(node, empty).result if command == "export" else restore(node, b"x" * 512, empty)
    done.failed(f"disk {empty} has 0 bytes: that is no disk")
