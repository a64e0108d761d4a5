"""The files of each backend: golden files for several plans; recognition of guests; files removed there.

`python3 tests/unit/test_network_files.py` writes the golden files again; git diff then shows the changes.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from imageos.guests import cloudinit, services, yaml
from imageos.guests.target import READ_LIMIT, Target
from imageos.network import Interface, existing, render
from imageos.network.backends import BACKENDS, assign, configure, find, is_started

GOLDEN = Path(__file__).parent / "golden"
DNS = ("192.0.2.53", "2001:db8::53")
FIRST = Interface(
    "eth0", "aa:00:00:00:00:01", False, "192.0.2.10/24", "192.0.2.1", dns=DNS, search=("example.org", "example.net")
)
SECOND = Interface("eth1", "aa:00:00:00:00:02", True, takes_gateway=False, takes_dns=False)
SIX = FIRST._replace(address6="2001:db8::a800:ff:fe00:1/64", gateway6="2001:db8::1")
PLANS: dict[str, tuple[Interface, ...]] = {
    "static-and-dhcp": (FIRST, SECOND),
    "dhcp": (Interface("eth0", "aa:00:00:00:00:01", True),),
    "routed": (Interface("eth0", "aa:00:00:00:00:01", False, "192.0.2.10/32", on_link=True, dns=("192.0.2.53",)),),
    "gateway-on-link": (FIRST._replace(address="203.0.113.9/32", on_link=True, dns=(), search=()),),
    "ipv6": (SIX, SECOND._replace(takes_gateway6=False)),
    "ipv6-on-link": (FIRST._replace(address6="2001:db8::9/128", gateway6="2001:db8:f::1", dns=(), search=()),),
    "ipv6-link-local": (SIX._replace(gateway6="fe80::1", dns=("2001:db8::53",), search=()),),
}


def unmanaged(plan: tuple[Interface, ...], main: str = "dns=none", prefix: str = "") -> Mapping[str, str]:
    devices = f"unmanaged-devices+={render.network_manager_devices(plan, prefix)}"
    return render.network_manager_conf({"main": [main] if main else [], "keyfile": [devices]})


RENDERERS: dict[str, Callable[[tuple[Interface, ...]], Mapping[str, str]]] = {
    "netplan": render.netplan,
    "networkd": render.networkd,
    "NetworkManager": render.keyfiles,
    "ifupdown": render.interfaces_file,
    "ifcfg": render.ifcfg,
    "wicked": lambda plan: {
        **render.wicked(plan),
        "/etc/sysconfig/network/config": assign("", render.wicked_dns(plan)),
    },
    "netifrc": render.netifrc,
    "cloud-init": lambda plan: {f"{cloudinit.SEED}/network-config": _json(render.version2(plan))},
    "cloud-init-version-1": lambda plan: {f"{cloudinit.SEED}/network-config": _json(cloudinit.version1(plan))},
    "connman": render.connman,
    "dhcpcd": lambda plan: {
        "/etc/dhcpcd.conf": render.dhcpcd_conf("", render.dhcpcd(plan)),
        "/etc/dhcpcd.exit-hook": render.dhcpcd_hook(plan),
    },
    "netplan for NetworkManager": lambda plan: render.netplan(plan, "NetworkManager"),
    "unmanaged": lambda plan: {**render.networkd_unmanaged(plan), **unmanaged(plan)},
    "managed": lambda plan: unmanaged(plan, "", "except:"),
    "udev": render.udev_rules,
    "sysctl": render.sysctl,
    "resolv.conf": lambda plan: {"/etc/resolv.conf": render.resolv_conf(plan), "resolved": render.resolved_conf(plan)},
}


def _json(config: object) -> str:
    return json.dumps(config, indent=2) + "\n"


def rendered(backend: str) -> str:
    """Return all plans in one text."""
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


# Guests


UNIT = "[Service]\n"
GENERATOR = "usr/lib/systemd/system-generators"


def enabled(*services: str) -> dict[str, str]:
    """Return units, and what `systemctl enable` adds."""
    directories = ("usr/lib/systemd/system", "etc/systemd/system/multi-user.target.wants")
    return {f"{directory}/{service}.service": UNIT for directory in directories for service in services}


INSTALLED_NETWORKD = {"usr/lib/systemd/system/systemd-networkd.service": UNIT}
NETPLAN = {"usr/sbin/netplan": "x", f"{GENERATOR}/netplan": "x", **INSTALLED_NETWORKD}
CLOUD_INIT = {
    "usr/bin/cloud-init": "x",
    "etc/cloud/cloud.cfg": "users: []\n",
    f"{GENERATOR}/cloud-init-generator": "x",
    "usr/lib/systemd/system/cloud-init.target": UNIT,
    "usr/lib/systemd/system/cloud-init-local.service": UNIT,
    "etc/systemd/system/cloud-init.target.wants/cloud-init-local.service": UNIT,
}
IFUPDOWN = {"sbin/ifup": "x", "etc/network/interfaces": "", **enabled("networking")}
GUESTS: dict[str, dict[str, str]] = {
    "cloud-init": {**CLOUD_INIT, **NETPLAN},
    "netplan": {**NETPLAN, "etc/network/interfaces": ""},
    "ifcfg": {
        "etc/sysconfig/network-scripts/ifcfg-lo": "",
        "etc/os-release": 'ID="centos"\nVERSION_ID="8"\n',
        **enabled("NetworkManager"),
    },
    "NetworkManager": {
        "etc/sysconfig/network-scripts/readme": "",
        "etc/os-release": 'ID="rhel"\nVERSION_ID="9.4"\n',
        **enabled("NetworkManager"),
    },
    "networkd": {**enabled("systemd-networkd"), "sbin/ifup": "x"},
    "wicked": {"etc/sysconfig/network/ifcfg-lo": "", "sbin/ifup": "x", **enabled("wicked")},
    "connman": enabled("connman"),
    "dhcpcd": {**enabled("dhcpcd"), **INSTALLED_NETWORKD},
    "netifrc": {"etc/init.d/net.lo": "x"},
    "ifupdown": {**IFUPDOWN, **INSTALLED_NETWORKD},
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
    assert find(target) == backend


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
    assert find(target) == "netplan"


def test_systemd_alone(guest: Path, target: Target) -> None:
    make(guest, INSTALLED_NETWORKD)
    assert find(target) == "networkd"
    configure(target, "networkd", PLANS["dhcp"])
    link = guest / "etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
    assert link.readlink() == Path("/usr/lib/systemd/system/systemd-networkd.service")


def test_nothing_to_configure(guest: Path, target: Target) -> None:
    make(guest, {"etc/hostname": ""})
    assert find(target) == ""


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
            "etc/NetworkManager/system-connections/no-type": "[connection]\nid=a\n[802-3-ethernet]\n",
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
    "cloud-init": ({"etc/netplan/50-cloud-init.yaml": "network:\n  ethernets: {}\n"}, {}),
    "connman": ({"var/lib/connman/ethernet_525400123456_cable/settings": "x"}, {}),
    "dhcpcd": ({"var/lib/dhcpcd/duid": "x"}, {}),
}


def test_every_backend_has_something_stale() -> None:
    assert {name.partition(",")[0] for name in STALE} == set(BACKENDS)


@pytest.mark.parametrize("name", STALE)
def test_configured(name: str, guest: Path, target: Target) -> None:
    """The image's own NICs are gone, other files stay, and a second run changes nothing."""
    backend = name.partition(",")[0]
    removed, kept = STALE[name]
    make(guest, {**GUESTS[backend], **removed, **kept, "usr/lib/udev/rules.d/x": ""})
    make(guest, {"etc/udev/rules.d/70-persistent-net.rules": "of the image\n", "etc/resolv.conf": "# of the image\n"})
    make(guest, {"var/lib/cloud/seed/nocloud/meta-data": "{}"})
    configure(target, backend, PLANS["ipv6"])
    once = contents(guest)
    assert not (set(removed) - {"etc/network/interfaces"}) & set(once)
    assert "etc/udev/rules.d/70-persistent-net.rules" not in once
    assert {name: once.get(name) for name in kept} == kept
    files = {
        **RENDERERS[backend](PLANS["ipv6"]),
        **(render.udev_rules(PLANS["ipv6"]) if BACKENDS[backend].by_name else {}),
    }
    files.pop("/etc/sysconfig/network/config", None)
    assert {path: once.get(path[1:], "") for path in files} == files
    mode = (guest / next(iter(files))[1:]).stat().st_mode & 0o777
    assert mode == BACKENDS[backend].mode
    configure(target, backend, PLANS["ipv6"])
    assert contents(guest) == once


