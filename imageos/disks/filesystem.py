"""Filesystems: made, mounted, described in an fstab."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from resource import RLIM_INFINITY

from imageos import log
from imageos.disks import superblock
from imageos.disks.layout import MIB, Layout
from imageos.errors import Failure
from imageos.node import linux, mounts
from imageos.node.confinement import Room
from imageos.run import output_of, run

# Spelt out from `none`, so that the guest gets the same on every node, and nothing that an older kernel,
# e2fsck or GRUB cannot read: mke2fs 1.47 would add metadata_csum_seed and orphan_file.
_EXT2 = "none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
_EXT3 = _EXT2 + ",has_journal"
_EXT4 = _EXT3 + ",extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize"
# mke2fs before 1.46.4 takes 128 for a small filesystem, as /boot is one, whose times end in 2038.
_INODE_SIZE = "256"
# What came with which xfsprogs; a profile that it ships (not used itself: that of 6.1 has a syntax error) tells
# whether it knows the option. Off, Linux 5.10 (Debian 11) and the GRUB of that time can read the filesystem.
_XFS_PROFILE = "/usr/share/xfsprogs/mkfs/lts_{}.conf"
_XFS_OFF = {"6.1": ("-i", "nrext64=0"), "6.12": ("-i", "exchange=0", "-n", "parent=0")}


@dataclass(frozen=True)
class Filesystem:
    """How one type of filesystem is made and mounted."""

    make: Callable[[str, str, str], list[str]]  # device, UUID, label -> command
    smallest: int = 16 * MIB  # bytes of the smallest partition that it makes sense on
    root_options: str = "defaults"  # in the fstab
    check_pass: bool = True  # whether the guest's fsck looks at it at boot
    # Options of every mount of ours, which overrule what the guest's superblock says
    forced: str = ""
    look_data: str = ""  # to read it without replaying its journal, which would write


def _make_ext(kind: str, features: str) -> Callable[[str, str, str], list[str]]:
    return lambda device, identity, label: [
        f"mkfs.{kind}",
        "-F",
        "-q",
        "-O",
        features,
        "-I",
        _INODE_SIZE,
        "-U",
        identity,
        "-L",
        label,
        device,
    ]


def _make_xfs(device: str, identity: str, label: str) -> list[str]:
    known = [
        word for kernel, words in _XFS_OFF.items() if os.path.exists(_XFS_PROFILE.format(kernel)) for word in words
    ]
    metadata = f"bigtime=0,inobtcount=0,rmapbt=0,uuid={identity}"
    return ["mkfs.xfs", "-f", "-q", "-m", metadata, *known, "-L", label, device]


def _make_btrfs(device: str, identity: str, label: str) -> list[str]:
    return ["mkfs.btrfs", "-f", "-q", "-U", identity, "-L", label, device]


def _btrfs_off() -> list[str]:
    """What mkfs.btrfs makes since 6.19 and Linux before 6.1 cannot write. An older one refuses the name."""
    known: list[str] = []
    run(["mkfs.btrfs", "-O", "list-all"], on_line=known.append)
    return ["-O", "^block-group-tree"] if any(line.startswith("block-group-tree ") for line in known) else []


_ON_ERROR = "errors=remount-ro"  # errors=panic, in the superblock, would be the node's panic
FILESYSTEMS = {
    "ext2": Filesystem(_make_ext("ext2", _EXT2), root_options=_ON_ERROR, forced=_ON_ERROR),
    "ext3": Filesystem(_make_ext("ext3", _EXT3), root_options=_ON_ERROR, forced=_ON_ERROR, look_data="noload"),
    "ext4": Filesystem(_make_ext("ext4", _EXT4), root_options=_ON_ERROR, forced=_ON_ERROR, look_data="noload"),
    # 300 MB: mkfs.xfs refuses less since 5.19. nouuid: a clone of a guest that is mounted may be mounted too.
    "xfs": Filesystem(_make_xfs, smallest=300 * MIB, check_pass=False, forced="nouuid", look_data="norecovery"),
    # skip_balance: what the guest had begun would go on for hours
    "btrfs": Filesystem(
        _make_btrfs, smallest=128 * MIB, check_pass=False, forced="skip_balance", look_data="rescue=nologreplay"
    ),
}
WRITE_BACK = ("sync",)  # the programs that `writing_back` takes
TWIN_PATIENCE = 300.0  # seconds that another instance of the same image may take


class MountedTwice(Failure):
    """The kernel cannot tell this filesystem from one that is mounted already."""


@dataclass(frozen=True)
class Volume:
    """A filesystem (of a btrfs: one subvolume) or swap of the guest, as we made or found it."""

    role: str  # esp, boot, swap, root, usr or var; data for any other
    kind: str  # vfat, swap or a key of FILESYSTEMS
    device: str
    uuid: str
    mount_point: str = ""  # in the guest; empty: we do not mount it
    options: str = ""  # what it takes to find it inside its filesystem: `subvol=@home`


def plan_volumes(layout: Layout, kind: str, node: Callable[[int], str]) -> list[Volume]:
    """What goes onto each partition of `layout`; `node` gives the device of a partition's number.

    /boot has the root's type, but ext4 where that is xfs or btrfs: too large for a small partition, and
    not readable by every GRUB.
    """
    boot_kind = kind if kind.startswith("ext") else "ext4"
    kinds = {"esp": "vfat", "boot": boot_kind, "swap": "swap", "root": kind}
    places = {"root": "/", "boot": "/boot"}
    return [
        Volume(part.role, kinds[part.role], node(part.number), _new_uuid(kinds[part.role]), places.get(part.role, ""))
        for part in layout.partitions
        if part.role in kinds
    ]


def programs(layout: Layout, kind: str) -> list[str]:
    """The programs that making the volumes of `layout` takes."""
    return ["sfdisk", *(make_command(volume)[0] for volume in plan_volumes(layout, kind, str))]


def make(volumes: Iterable[Volume]) -> None:
    """Put a fresh filesystem (or swap) on every volume."""
    for volume in volumes:
        program, *words = make_command(volume)
        options = _btrfs_off() if volume.kind == "btrfs" else []
        # mkfs.xfs sets the device's block size, which takes that; there is nothing of a stranger's for it to read
        capabilities = [linux.CAP_SYS_ADMIN] if volume.kind == "xfs" else []
        room = Room([volume.device], capabilities=capabilities, memory=RLIM_INFINITY)
        run([program, *options, *words], room=room)


def make_command(volume: Volume) -> list[str]:
    if volume.kind == "vfat":
        return ["mkfs.vfat", "-F", "32", "-n", "ESP", "-i", volume.uuid.replace("-", ""), volume.device]
    if volume.kind == "swap":
        return ["mkswap", "--uuid", volume.uuid, volume.device]
    label = {"root": "/", "boot": "/boot"}[volume.role]
    return FILESYSTEMS[volume.kind].make(volume.device, volume.uuid, label)


class NotWritten(Failure):
    """What has been written to a filesystem is not all on its device."""


@contextmanager
def mounted(device: str, path: str, kind: str, read_only: bool = False, options: str = "") -> Iterator[None]:
    """Mount `device`; what the guest's filesystem holds gets no power on the node (nosuid, nodev).

    Mounted `read_only`, nothing is written to it, not even by a journal that wants to be replayed.
    """
    flags = linux.MS_NOSUID | linux.MS_NODEV | (linux.MS_RDONLY if read_only else 0)
    looking = FILESYSTEMS[kind].look_data if read_only else ""
    data = ",".join(filter(None, [options, looking, FILESYSTEMS[kind].forced]))  # the last one counts
    _check_superblock(device, kind, writable=not read_only)
    with nullcontext() if read_only else _written(device, device, os.fsync):  # the metadata, after unmounting
        if kind == "btrfs":
            _mount_btrfs(device, path, flags, data)
        else:
            _mount(device, path, kind, flags, data)
        try:
            with nullcontext() if read_only else _written(device, path, linux.sync_filesystem):
                yield
        except BaseException as failure:
            # What was written is lost anyway: writing it back would only delay the end, by minutes on a slow disk.
            if not (read_only or isinstance(failure, NotWritten)):
                with suppress(OSError):
                    linux.shut_down_filesystem(path)
            try:
                _unmount(path, device, kind)
            except Failure as another:
                log.warning(str(another))  # the last line belongs to the real cause
            raise
        _unmount(path, device, kind)


@contextmanager
def _written(device: str, path: str, sync: Callable[[int], None]) -> Iterator[None]:
    """What `sync` of `path` sees to is on the device in the end; umount(2) does not tell.

    `path` is open from the beginning, since some kernels forget an error with the last who has it open.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield
        except NotWritten:  # of another filesystem of the guest: this one may be well
            with suppress(OSError):
                sync(descriptor)
            raise
        try:
            sync(descriptor)
        except OSError as error:
            raise NotWritten(f"cannot write everything to {device}: {error.strerror}") from None
    finally:
        os.close(descriptor)


