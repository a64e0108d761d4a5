"""Archives and streams with wrong sizes or huge contents: an error or a right result, in bounded memory."""

from __future__ import annotations

import gzip
import lzma
import os
import resource
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import backups
import dumps
import guestdisks
import pytest
import trees
from backups import is_disarmed
from support import MIB, Node, attached, digest, mounted, partitions, run

MakeDisk = Callable[..., Path]


@contextmanager
def watched() -> Iterator[None]:
    """Fail if a process uses more real memory than it needs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 600 << 10), "KiB"


def image(node: Node, name: str, data: bytes) -> None:
    (node.images / f"evil-{trees.ARCH}.{name}").write_bytes(data)


def header(name: bytes, size: int, kind: bytes) -> bytes:
    """Return a tar header with any size (base 256)."""
    field = b"\x80" + size.to_bytes(11, "big")
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"0" * 11 + b"\0"
    block = (block + b" " * 8 + kind).ljust(257, b"\0") + b"ustar  \0"
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def xz_of_large_dictionary() -> bytes:
    good = bytearray(lzma.compress(bytes(1024), lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]))
    # block header: the dictionary's size is one byte of the filter's properties (xz file format, 5.3.1)
    place = good.index(b"\x21\x01", 12) + 2
    good[place] = 40  # 4 GiB - 1
    size = (good[12] + 1) * 4
    struct.pack_into("<I", good, 12 + size - 4, zlib.crc32(bytes(good[12 : 12 + size - 4])))
    return bytes(good)


def zstd_of_large_window() -> bytes:
    # magic, no single segment, window descriptor of the largest size (RFC 8878), a raw block that follows
    return b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x01\x00\x00" + bytes(100)


HUGE = 1 << 40
ARCHIVES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "name of 1 TiB": ("tar", lambda: header(b"././@LongLink", HUGE, b"L") + bytes(4096)),
    "pax header of 1 TiB": ("tar", lambda: header(b"x", HUGE, b"x") + bytes(4096)),
    "file of 1 TiB": ("tar", lambda: header(b"x", HUGE, b"0") + bytes(4096)),
    "file of 2**88 bytes": ("tar", lambda: header(b"x", (1 << 88) - 1, b"0") + bytes(4096)),
    "dictionary of 4 GiB": ("tar.xz", xz_of_large_dictionary),
    "window of 3 TiB": ("tar.zst", zstd_of_large_window),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_that_claim_much(what: str, node: Node, disk: MakeDisk) -> None:
    suffix, make = ARCHIVES[what]
    image(node, suffix, make())
    with watched():
        result = node.create(disk(), OSP_IMAGE_NAME="evil")
    result.failed(f"evil-{trees.ARCH}.{suffix}")
    assert "internal error" not in result.log


@pytest.mark.parametrize("image_type", ["tarball", "raw"])
@pytest.mark.parametrize("program", ["gzip", "zstd"])
def test_bombs(program: str, image_type: str, node: Node, disk: MakeDisk) -> None:
    """Small files that unpack to much more than the disk holds."""
    suffix = {"gzip": "gz", "zstd": "zst"}[program]
    name = f"evil-{trees.ARCH}.{'tar' if image_type == 'tarball' else 'raw'}.{suffix}"
    begin = header(b"zeroes", 8 << 30, b"0") if image_type == "tarball" else b"\1" * 512
    with (
        (node.images / name).open("wb") as output,
        subprocess.Popen([program, "-1", "-c"], stdin=subprocess.PIPE, stdout=output) as packer,
    ):
        assert packer.stdin
        packer.stdin.write(begin)
        for _ in range(400 if image_type == "tarball" else 200):
            packer.stdin.write(b"\1" * MIB)
    target = disk()
    with watched():
        node.create(target, OSP_IMAGE_NAME="evil", OSP_IMAGE_TYPE=image_type).failed(name)


@pytest.mark.parametrize("what", ["dictionary of 4 GiB", "window of 3 TiB", "zeroes without end"])
def test_streams(what: str, node: Node, disk: MakeDisk) -> None:
    stream = gzip.compress(bytes(512 * MIB), 1) if what.startswith("zeroes") else ARCHIVES[what][1]()
    target = disk()
    before = digest(target)
    with watched():
        result = backups.restore(node, stream, target)
    assert result.status == 1 and "internal error" not in result.log, result.log
    assert digest(target) == before or not any(target.read_bytes()[:MIB])


@pytest.fixture
def evil_dumps(small_tree: Path, tmp_path: Path) -> Path:
    """Make root.dump and boot.dump, with links to a canary; the other dump has a directory or file of the same name."""
    canary, work = tmp_path / "canary", tmp_path / "evil"
    for path in (canary, work):
        path.mkdir()
    (canary / "file").write_text("of the node\n")
    guest = guestdisks.ancestor(work / "disk", small_tree, work)
    boot, root = guestdisks.place(guest.path, 1), guestdisks.place(guest.path, 3)
    with mounted(guest.path, work / "mnt", root, "rw") as top:
        (top / "boot/grub").symlink_to(canary)
        (top / "boot/restoresymtable").symlink_to(canary / "file")
        (top / "boot/sub").mkdir()
        (top / "boot/sub/evil").write_text("evil")
    with mounted(guest.path, work / "mnt", boot, "rw") as top:
        (top / "grub").mkdir()
        (top / "grub/evil").write_text("evil")
        (top / "sub").symlink_to(canary)
    for name, part in (("root", root), ("boot", boot)):
        assert part
        with attached(guest.path, part.start, part.size) as device:
            run("dump", "-0", "-q", "-f", work / f"{name}.dump", device)
    return work


def assert_as_it_was(canary: Path) -> None:
    assert {path.name: path.read_text() for path in canary.iterdir()} == {"file": "of the node\n"}


def test_dump_over_links_of_another(node: Node, disk: MakeDisk, evil_dumps: Path, tmp_path: Path) -> None:
    """Files of the root's dump under the mount point of /boot stay under it."""
    for name in ("root", "boot"):
        shutil.copy(evil_dumps / f"{name}.dump", node.images / f"evil-{trees.ARCH}-{name}.dump")
    target = disk()
    node.create(target, OSP_IMAGE_NAME="evil", OSP_IMAGE_TYPE="dump").ok()
    assert_as_it_was(tmp_path / "canary")
    boot, _, root = partitions(target)
    with mounted(target, tmp_path / "mnt", boot) as top:
        assert (top / "grub/evil").read_text() == "evil" and (top / "sub").is_symlink()
    with mounted(target, tmp_path / "mnt", root) as top:
        assert (top / "boot/sub/evil").read_text() == "evil" and (top / "boot/grub").is_symlink()


