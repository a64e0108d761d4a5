"""Disk images and dumps of real systems: deployed as by Ganeti, grown, booted, checked from inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from bootdisks import BootDisk, boot_disks
from debian import Debian, debian
from qemu import Facts, booting
from support import DEFAULTS, MIB, SITE, Node, left_dirty, mounted, partitions, recorded, run, table_of

DISK_SIZE = 2048  # MiB; the images have half of it
PROMPT = r"^inst1 login: "
MACS = [recorded("create-kvm-network")[f"NIC_{index}_MAC"] for index in (0, 1)]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKqT3FmJ0vSEGlKqVYZ0GfhCmLl0p2vWqEJbX9vbHq1Z admin@example.org"
HASH = "$6$imageosTest$vOKKOO/xQ8QnDAVcKbLFZZVQ0PX.0OXQBkdhzIYdTYeDTHc2JAPGYHsTBcq/2H7DI0VuqaJ6ueNcJT/Fr1FAp1"
USER_DATA = "#cloud-config\nwrite_files:\n- path: /etc/from-user-data\n  content: hello\n"

# A hook that makes the guest report more; bullseye's cloud-init has its checker at another path.
MORE_FACTS = r"""#!/bin/sh
sed -i "/^  echo FACTS-END/e cat $0.facts" $TARGET/usr/local/sbin/report-facts
"""
CLOUD_FACTS = rf"""
  fact readable "$(find /etc /root /run /tmp /var/lib /var/log -xdev -type f -perm /004 \
    -exec grep -lF '{HASH}' {{}} + 2>/dev/null | tr '\n' ' ')"
  fact cloud-status "$(cloud-init status --long 2>&1 | tr '\n' ' ')"
  if cloud-init schema --help >/dev/null 2>&1; then check='schema --system'
  else check='devel schema --config-file /var/lib/cloud/seed/nocloud/user-data'; fi
  said=$(cloud-init $check 2>&1) && fact cloud-schema valid || fact cloud-schema "$said"
  fact root-password "$(getent shadow root | cut -d: -f2)"
  fact root-keys "$(cat /root/.ssh/authorized_keys)"
  fact user-data "$(cat /etc/from-user-data)"