@contextmanager
def mounted_somewhere(device: str, kind: str, read_only: bool = False, options: str = "") -> Iterator[str]:
    """As `mounted`, at a place of its own, which is given."""
    directory = tempfile.mkdtemp(prefix="mount.", dir=os.environ.get("TMPDIR"))
    try:
        with mounted(device, directory, kind, read_only, options):
            yield directory
    finally:
        with suppress(OSError):  # still mounted: that is being reported
            os.rmdir(directory)


@contextmanager
def alone(directory: str) -> Iterator[str]:
    """The filesystem at `directory` without what is mounted below it, at a place that is given."""
    place = tempfile.mkdtemp(prefix="alone.", dir=os.environ.get("TMPDIR"))
    try:
        linux.mount(directory, place, None, linux.MS_BIND)
        try:
            yield place
        finally:
            linux.umount(place)
    finally:
        os.rmdir(place)


def mount_all(stack: ExitStack, volumes: Iterable[Volume], top: str, read_only: bool = False) -> None:
    """Mount the volumes of a guest, its root at `top`, until `stack` is left."""
    for volume in sorted(volumes, key=lambda one: one.mount_point):
        if not volume.mount_point:
            continue
        try:
            place = top if volume.mount_point == "/" else _inside(top, volume.mount_point, make=not read_only)
            stack.enter_context(mounted(volume.device, place, volume.kind, read_only, volume.options))
        except Failure as failure:
            if volume.role != "data":
                raise
            log.warning(f"the guest's {volume.mount_point} is left out: {failure}")


