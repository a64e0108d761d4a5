"""Filesystems as values: mount points, options of mkfs, and the fstab."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from imageos.disks import blockdev, btrfs, filesystem, fstab, layout, mounting, superblock
from imageos.disks.filesystem import FILESYSTEMS, Volume
from imageos.disks.layout import MIB, Layout
from imageos.errors import Failure
from imageos.node import linux
from imageos.node.mounts import Mount
from imageos.run import Command

EXT2 = "none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
EXT3 = f"{EXT2},has_journal"
EXT4 = f"{EXT3},extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize"
# Features that an older e2fsck or GRUB in the guest cannot read
TOO_NEW = {"metadata_csum_seed", "orphan_file", "inline_data", "casefold", "encrypt", "verity", "bigalloc"}

ROOT_UUID = "11111111-1111-4111-8111-111111111111"
BOOT_UUID = "22222222-2222-4222-8222-222222222222"
XFS_METADATA = f"bigtime=0,inobtcount=0,rmapbt=0,uuid={ROOT_UUID}"
SWAP_UUID = "33333333-3333-4333-8333-333333333333"


def planned(table: str = "gpt", boot: int = 100, swap: int = 256) -> Layout:
    return layout.plan(table, 10 << 30, boot=boot * MIB, swap=swap * MIB, arch="x86_64", smallest_root=16 * MIB)


def node(number: int) -> str:
    return f"/dev/loop7p{number}"


# Mount points


@pytest.mark.parametrize(
    ("kind", "boot_kind"), [("ext2", "ext2"), ("ext3", "ext3"), ("ext4", "ext4"), ("xfs", "ext4"), ("btrfs", "ext4")]
)
def test_volumes(kind: str, boot_kind: str) -> None:
    made = filesystem.plan_volumes(planned(), kind, node)
    assert [(volume.role, volume.kind, volume.device) for volume in made] == [
        ("esp", "vfat", "/dev/loop7p2"),
        ("boot", boot_kind, "/dev/loop7p3"),
        ("swap", "swap", "/dev/loop7p4"),
        ("root", kind, "/dev/loop7p5"),
    ]


def test_volumes_without_boot_and_swap() -> None:
    made = filesystem.plan_volumes(planned("msdos", 0, 0), "ext4", node)
    assert [(volume.role, volume.kind, volume.device) for volume in made] == [("root", "ext4", "/dev/loop7p1")]


def test_every_volume_has_a_uuid_of_its_own() -> None:
    made = filesystem.plan_volumes(planned(), "ext4", node)
    assert len({volume.uuid for volume in made}) == len(made)
    for volume in made:
        form = r"[0-9A-F]{4}-[0-9A-F]{4}" if volume.kind == "vfat" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
        assert re.fullmatch(form, volume.uuid)


@pytest.mark.parametrize(
    ("table", "kind", "expected"),
    [
        ("msdos", "ext4", {"sfdisk", "mkfs.ext4", "mkswap"}),
        ("msdos", "xfs", {"sfdisk", "mkfs.ext4", "mkswap", "mkfs.xfs"}),
        ("gpt", "btrfs", {"sfdisk", "mkfs.vfat", "mkfs.ext4", "mkswap", "mkfs.btrfs"}),
    ],
)
def test_programs(table: str, kind: str, expected: set[str]) -> None:
    assert set(filesystem.programs(planned(table), kind)) == expected


# mkfs


def ext_command(kind: str, features: str, label: str = "/") -> list[str]:
    return [f"mkfs.{kind}", "-F", "-q", "-O", features, "-I", "256", "-U", ROOT_UUID, "-L", label, "/dev/loop7p3"]


@pytest.mark.parametrize(
    ("role", "kind", "uuid", "command"),
    [
        ("root", "ext2", ROOT_UUID, ext_command("ext2", EXT2)),
        ("root", "ext3", ROOT_UUID, ext_command("ext3", EXT3)),
        ("root", "ext4", ROOT_UUID, ext_command("ext4", EXT4)),
        ("boot", "ext4", ROOT_UUID, ext_command("ext4", EXT4, "/boot")),
        (
            "root",
            "xfs",
            ROOT_UUID,
            ["mkfs.xfs", "-f", "-q", "-m", XFS_METADATA, "-L", "/", "/dev/loop7p3"],
        ),
        ("root", "btrfs", ROOT_UUID, ["mkfs.btrfs", "-f", "-q", "-U", ROOT_UUID, "-L", "/", "/dev/loop7p3"]),
        ("swap", "swap", SWAP_UUID, ["mkswap", "--uuid", SWAP_UUID, "/dev/loop7p3"]),
        ("esp", "vfat", "12AB-34CD", ["mkfs.vfat", "-F", "32", "-n", "ESP", "-i", "12AB34CD", "/dev/loop7p3"]),
    ],
)
def test_make_command(role: str, kind: str, uuid: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_XFS_PROFILE", "/nonexistent/{}")
    assert filesystem.make_command(Volume(role, kind, "/dev/loop7p3", uuid)) == command


@pytest.mark.parametrize(
    ("profiles", "off"),
    [
        (["5.10", "5.15"], []),
        (["5.10", "5.15", "6.1"], ["-i", "nrext64=0"]),
        (["5.10", "6.1", "6.12"], ["-i", "nrext64=0", "-i", "exchange=0", "-n", "parent=0"]),
    ],
)
def test_xfs_of_newer_tools(
    profiles: list[str], off: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of this node's mkfs.xfs (see its profiles) that an older GRUB cannot read are off."""
    for name in profiles:
        (tmp_path / name).touch()
    monkeypatch.setattr(filesystem, "_XFS_PROFILE", f"{tmp_path}/{{}}")
    command = filesystem.make_command(Volume("root", "xfs", "/dev/loop7p3", ROOT_UUID))
    assert command == ["mkfs.xfs", "-f", "-q", "-m", XFS_METADATA, *off, "-L", "/", "/dev/loop7p3"]


