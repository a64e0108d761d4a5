"""The cause of a failure among all that a program has printed. Most print it last, and some go on after it."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What is no cause: advice, summaries, banners. A program's last lines but for these are taken for the cause.
NO_CAUSE = "(?m)^(?:{})$".format(
    "|".join(
        (
            r"Usage: (?:.|\n)*",
            r"(?:\S+: )?[Tt]ry [`'].*",
            # e2fsprogs: its banner, and what it closes with
            r"\S+ \d+\.\S+ \(\d+-\w+-\d{4}\)",
            r".*UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY\.",
            r"[ \t]*\(i\.e\., without -a or -p options\)",
            r"\S+:[ \t]*",
            r"e2fsck: Get a newer version of e2fsck!",
            r"Please run 'e2fsck -fy .*\nafter the aborted resize operation\.",
            # tar, restore and dump
            r"tar: (?:Exiting with failure status|Error is not recoverable|Child ).*",
            r"tar: (?:Skipping to next header|rmtlseek not stopped at a record boundary)",
            r"restore: cannot open /dev/tty: .*",
            r"abort\? \[yn\].*",
            r"[ \t]*DUMP: The ENTIRE dump is aborted\.",
            # bzip2 and zstd
            r"bzip2: Inappropriate ioctl for device",
            r"\t(?:Input file = |perhaps it is corrupted\?).*",
            r"It is possible that the compressed file\(s\) have become corrupted\.\nYou can use the -tvv option .*",
            r"You can use the .bzip2recover' program .*\ndata from undamaged sections .*",
            r".*Use --long=\d+ or --memory=.*",
            # dd, gpgv, lvm, mount
            r"\d+\+\d+ records (?:in|out)",
            r"\d+ bytes .*copied, .*",
            r"gpgv: the signature could not be verified\.",
            r"Please remember that the signature file .*\nshould be the first file given on the command line\.",
            r"[ \t]*Error during parsing of command line\.",
            r"File descriptor \d+ .* leaked on .*",
            r"[ \t]*dmesg\(1\) may have more information .*",
        )
    )
)
LONGEST = 5  # lines of one cause
LOOKED_AT = 1 << 16  # characters, from the end
# That say one thing in several lines, and nothing else
AT_LENGTH = ("resize2fs", "btrfs", "mkfs.btrfs", "mcopy")


def cause(program: str, errors: str, output: str = "") -> str:
    """Return in one line why `program` has failed, which has printed `errors` to stderr and `output` to stdout."""
    lines = _possible(errors)
    if program == "e2fsck":  # which tells on stdout what is wrong with a filesystem
        lines = lines or _possible(output)
        # each finding begins with the name of the device, or of e2fsck, and may go on for some lines
        begins = [number for number, line in enumerate(lines) if re.match(r"\S+: \S", line)]
        lines = lines[begins[-1] :][:LONGEST] if begins else lines[-1:]
    else:
        lines = lines[-LONGEST:] if program in AT_LENGTH else lines[-1:]
    return " ".join(" ".join(lines).split())


def _possible(text: str) -> Sequence[str]:
    return [line for line in re.sub(NO_CAUSE, "", text[-LOOKED_AT:]).splitlines() if line.strip()]
