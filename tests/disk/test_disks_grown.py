"""imageos grow: what is on a disk gets what was added to it, and nothing else of the disk changes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import guestdisks
import lvmdisks
import pytest
from guestdisks import by_number, place
from support import MIB, PATH, Gate, Node, Result, attached, describe, digest, locked, mounted, probe, run, wait_until

MakeDisk = Callable[..., Path]
MORE = 300  # MiB that Ganeti has added
CHECK = {"ext": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"], "btr": ["btrfs", "check", "--readonly"]}
NOTHING = "there is nothing to do"


def enlarge(path: Path, mib: int = MORE) -> Path:
    """As gnt-instance grow-disk does."""
    os.truncate(path, path.stat().st_size + mib * MIB)
    return path


def grow(node: Node, *disks: Path) -> Result:
    return node.tool("grow", *(f"--disk={disk}" for disk in disks), "inst1.example.org")


def seen(disk: Path, number: int | str, work: Path) -> tuple[dict[bytes, tuple], int]:  # type: ignore[type-arg]
    """Return what is in a filesystem, and how many bytes it has; fail unless it is sound."""
    part = place(disk, number)
    with attached(disk, part.start if part else 0, part.size if part else 0, read_only=True) as device:
        kind = run("blkid", "--probe", "-o", "value", "-s", "TYPE", device).strip()
        run(*CHECK[kind[:3]], device)
    with mounted(disk, work / "look", part) as where:
        status = os.statvfs(where)
        return describe(where), status.f_blocks * status.f_frsize


def identifiers(disk: Path) -> list[str]:
    """Return those of the disk, of its partitions, and of what is on them."""
    table = {key: value for key, value in probe(disk).items() if key != "PTTYPE"}
    parts = by_number(disk) if "PTUUID" in table else []
    found = [f"{part.number} {part.start} {part.content.get('UUID')} {part.content.get('LABEL')}" for part in parts]
    entries = run("sfdisk", "--dump", disk) if parts else ""
    return [
        table.get("PTUUID", table.get("UUID", "")),
        *found,
        *re.findall(r"(?:uuid|type|name|attrs)=[^,\n]*", entries),
    ]


@pytest.mark.parametrize("layout", guestdisks.LAYOUTS)
def test_layouts(layout: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Root, partition and LVM have the whole disk; files and identifiers stay; a second call writes nothing."""
    guest = guestdisks.LAYOUTS[layout](tmp_path / "guest.raw", small_tree, tmp_path)
    files, before = seen(guest.path, guest.root, tmp_path)
    before_ids = identifiers(guest.path)
    enlarge(guest.path)
    result = grow(node, guest.path).ok()
    assert "has grown from" in result.last, result.log
    now, size = seen(guest.path, guest.root, tmp_path)
    assert now == files
    assert size - before > 0.9 * MORE * MIB, result.log
    assert identifiers(guest.path) == before_ids
    is_written = digest(guest.path)
    assert NOTHING in grow(node, guest.path).ok().last
    assert layout == "xfs" or digest(guest.path) == is_written  # Linux notes in its log that it was looked at


