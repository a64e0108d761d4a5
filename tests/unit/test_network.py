"""The plan of the guest's interfaces, and how cloud-init is told."""

import dataclasses
import json

import pytest
from support import recorded

from imageos import cloudinit, ganeti, network
from imageos.errors import Failure
from imageos.network import Interface
from imageos.settings import Settings
from imageos.target import Target

INSTANCE = ganeti.instance(recorded("create-kvm-network"))
STATIC = Interface("eth0", "aa:00:00:c5:90:29", False, "198.51.100.2/24", "198.51.100.1", False, ("198.51.100.53",), ())
ROUTED = Interface("eth1", "aa:00:00:9a:16:b4", False, "192.0.2.60/32")


def test_recorded_instance() -> None:
    assert network.plan(INSTANCE, Settings()) == (STATIC, ROUTED)


def test_settings_come_before_the_tags_of_a_network() -> None:
    settings = Settings(dns_servers="192.0.2.1 2001:db8::1", dns_search="example.org example.net")
    first, second = network.plan(INSTANCE, settings)
    assert (first.dns, first.search) == (("192.0.2.1", "2001:db8::1"), ("example.org", "example.net"))
    assert (second.dns, second.search) == ((), ())


def test_only_one_default_route() -> None:
    nic = dataclasses.replace(INSTANCE.nics[0], index=1)
    instance = dataclasses.replace(INSTANCE, nics=(INSTANCE.nics[0], nic))
    assert [one.gateway for one in network.plan(instance, Settings())] == ["198.51.100.1", ""]


def test_routed_alone_has_its_default_route_on_the_link() -> None:
    instance = dataclasses.replace(INSTANCE, nics=(dataclasses.replace(INSTANCE.nics[1], index=0),))
    (only,) = network.plan(instance, Settings())
    assert (only.address, only.gateway, only.on_link) == ("192.0.2.60/32", "", True)


def test_gateway_outside_of_the_network_is_on_the_link() -> None:
    nic = dataclasses.replace(INSTANCE.nics[0], network={**INSTANCE.nics[0].network, "GATEWAY": "203.0.113.1"})
    (only,) = network.plan(dataclasses.replace(INSTANCE, nics=(nic,)), Settings())
    assert (only.gateway, only.on_link) == ("203.0.113.1", True)


@pytest.mark.parametrize(("ip", "mode"), [("", "routed"), ("", "bridged"), ("192.0.2.9", "bridged")])
def test_dhcp_where_nothing_is_known(ip: str, mode: str) -> None:
    nic = dataclasses.replace(INSTANCE.nics[1], ip=ip, mode=mode)
    (only,) = network.plan(dataclasses.replace(INSTANCE, nics=(nic,)), Settings())
    assert only.dhcp
    assert not only.address


def test_no_nics() -> None:
    assert network.plan(dataclasses.replace(INSTANCE, nics=()), Settings()) == ()


@pytest.mark.parametrize("servers", ["example.org", "192.0.2.300", "192.0.2.1,192.0.2.2"])
def test_dns_server_that_is_no_address(servers: str) -> None:
    with pytest.raises(Failure, match="is not an address"):
        network.plan(INSTANCE, Settings(dns_servers=servers))


def test_nic_whose_address_is_none() -> None:
    nic = dataclasses.replace(INSTANCE.nics[0], ip="here")
    with pytest.raises(Failure, match="NIC 0: here/24 is not an IPv4 address"):
        network.plan(dataclasses.replace(INSTANCE, nics=(nic,)), Settings())


# cloud-init


def test_network_config() -> None:
    """Version 2, as cloud-init 22.4 of Debian 12 took it."""
    config = cloudinit.version2((STATIC, ROUTED, Interface("eth2", "aa:00:00:00:00:02", True)))
    assert config == {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": "aa:00:00:c5:90:29"},
                "set-name": "eth0",
                "dhcp4": False,
                "addresses": ["198.51.100.2/24"],
                "routes": [{"to": "0.0.0.0/0", "via": "198.51.100.1"}],
                "nameservers": {"addresses": ["198.51.100.53"]},
            },
            "eth1": {
                "match": {"macaddress": "aa:00:00:9a:16:b4"},
                "set-name": "eth1",
                "dhcp4": False,
                "addresses": ["192.0.2.60/32"],
            },
            "eth2": {"match": {"macaddress": "aa:00:00:00:00:02"}, "set-name": "eth2", "dhcp4": True},
        },
    }


def test_seed(target: Target) -> None:
    for path in ("/etc/cloud", "/usr/bin"):
        target.mkdir(path)
    assert not cloudinit.present(target)
    target.write("/usr/bin/cloud-init", "", mode=0o755)
    assert cloudinit.present(target)
    settings = Settings(ssh_authorized_keys="ssh-ed25519 AAAA one\n\nssh-rsa BBBB two\n", user_data="#!/bin/sh\nid\n")
    cloudinit.write_seed(target, INSTANCE, settings, (STATIC,))
    first = json.loads(target.read(f"{cloudinit.SEED}/meta-data") or "")
    assert first["local-hostname"] == "inst1.example.org"
    assert first["public-keys"] == ["ssh-ed25519 AAAA one", "ssh-rsa BBBB two"]
    assert target.read(f"{cloudinit.SEED}/user-data") == "#!/bin/sh\nid\n"
    assert json.loads(target.read(f"{cloudinit.SEED}/network-config") or "")["version"] == 2
    assert "datasource_list: [NoCloud, None]" in (target.read(cloudinit.DATASOURCE) or "")
    cloudinit.write_seed(target, INSTANCE, Settings(), ())
    second = json.loads(target.read(f"{cloudinit.SEED}/meta-data") or "")
    assert second["instance-id"] != first["instance-id"]
    assert second["public-keys"] == []
    assert (target.read(f"{cloudinit.SEED}/user-data") or "").startswith("#cloud-config\n")


def test_seed_is_for_root_only(target: Target) -> None:
    """user-data holds secrets."""
    cloudinit.write_seed(target, INSTANCE, Settings(), (STATIC,))
    for path in target.glob(f"{cloudinit.SEED}/*"):
        assert target._mode(path) == 0o100600
