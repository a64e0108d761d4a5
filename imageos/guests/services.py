"""The services that a guest starts when it boots, asked as its init would: systemd, OpenRC or sysvinit.

Nothing is started for that: the links are read, because a guest's programs may be for another processor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from imageos.guests.target import Target, matches, real

Names = dict[str, list[str]]

OWN_UNITS = "/etc/systemd/system"
UNITS = (OWN_UNITS, "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
DEPENDENCIES = ("wants", "requires", "upholds")
# Each of these is reached in a boot to multi-user.target or graphical.target, or wanted by one of many units.
REACHED = frozenset(
    f"{name}.target"
    for name in (
        *("sysinit", "basic", "local-fs", "remote-fs", "sockets", "timers", "paths", "getty"),
        *("network-pre", "network", "network-online", "default"),
    )
)
DEFAULTS = ("multi-user.target", "graphical.target")  # the second includes the first
# Links to these may have the names of run levels, which old instructions use
RUN_LEVEL_TARGETS = {
    **dict.fromkeys(("runlevel2.target", "runlevel3.target", "runlevel4.target"), DEFAULTS[0]),
    **{"runlevel1.target": "rescue.target", "runlevel5.target": DEFAULTS[1]},
}
RUN_LEVELS = "2345"
# SUSE up to 11 has its directories below init.d
RUN_LEVEL_DIRECTORIES = ("/etc", "/etc/init.d", "/etc/rc.d")
RUNIT = ("/etc/runit/runsvdir/default", "/etc/service")  # of Void, Debian
GENERATORS = (
    *("/etc/systemd/system-generators", "/usr/local/lib/systemd/system-generators"),
    *("/usr/lib/systemd/system-generators", "/lib/systemd/system-generators"),
)


def unit_file(target: Target, unit: str) -> str | None:
    """Return the path of a unit that a package of the guest has brought."""
    return next((path for path in (f"{units}/{unit}" for units in UNITS[2:]) if target.is_file(path)), None)


def exists(target: Target, service: str) -> bool:
    """Return whether a package of the guest has brought a service for any init."""
    return target.exists(f"/etc/init.d/{service}") or unit_file(target, f"{service}.service") is not None


def is_enabled(target: Target, service: str) -> bool:
    """Return whether the guest starts a service when it boots."""
    kind = init(target)
    return any(is_asked(target, service) for name, is_asked in INITS.items() if kind in (name, ""))


def init(target: Target) -> str:
    """Return what /sbin/init is, one of INITS; empty if that is not known, so that it may be any of them."""
    path = real(target, "/sbin/init")
    if not path:
        return ""
    if os.path.basename(path) == "systemd":
        return "systemd"
    if os.path.basename(path) in ("runit-init", "runit"):
        return "runit"
    has_openrc = target.is_dir("/etc/runlevels") and target.which("openrc")
    if os.path.basename(path) == "openrc-init" or has_openrc or matches(target, "/etc/inittab", r"^[^#\n]*\bopenrc\b"):
        return "openrc"
    return "sysvinit" if target.is_file("/etc/inittab") else ""


# --- systemd ----------------------------------------------------------------------------------------------


def is_masked(target: Target, unit: str) -> bool:
    """Return whether the first file of that name is empty, or a link to /dev/null: systemd.unit(5)."""
    for path in (f"{units}/{unit}" for units in UNITS):
        link = target.link(path)
        if link is not None and os.path.normpath(link).endswith("/dev/null"):
            return True
        if target.is_file(path):
            return not target.read(path)
    return False


def has_generator(target: Target, name: str) -> bool:
    """Return whether systemd runs a generator; a link to /dev/null masks it."""
    paths = [f"{directory}/{name}" for directory in GENERATORS]
    first = next((path for path in paths if target.link(path) is not None or target.is_file(path)), "")
    return target.is_file(first) and init(target) in ("systemd", "")


def disable(target: Target, units: Sequence[str]) -> bool:
    """Remove the links by which systemd starts units of the guest's configuration; return whether there were any."""
    directories = [path for dependency in DEPENDENCIES for path in target.glob(f"{OWN_UNITS}/*.{dependency}")]
    links = [link for path in directories for link in target.glob(f"{path}/*") if os.path.basename(link) in units]
    for link in links:
        target.remove(link)
    return bool(links)