"""


@dataclass(frozen=True)
class Guest:
    """A disk, how it is deployed, and the expected result."""

    disk: str  # a key of DISKS
    image_type: str
    suffix: str
    filesystem: str
    swap: int = 0  # number of the partition


# name -> layout, suite, flavour
DISKS = {
    "cloud": ("cloud", "bookworm", "cloud-init"),
    "bullseye": ("cloud", "bullseye", "cloud-init-ifupdown"),
    "trixie": ("cloud", "trixie", "cloud-init"),
    "mbr": ("mbr", "bookworm", ""),
    "xfs": ("xfs", "bookworm", ""),
    "btrfs": ("btrfs", "bookworm", ""),
    "lvm": ("lvm", "bookworm", "lvm"),
    "lvm-xfs": ("lvm-xfs", "bookworm", "lvm"),
    "ancestor": ("ancestor", "bookworm", ""),
}
CLOUD = Guest("cloud", "qemu", ".img", "ext4")  # qcow2 under another suffix, as Ubuntu's
PAIRS = [
    (Guest("mbr", "raw", ".raw.zst", "ext4"), Guest("xfs", "qcow2", ".qcow2", "xfs")),
    (Guest("btrfs", "qemu", ".raw", "btrfs"), Guest("ancestor", "qemu", ".qcow2", "ext3", swap=2)),
]
Disks = dict[str, BootDisk]


@pytest.fixture(scope="session")
def disks() -> Disks:
    return boot_disks({name: (layout, debian(suite, flavour)) for name, (layout, suite, flavour) in DISKS.items()})


@pytest.fixture
def node(disks: Disks, node: Node) -> Node:
    """Return a node with the shipped settings."""
    shipped = (node.root / DEFAULTS.relative_to("/")).read_text()
    node.write(DEFAULTS, f"{shipped}\nIMAGE_DIR={node.images}\n")
    return node


def make_image(source: Path, path: Path) -> Path:
    """Convert the raw disk `source` to the usual format for the name `path`."""
    if path.suffix == ".vmdk":
        run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", source, path)
    elif path.suffix in (".img", ".qcow2"):
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, path)
    elif path.suffix == ".zst":
        run("zstd", "-q", "-1", "-T0", source, "-o", path)
    else:
        path.symlink_to(source)
    return path


def deploy(node: Node, guest: Guest, source: BootDisk, target: Path, **more: str | None) -> str:
    make_image(source.path, node.images / f"{guest.disk}-x86_64{guest.suffix}")
    return create(node, target, OSP_IMAGE_NAME=guest.disk, OSP_IMAGE_TYPE=guest.image_type, **more)


def create(node: Node, target: Path, **parameters: str | None) -> str:
    with target.open("xb") as file:
        file.truncate(DISK_SIZE * MIB)
    return node.create(target, env="create-kvm-network", **parameters).ok().log


def boot(disks: Sequence[tuple[Path, str]], macs: Sequence[str] = ()) -> list[Facts]:
    """Boot the guests on these disks at the same time, each by its firmware; return their reports."""
    with ExitStack() as stack:
        consoles = [
            stack.enter_context(booting(disk, disk.with_suffix(f".{firmware}"), firmware, macs))
            for disk, firmware in disks
        ]
        for console in consoles:
            console.wait_for(PROMPT)
        return [console.facts() for console in consoles]


def check_identity(facts: Facts, image: Debian) -> None:
    """Fail unless the guest is up, complete, and has its own identity."""
    assert facts.failed == []
    assert facts["state"] == "running"
    assert facts["hostname"] == "inst1"
    assert facts["fqdn"] == "inst1.example.org"
    assert facts["sshd"] == "active"
    assert re.fullmatch("[0-9a-f]{32}", facts["machine-id"])
    assert facts["machine-id"] != image.machine_id
    assert facts.host_keys
    assert not facts.host_keys & image.host_keys


def check_grown(guest: Guest, facts: Facts, target: Path, source: BootDisk) -> None:
    """Fail unless the root fills the disk, and all that a boot loader uses is as in the image."""
    root = facts.mounts["/"]
    node = f"/dev/vda{source.layout.root}"
    assert (root.source.partition("[")[0], root.fstype) == (node, guest.filesystem)  # [/@]: the subvolume of a btrfs
    before, after = table_of(source.path), table_of(target)
    assert (after["label"], after["id"]) == (before["label"], before["id"])
    old, new = ({_number(entry): entry for entry in table["partitions"]} for table in (before, after))
    assert list(old) == list(new)
    grown = new[source.layout.root]
    assert DISK_SIZE * MIB - 2 * MIB <= (grown["start"] + grown["size"]) * 512 <= DISK_SIZE * MIB
    assert facts.sizes[node] == grown["size"] * 512
    assert 0.9 * grown["size"] * 512 < root.size <= grown["size"] * 512
    grown["size"] = old[source.layout.root]["size"]
    for number, entry in old.items():
        assert {**new[number], "node": ""} == {**entry, "node": ""}
    assert facts.swaps == ([f"/dev/vda{guest.swap}"] if guest.swap else [])


def _number(entry: dict[str, object]) -> int:
    """Return the number at the end of a partition's node: /var/cache/.../disk15."""
    digits = re.search(r"\d+$", str(entry["node"]))
    assert digits
    return int(digits[0])


def cloud_facts(node: Node) -> None:
    """Make the guest report what cloud-init did."""
    hook = node.hook("more-facts", MORE_FACTS)
    node.write(hook.with_name("more-facts.facts"), CLOUD_FACTS)


def check_cloud_init(facts: Facts, user_data: str) -> None:
    """Fail unless cloud-init has finished without a complaint, and kept the secrets."""
    assert "status: done" in facts["cloud-status"]
    assert "degraded" not in facts["cloud-status"]
    assert facts["cloud-schema"] == "valid"
    assert facts["root-keys"] == KEY
    assert facts["user-data"] == user_data
    assert facts["readable"] == ""


