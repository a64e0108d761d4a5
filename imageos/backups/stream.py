"""The stream of export and import: a tar archive (POSIX.1-2017, pax) of the used parts of one disk.

    manifest.json   what the disk is, and how much follows
    disk/OFFSET     a run of bytes that belongs at that offset of the disk; any number, ascending
    end.json        totals, and a hash over the hashes of all runs

Every member has the SHA-256 of its content in a pax record, where tar(1) makes an extended attribute of it. There is
exactly one way to write a given stream, so that a reader finds every changed bit: it makes each header itself, and
compares. Pure but for the descriptors read and written.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from imageos.errors import Failure, explained
from imageos.images.tarball import BLOCK, octal
from imageos.node import linux

VERSION = 1
HEADER = 3 * BLOCK  # the pax header, its records, the header proper
RUN = 1 << 20  # bytes of the longest run
HASHERS = 2  # threads of an export that hash
DOCUMENT = 1 << 20  # bytes of the longest JSON document
RECORD = "SCHILY.xattr.user.sha256"
MANIFEST, END = "manifest.json", "end.json"
PADDING = bytes(BLOCK)
TRAILER = bytes(2 * BLOCK)
MODE = 0o600
# name, mode, uid, gid, size, time, checksum, type, (link,) magic and version, names of user and group
USTAR = struct.Struct("100s8s8s8s12s12s8sc100x8s32s32s183x")

Runs = Iterable[tuple[int, int]]  # offset, length


class Volume(NamedTuple):
    """A partition, or with number 0 the whole disk, as the exporter saw it."""

    number: int
    start: int
    size: int
    type: str
    content: str


class Manifest(NamedTuple):
    disk_size: int
    table: str  # gpt, dos, or an empty string for none
    volumes: tuple[Volume, ...]
    runs: int
    bytes: int  # of all runs
    created: int  # seconds since 1970
    instance: str = ""
    index: int = 0  # type: ignore[assignment]  # of the disk; a tuple has a method of that name
    exporter: str = ""


class Totals:
    """The content of end.json; its hash is that of the output of `sha256sum disk/*`, in the order of the stream."""

    def __init__(self) -> None:
        self.runs = 0
        self.bytes = 0
        self._hash = hashlib.sha256()

    def add(self, offset: int, length: int, digest: str) -> None:
        self.runs += 1
        self.bytes += length
        self._hash.update(f"{digest}  disk/{offset}\n".encode())

    def document(self) -> bytes:
        return _json({"runs": self.runs, "bytes": self.bytes, "sha256": self._hash.hexdigest()})


# --- writing ---------------------------------------------------------------------------------------------


def count(runs: Runs) -> tuple[int, int, int]:
    """Return how many runs there are, their bytes, and the bytes that their members take."""
    number = total = padded = 0
    for _, length in runs:
        number += 1
        total += length
        padded += HEADER + _padded(length)
    return number, total, padded


def length(manifest: Manifest, members: int) -> int:
    """Return the bytes of a stream whose members of runs take `members`."""
    end = _json({"runs": manifest.runs, "bytes": manifest.bytes, "sha256": "0" * 64})
    return 2 * HEADER + _padded(len(manifest_document(manifest))) + members + _padded(len(end)) + len(TRAILER)


def write(output: int, manifest: Manifest, runs: Runs, read_into: Callable[[int, memoryview], None]) -> Iterator[int]:
    """Write a whole stream; after each run, yield how many bytes of the disk have been sent."""
    document = manifest_document(manifest)
    _write_member(output, MANIFEST, document, _digest(document), manifest.created)
    totals = Totals()
    for offset, data, digest in _hashed(runs, read_into):
        _write_member(output, f"disk/{offset}", data, digest, manifest.created)
        totals.add(offset, len(data), digest)
        yield totals.bytes
    document = totals.document()
    _write_member(output, END, document, _digest(document), manifest.created)
    _write(output, TRAILER)


def _hashed(runs: Runs, read_into: Callable[[int, memoryview], None]) -> Iterator[tuple[int, memoryview, str]]:
    """Yield each run, its content (valid until the next one) and its hash. Other threads hash while the runs before
    are written: as measured, one processor hashes half as fast as a disk is read."""
    buffers = [memoryview(bytearray(RUN)) for _ in range(HASHERS + 1)]
    waiting: deque[tuple[int, memoryview, Future[str]]] = deque()
    with ThreadPoolExecutor(HASHERS) as hashers:
        for number, (offset, size) in enumerate(runs):
            data = buffers[number % len(buffers)][:size]
            read_into(offset, data)
            waiting.append((offset, data, hashers.submit(_digest, data)))
            if len(waiting) > HASHERS:
                done, content, digest = waiting.popleft()
                yield done, content, digest.result()
        for done, content, digest in waiting:
            yield done, content, digest.result()


def manifest_document(manifest: Manifest) -> bytes:
    volumes = [volume._asdict() for volume in manifest.volumes]
    return _json({"format": "imageos", "version": VERSION, **manifest._asdict(), "volumes": volumes})


def header(name: str, size: int, digest: str, created: int) -> bytes:
    """Return what precedes a member's content."""
    record = _record(f"{RECORD}={digest}")
    return (
        _ustar(f"PaxHeaders/{name}", len(record), created, b"x")
        + record.ljust(BLOCK, b"\0")
        + _ustar(name, size, created, b"0")
    )


