"""Find images by name, and detect their format by their first bytes. The tiers with real disks unpack them."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_odd

from imageos.errors import Failure, Interrupted
from imageos.images import dump, imagefile, imagetypes, preview, tarball, wholeness
from imageos.images.imagefile import Image, check_stages, zstd_frame_size
from imageos.run import Finished
from imageos.settings import Settings

MAGIC = {
    "gzip": b"\x1f\x8b\x08\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ\x00",
    "bzip2": b"BZh9",
    "lz4": b"\x04\x22\x4d\x18",
}
SUFFIX = {"gzip": ".tar.gz", "zstd": ".tar.zst", "xz": ".tar.xz", "bzip2": ".tar.bz2", "lz4": ".tar.lz4"}


def archive(name: str = "etc/hostname", size: int = 7, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar archive that contains one file."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as tar:
        member = tarfile.TarInfo(name)
        member.size = size
        tar.addfile(member, io.BytesIO(b"x" * size))
    return made.getvalue()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return the settings for an image `tiny` in an empty directory."""
    directory = tmp_path / "images"
    directory.mkdir()
    return Settings(image_dir=str(directory), image_name="tiny", arch="x86_64", image_type="tarball")


@pytest.fixture(autouse=True)
def no_descriptor_stays(tmp_path: Path) -> Iterator[None]:
    """Close images, which stay open until the command ends."""
    yield
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(str(tmp_path)):
                os.close(int(name))
        except OSError:
            continue  # it belonged to the listing


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the only directory in PATH, with every program except the parallel ones."""
    directory = tmp_path / "tools"
    directory.mkdir()
    for name in ("tar", "gzip", "zstd", "xz", "bzip2", "lz4"):
        add(directory, name)
    monkeypatch.setenv("PATH", str(directory))
    return directory


def add(directory: Path, name: str) -> None:
    (directory / name).touch()
    (directory / name).chmod(0o755)


def put(settings: Settings, content: bytes, suffix: str = ".tar") -> Path:
    path = Path(settings.image_dir, f"tiny-x86_64{suffix}")
    path.write_bytes(content)
    return path


# Found


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4"])
def test_found_by_name(suffix: str, settings: Settings) -> None:
    path = put(settings, archive(), suffix)
    found = imagetypes.find(settings)
    assert found.path == str(path)
    assert found.size == path.stat().st_size
    assert os.path.samestat(os.stat(found.descriptor), path.stat())


@pytest.mark.parametrize("compression", MAGIC)
def test_content_counts_not_the_name(compression: str, settings: Settings, tools: Path) -> None:
    put(settings, MAGIC[compression] + bytes(1000), ".tar")
    assert imagetypes.find(settings).decompress[0] == compression


def test_suffix_does_not_count(settings: Settings) -> None:
    put(settings, archive(), ".tar.gz")
    assert imagetypes.find(settings).compression == ""
    assert imagetypes.find(settings).decompress == ()


@pytest.mark.parametrize(("compression", "parallel"), [("gzip", "pigz"), ("bzip2", "lbzip2")])
def test_faster_program_first(compression: str, parallel: str, settings: Settings, tools: Path) -> None:
    put(settings, MAGIC[compression], SUFFIX[compression])
    assert imagetypes.find(settings).decompress == (compression, "-dc")
    add(tools, parallel)
    assert imagetypes.find(settings).decompress == (parallel, "-dc")


def test_what_is_missing_is_named(settings: Settings, tools: Path) -> None:
    (tools / "zstd").unlink()
    put(settings, MAGIC["zstd"], ".tar.zst")
    with pytest.raises(Failure, match="missing on this node: zstd"):
        tarball.check(imagetypes.find(settings))


def test_no_name() -> None:
    with pytest.raises(Failure, match="^IMAGE_NAME is not set$") as raised:
        imagetypes.find(Settings())
    assert "image_name" in str(raised.value.hint)


def test_missing_image(settings: Settings) -> None:
    for name in ("other-x86_64.tar.gz", "tiny-x86.tar.gz"):
        Path(settings.image_dir, name).touch()
    with pytest.raises(Failure) as raised:
        imagetypes.find(settings)
    assert str(raised.value).startswith(f"cannot find image {settings.image_dir}/tiny-x86_64.tar")
    for name in ("IMAGE_NAME", "ARCH", "IMAGE_DIR", "tiny-x86.tar.gz", "other-x86_64.tar.gz"):
        assert name in str(raised.value.hint)


def test_missing_image_in_a_full_directory(settings: Settings) -> None:
    for n in range(100):
        Path(settings.image_dir, f"image-{n:02d}.tar").touch()
    with pytest.raises(Failure) as raised:
        imagetypes.find(settings)
    assert str(raised.value.hint).endswith("image-06.tar, image-07.tar, and 92 more")


def test_missing_directory(settings: Settings) -> None:
    os.rmdir(settings.image_dir)
    with pytest.raises(Failure) as raised:
        imagetypes.find(settings)
    assert f"IMAGE_DIR {settings.image_dir}: No such file or directory" in str(raised.value.hint)


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link", "empty"])
def test_what_is_no_image(kind: str, settings: Settings) -> None:
    path = put(settings, b"")
    if kind != "empty":
        path.unlink()
    make_odd(path, kind)
    with pytest.raises(Failure) as raised:
        imagetypes.find(settings)
    assert str(path) in str(raised.value)


# The header of a tarball, uncompressed


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["bin", "etc/\u00fcmlaut", "usr/" + "d/" * 90 + "f"], ids=["short", "umlaut", "long"])
def test_real_archives(form: int, name: str, settings: Settings, tools: Path) -> None:
    put(settings, archive(name, form=form))
    tarball.check(imagetypes.find(settings))


NO_ARCHIVE = {
    "zeroes": bytes(10240),
    "text": b"this is not an archive\n" * 500,
    "error page": b"<!DOCTYPE html><title>404 Not Found</title>".ljust(10240),
    "garbage": bytes(range(256)) * 40,
    "half a header": archive()[:511],
    "one byte": b"x",
}


@pytest.mark.parametrize("content", NO_ARCHIVE)
def test_no_archive(content: str, settings: Settings, tools: Path) -> None:
    put(settings, NO_ARCHIVE[content])
    with pytest.raises(Failure, match="is not a tarball, or damaged at its beginning"):
        tarball.check(imagetypes.find(settings))


@pytest.mark.parametrize("cut", [1, 512, 1024])
def test_end_is_missing(cut: int, settings: Settings, tools: Path) -> None:
    whole = archive(size=10 * 512)
    put(settings, whole.rstrip(b"\0") + bytes(1024 - cut))
    with pytest.raises(Failure, match="truncated"):
        imagetypes.check(imagetypes.IMAGE_TYPES["tarball"], imagetypes.find(settings))


HEADER = archive("name", 8)[:512]


def is_archive(header: bytes) -> bool:
    """Return True if an archive with this beginning is accepted, as far as its beginning tells."""
    descriptor = os.memfd_create("image")
    try:
        os.write(descriptor, header + bytes(1024))
        tarball.check(Image("image", descriptor, len(header) + 1024, "", whole=False))
    except Failure:
        return False
    finally:
        os.close(descriptor)
    return True


def test_checksum_may_be_signed() -> None:
    """Old programs wrote a signed checksum."""
    block = bytearray(HEADER)
    block[0] = 0xE4
    block[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert is_archive(bytes(block))


@given(st.integers(0, 511), st.integers(1, 255))
def test_any_changed_byte_is_noticed(place: int, change: int) -> None:
    assert is_archive(HEADER)
    block = bytearray(HEADER)
    block[place] ^= change
    # only white space around the checksum, or another way to write it, leaves its value as it was
    if is_archive(bytes(block)):
        assert 148 <= place < 156


@given(st.binary(min_size=512, max_size=512))
def test_garbage(block: bytes) -> None:
    assert not is_archive(block)


@given(st.binary(min_size=8, max_size=8))
def test_garbage_for_a_checksum(checksum: bytes) -> None:
    is_archive(HEADER[:148] + checksum + HEADER[156:])


# End of unpacking: status and stderr of the decompressor, status of its consumer, the message


@pytest.mark.parametrize(
    ("upstream", "said", "last", "cause"),
    [
        (0, "", 0, ""),
        (2, "gzip: decompression OK, trailing garbage ignored", 0, ""),
        (2, "gzip: something else", 0, "gzip failed .exit status 2.: gzip: something else"),
        (1, "gzip: trailing garbage", 0, "gzip failed .exit status 1."),
        (1, "gzip: crc error", 0, "gzip failed .exit status 1.: gzip: crc error"),
        (2, "gzip: decompression OK, trailing garbage ignored", 2, "gzip failed"),
        (-13, "", 2, "tar failed .exit status 2."),
        (-13, "", 0, "gzip failed .killed by SIGPIPE."),
        (0, "", 1, "tar failed .exit status 1."),
    ],
)
def test_end_of_unpacking(upstream: int, said: str, last: int, cause: str) -> None:
    image = Image("/images/one-x86_64.tar.gz", -1, 1, "gzip")
    finished = [Finished(["gzip", "-dc"], upstream, b"", said), Finished(["tar"], last, b"", "")]
    if not cause:
        check_stages(image, finished)
        return
    with pytest.raises(Failure, match=f"^image /images/one-x86_64.tar.gz is damaged or truncated: {cause}"):
        check_stages(image, finished)


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        ("20 ff", 255),  # a single segment: one byte for the size, no window
        ("60 f4 00", 500),  # two bytes: 256 less
        ("40 58 f4 00", 500),  # the same after the byte of a window
        ("80 58 01 00 00 00", 1),
        ("a0 00 00 00 01", 1 << 24),
        ("e0 00 00 00 00 01 00 00 00", 1 << 32),
        ("61 07 f4 00", 500),  # after the id of a dictionary
        ("00 58", 0),  # no size
    ],
)
def test_size_in_the_header_of_zstd(frame: str, size: int) -> None:
    """RFC 8878, 3.1.1.1."""
    assert zstd_frame_size((MAGIC["zstd"] + bytes.fromhex(frame)).ljust(18, b"\0")) == size


def test_a_skippable_frame_has_no_size() -> None:
    assert zstd_frame_size(b"\x55\x2a\x4d\x18\xc8\0\0\0".ljust(18, b"\xff")) == 0


@pytest.mark.parametrize("length, most", [(100, 100_000), (26_000, 645)])
def test_restore_that_talks_for_ever(length: int, most: int) -> None:
    """Deeper and deeper into a directory that holds itself, each line a little longer."""
    listen = dump.watch("a.dump")
    for _ in range(most):
        listen("x" * length)
    with pytest.raises(Failure, match="image a.dump is damaged"):
        listen("x" * length)


# The frames of a zstd file


def zstd_frame(blocks: list[tuple[int, int]], descriptor: int = 0x04) -> bytes:
    """Return a frame of blocks (kind, size), with a window descriptor and a checksum."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([descriptor, 0x58])
    for number, (kind, size) in enumerate(blocks, 1):
        frame += (size << 3 | kind << 1 | (number == len(blocks))).to_bytes(3, "little")
        frame += bytes(1 if kind == 1 else size)
    return frame + (bytes(4) if descriptor & 4 else b"")


