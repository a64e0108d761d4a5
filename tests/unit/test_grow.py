"""Decide if a root grows, and how far."""

from __future__ import annotations

import pytest

from imageos.disks.grow import new_size, why_not
from imageos.disks.layout import MIB
from imageos.disks.partitions import Part, Table


def part(number: int, start: int, size: int, kind: str = "ext4", type: str = "83") -> Part:
    return Part(number, start * MIB, size * MIB, type, "", "", f"/dev/loop7p{number}", kind)


def test_order_on_the_disk_counts_not_the_numbers() -> None:
    root = part(1, 50, 40)
    assert not why_not(Table("gpt", (root, part(14, 1, 4, ""), part(15, 5, 40, "vfat")), 100 * MIB), root)


@pytest.mark.parametrize("kind, shown", [("swap", "partition 3 (swap)"), ("", "partition 3 (unknown)")])
def test_what_lies_behind(kind: str, shown: str) -> None:
    root = part(2, 5, 40)
    assert shown in why_not(Table("dos", (part(1, 1, 4), root, part(3, 45, 10, kind)), 100 * MIB), root)


def test_logical_root() -> None:
    root = part(5, 11, 20)
    table = Table("dos", (part(1, 1, 9), root), 100 * MIB, extended=(part(2, 10, 30, type="5"),))
    assert not why_not(table, root)
    behind = part(6, 32, 8, "swap")
    assert "partition 6 (swap)" in why_not(Table("dos", (*table.parts, behind), 100 * MIB, table.extended), root)


def test_no_table() -> None:
    root = Part(0, 0, 100 * MIB, "", "", "", "/dev/loop7", "ext4")
    assert not why_not(Table("", (root,), 100 * MIB), root)


@pytest.mark.parametrize(
    "end, expected",
    [(100 * MIB, 90 * MIB), (100 * MIB - 17 * 1024, 89 * MIB), (50 * MIB + 5, 40 * MIB), (40 * MIB, 40 * MIB)],
)
def test_size_is_aligned_and_never_smaller(end: int, expected: int) -> None:
    root = part(1, 10, 40)
    assert new_size(Table("gpt", (root,), end), root) == expected
