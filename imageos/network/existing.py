"""What an image says about its own NICs, which are not this instance's: found as each program finds it, and removed.

Each function returns the names of what it has removed, for the log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from imageos.guests import cloudboot, yaml
from imageos.guests.services import OWN_UNITS
from imageos.guests.target import Target, matches
from imageos.network import Interface

Interfaces = Sequence[Interface]

# What ethernet interfaces are called: by the kernel, and by udev for a virtual machine
SAMPLES = ("eth0", "eth1", "ens3", "ens13", "enp1s0", "enp0s13", "eno1", "enx001122334455")
NIC = r"(eth|en[a-z])[0-9a-z]*"
INTERFACES = "/etc/network/interfaces"
DHCLIENT_HOOK = "/etc/dhcp/dhclient-enter-hooks.d/imageos"
MOST_SOURCES = 200  # files that others name, and patterns by which they do
NETWORKS = "/etc/systemd/network"
PACKAGED_NETWORKS = ("/usr/local/lib/systemd/network", "/usr/lib/systemd/network", "/lib/systemd/network")
# networkd uses the first file that matches; ours and those that netplan and cloud-init write have these names
OUR_NETWORKS = "00-imageos-"
LAST_NETWORK = "10-netplan-"
KEYFILES = "/etc/NetworkManager/system-connections"
PACKAGED_KEYFILES = ("/usr/lib/NetworkManager/system-connections",)
ETHERNET_KEYFILE = r"^[ \t]*type[ \t]*=[ \t]*(802-3-)?ethernet"
ETHERNET_IFCFG = r"^[ \t]*TYPE=[\"']?Ethernet"
# What NetworkManager writes for the scripts of Red Hat may have any name; one without a NIC is for all
OTHER_SCRIPTS = (("/etc/sysconfig/network-scripts/ifcfg-*", ETHERNET_IFCFG),)
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


# --- ifupdown: interfaces(5) ------------------------------------------------------------------------------


def ifupdown(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove what its files say about NICs; a file that then says nothing more goes, too."""
    found: list[str] = []
    target.remove(DHCLIENT_HOOK)
    for path in _sources(target):
        text, names = without_nics(target.read(path) or "", lambda name: is_nic(name, interfaces))
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
    asked, paths, looked = [INTERFACES, *target.glob(f"{INTERFACES}.d/*")], dict[str, None](), set[str]()
    while asked and len(paths) < MOST_SOURCES:
        path = asked.pop(0)
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
        return any(fnmatchcase(name, pattern) for name in SAMPLES)
    return is_ours(re.split("[=:]", word)[0])


# --- networkd: systemd.network(5) -------------------------------------------------------------------------


def networks(target: Target, interfaces: Interfaces) -> list[str]:
    """Remove the files that networkd would use for our NICs before ours, and ours, which may be of another plan."""
    remove(target, f"{NETWORKS}/{OUR_NETWORKS}*")
    found = []
    for path in target.glob(f"{NETWORKS}/*.network"):
        if _is_before_ours(path) and _is_for_nic(target.read(path) or "", interfaces):
            found += remove(target, _literal(path))
    for pattern in (LAST_NETWORK, OUR_NETWORKS):
        remove(target, f"{NETWORKS}/{pattern}*.d")
    for path in [path for directory in PACKAGED_NETWORKS for path in target.glob(f"{directory}/*.network")]:
        own = f"{NETWORKS}/{os.path.basename(path)}"
        is_hidden = target.link(own) is not None or target.is_file(own)
        if not is_hidden and _is_before_ours(path) and _is_for_nic(target.read(path) or "", interfaces):
            target.symlink(NOTHING, own)
            found.append(os.path.basename(path))
    return found


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
        return any(not fnmatchcase(name, pattern.lstrip("!")) for name in names for pattern in patterns)
    return not patterns or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def ini_section(text: str, section: str) -> dict[str, str]:
    """Return the assignments in one section; several of a key are joined."""
    found: dict[str, str] = {}
    current = ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            current = line.strip("[]")
        elif current == section and line and line[0] not in "#;":
            key, _, value = line.partition("=")
            found[key.strip()] = f"{found.get(key.strip(), '')} {value.strip()}".strip()
    return found


# --- NetworkManager and the scripts of Red Hat ------------------------------------------------------------


def profiles(target: Target, _interfaces: Interfaces) -> list[str]:
    """Remove NetworkManager's profiles for ethernet: they may have any name, and one without a NIC is for all."""
    scripts = (("/etc/sysconfig/network-scripts/ifcfg-e*", ""), *OTHER_SCRIPTS)
    found = remove_each(target, ((f"{KEYFILES}/*", ETHERNET_KEYFILE), *scripts))
    for path in [path for directory in PACKAGED_KEYFILES for path in target.glob(f"{directory}/*")]:
        if matches(target, path, ETHERNET_KEYFILE):
            target.symlink(NOTHING, f"{KEYFILES}/{os.path.basename(path)}")
            found.append(os.path.basename(path))
    return [name.partition(".nmconnection")[0] for name in found]


# --- dhcpcd of a single NIC -------------------------------------------------------------------------------


def dhcpcd_links(target: Target) -> list[str]:
    """Return the links that start dhcpcd@NIC.service, Arch's way: its configuration does not keep it from that NIC."""
    wants = [f"{OWN_UNITS}/{name}.target.wants" for name in ("multi-user", "network", "network-online")]
    return [path for directory in wants for path in target.glob(f"{directory}/dhcpcd@*.service")]


def dhcpcd_instances(target: Target, interfaces: Interfaces) -> list[str]:
    found = []
    for path in dhcpcd_links(target):
        name = os.path.basename(path)[len("dhcpcd@") : -len(".service")]
        if is_nic(name, interfaces):
            target.remove(_literal(path))
            found.append(name)
    return found


# --- netplan and cloud-init -------------------------------------------------------------------------------


def netplan_files(target: Target) -> list[str]:
    """Return netplan's files in the order in which it reads them; one in /etc hides that of a package."""
    by_name = {
        os.path.basename(path): path
        for directory in (*reversed(PACKAGED_NETPLAN), NETPLAN)
        for path in target.glob(f"{directory}/*.yaml")
    }
    return [by_name[name] for name in sorted(by_name)]


def netplan(target: Target, _interfaces: Interfaces) -> list[str]:
    found = []
    for path in netplan_files(target):
        if yaml.has(yaml.scalars(target.read(path) or ""), "network", "ethernets"):
            found.append(os.path.basename(path))
            if path.startswith(NETPLAN):
                target.remove(_literal(path))
            else:
                target.write(f"{NETPLAN}/{os.path.basename(path)}", "network: {version: 2}\n", mode=0o600)
    return found


def cloud_init(target: Target, _interfaces: Interfaces) -> list[str]:
    """Remove a network from cloud-init's configuration: it would count more than that of the seed."""
    found = []
    for path in cloudboot.configuration(target):
        text = target.read(path) or ""
        keys = yaml.scalars(text)
        if yaml.has(keys, "network") and keys.get(("network", "config")) != "disabled":
            target.write(path, yaml.without(text, "network"))
            found.append(os.path.basename(path))
    return found
