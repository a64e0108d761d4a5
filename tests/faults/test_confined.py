"""Programs of the node that read what a stranger has made: who takes one over has no way out.

Nor has he rights of root, but for those that make the guest's files what they were.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import backups
import guestdisks
import pytest
import trees
from support import PATH, Call, Node, attached, run

MakeDisk = Callable[..., Path]
CANARY = Path("/run/imageos-canary")
# NAME -> what it is tried by, true if it succeeded; all of it is harmless
ATTEMPTS = {
    # none, or CAP_DAC_READ_SEARCH
    "capabilities": "! grep -Eq '^CapPrm:\\s*000000000000000[04]$' /proc/self/status",
    # ... or what it takes to make any file: chown, dac_override, fowner, fsetid, linux_immutable, sys_admin, mknod,
    # setfcap, mac_admin (linux/capability.h)
    "other capabilities": "! grep -Eq '^CapPrm:\\s*0{6}(0{9}[04]|028820021b)$' /proc/self/status",
    "mounts": "mount -t tmpfs none /mnt && umount /mnt",
    "remounts": "mount -o remount,bind,rw /etc && [ -w /etc/hosts ]",
    "devices that it makes": "mknod $PLACE/$$ c 1 5 && : <$PLACE/$$",
    "new privileges": "! grep -q '^NoNewPrivs:\\s*1$' /proc/self/status",
    "configuration of the node": "[ -w /etc/hosts ]",
    "programs of the node": "[ -w /usr/bin/env ]",
    "crontabs": "[ -w /var/spool ]",
    "sysctl": "[ -w /proc/sys/kernel/core_pattern ]",
    "sysrq": "[ -w /proc/sysrq-trigger ]",
    "sysfs": "[ -w /sys/block/loop0/uevent ]",
    "disks of others": '[ -e /dev/loop-control ] || [ "$(ls /dev | grep -c -E "^(loop|[sv]d|nvme|dm-)")" -gt 1 ]',
    "sockets of the node": f"[ -e {CANARY} ]",
    "network": '[ "$(grep -c : /proc/net/dev)" -gt 1 ] || ! grep -q lo: /proc/net/dev',
}
ESP_HOOK = """#!/usr/bin/env python3
from imageos.guests import esp
from imageos.hook import Hook


def main(hook):
    (device,) = [one.device for one in hook.volumes if one.role == "esp"]
    esp.write(device, {"EFI/BOOT/BOOTX64.EFI": b"a loader"})


