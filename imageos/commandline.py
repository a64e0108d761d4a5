"""The options and arguments of a command. An error in them is reported as all others are."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from imageos.errors import Usage
from imageos.installation import OS_DIR


class Parser(argparse.ArgumentParser):
    """A parser for the command `prog`; `about` is the docstring of its module."""

    def __init__(self, prog: str, about: str, epilog: str | None = None, **inherited: Any) -> None:
        super().__init__(
            prog=prog,
            description=about.partition(": ")[2],
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **inherited,
        )

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{self.prog}: {message}", hint=" ".join(self.format_usage().split()))

    def add_instance(self) -> None:
        self.add_argument("instance", metavar="INSTANCE", help="its name, as Ganeti knows it")

    def add_os_dir(self) -> None:
        self.add_argument(
            "--os-dir", default=OS_DIR, metavar="DIR", help="directory of the OS definition (default: %(default)s)"
        )

    def add_site_files(self) -> None:
        """For the scripts of packages."""
        self.add_argument("--site-files", action="store_true", help=argparse.SUPPRESS)

    def add_disk(self) -> None:
        what = "this is the disk, on this node: Ganeti is not asked, INSTANCE is only a name"
        self.add_argument("--disk", metavar="PATH", help=what)
