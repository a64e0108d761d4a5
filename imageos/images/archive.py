"""Disk images in tar archives, as OVA files and clouds have them: find the one disk, and how to get at it."""

from __future__ import annotations

import re
from typing import NamedTuple

from imageos import log
from imageos.errors import Failure
from imageos.images import formats
from imageos.images.imagefile import Image, check_stages, compression_of, decompressor, exact, feed
from imageos.images.tarball import BLOCK, is_header
from imageos.node.confinement import Room
from imageos.node.linux import CAP_DAC_OVERRIDE
from imageos.node.programs import require
from imageos.run import Command

# Not what macOS puts beside each file, ._NAME
DISK = re.compile(r"(^|/)(?!\._)[^/]*\.(raw|img|qcow2?|vmdk|vdi|vhdx?|dd)(\.(gz|xz|bz2|zst|lz4))?$", re.IGNORECASE)
LIST = ["tar", "--list", "--verbose", "--numeric-owner", "--quoting-style=escape", "--full-time", "--file"]
# kind and mode, owner, size or numbers of a device, date, time, name
ENTRY = re.compile(r"(.)\S+ +\S+ +(\d{1,19})(?:,\d+)? \S+ \S+ (.+)")
FILE, DIRECTORY = "-", "d"  # kinds
MOST_MEMBERS = 1000  # an archive of more files is a system, not a disk


class Member(NamedTuple):
    kind: str
    name: str  # as tar escapes it; of a link, with its target
    size: int  # bytes


def is_archive(image: Image) -> bool:
    return is_header(image.start[:BLOCK])


def begins_with_disk(image: Image) -> bool:
    """Return whether the first file of an archive is a disk image: the name alone says nothing of /initrd.img."""
    header, content = image.start[:BLOCK], image.start[BLOCK:]
    name = DISK.search(header[:100].rstrip(b"\0").decode("latin-1"))
    if not (name and is_header(header)) or header[156:157] not in (b"0", b"\0"):  # no regular file
        return False
    if name[3]:
        return bool(compression_of(content))
    is_partitioned = content[510:512] == b"\x55\xaa"
    return is_partitioned or formats.recognise(lambda at, count: content[at : at + count], len(content)) is not None


def opened(image: Image, most: int | None = None) -> Image:
    """Return the one disk image in an archive as an image that has to be unpacked.

    Fail unless there is just one, or if all that is in the archive has more than `most` bytes.
    """
    if image.layers:
        raise Failure(f"image {image.path} is an archive in an archive", hint="take it out and deploy that")
    require("tar")
    disk = _only_disk(image, _members(image, most))
    tar = ["tar", "--extract", "--to-stdout", "--no-recursion", "--no-unquote", "--file=-", "--", _unescaped(disk.name)]
    inner = image._replace(layers=(tar,), known_size=disk.size)
    compression = compression_of(inner.start)
    if compression:
        log.info(f"{disk.name} in image {image.path} is compressed with {compression}")
        require(decompressor(compression)[0])
        inner = inner._replace(layers=(tar, decompressor(compression)), known_size=None)
    return inner._replace(path=f"{image.path}:{disk.name}")


def _members(image: Image, most: int | None) -> list[Member]:
    """Return all but the directories in an archive, all of which is read."""
    members: list[Member] = []

    def add(line: str) -> None:
        entry = ENTRY.fullmatch(line)
        if entry:
            size = int(entry[2]) if entry[1] == FILE else 0
            members.append(Member(entry[1], entry[3], size))
        if len(members) > MOST_MEMBERS:
            raise Failure(
                f"image {image.path} is an archive of many files, not of a disk", hint="set IMAGE_TYPE=tarball"
            )

        total = sum(member.size for member in members)
        if most is not None and total > most:  # at its first line, before all that is unpacked
            raise Failure(f"image {image.path} holds {exact(total)} or more, too much for the disk")

    # tar seeks in a file that it opens itself
    source, room = ("-", Room()) if image.stages else ("/proc/self/fd/0", Room(capabilities=[CAP_DAC_OVERRIDE]))
    check_stages(image, feed(image, Command([*LIST, source], room), "listing", on_line=add))
    return [member for member in members if member.kind != DIRECTORY]


def _only_disk(image: Image, members: list[Member]) -> Member:
    files = [member for member in members if member.kind == FILE]
    disks = [member for member in files if DISK.search(member.name)]
    if not disks and len(members) == 1:
        disks = files
    if len(disks) == 1:
        return disks[0]
    listed = ", ".join(f"{member.name} ({log.size(member.size)})" for member in (disks or members)[:8])
    if disks:
        raise Failure(
            f"image {image.path} holds {len(disks)} disk images: {listed}",
            hint=f"take out the one to be deployed: tar --extract --file {image.path} NAME",
        )
    raise Failure(
        f"image {image.path} is an archive without a disk image: it holds {listed or 'no file'}",
        hint="set IMAGE_TYPE=tarball if it holds the files of a system",
    )


def _unescaped(name: str) -> str:
    """Undo what tar does to a name that it lists: \\\\n for a newline, \\\\ooo for a byte in octal."""
    plain = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}

    def byte(match: re.Match[bytes]) -> bytes:
        word = match[1].decode("ascii")
        return bytes([plain[word] if word in plain else int(word, 8) & 0xFF])

    data = name.encode("utf-8", "surrogateescape")
    return re.sub(rb"\\([abfnrtv\\]|[0-7]{3})", byte, data).decode("utf-8", "surrogateescape")
