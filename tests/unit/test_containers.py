"""Judge headers of VMDK, VDI, VHD and VHDX, without files; tests/disk compares with qemu-img."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diskformats import DESCRIPTOR, MIB, SIZE, vdi, vhd, vhdx, vmdk

from imageos.errors import Failure
from imageos.images import formats
from imageos.images.words import Cut

HUGE = (1 << 63) - 1


def judged(data: bytes) -> tuple[int, int]:
    """Return the size of the disk, and the least size of the file."""

    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    found = formats.recognise(read, len(data))
    assert found and found.virtual_size and found.least_size
    return found.virtual_size(read, len(data)), found.least_size(read, len(data))


@pytest.mark.parametrize("make", [vmdk, vdi, vhd, vhdx])
def test_whole(make: Callable[[], bytes]) -> None:
    assert judged(make()) == (SIZE, len(make()))


@pytest.mark.parametrize("make", [vmdk, vdi, vhd, vhdx])
def test_cut(make: Callable[[], bytes]) -> None:
    """Anywhere: what is left has fewer bytes than it needs, or is no such image any more."""
    whole = make()
    for size in (len(whole) - 1, len(whole) // 2, 2 * MIB, 70_000, 600, 80):
        try:
            least = judged(whole[:size])[1]
        except Cut as cut:
            least = cut.needed
        except Failure:
            continue
        assert least > min(size, len(whole) - 1)


def test_vmdk_with_its_directory_at_the_end() -> None:
    at_end = vmdk(directory=(1 << 64) - 1, flags=3 | 3 << 16)
    footer = vmdk(flags=3 | 3 << 16)[:512]
    grain = (0).to_bytes(8, "little") + (5).to_bytes(4, "little") + b"grain"
    body = at_end[: 256 * 512] + grain.ljust(512, b"\0")
    assert judged(body + footer + bytes(512)) == (SIZE, 256 * 512 + 17)
    with pytest.raises(Cut):
        judged(body + bytes(512))


def test_vhdx_with_bitmaps_in_its_table() -> None:
    """Behind the blocks of 4 GiB is the entry of their bitmap, which only an image with a parent has."""
    block = 256 * MIB
    blocks = (*[0] * 16, 1 << 50 | 6, 8 * MIB | 6)
    data = vhdx(block=block, size=17 * block, blocks=blocks)
    assert judged(data) == (17 * block, 8 * MIB + block)


REFUSED = {
    "flat": (vmdk(DESCRIPTOR.replace("monolithicSparse", "monolithicFlat").replace("SPARSE", "FLAT")), "other files"),
    "flat extent": (vmdk(DESCRIPTOR.replace("SPARSE", "FLAT")), "other files"),
    "two extents": (vmdk(DESCRIPTOR + 'RW 8192 SPARSE "more.vmdk"\n'), "other files"),
    "no extent": (vmdk(DESCRIPTOR.replace("RW 8192", "# RW 8192")), "other files"),
    "device": (vmdk(DESCRIPTOR.replace("monolithicSparse", "fullDevice")), "other files"),
    "parent": (vmdk(DESCRIPTOR.replace("ffffffff", "12345678")), "parent"),
    "parent by name": (vmdk(DESCRIPTOR + 'parentFileNameHint="/etc/shadow"\n'), "parent"),
    "descriptor alone": (vmdk(capacity=0), "damaged"),
    "no descriptor": (vmdk(descriptor=""), "other files"),
    "descriptor elsewhere": (vmdk(place=200), "behind its header"),
    "parent in a comment": (vmdk(DESCRIPTOR + '# parentFileNameHint="/etc/shadow"\n'), "parent"),
    "parent behind the descriptor": (vmdk(DESCRIPTOR + 'parentFileNameHint="/etc/shadow"\n', length=0), "parent"),
    "vdi difference": (vdi(kind=4), "parent"),
    "vdi undo": (vdi(kind=3), "parent"),
    "vdi parent": (vdi(parent=b"x" * 16), "parent"),
    "vhd difference": (vhd(kind=4), "parent"),
    "vhdx parent": (vhdx(flags=2), "parent"),
}
MEANINGLESS = {
    "vmdk size": vmdk(capacity=HUGE), "vmdk grain": vmdk(grain=0), "vmdk large grain": vmdk(grain=HUGE),
    "vmdk table": vmdk(entries=0), "vmdk large table": vmdk(entries=0xFFFFFFFF), "vmdk descriptor": vmdk(place=HUGE),
    "vdi size": vdi(size=HUGE), "vdi block": vdi(block=0), "vdi large block": vdi(block=0xFFFFFFFF, size=HUGE),
    "vhd size": vhd(size=HUGE), "vhd block": vhd(block=0), "vhd odd block": vhd(block=513), "vhd table": vhd(entries=1),
    "vhdx size": vhdx(size=HUGE), "vhdx block": vhdx(block=0), "vhdx large block": vhdx(block=0x80000000),
    "vhdx sector": vhdx(sector=0),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    data, reason = REFUSED[what]
    with pytest.raises(Failure, match=reason):
        judged(data)


@pytest.mark.parametrize("what", MEANINGLESS)
def test_numbers_that_make_no_sense(what: str) -> None:
    with pytest.raises((Failure, Cut)):
        judged(MEANINGLESS[what])


def test_large_tables_end_with_the_file() -> None:
    """Their size is a claim; what is read of them is what the file has."""
    with pytest.raises(Cut):
        judged(vmdk(capacity=(1 << 50) // 512))
    with pytest.raises(Cut):
        judged(vhdx(size=1 << 59))
