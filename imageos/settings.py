"""The settings: one table, and the files and OS parameters that give them values.

built-in < defaults file < variant file < OS parameter (OSP_NAME). The files are shell: the shell evaluates
them, with Ganeti's variables in its environment, and what they set is read back.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any, cast

from imageos import ganeti, log, shellfiles
from imageos.errors import Failure

DEFAULTS_FILE = "/etc/default/ganeti-instance-image"
SITE_DIR = "/etc/ganeti/instance-image"
CACHE_DIR = "/var/cache/ganeti-instance-image"


# --- kinds: text -> value; ValueError says what is accepted -----------------------------------------------


def _yes_no(text: str) -> bool:
    if text.lower() in ("yes", "1", "true"):
        return True
    if text.lower() in ("no", "0", "false"):
        return False
    raise ValueError("yes or no")


def _mebibytes(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError("a whole number of MiB, at least 1")
    return int(text)


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError("a whole number of seconds, at least 1")
    return int(text)


def _choice(*accepted: str) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in accepted:
            raise ValueError("one of " + ", ".join(accepted))
        return text

    return choose


def _is_name(text: str) -> bool:
    """Whether it is a file name that cannot leave its directory."""
    return "/" not in text and not text.startswith(".") and text.isprintable()


def _name(text: str) -> str:
    if not _is_name(text):
        raise ValueError("a name without / that does not begin with a dot")
    return text


def _arch(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]+", text):
        raise ValueError("an architecture, such as x86_64")
    return text


def _directory(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise ValueError("an absolute path")
    return text


def _text(text: str) -> str:
    return text


def _line(text: str) -> str:
    if not all(c == "\t" or c.isprintable() for c in text):
        raise ValueError("one line of text")
    return text


def _lines(text: str) -> str:
    if not all(c == "\t" or c.isprintable() for line in text.split("\n") for c in line.rstrip("\r")):
        raise ValueError("lines of text")
    return text


def _password_hash(text: str) -> str:
    """What the second field of /etc/shadow may hold (shadow(5), crypt(5)): old hashes, `!!` and `*` have no $."""
    if text and not re.fullmatch(r"[!-9;-~]+", text):  # printable ASCII without blanks and colons
        raise ValueError("a hash as `openssl passwd -6` prints it, or * for none")
    return text


def _addresses(text: str) -> str:
    import ipaddress  # only where it is set

    for word in _line(text).split():
        try:
            ipaddress.ip_address(word)
        except ValueError:
            raise ValueError("IP addresses, separated by spaces") from None
    return text


_URL = r"https?://[^\s/]+(/\S*)?"


def _url(text: str) -> str:
    if not re.fullmatch(_URL, text):
        raise ValueError("a URL that begins with http:// or https://")
    return text


def _checksum(text: str) -> str:
    is_url = re.fullmatch(_URL, text)
    # What others mean as a digest, or as an answer, must not become the name of a file that is not there.
    is_name = not re.fullmatch(r"(?i)[0-9a-f]{32,}|.*:.*|yes|no|none|off|true|false", text) and _is_name(text)
    if not (text == "no" or is_pin(text) or is_url or is_name):
        raise ValueError("sha256:HEX, sha512:HEX, no, or the checksum file: its URL, or its name beside the image")
    return text


def is_pin(checksum: str) -> bool:
    """Whether an IMAGE_CHECKSUM is the checksum itself."""
    return bool(re.fullmatch(r"sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128}", checksum))


def _hook_names(text: str) -> str:
    if not all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in text.split()):
        raise ValueError("names of hooks, separated by spaces")
    return text


def _for_ganeti(text: str) -> str:
    """As Ganeti judges it (CheckImageValidity in its cmdlib/common.py), and a URL has to name a file.

    Ganeti keeps what it cannot fetch, and each reinstall fails from then on.
    """
    if not re.match(r"(https?|ftps?)://[^\s/]+/\S|/", _line(text)):
        raise ValueError("an absolute path, or the URL of a file (http, https, ftp or ftps)")
    return text


def _setting(
    kind: Callable[[str], Any], default: str, doc: str, *, parameter: bool = False, secret: bool = False
) -> Any:
    """A field of Settings. `default` is text as in a file; empty means none (decided when needed)."""
    value = kind(default) if default else (None if kind is _mebibytes else "")
    return dataclasses.field(
        default=value, metadata={"kind": kind, "default": default, "doc": doc, "parameter": parameter, "secret": secret}
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting, under its name in lower case. The only place that knows them."""

    cdinstall: bool = _setting(_yes_no, "no", "leave the disks alone: the instance boots an installer", parameter=True)
    swap: bool = _setting(_yes_no, "yes", "make a swap partition (tarball and dump)", parameter=True)
    swap_size: int | None = _setting(
        _mebibytes, "", "size of swap in MiB (default: the instance's memory)", parameter=True
    )
    boot_size: int | None = _setting(_mebibytes, "", "size of /boot in MiB (default: 100, on gpt 512)", parameter=True)
    filesystem: str = _setting(
        _choice("ext2", "ext3", "ext4", "xfs", "btrfs"),
        "ext3",
        "filesystem of the partitions: ext2, ext3, ext4, xfs or btrfs",
        parameter=True,
    )
    partition_table: str = _setting(
        _choice("msdos", "gpt"), "msdos", "msdos, or gpt, which boots from BIOS and UEFI alike", parameter=True
    )
    kernel_args: str = _setting(_line, "", "added to the guest's kernel command line", parameter=True)
    image_name: str = _setting(_name, "", "name of the image, without architecture and suffix", parameter=True)
    arch: str = _setting(
        _arch, "", "architecture in the image's file name (default: the node's, as x86_64 or x86)", parameter=True
    )
    image_type: str = _setting(
        _choice("tarball", "dump", "qemu", "raw", "qcow2"), "dump", "tarball, dump, qemu, raw or qcow2", parameter=True
    )
    image_dir: str = _setting(_directory, CACHE_DIR, "where the images are")
    image_url: str = _setting(_url, "", "directory URL of the images, or URL of one image file", parameter=True)
    image_checksum: str = _setting(
        _checksum,
        "",
        "sha256:HEX or sha512:HEX of the image; or its checksum file, a URL or a name beside it; or no",
        parameter=True,
    )
    image_keyring: str = _setting(_directory, "", "gpgv keyring that must have signed the checksum file")
    image_verify: bool = _setting(_yes_no, "yes", "check a downloaded image against its checksum")
    image_cleanup: bool = _setting(_yes_no, "no", "remove a downloaded image after use")
    cache_dir: str = _setting(_directory, CACHE_DIR, "where downloaded images are kept")
    export_dir: str = _setting(_directory, "/tmp", "where import keeps a qcow2 disk of an old backup")
    fdisk: str = _setting(_text, "sfdisk", "accepted and ignored: sfdisk it is")
    grow: bool = _setting(
        _yes_no, "yes", "grow root partition and filesystem of a disk image to the disk", parameter=True
    )
    nomount: bool = _setting(
        _yes_no, "no", "not Linux (Windows, BSD): write the disk image, touch nothing", parameter=True
    )
    overlay: str = _setting(_name, "", "directory in OVERLAYS_DIR that is copied over the guest's root", parameter=True)
    customize_dir: str = _setting(_directory, SITE_DIR + "/hooks", "where the hooks are")
    variants_dir: str = _setting(_directory, SITE_DIR + "/variants", "where the files of the variants are")
    networks_dir: str = _setting(_directory, SITE_DIR + "/networks", "where static addresses are described")
    overlays_dir: str = _setting(_directory, SITE_DIR + "/overlays", "where the overlays are")
    import_hooks: str = _setting(_hook_names, "grub", "the hooks that an import runs")
    rename_hooks: str = _setting(_hook_names, "zz_ddns", "the hooks that a rename runs")
    dns_servers: str = _setting(_addresses, "", "DNS servers of the guest, separated by spaces", parameter=True)
    dns_search: str = _setting(_line, "", "DNS search list of the guest", parameter=True)
    dns_domain: str = _setting(_line, "", "DNS domain of the guest", parameter=True)
    ssh_authorized_keys: str = _setting(_lines, "", "public keys that may log in as root", parameter=True, secret=True)
    root_password_hash: str = _setting(
        _password_hash, "", "root's password as in /etc/shadow", parameter=True, secret=True
    )
    user_data: str = _setting(_text, "", "user-data for cloud-init", parameter=True, secret=True)
    hook_timeout: int = _setting(_seconds, "3600", "seconds that one hook may take")
    guest_timeout: int = _setting(_seconds, "600", "seconds that one command of the guest may take")
    image_debug: bool = _setting(_yes_no, "no", "yes: every command and its output in the log", parameter=True)

    # What the files set besides: for the hooks.
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def resolved(self, memory: int) -> Settings:
        """With the sizes that depend on others filled in; `memory` of the instance in MiB."""
        boot_size = self.boot_size or (512 if self.partition_table == "gpt" else 100)
        return dataclasses.replace(self, boot_size=boot_size, swap_size=self.swap_size or memory)

    def variables(self) -> dict[str, str]:
        """All settings as a hook or a file has them: NAME -> text."""
        known = {name.upper(): _as_text(getattr(self, name)) for name in TABLE}
        return {**self.unknown, **known}


