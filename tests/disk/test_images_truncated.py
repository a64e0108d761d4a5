"""Truncated images are refused with both sizes, before the first write or with a disarmed disk; whole ones are not."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import backups
import guestdisks
import pytest
import trees
from support import MIB, Node, attached, digest, run

MakeDisk = Callable[..., Path]
SIZE, DISK = 64, 96  # MiB

GPT = "label: gpt\n1 : start=1M, size=20M\n2 : start=22M, size=40M\n"
MSDOS = "label: dos\n1 : start=1M, size=20M\n2 : start=22M, size=42M, type=5\n5 : start=24M, size=40M\n"
FILESYSTEMS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext2": ["mkfs.ext2", "-q", "-F", "-b", "1024"],
    "swap": ["mkswap", "-q"],
    "swap-64k": ["mkswap", "-q", "--pagesize", "65536"],
}
LARGE = {"xfs": (320, ["mkfs.xfs", "-q"]), "btrfs": (128, ["mkfs.btrfs", "-q"])}


def random_data(path: Path, mib: int) -> None:
    """Fill a file with holes, and with data in every tenth MiB and up to its last sector."""
    with path.open("wb") as file:
        for start in range(0, mib * MIB, 10 * MIB):
            file.seek(start)
            file.write(os.urandom(MIB // 2))
        file.truncate(mib * MIB)
        file.seek(mib * MIB - MIB // 2)
        file.write(os.urandom(MIB // 2))


def partitioned(path: Path, script: str) -> Path:
    random_data(path, SIZE)
    run("sfdisk", "--quiet", "--wipe", "always", path, text=script)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return partitioned(tmp_path / "source", GPT)


def attempt(node: Node, target: Path, name: str, image_type: str = "qemu", **settings: object) -> str:
    """Return the log of a create that must fail, name the image, and leave the disk as it was or disarmed."""
    with target.open("r+b") as file:
        file.write(os.urandom(MIB))
    before = digest(target)
    result = node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE=image_type, **settings)
    result.failed(f"cut-{trees.ARCH}.{name}", "is truncated")
    refused = digest(target) == before
    assert refused or target.read_bytes()[:512] == bytes(512), "still armed"
    return f"{'refused' if refused else 'disarmed'}: {result.last}"


def image_path(node: Node, name: str) -> Path:
    return node.images / f"cut-{trees.ARCH}.{name}"


def shorten(path: Path, size: int) -> None:
    os.truncate(path, size)


# qcow2


@pytest.mark.parametrize("options", [[], ["-c"], ["-o", "cluster_size=2M"], ["-o", "extended_l2=on"],
                                     ["-o", "compat=0.10"], ["-o", "preallocation=metadata"]], ids=str)  # fmt: skip
def test_qcow2(options: list[str], node: Node, disk: MakeDisk, source: Path) -> None:
    path = image_path(node, "qcow2")
    guestdisks.qcow2(source, path, *options)
    whole = path.read_bytes()
    for cut, nomount in ((1024, "yes"), (len(whole) // 2, "no"), (len(whole) - 200_000, "yes")):
        path.write_bytes(whole[: len(whole) - cut])
        log = attempt(node, disk(DISK), "qcow2", OSP_NOMOUNT=nomount)
        assert log.startswith("refused") and f"({len(whole) - cut} bytes)" in log and "of at least" in log
    path.write_bytes(whole + b"more")
    target = disk(DISK)
    node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="qcow2", OSP_NOMOUNT="yes").ok()
    assert target.read_bytes()[: SIZE * MIB] == source.read_bytes()


def test_qcow2_that_is_only_dirty(node: Node, disk: MakeDisk, source: Path) -> None:
    """Its writer was killed; qemu-img check finds errors in the reference counts, which no reader needs."""
    path = image_path(node, "qcow2")
    guestdisks.qcow2(source, path, "-o", "lazy_refcounts=on")
    killed = ["-c", "write -P 7 11M 1M", "-c", "flush", "-c", "sigraise 9"]
    subprocess.run(["qemu-io", "-f", "qcow2", *killed, path], stdout=subprocess.DEVNULL)
    assert subprocess.run(["qemu-img", "check", "-q", path], capture_output=True).returncode
    target = disk(DISK)
    node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="qcow2", OSP_NOMOUNT="yes").ok()
    assert target.read_bytes()[11 * MIB : 12 * MIB] == b"\7" * MIB


def test_qcow2_of_a_truncated_disk(node: Node, disk: MakeDisk, source: Path) -> None:
    shorten(source, 40 * MIB)
    guestdisks.qcow2(source, image_path(node, "qcow2"))
    log = attempt(node, disk(DISK), "qcow2", OSP_NOMOUNT="yes")
    assert str(40 * MIB) in log and str(62 * MIB) in log


# Raw


@pytest.mark.parametrize("script", [GPT, MSDOS], ids=["gpt", "msdos"])
def test_raw_behind_whose_end_a_partition_ends(script: str, node: Node, disk: MakeDisk) -> None:
    path = partitioned(image_path(node, "raw"), script)
    end = 62 if script == GPT else 64
    for size, nomount in ((end * MIB - 512, "yes"), (30 * MIB, "no"), (MIB, "yes")):
        shorten(path, size)
        log = attempt(node, disk(DISK), "raw", "raw", OSP_NOMOUNT=nomount)
        assert log.startswith("refused") and f"({size} bytes)" in log and f"({end * MIB} bytes)" in log


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "bzip2", "lz4"])
def test_compressed_after_it_was_truncated(compression: str, node: Node, disk: MakeDisk, source: Path) -> None:
    """The file is sound; what comes out of it is not. Only xz says how much that is before."""
    shorten(source, 40 * MIB + 512)
    guestdisks.compress(source, image_path(node, "raw"), compression)
    log = attempt(node, disk(DISK), "raw", "raw", OSP_NOMOUNT="yes")
    assert str(40 * MIB + 512) in log and str(62 * MIB) in log


@pytest.mark.parametrize("kind", [*FILESYSTEMS, *LARGE])
def test_raw_filesystem(kind: str, node: Node, disk: MakeDisk) -> None:
    mib, make = LARGE.get(kind) or (SIZE, FILESYSTEMS[kind])
    path = image_path(node, "raw")
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    run(*make, path)
    shorten(path, mib * MIB - 4096)
    log = attempt(node, disk(mib), "raw", "raw", OSP_NOMOUNT="yes")
    assert log.startswith("refused") and str(mib * MIB) in log
    shorten(path, mib * MIB)
    node.create(disk(mib), OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes").ok()


@pytest.mark.parametrize("suffix", ["raw", "raw.gz"])
def test_raw_of_zeroes(suffix: str, node: Node, disk: MakeDisk) -> None:
    """As a download leaves that has reserved its room, and stopped."""
    path = image_path(node, "raw")
    path.write_bytes(bytes(SIZE * MIB))
    if suffix != "raw":
        run("gzip", path)
    target = disk(DISK)
    before = digest(target)
    result = node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes")
    result.failed("begins with nothing but zeroes")
    assert digest(target) == before


def test_raw_of_large_sectors(node: Node, disk: MakeDisk) -> None:
    path = image_path(node, "raw")
    random_data(path, SIZE)
    with path.open("r+b") as file:
        file.write(bytes(MIB))
    device = run("losetup", "--find", "--show", "--sector-size", "4096", path).strip()
    try:
        run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", device, text=GPT)
    finally:
        run("losetup", "--detach", device)
    node.create(disk(DISK), OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes").ok()
    shorten(path, 61 * MIB)
    attempt(node, disk(DISK), "raw", "raw", OSP_NOMOUNT="yes")


# No alarm


def without_backup_table(path: Path) -> None:
    shorten(partitioned(path, GPT), 62 * MIB)


def with_more_behind(path: Path) -> None:
    with partitioned(path, GPT).open("ab") as file:
        file.write(b"trailing bytes")


def iso(path: Path) -> None:
    """As xorriso makes it, with a table whose partition ends at a round number behind the end."""
    random_data(path, SIZE - 1)
    with path.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<B3xB3xII", 0x80, 0x17, 0, SIZE * MIB // 512).ljust(64, b"\0") + b"\x55\xaa")
        file.seek(16 * 2048)
        blocks = (SIZE - 2) * MIB // 2048
        descriptor = b"\1CD001\1".ljust(80, b"\0") + blocks.to_bytes(4, "little") + blocks.to_bytes(4, "big")
        file.write(descriptor.ljust(128, b"\0") + b"\0\x08\x08\0" + bytes(1916))


def boot_sector_of_fat(path: Path) -> None:
    """It ends like a partition table, and has code where that has entries."""
    random_data(path, SIZE)
    with path.open("r+b") as file:
        file.write(b"\xeb\x3c\x90mkfs.fat".ljust(54, b"\0") + b"FAT16   ".ljust(456, b"\x80") + b"\x55\xaa")


def boot_loader_alone(path: Path) -> None:
    random_data(path, SIZE)
    with path.open("r+b") as file:
        file.seek(510)
        file.write(b"\x55\xaa")


@pytest.mark.parametrize("make", [without_backup_table, with_more_behind, iso, boot_sector_of_fat, boot_loader_alone])
def test_whole_raw(make: Callable[[Path], None], node: Node, disk: MakeDisk) -> None:
    path, target = image_path(node, "raw"), disk(DISK)
    make(path)
    node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes").ok()
    assert target.read_bytes() == path.read_bytes().ljust(DISK * MIB, b"\0")


def test_gpt_without_its_backup_is_grown(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.cloud(tmp_path / "image", small_tree, tmp_path)
    root = guestdisks.place(guest.path, guest.root)
    assert root
    shorten(guest.path, root.start + root.size)
    guest.path.rename(image_path(node, "raw"))
    target = disk(200)
    node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="raw").ok()
    grown = guestdisks.place(target, guest.root)
    assert grown and grown.size > 100 * MIB
    assert "corrupt" not in run("sh", "-c", 'sfdisk --list "$0" 2>&1', target)


@pytest.mark.parametrize("compression", ["gzip", "bzip2"])
def test_garbage_behind_a_compressed_image(compression: str, node: Node, disk: MakeDisk, source: Path) -> None:
    """What ignores it while it unpacks does not take it for the end."""
    path = image_path(node, "raw")
    guestdisks.compress(source, path, compression)
    with path.open("ab") as file:
        file.write(b"garbage")
    target = disk(DISK)
    node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes").ok()
    assert target.read_bytes()[: SIZE * MIB] == source.read_bytes()


# What is compressed, and dumps


@pytest.mark.parametrize("image_type", ["raw", "tarball"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "bzip2", "lz4"])
def test_compressed(compression: str, image_type: str, node: Node, disk: MakeDisk, source: Path, images: Path) -> None:
    plain = source if image_type == "raw" else images / "small.tar"
    path = image_path(node, "raw" if image_type == "raw" else "tar")
    guestdisks.compress(plain, path, compression)
    size = path.stat().st_size * 2 // 3
    while int.from_bytes(path.read_bytes()[size - 4 : size], "little") % 512 == 0:  # by accident whole for gzip
        size -= 1
    shorten(path, size)
    assert attempt(node, disk(DISK), path.name.partition(".")[2], image_type).startswith("refused")


def test_dump(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "guest", small_tree, tmp_path)
    part = guestdisks.place(guest.path, 1)
    assert part
    path = node.images / f"cut-{trees.ARCH}-root.dump"
    with attached(guest.path, part.start, part.size) as device:
        run("dump", "-0", "-q", "-f", path, device)
    whole = path.read_bytes()
    target = guestdisks.soiled(disk(160), 160)
    before = digest(target)
    for size in (len(whole) * 2 // 3, 20_000):
        path.write_bytes(whole[:size])
        result = node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="dump", INSTANCE_HV_kernel_path="/vmlinuz")
        result.failed(str(path), "truncated")
        assert digest(target) == before
    path.write_bytes(whole + bytes(5000))
    node.create(target, OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="dump", INSTANCE_HV_kernel_path="/vmlinuz").ok()


@pytest.mark.parametrize("form", ["qcow2", "raw", "raw.gz", "raw.xz"])
def test_verify_judges_as_create_does(form: str, node: Node, disk: MakeDisk, source: Path) -> None:
    """As far as that is seen without unpacking."""
    path = image_path(node, form)
    if form == "qcow2":
        guestdisks.qcow2(source, path)
    elif form == "raw":
        run("cp", source, path)
    if form == "raw.xz":
        shorten(source, 40 * MIB)
    if form.startswith("raw."):
        guestdisks.compress(source, path, {"raw.gz": "gzip", "raw.xz": "xz"}[form])
    values = node.environment(disk(DISK), OSP_IMAGE_NAME="cut", OSP_IMAGE_TYPE="qemu", OSP_NOMOUNT="yes")
    if form != "raw.xz":
        node.call("verify", values).ok()
        shorten(path, path.stat().st_size // 2 + 1)
    node.call("verify", values).failed(str(path), "is truncated")


# Import


def test_backup_of_a_disk_without_a_table(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    with stream.open("wb") as file:
        file.truncate(SIZE * MIB)
    run("mkfs.ext4", "-q", stream)
    shorten(stream, 50 * MIB)
    target = disk(DISK)
    backups.restore(node, stream, target, 1).failed("truncated", str(50 * MIB), str(SIZE * MIB))
    assert backups.is_disarmed(target, [])


def test_backup_with_a_truncated_qcow2(node: Node, disk: MakeDisk, source: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    guestdisks.qcow2(source, stage / "disk.img")
    shorten(stage / "disk.img", (stage / "disk.img").stat().st_size - 100_000)
    run("tar", "--create", "--file", tmp_path / "stream", "--directory", stage, "./disk.img")
    target = disk(DISK)
    before = digest(target)
    backups.restore(node, tmp_path / "stream", target, 1).failed("disk.img", "is truncated")
    assert digest(target) == before
