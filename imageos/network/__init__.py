"""What the guest's network interfaces shall be: a plan from Ganeti's NICs, the site's files and the DNS settings. Pure.

The first NIC is static if the site's files give it an address. Else a NIC with an address in a gnt-network is static; a
routed one with an address alone has that address and finds everything else on the link (the node answers for it, proxy
ARP); all others use DHCP. IPv6: Ganeti has no addresses, so where a gnt-network has a /64 and a gateway the address is
made of the MAC (EUI-64), which is what a node can foresee; elsewhere routers advertise.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Union

from imageos import log
from imageos.errors import Failure
from imageos.ganeti import Instance, Nic
from imageos.settings import Settings

DNS_TAG = "dns:"  # a tag of a gnt-network that names a DNS server
NO_FILES: Mapping[str, str] = {}

Address = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]


@dataclass(frozen=True)
class Interface:
    """One interface of the guest. Every text is an address, a MAC or a domain: safe in any configuration file."""

    name: str  # eth0, eth1, ...: in the order of the NICs
    mac: str  # lower case
    dhcp: bool  # IPv4 by DHCP; otherwise `address`
    address: str = ""  # with its prefix: 192.0.2.10/24
    gateway: str = ""  # the default route's, on one interface only
    on_link: bool = False  # the gateway is outside the address's network; without one: the default route is the link
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    address6: str = ""  # with its prefix; otherwise router advertisements
    gateway6: str = ""
    takes_gateway: bool = True  # one that DHCP offers: not if another interface has the default route
    takes_gateway6: bool = True  # one that a router advertises: likewise


@dataclass(frozen=True)
class Route:
    """A default route."""

    version: int  # 4 or 6
    gateway: str  # none: the link itself
    on_link: bool  # the gateway is not in the address's network


def plan(instance: Instance, settings: Settings, files: Mapping[str, str] = NO_FILES) -> tuple[Interface, ...]:
    """The interfaces of `instance`; `files` is what the site's files say of the first (see network.files).

    Failure names a NIC or setting whose address is none.
    """
    planned: list[Interface] = []
    for position, nic in enumerate(instance.nics):
        routed = any(one.gateway or one.on_link for one in planned)
        routed6 = any(one.gateway6 for one in planned)
        given = _from_files(nic, files) if position == 0 and files else _from_ganeti(nic)
        planned.append(_interface(nic, given, settings, position == 0, not routed, not routed6))
    has_default = any(one.gateway or one.on_link for one in planned)
    has_default6 = any(one.gateway6 for one in planned)
    first_dhcp = next((one for one in planned if one.dhcp), None)
    return tuple(
        replace(
            one,
            takes_gateway=not one.dhcp or (one is first_dhcp and not has_default),
            takes_gateway6=bool(one.gateway6) or not has_default6,
        )
        for one in planned
    )


def routes(interface: Interface) -> list[Route]:
    """The default routes that `interface` has of its own."""
    found = []
    if interface.gateway or interface.on_link:
        found.append(Route(4, interface.gateway, interface.on_link))
    if interface.gateway6:
        gateway = ipaddress.IPv6Address(interface.gateway6)
        near = gateway.is_link_local or gateway in ipaddress.IPv6Interface(interface.address6).network
        found.append(Route(6, interface.gateway6, not near))
    return found


# --- where addresses come from ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """What is known of a NIC's addresses, as it was checked."""

    address: Address | None
    gateway: str
    address6: Address | None
    gateway6: str
    dns: Sequence[str]
    search: Sequence[str] = ()
    link: bool = False  # everything is on the link


def _from_files(nic: Nic, files: Mapping[str, str]) -> _Given:
    """Names as in ganeti-instance-image's files, and those of the settings."""
    where = f"NIC {nic.index} (files in NETWORKS_DIR)"
    address6 = files.get("ADDRESS6", "")
    return _Given(
        _address(4, where, files.get("ADDRESS", ""), files.get("NETMASK", "")),
        _gateway(4, where, files.get("GATEWAY", "")),
        _address(6, where, address6, files.get("NETMASK6", "64")) if address6 else None,
        _gateway(6, where, files.get("GATEWAY6", "")) if address6 else "",
        files.get("DNS_SERVERS", "").split(),
        (files.get("DNS_SEARCH") or files.get("DNS_DOMAIN") or "").split(),
    )


