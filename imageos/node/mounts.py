"""What is mounted, as the kernel tells it: /proc/self/mountinfo (proc(5)) as values."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mount:
    place: str
    source: str  # a name: any user gives what he mounts (FUSE) the name of a device
    kind: str
    number: int  # as st_dev of what is in it

    @property
    def instance(self) -> str:
        """The instance at whose mount point, or below it, this is; empty if it is none's. Anybody can mount there."""
        match = re.match(r"/tmp/([A-Za-z0-9][A-Za-z0-9._-]*)_root(/|$)", self.place)
        return match[1] if match else ""


def mount_point(instance: str) -> str:
    """Where mount-disks mounts the root of an instance's guest."""
    return f"/tmp/{instance}_root"


def current(mountinfo: str = "/proc/self/mountinfo") -> list[Mount]:
    """All mounts of this mount namespace, in the order in which they were made."""
    # newline: the kernel does not escape a carriage return in a path, and it ends no line
    with open(mountinfo, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse(file.read())


def block_device(mount: Mount) -> int:
    """The number of the block device that a mounted filesystem is on; 0 if it is on none."""
    if mount.kind == "btrfs":  # whose files have a number of their own; users cannot mount it
        try:
            return os.stat(mount.source).st_rdev
        except OSError:
            return 0
    return mount.number if os.major(mount.number) else 0


def parse(text: str) -> list[Mount]:
    return [_mount(line) for line in text.split("\n") if line]


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    _, _, number, _, place, *_ = before.split(" ")
    kind, source, *_ = after.split(" ")
    return Mount(unescape(place), unescape(source), kind, os.makedev(*(int(part) for part in number.split(":"))))


def unescape(text: str) -> str:
    """A field of mountinfo or fstab(5), in which blanks and backslashes are octal."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
