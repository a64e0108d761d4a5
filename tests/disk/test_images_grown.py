"""Roots that do not grow, or not as far as their disk: deployed all the same, with a warning that names the cause."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import guestdisks
import pytest
import trees
from backups import is_disarmed, restore
from guestdisks import UUID, place
from support import MIB, Node, Result, attached, mounted, run

MakeDisk = Callable[..., Path]
GIB = 1024  # MiB
MSDOS = "label: dos\n1 : start=1M\n"


def guest(path: Path, mib: int, tree: Path, work: Path, *options: str) -> Path:
    """Make an image whose root, on its only partition, is an ext4 with these options of mkfs.ext4."""
    guestdisks.blank(path, mib + 1, MSDOS)
    part = place(path, 1)
    assert part
    with attached(path, part.start, part.size) as device:
        run("mkfs.ext4", "-q", "-F", "-U", UUID.format(1), *options, device)
    guestdisks.fill(path, 1, tree, work, f"UUID={UUID.format(1)} / ext4 defaults 0 1\n")
    return path


def deploy(node: Node, image: Path, target: Path, **settings: object) -> Result:
    node.image(image, f"guest-{trees.ARCH}.raw")
    return node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="raw", **settings)


def warnings(result: Result) -> list[str]:
    return [line for line in result.lines if "warning: " in line]


def size_of_root(target: Path, work: Path, number: int = 1) -> int:
    """Return the bytes of the root, checked and mounted. Fail if the table is not valid, or it has another name."""
    part = place(target, number)
    assert part
    with attached(target, part.start, part.size, read_only=True) as device:
        force = ["-f"] if part.size < 100 * GIB * MIB else []  # it takes half a minute for 1 TiB
        run("e2fsck", "-n", *force, device)
    with mounted(target, work / "look", part) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"
        status = os.statvfs(root)
    return status.f_blocks * status.f_frsize


@dataclass(frozen=True)
class Odd:
    options: str  # of mkfs.ext4
    mib: int
    target: int  # MiB
    least: float  # share of the target that the root has at least
    warning: str = ""  # words; empty: there is none


ODD = {
    "64bit, no resize inode": Odd("-O 64bit,^resize_inode", 64, 70 * GIB, 0.9),
    "1 KiB blocks": Odd("-b 1024 -O 64bit", 200, 1900 * GIB, 0.45, "too many block group descriptors"),
    "small groups": Odd("-b 1024 -g 1024 -O 64bit,^resize_inode", 64, 70 * GIB, 0.05, "too many block"),
    "bigalloc": Odd("-O bigalloc", 300, 20 * GIB, 0, "fully tested. Proceed at your own risk!"),
    # resize2fs 1.47.0 leaves checksums behind with which Linux does not mount it
    "orphan file": Odd("-b 4096 -O orphan_file,^resize_inode", 300, 70 * GIB, 0.9),
    "sparse_super2": Odd("-O sparse_super2,^resize_inode", 64, 70 * GIB, 0.9),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_filesystems(name: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    odd = ODD[name]
    image = guest(tmp_path / "image", odd.mib, small_tree, tmp_path, *odd.options.split())
    target = disk(odd.target)
    result = deploy(node, image, target).ok()
    said = warnings(result)
    assert len(said) == bool(odd.warning) and odd.warning in "".join(said), result.log
    assert ("grew the root" in result.log) != ("is not grown" in result.log), result.log
    part = place(target, 1)
    assert part and part.start + part.size == odd.target * MIB
    assert size_of_root(target, tmp_path) >= odd.least * odd.target * MIB


def damage(image: Path) -> None:
    """Let two files have one block, which a check leaves to a person."""
    part = place(image, 1)
    assert part
    with attached(image, part.start, part.size) as device:
        block = run("debugfs", "-R", "blocks /etc/hostname", device).split()[0]
        run("debugfs", "-w", "-R", f"set_inode_field /etc/fstab block[0] {block}", device)


def test_damaged_before(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """An image with errors is refused; a backup with errors is restored, as that is all there is."""
    image = guest(tmp_path / "image", 100, small_tree, tmp_path, "-O", "^extent,^64bit")
    damage(image)
    target = disk(200)
    deploy(node, image, target).failed("the ext4 on partition 1 is damaged", "File /etc/hostname", "shared with 1 file")
    assert is_disarmed(target, [])
    result = restore(node, image, target := disk(200)).ok()
    assert "the ext4 on partition 1 is damaged" in warnings(result)[0]
    assert place(target, 1).size == place(image, 1).size  # type: ignore[union-attr]


def test_more_than_32_bits_of_blocks(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """A filesystem that counts its blocks with 32 bits ends at 16 TiB."""
    image = guestdisks.blank(tmp_path / "image", 300)
    with attached(image) as device:
        run("mkfs.ext4", "-q", "-F", "-O", "^64bit", "-b", "4096", device)
    guestdisks.fill(image, 0, small_tree, tmp_path, "")
    # ext4 has no files of more than 16 TiB
    place_of_large = guestdisks.blank(tmp_path / "xfs", 8 * GIB)
    guestdisks.make(place_of_large, 0, "xfs")
    with mounted(place_of_large, tmp_path / "large", None, "rw") as large:
        target = guestdisks.blank(large / "disk", 20 * GIB * GIB)
        result = deploy(node, image, target).ok()
        assert "too large to be expressed in 32 bits" in warnings(result)[0], result.log
        with mounted(target, tmp_path / "look") as root:
            status = os.statvfs(root)
            assert status.f_blocks * status.f_frsize > 14 * GIB * GIB * MIB
