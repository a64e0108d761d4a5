"""Random damage to a file, without knowledge of its format."""

from __future__ import annotations

import struct
from random import Random

TOKENS = (b"\0", b"\n", b"\r", b"\\000", b"\\777", b"..", b"/", b"$(id)", b"\xff\xfe", b"-1", b"1e999", b"null", b"{}",
          b"[", b"9" * 30, b"9" * 5000, "\u00b2".encode(), b"\x1b[2J",
          b"=", b"'", b'"', b"#", b" ", b"\t", b"\xc2\x85", b"\xed\xb3\xbf", b"NaN")  # fmt: skip


def damaged(data: bytes, chance: Random) -> bytes:
    """Return `data` with bytes changed, inserted, removed, doubled, or cut off."""
    copy = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(len(copy) + 1)
        what = chance.randrange(6)
        if what == 0 and copy:
            copy[place % len(copy)] ^= 1 << chance.randrange(8)
        elif what == 1:
            copy[place:place] = chance.choice(TOKENS)
        elif what == 2:
            del copy[place : place + chance.choice((1, 4, 100))]
        elif what == 3:
            copy[place:place] = copy[place : place + chance.choice((8, 64, 512))]
        elif what == 4:
            copy[place : place + 4] = struct.pack(
                chance.choice("<>") + "I", chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF))
            )
        else:
            del copy[place:]
    return bytes(copy)
