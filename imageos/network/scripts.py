"""What an image has besides the programs that configure a network: its own scripts and units, the kernel's `ip=`.

Nothing can tell these to leave a NIC alone, so they are only found, for a warning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice

from imageos.errors import Failure
from imageos.guests.bootloaders import command_lines
from imageos.guests.services import OWN_UNITS, is_started
from imageos.guests.target import Target

PLACES = (
    *("/etc/rc.local", "/etc/rc.d/rc.local", "/etc/init.d/*.local", "/etc/local.d/*.start"),
    *("/etc/network/if-pre-up.d/*", "/etc/network/if-up.d/*"),
    "/etc/NetworkManager/dispatcher.d/*",
    *("/etc/networkd-dispatcher/routable.d/*", "/etc/networkd-dispatcher/configured.d/*"),
    *("/etc/dhcp/dhclient-enter-hooks.d/*", "/etc/dhcp/dhclient-exit-hooks.d/*"),
    *("/etc/cron.d/*", "/var/spool/cron/crontabs/root"),
)
PROGRAMS = frozenset(("ip", "ifconfig", "route", "ifup", "dhclient", "dhcpcd", "udhcpc", "nmcli"))
ASKS = frozenset(("show", "get", "list"))
# Not within an `if`, as in the hooks of packages, which tell the servers to resolved or resolvconf instead
NO_RESOLV_CONF = re.compile(r"^make_resolv_conf\s*\(\)\s*\{\s*(?::|true|return)[\s;0]*\}", re.MULTILINE)
MOST_UNITS = 20  # that name a NIC, of which it is asked whether they are started
NIC = r"(eth|en[a-z]+)[0-9]\w*"


def configuring(target: Target) -> Iterator[str]:
    """Yield what configures a NIC that it names, or sets a default route: paths, and arguments of the kernel."""
    yield from (path for place in PLACES for path in _found(target, place))
    units = islice(_found(target, f"{OWN_UNITS}/*.service"), MOST_UNITS)
    yield from (path for path in units if is_started(target, os.path.basename(path)))
    words = {word for line in command_lines(target) for word in line.split()}
    yield from (f"the kernel's {word}" for word in sorted(words) if re.match("ip=[^on]", word))


def keeping_dns(target: Target) -> list[str]:
    """Return hooks of dhclient that keep DHCP's servers from resolv.conf, as forums advise it."""
    paths = filter(target.is_file, target.glob("/etc/dhcp/dhclient-enter-hooks.d/*"))
    return [path for path in paths if NO_RESOLV_CONF.search(_text(target, path))]


def _found(target: Target, pattern: str) -> Iterator[str]:
    for path in filter(target.is_file, target.glob(pattern)):
        if any(_configures(line) for line in _text(target, path).splitlines()):
            yield path


def _text(target: Target, path: str) -> str:
    """Return a script; nothing of what is too large for one, as a compiled program may be."""
    try:
        return target.read(path) or ""
    except Failure:
        return ""


def _configures(line: str) -> bool:
    words = re.findall(r"[\w-]+", line.partition("#")[0])  # of /sbin/ip the last one, of eth0:1 the first
    if not PROGRAMS.intersection(words) or ASKS.intersection(words):
        return False
    return "default" in words or any(re.fullmatch(NIC, word) for word in words)
