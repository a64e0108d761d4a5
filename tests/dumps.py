"""Make small dumps record by record, without dump(8) and a disk: like any version, or wrong on purpose."""

from __future__ import annotations

import bz2
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RECORD = 1024
TAPE, INODE, BITS, ADDR, END, CLRI = range(1, 7)
DIRECTORY, REGULAR, LINK = 0o040000, 0o100000, 0o120000
INLINE, ENCRYPTED = 0x10000000, 0x800


@dataclass(frozen=True)
class File:
    """An inode with its names: (number of the directory, name)."""

    number: int
    mode: int
    content: bytes = b""
    names: Sequence[tuple[int, bytes]] = ()
    owner: tuple[int, int] = (0, 0)
    attributes: Sequence[bytes] = ()
    flags: int = 0
    blocks: bytes = b""  # content of the inode's field for block numbers
    map: bytes | None = None  # instead of the usual map
    size: int | None = None  # instead of the true size


def header(kind: int, place: int, *, inode: int = 0, size: int = 0, mode: int = 0, links: int = 1, map: bytes = b"",
           mapped: int | None = None, flags: int = 2, extension: int = 0, owner: tuple[int, int] = (0, 0),
           inode_flags: int = 0, blocks: bytes = b"", volume: int = 1, level: int = 0) -> bytes:  # fmt: skip
    """Return a record header, struct s_spcl of protocols/dumprestore.h."""
    record = struct.pack(
        "<4iiIiiHH4xQ24x60sI8xII8xi512s16xi192xI4xii120x",
        *(kind, 1_700_000_000, 0, volume, place, inode, 60012, 0, mode, links, size, blocks, inode_flags, *owner),
        *(len(map) if mapped is None else mapped, map, level, flags, 10, extension),
    )
    checksum = (84446 - sum(struct.unpack("<256i", record))) & 0xFFFFFFFF
    return record[:28] + struct.pack("<I", checksum) + record[32:]


def attributes(*entries: tuple[int, bytes, bytes], in_inode: bool = True, elsewhere: int = 0) -> bytes:
    """Return attributes (index, name, value) as ext stores them, in the inode or in their own block."""
    size, begin, base = (256, 4, 4) if in_inode else (1024, 32, 0)
    blob = bytearray(struct.pack("<I", 0xEA020001 if in_inode else 0xEA020000).ljust(size, b"\0"))
    end = size
    for index, name, value in entries:
        end -= len(value) + 3 & ~3
        blob[end : end + len(value)] = value
        entry = struct.pack("<BBHIII", len(name), index, end - base, elsewhere, len(value), 0) + name
        blob[begin : begin + len(entry)] = entry
        begin += len(entry) + 3 & ~3
    return bytes(blob)


def directory(self: int, parent: int, entries: Sequence[tuple[int, bytes]]) -> bytes:
    data = b""
    for number, name in [(self, b"."), (parent, b".."), *entries]:
        length = 8 + len(name) + 4 & ~3
        data += struct.pack("<IHBB", number, length, 0, len(name)) + name.ljust(length - 8, b"\0")
    last = length
    rest = -len(data) % 512
    place = len(data) - last + 4
    return data[:place] + struct.pack("<H", last + rest) + data[place + 2 :] + bytes(rest)


