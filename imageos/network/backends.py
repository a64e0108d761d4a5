"""The programs that may rule a guest's network: how each is recognised, what it is given, what would contradict it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from imageos import log
from imageos.guests import cloudinit
from imageos.guests.target import Target
from imageos.network import Interface, render

Interfaces = Sequence[Interface]
Files = Callable[[Target, Interfaces], Mapping[str, str]]

UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
NETWORKD = "systemd-networkd.service"
RESOLVED = "/etc/systemd/resolved.conf.d/imageos.conf"
UDEV = ("/lib/udev", "/usr/lib/udev")
DHCLIENT_HOOK = "/etc/dhcp/dhclient-enter-hooks.d/imageos"
NAMES = ("/etc/udev/rules.d/70-persistent-net.rules", "/etc/udev/rules.d/70-imageos-net.rules")
# A guest's text: no pattern may have two ways to match the same blanks, or it takes hours
CLOUD_INIT_OFF = r"^network:[ \t\r]*(\{\s*|\n\s+)[\"']?config[\"']?:\s*disabled"
ETHERNET = r"^[ \t]*(auto|allow-hotplug|iface)[ \t]+e(th|n)"  # in ifupdown's files
SOURCES = r"^[ \t]*(source(?:-directory)?[ \t]+/etc/network/interfaces\.d\b.*)$"
ETHERNET_KEYFILE = r"^[ \t]*type[ \t]*=[ \t]*(802-3-)?ethernet"
ETHERNET_IFCFG = r"^[ \t]*TYPE=[\"']?Ethernet"
ETHERNET_NETWORK = r"^[ \t]*Name[ \t]*=.*\be(n|th)"
DHCPCD = "/etc/dhcpcd.conf"


@dataclass(frozen=True)
class Backend:
    """One program; what differs between them."""

    files: Files  # what it is given
    # What the image has for NICs of its own, and is removed: a pattern of paths, and of what is in the file
    contradicts: tuple[tuple[str, str], ...] = ()
    links: Files = lambda _target, _interfaces: {}  # what starts it: path -> content of the link
    # In files that hold other things, too: path -> variable -> value, or nothing to remove it
    variables: Callable[[Interfaces], Mapping[str, Mapping[str, str]]] = lambda _interfaces: {}
    mode: int = 0o644
    by_name: bool = False  # it cannot match a MAC: udev gives the names
    makes_resolv_conf: Callable[[Target], bool] = lambda _target: True


def configure(target: Target, backend: Backend, interfaces: Interfaces) -> None:
    """Give a backend what it needs for these interfaces, and nothing else of the kind; again with the same result."""
    files = backend.files(target, interfaces)  # first: it may look at what is removed
    for pattern, content in backend.contradicts:
        for path in target.glob(pattern):
            if path not in files and (not content or _holds(target, path, content)):
                target.remove(path)
    for path, text in files.items():
        target.write(path, text, mode=backend.mode)
    for path, text in backend.links(target, interfaces).items():
        target.symlink(text, path)
    for path, values in backend.variables(interfaces).items():
        target.write(path, assigned(target.read(path) or "", values))
    name_interfaces(target, interfaces if backend.by_name else ())
    if not backend.makes_resolv_conf(target):
        write_resolv_conf(target, interfaces)


def _holds(target: Target, path: str, pattern: str) -> bool:
    return target.is_file(path) and re.search(pattern, target.read(path) or "", re.MULTILINE) is not None


def name_interfaces(target: Target, interfaces: Interfaces) -> None:
    """eth0, eth1, ... by MAC, and no names for NICs of the image."""
    for path in NAMES:
        target.remove(path)
    if interfaces and any(target.is_dir(path) for path in UDEV):
        for path, text in render.udev_rules(interfaces).items():
            target.write(path, text)


def write_resolv_conf(target: Target, interfaces: Interfaces) -> None:
    """For a backend that does not; through resolved where the guest has it, since it then owns resolv.conf."""
    if not any(render.dns(interfaces)):
        return
    if has_resolved(target):
        target.write(RESOLVED, render.resolved_conf(interfaces))
    else:
        target.remove("/etc/resolv.conf")  # it may be a link to what will not be there
        target.write("/etc/resolv.conf", render.resolv_conf(interfaces))


def assigned(text: str, values: Mapping[str, str]) -> str:
    """A text of shell assignments with other values; without a variable whose value is empty."""
    kept = [line for line in text.splitlines() if line.partition("=")[0].strip() not in values]
    return "".join(f"{line}\n" for line in [*kept, *(f'{name}="{value}"' for name, value in values.items() if value)])


# --- recognising ------------------------------------------------------------------------------------------


def used(target: Target) -> str:
    """The name of the backend that rules the guest's network; empty if there is none."""
    return next((name for name, holds in RECOGNISED if holds(target)), "")


