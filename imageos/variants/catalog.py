"""The catalog: images that are known by name, with what is needed to make a variant of one."""

from __future__ import annotations

import configparser
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from imageos import log
from imageos.errors import Failure
from imageos.images.imagetypes import IMAGE_TYPES, ONE_IMAGE
from imageos.images.urls import cleaned, shown
from imageos.installation import OS_DIR
from imageos.settings import SITE_DIR, VARIANT, parse_setting

FILE = "catalog.conf"  # in the directory of the OS definition, and the site's own in SITE_DIR
ARCHITECTURES = ("x86_64", "x86", "aarch64", "ppc64le", "riscv64", "s390x")
ONE_FOR_EACH = ("checksum", "signed_name")  # these may have .ARCHITECTURE behind their names
TEXTS = ("title", "page", "type", "keyring", "key", "key_from", "user", "disk", "nomount", *ONE_FOR_EACH)
UNITS = {"M": 1 << 20, "G": 1 << 30}
WRITTEN = "# as written: "  # before the SHA-256 of all that is above, in a variant's file


class Entry(NamedTuple):
    """One image of a publisher. Texts that are not in the catalog are empty."""

    name: str
    urls: Mapping[str, str]  # by architecture
    title: str = ""
    page: str = ""
    type: str = "qcow2"
    checksums: Mapping[str, str] = {}  # IMAGE_CHECKSUM by architecture; "" for all others
    signed_names: Mapping[str, str] = {}  # IMAGE_SIGNED_NAME, likewise
    keyring: str = ""
    key: str = ""
    key_from: str = ""
    user: str = ""
    disk: int = 0  # bytes; 0: unknown
    nomount: bool = False

    @property
    def keyring_path(self) -> str:
        """The file that holds the publisher's key, if somebody has put it there; empty if nothing is signed."""
        return self.keyring if self.keyring.startswith("/") or not self.keyring else f"{SITE_DIR}/{self.keyring}.gpg"

    @property
    def get_key(self) -> str:
        """The commands that get the key: gpg hands out no other one than that of the fingerprint."""
        if self.key_from.startswith("hkps://"):
            get = f"gpg --keyserver {self.key_from} --recv-keys {self.key}"
        else:
            get = f"curl -fsS {shlex.quote(self.key_from)} | gpg --import"
        return f"{get} && gpg --export {self.key} > {self.keyring_path}"

    def settings(self, arch: str, is_key_there: bool) -> dict[str, str]:
        """Return the settings of the variant on nodes of an architecture; Failure if the publisher has none for it."""
        if arch not in self.urls:
            raise Failure(f"{self.name} is not for {arch}, but for {', '.join(self.urls)}")
        image = unquote(urlsplit(self.urls[arch]).path.rpartition("/")[2])
        signed_name = self.signed_names.get(arch, self.signed_names.get("", ""))
        wanted = {
            "IMAGE_URL": self.urls[arch],
            "IMAGE_TYPE": self.type,
            "IMAGE_CHECKSUM": self.checksums.get(arch, self.checksums.get("", "")).replace("{}", image),
            **({"IMAGE_KEYRING": self.keyring_path, "IMAGE_SIGNER": self.key} if is_key_there else {}),
            **({"IMAGE_SIGNED_NAME": signed_name} if is_key_there else {}),
            "NOMOUNT": "yes" if self.nomount else "",
        }
        return {name: text for name, text in wanted.items() if text}

    def variant_file(self, arch: str, is_key_there: bool) -> str:
        """Return the file of the variant; `is_as_written` knows it again."""
        about = [
            f"{self.title or self.name}, from the catalog of imageos. Change a line, and the file is the site's own.",
            *([self.page] if self.page else []),
            *([f"The image's own user is {self.user}."] if self.user else []),
            *([f"The disk of an instance needs at least {log.size(self.disk)}."] if self.disk else []),
        ]
        settings = self.settings(arch, is_key_there)
        lines = [*(f"# {line}" for line in about), *(f"{name}={shlex.quote(settings[name])}" for name in settings)]
        text = "".join(f"{line}\n" for line in lines)
        return f"{text}{WRITTEN}{_digest(text.encode())}\n"


