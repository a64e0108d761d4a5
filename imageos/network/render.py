"""The plan as the files of each program that may rule a guest's network: {path: text}. Pure.

Formats: interfaces(5); netplan's reference; systemd.network(5); NetworkManager's nm-settings-keyfile(5);
/usr/share/doc/initscripts/sysconfig.txt of Red Hat; ifcfg(5) and routes(5) of SUSE; netifrc's net.example; udev(7).
"""

from __future__ import annotations

import ipaddress
import json
import uuid
from collections.abc import Sequence
from typing import Any

from imageos.network import Interface, Route, routes

Files = dict[str, str]
Interfaces = Sequence[Interface]

HEADER = "# Written by imageos when the instance was made.\n"
DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}
DHCPCD_SECTIONS = "# imageos: what this instance needs, to the end of the file"
KEYFILES = "/etc/NetworkManager/system-connections"
IFCFG = "/etc/sysconfig/network-scripts"
IFCFG_SUSE = "/etc/sysconfig/network"


def version2(interfaces: Interfaces) -> dict[str, Any]:
    """netplan's and cloud-init's network configuration, version 2."""
    return {"version": 2, "ethernets": {one.name: _ethernet(one) for one in interfaces}}


def _ethernet(interface: Interface) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "match": {"macaddress": interface.mac},
        "set-name": interface.name,
        "dhcp4": interface.dhcp,
    }
    if not interface.takes_gateway:
        entry["dhcp4-overrides"] = {"use-routes": False}
    addresses = [one for one in (interface.address, interface.address6) if one]
    if addresses:
        entry["addresses"] = addresses
    if interface.address6 or not interface.takes_gateway6:
        entry["accept-ra"] = False
    found = [_route2(route) for route in routes(interface)]
    if found:
        entry["routes"] = found
    nameservers = {
        name: list(values) for name, values in (("addresses", interface.dns), ("search", interface.search)) if values
    }
    if nameservers:
        entry["nameservers"] = nameservers
    return entry


def _route2(route: Route) -> dict[str, Any]:
    if not route.gateway:
        return {"to": DEFAULT[route.version], "scope": "link"}
    found: dict[str, Any] = {"to": DEFAULT[route.version], "via": route.gateway}
    return {**found, "on-link": True} if route.on_link else found


def netplan(interfaces: Interfaces, renderer: str = "") -> Files:
    """JSON, which is YAML. `renderer` is what the image had chosen."""
    config = version2(interfaces)
    if renderer:
        config["renderer"] = renderer
    return {"/etc/netplan/10-imageos.yaml": HEADER + json.dumps({"network": config}, indent=2) + "\n"}


def networkd(interfaces: Interfaces) -> Files:
    return {f"/etc/systemd/network/00-imageos-{one.name}.network": HEADER + _network(one) for one in interfaces}


def _network(interface: Interface) -> str:
    addresses = [one for one in (interface.address, interface.address6) if one]
    lines = [
        # Type: a VLAN or bridge that a guest makes of it has the same MAC
        *("[Match]", f"MACAddress={interface.mac}", "Type=ether", "", "[Network]"),
        *(["DHCP=ipv4"] if interface.dhcp else []),
        *(f"Address={address}" for address in addresses),
        *(["IPv6AcceptRA=no"] if interface.address6 else []),
        *(f"DNS={server}" for server in interface.dns),
        *([f"Domains={' '.join(interface.search)}"] if interface.search else []),
    ]
    for route in routes(interface):
        lines += ["", "[Route]"]
        if route.gateway:
            lines += [f"Gateway={route.gateway}", *(["GatewayOnLink=yes"] if route.on_link else [])]
        else:
            lines += [f"Destination={DEFAULT[route.version]}", "Scope=link"]
    if not interface.takes_gateway:
        lines += ["", "[DHCPv4]", "UseRoutes=no"]
    if not interface.takes_gateway6 and not interface.address6:
        lines += ["", "[IPv6AcceptRA]", "UseGateway=no"]
    return "\n".join(lines) + "\n"


def keyfiles(interfaces: Interfaces) -> Files:
    return {f"{KEYFILES}/{one.name}.nmconnection": HEADER + _keyfile(one) for one in interfaces}


def _keyfile(interface: Interface) -> str:
    found = {route.version: route for route in routes(interface)}
    takes = {4: interface.takes_gateway, 6: interface.takes_gateway6}
    lines = [
        *("[connection]", f"id={interface.name}", f"uuid={uuid.uuid5(uuid.NAMESPACE_OID, interface.mac)}"),
        *("type=ethernet", "", "[ethernet]", f"mac-address={interface.mac.upper()}", ""),
    ]
    for version, address in ((4, interface.address), (6, interface.address6)):
        route = found.get(version)
        gateway = f",{route.gateway}" if route and route.gateway else ""
        servers = [one for one in interface.dns if ipaddress.ip_address(one).version == version]
        lines += [
            f"[ipv{version}]",
            f"method={'manual' if address else 'auto'}",
            *([f"address1={address}{gateway}"] if address else []),
            *([f"route1={DEFAULT[version]}"] if route and not route.gateway else []),
            *(["never-default=true"] if not takes[version] else []),
            *([f"dns={';'.join(servers)};"] if servers else []),
            *([f"dns-search={';'.join(interface.search)};"] if interface.search and version == 4 else []),
            "",
        ]
    return "\n".join(lines[:-1]) + "\n"


