"""Strange and hostile disk images: clear refusals, and no change to the node."""

from __future__ import annotations

import os
import random
import re
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import guestdisks
import pytest
import trees
from guestdisks import DATA, ROOT, UUID, by_number, place
from support import MIB, Node, Result, attached, digest, listing, mounted, partitions, run, table_of

MakeDisk = Callable[..., Path]


def deploy(node: Node, image: Path, target: Path, **settings: object) -> Result:
    node.image(image, f"guest-{trees.ARCH}.raw")
    return node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="raw", **settings)


def assert_disarmed(target: Path) -> None:
    assert target.read_bytes()[:MIB] == bytes(MIB)
    assert target.read_bytes()[-MIB:] == bytes(MIB)


# A root that is not whole, or read-only


USR = "8484680C-9521-48C6-9C11-B0720656F69E"


def usr_apart(path: Path, tree: Path, work: Path, kind: str, fstab: str) -> Path:
    """Make a disk whose root has an empty /usr; partition 2 is of type `kind` and has what belongs there."""
    guestdisks.blank(path, 132, f"label: gpt\n1 : size=60M, type={ROOT}\n2 : size=60M, type={kind}\n")
    apart = work / "apart"
    run("cp", "--archive", tree, apart)
    for number in (1, 2):
        guestdisks.make(path, number, "ext4")
    guestdisks.fill(path, 2, apart / "usr", work)
    run("rm", "-r", apart / "usr")
    (apart / "usr").mkdir()
    for name in ("bin", "lib", "sbin"):
        run("rm", "-rf", apart / name)
        (apart / name).symlink_to(f"usr/{name}")
    guestdisks.fill(path, 1, apart, work, fstab)
    with mounted(path, work / "look", place(path, 2), "rw") as usr:
        (usr / "bin").mkdir(exist_ok=True)
    return path


LINK = "/dev/disk/by-id/scsi-0QEMU_HARDDISK_1-part"


