"""Compressions that look back a long way: what they ask for in memory is promised, and what is more is refused."""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import guestdisks
import pytest
import trees
from backups import restore
from support import Node, digest, run

MakeDisk = Callable[..., Path]
# The window is in the header of a frame whose size zstd does not know ahead: it reads from a pipe.
ZSTD = ["zstd", "-q", "-1", "--long=31", "-c"]
XZ = ["xz", "-T1", "--lzma2=preset=0,mf=hc3,dict=1536MiB", "-c"]


def compressed(source: Path, path: Path, command: list[str]) -> Path:
    with path.open("wb") as output, subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as plain:
        subprocess.run(command, stdin=plain.stdout, stdout=output, check=True)
    if command is ZSTD:
        assert "(2147483648 B)" in run("zstd", "-l", "-v", path)
    return path


@pytest.mark.parametrize(("suffix", "command"), [("tar.zst", ZSTD), ("tar.xz", XZ)], ids=["zstd", "xz"])
def test_tarball(suffix: str, command: list[str], node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    plain = trees.tarball(small_tree, tmp_path / "plain.tar", "tar")
    compressed(plain, node.images / f"wide-{trees.ARCH}.{suffix}", command)
    node.create(disk(), OSP_IMAGE_NAME="wide").ok()


@pytest.mark.parametrize(("suffix", "command"), [("raw.zst", ZSTD), ("raw.xz", XZ)], ids=["zstd", "xz"])
def test_disk_image(
    suffix: str, command: list[str], node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path).path
    compressed(guest, node.images / f"wide-{trees.ARCH}.{suffix}", command)
    target = disk(101)
    node.create(target, OSP_IMAGE_NAME="wide", OSP_IMAGE_TYPE="raw", OSP_NOMOUNT="yes").ok()
    assert digest(target) == digest(guest)


@pytest.mark.parametrize("command", [ZSTD, XZ], ids=["zstd", "xz"])
def test_backup(command: list[str], node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path).path
    target = disk(101)
    restore(node, compressed(guest, tmp_path / "stream", command), target, index=1).ok()
    assert digest(target) == digest(guest)


def test_more_than_is_promised(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """A header may ask for 3 GiB of dictionary, whatever the content."""
    plain = trees.tarball(small_tree, tmp_path / "plain.tar", "tar")
    path = compressed(plain, node.images / f"wide-{trees.ARCH}.tar.xz", XZ)
    data = bytearray(path.read_bytes())
    # the block's header, behind the 12 bytes of the stream's: flags, then the filter LZMA2 with one byte for its size
    header = data[12 : 12 + 4 * (data[12] + 1)]
    where = header.index(b"\x21\x01") + 2
    header[where] = 39  # 3 GiB (The .xz File Format, 5.3.1)
    header[-4:] = zlib.crc32(bytes(header[:-4])).to_bytes(4, "little")
    data[12 : 12 + len(header)] = header
    path.write_bytes(data)
    result = node.create(disk(), OSP_IMAGE_NAME="wide")
    result.failed("cannot be unpacked", "xz", "emory")
