"""What an image says about its own NICs, which are not this instance's: found as each program finds it, and removed.

Each function returns the names of what it has removed, for the log.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from imageos.guests import cloudboot, yaml
from imageos.guests.services import OWN_UNITS
from imageos.guests.target import Target, fits, matches
from imageos.network import Interface, stacked
from imageos.network.render import DHCPCD_DENY, DHCPCD_SECTIONS, HEADER, NETWORKD_WAITS
from imageos.network.stacked import Pair

Interfaces = Sequence[Interface]

# What ethernet interfaces are called: by the kernel, and by udev for a virtual machine
SAMPLES = ("eth0", "eth1", "ens3", "ens13", "enp1s0", "enp0s13", "eno1", "enx001122334455")
NIC = r"(eth|en[a-z])[0-9a-z]*"
INTERFACES = "/etc/network/interfaces"
DHCLIENT_HOOK = "/etc/dhcp/dhclient-enter-hooks.d/zz-imageos"  # of those that name a function, the last one counts
UDHCPC_CONF = "/etc/udhcpc/udhcpc.conf"
OURS = f"^{HEADER}"
EVERY_NIC = ("all", "regex", "glob")  # bridge_ports(5): the words that are patterns of names
MOST_SOURCES = 200  # files that others name, and patterns by which they do
NETWORKS = "/etc/systemd/network"
PACKAGED_NETWORKS = ("/usr/local/lib/systemd/network", "/usr/lib/systemd/network", "/lib/systemd/network")
# networkd uses the first file that matches; ours and those that netplan and cloud-init write have these names
OUR_NETWORKS = "00-imageos-"
LAST_NETWORK = "10-netplan-"
WAITS_FOR_ONE = r"^[ \t]*ExecStart=.* (-i|--interface)\b"
KEYFILES = "/etc/NetworkManager/system-connections"
PACKAGED_KEYFILES = ("/usr/lib/NetworkManager/system-connections",)
ETHERNET = ("ethernet", "802-3-ethernet")  # of a profile: its type, and its section
ETHERNET_IFCFG = r"^[ \t]*TYPE=[\"']?Ethernet"
# What NetworkManager writes for the scripts of Red Hat may have any name; one without a NIC is for all
IFCFG, ROUTES = "/etc/sysconfig/network-scripts", ("route", "route6", "rule", "rule6")
DHCPCD_CONF = "/etc/dhcpcd.conf"
# What it would do to a NIC without a section of its own
DHCPCD_OF_ALL = (
    *("allowinterfaces", "denyinterfaces", "static", "inform", "inform6", "fallback"),
    *("noipv4", "ipv6only", "nodhcp", "nogateway"),
)
NETCTL = "/etc/netctl"
NETIFRC = ("init.d", "runlevels/boot", "runlevels/default")
NETPLAN = "/etc/netplan"
PACKAGED_NETPLAN = ("/usr/lib/netplan", "/lib/netplan")
NOTHING = "/dev/null"


def remove(target: Target, pattern: str, content: str = "") -> list[str]:
    """Remove the files whose names match, and whose text does; the content is a pattern, too."""
    paths = [path for path in target.glob(pattern) if not content or matches(target, path, content)]
    for path in paths:
        target.remove(_literal(path))
    return [os.path.basename(path) for path in paths]


def remove_each(target: Target, patterns: Iterable[tuple[str, str]]) -> list[str]:
    return [name for pattern, content in patterns for name in remove(target, pattern, content)]


def _literal(path: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", path)


def is_nic(name: str, interfaces: Interfaces) -> bool:
    return name in {interface.name for interface in interfaces} or re.fullmatch(NIC, name) is not None


def _discard(target: Target, path: str, directory: str) -> str:
    """Remove a file from a directory of the guest's own, or hide there that of a package; return its name."""
    name = os.path.basename(path)
    if path.startswith(f"{directory}/"):
        target.remove(_literal(path))
    else:
        target.symlink(NOTHING, f"{directory}/{name}")
    return name


