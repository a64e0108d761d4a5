"""What an image has put on its NICs goes with them: bridges, bonds, teams, VLANs, macvlans, VRFs; others stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from test_network_files import GUESTS, IFUPDOWN, NETPLAN, PLANS, UNIT, contents, enabled, make

from imageos.guests.target import Target
from imageos.network import stacked
from imageos.network.backends import configure

NETWORKD, WANTS = "etc/systemd/network", "etc/systemd/system/multi-user.target.wants"
KEYFILES, SCRIPTS, SUSE = (
    "etc/NetworkManager/system-connections",
    "etc/sysconfig/network-scripts",
    "etc/sysconfig/network",
)
INTERFACES = "etc/network/interfaces.d"
MASKED = "-> /dev/null"


def profile(kind: str, *lines: str) -> str:
    return "\n".join(["[connection]", f"type={kind}", *lines, ""])


# What rules -> files that go, files that stay
CASES: dict[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "networkd": (
        "networkd",
        {
            f"{NETWORKD}/20-br0.netdev": "[NetDev]\nName=br0\nKind=bridge\n",
            f"{NETWORKD}/30-br0.network": "[Match]\nName=br0\n[Network]\nDHCP=yes\nVLAN=v7 v8\n",
            f"{NETWORKD}/40-v.network": "[Match]\nName=v7 v8\n[Network]\nVRF=red\n",
            f"{NETWORKD}/40-red.netdev": "[NetDev]\nName=red\nKind=vrf\n[VRF]\nTable=1\n",
            f"{NETWORKD}/50-m.netdev": "[NetDev]\nName=m0\nKind=macvlan\n",
        },
        {
            f"{NETWORKD}/40-port.network": "[Match]\nName=en*\n[Network]\nBridge=br0\nMACVLAN=m0\n",
            f"{NETWORKD}/40-lxc.netdev": "[NetDev]\nName=lxc0\nKind=bridge\n",
            f"{NETWORKD}/40-lxc.network": "[Match]\nName=lxc0\n[Network]\nAddress=10.0.3.1/24\n",
            f"{NETWORKD}/40-wg.network": "[Match]\nName=wg0\n[Network]\nBridge=lxc0\n",
            f"{NETWORKD}/40-both.network": "[Match]\nName=br0 lxc0\n",
        },
    ),
    "networkd, an old MAC": (
        "networkd",
        {f"{NETWORKD}/b.netdev": "[NetDev]\nName=bond0\nKind=bond\n", f"{NETWORKD}/b.network": "[Match]\nName=bond0\n"},
        {f"{NETWORKD}/c.network": "[Match]\nMACAddress=aa:00:00:00:00:99\n[Network]\nBond=bond0\n"},
    ),
    "netplan": (
        "netplan",
        {
            "etc/netplan/10-br.yaml": "network:\n  bridges:\n    br0:\n      interfaces: [eth0, dummy0]\n",
            "etc/netplan/20-vlan.yaml": "network: {vlans: {v7: {id: 7, link: br0}}}\n",
            "etc/netplan/20-vxlan.yaml": "network: {tunnels: {vx: {mode: vxlan, id: 5, link: ens3}}}\n",
            "etc/netplan/30-vrf.yaml": "network:\n  vrfs:\n    red:\n      table: 1\n      interfaces:\n      - v7\n",
        },
        {"etc/netplan/40.yaml": "network:\n  bridges:\n    lxc0: {interfaces: [], addresses: [10.0.3.1/24]}\n"},
    ),
    "NetworkManager": (
        "NetworkManager",
        {
            f"{KEYFILES}/a": profile("ethernet", "interface-name=ens3", "controller=team0"),
            f"{KEYFILES}/b.nmconnection": profile("team", "uuid=b-b", "interface-name=team0"),
            f"{KEYFILES}/c.nmconnection": profile("vlan", "uuid=c-c", "", "[vlan]", "parent=b-b", "id=7"),
            f"{KEYFILES}/d.nmconnection": profile("macvlan", "", "[macvlan]", "parent=eth0"),
            f"{KEYFILES}/e.nmconnection": profile("vlan", "", "[vlan]", "id=7", "[ethernet]", "mac-address=AA:0"),
            f"{KEYFILES}/f.nmconnection": profile("vlan", "master=vrf0", "[vlan]", "parent=eth0"),
            f"{KEYFILES}/g.nmconnection": profile("vrf", "interface-name=vrf0"),
        },
        {
            f"{KEYFILES}/lxc.nmconnection": profile("bridge", "interface-name=lxc0"),
            f"{KEYFILES}/lxc-port.nmconnection": profile("dummy", "interface-name=dummy0", "controller=lxc0"),
            f"{KEYFILES}/v.nmconnection": profile("vlan", "", "[vlan]", "parent=lxc0"),
        },
    ),
    "ifcfg": (
        "ifcfg",
        {
            f"{SCRIPTS}/ifcfg-p": 'DEVICE=em1\nTYPE=Ethernet\nMASTER="bond0"\nSLAVE=yes\n',
            f"{SCRIPTS}/ifcfg-bond0": "DEVICE=bond0\nBRIDGE=br0\n",
            f"{SCRIPTS}/ifcfg-Bridge_1": "TYPE=Bridge\nDEVICE=br0\nIPADDR=192.0.2.9\n",
            f"{SCRIPTS}/route-br0": "default via 192.0.2.2\n",
            f"{SCRIPTS}/ifcfg-v7": "VLAN=yes\nDEVICE=br0.7\n",
            f"{SCRIPTS}/ifcfg-v8": "VLAN=yes\nDEVICE=v8\nPHYSDEV=eth0\n",
        },
        {f"{SCRIPTS}/ifcfg-lxc0": "DEVICE=lxc0\nTYPE=Bridge\n", f"{SCRIPTS}/ifcfg-lo": "DEVICE=lo\n"},
    ),
    "wicked": (
        "wicked",
        {
            f"{SUSE}/ifcfg-bond0": "BONDING_MASTER=yes\nBONDING_SLAVE_0='eth0'\nBONDING_SLAVE1='eth1'\n",
            f"{SUSE}/ifcfg-br0": "BRIDGE=yes\nBRIDGE_PORTS='dummy0 bond0'\n",
            f"{SUSE}/ifroute-br0": "default 192.0.2.2 - br0\n",
            f"{SUSE}/ifcfg-v7": "ETHERDEVICE=br0\n",
        },
        {f"{SUSE}/ifcfg-lxc0": "BRIDGE=yes\nBRIDGE_PORTS=''\n", f"{SUSE}/ifcfg-lo": "IPADDR=127.0.0.1/8\n"},
    ),
    "ifupdown": (
        "ifupdown",
        {
            f"{INTERFACES}/a": "auto bond0\niface bond0 inet manual\n  slaves none\n",
            f"{INTERFACES}/b": "auto dummy1\niface dummy1 inet manual\n  bond-master br0\n  vlan-raw-device eth0\n",
            f"{INTERFACES}/c": "auto br0 v7 eth0.5\niface br0 inet dhcp\n  bridge-ports \\\n    none regex e.*\n"
            "iface v7 inet dhcp\n  vlan_raw_device br0\niface eth0.5 inet dhcp\n",
            f"{INTERFACES}/d": "iface all inet static\n  bridge_ports all\n",
            f"{INTERFACES}/ng": "auto br1\niface br1\n  use bridge\n  requires eth0 eth1\n",
            f"{INTERFACES}/e": "iface eth0 inet manual\n  bond-master bond0\n",
        },
        {f"{INTERFACES}/lxc": "auto lxc0\niface lxc0 inet static\n  address 10.0.3.1/24\n  bridge_ports none\n"},
    ),
    "networkd beside ifupdown": (
        "networkd",
        {f"{INTERFACES}/br0": "auto br0\niface br0 inet dhcp\n  bridge_ports eth0\n"},
        {},
    ),
    "netifrc": (
        "netifrc",
        {
            **{f"etc/{place}/net.br0": "x" for place in ("init.d", "runlevels/default")},
            "etc/init.d/net.bond0": "x",
        },
        {"etc/init.d/net.wlan0": "x"},
    ),
    "netctl": (
        "networkd",
        {
            **{f"{WANTS}/netctl@{name}.service": UNIT for name in (r"my\x2dnet", "bridge", "vlan")},
            f"{WANTS}/netctl-ifplugd@ens3.service": UNIT,
            f"{WANTS}/dhclient@eth0.service": UNIT,
        },
        {
            "etc/netctl/my-net": "Interface=ens3\nConnection=ethernet\n",
            "etc/netctl/bridge": "Interface=br0\nConnection=bridge\nBindsToInterfaces=(eth0 'eth1')\n",
            "etc/netctl/vlan": "Interface=br0.7\nConnection=vlan\nBindsToInterfaces=br0\n",
            "etc/netctl/lxc": "Interface=lxc0\nConnection=bridge\nBindsToInterfaces=()\n",
            f"{WANTS}/netctl@lxc.service": UNIT,
            f"{WANTS}/netctl-ifplugd@wlan0.service": UNIT,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stands_on_nics_goes_with_them(case: str, guest: Path, target: Target) -> None:
    rules, removed, kept = CASES[case]
    make(guest, {**GUESTS[rules], **removed, **kept})
    if "beside ifupdown" in case:
        make(guest, IFUPDOWN)
    if rules == "netifrc":
        make(guest, {"etc/conf.d/net": 'bridge_br0="bond0"\nslaves_bond0="eth0 eth1"\n'})
    for _ in range(2):
        configure(target, rules, PLANS["dhcp"])
        files = contents(guest)
        assert {name for name in removed if files.get(name, MASKED) != MASKED} == set()
        assert {name: files.get(name) for name in kept} == dict(kept)


def test_what_is_disabled_is_named(guest: Path, target: Target) -> None:
    make(guest, {**NETPLAN, **GUESTS["networkd"], "etc/netplan/1.yaml": "network: {bridges: {b: {interfaces: [a]}}}\n"})
    make(guest, {**CASES["networkd, an old MAC"][1], **CASES["networkd, an old MAC"][2], **CASES["netctl"][2]})
    make(guest, {f"{WANTS}/netctl@bridge.service": UNIT, **enabled("netctl@bridge")})
    said = ["netplan's 1.yaml", "networkd's b.netdev, b.network", "netctl@bridge"]
    assert configure(target, "netplan", PLANS["dhcp"]) == said


def test_packaged_files_are_hidden(guest: Path, target: Target) -> None:
    packaged = {
        "usr/lib/systemd/network/80-br.netdev": "[NetDev]\nName=br0\nKind=bridge\n",
        "usr/lib/NetworkManager/system-connections/br0.nmconnection": profile("bridge", "interface-name=br0"),
    }
    make(guest, {**GUESTS["networkd"], **enabled("NetworkManager"), **packaged})
    make(guest, {"usr/lib/systemd/network/90-p.network": "[Match]\nName=e*\n[Network]\nBridge=br0\n"})
    make(guest, {f"{KEYFILES}/p": profile("ethernet", "controller=br0")})
    configure(target, "networkd", PLANS["dhcp"])
    files = contents(guest)
    assert files[f"{NETWORKD}/80-br.netdev"] == files[f"{KEYFILES}/br0.nmconnection"] == MASKED


def test_a_tower_that_takes_hours() -> None:
    pairs = [(f"v{number + 1}", f"v{number}") for number in range(20_000)] + [("v0", "v20000"), ("v0", "eth0")]
    assert len(stacked.above(pairs, "eth0".__eq__)) == 20_001
