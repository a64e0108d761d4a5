"""What programs of the node say of a stranger's disk or image, when that has taken them over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imageos import log
from imageos.disks import btrfs, partitions
from imageos.errors import Failure
from imageos.images import archive, curl, diskimage, dump, imagefile
from imageos.images.formats import FORMATS
from imageos.images.imagefile import Image
from imageos.run import Finished

NINES = "9" * 5000  # Python makes no number of so many digits


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An image, and programs that say all of it."""
    lines = [
        f"{NINES} bytes copied",
        f'"required": {NINES}',
        f"-rw-r--r-- 0/0 {NINES} 2026-01-01 00:00:00 disk.img",
        f"totals\t1\t1\t1\t{NINES}",
        f"dump 0.4b{NINES}",
        f"x - y (compat={NINES}.{NINES}, default=1)",
        f"{NINES} 404",
        "7 404",
    ]

    def say(*_arguments: object, **listeners: object) -> list[Finished]:
        for line in lines:
            listener = listeners.get("on_line")
            if callable(listener):
                listener(line)
        return [Finished(["x"], 0, "\n".join(lines).encode(), "\n".join(lines))]

    for module in (archive, btrfs, curl, diskimage, dump, imagefile):
        for name in ("feed", "pipeline", "run"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, say)
    path = tmp_path / "image"
    path.write_bytes(b"\xfd7zXZ\0" + bytes(1000))
    return imagefile.open_image(str(path))


def test_numbers(image: Image, tmp_path: Path) -> None:
    assert archive._members(image, None) == []
    assert btrfs.make_options() == []
    assert diskimage.measure(image, FORMATS[0]) == image.size
    assert dump.version("dump") is None
    assert image.unpacked_size == (0, False)
    assert curl.statuses(["http://a/b", "http://a/c"], {}) == {}
    diskimage.qemu_img_progress(log.Progress("x", 1), 1)(f"({NINES}.0/100%)")


def test_size_that_dd_copied(image: Image, tmp_path: Path) -> None:
    class Loop:
        path, size = str(tmp_path / "loop"), 1

    with pytest.raises(Failure, match="^dd does not say"):
        diskimage._copy(image, Loop())  # type: ignore[arg-type]


@pytest.mark.parametrize("uuid", ["../../../tmp/x", "a b", "/etc/x", "a" * 65, ""])
def test_uuid_that_is_none(uuid: str) -> None:
    """It becomes the name of a file."""
    assert partitions.parse_probe(f"UUID={uuid}\nTYPE=ext4\n") == {"TYPE": "ext4"}


def test_head_without_a_first_line() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
    os.close(writer)
    assert curl._head(reader) == []
    os.close(reader)