TABLE: dict[str, Mapping[str, Any]] = {
    field.name: field.metadata for field in dataclasses.fields(Settings) if field.metadata
}
# What the installed defaults file sets, better than what has to stay built in for the sake of old sites.
SHIPPED = {"filesystem": "ext4"}
PARAMETERS = tuple(name for name, entry in TABLE.items() if entry["parameter"])


def _reserved(kind: Callable[[str], Any], doc: str) -> Mapping[str, Any]:
    return {"kind": kind, "default": "", "doc": doc, "secret": False}


# OS parameters that Ganeti reads itself, whatever the OS: no settings. It refuses them all the same where the OS does
# not list them, so they are in parameters.list. The first is of its master daemon, the others of its metadata daemon.
RESERVED: dict[str, Mapping[str, Any]] = {
    "os-image": _reserved(_for_ganeti, "path or URL of a disk image that Ganeti itself writes to the first disk"),
    "os-install-package": _reserved(_line, "archive that Ganeti's metadata daemon serves to the instance"),
    "os-package": _reserved(_line, "archive that Ganeti's metadata daemon serves to the instance"),
}


def load(environ: Mapping[str, str], defaults_file: str = DEFAULTS_FILE) -> Settings:
    """The settings that hold for the call that `environ` describes; fails with the first problem."""
    settings, problems = examine(environ, defaults_file)
    if problems:
        for problem in problems[:-1]:
            log.info(str(problem))
        raise problems[-1]
    log.set_debug(settings.image_debug)
    return settings


