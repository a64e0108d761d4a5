"""Filesystems as values: what goes where, how it is made, and the fstab."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from imageos.disks import filesystem, layout
from imageos.disks.filesystem import FILESYSTEMS, Volume
from imageos.disks.layout import MIB, Layout
from imageos.node import linux
from imageos.node.mounts import Mount

EXT2 = "none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
EXT3 = f"{EXT2},has_journal"
EXT4 = f"{EXT3},extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize"
# What an older e2fsck or GRUB in the guest cannot read
TOO_NEW = {"metadata_csum_seed", "orphan_file", "inline_data", "casefold", "encrypt", "verity", "bigalloc"}

ROOT_UUID = "11111111-1111-4111-8111-111111111111"
BOOT_UUID = "22222222-2222-4222-8222-222222222222"
XFS_METADATA = f"bigtime=0,inobtcount=0,rmapbt=0,uuid={ROOT_UUID}"
SWAP_UUID = "33333333-3333-4333-8333-333333333333"


def planned(table: str = "gpt", boot: int = 100, swap: int = 256) -> Layout:
    return layout.plan(table, 10 << 30, boot=boot * MIB, swap=swap * MIB, arch="x86_64", smallest_root=16 * MIB)


def node(number: int) -> str:
    return f"/dev/loop7p{number}"


# What goes where


@pytest.mark.parametrize(
    ("kind", "boot_kind"), [("ext2", "ext2"), ("ext3", "ext3"), ("ext4", "ext4"), ("xfs", "ext4"), ("btrfs", "ext4")]
)
def test_volumes(kind: str, boot_kind: str) -> None:
    made = filesystem.plan_volumes(planned(), kind, node)
    assert [(one.role, one.kind, one.device) for one in made] == [
        ("esp", "vfat", "/dev/loop7p2"),
        ("boot", boot_kind, "/dev/loop7p3"),
        ("swap", "swap", "/dev/loop7p4"),
        ("root", kind, "/dev/loop7p5"),
    ]


def test_volumes_without_boot_and_swap() -> None:
    made = filesystem.plan_volumes(planned("msdos", 0, 0), "ext4", node)
    assert [(one.role, one.kind, one.device) for one in made] == [("root", "ext4", "/dev/loop7p1")]


def test_every_volume_has_a_uuid_of_its_own() -> None:
    made = filesystem.plan_volumes(planned(), "ext4", node)
    assert len({one.uuid for one in made}) == len(made)
    for one in made:
        form = r"[0-9A-F]{4}-[0-9A-F]{4}" if one.kind == "vfat" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
        assert re.fullmatch(form, one.uuid)


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


# How it is made


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
    """What this node's mkfs.xfs knows, by the profiles that it brings, and an older GRUB cannot read is off."""
    for name in profiles:
        (tmp_path / name).touch()
    monkeypatch.setattr(filesystem, "_XFS_PROFILE", f"{tmp_path}/{{}}")
    command = filesystem.make_command(Volume("root", "xfs", "/dev/loop7p3", ROOT_UUID))
    assert command == ["mkfs.xfs", "-f", "-q", "-m", XFS_METADATA, *off, "-L", "/", "/dev/loop7p3"]


@pytest.mark.parametrize(
    ("feature", "off"),
    [("free-space-tree", []), ("block-group-tree", ["-O", "^block-group-tree"])],
)
def test_btrfs_of_newer_tools(feature: str, off: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What this node's mkfs.btrfs knows and Linux 5.10 cannot write is off; an older one would refuse the name."""
    called = []

    def run(argv: list[str], on_line: Callable[[str], None] = print, **_: object) -> str:
        called.append(argv)
        on_line(f"{feature:19} - some words (compat=6.1, safe=6.6, default=6.19)")
        return ""

    monkeypatch.setattr(filesystem, "run", run)
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
    assert filesystem.fstab(volumes("boot", "swap", "root")) == (
        "# /etc/fstab: written by imageos\n"
        "# <filesystem>                            <mount point> <type> <options>         <dump> <pass>\n"
        "UUID=11111111-1111-4111-8111-111111111111 /             ext4   errors=remount-ro 0      1\n"
        "UUID=22222222-2222-4222-8222-222222222222 /boot         ext4   defaults          0      2\n"
        "UUID=33333333-3333-4333-8333-333333333333 none          swap   sw                0      0\n"
    )


def test_fstab_of_gpt_with_xfs() -> None:
    assert filesystem.fstab(volumes("esp", "boot", "swap", "root", kind="xfs")) == (
        "# /etc/fstab: written by imageos\n"
        "# <filesystem>                            <mount point> <type> <options>         <dump> <pass>\n"
        "UUID=11111111-1111-4111-8111-111111111111 /             xfs    defaults          0      0\n"
        "UUID=22222222-2222-4222-8222-222222222222 /boot         ext4   defaults          0      2\n"
        "UUID=12AB-34CD                            /boot/efi     vfat   umask=0077,nofail 0      1\n"
        "UUID=33333333-3333-4333-8333-333333333333 none          swap   sw                0      0\n"
    )


def test_fstab_of_one_partition() -> None:
    assert filesystem.fstab(volumes("root", kind="btrfs")) == (
        "# /etc/fstab: written by imageos\n"
        "# <filesystem>                            <mount point> <type> <options> <dump> <pass>\n"
        "UUID=11111111-1111-4111-8111-111111111111 /             btrfs  defaults  0      0\n"
    )


@pytest.mark.parametrize("kind", sorted(FILESYSTEMS))
def test_fstab_rows_have_six_fields(kind: str) -> None:
    rows = filesystem.fstab(volumes("esp", "boot", "swap", "root", kind=kind)).splitlines()[2:]
    assert [len(row.split()) for row in rows] == [6] * 4
    assert [row.split()[1] for row in rows] == ["/", "/boot", "/boot/efi", "none"]


# Two of one UUID


class Twins:
    """A kernel that has another device with this btrfs's UUID mounted, for so many looks."""

    def __init__(self, looks: int, visible: bool = False) -> None:
        self.looks, self.visible = looks, visible
        self.done: list[str] = []

    def mounted_twin(self, device: str) -> str:
        self.looks -= 1
        return "loop9p1" if self.looks >= 0 else ""

    def mount(self, device: str, path: str, kind: str, flags: int, data: str) -> None:
        self.done.append(f"mount {device}")

    def umount(self, path: str) -> None:
        self.done.append(f"umount {path}")


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Twins]:
    def make(looks: int, visible: bool = False) -> Twins:
        made = Twins(looks, visible)
        monkeypatch.setattr(filesystem, "_mounted_twin", made.mounted_twin)
        monkeypatch.setattr("imageos.disks.filesystem.linux.mount", made.mount)
        monkeypatch.setattr("imageos.disks.filesystem.linux.umount", made.umount)
        monkeypatch.setattr("imageos.disks.filesystem.linux.forget_btrfs", lambda device: None)
        seen = [Mount("/mnt", "/dev/loop9p1", "btrfs" if visible else "fuse", 0)]
        monkeypatch.setattr("imageos.disks.filesystem.mounts.current", lambda: seen)
        return made

    return make


