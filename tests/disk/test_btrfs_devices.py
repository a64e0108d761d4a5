"""A btrfs over several partitions of one disk; the kernel may know them, or those of another instance, from a scan."""

from __future__ import annotations

import os
import signal
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import backups
import guestdisks
import pytest
import trees
from guestdisks import place
from support import MIB, Node, Result, attached, digest, mounted, run

MakeDisk = Callable[..., Path]
NAME = "inst1.example.org"
PROFILES = {"single": ["-d", "single", "-m", "single"], "raid1": ["-d", "raid1", "-m", "raid1"]}


@contextmanager
def devices(disk: Path, *numbers: int) -> Iterator[list[Path]]:
    """Attach partitions; the kernel forgets them as devices of a btrfs on exit."""
    with ExitStack() as stack:
        parts = [part for part in (place(disk, number) for number in numbers) if part]
        found = [stack.enter_context(attached(disk, part.start, part.size)) for part in parts]
        try:
            yield found
        finally:
            for device in found:
                run("btrfs", "device", "scan", "--forget", device, check=False)


@contextmanager
def mounted_devices(disk: Path, work: Path, *numbers: int, options: str = "rw") -> Iterator[Path]:
    where = work / "devices"
    where.mkdir()
    with devices(disk, *numbers) as found:
        others = "".join(f",device={device}" for device in found)
        run("mount", "-t", "btrfs", "-o", f"{options}{others}", found[0], where)
        try:
            yield where
        finally:
            run("umount", where)
    where.rmdir()


def image_of(path: Path, tree: Path, work: Path, *options: str, count: int = 2) -> Path:
    """Make a disk whose partitions are one btrfs."""
    numbers = range(1, count + 1)
    guestdisks.blank(path, 130 * count + 2, "label: gpt\n" + ", 130M\n" * count)
    identity = uuid.uuid4()
    with devices(path, *numbers) as found:
        run("mkfs.btrfs", "-q", "-f", "-U", str(identity), *options, *found)
    with mounted_devices(path, work, *numbers) as where:
        run("cp", "--archive", f"{tree}/.", where)
        (where / "etc/hostname").write_text("inst2\n")
        (where / "etc/fstab").write_text(f"UUID={identity} / btrfs\n")
    return path


@contextmanager
def second_device(path: Path, work: Path) -> Iterator[Path]:
    """Yield a device whose content is copied to partition 2; btrfs(8) takes those of one file for the same."""
    part = place(path, 2)
    assert part
    second = work / "second"
    with second.open("xb") as file:
        file.truncate(part.size)
    with attached(second) as device:
        try:
            yield device
        finally:
            run("btrfs", "device", "scan", "--forget", device, check=False)
    run("dd", f"if={second}", f"of={path}", "bs=1M", f"seek={part.start // MIB}", "conv=notrunc", "status=none")


def hostname(disk: Path, work: Path, *numbers: int) -> str:
    with mounted_devices(disk, work, *numbers or (1, 2), options="ro") as where:
        return (where / "etc/hostname").read_text()


def size_of_root(disk: Path, work: Path, *numbers: int) -> int:
    with mounted_devices(disk, work, *numbers or (1, 2), options="ro") as where:
        return os.statvfs(where).f_blocks * os.statvfs(where).f_frsize


def deploy(node: Node, image: Path, target: Path, **settings: object) -> Result:
    node.image(image, f"several-{trees.ARCH}.raw")
    return node.create(target, OSP_IMAGE_NAME="several", OSP_IMAGE_TYPE="raw", **settings)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_command(profile: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES[profile])
    node.hook("look", "#!/bin/sh\nls $TARGET/usr/share/doc\n")
    node.defaults("IMPORT_HOOKS=look")
    target = disk(600)
    log = deploy(node, image, target).ok().log
    assert "found / on partition 1 (btrfs), member on partition 2 (btrfs)" in log
    assert "waiting" not in log and "there is a system on" not in log
    assert hostname(target, tmp_path) == "inst1\n"
    if profile == "single":
        assert size_of_root(target, tmp_path) > 500 * MIB

    node.call("rename", node.environment(image, env="rename")).ok()
    assert hostname(image, tmp_path) == "inst1\n"
    for options in ([], ["--read-only"]):
        node.tool("mount-disks", NAME, *options, "--disk", str(image)).ok()
        try:
            assert (Path(f"/tmp/{NAME}_root") / "etc/hostname").read_text() == "inst1\n"
        finally:
            node.tool("umount-disks", "--here", NAME).ok()
    for kind in ("tarball", "qemu-img"):
        node.tool("ganeti-image", "-t", kind, "-i", NAME, "-n", kind, "--disk", str(image), "--seal").ok()
    node.create(target, OSP_IMAGE_NAME="qemu-img", OSP_IMAGE_TYPE="qemu").ok()
    larger = disk(600)
    assert "copyright" in backups.restore(node, backups.exported(node, image), larger).ok().log
    assert hostname(larger, tmp_path) == "inst1\n"


