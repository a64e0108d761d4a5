"""Who makes the guest's /etc/resolv.conf? Look at the file itself, and let its resolver ask the servers that we set."""

from __future__ import annotations

import os
import re

from imageos import log
from imageos.guests.services import is_enabled
from imageos.guests.target import Target, real
from imageos.network import RESOLV_CONF, existing, render
from imageos.network.render import Interfaces

RESOLVED = "systemd-resolved"
RESOLVED_CONFIG = "/etc/systemd/resolved.conf.d/zz-imageos.conf"  # the last one counts
RESOLVED_CONFIGS = ("/usr/lib/systemd/resolved.conf.d", "/etc/systemd/resolved.conf.d")
RESOLVED_LINK = "../run/systemd/resolve"
DEMANDS, YES = ("DNSOverTLS", "DNSSEC"), ("yes", "true", "on", "1")
# Directories that only a running guest fills, in which resolv.conf is a link, and by whom
FILLED = {
    "/run/systemd/resolve": (RESOLVED,),
    "/usr/lib/systemd": (RESOLVED,),
    "/lib/systemd": (RESOLVED,),
    "/run/NetworkManager": ("NetworkManager", "networkmanager"),
    "/run/connman": ("connman",),
    "/run/resolvconf": (),
    "/etc/resolvconf/run": (),
    "/run/netconfig": (),
}
RESOLVCONF = ("/etc/resolvconf/resolv.conf.d/head", "/etc/resolvconf/resolv.conf.d/base", "/etc/resolvconf.conf")
SERVERS_OF_RESOLVCONF = r"^[ \t]*(nameserver[ \t]|name_servers=).*\n?"
WITHOUT_SERVICE = {"/run/resolvconf": "resolvconf", "/etc/resolvconf/run": "resolvconf", "/run/netconfig": "netconfig"}


def settle(target: Target, interfaces: Interfaces, is_told: bool, tells_file: bool, own: str = "") -> None:
    """Set the DNS servers, and see that resolv.conf is what an enabled program writes.

    `is_told`: the program that rules the network tells the servers to resolved, resolvconf or the file. `tells_file`:
    it writes the file itself, unless this is a link to what resolved writes. `own`: or only this one, elsewhere.
    """
    is_known = any(render.dns(interfaces))
    if is_known:
        _forget_servers(target)
    has_resolved = is_enabled(target, RESOLVED)
    target.remove("/etc/systemd/resolved.conf.d/*imageos.conf")
    if target.link(RESOLV_CONF) is None and target.is_dir(RESOLV_CONF):
        target.remove(RESOLV_CONF)  # a container's mistake, which nobody could write to
    if has_resolved and not (tells_file and not _leads_to_resolved(target)):
        said = _resolved_conf(target)
        if is_known and (not is_told or said.get("DNS") or said.get("Domains")):
            target.write(RESOLVED_CONFIG, render.resolved_conf(() if is_told else interfaces))
        demands = [f"{key}={said[key]}" for key in DEMANDS if said.get(key, "").lower() in YES]
        if is_known and demands:
            log.warning(f"the guest's resolved asks no server without {', '.join(demands)}: DNS_SERVERS must have it")
        if not _leads_to_resolved(target):
            has_stub = said.get("DNSStubListener", "yes").lower() in (*YES, "udp", "tcp")
            target.symlink(f"{RESOLVED_LINK}/{'stub-' if has_stub else ''}resolv.conf", RESOLV_CONF)
    elif own and is_told:
        target.symlink(own, RESOLV_CONF)
    elif is_known and (not is_told or not _is_filled(target) or _leads_elsewhere(target)):
        target.write(RESOLV_CONF, render.resolv_conf(interfaces), follow=False)
    elif not _is_filled(target):
        # for a DHCP client to fill; systemd starts none that may write to a file that is missing
        target.write(RESOLV_CONF, render.HEADER, follow=False)


def is_of_resolvconf(target: Target) -> bool:
    return WITHOUT_SERVICE.get(_directory(target)) == "resolvconf" and _is_filled(target)


def has_only_resolvectl(target: Target) -> bool:
    """Return whether resolvconf is the one of resolved, which only talks to it."""
    program = target.which("resolvconf")
    return program is not None and (real(target, program) or "").endswith("/resolvectl")


def has_idle_resolvconf(target: Target, tells_file: bool) -> bool:
    """Return whether resolvconf is of no use: NetworkManager and dhcpcd prefer it to the file, but its resolved is off.

    Or resolved is on, and resolv.conf a file that knows nothing of it; `tells_file`: it stays one (see settle).
    """
    is_asked = is_enabled(target, RESOLVED) and (not tells_file or _leads_to_resolved(target))
    return has_only_resolvectl(target) and not is_asked


def _forget_servers(target: Target) -> None:
    """Take DNS servers of the image out of what resolvconf, of Debian or openresolv, writes before all others."""
    for path in RESOLVCONF:
        if target.is_file(path):
            target.edit(path, lambda text: re.sub(SERVERS_OF_RESOLVCONF, "", text, flags=re.MULTILINE))


def _resolved_conf(target: Target) -> dict[str, str]:
    """Return what the image tells resolved; of a list, the assignments of one file are joined."""
    found: dict[str, str] = {}
    drop_ins = sorted(
        (path for directory in RESOLVED_CONFIGS for path in target.glob(f"{directory}/*.conf")), key=os.path.basename
    )
    for path in ("/etc/systemd/resolved.conf", *filter(target.is_file, drop_ins)):
        found.update(existing.ini_section(target.read(path) or "", "Resolve"))
    return found


def _leads_to_resolved(target: Target) -> bool:
    return RESOLVED in FILLED.get(_directory(target), ())


def _is_filled(target: Target) -> bool:
    """Return False for a link to what no program of this guest writes."""
    directory = _directory(target)
    if directory in WITHOUT_SERVICE:
        program = WITHOUT_SERVICE[directory]
        return target.which(program) is not None and not (program == "resolvconf" and has_only_resolvectl(target))
    if directory in FILLED:
        return any(is_enabled(target, service) for service in FILLED[directory])
    # a missing one becomes, when the guest boots, what any package's tmpfiles.d(5) links; netconfig keeps to its own
    is_missing = target.link(RESOLV_CONF) is None and not target.exists(RESOLV_CONF)
    return target.which("netconfig") is not None if is_missing else target.is_file(RESOLV_CONF)


def _leads_elsewhere(target: Target) -> bool:
    """Return whether it is a link to a file of the image's builder: who writes resolv.conf leaves such a one alone."""
    return _directory(target) not in ("", *FILLED)


def _directory(target: Target) -> str:
    """Return the directory that a link leads to, of which only a running guest may have the rest; empty if none."""
    link = target.link(RESOLV_CONF)
    if link is None:
        return ""
    return os.path.dirname(os.path.normpath(os.path.join("/etc", link)).replace("/var/run/", "/run/"))
