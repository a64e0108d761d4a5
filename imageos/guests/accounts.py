"""Root's account in the guest: its keys, its password, and what else in the guest decides whether they let root in."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from imageos import log, logins
from imageos.errors import Failure
from imageos.guests.services import is_enabled
from imageos.guests.target import Target, directory_of, fits, matches, real
from imageos.logins import AuthorizedKey, bits

PASSWD, SHADOW = "/etc/passwd", "/etc/shadow"
HOME, SHELL = 5, 6  # fields of passwd(5)
PASSWORD = 1  # field of passwd(5) and shadow(5)
CHANGED, MAXIMUM, EXPIRES = 2, 4, 7  # fields of shadow(5): days since 1970, days, days since 1970
DAY = 86400  # seconds
NO_LOGIN = ("nologin", "false")  # shells that let nobody in
# Where crypt(3) is, and what it knows where that is musl, whose library does not tell
LIBCRYPTS = tuple(f"{directory}/libcrypt.so*" for directory in ("/lib", "/usr/lib", "/usr/lib64", "/usr/lib/*-linux-*"))
MUSL, MUSL_HASHES = "/lib/ld-musl-*", ("", "_", "$1$", "$2a$", "$2b$", "$2x$", "$2y$", "$5$", "$6$")
EVERYWHERE = ("0.0.0.0", "[::]")  # sshd listens on all addresses
AUTHORIZED_KEYS = ".ssh/authorized_keys"
# Settings of sshd that may keep root out; the groups are root's own, root
REFUSING = (
    *("PermitRootLogin", "PubkeyAuthentication", "AuthorizedKeysFile", "AuthenticationMethods"),
    *("AllowUsers", "AllowGroups", "DenyUsers", "DenyGroups"),
)
SSHD_CONFIG = ("/etc/ssh/sshd_config", "/etc/ssh/sshd_config.d/*.conf")
LARGEST_PROGRAM = 16 * 2**20  # bytes of a program or library that is looked into
CHANGED_KEYS_FILE = r"(?i)^[ \t]*AuthorizedKeysFile\b"
SIGNATURES = {"ssh-rsa": ("rsa-sha2-256", "rsa-sha2-512")}  # of types of keys that have another name for them
# The options of a key that dropbear knows (2025.89): it refuses a key that has any other
DROPBEAR_OPTIONS = (
    *("restrict", "no-port-forwarding", "no-agent-forwarding", "no-x11-forwarding", "no-pty", "command"),
    *("permitopen", "no-touch-required", "verify-required"),
)
# What Debian's sshd needs to tell its configuration (sshd -T): /run is empty where the guest's programs run
IN_RUN_SSHD = ("sh", "-c", 'mkdir -p /run/sshd && exec "$0" "$@"')


def authorize(target: Target, keys: Sequence[AuthorizedKey]) -> str:
    """Add the keys to root's, each in the place of what root has of that key; return the file."""
    file = keys_file(target)
    home = file.removesuffix(AUTHORIZED_KEYS)
    for directory in (home, f"{home}.ssh") if home != file else ():
        make_directory(target, directory.rstrip("/") or "/")
    if target.link(file) == "/dev/null":  # what is written there is for nobody
        target.remove(file)
    target.edit(file, partial(with_keys, keys=keys), mode=0o600)
    return file


def make_directory(target: Target, path: str) -> None:
    """Make one of root's directories where it is missing: if it is a link to nothing, what that leads to."""
    is_dangling = target.link(path) is not None and not target.exists(path)
    target.mkdir(path, mode=0o700)
    if is_dangling:
        log.warning(f"the guest's {path} is a link to {real(target, path)}, which the image does not have: it is made")


def withdraw(target: Target, keys: Sequence[AuthorizedKey]) -> None:
    """Take out of root's file the lines that `authorize` has added for these keys."""
    file, lines = keys_file(target), {key.line for key in keys}
    if target.exists(file):
        kept = [line for line in (target.read(file) or "").splitlines() if line not in lines]
        target.write(file, "".join(f"{line}\n" for line in kept), mode=0o600)


