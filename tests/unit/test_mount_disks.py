"""mount-disks: what it keeps open, and the order in which it releases it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from imageos.commands import mount_disks
from imageos.disks import blockdev, discovery, mounting
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.discovery import Found
from imageos.disks.partitions import Part, Table
from imageos.errors import Interrupted
from imageos.node import linux


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is open. Nothing is really mounted: the copy of the mounts is a descriptor of /dev/null."""
    names: list[str] = []

    @contextmanager
    def holding(name: str, value: object) -> Iterator[object]:
        names.append(name)
        try:
            yield value
        finally:
            assert name != "loop" or "copy" not in names, "nobody can take the loop device away"
            names.remove(name)

    def copy_mounts(_path: str) -> int:
        names.append("copy")
        return os.open(os.devnull, os.O_RDONLY)

    def close(descriptor: int) -> None:
        really_close(descriptor)
        names.remove("copy")

    really_close = os.close
    device = Disk("/dev/disk0", -1, 0, is_file=False)
    attached = LoopDevice("/dev/loop0", -1, device, [], set())
    part = Part(0, 0, 0, "", "", "", "/dev/loop0")
    monkeypatch.setattr(blockdev, "claimed", lambda *_, **__: holding("disk", device))
    monkeypatch.setattr(blockdev, "attached", lambda *_: holding("loop", attached))
    monkeypatch.setattr(discovery, "find", lambda *_, **__: Found(Table("", (part,), 0), part, ()))
    monkeypatch.setattr(mounting, "mounted_all", lambda *_, **__: holding("mounts", None))
    monkeypatch.setattr(linux, "copy_mounts", copy_mounts)
    monkeypatch.setattr(os, "close", close)
    return names


def test_signal_before_anything_is_seen(held: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the mounts is released before the wait for the disk, which it would keep in use."""

    def publish(*_: object) -> None:
        assert held == ["disk", "loop", "copy"]
        raise Interrupted(15)

    monkeypatch.setattr(mount_disks, "publish", publish)
    options = mount_disks.parser().parse_args(["inst1"])
    with pytest.raises(Interrupted):
        mount_disks.mount("inst1", "/dev/disk0", options, (-1, -1))
    assert held == []