def contents(guest: Path) -> dict[str, str]:
    return {
        str(path.relative_to(guest)): f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
        for path in guest.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_netplan_keeps_its_renderer(guest: Path, target: Target) -> None:
    chosen = "network:\n  version: 2\n  renderer: NetworkManager\n"
    make(guest, {**GUESTS["netplan"], **enabled("NetworkManager"), "etc/netplan/01-network-manager-all.yaml": chosen})
    for _ in range(2):
        configure(target, "netplan", PLANS["dhcp"])
        assert '"renderer": "NetworkManager"' in (guest / "etc/netplan/10-imageos.yaml").read_text()


def test_openrc_services(guest: Path, target: Target) -> None:
    make(guest, GUESTS["netifrc"])
    configure(target, "netifrc", PLANS["static-and-dhcp"])
    files = contents(guest)
    assert files["etc/init.d/net.eth1"] == "-> net.lo"
    assert files["etc/runlevels/default/net.eth1"] == "-> /etc/init.d/net.eth1"
    make(guest, {**GUESTS["ifupdown"], "etc/init.d/networking": "x", "etc/runlevels/boot/hostname": ""})
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    assert contents(guest)["etc/runlevels/boot/networking"] == "-> /etc/init.d/networking"


def test_resolv_conf_is_written_where_nobody_else_does(guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["ifupdown"], "etc/network/if-up.d/resolved": "x"})
    (guest / "etc/resolv.conf").symlink_to("../run/resolvconf/resolv.conf")
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    assert "nameserver 192.0.2.53\n" in contents(guest)["etc/resolv.conf"]
    assert not (guest / "run").exists(), "through the link"
    assert "dns-nameservers" not in contents(guest)["etc/network/interfaces"]


