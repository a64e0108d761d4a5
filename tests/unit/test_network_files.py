"""What each backend is given: golden files for one plan after the other; recognised guests, and what is removed there.

`python3 tests/unit/test_network_files.py` writes the golden files anew; what has changed is for git diff to show.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from imageos.guests import cloudinit
from imageos.guests.target import READ_LIMIT, Target
from imageos.network import Interface, backends, render
from imageos.network.backends import BACKENDS, RECOGNISED, assigned, configure, used

GOLDEN = Path(__file__).parent / "golden"
DNS = ("192.0.2.53", "2001:db8::53")
FIRST = Interface(
    "eth0", "aa:00:00:00:00:01", False, "192.0.2.10/24", "192.0.2.1", dns=DNS, search=("example.org", "example.net")
)
SECOND = Interface("eth1", "aa:00:00:00:00:02", True, takes_gateway=False)
SIX = dataclasses.replace(FIRST, address6="2001:db8::a800:ff:fe00:1/64", gateway6="2001:db8::1")
PLANS: dict[str, tuple[Interface, ...]] = {
    "static-and-dhcp": (FIRST, SECOND),
    "dhcp": (Interface("eth0", "aa:00:00:00:00:01", True),),
    "routed": (Interface("eth0", "aa:00:00:00:00:01", False, "192.0.2.10/32", on_link=True, dns=("192.0.2.53",)),),
    "gateway-on-link": (dataclasses.replace(FIRST, address="203.0.113.9/32", on_link=True, dns=(), search=()),),
    "ipv6": (SIX, dataclasses.replace(SECOND, takes_gateway6=False)),
    "ipv6-on-link": (
        dataclasses.replace(FIRST, address6="2001:db8::9/128", gateway6="2001:db8:f::1", dns=(), search=()),
    ),
    "ipv6-link-local": (dataclasses.replace(SIX, gateway6="fe80::1", dns=("2001:db8::53",), search=()),),
}
RENDERERS: dict[str, Callable[[tuple[Interface, ...]], Mapping[str, str]]] = {
    "netplan": render.netplan,
    "networkd": render.networkd,
    "NetworkManager": render.keyfiles,
    "ifupdown": render.interfaces_file,
    "ifcfg": render.ifcfg,
    "wicked": lambda plan: {
        **render.wicked(plan),
        "/etc/sysconfig/network/config": assigned("", render.wicked_dns(plan)),
    },
    "netifrc": render.netifrc,
    "cloud-init": lambda plan: {f"{cloudinit.SEED}/network-config": _json(render.version2(plan))},
    "cloud-init-version-1": lambda plan: {f"{cloudinit.SEED}/network-config": _json(cloudinit.version1(plan))},
    "udev": render.udev_rules,
    "resolv.conf": lambda plan: {"/etc/resolv.conf": render.resolv_conf(plan), "resolved": render.resolved_conf(plan)},
}


def _json(config: object) -> str:
    return json.dumps(config, indent=2) + "\n"


def rendered(backend: str) -> str:
    """All plans in one text."""
    return "".join(
        f"#### {name}: {path}\n{text}"
        for name, plan in PLANS.items()
        for path, text in RENDERERS[backend](plan).items()
    )


@pytest.mark.parametrize("backend", RENDERERS)
def test_golden(backend: str) -> None:
    assert rendered(backend) == (GOLDEN / backend).read_text()


def test_every_backend_has_golden_files() -> None:
    assert set(BACKENDS) <= set(RENDERERS)
    assert {name for name, _ in RECOGNISED} == set(BACKENDS)


# Guests


UNIT = "[Service]\n"
GUESTS: dict[str, dict[str, str]] = {
    "cloud-init": {"usr/bin/cloud-init": "x", "etc/cloud/cloud.cfg": "users: []\n", "usr/sbin/netplan": "x"},
    "netplan": {"usr/sbin/netplan": "x", "etc/network/interfaces": ""},
    "ifcfg": {
        "etc/sysconfig/network-scripts/ifcfg-lo": "",
        "etc/os-release": 'ID="centos"\nVERSION_ID="8"\n',
        "etc/systemd/system/multi-user.target.wants/NetworkManager.service": UNIT,
    },
    "NetworkManager": {
        "etc/sysconfig/network-scripts/readme": "",
        "etc/os-release": 'ID="rhel"\nVERSION_ID="9.4"\n',
        "etc/systemd/system/multi-user.target.wants/NetworkManager.service": UNIT,
    },
    "networkd": {"etc/systemd/system/multi-user.target.wants/systemd-networkd.service": UNIT, "sbin/ifup": "x"},
    "wicked": {"etc/sysconfig/network/ifcfg-lo": "", "sbin/ifup": "x"},
    "netifrc": {"etc/init.d/net.lo": "x"},
    "ifupdown": {
        "sbin/ifup": "x",
        "etc/network/interfaces": "",
        "usr/lib/systemd/system/systemd-networkd.service": UNIT,
    },
}


def make(guest: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = guest / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text == "x" else 0o644)


@pytest.mark.parametrize("backend", GUESTS)
def test_used(backend: str, guest: Path, target: Target) -> None:
    make(guest, GUESTS[backend])
    assert used(target) == backend


def test_every_backend_is_recognised() -> None:
    assert set(GUESTS) == set(BACKENDS)


@pytest.mark.parametrize(
    "files",
    [
        {"etc/cloud/cloud-init.disabled": ""},
        {"etc/cloud/cloud.cfg.d/99-x.cfg": "network: {config: disabled}\n"},
        {"etc/cloud/cloud.cfg.d/99-x.cfg": "users: []\nnetwork:\n  config: disabled\n"},
    ],
)
def test_cloud_init_that_does_not_rule_the_network(files: dict[str, str], guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["cloud-init"], **files})
    assert used(target) == "netplan"


def test_systemd_alone(guest: Path, target: Target) -> None:
    make(guest, {"usr/lib/systemd/system/systemd-networkd.service": UNIT})
    assert used(target) == "networkd"
    configure(target, BACKENDS["networkd"], PLANS["dhcp"])
    link = guest / "etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
    assert link.readlink() == Path("/usr/lib/systemd/system/systemd-networkd.service")


def test_nothing_to_configure(guest: Path, target: Target) -> None:
    make(guest, {"etc/hostname": ""})
    assert used(target) == ""


STALE: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # removed, kept
    "netplan": (
        {"etc/netplan/50-cloud-init.yaml": "network:\n  ethernets:\n    ens3: {dhcp4: true}\n"},
        {"etc/netplan/60-wg.yaml": "network:\n  tunnels: {}\n"},
    ),
    "NetworkManager": (
        {
            "etc/NetworkManager/system-connections/ens3.nmconnection": "[connection]\ntype=ethernet\n",
            "etc/sysconfig/network-scripts/ifcfg-ens3": "DEVICE=ens3\n",
            "etc/network/interfaces": "auto lo\niface lo inet loopback\nallow-hotplug ens3\niface ens3 inet dhcp\n",
        },
        {"etc/NetworkManager/system-connections/vpn.nmconnection": "[connection]\ntype=vpn\n"},
    ),
    "NetworkManager, profiles for every NIC": (
        {
            "etc/NetworkManager/system-connections/Wired connection 1": "[connection]\ntype = ethernet\n",
            "etc/sysconfig/network-scripts/ifcfg-Wired_connection_1": 'NAME="Wired connection 1"\nTYPE=Ethernet\n',
        },
        {"etc/sysconfig/network-scripts/ifcfg-lo": "DEVICE=lo\n"},
    ),
    "ifcfg, profiles for every NIC": (
        {
            "etc/NetworkManager/system-connections/Wired connection 1.nmconnection": "[connection]\ntype=ethernet\n",
            "etc/sysconfig/network-scripts/ifcfg-System_eth0": 'TYPE="Ethernet"\nBOOTPROTO=dhcp\n',
        },
        {"etc/sysconfig/network-scripts/ifcfg-lo": "DEVICE=lo\n"},
    ),
    "networkd, before ours": (
        {"etc/systemd/network/00-default.network": "[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n"},
        {
            "etc/systemd/network/00-br0.network": "[Match]\nName=br0\n",
            "etc/systemd/network/00-name.link": "[Link]\nName=eth9\n",
        },
    ),
    "ifcfg": (
        {"etc/sysconfig/network-scripts/ifcfg-ens3": "", "etc/sysconfig/network-scripts/route-ens3": "default via x\n"},
        {"etc/sysconfig/network-scripts/ifcfg-lo": "DEVICE=lo\n", "etc/sysconfig/network-scripts/ifup-eth": "x"},
    ),
    "networkd": (
        {"etc/systemd/network/00-imageos-eth7.network": "[Match]\nMACAddress=aa:00:00:00:00:77\n"},
        {"etc/systemd/network/20-wired.network": "[Match]\nName=en*\n"},
    ),
    "wicked": (
        {"etc/sysconfig/network/ifcfg-ens3": "", "etc/sysconfig/network/routes": "default 192.0.2.254 - -\n"},
        {"etc/sysconfig/network/ifcfg-lo": "IPADDR=127.0.0.1/8\n"},
    ),
    "netifrc": ({"etc/init.d/net.enp3s0": "x", "etc/runlevels/default/net.enp3s0": "x"}, {"etc/init.d/net.lo": "x"}),
    "ifupdown": (
        {"etc/network/interfaces.d/50-cloud-init": "auto ens3\niface ens3 inet dhcp\n"},
        {"etc/network/interfaces.d/dummy": "auto dummy0\niface dummy0 inet manual\n"},
    ),
    "cloud-init": ({}, {"etc/netplan/50-cloud-init.yaml": "network:\n  ethernets: {}\n"}),
}


def test_every_backend_has_something_stale() -> None:
    assert {name.partition(",")[0] for name in STALE} == set(BACKENDS)


@pytest.mark.parametrize("name", STALE)
def test_configured(name: str, guest: Path, target: Target) -> None:
    """What the image had is gone, what is not about its NICs stays, and once more changes nothing."""
    backend = name.partition(",")[0]
    removed, kept = STALE[name]
    make(guest, {**GUESTS[backend], **removed, **kept, "usr/lib/udev/rules.d/x": ""})
    make(guest, {"etc/udev/rules.d/70-persistent-net.rules": "of the image\n", "etc/resolv.conf": "# of the image\n"})
    make(guest, {"var/lib/cloud/seed/nocloud/meta-data": "{}"})
    configure(target, BACKENDS[backend], PLANS["ipv6"])
    once = contents(guest)
    assert not (set(removed) - {"etc/network/interfaces"}) & set(once)
    assert "etc/udev/rules.d/70-persistent-net.rules" not in once
    assert {name: once.get(name) for name in kept} == kept
    files = {
        **RENDERERS[backend](PLANS["ipv6"]),
        **(render.udev_rules(PLANS["ipv6"]) if BACKENDS[backend].by_name else {}),
    }
    files.pop("/etc/sysconfig/network/config", None)
    assert {path: once.get(path[1:]) for path in files} == files
    mode = (guest / next(iter(files))[1:]).stat().st_mode & 0o777
    assert mode == BACKENDS[backend].mode
    configure(target, BACKENDS[backend], PLANS["ipv6"])
    assert contents(guest) == once


def contents(guest: Path) -> dict[str, str]:
    return {
        str(path.relative_to(guest)): f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
        for path in guest.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_netplan_keeps_its_renderer(guest: Path, target: Target) -> None:
    chosen = "network:\n  version: 2\n  renderer: NetworkManager\n"
    make(guest, {**GUESTS["netplan"], "etc/netplan/01-network-manager-all.yaml": chosen})
    for _ in range(2):
        configure(target, BACKENDS["netplan"], PLANS["dhcp"])
        assert '"renderer": "NetworkManager"' in (guest / "etc/netplan/10-imageos.yaml").read_text()


def test_openrc_services(guest: Path, target: Target) -> None:
    make(guest, GUESTS["netifrc"])
    configure(target, BACKENDS["netifrc"], PLANS["static-and-dhcp"])
    found = contents(guest)
    assert found["etc/init.d/net.eth1"] == "-> net.lo"
    assert found["etc/runlevels/default/net.eth1"] == "-> /etc/init.d/net.eth1"
    make(guest, {**GUESTS["ifupdown"], "etc/init.d/networking": "x", "etc/runlevels/boot/hostname": ""})
    configure(target, BACKENDS["ifupdown"], PLANS["static-and-dhcp"])
    assert contents(guest)["etc/runlevels/boot/networking"] == "-> /etc/init.d/networking"


def test_resolv_conf_is_written_where_nobody_else_does(guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["ifupdown"], "etc/network/if-up.d/resolved": "x"})
    (guest / "etc/resolv.conf").symlink_to("../run/resolvconf/resolv.conf")
    configure(target, BACKENDS["ifupdown"], PLANS["static-and-dhcp"])
    assert "nameserver 192.0.2.53\n" in contents(guest)["etc/resolv.conf"]
    assert not (guest / "run").exists(), "through the link"
    assert "dns-nameservers" not in contents(guest)["etc/network/interfaces"]


def test_resolv_conf_of_resolved_is_left_to_it(guest: Path, target: Target) -> None:
    resolved = {"etc/systemd/system/sysinit.target.wants/systemd-resolved.service": UNIT}
    make(guest, {**GUESTS["ifupdown"], **resolved})
    (guest / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    configure(target, BACKENDS["ifupdown"], PLANS["static-and-dhcp"])
    found = contents(guest)
    assert found["etc/resolv.conf"] == "-> ../run/systemd/resolve/stub-resolv.conf"
    assert "DNS=192.0.2.53 2001:db8::53\n" in found["etc/systemd/resolved.conf.d/imageos.conf"]


@pytest.mark.parametrize(
    "told",
    [
        {"etc/network/if-up.d/000resolvconf": "x"},
        {
            "etc/network/if-up.d/resolved": "x",  # Debian's ifupdown has it, whether there is resolved or not
            "etc/systemd/system/sysinit.target.wants/systemd-resolved.service": UNIT,
        },
    ],
    ids=["resolvconf", "resolved"],
)
def test_dns_is_told(told: dict[str, str], guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["ifupdown"], **told, "etc/resolv.conf": "as it was\n"})
    configure(target, BACKENDS["ifupdown"], PLANS["static-and-dhcp"])
    found = contents(guest)
    assert "    dns-nameservers 192.0.2.53 2001:db8::53\n    dns-search example.org" in found["etc/network/interfaces"]
    assert found["etc/resolv.conf"] == "as it was\n"


def test_dhcp_clients_of_ifupdown(guest: Path, target: Target) -> None:
    """They know nothing of what is given for another interface."""
    make(guest, {**GUESTS["ifupdown"], "sbin/dhclient": "x", "sbin/udhcpc": "x"})
    configure(target, BACKENDS["ifupdown"], PLANS["static-and-dhcp"])
    found = contents(guest)
    assert found["etc/dhcp/dhclient-enter-hooks.d/imageos"].splitlines()[1:] == [
        "make_resolv_conf() { :; }",
        'case "$interface" in eth1) unset new_routers ;; esac',
    ]
    assert found["etc/udhcpc/udhcpc.conf"].splitlines()[1:] == ['RESOLV_CONF="no"', 'NO_GATEWAY="eth1"']
    configure(target, BACKENDS["ifupdown"], PLANS["dhcp"])
    assert "etc/dhcp/dhclient-enter-hooks.d/imageos" not in contents(guest)


DHCPCD = "hostname\nduid\n"


def test_dhcpcd_of_ifupdown(guest: Path, target: Target) -> None:
    """What Debian 13 has beside ifupdown."""
    make(guest, {**GUESTS["ifupdown"], "usr/sbin/dhcpcd": "x", "etc/dhcpcd.conf": DHCPCD})
    for _ in range(2):
        configure(target, BACKENDS["ifupdown"], PLANS["static-and-dhcp"])
        text = contents(guest)["etc/dhcpcd.conf"]
        assert text == f"{DHCPCD}{render.DHCPCD_SECTIONS}\ninterface eth1\nnohook resolv.conf\nnogateway\n"
    configure(target, BACKENDS["ifupdown"], PLANS["dhcp"])
    assert contents(guest)["etc/dhcpcd.conf"] == DHCPCD


@pytest.mark.parametrize(
    "line", ["source /etc/network/interfaces.d/*", "source-directory /etc/network/interfaces.d", ""]
)
def test_what_the_image_takes_in_stays(line: str, guest: Path, target: Target) -> None:
    """As the image does: busybox refuses a directory that is not there, `source .../*` takes names with a dot, too."""
    old = f"auto lo\n  {line}\nsource /etc/network/other\n"
    make(guest, {**GUESTS["ifupdown"], "etc/network/interfaces": old, "etc/network/interfaces.d/br.cfg": "auto br0\n"})
    for _ in range(2):
        configure(target, BACKENDS["ifupdown"], PLANS["dhcp"])
        found = [one for one in contents(guest)["etc/network/interfaces"].splitlines() if one.startswith("source")]
        assert found == ([line] if line else [])
    (guest / "etc/network/interfaces.d/br.cfg").unlink()
    (guest / "etc/network/interfaces.d").rmdir()
    configure(target, BACKENDS["ifupdown"], PLANS["dhcp"])
    assert "source" not in contents(guest)["etc/network/interfaces"]


@pytest.mark.parametrize("helper", ["nobody", "resolved", "NetworkManager"])
def test_dns_of_netplan(helper: str, guest: Path, target: Target) -> None:
    """networkd alone makes no resolv.conf."""
    make(guest, {**GUESTS["netplan"], "etc/resolv.conf": "theirs\n"})
    if helper == "resolved":
        make(guest, {"etc/systemd/system/multi-user.target.wants/systemd-resolved.service": UNIT})
    if helper == "NetworkManager":
        make(guest, {"etc/netplan/01-all.yaml": "network:\n  renderer: NetworkManager\n"})
    configure(target, BACKENDS["netplan"], PLANS["static-and-dhcp"])
    text = contents(guest)["etc/resolv.conf"]
    assert ("nameserver 192.0.2.53\n" in text) == (helper == "nobody") != (text == "theirs\n")


@pytest.mark.parametrize(
    ("backend", "files"),
    [
        ("NetworkManager", {"etc/init.d/networkmanager": "x", "etc/runlevels/default/networkmanager": "x"}),
        ("networkd", {"lib/systemd/system/systemd-networkd.service": UNIT}),
    ],
    ids=["Alpine", "Debian without merged /usr"],
)
def test_other_places(backend: str, files: dict[str, str], guest: Path, target: Target) -> None:
    make(guest, files)
    assert used(target) == backend
    configure(target, BACKENDS[backend], PLANS["dhcp"])
    link = contents(guest).get("etc/systemd/system/multi-user.target.wants/systemd-networkd.service")
    assert link == ("-> /lib/systemd/system/systemd-networkd.service" if backend == "networkd" else None)


def test_cloud_init_without_our_seed(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    make(guest, GUESTS["cloud-init"])
    configure(target, BACKENDS["cloud-init"], PLANS["dhcp"])
    assert "etc/netplan" not in contents(guest)
    assert not target.exists(cloudinit.SEED)
    assert "cloud-init has no seed in /var/lib/cloud/seed/nocloud" in capfd.readouterr().err


def test_assigned() -> None:
    text = "# comment\nHOSTNAME=a\n GATEWAY=192.0.2.254\nNETWORKING=no\n"
    changed = assigned(text, {"GATEWAY": "", "NETWORKING": "yes"})
    assert changed == '# comment\nHOSTNAME=a\nNETWORKING="yes"\n'
    assert assigned(changed, {"GATEWAY": "", "NETWORKING": "yes"}) == changed


@pytest.mark.parametrize("pattern", [backends.ETHERNET, backends.CLOUD_INIT_OFF])
@pytest.mark.parametrize("text", ["\n" * READ_LIMIT, "network:" + "\n" * READ_LIMIT, "network:\n" * (READ_LIMIT // 9)])
def test_a_text_that_takes_hours(pattern: str, text: str) -> None:
    begin = time.process_time()
    assert not re.search(pattern, text, re.MULTILINE)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "text", ["network: {config: disabled}", "network:\r\n  config:  disabled", 'network:\n\n "config": disabled']
)
def test_cloud_init_that_is_forbidden_the_network(text: str) -> None:
    assert re.search(backends.CLOUD_INIT_OFF, f"a: b\n{text}\n", re.MULTILINE)


if __name__ == "__main__":
    for backend in RENDERERS:
        (GOLDEN / backend).write_text(rendered(backend))
    sys.exit(0)
