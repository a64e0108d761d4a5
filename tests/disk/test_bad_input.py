"""Bad input: exit status 1, the last line names the cause, the disk is unchanged or disarmed, nothing is left."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trees
from support import DEFAULTS, MIB, PATH, SITE, Node, Result, attached, digest, locked, partitions, run, signatures

MakeDisk = Callable[..., Path]


def refused(node: Node, target: Path, *names: str, **overrides: object) -> Result:
    """Fail unless the call fails before the first write."""
    before = digest(target)
    result = node.create(target, **overrides).failed(*names)
    assert digest(target) == before, f"the disk was written to\n{result.log}"
    return result


def disarmed(node: Node, target: Path, *names: str, **overrides: object) -> Result:
    """Fail unless the call fails and the disk is unchanged, or nothing on it is recognised."""
    with target.open("r+b") as file:
        file.write(b"\1" * 512)
    before = digest(target)
    result = node.create(target, **overrides).failed(*names)
    if digest(target) != before:
        assert_disarmed(target)
    return result


def assert_disarmed(target: Path) -> None:
    assert signatures(target) == []
    assert run("blkid", "--probe", target, check=False) == ""
    with target.open("rb") as file:
        assert not any(file.read(MIB)), "something is left at the start of the disk"
    for start in (1, 25, 33):  # /boot, swap and root in the usual layout
        found = run("blkid", "--probe", "--offset", str(start * MIB), target, check=False)
        assert found == "", f"at {start} MiB: {found}"


def then_good(node: Node, target: Path, **overrides: object) -> None:
    """Run a good call after a refusal that may leave a lock, a busy loop device or a disarmed disk.

    Other tests compare the digest of the disk, and rely on the check for leftovers after each test.
    """
    node.create(target, **overrides).ok()
    assert partitions(target)[-1].content["TYPE"] == "ext4"


# The disk


def test_address_that_makes_no_sense(node: Node, disk: MakeDisk) -> None:
    """Only cloud-init's seed and hooks need it, but a typing error must not destroy the disk."""
    refused(node, disk(), "NIC 0", "10.1.2.3/99", NIC_0_IP="10.1.2.3/99")


def test_no_disk(node: Node, disk: MakeDisk) -> None:
    result = refused(node, disk(), "disk", DISK_COUNT="0", DISK_0_PATH=None, DISK_0_SIZE=None)
    assert "inst1.example.org" in result.last


@pytest.mark.parametrize("count", ["many", "-1", "1x"])
def test_strange_disk_count(count: str, node: Node, disk: MakeDisk) -> None:
    refused(node, disk(), "DISK_COUNT", DISK_COUNT=count)


def test_no_path(node: Node, disk: MakeDisk) -> None:
    refused(node, disk(), "DISK_0_PATH", DISK_0_PATH=None)


def test_userspace_only_disk(node: Node, disk: MakeDisk) -> None:
    refused(node, disk(), "disk 0", "DISK_0_URI", DISK_0_PATH=None, DISK_0_URI="gluster://server/volume/image")


@pytest.mark.parametrize("kind", ["directory", "missing", "fifo", "character device", "dangling link", "empty"])
def test_path_that_is_no_disk(kind: str, node: Node, tmp_path: Path) -> None:
    path = tmp_path / "no-disk"
    {
        "directory": path.mkdir,
        "missing": lambda: None,
        "fifo": lambda: os.mkfifo(path),
        "character device": lambda: os.mknod(path, 0o020600, os.makedev(1, 5)),
        "dangling link": lambda: path.symlink_to("/nonexistent/volume"),
        "empty": lambda: path.write_bytes(b""),
    }[kind]()
    node.create(path, DISK_0_SIZE=160).failed("0 bytes" if kind == "empty" else str(path))
    assert kind != "empty" or path.read_bytes() == b""


def test_disk_in_use_by_a_loop_device(node: Node, disk: MakeDisk) -> None:
    target = disk()
    with attached(target) as device:
        assert device.name in refused(node, target, str(target), "in use").log