def is_as_written(content: bytes) -> bool:
    """Return True if a variant's file was made of a catalog, also of another version, and not changed since."""
    text, _, digest = content.rpartition(WRITTEN.encode())
    return bool(text) and digest.decode("ascii", "replace") == f"{_digest(text)}\n"


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def load(os_dir: str = OS_DIR) -> dict[str, Entry]:
    """Return the entries of the catalog by name, the site's own in the place of others; Failure says what is wrong."""
    shipped, own = f"{os_dir}/{FILE}", f"{SITE_DIR}/{FILE}"
    found = read(shipped)
    if found is None:
        raise Failure(f"there is no catalog {shipped}", hint="imageos install")
    return {**found, **(read(own) or {})}


def read(path: str) -> dict[str, Entry] | None:
    """Return the entries of one file; None if there is none."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError, configparser.Error) as error:
        raise Failure(f"cannot read the catalog {path}: {' '.join(str(error).split())}") from None
    return {name: _entry(name, dict(parser[name]), path) for name in parser.sections()}


def _entry(name: str, texts: Mapping[str, str], path: str) -> Entry:
    where = f"in [{name}] of {path}"
    known = [*TEXTS, *ARCHITECTURES, *(f"{key}.{arch}" for key in ONE_FOR_EACH for arch in ARCHITECTURES)]
    unknown = [key for key in texts if key not in known]
    if not re.fullmatch(VARIANT, name):
        raise Failure(f"{where}: this cannot be the name of a variant")
    if unknown:
        raise Failure(f"{where}: {unknown[0]} is not known there", hint=f"known are {', '.join(known)}")
    disk = re.fullmatch(r"([0-9]{1,6})([MG])", texts.get("disk", "0M"))
    nomount = texts.get("nomount", "no")
    if not disk or nomount not in ("yes", "no"):
        raise Failure(f"{where}: disk must be a number and M or G, nomount yes or no")
    plain = {key: texts.get(key, "") for key in ("title", "page", "keyring", "key", "key_from", "user")}
    made = Entry(
        name=name,
        urls={arch: texts[arch] for arch in ARCHITECTURES if arch in texts},
        type=texts.get("type", "qcow2"),
        checksums=_for_each("checksum", texts),
        signed_names=_for_each("signed_name", texts),
        disk=int(disk[1]) * UNITS[disk[2]],
        nomount=nomount == "yes",
        **plain,
    )
    _check(made, where)
    return made


def _for_each(key: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of `key` by architecture; that for all is under the empty one."""
    keys = {"": key, **{arch: f"{key}.{arch}" for arch in ARCHITECTURES}}
    return {arch: texts[name] for arch, name in keys.items() if name in texts}


def _check(entry: Entry, where: str) -> None:
    """Fail unless the entry makes a variant whose settings are right."""
    if not entry.urls or not all(entry.urls.values()):
        raise Failure(f"{where}: no URL", hint=f"set one for an architecture: {', '.join(ARCHITECTURES)}")
    if entry.keyring and not (entry.key and entry.key_from and re.fullmatch(rf"{VARIANT}|/\S+", entry.keyring)):
        raise Failure(f"{where}: a keyring needs a name or a path, and key and key_from")
    if not all(line.isprintable() for line in (entry.title, entry.page, entry.user)):
        raise Failure(f"{where}: each text is one line")
    for arch, url in entry.urls.items():
        for name, text in entry.settings(arch, bool(entry.keyring)).items():
            parse_setting(name.lower(), text, where)
        end = ONE_IMAGE.search(urlsplit(cleaned(url)).path)
        if not end or end[1].lower() not in IMAGE_TYPES[entry.type].url_ends:
            raise Failure(f"{where}: {arch} = {shown(url)} is not the URL of a file of IMAGE_TYPE={entry.type}")


def choose(entries: Mapping[str, Entry], name: str) -> Entry:
    """Return the entry `name`; Failure names the nearest ones."""
    if name in entries:
        return entries[name]
    near = nearest(name, list(entries))
    hint = f"did you mean {near}?" if near else "imageos variants shows all that there are"
    raise Failure(f"the catalog has no {name!r}", hint=hint)


def nearest(name: str, names: Sequence[str]) -> str:
    import difflib

    found: list[str] = difflib.get_close_matches(name, names, 3, 0.5)
    found = found or difflib.get_close_matches(name.lower(), names, 3, 0.5)
    return " or ".join(found)
