"""variants try: the units that a guest's journal calls failed."""

from __future__ import annotations

import json

from imageos.variants import journal
from imageos.variants.journal import FAILED, SHUTDOWN


def entry(kind: str, unit: object = None, boot: str = "1") -> str:
    return json.dumps({"MESSAGE_ID": kind, "_BOOT_ID": boot, **({"UNIT": unit} if unit else {})})


def test_what_a_shutdown_ends_has_not_failed() -> None:
    lines = [
        entry(FAILED, "b.service"),
        entry(FAILED, "a@x\\x2dy.service"),
        entry(FAILED, "b.service"),
        entry(SHUTDOWN),
        entry(FAILED, "late.service"),
        entry(FAILED, "c.mount", boot="2"),
        entry(SHUTDOWN, boot="2"),
        entry(FAILED, "later.service", boot="2"),
    ]
    assert journal.failed(lines) == ["a@x\\x2dy.service", "b.service", "c.mount"]


def test_entries_of_a_hostile_journal() -> None:
    lines = [
        "",
        "[]",
        "{",
        "[" * 99999,
        json.dumps({"MESSAGE_ID": [FAILED], "_BOOT_ID": ["1"], "UNIT": "x.service"}),
        entry(FAILED, ["a", "b"]),
        entry(FAILED, "a\x1b[2J.service"),
        entry(FAILED, "a" * 300),
        entry(FAILED),
        entry(FAILED, "good.service"),
    ]
    assert journal.failed(lines) == ["good.service"]
