"""Btrfs: its devices on the instance's disk, and what keeps the kernel from taking those of another for them."""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from imageos import log
from imageos.disks import blockdev, superblock
from imageos.disks.superblock import BtrfsDevice
from imageos.errors import Failure, explained
from imageos.node import linux, mounts
from imageos.run import Command, run

OLDEST_LINUX = (5, 10)  # of a guest
SUBVOLUME = 256  # the inode of the top of each (BTRFS_FIRST_FREE_OBJECTID)
NAME = re.compile(r"[\w@+-][\w.@+-]{0,63}", re.ASCII)  # of a subvolume that may be a root; no comma, no hidden snapshot
MOST_NAMES, MOST_SUBVOLUMES = 256, 32  # that are looked at, in one directory and of all
TWIN_PATIENCE = 300.0  # seconds that another instance of the same image may take


class MountedTwice(Failure):
    """The kernel cannot tell this filesystem from one that is mounted already."""


def make(device: str, identity: str, label: str) -> list[str]:
    return ["mkfs.btrfs", "-f", "-q", "-U", identity, "-L", label, device]


def make_options() -> list[str]:
    """Turn off what this node's mkfs.btrfs makes by default and Linux 5.10 (Debian 11) cannot write.

    It lists what it knows, each with the kernel that it takes; it refuses other names.
    """
    features: list[str] = []
    run(Command(["mkfs.btrfs", "-O", "list-all"]), on_line=features.append)
    found = [re.match(r"(\S+) .*\(compat=(\d{1,9})\.(\d{1,9})\b.*default=", line) for line in features]
    too_new = [f"^{match[1]}" for match in found if match and (int(match[2]), int(match[3])) > OLDEST_LINUX]
    return ["-O", ",".join(too_new)] if too_new else []


def grow(device: str) -> list[str]:
    facts = blockdev.ask(device, superblock.btrfs_device)
    # without a number, the program means the first device that the filesystem ever had
    return ["btrfs", "filesystem", "resize", f"{facts.number}:max" if facts else "max"]


@contextmanager
def alone(device: str) -> Iterator[None]:
    """Meanwhile, the devices of this btrfs that the kernel knows are those on this disk.

    It finds them by UUID among all that it was ever shown, and takes instances of one image for the same filesystem:
    one process of ours after the other has this UUID.
    """
    own = devices(device)
    if not own:
        yield  # the kernel says what is wrong with it
        return
    identity = own[device].filesystem
    mounted = _mounted(identity)
    if mounted and mounted <= set(own):
        yield  # another subvolume of it is mounted by us, who have the disk
        return
    with explained(f"cannot mount {device} as btrfs: /dev/btrfs-control", "modprobe btrfs"):
        opened = os.open("/dev/btrfs-control", os.O_RDWR)
    with linux.closing(opened) as control:
        _await_turn(device, control, identity)
        try:
            _scan([*(name for name in own if name != device), device])
            yield
        finally:
            for other in own:
                linux.forget_btrfs(other)


def subvolumes(top: str) -> list[str]:
    """Return the paths of the subvolumes in a mounted btrfs, and in its directories; odd ones are left out."""
    found = []
    for name, is_subvolume in _directories(top):
        found += [name] if is_subvolume else []
        found += [f"{name}/{inner}" for inner, is_too in _directories(f"{top}/{name}") if is_too]
    return sorted(found, key=lambda path: (path.count("/"), path))[:MOST_SUBVOLUMES]


def _directories(path: str) -> list[tuple[str, bool]]:
    """Return the names of the directories in one, and whether each is a subvolume; those that nobody has left out."""
    with os.scandir(path) as entries:
        return [
            (entry.name, entry.stat(follow_symlinks=False).st_ino == SUBVOLUME)
            for entry in itertools.islice(entries, MOST_NAMES)
            if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]


def check_no_twin(identity: uuid.UUID) -> None:
    """Fail if a user has a btrfs with this UUID mounted: no command can then look into another one."""
    twins = _mounted(identity) & _mounted_by_users()
    if twins:
        raise MountedTwice(
            f"a btrfs with the same UUID is mounted from {min(twins)}", hint="unmount that one, or set NOMOUNT=yes"
        )


