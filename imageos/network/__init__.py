"""Plan the guest's network interfaces from Ganeti's NICs, the site's files and the DNS settings. Pure.

The first NIC is static if the site's files give it an address; any NIC is static if it has an address in a gnt-network.
A routed NIC with an address only gets that address, and the link as default route (the node answers: proxy ARP). Other
NICs use DHCP. IPv6: Ganeti has no addresses, so in a gnt-network with a /64 and a gateway the address is made of the
MAC (EUI-64), which the node can predict; elsewhere the guest uses router advertisements.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Union

from imageos import log
from imageos.errors import Failure
from imageos.ganeti import Instance, Nic
from imageos.settings import Settings

DNS_TAG = "dns:"  # a tag of a gnt-network that names a DNS server
RESOLV_CONF = "/etc/resolv.conf"  # may be a link to a file that only a running guest has
NO_FILES: Mapping[str, str] = {}

Address = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]


class Interface(NamedTuple):
    """One interface of the guest. Every text is a checked address, MAC or domain: safe in any configuration file."""

    name: str  # eth0, eth1, ... in the order of the NICs
    mac: str  # lower case
    dhcp: bool  # IPv4 comes from DHCP; otherwise from `address`
    address: str = ""  # with its prefix: 192.0.2.10/24
    gateway: str = ""  # of the default route; only one interface has it
    on_link: bool = False  # the gateway is outside the address's network; no gateway: the link is the default route
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    address6: str = ""  # with its prefix; empty: router advertisements
    gateway6: str = ""
    takes_gateway: bool = True  # use the gateway that DHCP offers; False if another interface has the default route
    takes_gateway6: bool = True  # the same for the gateway that a router advertises
    takes_dns: bool = True  # use the DNS servers that DHCP or a router offers; False if any are set


class Route(NamedTuple):
    """A default route."""

    version: int  # 4 or 6
    gateway: str  # empty: the link itself
    on_link: bool  # the gateway is outside the address's network


def plan(instance: Instance, settings: Settings, files: Mapping[str, str] = NO_FILES) -> tuple[Interface, ...]:
    """Return the interfaces of `instance`; `files`: the site's variables for the first one (see network.files).

    Fail if an address in a NIC or setting is not valid, and name it.
    """
    planned: list[Interface] = []
    for position, nic in enumerate(instance.nics):
        routed = any(interface.gateway or interface.on_link for interface in planned)
        routed6 = any(interface.gateway6 for interface in planned)
        addresses = _from_files(nic, files) if position == 0 and files else _from_ganeti(nic)
        planned.append(_interface(nic, addresses, settings, position == 0, not routed, not routed6))
    has_default = any(interface.gateway or interface.on_link for interface in planned)
    has_default6 = any(interface.gateway6 for interface in planned)
    has_dns = any(interface.dns for interface in planned)
    first_dhcp = next((interface for interface in planned if interface.dhcp), None)
    return tuple(
        interface._replace(
            takes_gateway=not interface.dhcp or (interface is first_dhcp and not has_default),
            takes_gateway6=bool(interface.gateway6) or not has_default6,
            takes_dns=not has_dns,
        )
        for interface in planned
    )


def routes(interface: Interface) -> list[Route]:
    """Return the default routes that `interface` sets itself."""
    default = []
    if interface.gateway or interface.on_link:
        default.append(Route(4, interface.gateway, interface.on_link))
    if interface.gateway6:
        gateway = ipaddress.IPv6Address(interface.gateway6)
        is_reachable = gateway.is_link_local or gateway in ipaddress.IPv6Interface(interface.address6).network
        default.append(Route(6, interface.gateway6, not is_reachable))
    return default


# --- sources of addresses -----------------------------------------------------------------------------------


class _Addresses(NamedTuple):
    """The checked addresses of a NIC; `dns` and `search` are not checked yet."""

    address: Address | None
    gateway: str
    address6: Address | None
    gateway6: str
    dns: Sequence[str]
    search: Sequence[str] = ()
    link: bool = False  # the link is the default route


def _from_files(nic: Nic, files: Mapping[str, str]) -> _Addresses:
    """The names are those of ganeti-instance-image's files and of the settings."""
    where = f"NIC {nic.number} (files in NETWORKS_DIR)"
    address6 = files.get("ADDRESS6", "")
    return _Addresses(
        _address(4, where, files.get("ADDRESS", ""), files.get("NETMASK", "")),
        _gateway(4, where, files.get("GATEWAY", "")),
        _address(6, where, address6, files.get("NETMASK6", "64")) if address6 else None,
        _gateway(6, where, files.get("GATEWAY6", "")) if address6 else "",
        files.get("DNS_SERVERS", "").split(),
        (files.get("DNS_SEARCH") or files.get("DNS_DOMAIN") or "").split(),
    )


def _from_ganeti(nic: Nic) -> _Addresses:
    where = f"NIC {nic.number}"
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
    return _Addresses(address, gateway, address6, _gateway(6, where, gateway6) if address6 else "", tags, link=link)


def _interface(
    nic: Nic, addresses: _Addresses, settings: Settings, first: bool, may_route: bool, may_route6: bool
) -> Interface:
    address, gateway = addresses.address, addresses.gateway if may_route else ""
    outside = bool(gateway) and address is not None and ipaddress.ip_address(gateway) not in address.network
    servers = addresses.dns if not settings.dns_servers else settings.dns_servers.split() if first else []
    search = (settings.dns_search or settings.dns_domain).split() or addresses.search
    return Interface(
        name=f"eth{nic.number}",
        mac=_mac(nic),
        dhcp=address is None,
        address=str(address or ""),
        gateway=gateway,
        on_link=outside or (addresses.link and may_route),
        dns=_dns_servers(nic, servers),
        search=_domains(search) if first else (),
        address6=str(addresses.address6 or ""),
        gateway6=addresses.gateway6 if may_route6 else "",
    )


# --- checks -----------------------------------------------------------------------------------------------


def _mac(nic: Nic) -> str:
    mac = nic.mac.lower()
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac):
        raise Failure(f"NIC {nic.number}: {nic.mac!r} is not a MAC address")
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
    if "%" in text:  # Python accepts any text after it
        raise ValueError("scope")
    return text


def _eui64(nic: Nic, subnet: str) -> Address | None:
    """Return the address that the MAC gives in a /64 (RFC 4291, appendix A); None in any other network."""
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
                f"DNS server {server!r} (DNS_SERVERS, or a tag of NIC {nic.number}'s network) is not an address"
            ) from None
    return tuple(servers)


def _domains(words: Sequence[str]) -> tuple[str, ...]:
    for word in words:
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*)", word):
            raise Failure(f"DNS_SEARCH, DNS_DOMAIN: {word!r} is not a domain")
    return tuple(words)