def test_resolv_conf_of_resolved_is_left_to_it(guest: Path, target: Target) -> None:
    resolved = {**enabled("systemd-resolved")}
    make(guest, {**GUESTS["ifupdown"], **resolved})
    (guest / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    files = contents(guest)
    assert files["etc/resolv.conf"] == "-> ../run/systemd/resolve/stub-resolv.conf"
    assert "DNS=192.0.2.53 2001:db8::53\n" in files["etc/systemd/resolved.conf.d/zz-imageos.conf"]


def test_what_the_image_tells_resolved_gives_way(guest: Path, target: Target) -> None:
    """Its lists would be joined with ours, and `~.` sends all to the image's server."""
    ours, theirs = "etc/systemd/resolved.conf.d/zz-imageos.conf", "etc/systemd/resolved.conf.d/dns.conf"
    make(guest, {**enabled("systemd-networkd", "systemd-resolved"), theirs: "[Resolve]\nDNS=192.0.2.99\nDomains=~.\n"})
    configure(target, "networkd", PLANS["static-and-dhcp"])
    assert contents(guest)[ours].endswith("[Resolve]\nDNS=\nDomains=\n")
    configure(target, "networkd", PLANS["dhcp"])  # without DNS servers, the image's count
    assert ours not in contents(guest)
    make(guest, {theirs: "[Resolve]\nFallbackDNS=192.0.2.99\n"})
    configure(target, "networkd", PLANS["static-and-dhcp"])
    assert ours not in contents(guest)


def test_resolved_without_a_stub(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    text = "[Resolve]\nDNSStubListener=no\nDNSOverTLS=yes\n"
    make(guest, {**enabled("systemd-networkd", "systemd-resolved"), "etc/systemd/resolved.conf": text})
    configure(target, "networkd", PLANS["static-and-dhcp"])
    assert contents(guest)["etc/resolv.conf"] == "-> ../run/systemd/resolve/resolv.conf"
    assert "asks no server without DNSOverTLS=yes" in capfd.readouterr().err


def test_dns_is_told_to_resolvconf(guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["ifupdown"], "etc/network/if-up.d/000resolvconf": "x", "sbin/resolvconf": "x"})
    (guest / "etc/resolv.conf").symlink_to("/run/resolvconf/resolv.conf")
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    files = contents(guest)
    assert "    dns-nameservers 192.0.2.53 2001:db8::53\n    dns-search example.org" in files["etc/network/interfaces"]
    assert files["etc/resolv.conf"] == "-> /run/resolvconf/resolv.conf"


def test_servers_of_the_image_that_resolvconf_would_write_first(guest: Path, target: Target) -> None:
    head, own = "etc/resolvconf/resolv.conf.d/head", "etc/resolvconf.conf"
    files = {head: "# first\nnameserver 192.0.2.99\n", own: "name_servers=192.0.2.99\nresolv_conf=/etc/resolv.conf\n"}
    make(guest, {**GUESTS["ifupdown"], **files})
    configure(target, "ifupdown", PLANS["dhcp"])
    assert {name: contents(guest)[name] for name in files} == files
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    assert contents(guest)[head] == "# first\n"
    assert contents(guest)[own] == "resolv_conf=/etc/resolv.conf\n"


def test_ifupdown_does_not_tell_resolved(guest: Path, target: Target) -> None:
    """The script of Debian 12 gives it a word that is no address, and it refuses all."""
    make(guest, {**GUESTS["ifupdown"], "etc/network/if-up.d/resolved": "x", **enabled("systemd-resolved")})
    (guest / "etc/resolv.conf").symlink_to("/run/systemd/resolve/resolv.conf")
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    files = contents(guest)
    assert "dns-nameservers" not in files["etc/network/interfaces"]
    assert "DNS=192.0.2.53 2001:db8::53\n" in files["etc/systemd/resolved.conf.d/zz-imageos.conf"]
    assert files["etc/resolv.conf"] == "-> /run/systemd/resolve/resolv.conf"


def test_dhclient_tells_resolvconf_nothing(guest: Path, target: Target) -> None:
    """Its servers would come before those that ifupdown tells; of two functions of one name, the last counts."""
    make(guest, {**GUESTS["ifupdown"], "etc/network/if-up.d/000resolvconf": "x", "sbin/resolvconf": "x"})
    make(guest, {"sbin/dhclient": "x", "etc/dhcp/dhclient-enter-hooks.d/resolvconf": "make_resolv_conf() { x; }\n"})
    (guest / "etc/resolv.conf").symlink_to("/run/resolvconf/resolv.conf")
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    hooks = [path for path in contents(guest) if path.startswith("etc/dhcp/dhclient-enter-hooks.d/")]
    assert "make_resolv_conf() { :; }\n" in contents(guest)[max(hooks)]


def test_dhcp_clients_of_ifupdown(guest: Path, target: Target) -> None:
    """They know nothing of values set for another interface."""
    make(guest, {**GUESTS["ifupdown"], "sbin/dhclient": "x", "sbin/udhcpc": "x"})
    configure(target, "ifupdown", PLANS["static-and-dhcp"])
    files = contents(guest)
    assert files["etc/dhcp/dhclient-enter-hooks.d/zz-imageos"].splitlines()[1:] == [
        "make_resolv_conf() { :; }",
        'case "$interface" in eth1) unset new_routers ;; esac',
    ]
    assert files["etc/udhcpc/udhcpc.conf"].splitlines()[1:] == ['RESOLV_CONF="no"', 'NO_GATEWAY="eth1"']
    configure(target, "ifupdown", PLANS["dhcp"])
    assert "etc/dhcp/dhclient-enter-hooks.d/zz-imageos" not in contents(guest)


DHCPCD = "hostname\nduid\n"


def test_dhcpcd_of_ifupdown(guest: Path, target: Target) -> None:
    """Debian 13 has it with ifupdown."""
    make(guest, {**GUESTS["ifupdown"], "usr/sbin/dhcpcd": "x", "etc/dhcpcd.conf": DHCPCD})
    for _ in range(2):
        configure(target, "ifupdown", PLANS["static-and-dhcp"])
        text = contents(guest)["etc/dhcpcd.conf"]
        assert text == f"{DHCPCD}{render.DHCPCD_SECTIONS}\ninterface eth1\nnohook resolv.conf\nnogateway\n"
    configure(target, "ifupdown", PLANS["dhcp"])
    assert contents(guest)["etc/dhcpcd.conf"] == DHCPCD


@pytest.mark.parametrize(
    "line", ["source /etc/network/interfaces.d/*", "source-directory /etc/network/interfaces.d", ""]
)
def test_what_the_image_takes_in_stays(line: str, guest: Path, target: Target) -> None:
    """As in the image: busybox refuses a missing directory, and `source .../*` reads names with a dot, too."""
    old = f"auto lo\n  {line}\nsource /etc/network/other\n"
    make(guest, {**GUESTS["ifupdown"], "etc/network/interfaces": old, "etc/network/interfaces.d/br.cfg": "auto br0\n"})
    for _ in range(2):
        configure(target, "ifupdown", PLANS["dhcp"])
        sources = [line for line in contents(guest)["etc/network/interfaces"].splitlines() if line.startswith("source")]
        assert sources == ([line] if line else [])
    (guest / "etc/network/interfaces.d/br.cfg").unlink()
    (guest / "etc/network/interfaces.d").rmdir()
    configure(target, "ifupdown", PLANS["dhcp"])
    assert "source" not in contents(guest)["etc/network/interfaces"]


@pytest.mark.parametrize("helper", ["nobody", "resolved", "NetworkManager"])
def test_dns_of_netplan(helper: str, guest: Path, target: Target) -> None:
    """networkd alone writes no resolv.conf."""
    make(guest, {**GUESTS["netplan"], "etc/resolv.conf": "theirs\n"})
    if helper == "resolved":
        make(guest, {**enabled("systemd-resolved")})
    if helper == "NetworkManager":
        make(guest, {"etc/netplan/01-all.yaml": "network:\n  renderer: NetworkManager\n", **enabled("NetworkManager")})
    configure(target, "netplan", PLANS["static-and-dhcp"])
    expected = {"nobody": OURS, "resolved": STUB, "NetworkManager": "theirs\n"}
    assert contents(guest)["etc/resolv.conf"] == expected[helper]


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
    assert find(target) == backend
    configure(target, backend, PLANS["dhcp"])
    link = contents(guest).get("etc/systemd/system/multi-user.target.wants/systemd-networkd.service")
    assert link == ("-> /lib/systemd/system/systemd-networkd.service" if backend == "networkd" else None)


def test_cloud_init_without_our_seed(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    make(guest, GUESTS["cloud-init"])
    configure(target, "cloud-init", PLANS["dhcp"])
    assert "etc/netplan" not in contents(guest)
    assert not target.exists(cloudinit.SEED)
    assert "cloud-init has no seed in /var/lib/cloud/seed/nocloud" in capfd.readouterr().err


def test_assigned() -> None:
    text = "# comment\nHOSTNAME=a\n GATEWAY=192.0.2.254\nNETWORKING=no\n"
    changed = assign(text, {"GATEWAY": "", "NETWORKING": "yes"})
    assert changed == '# comment\nHOSTNAME=a\nNETWORKING="yes"\n'
    assert assign(changed, {"GATEWAY": "", "NETWORKING": "yes"}) == changed


LONG = ["\n", "network:", "network:\n", "- ", "{", "[a,", "'", '"', "\\", "a: {", "auto eth0 \\\n", "# ", "& "]
UNCLOSED = {"blanks": "{a: " + " " * 500_000 + '"', "comma": '{a: "b",' + " " * 500_000 + "'"}


@pytest.mark.parametrize("piece", [*LONG, *UNCLOSED])
def test_a_text_that_takes_hours(piece: str) -> None:
    text = UNCLOSED.get(piece) or piece * (READ_LIMIT // len(piece))
    begin = time.process_time()
    yaml.scalars(text)
    existing.without_nics(text, lambda name: True)
    assert time.process_time() - begin < 15


def test_sources_that_take_hours(guest: Path, target: Target) -> None:
    """Each of many patterns would list a large directory."""
    make(guest, {f"d/{number}": "" for number in range(500)})
    make(guest, {"etc/network/interfaces": "".join(f"source /d/{n}* /d/*\n" for n in range(20_000))})
    begin = time.process_time()
    existing.ifupdown(target, ())
    assert time.process_time() - begin < 5


def test_instance_id_after_lines_that_take_hours() -> None:
    begin = time.process_time()
    text = "\n" * 300_000 + '{"instance-id": "a"}'
    assert re.findall(cloudinit.INSTANCE_ID, text, re.MULTILINE) == ["a"]
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "text",
    [
        "network: {config: disabled}",
        "network: { 'config' : \"disabled\" } # off",
        "network:\r\n  config:  disabled",
        'network:\n\n "config": disabled',
        "network:\n# by hand\n    config: 'disabled'  # no",
        '{"network":{"config":"disabled"}}',
        "network:\n  {config:\n    disabled}",
        "network: {version: 2,\n  config: disabled}",
        "network: &net {config: disabled}",
        "my key:\n  network: {}\nnetwork: {config: disabled}",
        "a: {b: 'of\n  lines # }\n  '}\nnetwork: {config: disabled}",
        "network: !!map\n  config: &off !!str disabled",
        "network: !!map &net\n  {config: disabled}",
    ],
)
def test_cloud_init_that_is_forbidden_the_network(text: str, guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["cloud-init"], "etc/cloud/cloud.cfg.d/50.cfg": f"a: b\n{text}\n"})
    assert find(target) == "netplan"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffnetwork: {config: disabled}\n",
        "---  {network: {config: disabled}}\n",
        "--- # x\nnetwork: {config: disabled}",
    ],
)
def test_document_with_a_beginning(text: str) -> None:
    assert yaml.scalars(text)[("network", "config")] == "disabled"


