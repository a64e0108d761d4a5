"""Space on the node: what is kept in one of its directories, for a while or for good, never takes the last of it.

A twentieth of each filesystem stays free, 1 GiB at most: for the node, and for what else is kept there.
"""

from __future__ import annotations

import os

from imageos import log

SHARE = 20  # parts, of which one stays free
MOST = 1 << 30  # bytes


def reserve(status: os.statvfs_result) -> int:
    """Bytes of a filesystem that stay free."""
    return min(status.f_blocks * status.f_frsize // SHARE, MOST)


def lacking(directory: str, need: int) -> str | None:
    """Why `need` more bytes are not to be written to `directory`; None if they may be."""
    status = os.statvfs(directory)
    free, reserved = status.f_bavail * status.f_frsize, reserve(status)
    if need + reserved <= free or not status.f_blocks:  # not every filesystem says how large it is
        return None
    return f"{log.size(need)} needed, {log.size(free)} free, of which {log.size(reserved)} have to stay free"
