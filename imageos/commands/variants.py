"""variants: show, enable, fetch and try the variants of this node and of the catalog.

Without a further word it prints a table of them. It works on a node alone, with or without Ganeti.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from imageos.commandline import Parser
from imageos.errors import Failure
from imageos.variants import trial


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    action = options.action or show
    status: int = action(options)
    return status


def show(options: Namespace) -> int:
    raise Failure("not yet")


def enable(options: Namespace) -> int:
    raise Failure("not yet")


def disable(options: Namespace) -> int:
    raise Failure("not yet")


def fetch(options: Namespace) -> int:
    raise Failure("not yet")


def parser() -> Parser:
    options = Parser("imageos variants", __doc__)
    options.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options.set_defaults(action=None)
    actions = options.add_subparsers(title="actions", metavar="ACTION", parser_class=Parser)

    def add(name: str, about: str) -> Parser:
        made: Parser = actions.add_parser(name, about=f"{name}: {about}", help=about)
        return made

    enabling = add("enable", "take variants from the catalog")
    enabling.add_argument("names", nargs="+", metavar="NAME", help="as the table has it")
    enabling.set_defaults(action=enable)
    disabling = add("disable", "take back what enable has written, unless instances use it")
    disabling.add_argument("names", nargs="+", metavar="NAME")
    disabling.set_defaults(action=disable)
    fetching = add("fetch", "download and verify the images of variants now, as create would at the first use")
    fetching.add_argument("names", nargs="*", metavar="NAME", help="default: all that are enabled")
    fetching.add_argument("--prune", action="store_true", help="remove from CACHE_DIR what no enabled variant names")
    fetching.set_defaults(action=fetch)
    trying = add("try", "deploy a variant to a scratch file, and boot that in qemu to its login prompt")
    trying.add_argument("name", metavar="NAME")
    trying.add_argument("--uefi", action="store_true", help="boot by UEFI instead of BIOS")
    trying.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="default: %(default)s")
    trying.add_argument("--keep", action="store_true", help="keep the scratch file, and say where it is")
    trying.set_defaults(action=trial.try_variant)
    return options
