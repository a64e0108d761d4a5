"""Which units have failed, as the guest's journal says: read by the node's journalctl, in a room of its own."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress

from imageos import log
from imageos.errors import Failure
from imageos.guests.target import Target
from imageos.node.confinement import Room
from imageos.node.programs import available
from imageos.run import Command, run

MOST = 128 << 20  # bytes, the most that journald gives one file
TIMEOUT = 60.0  # seconds
UNIT = r"[\w:.\\@-]{1,255}"  # systemd.unit(5)
# Of sd-messages.h: SD_MESSAGE_UNIT_FAILURE_RESULT, SD_MESSAGE_SHUTDOWN
FAILED, SHUTDOWN = "d9b373ed55a64feb8242e02dbe79a49c", "98268866d1d54a499c4e98921d93bc40"


def failed_units(guest: Target) -> str:
    """Return the names of the units that have failed, or why nobody knows."""
    if not available("journalctl"):
        return "not known: this node has no journalctl"
    identity = (guest.read("/etc/machine-id") or "").strip()
    try:
        content = guest.read_bytes(f"/var/log/journal/{identity}/system.journal", MOST) if identity else None
        if content is None:
            return "not known: the guest keeps no journal on its disk"
        return log.few(_names(content)) or "none"
    except Failure as failure:
        return f"not known: {failure}"


def _names(content: bytes) -> list[str]:
    # a file without a name is refused
    with tempfile.TemporaryDirectory(prefix="journal.", dir=os.environ.get("TMPDIR")) as directory:
        with open(f"{directory}/system.journal", "xb") as file:
            file.write(content)
        argv = ["journalctl", "--file=system.journal", "--output=json", "--no-pager", "--quiet"]
        argv += [f"MESSAGE_ID={FAILED}", f"MESSAGE_ID={SHUTDOWN}"]  # of one field: either
        return failed(run(Command(argv, Room(work=directory)), timeout=TIMEOUT).splitlines())


def failed(lines: Iterable[str]) -> list[str]:
    """Return the units that failed, but for those that a shutdown has ended; `lines` are entries in JSON, in order."""
    units, going_down = set(), set()
    for line in lines:
        with suppress(ValueError, AttributeError, TypeError, RecursionError):
            entry = json.loads(line)
            boot, unit = entry.get("_BOOT_ID"), entry.get("UNIT", "")
            if entry.get("MESSAGE_ID") == SHUTDOWN:
                going_down.add(boot)
            elif boot not in going_down and re.fullmatch(UNIT, unit):
                units.add(unit)
    return sorted(units)