def interfaces_file(interfaces: Interfaces, dns: bool = False, sources: Sequence[str] = ()) -> Files:
    """ifupdown of Debian, ifupdown-ng and busybox of Alpine. With `dns`, resolvconf or resolved is told.

    `sources`: the image's own lines that take in what is added to the system later.
    """
    stanzas = ["auto lo\niface lo inet loopback", *(_stanzas(one, dns) for one in interfaces)]
    if sources:
        stanzas.append("\n".join(["# What is added to the system later.", *sources]))
    return {"/etc/network/interfaces": HEADER + "\n\n".join(stanzas) + "\n"}


def _stanzas(interface: Interface, dns: bool) -> str:
    found = {route.version: route for route in routes(interface)}
    lines = [f"auto {interface.name}"]
    for version, family, address in ((4, "inet", interface.address), (6, "inet6", interface.address6)):
        if address:
            own = ipaddress.ip_interface(address)
            mask = own.netmask if version == 4 else own.network.prefixlen
            lines += [f"iface {interface.name} {family} static", f"    address {own.ip}", f"    netmask {mask}"]
            lines += _ifupdown_routes(found[version]) if version in found else []
            lines += ["    accept_ra 0"] if version == 6 else []
        elif version == 4:
            lines += [f"iface {interface.name} inet dhcp"]
        if version == 4 and not interface.takes_gateway6:
            lines += ["    pre-up echo 0 > /proc/sys/net/ipv6/conf/$IFACE/accept_ra_defrtr || true"]
        if version == 4 and dns:
            lines += [f"    dns-nameservers {' '.join(interface.dns)}"] if interface.dns else []
            lines += [f"    dns-search {' '.join(interface.search)}"] if interface.search else []
    return "\n".join(lines)


def _ifupdown_routes(route: Route) -> list[str]:
    """ip(8) of busybox, too, understands these."""
    add = f"    up ip -{route.version} route add"
    if not route.gateway:
        return [f"{add} default dev $IFACE"]
    if not route.on_link:
        return [f"    gateway {route.gateway}"]
    return [f"{add} {route.gateway} dev $IFACE", f"{add} default via {route.gateway} dev $IFACE"]


def dhclient_hook(keep_dns: bool, no_gateway: Sequence[str]) -> str:
    """dhclient-script(8) sources it."""
    lines = ["make_resolv_conf() { :; }"] if keep_dns else []
    lines += [f'case "$interface" in {"|".join(no_gateway)}) unset new_routers ;; esac'] if no_gateway else []
    return HEADER + "\n".join(lines) + "\n"


def dhcpcd_conf(text: str, names: Sequence[str], keep_dns: bool, no_gateway: Sequence[str]) -> str:
    """dhcpcd.conf(5) `text`, with sections at its end for the interfaces `names`, in the place of earlier ones."""
    sections = []
    for name in names:
        lines = [*(["nohook resolv.conf"] if keep_dns else []), *(["nogateway"] if name in no_gateway else [])]
        sections += [f"interface {name}", *lines] if lines else []
    own = text.partition(DHCPCD_SECTIONS)[0].splitlines()
    return "".join(f"{line}\n" for line in [*own, *([DHCPCD_SECTIONS, *sections] if sections else [])])


def udhcpc_conf(keep_dns: bool, no_gateway: Sequence[str]) -> str:
    """Read by Alpine's default.script."""
    variables = {"RESOLV_CONF": "no"} if keep_dns else {}
    return HEADER + _assignments({**variables, "NO_GATEWAY": " ".join(no_gateway)})


def ifcfg(interfaces: Interfaces) -> Files:
    """Red Hat up to 8: read by the network scripts as well as by NetworkManager."""
    files = {}
    for one in interfaces:
        variables = {
            **{"DEVICE": one.name, "HWADDR": one.mac.upper(), "TYPE": "Ethernet", "ONBOOT": "yes"},
            "BOOTPROTO": "dhcp" if one.dhcp else "none",
        }
        if not one.takes_gateway:
            variables["DEFROUTE"] = "no"
        if one.address:
            own = ipaddress.IPv4Interface(one.address)
            variables.update(IPADDR=str(own.ip), PREFIX=str(own.network.prefixlen), NETMASK=str(own.netmask))
        variables["IPV6INIT"] = "yes"
        if not one.takes_gateway6:
            variables["IPV6_DEFROUTE"] = "no"
        if one.address6:
            variables.update(IPV6_AUTOCONF="no", IPV6ADDR=one.address6)
        for route in routes(one):
            if route.gateway and not route.on_link:
                scope = f"%{one.name}" if ipaddress.ip_address(route.gateway).is_link_local else ""
                variables["GATEWAY" if route.version == 4 else "IPV6_DEFAULTGW"] = route.gateway + scope
            else:
                name = "route" if route.version == 4 else "route6"
                files[f"{IFCFG}/{name}-{one.name}"] = "\n".join(_ip_routes(route, one.name)) + "\n"
        variables.update({f"DNS{number}": server for number, server in enumerate(one.dns, 1)})
        if one.search:
            variables["DOMAIN"] = " ".join(one.search)
        files[f"{IFCFG}/ifcfg-{one.name}"] = HEADER + _assignments(variables)
    return files