def keys_file(target: Target) -> str:
    """Return the file in which root's keys are, or would be: the usual one, unless sshd does not look there."""
    home = field(target.read(PASSWD) or "", HOME) or "/root"
    sshd = target.which("sshd")
    words = []
    if sshd and any(
        matches(target, path, CHANGED_KEYS_FILE) for pattern in SSHD_CONFIG for path in target.glob(pattern)
    ):
        with suppress(Failure):  # the hook that gives root keys says so
            words = sshd_configuration(target, sshd).get("authorizedkeysfile", "").split()
    files = [_expanded(word, home) for word in words if word != "none"]
    usual = f"{home}/{AUTHORIZED_KEYS}"
    return usual if usual in files or not files else files[0]


def _expanded(word: str, home: str) -> str:
    """Return a word of AuthorizedKeysFile as the path that it means for root: sshd_config(5), TOKENS."""
    tokens = {"%h": home, "%u": "root", "%U": "0", "%%": "%"}
    path = re.sub("%.", lambda match: tokens.get(match[0], match[0]), word)
    return os.path.join(home, path)


def with_keys(text: str, keys: Sequence[AuthorizedKey]) -> str:
    """Return the text of authorized_keys with these keys. sshd takes the first line of a key that lets in.

    So a line that has one of them with other options, or none, gives way.
    """
    ours = list(dict.fromkeys(key.line for key in keys))
    blobs = {key.blob for key in keys}
    lines = text.splitlines()
    kept = [line for line in lines if line in ours or line.startswith("#") or not blobs.intersection(line.split())]
    return "".join(f"{line}\n" for line in [*kept, *(line for line in ours if line not in kept)])


def set_password(target: Target, password: str) -> None:
    """Set root's password; with shadow passwords it counts only with an `x` in /etc/passwd."""
    for file, value in ((SHADOW, password), (PASSWD, "x")):
        if not field(target.read(file) or "", 0):
            raise Failure(f"the guest's {file} has no line for root", hint="run pwconv in the image")
        target.edit(file, partial(with_field, number=PASSWORD, value=value))


def admit(target: Target) -> bool:
    """Take away what keeps root out whatever the key or password: dates that are over, a lock; return whether it did.

    A locked account gets the password `*`, which none matches: without PAM, sshd refuses keys of one with `!`.
    """
    today = int(time.time()) // DAY
    return target.is_file(SHADOW) and target.edit(SHADOW, partial(admitted, today=today))


def admitted(text: str, today: int) -> str:
    """Return the text of /etc/shadow with root's line such that root can log in on the day `today`."""
    changed, maximum, expires = (_number(field(text, number)) for number in (CHANGED, MAXIMUM, EXPIRES))
    if changed == 0 or (changed is not None and maximum is not None and changed + maximum < today):
        text = with_field(text, CHANGED, str(today))
    if expires is not None and expires <= today:
        text = with_field(text, EXPIRES, "")
    for number in range(CHANGED, EXPIRES + 1):
        if field(text, number).startswith("-"):  # PAM takes it for long ago
            text = with_field(text, number, "")
    if field(text, PASSWORD).startswith("!"):
        text = with_field(text, PASSWORD, "*")
    return text


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def field(text: str, number: int) -> str:
    """Return a field of root's line in /etc/passwd or /etc/shadow."""
    fields = next((line.split(":") for line in text.splitlines() if line.startswith("root:")), [])
    return fields[number] if number < len(fields) else ""


def with_field(text: str, number: int, value: str) -> str:
    """Return the text of such a file with a field of root's line changed, and nothing else."""
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if line.startswith("root:"):
            fields = line.split(":")
            fields[number] = value
            lines[index] = ":".join(fields)
            break
    return "".join(lines)


# --- reports ----------------------------------------------------------------------------------------------


def describe(keys: Sequence[AuthorizedKey], password: str) -> str:
    """Return in a few words what was given to root: `2 keys, one only from 192.0.2.0/24; a password`."""
    parts = []
    if keys:
        parts.append("1 key" if len(keys) == 1 else f"{len(keys)} keys")
        limited = [f"one only from {key.sources}" for key in keys if key.sources]
        others = sum(1 for key in keys if key.options and not key.sources)
        parts[0] = ", ".join([*parts, *limited, *([f"{others} with options"] if others else [])])
    if password:
        parts.append("a password" if logins.admits(password) else "no password")
    return "; ".join(parts)


