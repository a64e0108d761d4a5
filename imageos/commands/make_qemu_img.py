"""make-qemu-img: make an image of a stopped instance's first disk, as a qcow2 of the whole disk.

The instance is only read: everything happens to a copy of what is in use on its disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from imageos.commandline import Parser
from imageos.images.instance import make_image, parser_of


def parser() -> Parser:
    return parser_of("qemu-img", "make-qemu-img", __doc__)


def main(arguments: Sequence[str]) -> int:
    return make_image("qemu-img", parser().parse_args(arguments))
