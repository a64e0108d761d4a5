"""Parse headers of qcow2, without files; tests/disk compares with qemu-img."""

from __future__ import annotations

import struct

import pytest

from imageos.errors import Failure
from imageos.images import formats, qcow2

GIB = 1 << 30
FIELDS = {
    "magic": b"QFI\xfb", "version": 3, "backing": 0, "backing_length": 0, "cluster_bits": 16, "size": GIB,
    "encryption": 0, "l1_entries": 2, "l1_offset": 0x30000, "refcount_offset": 0x10000, "refcount_clusters": 1,
    "snapshots": 0, "snapshots_offset": 0,
}  # fmt: skip


def image(incompatible: int = 0, l1: bytes = b"\x80" + bytes(15), **changes: object) -> bytes:
    head = qcow2.HEADER.pack(*{**FIELDS, **changes}.values())
    return (head + struct.pack(">QQQII", incompatible, 0, 0, 4, 104)).ljust(0x30000, b"\0") + l1


def size_of(data: bytes) -> int:
    return qcow2.virtual_size(lambda offset, length: data[offset : offset + length])


@pytest.mark.parametrize("version", [2, 3])
def test_plain(version: int) -> None:
    assert size_of(image(version=version)) == GIB


@pytest.mark.parametrize("bit", [qcow2.DIRTY, qcow2.COMPRESSION, qcow2.EXTENDED_L2])
def test_harmless_features(bit: int) -> None:
    assert size_of(image(bit)) == GIB


@pytest.mark.parametrize(
    "data, some",
    [(image(), False), (image(1), False), (image(8), True), (image(16), True), (image(8, version=2), False)],
)
def test_what_not_every_qemu_img_can_read(data: bytes, some: bool) -> None:
    assert qcow2.is_for_some(lambda offset, length: data[offset : offset + length]) == some


def test_snapshots_beside_a_disk() -> None:
    assert size_of(image(snapshots=2, snapshots_offset=0x40000)) == GIB


def test_version_2_has_no_feature_bits() -> None:
    """In version 2, extensions follow the header."""
    assert size_of(image(qcow2.DATA_FILE, version=2)) == GIB


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a qcow2"),
        (b"QFI\xfb", "not a qcow2"),
        (b"QFI\xfc" + bytes(200), "not a qcow2"),
        (image(version=1), "version 1"),
        (image(version=4), "version 4"),
        (image(backing=0x200, backing_length=11), "backing file"),
        (image(encryption=1), "encrypted"),
        (image(encryption=2), "encrypted"),
        (image(qcow2.DATA_FILE), "data file"),
        (image(qcow2.CORRUPT), "corrupt"),
        (image(1 << 5), "0x20"),
        (image(1 << 63 | 1), "0x8000000000000000"),
        (image()[:90], "damaged"),
        (image(cluster_bits=8), "damaged"),
        (image(cluster_bits=40), "damaged"),
        (image(size=1 << 63), "damaged"),
        (image(l1_entries=1 << 31), "damaged"),
        (image(snapshots=1, l1=bytes(16)), "snapshots only"),
    ],
)
def test_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Failure, match=reason):
        size_of(data)


@pytest.mark.parametrize(
    "data, name",
    [
        (image(), "qcow2"),
        (b"KDMV" + bytes(600), "VMDK"),
        (b"COWD" + bytes(600), "VMDK of ESX"),
        (b"# Disk DescriptorFile\nversion=1\n", "VMDK descriptor"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(0x40, b"\0") + b"\x7f\x10\xda\xbe" + bytes(600), "VDI"),
        (b"vhdxfile" + bytes(600), "VHDX"),
        (b"conectix" + bytes(600), "VHD"),
        (bytes(2048) + b"conectix" + bytes(504), "VHD"),
        (b"QED\0" + bytes(600), "QED"),
        (b"LUKS\xba\xbe" + bytes(600), "LUKS"),
    ],
)
def test_formats(data: bytes, name: str) -> None:
    found = formats.recognise(lambda offset, length: data[offset : offset + length], len(data))
    assert found and found.name == name


@pytest.mark.parametrize("data", [b"", bytes(100), bytes(4096), b"\xeb\x63\x90" + bytes(509)])
def test_raw(data: bytes) -> None:
    assert formats.recognise(lambda offset, length: data[offset : offset + length], len(data)) is None
