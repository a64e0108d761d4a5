"""Nothing that is kept for others takes the last room of a directory, and nothing is kept that is of no use."""

from __future__ import annotations

import gzip
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import backups
import pytest
from http_server import Server
from support import HANGS, MIB, Node, digest, run

from imageos.errors import Failure
from imageos.images import curl, fetch, imagetypes, qcow2
from imageos.node import space
from imageos.settings import Settings

MakeDisk = Callable[..., Path]
EIB = 1 << 60


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory with 64 MiB, of which 3.2 stay free."""
    path = tmp_path / "small"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64M,mode=700", "tmpfs", path)
    yield path
    run("umount", path)


def free(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


@contextmanager
def watched(path: Path) -> Iterator[list[int]]:
    """The least that has been free, as far as looking all the time can tell."""
    least, is_over = [free(path)], threading.Event()

    def look() -> None:
        while not is_over.wait(0.001):
            least[0] = min(least[0], free(path))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield least
    finally:
        is_over.set()
        thread.join()


# --- EXPORT_DIR -------------------------------------------------------------------------------------------


def tar_header(size: int, name: bytes = b"./disk.img") -> bytes:
    """As GNU tar writes it; sizes of 8 GiB and more in base 256."""
    field = b"%011o\0" % size if size < 1 << 33 else b"\x80" + size.to_bytes(11, "big")
    header = b"".join(
        [name.ljust(100, b"\0"), b"0000600\0", b"0000000\0" * 2, field, b"%011o\0" % 0, b" " * 8, b"0", bytes(100),
         b"ustar  \0", bytes(247)]
    )  # fmt: skip
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def qcow2_header(size: int, backing: int = 0, incompatible: int = 0, snapshots: int = 0) -> bytes:
    values = (qcow2.MAGIC, 3, backing, 10, 16, size, 0, 16, 196608, 65536, 1, snapshots, 0)
    return (qcow2.HEADER.pack(*values) + struct.pack(">QQQII", incompatible, 0, 0, 4, 104)).ljust(65536, b"\0")


def restore(node: Node, beginning: bytes, disk: Path, compressed: bool = False, endless: bool = True) -> backups.Result:
    """import of a stream that begins so, and goes on for ever."""
    data = gzip.compress(beginning, 1) if compressed else beginning
    more = gzip.compress(bytes(MIB), 1) if compressed else bytes(MIB)
    values = backups.environment(node, "import", disk, index=1)
    reader, writer = os.pipe()
    call = backups.Running(node, "import", values, reader, None)
    os.close(reader)

    def send() -> None:
        with open(writer, "wb", buffering=0) as stream:
            try:
                stream.write(data)
                while endless:
                    stream.write(more)
            except BrokenPipeError:
                pass

    thread = threading.Thread(target=send)
    thread.start()
    call.announced()
    result = call.result()
    thread.join()
    return result


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "member, header, words",
    [
        (4 * EIB, qcow2_header(4 * EIB, backing=512), "backing file"),
        (4 * EIB, qcow2_header(MIB, backing=512), "backing file"),
        (4 * EIB, qcow2_header(4 * EIB), "header is damaged"),
        (4 * EIB, qcow2_header(EIB), "smaller than the one of the backup"),
        (100 * MIB, qcow2_header(33 * MIB), "smaller than the one of the backup"),
        (4 * EIB, qcow2_header(MIB, incompatible=qcow2.DATA_FILE), "external data file"),
        (4 * EIB, qcow2_header(32 * MIB), "cannot be the image of a disk of 32 MiB alone"),
        (4 * EIB, qcow2_header(32 * MIB, snapshots=9), "cannot be the image of a disk of 32 MiB alone"),
        (53 * MIB, qcow2_header(32 * MIB), "cannot be the image of a disk of 32 MiB alone"),
    ],
)
def test_judged_before_the_first_byte_is_kept(
    member: int, header: bytes, words: str, compressed: bool, node: Node, disk: MakeDisk, tmp_path: Path
) -> None:
    """There is not even a place for it."""
    node.defaults(f"EXPORT_DIR={tmp_path}/nowhere\n")
    target = disk(32)
    before = digest(target)
    restore(node, tar_header(member) + header, target, compressed).failed(
        "disk.img" if "smaller" not in words else "", words
    )
    assert digest(target) == before


def test_no_room_for_a_backup(node: Node, disk: MakeDisk, small: Path) -> None:
    """The cause names the directory, what is needed and what is free; nothing is kept."""
    node.defaults(f"EXPORT_DIR={small}\n")
    target = disk(128)
    before = digest(target)
    with watched(small) as least:
        stream = tar_header(62 * MIB) + qcow2_header(128 * MIB)
        result = restore(node, stream, target).failed(
            "62 MiB", "disk.img", f"EXPORT_DIR {small}", "64 MiB free", "3.2 MiB"
        )
    assert "EXPORT_DIR" in result.log.splitlines()[-2]
    assert least[0] == 64 * MIB
    assert digest(target) == before


def test_room_that_goes_meanwhile(node: Node, disk: MakeDisk, small: Path) -> None:
    """Others keep something there, too."""
    node.defaults(f"EXPORT_DIR={small}\n")
    target = disk(128)
    values = backups.environment(node, "import", target, index=1)
    reader, writer = os.pipe()
    call = backups.Running(node, "import", values, reader, None)
    os.close(reader)
    with open(writer, "wb", buffering=0) as stream, watched(small) as least:
        stream.write(tar_header(40 * MIB) + qcow2_header(128 * MIB) + b"\1" * (10 * MIB - 65536))
        deadline = time.monotonic() + HANGS
        while free(small) > 56 * MIB:
            assert time.monotonic() < deadline
        (small / "other").write_bytes(bytes(30 * MIB))
        with pytest.raises(BrokenPipeError):
            for _ in range(64):
                stream.write(b"\1" * MIB)
        call.announced()
        call.result().failed(f"EXPORT_DIR {small}", "needed", "have to stay free")
    assert least[0] >= space.reserve(os.statvfs(small))
    assert free(small) == 34 * MIB


@pytest.mark.parametrize(
    "options, most",
    [("cluster_size=512,refcount_bits=64", 8 * MIB), ("cluster_size=512", 8 * MIB), ("", MIB),
     ("cluster_size=2M", qcow2.MARGIN)],
)  # fmt: skip
def test_the_largest_qcow2_of_a_disk(options: str, most: int, tmp_path: Path) -> None:
    """All of it in use, with as many tables beside it as there can be: it may come."""
    raw, image = tmp_path / "raw", tmp_path / "qcow2"
    raw.write_bytes(os.urandom(MIB) * 64)
    more = ["-o", options] if options else []
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "0", *more, raw, image)
    assert 0 < image.stat().st_size - 64 * MIB <= most
    assert qcow2.largest_file(64 * MIB) == 64 * MIB + 8 * MIB + qcow2.MARGIN


# --- CACHE_DIR --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"announced": 4 * EIB}, {"announced": -1}, {"chunked": True}],
    ids=["announced", "too much", "not announced", "chunked"],
)  # fmt: skip
def test_no_room_for_a_download(how: dict[str, object], server: Server, small: Path) -> None:
    settings = Settings(
        image_url=server.put("/a.tar", bytes(62 * MIB), **how), image_type="tarball", cache_dir=str(small)
    )
    with watched(small) as least, pytest.raises(Failure) as raised:
        fetch.fetched(settings, [settings.image_url])
    assert f"CACHE_DIR {small} has no space left for image {server.url}/a.tar: " in str(raised.value)
    assert "needed" in str(raised.value) and "of which 3.2 MiB have to stay free" in str(raised.value)
    is_announced = how in ({}, {"announced": 4 * EIB})
    assert least[0] >= (63 * MIB if is_announced else space.reserve(os.statvfs(small)))
    assert os.listdir(small) == []


def test_room_for_a_download_that_goes_meanwhile(server: Server, small: Path) -> None:
    settings = Settings(image_url=server.put("/a.tar", bytes(40 * MIB)), image_type="tarball", cache_dir=str(small))
    server.files["/a.tar"].cuts = [20 * MIB, 0, 0, 0]
    with pytest.raises(curl.Unreachable):
        fetch.fetched(settings, [settings.image_url])
    assert free(small) < 45 * MIB, "it can be gone on with"
    (small / "other").write_bytes(bytes(30 * MIB))
    with watched(small) as least, pytest.raises(Failure, match="no space left"):
        fetch.fetched(settings, [settings.image_url])
    assert least[0] >= space.reserve(os.statvfs(small))
    assert os.listdir(small) == ["other"]
    (small / "other").unlink()
    with open(fetch.fetched(settings._replace(image_cleanup=True), [settings.image_url])[1], "rb") as file:
        assert len(file.read()) == 40 * MIB


def found(settings: Settings, disk_size: int | None = None) -> bytes:
    with open(imagetypes.find(settings, disk_size=disk_size).descriptor, "rb") as file:
        return file.read()


def tar_of(name: str, size: int) -> bytes:
    return tar_header(size, name.encode()) + bytes(-(-size // 512) * 512 + 1024)


WEB_PAGE = b"\n<!DOCTYPE html><html><title>503</title>"
NOT_WANTED: list[tuple[str, str, bytes, str]] = [
    ("tarball", "a.tar.gz", WEB_PAGE, "is a web page"),
    ("tarball", "a.tar", b"<HTML>", "is a web page"),
    ("tarball", "a.tar", b"", "is not a tarball"),
    ("tarball", "a.tar.zst", b"PK\3\4", "is not a tarball"),
    ("tarball", "a.tar", qcow2_header(MIB), "is not a tarball"),
    ("dump", "a-root.dump", b"", "is not a dump"),
    ("dump", "a-root.dump.gz", tar_header(MIB), "is not a dump"),
    ("qcow2", "a.qcow2", b"", "is not a qcow2 image"),
    ("qcow2", "a.qcow2", WEB_PAGE, "is a web page"),
    ("qcow2", "a.qcow2", b"BZ\x08\0", "is not a qcow2 image"),
    ("qcow2", "a.qcow2", qcow2_header(MIB, backing=512), "backing file"),
    ("qcow2", "a.qcow2", qcow2_header(4 * EIB), "header is damaged"),
    ("qemu", "a.img", qcow2_header(EIB), "the instance's disk has 32 MiB"),
    ("qemu", "a.img", qcow2_header(33 * MIB), "the instance's disk has 32 MiB"),
    ("qemu", "a.img", qcow2_header(MIB, incompatible=qcow2.DATA_FILE), "external data file"),
    ("qemu", "a.img", b"QED\0", "format QED"),
    ("qemu", "a.img", WEB_PAGE, "is a web page"),
    ("raw", "a.raw", qcow2_header(MIB), "is a qcow2 image, not raw"),
    ("raw", "a.raw", b"", "the instance's disk has 32 MiB"),
    ("raw", "a.raw.zst", b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 33 * MIB), "the instance's disk has 32 MiB"),
]


@pytest.mark.parametrize(("image_type", "name", "beginning", "words"), NOT_WANTED)
def test_judged_before_the_first_byte_of_a_download(
    image_type: str, name: str, beginning: bytes, words: str, server: Server, small: Path
) -> None:
    """Nobody waits for the rest: it would take a quarter of an hour."""
    url = server.put(f"/{name}", beginning.ljust(34 * MIB, b"\0"), rate=40_000)
    settings = Settings(image_url=url, image_type=image_type, cache_dir=str(small), image_checksum="no")
    with watched(small) as least, pytest.raises(Failure) as raised:
        imagetypes.find(settings, disk_size=32 * MIB)
    assert words in str(raised.value) and url in str(raised.value)
    assert server.count(f"/{name}") == 1
    assert least[0] > 64 * MIB - 16384, "nothing but a lock was there"
    assert os.listdir(small) == []


def test_raw_image_that_does_not_end(server: Server, small: Path) -> None:
    """The server has not said how much it sends: the disk is the limit."""
    url = server.put("/a.raw", bytes(60 * MIB), chunked=True)
    settings = Settings(image_url=url, image_type="raw", cache_dir=str(small), image_checksum="no")
    with watched(small) as least, pytest.raises(Failure, match="the instance's disk has 16 MiB"):
        imagetypes.find(settings, disk_size=16 * MIB)
    assert 64 * MIB > least[0] > 46 * MIB
    assert os.listdir(small) == []
    settings = settings._replace(image_url=server.put("/b.raw", bytes(16 * MIB)))
    assert len(found(settings, 16 * MIB)) == 16 * MIB


@pytest.mark.parametrize(
    "how", [{"cuts": [600]}, {"cuts": [1030]}, {"announced": -1}, {"chunked": True}, {"stalls_at": 3072}]
)
def test_small_tarball_is_judged(how: dict[str, object], server: Server, small: Path) -> None:
    """Bit by bit, and when there is not more of it than its beginning."""
    content = tar_of("a", 1024)
    url = server.put("/a.tar", content, rate=20_000, **how)
    settings = Settings(image_url=url, image_type="tarball", cache_dir=str(small), image_checksum="no")
    assert found(settings) == content


def test_what_is_there_is_judged_when_it_is_gone_on_with(server: Server, small: Path) -> None:
    """By who goes on with it: another one may have begun, for another disk."""
    url = server.put("/a.raw", bytes(20 * MIB), cuts=[10 * MIB, 0, 0, 0])
    settings = Settings(image_url=url, image_type="raw", cache_dir=str(small), image_checksum="no")
    with pytest.raises(curl.Unreachable):
        imagetypes.find(settings, disk_size=20 * MIB)
    with pytest.raises(Failure, match="the instance's disk has 19 MiB"):
        imagetypes.find(settings, disk_size=19 * MIB)
    with pytest.raises(Failure, match="not a qcow2 image"):
        imagetypes.find(settings._replace(image_type="qcow2"), disk_size=20 * MIB)
    assert os.listdir(small) == []
    assert len(found(settings, 20 * MIB)) == 20 * MIB


# --- IMAGE_DIR: see test_capture_refused ------------------------------------------------------------------
