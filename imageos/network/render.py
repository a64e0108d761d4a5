"""Render the plan as configuration files, {path: text}, of each program that may configure the network. Pure.

Formats: interfaces(5); netplan's reference; systemd.network(5); NetworkManager's nm-settings-keyfile(5);
/usr/share/doc/initscripts/sysconfig.txt of Red Hat; ifcfg(5) and routes(5) of SUSE; netifrc's net.example; udev(7).
"""

from __future__ import annotations

import ipaddress
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from imageos.network import Interface, Route, routes

Files = dict[str, str]
Interfaces = Sequence[Interface]

HEADER = "# Written by imageos when the instance was made.\n"
DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}
DHCPCD_SECTIONS = "# imageos: what this instance needs, to the end of the file"
NETWORKD_WAITS = "/etc/systemd/system/systemd-networkd-wait-online.service.d"
NETWORKD_WAIT = f"{NETWORKD_WAITS}/zz-imageos.conf"
NETWORK_MANAGER_CONF = "/etc/NetworkManager/conf.d/zz-imageos.conf"
DHCPCD_TO_FILE = "env resolvconf=none"  # its hook writes resolv.conf itself where that program is not found
DHCPCD_DENIED = "# imageos: another program rules these"
DHCPCD_DENY = "denyinterfaces eth* en*"
CONNMAN_BLACKLIST = "vmnet,vboxnet,virbr,ifb,ve-,vb-,ham,veth"  # its default
# A gateway for programs that must have one: the node answers ARP for any address that it has a route to (proxy ARP).
LINK_GATEWAY = "169.254.1.1"
# netplan's use-dns is for networkd only: what NetworkManager understands goes through it as it is
WITHOUT_OFFERED_DNS = {
    "networkmanager": {"passthrough": {"ipv4.ignore-auto-dns": "true", "ipv6.ignore-auto-dns": "true"}}
}
GLOBAL_DNS = "global-dns-domain-*"
KEYFILES = "/etc/NetworkManager/system-connections"
IFCFG = "/etc/sysconfig/network-scripts"
IFCFG_SUSE = "/etc/sysconfig/network"


def version2(interfaces: Interfaces, renderer: str = "") -> dict[str, Any]:
    """Return netplan's and cloud-init's network configuration, version 2. `renderer`: for whom netplan writes."""
    ethernets = {interface.name: _ethernet(interface) for interface in interfaces}
    if renderer == "NetworkManager":
        for interface in interfaces:
            ethernets[interface.name].update(_router_advertisements(interface))
    return {"version": 2, "ethernets": ethernets}


def _ethernet(interface: Interface) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "match": {"macaddress": interface.mac},
        "set-name": interface.name,
        "dhcp4": interface.dhcp,
    }
    overrides = {
        **({} if interface.takes_gateway else {"use-routes": False}),
        **({} if interface.takes_dns else {"use-dns": False}),
    }
    if overrides and interface.dhcp:
        entry["dhcp4-overrides"] = overrides
    addresses = [address for address in (interface.address, interface.address6) if address]
    if addresses:
        entry["addresses"] = addresses
    if interface.address6 or not interface.takes_gateway6:
        entry["accept-ra"] = False
    entries = [_route2(route) for route in routes(interface)]
    if entries:
        entry["routes"] = entries
    nameservers = {
        name: list(values) for name, values in (("addresses", interface.dns), ("search", interface.search)) if values
    }
    if nameservers:
        entry["nameservers"] = nameservers
    return entry


def _route2(route: Route) -> dict[str, Any]:
    if not route.gateway:
        return {"to": DEFAULT[route.version], "scope": "link"}
    entry: dict[str, Any] = {"to": DEFAULT[route.version], "via": route.gateway}
    return {**entry, "on-link": True} if route.on_link else entry


