"""Whether restore(8) has made what the dump says, which its status does not tell.

Before 0.4b48 it drops attributes of directories, and leaves zeroes of what an inode itself holds (inline_data); 0.4b49
sets attributes before owners, and the kernel takes a file's capabilities when it gets a new owner. So every name in the
dump is looked at, and the attributes that are missing are set again.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from imageos import log
from imageos.errors import Failure
from imageos.guests import target
from imageos.guests.sandbox import GuestDisk
from imageos.guests.target import Target
from imageos.images.dumpfile import ACL_NAMED, FIXED, ROOT, Dump, Facts

GETFLAGS, SETFLAGS = 0x80086601, 0x40086602  # FS_IOC_*, linux/fs.h
SYMBOL_TABLE = "restoresymtable"  # restore's own, in the place of what may be called so
SHOWN = 5  # of what there may be thousands of


def complete(dump: Dump, directory: str) -> None:
    """Failure unless all of `dump` is in `directory`, where it was restored; lost attributes are set again."""
    with target.opened(directory, "", GuestDisk([], []), 0) as root:
        check = _Check(dump, root)
        check.visit_all()
    if check.mended:
        log.info(f"restore lost {len(check.mended)} attributes, which are set now: {_some(check.mended)}")
    if check.lost:
        log.warning(f"image {dump.name}: {len(check.lost)} attributes cannot be kept: {_some(check.lost)}")


class _Check:
    def __init__(self, dump: Dump, root: Target) -> None:
        self._dump = dump
        self._root = root
        self._links: dict[int, int] = {}  # inodes that may have several names -> the one that was made
        self.mended: list[str] = []
        self.lost: list[str] = []

    def visit_all(self) -> None:
        left, directories, found = [("", ROOT)], {ROOT}, 0
        while left:
            path, directory = left.pop()
            with self._root.directory(path or "/") as place:
                if directory == ROOT:
                    found += self._visit("/", f"{place}/.", ROOT, self._dump.facts(ROOT))
                for name, number in self._dump.names(directory):
                    below, facts = f"{path}/{os.fsdecode(name)}", self._dump.facts(number)
                    found += self._visit(below, f"{place}/{os.fsdecode(name)}", number, facts)
                    if facts and stat.S_ISDIR(facts.mode):
                        if number in directories:
                            raise self._failure(below, "is a directory that has another name")
                        directories.add(number)
                        left.append((below, number))
        if found < len(self._dump):
            raise Failure(
                f"image {self._dump.name} is damaged or truncated: no directory names {len(self._dump) - found} files"
            )

    def _visit(self, path: str, place: str, number: int, facts: Facts | None) -> bool:
        """Look at what has a name; whether it is the first name of an inode."""
        if not facts:  # it was left out on purpose (chattr +d, dump -e)
            return False
        if path == f"/{SYMBOL_TABLE}":
            return facts.links == 1
        try:
            status = os.lstat(place)
        except OSError as error:
            raise self._failure(path, f"is missing ({error.strerror})") from None
        if facts.links > 1 and not stat.S_ISDIR(facts.mode):
            first = self._links.setdefault(number, -1)
            self._links[number] = status.st_ino
            if first not in (-1, status.st_ino):
                raise self._failure(path, "is not one with its other names")
            if first != -1:
                return False
        self._compare(path, number, facts, status)
        missing = [(name, value) for name, value in self._dump.attributes(number) if not _has(place, name, value)]
        if missing:
            self._mend(path, place, facts, missing)
        return True

    def _compare(self, path: str, number: int, facts: Facts, status: os.stat_result) -> None:
        kind = stat.S_IFMT(facts.mode)
        if stat.S_IFMT(status.st_mode) != kind:
            raise self._failure(path, "is of another kind")
        if kind == stat.S_IFREG and status.st_size != facts.size:
            raise self._failure(path, f"has {status.st_size} bytes, not {facts.size}")
        if (status.st_uid, status.st_gid) != (facts.uid, facts.gid):
            raise self._failure(path, f"belongs to {status.st_uid}:{status.st_gid}, not {facts.uid}:{facts.gid}")
        if kind != stat.S_IFLNK and status.st_mode != facts.mode:
            raise self._failure(path, f"has mode {status.st_mode:o}, not {facts.mode:o}")
        content = self._dump.inline.get(number)
        if content is not None and self._root.read_bytes(path, facts.size) != content:
            failure = self._failure(path, "has lost its content: restore before 0.4b48 cannot read inline_data")
            failure.hint = "use restore of Debian 13, or make a tarball instead of a dump"
            raise failure

    def _mend(self, path: str, place: str, facts: Facts, missing: Sequence[tuple[str, bytes]]) -> None:
        with _changeable(place, facts):
            for name, value in missing:
                try:
                    os.setxattr(place, name, value, follow_symlinks=False)
                    self.mended.append(f"{name} of {_shown(path)}")
                except OSError as error:
                    self.lost.append(f"{_shown(name)} of {_shown(path)} ({error.strerror})")

    def _failure(self, path: str, what: str) -> Failure:
        return Failure(f"image {self._dump.name} is damaged, or restore failed: {_shown(path)} {what}")


def _has(place: str, name: str, value: bytes) -> bool:
    if name.startswith("system.") and not name.startswith("system.posix_acl_"):
        return True  # inline_data, which is content
    try:
        found = os.getxattr(place, name, follow_symlinks=False)
    except OSError:
        return False
    return found == value or (name.startswith("system.posix_acl_") and _acl(found) == _acl(value))


def _acl(value: bytes) -> list[tuple[int, ...]]:
    """The entries of an ACL, without the numbers that mean nothing: xfs has others there than ext."""
    whole = value[4 : len(value) - (len(value) - 4) % 8]
    return [(tag, mode, number if tag in ACL_NAMED else 0) for tag, mode, number in struct.iter_unpack("<HHI", whole)]


@contextmanager
def _changeable(place: str, facts: Facts) -> Iterator[None]:
    """A file that is immutable or append-only is neither for a moment."""
    if not facts.flags & FIXED or not (stat.S_ISREG(facts.mode) or stat.S_ISDIR(facts.mode)):
        yield
        return
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = struct.unpack("l", fcntl.ioctl(descriptor, GETFLAGS, bytes(struct.calcsize("l"))))[0]
        fcntl.ioctl(descriptor, SETFLAGS, struct.pack("l", flags & ~FIXED))
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(descriptor)


def _shown(name: str) -> str:
    """On one line, whatever a stranger has named it."""
    return ascii(name)[1:-1]


def _some(things: Sequence[str]) -> str:
    more = f" and {len(things) - SHOWN} more" if len(things) > SHOWN else ""
    return ", ".join(things[:SHOWN]) + more
