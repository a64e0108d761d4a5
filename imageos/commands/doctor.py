"""doctor: say whether this node can deploy its variants, and what to do where it cannot.

It looks at the OS definition, the kernel, the settings of every variant, the programs and images that they need, free
space, and what crashed runs have left. It changes nothing. Without root it looks at less, and says at what not. The
exit status is 1 if this node cannot deploy all of its variants.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from imageos.checks import definition, kernel, node, programs, variants
from imageos.checks.report import Report, as_json, as_text
from imageos.commandline import Parser
from imageos.node import mounts
from imageos.node.programs import DEFAULT_PATH, GANETI_PATH


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    report = examine(options.os_dir)
    print(as_json(report) if options.json else as_text(report, colour=sys.stdout.isatty()), end="")
    return 1 if report.errors else 0


def examine(os_dir: str) -> Report:
    callers_path = os.environ.get("PATH", DEFAULT_PATH)
    os.environ["PATH"] = GANETI_PATH  # what create finds counts
    report = Report()
    definition.check_files(report.on("OS definition"), os_dir)
    definition.check_in_use(report.on("OS definition"), os_dir)
    definition.check_offers(report.on("OS definition"))
    definition.check_python(report.on("OS definition"))
    with report.on("kernel").looking() as on:
        kernel.check_kernel(on)
    examined = variants.check_settings(report.on("settings"))
    variants.check_hooks(report.on("settings"), examined)
    variants.check_overlays(report.on("settings"), examined)
    examined = variants.check_images(report.on("images"), examined)
    programs.check_programs(report.on("programs"), examined, callers_path)
    with report.on("filesystems").looking() as on:
        kernel.check_filesystems(on, examined)
    node.check_space(report.on("space"), examined)
    with report.on("leftovers").looking() as on:
        node.check_leftovers(on, mounts.current())
    return report


def parser() -> Parser:
    options = Parser("imageos doctor", __doc__)
    options.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options.add_os_dir()
    return options
