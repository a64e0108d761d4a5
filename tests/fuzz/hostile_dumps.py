"""Hostile dumps: made by dump(8), or record by record, with wrong names, numbers, kinds and sizes. The checksums are
right, so that restore(8) continues.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import dumps
from baits import DEVICES, OURS, SIMPLE, TARGETS
from dumps import ADDR, BITS, CLRI, DIRECTORY, END, INODE, LINK, RECORD, REGULAR, TAPE, File
from mutations import damaged
from support import run
from throwaway import loop_over

from imageos.images.dumpfile import FIELDS, PADDED, Dump, Header

BLOCK_NODE, CHARACTER_NODE, FIFO, SOCKET = 0o060000, 0o020000, 0o010000, 0o140000
KINDS = (DIRECTORY, REGULAR, LINK, BLOCK_NODE, CHARACTER_NODE, FIFO, SOCKET, 0)
# All have the same length, so that one can replace another in a directory
WORDS = (
    b"a",
    b"Q",
    b".",
    b"..",
    b"/",
    b"lnk",
    b"lnR",
    b"q",
    b"t",
    b"sub",
    b"etc",
    b"dev",
    b"evil",
    b"victim",
    b"canary",
)
ODD_WORDS = (b"", b"\0", b"a/b", b"../", b"\n", b"\xff", b"a\0b", b"\x1b[2J", b"imageos: ready", b"restoresymtable",
             b"n" * 254, b"lost+found", b"bin", b"tmp", b"../evil", b"/etc/canary/evil", b"RSTTMP0000012",
             b"rstdir")  # fmt: skip
ODD_NUMBERS = (0, 1, 2, 3, 11, 12, 13, 14, 15, 16, 17, 0x7F, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
ODD_SIZES = (0, 1, 512, 1023, 1024, 4096, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@dataclass
class Part:
    """A header and the records after it."""

    header: bytearray
    data: bytearray

    def number(self, kind: str, at: int) -> int:
        return int(struct.unpack_from("<" + kind, self.header, at)[0])

    def set(self, kind: str, at: int, value: int) -> None:
        size = 8 * struct.calcsize("<" + kind)
        struct.pack_into("<" + kind.upper(), self.header, at, value % (1 << size))

    @property
    def kind(self) -> int:
        return self.number("i", 0)

    @property
    def mode(self) -> int:
        return self.number("H", 32) & 0o170000


def parsed(dump: bytes) -> list[Part]:
    """Return the parts of a dump without compression."""
    reader = Dump("fuzz")
    parts, at = [], 0
    while at < len(dump):
        header = Header(*struct.unpack("<" + FIELDS + PADDED, dump[at : at + RECORD]))
        follow = reader._mapped_records(header)[0] if header.kind in (INODE, ADDR) else 0
        follow = header.mapped if header.kind in (BITS, CLRI) else follow
        end = at + RECORD * (1 + follow)
        parts.append(Part(bytearray(dump[at : at + RECORD]), bytearray(dump[at + RECORD : end])))
        at = end
    return parts


def joined(parts: Sequence[Part], chance: Random) -> bytes:
    """Join the parts: count the records and correct the checksums, but not always."""
    place, made = 0, []
    wrong = chance.randrange(len(parts)) if parts and chance.random() < 0.04 else -1
    counted = chance.random() < 0.96
    for number, part in enumerate(parts):
        if counted:
            part.set("i", 16, place)
        data = part.data + bytes(-len(part.data) % RECORD)
        part.set("i", 28, 0)
        part.set("i", 28, 84446 - sum(struct.unpack("<256i", part.header)) + (number == wrong))
        made += [part.header, data]
        place += 1 + len(data) // RECORD
    return b"".join(made)


# --- sources --------------------------------------------------------------------------------------


def dumped(place: Path) -> list[bytes]:
    """Return dumps that dump(8) makes of small filesystems; `place` is a working directory."""
    made = []
    for kind, options in (("ext2", ("-b", "4096", "-I", "128")), ("ext4", ("-b", "1024", "-I", "256"))):
        disk, tree = place / f"{kind}.disk", place / kind
        fill(tree)
        run(f"mkfs.{kind}", "-q", "-O", "^dir_index", "-U", "clear", "-d", tree, *options, disk, "6M")
        loop = loop_over(str(disk))
        for more in ((), ("-z",), ("-j",), ("-y",)):
            # for a plain file, dump(8) would dump the filesystem around it
            run("dump", "-0", "-q", *more, "-f", place / "dump", f"/dev/loop{os.minor(os.fstat(loop).st_rdev)}")
            made.append((place / "dump").read_bytes())
            (place / "dump").unlink()
        os.close(loop)
    return made


def fill(tree: Path) -> None:
    """Use names of one letter more than once, so that a changed name meets another one."""
    for name in ("etc", "bin", "a/lnk", "a/Q/Q", "a/Q/lnk", "b/sub", "tmp", "usr/bin"):
        (tree / name).mkdir(parents=True)
    for name, target in zip(OURS, TARGETS):
        (tree / os.fsdecode(name)).parent.mkdir(parents=True, exist_ok=True)
        (tree / os.fsdecode(name)).symlink_to(os.fsdecode(target))
    (tree / "a/Q/Q/lnk").symlink_to("/etc/canary")
    (tree / "b/lnk").symlink_to("/tmp/canary")
    (tree / "b/lnR").symlink_to("../../../../dev")
    for name in ("a/t", "a/Q/lnk/victim", "a/Q/lnk/evil", "a/Q/lnk/canary", "b/sub/victim", "bin/sh"):
        (tree / name).write_bytes(b"evil" * 1000)
    os.link(tree / "a/t", tree / "a/lnR")
    os.mknod(tree / "b/node", 0o060660, os.makedev(*DEVICES[0]))
    os.mkfifo(tree / "b/fifo")
    with (tree / "b/holes").open("wb") as file:
        file.seek(300_000)
        file.write(b"end")
    os.setxattr(tree / "a/t", "user.x", b"1")
    os.setxattr(tree / "b", "user.x", b"2" * 100)
    for top, directories, files in os.walk(tree):
        for name in [".", *directories, *files]:
            os.utime(os.path.join(top, name), (1_700_000_000,) * 2, follow_symlinks=False)


def misleading(chance: Random) -> bytes:
    dot, twice = chance.choice((b".", b".", b".", b"Q")), chance.choice((b"lnk", b"lnk", b"lnR"))
    return dumps.misleading(chance.choice(TARGETS) or b".", dot, twice)


def some_word(chance: Random) -> bytes:
    return chance.choice(ODD_WORDS if chance.random() < 0.1 else WORDS)


def made_up(chance: Random) -> bytes:
    """Make directories and files with any names, several with the same one, inside each other and themselves."""
    directories = [2, *range(12, 12 + chance.randrange(1, 6))]
    files = [File(2, DIRECTORY | 0o755)]
    for number in directories[1:]:
        above = [one for one in directories if one < number or chance.random() < 0.1] or [2]
        names = [(chance.choice(above), some_word(chance)) for _ in range(chance.choice((1, 1, 1, 2)))]
        files.append(File(number, DIRECTORY | chance.choice((0o755, 0o7777, 0)), names=names))
    for number in range(20, 20 + chance.randrange(1, 10)):
        kind = chance.choice((REGULAR, REGULAR, LINK, LINK, *KINDS[3:]))
        content = {REGULAR: b"evil" * chance.choice((0, 1, 600)), LINK: chance.choice(TARGETS)}.get(kind, b"")
        names = [(chance.choice(directories), some_word(chance)) for _ in range(chance.choice((1, 1, 2, 3)))]
        blocks = struct.pack("<I", os.makedev(*chance.choice(DEVICES)) & 0xFFFFFFFF) if not content else b""
        attributes = []
        if chance.random() < 0.3:
            index, name = chance.choice(
                ((1, b"x"), (2, b""), (3, b""), (4, b"x"), (6, b"capability"), (7, b"data"), (9, b"c"))
            )
            value = chance.choice((b"1", bytes(20), b"x" * 60))
            attributes = [dumps.attributes((index, name, value), in_inode=chance.random() < 0.5)]
        files.append(
            File(number, kind | chance.choice((0o644, 0o4755, 0)), content, names, attributes=attributes, blocks=blocks,
                 flags=chance.choice((0, 0, 0, 0x10, dumps.INLINE)))
        )  # fmt: skip
    return dumps.make(files)


# --- changes --------------------------------------------------------------------------------------


def entries(part: Part) -> Iterator[tuple[int, int]]:
    """Return the offsets and lengths of a directory's entries."""
    at = 0
    while at + 8 <= len(part.data):
        length = struct.unpack_from("<H", part.data, at + 4)[0]
        if length < 8:
            return
        yield at, length
        at += length