def is_started(target: Target, unit: str, reached: frozenset[str] = frozenset()) -> bool:
    """Return whether links lead from the default target, or from a unit in `reached`, to a unit.

    Presets do not count: systemd applies them where there is no machine-id, and create leaves an empty one.
    """
    ends = REACHED | reached | _default(target)
    starters, aliases = _links(target)
    asked, seen = [unit], set[str]()
    while asked:
        current = asked.pop()
        if current in seen or is_masked(target, current):
            continue
        seen.add(current)
        if current in ends:
            return True
        if _exists(target, current):
            names = (current, *aliases.get(current, ()))
            asked += [starter for name in names for starter in starters.get(name, ())]
            asked += _starters(target, current)
    return False


def _default(target: Target) -> set[str]:
    """Return what a boot reaches: a target of the image's own is taken for one that includes both, as it must."""
    links = (target.link(f"{units}/default.target") for units in UNITS)
    default = next((os.path.basename(link) for link in links if link), DEFAULTS[-1])
    default = RUN_LEVEL_TARGETS.get(default, default)
    return {default, *(() if default in ("rescue.target", "emergency.target", DEFAULTS[0]) else DEFAULTS)}


def _exists(target: Target, unit: str) -> bool:
    name, _, kind = unit.rpartition(".")
    has_script = kind == "service" and target.is_file(f"/etc/init.d/{name}")
    return has_script or any(target.is_file(f"{units}/{unit}") for units in UNITS)


def _links(target: Target) -> tuple[Names, Names]:
    """Return for every unit those that start it by a link (which may dangle), and its other names.

    Read at once: a hostile image may have a thousand units that start each other.
    """
    starters: Names = {}
    for directory in [
        path for units in UNITS for dependency in DEPENDENCIES for path in target.glob(f"{units}/*.{dependency}")
    ]:
        for path in target.glob(f"{directory}/*"):
            starters.setdefault(os.path.basename(path), []).append(os.path.basename(directory).rpartition(".")[0])
    aliases: Names = {}
    for path in target.glob(f"{OWN_UNITS}/*"):
        link = target.link(path)
        if link:
            aliases.setdefault(os.path.basename(link), []).append(os.path.basename(path))
    return starters, aliases


def _starters(target: Target, unit: str) -> list[str]:
    """Return the units that start this one without a link of their own: its socket, the links of run levels."""
    name, _, kind = unit.rpartition(".")
    if kind != "service":
        return []
    has_script = unit_file(target, unit) is None and _is_in_run_levels(target, name)
    return [f"{name}.socket", *(["basic.target"] if has_script else [])]


# --- the others -------------------------------------------------------------------------------------------


def _is_in_runlevels(target: Target, service: str) -> bool:
    """OpenRC's."""
    levels = ("sysinit", "boot", "default")
    return target.exists(f"/etc/init.d/{service}") and any(
        target.glob(f"/etc/runlevels/{level}/{service}") for level in levels
    )


def _is_in_run_levels(target: Target, service: str) -> bool:
    """Those of sysvinit."""
    default = re.search(r"^[^#:\n]*:([0-9]):initdefault:", target.read("/etc/inittab") or "", re.MULTILINE)
    levels = default[1] if default else RUN_LEVELS
    return any(
        target.glob(f"{directory}/rc{level}.d/S[0-9][0-9]{service}")
        for directory in RUN_LEVEL_DIRECTORIES
        for level in ("S", *levels)
    )


def _is_in_runit(target: Target, service: str) -> bool:
    return any(target.glob(f"{directory}/{service}") for directory in RUNIT)


INITS = {
    "systemd": lambda target, service: is_started(target, f"{service}.service"),
    "openrc": _is_in_runlevels,
    "sysvinit": _is_in_run_levels,
    "runit": _is_in_runit,
}