@pytest.mark.parametrize("command", ["create", "import"])
def test_dump_that_climbs(command: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The names in a dump have no checksum: with `..`, restore(8) would write to the node's files."""
    canary = tmp_path / "canary"
    canary.write_text("of the node")
    evil = tmp_path / "evil"
    run("cp", "-a", small_tree, evil)
    climbing = evil.joinpath(*["QQ"] * 8, *canary.parts[1:])
    climbing.parent.mkdir(parents=True)
    climbing.write_text("of the dump")
    whole = guestdisks.mbr(tmp_path / "evil.disk", evil, tmp_path).path
    part = guestdisks.place(whole, 1)
    assert part
    with attached(whole, part.start, part.size) as device:
        run("dump", "-0", "-q", "-f", tmp_path / "root.dump", device)
    data = (tmp_path / "root.dump").read_bytes()
    assert data.count(b"QQ") >= 8
    (tmp_path / "root.dump").write_bytes(data.replace(b"QQ", b".."))
    target = disk()
    if command == "create":
        shutil.copy(tmp_path / "root.dump", node.images / f"evil-{trees.ARCH}-root.dump")
        result = node.create(target, OSP_IMAGE_NAME="evil", OSP_IMAGE_TYPE="dump")
    else:
        run("tar", "--create", "--file", tmp_path / "stream", "--directory", tmp_path, "./root.dump")
        result = backups.restore(node, tmp_path / "stream", target, INSTANCE_HV_kernel_path="/vmlinuz")
    assert canary.read_text() == "of the node"
    result.failed("damaged", "..")
    assert is_disarmed(target, [])


@pytest.mark.parametrize("command", ["create", "import"])
def test_dump_that_follows_its_own_link(command: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "victim").write_text("of the node")
    dump = tmp_path / "root.dump"
    dump.write_bytes(dumps.misleading(os.fsencode(canary)))
    if command == "create":
        shutil.copy(dump, node.images / f"evil-{trees.ARCH}-root.dump")
        result = node.create(disk(), OSP_IMAGE_NAME="evil", OSP_IMAGE_TYPE="dump")
    else:
        run("tar", "--create", "--file", tmp_path / "stream", "--directory", tmp_path, "./root.dump")
        result = backups.restore(node, tmp_path / "stream", disk(), INSTANCE_HV_kernel_path="/vmlinuz")
    assert {path.name: path.read_text() for path in canary.iterdir()} == {"victim": "of the node"}
    assert result.status in (0, 1) and "internal error" not in result.log, result.log


@pytest.mark.parametrize("order", [["boot.dump", "root.dump"], ["root.dump", "boot.dump"], ["root.dump", "root.dump"]])
@pytest.mark.parametrize("kernel_path", [None, "/boot/vmlinuz"])
def test_dump_of_a_backup_over_links_of_another(
    order: list[str], kernel_path: str | None, node: Node, disk: MakeDisk, evil_dumps: Path, tmp_path: Path
) -> None:
    """With /boot on its own partition, and in the root filesystem."""
    stream, target = tmp_path / "stream", disk()
    names = [f"./{name}" for name in order]
    run("tar", "--create", "--file", stream, "--directory", evil_dumps, "--no-recursion", "--hard-dereference", *names)
    result = backups.restore(node, stream, target, INSTANCE_HV_kernel_path=kernel_path)
    assert_as_it_was(tmp_path / "canary")
    if order[0] == order[1]:
        result.failed("twice")
        assert is_disarmed(target, [])
        return
    result.ok()
    *boot, _, root = partitions(target)
    with mounted(target, tmp_path / "mnt", root) as top:
        found = top / "boot"
        assert (found / "sub/evil").exists() == (order[0] == "boot.dump" and not kernel_path), "hidden, or gone"
        if kernel_path:
            assert (found / "grub/evil").read_text() == "evil" and (found / "sub").is_symlink()
        assert not list(top.glob(".imageos-*"))
    for part in boot:
        with mounted(target, tmp_path / "mnt", part) as found:
            assert (found / "grub/evil").read_text() == "evil" and (found / "sub").is_symlink()


@pytest.mark.parametrize("offset", [1024 + 0x18, 1024 + 0x20, 1024 + 0x28, 1024 + 0x4, 1024 + 0xFE, 4096, 4100])
def test_damaged_superblock(offset: int, node: Node, sources: Path, disk: MakeDisk, tmp_path: Path) -> None:
    """A filesystem with meaningless numbers: refuse it, but make a complete backup of it."""
    damaged = tmp_path / "damaged"
    run("cp", "--sparse=always", sources / "guest.raw", damaged)
    with damaged.open("r+b") as file:
        file.seek(MIB + offset)
        file.write(b"\xff\xff\xff\x7f")
    node.image(damaged, f"evil-{trees.ARCH}.raw")
    result = node.create(disk(), OSP_IMAGE_NAME="evil", OSP_IMAGE_TYPE="raw")
    assert result.status in (0, 1) and "internal error" not in result.log, result.log
    target = disk()
    backups.restore(node, backups.exported(node, damaged, 1), target, 1).ok()
    assert backups.same(damaged, target) or result.status == 0


def test_swapped_and_double_labels(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Two filesystems have the same UUID and label, and the fstab uses neither."""
    guest = guestdisks.blank(tmp_path / "twins", 90, "label: dos\n1 : start=1M, size=40M\n2 : start=41M, size=48M\n")
    for number in (1, 2):
        part = guestdisks.place(guest, number)
        assert part
        with attached(guest, part.start, part.size) as device:
            run("mkfs.ext4", "-q", "-U", guestdisks.UUID.format(1), "-L", "same", device)
    guestdisks.fill(guest, 2, small_tree, tmp_path, "LABEL=same / ext4\nLABEL=same /boot ext4\nUUID=$(id) /var ext4\n")
    node.image(guest, f"evil-{trees.ARCH}.raw")
    result = node.create(disk(), OSP_IMAGE_NAME="evil", OSP_IMAGE_TYPE="raw")
    assert result.status in (0, 1) and "internal error" not in result.log, result.log
