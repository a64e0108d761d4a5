"""ganeti-image: make an image of a stopped instance's first disk: tarball, dump or disk image.

The instance is only read: everything happens to a copy of what is in use on its disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from imageos.commandline import Parser
from imageos.images.capture import CAPTURED
from imageos.images.instance import add_options, make_image


def parser() -> Parser:
    types = "; ".join(f"{name}: {capture_format.description}" for name, capture_format in CAPTURED.items())
    made = Parser("ganeti-image", __doc__)
    made.add_argument("-t", "--type", required=True, choices=CAPTURED, help=types)
    made.add_argument("-i", "--instance", metavar="INSTANCE", required=True, help="its name, as Ganeti knows it")
    made.add_argument("-d", "--image-dir", metavar="DIR", help="where the image is put, on the node that has the disk")
    add_options(made)
    made.add_disk()
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    return make_image(options.type, options, options.disk)
