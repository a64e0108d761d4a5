"""The plan of the guest's interfaces, and cloud-init's version of it."""

from __future__ import annotations

import json
import re

import pytest
from credentials import public_key
from hypothesis import given
from hypothesis import strategies as st
from support import recorded

from imageos import ganeti, network
from imageos.errors import Failure
from imageos.ganeti import Nic
from imageos.guests import cloudinit
from imageos.guests.target import Target
from imageos.network import Interface
from imageos.settings import Settings

INSTANCE = ganeti.instance(recorded("create-kvm-network"))
STATIC = Interface(
    name="eth0",
    mac="aa:00:00:c5:90:29",
    dhcp=False,
    address="198.51.100.2/24",
    gateway="198.51.100.1",
    dns=("198.51.100.53",),
    address6="2001:db8:1:0:a800:ff:fec5:9029/64",
    gateway6="2001:db8:1::1",
    takes_dns=False,
)
ROUTED = Interface("eth1", "aa:00:00:9a:16:b4", False, "192.0.2.60/32", takes_gateway6=False, takes_dns=False)
DHCP = INSTANCE.nics[1]._replace(ip="", mode="bridged")


def test_recorded_instance() -> None:
    assert network.plan(INSTANCE, Settings()) == (STATIC, ROUTED)


def test_settings_come_before_the_tags_of_a_network() -> None:
    settings = Settings(dns_servers="192.0.2.1 2001:db8::1", dns_search="example.org example.net")
    first, second = network.plan(INSTANCE, settings)
    assert (first.dns, first.search) == (("192.0.2.1", "2001:db8::1"), ("example.org", "example.net"))
    assert (second.dns, second.search) == ((), ())
    tagged = INSTANCE.nics[0]._replace(number=1)
    assert network.plan(INSTANCE._replace(nics=(INSTANCE.nics[0], tagged)), Settings())[1].dns
    assert not network.plan(INSTANCE._replace(nics=(INSTANCE.nics[0], tagged)), settings)[1].dns


def test_only_one_default_route() -> None:
    nic = INSTANCE.nics[0]._replace(number=1)
    instance = INSTANCE._replace(nics=(INSTANCE.nics[0], nic))
    assert [nic.gateway for nic in network.plan(instance, Settings())] == ["198.51.100.1", ""]


def test_routed_alone_has_its_default_route_on_the_link() -> None:
    instance = INSTANCE._replace(nics=(INSTANCE.nics[1]._replace(number=0),))
    (only,) = network.plan(instance, Settings())
    assert (only.address, only.gateway, only.on_link) == ("192.0.2.60/32", "", True)


def test_gateway_outside_of_the_network_is_on_the_link() -> None:
    nic = INSTANCE.nics[0]._replace(network={**INSTANCE.nics[0].network, "GATEWAY": "203.0.113.1"})
    (only,) = network.plan(INSTANCE._replace(nics=(nic,)), Settings())
    assert (only.gateway, only.on_link) == ("203.0.113.1", True)


@pytest.mark.parametrize(("ip", "mode"), [("", "routed"), ("", "bridged"), ("192.0.2.9", "bridged")])
def test_dhcp_where_nothing_is_known(ip: str, mode: str) -> None:
    nic = INSTANCE.nics[1]._replace(ip=ip, mode=mode)
    (only,) = network.plan(INSTANCE._replace(nics=(nic,)), Settings())
    assert only.dhcp
    assert not only.address


