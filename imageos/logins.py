"""Check the form of what lets somebody log in: password hashes of crypt(5), lines of sshd's authorized_keys.

Messages of ValueError say what is accepted; they never quote a value.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

# --- passwords --------------------------------------------------------------------------------------------

_B64 = "[./0-9A-Za-z]"
# The forms in crypt(5). The last character of some has only bits that are left over. DES and BSDi have no other mark.
_HASHES = (
    rf"\$(g|sm3)?y\${_B64}+\${_B64}{{0,86}}\${_B64}{{43}}",  # yescrypt and others with it
    rf"\$7\${_B64}{{11,97}}\${_B64}{{43}}",  # scrypt
    rf"\$2[abxy]\$[0-9]{{2}}\${_B64}{{53}}",  # bcrypt
    rf"\$6\$(rounds=[1-9][0-9]+\$)?[!-#%-9;-~]{{0,16}}\${_B64}{{86}}",  # SHA-512
    rf"\$(5|sm3)\$(rounds=[1-9][0-9]+\$)?[!-#%-9;-~]{{0,16}}\${_B64}{{43}}",  # SHA-256, SM3
    rf"\$sha1\$[1-9][0-9]+\${_B64}{{1,64}}\${_B64}{{28}}",
    rf"\$md5(,rounds=[1-9][0-9]+)?\${_B64}{{1,32}}\${{1,2}}{_B64}{{22}}",  # of Solaris
    rf"\$1\$[!-#%-9;-~]{{0,8}}\${_B64}{{22}}",  # MD5
    r"\$3\$\$[0-9a-f]{32}",  # NTHASH
    rf"_{_B64}{{19}}",  # BSDi
    rf"{_B64}{{12}}[.26AEIMQUYcgkosw]",  # DES
)
# One that no password has: locked by `usermod -L` with the old hash behind it, or a word: *, !!, *LK*, !left-2024.
_NO_PASSWORD = r"[!*][!*0-9A-Za-z_-]*"
_PASSWORD = f"!*({'|'.join(_HASHES)})|{_NO_PASSWORD}"
_LONGEST = 384  # CRYPT_OUTPUT_SIZE of libxcrypt


def password_hash(text: str) -> str:
    """Accept the second field of a line in shadow(5)."""
    if text and not (len(text) <= _LONGEST and re.fullmatch(_PASSWORD, text)):
        raise ValueError(
            "a whole hash as `openssl passwd -6` prints it, or * for none; in a file it has to be in single quotes, "
            "as in double quotes the shell replaces $6 and all that follows a $"
        )
    return text


def admits(text: str) -> bool:
    """Return whether a password can match the field."""
    return bool(text) and not text.startswith(("!", "*"))


def prefix(text: str) -> str:
    """Return the mark of the form that a hash has: `$6$`, `_`, or nothing for DES."""
    match = re.match(r"\$[0-9a-z]+\$?|_", text.lstrip("!"))
    return match[0] if match else ""


# --- keys -------------------------------------------------------------------------------------------------

# Options of sshd(8), in lower case: sshd ignores the case.
_FLAGS = (
    "agent-forwarding",
    "port-forwarding",
    "pty",
    "touch-required",
    "user-rc",
    "verify-required",
    "x11-forwarding",
)
_WORDS = ("restrict", "cert-authority", *_FLAGS, *(f"no-{flag}" for flag in _FLAGS))
_VALUED = ("command", "environment", "expiry-time", "from", "permitlisten", "permitopen", "principals", "tunnel")
_QUOTED = r'"(?:\\"|[^"\\]|\\(?!"))*"'
_OPTION = re.compile(rf"(?P<name>[A-Za-z0-9-]+)(=(?P<value>{_QUOTED}))?")
_OPTIONS = re.compile(rf'(?:{_QUOTED}|\\"|[^"\s])*')
_PLAIN = re.compile(r"[a-z0-9@.-]+\s+AAAA")  # the type of a key, and the beginning of every key in base64


_PORT = r"([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]|\*)"
# What sshd takes as the value of an option; it refuses a key with any other.
_FORMS = {
    "environment": r"[A-Za-z0-9_]+=.*",
    "expiry-time": r"[0-9]{8}([0-9]{4}([0-9]{2})?)?Z?",
    "permitlisten": rf"((\[[^\]]+\]|[^:\s]*):)?{_PORT}",
    "permitopen": rf"(\[[^\]]+\]|[^:\s]+):{_PORT}",
    "tunnel": r"[0-9]+|any",
}


class AuthorizedKey(NamedTuple):
    line: str  # all of it
    options: str  # as they are written; empty if there are none
    kind: str
    blob: str  # the key in base64
    sources: str  # the pattern list of the option from=


def authorized_keys(text: str) -> list[AuthorizedKey]:
    """Return the keys in the text of an authorized_keys file; ValueError for a line that sshd would ignore."""
    keys = []
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if line and not line.startswith("#"):
            try:
                keys.append(_key(line))
            except ValueError as error:
                accepted = "public keys, one a line, as sshd(8) reads authorized_keys"
                raise ValueError(f"{accepted}; line {number} {error}") from None
    return keys


def _key(line: str) -> AuthorizedKey:
    if not line.replace("\t", "").isprintable():
        raise ValueError("has control characters")
    if "PRIVATE KEY" in line:
        raise ValueError("is a private key: only the public one, FILE.pub, belongs here")
    if line.startswith(("/", "~")):
        raise ValueError("is the name of a file, not the key in it")
    match = None if _PLAIN.match(line) else _OPTIONS.match(line)
    end = match.end() if match else 0
    if line[end : end + 1] == '"':
        raise ValueError("has quotes that do not end")
    options, key = line[:end], line[end:].lstrip()
    if not _PLAIN.match(key):
        raise ValueError("is no key: TYPE AAAA..., perhaps with options before it")
    kind, blob = key.split()[:2]
    _check_blob(kind, blob)
    return AuthorizedKey(line, options, kind, blob, _checked_options(options).get("from", ""))


def options_of(key: AuthorizedKey) -> Mapping[str, str]:
    """Return the names of a key's options, in lower case, and their values."""
    return _checked_options(key.options)