def obstacles(
    target: Target, keys: Sequence[AuthorizedKey], password: str = "", addresses: Sequence[str] = ()
) -> list[str]:
    """Return what in the guest keeps root from logging in by ssh, with these keys or else with a password.

    `addresses`: those that the guest will have, as far as they are known.
    """
    found = _obstacles_of_account(target, password)
    if any(logins.has_expired(key, time.gmtime()) for key in keys):
        found.append("a key of root's has expired: expiry-time")
    sshd = target.which("sshd")
    if not sshd:
        return [*found, *_obstacles_of_dropbear(target, keys)]
    return [*found, *_obstacles_of_sshd(target, sshd, keys, addresses)]


def _obstacles_of_sshd(target: Target, sshd: str, keys: Sequence[AuthorizedKey], addresses: Sequence[str]) -> list[str]:
    found = []
    if not any(is_enabled(target, name) for name in ("ssh", "sshd")):
        found.append("the guest does not start its sshd when it boots")
    if is_denied_by_wrappers(target, sshd):
        found.append("the guest's /etc/hosts.deny has its sshd refuse all")
    try:
        configuration = sshd_configuration(target, sshd)
    except Failure as failure:
        return [*found, f"the guest's sshd does not take its configuration: {failure}"]
    listening = [words.rpartition(":")[0] for words in configuration.get("listenaddress", "").split()]
    if listening and not {*EVERYWHERE, *addresses}.intersection(listening):
        found.append(f"sshd listens on {', '.join(listening)} only (ListenAddress)")
    found += [f"root's keys are of no use: sshd has {reason}" for reason in refusals(configuration) if keys]
    found += _refused_kinds(configuration, keys)
    place = keys and configuration.get("strictmodes") == "yes" and changeable_by_others(target)
    if place:
        found.append(f"root's keys are of no use: others may change {place}, and sshd has StrictModes yes")
    needed = ("passwordauthentication", "permitrootlogin")
    if not (keys or all(configuration.get(name) == "yes" for name in needed)):
        found.append("root's password is for the console: sshd takes none from root")
    return found


def _obstacles_of_account(target: Target, password: str) -> list[str]:
    shell = field(target.read(PASSWD) or "", SHELL)
    found = []
    if shell.rpartition("/")[2] in NO_LOGIN:
        found.append(f"root's shell is {shell}, which lets nobody in")
    elif shell and not shell.startswith("/run/") and not target.is_file(shell):  # NixOS fills /run when it boots
        found.append(f"root's shell is {shell}, which the guest does not have: nobody gets in")
    if logins.admits(password) and not knows_hash(target, password):
        found.append(f"the guest's crypt(3) does not know hashes that begin with {logins.prefix(password)}")
    return found


def knows_hash(target: Target, password: str) -> bool:
    """Return whether the guest's crypt(3) knows the form of a hash, as far as its library tells."""
    mark = logins.prefix(password)
    libraries = [path for pattern in LIBCRYPTS for path in _files(target, pattern)]
    if not libraries:
        return not target.glob(MUSL) or mark in MUSL_HASHES
    # glibc's own knows fewer; the name of the form is in the library
    return not mark.startswith("$") or any(mark.encode() in _content(target, path) for path in libraries)


def _files(target: Target, pattern: str) -> list[str]:
    above, star, name = pattern.partition("/*-linux-*")
    directories = target.glob(f"{above}{star}") if star else [os.path.dirname(pattern)]
    return [path for found in directories for path in target.glob(f"{found}/{os.path.basename(pattern)}")]


def _content(target: Target, path: str) -> bytes:
    with suppress(Failure):
        return target.read_bytes(path, LARGEST_PROGRAM) or b""
    return b""


def is_denied_by_wrappers(target: Target, sshd: str) -> bool:
    """Return whether hosts_access(5) keeps all from an sshd that asks it, as Debian's does."""
    clients = _clients_of_sshd(target, "/etc/hosts.deny")
    if not any(words[:1] == ["ALL"] and "EXCEPT" not in words for words in clients):
        return False
    asking = (sshd, "/usr/lib/openssh/sshd-session")
    is_asked = any(b"libwrap.so" in _content(target, program) for program in asking)
    return is_asked and not _clients_of_sshd(target, "/etc/hosts.allow")


