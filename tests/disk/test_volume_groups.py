"""Disks with volume groups: every command sees their logical volumes, and of the node lvm2 sees nothing else."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import guestdisks
import lvmdisks
import pytest
import trees
from backups import MARKER, exported, restore
from captures import capture
from guestdisks import BIOS, DATA, Guest, by_number, place
from support import MIB, PATH, Gate, Node, Result, attached, digest, mounted, run, signatures, wait_until

MakeDisk = Callable[..., Path]
SIZE = 500  # MiB of the instance's disk
TWO = f"label: gpt\n1 : size=2M, type={BIOS}\n2 : size=40M, type={DATA}\n3 : size=120M, type={lvmdisks.LVM}\n"
ONE = TWO
TWO += f"4 : size=60M, type={lvmdisks.LVM}\n"
CHECK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}
ROOT_FSTAB = "/dev/vg/root / ext4 defaults 0 1\n"


@pytest.fixture(scope="module")
def guest(small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Return a guest on LVM. Tests must not write to it."""
    top = tmp_path_factory.mktemp("lvm")
    return guestdisks.lvm(top / "lvm.raw", small_tree, top)


def deploy(node: Node, image: Path, target: Path, **more: object) -> Result:
    path = node.images / f"guest-{trees.ARCH}.raw"
    path.unlink(missing_ok=True)
    path.symlink_to(image)
    return node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="raw", **more)


def check_root(disk: Path, name: str, tmp_path: Path) -> int:
    """Fail unless the root on this logical volume is this instance's, and sound; return its size."""
    part = place(disk, name)
    assert part
    with mounted(disk, tmp_path / "look", part) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"
        status = os.statvfs(root)
    with attached(disk, part.start, part.size, read_only=True) as device:
        run(*CHECK[part.content["TYPE"]], device)
    assert status.f_blocks * status.f_frsize > 0.8 * part.size
    return part.size


def system(path: Path, name: str, tree: Path, work: Path, fstab: str = ROOT_FSTAB, kind: str = "ext4") -> None:
    guestdisks.make(path, name, kind)
    guestdisks.fill(path, name, tree, work, fstab)


