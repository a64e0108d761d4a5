"""A tarball becomes the guest's tree, with all that a tree can contain."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from support import MIB, Node, describe, digest, mounted, partitions, run

MakeDisk = Callable[..., Path]
# create changes these files of a systemd guest. All others must be as in the image.
CHANGED = {b"etc/fstab", b"etc/hostname", b"etc/hosts", b"etc/machine-id"}
REMOVED = {b"var/lib/dbus/machine-id"}
REMOVED_BELOW = (b"etc/ssh/ssh_host_", b"var/lib/cloud/instance", b"var/lib/cloud/data")
MAY_APPEAR = re.compile(
    rb"lost\+found|etc/systemd/system(/getty\.target\.wants(/serial-getty@ttyS0\.service)?)?|var/lib/cloud/.*|"
    rb"etc/ssh/ssh_host_\w+_key(\.pub)?|var/lib/dbus/machine-id"
)


@pytest.mark.parametrize("compression", trees.SUFFIXES)
def test_tree_is_kept_with_every_compression(
    compression: str, node: Node, disk: MakeDisk, images: Path, odd_tree: Path, tmp_path: Path
) -> None:
    suffix = trees.SUFFIXES[compression]
    node.image(images / f"odd.{suffix}", f"odd-{trees.ARCH}.{suffix}")
    target = disk()
    node.create(target, OSP_IMAGE_NAME="odd", OSP_SWAP="no", INSTANCE_HV_kernel_path="/boot/vmlinuz").ok()
    root = partitions(target)[-1]
    with mounted(target, tmp_path / "root", root) as guest:
        assert_same_tree(describe(odd_tree), describe(guest))
        assert describe(guest / "odd", directory_times=True) == describe(odd_tree / "odd", directory_times=True)
        sparse = os.stat(guest / "odd/sparse")
        assert sparse.st_size == 64 * MIB
        assert 0 < sparse.st_blocks * 512 < MIB, "the sparse file has been filled"
        assert stat.S_ISFIFO(os.lstat(guest / "odd/fifo").st_mode)


def assert_same_tree(image: dict[bytes, tuple], guest: dict[bytes, tuple]) -> None:
    missing = {
        path for path in image.keys() - guest.keys() if path not in REMOVED and not path.startswith(REMOVED_BELOW)
    }
    assert not missing
    assert not {path for path in guest.keys() - image.keys() if not MAY_APPEAR.fullmatch(path)}
    different: set[bytes] = {path for path in image.keys() & guest.keys() if image[path] != guest[path]}
    assert not {path for path in different if path not in CHANGED and not MAY_APPEAR.fullmatch(path)}


@pytest.mark.parametrize("filesystem, size", [("xfs", 384), ("btrfs", 256), ("ext3", 160), ("ext2", 160)])
def test_odd_tree_on_other_filesystems(
    filesystem: str, size: int, node: Node, disk: MakeDisk, images: Path, odd_tree: Path, tmp_path: Path
) -> None:
    node.image(images / "odd.tar.gz", f"odd-{trees.ARCH}.tar.gz")
    target = disk(size)
    node.create(
        target, OSP_IMAGE_NAME="odd", OSP_SWAP="no", OSP_FILESYSTEM=filesystem, INSTANCE_HV_kernel_path="/boot/vmlinuz"
    ).ok()
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
        expected = describe(odd_tree / "odd", directory_times=True)
        found = describe(guest / "odd", directory_times=True)
        if filesystem != "btrfs":  # small inodes, and an xfs that every GRUB can read, end in 2038
            for tree in (expected, found):
                tree.pop(b"from 2100")
        assert found == expected


@pytest.mark.parametrize("name, content", [("tar.gz", "zst"), ("tar.zst", "gz"), ("tar.xz", "tar"), ("tar", "xz")])
def test_compression_is_recognised_by_content(
    name: str, content: str, node: Node, disk: MakeDisk, images: Path, tmp_path: Path
) -> None:
    node.image(images / f"small.{trees.SUFFIXES[content]}", f"other-{trees.ARCH}.{name}")
    target = disk()
    node.create(target, OSP_IMAGE_NAME="other").ok()
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
        assert (guest / "usr/share/doc/copyright").read_text() == "free\n"


def test_zstd_that_begins_with_a_skippable_frame(node: Node, disk: MakeDisk, images: Path) -> None:
    """pzstd writes such files (RFC 8878)."""
    frame = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    path = node.images / f"tiny-{trees.ARCH}.tar.gz"
    path.unlink()
    path.with_suffix(".zst").write_bytes(frame + (images / "small.tar.zst").read_bytes())
    node.create(disk()).ok()


@pytest.mark.parametrize("below", ["root.x86_64", "blobs/sha256"])
def test_tarball_that_is_not_of_a_root(
    below: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    """As Arch and LXD pack it, and `docker save` its layers: seen before the disk is written."""
    inner = tmp_path / "packed" / below
    inner.parent.mkdir(parents=True)
    if below == "blobs/sha256":
        trees.tarball(small_tree, inner, "tar")
    else:
        run("cp", "--archive", small_tree, inner)
    run(
        "tar",
        "--create",
        "--gzip",
        "--file",
        node.images / f"other-{trees.ARCH}.tar.gz",
        "-C",
        tmp_path / "packed",
        ".",
    )
    target = disk()
    before = digest(target)
    result = node.create(target, OSP_IMAGE_NAME="other").failed("no /etc", below.partition("/")[0])
    assert "hint: " in result.lines[-2] and "docker export" in result.lines[-2]
    assert digest(target) == before


def test_tarball_that_begins_with_another_file(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """What `docker export` makes has a file by which systemd would take the instance for a container."""
    tree = tmp_path / "tree"
    run("cp", "--archive", small_tree, tree)
    (tree / ".dockerenv").write_bytes(bytes(2 * MIB))
    names = [".dockerenv", *sorted(path.name for path in small_tree.iterdir())]
    run("tar", "--create", "--file", node.images / f"other-{trees.ARCH}.tar", "-C", tree, *names)
    target = disk()
    node.create(target, OSP_IMAGE_NAME="other").ok()
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
        assert (guest / "usr/share/doc/copyright").read_text() == "free\n"
        assert not (guest / ".dockerenv").exists()


def test_boot_is_on_the_partition_of_its_own(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk()
    node.create(target).ok()
    boot, _, root = partitions(target)
    with mounted(target, tmp_path / "boot", boot) as where:
        assert (where / "vmlinuz-1").read_text() == "not a kernel\n"
    with mounted(target, tmp_path / "root", root) as where:
        assert list((where / "boot").iterdir()) == [], "left under the mount point"


def test_modes_under_ganetis_umask(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk()
    node.create(target).ok()
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
        modes = {
            name: oct((guest / name).lstat().st_mode & 0o7777)
            for name in (
                "",
                "etc",
                "etc/hostname",
                "etc/hosts",
                "etc/fstab",
                "etc/machine-id",
                "etc/shadow",
                "root",
                "tmp",
                "boot",
                "etc/ssh",
            )
        }
        assert modes == {
            "": "0o755",
            "etc": "0o755",
            "etc/hostname": "0o644",
            "etc/hosts": "0o644",
            "etc/fstab": "0o644",
            "etc/machine-id": oct((guest / "etc/machine-id").stat().st_mode & 0o644),
            "etc/shadow": "0o640",
            "root": "0o700",
            "tmp": "0o1777",
            "boot": "0o755",
            "etc/ssh": "0o755",
        }
        made = [path for path in (guest / "etc/systemd").rglob("*") if path.is_dir() and not path.is_symlink()]
        assert all(path.stat().st_mode & 0o7777 == 0o755 for path in made)