def bits(key: AuthorizedKey) -> int:
    """Return the length of an RSA key in bits; 0 for others."""
    fields = _fields(base64.b64decode(key.blob))
    return int.from_bytes(fields[2], "big").bit_length() if key.kind == "ssh-rsa" and len(fields) == 3 else 0


def has_expired(key: AuthorizedKey, now: time.struct_time) -> bool:
    """Return whether the option expiry-time names a time before `now`."""
    until = options_of(key).get("expiry-time", "").rstrip("Z")
    return bool(until) and until.ljust(14, "0") < time.strftime("%Y%m%d%H%M%S", now)


def _check_blob(kind: str, blob: str) -> None:
    """Check that a key is a sequence of strings (RFC 4251), the first of which is its type."""
    if "-cert-v0" in kind:
        raise ValueError("is a certificate: the key that signs them belongs here, with the option cert-authority")
    try:
        data = base64.b64decode(blob, validate=True)
    except ValueError:
        data = b""
    if base64.b64encode(data).decode() != blob:  # no more padding than it takes, and none of its bits set
        raise ValueError(f"has a key of type {kind} that is cut off or changed")
    fields = _fields(data)
    is_whole = b"".join(len(one).to_bytes(4, "big") + one for one in fields) == data
    if fields[0] != kind.encode():
        raise ValueError(f"has a key that is not of the type {kind}")
    if not is_whole or len(fields) < 2 or (kind == "ssh-ed25519" and len(fields[1]) != 32):
        raise ValueError(f"has a key of type {kind} that is cut off or changed")


def _fields(data: bytes) -> list[bytes]:
    """Return a sequence of strings (RFC 4251); the last may be cut off."""
    fields, place = [], 0
    while place < len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "big")
        fields.append(data[place + 4 : end])
        place = end
    return fields


def _checked_options(text: str) -> dict[str, str]:
    """Return the options with their values, an empty one for a flag."""
    options: dict[str, str] = {}
    place = 0
    while text and place <= len(text):
        match = _OPTION.match(text, place)
        name = match["name"].lower() if match else ""
        quoted = match["value"] if match else None
        place = (match.end() if match else place) + 1
        if quoted is None and name in _VALUED:
            raise ValueError(
                f"has the option {name} without double quotes; in a file, put the setting in single quotes"
            )
        if name not in (_WORDS if quoted is None else _VALUED):
            raise ValueError("has options that sshd(8) does not know")
        if text[place - 1 : place] not in ("", ","):
            raise ValueError(f"has no comma after the option {name}")
        if name in options and name in ("command", "from"):
            raise ValueError(f"has the option {name} twice")
        options[name] = (quoted or "")[1:-1].replace('\\"', '"')
        if not re.fullmatch(_FORMS.get(name, ".*"), options[name]):
            raise ValueError(f"has a value of the option {name} that sshd(8) does not take")
    if "principals" in options and "cert-authority" not in options:
        raise ValueError("has the option principals without cert-authority")
    _check_sources(options)
    return options


def _check_sources(options: dict[str, str]) -> None:
    """Refuse a network that sshd takes for none: one with bits of a host, or a netmask. The key would let nobody in."""
    import ipaddress  # late: few keys say from where

    patterns = options["from"].split(",") if "from" in options else []
    if any(re.search(r"\s", pattern) for pattern in patterns):
        raise ValueError("has blanks in from=: sshd(8) takes them for a part of a name")
    if patterns and all(pattern.startswith("!") for pattern in patterns):
        raise ValueError("has nothing but exceptions in from=: it would let nobody in")
    for pattern in patterns:
        network = pattern.lstrip("!")
        if not network:
            raise ValueError("has an empty pattern in from=")
        if "/" in network:
            try:
                ipaddress.ip_network(network)
                int(network.rpartition("/")[2])
            except ValueError:
                raise ValueError("has a network in from= that is none, such as 192.0.2.1/24") from None