def test_without_a_key_in_json() -> None:
    text = '#cloud-config\n{"users": [1],\n "network": {"version": 2}}\n'
    assert yaml.without(text, "network") == '#cloud-config\n{\n  "users": [\n    1\n  ]\n}\n'
    assert yaml.without("{network: {}}\n", "network") == "{network: {}}\n"


@pytest.mark.parametrize(
    "text",
    [
        "# network: {config: disabled}",
        "a:\n  network: {config: disabled}",
        "my key:\n  network: {config: disabled}",
        "a: |\n  x\n\n  network: {config: disabled}",
        "network: {config: disabled }\nnetwork: {config: []}",
    ],
)
def test_cloud_init_that_is_not_forbidden_the_network(text: str, guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["cloud-init"], "etc/cloud/cloud.cfg.d/50.cfg": f"{text}\n"})
    assert find(target) == "cloud-init"


# Enabled, not installed


MASKED = "-> /dev/null"
MENU, DEFAULT = "boot/grub/grub.cfg", "etc/default/grub"
OFF: dict[str, tuple[str, dict[str, str], str]] = {  # guest, what is off, who rules then
    "cloud-init.disabled": ("cloud-init", {"etc/cloud/cloud-init.disabled": ""}, "netplan"),
    "cloud-init.target": ("cloud-init", {"etc/systemd/system/cloud-init.target": MASKED}, "netplan"),
    "one stage": ("cloud-init", {"etc/systemd/system/cloud-init-local.service": MASKED}, "netplan"),
    "its generator": (
        "cloud-init",
        {"etc/systemd/system-generators/cloud-init-generator": MASKED},
        "netplan",
    ),
    "kernel": ("cloud-init", {MENU: "linux /vmlinuz root=UUID=1 ro cloud-init=disabled quiet\n"}, "netplan"),
    "kernel of a menu to be": ("cloud-init", {DEFAULT: 'GRUB_CMDLINE_LINUX="cloud-init=disabled"\n'}, "netplan"),
    "kernel, policy": ("cloud-init", {MENU: "linux /vmlinuz root=UUID=1 ci.di.policy=disabled\n"}, "netplan"),
    "kernel, network": ("cloud-init", {MENU: "linux /vmlinuz root=UUID=1 network-config=disabled\n"}, "netplan"),
    "policy": ("cloud-init", {"etc/cloud/ds-identify.cfg": "policy: disabled\n"}, "netplan"),
    "netplan's generator": (
        "netplan",
        {**enabled("NetworkManager"), "etc/systemd/system-generators/netplan": MASKED},
        "NetworkManager",
    ),
    "networkd": ("netplan", {**IFUPDOWN, "etc/systemd/system/systemd-networkd.service": MASKED}, "ifupdown"),
    "NetworkManager": (
        "NetworkManager",
        {**enabled("systemd-networkd"), "etc/systemd/system/NetworkManager.service": MASKED},
        "networkd",
    ),
    "an empty unit": (
        "NetworkManager",
        {**enabled("systemd-networkd"), "etc/systemd/system/NetworkManager.service": ""},
        "networkd",
    ),
    "no unit": ("networkd", {"usr/lib/systemd/system/systemd-networkd.service": "gone", **IFUPDOWN}, "ifupdown"),
    "another target": (
        "ifupdown",
        {"usr/lib/systemd/system/dhcpcd.service": UNIT, "etc/systemd/system/rescue.target.wants/dhcpcd.service": UNIT},
        "ifupdown",
    ),
    "dhcpcd": ("dhcpcd", {"etc/systemd/system/dhcpcd.service": MASKED}, "networkd"),
    "systemd is not init": (
        "networkd",
        {**IFUPDOWN, "etc/inittab": "id:2:initdefault:\n", "sbin/init": "x", "etc/rcS.d/S10networking": "x"},
        "ifupdown",
    ),
    "not in this run level": (
        "ifupdown",
        {
            **{"etc/inittab": "id:3:initdefault:\n", "sbin/init": "x", "etc/rc3.d/S10dhcpcd": "x"},
            **{"etc/rc2.d/S10connman": "x", "etc/rc3.d/K10connman": "x"},
        },
        "dhcpcd",
    ),
    "OpenRC": (
        "ifupdown",
        {
            **{"sbin/openrc": "x", "sbin/init": "x", "etc/inittab": "::sysinit:/sbin/openrc sysinit\n"},
            **{"etc/init.d/connman": "x", "etc/init.d/dhcpcd": "x", "etc/runlevels/default/dhcpcd": "x"},
        },
        "dhcpcd",
    ),
}