# what `mkfs.btrfs -O list-all` says of a feature -> the options that turn it off
BTRFS_FEATURES = {
    "no-holes            - no explicit hole extents for files (compat=3.14, safe=4.0, default=5.15)": [],
    "zoned               - support zoned (SMR/ZBC/ZNS) devices (compat=5.12)": [],
    "bgt                 - block-group-tree alias": [],
    "block-group-tree    - more efficient tracking to reduce mount time (compat=6.1, safe=6.6, default=6.19)": [
        "-O", "^block-group-tree",
    ],
    "tomorrow            - to come (compat=10.0, safe=10.1, default=10.2)": ["-O", "^tomorrow"],
}  # fmt: skip


@pytest.mark.parametrize("line", BTRFS_FEATURES)
def test_btrfs_of_newer_tools(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of mkfs.btrfs that Linux 5.10 cannot write are off; an older mkfs would refuse their names."""
    called = []
    off = BTRFS_FEATURES[line]

    def run(command: Command, on_line: Callable[[str], None] = print) -> str:
        called.append(command.argv)
        on_line(line)
        return ""

    @contextmanager
    def output_of(command: Command) -> Iterator[tuple[int, Callable[[], None]]]:
        called.append(command.argv)
        yield 0, lambda: None

    monkeypatch.setattr(btrfs, "run", run)
    monkeypatch.setattr(filesystem, "output_of", output_of)
    volume = Volume("root", "btrfs", "/dev/loop7p3", ROOT_UUID)
    filesystem.make([volume])
    program, *words = filesystem.make_command(volume)
    assert called == [[program, "-O", "list-all"], [program, *off, *words]]


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_ext_has_nothing_that_is_too_new(kind: str) -> None:
    command = filesystem.make_command(Volume("root", kind, "/dev/loop7p3", ROOT_UUID))
    features = command[command.index("-O") + 1].split(",")
    assert features[0] == "none", "what this node's mkfs would add is switched off"
    assert not TOO_NEW & set(features)


# fstab


def volumes(*roles: str, kind: str = "ext4") -> list[Volume]:
    every = {
        "esp": Volume("esp", "vfat", "/dev/loop7p2", "12AB-34CD"),
        "boot": Volume("boot", "ext4" if kind in ("xfs", "btrfs") else kind, "/dev/loop7p3", BOOT_UUID),
        "swap": Volume("swap", "swap", "/dev/loop7p4", SWAP_UUID),
        "root": Volume("root", kind, "/dev/loop7p5", ROOT_UUID),
    }
    return [every[role] for role in roles]


def test_fstab_of_msdos() -> None:
    assert fstab.render(volumes("boot", "swap", "root")) == (
        "# /etc/fstab: written by imageos\n"
        "# <filesystem>                            <mount point> <type> <options>         <dump> <pass>\n"
        "UUID=11111111-1111-4111-8111-111111111111 /             ext4   errors=remount-ro 0      1\n"
        "UUID=22222222-2222-4222-8222-222222222222 /boot         ext4   defaults          0      2\n"
        "UUID=33333333-3333-4333-8333-333333333333 none          swap   sw                0      0\n"
    )


def test_fstab_of_gpt_with_xfs() -> None:
    assert fstab.render(volumes("esp", "boot", "swap", "root", kind="xfs")) == (
        "# /etc/fstab: written by imageos\n"
        "# <filesystem>                            <mount point> <type> <options>         <dump> <pass>\n"
        "UUID=11111111-1111-4111-8111-111111111111 /             xfs    defaults          0      0\n"
        "UUID=22222222-2222-4222-8222-222222222222 /boot         ext4   defaults          0      2\n"
        "UUID=12AB-34CD                            /boot/efi     vfat   umask=0077,nofail 0      1\n"
        "UUID=33333333-3333-4333-8333-333333333333 none          swap   sw                0      0\n"
    )


def test_fstab_of_one_partition() -> None:
    assert fstab.render(volumes("root", kind="btrfs")) == (
        "# /etc/fstab: written by imageos\n"
        "# <filesystem>                            <mount point> <type> <options> <dump> <pass>\n"
        "UUID=11111111-1111-4111-8111-111111111111 /             btrfs  defaults  0      0\n"
    )


@pytest.mark.parametrize("kind", sorted(FILESYSTEMS))
def test_fstab_rows_have_six_fields(kind: str) -> None:
    rows = fstab.render(volumes("esp", "boot", "swap", "root", kind=kind)).splitlines()[2:]
    assert [len(row.split()) for row in rows] == [6] * 4
    assert [row.split()[1] for row in rows] == ["/", "/boot", "/boot/efi", "none"]


# Filesystems with one UUID

IDENTITY = uuid.UUID("12345678-9abc-4def-8123-456789abcdef")


class Registry:
    """What the kernel says: who has the lock, and which devices with this UUID are mounted, look after look."""

    def __init__(self, locked: int, mounted: int, visible: bool) -> None:
        self.locked, self.mounted, self.visible, self.looks = locked, mounted, visible, 0

    def lock(self, control: int, number: int) -> bool:
        assert 0 <= number < 1 << 62
        self.looks += 1
        return self.looks > self.locked

    def devices(self, identity: uuid.UUID) -> set[str]:
        return {"/dev/loop9p1"} if self.looks <= self.mounted else set()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    def make(locked: int = 0, mounted: int = 0, visible: bool = False) -> Registry:
        made = Registry(locked, mounted, visible)
        monkeypatch.setattr(linux, "lock_btrfs", made.lock)
        monkeypatch.setattr(btrfs, "_mounted", made.devices)
        seen = [Mount("/mnt", "/dev/loop9p1", "btrfs" if visible else "fuse", 0)]
        monkeypatch.setattr("imageos.disks.btrfs.mounts.current", lambda: seen)
        return made

    return make


def await_turn() -> None:
    btrfs._await_turn("/dev/loop7p1", 3, IDENTITY)


def test_btrfs_alone(registry: Callable[..., Registry], capfd: pytest.CaptureFixture[str]) -> None:
    kernel = registry()
    await_turn()
    assert (kernel.looks, capfd.readouterr().err) == (1, "")


@pytest.mark.parametrize("state", [{"locked": 3}, {"mounted": 3}, {"locked": 3, "mounted": 3}])
def test_another_instance_of_the_image_is_waited_for(
    state: dict[str, int], registry: Callable[..., Registry], capfd: pytest.CaptureFixture[str]
) -> None:
    """One message is logged; a FUSE mount with the name of the other device is ignored."""
    kernel = registry(**state)
    await_turn()
    assert kernel.looks == 4
    assert capfd.readouterr().err.count("waiting for another instance of this image") == 1


@pytest.mark.parametrize("state", [{"locked": 1000}, {"mounted": 1000}, {"locked": 1000, "mounted": 1000}])
def test_waiting_for_another_instance_has_an_end(
    state: dict[str, int], registry: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(btrfs, "TWIN_PATIENCE", 0.1)
    registry(**state)
    with pytest.raises(btrfs.MountedTwice, match="a btrfs with the same UUID is mounted"):
        await_turn()


def test_what_a_user_has_mounted_is_not_waited_for(registry: Callable[..., Registry]) -> None:
    kernel = registry(mounted=1000, visible=True)
    with pytest.raises(btrfs.MountedTwice, match="mounted from /dev/loop9p1"):
        await_turn()
    assert kernel.looks == 1


DEVICE = superblock.BtrfsDevice(IDENTITY, 2, 1, 0, False)
OTHER = DEVICE._replace(filesystem=uuid.uuid4())
ON_DISK = {
    "alone": ({"p1": DEVICE._replace(devices=1)}, ["p1"]),
    "two": ({"p1": DEVICE, "p2": DEVICE._replace(number=2)}, ["p1", "p2"]),
    "a clone of one": ({"p1": DEVICE._replace(devices=1), "p2": DEVICE._replace(devices=1)}, ["p1"]),
    "clones of both": (
        {name: DEVICE._replace(number=number) for name, number in (("p1", 1), ("p2", 1), ("p3", 2), ("p4", 2))},
        ["p1", "p3"],
    ),
    "another filesystem": ({"p1": DEVICE._replace(devices=1), "p2": OTHER._replace(devices=1)}, ["p1"]),
    "a seed": ({"p1": DEVICE._replace(number=2), "p2": OTHER._replace(devices=1, is_seed=True)}, ["p1", "p2"]),
    "no btrfs": ({"p2": DEVICE}, []),
}


@pytest.mark.parametrize("name", ON_DISK)
def test_devices_of_a_btrfs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = ON_DISK[name]
    monkeypatch.setattr(blockdev, "parts_beside", lambda device: ["p0", "p1", "p2", "p3", "p4"])
    monkeypatch.setattr(blockdev, "ask", lambda name, _: found.get(name))
    assert list(btrfs.devices("p1")) == expected


def test_btrfs_without_some_of_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockdev, "parts_beside", lambda device: ["p1", "p2"])
    found = {"p1": DEVICE._replace(devices=3), "p2": OTHER}
    monkeypatch.setattr(blockdev, "ask", lambda name, _: found[name])
    with pytest.raises(Failure, match="2 of the 3 devices of its filesystem are not on this disk"):
        btrfs.devices("p1")


# Unmounting: the calls to the kernel, in order. tests/faults/test_storage.py tests the kernel's answers.


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Leave two nested mounts by `how`, with a refused sync of `failing`; return the calls to the kernel."""

    def leave(how: Exception | None, *failing: str) -> list[str]:
        calls: list[str] = []

        def note(call: str, path: str) -> None:
            calls.append(f"{call} {Path(path).name}")

        def sync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            note("sync", str(path))
            if path.name in failing:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(linux, "mount", lambda device, path, *_: None)
        monkeypatch.setattr(linux, "umount", lambda path, *_: note("umount", path))
        monkeypatch.setattr(linux, "shut_down_filesystem", lambda path: note("shut down", path))
        monkeypatch.setattr(linux, "sync_filesystem", sync)
        monkeypatch.setattr(os, "fsync", sync)
        for name in ("root", "boot"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / f"{name}-device").touch()
        expected = how or (mounting.NotWritten("") if failing else None)
        root = mounting.mounted(str(tmp_path / "root-device"), str(tmp_path / "root"), "ext4")
        boot = mounting.mounted(str(tmp_path / "boot-device"), str(tmp_path / "boot"), "ext4")
        with pytest.raises(type(expected)) if expected else nullcontext(), root, boot:
            if how:
                raise how
        return calls

    return leave


IN_ORDER = [
    *["sync boot", "umount boot", "sync boot-device"],
    *["sync root", "umount root", "sync root-device"],
]


def test_written_before_and_after_unmounting(asked: Callable[..., list[str]]) -> None:
    assert asked(None) == IN_ORDER


def test_unmounting_after_a_failure_does_not_wait(asked: Callable[..., list[str]]) -> None:
    assert asked(RuntimeError()) == ["shut down boot", "umount boot", "shut down root", "umount root"]


@pytest.mark.parametrize("lost", [["boot"], ["boot-device"], ["root"], ["root-device"], ["boot", "root"]])
def test_what_cannot_be_written_is_no_loss_of_the_rest(lost: list[str], asked: Callable[..., list[str]]) -> None:
    assert asked(None, *lost) == IN_ORDER
