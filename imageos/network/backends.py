"""The programs that may configure a guest's network: does one do so, which files does it get, how is it kept away?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from imageos.guests import cloudboot, cloudinit
from imageos.guests.services import OWN_UNITS, has_generator, init, is_enabled, is_masked, unit_file
from imageos.guests.target import Target
from imageos.network import Interface, existing, render, resolver

Interfaces = Sequence[Interface]
Files = Callable[[Target, Interfaces], Mapping[str, str]]

NETWORKD = "systemd-networkd"
NETWORKD_UNIT = f"{NETWORKD}.service"
UDEV = ("/lib/udev", "/usr/lib/udev")
NAMES = ("/etc/udev/rules.d/70-persistent-net.rules", "/etc/udev/rules.d/70-imageos-net.rules")
# It reads a guest's text: a pattern that can match the same blanks in two ways may take hours
SOURCES = r"^[ \t]*(source(?:-directory)?[ \t]+/etc/network/interfaces\.d\b.*)$"
DHCPCD, DHCPCD_HOOK = existing.DHCPCD_CONF, "/etc/dhcpcd.exit-hook"
CONNMAN = "/etc/connman/main.conf"
# What cloud-init may write for, in the order in which it prefers them
CLOUD_INIT_PREFERS = ("ifupdown", "ifcfg", "wicked", "netplan", "NetworkManager", "networkd")
# How it calls those for which it can write all. For networkd it has no word for a gateway outside the address's network
# and, up to 22.4, for an IPv6 default route; for the others none that keeps routes and DNS servers of DHCP away
CLOUD_INIT_WRITES = {"ifupdown": "eni", "netplan": "netplan"}


class Backend(NamedTuple):
    """One program, with all that differs between them."""

    is_enabled: Callable[[Target], bool]  # it may configure the network when the guest boots
    files: Files  # its configuration: path -> text
    # Removes what the image says about its own NICs, and returns the names of that
    clear: Callable[[Target, Interfaces], list[str]] = lambda _target, _interfaces: []
    # What tells it to care for our NICs whatever the image says, or to leave them alone: path -> text
    tell: Callable[[Target, Interfaces, bool], Mapping[str, str]] = lambda _target, _interfaces, _is_ours: {}
    may_act: Callable[[Target], bool] = lambda _target: False  # although it is not enabled
    can_be_enabled: Callable[[Target], bool] = lambda _target: False  # by `links`
    links: Files = lambda _target, _interfaces: {}  # these start it: path -> content of the link
    # Variables in files with other content: path -> variable -> value; an empty value removes the variable
    variables: Callable[[Interfaces], Mapping[str, Mapping[str, str]]] = lambda _interfaces: {}
    state: tuple[str, ...] = ()  # what it remembers of the image's NICs: patterns of paths
    mode: int = 0o644
    by_name: bool = False  # it cannot match a MAC, so udev names the interfaces by MAC
    tells_dns: Callable[[Target], bool] = lambda _target: True
    writes_resolv_conf: bool = True
    own_resolv_conf: str = ""  # the only one that it writes


def configure(target: Target, name: str, interfaces: Interfaces) -> list[str]:
    """Write the backend's files for these interfaces (perhaps none), and have all others leave them alone. Idempotent.

    Return what is disabled by that: "ifupdown's eth0".
    """
    backend, ruling = BACKENDS[name], chain(target, name)
    files = backend.files(target, interfaces)  # first: it may read files that are removed below
    ours = {path.rpartition("/")[2].partition(".nmconnection")[0] for path in files}
    disabled = []
    for other, program in BACKENDS.items():
        is_ours = other in ruling
        if is_ours or program.is_enabled(target) or program.may_act(target):
            found = [label for label in program.clear(target, interfaces) if label not in ours]
            for path in program.state:
                target.remove(path)
            told = program.tell(target, interfaces, is_ours)
            write(target, told, 0o644)
            if found or (any(told.values()) and not is_ours):
                disabled.append(f"{other}'s {', '.join(found)}" if found else other)
    disabled += existing.single_units(target, interfaces)
    for path, values in backend.variables(interfaces).items():
        target.edit(path, partial(assign, values=values))
    write(target, files, backend.mode)
    for one in ruling if interfaces else ():  # without a NIC, nothing more is started
        for path, text in BACKENDS[one].links(target, interfaces).items():
            target.symlink(text, path)
    named = interfaces if any(BACKENDS[one].by_name for one in ruling) else ()
    name_interfaces(target, named)
    write(target, render.sysctl(named), 0o644)
    last = BACKENDS[ruling[-1]]
    resolver.settle(target, interfaces, last.tells_dns(target), last.writes_resolv_conf, last.own_resolv_conf)
    return disabled


def write(target: Target, files: Mapping[str, str], mode: int) -> None:
    """Write files; remove one that would be empty."""
    for path, text in files.items():
        if text:
            target.write(path, text, mode=mode)
        else:
            target.remove(path)


def name_interfaces(target: Target, interfaces: Interfaces) -> None:
    """Name the interfaces eth0, eth1, ... by MAC, and remove the image's names."""
    for path in NAMES:
        target.remove(path)
    if interfaces and any(target.is_dir(path) for path in UDEV):
        for path, text in render.udev_rules(interfaces).items():
            target.write(path, text)


