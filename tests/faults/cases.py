"""The commands that these tests make fail. Each can be called many times, with its own PATH and disk.

A new command needs an entry in CASES.
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
from http_server import serving
from standins import Instance
from support import MIB, Node, Result, attached, run

SIZE = 160  # MiB of most disks


@dataclass(frozen=True)
class Case:
    """One command: how to call it, and with which disk."""

    call: Callable[[Node, Path, str], Result]  # node, disk, PATH
    mib: int = SIZE
    source: str = ""  # the disk is a copy of this file; empty: only its first sector is marked
    reads_only: bool = False
    mounts: bool = False  # it mounts filesystems for writing, so that the disk always changes
    blind: bool = False  # it learns the partitions only after it has written the whole disk
    layout: str = ""  # of guestdisks; make_layout adds a disk of this name to the sources
    at_once: int = 3
    only: tuple[str, ...] = ()  # let only these programs fail; empty: all
    # program or fault -> reason why the command goes on
    tolerated: dict[str, str] = field(default_factory=dict)

    def make_layout(self, sources: Path, tree: Path, work: Path) -> None:
        """Make the disk once, as all tests share the sources."""
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


def download(node: Node, disk: Path, path: str) -> Result:
    """create, of an image that is at a URL, with its checksum; nothing of it is kept."""
    name = f"small-{trees.ARCH}.tar.gz"
    node.variant("url", f"CACHE_DIR={node.work}/cache\nIMAGE_CLEANUP=yes")
    with serving() as server:
        server.put(f"/{name}", (node.images / name).read_bytes())
        server.sums("/SHA256SUMS", name)
        more = {"OSP_IMAGE_NAME": "small", "OSP_IMAGE_URL": server.url, "OS_VARIANT": "url", "PATH": path}
        result = node.start("create", node.environment(disk, **more)).result()
    assert not [name for name in os.listdir(node.work / "cache") if ".part" not in name], result.log
    return result


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
    """Call ganeti-image. Fail unless it leaves a file if and only if it says so."""

    def call(node: Node, disk: Path, path: str) -> Result:
        directory = node.work / "captured"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        name, instance = asked(how, node, disk)
        image = ["-n", "made", "-a", trees.ARCH, "-d", str(directory), "--seal"]
        result = node.tool("ganeti-image", "-t", kind, "-i", *name, *image, path=path)
        left = os.listdir(directory)
        assert bool(left) == ("imageos: made" in result.log) >= (result.status == 0), f"{left}\n{result.log}"
        if instance and instance.left():
            put_right(node, instance, result)
            assert result.status, result.log
        return result

    return call


def mount_and_umount(how: str = "--disk") -> Callable[[Node, Path, str], Result]:
    """Call both. Fail if mount-disks fails and leaves something to undo without saying so."""

    def call(node: Node, disk: Path, path: str) -> Result:
        name, instance = asked(how, node, disk)
        place = Path(f"/tmp/{name[0]}_root")
        result = node.tool("mount-disks", *name, path=path)
        if instance:
            assert result.status or place.is_mount(), result.log
            put_right(node, instance, result)
            return result
        assert place.exists() == (result.status == 0), result.log
        undone = node.tool("umount-disks", "--here", name[0]).ok()
        assert not place.exists(), undone.log
        return result

    return call


def umount(how: str) -> Callable[[Node, Path, str], Result]:
    """Call umount-disks. Fail unless a second call completes it."""

    def call(node: Node, disk: Path, path: str) -> Result:
        name, instance = asked(how, node, disk)
        assert instance
        node.tool("mount-disks", "--read-only", *name).ok()
        assert len(instance.left()) == 3
        result = node.tool("umount-disks", *name, path=path)
        assert result.status or not instance.left(), result.log
        node.tool("umount-disks", *name).ok()
        assert not instance.left()
        return result

    return call


def grow(how: str = "--disk") -> Callable[[Node, Path, str], Result]:
    """Call grow. Fail if it has left something to undo without saying so."""

    def call(node: Node, disk: Path, path: str) -> Result:
        name, instance = asked(how, node, disk)
        result = node.tool("grow", *name, path=path)
        if instance:
            put_right(node, instance, result)
        return result

    return call


def asked(how: str, node: Node, disk: Path) -> tuple[list[str], Instance | None]:
    """Return a tool's arguments for the disk: `--disk`, or an instance `here` or `elsewhere` that Ganeti knows."""
    if how == "--disk":
        return [f"{node.work.name}.example.org", "--disk", str(disk)], None
    instance = standins.instance(node, disk, how == "elsewhere")
    return [instance.name], instance


def put_right(node: Node, instance: Instance, result: Result) -> None:
    """If a tool left something, fail unless it named umount-disks and this removes all."""
    if instance.left():
        assert f"umount-disks {instance.name}" in result.log, f"{instance.left()}\n{result.log}"
        undone = node.tool("umount-disks", instance.name).ok()
        assert not instance.left(), undone.log