@pytest.mark.parametrize("kind", ["file", "block device"])
def test_disk_whose_loop_device_is_going(kind: str, node: Node, disk: MakeDisk, block_disk: MakeDisk) -> None:
    """It was detached, but exists until the last process has closed it."""
    target = disk() if kind == "file" else block_disk()
    with looked_at(target, "inf") as device:
        assert device.name in refused(node, target, str(target), "in use").log
    with looked_at(target, "0.5"):
        then_good(node, target)


@contextmanager
def looked_at(disk: Path, seconds: str) -> Iterator[Path]:
    """Keep a detached loop device over the disk open, as another process would."""
    with attached(disk) as device, device.open("rb") as file:
        looks = subprocess.Popen(["sleep", seconds], stdin=file)
    try:
        assert run("losetup", "--associated", disk)
        yield device
    finally:
        looks.kill()
        looks.wait()


def test_disk_in_use_by_a_mount_through_a_loop_device(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk()
    with attached(target) as device, mount_of(device, tmp_path / "mnt"):
        refused(node, target, str(target), "in use")
        refused(node, device, str(device), "in use")


def test_block_device_in_use_by_a_loop_device(node: Node, block_disk: MakeDisk) -> None:
    target = block_disk()
    with attached(target) as device:
        assert device.name in refused(node, target, str(target), "in use").log


def test_block_device_of_which_a_partition_is_mounted(
    node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path
) -> None:
    target = block_disk()
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", target, text="label: dos\n,,83\n")
    run("partx", "--update", target)
    partition = Path(f"{target}p1")
    run("mkfs.ext4", "-q", partition)
    try:
        with mount_of(partition, tmp_path / "mnt", make=False):
            refused(node, target, str(target), "in use")
    finally:
        run("partx", "--delete", target)


@contextmanager
def mount_of(device: Path, where: Path, make: bool = True) -> Iterator[None]:
    if make:
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    where.mkdir()
    run("mount", "-o", "ro", device, where)  # so that the mount itself does not change the disk
    run("sync", device)  # nor later the data that the kernel keeps about it
    try:
        yield
    finally:
        run("umount", where)


@pytest.mark.parametrize("kind", ["file", "block device"])
def test_disk_locked_by_somebody(kind: str, node: Node, disk: MakeDisk, block_disk: MakeDisk) -> None:
    target = disk() if kind == "file" else block_disk()
    with locked(target):
        refused(node, target, str(target), "in use")
    then_good(node, target)


def test_disk_in_use_by_a_virtual_machine(node: Node, disk: MakeDisk) -> None:
    """qemu holds shared locks of the open file description on bytes from 100 on (block/file-posix.c)."""
    target = disk()
    with target.open("r+b") as file:
        for byte in (100, 101, 103, 201):
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(file, 37, lock)  # F_OFD_SETLK
        refused(node, target, str(target), "in use")


def test_disk_that_is_read_only(node: Node, disk: MakeDisk) -> None:
    target = disk()
    with attached(target, read_only=True) as device:
        refused(node, device, str(device))


@pytest.mark.parametrize(
    "overrides, names",
    [
        ({"OSP_SWAP_SIZE": "150"}, ["swap 150 MiB"]),
        ({"OSP_SWAP_SIZE": "100000"}, ["swap"]),
        ({"OSP_BOOT_SIZE": "155"}, ["boot 155 MiB"]),
        ({"OSP_FILESYSTEM": "xfs"}, ["300 MiB"]),
        ({"OSP_PARTITION_TABLE": "gpt", "OSP_SWAP_SIZE": "100"}, ["swap 100 MiB"]),
    ],
)
def test_disk_too_small_for_the_layout(overrides: dict[str, str], names: list[str], node: Node, disk: MakeDisk) -> None:
    target = disk()
    refused(node, target, "disk", "160 MiB", "too small", *names, **overrides)


@pytest.mark.parametrize("mib", [1, 3, 20])
def test_tiny_disk(mib: int, node: Node, disk: MakeDisk) -> None:
    refused(node, disk(mib), "disk", f"{mib} MiB", "too small")


def test_disk_too_small_for_the_image(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    tree = tmp_path / "large"
    run("cp", "-a", small_tree, tree)
    with (tree / "usr/zeroes").open("wb") as large:
        large.write(b"\1" * (200 * MIB))
    name = f"large-{trees.ARCH}.tar.gz"
    trees.tarball(tree, node.images / name)
    target = disk()
    result = disarmed(node, target, name, OSP_IMAGE_NAME="large")
    assert "does not fit" in result.last
    assert len(result.log) < 20000
    then_good(node, target)


def test_boot_too_small_for_the_image(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """tar only says that it could not write everything."""
    tree = tmp_path / "large"
    run("cp", "-a", small_tree, tree)
    (tree / "boot/initrd.img").write_bytes(b"\1" * (30 * MIB))
    name = f"large-{trees.ARCH}.tar.gz"
    trees.tarball(tree, node.images / name)
    result = disarmed(node, disk(), name, OSP_IMAGE_NAME="large", OSP_BOOT_SIZE="24")
    assert "does not fit: /boot of" in result.last
    assert "hint: make BOOT_SIZE larger" in result.log


# The image


def test_image_missing(node: Node, disk: MakeDisk) -> None:
    target = disk()
    result = refused(node, target, str(node.images), f"nothing-{trees.ARCH}", OSP_IMAGE_NAME="nothing")
    assert "hint:" in result.log


def test_image_of_another_architecture(node: Node, disk: MakeDisk, images: Path) -> None:
    node.image(images / "small.tar.gz", "other-mips.tar.gz")
    target = disk()
    refused(node, target, f"other-{trees.ARCH}", OSP_IMAGE_NAME="other")
    then_good(node, target, OSP_IMAGE_NAME="other", OSP_ARCH="mips")


def test_no_image_name(node: Node, disk: MakeDisk) -> None:
    target = disk()
    refused(node, target, "IMAGE_NAME", OSP_IMAGE_NAME=None)


def test_image_directory_missing(node: Node, disk: MakeDisk) -> None:
    node.defaults("IMAGE_DIR=/nonexistent/images")
    refused(node, disk(), "/nonexistent/images")


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link", "device"])
def test_image_that_is_no_file(kind: str, node: Node, disk: MakeDisk) -> None:
    path = node.images / f"odd-{trees.ARCH}.tar.gz"
    {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "dangling link": lambda: path.symlink_to("nowhere"),
        "device": lambda: os.mknod(path, 0o020666, os.makedev(1, 5)),
    }[kind]()
    target = disk()
    before = digest(target)
    node.create(target, OSP_IMAGE_NAME="odd").failed(f"odd-{trees.ARCH}")
    assert digest(target) == before


@pytest.mark.parametrize("content", ["garbage", "empty", "text", "zeroes", "html"])
def test_image_that_is_no_tarball(content: str, node: Node, disk: MakeDisk) -> None:
    name = f"odd-{trees.ARCH}.tar.gz"
    (node.images / name).write_bytes(
        {
            "garbage": bytes(range(256)) * 4000,
            "empty": b"",
            "text": b"this is not an archive\n" * 1000,
            "zeroes": bytes(100000),
            "html": b"<!DOCTYPE html><title>404 Not Found</title>",
        }[content]
    )
    target = disk()
    refused(node, target, name, OSP_IMAGE_NAME="odd")


@pytest.mark.parametrize("compression", [name for name in trees.SUFFIXES if name != "tar"])
def test_compressed_garbage(compression: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(range(256)) * 4000)
    name = f"odd-{trees.ARCH}.{trees.SUFFIXES[compression]}"
    trees.compress(plain, node.images / name, compression)
    refused(node, disk(), name, OSP_IMAGE_NAME="odd")


@pytest.mark.parametrize("keep", [0.5, 0.999], ids=["half", "nearly-all"])
@pytest.mark.parametrize("compression", trees.SUFFIXES)
def test_image_truncated(compression: str, keep: float, node: Node, disk: MakeDisk, images: Path) -> None:
    suffix = trees.SUFFIXES[compression]
    whole = (images / f"small.{suffix}").read_bytes()
    # a plain archive ends with padding, so cut into its last member
    end = len(whole) if compression != "tar" else len(whole.rstrip(b"\0"))
    name = f"cut-{trees.ARCH}.{suffix}"
    (node.images / name).write_bytes(whole[: int(end * keep)])
    target = disk()
    disarmed(node, target, name, OSP_IMAGE_NAME="cut")


@pytest.mark.parametrize("compression", [name for name in trees.SUFFIXES if name != "tar"])
def test_image_damaged_in_the_middle(compression: str, node: Node, disk: MakeDisk, images: Path) -> None:
    suffix = trees.SUFFIXES[compression]
    content = bytearray((images / f"small.{suffix}").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0x55 for byte in content[middle : middle + 64])
    name = f"damaged-{trees.ARCH}.{suffix}"
    (node.images / name).write_bytes(content)
    disarmed(node, disk(), name, OSP_IMAGE_NAME="damaged")


def test_same_name_twice(node: Node, disk: MakeDisk, images: Path) -> None:
    """Two images of one name: either the log says which one is used, or an error names both."""
    node.image(images / "small.tar.zst", f"tiny-{trees.ARCH}.tar.zst")
    result = node.create(disk())
    assert result.status in (0, 1), result.log
    assert f"tiny-{trees.ARCH}.tar.gz" in result.log


# Settings


def test_unknown_image_type(node: Node, disk: MakeDisk) -> None:
    refused(node, disk(), "IMAGE_TYPE", "floppy", OSP_IMAGE_TYPE="floppy")


def test_variant_without_file(node: Node, disk: MakeDisk) -> None:
    (SITE / "variants.list").write_text("default\nforgotten\n")
    refused(node, disk(), "forgotten", str(SITE / "variants"), OS_VARIANT="forgotten")


@pytest.mark.parametrize("variant", ["../default", "..", "a/b", "$(id)", "x y"])
def test_variant_that_is_no_name(variant: str, node: Node, disk: MakeDisk) -> None:
    node.write(SITE / "default.conf", "SWAP=no\n")
    refused(node, disk(), "variant", variant, OS_VARIANT=variant)


@pytest.mark.parametrize("where", ["defaults", "variant"])
@pytest.mark.parametrize("text", ['SWAP="yes\n', "if true; then\n", "SWAP=$((\n", "fi\n"])
def test_syntax_error(where: str, text: str, node: Node, disk: MakeDisk) -> None:
    if where == "defaults":
        node.defaults(text)
        path = DEFAULTS
    else:
        path = SITE / "variants/default.conf"
        node.variant("default", text)
    refused(node, disk(), str(path))


@pytest.mark.parametrize(
    "text",
    [
        "exit 3",
        "exit 0",
        "return 4",
        "kill -9 $$",
        "nonexistent-command-of-a-site",
        "set -e; false",
        "set -u; echo $NOT_SET",
    ],
)
def test_file_that_fails_when_run(text: str, node: Node, disk: MakeDisk) -> None:
    """A file that ends the shell cannot be read back; after one with only a failed command, create may continue."""
    node.defaults(f"{text}\nSWAP_SIZE=9")
    target = disk()
    before = digest(target)
    result = node.create(target)
    if text in ("return 4", "nonexistent-command-of-a-site"):
        assert result.status in (0, 1), result.log
    if result.status or text not in ("return 4", "nonexistent-command-of-a-site"):
        result.failed(str(DEFAULTS))
        assert digest(target) == before


def test_endless_defaults_file_is_a_fifo(node: Node, disk: MakeDisk) -> None:
    DEFAULTS.unlink()
    os.mkfifo(DEFAULTS)
    result = node.start("create", node.environment(disk())).result()
    result.failed(str(DEFAULTS))


# The node


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., str]:
    """Return a PATH that has every tool of the node except these."""

    def make(*tools: str) -> str:
        directory = tmp_path / "tools"
        directory.mkdir()
        programs = {name: f"{source}/{name}" for source in reversed(PATH.split(":")) for name in os.listdir(source)}
        for name, path in programs.items():
            if name not in tools:
                os.symlink(path, directory / name)
        return str(directory)

    return make


# Programs that do the same work, and may be used instead
SAME = {"gzip": ["pigz"], "bzip2": ["lbzip2", "pbzip2"]}


@pytest.mark.parametrize(
    "tool, compression",
    [("gzip", "gz"), ("xz", "xz"), ("bzip2", "bz2"), ("lz4", "lz4")],
)
def test_missing_decompressor(
    tool: str, compression: str, node: Node, disk: MakeDisk, without: Callable[..., str], images: Path
) -> None:
    """The fault table tests the other programs."""
    suffix = trees.SUFFIXES[compression]
    node.image(images / f"small.{suffix}", f"same-{trees.ARCH}.{suffix}")
    path = without(tool, *SAME.get(tool, []))
    result = refused(node, disk(), tool, PATH=path, OSP_IMAGE_NAME="same")
    assert "install" in result.log, "a hint which package has it"


def test_tool_that_is_not_needed_may_be_missing(node: Node, disk: MakeDisk, without: Callable[..., str]) -> None:
    path = without("mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "zstd", "xz", "bzip2", "lz4", "qemu-img", "restore", "curl")
    node.create(disk(), PATH=path).ok()


def test_decompressor_that_fails_at_the_end(node: Node, disk: MakeDisk, images: Path, tmp_path: Path) -> None:
    """The whole archive arrives, but the status of every stage counts."""
    node.image(images / "small.tar.zst", f"same-{trees.ARCH}.tar.zst")
    fake = tmp_path / "fake/zstd"
    node.write(fake, f'#!/bin/sh\n{shutil.which("zstd")} "$@"\nexit 1\n')
    fake.chmod(0o755)
    target = disk()
    before = digest(target)
    node.create(target, PATH=f"{fake.parent}:{PATH}", OSP_IMAGE_NAME="same").failed(f"same-{trees.ARCH}.tar.zst")
    if digest(target) != before:
        assert_disarmed(target)


def test_not_root(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """An ordinary user who may read and write all files involved gets a clear error, and no traceback."""
    target = disk()
    target.chmod(0o666)
    for path in (target, node.root / "usr", node.images / "image"):
        for directory in path.parents:
            if directory.stat().st_mode & 0o111 != 0o111:
                directory.chmod(0o711)
    before = digest(target)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", node.os_dir / "create"],
        env=node.environment(target),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="ascii",
    )
    assert done.returncode == 1, done.stdout
    assert "root" in done.stdout.splitlines()[-1] and "Traceback" not in done.stdout
    assert digest(target) == before


@pytest.mark.parametrize(
    ("address", "servers", "named"), [("here", "", "NIC 0"), ("192.0.2.7", "192.0.2.300", "192.0.2.300")]
)
def test_network_that_makes_no_sense(address: str, servers: str, named: str, node: Node, disk: MakeDisk) -> None:
    target = disk()
    with target.open("r+b") as file:
        file.write(b"of the last tenant")
    before = digest(target)
    nic = {"NIC_0_IP": address, "NIC_0_NETWORK_SUBNET": "192.0.2.0/24", "OSP_DNS_SERVERS": servers}
    node.create(target, NIC_COUNT="1", **nic).failed(named)
    assert digest(target) == before