def _from_ganeti(nic: Nic) -> _Given:
    where = f"NIC {nic.index}"
    tags = [tag[len(DNS_TAG) :] for tag in nic.network.get("TAGS", "").split() if tag.startswith(DNS_TAG)]
    subnet, gateway6 = nic.network.get("SUBNET", ""), nic.network.get("GATEWAY6", "")
    address6 = _eui64(nic, nic.network.get("SUBNET6", "")) if gateway6 else None
    address, gateway, link = None, "", False
    if _is_ipv6(nic.ip):
        log.warning(f"{where}: its address {nic.ip} is not set up: only IPv4 addresses of a NIC are")
    elif nic.ip and subnet:
        address = _address(4, where, nic.ip, subnet.partition("/")[2])
        gateway = _gateway(4, where, nic.network.get("GATEWAY", ""))
    elif nic.ip and nic.mode == "routed":
        address, link = _address(4, where, nic.ip, "32"), True
    return _Given(address, gateway, address6, _gateway(6, where, gateway6) if address6 else "", tags, link=link)


def _interface(
    nic: Nic, given: _Given, settings: Settings, first: bool, may_route: bool, may_route6: bool
) -> Interface:
    gateway = given.gateway if may_route else ""
    outside = bool(gateway) and given.address is not None and ipaddress.ip_address(gateway) not in given.address.network
    search = (settings.dns_search or settings.dns_domain).split() or given.search
    return Interface(
        name=f"eth{nic.index}",
        mac=_mac(nic),
        dhcp=given.address is None,
        address=str(given.address or ""),
        gateway=gateway,
        on_link=outside or (given.link and may_route),
        dns=_dns_servers(nic, given.dns if not settings.dns_servers else settings.dns_servers.split() if first else []),
        search=_domains(search) if first else (),
        address6=str(given.address6 or ""),
        gateway6=given.gateway6 if may_route6 else "",
    )


# --- checks -----------------------------------------------------------------------------------------------


def _mac(nic: Nic) -> str:
    mac = nic.mac.lower()
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac):
        raise Failure(f"NIC {nic.index}: {nic.mac!r} is not a MAC address")
    return mac


def _address(version: int, where: str, address: str, netmask: str) -> Address:
    text = address if "/" in address else f"{address}/{netmask}"
    kind = ipaddress.IPv4Interface if version == 4 else ipaddress.IPv6Interface
    try:
        return kind(_without_scope(text))
    except ValueError:
        raise Failure(f"{where}: {text} is not an IPv{version} address with its netmask") from None


def _gateway(version: int, where: str, text: str) -> str:
    kind = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    try:
        return str(kind(_without_scope(text))) if text else ""
    except ValueError:
        raise Failure(f"{where}: gateway {text!r} is not an IPv{version} address") from None


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _without_scope(text: str) -> str:
    if "%" in text:  # behind it, Python takes anything
        raise ValueError("scope")
    return text


def _eui64(nic: Nic, subnet: str) -> Address | None:
    """The address that the MAC makes in a /64 (RFC 4291, appendix A); none in any other network."""
    try:
        network = ipaddress.IPv6Network(subnet)
    except ValueError:
        return None
    if network.prefixlen != 64:
        return None
    mac = bytes.fromhex(_mac(nic).replace(":", ""))
    identifier = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return ipaddress.IPv6Interface((network.network_address + int.from_bytes(identifier, "big"), 64))


def _dns_servers(nic: Nic, servers: Sequence[str]) -> tuple[str, ...]:
    for server in servers:
        try:
            ipaddress.ip_address(_without_scope(server))
        except ValueError:
            raise Failure(
                f"DNS server {server!r} (DNS_SERVERS, or a tag of NIC {nic.index}'s network) is not an address"
            ) from None
    return tuple(servers)


def _domains(words: Sequence[str]) -> tuple[str, ...]:
    for word in words:
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*)", word):
            raise Failure(f"DNS_SEARCH, DNS_DOMAIN: {word!r} is not a domain")
    return tuple(words)
