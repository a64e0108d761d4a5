"""Hostile tar archives: their members lead out of the guest, lie, repeat and contradict each other."""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
from collections.abc import Callable, Sequence
from random import Random

from baits import DEVICES, NAMES, TARGETS, XATTRS
from mutations import damaged

BLOCK = 512
GUEST = (b"./", b"./etc/", b"./bin/", b"./usr/", b"./var/", b"./a/")
ODD_NUMBERS = (
    b"-1", b"777777777777", b"99999999", b"        ", b"\0" * 12, b"+1", b"0x10", b"\xff" * 12, b"\x80" + b"\xff" * 11,
    b"\x80" + b"\0" * 10 + b"\1", b"\xff" * 11 + b"\xf0", b"\x80\0\0\0\x7f" + b"\xff" * 7, b"1 2 3", b"/" * 9,
)  # fmt: skip
FIELDS = {"mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12),
          "magic": (257, 8), "major": (329, 8), "minor": (337, 8), "prefix": (345, 155)}  # fmt: skip
KINDS = b"01234567DKLMNSVXgx\0AZ"


def header(name: bytes, kind: bytes = b"0", size: int = 0, *, link: bytes = b"", mode: int = 0o644, gnu: bool = True,
           device: tuple[int, int] = (0, 0), owner: int = 0) -> bytes:  # fmt: skip
    """Return a header of the GNU or the ustar format; cut off what is too long for it."""
    block = bytearray(BLOCK)
    block[:100] = name[:100].ljust(100, b"\0")
    for (at, width), value in zip(FIELDS.values(), (mode, owner, owner, size, 1_700_000_000)):
        block[at : at + width] = b"%0*o\0" % (width - 1, value)
    block[156:157] = kind
    block[157:257] = link[:100].ljust(100, b"\0")
    block[257:265] = b"ustar  \0" if gnu else b"ustar\x0000"
    for at, number in zip((329, 337), device):
        block[at : at + 8] = b"%07o\0" % number
    return checked(block)


def checked(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(
    chance: Random, name: bytes, kind: bytes = b"0", data: bytes = b"", link: bytes = b"", **more: object
) -> bytes:
    """Return a member in one of three formats, with the long names of that format."""
    before = b""
    gnu = chance.random() < 0.6
    if gnu:
        before += b"".join(
            header(b"././@LongLink", one, len(text) + 1) + padded(text + b"\0")
            for one, text in ((b"K", link), (b"L", name))
            if len(text) > 100
        )
    elif len(name) > 100 or len(link) > 100 or chance.random() < 0.3:
        before += pax(b"x", [(b"path", name), *([(b"linkpath", link)] if link else [])])
    return before + header(name, kind, len(data), link=link, gnu=gnu, **more) + padded(data)  # type: ignore[arg-type]


def pax(kind: bytes, records: Sequence[tuple[bytes, bytes]], lie: int = 0) -> bytes:
    """Return an extended header; `lie` is added to the length of each record."""
    data = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest) + len(str(len(rest) + 2))
        data += str(max(0, length + lie)).encode() + rest
    return header(b"pax", kind, len(data), gnu=False) + padded(data)


# Parts of an archive


def plain(chance: Random) -> bytes:
    mode = chance.choice((0o644, 0o4755, 0o2755, 0o777, 0, 0o7777))
    return member(chance, chance.choice(NAMES), data=b"evil" * chance.choice((0, 1, 200)), mode=mode,
                  owner=chance.choice((0, 0, 1000, 2_000_000)))  # fmt: skip


def directory(chance: Random) -> bytes:
    return member(
        chance, chance.choice(NAMES) + chance.choice((b"/", b"")), b"5", mode=chance.choice((0o755, 0, 0o7777))
    )


def link(chance: Random, kind: bytes = b"") -> bytes:
    kind = kind or chance.choice((b"1", b"2"))
    return member(chance, chance.choice(NAMES), kind, link=chance.choice((*TARGETS, *NAMES)))


def through(chance: Random) -> bytes:
    """Return a link, and a member whose path leads through it."""
    name = chance.choice((b"lnk", b"a/lnk", b"./lnk", b"a"))
    target = chance.choice(TARGETS)
    below = chance.choice(
        (name, name + b"/victim", name + b"/evil", name + b"/sub/new", name + b"/.", name + b"//victim")
    )
    kind = chance.choice((b"0", b"0", b"0", b"5", b"6", b"1", b"2", b"S", b"7"))
    made = member(chance, name, chance.choice((b"2", b"2", b"1")), link=target)
    if chance.random() < 0.3:  # tar makes the link at the end, and may meet these in its place
        made += member(chance, b"q", b"1", link=name) + member(chance, name + b"/", b"5")
    return made + member(chance, below, kind, b"evil" if kind in b"07" else b"", target, mode=0o777)


def node(chance: Random) -> bytes:
    name = chance.choice(NAMES)
    made = member(chance, name, chance.choice((b"3", b"4", b"6")), device=chance.choice(DEVICES), mode=0o666)
    return made + (member(chance, name, data=b"evil" * 300) if chance.random() < 0.5 else b"")


def sparse(chance: Random) -> bytes:
    """Return a file with holes as old GNU tar wrote it, perhaps with a wrong map."""
    block = bytearray(header(chance.choice(NAMES), b"S", chance.choice((0, 512, 1024))))
    where = [at for entry in range(chance.randrange(5)) for at in (386 + 24 * entry, 398 + 24 * entry)]
    for at in (*where, 483):  # offsets and lengths, then the total size
        number = chance.choice((b"%011o" % chance.choice((0, 512, 1 << 20, 1 << 32)), *ODD_NUMBERS))
        block[at : at + 12] = number[:12].ljust(12, b"\0")
    block[482:483] = chance.choice((b"\0", b"\1"))  # says that another block of the map follows, or not
    return checked(block) + bytes(BLOCK * chance.randrange(4))


