"""The list of mounts, /proc/self/mountinfo (proc(5)), as values; and the directory where mount-disks mounts."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from imageos.node import linux


class Mount(NamedTuple):
    path: str
    source: str  # not to be trusted: with FUSE, any user can mount under the name of a device
    kind: str
    number: int  # st_dev of its files
    identity: int = 0  # number of this mount, unique among the current ones
    parent: int = 0  # identity of the mount around it

    @property
    def instance(self) -> str:
        """The instance whose mount point contains this mount; empty if none. Any user can mount there."""
        match = re.match(r"/tmp/([A-Za-z0-9][A-Za-z0-9._-]*)_root(/|$)", self.path)
        return match[1] if match else ""


def mount_point(instance: str) -> str:
    """Return the directory where mount-disks mounts the guest's root."""
    return f"/tmp/{instance}_root"


def open_mount_point(path: str, flags: int = os.O_RDONLY) -> int:
    """Open the directory at `path` if it is as mount-disks makes it and nothing is mounted there; else OSError.

    Anybody can write to /tmp. Do not ask a user's filesystem (FUSE): it could lie about its owner, or never answer.
    """
    top, name = os.path.split(path)
    with linux.closing(os.open(top, os.O_PATH | os.O_DIRECTORY)) as parent:
        try:
            resolve = linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV
            directory = linux.open_in_root(parent, name, flags | os.O_DIRECTORY, resolve=resolve)
        except OSError as error:
            why = "something is mounted there" if error.errno == errno.EXDEV else error.strerror
            raise OSError(error.errno, why) from None
    status = os.fstat(directory)
    if status.st_uid != 0 or stat.S_IMODE(status.st_mode) != 0o700:
        os.close(directory)
        raise OSError(errno.EEXIST, "it exists, and mount-disks has not made it")
    return directory


def remove_mount_point(path: str) -> None:
    """Remove it if it is ours; OSError if it is in use. Nobody but root can replace it meanwhile (/tmp is sticky)."""
    try:
        os.close(open_mount_point(path, os.O_PATH))
    except OSError:
        return
    os.rmdir(path)


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """Open an absolute path without following links: a directory above may be a user's, who can put one there."""
    with linux.closing(os.open("/", os.O_PATH | os.O_DIRECTORY)) as root:
        descriptor = linux.open_in_root(root, path, flags, resolve=linux.RESOLVE_NO_SYMLINKS)
    with linux.closing(descriptor):
        yield descriptor


def current(mountinfo: str = "/proc/self/mountinfo") -> list[Mount]:
    """Return all mounts of this mount namespace, oldest first."""
    # newline: a path may contain a carriage return, which the kernel does not escape
    with open(mountinfo, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse(file.read())


def block_device(mount: Mount) -> int:
    """Return the number of the block device of a mounted filesystem; 0 if it has none."""
    if mount.kind == "btrfs":  # st_dev of its files is no device; users cannot mount it, so the source is right
        try:
            return os.stat(mount.source).st_rdev
        except OSError:
            return 0
    return mount.number if os.major(mount.number) else 0


def identity_of(descriptor: int) -> int:
    """Return the identity of the mount of an open file."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        return int(dict(line.split(":", 1) for line in file)["mnt_id"])


def parse(text: str) -> list[Mount]:
    return [_mount(line) for line in text.split("\n") if line]


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    identity, parent, number, _, path, *_ = before.split(" ")
    kind, source, *_ = after.split(" ")
    major, minor = number.split(":")
    device = os.makedev(int(major), int(minor))
    return Mount(unescape(path), unescape(source), kind, device, int(identity), int(parent))


def unescape(text: str) -> str:
    """Decode a field of mountinfo or fstab(5), where blanks and backslashes are octal."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
