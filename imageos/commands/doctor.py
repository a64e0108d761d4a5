"""doctor: say whether this node can deploy its variants, and what to do where it cannot.

It looks at the OS definition, the kernel, the settings of every variant, the programs and images that they need, free
space, and what crashed runs have left. It changes nothing. Without root it looks at less, and says at what not. The
exit status is 1 if this node cannot deploy all of its variants.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from imageos.checks import definition, kernel, node, programs, variants
from imageos.checks.report import Report, as_json, as_text
from imageos.commandline import Parser
from imageos.node import mounts


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    report = examine(options.os_dir)
    print(as_json(report) if options.json else as_text(report, colour=sys.stdout.isatty()), end="")
    return 1 if report.errors else 0


def examine(os_dir: str) -> Report:
    report = Report()
    definition.check_files(report.on("OS definition"), os_dir)
    definition.check_offers(report.on("OS definition"))
    definition.check_python(report.on("OS definition"))
    kernel.check_kernel(report.on("kernel"))
    known = variants.check_settings(report.on("settings"))
    variants.check_hooks(report.on("settings"), known)
    variants.check_overlays(report.on("settings"), known)
    known = variants.check_images(report.on("images"), known)
    programs.check_programs(report.on("programs"), known)
    kernel.check_filesystems(report.on("filesystems"), known)
    node.check_space(report.on("space"), known)
    node.check_leftovers(report.on("leftovers"), mounts.current())
    return report


def parser() -> Parser:
    options = Parser("imageos doctor", __doc__)
    options.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options.add_os_dir()
    return options
