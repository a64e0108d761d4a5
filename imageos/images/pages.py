"""Recognise what stands in the place of an image by mistake: web pages, messages as text, archives of other kinds."""

from __future__ import annotations

import re
from contextlib import suppress

BEGINNING = 1 << 10  # bytes that are looked at: a record of a dump
WEB_PAGE = re.compile(
    rb"\s*(<!--(?:(?!-->).)*-->\s*)*<(!doctype|html|head|body|title|meta|script|h1|\?xml)", re.IGNORECASE | re.DOTALL
)
MARKUP = re.compile(rb"\s*<[!?a-z]", re.IGNORECASE)
# No control characters but those of text. In what is packed or encrypted, 1 KiB without any does not occur.
TEXT = re.compile(rb"[\t-\r\x1b -~\x80-\xff]+")
# What else is handed out where one looks for an image; no disk that anything boots from begins so
MARKS = {
    b"PK\3\4": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\7": "a rar archive",
    b"070701": "a cpio archive",
    b"!<arch>\n": "an ar archive (a package of Debian)",
    b"\xed\xab\xee\xdb": "an RPM archive",
    b"MSCF": "a cab archive",
    b"MSWIM\0\0\0": "a WIM archive",
    b"VMA\0": "a VMA archive (a backup of Proxmox)",
    b"partclone-image": "a partclone archive",
    b"FsA0": "a fsarchiver archive",
    b"EVF\t\r\n\xff\0": "an EWF image (of EnCase)",
    b"AFF10\r\n\0": "an AFF image",
    b"xFSdump0": "a dump by xfsdump",
    b"btrfs-stream\0": "a stream of btrfs send",
    b"age-encryption.org/": "encrypted by age",
    b"Salted__": "encrypted by openssl",
    b"LZIP\1": "packed by lzip",
    b"LRZI": "packed by lrzip",
    b"\x89LZO\0\r\n\x1a\n": "packed by lzop",
    b"\x5d\0\0": "packed by lzma",
    b"\x1f\x9d": "packed by compress",
    b"\x3a\xff\x26\xed": "a sparse image of Android",
    b"\x27\5\x19\x56": "an image for U-Boot",
    b"\x7fELF": "a program",
}


def is_page(content: bytes) -> bool:
    """Return True for a web page, or another document of a web server in XML."""
    beginning = decoded(content[:BEGINNING])
    return bool(WEB_PAGE.match(beginning) or (MARKUP.match(beginning) and TEXT.fullmatch(beginning)))


def kind(content: bytes) -> str:
    """Return in words what `content`, which begins so, is instead of an image; empty if it may be one."""
    if is_page(content):
        return "a web page"
    beginning = decoded(content[:BEGINNING])
    if TEXT.fullmatch(beginning):
        return "text"
    return next((name for mark, name in MARKS.items() if beginning.startswith(mark)), "")


def decoded(content: bytes) -> bytes:
    """Return text as UTF-8 without a byte order mark, if it begins with one; anything else as it is."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        with suppress(UnicodeDecodeError):
            return content.decode("utf-16").encode()
    return content[3:] if content.startswith(b"\xef\xbb\xbf") else content
