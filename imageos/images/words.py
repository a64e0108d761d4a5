"""Read the tables of numbers in a disk image of a stranger, in bounded memory."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator

Read = Callable[[int, int], bytes]  # offset, length -> bytes, fewer at the end of the file

STEP = 1 << 20  # bytes
CODES = {4: "I", 8: "Q"}


class Cut(Exception):
    """The file must have at least `needed` bytes, and has fewer."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def words(read: Read, offset: int, count: int, width: int, order: str, unused: int = 0) -> Iterator[tuple[int, int]]:
    """Yield index and value of `count` numbers of `width` bytes that are not `unused`; Cut if one is missing."""
    for first in range(0, count, STEP // width):
        length = min(STEP, (count - first) * width)
        data = read(offset + first * width, length)
        if len(data) < length:
            raise Cut(offset + count * width)
        table = array(CODES[width], data)
        if order != sys.byteorder:
            table.byteswap()
        yield from ((index, value) for index, value in enumerate(table, first) if value != unused)
