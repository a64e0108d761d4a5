"""What no image is made of, or nowhere to be put; and tools that are stopped half way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import guestdisks
import pytest
from captures import BOOT, FILES, TYPES, MakeDisk, capture, start, unchanged
from captures import disks as disks
from captures import node as node
from support import MIB, PATH, Gate, Node, attached, describe, mounted, partitions, run, session, wait_until

# Other disks


@pytest.mark.parametrize("content", ["nothing", "ext4", "lvm"])
def test_a_disk_without_a_system(content: str, node: Node, tmp_path: Path) -> None:
    """It becomes a disk image without changes; a tarball or sealing is refused."""
    disk = guestdisks.blank(tmp_path / "guest", 64, "label: gpt\n1 : size=40M\n")
    if content != "nothing":
        guestdisks.make(disk, 1, content)
    with unchanged(disk):
        for arguments in (["tarball"], ["qemu-img", "--seal"]):
            lines = capture(node, disk, *arguments).failed("no root filesystem", "(1 partition, listed above)").lines
            assert lines[-2] == "imageos: hint: make-qemu-img, without --seal, takes a disk as it is"
        assert os.listdir(node.images) == []
        assert "partition 1: 40 MiB" in capture(node, disk, "qemu-img").ok().log
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", node.images / FILES["qemu-img"][0], raw)
    run("cmp", disk, raw)


@pytest.mark.parametrize("name, word", [("xfs", "xfs"), ("btrfs", "btrfs")])
def test_a_dump_of_what_dump_does_not_know(
    name: str, word: str, node: Node, disks: dict[str, guestdisks.Guest]
) -> None:
    result = capture(node, disks[name].path, "dump").failed(word, "dump(8)")
    assert "make-qemu-img" in result.lines[-2]
    assert os.listdir(node.images) == []


@pytest.mark.parametrize("feature", ["inline_data", "ea_inode", "verity", "encrypt", "bigalloc"])
def test_a_dump_that_would_lose_files(feature: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """It is refused before anything is written; a disk image of the same disk works."""
    disk = guestdisks.blank(tmp_path / "guest", 90)
    run("mkfs.ext4", "-q", "-F", "-I", "256", "-O", feature, disk)
    with mounted(disk, tmp_path / "mnt", options="rw") as root:
        run("cp", "--archive", f"{small_tree}/.", root)
    capture(node, disk, "dump").failed(feature, "dump(8)")
    assert os.listdir(node.images) == []
    capture(node, disk, "qemu-img").ok()


def test_a_dump_of_reserved_blocks(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """dump 0.4b47 takes old data in reserved blocks for a file's content."""
    guest = disk(100)
    with guest.open("r+b") as file:
        file.write(b"of a deleted file" * (90 * MIB // 17))
    run("mkfs.ext4", "-q", "-E", "nodiscard", guest)
    with mounted(guest, tmp_path / "guest", None, "rw") as top:
        run("cp", "-a", f"{small_tree}/.", top)
        (top / "half").write_bytes(b"written")
        for name in ("whole", "half"):
            run("fallocate", "--length", "100000", top / name)
        with (top / "sparse").open("wb") as sparse:
            sparse.truncate(MIB)
            sparse.seek(500_000)
            sparse.write(b"island")
        os.utime(top / "half", (1, 2))
        (top / "fixed").write_text("fixed")
        run("fallocate", "--length", "50000", top / "fixed")
        run("chattr", "+i", top / "fixed")
        before = {path: entry for path, entry in describe(top).items() if path != b"."}
    capture(node, guest, "dump").ok()
    target = disk(160)
    node.create(target, OSP_IMAGE_NAME="made", OSP_IMAGE_TYPE="dump", INSTANCE_HV_kernel_path="/vmlinuz").ok()
    with mounted(target, tmp_path / "made", partitions(target)[-1]) as top:
        assert (top / "whole").read_bytes() == bytes(100_000)
        after = describe(top)
        for name in (b"whole", b"half", b"sparse", b"fixed"):
            assert after[name] == before[name]


@pytest.mark.parametrize("kind", ["tarball", "dump"])
def test_attributes_that_only_root_may_see(
    kind: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    guest, target = disk(100), disk(160)
    run("mkfs.ext4", "-q", guest)
    with mounted(guest, tmp_path / "guest", None, "rw") as top:
        run("cp", "-a", f"{small_tree}/.", top)
        os.setxattr(top / "etc", "trusted.overlay.opaque", b"y")
        os.setxattr(top / "etc/passwd", "trusted.note\n", b"1")
        os.setxattr(top / "etc/passwd", "user.note", b"2")
    left_out = "which a dump would keep: trusted.note\\x0a, trusted.overlay.opaque"
    assert (left_out in capture(node, guest, kind).ok().log) == (kind == "tarball")
    settings = {"OSP_IMAGE_NAME": "made", "OSP_IMAGE_TYPE": TYPES[kind], "INSTANCE_HV_kernel_path": "/vmlinuz"}
    result = node.create(target, **settings).ok()
    assert "left out" not in result.log and "cannot be kept" not in result.log
    with mounted(target, tmp_path / "made", partitions(target)[-1]) as top:
        assert os.getxattr(top / "etc/passwd", "user.note") == b"2"
        names = {name for path in ("etc", "etc/passwd") for name in os.listxattr(top / path)} - {"user.note"}
    assert names == ({"trusted.overlay.opaque", "trusted.note\n"} if kind == "dump" else set())


def test_a_dump_of_the_longest_name(node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    """restore(8) then reads the rest of the directory wrongly."""
    capture(node, disks["ancestor"].path, "dump").failed("255", "dump(8)")
    assert os.listdir(node.images) == []


# Files in the way


@pytest.mark.parametrize("kind", TYPES)
def test_an_image_is_never_overwritten_silently(kind: str, node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    path = node.images / FILES[kind][0]
    path.write_text("precious")
    disk = disks["mbr"].path
    capture(node, disk, kind).failed(str(path))
    assert path.read_text() == "precious" and os.listdir(node.images) == [path.name]
    if kind == "dump":
        (node.images / BOOT[0]).write_text("would be deployed with the new one")
    capture(node, disk, kind, "--force").ok()
    assert sorted(os.listdir(node.images)) == FILES[kind]
    assert path.stat().st_size > 10000


@pytest.mark.parametrize("kind, other", [("tarball", ".tar.gz"), ("qemu-img", ".img")])
def test_an_image_that_would_be_deployed_instead(
    kind: str, other: str, node: Node, disks: dict[str, guestdisks.Guest]
) -> None:
    (node.images / f"made-x86_64{other}").write_text("precious")
    for options in ([], ["--force"]):
        capture(node, disks["mbr"].path, kind, *options).failed(f"made-x86_64{other}")
    assert os.listdir(node.images) == [f"made-x86_64{other}"]


def test_the_directory_is_missing(node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    capture(node, disks["mbr"].path, "tarball", directory=nowhere).failed(str(nowhere), "No such file")
    assert not nowhere.exists()
    nowhere.write_text("a file")
    capture(node, disks["mbr"].path, "tarball", directory=nowhere).failed(str(nowhere), "Not a directory")


@pytest.mark.parametrize("kind", TYPES)
def test_a_block_device(kind: str, node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    """Like those of LVM and DRBD."""
    disk = disks["mbr"].path
    with unchanged(disk), attached(disk) as device:
        capture(node, device, kind).ok()
    assert sorted(os.listdir(node.images)) == FILES[kind]


def test_the_disk_is_in_use(node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    with attached(disks["mbr"].path, read_only=True) as device:
        capture(node, disks["mbr"].path, "tarball").failed("in use", str(device))


def test_the_instance_is_started_meanwhile(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Data read before and after a write is inconsistent."""
    disk = guestdisks.mbr(tmp_path / "guest", small_tree, tmp_path).path
    fake, gate = tmp_path / "fake/blkid", Gate(tmp_path / "fake/gate")
    real = run("sh", "-c", f"PATH={PATH} command -v blkid").strip()
    node.write(fake, f'#!/bin/sh\n{gate.shell}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    call = start(node, disk, "tarball", path=f"{fake.parent}:{PATH}")
    call.wait_for(gate.reached, "in blkid")
    with disk.open("r+b") as file:
        file.seek(90 * MIB)
        file.write(b"a log entry")
    fake.unlink()
    gate.open()
    call.result().failed(str(disk), "was written to")
    assert os.listdir(node.images) == []


@contextmanager
def small(where: Path, mib: int) -> Iterator[Path]:
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={mib}M,mode=755", "tmpfs", where)
    try:
        yield where
    finally:
        run("umount", where)


@pytest.fixture(scope="module")
def full_disk(small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a disk with 40 MiB of data that cannot be compressed."""
    top = tmp_path_factory.mktemp("full")
    disk = guestdisks.mbr(top / "full", small_tree, top).path
    with mounted(disk, top / "mnt", guestdisks.place(disk, 1), "rw") as root:
        (root / "noise").write_bytes(os.urandom(40 * MIB))
    return disk


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "mib, words",
    [(32, ["is full", "free"]), (80, ["is full", "free"]), (86, ["is full", "4.3 MiB have to stay free"])],
    ids=["copy", "image", "reserve"],
)
def test_no_room(mib: int, words: list[str], kind: str, node: Node, full_disk: Path, tmp_path: Path) -> None:
    """For the copy it is known in advance, for the image found on the way; neither remains."""
    with small(tmp_path / "small", mib) as directory, unchanged(full_disk):
        capture(node, full_disk, kind, directory=directory).failed(str(directory), *words)
        assert os.listdir(directory) == []
        # Landlock releases a file a moment after its program has ended
        wait_until(lambda: os.statvfs(directory).f_bfree == os.statvfs(directory).f_blocks, "nothing is left of it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize(
    "kind, tool", [("tarball", "tar"), ("dump", "dump"), ("qemu-img", "qemu-img"), ("tarball", "blkid")]
)
def test_killed(
    kind: str, tool: str, number: signal.Signals, node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path
) -> None:
    """While it reads the disk, and while it writes the image: nothing remains, and the next call works."""
    gate = Gate(tmp_path / "fake/gate")
    fake = tmp_path / "fake" / tool
    real = run("sh", "-c", f"PATH={PATH} command -v {tool}").strip()
    work = '[ "$1" = create ]' if tool == "qemu-img" else "false"  # its trial run
    node.write(fake, f'#!/bin/sh\nif ! {work}; then {gate.shell}; fi\nexec {real} "$@"\n')
    fake.chmod(0o755)
    disk = disks["mbr"].path
    with unchanged(disk):
        call = start(node, disk, kind, path=f"{fake.parent}:{PATH}")
        call.wait_for(gate.reached, f"in {tool}")
        call.kill(number)
        assert call.result().status == 128 + number
        assert os.listdir(node.images) == []
        wait_until(lambda: not session(call.process.pid), "the disk is free")
    capture(node, disk, kind).ok()


def test_a_tool_that_fails(node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path) -> None:
    """At any position in the pipe: the last line says why, and there is no image."""
    for tool, kind in (("tar", "tarball"), ("zstd", "tarball"), ("dump", "dump"), ("qemu-img", "qemu-img")):
        fake = tmp_path / f"fake-{tool}" / tool
        node.write(fake, "#!/bin/sh\nhead -c 100 /dev/zero\necho out of order >&2\nexit 7\n")
        fake.chmod(0o755)
        result = capture(node, disks["mbr"].path, kind, path=f"{fake.parent}:{PATH}").failed(tool, "out of order")
        assert os.listdir(node.images) == [], result.log


def test_without_zstd(node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path) -> None:
    """It uses gzip."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for directory in reversed(PATH.split(":")):
        for name in os.listdir(directory):
            if name not in ("zstd", "pigz") and not (tools / name).is_symlink():
                (tools / name).symlink_to(f"{directory}/{name}")
    capture(node, disks["mbr"].path, "tarball", path=str(tools)).ok()
    assert sorted(os.listdir(node.images)) == ["made-x86_64.tar.gz", "made-x86_64.tar.gz.sha256"]
    run("gzip", "--test", node.images / "made-x86_64.tar.gz")


def test_an_image_is_roots_alone(node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    """The image contains password hashes and keys."""
    capture(node, disks["mbr"].path, "tarball").ok()
    assert (node.images / FILES["tarball"][0]).stat().st_mode & 0o7777 == 0o600
    assert (node.images / FILES["tarball"][1]).stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["new", "replaced"])
def test_the_directory_is_a_users(
    options: list[str], node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path
) -> None:
    """He puts a link to another directory in its place, meanwhile: nothing is made, replaced or removed there."""
    own, other = tmp_path / "users", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    for name in (*FILES["dump"], *BOOT):
        (other / name).write_text("of the node")
    fake, gate = tmp_path / "fake/dump", Gate(tmp_path / "fake/gate")
    real = run("sh", "-c", f"PATH={PATH} command -v dump").strip()
    node.write(fake, f'#!/bin/sh\n{gate.shell}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    disk = disks["mbr"].path
    call = start(node, disk, "dump", *options, directory=own, path=f"{fake.parent}:{PATH}")
    call.wait_for(gate.reached, "in dump")
    own.rename(tmp_path / "moved")
    own.symlink_to(other)
    fake.unlink()
    gate.open()
    call.result().ok()
    assert {path.read_text() for path in other.iterdir()} == {"of the node"}
    assert sorted(os.listdir(other)) == sorted([*FILES["dump"], *BOOT])
    assert sorted(os.listdir(tmp_path / "moved")) == FILES["dump"]
