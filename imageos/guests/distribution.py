"""The system in a tree: is it one, and of which distribution?

The latter in the words of ganeti-instance-image, whose common.sh tells hooks.
"""

from __future__ import annotations

import re

from imageos.errors import Failure
from imageos.guests.target import Target, opened

# A file that a family of distributions has always had
FAMILIES = {
    "/etc/redhat-release": "redhat",
    "/etc/debian_version": "debian",
    "/etc/gentoo-release": "gentoo",
    "/etc/SuSE-release": "suse",
}


def is_system(root: Target) -> bool:
    """Return whether this is the root of a system, all of it: configuration and programs."""
    return root.is_dir("/etc") and (root.exists("/bin") or root.exists("/usr/bin"))


def shell_variables(directory: str) -> str:
    """Return OS_TYPE, OPERATING_SYSTEM and OS_RELEASE of the guest in `directory`, a line each; empty if not known."""
    with opened(directory) as target:
        family = _family(target)
        found = {"OS_TYPE": family, "OPERATING_SYSTEM": _name(target, family), "OS_RELEASE": _release(target)}
    return "".join(f"{name}={value}\n" for name, value in found.items())


def _family(target: Target) -> str:
    for path, family in FAMILIES.items():
        if target.exists(path):
            return family
    return "suse" if "suse" in os_release(target, "ID_LIKE") else ""


def _name(target: Target, family: str) -> str:
    name = os_release(target, "ID")
    if name:
        return "redhat" if name == "rhel" else name
    if target.exists("/etc/fedora-release"):
        return "fedora"
    is_centos = family == "redhat" and "centos" in _text(target, "/etc/redhat-release").lower()
    return "centos" if is_centos else family


def _release(target: Target) -> str:
    release = os_release(target, "VERSION_ID")
    if not release and target.exists("/etc/debian_version"):
        release = _word(_text(target, "/etc/debian_version"))
    elif not release:
        number = re.match(r"[^0-9]*([0-9.]*)", _text(target, "/etc/redhat-release"))
        release = _word(number[1]) if number else ""
    return release


def os_release(target: Target, name: str) -> str:
    text = _text(target, "/etc/os-release") or _text(target, "/usr/lib/os-release")
    value = re.search(rf"^{name}=[\"']?([^\"'\n]*)", text, re.MULTILINE)
    return _word(value[1]) if value else ""


def _text(target: Target, path: str) -> str:
    """Return the text of a file; empty if it is missing, a FIFO, a device, or too large."""
    try:
        return target.read(path) or ""
    except Failure:
        return ""


def _word(value: str) -> str:
    """Return `value` if it has only the characters that distributions use: a shell gets it."""
    return value.strip() if re.fullmatch(r"[\w./ +-]{0,100}", value.strip(), re.ASCII) else ""
