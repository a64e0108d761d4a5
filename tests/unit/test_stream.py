"""The export stream: import reads back what export wrote, and detects every change."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageos.backups import stream
from imageos.backups.stream import Manifest, Source, Volume
from imageos.errors import Failure

Run = tuple[int, bytes]
BLOCK = 512
VOLUME = Volume(1, 1 << 20, 1 << 22, "83", "ext4")


def manifest(runs: Sequence[Run]) -> Manifest:
    return Manifest(
        disk_size=1 << 40,
        table="dos",
        volumes=(VOLUME,),
        runs=len(runs),
        bytes=sum(len(data) for _, data in runs),
        created=1_700_000_000,
        instance="inst1.example.org",
        index=1,
        exporter="imageos test",
    )


def written(runs: Sequence[Run], about: Manifest | None = None) -> bytes:
    contents = dict(runs)

    def read_into(offset: int, buffer: memoryview) -> None:
        buffer[:] = contents[offset]

    with tempfile.TemporaryFile() as file:
        places = [(offset, len(data)) for offset, data in runs]
        for _ in stream.write(file.fileno(), about or manifest(runs), places, read_into):
            pass
        file.seek(0)
        return file.read()


def received(data: bytes) -> tuple[Manifest, list[Run]]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        source = Source(file.fileno())
        about = stream.read_manifest(source)
        runs = [(offset, bytes(content)) for offset, content in stream.read_runs(source, about)]
        assert source.position == len(data)
        return about, runs


@st.composite
def some_runs(draw: st.DrawFn, least: int = 0) -> list[Run]:
    runs = []
    offset = 0
    for size in draw(st.lists(st.integers(1, 3000), min_size=least, max_size=6)):
        offset += draw(st.integers(0, 1 << 35))
        content = draw(st.binary(min_size=1, max_size=8))
        runs.append((offset, (content * size)[:size]))
        offset += size
    return runs


RUNS: list[Run] = [(0, b"boot" * 300), (1 << 20, bytes(range(256)) * 4), (1 << 33, b"x"), (1 << 36, b"end" * 400)]


@given(some_runs())
def test_round_trip(runs: list[Run]) -> None:
    assert received(written(runs)) == (manifest(runs), runs)


@given(some_runs())
def test_length_is_known_before(runs: list[Run]) -> None:
    number, total, members = stream.count((offset, len(data)) for offset, data in runs)
    assert (number, total) == (manifest(runs).runs, manifest(runs).bytes)
    assert stream.length(manifest(runs), members) == len(written(runs))


@given(some_runs(least=1))
def test_is_a_tar_archive(runs: list[Run]) -> None:
    with tarfile.open(fileobj=io.BytesIO(written(runs)), mode="r:") as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == [
            "manifest.json",
            *(f"disk/{offset}" for offset, _ in runs),
            "end.json",
        ]
        hashes = ""
        for member in members:
            file = archive.extractfile(member)
            assert file and member.mode == 0o600 and member.mtime == 1_700_000_000
            digest = hashlib.sha256(file.read()).hexdigest()
            assert member.pax_headers["SCHILY.xattr.user.sha256"] == digest
            hashes += f"{digest}  {member.name}\n" if member.name.startswith("disk/") else ""
        end = archive.extractfile("end.json")
        assert end and json.load(end)["sha256"] == hashlib.sha256(hashes.encode()).hexdigest()


def boundaries(data: bytes) -> Iterator[int]:
    """Yield every offset where a header, record, content or padding begins."""
    place = 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            yield from (member.offset, member.offset + BLOCK, member.offset_data - BLOCK, member.offset_data)
            place = member.offset_data + member.size
            yield place
    yield from range(-(-place // BLOCK) * BLOCK, len(data), BLOCK)


def test_truncated_at_every_boundary() -> None:
    data = written(RUNS)
    for place in sorted({near for edge in boundaries(data) for near in (edge - 1, edge, edge + 1)}):
        if 0 <= place < len(data):
            with pytest.raises(Failure, match=f"truncated: it ends at byte {place}$"):
                received(data[:place])


@given(st.data())
def test_truncated_anywhere(choice: st.DataObject) -> None:
    data = written(RUNS)
    place = choice.draw(st.integers(0, len(data) - 1))
    with pytest.raises(Failure, match=f"truncated: it ends at byte {place}$"):
        received(data[:place])


@given(st.data())
def test_one_bit_is_different(choice: st.DataObject) -> None:
    data = bytearray(written(RUNS))
    place = choice.draw(st.integers(0, len(data) - 1))
    data[place] ^= 1 << choice.draw(st.integers(0, 7))
    with pytest.raises(Failure, match="damaged at byte|truncated"):
        received(bytes(data))


def test_every_byte_of_the_headers_counts() -> None:
    whole = written(RUNS[2:])
    for place in range(0, len(whole), 7):  # prime to all sizes in a header
        data = bytearray(whole)
        data[place] ^= 0x01
        with pytest.raises(Failure, match="at byte"):
            received(bytes(data))


def members(data: bytes) -> list[bytes]:
    """Return the members, each with its headers and padding; the last includes the end of the archive."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        starts = [member.offset for member in archive] + [len(data)]
    return [data[start:end] for start, end in zip(starts, starts[1:])]


