"""Make small VMDK, VDI, VHD and VHDX images without a program, field by field, for tests that damage them."""

from __future__ import annotations

import struct
import uuid

MIB = 1 << 20
SIZE = 4 * MIB  # of the disks
DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicSparse"
RW 8192 SPARSE "disk.vmdk"
ddb.adapterType = "ide"
"""


def placed(*pieces: tuple[int, bytes], size: int) -> bytes:
    data = bytearray(size)
    for offset, piece in pieces:
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def vmdk(
    descriptor: str = DESCRIPTOR, capacity: int = SIZE // 512, directory: int = 24, place: int = 1, **fields: int
) -> bytes:
    """The first and the last grain of 64 KiB are there."""
    values = {"flags": 3, "grain": 128, "length": 20, "entries": 512, **fields}
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, values["flags"], capacity, values["grain"], place,
                         values["length"], values["entries"], 0, directory, 128)  # fmt: skip
    table = placed((0, struct.pack("<I", 128)), (4 * 63, struct.pack("<I", 256)), size=2048)
    grains = placed((0, b"first"), (128 * 512, b"last"), size=2 * 128 * 512)
    pieces = [(0, header), (512, descriptor.encode()), (24 * 512, struct.pack("<I", 32)), (32 * 512, table)]
    return placed(*pieces, (128 * 512, grains), size=128 * 512 + len(grains))


def vdi(kind: int = 1, block: int = MIB, size: int = SIZE, parent: bytes = bytes(16)) -> bytes:
    """The blocks 0 and 3, in reverse order."""
    header = [
        (0, b"<<< test >>>\n"),
        (0x40, struct.pack("<III", 0xBEDA107F, 0x10001, 0x190)), (0x4C, struct.pack("<I", kind)),
        (0x154, struct.pack("<II", 512, 1024)), (0x170, struct.pack("<QIIII", size, block, 0, 4, 2)),
        (0x1B8, parent), (512, struct.pack("<IIII", 1, 0xFFFFFFFF, 0xFFFFFFFE, 0)),
    ]  # fmt: skip
    return placed(*header, (1024, b"last"), (1024 + MIB, b"first"), size=1024 + 2 * MIB)


def vhd(kind: int = 3, block: int = 2 * MIB, size: int = SIZE, entries: int = 2) -> bytes:
    footer = placed((0, b"conectix"), (16, struct.pack(">Q", 512)), (28, b"win "), (40, struct.pack(">QQ", size, size)),
                    (60, struct.pack(">I", kind)), size=512)  # fmt: skip
    header = placed(
        (0, b"cxsparse"), (16, struct.pack(">Q", 1536)), (28, struct.pack(">II", entries, block)), size=1024
    )
    table = struct.pack(">II", 4, 0xFFFFFFFF).ljust(512, b"\xff")
    return footer + header + table + bytes(512) + b"first".ljust(2 * MIB, b"\0") + footer


def vhdx(
    block: int = 2 * MIB,
    size: int = SIZE,
    flags: int = 0,
    sector: int = 512,
    blocks: tuple[int, ...] = (4 * MIB | 6, 0),
) -> bytes:
    def identifier(text: str) -> bytes:
        return uuid.UUID(text).bytes_le

    bat, metadata = 3 * MIB, 2 * MIB
    regions = b"regi" + struct.pack("<II4x", 0, 2)
    for name, place in (
        ("2DC27766-F623-4200-9D64-115E9BFD4A08", bat),
        ("8B7CA206-4790-4B9A-B8FE-575F050F886E", metadata),
    ):
        regions += identifier(name) + struct.pack("<QII", place, MIB, 1)
    items = b"metadata".ljust(10, b"\0") + struct.pack("<H20x", 3)
    names = (
        "CAA16737-FA36-4D43-B3B6-33F0AA44E76B",
        "2FA54224-CD1B-4876-B211-5DBED83BF4B8",
        "8141BF1D-A96F-4709-BA47-F233A8FAAB5F",
    )
    for number, name in enumerate(names):
        items += identifier(name) + struct.pack("<III4x", 65536 + 8 * number, 8, 0)
    values = struct.pack("<II", block, flags) + struct.pack("<QI", size, sector)
    table = struct.pack(f"<{len(blocks)}Q", *blocks)
    return placed((0, b"vhdxfile"), (0x30000, regions), (metadata, items), (metadata + 65536, values), (bat, table),
                  (4 * MIB, b"first"), size=6 * MIB)  # fmt: skip
