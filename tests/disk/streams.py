"""A small stream of export, and a large disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from backups import MARKER, exported
from guestdisks import make
from support import MIB, Node, partitions, run

MakeDisk = Callable[..., Path]


def soil(disk: Path) -> Path:
    """Fill a disk with data that must not remain."""
    with disk.open("r+b") as file:
        for _ in range(disk.stat().st_size // MIB):
            file.write((MARKER * (MIB // len(MARKER) + 1))[:MIB])
    return disk


@pytest.fixture
def backup(node: Node, disk: MakeDisk, tmp_path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """Make a small stream; return it with the ranges of the partitions."""
    source = disk(32)
    run("sfdisk", "--quiet", source, text="label: gpt\n,10M\n,15M\n")
    places = [(part.start, part.size) for part in partitions(source)]
    make(source, 1, "ext4")
    with source.open("r+b") as file:
        file.seek(places[1][0])
        file.write(os.urandom(9 * MIB))
    return exported(node, source).read_bytes(), places


def archive(stage: Path, *names: str) -> Path:
    """Return the output of `tar -cf - .` with the members in this order."""
    path = stage.with_suffix(".tar")
    run(
        "tar", "--create", "--file", path, "--directory", stage, "--no-recursion", ".", *(f"./{name}" for name in names)
    )
    return path
