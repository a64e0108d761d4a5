"""The settings: one table, and the files and OS parameters that set them.

built-in < defaults file < variant file < OS parameter (OSP_NAME). The files are shell: a shell evaluates
them with Ganeti's variables in its environment, and we read back the variables that it then has.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from imageos import ganeti, log, logins, shellfiles
from imageos.errors import Failure, nearest
from imageos.run import Finished
from imageos.shellfiles import Rules

DEFAULTS_FILE = "/etc/default/ganeti-instance-image"
SITE_DIR = "/etc/ganeti/instance-image"
CACHE_DIR = "/var/cache/ganeti-instance-image"
READ_LIMIT = 1 << 20  # characters of a file
AT_ONCE = 32  # variants whose files one shell evaluates
VARIANT = r"(?!\.)[A-Za-z0-9_.-]+"  # a name of a variant


# --- kinds: text -> value; ValueError says what is accepted -----------------------------------------------


def _yes_no(text: str) -> bool:
    if text.lower() in ("yes", "1", "true"):
        return True
    if text.lower() in ("no", "0", "false"):
        return False
    raise ValueError("yes or no")


def _at_least_one(unit: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
            raise ValueError(f"a whole number of {unit}, at least 1")
        return int(text)

    return parse


def _matching(pattern: str, accepted: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(accepted)
        return text

    return check


def _choice(*names: str) -> Callable[[str], str]:
    return _matching("|".join(names), f"one of {', '.join(names)}")


def _is_name(text: str) -> bool:
    """Return True for a file name that cannot leave its directory."""
    return "/" not in text and not text.startswith(".") and text.isprintable()


def _name(text: str) -> str:
    if not _is_name(text):
        raise ValueError("a name without / that does not begin with a dot")
    return text


def _public_keys(text: str) -> str:
    logins.authorized_keys(text)
    return text


def _line(text: str) -> str:
    if not all(c == "\t" or c.isprintable() for c in text):
        raise ValueError("one line of text")
    return text


def _fingerprints(text: str) -> str:
    """Also as gpg prints them, in groups of four, and as others do, with 0x."""
    digits = re.sub(r"\b0[xX]|\s", "", _line(text)).upper()
    if not re.fullmatch(r"([0-9A-F]{40})*", digits):
        raise ValueError("fingerprints of keys: 40 digits each, 0-9 and A-F")
    return " ".join(digits[at : at + 40] for at in range(0, len(digits), 40))


_URL = r"(?i:https?)://[^\s/]+(/([ \S]*\S)?)?"

_mebibytes = _at_least_one("MiB")
_seconds = _at_least_one("seconds")
_arch = _matching(r"[A-Za-z0-9_]+", "an architecture, such as x86_64")
_directory = _matching(r"/(?s:.*)", "an absolute path")
_url = _matching(_URL, "a URL that begins with http:// or https://")
_hook_names = _matching(r"[A-Za-z0-9_\s-]*", "names of hooks, separated by spaces")


def _addresses(text: str) -> str:
    import ipaddress  # late: only these settings need it

    for word in _line(text).split():
        try:
            ipaddress.ip_address(word)
            if "%" in word:  # the scope of the node's
                raise ValueError
        except ValueError:
            raise ValueError("IP addresses, separated by spaces") from None
    return text


_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DOMAIN = rf"(?=.{{1,254}}$){_LABEL}(\.{_LABEL})*\.?"


def _domains(text: str) -> str:
    if not all(re.fullmatch(_DOMAIN, word) for word in text.split()):
        raise ValueError("DNS domains, separated by spaces")
    return _line(text)


def _checksum(text: str) -> str:
    is_url = re.fullmatch(_URL, text)
    # A digest of another kind or a yes/no answer is a mistake, not the name of a checksum file.
    is_name = not re.fullmatch(r"(?i)[0-9a-f]{32,}|.*:.*|yes|no|none|off|true|false", text) and _is_name(text)
    if not (text == "no" or is_pin(text) or is_url or is_name):
        raise ValueError("sha256:HEX, sha512:HEX, no, or the checksum file: its URL, or its name beside the image")
    return text


def is_pin(checksum: str) -> bool:
    """Return True if an IMAGE_CHECKSUM is the checksum itself, not the name or URL of a file."""
    return bool(re.fullmatch(r"sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128}", checksum))


def _for_ganeti(text: str) -> str:
    """Accept what Ganeti accepts (CheckImageValidity in its cmdlib/common.py), but a URL must name a file.

    Ganeti stores a value even if it cannot fetch it, and then every reinstall fails.
    """
    if not re.match(r"(https?|ftps?)://[^\s/]+/\S|/", _line(text)):
        raise ValueError("an absolute path, or the URL of a file (http, https, ftp or ftps)")
    return text


class Entry(NamedTuple):
    kind: Callable[[str], Any]  # text -> value
    default: str  # text as in a file; empty means none: decided when needed
    doc: str
    parameter: bool = False  # it may be an OS parameter
    secret: bool = False

    def value(self, text: str) -> Any:
        """Return the value of a text, which means not set if it is empty, as in ganeti-instance-image."""
        text = text or self.default
        return self.kind(text) if text else None if self.kind is _mebibytes else ""


def _setting(kind: Callable[[str], Any], default: str, doc: str, **marks: bool) -> Any:
    return Entry(kind, default, doc, **marks)  # `Settings` has its value


_parameter = partial(_setting, parameter=True)


class _Table(NamedTuple):
    """Every setting, under its name in lower case. They are listed nowhere else."""

    cdinstall: bool = _parameter(_yes_no, "no", "leave the disks alone: the instance boots an installer")
    swap: bool = _parameter(_yes_no, "yes", "make a swap partition (tarball and dump)")
    swap_size: int | None = _parameter(_mebibytes, "", "size of swap in MiB (default: the instance's memory)")
    boot_size: int | None = _parameter(_mebibytes, "", "size of /boot in MiB (default: 100, on gpt 512)")
    filesystem: str = _parameter(
        _choice("ext2", "ext3", "ext4", "xfs", "btrfs"),
        "ext3",
        "filesystem of the partitions: ext2, ext3, ext4, xfs or btrfs",
    )
    partition_table: str = _parameter(
        _choice("msdos", "gpt"), "msdos", "msdos, or gpt, which boots from BIOS and UEFI alike"
    )
    kernel_args: str = _parameter(_line, "", "added to the guest's kernel command line")
    image_name: str = _parameter(_name, "", "name of the image, without architecture and suffix")
    arch: str = _parameter(_arch, "", "architecture in the image's file name (default: the node's, as x86_64 or x86)")
    image_type: str = _parameter(
        _choice("tarball", "dump", "qemu", "raw", "qcow2"), "dump", "tarball, dump, qemu, raw or qcow2"
    )
    image_dir: str = _setting(_directory, CACHE_DIR, "where the images are")
    image_url: str = _parameter(_url, "", "directory URL of the images, or URL of one image file")
    image_checksum: str = _parameter(
        _checksum, "", "sha256:HEX or sha512:HEX of the image; or its checksum file, a URL or a name beside it; or no"
    )
    image_keyring: str = _setting(_directory, "", "gpgv keyring that must have signed the checksum file, or the image")
    image_signer: str = _setting(_fingerprints, "", "fingerprint of the key of IMAGE_KEYRING that must have signed")
    image_signed_name: str = _setting(
        _line, "", "pattern (as of files) of the name that a signed checksum may have instead of the image's"
    )
    image_verify: bool = _setting(_yes_no, "yes", "check an image against its checksum")
    image_cleanup: bool = _setting(_yes_no, "no", "remove a downloaded image after use")
    cache_dir: str = _setting(_directory, CACHE_DIR, "where downloads are kept, and images unpacked")
    export_dir: str = _setting(_directory, "/tmp", "where import keeps a qcow2 disk of an old backup")
    fdisk: str = _setting(str, "sfdisk", "accepted and ignored: sfdisk is used")
    grow: bool = _parameter(_yes_no, "yes", "grow root partition and filesystem of a disk image to the disk")
    nomount: bool = _parameter(_yes_no, "no", "not Linux (Windows, BSD): write the disk image, touch nothing")
    overlay: str = _parameter(_name, "", "directory in OVERLAYS_DIR that is copied over the guest's root")
    customize_dir: str = _setting(_directory, SITE_DIR + "/hooks", "where the hooks are")
    variants_dir: str = _setting(_directory, SITE_DIR + "/variants", "where the files of the variants are")
    networks_dir: str = _setting(_directory, SITE_DIR + "/networks", "where static addresses are described")
    overlays_dir: str = _setting(_directory, SITE_DIR + "/overlays", "where the overlays are")
    import_hooks: str = _setting(_hook_names, "grub", "the hooks that an import runs")
    rename_hooks: str = _setting(_hook_names, "zz_ddns", "the hooks that a rename runs")
    dns_servers: str = _parameter(_addresses, "", "DNS servers of the guest, separated by spaces")
    dns_search: str = _parameter(_domains, "", "DNS search list of the guest")
    dns_domain: str = _parameter(_domains, "", "DNS domain of the guest")
    ssh_authorized_keys: str = _parameter(_public_keys, "", "public keys that may log in as root", secret=True)
    root_password_hash: str = _parameter(logins.password_hash, "", "root's password as in /etc/shadow", secret=True)
    user_data: str = _parameter(str, "", "user-data for cloud-init", secret=True)
    hook_timeout: int = _setting(_seconds, "3600", "seconds that one hook may take")
    guest_timeout: int = _setting(_seconds, "600", "seconds that one command of the guest may take")
    image_debug: bool = _parameter(_yes_no, "no", "yes: every command and its output in the log")

    # Other variables that the files set, for the hooks.
    unknown: Mapping[str, str] = {}


TABLE: dict[str, Entry] = {name: entry for name, entry in _Table._field_defaults.items() if isinstance(entry, Entry)}


class Settings(_Table):
    __slots__ = ()

    def __new__(cls, **given: Any) -> Settings:
        return super().__new__(cls, **{**{name: entry.value("") for name, entry in TABLE.items()}, **given})

    def with_sizes(self, memory: int) -> Settings:
        """Return the settings with the default sizes filled in; `memory` of the instance in MiB."""
        boot_size = self.boot_size or (512 if self.partition_table == "gpt" else 100)
        return self._replace(boot_size=boot_size, swap_size=self.swap_size or memory)

    def variables(self) -> dict[str, str]:
        """Return all settings as in a hook's environment or a file: NAME -> text."""
        return {**self.unknown, **{name.upper(): _as_text(getattr(self, name)) for name in TABLE}}