FRAMES = zstd_frame([(0, 10), (1, 100_000), (2, 30)])
SKIPPED = b"\x5e\x2a\x4d\x18" + (7).to_bytes(4, "little") + bytes(7)


@pytest.mark.parametrize("data", [FRAMES, FRAMES * 3, SKIPPED + FRAMES, FRAMES + SKIPPED, zstd_frame([(0, 0)], 0)])
def test_whole_frames(data: bytes) -> None:
    def is_whole(content: bytes) -> bool:
        descriptor = os.memfd_create("image")
        try:
            os.write(descriptor, content)
            return wholeness._has_whole_frames(Image("image", descriptor, len(content), "zstd"))
        finally:
            os.close(descriptor)

    assert is_whole(data)
    boundaries = {len(piece) for piece in (b"", FRAMES, FRAMES * 2, SKIPPED)}
    for size in set(range(len(data))) - boundaries:
        assert not is_whole(data[:size]), size
    assert not is_whole(data + b"garbage")


def test_signal_when_enough_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come while the rest of the pipeline is ended."""

    def unpacked(_image: Image) -> Iterator[bytes]:
        try:
            yield bytes(imagefile.START)
        finally:
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(imagefile, "unpacked", unpacked)
    with pytest.raises(Interrupted):
        _ = Image("image", -1, 10, "gzip").start


def test_disk_of_nothing_but_swap() -> None:
    """Of a group that has its volume in the first MiB, for example."""
    assert not preview._is_readable(None, [])  # type: ignore[arg-type]
