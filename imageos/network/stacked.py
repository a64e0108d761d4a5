"""Devices that an image puts on its NICs: bridges, bonds, teams, VLANs, macvlans, VRFs. What a file says of them. Pure.

They go with the image's NICs: a bridge would take ours, which then loses its address; a VLAN or an empty bridge keeps
the image's own address and route, and a boot may wait for its carrier.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Pair = tuple[str, str]  # a device, and one that it stands on

# Keys of each program. A value in OVER names a device that stands on the one that has it; one in UNDER is below that.
IFUPDOWN_OVER = ("bond-master", "vrf", "vrf-member")
IFUPDOWN_UNDER = (
    *("bridge-ports", "bond-slaves", "slaves", "bond-members", "team-ports"),
    *("vlan-raw-device", "macvlan-raw-device", "requires"),
)
NETWORKD_OVER = ("Bridge", "Bond", "VRF", "VLAN", "MACVLAN", "MACVTAP", "IPVLAN", "IPVTAP")
PROFILE_OVER = ("controller", "master")
IFCFG_OVER = ("BRIDGE", "MASTER", "TEAM_MASTER", "VRF", "BRIDGE_UUID", "MASTER_UUID", "TEAM_MASTER_UUID")
IFCFG_UNDER = r"PHYSDEV|ETHERDEVICE|MACVLAN_DEVICE|BRIDGE_PORTS|BONDING_SLAVE_?[0-9]+|TEAM_PORT_DEVICE_?[0-9]+"
NETPLAN_UNDER = ("interfaces", "link")


def above(pairs: Iterable[Pair], is_nic: Callable[[str], bool]) -> set[str]:
    """Return the devices that stand on a NIC, be it by way of others."""
    uppers: dict[str, list[str]] = {}
    for upper, lower in pairs:
        uppers.setdefault(lower, []).append(upper)
    asked, found = [lower for lower in uppers if is_nic(lower)], set[str]()
    while asked:
        new = set(uppers.get(asked.pop(), ())) - found
        found |= new
        asked += new
    return found


def by_dot(name: str) -> list[Pair]:
    """Return what a VLAN's name says: eth0.5 stands on eth0."""
    lower, dot, number = name.rpartition(".")
    return [(name, lower)] if dot and number.isdigit() else []


def of_stanza(name: str, words: Sequence[str]) -> Iterator[Pair]:
    """Yield what a line of a stanza of interfaces(5) says of the device `name`; `all` is every NIC."""
    key = words[0].replace("_", "-") if words else ""
    if key in IFUPDOWN_OVER:
        yield from ((upper, name) for upper in words[1:])
    elif key in IFUPDOWN_UNDER:
        yield from ((name, lower) for lower in words[1:])


def of_variables(name: str, text: str) -> Iterator[Pair]:
    """Yield what an ifcfg file for the device `name` says, of Red Hat or SUSE."""
    for key, value in re.findall(r"^[ \t]*([A-Z0-9_]+)=[\"']?([^\"'\n]*)", text, re.MULTILINE):
        for word in value.split():
            if key in IFCFG_OVER:
                yield word, name
            elif re.fullmatch(IFCFG_UNDER, key) or key in ("DEVICE", "UUID"):
                yield name, word
            if key in ("DEVICE", "UUID"):
                yield word, name
                yield from by_dot(word)


def of_netctl(name: str, text: str) -> Iterator[Pair]:
    """Yield what a profile says: of a wired one, Interface is the NIC."""
    for key, value in re.findall(r"^[ \t]*(Interface|BindsToInterfaces)=(.*)$", text, re.MULTILINE):
        for word in re.findall(r"[\w.:-]+", value):
            yield name, word
            if key == "Interface":
                yield word, name


def of_netifrc(text: str) -> Iterator[Pair]:
    for name, value in re.findall(r"^[ \t]*(?:bridge|slaves|team)_(\w+)=[\"']?([^\"'\n]*)", text, re.MULTILINE):
        yield from ((name, lower) for lower in value.split())
    for lower, value in re.findall(r"^[ \t]*vlans_(\w+)=[\"']?([^\"'\n]*)", text, re.MULTILINE):
        yield from ((f"{lower}.{number}", lower) for number in value.split())


def is_of_netplan(keys: Mapping[tuple[str, ...], str]) -> bool:
    """Return whether a file of netplan defines something on others, of which it may not know any more."""
    return any(
        path[0] == "network" and path[3] in NETPLAN_UNDER and value for path, value in keys.items() if len(path) > 3
    )