def assign(text: str, values: Mapping[str, str]) -> str:
    """Return the shell assignments `text` with these values; drop a variable whose value is empty."""
    others = [line for line in text.splitlines() if line.partition("=")[0].strip() not in values]
    return "".join(f"{line}\n" for line in [*others, *(f'{name}="{value}"' for name, value in values.items() if value)])


# --- recognising ------------------------------------------------------------------------------------------


def find(target: Target) -> str:
    """Return the name of the backend that configures the guest's network; empty if there is none."""
    return "cloud-init" if BACKENDS["cloud-init"].is_enabled(target) else find_inner(target)


def find_inner(target: Target) -> str:
    """Return the program that is enabled, or can be, without cloud-init, which only writes its configuration.

    The last resort is one that may be started in a way that we do not know: by busybox's rcS, runit, Upstart.
    """
    others = [(name, backend) for name, backend in BACKENDS.items() if name != "cloud-init"]
    ways = ("is_enabled", "can_be_enabled", "may_act")
    return next((name for way in ways for name, backend in others if getattr(backend, way)(target)), "")


def is_started(target: Target, name: str) -> bool:
    """Return whether the guest's init starts a backend, or will: not of a last resort."""
    return BACKENDS[name].is_enabled(target) or BACKENDS[name].can_be_enabled(target)


def chain(target: Target, name: str) -> tuple[str, ...]:
    """Return the programs by which a backend configures the network: it, and those that it writes for."""
    if name == "cloud-init":
        inner = find_inner(target)
        return (name, *(chain(target, inner) if inner else ()))
    if name == "netplan":
        return (name, _renderer(target) or "networkd")
    if name == "ifcfg" and _has_network_manager(target):  # which reads these files
        return (name, "NetworkManager")
    return (name,)


def is_old_red_hat(target: Target) -> bool:
    """Return True if it has network scripts, or a NetworkManager that writes them: before Fedora 33 and RHEL 9."""
    if not target.is_dir(render.IFCFG):
        return False
    version = re.search(r"^VERSION_ID=\"?([0-9]{1,4})", target.read("/etc/os-release") or "", re.MULTILINE)
    return version is None or int(version[1]) <= 8


def _cloud_init_acts(target: Target) -> bool:
    return cloudboot.runs(target) and cloudboot.may_configure_network(target)


def _cloud_init_rules(target: Target) -> bool:
    inner = find_inner(target) if _cloud_init_acts(target) else None
    return inner is not None and (not inner or inner in CLOUD_INIT_WRITES)


def _has_network_manager(target: Target) -> bool:
    return any(is_enabled(target, name) for name in ("NetworkManager", "networkmanager"))


def _has_networkd(target: Target) -> bool:
    return unit_file(target, NETWORKD_UNIT) is not None and not is_masked(target, NETWORKD_UNIT)


def _has_ifupdown(target: Target) -> bool:
    return target.which("ifup") is not None and target.is_dir("/etc/network")


def _is_openrc(target: Target, script: str) -> bool:
    return init(target) in ("openrc", "") and target.exists(f"/etc/init.d/{script}")


# --- cloud-init -------------------------------------------------------------------------------------------