def make(files: Sequence[File], *, missing: Sequence[int] = (), flags: int = 3, uncounted: int = 0) -> bytes:
    """Return a dump of level 0. Its map also contains the `missing` inodes. 0.4b56 does not count the first record."""
    parents = {number: parent for file in files for parent, _ in file.names for number in [file.number]}
    numbers = [file.number for file in files] + list(missing)
    bits = bytearray(RECORD)
    for number in numbers:
        bits[(number - 1) // 8] |= 1 << (number - 1) % 8
    records: list[bytes] = []

    def add(kind: int, data: bytes = b"", **more: object) -> None:
        place = max(0, len(records) - uncounted)
        records.append(header(kind, place, **more))  # type: ignore[arg-type]
        records.extend(data[at : at + RECORD].ljust(RECORD, b"\0") for at in range(0, len(data), RECORD))

    add(TAPE, flags=flags)
    add(CLRI, bytes(RECORD), mapped=1, inode=1024)
    add(BITS, bytes(bits), mapped=1)
    for file in sorted(files, key=lambda file: (file.mode & 0o170000 != DIRECTORY, file.number)):
        content = file.content
        if file.mode & 0o170000 == DIRECTORY:
            entries = [(child.number, name) for child in files for at, name in child.names if at == file.number]
            content = directory(file.number, parents.get(file.number, 2), entries)
        kind, known = INODE, {"inode": file.number, "mode": file.mode, "links": max(1, len(file.names)),
                              "owner": file.owner, "inode_flags": file.flags, "blocks": file.blocks}  # fmt: skip
        whole = b"\1" * -(-len(content) // RECORD)
        size = len(content) if file.size is None else file.size
        if file.flags & INLINE:
            add(INODE, map=bytes(4), size=size, **known)
        elif file.map is not None:
            add(INODE, content, map=file.map, size=size, **known)
        else:
            for at in range(0, max(1, len(whole)), 512):
                part = content[at * RECORD : (at + 512) * RECORD]
                add(kind, part, map=whole[at : at + 512], size=size, **known)
                kind = ADDR
        for blob in file.attributes:
            add(INODE, blob, map=b"\1" * -(-len(blob) // RECORD), size=len(blob), flags=0x8002, extension=3, **known)
    add(END)
    while len(records) % 10:
        add(END)
    return b"".join(records)


def misleading(target: bytes, dot: bytes = b".", twice: bytes = b"lnk") -> bytes:
    """One path with two names, made by `dot` and `twice`: restore(8) moves a directory away, and its own link leads it
    to `target`, to write there."""
    files = [
        File(2, DIRECTORY | 0o755),
        File(12, DIRECTORY | 0o755, names=[(2, b"a")]),
        File(13, DIRECTORY | 0o755, names=[(12, b"lnk")]),
        File(14, DIRECTORY | 0o755, names=[(12, dot)]),
        File(15, DIRECTORY | 0o755, names=[(14, dot)]),
        File(16, DIRECTORY | 0o755, names=[(14, b"lnk")]),
        File(17, DIRECTORY | 0o755, names=[(2, b"etc")]),
        File(20, LINK | 0o777, target, [(15, b"lnk")]),
        File(21, REGULAR | 0o644, b"evil", [(12, b"t"), (12, twice)]),
    ]
    names = enumerate((b"victim", b"evil", b"canary"), 22)
    return make([*files, *(File(number, REGULAR | 0o644, b"evil", [(16, name)]) for number, name in names)])


def lzo(data: bytes) -> bytes:
    """Return LZO1X data without compression: all of it is literal."""
    assert len(data) > 238
    zeroes, rest = divmod(len(data) - 18 - 1, 255)
    return b"\0" + bytes(zeroes) + bytes([rest + 1]) + data + b"\x11\0\0"


PACKERS: dict[str, tuple[int, int, Callable[[bytes], bytes]]] = {
    "not": (0, 0, bytes),
    "zlib": (1, 0, zlib.compress),
    "bzip2": (1, 1, bz2.compress),
    "lzo": (1, 2, lzo),
}


def packed(dump: bytes, how: str) -> bytes:
    """Compress the blocks of a dump that was made with flags=0x83, except the first block."""
    is_compressed, number, pack = PACKERS[how]
    size = 10 * RECORD
    blocks = dump[:size]
    for at in range(size, len(dump), size):
        plain = dump[at : at + size]
        block, flag = pack(plain), is_compressed
        if how != "lzo" and len(block) >= len(plain):  # dump, too, stores such a block uncompressed
            block, flag = plain, 0
        blocks += (len(block) << 4 | number << 1 | flag).to_bytes(4, "little") + block
    return blocks