@pytest.mark.parametrize("case", OFF)
def test_what_is_off_does_not_rule(case: str, guest: Path, target: Target) -> None:
    backend, off, ruling = OFF[case]
    make(guest, GUESTS[backend])
    for name, text in off.items():
        (guest / name).unlink(missing_ok=True)
        if text == "gone":
            continue
        make(guest, {name: text})
        if text.startswith("-> "):
            (guest / name).unlink()
            (guest / name).symlink_to(text[3:])
    assert find(target) == ruling


@pytest.mark.parametrize(
    "files",
    [
        {"usr/lib/systemd/system/graphical.target.wants/dhcpcd.service": UNIT},
        {"etc/systemd/system/own.service": UNIT, "etc/systemd/system/sysinit.target.requires/own.service": UNIT}
        | {"etc/systemd/system/own.service.wants/dhcpcd.service": UNIT},
        {"usr/lib/systemd/system/dhcpcd.socket": UNIT, "etc/systemd/system/sockets.target.wants/dhcpcd.socket": UNIT},
    ],
    ids=["package", "another service", "socket"],
)
def test_started_in_another_way(files: dict[str, str], guest: Path, target: Target) -> None:
    make(guest, {"usr/lib/systemd/system/dhcpcd.service": UNIT, **files})
    assert find(target) == "dhcpcd"


@pytest.mark.parametrize(
    ("default", "is_reached"),
    [
        ("/lib/systemd/system/runlevel3.target", True),
        ("/usr/lib/systemd/system/runlevel5.target", True),
        ("/etc/systemd/system/appliance.target", True),
        ("/usr/lib/systemd/system/multi-user.target", True),
        ("/usr/lib/systemd/system/rescue.target", False),
        ("runlevel1.target", False),
    ],
)
def test_default_target(default: str, is_reached: bool, guest: Path, target: Target) -> None:
    make(guest, enabled("NetworkManager"))
    (guest / "etc/systemd/system/default.target").symlink_to(default)
    assert find(target) == ("NetworkManager" if is_reached else "")


def test_graphical_is_not_reached_by_a_run_level(guest: Path, target: Target) -> None:
    make(guest, {"usr/lib/systemd/system/dhcpcd.service": UNIT})
    make(guest, {"etc/systemd/system/graphical.target.wants/dhcpcd.service": UNIT})
    (guest / "etc/systemd/system/default.target").symlink_to("/lib/systemd/system/runlevel3.target")
    assert not find(target)


def test_guest_without_nics_waits_for_none(guest: Path, target: Target) -> None:
    """What the image says of its own NICs goes; nothing more is started."""
    waits = "etc/systemd/system/systemd-networkd-wait-online.service.d/zz-imageos.conf"
    make(guest, {**INSTALLED_NETWORKD, **IFUPDOWN, "etc/network/interfaces": "auto eth0\niface eth0 inet dhcp\n"})
    make(guest, {"etc/systemd/network/00.network": "[Match]\nName=en*\n[Network]\nDHCP=yes\n"})
    assert configure(target, "ifupdown", ()) == ["ifupdown's eth0"]
    assert "eth0" not in contents(guest)["etc/network/interfaces"]
    configure(target, "networkd", ())
    assert "/bin/true" in contents(guest)[waits] and "etc/systemd/network/00.network" not in contents(guest)
    assert not services.is_enabled(target, "systemd-networkd")
    configure(target, "networkd", PLANS["dhcp"])
    assert waits not in contents(guest) and services.is_enabled(target, "systemd-networkd")


def test_a_chain_of_units_that_takes_hours(guest: Path, target: Target) -> None:
    units = guest / "etc/systemd/system"
    for number in range(1000):
        make(units, {f"a{number}.service": UNIT, f"a{number + 1}.service.wants/a{number}.service": ""})
    begin = time.process_time()
    assert not services.is_enabled(target, "a0")
    assert time.process_time() - begin < 5
    make(units, {"multi-user.target.wants/a1000.service": "", "a1000.service": UNIT})
    assert services.is_enabled(target, "a0")