def test_btrfs_alone(twins: Callable[..., Twins], capfd: pytest.CaptureFixture[str]) -> None:
    kernel = twins(0)
    filesystem._mount_btrfs("/dev/loop7p1", "/x", 0, "")
    assert (kernel.done, capfd.readouterr().err) == (["mount /dev/loop7p1"], "")


def test_another_instance_of_the_image_is_waited_for(
    twins: Callable[..., Twins], capfd: pytest.CaptureFixture[str]
) -> None:
    """Said once; a FUSE mount of the twin's name tells nothing."""
    kernel = twins(3)
    filesystem._mount_btrfs("/dev/loop7p1", "/x", 0, "")
    assert kernel.done == ["mount /dev/loop7p1"]
    assert capfd.readouterr().err.count("waiting for another instance of this image") == 1


def test_waiting_for_another_instance_has_an_end(twins: Callable[..., Twins], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "TWIN_PATIENCE", 0.1)
    kernel = twins(1000)
    with pytest.raises(filesystem.MountedTwice, match="the same UUID is mounted from /dev/loop9p1"):
        filesystem._mount_btrfs("/dev/loop7p1", "/x", 0, "")
    assert kernel.done == []


def test_what_a_user_has_mounted_is_not_waited_for(twins: Callable[..., Twins]) -> None:
    kernel = twins(1000, visible=True)
    with pytest.raises(filesystem.MountedTwice):
        filesystem._mount_btrfs("/dev/loop7p1", "/x", 0, "")
    assert (kernel.done, kernel.looks) == ([], 999)


def test_another_instance_was_quicker(twins: Callable[..., Twins], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel has shown us is its filesystem, or it has refused ours: again."""
    kernel = twins(0)
    answers = iter(["", "loop9p1", "", ""])
    monkeypatch.setattr(filesystem, "_mounted_twin", lambda device: next(answers))
    filesystem._mount_btrfs("/dev/loop7p1", "/x", 0, "")
    assert kernel.done == ["mount /dev/loop7p1", "umount /x", "mount /dev/loop7p1"]

    kernel = twins(0)
    refusals = [OSError(errno.EEXIST, "File exists")] * 3

    def mount(*arguments: str) -> None:
        if refusals:
            raise refusals.pop()
        kernel.done.append("mounted")

    monkeypatch.setattr("imageos.disks.filesystem.linux.mount", mount)
    filesystem._mount_btrfs("/dev/loop7p1", "/x", 0, "")
    assert kernel.done == ["mounted"]


# The end of a mount: what the kernel is asked, in order. That it answers so: tests/faults/test_storage.py


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Leave two nested mounts by `how`, the sync of `failing` being refused; what was asked of the kernel."""

    def leave(how: Exception | None, *failing: str) -> list[str]:
        calls: list[str] = []

        def note(call: str, path: str) -> None:
            calls.append(f"{call} {Path(path).name}")

        def sync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            note("sync", str(path))
            if path.name in failing:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(filesystem, "_mount", lambda device, path, *_: None)
        monkeypatch.setattr(linux, "umount", lambda path, *_: note("umount", path))
        monkeypatch.setattr(linux, "shut_down_filesystem", lambda path: note("shut down", path))
        monkeypatch.setattr(linux, "sync_filesystem", sync)
        monkeypatch.setattr(os, "fsync", sync)
        for name in ("root", "boot"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / f"{name}-device").touch()
        expected = how or (filesystem.NotWritten("") if failing else None)
        root = filesystem.mounted(str(tmp_path / "root-device"), str(tmp_path / "root"), "ext4")
        boot = filesystem.mounted(str(tmp_path / "boot-device"), str(tmp_path / "boot"), "ext4")
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
