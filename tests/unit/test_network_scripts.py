"""Scripts and units of an image that configure a NIC themselves are found; those that only look are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_network_files import UNIT, enabled, make

from imageos.guests.target import READ_LIMIT, Target
from imageos.network import scripts

OWN = "etc/systemd/system"


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("ip address add 192.0.2.77/24 dev eth0", True),
        ("/sbin/dhclient -v ens3 &", True),
        ("ifconfig eth0:1 192.0.2.77", True),
        ("sleep 5; ip route replace default via 192.0.2.254", True),
        ("# ip address add 192.0.2.77/24 dev eth0", False),
        ("ip route show default", False),
        ('ip link set "$IFACE" up', False),
        ("ip link add name br0 type bridge", False),
        ('resolvectl default-route "$interface" yes', False),
        ("ethtool -K eth0 gro off", False),
    ],
)
def test_a_script(line: str, is_found: bool, guest: Path, target: Target) -> None:
    make(guest, {"etc/rc.local": f"#!/bin/sh\n{line}\nexit 0\n"})
    assert list(scripts.configuring(target)) == (["/etc/rc.local"] if is_found else [])


def test_a_program_is_no_script(guest: Path, target: Target) -> None:
    make(guest, {"etc/network/if-up.d/agent": "dhclient eth0\n" + "x" * READ_LIMIT})
    assert list(scripts.configuring(target)) == []


def test_units_that_are_started(guest: Path, target: Target) -> None:
    text = "[Service]\nExecStart=/sbin/dhclient eth0\n"
    make(guest, {f"{OWN}/{name}.service": text for name in ("on", "off")})
    make(guest, {f"{OWN}/multi-user.target.wants/on.service": UNIT, **enabled("networking")})
    assert list(scripts.configuring(target)) == ["/etc/systemd/system/on.service"]


def test_what_the_kernel_is_told(guest: Path, target: Target) -> None:
    line = "linux /vmlinuz root=LABEL=x ip=192.0.2.77::192.0.2.1:255.255.255.0::eth0:off quiet\n"
    make(
        guest, {"boot/grub/grub.cfg": f"menuentry x {{\n{line}}}\nmenuentry y {{\nlinux /vmlinuz ip=off ip=none\n}}\n"}
    )
    assert list(scripts.configuring(target)) == ["the kernel's ip=192.0.2.77::192.0.2.1:255.255.255.0::eth0:off"]


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("make_resolv_conf() { :; }", True),
        ("#!/bin/sh\nmake_resolv_conf(){\n\t:\n}\n", True),
        ("make_resolv_conf () { return 0; }", True),
        ("make_resolv_conf() { resolvconf -a eth0; }", False),
        ("if [ -x /sbin/resolvconf ]; then\n\tmake_resolv_conf() { : ; }\nfi\n", False),  # of Debian's package
        ("make_resolv_conf() {" + " " * 500_000, False),
    ],
    ids=["colon", "lines", "return", "resolvconf", "package", "blanks"],
)
def test_a_hook_that_keeps_dns_away(text: str, is_found: bool, guest: Path, target: Target) -> None:
    make(guest, {"etc/dhcp/dhclient-enter-hooks.d/nodns": text})
    assert scripts.keeping_dns(target) == (["/etc/dhcp/dhclient-enter-hooks.d/nodns"] if is_found else [])
