"""The commands that fail on purpose here: each can be called again and again, with a PATH and a disk of its own.

A new command joins the tables by an entry in CASES.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import backups
import guestdisks
import standins
import trees
from standins import Instance
from support import MIB, Node, Result, attached, run

SIZE = 160  # MiB of most disks


@dataclass(frozen=True)
class Case:
    """One command: how it is called, with which disk."""

    call: Callable[[Node, Path, str], Result]  # node, disk, PATH
    mib: int = SIZE
    source: str = ""  # what the disk is a copy of; empty: nothing but a mark in its first sector
    reads_only: bool = False
    mounts: bool = False  # its filesystems, to be written to: the disk never is as it was
    blind: bool = False  # the partitions are not known before the whole disk is written
    layout: str = ""  # of guestdisks: a disk of that name is among the sources
    at_once: int = 3
    only: tuple[str, ...] = ()  # the programs that fail here; empty: all
    # a program, or one fault -> why the command goes on
    tolerated: dict[str, str] = field(default_factory=dict)

    def make_layout(self, sources: Path, tree: Path, work: Path) -> None:
        """Once: the sources are the same for all tests."""
        if self.layout and not (sources / self.layout).exists():
            guestdisks.LAYOUTS[self.layout](sources / self.layout, tree, work)

    def disk(self, path: Path, sources: Path) -> Path:
        if self.source:
            run("cp", "--sparse=always", sources / self.source, path)
        with path.open("r+b" if self.source else "xb") as file:
            file.truncate(max(path.stat().st_size, self.mib * MIB))
            if not self.source:
                file.write(b"\1" * 512)
        return path


def create(image: str, image_type: str, suffix: str, **settings: object) -> Callable[[Node, Path, str], Result]:
    def call(node: Node, disk: Path, path: str) -> Result:
        name = f"{image}-{trees.ARCH}"
        more = {"OSP_IMAGE_NAME": image, "OSP_IMAGE_TYPE": image_type, **settings}
        assert (node.images / f"{name}{suffix}").exists()
        return node.start("create", node.environment(disk, PATH=path, **more)).result()

    return call


def export(node: Node, disk: Path, path: str) -> Result:
    done = backups.export(node, disk, PATH=path)
    assert done.result.status or done.announced == f"{done.size}\n"
    return done.result


def restore(stream: str) -> Callable[[Node, Path, str], Result]:
    return lambda node, disk, path: backups.restore(node, node.images / stream, disk, PATH=path)


def rename(node: Node, disk: Path, path: str) -> Result:
    environment = node.environment(disk, env="rename", PATH=path, OLD_INSTANCE_NAME="image.example.net")
    return node.start("rename", environment).result()


def capture(kind: str, how: str = "--disk") -> Callable[[Node, Path, str], Result]:
    """ganeti-image; it leaves a file if and only if it says so."""

    def call(node: Node, disk: Path, path: str) -> Result:
        directory = node.work / "captured"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        name, known = asked(how, node, disk)
        image = ["-n", "made", "-a", trees.ARCH, "-d", str(directory), "--seal"]
        result = node.tool("ganeti-image", "-t", kind, "-i", *name, *image, path=path)
        left = os.listdir(directory)
        assert bool(left) == ("imageos: made" in result.log) >= (result.status == 0), f"{left}\n{result.log}"
        if known and known.left():
            put_right(node, known, result)
            assert result.status, result.log
        return result

    return call


def mount_and_umount(how: str = "--disk") -> Callable[[Node, Path, str], Result]:
    """Where mount-disks fails, it leaves nothing for umount-disks to do, or says so."""

    def call(node: Node, disk: Path, path: str) -> Result:
        name, known = asked(how, node, disk)
        place = Path(f"/tmp/{name[0]}_root")
        result = node.tool("mount-disks", *name, path=path)
        if known:
            assert result.status or place.is_mount(), result.log
            put_right(node, known, result)
            return result
        assert place.exists() == (result.status == 0), result.log
        undone = node.tool("umount-disks", "--here", name[0]).ok()
        assert not place.exists(), undone.log
        return result

    return call


def umount(how: str) -> Callable[[Node, Path, str], Result]:
    """umount-disks, which may be called again."""

    def call(node: Node, disk: Path, path: str) -> Result:
        name, known = asked(how, node, disk)
        assert known
        node.tool("mount-disks", "--read-only", *name).ok()
        assert len(known.left()) == 3
        result = node.tool("umount-disks", *name, path=path)
        assert result.status or not known.left(), result.log
        node.tool("umount-disks", *name).ok()
        assert not known.left()
        return result

    return call


def asked(how: str, node: Node, disk: Path) -> tuple[list[str], Instance | None]:
    """How a tool is told about the disk: by `--disk`, or by asking Ganeti about an instance `here` or `elsewhere`."""
    if how == "--disk":
        return [f"{node.work.name}.example.org", "--disk", str(disk)], None
    known = standins.instance(node, disk, how == "elsewhere")
    return [known.name], known


def put_right(node: Node, known: Instance, result: Result) -> None:
    """What a tool leaves, umount-disks takes away; and the tool has said so."""
    if known.left():
        assert f"umount-disks {known.name}" in result.log, f"{known.left()}\n{result.log}"
        undone = node.tool("umount-disks", known.name).ok()
        assert not known.left(), undone.log


SURVEY = "a table that cannot be looked at is no reason not to make a backup: everything is sent"
BEGINNING = "it has given the first bytes, which is all that was wanted; what becomes of it then does not matter"
OTHERS = "there is another program that does the same"
UNREADABLE = "sfdisk says 1 of a table that it cannot read; such a disk is left as it is"
VERSION = "it is asked for its version, which is only told"
NO_ZSTD = "it is asked whether it knows zstd; zlib is good, too"
CHECKED = "e2fsck says 1 when it has corrected something"
AHEAD = {  # what is begun early, and done in another way if that fails
    "ssh-keygen": "the guest's own makes all keys",
}
GANETI = ("gnt-cluster", "gnt-instance")
SSH = ("gnt-cluster", "ssh")
GUNZIP = {
    **{f"{one} killed at its end at call 1": BEGINNING for one in ("gzip", "pigz")},
    "pigz missing at call 0": OTHERS,
}
CASES = {
    "create tarball": Case(create("small", "tarball", ".tar.gz"), tolerated={**GUNZIP, **AHEAD}),
    "create gpt": Case(create("plain", "tarball", ".tar", OSP_PARTITION_TABLE="gpt", OSP_FILESYSTEM="ext2"), mib=300,
                       only=("mkfs.vfat", "mkfs.ext2")),
    "create xfs": Case(create("plain", "tarball", ".tar", OSP_FILESYSTEM="xfs"), mib=400, only=("mkfs.xfs",)),
    "create btrfs": Case(create("plain", "tarball", ".tar", OSP_FILESYSTEM="btrfs"), mib=400, only=("mkfs.btrfs",)),
    "create raw": Case(create("guest", "raw", ".raw.zst"), tolerated={
        **{f"zstd killed at its end at call {nth}": BEGINNING for nth in (1, 2, 3)},
        "e2fsck fails at call 1": CHECKED, **AHEAD}, blind=True),
    "create qcow2": Case(create("guest", "qcow2", ".qcow2"), blind=True, only=("qemu-img",)),
    "create dump": Case(create("guest", "dump", "-root.dump"), only=("restore", "tee")),
    "grow xfs": Case(restore("xfs"), mib=430, layout="xfs", only=("xfs_growfs",)),
    "grow btrfs": Case(restore("btrfs"), mib=300, layout="btrfs", only=("btrfs",), at_once=1),
    "export": Case(export, source="guest.raw", reads_only=True, tolerated={"sfdisk": SURVEY, "blkid": SURVEY}),
    "import": Case(restore("stream"), tolerated={
        "sfdisk fails at call 1": UNREADABLE, "e2fsck fails at call 1": CHECKED}),
    "import bare": Case(restore("disk.zst"), only=("cat", "zstd", "sfdisk", "blkid"), tolerated={
        **{f"sfdisk fails at call {nth}": UNREADABLE for nth in (1, 2)}}),
    "import dumps": Case(restore("dumps.tar"), only=("head", "restore", "tee")),
    "capture tarball": Case(capture("tarball"), source="guest.raw", reads_only=True, tolerated={
        "zstd missing at call 0": OTHERS}),
    "capture dump": Case(capture("dump"), source="old.raw", reads_only=True, only=("dump",), tolerated={
        **dict.fromkeys(("dump fails at call 1", "dump killed at its end at call 1"), VERSION)}),
    "capture qemu-img": Case(capture("qemu-img"), source="guest.raw", reads_only=True, only=("qemu-img",), tolerated={
        "qemu-img fails at call 1": NO_ZSTD, "qemu-img killed at its end at call 1": NO_ZSTD}),
    "mount-disks": Case(mount_and_umount(), source="guest.raw", mounts=True),
    "mount-disks here": Case(mount_and_umount("here"), source="guest.raw", mounts=True, only=GANETI),
    "mount-disks elsewhere": Case(mount_and_umount("elsewhere"), source="guest.raw", mounts=True, only=SSH),
    "umount-disks here": Case(umount("here"), source="guest.raw", reads_only=True, only=GANETI),
    "umount-disks elsewhere": Case(umount("elsewhere"), source="guest.raw", reads_only=True, only=SSH),
    "capture here": Case(capture("tarball", "here"), source="guest.raw", reads_only=True, only=GANETI),
    "capture elsewhere": Case(capture("tarball", "elsewhere"), source="guest.raw", reads_only=True, only=SSH),
    "rename": Case(rename, source="guest.raw", tolerated={"sfdisk fails at call 1": UNREADABLE}),
}  # fmt: skip


def make_sources(top: Path, small: Path, tree: Path) -> Path:
    """What the cases are about, in one directory: it is the node's IMAGE_DIR."""
    guest = guestdisks.mbr(top / "guest.raw", tree, top).path
    part = guestdisks.place(guest, 1)
    assert part
    with attached(guest, part.start, part.size) as device:
        # or else resize2fs goes on without a check only if it was mounted in the second in which it was made
        run("e2fsck", "-f", "-p", device)
    run("cp", small, top / "small.tar.gz")
    run("cp", small, top / f"small-{trees.ARCH}.tar.gz")
    trees.tarball(tree, top / f"plain-{trees.ARCH}.tar", "tar")
    guestdisks.compress(guest, top / f"guest-{trees.ARCH}.raw.zst", "zstd", "-q", "-c")
    guestdisks.compress(guest, top / "disk.zst", "zstd", "-q", "-c")
    guestdisks.qcow2(guest, top / f"guest-{trees.ARCH}.qcow2")
    old = guestdisks.ancestor(top / "old.raw", tree, top).path
    for name, number in (("boot", 1), ("root", 3)):
        part = guestdisks.place(old, number)
        assert part
        dump = top / f"guest-{trees.ARCH}-{name}.dump"
        with attached(old, part.start, part.size, read_only=True) as device:
            run("dump", "-0", "-q", "-f", dump, device)
        run("cp", dump, top / f"{name}.dump")
    run("tar", "--create", "--file", top / "dumps.tar", "--directory", top, "root.dump", "boot.dump")
    return top


def apart(node: Node, work: Path) -> Node:
    """The same node, with a directory for the logs of one call: calls may run at once."""
    other = copy.copy(node)
    other.work = work
    work.mkdir(exist_ok=True)
    return other
