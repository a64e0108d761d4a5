"""The guest's ssh host keys, new ones of the types that its own ssh-keygen makes, and Debian's certificate."""

from __future__ import annotations

import fnmatch
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Optional

from imageos import log
from imageos.errors import Failure
from imageos.guests.accounts import SSHD_CONFIG
from imageos.guests.target import Target
from imageos.node.confinement import Room
from imageos.node.isolation import TEMPORARY
from imageos.node.programs import available
from imageos.run import Command, output_of

KEYS = "/etc/ssh/ssh_host_*"
# The second and third are those of its initramfs, which holds copies of them.
DROPBEAR = ("/etc/dropbear", "/etc/dropbear/initramfs", "/etc/dropbear-initramfs")
DROPBEAR_KEYS = tuple(f"{directory}/dropbear_*_host_key" for directory in DROPBEAR)
KINDS = ("rsa", "ecdsa", "ed25519")
DROPBEAR_KINDS = (*KINDS, "dss")  # the last is of old ones
# What sshd_config names beside KEYS
ELSEWHERE = r"""(?im)^[ \t]*HostKey[ \t]+["']?(/[^\s"'*?\[]+)["']?[ \t]*$"""
MOST_KEYS = 16  # each takes a program of the guest's
RSA = "/etc/ssh/ssh_host_rsa_key"
# Of Debian's ssl-cert: web, mail and database servers take it where they have no other
SNAKEOIL = "/etc/ssl/private/ssl-cert-snakeoil.key"
# PEM is read by every OpenSSH, its own format by 6.5 and later; 3072 bits are the default of ssh-keygen(1)
NEW_RSA = ("ssh-keygen", "-q", "-t", "rsa", "-b", "3072", "-m", "PEM", "-N", "")


class Key(NamedTuple):
    """Both files of a key, as text."""

    private: str
    public: str


GetKey = Callable[[], Optional[Key]]


def no_key() -> Key | None:
    return None


@contextmanager
def rsa_made_meanwhile(hostname: str) -> Iterator[GetKey]:
    """Make an RSA key on the node in the meantime, and yield the function that returns it; None if that failed.

    It takes up to a second of one processor, nearly all of what host keys cost, and the disk would wait for it.
    """
    if not available(NEW_RSA[0]):
        yield no_key
        return
    work = tempfile.mkdtemp(dir=TEMPORARY)
    with ExitStack() as stack:
        try:
            make = [*NEW_RSA, "-C", f"root@{hostname}", "-f", "rsa"]
            _, finish = stack.enter_context(output_of(Command(make, Room(work=work))))
        except Failure as failure:
            log.debug(str(failure))
            finish = None

        def key() -> Key | None:
            try:
                if finish:
                    finish()
                    return Key(_take(f"{work}/rsa"), _take(f"{work}/rsa.pub"))
            except (Failure, OSError, ValueError) as failure:
                log.debug(str(failure))
            return None

        yield key


def replace(target: Target, rsa: GetKey = no_key) -> None:
    """Remove the image's ssh host keys and make new ones: not every guest does so at boot."""
    _replace_dropbear(target)
    _replace_snakeoil(target)
    target.remove(KEYS)
    keygen = target.which("ssh-keygen")
    if not (keygen and target.is_dir("/etc/ssh")):
        return
    key = rsa()
    if key:
        target.write(RSA, key.private, mode=0o600)
        target.write(f"{RSA}.pub", key.public)
    _replace_elsewhere(target, keygen)
    try:
        target.run([keygen, "-A"])  # makes those that are missing
    except Failure as failure:
        log.warning(f"the guest has no ssh host keys{' but one of RSA' if key else ''}: {failure}")


def elsewhere(target: Target) -> list[str]:
    """Return the host keys that sshd's configuration names in other places than the usual one."""
    files = [path for pattern in SSHD_CONFIG for path in target.glob(pattern) if target.is_file(path)]
    found = [path for file in files for path in re.findall(ELSEWHERE, target.read(file) or "")]
    return [path for path in dict.fromkeys(found) if not fnmatch.fnmatchcase(path, KEYS)][:MOST_KEYS]


def _replace_elsewhere(target: Target, keygen: str) -> None:
    for path in elsewhere(target):
        telling, *_ = f"{target.read(f'{path}.pub') or ''} {path}".split()  # its type, or else its name
        kind = next((kind for kind in KINDS if kind in telling), KINDS[-1])
        target.remove(path)
        target.remove(f"{path}.pub")
        try:
            target.run([keygen, "-q", "-N", "", "-t", kind, "-f", path])
        except Failure as failure:
            log.warning(f"the guest has no ssh host key {path}: {failure}")


def _replace_dropbear(target: Target) -> None:
    """Make new keys in the place of dropbear's, and of every type for its daemon: a sealed image has none."""
    keygen = target.which("dropbearkey")
    for directory, pattern in zip(DROPBEAR, DROPBEAR_KEYS):
        old = target.glob(pattern)
        target.remove(pattern)
        files = {kind: pattern.replace("*", kind) for kind in DROPBEAR_KINDS}
        wanted = [kind for kind in DROPBEAR_KINDS if files[kind] in old]  # not any name: each takes a program
        if directory == DROPBEAR[0] and target.is_dir(directory):
            wanted = [*KINDS]
        elif old:
            log.warning("the guest's initramfs keeps the image's ssh host keys: update-initramfs -u makes it anew")
        for kind in wanted if keygen else ():
            try:
                target.run([keygen or "", "-t", kind, "-f", files[kind]])
            except Failure as failure:  # a type that it does not know
                log.debug(str(failure))


def _replace_snakeoil(target: Target) -> None:
    maker = target.which("make-ssl-cert")
    if not target.exists(SNAKEOIL):
        return
    try:
        if not maker:
            raise Failure("the guest has no make-ssl-cert")
        target.run([maker, "generate-default-snakeoil", "--force-overwrite"])
    except Failure as failure:
        log.warning(f"{SNAKEOIL} is that of the image: {failure}")


def _take(path: str) -> str:
    with open(path, encoding="ascii") as file:
        text = file.read()
    os.unlink(path)
    return text
