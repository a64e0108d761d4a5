"""The guest's hostname: every place where a guest keeps it, and how it is changed there.

A place is changed where it holds the old name, short or full, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from imageos import log
from imageos.guests.target import Target

_NAME = r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)"
_ALONE = rf"^\s*{_NAME}\s*$"
_YAML = rf"""^[\s{{,]*["']?(?:local-hostname|hostname|fqdn)["']?\s*:\s*["']?{_NAME}"""

# Where a guest's own name is set. Of these, the first that says anything tells how the guest is called.
OWN = {
    "/etc/hostname": _ALONE,
    "/etc/HOSTNAME": _ALONE,  # SUSE
    "/etc/sysconfig/network": rf"""^\s*HOSTNAME=["']?{_NAME}""",  # Red Hat up to 6
    "/etc/conf.d/hostname": rf"""^\s*(?i:hostname)=["']?{_NAME}""",  # OpenRC, and Gentoo before it
}
# Where it is repeated. In a path, `*` may stand in its last part, or be the last directory but one.
REPEATED = {
    "/etc/hosts": rf"(?<=\s){_NAME}(?=\s|$)",
    "/etc/mailname": _ALONE,
    "/etc/dhcp/dhclient.conf": rf"""^\s*send\s+(?:host-name|fqdn\.fqdn)\s+["']?{_NAME}""",
    "/etc/sysconfig/network-scripts/ifcfg-*": rf"""^\s*DHCP_HOSTNAME=["']?{_NAME}""",
    "/etc/cloud/cloud.cfg": _YAML,
    "/etc/cloud/cloud.cfg.d/*.cfg": _YAML,
    "/var/lib/cloud/seed/*/meta-data": _YAML,
    "/var/lib/cloud/seed/*/user-data": _YAML,
}


def rename(root: Target, old: str, new: str) -> bool:
    """Change the name in all places, unless the guest has a name of its own; whether anything was changed."""
    for path, pattern in OWN.items():
        current = find(root.read(path) or "", pattern)
        if current and current.lower() not in _forms(old, new) and current.lower() not in _forms(new, new):
            log.warning(f"the guest is called {current} (in {path}), not {old}: its name is left as it is")
            return False
        if current:
            break
    changed = []
    for path, pattern in {**OWN, **REPEATED}.items():
        for found in _expanded(root, path):
            text = root.read(found) or ""
            replaced = replace(text, pattern, old, new)
            if replaced != text:
                root.write(found, replaced)
                changed.append(found)
    if changed:
        log.info(f"renamed the guest from {old} to {new}: {', '.join(changed)}")
    else:
        log.info(f"the guest is not renamed to {new}: the name {old} is nowhere in it")
    return bool(changed)


def find(text: str, pattern: str) -> str:
    """The first name in `text` that `pattern` finds, or an empty string."""
    for line in text.splitlines():
        match = re.search(pattern, line.partition("#")[0])
        if match:
            return match["name"]
    return ""


def replace(text: str, pattern: str, old: str, new: str) -> str:
    """`text` with the old name replaced wherever `pattern` finds it; not in comments."""
    forms = _forms(old, new)

    def renamed(match: re.Match[str]) -> str:
        start, end = (place - match.start() for place in match.span("name"))
        name = forms.get(match["name"].lower(), match["name"])
        return match[0][:start] + name + match[0][end:]

    lines = []
    for line in text.splitlines(keepends=True):
        body, hash_sign, comment = line.partition("#")
        lines.append(re.sub(pattern, renamed, body) + hash_sign + comment)
    return "".join(lines)


def _forms(old: str, new: str) -> dict[str, str]:
    """Old name, full and short, in lower case -> new name."""
    return {old.lower(): new, _short(old).lower(): _short(new)}


def _short(name: str) -> str:
    return name.split(".")[0]


def _expanded(root: Target, path: str) -> Iterator[str]:
    directory, star, file = path.partition("/*/")
    paths = [f"{found}/{file}" for found in root.glob(f"{directory}/*")] if star else root.glob(path)
    yield from (found for found in paths if root.is_file(found))
