"""Unpack LZO1X by liblzo2, the library by which restore(8) reads dumps that are compressed so.

Called only in a process that has nothing (node.children.in_child), and by the function that checks its input.
"""

from __future__ import annotations

import ctypes


def unpack(data: bytes, most: int) -> bytes:
    """Return what was compressed; ValueError if `data` is no LZO1X, or that has more than `most` bytes."""
    library = ctypes.CDLL("liblzo2.so.2")
    unpacked, length = ctypes.create_string_buffer(most), ctypes.c_size_t(most)
    if library.lzo1x_decompress_safe(data, ctypes.c_size_t(len(data)), unpacked, ctypes.byref(length), None):
        raise ValueError("this is no LZO1X, or too much")
    return unpacked.raw[: length.value]