def _clients_of_sshd(target: Target, path: str) -> list[list[str]]:
    """Return the words of each list of clients in a file of hosts_access(5) that is about sshd."""
    text = _content(target, path).decode("utf-8", "replace").upper().replace(",", " ")
    found = []
    for line in text.splitlines():
        daemons, _, rest = line.partition(":")
        named, _, excepted = (set(words.split()) for words in daemons.partition("EXCEPT"))
        if not line.startswith("#") and named & {"ALL", "SSHD"} and "SSHD" not in excepted:
            found.append(rest.partition(":")[0].split())
    return found


def _obstacles_of_dropbear(target: Target, keys: Sequence[AuthorizedKey]) -> list[str]:
    if not keys:
        return []
    if not target.which("dropbear"):
        return ["the guest has no sshd: root's keys are of no use"]
    unknown = sorted({name for key in keys for name in logins.options_of(key)}.difference(DROPBEAR_OPTIONS))
    found = [f"dropbear refuses a key with an option that it does not know: {', '.join(unknown)}"] if unknown else []
    if not is_enabled(target, "dropbear"):
        found.append("the guest does not start its dropbear when it boots")
    if matches(target, "/etc/default/dropbear", r"^[ \t]*DROPBEAR_EXTRA_ARGS=.*(?<![\w-])-\w*w"):
        found.append("root's keys are of no use: dropbear has the option -w")
    return found


def _refused_kinds(configuration: Mapping[str, str], keys: Sequence[AuthorizedKey]) -> list[str]:
    """Return complaints of the types of keys that sshd takes from nobody: a policy of the distribution may say so."""
    names = ("pubkeyacceptedalgorithms", "pubkeyacceptedkeytypes")  # the second until OpenSSH 8.5
    accepted = next((configuration[name].split(",") for name in names if name in configuration), None)
    kinds = sorted({key.kind for key in keys}) if accepted else []
    refused = [kind for kind in kinds if not {kind, *SIGNATURES.get(kind, ())}.intersection(accepted or ())]
    found = [f"root's keys of type {kind} are of no use: sshd's PubkeyAcceptedAlgorithms lack it" for kind in refused]
    least = max(1024, _number(configuration.get("requiredrsasize", "")) or 0)  # less is built in
    short = sorted({bits(key) for key in keys if 0 < bits(key) < least})
    return found + [f"root's RSA keys of {number} bits are of no use: sshd wants {least} or more" for number in short]


def changeable_by_others(target: Target) -> str:
    """Return what others than root may change: root's file of keys, or a directory above it; empty if nothing."""
    path, home = real(target, keys_file(target)), real(target, field(target.read(PASSWD) or "", HOME) or "/root")
    is_debian = target.exists("/etc/debian_version")
    while path and path != "/":
        with directory_of(target, os.path.dirname(path)) as directory:
            status = directory.status(os.path.basename(path))
        by_others = 0o002 if is_debian and status.st_gid == 0 else 0o022  # Debian's sshd lets the owner's own group
        if status.st_uid or status.st_mode & by_others:
            return path
        path = os.path.dirname(path) if path != home else ""
    return ""


def sshd_configuration(target: Target, sshd: str) -> dict[str, str]:
    """Return what sshd says that it does for root, from any address: keyword in lower case -> value."""
    said = target.run([*IN_RUN_SSHD, sshd, "-T", "-C", "user=root,host=localhost,addr=192.0.2.1"])
    settings: dict[str, list[str]] = {}
    for keyword, _, value in (line.partition(" ") for line in said.splitlines()):
        settings.setdefault(keyword, []).append(value)  # lists have a line for each name
    return {keyword: " ".join(values).strip() for keyword, values in settings.items()}


def refusals(configuration: Mapping[str, str]) -> list[str]:
    """Return the settings of sshd, as it tells them, that keep root out even with a key."""
    found = {name: configuration.get(name.lower(), "") for name in REFUSING}
    return [f"{name} {value}" for name, value in found.items() if value and not _admits_root(name, value.split())]


def _admits_root(name: str, words: Sequence[str]) -> bool:
    if name.startswith("Allow"):
        return any(fits("root", word.partition("@")[0]) for word in words)
    if name.startswith("Deny"):
        return not any(fits("root", word) for word in words)
    if name == "AuthorizedKeysFile":
        return words != ["none"]
    if name == "AuthenticationMethods":
        return any(set(word.split(",")) <= {"any", "publickey"} for word in words)
    return words[0] not in ("no", "forced-commands-only")
