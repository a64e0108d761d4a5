"""Tarballs: a tree of files that becomes the guest's root."""

from __future__ import annotations

import os
import re

from imageos import log
from imageos.errors import Failure
from imageos.images.imagefile import Image, beginning, check_stages, feed, is_full, too_large
from imageos.node.confinement import unpacking
from imageos.run import require

SUFFIXES = (".tar.gz", ".tar", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")
BLOCK = 512  # bytes of a tar header
LEFT_OUT = re.compile(
    r"^tar: setxattrat: Cannot set '((?:trusted|security)\.[^']{1,60})' extended attribute", re.MULTILINE
)


def check(image: Image) -> None:
    """Look at the beginning of a tarball: Failure unless it is one that this node can unpack."""
    require("tar", *image.decompress[:1])
    block = beginning(image, BLOCK)
    if len(block) < BLOCK or not _is_header(block):
        raise Failure(f"image {image.path} is not a tarball, or damaged at its beginning")
    if not image.compression and os.pread(image.descriptor, 2 * BLOCK, max(0, image.size - 2 * BLOCK)).strip(b"\0"):
        raise Failure(f"image {image.path} is truncated: a tar archive ends with zeroes")


def deploy(image: Image, directory: str) -> None:
    """Unpack a tarball with everything it holds: owners by number, modes, ACLs, attributes, sparse files."""
    tar = [
        "tar", "--extract", "--file=-", "--numeric-owner", "--same-owner",
        "--preserve-permissions", "--acls", "--xattrs", "--xattrs-include=*", "--warning=no-timestamp",
        # 64 KiB at once instead of 10: a sixth of the time
        "--read-full-records", "--blocking-factor=128",
    ]  # fmt: skip
    finished = feed(image, tar, "unpacking", room=unpacking(directory))
    if finished[-1].status:
        full = [place for place in (directory, f"{directory}/boot") if os.path.ismount(place) and is_full(place)]
        if full or "No space left" in finished[-1].stderr:
            raise too_large(image, (full or [directory])[0])
    check_stages(image, finished)
    left_out = sorted(set(LEFT_OUT.findall(finished[-1].stderr)))
    if left_out:
        names = ", ".join(left_out[:10]) + (" ..." if left_out[10:] else "")
        log.warning(
            f"image {image.path}: attributes that the node's kernel gives to nobody but root are left out: {names}"
        )


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a tar header (POSIX.1-2017, ustar) is right; unsigned or, in old ones, signed."""
    try:
        expected = int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    summed = block[:148] + b" " * 8 + block[156:]
    return expected in (sum(summed), sum(byte - 256 if byte > 127 else byte for byte in summed))
