"""The format of dump(8), read in one go: what a dump holds, and whether all of it is there.

protocols/dumprestore.h: records of 1024 bytes. Headers have a checksum, and tell how many records of data follow; maps
of all inodes come first, then directories, then everything else, each with its extended attributes behind it.
"""

from __future__ import annotations

import bz2
import io
import stat
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from imageos.errors import Failure
from imageos.node import lzo

RECORD = 1024  # bytes
MAGIC = 60012
CHECKSUM = 84446  # of a header's 256 integers
TAPE, INODE, BITS, ADDR, END, CLRI = range(1, 7)  # kinds of records (TS_*)
NEW_NAMES, COMPRESSED, ATTRIBUTES = 0x2, 0x80, 0x8000  # flags (DR_*)
EXTENDED = 3  # what an extension of an inode may be (EXT_XATTR)
TAPE_BLOCK = 10  # records: what is compressed together, if nothing is said
ROOT = 2
# struct s_spcl
FIELDS = "i8xiII8xHH4xQ24x60sI8xII8xi512s212xI4xii"
PADDED = "120x"

WITH_CONTENT = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
# Flags of an ext inode
FIXED = 0x30  # immutable, append only: nothing can be changed
ENCRYPTED, INLINE = 0x800, 0x10000000
# Files of ext4 itself have no names: reserved ones, quotas (a mark at the beginning), orphan_file (one in each block)
RESERVED, INTERNAL_MODE = 11, 0o100600
QUOTA_MAGICS = tuple(magic.to_bytes(4, "little") for magic in (0xD9C01F11, 0xD9C01927, 0xD9C03F14))
ORPHANS_MAGIC, ORPHANS_TAIL = (0x0B10CA04).to_bytes(4, "little"), 8
# Attributes as ext keeps them (struct ext4_xattr_entry): in the inode, and in a block of their own
ENTRY = struct.Struct("<BBHIII")
FIRST_ENTRY = {0xEA020001: (4, 4), 0xEA020000: (32, 0)}  # magic -> where entries begin, where offsets of values do
PREFIXES = {1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}
SYSTEM, ENCRYPTION = 7, 9
ACL_NAMED = (2, 8)  # the tags of an ACL's entries that name a user or group

# A stranger's dump: what is kept of it has bounds. Those of restore(8) itself are no wider: see guests.sandbox.
MOST_INODES = 10_000_000
MOST_NAMES = 256 << 20  # bytes of all directories, and of all attributes that differ
MOST_INLINE = 64 << 10  # bytes that an inode itself may hold: it is no larger than a block
MOST_ATTRIBUTES = 64 << 10  # bytes that one inode may have (XATTR_MAXSIZE)
PIECE = 1 << 20


class Truncated(Failure):
    """The dump ends before its end."""


class Facts(NamedTuple):
    mode: int
    links: int
    uid: int
    gid: int
    size: int
    flags: int


class Header(NamedTuple):
    kind: int
    volume: int
    place: int  # of this record in the dump
    inode: int
    mode: int
    links: int
    size: int
    blocks: bytes  # the beginning of the content, with INLINE
    inode_flags: int
    uid: int
    gid: int
    mapped: int  # valid bytes of the map, or records of what is a map itself
    map: bytes
    flags: int
    tape_block: int
    extension: int


class Inodes:
    """Facts by number, in little memory: 28 bytes each."""

    _packed = struct.Struct("<HHIIQI")

    def __init__(self) -> None:
        self._numbers = array("I")
        self._facts = bytearray()

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, facts: Facts) -> bool:
        """Return False if it does not come in order."""
        if self._numbers and number <= self._numbers[-1]:
            return False
        self._numbers.append(number)
        self._facts += self._packed.pack(*facts)
        return True

    def find(self, number: int) -> Facts | None:
        place = bisect_left(self._numbers, number)
        if place == len(self._numbers) or self._numbers[place] != number:
            return None
        return Facts(*self._packed.unpack_from(self._facts, place * self._packed.size))