UNKNOWN_INITS = {
    "busybox's rcS": {"etc/inittab": "::sysinit:/etc/init.d/rcS\n", "etc/init.d/S40-network": "x", "sbin/init": "x"},
    "a container's": {"etc/inittab": "::sysinit:/sbin/openrc sysinit\n", "sbin/init": "x"},
    "none": {},
    "systemd, ifup@": {"usr/lib/systemd/systemd": "x", "sbin/init": "-> /usr/lib/systemd/systemd"},
}


@pytest.mark.parametrize("case", UNKNOWN_INITS)
def test_ifupdown_is_the_last_resort(case: str, guest: Path, target: Target) -> None:
    make(guest, {"sbin/ifup": "x", "etc/network/interfaces": ""})
    make(guest, {name: text for name, text in UNKNOWN_INITS[case].items() if not text.startswith("-> ")})
    for name, text in UNKNOWN_INITS[case].items():
        if text.startswith("-> "):
            (guest / name).symlink_to(text[3:])
    assert find(target) == "ifupdown"
    assert not is_started(target, "ifupdown")


@pytest.mark.parametrize("directory", ["etc/init.d/rc3.d", "etc/rc.d/rc3.d", "etc/rc3.d"])
def test_run_levels_of_suse(directory: str, guest: Path, target: Target) -> None:
    make(guest, {"sbin/init": "x", "etc/inittab": "id:3:initdefault:\n", "etc/sysconfig/network/ifcfg-lo": ""})
    make(guest, {f"{directory}/S05network": "x"})
    assert find(target) == "wicked"


def test_alias(guest: Path, target: Target) -> None:
    make(guest, {"usr/lib/systemd/system/dhcpcd.service": UNIT, "etc/systemd/system/x": ""})
    (guest / "etc/systemd/system/network.service").symlink_to("/usr/lib/systemd/system/dhcpcd.service")
    assert not find(target)
    make(guest, {"etc/systemd/system/multi-user.target.wants/network.service": UNIT})
    assert find(target) == "dhcpcd"


# Others leave our NICs alone


@pytest.mark.parametrize("word", ["en*", "/e*", "/*/1", "ens3:1", "eth0=home", "*"])
def test_stanzas_for_patterns(word: str) -> None:
    text = f"auto lo {word}\niface {word} inet dhcp\niface br0 inet manual\n"
    assert existing.without_nics(text, lambda name: existing.is_nic(name, ())) == (
        "auto lo\niface br0 inet manual\n",
        [word],
    )


def test_rivals(guest: Path, target: Target) -> None:
    """All are enabled: one rules, and each other one is told."""
    image = "# by hand\nauto lo eth0\niface lo inet loopback\nallow-hotplug ens3 /en*\niface ens3 inet dhcp\n  mtu 9\n"
    make(guest, {**GUESTS["networkd"], **enabled("dhcpcd", "connman", "NetworkManager"), **IFUPDOWN})
    make(guest, {"etc/network/interfaces": image + "source other/*\n# bridges\nauto br0\niface br0 inet manual\n"})
    make(
        guest, {"etc/network/other/a": "iface eth0 inet static\n  address 192.0.2.9/24\n", "etc/dhcpcd.conf": "duid\n"}
    )
    make(guest, {"etc/connman/main.conf": "[General]\n# all\nNetworkInterfaceBlacklist=docker,ve-\n"})
    make(guest, {"var/lib/NetworkManager/timestamps": "[timestamps]\n"})
    for _ in range(2):
        disabled = configure(target, "NetworkManager", PLANS["static-and-dhcp"])
        files = contents(guest)
        assert files["etc/systemd/network/00-imageos-eth1.network"].splitlines()[1:] == [
            *("[Match]", "MACAddress=aa:00:00:00:00:02", "Type=ether", "", "[Link]", "Unmanaged=yes")
        ]
        assert files["etc/dhcpcd.conf"] == f"{render.DHCPCD_DENIED}\ndenyinterfaces eth* en*\nduid\n"
        assert files["etc/connman/main.conf"].splitlines() == [
            *("[General]", "NetworkInterfaceBlacklist=docker,ve-,eth,en", "# all")
        ]
        assert files["etc/network/interfaces"] == (
            "# by hand\nauto lo\niface lo inet loopback\nsource other/*\n# bridges\nauto br0\niface br0 inet manual\n"
        )
        assert "etc/network/other/a" not in files and "var/lib/NetworkManager/timestamps" not in files
    assert disabled == ["networkd", "connman", "dhcpcd"]


def test_what_keeps_a_program_from_its_work(guest: Path, target: Target) -> None:
    """Debian's networking from NICs, dhcpcd from resolv.conf; others of these settings stay."""
    make(guest, {**GUESTS["ifupdown"], "etc/default/networking": "CONFIGURE_INTERFACES=no\nVERBOSE=yes\n"})
    configure(target, "ifupdown", PLANS["dhcp"])
    assert contents(guest)["etc/default/networking"] == "VERBOSE=yes\n"
    (guest / "etc/default/networking").unlink()
    configure(target, "ifupdown", PLANS["dhcp"])
    assert "etc/default/networking" not in contents(guest)
    text = "nohook resolv.conf, ntp.conf\nnohook hostname\n"
    make(guest, {**GUESTS["dhcpcd"], "etc/dhcpcd.conf": text})
    assert "dhcpcd's nohook" in configure(target, "dhcpcd", PLANS["dhcp"])
    assert contents(guest)["etc/dhcpcd.conf"].startswith("nohook hostname\n# imageos")


def test_a_boot_waits_for_no_other_nic(guest: Path, target: Target) -> None:
    waits, wants = (
        "etc/systemd/system/systemd-networkd-wait-online.service.d",
        "etc/systemd/system/network-online.target.wants",
    )
    one = "[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-networkd-wait-online --interface=ens3\n"
    make(guest, {**enabled("systemd-networkd"), f"{waits}/a.conf": one, f"{waits}/b.conf": "[Service]\nNice=1\n"})
    make(guest, {f"{wants}/systemd-networkd-wait-online@ens3.service": UNIT})
    disabled = configure(target, "networkd", PLANS["dhcp"])
    assert disabled == ["networkd's wait-online's a.conf", "systemd-networkd-wait-online@ens3"]
    assert f"{waits}/b.conf" in contents(guest)