def examine(
    environ: Mapping[str, str], defaults_file: str = DEFAULTS_FILE, warn: Callable[[str], None] = log.warning
) -> tuple[Settings, list[Failure]]:
    """As `load`, but gives all problems instead of raising; the settings hold what is right."""
    given = ganeti.variables(environ)
    problems: list[Failure] = []
    values: dict[str, Any] = {}
    unknown: dict[str, str] = {}

    def take(name: str, text: str, where: str, shown: str) -> None:
        try:
            values[name] = _parse(name, text, where, shown)
        except Failure as problem:
            problems.append(problem)

    try:
        layers = _evaluate_files(given, defaults_file)
    except Failure as problem:
        layers = []
        problems.append(problem)
    for path, variables in layers:
        for variable, text in variables.items():
            if variable.lower() in TABLE and variable.isupper():
                take(variable.lower(), text, f"in {path}", variable)
            elif variable not in given:
                _warn_unknown(variable, path, unknown, warn)
                unknown[variable] = text
    for variable, text in given.items():
        if variable.startswith("OSP_"):
            name = _parameter(variable)
            if name in RESERVED:
                try:
                    _parse(name, text, f"as OS parameter {name}", name)
                except Failure as problem:
                    problems.append(problem)
            elif name not in TABLE:
                warn(f"unknown OS parameter {name}{_nearest(name, list(PARAMETERS))}")
            elif name not in PARAMETERS:
                problems.append(Failure(f"{name.upper()} cannot be set by an OS parameter ({variable})"))
            else:
                take(name, text, f"as OS parameter {name}", name.upper())
    if not values.get("arch"):
        values["arch"] = _node_arch()
    return Settings(**values, unknown=unknown), problems


def accepted(name: str, text: str, where: str) -> Any:
    """The value of one setting that was given elsewhere; Failure says what is accepted."""
    return _parse(name, text, where, name.upper())


def unknown_parameters(environ: Mapping[str, str]) -> list[str]:
    """The OS parameters that are none of ours; Ganeti lets only those in parameters.list through."""
    names = (_parameter(variable) for variable in environ if variable.startswith("OSP_"))
    return [name for name in names if name not in TABLE and name not in RESERVED]


def given_to_ganeti(environ: Mapping[str, str]) -> dict[str, str]:
    """The OS parameters that Ganeti reads itself, of those that are set: name -> text, fit to be shown."""
    given = {_parameter(variable): text for variable, text in environ.items() if variable.startswith("OSP_") and text}
    return {name: _shown(RESERVED[name], text) for name, text in given.items() if name in RESERVED}


