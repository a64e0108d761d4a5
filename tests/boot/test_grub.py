"""What the hook `grub` makes boots from BIOS and from UEFI, with the command line that was asked for."""

from contextlib import ExitStack
from pathlib import Path

from debian import Debian, debian
from qemu import booting
from support import Node
from test_boot import Guest, check, deploy, images, make_disk, node

__all__ = ["images", "node"]
GPT = {"PARTITION_TABLE": "gpt"}
BOTH = Guest("bookworm", "ext4", 3, 4, 5, GPT)
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


def test_boots_from_uefi(node: Node, images: dict[str, Debian], tmp_path: Path) -> None:
    """Two guests at a time; a core image that grub-mkimage made, and the distribution's signed loaders."""
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