@pytest.mark.parametrize(
    "order",
    [[0, 2, 1, 3, 4, 5], [0, 1, 2, 3, 5], [0, 1, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 5], [0, 1, 2, 3, 4, 4, 5], [5]],
    ids=["swapped", "one missing", "one twice", "no manifest", "nothing between", "last twice", "end only"],
)
def test_members_in_another_order(order: list[int]) -> None:
    parts = members(written(RUNS))
    with pytest.raises(Failure, match="damaged at byte"):
        received(b"".join(parts[number] for number in order))


def test_runs_of_two_backups_mixed() -> None:
    """The same positions and sizes with another content, each with a correct checksum."""
    other = [(offset, bytes(len(data))) for offset, data in RUNS]
    parts, others = members(written(RUNS)), members(written(other))
    with pytest.raises(Failure, match="damaged at byte .* totals"):
        received(b"".join([*parts[:2], others[2], *parts[3:]]))


def test_something_follows() -> None:
    data = written(RUNS)
    assert received(data + bytes(10_000))[1] == RUNS  # tar(1) and dd(1) may pad it so
    with pytest.raises(Failure, match="damaged at byte .* follows"):
        received(data + bytes(10_000) + b"x")
    with pytest.raises(Failure, match="damaged at byte .* follows"):
        received(data + data)


@pytest.mark.parametrize(
    "runs",
    [[(5, b"abc"), (7, b"d")], [(5, b"abc"), (5, b"abc")], [((1 << 40) - 1, b"ab")], [(5, b"")]],
    ids=["overlapping", "the same place", "behind the end of the disk", "empty"],
)
def test_runs_that_cannot_be(runs: list[Run]) -> None:
    with pytest.raises(Failure, match="does not belong there"):
        received(written(runs))


@pytest.mark.parametrize(
    "change",
    [
        {"disk_size": -1},
        {"disk_size": 1.5},
        {"disk_size": True},
        *({field: 10**400} for field in ("disk_size", "runs", "bytes", "index")),
        {"instance": "\u00fc"},
        {"instance": None},
        {"volumes": (VOLUME._replace(start=1 << 40),)},
        {"volumes": (VOLUME._replace(size=-1),)},
        {"volumes": (VOLUME._replace(size="1"),)},  # type: ignore[arg-type]
    ],
)
def test_manifest_that_makes_no_sense(change: dict[str, object]) -> None:
    """Anyone can compute checksums."""
    with pytest.raises(Failure, match="damaged at byte 0: its manifest makes no sense"):
        received(written(RUNS, manifest(RUNS)._replace(**change)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"format": "imageos"}', "\xff", '{"format": "imageos", "version": 1}', "[" * 100_000],
)
def test_manifest_that_is_none(text: str) -> None:
    with pytest.raises(Failure, match="damaged at byte 0"):
        stream.parse_manifest(text.encode("latin-1"))


def test_version_to_come() -> None:
    with pytest.raises(Failure, match="does not know"):
        stream.parse_manifest(b'{"format": "imageos", "version": 2}')


def test_headers_as_python_writes_them() -> None:
    """Python's tarfile writes the same headers."""
    info = tarfile.TarInfo("disk/1048576")
    info.size, info.mtime, info.mode = 4096, 1_700_000_000, 0o600
    info.uname = info.gname = "root"
    digest = "0" * 64
    ours = stream.header(info.name, info.size, digest, int(info.mtime))
    info.pax_headers = {stream.RECORD: digest}
    theirs = info.tobuf(tarfile.PAX_FORMAT)
    assert ours[BLOCK : 2 * BLOCK] == theirs[BLOCK : 2 * BLOCK]
    parsed = tarfile.TarInfo.frombuf(ours[2 * BLOCK :], "ascii", "strict")
    assert (parsed.name, parsed.size, parsed.mtime, parsed.mode) == (info.name, 4096, info.mtime, 0o600)
    assert stream.is_ours(written([])) and not stream.is_ours(ours)


# --- looking ahead ---------------------------------------------------------------------------------------


def test_slow_pipe() -> None:
    """A pipe may return less than requested."""
    reader, writer = os.pipe()
    os.write(writer, b"ab")
    source = Source(reader)
    assert source.peek(1) == b"a"
    os.write(writer, b"cdef")
    assert source.peek(3) == b"abc"
    assert source.exactly(4) == b"abcd" and source.position == 4
    os.close(writer)
    assert source.peek(9) == b"ef" and source.read(9) == b"ef" and source.read(9) == b""
    with pytest.raises(Failure, match="ends at byte 6"):
        source.exactly(1)
    os.close(reader)


def test_replayed() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"0123456789")
    os.close(writer)
    source = Source(reader)
    source.peek(4)
    with source.replayed() as (ahead, rest):
        assert os.read(ahead, 99) + os.read(rest, 99) == b"0123456789"
    os.close(reader)