def netplan(interfaces: Interfaces, renderer: str = "") -> Files:
    """Write JSON, which is also YAML. `renderer` is the image's choice; empty: netplan's default."""
    config = version2(interfaces, renderer)
    if renderer == "NetworkManager":  # not by way of cloud-init, which takes it for a mistake since 25.1
        for interface in interfaces:
            config["ethernets"][interface.name].update({} if interface.takes_dns else WITHOUT_OFFERED_DNS)
    if renderer:
        config["renderer"] = renderer
    return {"/etc/netplan/10-imageos.yaml": HEADER + json.dumps({"network": config}, indent=2) + "\n"}


def _router_advertisements(interface: Interface) -> dict[str, Any]:
    """Return what lets NetworkManager heed these: otherwise netplan gives it a profile whose IPv6 is ignored, and it
    refuses such a profile if that has a DNS server with an IPv6 address."""
    if interface.address6:
        return {}
    return {"dhcp6": True, **({} if interface.takes_gateway6 else {"dhcp6-overrides": {"use-routes": False}})}


def networkd(interfaces: Interfaces) -> Files:
    return {
        f"/etc/systemd/network/00-imageos-{interface.name}.network": HEADER + _network(interface)
        for interface in interfaces
    }


def _network(interface: Interface) -> str:
    addresses = [address for address in (interface.address, interface.address6) if address]
    lines = [
        # Type=: the guest's VLAN or bridge on this NIC has the same MAC
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
    gateway = ["UseRoutes=no"] if not interface.takes_gateway else []
    gateway6 = ["UseGateway=no"] if not interface.takes_gateway6 else []
    dns = ["UseDNS=no"] if not interface.takes_dns else []
    if interface.dhcp and (gateway or dns):
        lines += ["", "[DHCPv4]", *gateway, *dns]
    if not interface.address6 and (gateway6 or dns):
        lines += ["", "[IPv6AcceptRA]", *gateway6, *dns]
    return "\n".join(lines) + "\n"


def networkd_unmanaged(interfaces: Interfaces) -> Files:
    """Have networkd leave the interfaces to another program, and wait for none."""
    unmanaged = "[Match]\nMACAddress={}\nType=ether\n\n[Link]\nUnmanaged=yes\n"
    return {
        # it would wait two minutes for a link that it manages
        NETWORKD_WAIT: HEADER + "[Service]\nExecStart=\nExecStart=/bin/true\n",
        **{
            f"/etc/systemd/network/00-imageos-{interface.name}.network": HEADER + unmanaged.format(interface.mac)
            for interface in interfaces
        },
    }


def network_manager_devices(interfaces: Interfaces, prefix: str = "") -> str:
    """Return a list of devices for NetworkManager.conf(5); the prefix `except:` makes them exceptions."""
    matches = (m for interface in interfaces for m in (f"mac:{interface.mac}", f"interface-name:{interface.name}"))
    return ";".join(f"{prefix}{match}" for match in matches)


def network_manager_conf(sections: Mapping[str, Sequence[str]]) -> Files:
    """Return a file of NetworkManager.conf(5), which is empty if the sections have no lines."""
    texts = ["\n".join([f"[{name}]", *lines, ""]) for name, lines in sections.items() if lines]
    return {NETWORK_MANAGER_CONF: HEADER + "\n".join(texts) if texts else ""}


def keyfiles(interfaces: Interfaces) -> Files:
    return {f"{KEYFILES}/{interface.name}.nmconnection": HEADER + _keyfile(interface) for interface in interfaces}


def _keyfile(interface: Interface) -> str:
    by_version = {route.version: route for route in routes(interface)}
    takes_gateway = {4: interface.takes_gateway, 6: interface.takes_gateway6}
    lines = [
        *("[connection]", f"id={interface.name}", f"uuid={uuid.uuid5(uuid.NAMESPACE_OID, interface.mac)}"),
        *("type=ethernet", "", "[ethernet]", f"mac-address={interface.mac.upper()}", ""),
    ]
    for version, address in ((4, interface.address), (6, interface.address6)):
        route = by_version.get(version)
        gateway = f",{route.gateway}" if route and route.gateway else ""
        servers = [server for server in interface.dns if ipaddress.ip_address(server).version == version]
        lines += [
            f"[ipv{version}]",
            f"method={'manual' if address else 'auto'}",
            *([f"address1={address}{gateway}"] if address else []),
            *([f"route1={DEFAULT[version]}"] if route and not route.gateway else []),
            *(["never-default=true"] if not takes_gateway[version] else []),
            *(["ignore-auto-dns=true"] if not interface.takes_dns and not address else []),
            *([f"dns={';'.join(servers)};"] if servers else []),
            *([f"dns-search={';'.join(interface.search)};"] if interface.search and version == 4 else []),
            "",
        ]
    return "\n".join(lines[:-1]) + "\n"


def interfaces_file(interfaces: Interfaces, dns: bool = False, sources: Sequence[str] = ()) -> Files:
    """For Debian's ifupdown and Alpine's ifupdown-ng and busybox. With `dns`, add options for resolvconf or resolved.

    `sources`: the image's own lines that include interfaces.d, where packages and the administrator may add files.
    """
    stanzas = ["auto lo\niface lo inet loopback", *(_stanzas(interface, dns) for interface in interfaces)]
    if sources:
        stanzas.append("\n".join(["# What is added to the system later.", *sources]))
    return {"/etc/network/interfaces": HEADER + "\n\n".join(stanzas) + "\n"}


def _stanzas(interface: Interface, dns: bool) -> str:
    by_version = {route.version: route for route in routes(interface)}
    lines = [f"auto {interface.name}"]
    for version, family, address in ((4, "inet", interface.address), (6, "inet6", interface.address6)):
        if address:
            static = ipaddress.ip_interface(address)
            mask = static.netmask if version == 4 else static.network.prefixlen
            lines += [f"iface {interface.name} {family} static", f"    address {static.ip}", f"    netmask {mask}"]
            lines += _ifupdown_routes(by_version[version]) if version in by_version else []
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
    """Use only what busybox's ip(8) understands, too."""
    add = f"    up ip -{route.version} route add"
    if not route.gateway:
        return [f"{add} default dev $IFACE"]
    if not route.on_link:
        return [f"    gateway {route.gateway}"]
    return [f"{add} {route.gateway} dev $IFACE", f"{add} default via {route.gateway} dev $IFACE"]


def dhclient_hook(keep_dns: bool, no_gateway: Sequence[str]) -> str:
    """Return a hook that dhclient-script(8) sources."""
    lines = ["make_resolv_conf() { :; }"] if keep_dns else []
    lines += [f'case "$interface" in {"|".join(no_gateway)}) unset new_routers ;; esac'] if no_gateway else []
    return HEADER + "\n".join(lines) + "\n"


def dhcpcd_client(names: Sequence[str], keep_dns: bool, no_gateway: Sequence[str], to_file: bool = False) -> list[str]:
    """Return the sections of dhcpcd.conf(5) for the interfaces `names`, for which ifupdown starts it.

    `to_file`: it writes resolv.conf itself even if there is a resolvconf.
    """
    sections = []
    for name in names:
        lines = ["nohook resolv.conf"] if keep_dns else [DHCPCD_TO_FILE] if to_file else []
        lines += ["nogateway"] if name in no_gateway else []
        sections += [f"interface {name}", *lines] if lines else []
    return sections


def dhcpcd(interfaces: Interfaces, to_file: bool = False) -> list[str]:
    """Return the sections for a dhcpcd that rules the network; its hook sets the routes that it cannot."""
    servers, search = dns(interfaces)
    sections = []
    for interface in interfaces:
        sections += [f"interface {interface.name}", *([DHCPCD_TO_FILE] if to_file else [])]
        sections += [f"static ip_address={interface.address}"] if interface.address else ["ipv4"]
        sections += [f"static ip6_address={interface.address6}", "noipv6rs"] if interface.address6 else []
        sections += [] if interface.takes_gateway or not interface.dhcp else ["nogateway"]
        sections += [f"static routers={interface.gateway}"] if interface.gateway and not interface.on_link else []
        sections += [f"static domain_name_servers={' '.join(servers)}"] if servers else []
        sections += [f"static domain_search={' '.join(search)}"] if search else []
    return sections


def dhcpcd_hook(interfaces: Interfaces) -> str:
    """Return a script that dhcpcd-run-hooks(8) sources; it must not end that."""
    lines = []
    for interface in interfaces:
        commands = []
        for route in routes(interface):
            if route.version == 6 or route.on_link:
                commands += [f"ip -{route.version} route replace {words}" for words in _ip_routes_of(route, interface)]
        if commands:
            lines += [f'case "$interface $if_up" in "{interface.name} true")', *(f"  {one} || :" for one in commands)]
            lines += ["  ;;", "esac"]
    return HEADER + "".join(f"{line}\n" for line in lines) if lines else ""


def _ip_routes_of(route: Route, interface: Interface) -> list[str]:
    plain = [f"default via {route.gateway} dev {interface.name}"]
    return _ip_routes(route, interface.name) if route.on_link or not route.gateway else plain


def dhcpcd_conf(text: str, sections: Sequence[str], deny: bool = False) -> str:
    """Return dhcpcd.conf(5) `text` with our sections at its end, instead of earlier ones.

    With `deny`, dhcpcd leaves every ethernet interface alone; it knows them by name only.
    """
    others = text.partition(DHCPCD_SECTIONS)[0].splitlines()
    others = [line for line in others if line not in (DHCPCD_DENIED, DHCPCD_DENY)]
    denied = [DHCPCD_DENIED, DHCPCD_DENY] if deny else []
    return "".join(f"{line}\n" for line in [*denied, *others, *([DHCPCD_SECTIONS, *sections] if sections else [])])


def connman(interfaces: Interfaces) -> Files:
    """Return a file of connman-service.config(5)."""
    servers, search = dns(interfaces)
    sections = []
    for interface in interfaces:
        lines = [f"[service_imageos_{interface.name}]", "Type=ethernet", f"MAC={interface.mac}"]
        ipv4 = ipaddress.IPv4Interface(interface.address) if interface.address else None
        gateway = interface.gateway or (LINK_GATEWAY if interface.on_link else "")
        lines += [f"IPv4={'/'.join(filter(None, [str(ipv4.ip), str(ipv4.netmask), gateway]))}" if ipv4 else "IPv4=dhcp"]
        address6 = "/".join(filter(None, [interface.address6, interface.gateway6]))
        lines += [f"IPv6={address6 or 'auto'}"]
        lines += [f"Nameservers={','.join(servers)}"] if servers else []
        lines += [f"SearchDomains={','.join(search)}"] if search else []
        sections.append("\n".join(lines) + "\n")
    return {"/var/lib/connman/imageos.config": HEADER + "\n".join(sections)}


def connman_main(text: str, denied: bool) -> str:
    """Return connman.conf(5) `text` with every ethernet interface in its black list, or not."""
    key, section = "NetworkInterfaceBlacklist", "[General]"
    lines = text.splitlines()
    old = [line for line in lines if line.partition("=")[0].strip() == key]
    words = old[-1].partition("=")[2].split(",") if old else CONNMAN_BLACKLIST.split(",")
    kept = [word.strip() for word in words if word.strip() not in ("", "eth", "en")]
    if not denied and (not old or len(kept) == len(words)):
        return text
    lines = [line for line in lines if line not in old]
    if section not in [line.strip() for line in lines]:
        lines.append(section)
    number = [line.strip() for line in lines].index(section) + 1
    lines.insert(number, f"{key}={','.join([*kept, *(['eth', 'en'] if denied else [])])}")
    return "".join(f"{line}\n" for line in lines)


def udhcpc_conf(keep_dns: bool, no_gateway: Sequence[str]) -> str:
    """Return a file that Alpine's default.script reads."""
    variables = {"RESOLV_CONF": "no"} if keep_dns else {}
    return HEADER + _assignments({**variables, "NO_GATEWAY": " ".join(no_gateway)})


def ifcfg(interfaces: Interfaces) -> Files:
    """For Red Hat up to 8, whose network scripts and NetworkManager both read these files."""
    files = {}
    for interface in interfaces:
        variables = {
            **{"DEVICE": interface.name, "HWADDR": interface.mac.upper(), "TYPE": "Ethernet", "ONBOOT": "yes"},
            "BOOTPROTO": "dhcp" if interface.dhcp else "none",
        }
        if not interface.takes_gateway:
            variables["DEFROUTE"] = "no"
        if interface.address:
            ipv4 = ipaddress.IPv4Interface(interface.address)
            variables.update(IPADDR=str(ipv4.ip), PREFIX=str(ipv4.network.prefixlen), NETMASK=str(ipv4.netmask))
        variables["IPV6INIT"] = "yes"
        if not interface.takes_gateway6:
            variables["IPV6_DEFROUTE"] = "no"
        if interface.address6:
            variables.update(IPV6_AUTOCONF="no", IPV6ADDR=interface.address6)
        for route in routes(interface):
            if route.gateway and not route.on_link:
                scope = f"%{interface.name}" if ipaddress.ip_address(route.gateway).is_link_local else ""
                variables["GATEWAY" if route.version == 4 else "IPV6_DEFAULTGW"] = route.gateway + scope
            else:
                name = "route" if route.version == 4 else "route6"
                files[f"{IFCFG}/{name}-{interface.name}"] = "\n".join(_ip_routes(route, interface.name)) + "\n"
        variables.update({f"DNS{number}": server for number, server in enumerate(interface.dns, 1)})
        if interface.dhcp and not interface.takes_dns:
            variables["PEERDNS"] = "no"
        if interface.search:
            variables["DOMAIN"] = " ".join(interface.search)
        files[f"{IFCFG}/ifcfg-{interface.name}"] = HEADER + _assignments(variables)
    return files


def _ip_routes(route: Route, name: str) -> list[str]:
    """Return arguments of `ip route add`. A gateway outside the address's network needs a route to itself first."""
    if not route.gateway:
        return [f"default dev {name}"]
    host = f"{route.gateway}/{32 if route.version == 4 else 128}"
    return [f"{host} dev {name}", f"default via {route.gateway} dev {name}"]


def wicked(interfaces: Interfaces) -> Files:
    files = {}
    for interface in interfaces:
        variables = {"STARTMODE": "auto", "BOOTPROTO": "dhcp4" if interface.dhcp else "static"}
        if not interface.takes_gateway:
            variables["DHCLIENT_SET_DEFAULT_ROUTE"] = "no"
        if interface.address:
            variables["IPADDR"] = interface.address
        if interface.address6:
            variables["IPADDR_6"] = interface.address6
        files[f"{IFCFG_SUSE}/ifcfg-{interface.name}"] = HEADER + _assignments(variables)
        lines = [line for route in routes(interface) for line in _suse_routes(route, interface.name)]
        if lines:
            files[f"{IFCFG_SUSE}/ifroute-{interface.name}"] = "\n".join(lines) + "\n"
    return files


def _suse_routes(route: Route, name: str) -> list[str]:
    """Return lines of destination, gateway, netmask and interface."""
    if not route.gateway:
        return [f"{DEFAULT[route.version]} - - {name}"]
    host = f"{route.gateway}/{32 if route.version == 4 else 128} - - {name}"
    return [*([host] if route.on_link else []), f"default {route.gateway} - {name}"]


def wicked_dns(interfaces: Interfaces) -> dict[str, str]:
    """Return variables of /etc/sysconfig/network/config, from which netconfig makes resolv.conf.

    Its policy: `auto` appends the servers of DHCP and routers to ours, an empty one leaves the file alone.
    """
    servers, search = dns(interfaces)
    variables = {
        "NETCONFIG_DNS_POLICY": ["STATIC" if servers else "auto"],
        "NETCONFIG_DNS_STATIC_SERVERS": servers,
        "NETCONFIG_DNS_STATIC_SEARCHLIST": search,
    }
    return {name: " ".join(words) for name, words in variables.items()}


def netifrc(interfaces: Interfaces) -> Files:
    variables = {}
    for interface in interfaces:
        addresses = [address for address in (interface.address or "dhcp", interface.address6) if address]
        variables[f"config_{interface.name}"] = "\n".join(addresses)
        lines = [line for route in routes(interface) for line in _netifrc_routes(route)]
        if lines:
            variables[f"routes_{interface.name}"] = "\n".join(lines)
        options = [
            *(["nogateway"] if not interface.takes_gateway else []),
            *(["nodns"] if not interface.takes_dns else []),
        ]
        if interface.dhcp and options:
            variables[f"dhcp_{interface.name}"] = " ".join(options)
        if interface.dns:
            variables[f"dns_servers_{interface.name}"] = " ".join(interface.dns)
        if interface.search:
            variables[f"dns_search_{interface.name}"] = " ".join(interface.search)
    return {"/etc/conf.d/net": HEADER + _assignments(variables)}


def _netifrc_routes(route: Route) -> list[str]:
    """netifrc appends the interface to each line, and takes the third of three words for a gateway."""
    if not route.gateway:
        return ["default"]
    host = f"{route.gateway}/{32 if route.version == 4 else 128}"
    return [*([host] if route.on_link else []), f"default via {route.gateway}"]


def udev_rules(interfaces: Interfaces) -> Files:
    """Return rules that name interfaces by MAC. Every udev knows them, and renames what an initrd has named."""
    # DRIVERS: the guest's VLAN or bridge on this NIC has the same MAC, but no driver
    rule = 'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{mac}", NAME="{name}"'
    lines = [rule.format(mac=interface.mac, name=interface.name) for interface in interfaces]
    return {"/etc/udev/rules.d/70-imageos-net.rules": HEADER + "\n".join(lines) + "\n"}


def sysctl(interfaces: Interfaces) -> Files:
    """Return settings for programs that know interfaces by name: they leave to the kernel what the others set.

    An image may have switched IPv6 off for all; a router may advertise itself beside the gateway that is set.
    """
    lines = []
    for interface in interfaces:
        key = f"net.ipv6.conf.{interface.name}"
        if interface.address6:
            lines += [f"{key}.disable_ipv6 = 0", f"{key}.accept_ra = 0"]
        elif not interface.takes_gateway6:
            lines += [f"{key}.accept_ra_defrtr = 0"]
    return {"/etc/sysctl.d/zz-imageos.conf": HEADER + "\n".join([*lines, ""]) if lines else ""}


def resolv_conf(interfaces: Interfaces) -> str:
    servers, search = dns(interfaces)
    lines = [*([f"search {' '.join(search)}"] if search else []), *(f"nameserver {server}" for server in servers)]
    return "".join(line + "\n" for line in lines)


def resolved_conf(interfaces: Interfaces) -> str:
    """Return a file that counts instead of what others say: without an empty assignment, ours would join theirs."""
    servers, search = dns(interfaces)
    ours = [*([f"DNS={' '.join(servers)}"] if servers else []), *([f"Domains={' '.join(search)}"] if search else [])]
    return HEADER + "\n".join(["[Resolve]", "DNS=", "Domains=", *ours]) + "\n"


def dns(interfaces: Interfaces) -> tuple[list[str], list[str]]:
    """Return the DNS servers and search domains of all interfaces, without duplicates."""
    servers = dict.fromkeys(server for interface in interfaces for server in interface.dns)
    search = dict.fromkeys(domain for interface in interfaces for domain in interface.search)
    return list(servers), list(search)


def _assignments(variables: dict[str, str]) -> str:
    """Return shell assignments; no value contains a quote (see Interface)."""
    return "".join(f'{name}="{value}"\n' for name, value in variables.items())