def _parameter(variable: str) -> str:
    """The OS parameter in a variable OSP_NAME: Ganeti sets OSP_OS_IMAGE for os-image (old ones kept the dash)."""
    name = variable[len("OSP_") :].lower()
    dashed = name.replace("_", "-")
    return dashed if dashed in RESERVED else name


def from_variables(environ: Mapping[str, str]) -> Settings:
    """The settings as a hook finds them in its environment (see `Settings.variables`)."""
    values = {
        name: _parse(name, environ[name.upper()], "in the environment", name.upper())
        for name in TABLE
        if name.upper() in environ
    }
    return Settings(**values)


def defaults_file() -> str:
    """The text of the defaults file that is installed: every setting, commented out, but those in SHIPPED."""
    lines = [
        "# Settings of imageos, the OS definition of Ganeti: on every node, the same on all of them.",
        "# This file is shell. A variant's file (variants/NAME.conf) and OS parameters have the last word.",
        "",
    ]
    for name, entry in TABLE.items():
        parameter = f"; OS parameter {name}" if entry["parameter"] else ""
        lines += [f"# {name.upper()}: {entry['doc']}{parameter}", _assignment(name, entry["default"]), ""]
    return "\n".join(lines[:-1]) + "\n"


def _assignment(name: str, default: str) -> str:
    if name in SHIPPED:
        return f'{name.upper()}="{SHIPPED[name]}"'
    return f'# {name.upper()}="{default}"'


def describe(name: str) -> str:
    """One line on a setting, as `parameters.list` and the help show it."""
    return cast(str, _entry(name)["doc"])


def _entry(name: str) -> Mapping[str, Any]:
    return RESERVED[name] if name in RESERVED else TABLE[name]


def _shown(entry: Mapping[str, Any], text: str) -> str:
    """A value in a message. A URL may hold a password."""
    hidden = entry["secret"] or (entry["kind"] in (_url, _for_ganeti, _checksum) and "@" in text)
    return "(secret)" if hidden else repr(text)


def _parse(name: str, text: str, where: str, shown: str) -> Any:
    entry = _entry(name)
    if text == "":
        text = entry["default"]  # as in the ancestor: empty is not set
        if text == "":
            return None if entry["kind"] is _mebibytes else ""
    try:
        if "\0" in text:
            raise ValueError("text without NUL")
        return entry["kind"](text)
    except ValueError as error:
        raise Failure(f"{shown}={_shown(entry, text)} {where} is not accepted: it must be {error}") from None


def _warn_unknown(variable: str, path: str, known: Mapping[str, str], warn: Callable[[str], None]) -> None:
    # A lower-case name is a file's own helper variable, CINIT_* are the cloud-init hook's. TARBALL_COMPRESS is in the
    # ancestor's defaults file; compression is recognised by content.
    if variable not in known and variable.isupper() and not variable.startswith(("CINIT_", "TARBALL_COMPRESS")):
        near = _nearest(variable, [name.upper() for name in TABLE])
        warn(f"unknown setting {variable} in {path}{near}")


def _nearest(name: str, names: list[str]) -> str:
    import difflib  # only on the way to a warning

    near = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _node_arch() -> str:
    machine = os.uname().machine
    return "x86" if re.fullmatch(r"i[3-6]86", machine) else machine


# --- the files -------------------------------------------------------------------------------------------


def _evaluate_files(given: Mapping[str, str], defaults_file: str) -> list[tuple[str, dict[str, str]]]:
    """(path, what it set) of the defaults file and of the variant's file, in this order."""
    variant = _variant_name(ganeti.variant(given))
    words = [shlex.quote(_regular_file(defaults_file))] if os.path.lexists(defaults_file) else []
    if variant:
        words.append(f'"${{VARIANTS_DIR:-{Settings.variants_dir}}}"/{variant}.conf')
    try:
        return shellfiles.evaluate("settings file", words, given, _may_hold_secrets)
    except shellfiles.MissingFile as missing:
        raise Failure(
            f"variant {variant} has no file {missing.path}",
            hint=f"create that file, or remove {variant} from {SITE_DIR}/variants.list",
        ) from None


def _regular_file(path: str) -> str:
    if not os.path.isfile(path):
        raise Failure(f"settings file {path} is not a regular file")
    return path


def _variant_name(variant: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]*", variant):
        raise Failure(f"OS_VARIANT={variant!r} is not the name of a variant")
    return variant


def _may_hold_secrets(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return True
    return any(name.upper() in text for name, entry in TABLE.items() if entry["secret"])
