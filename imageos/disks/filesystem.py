"""Filesystems: one table of their types; how they are planned and made."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from resource import RLIM_INFINITY
from typing import NamedTuple

from imageos.disks import btrfs, ext, layout, superblock
from imageos.disks.layout import MIB, Layout
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.run import Command, output_of
from imageos.settings import Settings

# Spelt out from `none`: the guest gets the same on every node, and nothing that an older kernel, e2fsck or GRUB cannot
# read (mke2fs 1.47 would add metadata_csum_seed and orphan_file).
_EXT2 = "none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
_EXT3 = _EXT2 + ",has_journal"
_EXT4 = _EXT3 + ",extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize"
# mke2fs before 1.46.4 takes 128 for a small filesystem, as /boot is one, whose times end in 2038.
_INODE_SIZE = "256"
# What came with which xfsprogs; a profile that it ships (not used itself: that of 6.1 has a syntax error) tells
# whether it knows the option. Off, Linux 5.10 (Debian 11) and the GRUB of that time can read the filesystem.
_XFS_PROFILE = "/usr/share/xfsprogs/mkfs/lts_{}.conf"
_XFS_OFF = {"6.1": ("-i", "nrext64=0"), "6.12": ("-i", "exchange=0", "-n", "parent=0")}
_ON_ERROR = "errors=remount-ro"  # errors=panic, in the superblock, would be the node's panic
MADE = {"root": "/", "boot": "/boot"}  # role -> mount point and label of the filesystems that are made


class Filesystem(NamedTuple):
    """How one type of filesystem is made, judged, mounted, read, checked and grown."""

    make: Callable[[str, str, str], list[str]]  # device, UUID, label -> command
    objection: superblock.Objection  # why the kernel must not mount it
    grow: Callable[[str], Sequence[str]]  # device -> command; the device, or where that is mounted, follows
    size: Callable[[ext.Read], int]  # reads the bytes that it covers of its device
    grub: str  # the module of GRUB that reads it
    repair: str  # the program that may repair it, for a hint
    make_options: Callable[[], list[str]] = list  # for this node's mkfs, which is asked for what it knows
    make_capabilities: tuple[int, ...] = ()
    smallest: int = 16 * MIB  # bytes of the smallest partition that it makes sense on
    boot: str = ""  # what /boot has instead: this is too large for a small partition, or not every GRUB reads it
    root_options: str = "defaults"  # in the fstab
    check_pass: bool = True  # the guest's fsck looks at it at boot
    forced: str = ""  # options of every mount of ours, which overrule what the guest's superblock says
    look_data: str = ""  # options to read it without replaying its journal, where nothing may be written
    is_dirty: Callable[[ext.Read], bool] | None = None  # whether replaying may change its UUID or label
    subvolumes: tuple[str, ...] = ()  # options that mount a root, where that is not its default subvolume
    writable: Callable[[str], AbstractContextManager[None]] = lambda path: nullcontext()  # around all that is written
    mount: Callable[[str, str, str, int, str], None] | None = None  # instead of mount(2)
    alone: Callable[[str], AbstractContextManager[None]] = lambda device: nullcontext()  # around mount and unmount
    check: tuple[str, ...] = ()  # command before `grow`; the device follows. Empty: it grows while it is mounted
    check_wait: Callable[[ext.Read], int] | None = None  # reads the seconds that `check` waits first, and `grow` again
    smallest_grown: int = 0  # bytes; the kernel refuses to grow it to fewer
    used: Callable[[ext.Read, int], Iterator[tuple[int, int]]] | None = None  # reads its used blocks, as ext.used
    is_dumped: bool = False  # dump(8) knows it


def _ext(kind: str, features: str, look_data: str = "") -> Filesystem:
    def make(device: str, identity: str, label: str) -> list[str]:
        return [f"mkfs.{kind}", "-F", "-q", "-O", features, "-I", _INODE_SIZE, "-U", identity, "-L", label, device]

    return Filesystem(
        make,
        superblock.of_ext,
        grow=lambda device: ["resize2fs"],
        size=superblock.ext_size,
        grub="ext2",
        repair="e2fsck",
        root_options=_ON_ERROR,
        forced=_ON_ERROR,
        look_data=look_data,
        is_dirty=superblock.is_dirty_ext,
        check=("e2fsck", "-p"),
        check_wait=superblock.check_wait,
        used=ext.used,
        is_dumped=True,
    )


def _make_xfs(device: str, identity: str, label: str) -> list[str]:
    options = [
        word for kernel, words in _XFS_OFF.items() if os.path.exists(_XFS_PROFILE.format(kernel)) for word in words
    ]
    metadata = f"bigtime=0,inobtcount=0,rmapbt=0,uuid={identity}"
    return ["mkfs.xfs", "-f", "-q", "-m", metadata, *options, "-L", label, device]


def devices_of(device: str, kind: str) -> Collection[str]:
    """Return the devices on this disk that the filesystem on `device` uses: a btrfs may have several."""
    return (btrfs.devices(device) if kind == "btrfs" else {}) or {device}


FILESYSTEMS = {
    "ext2": _ext("ext2", _EXT2),
    "ext3": _ext("ext3", _EXT3, look_data="noload"),
    "ext4": _ext("ext4", _EXT4, look_data="noload"),
    "xfs": Filesystem(
        _make_xfs,
        superblock.of_xfs,
        grow=lambda device: ["xfs_growfs", "-d"],
        size=superblock.xfs_size,
        grub="xfs",
        repair="xfs_repair",
        # mkfs.xfs sets the device's block size, which takes that; there is nothing of a stranger's for it to read
        make_capabilities=(linux.CAP_SYS_ADMIN,),
        smallest=300 * MIB,  # mkfs.xfs refuses less since 5.19
        boot="ext4",
        check_pass=False,
        forced="nouuid",  # a clone of a guest that is mounted may be mounted too
        look_data="norecovery",
    ),
    "btrfs": Filesystem(
        btrfs.make,
        superblock.of_btrfs,
        grow=btrfs.grow,
        size=superblock.btrfs_size,
        grub="btrfs",
        repair="btrfs check",
        make_options=btrfs.make_options,
        smallest=128 * MIB,
        boot="ext4",
        check_pass=False,
        forced="skip_balance",  # what the guest had begun would go on for hours
        look_data="rescue=nologreplay",
        subvolumes=("subvol=@", "subvol=@rootfs", "subvol=root"),  # Ubuntu and others, Debian's installer, Fedora
        alone=btrfs.alone,
        writable=btrfs.writable,
        mount=btrfs.mount,
        smallest_grown=256 * MIB,  # fs/btrfs/ioctl.c
    ),
}


class Volume(NamedTuple):
    """A filesystem (of a btrfs: one subvolume) or swap of the guest, as we made or found it."""

    role: str  # esp, boot, swap, root, usr or var; member: another device of one of them; data for any other
    kind: str  # vfat, swap or a key of FILESYSTEMS
    device: str
    uuid: str
    mount_point: str = ""  # in the guest; empty: we do not mount it
    options: str = ""  # what it takes to find it inside its filesystem: `subvol=@home`


def plan_layout(settings: Settings, disk_size: int, has_boot: bool) -> Layout:
    """Return the partitions that `settings`, resolved, ask for; `has_boot`: a boot loader of the guest's starts it."""
    return layout.plan(
        settings.partition_table,
        disk_size,
        boot=(settings.boot_size or 0) * MIB if has_boot else 0,
        swap=(settings.swap_size or 0) * MIB if settings.swap else 0,
        arch=settings.arch,
        smallest_root=FILESYSTEMS[settings.filesystem].smallest,
    )