def _record(text: str) -> bytes:
    """Return a pax record: its own length in front, which counts itself."""
    rest = len(text) + 2
    total = rest + len(str(rest))
    total = rest + len(str(total))
    return f"{total} {text}\n".encode()


def _ustar(name: str, size: int, created: int, kind: bytes) -> bytes:
    mode, root = b"%07o\0" % MODE, b"%07o\0" % 0
    sizes = b"%011o\0" % size, b"%011o\0" % created
    block = USTAR.pack(name.encode(), mode, root, root, *sizes, b" " * 8, kind, b"ustar\x0000", b"root", b"root")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _write_member(output: int, name: str, data: bytes | memoryview, digest: str, created: int) -> None:
    padding = PADDING[: _padded(len(data)) - len(data)]
    _write(output, header(name, len(data), digest, created), data, padding)


def _write(output: int, *pieces: bytes | memoryview) -> None:
    with explained("cannot write the backup stream"):
        for piece in pieces:
            linux.write_all(output, piece)


# --- reading ---------------------------------------------------------------------------------------------


class Source:
    """Bytes that are read once, from first to last, but can be looked at before.

    `check` is called at the end; it raises Failure if they cannot be trusted although they came.
    """

    def __init__(self, descriptor: int, check: Callable[[], None] = lambda: None) -> None:
        self._descriptor = descriptor
        self._check = check
        self._ahead = b""
        self.position = 0

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes, or fewer if the stream ends before."""
        while len(self._ahead) < count:
            more = bytearray(count - len(self._ahead))
            received = self._receive(memoryview(more))
            if not received:
                break
            self._ahead += more[:received]
        return self._ahead[:count]

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes, or fewer if the stream ends before."""
        data = bytearray(count)
        return bytes(memoryview(data)[: self.fill(memoryview(data))])

    def fill(self, buffer: memoryview) -> int:
        """Read until `buffer` is full or the stream ends; return how much there was."""
        done = min(len(self._ahead), len(buffer))
        buffer[:done] = self._ahead[:done]
        self._ahead = self._ahead[done:]
        while done < len(buffer):
            received = self._receive(buffer[done:])
            if not received:
                break
            done += received
        self.position += done
        return done

    def exactly(self, count: int) -> bytes:
        """Return the next `count` bytes; fail if the stream ends before."""
        data = self.read(count)
        if len(data) < count:
            raise self.truncated()
        return data

    def truncated(self, least: int | None = None) -> Failure:
        """Return the failure of a stream that ends here; raise a better reason if the writer failed."""
        self._check()
        of = "" if least is None else f" of at least {least}"
        return Failure(f"the backup stream is truncated: it ends at byte {self.position}{of}")

    def end(self) -> None:
        """Read what is left, so that the sender gets no broken pipe."""
        while self.read(RUN):
            pass
        self._check()

    @contextmanager
    def replayed(self) -> Iterator[tuple[int, int]]:
        """Yield two descriptors for a process that reads on: what was looked at (less than a pipe holds), and the rest.

        Afterwards `position` means nothing.
        """
        ahead, writer = os.pipe()
        with linux.closing(ahead):
            with linux.closing(writer):
                os.write(writer, self._ahead)
            self._ahead = b""
            yield ahead, self._descriptor

    def handed_over(self, count: int) -> int:
        """Return the descriptor for a process that reads exactly the next `count` bytes from it."""
        assert not self._ahead
        self.position += count
        return self._descriptor

    def _receive(self, buffer: memoryview) -> int:
        with explained(f"cannot read the backup stream after byte {self.position}"):
            return os.readv(self._descriptor, [buffer])


def is_ours(begin: bytes) -> bool:
    """Return whether a stream that begins so is one of imageos, as far as so many bytes tell."""
    name = f"PaxHeaders/{MANIFEST}\0".encode()
    return bool(begin) and begin[: len(name)] == name[: len(begin)]


