"""Read a dump: its files, its attributes, and whether it is complete. Any input gives a value or a Failure."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import dumps
import pytest
from dumps import DIRECTORY, INLINE, LINK, RECORD, REGULAR, File, attributes
from hypothesis import given
from hypothesis import strategies as st

from imageos.errors import Failure
from imageos.images import dump, dumpfile
from imageos.images.dumpfile import Dump, Truncated, unpack
from imageos.node import lzo

CAPABILITY = b"\1\0\0\2\0 \0\0" + bytes(12)
DISK_ACL = struct.pack("<IHHHHIHHHHHH", 1, 1, 6, 2, 4, 4321, 4, 4, 16, 4, 32, 4)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [(1, 6, 0xFFFFFFFF), (2, 4, 4321), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 4, 0xFFFFFFFF)]
)
FILES = [
    File(2, DIRECTORY | 0o755),
    File(12, DIRECTORY | 0o2775, names=[(2, b"etc")], attributes=[
        attributes((2, b"", DISK_ACL)), attributes((1, b"comment", b"x"), in_inode=False)]),
    File(13, REGULAR | 0o4755, os.urandom(3000), [(12, b"a"), (2, b"b")], (7, 70000), [
        attributes((6, b"capability", CAPABILITY))]),
    File(14, LINK | 0o777, b"etc/a", [(2, b"link")]),
    File(15, REGULAR | 0o644, b"", [(2, b"none")]),
    File(16, REGULAR | 0o600, bytes(600 * RECORD), [(12, b"\xff")]),
]  # fmt: skip
DUMP = dumps.make(FILES)


def read(data: bytes) -> Dump:
    dump = Dump("NAME")
    records = io.BytesIO()
    unpack(io.BytesIO(data), records.write)
    records.seek(0)
    dump.read(records)
    return dump


def refusal(data: bytes) -> str:
    with pytest.raises(Failure) as raised:
        read(data)
    assert str(raised.value).startswith("image NAME ")
    return str(raised.value)


def check(dump: Dump) -> None:
    assert len(dump) == len(FILES)
    for file in FILES:
        facts = dump.facts(file.number)
        assert facts and (facts.mode, (facts.uid, facts.gid)) == (file.mode, file.owner)
        assert facts.size == len(file.content) or not file.content
    assert dict(dump.names(2)) == {b"etc": 12, b"b": 13, b"link": 14, b"none": 15}
    assert dict(dump.names(12)) == {b"a": 13, b"\xff": 16}
    assert dump.attributes(12) == (("system.posix_acl_access", ACL), ("user.comment", b"x"))
    assert dump.attributes(13) == (("security.capability", CAPABILITY),)
    assert dump.attributes(14) == () and dump.facts(17) is None


def test_whole() -> None:
    dump = read(DUMP)
    check(dump)
    assert not dump.packed and not dump.inline
    check(read(dumps.make(FILES, uncounted=1)))


@pytest.mark.parametrize("how", dumps.PACKERS)
def test_compressed_within(how: str) -> None:
    whole = dumps.packed(dumps.make(FILES, flags=0x83), how)
    check(read(whole))
    for place in range(10 * RECORD, len(whole), 4999):
        assert "damaged or truncated" in refusal(whole[:place])


# Written by dump 0.4b49: a file with a hole, one with much data, and a small one
RUNS = [("07", 4), ("a68807ceb5", 4), ("01", 1), ("06", 0), ("fefe01", 1), ("27", 20), ("fefeb602", 0)]


@pytest.mark.parametrize("map, records", RUNS)
def test_runs_of_data_and_holes(map: str, records: int) -> None:
    dump = read(dumps.make([*FILES, File(20, REGULAR, bytes(records * RECORD), [(2, b"c")], map=bytes.fromhex(map))]))
    assert dump.packed is (map != "01") and len(dump) == len(FILES) + 1


def test_cut_off_after_any_record() -> None:
    ends = DUMP.index(dumps.header(dumps.END, 0)[:4] + DUMP[4:8], RECORD)
    for place in range(0, ends, RECORD):
        assert "it ends before record" in refusal(DUMP[:place])
        with pytest.raises(Truncated):
            read(DUMP[:place])
    read(DUMP[: ends + RECORD])


def test_any_header_is_missing() -> None:
    for place in range(0, len(DUMP), RECORD):
        record = DUMP[place : place + RECORD]
        if record[24:28] == DUMP[24:28] and record[0] != dumps.END:
            assert "damaged or truncated: record" in refusal(DUMP[:place] + bytes(RECORD) + DUMP[place + RECORD :])
            assert refusal(DUMP[:place] + DUMP[place + RECORD :])


@pytest.mark.parametrize("size", [1 << 33, (1 << 63) - 1, 1 << 63])
@pytest.mark.parametrize("mode, flags", [(REGULAR, 0), (REGULAR, INLINE), (LINK, 0), (DIRECTORY, 0)])
def test_size_without_blocks(mode: int, flags: int, size: int) -> None:
    """restore(8) would make a hole of what no map tells of, block by block."""
    file = File(20, mode, b"x", [(2, b"c")], flags=flags, size=size)
    assert "inode 20 lacks its last" in refusal(dumps.make([FILES[0], file]))


@pytest.mark.parametrize("size", [1025, (1 << 63) - 1, 1 << 63])
def test_size_of_attributes_without_blocks(size: int) -> None:
    """Here, too: it never ended."""
    header = dumps.header(dumps.INODE, 5, inode=2, mode=DIRECTORY, flags=0x8002, extension=3, size=size, map=b"\1")
    assert "attributes of inode 2 lack their last" in refusal(DUMP[: 5 * RECORD] + header + DUMP[6 * RECORD :])


LINKED = File(20, REGULAR, b"", [(2, b"c")])
REFUSED = {
    "inode 99 is missing": dumps.make(FILES, missing=[99]),
    "no root directory": dumps.make(FILES[1:]),
    "not the first volume": dumps.header(dumps.TAPE, 500, volume=2) + DUMP[RECORD:],
    "several volumes": DUMP[: 3 * RECORD] + dumps.header(dumps.TAPE, 3) + DUMP[4 * RECORD :],
    "unknown kind 9": DUMP[:RECORD] + dumps.header(9, 1) + DUMP[2 * RECORD :],
    "record 9 is at the place of record 1": DUMP[:RECORD] + dumps.header(dumps.CLRI, 9, mapped=1) + DUMP[2 * RECORD :],
    "map of 513": DUMP[: 5 * RECORD] + dumps.header(dumps.INODE, 5, inode=2, mode=DIRECTORY, mapped=513),
    "map of -1": DUMP[: 5 * RECORD] + dumps.header(dumps.INODE, 5, inode=2, mode=DIRECTORY, mapped=-1),
    "2147483647 records": DUMP[: 3 * RECORD] + dumps.header(dumps.BITS, 3, mapped=0x7FFFFFFF),
    "encrypted": dumps.make([*FILES, File(20, REGULAR, b"", [(2, b"c")], flags=dumps.ENCRYPTED)]),
    "encrypted files": dumps.make([*FILES, File(20, REGULAR, attributes=[attributes((9, b"c", b"key"))])]),
    "ea_inode": dumps.make([*FILES, File(20, REGULAR, attributes=[attributes((1, b"x", b""), elsewhere=30)])]),
    "ACL of inode 20": dumps.make([*FILES, File(20, REGULAR, attributes=[attributes((2, b"", DISK_ACL[:-2]))])]),
    "attributes of inode 20": dumps.make([*FILES, File(20, REGULAR, attributes=[b"\1\0\2\xea" + b"\xff" * 40])]),
    "not where it has to be": dumps.make([*FILES, LINKED, LINKED]),
    "extension of the unknown kind 2": DUMP[: 5 * RECORD]
    + dumps.header(dumps.INODE, 5, inode=2, mode=DIRECTORY, flags=0x8002, extension=2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    assert reason in refusal(REFUSED[reason])


def test_attributes_with_one_value() -> None:
    """3000 names for the same 60 KiB would be 180 MiB in memory, of each blob."""
    entry = struct.pack("<BBHIII", 0, 1, 0, 0, 60 << 10, 0)
    blob = (struct.pack("<I", 0xEA020001) + entry * 3000).ljust(64 << 10, b"\0")
    problem = "the attributes of inode 20 make no sense"
    assert problem in refusal(dumps.make([*FILES, File(20, REGULAR, attributes=[blob])]))


def test_memory_that_ends_is_the_fault_of_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Dump, "read", read)
    (tmp_path / "dump").write_bytes(DUMP)
    with (tmp_path / "dump").open("rb") as file, dump.following("NAME", file.fileno()) as follower:
        follower.tick()
        assert "NAME" in str(follower.failure()) and "memory" in str(follower.failure())


def test_attributes_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known already is kept once, but an inode that has it a thousand times takes memory each time."""
    monkeypatch.setattr(dumpfile, "MOST_NAMES", 100 << 10)
    blob = attributes((1, b"comment", b"x"))
    read(dumps.make([*FILES, *(File(20 + number, REGULAR, attributes=[blob]) for number in range(200))]))
    assert "names and attributes" in refusal(dumps.make([*FILES, File(20, REGULAR, attributes=[blob] * 200)]))