def test_dhcpcd_of_one_nic(guest: Path, target: Target) -> None:
    make(guest, {"usr/lib/systemd/system/dhcpcd@.service": UNIT, **enabled("systemd-networkd")})
    for name in ("ens3", "wlan0"):
        make(guest, {f"etc/systemd/system/multi-user.target.wants/dhcpcd@{name}.service": UNIT})
    assert configure(target, find(target), PLANS["dhcp"]) == ["dhcpcd's ens3"]
    files = contents(guest)
    assert "etc/systemd/system/multi-user.target.wants/dhcpcd@ens3.service" not in files
    assert "etc/systemd/system/multi-user.target.wants/dhcpcd@wlan0.service" in files


def test_dhcpcd_of_all_instead_of_one_nic(guest: Path, target: Target) -> None:
    make(guest, {f"usr/lib/systemd/system/dhcpcd{kind}.service": UNIT for kind in ("", "@")})
    make(guest, {"etc/systemd/system/multi-user.target.wants/dhcpcd@ens3.service": UNIT})
    assert find(target) == "dhcpcd"
    configure(target, "dhcpcd", PLANS["dhcp"])
    assert services.is_enabled(target, "dhcpcd") and find(target) == "dhcpcd"
    assert not target.glob("/etc/systemd/system/multi-user.target.wants/dhcpcd@*")


def test_rivals_that_rule_again(guest: Path, target: Target) -> None:
    make(
        guest, {**GUESTS["dhcpcd"], **enabled("connman", "NetworkManager"), "etc/connman/main.conf": "[General]\na=b\n"}
    )
    make(guest, {"etc/NetworkManager/NetworkManager.conf": "[keyfile]\nunmanaged-devices=*\n"})
    for name in ("dhcpcd", "connman", "NetworkManager"):
        configure(target, "NetworkManager" if name != "NetworkManager" else "dhcpcd", PLANS["static-and-dhcp"])
        configure(target, name, PLANS["static-and-dhcp"])
        files = contents(guest)
        assert ("denyinterfaces" in files["etc/dhcpcd.conf"]) == (name != "dhcpcd")
        assert ("eth,en" in files["etc/connman/main.conf"]) == (name != "connman")
        assert ("except:" in files["etc/NetworkManager/conf.d/zz-imageos.conf"]) == (name == "NetworkManager")


def test_what_keeps_network_manager_from_a_profile(guest: Path, target: Target) -> None:
    """The NIC left out, profiles elsewhere, DNS servers for all domains; only what the image says is contradicted."""
    ours, theirs = "etc/NetworkManager/conf.d/zz-imageos.conf", "etc/NetworkManager/conf.d/50-site.conf"
    said = {
        "[device-wired]\nmatch-device=type:ethernet\nmanaged=0\n": "[device-imageos]\nmatch-device=mac:aa:00:00",
        "[keyfile]\npath=/etc/site\n": "[keyfile]\npath=/etc/NetworkManager/system-connections\n",
        "[global-dns-domain-*]\nservers=192.0.2.99\n": "[global-dns-domain-*]\nservers=192.0.2.53,2001:db8::53\n",
    }
    for text, answer in said.items():
        make(guest, {**GUESTS["NetworkManager"], theirs: text})
        configure(target, "NetworkManager", PLANS["static-and-dhcp"])
        assert answer in contents(guest)[ours]
        assert contents(guest)[ours].count("[") == 1
    configure(target, "NetworkManager", PLANS["dhcp"])  # the image's servers may stay
    assert ours not in contents(guest)
    for text in ("dns=systemd-resolved\n", "dns=default\nsystemd-resolved=false\n"):
        make(guest, {theirs: f"[main]\n{text}"})
        configure(target, "NetworkManager", PLANS["dhcp"])
        assert contents(guest).get(ours, "").endswith("dns=default\n") == (text == "dns=systemd-resolved\n")
    make(guest, enabled("systemd-resolved"))
    configure(target, "NetworkManager", PLANS["dhcp"])
    assert contents(guest)[ours].endswith("[main]\nsystemd-resolved=true\n")


def test_disabled_in_words(guest: Path, target: Target) -> None:
    make(guest, {**GUESTS["netplan"], "etc/netplan/50.yaml": "network:\n  ethernets:\n    ens3: {}\n"})
    make(guest, {"sbin/ifup": "x", "etc/network/interfaces": "auto eth0 eth1\niface eth0 inet dhcp\n"})
    assert configure(target, "netplan", PLANS["dhcp"]) == ["netplan's 50.yaml", "ifupdown's eth0, eth1"]
    assert configure(target, "netplan", PLANS["dhcp"]) == []


def test_cloud_init_writes_for_what_is_enabled(guest: Path, target: Target) -> None:
    """ifupdown is installed, too, and cloud-init's first choice."""
    make(guest, {**GUESTS["cloud-init"], "sbin/ifup": "x", "etc/network/interfaces": ""})
    make(guest, {"var/lib/cloud/seed/nocloud/meta-data": "{}"})
    configure(target, "cloud-init", PLANS["routed"])
    files = contents(guest)
    assert '{"renderers": ["netplan"]}' in files["etc/cloud/cloud.cfg.d/zz-imageos-network.cfg"]
    assert '"version": 2' in files["var/lib/cloud/seed/nocloud/network-config"]


def test_list_of_the_image_without_what_is_enabled(guest: Path, target: Target) -> None:
    listed = "system_info:\n  network:\n    renderers: ['netplan', 'sysconfig']\n"
    make(guest, {**CLOUD_INIT, **IFUPDOWN, "var/lib/cloud/seed/nocloud/meta-data": "{}"})
    configure(target, "cloud-init", PLANS["dhcp"])
    assert "etc/cloud/cloud.cfg.d/zz-imageos-network.cfg" not in contents(guest)
    make(guest, {"etc/cloud/cloud.cfg": listed})
    for _ in range(2):
        configure(target, "cloud-init", PLANS["dhcp"])
        assert '{"renderers": ["eni"]}' in contents(guest)["etc/cloud/cloud.cfg.d/zz-imageos-network.cfg"]