def sparse_pax(chance: Random) -> bytes:
    """Return the same with its map in an extended header, or in the file itself."""
    values = (b"0", b"512", b"1048576", b"-1", b"99999999999999999999", b"", b"0,512,1024", b"1e9")
    keys = (b"major", b"minor", b"realsize", b"size", b"numblocks", b"offset", b"numbytes", b"map")
    records = [(b"GNU.sparse.name", chance.choice(NAMES))] if chance.random() < 0.7 else []
    if chance.random() < 0.5:
        records += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
    records += [(b"GNU.sparse." + chance.choice(keys), chance.choice(values)) for _ in range(chance.randrange(8))]
    data = b"".join(chance.choice(values) + b"\n" for _ in range(chance.randrange(1, 6)))
    return pax(b"x", records) + header(b"sparse", b"0", BLOCK, gnu=False) + data[:BLOCK].ljust(BLOCK, b"\0")


def extended(chance: Random) -> bytes:
    """Return extended headers with strange content."""
    records = [
        chance.choice((
            (b"path", chance.choice(NAMES)), (b"linkpath", chance.choice(TARGETS)),
            (b"size", chance.choice(ODD_NUMBERS)), (b"uid", chance.choice(ODD_NUMBERS)), (b"mtime", b"-1e99"),
            (b"mtime", b"9" * 40), (b"hdrcharset", b"BINARY"), (b"", b"x"), (b"a=b", b""), (b"path\0x", b"evil"),
            (b"SCHILY.dev", b"1"), (b"comment", b"x" * 5000),
            (b"SCHILY.xattr." + chance.choice(XATTRS), chance.choice((b"", b"1", bytes(20), b"\xff" * 70_000))),
            (b"SCHILY.acl.access", b"user::rwx,user:4000000000:rwx,group::rwx,mask::rwx,other::rwx"),
            (b"SCHILY.acl.default", chance.choice((b"nonsense", b"user::", b"\n", b"u" * 9000))),
            (b"RHT.security.selinux", b"system_u:object_r:bin_t:s0"), (b"GNU.volume.label", b"x"),
        ))
        for _ in range(chance.randrange(1, 5))
    ]  # fmt: skip
    lie = chance.choice((0, 0, 0, 1, -1, -3, 100, 1 << 70))
    made = pax(chance.choice((b"x", b"x", b"g", b"X")), records, lie)
    return made + chance.choice((plain, directory, link, node))(chance)


def numbers(chance: Random) -> bytes:
    """Return fields of a header with impossible values."""
    block = bytearray(
        header(chance.choice(NAMES), chance.choice((b"0", b"5", b"3", b"2")), link=chance.choice(TARGETS))
    )
    for _ in range(chance.randrange(1, 4)):
        at, width = chance.choice(list(FIELDS.values()))
        block[at : at + width] = chance.choice(ODD_NUMBERS)[:width].ljust(width, b"\0")
    return checked(block)


def other_kind(chance: Random) -> bytes:
    """Return rare kinds of members: incremental backups, volumes, labels, unknown ones."""
    rename = b"R" + chance.choice(NAMES) + b"\0T" + chance.choice(TARGETS) + b"\0\0"
    kind = bytes([chance.choice(KINDS)])
    return member(
        chance, chance.choice(NAMES), kind, chance.choice((b"", rename, b"Yevil\0\0")), chance.choice(TARGETS)
    )


def noise(chance: Random) -> bytes:
    return bytes(BLOCK * chance.choice((1, 2))) if chance.random() < 0.5 else chance.randbytes(BLOCK)


MILD: Sequence[Callable[[Random], bytes]] = (plain, directory, link, through, node)
PARTS = (
    *MILD, directory, link, through, through, sparse, sparse_pax, extended, extended, numbers, other_kind,
)  # fmt: skip


def archive(chance: Random) -> bytes:
    """Return an archive with many errors, or with a few, so that it may be unpacked to its end."""
    mild = chance.random() < 0.4
    parts = [member(chance, name, b"5", mode=0o755) for name in GUEST] if mild or chance.random() < 0.8 else []
    parts += [chance.choice(MILD if mild else PARTS)(chance) for _ in range(chance.choice((1, 1, 2, 4, 8, 20)))]
    if not mild and chance.random() < 0.15:
        parts.insert(chance.randrange(len(parts) + 1), noise(chance))
    data = b"".join(parts) + bytes(20 * BLOCK)
    if mild:
        return data
    data = damaged(data, chance) if chance.random() < 0.15 else data
    return data if chance.random() < 0.9 else data.rstrip(b"\0")


def filtered(*command: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": filtered("zstd", "-1", "-q", "-c"),
    "lz4": filtered("lz4", "-1", "-q", "-c"),
}


def compressed(data: bytes, chance: Random) -> bytes:
    """Return it as it is, or compressed in a known way, perhaps damaged."""
    if chance.random() < 0.5:
        return data
    how = COMPRESSORS[chance.choice(list(COMPRESSORS))]
    if chance.random() < 0.1:
        at = chance.randrange(len(data))
        return how(data[:at]) + how(data[at:])
    made = how(data)
    return damaged(made, chance) if chance.random() < 0.3 else made + chance.choice((b"", b"", b"\0" * 100, b"garbage"))