def read_manifest(source: Source) -> Manifest:
    """Return the first member; fail if the stream is not whole so far, or of a later version."""
    created = octal(source.peek(BLOCK)[136:148])
    name, size, digest = _read_header(source, created)
    if name != MANIFEST or size > DOCUMENT:
        raise damaged(0, f"it begins with {name!r} of {size} bytes instead of {MANIFEST}")
    document = bytearray(size)
    _read_content(source, memoryview(document), digest, 0)
    manifest = parse_manifest(bytes(document))
    if created != manifest.created:
        raise damaged(0, "its manifest has another time than its header")
    return manifest


def parse_manifest(document: bytes) -> Manifest:
    try:
        values = json.loads(document)
        if (values.pop("format"), values.pop("version")) != ("imageos", VERSION):
            raise Failure(
                "the backup stream has a format that this version of imageos does not know",
                hint="use the version of imageos that made the backup, or a later one",
            )
        manifest = Manifest(volumes=tuple(Volume(**volume) for volume in values.pop("volumes")), **values)
        _check_manifest(manifest)
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(0, f"its manifest makes no sense: {error}") from None


def read_runs(source: Source, manifest: Manifest) -> Iterator[tuple[int, memoryview]]:
    """Yield every run (offset, content), checked; the content is valid until the next but one.

    Fail for whatever is not as it was written, at the latest when the stream has ended.
    """
    totals = Totals()
    buffers = [memoryview(bytearray(RUN)) for _ in range(2)]
    reached = 0
    while True:
        position = source.position
        name, size, digest = _read_header(source, manifest.created)
        if name == END:
            break
        offset = int(name[5:]) if name.startswith("disk/") and name[5:].isdecimal() else -1
        if offset < reached or offset + size > manifest.disk_size or not 0 < size <= RUN:
            raise damaged(position, f"{name!r} with {size} bytes does not belong there")
        buffers.reverse()
        data = buffers[0][:size]
        _read_content(source, data, digest, position)
        totals.add(offset, size, digest)
        reached = offset + size
        yield offset, data
    _read_end(source, position, size, digest, totals)
    if (totals.runs, totals.bytes) != (manifest.runs, manifest.bytes):
        promised = f"the manifest says {manifest.runs} with {manifest.bytes}"
        raise damaged(position, f"{totals.runs} runs with {totals.bytes} bytes came, {promised}")


def damaged(position: int, why: str) -> Failure:
    return Failure(f"the backup stream is damaged at byte {position}: {why}")


def _read_end(source: Source, position: int, size: int, digest: str, totals: Totals) -> None:
    document = totals.document()
    if (size, digest) != (len(document), _digest(document)):
        raise damaged(position, "its totals are not those of the runs before them")
    _read_content(source, memoryview(bytearray(size)), digest, position)
    more = source.exactly(len(TRAILER))
    while more:
        if more.strip(b"\0"):
            raise damaged(source.position - len(more), "something follows its end")
        more = source.read(RUN)
    source.end()


def _read_header(source: Source, created: int) -> tuple[str, int, str]:
    """Return name, size and SHA-256 of the next member, if its header is exactly as we write it."""
    position = source.position
    data = source.exactly(HEADER)
    name = data[2 * BLOCK : 2 * BLOCK + 100].rstrip(b"\0").decode("ascii", "replace")
    size = octal(data[2 * BLOCK + 124 : 2 * BLOCK + 136])
    digest = data[BLOCK : 2 * BLOCK].partition(b"=")[2][:64].decode("ascii", "replace")
    if len(name) > 80 or size < 0 or created < 0 or header(name, size, digest, created) != data:
        raise damaged(position, "no header of a member is there")
    return name, size, digest


def _read_content(source: Source, data: memoryview, digest: str, position: int) -> None:
    if source.fill(data) < len(data):
        raise source.truncated()
    if _digest(data) != digest:
        raise damaged(position, "the content of the member there does not have its checksum")
    if source.exactly(_padded(len(data)) - len(data)).strip(b"\0"):
        raise damaged(source.position, "padding is not zero")


def _check_manifest(manifest: Manifest) -> None:
    numbers = [manifest.disk_size, manifest.runs, manifest.bytes, manifest.created, manifest.index]
    for volume in manifest.volumes:
        numbers += [volume.number, volume.start, volume.size, manifest.disk_size - volume.start - volume.size]
    texts = [manifest.table, manifest.instance, manifest.exporter]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) or not all(map(str.isascii, texts)):
        raise ValueError("a number or text is out of range")


def _padded(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
