"""cloud-init's seed: in the dialect that the guest's cloud-init can follow, and for root's eyes only."""

from __future__ import annotations

import json

import pytest
from support import recorded

from imageos import ganeti
from imageos.guests import cloudinit
from imageos.guests.target import Target
from imageos.network import Interface
from imageos.settings import Settings

INSTANCE = ganeti.instance(recorded("create-kvm-network"))
STATIC = Interface("eth0", "aa:00:00:c5:90:29", False, "198.51.100.2/24", "198.51.100.1", False, ("198.51.100.53",))
ROUTED = Interface("eth0", "aa:00:00:9a:16:b4", False, "192.0.2.60/32", "", True, ("192.0.2.53",), ("example.org",))


def network_config(target: Target, interface: Interface, *programs: str) -> dict[str, object]:
    for program in programs:
        target.write(f"/usr/sbin/{program}", "", mode=0o755)
    cloudinit.write_seed(target, INSTANCE, Settings(), [interface])
    return dict(json.loads(target.read(f"{cloudinit.SEED}/network-config") or ""))


@pytest.mark.parametrize(
    ("programs", "version"),
    [
        (["netplan"], 2),
        (["netplan", "NetworkManager"], 2),
        ([], 2),  # networkd
        (["NetworkManager"], 1),
        (["ifup"], 1),
        (["ifup", "netplan"], 1),
    ],
)
def test_version_that_the_guest_can_follow(target: Target, programs: list[str], version: int) -> None:
    assert network_config(target, STATIC, *programs)["version"] == version


def test_version_1(target: Target) -> None:
    assert network_config(target, STATIC, "ifup")["config"] == [
        {
            "type": "physical",
            "name": "eth0",
            "mac_address": "aa:00:00:c5:90:29",
            "subnets": [
                {
                    "type": "static",
                    "address": "198.51.100.2/24",
                    "gateway": "198.51.100.1",
                    "dns_nameservers": ["198.51.100.53"],
                }
            ],
        },
    ]


def test_version_1_has_a_gateway_for_everything_on_the_link(target: Target) -> None:
    """ifupdown adds it with `onlink`; without a gateway, cloud-init 20.4 to 25.1 fails (KeyError)."""
    (only,) = cloudinit.version1([ROUTED])["config"]
    (subnet,) = only["subnets"]
    assert (subnet["address"], subnet["gateway"]) == ("192.0.2.60/32", "169.254.1.1")
    assert (subnet["dns_nameservers"], subnet["dns_search"]) == (["192.0.2.53"], ["example.org"])


def test_version_1_dhcp() -> None:
    (only,) = cloudinit.version1([Interface("eth1", "aa:00:00:00:00:02", True)])["config"]
    assert only["subnets"] == [{"type": "dhcp4"}]


def test_resolv_conf_where_nobody_writes_it(target: Target) -> None:
    network_config(target, ROUTED, "ifup")
    assert target.read("/etc/resolv.conf") == "search example.org\nnameserver 192.0.2.53\n"


@pytest.mark.parametrize("helper", ["resolvconf", "resolved", "netplan alone"])
def test_resolv_conf_is_left_to_who_writes_it(target: Target, helper: str) -> None:
    target.write("/etc/resolv.conf", "theirs\n")
    if helper == "resolved":
        target.write("/etc/systemd/system/multi-user.target.wants/systemd-resolved.service", "")
    network_config(target, ROUTED, *{"resolvconf": ["ifup", "resolvconf"], "resolved": ["ifup"]}.get(helper, []))
    assert target.read("/etc/resolv.conf") == "theirs\n"


def test_root_password() -> None:
    head, _, text = cloudinit.vendor_data(Settings(root_password_hash="$6$salt$hash")).partition("\n")
    assert head == "#cloud-config"
    root = {"name": "root", "lock_passwd": False, "hashed_passwd": "$6$salt$hash"}
    assert json.loads(text)["users"] == ["default", root]
    assert "users" not in json.loads(cloudinit.vendor_data(Settings()).partition("\n")[2])


def test_seed_of_the_image_is_replaced(target: Target) -> None:
    """Its files may be readable to all, and would stay so."""
    for name in ("user-data", "network-config"):
        target.write(f"{cloudinit.SEED}/{name}", "of the image\n", mode=0o644)
    cloudinit.write_seed(target, INSTANCE, Settings(user_data="#!/bin/sh\nsecret\n"), ())
    assert not target.exists(f"{cloudinit.SEED}/network-config")
    assert target._mode(f"{cloudinit.SEED}/user-data") == 0o100600
