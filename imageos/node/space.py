"""Free space on the node: files that we keep in its directories, even for a short time, must leave a reserve.

A twentieth of each filesystem, at most 1 GiB, stays free for the node and other users.
"""

from __future__ import annotations

import errno
import os

from imageos import log

SHARE = 20  # one part of so many stays free
MOST = 1 << 30  # bytes


def reserve(status: os.statvfs_result) -> int:
    """Return the bytes of a filesystem that must stay free."""
    return min(status.f_blocks * status.f_frsize // SHARE, MOST)


def check(directory: str, need: int) -> None:
    """Fail as a full filesystem does (ENOSPC) if we must not write `need` more bytes to `directory`."""
    status = os.statvfs(directory)
    free, reserved = status.f_bavail * status.f_frsize, reserve(status)
    if need + reserved > free and status.f_blocks:  # some filesystems report no size
        needed, kept = log.size(need), log.size(reserved)
        raise OSError(errno.ENOSPC, f"{needed} needed, {log.size(free)} free, of which {kept} have to stay free")
