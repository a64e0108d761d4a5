"""Boot guests with every kind of network configuration, and compare their network with the plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from debian import Debian, flavours
from qemu import Facts, booting
from support import DEFAULTS, MIB, SITE, Node

MACS = ("aa:00:00:4e:37:01", "aa:00:00:4e:37:02")
# qemu's user networks: 10.0.0.0/24 and 10.0.1.0/24, router .2, DNS server .3, the first lease .15
NICS = {
    "NIC_0_MAC": MACS[0],
    "NIC_0_IP": "10.0.0.40",
    "NIC_0_NETWORK_SUBNET": "10.0.0.0/24",
    "NIC_0_NETWORK_GATEWAY": "10.0.0.2",
    "NIC_0_NETWORK_SUBNET6": "2001:db8:1::/64",
    "NIC_0_NETWORK_GATEWAY6": "2001:db8:1::2",
    "NIC_0_NETWORK_TAGS": "dns:10.0.0.3",
    "NIC_1_MAC": MACS[1],
    "NIC_1_IP": "",
    "NIC_1_MODE": "bridged",
}
ADDRESS6 = "2001:db8:1:0:a800:ff:fe4e:3701/64"
PAIRS = [("ifupdown", "netplan"), ("networkd", "network-manager")]
# A bond of the image over its NIC, and a VLAN over that, with an address that is another machine's
BOND = "6f1f5be0-5b5a-4c1c-8d3a-000000000001"
PROFILES = "etc/NetworkManager/system-connections"
STACKED = {
    "ifupdown": {
        "etc/network/interfaces.d/bond": """
            auto eth0 bond0 bond0.5
            iface eth0 inet manual
              up ip link add bond0 type bond && ip link set eth0 down master bond0
            iface bond0 inet static
              address 10.0.0.77/24
              bond-slaves eth0
            iface bond0.5 inet static
              address 10.0.5.77/24
              vlan-raw-device bond0
            """
    },
    "netplan": {
        "etc/netplan/50.yaml": """
network:
  ethernets: {nic: {match: {name: "e*"}}}
  bonds: {bond0: {interfaces: [nic], addresses: [10.0.0.77/24]}}
""",
        "etc/netplan/60.yaml": "network: {vlans: {v5: {id: 5, link: bond0, addresses: [10.0.5.77/24]}}}\n",
    },
    "networkd": {
        "etc/systemd/network/05-bond0.netdev": "[NetDev]\nName=bond0\nKind=bond\n",
        "etc/systemd/network/05-v5.netdev": "[NetDev]\nName=v5\nKind=vlan\n[VLAN]\nId=5\n",
        "etc/systemd/network/50-nic.network": "[Match]\nName=e*\n[Network]\nBond=bond0\n",
        "etc/systemd/network/50-bond0.network": "[Match]\nName=bond0\n[Network]\nVLAN=v5\nAddress=10.0.0.77/24\n",
        "etc/systemd/network/50-v5.network": "[Match]\nName=v5\n[Network]\nAddress=10.0.5.77/24\n",
    },
    "network-manager": {
        f"{PROFILES}/bond0.nmconnection": f"[connection]\nid=bond0\nuuid={BOND}\ntype=bond\ninterface-name=bond0\n"
        "[ipv4]\nmethod=manual\naddress1=10.0.0.77/24\n",
        f"{PROFILES}/port.nmconnection": "[connection]\nid=port\nuuid=6f1f5be0-5b5a-4c1c-8d3a-000000000002\n"
        f"type=ethernet\nautoconnect-priority=9\nmaster={BOND}\nslave-type=bond\n",
        f"{PROFILES}/v5.nmconnection": "[connection]\nid=v5\nuuid=6f1f5be0-5b5a-4c1c-8d3a-000000000003\ntype=vlan\n"
        f"interface-name=v5\n[vlan]\nid=5\nparent={BOND}\n[ipv4]\nmethod=manual\naddress1=10.0.5.77/24\n",
    },
}


@pytest.fixture(scope="session")
def images() -> dict[str, Debian]:
    return flavours("bookworm", [flavour for pair in PAIRS for flavour in pair])


@pytest.fixture
def node(node: Node, images: dict[str, Debian]) -> Node:
    node.write(DEFAULTS, f"IMAGE_DIR={node.images}\nIMAGE_TYPE=tarball\nFILESYSTEM=ext2\nSWAP=no\n")
    for flavour, image in images.items():
        (node.images / f"{flavour}-x86_64.tar.zst").symlink_to(image.tarball)
    for hook in ("grub", "interfaces"):
        (SITE / "hooks" / hook).chmod(0o755)
    return node


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for disk in tmp_path.glob("disk-*"):
        disk.unlink()


def deploy(node: Node, flavour: str, disk: Path) -> str:
    """Deploy an image that has a bond of its own: a hook before ours makes it."""
    texts = "".join(
        f"cat >$TARGET/{path} <<'END'\n{text}END\nchmod 600 $TARGET/{path}\n" for path, text in STACKED[flavour].items()
    )
    node.hook("bond", f"#!/bin/sh\nset -e\n{texts}")
    with disk.open("xb") as file:
        file.truncate(2048 * MIB)
    return node.create(disk, env="create-kvm-network", OSP_IMAGE_NAME=flavour, **NICS).ok().log


def check(facts: Facts) -> None:
    assert sorted(facts.links.values()) == sorted(MACS)  # neither a bond nor a VLAN
    names = {mac: name for name, mac in facts.links.items()}
    first, second = (names[mac] for mac in MACS)
    assert [one for one in facts.addresses[first] if "." in one] == ["10.0.0.40/24"]
    assert ADDRESS6 in facts.addresses[first]
    assert [one for one in facts.addresses[second] if "." in one] == ["10.0.1.15/24"]
    default = [re.match(r"default via (\S+) dev (\S+)", route) for route in facts.routes if "default" in route]
    assert [route and route.groups() for route in default] == [("10.0.0.2", first), ("2001:db8:1::2", first)]
    assert "10.0.0.3" in facts.dns
    assert facts.mounts["/"].fstype == "ext2"  # no other test boots it
    assert facts["state"] == "running"
    assert facts.failed == []


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_network(pair: tuple[str, ...], node: Node, work: Path) -> None:
    """Two at a time, one for each core. The first NIC is static, the other one uses DHCP."""
    with ExitStack() as stack:
        consoles = []
        for flavour in pair:
            disk = work / f"disk-{flavour}"
            log = deploy(node, flavour, disk)
            assert f"eth0 ({MACS[0]}): 10.0.0.40/24, {ADDRESS6}, by " in log
            consoles.append(stack.enter_context(booting(disk, work / f"{flavour}.console", macs=MACS)))
        reports = [console.facts() for console in consoles]
    for flavour, facts in zip(pair, reports):
        print(flavour, facts)  # shown if the test fails
    for facts in reports:
        check(facts)