@pytest.mark.parametrize("name", [b"..", b"a/b", b"", b"a\0b"])
def test_names_that_are_none(name: bytes) -> None:
    """Every directory contains `..`; the other names lead out of it."""
    dump = read(dumps.make([*FILES, File(20, REGULAR, names=[(2, name)])]))
    if name == b"..":
        assert b".." not in dict(dump.names(2))
    else:
        with pytest.raises(Failure, match="directory 2 holds the name"):
            list(dump.names(2))


def test_content_in_the_inode() -> None:
    text = b"0123456789" * 10
    inline = File(20, REGULAR | 0o644, text, [(2, b"c")], flags=INLINE, blocks=text[:60],
                  attributes=[attributes((7, b"data", text[60:]), (1, b"x", b"y"))])  # fmt: skip
    dump = read(dumps.make([*FILES, inline]))
    assert dump.inline == {20: text}
    assert ("user.x", b"y") in dump.attributes(20)


@pytest.mark.parametrize("block", [1024, 4096, 65536])
def test_files_that_have_no_names(block: int) -> None:
    tail = (0x0B10CA04).to_bytes(4, "little") + b"\1\2\3\4"
    orphans = File(20, REGULAR | 0o600, (bytes(block - 8) + tail) * 2)
    dump = read(dumps.make([*FILES, orphans, File(21, REGULAR | 0o600, b"of root"), File(22, REGULAR | 0o600)]))
    assert dump.nameless == 1 and len(dump) == len(FILES) + 3
    quota = File(20, REGULAR | 0o600, (0xD9C03F14).to_bytes(4, "little") + bytes(block))
    assert read(dumps.make([*FILES, quota])).nameless == 1


