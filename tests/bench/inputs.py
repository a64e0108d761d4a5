"""The images for the benchmark: one Debian in every type of image, kept between runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from debian import CACHE, debian
from support import Node, attached, mounted, partitions, run

DISK = 3 << 30  # bytes; size of the disk in the images
NAME = "bench-x86_64"


@dataclass(frozen=True)
class Inputs:
    """IMAGE_DIR with `bench-x86_64.*`, and an almost empty image named `empty`."""

    directory: Path
    tree_size: int  # bytes of the files in the Debian

    def path(self, suffix: str) -> Path:
        return self.directory / (NAME + suffix)


def inputs(node: Node) -> Inputs:
    """Return the images in the cache; make them first if they are missing."""
    source = debian("bookworm", "large").tarball
    directory = CACHE / f"bench-{source.parent.name}"
    if not directory.is_dir():
        unfinished = CACHE / ".bench"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _make(node, source, unfinished)
        unfinished.rename(directory)
    return Inputs(directory, int((directory / "size").read_text()))


def _make(node: Node, source: Path, directory: Path) -> None:
    archive = directory / f"{NAME}.tar.zst"
    shutil.copyfile(source, archive)
    _shell(f"zstd -dcq {archive} | gzip -6 >{directory}/{NAME}.tar.gz")
    empty = directory / "tree"
    for name in ("etc", "bin", "usr", "boot"):
        (empty / name).mkdir(parents=True)
    run("tar", "--create", "--zstd", f"--file={directory}/empty-x86_64.tar.zst", "-C", empty, ".")
    shutil.rmtree(empty)
    disk = directory / "disk"
    with disk.open("xb") as file:
        file.truncate(DISK)
    node.defaults(f"IMAGE_DIR={directory}\nBOOT_SIZE=256")
    node.create(disk, OSP_IMAGE_NAME="bench").ok()
    boot, _, root = partitions(disk)
    with mounted(disk, directory / "mnt", root) as tree:
        used = os.statvfs(tree)
        (directory / "size").write_text(str((used.f_blocks - used.f_bfree) * used.f_frsize))
    for part, name in ((boot, "boot"), (root, "root")):
        with attached(disk, part.start, part.size, read_only=True) as device:
            run("dump", "-0", "-q", "-f", directory / f"{NAME}-{name}.dump", device)
    for compression in ("zlib", "zstd"):
        packed = directory / f"{NAME}-{compression}.qcow2"
        options = f"compression_type={compression}"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-W", "-o", options, disk, packed)
    run("zstd", "-q", "-3", "-T0", disk, "-o", directory / f"{NAME}.raw.zst")
    disk.unlink()


def _shell(script: str) -> None:
    subprocess.run(["bash", "-c", f"set -euo pipefail; {script}"], check=True)