class Dump:
    """The content of a dump. `read` it from its beginning to its end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.packed = False  # in the way of dump 0.4b49, which an older restore cannot read
        self.inline: dict[int, bytes] = {}  # content that the inodes themselves hold
        self.nameless = 0  # inodes that need no name: of the filesystem itself, or removed while they were open
        self._directories, self._others = Inodes(), Inodes()
        self._contents: dict[int, bytearray] = {}  # of directories
        self._attributes: dict[int, tuple[tuple[str, bytes], ...]] = {}
        self._known: dict[bytes, tuple[tuple[str, bytes], ...]] = {}  # many inodes have the same attributes
        self._kept = 0  # bytes of both
        self._record = 0
        self._current, self._unmapped = 0, 0  # the last inode, and how many of its bytes no map has told of yet
        self._order = "<"
        self._new_names = True
        self._uncounted = 0  # records at the beginning: dump 0.4b56 does not count the first

    def __len__(self) -> int:
        return len(self._directories) + len(self._others)

    def facts(self, number: int) -> Facts | None:
        return self._directories.find(number) or self._others.find(number)

    def attributes(self, number: int) -> tuple[tuple[str, bytes], ...]:
        return self._attributes.get(number, ())

    def names(self, number: int) -> Iterator[tuple[bytes, int]]:
        """Yield the names in a directory, and the numbers of their inodes."""
        facts = self._directories.find(number)
        content, at = bytes(self._contents.get(number, b""))[: facts.size if facts else 0], 0
        entry = struct.Struct(self._order + ("IHBB" if self._new_names else "IHH"))
        while at + entry.size <= len(content):
            inode, length, *_, name_length = entry.unpack_from(content, at)
            name = content[at + 8 : at + 8 + name_length]
            if length < 8 + name_length or (inode and len(name) < name_length):
                raise self.damaged(f"directory {number} makes no sense")
            if inode and name not in (b".", b".."):
                if not name or b"/" in name or b"\0" in name:
                    raise self.damaged(f"directory {number} holds the name {name!r}")
                yield name, inode
            at += length

    def read(self, file: BinaryIO) -> None:
        """Fail unless the dump is whole: every inode of its own map, and the end. `unpack` comes before it."""
        header = self._header(file)
        if header.kind != TAPE or header.volume != 1:
            raise self._refused("is not the first volume of a dump")
        self._new_names = bool(header.flags & NEW_NAMES)
        maps = bytearray()
        before = TAPE
        while True:
            header = self._header(file)
            if header.kind == END:
                self._check_mapped()
                break
            if header.kind == BITS or (header.kind == ADDR and before == BITS):
                maps += self._take(file, header.mapped)
                before = BITS
            elif header.kind == CLRI or (header.kind == ADDR and before == CLRI):
                self._skip(file, header.mapped)
                before = CLRI
            elif header.kind in (INODE, ADDR):
                self._inode(file, header)
                before = INODE
            elif header.kind == TAPE:
                raise self._refused("is one of several volumes of a dump")
            else:
                raise self.damaged(f"record {self._record - 1} is of the unknown kind {header.kind}")
        self._check_map(maps)
        self._known.clear()
        while not file.seekable() and file.read(PIECE):  # whoever writes must not stumble
            pass

    def _header(self, file: BinaryIO) -> Header:
        record = self._take(file, 1)
        if self._record == 1 and is_header(record, ">"):
            self._order = ">"
        if not is_header(record, self._order):
            raise self.damaged(f"record {self._record - 1} is not what has to be there")
        header = _header(self._order, record)
        if self._record == 2:
            self._uncounted = int(header.place == 0)
        place = self._record - 1 - self._uncounted
        if header.kind != TAPE and header.place & 0xFFFFFFFF != place & 0xFFFFFFFF:
            raise self.damaged(f"record {header.place} is at the place of record {place}")
        return header

    def _inode(self, file: BinaryIO, header: Header) -> None:
        records, holes = self._mapped_records(header)
        number, is_directory = header.inode, stat.S_ISDIR(header.mode)
        if header.flags & ATTRIBUTES:
            data = self._take(file, min(records, 2 * MOST_ATTRIBUTES // RECORD))
            if header.size > len(data):  # restore makes holes of what is missing here, too
                raise self.damaged(f"the attributes of inode {number} lack their last {header.size - len(data)} bytes")
            self._add_attributes(header, data)
            return
        if header.kind == INODE:
            self._check_mapped()
            size = header.size
            facts = Facts(header.mode, header.links, header.uid, header.gid, size, header.inode_flags)
            if not (self._directories if is_directory else self._others).add(number, facts):
                raise self.damaged(f"inode {number} is not where it has to be")
            self.nameless += not facts.links
            if len(self) > MOST_INODES:
                raise self._refused(f"has more than {MOST_INODES} files")
            if header.inode_flags & ENCRYPTED:
                raise self._refused("is of an ext4 with encrypted files, whose content and names no dump holds")
            is_inline = bool(header.inode_flags & INLINE)
            if is_inline and stat.S_ISREG(header.mode):
                self.inline[number] = header.blocks[:size]
            self._current = number
            self._unmapped = size - MOST_INLINE * is_inline if stat.S_IFMT(header.mode) in WITH_CONTENT else 0
        self._unmapped -= (records + holes) * RECORD
        if is_directory:
            data = self._take(file, records)
            self._keep(len(data))
            self._contents.setdefault(number, bytearray()).extend(data)
        elif header.kind == INODE and (header.mode, header.uid, header.gid) == (INTERNAL_MODE, 0, 0):
            begin = self._take(file, min(records, 64))
            self.nameless += number < RESERVED or _is_internal(begin)
            self._skip(file, records - min(records, 64))
        else:
            self._skip(file, records)

    def _mapped_records(self, header: Header) -> tuple[int, int]:
        """Return how many records follow, and how many do not since they are holes, as the header's map tells.

        A byte of it is of one record: 1 for data, 0 for a hole. Since 0.4b49 it is of a run: of data with bit 0, and
        as long as bits 1 to 6 and one more say; with bit 7, the next byte and one more are its length in units of 64.
        """
        if not 0 <= header.mapped <= len(header.map):
            raise self.damaged(f"a map of {header.mapped} in record {self._record - 1}")
        runs = header.map[: header.mapped]
        if not runs or max(runs) <= 1:
            return sum(runs), len(runs) - sum(runs)
        self.packed = True
        found, rest = [0, 0], iter(runs)
        for byte in rest:
            length = 1 + (byte >> 1 & 63)
            if byte & 128:
                length += 64 * (1 + next(rest, 0))
            found[byte & 1] += length
        return found[1], found[0]

    def _check_mapped(self) -> None:
        """Fail if the end of a file is missing: restore makes a hole of it block by block, of 2**60 bytes for ever."""
        if self._unmapped > 0:
            raise self.damaged(f"inode {self._current} lacks its last {self._unmapped} bytes")

    def _add_attributes(self, header: Header, data: bytes) -> None:
        if header.kind != INODE or header.extension != EXTENDED:
            raise self.damaged(f"inode {header.inode} has an extension of the unknown kind {header.extension}")
        blob = data[: header.size]
        if blob not in self._known or header.inode in self._attributes:
            self._keep(len(data))
        if blob not in self._known:
            self._known[blob] = tuple(self._parsed(header.inode, blob))
        self._attributes[header.inode] = self.attributes(header.inode) + self._known[blob]
        if header.inode in self.inline:
            facts = self.facts(header.inode)
            more = b"".join(value for name, value in self._known[blob] if name == "system.data")
            self.inline[header.inode] = (self.inline[header.inode] + more)[: facts.size if facts else 0]

    def _parsed(self, inode: int, blob: bytes) -> Iterator[tuple[str, bytes]]:
        begin, base = FIRST_ENTRY.get(int.from_bytes(blob[:4], "little"), (len(blob), 0))
        if begin == len(blob):
            raise self.damaged(f"the attributes of inode {inode} make no sense")
        left = len(blob)  # values do not overlap: each entry could have all of it
        while blob[begin : begin + 4].strip(b"\0"):
            if begin + ENTRY.size > len(blob):
                raise self.damaged(f"the attributes of inode {inode} make no sense")
            length, index, offset, elsewhere, size, _ = ENTRY.unpack_from(blob, begin)
            name = blob[begin + ENTRY.size : begin + ENTRY.size + length]
            value = blob[base + offset : base + offset + size]
            if len(name) < length or b"\0" in name:
                raise self.damaged(f"the attributes of inode {inode} make no sense")
            if elsewhere:
                raise self._refused("is of an ext4 with ea_inode, whose large attributes no dump holds")
            if index == ENCRYPTION:
                raise self._refused("is of an ext4 with encrypted files, whose content and names no dump holds")
            left -= size
            if len(value) < size or left < 0:
                raise self.damaged(f"the attributes of inode {inode} make no sense")
            if index == SYSTEM:
                yield f"system.{name.decode('ascii', 'replace')}", value
            elif PREFIXES.get(index, "").startswith("system."):
                yield PREFIXES[index], self._acl(inode, value)
            else:
                prefix = PREFIXES.get(index, f"(kind {index}).")
                yield prefix + name.decode("utf-8", "surrogateescape"), value
            begin += ENTRY.size + length + 3 & ~3

    def _acl(self, inode: int, value: bytes) -> bytes:
        """Return an ACL as the kernel takes it (linux/posix_acl_xattr.h); ext has no number where nobody is named."""
        entries, at = [struct.pack("<I", 2)], 4
        while at + 4 <= len(value):
            tag, permissions = struct.unpack_from("<HH", value, at)
            at += 4
            name = value[at : at + 4] if tag in ACL_NAMED else b"\xff" * 4
            at += 4 if tag in ACL_NAMED else 0
            entries.append(struct.pack("<HH", tag, permissions) + name)
        if value[:4] != b"\1\0\0\0" or at != len(value):
            raise self.damaged(f"the ACL of inode {inode} makes no sense")
        return b"".join(entries)

    def _check_map(self, maps: bytearray) -> None:
        for place, byte in enumerate(maps):
            for bit in range(8) if byte else ():
                number = place * 8 + bit + 1
                if byte >> bit & 1 and not self.facts(number):
                    raise self.damaged(f"inode {number} is missing, which its own list names")
        if not self._directories.find(ROOT):
            raise self.damaged("it has no root directory")

    def _keep(self, size: int) -> None:
        self._kept += size
        if self._kept > MOST_NAMES:
            raise self._refused(f"has more than {MOST_NAMES >> 20} MiB of names and attributes")

    def _take(self, file: BinaryIO, count: int) -> bytes:
        self._record += count
        if not 0 <= count <= MOST_NAMES // RECORD:
            raise self.damaged(f"{count} records are said to follow record {self._record - count - 1}")
        data = file.read(count * RECORD)
        if len(data) < count * RECORD:
            raise self._cut_off()
        return data

    def _skip(self, file: BinaryIO, count: int) -> None:
        self._record += max(0, count)
        if file.seekable() and count > 0:
            file.seek(count * RECORD, io.SEEK_CUR)  # the next header tells whether the file ends before
            return
        left = count * RECORD
        while left > 0:
            data = file.read(min(left, PIECE))
            if not data:
                raise self._cut_off()
            left -= len(data)

    def _cut_off(self) -> Failure:
        return Truncated(f"image {self.name} is damaged or truncated: it ends before record {self._record}")

    def damaged(self, why: str) -> Failure:
        return Failure(f"image {self.name} is damaged or truncated: {why}")

    def _refused(self, why: str) -> Failure:
        return Failure(f"image {self.name} {why}")


def order_of(record: bytes) -> str:
    """Return the byte order of a header, as struct names it; empty if it is none."""
    return next((order for order in "<>" if is_header(record, order)), "")


def is_packed(record: bytes) -> bool:
    """Return whether a dump with this first record is compressed within."""
    order = order_of(record)
    return bool(order) and bool(_header(order, record).flags & COMPRESSED)


def is_end(record: bytes) -> bool:
    order = order_of(record)
    return bool(order) and _header(order, record).kind == END


def unpack(file: BinaryIO, write: Callable[[bytes], object]) -> None:
    """Give `write` a dump as it would be if it were not compressed within, as it may be.

    Then it comes in blocks, each but the first behind its length (struct tapebuf). Ends where `file` does, and before a
    block that is not whole; ValueError or whatever else for what is no block.
    """
    first = file.read(RECORD)
    write(first)
    if not is_packed(first):
        while data := file.read(PIECE):
            write(data)
        return
    size = RECORD * (_header(order_of(first), first).tape_block or TAPE_BLOCK)
    if not 0 < size <= PIECE:
        raise ValueError(f"blocks of {size} bytes")
    write(file.read(size - RECORD))
    while len(word := file.read(4)) == 4:
        head = int.from_bytes(word, "little")
        is_compressed, how, length = head & 1, head >> 1 & 7, head >> 4
        if not 0 < length <= 2 * size:
            raise ValueError(f"a block of {length} bytes")
        data = file.read(length)
        if len(data) < length:
            return
        write(UNPACKERS[how](data, size) if is_compressed else data)


def _header(order: str, record: bytes) -> Header:
    return Header(*struct.unpack(order + FIELDS + PADDED, record))


def is_header(record: bytes, order: str) -> bool:
    if len(record) < RECORD:
        return False
    numbers: tuple[int, ...] = struct.unpack(order + "256i", record)
    return numbers[6] == MAGIC and sum(numbers) & 0xFFFFFFFF == CHECKSUM


def _is_internal(begin: bytes) -> bool:
    """Return True for the beginning of a file that ext4 keeps for itself."""
    ends = range(RECORD, len(begin) + 1, RECORD)  # of blocks, however large they are
    return begin.startswith(QUOTA_MAGICS) or any(begin[end - ORPHANS_TAIL :].startswith(ORPHANS_MAGIC) for end in ends)


# What a block's head says -> what makes of its data the bytes, at most so many, that were compressed
UNPACKERS: dict[int, Callable[[bytes, int], bytes]] = {
    0: lambda data, most: zlib.decompressobj().decompress(data, most),
    1: lambda data, most: bz2.BZ2Decompressor().decompress(data, most),
    2: lzo.unpack,
}
