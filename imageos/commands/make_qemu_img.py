"""make-qemu-img: make an image of a stopped instance's first disk, as a qcow2 of the whole disk.

The instance is only read: everything happens to a copy of what is in use on its disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from imageos.commands.ganeti_image import TYPES, add_options, make_image


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="make-qemu-img",
        description=__doc__.partition(": ")[2],
        epilog=f"The image is {TYPES['qemu-img']}.",
    )
    made.add_argument("instance", metavar="INSTANCE", help="its name, as Ganeti knows it")
    made.add_argument(
        "image_dir", metavar="IMAGE_DIR", nargs="?", help="where it is put, on the node that has the disk"
    )
    add_options(made)
    return made


def main(arguments: Sequence[str]) -> int:
    return make_image("qemu-img", parser().parse_args(arguments))
