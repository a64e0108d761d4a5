"""Two calls at once: on one disk the second is refused and the first unharmed; on different disks both work."""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import backups
import guestdisks
import pytest
from support import SITE, Call, Node, Result, attached, mounted, partitions, run, wait_until
from trees import ARCH

from imageos.disks import btrfs

MakeDisk = Callable[..., Path]
NAME = "parallel.example.org"
PLACE = Path(f"/tmp/{NAME}_root")
KINDS = ["file", "block device"]


def capture(node: Node, target: Path, kind: str) -> Result:
    return node.tool("ganeti-image", "-t", kind, "-i", NAME, "-d", str(node.images), "--disk", str(target))


def rename(node: Node, target: Path) -> Result:
    return node.call("rename", node.environment(target, env="rename", OLD_INSTANCE_NAME="old.example.org"))


# All possible second calls, also those that only read, because they would read inconsistent data
SECOND: dict[str, Callable[[Node, Path], Result]] = {
    "create": lambda node, target: node.create(target),
    "import": lambda node, target: backups.restore(node, b"a stream that is never read", target),
    "export": lambda node, target: backups.export(node, target).result,
    "rename": rename,
    "mount-disks": lambda node, target: node.tool("mount-disks", "other", "--disk", str(target)),
    "ganeti-image -t tarball": lambda node, target: capture(node, target, "tarball"),
    "ganeti-image -t dump": lambda node, target: capture(node, target, "dump"),
    "ganeti-image -t qemu-img": lambda node, target: capture(node, target, "qemu-img"),
}


