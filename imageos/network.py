"""What the guest's network interfaces shall be: a plan from Ganeti's NICs and the DNS settings. Pure.

A NIC with an address in a gnt-network is static; a routed one with an address alone has that address and finds
everything else on the link (the node answers for it, proxy ARP); all others use DHCP. IPv6 comes by router
advertisements, as Ganeti has no IPv6 addresses.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from imageos.errors import Failure
from imageos.ganeti import Instance, Nic
from imageos.settings import Settings

DNS_TAG = "dns:"  # a tag of a gnt-network that names a DNS server


@dataclass(frozen=True)
class Interface:
    """One interface of the guest."""

    name: str  # eth0, eth1, ...: in the order of the NICs
    mac: str  # lower case
    dhcp: bool  # IPv4 by DHCP; otherwise `address`
    address: str = ""  # with its prefix: 192.0.2.10/24
    gateway: str = ""  # the default route's, on one interface only
    on_link: bool = False  # the gateway is outside the address's network; without one: the default route is the link
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()


def plan(instance: Instance, settings: Settings) -> tuple[Interface, ...]:
    """The interfaces of `instance`; Failure names a NIC or setting whose address is none."""
    interfaces: list[Interface] = []
    for nic in instance.nics:
        has_default = any(one.gateway or one.on_link for one in interfaces)
        interfaces.append(_interface(nic, settings, first=not interfaces, may_route=not has_default))
    return tuple(interfaces)


def _interface(nic: Nic, settings: Settings, first: bool, may_route: bool) -> Interface:
    name, mac = f"eth{nic.index}", nic.mac.lower()
    search = tuple((settings.dns_search or settings.dns_domain).split()) if first else ()
    dns = _dns_servers(nic, settings.dns_servers.split() if first else [])
    subnet = nic.network.get("SUBNET", "")
    if nic.ip and subnet:
        address = _address(nic, f"{nic.ip}/{subnet.partition('/')[2]}")
        gateway = nic.network.get("GATEWAY", "") if may_route else ""
        on_link = bool(gateway) and ipaddress.ip_address(gateway) not in address.network
        return Interface(name, mac, False, str(address), gateway, on_link, dns, search)
    if nic.ip and nic.mode == "routed":
        return Interface(name, mac, False, str(_address(nic, f"{nic.ip}/32")), "", may_route, dns, search)
    return Interface(name, mac, True, dns=dns, search=search)


def _address(nic: Nic, text: str) -> ipaddress.IPv4Interface:
    try:
        return ipaddress.IPv4Interface(text)
    except ValueError:
        raise Failure(f"NIC {nic.index}: {text} is not an IPv4 address") from None


def _dns_servers(nic: Nic, given: Sequence[str]) -> tuple[str, ...]:
    """From the settings, else from the tags of the NIC's network."""
    tags = [tag[len(DNS_TAG) :] for tag in nic.network.get("TAGS", "").split() if tag.startswith(DNS_TAG)]
    servers = given or tags
    for server in servers:
        try:
            ipaddress.ip_address(server)
        except ValueError:
            raise Failure(
                f"DNS server {server!r} (DNS_SERVERS, or a tag of NIC {nic.index}'s network) is not an address"
            ) from None
    return tuple(servers)