SURVEY = "a table that cannot be read must not prevent a backup: all blocks are sent"
BEGINNING = "only its first bytes are needed; a later failure does not matter"
ALL_THERE = "it has given all that the server announced; a later failure does not matter"
OTHERS = "another program does the same"
UNREADABLE = "sfdisk returns 1 for a table that it cannot read; such a disk is left unchanged"
VERSION = "this call asks for its version, which is only shown"
NO_ZSTD = "this call asks whether it knows zstd; zlib is good, too"
CHECKED = "e2fsck returns 1 after it has corrected an error"
NOT_GROWN = "a disk is worth more than its size: a warning says why it does not grow"
AHEAD = {  # started early; if this fails, another way is used
    "ssh-keygen": "the guest's ssh-keygen makes all keys",
}
GROWING = {
    **dict.fromkeys(("e2fsck", "resize2fs", "xfs_growfs", "btrfs"), NOT_GROWN),
    **dict.fromkeys(("sfdisk fails at call 2", "sfdisk killed at its end at call 2"), NOT_GROWN),
}
GANETI = ("gnt-cluster", "gnt-instance")
SSH = ("gnt-cluster", "ssh")
GUNZIP = {
    **{f"{program} killed at its end at call 1": BEGINNING for program in ("gzip", "pigz")},
    "pigz missing at call 0": OTHERS,
}
CASES = {
    "create tarball": Case(create("small", "tarball", ".tar.gz"), tolerated={**GUNZIP, **AHEAD}),
    "create url": Case(download, only=("curl",), at_once=1, tolerated={
        f"curl killed at its end at call {nth}": ALL_THERE for nth in (1, 2, 3)}),
    "create gpt": Case(create("plain", "tarball", ".tar", OSP_PARTITION_TABLE="gpt", OSP_FILESYSTEM="ext2"), mib=300,
                       only=("mkfs.vfat", "mkfs.ext2")),
    "create xfs": Case(create("plain", "tarball", ".tar", OSP_FILESYSTEM="xfs"), mib=400, only=("mkfs.xfs",)),
    "create btrfs": Case(create("plain", "tarball", ".tar", OSP_FILESYSTEM="btrfs"), mib=400, only=("mkfs.btrfs",)),
    "create raw": Case(create("guest", "raw", ".raw.zst"), tolerated={
        "zstd killed at its end at call 1": BEGINNING,
        "e2fsck fails at call 1": CHECKED, **GROWING, **AHEAD}, blind=True),
    "create qcow2": Case(create("guest", "qcow2", ".qcow2"), blind=True, only=("qemu-img",)),
    "create dump": Case(create("guest", "dump", "-root.dump"), only=("restore", "tee")),
    "grow xfs": Case(restore("xfs"), mib=430, layout="xfs", only=("xfs_growfs",), tolerated=GROWING),
    "grow btrfs": Case(restore("btrfs"), mib=300, layout="btrfs", only=("btrfs",), at_once=1, tolerated=GROWING),
    "grow lvm": Case(restore("lvm"), mib=300, layout="lvm", only=("lvm",), tolerated={"lvm": NOT_GROWN}),
    "export": Case(export, source="guest.raw", reads_only=True, tolerated={"sfdisk": SURVEY, "blkid": SURVEY}),
    "import": Case(restore("stream"), tolerated={
        "sfdisk fails at call 1": UNREADABLE, "e2fsck fails at call 1": CHECKED, **GROWING}),
    "import bare": Case(restore("disk.zst"), only=("cat", "zstd", "sfdisk", "blkid"), tolerated={
        **{f"sfdisk fails at call {nth}": UNREADABLE for nth in (1, 2)},
        **dict.fromkeys(("sfdisk fails at call 3", "sfdisk killed at its end at call 3"), NOT_GROWN)}),
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
    "grow": Case(grow(), mib=300, source="guest.raw", mounts=True, tolerated={"e2fsck fails at call 1": CHECKED}),
    "grow here": Case(grow("here"), mib=300, source="guest.raw", mounts=True, only=GANETI),
    "grow elsewhere": Case(grow("elsewhere"), mib=300, source="guest.raw", mounts=True, only=SSH),
    "rename": Case(rename, source="guest.raw", tolerated={"sfdisk fails at call 1": UNREADABLE}),
}  # fmt: skip


def make_sources(top: Path, small: Path, tree: Path) -> Path:
    """Make the images and streams of all cases in one directory, the node's IMAGE_DIR."""
    guest = guestdisks.mbr(top / "guest.raw", tree, top).path
    part = guestdisks.place(guest, 1)
    assert part
    with attached(guest, part.start, part.size) as device:
        # without this, resize2fs demands a check unless the filesystem was mounted in the second in which it was made
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
    """Return the same node with its own directory for logs, so that calls may run at once."""
    other = copy.copy(node)
    other.work = work
    work.mkdir(exist_ok=True)
    return other