@contextmanager
def waiting(node: Node, target: Path, gate: Path) -> Iterator[Call]:
    """Start a create that waits before its end; let it finish at the end of the context."""
    node.hook("waits", f"#!/bin/sh\n: > {gate}\nwhile [ -e {gate} ]; do sleep 0.05; done\n")
    call = node.start("create", node.environment(target))
    call.wait_for(gate.exists, "its hook runs")
    try:
        yield call
    finally:
        gate.unlink()
    call.result().ok()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_during_create(
    kind: str, node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path
) -> None:
    target = disk() if kind == "file" else block_disk()
    images = os.listdir(node.images)
    with waiting(node, target, tmp_path / "gate"):
        for name, second in SECOND.items():
            assert f"disk {target} is in use: " in second(node, target).failed().last, name
        node.tool("mount-disks", "other", "--read-only", "--disk", str(target)).failed(str(target), "in use")
        assert os.listdir(node.images) == images
    assert_whole(target, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_while_mounted(
    kind: str, node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path
) -> None:
    """They name the mount point; files written there afterwards are on the disk."""
    target = disk() if kind == "file" else block_disk()
    node.create(target).ok()
    node.tool("mount-disks", NAME, "--disk", str(target)).ok()
    try:
        for name, second in SECOND.items():
            result = second(node, target).failed(str(target))
            assert f"is in use: it is mounted at {PLACE}" in result.last, name
            assert f"hint: umount-disks {NAME}" in result.log, name
        (PLACE / "written").write_text("afterwards\n")
    finally:
        node.tool("umount-disks", "--here", NAME).ok()
    assert_whole(target, tmp_path)
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
        assert (guest / "written").read_text() == "afterwards\n"
    node.create(target).ok()


def test_install_during_create(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """A new version replaces the file that a create runs from; the create continues with the old one."""
    newer = another_version(node.imageos, tmp_path / "newer", "99.9")
    here = copy.copy(node)
    here.root = tmp_path / "own"
    here.os_dir = here.root / "usr/share/ganeti/os/image"
    run(node.imageos, "install", "--root", here.root)
    target, gate = disk(), tmp_path / "gate"
    node.variant("default", f": > {gate}; while [ -e {gate} ]; do sleep 0.05; done")
    (SITE / "hooks/interfaces").chmod(0o755)
    call = here.start("create", here.environment(target, NIC_COUNT="0"))
    call.wait_for(gate.exists, "it reads its settings")
    with (here.os_dir / "imageos").open("rb") as running:
        run(newer, "install", "--root", here.root)
        assert running.read() == node.imageos.read_bytes(), "written into the file that somebody runs"
    gate.unlink()
    call.result().ok()
    assert_whole(target, tmp_path)
    assert (here.os_dir / "imageos").read_bytes() == newer.read_bytes()
    assert [name for name in os.listdir(here.os_dir) if name.endswith(".tmp")] == []
    node.variant("default")
    node.hook("version", "#!/bin/sh\n$IMAGEOS --version\n")
    assert "imageos 99.9" in here.create(disk(), NIC_COUNT="0").ok().log


def test_install_before_a_hook(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The bundled hooks of a create that has begun are those of the old version, too."""
    newer = another_version(node.imageos, tmp_path / "newer", "99.9")
    here = copy.copy(node)
    here.root = tmp_path / "own"
    here.os_dir = here.root / "usr/share/ganeti/os/image"
    run(node.imageos, "install", "--root", here.root)
    gate = tmp_path / "gate"
    node.hook("a_wait", f"#!/bin/sh\n: >{gate}\nwhile [ -e {gate} ]; do sleep 0.05; done\n")
    (SITE / "hooks/interfaces").chmod(0o755)
    call = here.start("create", here.environment(disk(), NIC_COUNT="0"))
    call.wait_for(gate.exists, "its hooks run")
    run(newer, "install", "--root", here.root)
    gate.unlink()
    call.result().ok()


def another_version(imageos: Path, path: Path, version: str) -> Path:
    """Return the same file with another version: all offsets in the archive differ."""
    with zipfile.ZipFile(imageos) as old, path.open("wb") as file:
        file.write(imageos.read_bytes().partition(b"\n")[0] + b"\n")
        with zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                is_its_place = name.endswith("/imageos/__init__.py")
                new.writestr(name, f'__version__ = "{version}"\n' if is_its_place else old.read(name))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_three_on_one_disk_at_the_same_moment(
    kind: str, node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path
) -> None:
    """One gets the disk, and keeps it until the others have given up."""
    gate = tmp_path / "gate"
    node.hook("waits", f"#!/bin/sh\nwhile [ -e {gate} ]; do sleep 0.05; done\n")
    target = disk() if kind == "file" else block_disk()
    for _ in range(3):
        gate.write_text("")
        calls = [node.start("create", node.environment(target)) for _ in range(3)]
        wait_until(lambda calls=calls: sum(call.process.poll() is not None for call in calls) >= 2, "two ended")
        gate.unlink()
        results = [call.result() for call in calls]
        assert sorted(result.status for result in results) == [0, 1, 1], [result.log for result in results]
        for result in results:
            if result.status:
                result.failed(str(target), "in use")
        assert_whole(target, tmp_path)


def test_four_on_four_disks(node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path) -> None:
    node.hook("slow", "#!/bin/sh\nsleep 1\n")
    targets = [disk(), block_disk(), disk(), block_disk()]
    calls = [
        node.start("create", node.environment(target, INSTANCE_NAME=f"inst{number}.example.org"))
        for number, target in enumerate(targets, 1)
    ]
    for call in calls:
        call.result().ok()
    for number, target in enumerate(targets, 1):
        assert_whole(target, tmp_path)
        with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
            assert f"inst{number}" in (guest / "etc/hostname").read_text()


def assert_whole(target: Path, work: Path) -> None:
    boot, swap, root = partitions(target)
    for part in (boot, root):
        with attached(target, part.start, part.size, read_only=True) as device:
            run("e2fsck", "-f", "-n", device)
    with mounted(target, work / "root", root) as guest:
        assert (guest / "usr/share/doc/copyright").read_text() == "free\n"


def test_instances_of_one_btrfs_image(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The kernel cannot tell their filesystems apart: each waits until it is alone, and gets its own."""
    gate = tmp_path / "gate"
    guest = guestdisks.btrfs(tmp_path / "image", small_tree, tmp_path)
    node.image(guest.path, f"btrfs-{ARCH}.raw")
    node.hook("waits", f"#!/bin/sh\n: >{gate}.$INSTANCE_NAME\nwhile [ -e {gate} ]; do sleep 0.05; done\n")
    gate.touch()
    targets = [disk(300) for _ in range(3)]
    image = {"OSP_IMAGE_NAME": "btrfs", "OSP_IMAGE_TYPE": "raw"}
    calls = [
        node.start("create", node.environment(target, INSTANCE_NAME=f"twin{number}", **image))
        for number, target in enumerate(targets)
    ]

    def all_meet() -> bool:
        """One waits in its hook, the others wait for it."""
        waiting = [call for call in calls if "waiting for another instance" in call.log()]
        return len(waiting) >= 2 and len(list(tmp_path.glob("gate.*"))) == 1

    wait_until(all_meet, "one is at its hook, and two wait")
    gate.unlink()
    for number, (call, target) in enumerate(zip(calls, targets)):
        call.result().ok()
        with mounted(target, tmp_path / "look", guestdisks.place(target, 2), "ro,subvol=@") as root:
            assert (root / "etc/hostname").read_text() == f"twin{number}\n"


def test_btrfs_image_whose_instance_is_mounted(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The mount of a user may last: an error names the mount point."""
    guest = guestdisks.btrfs(tmp_path / "image", small_tree, tmp_path)
    node.image(guest.path, f"btrfs-{ARCH}.raw")
    with mounted(guest.path, tmp_path / "look", guestdisks.place(guest.path, 2), "ro,subvol=@"):
        result = node.create(disk(300), OSP_IMAGE_NAME="btrfs", OSP_IMAGE_TYPE="raw")
    result.failed("a btrfs with the same UUID is mounted from")
    assert result.seconds < btrfs.TWIN_PATIENCE / 2, "waited for somebody who may take his time"