# The installed defaults file sets these better values; the built-in ones cannot change, as old sites rely on them.
SHIPPED = {"filesystem": "ext4"}
PARAMETERS = tuple(name for name, entry in TABLE.items() if entry.parameter)
# OS parameters that Ganeti reads itself for any OS. They are not settings, but parameters.list must contain them, or
# Ganeti refuses them. Its master daemon reads the first, its metadata daemon the others.
RESERVED = {
    "os-image": Entry(_for_ganeti, "", "path or URL of a disk image that Ganeti itself writes to the first disk"),
    "os-install-package": Entry(_line, "", "archive that Ganeti's metadata daemon serves to the instance"),
    "os-package": Entry(_line, "", "archive that Ganeti's metadata daemon serves to the instance"),
}
ENTRIES = {**TABLE, **RESERVED}


def load_settings(environ: Mapping[str, str], defaults_file: str = DEFAULTS_FILE) -> Settings:
    """Return the settings of the call that `environ` describes. Log all problems but the last; fail with that."""
    settings, problems = examine_settings(environ, defaults_file)
    if problems:
        for problem in problems[:-1]:
            log.info(str(problem))
        raise problems[-1]
    log.set_debug(settings.image_debug)
    return settings


def examine_settings(
    environ: Mapping[str, str],
    defaults_file: str = DEFAULTS_FILE,
    warn: Callable[[str], None] = log.warning,
    done: Finished | None = None,
) -> tuple[Settings, list[Failure]]:
    """As `load_settings`, but return all problems instead of raising; the settings ignore wrong values.

    `done`: what a shell has said of the files (shellfiles.run_each).
    """
    from_ganeti = ganeti.variables(environ)
    problems: list[Failure] = []
    values: dict[str, Any] = {}
    unknown: dict[str, str] = {}

    def set_value(name: str, text: str, where: str) -> None:
        with _noted(problems):
            value = parse_setting(name, text, where)
            if name in TABLE:  # else Ganeti's own
                values[name] = value

    layers = []
    with _noted(problems):
        layers = _evaluate_files(from_ganeti, defaults_file, warn, done)
    known = {name: text for _, variables in layers for name, text in variables.items()}
    for path, variables in layers:
        for variable, text in variables.items():
            if variable.lower() in TABLE and variable.isupper():
                if TABLE[variable.lower()].secret:
                    problems += _lost_in_quotes(path, variable, {**from_ganeti, **known})
                set_value(variable.lower(), text, f"in {path}")
            elif variable not in from_ganeti:
                if variable not in unknown:
                    _warn_unknown(variable, path, variables, warn)
                unknown[variable] = text
    for name, text in _os_parameters(from_ganeti):
        if name not in TABLE and name not in RESERVED:
            warn(f"unknown OS parameter {name}{nearest(name, PARAMETERS)}")
        elif name in TABLE and name not in PARAMETERS:
            problems.append(Failure(f"{name.upper()} cannot be set by an OS parameter (OSP_{name.upper()})"))
        else:
            set_value(name, text, f"as OS parameter {name}")
    for name in ("image_signer", "image_signed_name"):
        if values.get(name) and not values.get("image_keyring"):
            warn(f"{name.upper()} has no effect: without IMAGE_KEYRING no signature is asked for")
    values["arch"] = values.get("arch") or _node_arch()
    return Settings(**values, unknown=unknown), problems