def test_network_of_cloud_inits_own_configuration(guest: Path, target: Target) -> None:
    """It would count more than the seed's."""
    system = "a: b\nnetwork:\n  version: 1\n  # c\n  config: [{type: physical, name: ens3}]\nc: d\n"
    make(guest, {**GUESTS["cloud-init"], "etc/cloud/cloud.cfg.d/50-net.cfg": system})
    make(guest, {"var/lib/cloud/seed/nocloud/meta-data": "{}"})
    assert configure(target, "cloud-init", PLANS["dhcp"]) == ["cloud-init's 50-net.cfg"]
    assert contents(guest)["etc/cloud/cloud.cfg.d/50-net.cfg"] == "a: b\nc: d\n"


@pytest.mark.parametrize("name", ["connman", "networkd", "NetworkManager", "ifcfg", "wicked"])
def test_cloud_init_is_forbidden_what_it_cannot_write_for(name: str, guest: Path, target: Target) -> None:
    """Or cannot in full: with three of these, DHCP on a second NIC would set a default route of its own."""
    make(guest, {**CLOUD_INIT, **GUESTS[name]})
    for _ in range(2):
        assert find(target) == name
        configure(target, name, PLANS["dhcp"])
        assert "network: {config: disabled}\n" in contents(guest)["etc/cloud/cloud.cfg.d/zz-imageos-network.cfg"]


@pytest.mark.parametrize(
    ("match", "is_removed"),
    [
        ("Name=en*", True),
        ("Name=br0", False),
        ("Name=!lo", True),
        ("Type=ether", True),
        ("Type=wlan", False),
        ("Type=ether wlan", True),
        ("Type=!loopback", True),
        ("Type=!ether", False),
        ('Name="eth0" br1', True),
        ("MACAddress=AA:00:00:00:00:01", True),
        ("MACAddress=aa00.0000.0001 aa-00-00-00-00-07", True),
        ("MACAddress=aa:00:00:00:00:99", False),
        ("Kind=bridge", False),
        ("Driver=virtio_net", True),
        ("# Name=eth0\nName=wg0", False),
        ("", True),
    ],
)
def test_networks_before_ours(match: str, is_removed: bool, guest: Path, target: Target) -> None:
    text = f"[Match]\n{match}\n[Network]\nName=eth0\nDHCP=yes\n"
    make(guest, {**GUESTS["networkd"], "etc/systemd/network/05-x.network": text})
    make(guest, {"usr/lib/systemd/network/05-y.network": text})
    configure(target, "networkd", PLANS["dhcp"])
    files = contents(guest)
    assert ("etc/systemd/network/05-x.network" in files) != is_removed
    assert files.get("etc/systemd/network/05-y.network") == (MASKED if is_removed else None)


# resolv.conf


STUB = "-> ../run/systemd/resolve/stub-resolv.conf"
OURS, THEIRS = (
    "search example.org example.net\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n",
    "nameserver 10.0.2.3\n",
)
MANAGED = "-> /run/NetworkManager/resolv.conf"
RESOLVED = enabled("systemd-resolved")
RESOLVERS: dict[str, tuple[str, dict[str, str], str, str, str]] = {
    # backend, image, resolv.conf, then with DNS servers, then without
    "plain beside resolved": ("networkd", RESOLVED, THEIRS, STUB, STUB),
    "link to resolved": ("networkd", RESOLVED, STUB, STUB, STUB),
    "plain, nobody": ("networkd", {}, THEIRS, OURS, THEIRS),
    "dangling, nobody": ("networkd", {}, STUB, OURS, render.HEADER),
    "plain, NetworkManager": ("NetworkManager", {}, THEIRS, THEIRS, THEIRS),
    "plain, NetworkManager beside resolved": ("NetworkManager", RESOLVED, THEIRS, THEIRS, THEIRS),
    "dangling, NetworkManager": ("NetworkManager", {}, STUB, OURS, render.HEADER),
    "link to NetworkManager": ("NetworkManager", {}, MANAGED, MANAGED, MANAGED),
    "NetworkManager that may not": (
        "NetworkManager",
        {"etc/NetworkManager/conf.d/dns.conf": "[main]\ndns = none\n"},
        THEIRS,
        OURS,
        THEIRS,
    ),
    "link to another file": ("networkd", {"etc/resolv.static": THEIRS}, "-> resolv.static", OURS, "-> resolv.static"),
    "link to another file, NetworkManager": (
        "NetworkManager",
        {"etc/resolv.static": THEIRS},
        "-> resolv.static",
        OURS,
        "-> resolv.static",
    ),
    "plain beside resolvconf": (
        "ifupdown",
        {"sbin/resolvconf": "x", "etc/network/if-up.d/000resolvconf": "x"},
        THEIRS,
        OURS,
        THEIRS,
    ),
    "resolvconf is gone": ("ifupdown", {}, "-> /run/resolvconf/resolv.conf", OURS, render.HEADER),
}  # fmt: skip


@pytest.mark.parametrize(("backend", "expected"), [("networkd", STUB), ("NetworkManager", None)])
def test_resolv_conf_is_a_directory(backend: str, expected: str | None, guest: Path, target: Target) -> None:
    make(guest, {**GUESTS[backend], **RESOLVED, "etc/resolv.conf/x": ""})
    configure(target, backend, PLANS["static-and-dhcp"])
    assert target.link("/etc/resolv.conf") == (expected and expected[3:])
    assert not target.is_dir("/etc/resolv.conf")


@pytest.mark.parametrize("case", RESOLVERS)
def test_who_makes_resolv_conf(case: str, guest: Path, target: Target) -> None:
    backend, image, before, *after = RESOLVERS[case]
    make(guest, {**GUESTS[backend], **image})
    file = guest / "etc/resolv.conf"
    for plan, expected in zip(("static-and-dhcp", "dhcp"), after):
        file.unlink(missing_ok=True)
        if before.startswith("-> "):
            file.symlink_to(before[3:])
        else:
            file.write_text(before)
        configure(target, backend, PLANS[plan])
        assert contents(guest).get("etc/resolv.conf") == expected, plan


if __name__ == "__main__":
    for backend in RENDERERS:
        (GOLDEN / backend).write_text(rendered(backend))
    sys.exit(0)
