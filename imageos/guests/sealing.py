"""Sealing: remove all that makes a system this one instance, so that it can be the template of others.

Accounts, passwords, authorized keys and what the site has configured stay.
"""

from __future__ import annotations

from imageos.guests import cloudinit, guest, hostkeys
from imageos.guests.target import Target
from imageos.network import backends

# Removed in addition to guest.forget_identity. Only names may be patterns.
REMOVED = (
    *(hostkeys.KEYS, *hostkeys.DROPBEAR_KEYS),
    # names of interfaces by the MAC of this machine's, and of drives
    *(*backends.NAMES, "/etc/udev/rules.d/70-persistent-cd.rules"),
    *cloudinit.INSTANCE_FILES,
    # contents of memory
    *("/var/lib/systemd/coredump/*", "/var/crash/*"),
    # mail that every copy would deliver
    *("/var/spool/postfix/maildrop/*", "/var/spool/postfix/incoming/*", "/var/spool/postfix/active/*"),
    *("/var/spool/postfix/deferred/*", "/var/spool/postfix/defer/*", "/var/spool/exim4/input/*"),
    *("/var/spool/exim4/msglog/*", "/var/spool/mqueue/*", "/var/spool/nullmailer/queue/*"),
    *("/var/mail/*", "/var/spool/mail/*"),
    # temporary files
    *("/tmp/*", "/var/tmp/*"),
    # old logs; current ones are emptied, below
    *("/var/log/journal/*", "/var/log/*.gz", "/var/log/*.xz", "/var/log/*.old", "/var/log/*.[0-9]"),
)
HOMES = ("/root", "/home/*")
# .*_history: of bash, ash, sh, zsh, python, mysql, psql, sqlite, ...
HISTORIES = (".*_history", ".history", ".lesshst", ".viminfo", ".wget-hsts")


def seal(target: Target) -> None:
    guest.forget_identity(target)
    for pattern in (*REMOVED, *hostkeys.elsewhere(target)):
        target.remove(pattern)
    target.empty_files("/var/log")  # files stay, with owner and mode: not every daemon makes its log anew
    for homes in HOMES:
        for home in target.glob(homes):
            for pattern in HISTORIES:
                target.remove(f"{home}/{pattern}")