def _read(target: Target, *patterns: str) -> dict[str, str]:
    """Return the texts of files by path; of two with one name, that in the first directory hides the other."""
    by_name: dict[str, str] = {}
    for path in (path for pattern in patterns for path in target.glob(pattern)):
        by_name.setdefault(os.path.basename(path), path)
    return {path: target.read(path) or "" for path in by_name.values() if target.is_file(path)}


# --- ifupdown: interfaces(5) ------------------------------------------------------------------------------


def ifupdown(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove what its files say about NICs; a file that then says nothing more goes, too."""
    found: list[str] = []
    for path in ("/etc/dhcp/dhclient-enter-hooks.d/*imageos", UDHCPC_CONF):
        remove(target, path, OURS)
    texts = {path: target.read(path) or "" for path in _sources(target)}
    pairs = [pair for text in texts.values() for pair in _stanza_pairs(text)]
    upper = stacked.above(pairs, lambda name: name in EVERY_NIC or is_nic(name, interfaces))
    for path, before in texts.items():
        text, names = without_nics(before, lambda name: name in upper or is_nic(name, interfaces))
        if not names:
            continue
        found += names
        if path != INTERFACES and not re.search(r"^[ \t]*[^#\s]", text, re.MULTILINE):
            target.remove(_literal(path))
        else:
            target.write(path, text)
    return list(dict.fromkeys(found))


def _sources(target: Target) -> list[str]:
    """Return /etc/network/interfaces, what it includes, and what is in interfaces.d, which may be included later."""
    asked, paths, looked = deque([INTERFACES, *target.glob(f"{INTERFACES}.d/*")]), dict[str, None](), set[str]()
    while asked and len(paths) < MOST_SOURCES:
        path = asked.popleft()
        if path in paths or not target.is_file(path):
            continue
        paths[path] = None
        for keyword, words in re.findall(r"^[ \t]*(source(?:-directory)?)[ \t]+(\S.*)$", target.read(path) or "", re.M):
            for word in words.split():
                pattern = os.path.join(os.path.dirname(path), word, *(["*"] if keyword == "source-directory" else []))
                if pattern not in looked and len(looked) < MOST_SOURCES:
                    looked.add(pattern)
                    asked += target.glob(pattern)
    return list(paths)


def _stanza_pairs(text: str) -> Iterator[Pair]:
    name = ""
    for line in _logical_lines(text):
        words = line.replace("\\\n", " ").split()
        if words[:1] == ["iface"] and len(words) > 1:
            name = words[1]
            yield from stacked.by_dot(name)
        elif name:
            yield from stacked.of_stanza(name, words)


def without_nics(text: str, is_ours: Callable[[str], bool]) -> tuple[str, list[str]]:
    """Return the text of interfaces(5) without the NICs' stanzas, and the names of these."""
    kept, names, is_dropped = [], [], False
    for line in _logical_lines(text):
        words = line.replace("\\\n", " ").split()
        keyword = words[0] if words and not words[0].startswith("#") else ""
        if keyword in ("auto", "no-auto-down", "no-scripts") or keyword.startswith("allow-"):
            others = [word for word in words[1:] if not _names_nic(word, is_ours)]
            names += words[1:] if not others else [word for word in words[1:] if word not in others]
            if len(others) == len(words) - 1:
                kept.append(line)
            elif others:
                kept.append(f"{' '.join([keyword, *others])}\n")
            is_dropped = False
        elif keyword in ("iface", "mapping"):
            is_dropped = any(_names_nic(word, is_ours) for word in (words[1:2] if keyword == "iface" else words[1:]))
            names += words[1:2] if is_dropped else []
        elif keyword.startswith("source") or keyword in ("template", "rename"):
            is_dropped = False
        if not is_dropped and not (keyword in ("auto", "no-auto-down", "no-scripts") or keyword.startswith("allow-")):
            kept.append(line)
    return "".join(kept), list(dict.fromkeys(names))


def _logical_lines(text: str) -> Iterator[str]:
    """Yield lines; one that ends in a backslash goes on in the next."""
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        parts.append(line)
        if not line.rstrip("\n").endswith("\\"):
            yield "".join(parts)
            parts = []
    if parts:
        yield "".join(parts)


def _names_nic(word: str, is_ours: Callable[[str], bool]) -> bool:
    """Return whether a word is or matches a NIC: eth0, eth0:1, eth0=home, en*, /eth*, /*/1."""
    if word.startswith("/") or "*" in word:
        pattern = word.lstrip("/").split("/")[0].partition("=")[0]
        return any(fits(name, pattern) for name in SAMPLES)
    return is_ours(re.split("[=:]", word)[0])


# --- networkd: systemd.network(5) -------------------------------------------------------------------------


def networks(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove the files that networkd would use for our NICs before ours, and ours, which may be of another plan.

    With them goes what stands on our NICs, wherever these files are, and what has a boot wait for one of another name.
    """
    remove(target, f"{NETWORKS}/{OUR_NETWORKS}*")
    directories = (NETWORKS, *PACKAGED_NETWORKS)
    texts = _read(target, *(f"{directory}/*.net*" for directory in directories))
    upper = stacked.above(_network_pairs(texts, interfaces), lambda name: name == "")
    found = [
        _discard(target, path, NETWORKS)
        for path, text in texts.items()
        if (_is_before_ours(path) and path.endswith(".network") and _is_for_nic(text, interfaces))
        or _names_only(text, upper)
    ]
    for pattern in (LAST_NETWORK, OUR_NETWORKS):
        remove(target, f"{NETWORKS}/{pattern}*.d")
    remove(target, f"{NETWORKD_WAITS}/*.conf", OURS)
    return found + [f"wait-online's {name}" for name in remove(target, f"{NETWORKD_WAITS}/*.conf", WAITS_FOR_ONE)]


def _network_pairs(texts: Mapping[str, str], interfaces: Interfaces) -> Iterator[Pair]:
    """Yield what stands on what; a NIC is the empty name."""
    for text in texts.values():
        match, network = ini_section(text, "Match"), ini_section(text, "Network")
        names = [] if _is_for_nic(text, interfaces) else match.get("Name", "").split()
        for upper in (upper for key in stacked.NETWORKD_OVER for upper in network.get(key, "").split()):
            yield from ((upper, name) for name in names or [""])


def _names_only(text: str, names: Collection[str]) -> bool:
    """Return whether a .network or .netdev is for these devices, and for no other."""
    found = (ini_section(text, "NetDev").get("Name") or ini_section(text, "Match").get("Name", "")).split()
    return bool(found) and all(name in names for name in found)


def _is_before_ours(path: str) -> bool:
    return os.path.basename(path) < LAST_NETWORK


def _is_for_nic(text: str, interfaces: Interfaces) -> bool:
    match = ini_section(text, "Match")
    if "Name" in match:
        return _has_match(match["Name"], [*SAMPLES, *(interface.name for interface in interfaces)])
    macs = f"{match.get('MACAddress', '')} {match.get('PermanentMACAddress', '')}".split()
    if macs:
        digits = [re.sub("[-:.]", "", mac).lower() for mac in macs]  # of any of three forms
        return any(interface.mac.replace(":", "") in digits for interface in interfaces)
    return "Kind" not in match and _has_match(match.get("Type", ""), ["ether"])


def _has_match(value: str, names: Sequence[str]) -> bool:
    """Return whether a list of patterns, perhaps quoted or all negated, matches one of these; an empty one does."""
    patterns = value.replace('"', " ").replace("'", " ").split()
    if patterns and patterns[0].startswith("!"):
        return any(not fits(name, pattern.lstrip("!")) for name in names for pattern in patterns)
    return not patterns or any(fits(name, pattern) for name in names for pattern in patterns)


def ini_section(text: str, section: str) -> dict[str, str]:
    return ini_sections(text).get(section, {})


def ini_sections(text: str) -> dict[str, dict[str, str]]:
    """Return the assignments in each section; several of a key are joined."""
    found: dict[str, dict[str, list[str]]] = {}
    current: dict[str, list[str]] = {}
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            current = found.setdefault(line.strip("[]"), {})
        elif line and line[0] not in "#;":
            key, _, value = line.partition("=")
            current.setdefault(key.strip(), []).append(value.strip())
    return {
        section: {key: " ".join(filter(None, values)) for key, values in assigned.items()}
        for section, assigned in found.items()
    }


# --- NetworkManager and the scripts of Red Hat ------------------------------------------------------------


def profiles(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove NetworkManager's profiles for ethernet: they may have any name, and one without a NIC is for all.

    With them goes what stands on these.
    """
    found = scripts(target, interfaces)
    texts = _read(target, *(f"{directory}/*" for directory in (KEYFILES, *PACKAGED_KEYFILES)))
    wired = {path for path, text in texts.items() if _is_wired(ini_sections(text))}
    pairs = [pair for path, text in texts.items() for pair in _profile_pairs(path, text)]
    upper = stacked.above(pairs, lambda name: name in wired or is_nic(name, interfaces))
    found += [_discard(target, path, KEYFILES) for path in texts if path in wired or path in upper]
    return [name.partition(".nmconnection")[0] for name in found]


def _is_wired(profile: Mapping[str, Mapping[str, str]]) -> bool:
    """A profile without a type has that of its section."""
    kind = profile.get("connection", {}).get("type")
    return kind in ETHERNET if kind else any(section in profile for section in ETHERNET)


def _profile_pairs(path: str, text: str) -> Iterator[Pair]:
    """Yield what stands on what; a profile is its path, its UUID and the name of its device."""
    connection = ini_section(text, "connection")
    for name in filter(None, (connection.get("uuid"), connection.get("interface-name"))):
        yield from ((path, name), (name, path))
    for key in stacked.PROFILE_OVER:
        yield from ((upper, path) for upper in connection.get(key, "").split())
    kind = connection.get("type", "")
    if kind in ("vlan", "macvlan"):  # without a parent, it is a NIC by its MAC
        yield path, ini_section(text, kind).get("parent") or SAMPLES[0]


def scripts(
    target: Target, interfaces: Interfaces, directory: str = IFCFG, others: Sequence[str] = ROUTES
) -> list[str]:
    """Remove the ifcfg files for ethernet and for what stands on it, and the `others` of the same devices."""
    texts = {path.rpartition("/ifcfg-")[2]: target.read(path) or "" for path in target.glob(f"{directory}/ifcfg-*")}
    wired = {name for name, text in texts.items() if name.startswith("e") or re.search(ETHERNET_IFCFG, text, re.M)}
    pairs = [pair for name, text in texts.items() for pair in stacked.of_variables(name, text)]
    upper = stacked.above(pairs, lambda name: name in wired or is_nic(name, interfaces)) - {"lo"}
    found = [f"ifcfg-{name}" for name in texts if name in wired or name in upper]
    for kind in ("ifcfg", *others):
        for name in (*wired, *upper):
            target.remove(_literal(f"{directory}/{kind}-{name}"))
        remove(target, f"{directory}/{kind}-e*")
    return found


# --- dhcpcd -----------------------------------------------------------------------------------------------


def dhcpcd(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove what starts it for a single NIC; return this, and what its configuration says of NICs."""
    return [*dhcpcd_instances(target, interfaces), *dhcpcd_conf(target, interfaces)[1]]


def dhcpcd_conf(target: Target, interfaces: Interfaces) -> tuple[str, list[str]]:
    """Return the text of dhcpcd.conf(5) without the sections of NICs, and without what is said of all; their names."""
    kept, names, section = [], [], ""
    for line in (target.read(DHCPCD_CONF) or "").partition(DHCPCD_SECTIONS)[0].splitlines():
        words = [*line.split(), ""]
        if words[0] in ("interface", "ssid", "profile"):
            section = words[1] if words[0] == "interface" else words[0]
            names += [section] if is_nic(section, interfaces) else []
        is_of_all = not section and (words[0] in DHCPCD_OF_ALL or (words[0] == "nohook" and "resolv.conf" in line))
        if is_of_all and line != DHCPCD_DENY:
            names.append(words[0])
        if not is_nic(section, interfaces) and not is_of_all:
            kept.append(line)
    return "".join(f"{line}\n" for line in kept), list(dict.fromkeys(names))


def dhcpcd_links(target: Target) -> list[str]:
    """Return the links that start dhcpcd@NIC.service, Arch's way: its configuration does not keep it from that NIC."""
    return list(_instances(target, "dhcpcd"))


def dhcpcd_instances(target: Target, interfaces: Interfaces) -> list[str]:
    return _disable(target, "dhcpcd", lambda name: is_nic(name, interfaces))


# --- units for a single NIC or profile --------------------------------------------------------------------


def single_units(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove what starts a DHCP client for a NIC, or a profile of netctl (Arch) for one or for what stands on it."""
    texts = {path: target.read(path) or "" for path in target.glob(f"{NETCTL}/*") if target.is_file(path)}
    pairs = [pair for path, text in texts.items() for pair in stacked.of_netctl(os.path.basename(path), text)]
    upper = stacked.above(pairs, lambda name: is_nic(name, interfaces))
    is_ours = {"netctl": upper.__contains__}
    return [
        f"{template}@{name}"
        for template in ("netctl", "netctl-ifplugd", "dhclient", "systemd-networkd-wait-online")
        for name in _disable(target, template, is_ours.get(template, lambda name: is_nic(name, interfaces)))
    ]


def _instances(target: Target, template: str) -> dict[str, str]:
    """Return the links that start TEMPLATE@NAME.service, with their names."""
    wants = [f"{OWN_UNITS}/{name}.target.wants" for name in ("multi-user", "network", "network-online")]
    paths = [path for directory in wants for path in target.glob(f"{directory}/{template}@*.service")]
    escaped = {path: os.path.basename(path)[len(template) + 1 : -len(".service")] for path in paths}
    return {path: re.sub(r"\\x2d", "-", name) for path, name in escaped.items()}


def _disable(target: Target, template: str, is_ours: Callable[[str], bool]) -> list[str]:
    found = {path: name for path, name in _instances(target, template).items() if is_ours(name)}
    for path in found:
        target.remove(_literal(path))
    return list(found.values())


# --- netifrc of Gentoo ------------------------------------------------------------------------------------


def netifrc(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove the services of NICs and of what stands on them: they would use DHCP, as /etc/conf.d/net is ours."""
    pairs = stacked.of_netifrc(target.read("/etc/conf.d/net") or "")
    upper = stacked.above(pairs, lambda name: is_nic(name, interfaces))
    names = [f"net.{name}" for name in ("e*", *map(_literal, sorted(upper)))]
    return remove_each(target, [(f"/etc/{place}/{name}", "") for place in NETIFRC for name in names])


# --- netplan and cloud-init -------------------------------------------------------------------------------


def netplan_files(target: Target) -> list[str]:
    """Return netplan's files in the order in which it reads them; one in /etc hides that of a package."""
    by_name = {
        os.path.basename(path): path
        for directory in (*reversed(PACKAGED_NETPLAN), NETPLAN)
        for path in target.glob(f"{directory}/*.yaml")
    }
    return [by_name[name] for name in sorted(by_name)]


def netplan_renderer(target: Target) -> str:
    """Return the renderer that netplan's files choose, for all or for ethernet; empty if none."""
    chosen = ""
    for path in netplan_files(target):
        keys = yaml.scalars(target.read(path) or "")
        for key in (("network", "renderer"), ("network", "ethernets", "renderer")):
            chosen = keys.get(key, "") or chosen
    return chosen


def netplan(target: Target, _interfaces: Interfaces) -> list[str]:
    found = []
    for path in netplan_files(target):
        keys = yaml.scalars(target.read(path) or "")
        if yaml.has(keys, "network", "ethernets") or stacked.is_of_netplan(keys):
            found.append(os.path.basename(path))
            if path.startswith(NETPLAN):
                target.remove(_literal(path))
            else:
                target.write(f"{NETPLAN}/{os.path.basename(path)}", "network: {version: 2}\n", mode=0o600)
    return found


def cloud_init(target: Target, _interfaces: Interfaces) -> list[str]:
    """Remove a network from cloud-init's configuration: it would count more than that of the seed."""
    return cloudboot.drop(target, "network") if cloudboot.may_configure_network(target) else []
