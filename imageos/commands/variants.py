"""variants: show, enable, fetch and try the variants of this node and of the catalog.

Without an action it prints a table of them, in which no server is asked. The catalog is catalog.conf in the directory
of the OS definition; a site's own entries are in /etc/ganeti/instance-image/catalog.conf. Each call is for one node:
gnt-cluster command runs it on all. Without Ganeti it works as well.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence

from imageos import log
from imageos.checks.variants import listed
from imageos.commandline import Parser
from imageos.errors import Failure, Usage
from imageos.variants import catalog, site, table


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.json and options.action:
        raise Usage("--json is for the table alone", hint="imageos variants --json")
    action = options.action or show
    status: int = action(options)
    return status


def show(options: Namespace) -> int:
    arch = site.architecture()
    enabled = table.rows()
    if any(row.image == table.UNKNOWN for row in enabled):
        log.warning("who is not root does not see which images are there: run it with sudo")
    wrong, entries = None, {}
    try:
        entries = catalog.load(options.os_dir)
    except Failure as failure:
        wrong = failure  # what the node offers is shown nevertheless
    if options.json:
        print(table.as_json(enabled, entries, arch), end="")
    else:
        width = os.get_terminal_size(1).columns if os.isatty(1) else 0
        print(table.as_text(enabled, entries, arch, width), end="")
    if wrong:
        sys.stdout.flush()  # the cause is the last line of a log, too
        raise wrong
    return 0


def enable(options: Namespace) -> int:
    site.enable(options.names, catalog.load(options.os_dir))
    return 0


def disable(options: Namespace) -> int:
    site.disable(options.names, options.os_dir)
    return 0


def fetch(options: Namespace) -> int:
    from imageos.variants import download  # late: the table needs nothing of it

    failure = None
    try:
        download.fetch_all(options.names)
    except Failure as problem:
        failure = problem
    try:
        if options.prune:
            download.prune()
    except Failure as problem:
        if not failure:
            raise
        download.report("--prune", problem)
    if failure:
        raise failure
    return 0


def try_variant(options: Namespace) -> int:
    from imageos.variants import download, trial  # late: the table needs nothing of them

    download.check_enabled(options.name, listed())
    for label, value in trial.try_variant(options):
        print(f"{label:<16} {value}")
    return 0


def _seconds(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,5}", text):
        raise ArgumentTypeError(f"{text!r} is no number of seconds from 1 to 999999")
    return int(text)


def parser() -> Parser:
    options = Parser("imageos variants", __doc__)
    options.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options.add_os_dir()
    options.set_defaults(action=None)
    actions = options.add_subparsers(
        title="actions", metavar="ACTION", parser_class=Parser, help="see imageos variants ACTION --help"
    )

    def add(name: str, about: str) -> Parser:
        made: Parser = actions.add_parser(name, about=f"{name}: {about}", help=about)
        return made

    enabling = add("enable", "take variants from the catalog")
    enabling.add_argument("names", nargs="+", metavar="VARIANT", help="its name in the table")
    enabling.set_defaults(action=enable)
    disabling = add("disable", "take back what enable has written, unless instances use it")
    disabling.add_argument("names", nargs="+", metavar="VARIANT", help="one that is enabled")
    disabling.set_defaults(action=disable)
    fetching = add("fetch", "download and verify the images of variants now, as create would at the first use")
    fetching.add_argument("names", nargs="*", metavar="VARIANT", help="default: all that are enabled")
    fetching.add_argument("--prune", action="store_true", help="remove from CACHE_DIR what no enabled variant names")
    fetching.set_defaults(action=fetch)
    trying = add("try", "deploy a variant to a scratch file, and boot that in qemu to its login prompt")
    trying.add_argument("name", metavar="VARIANT", help="one that is enabled")
    trying.add_argument("--uefi", action="store_true", help="boot by UEFI instead of BIOS")
    trying.add_argument("--timeout", type=_seconds, default=600, metavar="SECONDS", help="default: %(default)s")
    trying.add_argument("--keep", action="store_true", help="keep the scratch file, and say where it is")
    trying.set_defaults(action=try_variant)
    return options
