"""Tarballs: a tree of files that becomes the guest's root."""

from __future__ import annotations

import os
import re

from imageos import log
from imageos.errors import Failure
from imageos.images.imagefile import Image, check_stages, feed, is_full, too_large
from imageos.node.confinement import Room, unpacking
from imageos.node.programs import require
from imageos.run import Command

SUFFIXES = (".tar.gz", ".tar", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")
BLOCK = 512  # bytes of a tar header
LIST = ["tar", "--list", "--quoting-style=escape", "--file=-"]
# What is at the top of a system; a tarball that begins with something else is listed
TOP = {"bin", "boot", "dev", "etc", "home", "lib", "lib64", "media", "mnt", "opt", "proc", "root", "run", "sbin", "srv"}
TOP |= {"sys", "tmp", "usr", "var"}
MOST_TOPS = 100
EXTENSIONS = (b"x", b"g", b"L", b"K")  # kinds of headers that say more of the next one
LEFT_OUT = re.compile(
    r"^tar: setxattrat: Cannot set '((?:trusted|security)\.[^']{1,60})' extended attribute", re.MULTILINE
)


def check(image: Image) -> None:
    """Look at the beginning of a tarball: Failure unless it is one that this node can unpack."""
    require("tar", *image.decompress[:1])
    if not is_header(image.start[:BLOCK]):
        raise Failure(f"image {image.path} is not a tarball, or damaged at its beginning")
    if image.whole and not _tops(image.start) & TOP:
        _check_tops(image)


def _tops(start: bytes) -> set[str]:
    """Return the names at the top of a tarball that begins so."""
    names, offset = set(), 0
    while is_header(header := start[offset : offset + BLOCK]):
        if header[156:157] not in EXTENSIONS:
            prefix = header[345:500] + b"/" if header.startswith(b"ustar\0", 257) and header[345:346] != b"\0" else b""
            names.add(_top((prefix.replace(b"\0", b"") + header[:100].partition(b"\0")[0]).decode("latin-1")))
        offset += BLOCK + -(-max(0, octal(header[124:136])) // BLOCK) * BLOCK
    return names


def _top(path: str) -> str:
    return next((name for name in path.split("/") if name not in ("", ".")), "")


def _check_tops(image: Image) -> None:
    """Fail unless all of a tarball, which does not begin as the root of a system, has /etc."""
    names: dict[str, None] = {}  # in their order

    def add(line: str) -> None:
        if len(names) < MOST_TOPS or line.startswith(("etc/", "./etc/")):
            names[_top(line)] = None

    check_stages(image, feed(image, Command(LIST, Room()), "listing", on_line=add))
    if "etc" not in names:
        raise Failure(
            f"image {image.path} holds no Linux system: it has no /etc, but {log.few(list(filter(None, names)))}",
            hint="make it from within the system's root (tar --create ... -C ROOT .); of a container: docker export",
        )


def deploy(image: Image, directory: str) -> None:
    """Unpack a tarball with everything it holds: owners by number, modes, ACLs, attributes, sparse files."""
    tar = [
        "tar", "--extract", "--file=-", "--numeric-owner", "--same-owner",
        "--preserve-permissions", "--acls", "--xattrs", "--xattrs-include=*", "--warning=no-timestamp",
        # 64 KiB at once instead of 10: a sixth of the time
        "--read-full-records", "--blocking-factor=128",
    ]  # fmt: skip
    finished = feed(image, Command(tar, unpacking(directory)), "unpacking")
    if finished[-1].status:
        full = [path for path in (directory, f"{directory}/boot") if os.path.ismount(path) and is_full(path)]
        if full or "No space left" in finished[-1].stderr:
            raise too_large(image, (full or [directory])[0])
    check_stages(image, finished)
    left_out = sorted(set(LEFT_OUT.findall(finished[-1].stderr)))
    if left_out:
        what = f"image {image.path}: attributes that the node's kernel gives to nobody but root are left out"
        log.warning(f"{what}: {log.few(left_out, 10)}")


def is_header(block: bytes) -> bool:
    """Return whether a tar header (POSIX.1-2017, ustar) has the right checksum; unsigned or, in old ones, signed."""
    checksum = octal(block[148:156]) if len(block) >= BLOCK else -1
    summed = block[:148] + b" " * 8 + block[156:BLOCK]
    return checksum >= 0 and checksum in (sum(summed), sum(byte - 256 if byte > 127 else byte for byte in summed))


def octal(field: bytes) -> int:
    """Return the number in a field of a tar header; -1 if there is none."""
    if field[:1] >= b"\x80":  # GNU tar: in base 256, where it would be too long
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
