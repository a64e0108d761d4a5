"""Whether an image file ends where it should, told without reading all of it.

For a quick look only: a deployment reads every byte, and notices more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from imageos.backups import legacy
from imageos.disks.layout import MIB, SECTOR
from imageos.images import qcow2
from imageos.images.imagefile import Image
from imageos.node.confinement import Room
from imageos.node.linux import CAP_DAC_OVERRIDE
from imageos.run import available, pipeline

# The magic of the end of a bzip2 stream; it begins at any bit, 32 bits of CRC and padding follow.
BZIP2_END = 0x177245385090
LARGE = 1 << 40  # bytes that a file in TMPDIR may have, whatever its filesystem (ext3: 2 TiB, ext4: 16 TiB)


def why_truncated(image: Image) -> str:
    """What is wrong with the end of the image; empty if nothing is seen to be."""
    tail = os.pread(image.descriptor, 16, max(0, image.size - 16))
    if image.compression == "gzip":
        # RFC 1952: the unpacked size. A tar archive, a dump and a disk consist of whole sectors.
        return "its length is odd" if int.from_bytes(tail[-4:], "little") % SECTOR else ""
    if image.compression == "xz":
        return "" if tail.rstrip(b"\0").endswith(b"YZ") else "it has no xz footer"
    if image.compression == "bzip2":
        bits = int.from_bytes(tail, "big")
        found = any(bits >> 32 + shift & (1 << 48) - 1 == BZIP2_END for shift in range(8))
        return "" if found else "it has no end of bzip2"
    if image.compression == "lz4":
        # the end mark, and perhaps a checksum
        return "" if bytes(4) in (tail[-4:], tail[-8:-4]) else "it has no end of lz4"
    if image.compression == "zstd":
        return _refused(["zstd", "--list", "--quiet", image.path], image, [image.path])
    if os.pread(image.descriptor, 4, 0) == qcow2.MAGIC:
        return _refused(["qemu-img", "check", "-q", "-f", "qcow2", "/proc/self/fd/0"], image)
    table = legacy.read_table(os.pread(image.descriptor, MIB, 0), max(LARGE, image.size))
    if table and legacy.least_size(table) > image.size:
        return f"its partitions end at byte {legacy.least_size(table)}"
    return ""


def _refused(check: list[str], image: Image, sees: Sequence[str] = ()) -> str:
    """What a program that goes through the image's structure says against it."""
    if not available(check[0]):
        return ""
    done = pipeline([check], stdin=image.descriptor, room=Room(sees, capabilities=[CAP_DAC_OVERRIDE]))[0]
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # qemu-img: 3 is lost space, which does no harm
    return (said or [f"{check[0]} refuses it"])[0] if done.status not in (0, 3) else ""