@contextmanager
def writing_back(path: str) -> Iterator[None]:
    """While this lasts, what has been written below `path` so far goes to the disk; `mounted` sees to the rest.

    Programs of the guest keep a processor busy (ssh-keygen, update-grub) while the disk would have nothing to do.
    """
    with output_of([["sync", "--file-system", "."]], room=Room(work=path)) as (_, finish):
        try:
            yield
            finish()  # it may have been told of an error of which nobody else will be
        except BaseException:
            with suppress(OSError):
                linux.shut_down_filesystem(path)  # nobody waits for what is lost anyway
            raise


def trim(path: str) -> None:
    """Have the device below the mounted filesystem drop the free blocks, if both can do that."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        linux.trim(directory)
    except OSError as error:
        log.debug(f"free blocks of {path} are kept: {error.strerror}")
    finally:
        os.close(directory)


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


def _check_superblock(device: str, kind: str, writable: bool) -> None:
    with open(device, "rb") as file:
        reason = superblock.objection(lambda offset, count: os.pread(file.fileno(), count, offset), kind, writable)
    if reason:
        raise Failure(
            f"cannot mount {device} as {kind}: {reason}",
            hint="correct that in the guest or the image; NOMOUNT=yes deploys a disk image without looking into it",
        )


def _unmount(path: str, device: str, kind: str) -> None:
    try:
        linux.umount(path)
    except OSError as error:
        raise Failure(f"cannot unmount {device}: {error.strerror}") from None
    if kind == "btrfs":
        linux.forget_btrfs(device)


def _inside(top: str, path: str, make: bool) -> str:
    """The node's path of the guest's directory `path`, to which no link of the guest's leads astray."""
    root = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if make:
            _make_directory(root, path)
        found = _real_path(root, path)
        if found == _real_path(root, "/"):
            raise Failure(f"the guest's {path} is its root directory: nothing can be mounted there")
        return found
    except OSError as error:
        raise Failure(f"the guest's {path}: nothing can be mounted there: {error.strerror}") from None
    finally:
        os.close(root)


def _make_directory(root: int, path: str) -> None:
    parent = linux.open_in_root(root, os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        os.mkdir(os.path.basename(path), 0o755, dir_fd=parent)
    except FileExistsError:
        pass
    finally:
        os.close(parent)


def _real_path(root: int, path: str) -> str:
    descriptor = linux.open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _mount(device: str, path: str, kind: str, flags: int, data: str) -> None:
    try:
        linux.mount(device, path, kind, flags, data)
    except OSError as error:
        unknown = error.errno == errno.ENODEV
        raise Failure(
            f"cannot mount {device} as {kind}: {error.strerror}",
            hint=f"this kernel has no {kind}: modprobe {kind}" if unknown else None,
        ) from None


def _mount_btrfs(device: str, path: str, flags: int, data: str) -> None:
    """Mount it when no other device with its UUID is mounted: the kernel would refuse, or show us that one.

    Another instance of the same image is waited for; what a user has mounted is not.
    """
    deadline = time.monotonic() + TWIN_PATIENCE
    waiting = False
    while True:
        twin = _mounted_twin(device)
        if not twin:
            try:
                linux.mount(device, path, "btrfs", flags, data)
            except OSError as error:
                if error.errno != errno.EEXIST or time.monotonic() > deadline:
                    _mount(device, path, "btrfs", flags, data)  # and say why not
                    return
            else:
                if not _mounted_twin(device):
                    return
                _unmount(path, device, "btrfs")  # another process was quicker
        elif time.monotonic() > deadline or twin in _mounted_by_users():
            raise MountedTwice(
                f"cannot mount {device}: a btrfs with the same UUID is mounted from /dev/{twin}",
                hint="unmount that one, or wait until the other instance of this image is done",
            )
        if not waiting:
            log.info("waiting for another instance of this image: its btrfs is mounted")
            waiting = True
        time.sleep(0.05)


def _mounted_by_users() -> list[str]:
    """The names of the devices of what is mounted where everybody sees it, not by a command like this one."""
    return [os.path.basename(mount.source) for mount in mounts.current() if mount.kind == "btrfs"]


def _mounted_twin(device: str) -> str:
    """The name of another device with this btrfs's UUID that the kernel has mounted; empty if there is none."""
    with open(device, "rb") as file:
        fsid = uuid.UUID(bytes=superblock.btrfs_id(lambda offset, count: os.pread(file.fileno(), count, offset)))
    try:
        names = os.listdir(f"/sys/fs/btrfs/{fsid}/devices")
    except FileNotFoundError:
        return ""
    return next((name for name in names if name != os.path.basename(device)), "")