def _cloud_init(target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    return cloudinit.network_files(target, interfaces, chain(target, "cloud-init")[1:])


def _tell_cloud_init(target: Target, _interfaces: Interfaces, is_ours: bool) -> Mapping[str, str]:
    """Choose for cloud-init: of a list, which may be the image's own, it takes the first that is installed."""
    if not is_ours:
        return {cloudboot.OURS: render.HEADER + "network: {config: disabled}\n"}
    inner = find_inner(target)
    first = next((name for name in CLOUD_INIT_PREFERS if _is_installed(target, name)), "")
    if not inner or (inner == first and not cloudboot.lists_renderers(target)):
        return {cloudboot.OURS: ""}
    config = {"system_info": {"network": {"renderers": [CLOUD_INIT_WRITES[inner]]}}}
    return {cloudboot.OURS: render.HEADER + json.dumps(config) + "\n"}


def _is_installed(target: Target, name: str) -> bool:
    """Return whether cloud-init would write for it."""
    return {
        "ifupdown": target.which("ifup") is not None,
        "ifcfg": target.is_dir(render.IFCFG),
        "wicked": target.is_dir(render.IFCFG_SUSE),
        "netplan": target.which("netplan") is not None,
        "NetworkManager": target.which("NetworkManager") is not None,
        "networkd": unit_file(target, NETWORKD_UNIT) is not None,
    }[name]


# --- netplan, networkd, NetworkManager --------------------------------------------------------------------


def _netplan(target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    renderer = _renderer(target)
    return render.netplan(interfaces, renderer if renderer != "networkd" or existing.netplan_renderer(target) else "")


def _renderer(target: Target) -> str:
    """Return for which program netplan can write: the one that its files choose, else one that is there."""
    able = {"networkd": _has_networkd(target), "NetworkManager": _has_network_manager(target)}
    chosen = existing.netplan_renderer(target) or "networkd"
    return chosen if able.get(chosen) else next((name for name in able if able[name]), "")


def _tell_networkd(_target: Target, interfaces: Interfaces, is_ours: bool) -> Mapping[str, str]:
    return {} if is_ours and interfaces else render.networkd_unmanaged(interfaces)


def _networkd_links(target: Target, _interfaces: Interfaces) -> Mapping[str, str]:
    return _systemd_link(target, NETWORKD)


def _systemd_link(target: Target, service: str) -> Mapping[str, str]:
    """Return what enables a service that is not; nothing if there is none, or no systemd."""
    unit = unit_file(target, f"{service}.service")
    if is_enabled(target, service) or not unit or init(target) not in ("systemd", ""):
        return {}
    return {f"{OWN_UNITS}/multi-user.target.wants/{service}.service": unit}


def _tell_network_manager(target: Target, interfaces: Interfaces, is_ours: bool) -> Mapping[str, str]:
    """Contradict the image only where it says something: a list of nothing but exceptions is all other devices."""
    devices = render.network_manager_devices(interfaces)
    if not is_ours:
        return render.network_manager_conf({"main": ["dns=none"], "keyfile": [f"unmanaged-devices+={devices}"]})
    said = _network_manager_says(target)
    has_resolved = is_enabled(target, resolver.RESOLVED)
    exceptions = render.network_manager_devices(interfaces, "except:")
    servers = ",".join(render.dns(interfaces)[0])
    is_contradicted = {
        ("main", "rc-manager=file"): resolver.has_idle_resolvconf(target, tells_file=True),
        ("main", "dns=default"): not has_resolved and said.get(("main", "dns")) == "systemd-resolved",
        ("main", "systemd-resolved=true"): has_resolved and ("main", "systemd-resolved") in said,
        ("keyfile", f"path={render.KEYFILES}"): ("keyfile", "path") in said,
        ("keyfile", f"unmanaged-devices+={exceptions}"): ("keyfile", "unmanaged-devices") in said,
        ("device-imageos", f"match-device={devices}\nmanaged=1"): ("device", "managed") in said,
        (render.GLOBAL_DNS, f"servers={servers}"): servers and (render.GLOBAL_DNS, "servers") in said,
    }
    sections: dict[str, list[str]] = {}
    for (section, line), is_so in is_contradicted.items():
        if is_so:
            sections.setdefault(section, []).append(line)
    return render.network_manager_conf(sections)


def _network_manager_tells_dns(target: Target) -> bool:
    """Return False if NetworkManager is forbidden to touch resolv.conf."""
    said = _network_manager_says(target)
    return said.get(("main", "dns")) != "none" and said.get(("main", "rc-manager")) != "unmanaged"


def _network_manager_says(target: Target) -> dict[tuple[str, str], str]:
    """Return values that are not empty by section and key, in which sections for devices are one, and += is =."""
    return {
        ("device" if section.startswith("device") else section, key.rstrip("+")): value
        for path in _network_manager_conf(target)
        for section, values in existing.ini_sections(target.read(path) or "").items()
        for key, value in values.items()
        if value
    }


def _network_manager_conf(target: Target) -> list[str]:
    """Return the image's files; of two with one name, that of a package does not count."""
    directories = ("/usr/lib/NetworkManager/conf.d", "/etc/NetworkManager/conf.d")
    by_name = {
        path.rpartition("/")[2]: path for directory in directories for path in target.glob(f"{directory}/*.conf")
    }
    paths = ["/etc/NetworkManager/NetworkManager.conf", *(by_name[name] for name in sorted(by_name))]
    return [path for path in paths if path != render.NETWORK_MANAGER_CONF and target.is_file(path)]


# --- the others -------------------------------------------------------------------------------------------


def _netifrc_links(_target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    names = [f"net.{interface.name}" for interface in interfaces]
    services = {f"/etc/init.d/{name}": "net.lo" for name in names}
    return {**services, **{f"/etc/runlevels/default/{name}": f"/etc/init.d/{name}" for name in names}}


def _tell_connman(target: Target, _interfaces: Interfaces, is_ours: bool) -> Mapping[str, str]:
    return {CONNMAN: render.connman_main(target.read(CONNMAN) or "", denied=not is_ours)}


def _dhcpcd(target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    sections = render.dhcpcd(interfaces, resolver.has_idle_resolvconf(target, tells_file=True))
    conf = render.dhcpcd_conf(existing.dhcpcd_conf(target, interfaces)[0], sections)
    return {DHCPCD: conf, DHCPCD_HOOK: render.dhcpcd_hook(interfaces)}


def _tell_dhcpcd(target: Target, _interfaces: Interfaces, is_ours: bool) -> Mapping[str, str]:
    if is_ours:
        return {}
    return {DHCPCD: render.dhcpcd_conf(target.read(DHCPCD) or "", [], deny=True), DHCPCD_HOOK: ""}


def _ifupdown(target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    sources = re.findall(SOURCES, target.read(existing.INTERFACES) or "", re.MULTILINE)
    if not target.is_dir(f"{existing.INTERFACES}.d"):
        sources = []  # busybox's ifup would refuse the whole file
    return render.interfaces_file(interfaces, _tells_dns(target), sources)


def _tell_ifupdown(target: Target, interfaces: Interfaces, is_ours: bool) -> Mapping[str, str]:
    """Keep its DHCP clients from replacing configured DNS servers or another interface's default route."""
    if not is_ours:
        return {}
    files = {}
    keep_dns = any(render.dns(interfaces))
    no_gateway = [interface.name for interface in interfaces if not interface.takes_gateway]
    if any(interface.dhcp for interface in interfaces) and (keep_dns or no_gateway):
        if target.which("dhclient"):
            files[existing.DHCLIENT_HOOK] = render.dhclient_hook(keep_dns, no_gateway)
        if target.which("udhcpc"):
            files["/etc/udhcpc/udhcpc.conf"] = render.udhcpc_conf(keep_dns, no_gateway)
    if target.which("dhcpcd"):
        dhcp = [interface.name for interface in interfaces if interface.dhcp]
        is_idle = resolver.has_idle_resolvconf(target, tells_file=False)
        sections = render.dhcpcd_client(dhcp, keep_dns, no_gateway, is_idle)
        files[DHCPCD] = render.dhcpcd_conf(existing.dhcpcd_conf(target, interfaces)[0], sections)
    return files


def _ifupdown_links(target: Target, _interfaces: Interfaces) -> Mapping[str, str]:
    openrc = target.is_file("/etc/init.d/networking") and target.is_dir("/etc/runlevels")
    return {"/etc/runlevels/boot/networking": "/etc/init.d/networking"} if openrc else {}


def _tells_dns(target: Target) -> bool:
    """Return True if ifupdown passes dns-nameservers on to resolvconf, and that to the resolver.

    Not to resolved: that script of Debian 12 passes a word on that is no address, and resolved refuses all.
    """
    return target.exists("/etc/network/if-up.d/000resolvconf") and resolver.is_of_resolvconf(target)


# The first that is enabled counts.
BACKENDS = {
    "cloud-init": Backend(
        _cloud_init_rules,
        _cloud_init,
        clear=existing.cloud_init,
        tell=_tell_cloud_init,
        may_act=_cloud_init_acts,
        mode=0o600,
    ),
    "netplan": Backend(
        lambda target: has_generator(target, "netplan") and _renderer(target) != "",
        _netplan,
        clear=existing.netplan,
        mode=0o600,
    ),
    "ifcfg": Backend(
        lambda target: is_old_red_hat(target) and (is_enabled(target, "network") or _has_network_manager(target)),
        lambda _target, interfaces: render.ifcfg(interfaces),
        clear=existing.scripts,
        variables=lambda _interfaces: {render.IFCFG_SUSE: {"GATEWAY": "", "GATEWAYDEV": "", "NETWORKING": "yes"}},
        by_name=True,
    ),
    "NetworkManager": Backend(
        _has_network_manager,
        lambda _target, interfaces: render.keyfiles(interfaces),
        clear=existing.profiles,
        tell=_tell_network_manager,
        # of profiles with the same priority, the one that was used last wins; the state may be "off"
        state=tuple(f"/var/lib/NetworkManager/{name}" for name in ("timestamps", "NetworkManager.state", "*.lease")),
        mode=0o600,
        tells_dns=_network_manager_tells_dns,
    ),
    "networkd": Backend(
        lambda target: is_enabled(target, NETWORKD),
        lambda _target, interfaces: render.networkd(interfaces),
        clear=existing.networks,
        tell=_tell_networkd,
        can_be_enabled=lambda target: _has_networkd(target) and init(target) in ("systemd", ""),
        links=_networkd_links,
        tells_dns=lambda target: is_enabled(target, resolver.RESOLVED),
        writes_resolv_conf=False,
    ),
    "wicked": Backend(
        lambda target: (
            target.is_dir(render.IFCFG_SUSE) and (is_enabled(target, "wicked") or is_enabled(target, "network"))
        ),
        lambda _target, interfaces: render.wicked(interfaces),
        clear=lambda target, interfaces: [
            *existing.scripts(target, interfaces, render.IFCFG_SUSE, ["ifroute", "ifrule", "ifsysctl"]),
            *existing.remove(target, f"{render.IFCFG_SUSE}/routes", "^default"),
        ],
        variables=lambda interfaces: {f"{render.IFCFG_SUSE}/config": render.wicked_dns(interfaces)},
        state=("/var/lib/wicked/lease-*",),
        by_name=True,
    ),
    "connman": Backend(
        lambda target: is_enabled(target, "connman"),
        lambda _target, interfaces: render.connman(interfaces),
        tell=_tell_connman,
        state=("/var/lib/connman/ethernet_*", "/var/lib/connman/imageos.config"),
        mode=0o600,
        own_resolv_conf="/run/connman/resolv.conf",
    ),
    "dhcpcd": Backend(
        lambda target: is_enabled(target, "dhcpcd"),
        _dhcpcd,
        clear=existing.dhcpcd,
        tell=_tell_dhcpcd,
        may_act=lambda target: bool(existing.dhcpcd_links(target)),
        links=lambda target, _interfaces: _systemd_link(target, "dhcpcd"),
        state=("/var/lib/dhcpcd/*",),
        by_name=True,
    ),
    "netifrc": Backend(
        lambda target: _is_openrc(target, "net.lo") and bool(target.glob("/etc/runlevels/default/net.e*")),
        lambda _target, interfaces: render.netifrc(interfaces),
        clear=existing.netifrc,
        can_be_enabled=lambda target: _is_openrc(target, "net.lo"),
        links=_netifrc_links,
        by_name=True,
    ),
    "ifupdown": Backend(
        lambda target: _has_ifupdown(target) and is_enabled(target, "networking"),
        _ifupdown,
        clear=existing.ifupdown,
        tell=_tell_ifupdown,
        may_act=_has_ifupdown,  # udev starts it for `allow-hotplug`
        can_be_enabled=lambda target: _has_ifupdown(target) and _is_openrc(target, "networking"),
        links=_ifupdown_links,
        variables=lambda _interfaces: {
            "/etc/default/networking": {"CONFIGURE_INTERFACES": "", "EXCLUDE_INTERFACES": ""}
        },
        state=("/var/lib/dhcp/*.leases",),
        by_name=True,
        tells_dns=_tells_dns,
        writes_resolv_conf=False,
    ),
}
