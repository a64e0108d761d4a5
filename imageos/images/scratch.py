"""Files without a name, for what must be whole before it can be read: they vanish with us, however we end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

from imageos import log
from imageos.errors import Failure
from imageos.node import linux, space

UNIT = 64 << 10  # bytes: zeroes are left out in such units


def stored(
    chunks: Iterable[bytes], directory: str, what: str, setting: str, size: int = 0, most: int | None = None
) -> tuple[int, int]:
    """Return the descriptor of a sparse file that holds `chunks`, and its size.

    `setting` names the directory for the user. `size` is what will come, if known. Fail if there is no room for it, or
    if more than `most` bytes come: zeroes take no room, and could go on for ever.
    """
    total = 0
    try:
        space.check(directory, size)
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            for chunk in chunks:
                if most is not None and total + len(chunk) > most:
                    raise Failure(f"{what} has more than {log.size(most)}, too much for the disk")
                space.check(directory, len(chunk))  # others write there, too
                for start in range(0, len(chunk), UNIT):
                    write(file.fileno(), chunk[start : start + UNIT], total + start)
                total += len(chunk)
            file.truncate(total)
            return os.dup(file.fileno()), total
    except OSError as error:
        raise Failure(
            f"cannot keep {log.size(max(size, total))} of {what} in {setting} {directory}: {error.strerror}",
            hint=f"set {setting} to a directory with enough room",
        ) from None


def write(descriptor: int, data: bytes, offset: int) -> None:
    """Write, but leave out zeroes."""
    if data != bytes(len(data)):
        linux.write_all(descriptor, data, offset)
