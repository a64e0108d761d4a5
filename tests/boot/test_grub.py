"""Disks made with the hook `grub` boot from BIOS and from UEFI, with the requested command line."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from debian import SUITES, Debian, debian
from qemu import booting
from support import SITE, Node
from test_boot import Guest, check, deploy, images, make_disk, node

__all__ = ["images", "node"]
GPT = {"PARTITION_TABLE": "gpt"}
BOTH = Guest("bookworm", "ext3", 3, 0, 4, {"FILESYSTEM": "ext3", "SWAP": "no", **GPT})
PAIR = (
    Guest("trixie", "xfs", 3, 0, 4, {"FILESYSTEM": "xfs", "SWAP": "no", **GPT}),
    Guest("signed", "btrfs", 3, 0, 4, {"FILESYSTEM": "btrfs", "SWAP": "no", **GPT}),  # bookworm, with shim
)


def test_one_disk_boots_from_bios_and_from_uefi(node: Node, images: dict[str, Debian], tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk")
    deploy(node, BOTH, disk)
    with ExitStack() as stack:
        consoles = {
            firmware: stack.enter_context(booting(disk, tmp_path / firmware, firmware=firmware))
            for firmware in ("bios", "uefi")
        }
        reports = {firmware: console.facts() for firmware, console in consoles.items()}
    for firmware, facts in reports.items():
        assert facts["firmware"] == firmware
        check(BOTH, facts, disk, images[BOTH.suite])


# All files for booting, by content; the times on the ESP may differ.
LOOK = """#!/bin/sh
cd "$TARGET" && find boot etc -type f -exec sha256sum {} + | sort -k 2 | sed 's/^/content /'
scratch=$(mktemp -d) && MTOOLS_SKIP_CHECK=1 mcopy -s -n -i "${DISK_DEV}p2" '::*' "$scratch" 2>/dev/null
cd "$scratch" && find . -type f -exec sha256sum {} + | sort -k 2 | sed 's/^/content /'
rm -r "$scratch"
"""


@pytest.mark.parametrize("suite", SUITES)
def test_twice_is_as_once(suite: str, node: Node, images: dict[str, Debian], tmp_path: Path) -> None:
    """With the real programs of each suite; nothing boots."""
    for name in ("h-look", "j-look"):
        node.hook(name, LOOK)
    (SITE / "hooks/i-again").symlink_to("grub")
    log = deploy(node, Guest(suite, "ext4", 3, 4, 5, GPT), make_disk(tmp_path / "disk"))
    once, twice = (re.findall(rf"{name}: content (.*)", log) for name in ("h-look", "j-look"))
    assert once == twice
    for part in ("boot/grub/grub.cfg", "etc/default/grub.d/90-imageos.cfg", "./EFI/BOOT/BOOTX64.EFI"):
        assert [line for line in once if line.endswith(part)], part


def test_boots_from_uefi(node: Node, images: dict[str, Debian], tmp_path: Path) -> None:
    """Two guests at a time: with a core image by grub-mkimage, and with the distribution's signed loaders."""
    images = {**images, "signed": debian("bookworm", "signed")}
    (node.images / "signed-x86_64.tar.zst").symlink_to(images["signed"].tarball)
    disks = [make_disk(tmp_path / f"disk-{guest}") for guest in PAIR]
    with ExitStack() as stack:
        consoles = []
        for guest, disk in zip(PAIR, disks):
            deploy(node, guest, disk)
            consoles.append(stack.enter_context(booting(disk, disk.with_suffix(".console"), firmware="uefi")))
        reports = [console.facts() for console in consoles]
    for guest, disk, facts in zip(PAIR, disks, reports):
        assert facts["firmware"] == "uefi"
        check(guest, facts, disk, images[guest.suite])