Hook.run(main)
"""


@pytest.fixture
def canary() -> Iterator[None]:
    CANARY.touch()
    yield
    CANARY.unlink()


@pytest.fixture
def recorded(tmp_path: Path, canary: None) -> Callable[..., str]:
    """A PATH in which these programs first try what they may not; what each could is in `said.PID`."""
    place = tmp_path / "tried"

    def make(*programs: str) -> str:
        place.mkdir()
        for program in programs:
            tries = "".join(f"({condition}) 2>/dev/null && echo '{name}'\n" for name, condition in ATTEMPTS.items())
            real = shutil.which(program, path=PATH)
            (place / program).write_text(
                f"#!/bin/sh\nPLACE={place}\n"
                f'(echo "{program} $1:"; {tries}) </dev/null >$PLACE/said.$$\nexec {real} "$@"\n'
            )
            (place / program).chmod(0o755)
        return f"{place}:{PATH}"

    return make


def could(tmp_path: Path) -> dict[str, set[str]]:
    """Program and first argument -> in what it succeeded."""
    found: dict[str, set[str]] = {}
    for said in (tmp_path / "tried").glob("said.*"):
        program, *things = said.read_text().splitlines()
        found.setdefault(program.rstrip(":"), set()).update(things)
    return found


def test_disk_image(node: Node, disk: MakeDisk, recorded: Callable[..., str], small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.LAYOUTS["cloud"](tmp_path / "cloud.raw", small_tree, tmp_path)
    image = node.images / f"cloud-{trees.ARCH}.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", guest.path, image)
    image.chmod(0o600)
    os.chown(image, 1234, 1234)
    path = recorded("qemu-img", "sfdisk", "blkid", "e2fsck", "resize2fs")
    node.create(disk(), PATH=path, OSP_IMAGE_NAME="cloud", OSP_IMAGE_TYPE="qcow2").ok()
    found = could(tmp_path)
    # these write what we tell them, and show that the attempts are true
    written = found.pop("sfdisk --quiet") & found.pop("sfdisk --relocate")
    assert written >= {
        "capabilities", "mounts", "devices that it makes", "sysctl", "sysfs", "disks of others", "sockets of the node"
    }  # fmt: skip
    assert {name.split()[0] for name in found} == {"qemu-img", "sfdisk", "blkid", "e2fsck", "resize2fs"}
    assert {name: things for name, things in found.items() if things} == {}


def test_compressed_disk_image(
    node: Node, disk: MakeDisk, recorded: Callable[..., str], small_tree: Path, tmp_path: Path
) -> None:
    guest = guestdisks.LAYOUTS["cloud"](tmp_path / "cloud.raw", small_tree, tmp_path)
    image = node.images / f"cloud-{trees.ARCH}.raw.xz"
    trees.compress(guest.path, image, "xz")
    path = recorded("xz", "dd")
    node.create(disk(), PATH=path, OSP_IMAGE_NAME="cloud", OSP_IMAGE_TYPE="raw").ok()
    found = could(tmp_path)
    assert {name.split()[0] for name in found} == {"xz", "dd"}
    assert {name: things for name, things in found.items() if things} == {}


def test_tarball_and_loader(
    node: Node, disk: MakeDisk, recorded: Callable[..., str], images: Path, tmp_path: Path
) -> None:
    node.image(images / "small.tar.zst", f"zst-{trees.ARCH}.tar.zst")
    node.hook("esp", ESP_HOOK)
    target = disk(400)
    path = recorded("zstd", "tar", "mcopy")
    node.create(target, PATH=path, OSP_IMAGE_NAME="zst", OSP_PARTITION_TABLE="gpt").ok()
    assert could(tmp_path) == {"zstd -dcq": set(), "tar --extract": {"capabilities"}, "mcopy -s": set()}
    esp = guestdisks.place(target, 2)
    assert esp
    assert run("mtype", "-i", f"{target}@@{esp.start}", "::EFI/BOOT/BOOTX64.EFI") == "a loader"


@pytest.mark.parametrize("command", ["create", "import"])
def test_dump(
    command: str, node: Node, disk: MakeDisk, recorded: Callable[..., str], small_tree: Path, tmp_path: Path
) -> None:
    place = tmp_path / "dumped"
    place.mkdir()
    whole = guestdisks.mbr(place / "disk", small_tree, tmp_path).path
    part = guestdisks.place(whole, 1)
    assert part
    with attached(whole, part.start, part.size) as device:
        run("dump", "-0", "-q", "-f", place / "root.dump", device)
    path = recorded("restore")
    if command == "create":
        (place / "root.dump").rename(node.images / f"old-{trees.ARCH}-root.dump")
        node.create(disk(), PATH=path, OSP_IMAGE_NAME="old", OSP_IMAGE_TYPE="dump").ok()
    else:
        run("tar", "--create", "--file", place / "stream", "--directory", place, "./root.dump")
        backups.restore(node, place / "stream", disk(), PATH=path, INSTANCE_HV_kernel_path="/vmlinuz").ok()
    assert could(tmp_path) == {"restore -r": {"capabilities"}}


def test_dump_is_made(node: Node, recorded: Callable[..., str], small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "disk", small_tree, tmp_path).path
    command = ["ganeti-image", "-t", "dump", "-i", "inst1", "--disk", str(guest), "-n", "made", "-d", str(node.images)]
    Call(node.imageos, {"PATH": recorded("dump")}, node.work / "capture.log", command).result().ok()
    assert could(tmp_path) == {"dump -0": set()}