def test_an_image_of_a_guest_that_crashed(node: Node, disks: Disks, tmp_path: Path) -> None:
    """Its /etc is only in the journal."""
    source, image = disks["mbr"], tmp_path / "image"
    run("cp", "--sparse=always", source.path, image)
    part = partitions(image)[0]
    with mounted(image, tmp_path / "whole", part, "rw") as root:
        run("mv", root / "etc", root / "root/etc")
    with left_dirty(image, tmp_path / "crashing", part, below="etc") as root:
        run("mv", root / "root/etc", root / "etc")
    with mounted(image, tmp_path / "look", part, "ro,noload") as root:
        assert not (root / "etc").exists()
    target = tmp_path / "disk"
    guest = Guest("crashed", "raw", ".raw", "ext4")
    deploy(node, guest, replace(source, path=image), target)
    (report,) = boot([(target, "bios")])
    check_identity(report, source.image)
    check_grown(guest, report, target, source)


SECRETS = {"OSP_ROOT_PASSWORD_HASH": HASH, "OSP_SSH_AUTHORIZED_KEYS": KEY}


def test_a_cloud_image_boots_by_bios_and_by_uefi(node: Node, disks: Disks, tmp_path: Path) -> None:
    """With cloud-init: the first NIC has its address from Ganeti's network, the second uses DHCP."""
    target, source = tmp_path / "disk", disks["cloud"]
    cloud_facts(node)
    log = deploy(node, CLOUD, source, target, NIC_1_IP=None, OSP_USER_DATA=USER_DATA, **SECRETS)
    assert HASH not in log and KEY not in log
    reports = boot([(target, "bios"), (target, "uefi")], MACS)
    for report, firmware in zip(reports, ("bios", "uefi")):
        check_identity(report, source.image)
        check_grown(CLOUD, report, target, source)
        check_cloud_init(report, "hello")
        assert report["firmware"] == firmware
        assert re.search(r"\broot=PARTUUID=[0-9a-f-]{36}\b", report["cmdline"])
        assert report["root-password"] == HASH
        assert report.links == {"eth0": MACS[0], "eth1": MACS[1]}
        assert report.addresses["eth0"][0] == "198.51.100.2/24"
        assert report.addresses["eth1"][0] == "10.0.1.15/24"
        assert [route for route in report.routes if route.startswith("default")][0].startswith(
            "default via 198.51.100.1 dev eth0"
        )
        assert "198.51.100.53" in report.dns
    assert len(reports[0].host_keys & reports[1].host_keys) >= 3  # create's own; cloud-init 22.4 wants one of DSA, too
    assert reports[0]["machine-id"] != reports[1]["machine-id"]  # each made its own


@pytest.mark.parametrize("name, kind, firmwares", [("lvm", "ext4", ["bios", "uefi"]), ("lvm-xfs", "xfs", ["bios"])])
def test_a_root_on_lvm_boots_by_bios_and_by_uefi(
    name: str, kind: str, firmwares: list[str], node: Node, disks: Disks, tmp_path: Path
) -> None:
    """The hook adds to its menu, which goes on naming the logical volume."""
    (SITE / "hooks/grub").chmod(0o755)
    target, source = tmp_path / "disk", disks[name]
    log = deploy(node, Guest(name, "qcow2", ".qcow2", kind), source, target, OSP_KERNEL_ARGS="quiet loglevel=3")
    assert f"/ on logical volume vg-main/root ({kind}), /boot on partition 2 (ext4)" in log
    for report in boot([(target, firmware) for firmware in firmwares]):
        check_identity(report, source.image)
        root = report.mounts["/"]
        assert (root.source, root.fstype) == ("/dev/mapper/vg--main-root", kind)
        assert report.mounts["/boot"].source == "/dev/vda2"
        assert report.sizes["/dev/mapper/vg--main-root"] > (DISK_SIZE - 320) * MIB
        assert root.size > 0.9 * report.sizes["/dev/mapper/vg--main-root"]
        assert len(report.swaps) == 1
        assert " root=/dev/mapper/vg--main-root " in report["cmdline"]
        assert report["cmdline"].endswith("quiet loglevel=3")


