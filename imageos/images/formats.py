"""The formats of disk images besides raw: how each is recognised and judged, and which are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from imageos.images import containers, qcow2
from imageos.images.words import Read

Judge = Callable[[Read, int], int]  # of the bytes of the file


class Format(NamedTuple):
    name: str  # for messages
    driver: str  # qemu-img's name
    marks: Sequence[tuple[int, bytes]]  # any of these, at an offset from the beginning or, if negative, from the end
    # Bytes of the disk; Failure if the image must not be deployed, Cut if the file is too short. None: it never is.
    virtual_size: Judge | None = None
    least_size: Judge | None = None  # bytes that the file must have
    options: str = ""  # for the driver


# A VHD says the size of its disk twice. Without the option qemu-img believes the geometry, which is often less.
VHD_OPTIONS = ",force_size_calc=current_size"
FORMATS = (
    Format("qcow2", "qcow2", [(0, qcow2.MAGIC)], qcow2.virtual_size, qcow2.least_size),
    Format("VMDK", "vmdk", [(0, containers.VMDK_MAGIC)], containers.vmdk_size, containers.vmdk_end),
    Format("VDI", "vdi", [(containers.VDI_PLACE, containers.VDI_MAGIC)], containers.vdi_size, containers.vdi_end),
    Format("VHDX", "vhdx", [(0, containers.VHDX_MAGIC)], containers.vhdx_size, containers.vhdx_end),
    # of fixed size: only a footer, behind the data
    Format("VHD", "vpc", [(0, containers.VHD_MAGIC), (-512, containers.VHD_MAGIC)], containers.vhd_size,
           containers.vhd_end, VHD_OPTIONS),
    # Text that names the files with the data, or what only ESX writes
    Format("VMDK descriptor", "vmdk", [(0, b"# Disk DescriptorFile")]),
    Format("VMDK of ESX", "vmdk", [(0, b"COWD"), (0, b"SE SPARSE")]),
    Format("QED", "qed", [(0, b"QED\0")]),
    Format("Parallels", "parallels", [(0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")]),
    Format("DMG", "dmg", [(-512, b"koly")]),
    Format("LUKS", "luks", [(0, b"LUKS\xba\xbe")]),
)  # fmt: skip


def recognise(read: Read, size: int) -> Format | None:
    """Return the format of a file of `size` bytes; None if it is none of these, which means raw."""
    for candidate in FORMATS:
        for offset, mark in candidate.marks:
            place = offset if offset >= 0 else size + offset
            if place >= 0 and read(place, len(mark)) == mark:
                return candidate
    return None