@pytest.mark.parametrize("of", ["image", "another instance", "one that was written to"])
def test_known_from_a_scan(of: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The kernel would take devices that it knows for parts of ours."""
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES["single"])
    other = tmp_path / "other"
    run("cp", image, other)
    if of == "one that was written to":
        for _ in range(3):
            with mounted_devices(other, tmp_path, 1, 2) as where:
                (where / "written").touch()
    target = disk(300)
    with devices(image if of == "image" else other, 1, 2) as scanned:
        run("btrfs", "device", "scan", *scanned)
        before = [device.read_bytes() for device in scanned]
        log = deploy(node, image, target).ok().log
        assert ("the kernel forgets all btrfs devices" in log) == (of == "one that was written to")
        assert [device.read_bytes() for device in scanned] == before
    assert hostname(target, tmp_path) == "inst1\n"
    assert hostname(other, tmp_path) == "inst2\n"


def test_many_instances_at_once(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES["raid1"])
    node.image(image, f"several-{trees.ARCH}.raw")
    targets = [disk(300) for _ in range(5)]
    settings = {"OSP_IMAGE_NAME": "several", "OSP_IMAGE_TYPE": "raw"}
    calls = [
        node.start("create", node.environment(target, INSTANCE_NAME=f"twin{number}", **settings))
        for number, target in enumerate(targets)
    ]
    for call in calls:
        call.result().ok()
    assert [hostname(target, tmp_path) for target in targets] == [f"twin{number}\n" for number in range(5)]


def test_after_a_command_that_was_killed(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The kernel still knows the devices of its disk, which were written to."""
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES["raid1"])
    node.image(image, f"several-{trees.ARCH}.raw")
    started = tmp_path / "started"
    hook = node.hook("waits", f"#!/bin/sh\nsync -f $TARGET\n: >{started}\nexec sleep 1000\n")
    settings = {"OSP_IMAGE_NAME": "several", "OSP_IMAGE_TYPE": "raw"}
    call = node.start("create", node.environment(disk(300), **settings))
    call.wait_for(started.exists, "the hook runs")
    call.kill(signal.SIGKILL)
    call.result()
    hook.unlink()
    with attached(disk(10)), attached(disk(10)):  # another loop device than before
        target = disk(300)
        node.create(target, **settings).ok()
    assert hostname(target, tmp_path) == "inst1\n"


def test_instance_that_is_mounted(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES["raid1"])
    with mounted_devices(image, tmp_path, 1, 2, options="ro"):
        result = deploy(node, image, disk(300))
    result.failed("a btrfs with the same UUID is mounted from")
    assert result.seconds < 60


def test_missing_device(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """It is not searched for elsewhere, even if the kernel knows one."""
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES["raid1"])
    half = tmp_path / "half"
    run("cp", image, half)
    with devices(half, 2) as found:
        run("wipefs", "--all", "--quiet", *found)
    target = disk(300)
    why = "1 of the 2 devices of its filesystem are not on this disk"
    with devices(image, 1, 2) as scanned:
        run("btrfs", "device", "scan", *scanned)
        assert "NOMOUNT=yes" in deploy(node, half, target).failed(why).log
    assert backups.is_disarmed(target, [])
    node.call("rename", node.environment(half, env="rename")).failed(why)