def _await_turn(device: str, control: int, identity: uuid.UUID) -> None:
    """Wait for other instances of the same image, but not for what a user has mounted."""
    deadline = time.monotonic() + TWIN_PATIENCE
    waiting = False
    while True:
        is_ours = linux.lock_btrfs(control, identity.int >> 66)
        twins = _mounted(identity)
        if is_ours and not twins:
            return
        if twins & _mounted_by_users() or time.monotonic() > deadline:
            raise MountedTwice(
                f"cannot mount {device}: a btrfs with the same UUID is mounted"
                + (f" from {min(twins)}" if twins else ", or was until now, by another process"),
                hint="unmount that one, or wait until the other instances of this image are done",
            )
        if not waiting:
            log.info("waiting for another instance of this image: its btrfs is mounted")
            waiting = True
        time.sleep(0.05)


def _scan(devices: Sequence[str], is_first: bool = True) -> None:
    """Show the kernel the devices of a btrfs that is not mounted."""
    for device in devices:
        try:
            linux.scan_btrfs(device)
        except OSError as error:
            if not (is_first and error.errno == errno.EEXIST):
                raise Failure(f"cannot use {device} as a part of its btrfs: {error.strerror}") from None
            # It keeps what was written last, even if that is gone, as after a command that was killed.
            log.info("the kernel forgets all btrfs devices that are not mounted: it knows others with the same UUID")
            linux.forget_btrfs("")
            _scan(devices, is_first=False)
            return


@contextmanager
def writable(path: str) -> Iterator[None]:
    """Meanwhile, a subvolume that is read-only is not: the root of a guest that is updated as a whole."""
    opened = linux.closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    with opened as directory, linux.writable_subvolume(directory) as was_read_only:
        if was_read_only:
            log.info("the guest's subvolume is read-only: it is changed all the same, and read-only again afterwards")
        yield


def mount(device: str, path: str, kind: str, flags: int, data: str) -> None:
    """Mount it if the kernel takes nothing but our devices for it.

    What a hostile one says of its devices, in its chunk tree, the kernel believes: it would write to any that it knows.
    So the first mount is one that does not write at all.
    """
    own = devices(device)
    identity = own[device].filesystem if own else uuid.UUID(int=0)  # without a device, mounting fails

    def mount(flags: int, data: str) -> None:
        linux.mount(device, path, kind, flags, data)
        others = _mounted(identity) - set(own)
        if others:
            linux.umount(path)
            raise MountedTwice(f"cannot mount {device}: the kernel takes {min(others)} for a part of its btrfs")

    if not _mounted(identity):
        mount(flags | linux.MS_RDONLY, "subvolid=5,rescue=nologreplay")
        linux.umount(path)
    mount(flags, data)


def devices(device: str) -> dict[str, BtrfsDevice]:
    """Return the devices of the btrfs on `device` that are on the same disk, and the seeds that it may be based on.

    Fail if there are too few of them: nobody may take the others from another disk.
    """
    asked = {name: blockdev.ask(name, superblock.btrfs_device) for name in blockdev.parts_beside(device)}
    found = {name: facts for name, facts in asked.items() if facts}
    if device not in found:
        return {}
    this = found[device]
    own = {device: this}
    for name, facts in found.items():
        is_clone = facts.filesystem == this.filesystem and facts.number in [other.number for other in own.values()]
        if (facts.filesystem == this.filesystem and this.devices > 1 and not is_clone) or facts.is_seed:
            own[name] = facts
    if len(own) < this.devices:
        raise Failure(
            f"cannot mount {device} as btrfs: {this.devices - len(own)} of the {this.devices} devices of its "
            "filesystem are not on this disk",
            hint="NOMOUNT=yes deploys a disk image, and leaves a disk, without looking into it",
        )
    return own


def _mounted(identity: uuid.UUID) -> set[str]:
    """Return the devices of the mounted btrfs with this UUID; none if there is none."""
    with suppress(FileNotFoundError):
        return {f"/dev/{name}" for name in os.listdir(f"/sys/fs/btrfs/{identity}/devices")}
    return set()


def _mounted_by_users() -> set[str]:
    """Return the devices that are mounted where everybody sees it, not by a command like this one."""
    return {mount.source for mount in mounts.current() if mount.kind == "btrfs"}