def _ip_routes(route: Route, name: str) -> list[str]:
    """Arguments of `ip route add`; the way to a gateway that is outside the address's network comes first."""
    if not route.gateway:
        return [f"default dev {name}"]
    host = f"{route.gateway}/{32 if route.version == 4 else 128}"
    return [f"{host} dev {name}", f"default via {route.gateway} dev {name}"]


def wicked(interfaces: Interfaces) -> Files:
    files = {}
    for one in interfaces:
        variables = {"STARTMODE": "auto", "BOOTPROTO": "dhcp4" if one.dhcp else "static"}
        if not one.takes_gateway:
            variables["DHCLIENT_SET_DEFAULT_ROUTE"] = "no"
        if one.address:
            variables["IPADDR"] = one.address
        if one.address6:
            variables["IPADDR_6"] = one.address6
        files[f"{IFCFG_SUSE}/ifcfg-{one.name}"] = HEADER + _assignments(variables)
        lines = [line for route in routes(one) for line in _suse_routes(route, one.name)]
        if lines:
            files[f"{IFCFG_SUSE}/ifroute-{one.name}"] = "\n".join(lines) + "\n"
    return files


def _suse_routes(route: Route, name: str) -> list[str]:
    """Destination, gateway, netmask, interface."""
    if not route.gateway:
        return [f"{DEFAULT[route.version]} - - {name}"]
    host = f"{route.gateway}/{32 if route.version == 4 else 128} - - {name}"
    return [*([host] if route.on_link else []), f"default {route.gateway} - {name}"]


def wicked_dns(interfaces: Interfaces) -> dict[str, str]:
    """Variables of /etc/sysconfig/network/config, from which netconfig makes resolv.conf."""
    servers, search = dns(interfaces)
    variables = {"NETCONFIG_DNS_STATIC_SERVERS": servers, "NETCONFIG_DNS_STATIC_SEARCHLIST": search}
    return {name: " ".join(words) for name, words in variables.items()}


def netifrc(interfaces: Interfaces) -> Files:
    variables = {}
    for one in interfaces:
        addresses = [address for address in (one.address or "dhcp", one.address6) if address]
        variables[f"config_{one.name}"] = "\n".join(addresses)
        lines = [line for route in routes(one) for line in _netifrc_routes(route)]
        if lines:
            variables[f"routes_{one.name}"] = "\n".join(lines)
        if not one.takes_gateway:
            variables[f"dhcp_{one.name}"] = "nogateway"
        if one.dns:
            variables[f"dns_servers_{one.name}"] = " ".join(one.dns)
        if one.search:
            variables[f"dns_search_{one.name}"] = " ".join(one.search)
    return {"/etc/conf.d/net": HEADER + _assignments(variables)}


def _netifrc_routes(route: Route) -> list[str]:
    """netifrc adds the interface to each, and takes the third of three words for a gateway."""
    if not route.gateway:
        return ["default"]
    host = f"{route.gateway}/{32 if route.version == 4 else 128}"
    return [*([host] if route.on_link else []), f"default via {route.gateway}"]


def udev_rules(interfaces: Interfaces) -> Files:
    """Names by MAC, for what cannot match a MAC. Every udev knows these, and renames what an initrd has named."""
    # DRIVERS: a VLAN or bridge that a guest makes of it has the same MAC, but no driver
    rule = 'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{mac}", NAME="{name}"'
    lines = [rule.format(mac=one.mac, name=one.name) for one in interfaces]
    return {"/etc/udev/rules.d/70-imageos-net.rules": HEADER + "\n".join(lines) + "\n"}


def resolv_conf(interfaces: Interfaces) -> str:
    servers, search = dns(interfaces)
    lines = [*([f"search {' '.join(search)}"] if search else []), *(f"nameserver {server}" for server in servers)]
    return "".join(line + "\n" for line in lines)


def resolved_conf(interfaces: Interfaces) -> str:
    servers, search = dns(interfaces)
    return f"{HEADER}[Resolve]\nDNS={' '.join(servers)}\nDomains={' '.join(search)}\n"


def dns(interfaces: Interfaces) -> tuple[list[str], list[str]]:
    """The servers and the search list of all interfaces, each once."""
    servers = dict.fromkeys(server for one in interfaces for server in one.dns)
    search = dict.fromkeys(domain for one in interfaces for domain in one.search)
    return list(servers), list(search)


def _assignments(variables: dict[str, str]) -> str:
    """Shell; no value has a quote in it (see Interface)."""
    return "".join(f'{name}="{value}"\n' for name, value in variables.items())