def enabled(target: Target, service: str) -> bool:
    """Whether the guest starts a service when it boots: systemd's, or OpenRC's of the same name."""
    links = [f"{units}/multi-user.target.wants/{service}.service" for units in UNITS]
    links += [f"/etc/runlevels/{level}/{service}" for level in ("boot", "default")]
    return any(target.glob(link) for link in links)


def has_resolved(target: Target) -> bool:
    return any(
        target.glob(f"{units}/{wants}.target.wants/systemd-resolved.service")
        for units in UNITS
        for wants in ("multi-user", "sysinit")
    )


def rules_network(target: Target) -> bool:
    """Whether cloud-init does, which it can be forbidden."""
    if not cloudinit.present(target) or target.exists("/etc/cloud/cloud-init.disabled"):
        return False
    paths = ("/etc/cloud/cloud.cfg", *target.glob("/etc/cloud/cloud.cfg.d/*.cfg"))
    return not any(_holds(target, path, CLOUD_INIT_OFF) for path in paths)


def is_old_red_hat(target: Target) -> bool:
    """Network scripts, or a NetworkManager that writes their files; Fedora 33 and RHEL 9 are beyond that."""
    if not target.is_dir(render.IFCFG):
        return False
    version = re.search(r"^VERSION_ID=\"?([0-9]{1,4})", target.read("/etc/os-release") or "", re.MULTILINE)
    return version is None or int(version[1]) <= 8


RECOGNISED: tuple[tuple[str, Callable[[Target], bool]], ...] = (
    ("cloud-init", rules_network),
    ("netplan", lambda target: target.which("netplan") is not None),
    ("ifcfg", is_old_red_hat),
    ("NetworkManager", lambda target: any(enabled(target, name) for name in ("NetworkManager", "networkmanager"))),
    ("networkd", lambda target: enabled(target, "systemd-networkd")),
    ("wicked", lambda target: target.is_dir(render.IFCFG_SUSE)),
    ("netifrc", lambda target: target.exists("/etc/init.d/net.lo")),
    ("ifupdown", lambda target: target.which("ifup") is not None and target.is_dir("/etc/network")),
    # nothing is enabled, but this is part of systemd
    ("networkd", lambda target: _networkd_unit(target) is not None),
)


# --- what each is given -----------------------------------------------------------------------------------


