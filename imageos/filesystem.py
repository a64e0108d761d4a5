"""Filesystems: made, mounted, described in an fstab."""

import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable

from imageos import linux, log
from imageos.errors import Failure
from imageos.layout import MIB, Layout
from imageos.run import run

# Spelt out from `none`, so that the guest gets the same on every node, and nothing that an older kernel,
# e2fsck or GRUB cannot read: mke2fs 1.47 would add metadata_csum_seed and orphan_file.
_EXT2 = "none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
_EXT3 = _EXT2 + ",has_journal"
_EXT4 = _EXT3 + ",extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize"
# xfsprogs ships what a given kernel can read; Linux 5.10 is Debian 11 and everything newer. Where it does
# not (before 5.15), its own defaults are older still.
_XFS_PROFILE = "/usr/share/xfsprogs/mkfs/lts_5.10.conf"


@dataclass(frozen=True)
class Filesystem:
    """How one type of filesystem is made and mounted."""

    make: Callable[[str, str, str], list[str]]  # device, UUID, label -> command
    smallest: int = 16 * MIB  # bytes of the smallest partition that it makes sense on
    root_options: str = "defaults"  # in the fstab
    check_pass: bool = True  # whether the guest's fsck looks at it at boot
    mount_data: str = ""


def _make_ext(kind: str, features: str) -> Callable[[str, str, str], list[str]]:
    return lambda device, identity, label: [
        f"mkfs.{kind}",
        "-F",
        "-q",
        "-O",
        features,
        "-U",
        identity,
        "-L",
        label,
        device,
    ]


def _make_xfs(device: str, identity: str, label: str) -> list[str]:
    profile = ["-c", f"options={_XFS_PROFILE}"] if os.path.exists(_XFS_PROFILE) else []
    return ["mkfs.xfs", "-f", "-q", *profile, "-m", f"uuid={identity}", "-L", label, device]


def _make_btrfs(device: str, identity: str, label: str) -> list[str]:
    return ["mkfs.btrfs", "-f", "-q", "-U", identity, "-L", label, device]


FILESYSTEMS = {
    "ext2": Filesystem(_make_ext("ext2", _EXT2), root_options="errors=remount-ro"),
    "ext3": Filesystem(_make_ext("ext3", _EXT3), root_options="errors=remount-ro"),
    "ext4": Filesystem(_make_ext("ext4", _EXT4), root_options="errors=remount-ro"),
    # 300 MB: mkfs.xfs refuses less since 5.19
    "xfs": Filesystem(_make_xfs, smallest=300 * MIB, check_pass=False, mount_data="nouuid"),
    "btrfs": Filesystem(_make_btrfs, smallest=128 * MIB, check_pass=False),
}


@dataclass(frozen=True)
class Volume:
    """A partition with its filesystem or swap, as we made it."""

    role: str  # esp, boot, swap or root
    kind: str  # vfat, swap or a key of FILESYSTEMS
    device: str
    uuid: str


def plan_volumes(layout: Layout, kind: str, node: Callable[[int], str]) -> list[Volume]:
    """What goes onto each partition of `layout`; `node` gives the device of a partition's number.

    /boot has the root's type, but ext4 where that is xfs or btrfs: too large for a small partition, and
    not readable by every GRUB.
    """
    boot_kind = kind if kind.startswith("ext") else "ext4"
    kinds = {"esp": "vfat", "boot": boot_kind, "swap": "swap", "root": kind}
    return [
        Volume(part.role, kinds[part.role], node(part.number), _new_uuid(kinds[part.role]))
        for part in layout.partitions
        if part.role in kinds
    ]


def programs(layout: Layout, kind: str) -> list[str]:
    """The programs that making the volumes of `layout` takes."""
    return ["sfdisk", *(make_command(volume)[0] for volume in plan_volumes(layout, kind, str))]


def make(volumes: Iterable[Volume]) -> None:
    """Put a fresh filesystem (or swap) on every volume."""
    for volume in volumes:
        run(make_command(volume))


def make_command(volume: Volume) -> list[str]:
    if volume.kind == "vfat":
        return ["mkfs.vfat", "-F", "32", "-n", "ESP", "-i", volume.uuid.replace("-", ""), volume.device]
    if volume.kind == "swap":
        return ["mkswap", "--uuid", volume.uuid, volume.device]
    label = {"root": "/", "boot": "/boot"}[volume.role]
    return FILESYSTEMS[volume.kind].make(volume.device, volume.uuid, label)


@contextmanager
def mounted(device: str, path: str, kind: str, read_only: bool = False) -> Iterator[None]:
    """Mount `device`; what the guest's filesystem holds gets no power on the node (nosuid, nodev)."""
    flags = linux.MS_NOSUID | linux.MS_NODEV | (linux.MS_RDONLY if read_only else 0)
    try:
        linux.mount(device, path, kind, flags, FILESYSTEMS[kind].mount_data)
    except OSError as error:
        unknown = error.errno == errno.ENODEV
        raise Failure(
            f"cannot mount {device} as {kind}: {error.strerror}",
            hint=f"this kernel has no {kind}: modprobe {kind}" if unknown else None,
        ) from None
    try:
        yield
    except BaseException:
        # What was written is lost anyway: writing it back would only delay the end, by minutes on a slow disk.
        if not read_only:
            _shut_down(path)
        try:
            _unmount(path, device)
        except Failure as failure:
            log.warning(str(failure))  # the last line belongs to the real cause
        raise
    _unmount(path, device)


def fstab(volumes: Iterable[Volume]) -> str:
    """The text of /etc/fstab for a guest that lives on `volumes`."""
    rows = [("# <filesystem>", "<mount point>", "<type>", "<options>", "<dump>", "<pass>")]
    order = ["root", "boot", "esp", "swap"]
    for volume in sorted(volumes, key=lambda one: order.index(one.role)):
        source = f"UUID={volume.uuid}"
        if volume.role == "swap":
            rows.append((source, "none", "swap", "sw", "0", "0"))
        elif volume.role == "esp":
            # nofail: a guest without a FAT driver still boots (from BIOS)
            rows.append((source, "/boot/efi", "vfat", "umask=0077,nofail", "0", "1"))
        else:
            filesystem = FILESYSTEMS[volume.kind]
            is_root = volume.role == "root"
            options = filesystem.root_options if is_root else "defaults"
            check = "0" if not filesystem.check_pass else "1" if is_root else "2"
            rows.append((source, "/" if is_root else "/boot", volume.kind, options, "0", check))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["".join(cell.ljust(width + 1) for cell, width in zip(row, widths)) + row[5] for row in rows]
    return "\n".join(["# /etc/fstab: written by imageos", *lines]) + "\n"


def _new_uuid(kind: str) -> str:
    unique = str(uuid.uuid4())
    return re.sub(r"^(....)(....).*", r"\1-\2", unique).upper() if kind == "vfat" else unique


def _shut_down(path: str) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        linux.shut_down_filesystem(directory)
    except OSError:
        pass  # btrfs cannot: it writes everything back
    finally:
        os.close(directory)


def _unmount(path: str, device: str) -> None:
    try:
        linux.umount(path)
    except OSError as error:
        raise Failure(f"cannot unmount {device}: {error.strerror}") from None