def some_entry(parts: Sequence[Part], chance: Random) -> tuple[Part, int, int]:
    found = [
        (part, *where) for part in parts if part.kind == INODE and part.mode == DIRECTORY for where in entries(part)
    ]
    return chance.choice(found) if found else (Part(bytearray(RECORD), bytearray(512)), 0, 16)


def some(parts: Sequence[Part], chance: Random, *kinds: int) -> Part:
    found = [part for part in parts if part.kind in kinds]
    return chance.choice(found or list(parts))


def rename(parts: list[Part], chance: Random) -> None:
    part, at, length = some_entry(parts, chance)
    old = bytes(part.data[at + 8 : at + 8 + part.data[at + 6]])
    like = [word for word in WORDS if len(word) == len(old)]
    new = chance.choice(like if like and chance.random() < 0.6 else (*WORDS, *ODD_WORDS, *SIMPLE))[: max(0, length - 8)]
    part.data[at + 6] = len(new)
    part.data[at + 8 : at + length] = new.ljust(length - 8, b"\0")


def renumber(parts: list[Part], chance: Random) -> None:
    """Make an entry name another inode."""
    part, at, _ = some_entry(parts, chance)
    known = [one.number("I", 20) for one in parts if one.kind == INODE]
    struct.pack_into("<I", part.data, at, chance.choice((*known, *ODD_NUMBERS)))