@contextmanager
def _noted(problems: list[Failure]) -> Iterator[None]:
    try:
        yield
    except Failure as problem:
        problems.append(problem)


def examine_each(
    environs: Iterable[Mapping[str, str]], warn: Callable[[str], None]
) -> Iterator[tuple[Settings, list[Failure]]]:
    """As `examine_settings` of each, but with one shell for many. They have the same variables."""
    left = iter(environs)
    while some := list(islice(left, AT_ONCE)):
        ended: Sequence[Finished | None] = [None] * len(some)
        with suppress(Failure):  # of one that is wrong before the shell sees it
            of_ganeti = [ganeti.variables(environ) for environ in some]
            ended = shellfiles.run_each([(_words(environ, DEFAULTS_FILE), environ) for environ in of_ganeti])
        for environ, done in zip(some, ended):
            yield examine_settings(environ, warn=warn, done=done)


def unknown_parameters(environ: Mapping[str, str]) -> list[str]:
    """Return the OS parameters that imageos does not know; Ganeti itself refuses those not in parameters.list."""
    return [name for name, _ in _os_parameters(environ) if name not in TABLE and name not in RESERVED]


def reserved_parameters(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the OS parameters that are set and that Ganeti reads itself: name -> text without secrets."""
    given = _os_parameters(environ)
    return {name: _shown(RESERVED[name], text) for name, text in given if text and name in RESERVED}


def _os_parameters(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each OSP_NAME. For os-image that is OSP_OS_IMAGE, from old Ganeti OSP_OS-IMAGE."""
    for variable, text in environ.items():
        if variable.startswith("OSP_"):
            name = variable[len("OSP_") :].lower()
            dashed = name.replace("_", "-")
            yield dashed if dashed in RESERVED else name, text


def settings_from_variables(environ: Mapping[str, str]) -> Settings:
    """Return the settings from a hook's environment (see `Settings.variables`)."""
    values = {
        name: parse_setting(name, environ[name.upper()], "in the environment")
        for name in TABLE
        if name.upper() in environ
    }
    return Settings(**values)


def defaults_file() -> str:
    """Return the text of the defaults file to install: every setting, commented out except those in SHIPPED."""
    lines = [
        "# Settings of imageos, the OS definition of Ganeti: on every node, the same on all of them.",
        "# This file is shell. A variant's file (variants/NAME.conf) and OS parameters have the last word.",
        "",
    ]
    for name, entry in TABLE.items():
        parameter = f"; OS parameter {name}" if entry.parameter else ""
        lines += [f"# {name.upper()}: {entry.doc}{parameter}", _assignment(name, entry.default), ""]
    return "\n".join(lines[:-1]) + "\n"


def _assignment(name: str, default: str) -> str:
    if name in SHIPPED:
        return f'{name.upper()}="{SHIPPED[name]}"'
    quote = "'" if TABLE[name].secret else '"'  # the shell replaces no $ in single quotes
    return f"# {name.upper()}={quote}{default}{quote}"


def _shown(entry: Entry, text: str) -> str:
    """Return a value for messages, without secrets. A URL may contain a password, and a query that is a token."""
    return "(secret)" if _is_hidden(entry, text) else repr(text)


def _is_hidden(entry: Entry, text: str) -> bool:
    return entry.secret or bool(entry.kind in (_url, _for_ganeti, _checksum) and re.search("[@?]", text))


def parse_setting(name: str, text: str, where: str) -> Any:
    """Return the value of a setting; Failure says which values are accepted."""
    entry = ENTRIES[name]
    try:
        if "\0" in text:
            raise ValueError("text without NUL")
        return entry.value(text)
    except ValueError as error:
        what = f"{name.upper() if name in TABLE else name}={_shown(entry, text)} {where}"
        raise Failure(f"{what} is not accepted: it must be {error}") from None


# Not settings, but the ancestor's too: what the hook cloud-init reads, and what its defaults file has for the tools'
# compression, which we recognise by content.
HOOK_VARIABLES = ("CINIT_USER", "CINIT_SSH_KEY", "CINIT_DISABLE_ROOT", "CINIT_SSH_PWAUTH", "CINIT_MANAGE_RESOLV_CONF")
_KNOWN_BESIDES = (*HOOK_VARIABLES, "TARBALL_COMPRESS")


def _warn_unknown(variable: str, path: str, layer: Collection[str], warn: Callable[[str], None]) -> None:
    """Warn of a variable that a file sets, with the others in `layer`, and that looks like a setting."""
    names = [*(name.upper() for name in TABLE), *HOOK_VARIABLES]
    if variable.isupper():
        if variable not in _KNOWN_BESIDES:
            warn(f"unknown setting {variable} in {path}{nearest(variable, names)}")
    # Other names are a file's helper variables, as in `arch=...` and IMAGE_NAME=debian-$arch.
    elif variable.upper() in names and variable.upper() not in layer and not _uses(path, variable):
        warn(f"unknown setting {variable} in {path} (did you mean {variable.upper()}?)")


def _uses(path: str, variable: str) -> bool:
    """Return whether a file reads a variable itself."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return bool(re.search(rf"\$\{{?{variable}\b", file.read(READ_LIMIT)))
    return False


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _node_arch() -> str:
    machine = os.uname().machine
    return "x86" if re.fullmatch(r"i[3-6]86", machine) else machine


# --- the files -------------------------------------------------------------------------------------------


def _evaluate_files(
    from_ganeti: Mapping[str, str], defaults_file: str, warn: Callable[[str], None], done: Finished | None
) -> list[tuple[str, dict[str, str]]]:
    """Return (path, variables that it set) of the defaults file, then of the variant's file."""

    def is_secret(path: str, text: str, variables: Mapping[str, str] | None) -> bool:
        return _may_tell_a_secret(path, text, variables, from_ganeti)

    words, rules = _words(from_ganeti, defaults_file), Rules(is_secret, _VITAL, _NAMES, warn)
    try:
        return shellfiles.evaluate("settings file", words, from_ganeti, rules, done)
    except shellfiles.MissingFile as missing:
        variant = from_ganeti.get("OS_VARIANT", "")
        raise Failure(
            f"variant {variant} has no file {missing.path}",
            hint=f"create that file, or remove {variant} from {SITE_DIR}/variants.list",
        ) from None


def _words(from_ganeti: Mapping[str, str], defaults_file: str) -> list[str]:
    """Return the files as shell words."""
    variant, has_defaults = from_ganeti.get("OS_VARIANT", ""), os.path.lexists(defaults_file)
    if variant and not re.fullmatch(VARIANT, variant):
        raise Failure(
            f"OS_VARIANT={variant!r} is not the name of a variant",
            hint=f"letters, digits, _, - and . only: correct {SITE_DIR}/variants.list, or remove its byte order mark",
        )
    if has_defaults and not os.path.isfile(defaults_file):
        raise Failure(f"settings file {defaults_file} is not a regular file")
    words = [shlex.quote(defaults_file)] if has_defaults else []
    if variant:
        words.append(f'"${{VARIANTS_DIR:-{Settings().variants_dir}}}"/{variant}.conf')
    return words


# A double-quoted value in a file, and what the shell replaces in it. Not the output of commands: $(cat FILE).
_DOUBLE_QUOTED = r'^[ \t]*(?:export[ \t]+)?{}="((?:[^"\\`]|\\.)*)"[ \t]*$'
_REPLACED = re.compile(r"\\.|\$(\{(?:[A-Za-z_]\w*|[0-9])\}|[A-Za-z_]\w*|[0-9*@#?$!-])", re.DOTALL)
_ASSIGNED = re.compile(r"(?:^|[\s;&|(])([A-Za-z_]\w*)(?:\[[^]\n]*\])?\+?=")
_OF_THE_SHELL = ("PATH", "PWD", "HOSTNAME")


def _lost_in_quotes(path: str, variable: str, known: Mapping[str, str]) -> list[Failure]:
    """Return the error of a value in double quotes in which the shell has replaced $WORD, although that is not set.

    Nothing in the value tells: what is left of user-data has its form.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(READ_LIMIT)
    except OSError:
        return []
    pattern = _DOUBLE_QUOTED.format(variable)
    values = re.findall(pattern, text, re.MULTILINE)
    # which it may unset later, and an array is not exported
    assigned = _ASSIGNED.findall(re.sub(pattern, "", text, flags=re.MULTILINE)) if values else []
    words = [word.strip("{}") for value in values if "$(" not in value for word in _REPLACED.findall(value) if word]
    lost = next((word for word in words if word not in (*known, *assigned, *_OF_THE_SHELL)), "")
    if not lost:
        return []
    reason = f"{variable} in {path} is in double quotes, in which the shell replaces ${lost}"
    return [Failure(reason, hint="put it in single quotes, or write \\$ for a $ that is part of it")]


# Without them an image is accepted that they would refuse.
_VITAL = ("IMAGE_KEYRING", "IMAGE_SIGNER", "IMAGE_CHECKSUM")
_NAMES = tuple(name.upper() for name in TABLE)
_SECRETS = tuple(name.upper() for name, entry in TABLE.items() if entry.secret)
_NAMED_SECRET = re.compile("PASS|SECRET|TOKEN|CREDENTIAL|PRIVATE", re.IGNORECASE)
_QUOTING = re.compile(r"""[\\'"]""")
_SHORT = 4  # characters; what is shorter is in too many words


def _may_tell_a_secret(
    path: str, text: str, variables: Mapping[str, str] | None, from_ganeti: Mapping[str, str]
) -> bool:
    """Return whether what was said of a file may quote a secret that it sets, or that is among all `variables`.

    If these are not known, it may be one of any file that it reads.
    """
    command = re.fullmatch(r"([A-Z_]+): .*not found", text)
    if command and command[1].lower() in TABLE:  # spaces around =
        return False
    values = _secret_lines({**from_ganeti, **(variables or {})})
    plain = _QUOTING.sub("", text)  # `export` and `set -x` quote what they print
    if any(word in text for word in _SECRETS) or any(_QUOTING.sub("", value) in plain for value in values):
        return True
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if not line.lstrip().startswith("#")]
    except OSError:
        return False  # no file of the site's
    telling = "|".join((*_SECRETS, *(() if variables is not None else (r"source\s", r"(?<!\S)\.\s"))))
    return any(re.search(telling, line) for line in lines)


def _secret_lines(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of secrets: ours, those whose names say so, and the OS parameters of a site's own hooks.

    Whether Ganeti was told that such a parameter is secret, it does not tell us.
    """
    for name, text in variables.items():
        entry = TABLE.get(name.removeprefix("OSP_").lower())
        if _is_hidden(entry, text) if entry else name.startswith("OSP_") or _NAMED_SECRET.search(name):
            yield from (line for line in text.splitlines() if len(_QUOTING.sub("", line)) >= _SHORT)