@pytest.mark.parametrize("kind", ["ext3", "ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("table", ["", "label: gpt\n1 : start=1M\n", "label: dos\n1 : start=1M\n"])
def test_data_disk(kind: str, table: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """A disk without a system: its last filesystem grows."""
    disk = guestdisks.blank(tmp_path / "data", 320, table)
    guestdisks.make(disk, number := int(bool(table)), kind)
    guestdisks.fill(disk, number, small_tree / "etc", tmp_path)
    files, before = seen(disk, number, tmp_path)
    assert NOTHING in grow(node, disk).ok().last
    grow(node, enlarge(disk)).ok()
    now, size = seen(disk, number, tmp_path)
    assert now == files and size - before > 0.9 * MORE * MIB


def test_several_disks(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Each for itself: what is not ours to grow behind the first is left, a failure of one does not stop the others."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    swap, data = guestdisks.blank(tmp_path / "swap", 64), guestdisks.blank(tmp_path / "data", 64)
    guestdisks.make(swap, 0, "swap")
    guestdisks.make(data, 0, "ext4")
    crowded = guestdisks.blank(tmp_path / "crowded", 65, "label: gpt\n1 : size=40M\n2 : size=16M\n")
    guestdisks.make(crowded, 1, "ext4")
    left = digest(enlarge(swap))
    behind = digest(enlarge(crowded))
    result = grow(node, enlarge(guest.path), swap, crowded, enlarge(data)).failed(str(crowded), "partition 2 (unknown)")
    assert f"disk {swap} is left as it is" in result.log or f"disk {swap}: it holds nothing" in result.log
    assert (digest(swap), digest(crowded)) == (left, behind)
    assert seen(data, 0, tmp_path)[1] > MORE * MIB
    assert seen(guest.path, 1, tmp_path)[1] > MORE * MIB


BEHIND = [
    "label: gpt\n1 : size=40M, name=root\n2 : type=S\n",
    "label: dos\n2 : start=42M, type=S\n1 : start=1M, size=40M\n",
]


@pytest.mark.parametrize("table", BEHIND)
def test_something_lies_behind(table: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Refused before anything is written; as long as nothing was added, that is no failure."""
    disk = guestdisks.blank(tmp_path / "disk", 65, table)
    guestdisks.make(disk, 1, "ext4")
    guestdisks.fill(disk, 1, small_tree, tmp_path, "")
    guestdisks.make(disk, 2, "swap")
    assert NOTHING in grow(node, disk).ok().last
    before = digest(enlarge(disk))
    grow(node, disk).failed("behind partition 1 lies partition 2 (swap)")
    assert digest(disk) == before


def test_logical_volumes(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Of a data disk with several nobody can tell which is meant; a root in front of another is refused."""
    disk = guestdisks.blank(tmp_path / "disk", 200, f"label: gpt\n1 : start=1M, type={lvmdisks.LVM}\n")
    guestdisks.volume_group(disk, 1, "vg", {"one": 64, "two": 64})
    for name in ("one", "two"):
        guestdisks.make(disk, f"vg/{name}", "ext4")
    before = digest(disk)
    grow(node, disk).failed("logical volume vg/one, logical volume vg/two")
    assert digest(disk) == before
    guestdisks.fill(disk, "vg/one", small_tree, tmp_path, "")
    before = digest(enlarge(disk))
    grow(node, disk).failed("behind logical volume vg/one lies logical volume vg/two")
    assert digest(disk) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(number: signal.Signals, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """SIGTERM waits: what is stopped half way is damaged. After SIGKILL nothing is left, and the next call goes on."""
    guest = guestdisks.cloud(tmp_path / "guest.raw", small_tree, tmp_path)
    files, before = seen(guest.path, 1, tmp_path)
    gate = Gate(tmp_path / "fake/gate")
    fake = tmp_path / "fake/resize2fs"
    node.write(fake, f'#!/bin/sh\n{gate.shell}\nPATH={PATH} exec resize2fs "$@"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{PATH}"
    call = node.start_tool("grow", f"--disk={enlarge(guest.path)}", "inst1", path=path)
    call.wait_for(gate.reached, "in resize2fs")
    call.kill(number)
    if number == signal.SIGTERM:
        gate.open()
        assert "has grown from" in (result := call.result()).log
        assert result.status == 128 + number
    else:
        assert call.result().status == 128 + number
        gate.open()
        wait_until(lambda: not run("losetup", "--associated", guest.path), "no loop device is left")
        now, size = seen(guest.path, 1, tmp_path)
        assert (now, size) == (files, before)
        assert place(guest.path, 1).size > MORE * MIB  # type: ignore[union-attr]
        grow(node, guest.path).ok()
    now, size = seen(guest.path, 1, tmp_path)
    assert now == files and size - before > 0.9 * MORE * MIB


# what is done to the disk, or instead of a disk -> words of the last lines
BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "nothing on it": (lambda path: path.write_bytes(bytes(9 * MIB)), ("holds nothing that imageos can grow",)),
    "windows": (
        lambda path: path.write_bytes(bytes(3) + b"NTFS    " + bytes(9 * MIB)),
        ("holds nothing that imageos can grow",),
    ),
    "no disk": (lambda path: path.unlink(), ("No such file",)),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), ("neither a block device",)),
    "a FIFO": (lambda path: (path.unlink(), os.mkfifo(path)), ("neither a block device",)),
    "empty": (lambda path: os.truncate(path, 0), ("has 0 bytes",)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_disks(what: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    path = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path).path
    change, words = BAD[what]
    change(path)
    result = grow(node, path).failed(*words)
    assert str(path) in result.last


def test_root_that_cannot_be_seen(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """It may be on a logical volume in two pieces; then the last filesystem, /boot, is not what is meant."""
    disk = guestdisks.blank(
        tmp_path / "disk", 240, f"label: gpt\n1 : size=120M, type={lvmdisks.LVM}\n2 : type={guestdisks.DATA}\n"
    )
    guestdisks.volume_group(disk, 1, "vg", {"one": 16, "two": 16})
    place_of_pv = place(disk, 1)
    assert place_of_pv
    with attached(disk, place_of_pv.start, place_of_pv.size) as device:
        lvmdisks.lvm([device], "lvextend", "-L", "32M", "vg/one")
    guestdisks.make(disk, 2, "ext4")
    before = digest(enlarge(disk))
    grow(node, disk).failed("no root filesystem found", "logical volume vg/one cannot be read: it is in 2 pieces")
    assert digest(disk) == before


def test_damaged(node: Node, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    part = place(guest.path, 1)
    assert part
    with attached(guest.path, part.start, part.size) as device:
        run("debugfs", "-w", "-R", "clri /etc", device)
    enlarge(guest.path)
    result = grow(node, guest.path).failed(str(guest.path))
    assert place(guest.path, 1) == part, result.log


def test_in_use(node: Node, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    enlarge(guest.path)
    with locked(guest.path):
        grow(node, guest.path).failed("in use")
    with attached(guest.path):
        grow(node, guest.path).failed("in use")