def plan_volumes(planned: Layout, kind: str, node: Callable[[int], str]) -> list[Volume]:
    """Return what goes onto each partition of `planned`; `node` gives the device of a partition's number."""
    kinds = {"esp": "vfat", "boot": FILESYSTEMS[kind].boot or kind, "swap": "swap", "root": kind}
    return [
        Volume(part.role, kinds[part.role], node(part.number), _new_uuid(kinds[part.role]), MADE.get(part.role, ""))
        for part in planned.partitions
        if part.role in kinds
    ]


def programs(planned: Layout, kind: str) -> list[str]:
    return ["sfdisk", *(make_command(volume)[0] for volume in plan_volumes(planned, kind, str))]


def make(volumes: Iterable[Volume]) -> None:
    """Put a fresh filesystem (or swap) on every volume, on all at once."""
    with ExitStack() as stack:
        ends = []
        for volume in volumes:
            program, *words = make_command(volume)
            filesystem = FILESYSTEMS.get(volume.kind)
            options, capabilities = (
                (filesystem.make_options(), filesystem.make_capabilities) if filesystem else ([], ())
            )
            room = Room([volume.device], capabilities=capabilities, memory=RLIM_INFINITY)
            ends.append(stack.enter_context(output_of(Command([program, *options, *words], room)))[1])
        for finish in ends:
            finish()


def make_command(volume: Volume) -> list[str]:
    if volume.kind == "vfat":
        return ["mkfs.vfat", "-F", "32", "-n", "ESP", "-i", volume.uuid.replace("-", ""), volume.device]
    if volume.kind == "swap":
        return ["mkswap", "--uuid", volume.uuid, volume.device]
    return FILESYSTEMS[volume.kind].make(volume.device, volume.uuid, MADE[volume.role])


def _new_uuid(kind: str) -> str:
    unique = str(uuid.uuid4())
    return re.sub(r"^(....)(....).*", r"\1-\2", unique).upper() if kind == "vfat" else unique