# Where it is


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_physical_volume_without_a_table(
    kind: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    image = guestdisks.blank(tmp_path / "image", 340)
    guestdisks.volume_group(image, 0, "vg", {"swap": 8, "root": 320})
    guestdisks.make(image, "vg/swap", "swap")
    system(image, "vg/root", small_tree, tmp_path, kind=kind)
    target = disk(SIZE)
    log = deploy(node, image, target).ok().log
    assert "swap on logical volume vg/swap" in log
    assert check_root(target, "vg/root", tmp_path) >= (SIZE - 20) * MIB


@pytest.mark.parametrize(
    "source", ["UUID={uuid}", "LABEL={label}", "/dev/mapper/a--b-usr--1", "/dev/disk/by-id/{mapped}"]
)
def test_several_groups_and_names(source: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """/usr is on another group, on another partition, under any name."""
    image = guestdisks.blank(tmp_path / "image", 240, TWO)
    guestdisks.volume_group(image, 3, "vg", {"root": 116})
    guestdisks.volume_group(image, 4, "a-b", {"usr-1": 48})
    guestdisks.make(image, "a-b/usr-1", "ext4", "the-usr")
    content = place(image, "a-b/usr-1").content  # type: ignore[union-attr]
    mapped = lvmdisks.mapped_uuid(image, "a-b/usr-1")
    place_of_usr = source.format(uuid=content["UUID"], label=content["LABEL"], mapped=mapped)
    tree = tmp_path / "tree"
    run("cp", "--archive", small_tree, tree)
    guestdisks.fill(image, "a-b/usr-1", tree / "usr", tmp_path)
    shutil.rmtree(tree / "usr")
    (tree / "usr").mkdir()
    system(image, "vg/root", tree, tmp_path, f"{ROOT_FSTAB}{place_of_usr} /usr ext4 defaults 0 2\n")
    target = disk(SIZE)
    log = deploy(node, image, target).ok().log
    assert "/ on logical volume vg/root (ext4), /usr on logical volume a-b/usr-1 (ext4)" in log
    assert "not grown: behind partition 3 lies partition 4 (LVM2_member)" in log
    check_root(target, "vg/root", tmp_path)


def test_a_physical_volume_in_no_group(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """A root beside it is none of its business."""
    image = guestdisks.blank(tmp_path / "image", 150, "label: gpt\n1 : size=30M\n2 : size=100M\n")
    guestdisks.make(image, 1, "lvm")
    guestdisks.make(image, 2, "ext4")
    guestdisks.fill(image, 2, small_tree, tmp_path, f"UUID={guestdisks.UUID.format(2)} / ext4 defaults 0 1\n")
    log = deploy(node, image, disk(SIZE)).ok().log
    assert "found / on partition 2 (ext4)" in log and "logical volumes" not in log


def test_a_logical_partition(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """As Debian's installer makes it: the extended partition grows, too."""
    table = "label: dos\n1 : start=1M, size=40M, type=83, bootable\n2 : start=42M, type=5\n5 : start=43M, type=8e\n"
    image = guestdisks.blank(tmp_path / "image", 200, table)
    guestdisks.make(image, 1, "ext2", "boot")
    guestdisks.volume_group(image, 5, "vg", {"swap": 8, "root": 96})
    system(image, "vg/root", small_tree, tmp_path)
    target = disk(SIZE)
    deploy(node, image, target).ok()
    assert check_root(target, "vg/root", tmp_path) >= (SIZE - 60) * MIB


def test_free_extents_are_enough(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Behind the partition lies another one, behind the root there is room."""
    image = guestdisks.blank(tmp_path / "image", 240, TWO)
    guestdisks.volume_group(image, 3, "vg", {"root": 48})
    guestdisks.make(image, 4, "ext4")
    system(image, "vg/root", small_tree, tmp_path)
    target = disk(SIZE)
    deploy(node, image, target).ok()
    assert check_root(target, "vg/root", tmp_path) == 116 * MIB
    assert [(part.start, part.size) for part in by_number(target)] == [
        (part.start, part.size) for part in by_number(image)
    ]


def test_what_lies_behind_the_root(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The root stays as it is, but the guest gets free extents."""
    image = guestdisks.blank(tmp_path / "image", 240, ONE)
    guestdisks.volume_group(image, 3, "vg", {"root": 80, "swap": 8})
    system(image, "vg/root", small_tree, tmp_path)
    target = disk(SIZE)
    log = deploy(node, image, target).ok().log
    assert "not grown: behind logical volume vg/root lies logical volume vg/swap" in log
    assert check_root(target, "vg/root", tmp_path) == 80 * MIB
    places = lvmdisks.places(target)
    assert sum(places[3]) > (SIZE - 2) * MIB
    with lvmdisks.physical(target, places) as devices:
        assert int(lvmdisks.report(devices, "vgs", "vg_free")[0]["vg_free"]) > 350 * MIB


# What cannot be read

PHYSICAL = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
ELSEWHERE = "bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb"


def metadata(volumes: str, status: str = "", more: str = "", other: str = "") -> str:
    """Return the metadata of a volume group `vg`, as vgcfgbackup(8) writes it."""
    return f"""
contents = "Text Format Volume Group"
version = 1
vg {{
  id = "cccccc-cccc-cccc-cccc-cccc-cccc-cccccc"
  seqno = 3
  format = "lvm2"
  status = ["RESIZEABLE", "READ", "WRITE"{status}]
  flags = []
  {more}
  extent_size = 8192
  max_lv = 0
  max_pv = 0
  metadata_copies = 0
  physical_volumes {{
    pv0 {{ id = "{PHYSICAL}" device = "unknown" status = ["ALLOCATABLE"] flags = []
          dev_size = 245760 pe_start = 2048 pe_count = 29 }}
    {other}
  }}
  logical_volumes {{
{volumes}
  }}
}}
"""


def volume(name: str, *segments: str, status: str = '"READ", "WRITE", "VISIBLE"') -> str:
    letter = sum(name.encode())
    lines = [f"segment{number} {{ {text} }}" for number, text in enumerate(segments, 1)]
    return f"""
    {name} {{ id = "{letter:06}-dddd-dddd-dddd-dddd-dddd-dddddd" status = [{status}] flags = []
      segment_count = {len(segments)}
      {" ".join(lines)} }}
"""


def linear(first: int, count: int, start: int = 0, pv: str = "pv0") -> str:
    return (
        f'start_extent = {start} extent_count = {count} type = "striped" stripe_count = 1 stripes = ["{pv}", {first}]'
    )


HIDDEN = '"READ", "WRITE"'
ROOT = volume("root", linear(0, 20))
STRIPED = 'start_extent = 0 extent_count = 20 type = "striped" stripe_count = 2 stripe_size = 128'
STRIPED += ' stripes = ["pv0", 0, "pv0", 12]'
MIRROR = 'start_extent = 0 extent_count = 10 type = "mirror" mirror_count = 2 region_size = 1024'
MIRROR += ' mirrors = ["root_mimage_0", 0, "root_mimage_1", 0]'
RAID = 'start_extent = 0 extent_count = 10 type = "raid1" device_count = 2 region_size = 1024'
RAID += ' raids = ["root_rmeta_0", "root_rimage_0", "root_rmeta_1", "root_rimage_1"]'
POOL = 'start_extent = 0 extent_count = 20 type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata"'
POOL += ' transaction_id = 1 chunk_size = 128 discards = "passdown" zero_new_blocks = 1'
THIN = 'start_extent = 0 extent_count = 20 type = "thin" thin_pool = "pool" transaction_id = 0 device_id = 1'
SNAPSHOT = 'start_extent = 0 extent_count = 20 type = "snapshot" chunk_size = 8 origin = "root" cow_store = "snap"'
OTHER_PV = f"""pv1 {{ id = "{ELSEWHERE}" device = "unknown" status = ["ALLOCATABLE"] flags = []
               dev_size = 245760 pe_start = 2048 pe_count = 29 }}"""
# name -> metadata, reason
ODD = {
    "striped": (metadata(volume("root", STRIPED)), "vg/root cannot be read: it is not linear but striped"),
    "pieces": (metadata(volume("root", linear(0, 9), linear(15, 9, 9))), "vg/root cannot be read: it is in 2 pieces"),
    "mirror": (
        metadata(
            volume("root", MIRROR)
            + "".join(volume(f"root_mimage_{n}", linear(10 * n, 10), status=HIDDEN) for n in (0, 1))
        ),
        "logical volume vg/root cannot be read: it is not linear but mirror",
    ),
    "raid": (
        metadata(
            volume("root", RAID)
            + "".join(volume(f"root_rimage_{n}", linear(10 * n, 10), status=HIDDEN) for n in (0, 1))
            + "".join(volume(f"root_rmeta_{n}", linear(20 + n, 1), status=HIDDEN) for n in (0, 1))
        ),
        "logical volume vg/root cannot be read: it is not linear but raid,raid1",
    ),
    "thin": (
        metadata(
            volume("root", THIN)
            + volume("pool", POOL)
            + volume("pool_tmeta", linear(20, 1), status=HIDDEN)
            + volume("pool_tdata", linear(0, 20), status=HIDDEN)
        ),
        "vg/pool cannot be read: it is not linear but thin,pool",
    ),
    "snapshots": (
        metadata(ROOT + volume("snap", linear(20, 4), status=HIDDEN) + volume("snapshot0", SNAPSHOT, status=HIDDEN)),
        "vg/root cannot be read: there are snapshots of it",
    ),
    "read-only": (
        metadata(volume("root", linear(0, 20), status='"READ", "VISIBLE"')),
        "vg/root cannot be read: it is read-only",
    ),
    "exported": (metadata(ROOT, ', "EXPORTED"'), "vg/root cannot be read: its volume group is exported"),
    "cluster": (
        metadata(ROOT, more='lock_type = "sanlock" lock_args = "1.0.0:lvmlock"'),
        "vg/root cannot be read: its volume group belongs to a cluster",
    ),
    "missing": (
        metadata(volume("root", linear(0, 20)), other=OTHER_PV),
        "vg/root cannot be read: its volume group has physical volumes that are not on this disk",
    ),
}


def restore_metadata(image: Path, number: int, text: str, work: Path) -> None:
    """Write the metadata of `vg` to a partition, and to another disk if it has a second physical volume."""
    file, other = work / "metadata", guestdisks.blank(work / "other", 121)
    file.write_text(text)
    part = place(image, number)
    whole = (part.start, part.size) if part else (0, 0)
    with attached(image, *whole) as device, attached(other) as second:
        for name, identity in ((device, PHYSICAL), (second, ELSEWHERE)):
            lvmdisks.lvm([name], "pvcreate", "--uuid", identity, "--norestorefile", "-y", name)
        lvmdisks.lvm([device, second], "vgcfgrestore", "--force", "-y", "-f", file, "vg")


@pytest.mark.parametrize("name", ODD)
def test_odd_roots(name: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    text, reason = ODD[name]
    image = guestdisks.blank(tmp_path / "image", 165, ONE)
    restore_metadata(image, 3, text, tmp_path)
    before = digest(image)
    stream = exported(node, image)
    result = node.call("rename", node.environment(image, env="rename")).failed("no root filesystem found", reason)
    assert "NOMOUNT=yes" in result.lines[-2], "nobody knows whom it has left out"
    assert digest(image) == before
    node.call("rename", node.environment(image, env="rename", OSP_NOMOUNT="yes")).ok()
    if name == "striped":
        target = disk(200)
        restore(node, stream, target).failed(reason)
        assert target.read_bytes()[: 165 * MIB] == image.read_bytes(), "the disk is as it was in the backup"
        restore(node, stream, target, OSP_NOMOUNT="yes").ok()


def test_an_image_with_an_odd_root(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    text, reason = ODD["striped"]
    image = guestdisks.blank(tmp_path / "image", 165, ONE)
    restore_metadata(image, 3, text, tmp_path)
    target = disk(200)
    result = deploy(node, image, target).failed("no root filesystem found", reason)
    assert "NOMOUNT=yes" in result.lines[-2]
    assert signatures(target) == [], "it is disarmed"
    deploy(node, image, target, OSP_NOMOUNT="yes").ok()


@pytest.mark.parametrize("source", ["/dev/mapper/vg-usr", "UUID=11111111-2222-3333-4444-555555555555"])
def test_an_odd_volume_that_the_system_needs(
    source: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    """Where it may be the one with this UUID, nothing is changed."""
    image = guestdisks.blank(tmp_path / "image", 165, ONE)
    restore_metadata(image, 3, metadata(ROOT + volume("usr", linear(20, 2), linear(24, 2, 2))), tmp_path)
    system(image, "vg/root", small_tree, tmp_path, f"{ROOT_FSTAB}{source} /usr ext4 defaults 0 2\n")
    result = deploy(node, image, disk(200)).failed(f"the guest's /usr ({source}) is not found", "vg/usr", "in 2 pieces")
    assert "NOMOUNT=yes" in result.lines[-2]
    before = digest(image)
    node.call("rename", node.environment(image, env="rename")).failed("in 2 pieces")
    assert digest(image) == before


def test_an_odd_volume_that_it_does_not_need(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    image = guestdisks.blank(tmp_path / "image", 165, ONE)
    data = volume("data", linear(0, 2), linear(4, 2, 2))
    restore_metadata(image, 3, metadata(data + volume("root", linear(6, 20))), tmp_path)
    system(image, "vg/root", small_tree, tmp_path, f"{ROOT_FSTAB}/dev/vg/data /srv ext4 defaults 0 2\n")
    target = disk(200)
    log = deploy(node, image, target).ok().log
    assert "logical volume vg/data is left out: it is in 2 pieces" in log
    assert check_root(target, "vg/root", tmp_path) > 100 * MIB


def test_a_physical_volume_twice(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """A copy of a partition: nobody knows which of them counts."""
    image = guestdisks.blank(tmp_path / "image", 300, TWO.replace("60M", "120M"))
    guestdisks.volume_group(image, 3, "vg", {"root": 80})
    system(image, "vg/root", small_tree, tmp_path)
    one, other = place(image, 3), place(image, 4)
    assert one and other
    copy = ["dd", f"if={image}", f"of={image}", "bs=1M", "count=120", "conv=notrunc,sparse", "status=none"]
    run(*copy, f"skip={one.start // MIB}", f"seek={other.start // MIB}")
    deploy(node, image, disk(320)).failed(
        "vg/root", "its volume group has a physical volume that is on this disk twice"
    )


def test_without_lvm2(node: Node, disk: MakeDisk, guest: Guest, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for directory in reversed(PATH.split(":")):
        for program in Path(directory).iterdir():
            link = tools / program.name
            link.unlink(missing_ok=True)
            link.symlink_to(program)
    (tools / "lvm").unlink()
    target = disk(300)
    result = deploy(node, guest.path, target, PATH=str(tools)).failed("lvm2 is not installed on this node")
    assert "hint: install lvm2 on every node" in result.lines[-2]
    deploy(node, guest.path, target, PATH=str(tools), OSP_NOMOUNT="yes").ok()


# The node


@pytest.mark.parametrize("is_clone", [False, True])
def test_the_nodes_own_volume_group(is_clone: bool, node: Node, disk: MakeDisk, guest: Guest, tmp_path: Path) -> None:
    """It has the name of the guest's, or is even a copy of it; on another device it is not touched."""
    own = tmp_path / "own"
    if is_clone:
        run("cp", "--sparse=always", guest.path, own)
        (part,) = lvmdisks.places(own).values()
    else:
        guestdisks.blank(own, 300)
        guestdisks.volume_group(own, 0, "vg-main", {"root": 40, "swap": 8})
        part = (0, own.stat().st_size)
    before = digest(own)
    with attached(own, *part):
        target = disk(SIZE)
        deploy(node, guest.path, target).ok()
        assert check_root(target, "vg-main/root", tmp_path) > 300 * MIB
        node.call("rename", node.environment(target, env="rename")).ok()
        exported(node, target)
    assert digest(own) == before


@pytest.mark.parametrize("step", ["pvresize", "lvextend", "resize2fs"])
def test_killed_while_it_grows(step: str, node: Node, disk: MakeDisk, guest: Guest, tmp_path: Path) -> None:
    """Before each step, the guest could read all."""
    program = step if step == "resize2fs" else "lvm"
    real = run("sh", "-c", f"PATH={PATH} command -v {program}").strip()
    gate = Gate(tmp_path / "fake/gate")
    fake = tmp_path / "fake" / program
    node.write(fake, f'#!/bin/sh\ncase "$0 $1" in *{step}*) {gate.shell};; esac\nexec {real} "$@"\n')
    fake.chmod(0o755)
    target = disk(SIZE)
    (node.images / f"guest-{trees.ARCH}.raw").symlink_to(guest.path)
    image = {"OSP_IMAGE_NAME": "guest", "OSP_IMAGE_TYPE": "raw"}
    call = node.start("create", node.environment(target, PATH=f"{fake.parent}:{PATH}", **image))
    call.wait_for(gate.reached, step)
    call.kill(signal.SIGKILL)
    assert call.result().status == 128 + signal.SIGKILL
    gate.open()
    wait_until(lambda: run("losetup", "--associated", target) == "", "the disk is let go")
    part = place(target, guest.root)
    assert part and (part.size > 88 * MIB) == (step == "resize2fs")
    with attached(target, part.start, part.size, read_only=True) as device:
        run("e2fsck", "-f", "-n", device)
    assert lvmdisks.volumes(target).keys() == lvmdisks.volumes(guest.path).keys()
    node.create(target, **image).ok()
    check_root(target, "vg-main/root", tmp_path)


def test_a_failure_disarms_the_volume_group(node: Node, disk: MakeDisk, guest: Guest) -> None:
    """Its physical volume, too, which has no node by then."""
    node.hook("fails", "#!/bin/sh\nexit 1\n")
    target = disk(SIZE)
    deploy(node, guest.path, target).failed("hook fails")
    ((start, _),) = lvmdisks.places(guest.path).values()
    with target.open("rb") as file:
        file.seek(start)
        assert not any(file.read(MIB))
    assert signatures(target) == []


# Backups


def test_an_export_leaves_out_what_is_free(node: Node, disk: MakeDisk, guest: Guest, tmp_path: Path) -> None:
    """Extents that are not allocated, and the free blocks of filesystems on logical volumes."""
    source = tmp_path / "source"
    run("cp", "--sparse=always", guest.path, source)
    root = place(source, guest.root)
    ((start, size),) = lvmdisks.places(source).values()
    assert root and start + size - (root.start + root.size) > 40 * MIB
    with source.open("r+b") as file:
        file.seek(root.start + root.size)
        file.write(MARKER * (40 * MIB // len(MARKER)))
    with mounted(source, tmp_path / "mnt", root, "rw") as top:
        (top / "deleted").write_bytes(MARKER * (40 * MIB // len(MARKER)))
        run("sync", "-f", top)
        (top / "deleted").unlink()
    stream = exported(node, source)
    assert MARKER * 9 not in stream.read_bytes()
    assert stream.stat().st_size < 20 * MIB
    target = disk(SIZE)
    log = restore(node, stream, target).ok().log
    assert "grew the root filesystem" in log
    part = place(target, guest.root)
    assert part and part.size > 300 * MIB
    with attached(target, part.start, part.size, read_only=True) as device:
        run("e2fsck", "-f", "-n", device)


# Tools


def test_a_look_without_writing(node: Node, guest: Guest) -> None:
    """As on the disk of a running instance, which has it open."""
    name = f"lvm{os.getpid()}.example.org"
    (pv,) = lvmdisks.places(guest.path)
    top = Path(f"/tmp/{name}_root")
    before = digest(guest.path)
    with attached(guest.path):
        node.tool("mount-disks", "--read-only", name, "--disk", str(guest.path)).ok()
        try:
            assert (top / "etc/fstab").read_text() == guest.fstab
            assert (top / "boot/vmlinuz-1").exists()
            loops = [line.partition(":")[0] for line in run("losetup", "--associated", guest.path).splitlines()]
            assert any(Path(f"{loop}p2").exists() for loop in loops)
            assert not any(Path(f"{loop}p{pv}").exists() for loop in loops), "lvm2 of the node would see it"
            with pytest.raises(OSError, match="Read-only"):
                (top / "written").touch()
        finally:
            node.tool("umount-disks", "--here", name).ok()
    assert digest(guest.path) == before


def test_a_sealed_image(node: Node, disk: MakeDisk, guest: Guest, tmp_path: Path) -> None:
    before = digest(guest.path)
    capture(node, guest.path, "qemu-img", "--seal").ok()
    assert digest(guest.path) == before
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", node.images / f"made-{trees.ARCH}.qcow2", raw)
    with mounted(raw, tmp_path / "look", place(raw, guest.root)) as root:
        assert (root / "etc/machine-id").read_text() == ""
        assert (root / "etc/fstab").read_text() == guest.fstab
    target = disk(SIZE)
    node.create(target, OSP_IMAGE_NAME="made", OSP_IMAGE_TYPE="qcow2").ok()
    check_root(target, "vg-main/root", tmp_path)


def test_a_guest_that_crashed(node: Node, disk: MakeDisk, guest: Guest, tmp_path: Path) -> None:
    """What is in the journal of a logical volume only counts."""
    image = tmp_path / "image"
    run("cp", "--sparse=always", guest.path, image)
    part = place(image, guest.root)
    with mounted(image, tmp_path / "mnt", part, "rw,commit=300") as root:
        (root / "etc/written-last").write_text("in the journal\n")
        descriptor = os.open(root / "etc/written-last", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        run("cp", "--sparse=always", image, tmp_path / "crashed")
    assert part
    with attached(tmp_path / "crashed", part.start, part.size, read_only=True) as device:
        assert "needs_recovery" in run("dumpe2fs", "-h", device)
    target = disk(SIZE)
    deploy(node, tmp_path / "crashed", target).ok()
    check_root(target, "vg-main/root", tmp_path)
    with mounted(target, tmp_path / "look", place(target, guest.root)) as root:
        assert (root / "etc/written-last").read_text() == "in the journal\n"