def entry_field(parts: list[Part], chance: Random) -> None:
    part, at, _ = some_entry(parts, chance)
    if chance.random() < 0.5:
        struct.pack_into("<H", part.data, at + 4, chance.choice((0, 1, 7, 8, 12, 512, 1024, 65535)))
    else:
        part.data[at + 6 + chance.randrange(2)] = chance.choice((0, 1, 2, 3, 4, 7, 10, 254, 255))


def retarget(parts: list[Part], chance: Random) -> None:
    links = [part for part in parts if part.kind == INODE and part.mode == LINK]
    if links:
        part, target = chance.choice(links), chance.choice(TARGETS)
        part.data = bytearray(target.ljust(RECORD if part.data else 0, b"\0"))
        part.set("Q", 40, len(target))


def of_another_kind(parts: list[Part], chance: Random) -> None:
    part = some(parts, chance, INODE)
    part.set("H", 32, chance.choice(KINDS) | chance.choice((0o644, 0o755, 0o7777, 0)))


def of_other_rights(parts: list[Part], chance: Random) -> None:
    part = some(parts, chance, INODE)
    part.set("H", 32, part.mode | chance.choice((0, 0o644, 0o4755, 0o7777)))
    part.set("I", 144, chance.choice((0, 1000, 2_000_000, 0xFFFFFFFE)))


def inode_number(parts: list[Part], chance: Random) -> None:
    part = some(parts, chance, INODE, ADDR)
    part.set("I", 20, chance.choice((*ODD_NUMBERS, part.number("I", 20) + 1)))


def size(parts: list[Part], chance: Random) -> None:
    some(parts, chance, INODE, ADDR).set("Q", 40, chance.choice(ODD_SIZES))


def count(parts: list[Part], chance: Random) -> None:
    part = some(parts, chance, INODE, ADDR, BITS, CLRI)
    part.set("i", 160, chance.choice((0, 1, 2, 511, 512, 513, 1024, 0x7FFFFFFF, -1, part.number("i", 160) + 1)))
    if chance.random() < 0.5:
        part.data = part.data[: chance.randrange(len(part.data) + 1) & -RECORD]


def map_byte(parts: list[Part], chance: Random) -> None:
    some(parts, chance, INODE, ADDR).header[164 + chance.randrange(512)] = chance.choice((0, 1, 2, 3, 128, 255))