def test_lzo() -> None:
    """Compressed by liblzo2, with each kind of instruction at least once."""
    text = b"the quick brown fox " * 3 + bytes(300) + b"the quick brown dog jumps" + bytes(range(60)) + b"abcab" * 100
    text += b"fox dog" + bytes(5000) + b"the quick"
    packed = bytes.fromhex(
        "000274686520717569636b2062726f776e20666f782020074d000020000b00002e4c050043646f67206a756d707300010203"
        "0405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435"
        "363738393a3b616263616261626361626162636162612000c438006374646f6720000be80d20000000000000000000000000"
        "00000000000045a8040f00000000000000000074686520717569636b110000"
    )
    assert lzo.unpack(packed, len(text)) == text
    for damaged in (packed[:-3], packed[:40], b"\x20\x00\x00" + packed, b""):
        with pytest.raises(ValueError, match="no LZO1X"):
            lzo.unpack(damaged, len(text))
    with pytest.raises(ValueError, match="too much"):
        lzo.unpack(packed, 1000)


@given(place=st.integers(0, len(DUMP) - 1), junk=st.binary(min_size=1, max_size=64), seal=st.booleans())
def test_junk(place: int, junk: bytes, seal: bool) -> None:
    """Also if the checksum of the header is correct."""
    data = bytearray(DUMP)
    data[place : place + len(junk)] = junk
    record = place // RECORD * RECORD
    if seal:
        data[record + 28 : record + 32] = bytes(4)
        total = sum(struct.unpack_from("<256i", data, record))
        data[record + 28 : record + 32] = (84446 - total & 0xFFFFFFFF).to_bytes(4, "little")
    try:
        dump = read(bytes(data))
        for number in (2, 12):
            list(dump.names(number))
    except Failure as failure:
        assert "NAME" in str(failure)  # noqa: PT017