def _seed(target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    if not target.is_file(f"{cloudinit.SEED}/meta-data"):
        log.warning(f"cloud-init has no seed in {cloudinit.SEED}: the guest's network is left as it is")
        return {}
    return {f"{cloudinit.SEED}/network-config": cloudinit.network_config(target, interfaces)}


def _netplan(target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    return render.netplan(interfaces, _renderer(target))


def _renderer(target: Target) -> str:
    """What the files of netplan choose."""
    renderer = ""
    for path in target.glob("/etc/netplan/*.yaml"):
        found = re.findall(r"renderer[\"']?:\s*[\"']?(networkd|NetworkManager)", target.read(path) or "")
        renderer = found[-1] if found else renderer
    return renderer


def _networkd_unit(target: Target) -> str | None:
    paths = (f"{units}/{NETWORKD}" for units in UNITS[1:])
    return next((path for path in paths if target.is_file(path)), None)


def _networkd_links(target: Target, _interfaces: Interfaces) -> Mapping[str, str]:
    unit = _networkd_unit(target)
    if enabled(target, "systemd-networkd") or not unit:
        return {}
    return {f"{UNITS[0]}/multi-user.target.wants/{NETWORKD}": unit}


def _netifrc_links(_target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    names = [f"net.{one.name}" for one in interfaces]
    services = {f"/etc/init.d/{name}": "net.lo" for name in names}
    return {**services, **{f"/etc/runlevels/default/{name}": f"/etc/init.d/{name}" for name in names}}


def _ifupdown(target: Target, interfaces: Interfaces) -> Mapping[str, str]:
    """With what its DHCP clients must leave alone: DNS servers that are given, another interface's default route."""
    sources = re.findall(SOURCES, target.read("/etc/network/interfaces") or "", re.MULTILINE)
    there = target.is_dir("/etc/network/interfaces.d")  # else ifup of busybox refuses the whole file
    files = render.interfaces_file(interfaces, _tells_dns(target), sources if there else ())
    keep_dns = any(render.dns(interfaces)) and not _tells_dns(target)
    no_gateway = [one.name for one in interfaces if not one.takes_gateway]
    if any(one.dhcp for one in interfaces) and (keep_dns or no_gateway):
        if target.which("dhclient"):
            files[DHCLIENT_HOOK] = render.dhclient_hook(keep_dns, no_gateway)
        if target.which("udhcpc"):
            files["/etc/udhcpc/udhcpc.conf"] = render.udhcpc_conf(keep_dns, no_gateway)
    if target.which("dhcpcd"):
        dhcp = [one.name for one in interfaces if one.dhcp]
        files[DHCPCD] = render.dhcpcd_conf(target.read(DHCPCD) or "", dhcp, keep_dns, no_gateway)
    return files


def _ifupdown_links(target: Target, _interfaces: Interfaces) -> Mapping[str, str]:
    openrc = target.is_file("/etc/init.d/networking") and target.is_dir("/etc/runlevels")
    return {"/etc/runlevels/boot/networking": "/etc/init.d/networking"} if openrc else {}


def _tells_dns(target: Target) -> bool:
    """Whether ifupdown passes dns-nameservers on, to resolvconf or to resolved."""
    scripts = "/etc/network/if-up.d"
    return target.exists(f"{scripts}/000resolvconf") or (target.exists(f"{scripts}/resolved") and has_resolved(target))


# Of NetworkManager, with any name: one without an interface is for every NIC
OTHER_PROFILES = ((f"{render.KEYFILES}/*", ETHERNET_KEYFILE), (f"{render.IFCFG}/ifcfg-*", ETHERNET_IFCFG))

BACKENDS = {
    "cloud-init": Backend(_seed, mode=0o600),
    "netplan": Backend(
        _netplan,
        contradicts=(("/etc/netplan/*", "ethernets"),),
        mode=0o600,
        makes_resolv_conf=lambda target: _renderer(target) == "NetworkManager" or has_resolved(target),
    ),
    "ifcfg": Backend(
        lambda _target, interfaces: render.ifcfg(interfaces),
        contradicts=(
            *((f"{render.IFCFG}/{kind}-e*", "") for kind in ("ifcfg", "route", "route6")),
            *OTHER_PROFILES,
        ),
        variables=lambda _interfaces: {render.IFCFG_SUSE: {"GATEWAY": "", "GATEWAYDEV": "", "NETWORKING": "yes"}},
        by_name=True,
    ),
    "NetworkManager": Backend(
        lambda _target, interfaces: render.keyfiles(interfaces),
        contradicts=(
            *OTHER_PROFILES,
            (f"{render.IFCFG}/ifcfg-e*", ""),
            ("/etc/network/interfaces", ETHERNET),  # it would leave these alone
            ("/etc/network/interfaces.d/*", ETHERNET),
        ),
        mode=0o600,
    ),
    "networkd": Backend(
        lambda _target, interfaces: render.networkd(interfaces),
        # the first that matches counts
        contradicts=(("/etc/systemd/network/00-imageos-*", ""), ("/etc/systemd/network/0*.network", ETHERNET_NETWORK)),
        links=_networkd_links,
        makes_resolv_conf=lambda target: has_resolved(target),
    ),
    "wicked": Backend(
        lambda _target, interfaces: render.wicked(interfaces),
        contradicts=(
            (f"{render.IFCFG_SUSE}/ifcfg-e*", ""),
            (f"{render.IFCFG_SUSE}/ifroute-e*", ""),
            (f"{render.IFCFG_SUSE}/routes", "^default"),
        ),
        variables=lambda interfaces: {f"{render.IFCFG_SUSE}/config": render.wicked_dns(interfaces)},
        by_name=True,
    ),
    "netifrc": Backend(
        lambda _target, interfaces: render.netifrc(interfaces),
        contradicts=(("/etc/init.d/net.e*", ""), ("/etc/runlevels/default/net.e*", "")),
        links=_netifrc_links,
        by_name=True,
    ),
    "ifupdown": Backend(
        _ifupdown,
        contradicts=(("/etc/network/interfaces.d/*", ETHERNET), (DHCLIENT_HOOK, "")),
        links=_ifupdown_links,
        by_name=True,
        makes_resolv_conf=_tells_dns,
    ),
}
