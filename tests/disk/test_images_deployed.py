"""Deploy disk images of every layout on a larger disk: find, grow and name the root, and change nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import guestdisks
import lvmdisks
import pytest
import trees
from guestdisks import Guest, by_number, place
from support import MIB, Node, attached, mounted, probe, run, table_of

MakeDisk = Callable[..., Path]
SIZE = 640  # MiB; size of the instance's disk
CHECK = {
    "ext3": ["e2fsck", "-f", "-n"],
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}


@pytest.fixture(scope="module")
def guests(small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Guest]:
    """Return the image of a layout, made once."""
    top = tmp_path_factory.mktemp("guests")
    made: dict[str, Guest] = {}

    def get(layout: str) -> Guest:
        if layout not in made:
            made[layout] = guestdisks.LAYOUTS[layout](top / f"{layout}.raw", small_tree, top)
        return made[layout]

    return get


def kept(disk: Path, root: int | str, with_size: bool) -> object:
    """Return all that identifies a disk and its content; the size of the root only if it must not grow."""
    if not root:
        return probe(disk).get("UUID")
    table = table_of(disk)
    entries = [dict(entry, node=str(entry["node"])[len(str(disk)) :].lstrip("p")) for entry in table["partitions"]]  # type: ignore
    for entry in entries:
        if entry["node"] in (str(root), *map(str, lvmdisks.places(disk))) and not with_size:
            del entry["size"]
    return table["id"], table["label"], entries, [part.content.get("UUID") for part in by_number(disk)]


def root_options(guest: Guest, options: str) -> str:
    return f"{options},subvol={guest.subvolume}" if guest.subvolume else options


def check_guest(disk: Path, guest: Guest, tmp_path: Path) -> None:
    """Fail unless the guest has this instance's identity and the image's own boot files."""
    with mounted(disk, tmp_path / "look", place(disk, guest.root), root_options(guest, "ro")) as root:
        assert (root / "etc/hostname").read_text() == "inst1\n"
        assert "inst1.example.org" in (root / "etc/hosts").read_text()
        assert (root / "etc/machine-id").read_text() == ""
        assert not list((root / "etc/ssh").glob("ssh_host_*"))
        assert not os.path.lexists(root / "var/lib/cloud/instance")
        assert os.path.lexists(root / "etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service")
        assert (root / "etc/fstab").read_text() == guest.fstab
        assert not [name for name in os.listdir(root) if name.startswith(("look", "grow"))]


def check_filesystem(disk: Path, guest: Guest) -> None:
    part = place(disk, guest.root)
    start, size = (part.start, part.size) if part else (0, 0)
    with attached(disk, start, size, read_only=True) as device:
        kind = probe(device)["TYPE"]
        run(*CHECK[kind], device)


def size_of_root(disk: Path, guest: Guest, tmp_path: Path) -> int:
    with mounted(disk, tmp_path / "look", place(disk, guest.root), root_options(guest, "ro")) as root:
        status = os.statvfs(root)
        return status.f_blocks * status.f_frsize


def stock(node: Node, guest: Guest, image_type: str) -> None:
    if image_type == "qcow2":
        guestdisks.qcow2(guest.path, node.images / f"guest-{trees.ARCH}.qcow2")
    elif image_type == "qemu":
        guestdisks.qcow2(guest.path, node.images / f"guest-{trees.ARCH}.img", "-c")
    else:
        node.image(guest.path, f"guest-{trees.ARCH}.raw")


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
@pytest.mark.parametrize("layout", guestdisks.LAYOUTS)
def test_deployed_and_grown(layout: str, image_type: str, node: Node, disk: MakeDisk, tmp_path: Path,
                            guests: Callable[[str], Guest]) -> None:  # fmt: skip
    guest = guests(layout)
    stock(node, guest, image_type)
    target = guestdisks.soiled(disk(SIZE), SIZE)
    result = node.create(target, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE=image_type,
                         INSTANCE_HV_serial_console="True").ok()  # fmt: skip
    print(result.log)
    assert target.stat().st_size == SIZE * MIB
    assert kept(target, guest.root, False) == kept(guest.path, guest.root, False)
    end = SIZE * MIB
    part = place(target, guest.root)
    if part:
        end = part.start + part.size
        slack = 6 if isinstance(guest.root, str) else 2  # an extent has 4 MiB
        assert SIZE * MIB - slack * MIB <= end <= SIZE * MIB, "the partition does not reach the end"
    grown = end - (part.start if part else 0)
    assert size_of_root(target, guest, tmp_path) > 0.8 * grown
    check_guest(target, guest, tmp_path)
    check_filesystem(target, guest)
    assert b"secret of the last tenant" not in target.read_bytes()
    assert target.stat().st_blocks * 512 < 250 * MIB, "not sparse"