def set_device_count(device: Path, count: int) -> None:
    """Change what the superblock says; its checksum is a crc32c."""
    with device.open("r+b") as file:
        file.seek(0x10000)
        block = bytearray(file.read(4096))
        struct.pack_into("<Q", block, 136, count)
        crc = 0xFFFFFFFF
        for byte in block[32:]:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        struct.pack_into("<I", block, 0, crc ^ 0xFFFFFFFF)
        file.seek(0x10000)
        file.write(block)


def test_device_of_somebody_else(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """An image can name a device that is not on it, but known to the kernel, which would write to that."""
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES["raid1"], count=3)
    hostile = tmp_path / "hostile"
    run("cp", image, hostile)
    with devices(hostile, 1, 2, 3) as (first, second, third):
        run("wipefs", "--all", "--quiet", second)
        for device in (first, third):
            set_device_count(device, 2)
    target = disk(400)
    with devices(image, 1, 2, 3) as scanned:
        run("btrfs", "device", "scan", *scanned)
        before = digest(image)
        deploy(node, hostile, target).failed(f"the kernel takes {scanned[1]} for a part of its btrfs")
        assert digest(image) == before
    assert backups.is_disarmed(target, [])


def test_root_that_moved_to_a_second_device(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Its number in the filesystem is 2, and `btrfs filesystem resize max` would look for 1."""
    path = guestdisks.blank(tmp_path / "image", 302, "label: gpt\n1 : size=150M\n2 : size=150M\n")
    guestdisks.make(path, 1, "btrfs")
    guestdisks.fill(path, 1, small_tree, tmp_path, "")
    with second_device(path, tmp_path) as added, mounted_devices(path, tmp_path, 1) as where:
        run("btrfs", "device", "add", "-f", added, where)
        run("btrfs", "device", "remove", "1", where)
    target = disk(600)
    deploy(node, path, target).ok()
    assert size_of_root(target, tmp_path, 2) > 400 * MIB
    assert hostname(target, tmp_path, 2) == "inst1\n"


def test_subvolume_beside_the_root(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The guest's /var is what its fstab says, not all of the filesystem that it is on."""
    path = guestdisks.blank(tmp_path / "image", 282, "label: gpt\n1 : size=130M\n2 : size=150M\n")
    guestdisks.make(path, 1, "btrfs")
    guestdisks.make(path, 2, "ext4")
    root = "UUID={} / ext4\nUUID={} /var btrfs subvol=its-var\n".format(*map(guestdisks.UUID.format, (2, 1)))
    guestdisks.fill(path, 2, small_tree, tmp_path, root)
    with mounted(path, tmp_path / "var", place(path, 1), "rw") as where:
        run("btrfs", "subvolume", "create", where / "its-var")
        run("cp", "--archive", f"{small_tree}/var/.", where / "its-var")
    target = disk(320)
    assert "/var on partition 1 (btrfs, subvol=its-var)" in deploy(node, path, target).ok().log
    with mounted(target, tmp_path / "var", place(target, 1)) as where:
        assert os.listdir(where) == ["its-var"]


def test_seed(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The system is on the filesystem that is based on the seed; the seed alone is read-only."""
    path = guestdisks.blank(tmp_path / "image", 302, "label: gpt\n1 : size=150M\n2 : size=150M\n")
    guestdisks.make(path, 1, "btrfs")
    guestdisks.fill(path, 1, small_tree, tmp_path, "")
    with devices(path, 1) as seed:
        run("btrfstune", "-S", "1", *seed)
    target = disk(600)
    deploy(node, path, target).failed("it is a seed of other filesystems, and read-only")

    with second_device(path, tmp_path) as added, mounted_devices(path, tmp_path, 1, options="ro") as where:
        run("btrfs", "device", "add", "-f", added, where)
        run("mount", "-o", "remount,rw", where)
    deploy(node, path, target).ok()
    with mounted(target, tmp_path / "look", place(target, 1)) as where:
        assert (where / "etc/hostname").read_text() != "inst1\n"
    with mounted_devices(target, tmp_path, 2, 1, options="ro") as where:
        assert (where / "etc/hostname").read_text() == "inst1\n"
