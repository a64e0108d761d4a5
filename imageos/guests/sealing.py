"""Sealing: what makes a system this one instance is taken out, so that it can be the template of others.

Accounts, passwords, authorized keys and what the site has configured stay.
"""

from __future__ import annotations

from imageos.guests import cloudinit, guest, hostkeys
from imageos.guests.target import Target

# What is removed besides what every new instance gets anew (guest.forget_identity). Only names may be patterns.
REMOVED = (
    # keys and secrets of this machine
    hostkeys.KEYS,
    "/var/lib/systemd/credential.secret",
    "/var/lib/NetworkManager/secret_key",
    # leases
    "/var/lib/dhcp/*",
    "/var/lib/dhclient/*",
    "/var/lib/dhcpcd/*",
    "/var/lib/NetworkManager/*.lease",
    "/var/lib/NetworkManager/*.leases",
    "/var/lib/systemd/network",
    # names of interfaces by the MAC of this machine's
    "/etc/udev/rules.d/70-persistent-net.rules",
    "/etc/udev/rules.d/70-persistent-cd.rules",
    # what cloud-init was told, and what it wrote from that
    f"{cloudinit.SEED}*",
    cloudinit.DATASOURCE,
    "/etc/netplan/50-cloud-init.yaml",
    "/etc/network/interfaces.d/50-cloud-init*",
    # what memory held
    "/var/lib/systemd/coredump/*",
    "/var/crash/*",
    # what was in passing
    "/tmp/*",
    "/var/tmp/*",
    # logs that are over; of the others see below
    "/var/log/journal/*",
    "/var/log/*.gz",
    "/var/log/*.xz",
    "/var/log/*.old",
    "/var/log/*.[0-9]",
)
EMPTIED = ("/var/log",)  # files stay, with owner and mode: not every daemon makes its log anew
HOMES = ("/root", "/home/*")
HISTORIES = (
    ".*_history",  # bash, ash, sh, zsh, python, mysql, psql, sqlite, ...
    ".history",
    ".lesshst",
    ".viminfo",
    ".wget-hsts",
)


def seal(target: Target) -> None:
    """Make a template of the system."""
    guest.forget_identity(target)
    for pattern in REMOVED:
        target.remove(pattern)
    for directory in EMPTIED:
        target.empty_files(directory)
    for homes in HOMES:
        for home in target.glob(homes):
            for pattern in HISTORIES:
                target.remove(f"{home}/{pattern}")
