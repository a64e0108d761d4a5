"""Compare the files that restore(8) made with the dump: its status does not report all differences.

Before 0.4b48 it drops attributes of directories, and leaves zeroes of what an inode itself holds (inline_data); 0.4b49
sets attributes before owners, and the kernel takes a file's capabilities when it gets a new owner. So every name in the
dump is looked at, and the attributes that are missing are set again.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from contextlib import ExitStack

from imageos import log
from imageos.errors import Failure
from imageos.guests import target
from imageos.guests.target import Directory, Target
from imageos.images.dumpfile import ACL_NAMED, FIXED, ROOT, Dump, Facts

SYMBOL_TABLE = "restoresymtable"  # restore's own, in the place of what may be called so
SHOWN = 5  # of what there may be thousands of


def complete(dump: Dump, directory: str) -> None:
    """Failure unless all of `dump` is in `directory`, where it was restored; lost attributes are set again."""
    with target.opened(directory) as root:
        check = _Check(dump, root)
        check.visit_all()
    if check.mended:
        log.info(f"restore lost {len(check.mended)} attributes, which are set now: {log.few(check.mended, SHOWN)}")
    if check.lost:
        log.warning(f"image {dump.name}: {len(check.lost)} attributes cannot be kept: {log.few(check.lost, SHOWN)}")


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
            with target.directory_of(self._root, path or "/") as place:
                if directory == ROOT:
                    found += self._visit(place, ".", "/", ROOT, self._dump.facts(ROOT))
                for entry, number in self._dump.names(directory):
                    name, facts = os.fsdecode(entry), self._dump.facts(number)
                    below = f"{path}/{name}"
                    found += self._visit(place, name, below, number, facts)
                    if facts and stat.S_ISDIR(facts.mode):
                        if number in directories:
                            raise self._failure(below, "is a directory that has another name")
                        directories.add(number)
                        left.append((below, number))
        lost = len(self._dump) - found - self._dump.nameless
        if lost > 0:
            raise Failure(f"image {self._dump.name} is damaged or truncated: no directory names {lost} of its files")

    def _visit(self, place: Directory, name: str, path: str, number: int, facts: Facts | None) -> bool:
        """Look at what has a name in a directory; whether it is the first name of an inode."""
        if not facts:  # it was left out on purpose (chattr +d, dump -e)
            return False
        if path == f"/{SYMBOL_TABLE}":
            return facts.links == 1
        try:
            status = place.status(name)
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
        attributes = self._dump.attributes(number)
        missing = [(key, value) for key, value in attributes if not _same(key, place.attribute(name, key), value)]
        if missing:
            self._mend(place, name, path, facts, missing)
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

    def _mend(self, place: Directory, name: str, path: str, facts: Facts, missing: Sequence[tuple[str, bytes]]) -> None:
        with ExitStack() as stack:
            if facts.flags & FIXED and (stat.S_ISREG(facts.mode) or stat.S_ISDIR(facts.mode)):
                stack.enter_context(place.changeable(name))
            for key, value in missing:
                try:
                    place.set_attribute(name, key, value)
                    self.mended.append(f"{key} of {path}")
                except OSError as error:
                    self.lost.append(f"{key} of {path} ({error.strerror})")

    def _failure(self, path: str, what: str) -> Failure:
        return Failure(f"image {self._dump.name} is damaged, or restore failed: {path} {what}")


def _same(key: str, found: bytes | None, value: bytes) -> bool:
    if key.startswith("system.posix_acl_"):
        return found is not None and _acl(found) == _acl(value)
    return found == value or key.startswith("system.")  # inline_data, which is content


def _acl(value: bytes) -> list[tuple[int, ...]]:
    """The entries of an ACL, without the numbers that mean nothing: xfs has others there than ext."""
    whole = value[4 : len(value) - (len(value) - 4) % 8]
    return [(tag, mode, number if tag in ACL_NAMED else 0) for tag, mode, number in struct.iter_unpack("<HHI", whole)]
