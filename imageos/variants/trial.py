"""Try a variant: deploy it to a scratch file and boot it."""

from __future__ import annotations

from argparse import Namespace

from imageos.errors import Failure


def try_variant(options: Namespace) -> list[tuple[str, str]]:
    """Return the rows of the table of `imageos variants try NAME [--uefi] [--timeout SECONDS] [--keep]`."""
    raise Failure(f"variant {options.name} cannot be tried yet")
