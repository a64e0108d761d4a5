"""The space that must stay free on a filesystem."""

from __future__ import annotations

import errno
import os

import pytest

from imageos.node import space

GIB = 1 << 30


def filesystem(size: int, free: int) -> os.statvfs_result:
    block = 4096
    return os.statvfs_result((block, block, size // block, free // block + 9, free // block, 0, 0, 0, 0, 255))


@pytest.mark.parametrize(
    "size, kept", [(20 << 20, 1 << 20), (10 * GIB, GIB // 2), (20 * GIB, GIB), (1000 * GIB, GIB), (0, 0)]
)
def test_reserve(size: int, kept: int) -> None:
    assert space.reserve(filesystem(size, size)) == kept


def test_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(size: int, free: int, need: int) -> str | None:
        monkeypatch.setattr(os, "statvfs", lambda _: filesystem(size, free))
        try:
            space.check("/somewhere", need)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            return error.strerror
        return None

    assert lacking(100 * GIB, 10 * GIB, 9 * GIB) is None
    assert lacking(100 * GIB, 10 * GIB, 9 * GIB + 1) == "9.0 GiB needed, 10 GiB free, of which 1 GiB have to stay free"
    assert lacking(100 * GIB, 10 * GIB, 1 << 62) is not None
    assert lacking(100 * GIB, GIB, 0) is None
    assert lacking(100 * GIB, GIB - 4096, 0) is not None, "somebody else has taken it"
    assert lacking(0, 0, GIB) is None, "a filesystem that does not say how large it is"