def test_cloud_init_on_a_routed_nic(node: Node, disks: Disks, tmp_path: Path) -> None:
    """An address only: the link is the default route, with netplan in Debian 13 and with ifupdown in Debian 11."""
    cloud_facts(node)
    nics = {"NIC_COUNT": "1", "NIC_0_IP": "192.0.2.60", "NIC_0_NETWORK_SUBNET": None, "NIC_0_NETWORK_GATEWAY": None}
    # user-data has precedence
    own = {"trixie": USER_DATA + "users:\n- default\n", "bullseye": USER_DATA}
    for name, user_data in own.items():
        guest = Guest(name, "qcow2", ".qcow2", "ext4")
        deploy(node, guest, disks[name], tmp_path / name, OSP_USER_DATA=user_data, **nics, **SECRETS)
    trixie, bullseye = reports = boot([(tmp_path / name, "bios") for name in own], MACS[:1])
    for name, report in zip(own, reports):
        check_identity(report, disks[name].image)
        check_cloud_init(report, "hello")
        assert report.links == {"eth0": MACS[0]}
        assert report.addresses["eth0"][0] == "192.0.2.60/32"
        assert "198.51.100.53" in report.dns
    assert trixie["root-password"] != HASH
    assert bullseye["root-password"] == HASH
    assert any(re.match(r"default dev eth0 .*scope link", route) for route in trixie.routes)
    assert any(re.match("default via 169.254.1.1 dev eth0 onlink", route) for route in bullseye.routes)


@pytest.mark.parametrize("guests", PAIRS, ids=lambda pair: "+".join(guest.disk for guest in pair))
def test_boots(node: Node, disks: Disks, tmp_path: Path, guests: tuple[Guest, Guest]) -> None:
    """Two guests at a time, one for each core."""
    targets = [tmp_path / guest.disk for guest in guests]
    for guest, target in zip(guests, targets):
        deploy(node, guest, disks[guest.disk], target)
    reports = boot([(target, "bios") for target in targets])
    for guest, target, report in zip(guests, targets, reports):
        check_identity(report, disks[guest.disk].image)
        check_grown(guest, report, target, disks[guest.disk])
        assert (guest.filesystem == "btrfs") == ("/home" in report.mounts)
    assert not reports[0].host_keys & reports[1].host_keys
    assert reports[0]["machine-id"] != reports[1]["machine-id"]


def test_an_image_of_another_maker_boots(node: Node, disks: Disks, tmp_path: Path) -> None:
    """A VMDK as it is in an OVA."""
    guest, target = Guest("mbr", "qemu", ".vmdk", "ext4"), tmp_path / "disk"
    deploy(node, guest, disks[guest.disk], target)
    (report,) = boot([(target, "bios")])
    check_identity(report, disks[guest.disk].image)
    check_grown(guest, report, target, disks[guest.disk])


def test_a_pair_of_dumps_boots(node: Node, disks: Disks, tmp_path: Path) -> None:
    """Captured by ganeti-instance-image, deployed with today's GRUB on the requested layout."""
    source, target = disks["ancestor"], tmp_path / "disk"
    for name, dump in source.dumps.items():
        (node.images / f"dump-x86_64-{name}.dump").symlink_to(dump)
    (SITE / "hooks/grub").chmod(0o755)
    create(node, target, OSP_IMAGE_NAME="dump", OSP_IMAGE_TYPE="dump")
    (report,) = boot([(target, "bios")])
    check_identity(report, source.image)
    root, boot_partition = report.mounts["/"], report.mounts["/boot"]
    assert (root.source, root.fstype) == ("/dev/vda3", "ext4")
    assert boot_partition.source == "/dev/vda1"
    assert report.swaps == ["/dev/vda2"]
    assert root.size > (DISK_SIZE - 256 - 100) * MIB * 0.9