@pytest.mark.parametrize("mode", ["routed", "bridged"])
def test_ipv6_address_of_a_nic_is_no_reason_to_fail(mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Ganeti accepts such an address."""
    nic = INSTANCE.nics[0]._replace(ip="2001:db8::5", mode=mode)
    (only,) = network.plan(INSTANCE._replace(nics=(nic,)), Settings())
    assert only.dhcp and not only.address
    assert "2001:db8::5 is not set up" in capfd.readouterr().err


def test_no_nics() -> None:
    assert network.plan(INSTANCE._replace(nics=()), Settings()) == ()


@pytest.mark.parametrize("servers", ["example.org", "192.0.2.300", "192.0.2.1,192.0.2.2"])
def test_dns_server_that_is_no_address(servers: str) -> None:
    with pytest.raises(Failure, match="is not an address"):
        network.plan(INSTANCE, Settings(dns_servers=servers))


def test_nic_whose_address_is_none() -> None:
    nic = INSTANCE.nics[0]._replace(ip="here")
    with pytest.raises(Failure, match="NIC 0: here/24 is not an IPv4 address with its netmask"):
        network.plan(INSTANCE._replace(nics=(nic,)), Settings())


# IPv6


def with_network(**network: str) -> Interface:
    """Return the instance with its first NIC in another gnt-network."""
    nic = INSTANCE.nics[0]._replace(ip="", network={**INSTANCE.nics[0].network, **network})
    (only,) = plan_of(nic)
    return only


def plan_of(*nics: Nic) -> tuple[Interface, ...]:
    numbered = tuple(nic._replace(number=index) for index, nic in enumerate(nics))
    return network.plan(INSTANCE._replace(nics=numbered), Settings())


def test_address6_is_made_of_the_mac() -> None:
    """RFC 4291, appendix A; the kernel makes the same from a router's advertisement."""
    assert with_network().address6 == "2001:db8:1:0:a800:ff:fec5:9029/64"
    assert with_network().dhcp


@pytest.mark.parametrize("other", [{"GATEWAY6": ""}, {"SUBNET6": "2001:db8:1::/56"}, {"SUBNET6": ""}])
def test_routers_advertise_elsewhere(other: dict[str, str]) -> None:
    assert (with_network(**other).address6, with_network(**other).gateway6) == ("", "")


def test_only_one_default_route6() -> None:
    first, second = plan_of(INSTANCE.nics[0], INSTANCE.nics[0])
    assert first.gateway6 and second.address6 and not second.gateway6


@pytest.mark.parametrize(
    ("gateway", "on_link"), [("2001:db8:1::1", False), ("fe80::1", False), ("2001:db8:2::1", True)]
)
def test_gateway6(gateway: str, on_link: bool) -> None:
    routes = network.routes(with_network(GATEWAY6=gateway))
    assert routes == [network.Route(6, gateway, on_link)]


# DHCP offers gateways


@pytest.mark.parametrize(
    ("nics", "takes"),
    [
        ((DHCP,), [True]),
        ((DHCP, DHCP), [True, False]),
        ((INSTANCE.nics[0], DHCP), [True, False]),
        ((DHCP, INSTANCE.nics[0]), [False, True]),
        ((DHCP, INSTANCE.nics[1], DHCP), [False, True, False]),
    ],
    ids=["one", "two", "second", "before-a-gateway", "around-a-routed-one"],
)
def test_one_default_route(nics: tuple[Nic, ...], takes: list[bool]) -> None:
    planned = plan_of(*nics)
    assert [nic.takes_gateway for nic in planned] == takes
    assert sum(bool(nic.gateway or nic.on_link or (nic.dhcp and nic.takes_gateway)) for nic in planned) == 1


# The site's files


FILES = {"ADDRESS": "203.0.113.7", "SUBNET": "lan", "NETMASK": "255.255.255.0", "GATEWAY": "203.0.113.1"}


def test_files_come_before_ganeti() -> None:
    first, second = network.plan(INSTANCE, Settings(), FILES)
    assert (first.address, first.gateway, first.address6) == ("203.0.113.7/24", "203.0.113.1", "")
    assert second == ROUTED._replace(takes_gateway6=True, takes_dns=True)


def test_files_of_ganeti_instance_image_with_dns_and_ipv6() -> None:
    more = {"DNS_SERVERS": "192.0.2.1", "DNS_DOMAIN": "example.org", "ADDRESS6": "2001:db8::7", "GATEWAY6": "fe80::1"}
    first, _ = network.plan(INSTANCE, Settings(), {**FILES, **more})
    assert (first.dns, first.search) == (("192.0.2.1",), ("example.org",))
    assert (first.address6, first.gateway6) == ("2001:db8::7/64", "fe80::1")
    first, _ = network.plan(INSTANCE, Settings(dns_servers="192.0.2.2", dns_search="example.net"), {**FILES, **more})
    assert (first.dns, first.search) == (("192.0.2.2",), ("example.net",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ADDRESS": "203.0.113.7\nup id"}, "NIC 0 (files in NETWORKS_DIR): 203.0.113.7\nup id/255.255.255.0 is not"),
        ({"NETMASK": ""}, "203.0.113.7/ is not an IPv4 address with its netmask"),
        ({"NETMASK": "255.0.255.0"}, "203.0.113.7/255.0.255.0 is not an IPv4 address with its netmask"),
        ({"GATEWAY": "2001:db8::1"}, "gateway '2001:db8::1' is not an IPv4 address"),
        ({"ADDRESS6": "fe80::1%\n; id"}, "fe80::1%\n; id/64 is not an IPv6 address with its netmask"),
        ({"DNS_SERVERS": "fe80::1%$(id)"}, "DNS server 'fe80::1%$(id)'"),
        ({"DNS_SEARCH": 'a"; id'}, "DNS_SEARCH, DNS_DOMAIN: 'a\";' is not a domain"),
    ],
)
def test_what_is_wrong_in_the_files(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(Failure, match=re.escape(message)):
        network.plan(INSTANCE, Settings(), {**FILES, **wrong})


def test_mac_that_is_none() -> None:
    with pytest.raises(Failure, match="NIC 0: 'auto' is not a MAC address"):
        plan_of(DHCP._replace(mac="auto"))


@given(st.text(), st.sampled_from([*FILES, "DNS_SERVERS", "DNS_SEARCH", "ADDRESS6", "GATEWAY6", "NETMASK6"]))
def test_nothing_of_the_files_ends_a_line(text: str, name: str) -> None:
    """Nor a quoted shell word: any value is refused, or is harmless in every file."""
    try:
        planned = network.plan(INSTANCE, Settings(), {**FILES, "ADDRESS6": "2001:db8::1", name: text})
    except Failure:
        return
    for nic in planned:
        words = [nic.address, nic.gateway, nic.address6, nic.gateway6, *nic.dns, *nic.search]
        assert all(re.fullmatch(r"[A-Za-z0-9:./_-]*", word) for word in words)


# cloud-init


def test_seed(target: Target) -> None:
    for path in ("/etc/cloud", "/usr/bin"):
        target.mkdir(path)
    assert not cloudinit.is_present(target)
    target.write("/usr/bin/cloud-init", "", mode=0o755)
    assert cloudinit.is_present(target)
    keys = [public_key("one"), public_key("two", "ssh-rsa")]
    settings = Settings(ssh_authorized_keys="\n\n".join(keys), user_data="#!/bin/sh\nid\n")
    cloudinit.write_seed(target, INSTANCE, settings, (STATIC,))
    first = json.loads(target.read(f"{cloudinit.SEED}/meta-data") or "")
    assert first["local-hostname"] == "inst1.example.org"
    assert first["public-keys"] == keys
    assert target.read(f"{cloudinit.SEED}/user-data") == "#!/bin/sh\nid\n"
    assert json.loads(target.read(f"{cloudinit.SEED}/network-config") or "")["version"] == 2
    assert "datasource_list: [NoCloud, None]" in (target.read(cloudinit.DATASOURCE) or "")
    cloudinit.write_seed(target, INSTANCE, Settings(), ())
    second = json.loads(target.read(f"{cloudinit.SEED}/meta-data") or "")
    assert second["instance-id"] != first["instance-id"]
    assert second["public-keys"] == []
    assert (target.read(f"{cloudinit.SEED}/user-data") or "").startswith("#cloud-config\n")


def test_seed_is_for_root_only(target: Target) -> None:
    """user-data contains secrets."""
    cloudinit.write_seed(target, INSTANCE, Settings(), (STATIC,))
    modes = {path.rpartition("/")[2]: target._mode(path) for path in target.glob(f"{cloudinit.SEED}/*")}
    assert modes == dict.fromkeys(("meta-data", "network-config", "user-data", "vendor-data"), 0o100600)