def any_field(parts: list[Part], chance: Random) -> None:
    """Change another field of a header: kind, dates, volume, magic, links, owners, texts, level, flags, extensions."""
    part = some(parts, chance, TAPE, INODE, ADDR, BITS, CLRI, END)
    at = chance.choice((0, 4, 8, 12, 16, 34, 72, 132, 144, 148, 676, 692, 696, 760, 824, 888, 892, 896, 900))
    part.set("i", at, chance.choice((*ODD_NUMBERS, 4, 5, 6, -1, 0x80, 0x8000, 0x8002)))


def device(parts: list[Part], chance: Random) -> None:
    part = some(parts, chance, INODE)
    part.set("H", 32, chance.choice((BLOCK_NODE, CHARACTER_NODE)) | 0o666)
    part.set("I", 72, os.makedev(*chance.choice(DEVICES)))
    part.set("Q", 40, 0)


def bitmap(parts: list[Part], chance: Random) -> None:
    part = some(parts, chance, BITS, CLRI)
    if part.data:
        part.data[chance.choice((0, 1, 2, 3, len(part.data) - 1)) % len(part.data)] ^= 1 << chance.randrange(8)


def attribute(parts: list[Part], chance: Random) -> None:
    found = [part for part in parts if part.number("I", 888) & 0x8000 and part.data]
    if found:
        part = chance.choice(found)
        at = chance.choice((0, 4, 5, 6, 8, 12, 32, 33, chance.randrange(len(part.data)))) % (len(part.data) - 4)
        struct.pack_into("<I", part.data, at, chance.choice((*ODD_NUMBERS, 0xEA020000, 0xEA020001)))


def take_out(parts: list[Part], chance: Random) -> None:
    if len(parts) > 1:
        del parts[chance.randrange(len(parts))]


def put_in(parts: list[Part], chance: Random) -> None:
    part = chance.choice(parts)
    parts.insert(chance.randrange(len(parts) + 1), Part(bytearray(part.header), bytearray(part.data)))


def swap(parts: list[Part], chance: Random) -> None:
    one, other = chance.randrange(len(parts)), chance.randrange(len(parts))
    parts[one], parts[other] = parts[other], parts[one]


def content(parts: list[Part], chance: Random) -> None:
    part = chance.choice(parts)
    if part.data:
        part.data = bytearray(damaged(bytes(part.data), chance))


MILD = (retarget, retarget, device, of_other_rights)  # with which it can still be restored to its end
CHANGES: Sequence[Callable[[list[Part], Random], None]] = (
    rename, rename, rename, rename, renumber, renumber, entry_field, retarget, retarget, of_another_kind, inode_number,
    size, count, map_byte, any_field, device, bitmap, attribute, take_out, put_in, swap, content,
)  # fmt: skip


def dump(chance: Random, real: Sequence[bytes]) -> bytes:
    """Return a hostile dump; `real` are dumps by dump(8), each without compression and with three kinds of it."""
    if chance.random() < 0.15:
        parts = parsed(real[chance.choice((0, 4))])
        for _ in range(chance.randrange(8)):
            chance.choice(MILD)(parts, chance)
        return joined(parts, chance)
    base = chance.choice((misleading, made_up, made_up, None, None, None))
    if base:
        data = base(chance)
    else:
        number = chance.randrange(len(real))
        data = real[number]
        if number % 4:
            return damaged(data[:10_240] + damaged(data[10_240:], chance), chance) if chance.random() < 0.2 else \
                data[:10_240] + damaged(data[10_240:], chance)  # fmt: skip
    parts = parsed(data)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 6)) if base else chance.choice((1, 1, 2, 3, 6))):
        chance.choice(CHANGES)(parts, chance)
    data = joined(parts, chance)
    if chance.random() < 0.2:  # with compressed blocks
        parts[0].set("i", 888, parts[0].number("I", 888) | 0x80)
        data = dumps.packed(joined(parts, chance), chance.choice(list(dumps.PACKERS)))
        return damaged(data, chance) if chance.random() < 0.2 else data
    return damaged(data, chance) if chance.random() < 0.05 else data
