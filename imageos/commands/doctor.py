"""doctor: say whether this node can deploy its variants, and what to do where it cannot.

It looks at the OS definition, the kernel, the settings of every variant, the programs and images that they need, free
space, and what crashed runs have left. It changes nothing. Without root it looks at less, and says at what not. The
exit status is 1 if this node cannot deploy all of its variants.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from imageos.checks import definition, kernel, node, programs, variants
from imageos.checks.report import ERROR, Finding, Report, as_json, as_text, findings, levels
from imageos.checks.variants import Variant
from imageos.commandline import Parser
from imageos.node.programs import DEFAULT_PATH, GANETI_PATH


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    report = examine(options.os_dir)
    print(as_json(report) if options.json else as_text(report, colour=sys.stdout.isatty()), end="")
    return ERROR in levels(report)


def examine(os_dir: str) -> Report:
    callers_path = os.environ.get("PATH", DEFAULT_PATH)
    os.environ["PATH"] = GANETI_PATH  # what create finds counts
    return {area: [*findings(of_area)] for area, of_area in checks(os_dir, callers_path).items()}


def checks(os_dir: str, callers_path: str) -> dict[str, Sequence[Iterator[Finding]]]:
    """Return the checks of each area, in the order in which they are to be made."""
    examined: list[Variant] = []  # those that the check of settings finds right, for the checks after it
    return {
        "OS definition": (definition.check_files(os_dir), definition.check_in_use(os_dir), definition.check_offers(),
                          definition.check_owners(), definition.check_python()),
        "kernel": (kernel.check_kernel(),),
        "settings": (variants.check_settings(examined), variants.check_hooks(examined),
                     variants.check_overlays(examined)),
        "images": (variants.check_images(examined), variants.check_trials(examined)),
        "programs": (programs.check_programs(examined, callers_path),),
        "filesystems": (kernel.check_filesystems(examined),),
        "space": (node.check_space(examined),),
        "leftovers": (node.check_leftovers(),),
    }  # fmt: skip


def parser() -> Parser:
    options = Parser("imageos doctor", __doc__)
    options.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options.add_os_dir()
    return options