@pytest.mark.parametrize(
    "kind, fstab",
    [(USR, ""), (DATA, "LABEL=l2 /usr ext4\n"), (DATA, f"{LINK}1 / ext4\n{LINK}2 /usr ext4\n")],
    ids=["by its type", "by label", "by link"],
)
def test_usr_apart(kind: str, fstab: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """/usr is found in the fstab, or by its type where the root has none."""
    image = usr_apart(tmp_path / "image", small_tree, tmp_path, kind, fstab)
    node.hook("look", "#!/bin/sh\nls $TARGET/usr/share/doc\n")
    result = deploy(node, image, disk(200)).ok()
    assert "/usr on partition 2" in result.log and "copyright" in result.log


def test_usr_that_is_nowhere(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    image = usr_apart(tmp_path / "image", small_tree, tmp_path, DATA, "")
    target = disk(200)
    result = deploy(node, image, target).failed(
        "partition 1 has /etc, but neither /bin nor /usr/bin", "its /usr is not"
    )
    assert "NOMOUNT=yes" in result.log
    assert "tarball" not in result.log and "grew" not in result.log and "not grown" not in result.log
    assert_disarmed(target)
    # a guest may have it on another disk of the instance: its name is in /etc
    with mounted(image, tmp_path / "look", place(image, 1), "rw") as root:
        (root / "etc/hostname").write_text("inst2\n")
    node.call("rename", node.environment(image, env="rename")).ok()
    with mounted(image, tmp_path / "look", place(image, 1)) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"


def test_read_only_subvolume(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The default one, as of a system that is updated as a whole: it is changed, and stays read-only for the guest."""
    image = guestdisks.blank(tmp_path / "image", 150)
    guestdisks.make(image, 0, "btrfs")
    with mounted(image, tmp_path / "fill", None, "rw") as where:
        run("btrfs", "subvolume", "create", where / "snapshot")
        run("cp", "--archive", f"{small_tree}/.", where / "snapshot")
        run("btrfs", "subvolume", "set-default", where / "snapshot")
        run("btrfs", "property", "set", where / "snapshot", "ro", "true")
    target = disk(300)
    assert "and read-only again afterwards" in deploy(node, image, target).ok().log
    name = "inst1"
    for new in (name, "inst2"):
        with mounted(target, tmp_path / "look", None, "rw") as root:
            assert (root / "etc/hostname").read_text() == f"{new}\n"
            assert run("btrfs", "property", "get", root, "ro") == "ro=true\n"
        environment = node.environment(target, env="rename", OLD_INSTANCE_NAME="inst1", INSTANCE_NAME="inst2")
        node.call("rename", environment).ok()
    node.tool("mount-disks", "inst2", "--disk", str(target)).ok()
    try:
        assert (Path("/tmp/inst2_root") / "etc/hostname").read_text() == "inst2\n"
    finally:
        node.tool("umount-disks", "--here", "inst2").ok()


@pytest.mark.parametrize(
    ("filesystem", "size", "superblock", "repair"),
    [("ext4", 40, 2048, "e2fsck"), ("xfs", 310, 512, "xfs_repair"), ("btrfs", 130, 69632, "btrfs check")],
)
def test_damaged_filesystem(
    filesystem: str, size: int, superblock: int, repair: str, node: Node, disk: MakeDisk, tmp_path: Path
) -> None:
    """Only the superblock is left. With the kernel's answer comes the program that may repair it."""
    image = guestdisks.blank(tmp_path / "image", size + 2, f"label: dos\n1 : size={size}M\n")
    guestdisks.make(image, 1, filesystem)
    part = place(image, 1)
    assert part
    os.truncate(image, part.start + superblock)
    os.truncate(image, (size + 2) * MIB)
    result = deploy(node, image, disk(400)).failed(f"as {filesystem}: ")
    assert f"hint: repair it with {repair}; dmesg has more" in result.log


def test_ext4_that_is_read_only(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    part = place(guest.path, 1)
    assert part
    with attached(guest.path, part.start, part.size) as device:
        run("tune2fs", "-O", "read-only", device)
    target = disk(300)
    result = deploy(node, guest.path, target).failed("cannot mount", "its superblock marks it read-only")
    assert "NOMOUNT=yes" in result.log
    assert_disarmed(target)
    node.call("rename", node.environment(guest.path, env="rename")).failed("its superblock marks it read-only")
    node.tool("mount-disks", "inst1", "--read-only", "--disk", str(guest.path)).ok()
    node.tool("umount-disks", "--here", "inst1").ok()


# Growing


def test_grow_no(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.cloud(tmp_path / "image", small_tree, tmp_path)
    target = disk(300)
    partition = place(guest.path, 1)
    deploy(node, guest.path, target, OSP_GROW="no").ok()
    # sfdisk would warn of a backup header that is not at the end, which is intended here
    before, after = (run("sfdisk", "--dump", path).splitlines() for path in (guest.path, target))
    entry = re.compile(r"^.*(?= : start)")
    assert [entry.sub("", line) for line in before if "device" not in line] == \
        [entry.sub("", line) for line in after if "device" not in line]  # fmt: skip
    with mounted(target, tmp_path / "root", partition) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"
        assert os.statvfs(root).f_blocks * os.statvfs(root).f_frsize < 80 * MIB


def test_swap_behind_the_root(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    image = guestdisks.blank(tmp_path / "image", 130, "label: dos\n1 : start=1M, size=100M\n2 : size=20M, type=82\n")
    guestdisks.make(image, 1, "ext4")
    guestdisks.make(image, 2, "swap")
    guestdisks.fill(image, 1, small_tree, tmp_path, f"UUID={UUID.format(1)} / ext4\nUUID={UUID.format(2)} none swap\n")
    target = disk(300)
    result = deploy(node, image, target).ok()
    assert "not grown" in result.log and "partition 2 (swap)" in result.log
    assert [(part.start, part.size) for part in partitions(target)] == \
        [(part.start, part.size) for part in partitions(image)]  # fmt: skip
    assert partitions(target)[1].content["UUID"] == UUID.format(2)


def test_logical_root(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """It grows together with the extended partition around it."""
    script = "label: dos\n1 : start=1M, size=20M\n2 : type=5\n5 : size=20M, type=82\n6 : size=80M\n"
    image = guestdisks.blank(tmp_path / "image", 130, script)
    for number, kind in ((1, "ext4"), (5, "swap"), (6, "ext4")):
        guestdisks.make(image, number, kind)
    guestdisks.fill(image, 6, small_tree, tmp_path, f"/dev/sda6 / ext4\nUUID={UUID.format(1)} /boot ext4\n")
    target = disk(300)
    result = deploy(node, image, target).ok()
    assert "/boot on partition 1" in result.log
    old, new = by_number(image), by_number(target)
    assert [(part.number, part.start, part.type, part.content.get("UUID")) for part in new] == \
        [(part.number, part.start, part.type, part.content.get("UUID")) for part in old]  # fmt: skip
    extended, swap, root = new[1:]
    assert swap.size == old[2].size
    assert extended.start + extended.size == root.start + root.size == 300 * MIB
    run("sfdisk", "--verify", target)
    with mounted(target, tmp_path / "look", root) as where:
        assert (where / "etc/hostname").read_text() == "inst1\n"
        assert os.statvfs(where).f_blocks * os.statvfs(where).f_frsize > 200 * MIB


def test_backup_header_moves_although_the_root_stays(node: Node, disk: MakeDisk, small_tree: Path,
                                                     tmp_path: Path) -> None:  # fmt: skip
    script = f"label: gpt\n1 : start=1M, size=80M, type={ROOT}\n2 : size=20M, type={DATA}\n"
    image = guestdisks.blank(tmp_path / "image", 110, script)
    guestdisks.make(image, 1, "ext4")
    guestdisks.fill(image, 1, small_tree, tmp_path, "")
    target = disk(300)
    deploy(node, image, target).ok()
    assert target.read_bytes()[-512:-504] == b"EFI PART"
    assert partitions(target)[0].size == 80 * MIB


def test_somebody_looks_at_a_partition(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Another process opens it for a while, as LVM does with every disk; it still grows."""
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    target = disk(300)
    node.image(guest.path, f"guest-{trees.ARCH}.raw")
    call = node.start("create", node.environment(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="raw"))
    seen = 0
    while call.process.poll() is None:
        for loop in run("losetup", "--noheadings", "--output", "NAME", "--associated", target).split():
            with suppress(OSError), open(f"{loop}p{guest.root}", "rb"):
                seen += 1
                time.sleep(0.5)
    call.result().ok()
    assert seen
    root = place(target, guest.root)
    assert root and root.size > place(guest.path, guest.root).size + 100 * MIB


def test_same_size_as_the_image(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.cloud(tmp_path / "image", small_tree, tmp_path)
    target = disk(106)
    deploy(node, guest.path, target).ok()
    assert table_of(target)["id"] == table_of(guest.path)["id"]


@pytest.mark.parametrize("extra", [512, 4096 + 512, MIB - 512])
def test_disk_of_an_odd_size(extra: int, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    for build in (guestdisks.cloud, guestdisks.mbr):
        guest = build(tmp_path / build.__name__, small_tree, tmp_path)
        target = disk(200)
        os.truncate(target, 200 * MIB + extra)
        deploy(node, guest.path, target).ok()
        part = place(target, guest.root)
        assert part and part.start + part.size >= 198 * MIB
        with attached(target, part.start, part.size, read_only=True) as device:
            run("e2fsck", "-f", "-n", device)


def test_journal_that_needs_recovery(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The image was taken from a running guest."""
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    image = tmp_path / "running"
    with mounted(guest.path, tmp_path / "live", place(guest.path, 1), "rw") as root:
        (root / "etc/written-late").write_text("late\n")
        run("sync", "-f", root)
        (root / "etc/later").write_text("later\n")
        run("cp", "--sparse=always", guest.path, image)
    part = place(image, 1)
    assert part
    with attached(image, part.start, part.size, read_only=True) as device:
        assert "needs_recovery" in run("dumpe2fs", "-h", device)
    target = disk(200)
    deploy(node, image, target).ok()
    with mounted(target, tmp_path / "look", place(target, 1)) as root:
        assert (root / "etc/written-late").read_text() == "late\n"


def test_damaged_filesystem_is_not_grown(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "image", small_tree, tmp_path)
    part = place(guest.path, 1)
    assert part
    with attached(guest.path, part.start, part.size) as device:
        run("debugfs", "-w", "-R", "clri /etc", device)
        run("debugfs", "-w", "-R", "mkdir /etc", device, check=False)
    target = disk(200)
    result = deploy(node, guest.path, target)
    if result.status:
        result.failed()
        assert "hint:" in result.log
        assert_disarmed(target)


# Finding the root


def test_other_partitions_that_hold_a_system(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """A larger rescue system comes first; the root is the one whose fstab mounts itself as /."""
    image = guestdisks.blank(tmp_path / "image", 170, "label: dos\n1 : start=1M, size=90M\n2 : size=70M\n")
    for number in (1, 2):
        guestdisks.make(image, number, "ext4")
        guestdisks.fill(image, number, small_tree, tmp_path, "LABEL=l2 / ext4 defaults 0 1\n")
    target = disk(300)
    result = deploy(node, image, target).ok()
    assert "partition 2 is taken for the root" in result.log
    with mounted(target, tmp_path / "look", place(target, 2)) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"
    with mounted(target, tmp_path / "look", place(target, 1)) as root:
        assert (root / "etc/hostname").read_text() == "image\n"


def test_type_in_the_gpt_decides(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    script = f"label: gpt\n1 : start=1M, size=90M, type={DATA}\n7 : size=70M, type={ROOT}\n"
    image = guestdisks.blank(tmp_path / "image", 170, script)
    for number in (1, 7):
        guestdisks.make(image, number, "ext4")
        guestdisks.fill(image, number, small_tree, tmp_path, "LABEL=l1 / ext4 defaults 0 1\n")
    target = disk(300)
    deploy(node, image, target).ok()
    with mounted(target, tmp_path / "look", place(target, 7)) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"


@pytest.mark.parametrize(
    "subvolume, default",
    [("root", False), ("@rootfs", False), ("deep/snapshot", True), ("", False), ("arch", False), ("vol/void", False)],
)
def test_btrfs_subvolumes(subvolume: str, default: bool, node: Node, disk: MakeDisk, small_tree: Path,
                          tmp_path: Path) -> None:  # fmt: skip
    image = guestdisks.blank(tmp_path / "image", 150)
    guestdisks.make(image, 0, "btrfs")
    with mounted(image, tmp_path / "fill", None, "rw") as where:
        top = where / subvolume
        if subvolume:
            top.parent.mkdir(exist_ok=True)
            run("btrfs", "subvolume", "create", top)
        run("cp", "--archive", f"{small_tree}/.", top)
        if default:
            run("btrfs", "subvolume", "set-default", top)
    target = disk(300)
    deploy(node, image, target).ok()
    options = "ro" if default or not subvolume else f"ro,subvol={subvolume}"
    with mounted(target, tmp_path / "look", None, options) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"
        status = os.statvfs(root)
        assert status.f_blocks * status.f_frsize == 300 * MIB


def test_btrfs_that_is_too_small_to_grow(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Linux refuses to resize a btrfs to less than 256 MiB."""
    image = guestdisks.blank(tmp_path / "image", 150)
    guestdisks.make(image, 0, "btrfs")
    guestdisks.fill(image, 0, small_tree, tmp_path, "")
    assert "is not grown" in deploy(node, image, disk(200)).ok().log


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_btrfs_that_is_mounted_on_the_node(
    kind: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    """The disk is not lost; the image is right all the same."""
    guest = guestdisks.btrfs(tmp_path / "disk", small_tree, tmp_path)
    image = tmp_path / "image"
    run("qemu-img", "convert", "-f", "raw", "-O", kind, guest.path, image)
    node.image(image, f"guest-{trees.ARCH}.{kind}")
    target = guestdisks.soiled(disk(300), 300)
    before = digest(target)
    settings = {"OSP_IMAGE_NAME": "guest", "OSP_IMAGE_TYPE": kind}
    with mounted(guest.path, tmp_path / "live", place(guest.path, 2), "rw"):
        node.create(target, **settings).failed("same UUID", "mounted from")
        assert digest(target) == before
        node.call("verify", node.environment(target, **settings)).ok()
    node.create(target, **settings).ok()


def test_separate_var_and_usr(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    script = "label: gpt\n1 : start=1M, size=40M\n2 : size=40M\n3 : size=60M\n"
    image = guestdisks.blank(tmp_path / "image", 150, script)
    for number in (1, 2, 3):
        guestdisks.make(image, number, "ext4")
    apart = tmp_path / "apart"
    run("cp", "--archive", small_tree, apart)
    for number, name in ((1, "var"), (2, "usr")):
        guestdisks.fill(image, number, apart / name, tmp_path)
        run("rm", "-r", apart / name)
        (apart / name).mkdir()
    guestdisks.fill(image, 3, apart, tmp_path, "LABEL=l3 / ext4\nLABEL=l1 /var ext4\nPARTLABEL=none /boot ext4\n"
                                               "/dev/nvme0n1p2 /usr ext4\n")  # fmt: skip
    target = disk(200)
    node.hook("look", "#!/bin/sh\nls $TARGET/usr/share/doc $TARGET/var/lib\n")
    result = deploy(node, image, target).ok()
    assert "copyright" in result.log
    assert "PARTLABEL=none at /boot, which is not on this disk" in result.log
    with mounted(target, tmp_path / "look", place(target, 1)) as var:
        assert not os.path.lexists(var / "lib/dbus/machine-id")
        assert not os.path.lexists(var / "lib/cloud/instance")


# No root


def no_table(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(MIB) * 20)  # a fixed seed, so that no signature appears by chance


def windows(path: Path) -> None:
    guestdisks.blank(path, 40, "label: dos\n1 : start=1M, size=10M, type=7\n2 : size=20M, type=7\n")


def swap_and_data(path: Path) -> None:
    guestdisks.blank(path, 60, "label: gpt\n1 : start=1M, size=10M\n2 : size=40M\n")
    guestdisks.make(path, 1, "swap")
    guestdisks.make(path, 2, "ext4", "my data")


def lvm(path: Path) -> None:
    from test_create_disks import lvm_label

    guestdisks.blank(path, 60, "label: gpt\n1 : start=1M, size=10M\n2 : size=40M, type=lvm\n")
    guestdisks.make(path, 1, "ext4", "boot")
    with path.open("r+b") as file:
        file.seek(11 * MIB + 512)
        file.write(lvm_label())


SEEN = {
    no_table: ["found on the disk, which has no partition table: nothing that is known"],
    windows: ["partition 1: 10 MiB: nothing", "partition 2: 20 MiB: nothing"],
    swap_and_data: ["partition 1: 10 MiB, label l1: swap", "partition 2: 40 MiB, label my data: ext4 without a system"],
    lvm: ["partition 1: 10 MiB, label boot: ext4 without", "partition 2: 40 MiB: LVM"],
}


@pytest.mark.parametrize("build", SEEN)
def test_no_root(build: Callable[[Path], None], node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    build(tmp_path / "image")
    target = disk(100)
    result = deploy(node, tmp_path / "image", target).failed("no root filesystem found")
    assert "hint: " in result.lines[-2] and "NOMOUNT=yes" in result.lines[-2]
    for line in SEEN[build]:
        assert line in result.log
    assert_disarmed(target)
    deploy(node, tmp_path / "image", target, OSP_NOMOUNT="yes").ok()
    image = (tmp_path / "image").read_bytes()
    assert target.read_bytes() == image.ljust(100 * MIB, b"\0")


# Hostile tables


def mbr_entries(path: Path, *entries: tuple[int, int, int]) -> None:
    """Return an MBR with these entries (type, start, size), valid or not."""
    guestdisks.blank(path, 40)
    table = b"".join(
        struct.pack("<B3sB3sII", 0, bytes(3), kind, bytes(3), start, size) for kind, start, size in entries
    )
    with path.open("r+b") as file:
        file.seek(440)
        file.write(b"\1\2\3\4\0\0" + table.ljust(64, b"\0") + b"\x55\xaa")


def overlapping(path: Path) -> None:
    mbr_entries(path, (0x83, 2048, 40000), (0x83, 20000, 40000))


def beyond_the_end(path: Path) -> None:
    mbr_entries(path, (0x83, 2048, 0xFFFF0000))


def over_the_table(path: Path) -> None:
    mbr_entries(path, (0x83, 0, 40000))


def gpt_lost(path: Path) -> None:
    mbr_entries(path, (0xEE, 1, 80000))


def endless_chain(path: Path) -> None:
    """An extended partition that is its own successor."""
    mbr_entries(path, (5, 2048, 60000))
    link = struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), 8, 8) + \
        struct.pack("<B3sB3sII", 0, bytes(3), 5, bytes(3), 0, 60000)  # fmt: skip
    with path.open("r+b") as file:
        file.seek(2048 * 512 + 446)
        file.write(link.ljust(64, b"\0") + b"\x55\xaa")


def gpt_of_4k_sectors(path: Path) -> None:
    mbr_entries(path, (0xEE, 1, 10000))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"EFI PART" + bytes(500))


@pytest.mark.parametrize("build", [overlapping, beyond_the_end, over_the_table, gpt_lost, endless_chain,
                                   gpt_of_4k_sectors])  # fmt: skip
def test_hostile_table(build: Callable[[Path], None], node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    build(tmp_path / "image")
    target = disk(100)
    result = deploy(node, tmp_path / "image", target).failed()
    assert any(words in result.last for words in ("partition", "no root", "is truncated"))
    assert_disarmed(target)


# Hostile guests


@pytest.mark.parametrize("place_of_boot", ["../../../../../etc", "/etc", "/../../proc", "..", "."])
def test_mount_point_that_leads_out(place_of_boot: str, node: Node, disk: MakeDisk, small_tree: Path,
                                    tmp_path: Path) -> None:  # fmt: skip
    image = guestdisks.blank(tmp_path / "image", 120, "label: dos\n1 : start=1M, size=20M\n2 : size=90M\n")
    guestdisks.make(image, 1, "ext4")
    guestdisks.make(image, 2, "ext4")
    evil = tmp_path / "evil"
    run("cp", "--archive", small_tree, evil)
    run("rm", "-r", evil / "boot")
    (evil / "boot").symlink_to(place_of_boot)
    guestdisks.fill(image, 2, evil, tmp_path, "/dev/vda2 / ext4\n/dev/vda1 /boot ext4\n")
    before = listing(Path("/etc"))
    target = disk(200)
    result = deploy(node, image, target)
    assert result.status in (0, 1) and result.log
    assert listing(Path("/etc")) == before
    if result.status:
        assert "/boot" in result.last or "/etc" in result.last


def test_fstab_that_is_no_file(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    for number, special in enumerate((["mkfifo"], ["mkdir"], ["ln", "-s", "/dev/zero"], ["ln", "-s", "fstab"],
                                      ["truncate", "-s", "2G"])):  # fmt: skip
        guest = guestdisks.mbr(tmp_path / f"image{number}", small_tree, tmp_path)
        with mounted(guest.path, tmp_path / "live", place(guest.path, 1), "rw") as root:
            (root / "etc/fstab").unlink()
            run(*special, root / "etc/fstab")
        result = deploy(node, guest.path, disk(200))
        if result.status:
            assert "/etc/fstab" in result.last or "no root" in result.last


def test_table_of_many_partitions(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    lines = "".join(f"{number} : start={2048 + 8 * number}, size=8\n" for number in range(1, 128))
    image = guestdisks.blank(tmp_path / "image", 120, f"label: gpt\n{lines}128 : start=8192, size=204800\n")
    guestdisks.make(image, 128, "ext4")
    guestdisks.fill(image, 128, small_tree, tmp_path, "")
    target = disk(200)
    deploy(node, image, target).ok()
    assert by_number(target)[-1].size > 180 * MIB
