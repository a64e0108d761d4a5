"""A Debian tarball becomes a bootable system: deployed as by Ganeti, booted in qemu, checked from inside."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from debian import SUITES, Debian, debians
from qemu import Facts, booting
from support import DEFAULTS, MIB, SITE, Node, partitions

DISK_SIZE = 2048  # MiB
KERNEL_ARGS = "mitigations=off no_timer_check imageos.test=1"


@dataclass(frozen=True)
class Guest:
    """A suite, its OS parameters, and the expected result."""

    suite: str
    filesystem: str
    boot: int  # the partition's number in the documented layout
    swap: int  # 0: none
    root: int
    settings: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.suite, self.filesystem, *self.settings.values()])


EXT4 = Guest("bookworm", "ext4", 1, 2, 3)  # all settings as shipped
PAIRS = [
    (Guest("bullseye", "ext4", 1, 2, 3), Guest("trixie", "ext4", 1, 2, 3)),
    (
        Guest("bookworm", "xfs", 3, 4, 5, {"FILESYSTEM": "xfs", "PARTITION_TABLE": "gpt"}),
        Guest("bookworm", "btrfs", 1, 0, 2, {"FILESYSTEM": "btrfs", "SWAP": "no"}),
    ),
]  # fmt: skip


# As if the image had been made where there was swap: its initramfs waits for that
OTHER_SWAP = """#!/bin/sh
for initramfs in "$TARGET"/boot/initrd.img-*; do
  truncate --size=%4 "$initramfs"
  cat "{}" >>"$initramfs"
done
"""


@pytest.fixture(scope="session")
def images() -> dict[str, Debian]:
    return debians(SUITES)


@pytest.fixture
def node(node: Node, images: dict[str, Debian]) -> Node:
    """Return a node with the shipped settings, the images, and the hook `grub` enabled."""
    shipped = (node.root / DEFAULTS.relative_to("/")).read_text()
    node.write(DEFAULTS, f"{shipped}\nIMAGE_DIR={node.images}\nIMAGE_TYPE=tarball\n")
    for image in images.values():
        (node.images / f"{image.suite}-x86_64.tar.zst").symlink_to(image.tarball)
    (SITE / "hooks/grub").chmod(0o755)
    return node


def make_disk(path: Path) -> Path:
    with path.open("xb") as file:
        file.truncate(DISK_SIZE * MIB)
    return path


def deploy(node: Node, guest: Guest, disk: Path, *more: Path, env: str = "create-kvm-network") -> str:
    parameters = {
        f"OSP_{name}": value
        for name, value in {
            "IMAGE_NAME": guest.suite,
            "KERNEL_ARGS": KERNEL_ARGS,
            **guest.settings,
        }.items()
    }
    return node.create(disk, *more, env=env, **parameters).ok().log


def archive(name: str, data: bytes) -> bytes:
    """Return an archive of one file, in the format `newc` of cpio: one that ends an initramfs adds to it."""

    def entry(name: str, data: bytes) -> bytes:
        fields = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        return b"".join(part.ljust(-(-len(part) // 4) * 4, b"\0") for part in (header, data))

    return entry(name, data) + entry("TRAILER!!!", b"")


def check(guest: Guest, facts: Facts, disk: Path, image: Debian) -> None:
    """Fail unless the guest's report agrees with the request."""
    assert facts.failed == []
    assert facts["state"] == "running"
    assert facts["hostname"] == "inst1"
    assert facts["fqdn"] == "inst1.example.org"
    assert facts["sshd"] == "active"

    table = {partition.number: partition for partition in partitions(disk)}
    root, boot = facts.mounts["/"], facts.mounts["/boot"]
    assert (root.source, root.fstype) == (f"/dev/vda{guest.root}", guest.filesystem)
    assert root.uuid == table[guest.root].content["UUID"]
    assert boot.source == f"/dev/vda{guest.boot}"
    assert boot.uuid == table[guest.boot].content["UUID"]
    assert facts.sizes["/dev/vda"] == DISK_SIZE * MIB
    last = table[guest.root]
    assert DISK_SIZE * MIB - 2 * MIB <= last.start + last.size <= DISK_SIZE * MIB
    assert facts.sizes[root.source] == last.size
    assert 0.9 * last.size < root.size <= last.size  # minus the filesystem's own overhead
    assert facts.swaps == ([f"/dev/vda{guest.swap}"] if guest.swap else [])

    words = facts["cmdline"].split()
    assert words.count(f"root=UUID={root.uuid}") == 1
    assert len(re.findall(r"\bconsole=ttyS0\b", facts["cmdline"])) == 1
    for word in KERNEL_ARGS.split():
        assert words.count(word) == 1

    assert re.fullmatch("[0-9a-f]{32}", facts["machine-id"])
    assert facts["machine-id"] != image.machine_id
    assert facts.host_keys
    assert not facts.host_keys & image.host_keys


def test_a_reinstalled_debian_boots_to_a_login_prompt(node: Node, images: dict[str, Debian], tmp_path: Path) -> None:
    """Over another layout, with another filesystem and kernel. All other tests boot a new one."""
    disk, second = make_disk(tmp_path / "disk0"), make_disk(tmp_path / "disk1")
    before = Guest("trixie", "xfs", 3, 4, 5, {"FILESYSTEM": "xfs", "PARTITION_TABLE": "gpt"})
    deploy(node, before, disk)
    assert partitions(disk)[-1].content["TYPE"] == "xfs"
    log = deploy(node, EXT4, disk, second, env="create-kvm-network-reinstall")
    assert re.search(r"^imageos: .*\bgrub\b", log, re.MULTILINE), log
    with booting(disk, tmp_path / "console") as console:
        console.wait_for(r"^Debian GNU/Linux 12 inst1 ttyS0$", r"^inst1 login: ")
        check(EXT4, console.facts(), disk, images[EXT4.suite])
    assert second.stat().st_blocks == 0  # the other disk is not touched


@pytest.mark.parametrize("guests", PAIRS, ids=lambda pair: "+".join(map(str, pair)))
def test_boots(node: Node, images: dict[str, Debian], tmp_path: Path, guests: tuple[Guest, ...]) -> None:
    """Two guests at a time, one for each core."""
    (tmp_path / "archive").write_bytes(
        archive("conf/conf.d/resume", b"RESUME=UUID=00000000-0000-4000-8000-000000000000\n")
    )
    node.hook("a-swap", OTHER_SWAP.format(tmp_path / "archive"))
    disks = [make_disk(tmp_path / f"disk-{guest}") for guest in guests]
    consoles = []
    with ExitStack() as stack:
        for guest, disk in zip(guests, disks):
            deploy(node, guest, disk)
            log = disk.with_suffix(".console")
            consoles.append(stack.enter_context(booting(disk, log)))
        for console in consoles:
            console.wait_for(r"^inst1 login: ")
        reports = [console.facts() for console in consoles]
    assert not [console for console in consoles if "suspend/resume device" in console.text()]
    for guest, disk, report in zip(guests, disks, reports):
        check(guest, report, disk, images[guest.suite])
    assert not reports[0].host_keys & reports[1].host_keys
    assert reports[0]["machine-id"] != reports[1]["machine-id"]
    for disk in disks:
        disk.unlink()
