"""The guest's hostname: every file in which a guest keeps it, and how it is changed there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from imageos import log
from imageos.guests import cloudinit
from imageos.guests.distribution import os_release
from imageos.guests.target import Target, holding

_NAME = r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)"
_ANY = r"""(?P<name>[^"'\s]*)"""  # any value, to be replaced by the name
_ALONE = rf"^\s*{_NAME}\s*$"
_LIST = r"(?P<name>(?P<list>[^\n\"']*))"  # of names, with anything between them
_YAML = rf"""^[\s{{,]*["']?(?:local-hostname|hostname|fqdn)["']?\s*:\s*["']?{_NAME}"""

HOSTNAME, HOSTS, MAILNAME = "/etc/hostname", "/etc/hosts", "/etc/mailname"
# The files that set the guest's name. The first that holds one tells how the guest is called.
OWN = {
    HOSTNAME: _ALONE,
    "/etc/HOSTNAME": _ALONE,  # SUSE
    "/etc/sysconfig/network": rf"""^\s*HOSTNAME=["']?{_NAME}""",  # Red Hat up to 6
    "/etc/conf.d/hostname": rf"""^\s*(?i:hostname)=["']?{_NAME}""",  # OpenRC, and Gentoo before it
}
FULL = ("/etc/HOSTNAME", "/etc/sysconfig/network")  # these hold the full name
# The distributions (ID or ID_LIKE of os-release) whose /etc/hostname holds the full name
FULL_DISTRIBUTIONS = ("rhel", "fedora", "centos", "suse", "sles", "opensuse")
# The files that repeat it. In a path, `*` may stand in its last part, or be the last directory but one.
REPEATED = {
    HOSTS: rf"(?<=\s){_NAME}(?=\s|$)",
    MAILNAME: _ALONE,
    # what begins with blanks continues a line
    "/etc/postfix/main.cf": rf"^\s*(?:(?:myhostname|myorigin|mydestination)\s*=\s*|(?<=\s)(?=\S[^=]*$)){_LIST}",
    "/etc/exim4/update-exim4.conf.conf": rf"""^dc_(?:other_hostnames|readhost|visiblename)=["']?{_LIST}""",
    **dict.fromkeys(("/etc/nullmailer/me", "/etc/nullmailer/helohost", "/etc/mail/local-host-names"), _ALONE),
    **dict.fromkeys(("/etc/ssmtp/ssmtp.conf", "/etc/dma/dma.conf"), rf"^\s*(?:hostname\s*=|MAILNAME)\s*{_NAME}"),
    "/etc/msmtprc": rf"^\s*(?:domain|maildomain)\s+{_NAME}\s*$",
    "/etc/machine-info": rf"""^\s*PRETTY_HOSTNAME=["']?{_NAME}["']?\s*$""",
    **dict.fromkeys(
        ("/etc/puppetlabs/puppet/puppet.conf", "/etc/puppet/puppet.conf"), rf"^\s*certname\s*=\s*{_NAME}\s*$"
    ),
    **dict.fromkeys(("/etc/salt/minion", "/etc/salt/minion.d/*.conf"), rf"""^id:\s*["']?{_NAME}["']?\s*$"""),
    "/etc/salt/minion_id": _ALONE,
    "/etc/chef/client.rb": rf"""^\s*node_name[\s(]+["']{_NAME}["']""",
    **dict.fromkeys(
        (
            *("/etc/zabbix/zabbix_agentd.conf", "/etc/zabbix/zabbix_agent2.conf"),
            *("/etc/zabbix/zabbix_agentd.d/*.conf", "/etc/zabbix/zabbix_agent2.d/*.conf"),
        ),
        rf"^Hostname={_NAME}\s*$",
    ),
    **dict.fromkeys(
        ("/etc/telegraf/telegraf.conf", "/etc/collectd/collectd.conf"), rf"""^\s*(?i:hostname)[\s=]+"{_NAME}"\s*$"""
    ),
    "/etc/munin/munin-node.conf": rf"^\s*host_name\s+{_NAME}\s*$",
    "/etc/icinga2/constants.conf": rf"""^const\s+NodeName\s*=\s*"{_NAME}"\s*$""",
    "/etc/icinga2/zones.conf": rf"""^\s*(?:object\s+(?:Endpoint|Zone)\s+|endpoints\s*=\s*\[\s*)"{_NAME}\"""",
    **dict.fromkeys(
        ("/etc/datadog-agent/datadog.yaml", "/etc/netdata/netdata.conf"), rf"^\s*hostname\s*[:=]\s*{_NAME}\s*$"
    ),
    "/etc/snmp/snmpd.conf": rf"^\s*sysName\s+{_NAME}\s*$",
    "/etc/dhcp/dhclient.conf": rf"""^\s*send\s+(?:host-name|fqdn\.fqdn)\s+["']?{_NAME}""",
    "/etc/sysconfig/network-scripts/ifcfg-*": rf"""^\s*DHCP_HOSTNAME=["']?{_NAME}""",
    f"{cloudinit.STATE}/data/previous-hostname": _ALONE,
    **dict.fromkeys((*cloudinit.NAMED, f"{cloudinit.STATE}/data/set-hostname"), _YAML),
}
# Where a name only says on which machine a key was made, or metadata of LVM was written
REMARKS = ("/etc/ssh/ssh_host_", "/etc/lvm/archive/", "/etc/lvm/backup/")


def write(root: Target, name: str) -> None:
    """Name the guest, in /etc/hostname, in /etc/hosts, in the files of older guests, and where the image's name is."""
    old = _old_name(root)
    like = f"{os_release(root, 'ID')} {os_release(root, 'ID_LIKE')}".split()
    is_full = any(distribution.split("-")[0] in FULL_DISTRIBUTIONS for distribution in like)
    if old.lower() not in _forms(name, name):
        root.edit(HOSTS, partial(without_addresses, name=old))
    root.edit(HOSTS, partial(hosts, instance_name=name))
    for path in [HOSTNAME, *filter(root.is_file, list(OWN)[1:])]:
        own = name if path in FULL or (path == HOSTNAME and is_full) else _short(name)
        root.write(path, own + "\n" if OWN[path] == _ALONE else _assign(root.read(path) or "", OWN[path], own))
    if root.is_file(MAILNAME):
        root.write(MAILNAME, f"{name}\n")
    if old:
        _replace_all(root, REPEATED, old, name)
        _warn_of_rest(root, old, name)


def _old_name(root: Target) -> str:
    """Return the image's name, with a domain if one of its files adds that; empty if it is nobody's name."""
    texts = {path: root.read(path) or "" for path in (*OWN, HOSTS, MAILNAME) if root.is_file(path)}
    own = next(filter(None, (find(texts.get(path, ""), pattern) for path, pattern in OWN.items())), "")
    if _short(own.lower()) in ("localhost", ""):
        return ""
    lines = [line.partition("#")[0] for line in texts.get(HOSTS, "").splitlines()]
    known = [line for line in lines if line.lstrip().startswith("127.") or own in line.split()]
    names = " ".join([own, *known, texts.get(MAILNAME, "")]).split()
    return next((name for name in names if name.lower().startswith(f"{own.lower()}.")), own)


def _replace_all(root: Target, patterns: Mapping[str, str], old: str, new: str) -> list[str]:
    """Replace the old name, short or full, where the patterns find it; return the files that changed."""
    return [
        found
        for path, pattern in patterns.items()
        for found in _expand(root, path)
        if root.edit(found, partial(replace, pattern=pattern, old=old, new=new))
    ]


def _warn_of_rest(root: Target, old: str, new: str) -> None:
    """Name the files of the guest's configuration that have the old name still; a name without a domain is any word."""
    if "." in old and old.lower() != new.lower():
        found = [path for path in holding(root, "/etc", [old]) if not path.startswith(REMARKS)]
        if found:
            log.warning(f"the old name {old} stays in {log.few(found)}: what it means there is not known")


def without_addresses(text: str, name: str) -> str:
    """Return the text of /etc/hosts in which only addresses of the loopback are called `name`, or its short form."""
    lines = []
    for line in text.splitlines(keepends=True):
        body, hash_sign, comment = line.partition("#")
        address, *names = body.split() or [""]
        kept = [one for one in names if one.lower() not in _forms(name, name)]
        if kept == names or address == "::1" or address.startswith("127."):
            lines.append(line)
        elif kept:
            lines.append(f"{address}\t{' '.join(kept)}{' ' if hash_sign else ''}{hash_sign}{comment}".rstrip() + "\n")
    return "".join(lines)


def hosts(text: str, instance_name: str) -> str:
    """Return the text of /etc/hosts with the instance's name on Debian's own line for it, 127.0.1.1."""
    short = _short(instance_name)
    names = instance_name if short == instance_name else f"{instance_name} {short}"
    lines = text.splitlines() or ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    localhost = next((n for n, line in enumerate(lines) if line.split()[:1] == ["127.0.0.1"]), -1)
    return with_line(lines, r"\s*127\.0\.1\.1(\s.*)?", f"127.0.1.1\t{names}", localhost + 1)


def with_line(lines: Sequence[str], old: str, new: str, default: int) -> str:
    """Return a text with `new` instead of the lines that match `old`: where the first was, else at number `default`."""
    number = next((n for n, line in enumerate(lines) if re.fullmatch(old, line)), default)
    kept = [line for line in lines if not re.fullmatch(old, line)]
    return "".join(f"{line}\n" for line in [*kept[:number], new, *kept[number:]])


def rename(root: Target, old: str, new: str) -> bool:
    """Replace the old name, short or full, in all files, unless the guest has another; return whether one changed."""
    for path, pattern in OWN.items():
        current = find(root.read(path) or "", pattern)
        if current and current.lower() not in _forms(old, new) and current.lower() not in _forms(new, new):
            log.warning(f"the guest is called {current} (in {path}), not {old}: its name is left as it is")
            return False
        if current:
            break
    changed = _replace_all(root, {**OWN, **REPEATED}, old, new)
    _warn_of_rest(root, old, new)
    if changed:
        cloudinit.rename(root, new)
        log.info(f"renamed the guest from {old} to {new}: {', '.join(changed)}")
    else:
        log.info(f"the guest is not renamed to {new}: the name {old} is nowhere in it")
    return bool(changed)


def find(text: str, pattern: str) -> str:
    """Return the first name in `text` that `pattern` finds, or an empty string."""
    for line in text.splitlines():
        match = re.search(pattern, line.partition("#")[0])
        if match:
            return match["name"]
    return ""


def replace(text: str, pattern: str, old: str, new: str) -> str:
    """Return `text` with the old name replaced wherever `pattern` finds it; not in comments."""
    forms = _forms(old, new)
    return _with_names(text, pattern, lambda name: forms.get(name.lower(), name))


def _assign(text: str, pattern: str, name: str) -> str:
    return _with_names(text, pattern.replace(_NAME, _ANY), lambda _: name)


def _with_names(text: str, pattern: str, renamed: Callable[[str], str]) -> str:
    def replaced(match: re.Match[str]) -> str:
        start, end = (position - match.start() for position in match.span("name"))
        is_list = "list" in match.groupdict()
        name = re.sub(_NAME, lambda one: renamed(one["name"]), match["name"]) if is_list else renamed(match["name"])
        return match[0][:start] + name + match[0][end:]

    lines = []
    for line in text.splitlines(keepends=True):
        body, hash_sign, comment = line.partition("#")
        lines.append(re.sub(pattern, replaced, body) + hash_sign + comment)
    return "".join(lines)


def _forms(old: str, new: str) -> dict[str, str]:
    """Return old name, full and short, in lower case -> new name."""
    return {old.lower(): new, _short(old).lower(): _short(new)}


def _short(name: str) -> str:
    return name.split(".")[0]


def _expand(root: Target, path: str) -> Iterator[str]:
    directory, star, file = path.partition("/*/")
    paths = [f"{found}/{file}" for found in root.glob(f"{directory}/*")] if star else root.glob(path)
    yield from (found for found in paths if root.is_file(found))
