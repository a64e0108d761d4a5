"""What would fail once an image is written is refused before, if the image shows it, and the disk stays as it is."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import guestdisks
import lvmdisks
import pytest
import trees
from guestdisks import BIOS, DATA, ROOT, place
from support import MIB, Node, Result, attached, digest, left_dirty, mounted, run
from test_btrfs_devices import PROFILES, devices, image_of
from test_doctor_node import Doctor, doctor  # noqa: F401
from test_volume_groups import ODD, ROOT_FSTAB, check_root, linear, metadata, restore_metadata, system, volume

from imageos.images import diskimage, imagefile, preview
from imageos.node import space

MakeDisk = Callable[..., Path]
SIZE = 300  # MiB of the instance's disk
TABLE = f"label: gpt\n1 : size=2M, type={BIOS}\n2 : size=20M, type={DATA}\n3 : size=120M, type={lvmdisks.LVM}\n"
FORMATS = {
    "raw": [],
    "qcow2": ["-O", "qcow2", "-c"],
    "vmdk": ["-O", "vmdk", "-o", "subformat=streamOptimized"],
    "vdi": ["-O", "vdi"],
    "vhdx": ["-O", "vhdx"],
    "vhd": ["-O", "vpc", "-o", "force_size=on"],
}


def place_image(node: Node, image: Path, form: str) -> Path:
    path = node.images / f"guest-{trees.ARCH}.{form}"
    if FORMATS[form]:
        run("qemu-img", "convert", "-f", "raw", *FORMATS[form], image, path)
    else:
        run("cp", "--sparse=always", image, path)
    return path


def refused(node: Node, target: Path, image: Path, form: str, *reasons: str, hint: str = "NOMOUNT=yes") -> Result:
    """Fail unless create refuses the image, and verify does in the same words, and nothing is written."""
    path = place_image(node, image, form)
    with target.open("r+b") as file:
        file.write(os.urandom(MIB))
    before, image_before = digest(target), digest(path)
    wanted = {"OSP_IMAGE_NAME": "guest", "OSP_IMAGE_TYPE": "qemu"}
    result = node.create(target, **wanted).failed(str(path), *reasons)
    assert hint in result.lines[-2]
    assert digest(target) == before, f"written to:\n{result.log}"
    assert digest(path) == image_before
    assert node.call("verify", node.environment(target, **wanted)).failed().last == result.last
    return result


def deployed(node: Node, target: Path, image: Path, form: str, **settings: object) -> str:
    place_image(node, image, form)
    return node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="qemu", **settings).ok().log


def with_boot(path: Path, work: Path, text: str, table: str = TABLE, number: int = 3) -> Path:
    """Make a disk with a filesystem for /boot, and a volume group described by `text`."""
    guestdisks.blank(path, 150, table)
    guestdisks.make(path, 2, "ext4", "boot")
    with mounted(path, work / "boot", guestdisks.place(path, 2), "rw") as boot:
        (boot / "grub").mkdir()
        (boot / "vmlinuz").write_bytes(b"kernel")
    restore_metadata(path, number, text, work)
    return path


# Volume groups


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "raw") for name in ODD), ("pieces", "qcow2"), ("missing", "qcow2")]
)
def test_root_that_cannot_be_read(name: str, form: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    text, reason = ODD[name]
    image = with_boot(tmp_path / "image", tmp_path, text)
    refused(node, disk(SIZE), image, form, "no root filesystem found", reason)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("raw", "qcow2")])
def test_in_every_format(form: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    text, reason = ODD["striped"]
    image = with_boot(tmp_path / "image", tmp_path, text)
    refused(node, disk(SIZE), image, form, reason)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_on_a_logical_partition(form: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """As Debian's installer makes it: its place is in a table of its own."""
    text, reason = ODD["thin"]
    table = "label: dos\n2 : start=1M, size=20M, type=83, bootable\n3 : start=22M, type=5\n"
    table += "5 : start=23M, size=2M, type=82\n6 : start=26M, size=121M, type=8e\n"
    image = with_boot(tmp_path / "image", tmp_path, text, table, 6)
    refused(node, disk(SIZE), image, form, reason)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_physical_volume_without_a_table(form: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    text, reason = ODD["missing"]
    image = guestdisks.blank(tmp_path / "image", 130)
    restore_metadata(image, 0, text, tmp_path)
    refused(node, disk(SIZE), image, form, reason)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_usr_that_cannot_be_read(form: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Only the root's fstab says that it is needed."""
    text = metadata(volume("root", linear(0, 20)) + volume("usr", linear(20, 2), linear(24, 2, 2)))
    image = with_boot(tmp_path / "image", tmp_path, text)
    system(image, "vg/root", small_tree, tmp_path, f"{ROOT_FSTAB}/dev/vg/usr /usr ext4 defaults 0 2\n")
    refused(node, disk(SIZE), image, form, "the guest's /usr (/dev/vg/usr) is not found", "in 2 pieces")


@pytest.fixture
def odd_data(small_tree: Path, tmp_path: Path) -> Path:
    """Return a disk whose system does not need the volume that cannot be read."""
    data = volume("data", linear(0, 2), linear(4, 2, 2))
    image = with_boot(tmp_path / "image", tmp_path, metadata(data + volume("root", linear(6, 20))))
    system(image, "vg/root", small_tree, tmp_path, f"{ROOT_FSTAB}/dev/vg/data /srv ext4 defaults 0 2\n")
    return image


def check_told_once(log: str) -> None:
    assert log.count("logical volume vg/data is left out: it is in 2 pieces") == 1
    assert log.count("found / on logical volume vg/root") == 1


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_data_that_cannot_be_read(form: str, node: Node, disk: MakeDisk, odd_data: Path, tmp_path: Path) -> None:
    target = disk(SIZE)
    check_told_once(deployed(node, target, odd_data, form))
    assert check_root(target, "vg/root", tmp_path) > 100 * MIB


def test_no_room_to_look(node: Node, disk: MakeDisk, odd_data: Path, tmp_path: Path) -> None:
    """What cannot be copied shows on the disk."""
    size = place_image(node, odd_data, "qcow2").stat().st_size
    run("mount", "-t", "tmpfs", "-o", f"size={size + MIB}", "tmpfs", node.images)
    try:
        check_told_once(deployed(node, disk(SIZE), odd_data, "qcow2"))
    finally:
        run("umount", node.images)


def test_directory_without_large_files(node: Node, disk: MakeDisk, odd_data: Path, tmp_path: Path) -> None:
    """With blocks of 1 KiB, ext2 has none over 16 GiB: the copy is beside the image."""
    os.truncate(odd_data, 20 << 30)
    place_image(node, odd_data, "qcow2")
    small = guestdisks.blank(tmp_path / "small", 300)
    run("mkfs.ext2", "-q", "-F", "-b", "1024", small)
    with mounted(small, tmp_path / "cache", options="rw") as cache:
        node.defaults(f"CACHE_DIR={cache}\n")
        wanted = {"OSP_IMAGE_NAME": "guest", "OSP_IMAGE_TYPE": "qcow2"}
        node.call("verify", node.environment(disk(SIZE), **wanted)).ok()


def test_directory_that_others_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not the fault of the image."""
    (tmp_path / "disk").write_bytes(os.urandom(8 * MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk", tmp_path / "image")
    image = imagefile.open_image(str(tmp_path / "image"))
    cache = tmp_path / "cache"
    cache.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", cache)
    try:
        monkeypatch.setattr(space, "check", lambda directory, need: None)
        beginnings = preview._beginnings(image, diskimage.format_of(image), 8 * MIB)
        unknown = pytest.raises(preview._Unknown, match="error while writing")
        with beginnings as begin, unknown, preview._copied(begin, str(cache)):
            pytest.fail("there was room")
    finally:
        os.close(image.descriptor)
        run("umount", cache)


def test_doctor_says_the_same(doctor: Doctor, node: Node, tmp_path: Path) -> None:  # noqa: F811
    text, reason = ODD["mirror"]
    path = place_image(node, with_boot(tmp_path / "image", tmp_path, text), "qcow2")
    node.variant("mine", "IMAGE_NAME=guest\nIMAGE_TYPE=qcow2\n")
    assert "NOMOUNT=yes" in doctor.ill(f"image {path}: no root filesystem found", reason)
    node.variant("mine", "IMAGE_NAME=guest\nIMAGE_TYPE=qcow2\nNOMOUNT=yes\n")
    doctor.well()


# Filesystems


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_btrfs_with_a_missing_device(form: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", small_tree, tmp_path, *PROFILES["raid1"])
    deployed(node, disk(SIZE), image, form)
    with devices(image, 2) as found:
        run("wipefs", "--all", "--quiet", *found)
    refused(node, disk(SIZE), image, form, "1 of the 2 devices of its filesystem are not on this disk")


def read_only(device: Path) -> None:
    run("tune2fs", "-O", "read-only", device)


def mount_options(device: Path) -> None:
    run("tune2fs", "-E", "mount_opts=data=journal", device)


def seed(device: Path) -> None:
    run("btrfstune", "-S", "1", device)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("ext4", read_only, "its superblock marks it read-only"),
        ("ext4", mount_options, "its superblock demands mount options"),
        ("btrfs", seed, "it is a seed of other filesystems"),
    ],
)
def test_superblock_that_forbids_it(
    kind: str,
    change: Callable[[Path], None],
    reason: str,
    form: str,
    node: Node,
    disk: MakeDisk,
    small_tree: Path,
    tmp_path: Path,
) -> None:
    image = guestdisks.blank(tmp_path / "image", 152, f"label: gpt\n1 : size=150M, type={ROOT}\n")
    guestdisks.make(image, 1, kind)
    guestdisks.fill(image, 1, small_tree, tmp_path, "")
    part = guestdisks.place(image, 1)
    assert part
    with attached(image, part.start, part.size) as device:
        change(device)
    refused(node, disk(SIZE), image, form, reason)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_superblock_on_a_logical_volume(
    form: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    image = with_boot(tmp_path / "image", tmp_path, metadata(volume("root", linear(0, 20))))
    system(image, "vg/root", small_tree, tmp_path)
    part = guestdisks.place(image, "vg/root")
    assert part
    with attached(image, part.start, part.size) as device:
        read_only(device)
    refused(node, disk(SIZE), image, form, "its superblock marks it read-only")


# No filesystem


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def encrypt(path: Path, number: int | str) -> None:
    part = guestdisks.place(path, number)
    assert part
    header = b"LUKS\xba\xbe\0\1aes".ljust(40, b"\0") + b"xts".ljust(32, b"\0") + b"sha256".ljust(136, b"\0")
    patch(path, part.start, header)
    patch(path, part.start + 168, b"01234567-89ab-cdef-0123-456789abcdef")


def encrypted(path: Path) -> None:
    guestdisks.blank(path, 40, "label: gpt\n1 : size=30M\n")
    encrypt(path, 1)


def encrypted_beside_boot(path: Path) -> None:
    """As installers make it."""
    guestdisks.blank(path, 90, "label: gpt\n1 : size=40M\n2 : size=40M\n")
    guestdisks.make(path, 1, "ext4", "boot")
    encrypt(path, 2)


def encrypted_volume(path: Path) -> None:
    guestdisks.blank(path, 90, f"label: gpt\n1 : size=40M\n2 : size=40M, type={lvmdisks.LVM}\n")
    guestdisks.make(path, 1, "ext4", "boot")
    guestdisks.volume_group(path, 2, "vg", {"root": 16})
    encrypt(path, "vg/root")


def raid_beside_boot(path: Path) -> None:
    guestdisks.blank(path, 90, "label: gpt\n1 : size=40M\n2 : size=40M\n")
    guestdisks.make(path, 1, "ext4", "boot")
    patch(path, 41 * MIB + 4096, struct.pack("<II", 0xA92B4EFC, 1))


def squashfs_beside_boot(path: Path) -> None:
    guestdisks.blank(path, 90, "label: gpt\n1 : size=40M\n2 : size=40M\n")
    guestdisks.make(path, 1, "ext4", "boot")
    patch(path, 41 * MIB, b"hsqs".ljust(28, b"\0") + struct.pack("<HH", 4, 0))


def swap_alone(path: Path) -> None:
    guestdisks.blank(path, 40, "label: dos\n1 : size=30M, type=82\n")
    guestdisks.make(path, 1, "swap")


def ntfs(path: Path) -> None:
    guestdisks.blank(path, 40, "label: dos\n1 : size=30M, type=7\n")
    with path.open("r+b") as file:
        file.seek(MIB)
        sector = bytearray(b"\xeb\x52\x90NTFS    ".ljust(512, b"\0"))
        struct.pack_into("<HB", sector, 11, 512, 8)
        struct.pack_into("<QQQ", sector, 0x28, 30 * MIB // 512 - 1, 4, 8)
        file.write(sector)


def solaris(path: Path) -> None:
    guestdisks.blank(path, 40, "label: sun\n1 : size=30M\n")


def overlapping(path: Path) -> None:
    """With a filesystem that could be mounted."""
    guestdisks.blank(path, 40, "label: dos\n1 : size=30M\n")
    guestdisks.make(path, 1, "ext4")
    patch(path, 446 + 16, struct.pack("<B3xB3xII", 0, 0x83, 4096, 8192))


def circular(path: Path) -> None:
    """An extended partition whose first table is its second, too."""
    guestdisks.blank(path, 40, "label: dos\n1 : start=1M, size=20M\n2 : start=22M, type=5\n5 : start=23M, size=1M\n")
    guestdisks.make(path, 1, "ext4")
    patch(path, 22 * MIB + 446 + 16, struct.pack("<B3xB3xII", 0, 5, 0, 8192))


def unknown_beside_boot(path: Path) -> None:
    """As a root on ZFS, JFS or what comes next: nobody knows it, but it is the largest."""
    guestdisks.blank(path, 90, "label: gpt\n1 : size=40M\n2 : size=45M\n")
    guestdisks.make(path, 1, "ext4", "boot")
    patch(path, 42 * MIB, os.urandom(MIB))


def raid_behind_its_data(path: Path) -> None:
    """Version 0.90 of md(4) has its superblock at the end, so that the filesystem begins as any other."""
    guestdisks.blank(path, 42, "label: dos\n1 : start=1M, size=40M, type=fd\n")
    make_ext4(path, "-b", "4096", size="39M")
    patch(path, 41 * MIB - 65536, struct.pack("<IIII", 0xA92B4EFC, 0, 90, 0).ljust(4096, b"\0"))


def remains_of_another(path: Path) -> None:
    guestdisks.blank(path, 42, "label: dos\n1 : start=1M, size=40M\n")
    make_ext4(path)
    patch(path, MIB + 0x10040, b"_BHRfS_M")


def larger_than_its_partition(path: Path) -> None:
    guestdisks.blank(path, 42, "label: dos\n1 : start=1M, size=40M\n")
    make_ext4(path)
    run("sfdisk", "--quiet", "--partno", "1", path, text=", 30M\n")


def feature_that_nobody_knows(path: Path) -> None:
    guestdisks.blank(path, 42, "label: dos\n1 : start=1M, size=40M\n")
    make_ext4(path, "-O", "^metadata_csum")
    with path.open("r+b") as file:
        file.seek(MIB + 1024 + 0x63)
        file.write(b"\x40")


def xfs_of_version_4(path: Path) -> None:
    """Many kernels know it no more."""
    guestdisks.blank(path, 310, "label: dos\n1 : start=1M, size=305M\n")
    part = place(path, 1)
    assert part
    with attached(path, part.start, part.size) as device:
        run("mkfs.xfs", "-q", "-f", "-m", "crc=0,finobt=0", device)


def make_ext4(path: Path, *options: str, size: str = "") -> None:
    part = place(path, 1)
    assert part
    with attached(path, part.start, part.size) as device:
        run("mkfs.ext4", "-q", "-F", *options, device, *([size] if size else []))


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "make",
    [
        unknown_beside_boot,
        raid_behind_its_data,
        remains_of_another,
        larger_than_its_partition,
        feature_that_nobody_knows,
        encrypted,
        encrypted_beside_boot,
        encrypted_volume,
        raid_beside_boot,
        squashfs_beside_boot,
        swap_alone,
        ntfs,
        solaris,
        overlapping,
        circular,
    ],
)
def test_no_filesystem_of_linux(
    make: Callable[[Path], None], form: str, node: Node, disk: MakeDisk, tmp_path: Path
) -> None:
    make(tmp_path / "image")
    refused(node, disk(SIZE), tmp_path / "image", form)
    deployed(node, disk(SIZE), tmp_path / "image", form, OSP_NOMOUNT="yes")


def test_old_xfs(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """Whether a kernel knows a version, or a feature, is asked before; this one holds no system."""
    xfs_of_version_4(tmp_path / "image")
    refused(node, disk(400), tmp_path / "image", "raw")


def test_qcow2_of_a_truncated_disk(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    image = guestdisks.blank(tmp_path / "image", 40, "label: gpt\n1 : size=30M\n")
    os.truncate(image, 20 * MIB)
    target = disk(SIZE)
    before = digest(target)
    path = place_image(node, image, "qcow2")
    for nomount in ("yes", "no"):
        result = node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="qcow2", OSP_NOMOUNT=nomount)
        result.failed(str(path), "is truncated", str(20 * MIB), str(31 * MIB))
        assert digest(target) == before


@pytest.mark.parametrize("nomount", ["no", "yes"])
@pytest.mark.parametrize(
    ("form", "offset", "data"),
    [
        ("qcow2", 36, bytes(4)),  # a first table without entries
        ("vmdk", 77, b"\1\0"),  # compressed, but its flags say nothing of it
    ],
)
def test_what_qemu_img_refuses(
    form: str, offset: int, data: bytes, nomount: str, node: Node, disk: MakeDisk, tmp_path: Path
) -> None:
    image = guestdisks.blank(tmp_path / "image", 40, "label: gpt\n1 : size=30M\n")
    path = node.images / f"guest-{trees.ARCH}.{form}"
    run("qemu-img", "convert", "-f", "raw", "-O", form, image, path)
    patch(path, offset, data)
    target = disk(SIZE)
    patch(target, 0, os.urandom(MIB))
    before = digest(target)
    wanted = {"OSP_IMAGE_NAME": "guest", "OSP_IMAGE_TYPE": "qemu", "OSP_NOMOUNT": nomount}
    result = node.create(target, **wanted).failed(str(path))
    assert digest(target) == before, result.log
    assert node.call("verify", node.environment(target, **wanted)).failed().last == result.last


# No alarm


@pytest.mark.parametrize("kind", ["ova", "tar"])
def test_archive(kind: str, node: Node, doctor: Doctor, disk: MakeDisk, tmp_path: Path) -> None:  # noqa: F811
    """Its members are not the disk: that shows when it is unpacked."""
    guestdisks.blank(tmp_path / "image", 40, "label: gpt\n1 : size=30M\n")
    run("qemu-img", "convert", "-f", "raw", *FORMATS["vmdk"], tmp_path / "image", tmp_path / "disk.vmdk")
    path = node.images / f"guest-{trees.ARCH}.{kind}"
    run("tar", "--create", "--format=ustar", "-C", tmp_path, "--file", path, "disk.vmdk")
    wanted = {"OSP_IMAGE_NAME": "guest", "OSP_IMAGE_TYPE": "qemu"}
    assert node.call("verify", node.environment(disk(SIZE), **wanted)).ok().log.count("\n") == 1
    node.variant("mine", "IMAGE_NAME=guest\nIMAGE_TYPE=qemu\n")
    doctor.well()


def test_metadata_behind_the_first_mib(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """lvm2 writes each version of it behind the last one."""
    image = guestdisks.blank(tmp_path / "image", 150)
    tags = [word for number in range(80) for word in ("--addtag", f"{number:03}".ljust(900, "t"))]
    with attached(image) as device:
        lvmdisks.lvm([device], "pvcreate", "--metadatasize", "8m", device)
        lvmdisks.lvm([device], "vgcreate", "vg", device)
        lvmdisks.lvm([device], "lvcreate", *lvmdisks.NEW, "-L", "100M", "-n", "root", "vg")
        lvmdisks.lvm([device], "vgchange", *tags, "vg")
        for number in range(16):
            lvmdisks.lvm([device], "vgchange", "--addtag", f"more{number}", "vg")
    with image.open("rb") as file:
        assert b'"more15"' not in file.read(MIB)
    system(image, "vg/root", small_tree, tmp_path)
    target = disk(SIZE)
    deployed(node, target, image, "qcow2")
    check_root(target, "vg/root", tmp_path)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_what_only_the_journal_holds(form: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """A raw image must not be written to, so its journal is not replayed before."""
    image = guestdisks.blank(tmp_path / "image", 160, TABLE)
    data = volume("data", linear(0, 2), linear(4, 2, 2))
    restore_metadata(image, 3, metadata(data + volume("root", linear(6, 20))), tmp_path)
    guestdisks.make(image, "vg/root", "ext4")
    with left_dirty(image, tmp_path / "dirty", guestdisks.place(image, "vg/root")) as where:
        run("cp", "--archive", f"{small_tree}/.", where)
        (where / "etc/fstab").write_text(ROOT_FSTAB)
    target = disk(SIZE)
    deployed(node, target, image, form)
    check_root(target, "vg/root", tmp_path)


def test_metadata_at_the_end(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """LVM reads its copy there if that at the beginning is damaged."""
    image = guestdisks.blank(tmp_path / "image", 160, "label: gpt\n1 : start=1M, size=130M\n2 : size=20M\n")
    with attached(image, MIB, 130 * MIB) as device:
        lvmdisks.lvm([device], "pvcreate", "--pvmetadatacopies", "2", device)
        lvmdisks.lvm([device], "vgcreate", "vg", device)
        lvmdisks.lvm([device], "lvcreate", *lvmdisks.NEW, "-L", "100M", "-n", "root", "vg")
    system(image, "vg/root", small_tree, tmp_path)
    patch(image, MIB + 4096, bytes(512))
    assert "found / on logical volume vg/root" in deployed(node, disk(SIZE), image, "qcow2")


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_chain_that_goes_back(form: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """The root is on a logical partition that was made last, before the others."""
    table = "label: dos\n1 : start=1M, type=5\n5 : start=2M, size=1M\n6 : start=4M, size=80M\n7 : start=90M, size=2M\n"
    image = guestdisks.blank(tmp_path / "image", 95, table)
    guestdisks.make(image, 6, "ext4")
    guestdisks.fill(image, 6, small_tree, tmp_path, "")
    with image.open("rb") as file:
        data = file.read()
    first, second, third = (part.start - MIB for part in guestdisks.by_number(image) if part.number > 4)
    links = {place: data[place + 462 : place + 478] for place in (first, second)}
    patch(image, first + 462, links[second])
    patch(image, third + 462, links[first])
    patch(image, second + 462, bytes(16))
    target = disk(SIZE)
    assert "found / on partition 7" in deployed(node, target, image, form, OSP_GROW="no")


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_table_of_which_only_the_copy_is_there(
    form: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    guest = guestdisks.cloud(tmp_path / "image", small_tree, tmp_path)
    with guest.path.open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))
    target = disk(106)
    assert "found / on partition 1" in deployed(node, target, guest.path, form)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("layout", ["cloud", "ancestor", "bare"])
def test_sound_images_cost_little(
    layout: str, form: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    """No program is started for a raw one, and one or two for the others."""
    guest = guestdisks.LAYOUTS[layout](tmp_path / "image", small_tree, tmp_path)
    log = deployed(node, disk(SIZE), guest.path, form, OSP_IMAGE_DEBUG="yes")
    before, _, _ = log.partition(" dd of=" if form == "raw" else "qemu-img convert -n -p")
    assert "sfdisk" not in before and "blkid" not in before
    assert before.count("qemu-img convert") <= {"raw": 0, "qcow2": 2}[form]
