"""install: put the OS definition, the defaults and the hooks in place on this node.

Done again, it changes nothing; done by a newer version, it upgrades. What belongs to imageos is replaced; a file of
the site's is replaced if it is still as install has put it there, else it is kept, and the newer version is put beside
it as FILE.new. There is no cache to prune: imageos runs from its file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from imageos import __version__, ganeti, log, settings
from imageos.commandline import Parser
from imageos.errors import Failure
from imageos.hooks import program_file

SCRIPTS = ("create", "import", "export", "rename", "verify")
TOOLS = ("mount-disks", "umount-disks", "make-dump", "make-qemu-img", "ganeti-image")
BIN_DIR = "/usr/local/sbin"
RECORD = "installed.json"  # in the directory of the OS definition
DIRECTORIES = (
    f"{settings.SITE_DIR}/variants",
    f"{settings.SITE_DIR}/hooks",
    f"{settings.SITE_DIR}/overlays",
    f"{settings.SITE_DIR}/networks/subnets",
    f"{settings.SITE_DIR}/networks/instances",
    settings.CACHE_DIR,
)


@dataclass(frozen=True)
class Entry:
    """One path that is put in place: a file with `content`, or a link with the text `link`."""

    path: str
    content: bytes = b""
    link: str = ""
    mode: int = 0o644
    site: bool = False  # the site may change it: never overwritten
    offered: bool = True  # whether a newer version is put beside it then


@dataclass(frozen=True)
class Record:
    """What install has put in place, by path; `package`: the package that did so instead."""

    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of the content
    links: dict[str, str] = field(default_factory=dict)  # text of the link
    package: str = ""


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    root = os.path.abspath(options.root)
    before = read_record(root, options.os_dir)
    refuse_package(before, options.os_dir, "upgrade")
    wanted = list(entries(options.os_dir, options.bin_dir))
    changed = 0
    for directory in DIRECTORIES:
        os.makedirs(under(root, directory), 0o700 if directory == settings.CACHE_DIR else 0o755, exist_ok=True)
    for entry in wanted:
        changed += put(root, entry, before.files)
    put(root, record_entry(root, options.os_dir, wanted))
    log.info(
        f"imageos {__version__} is installed in {under(root, options.os_dir)}"
        + ("" if changed else ": nothing had to be changed")
    )
    return 0


def entries(os_dir: str, bin_dir: str) -> Iterator[Entry]:
    """All that is put in place, in an order in which no link dangles."""
    yield Entry(f"{os_dir}/imageos", _program(), mode=0o755)
    for script in SCRIPTS:
        yield Entry(f"{os_dir}/{script}", link="imageos")
    for tool in TOOLS:
        yield Entry(f"{os_dir}/tools/{tool}", link="../imageos")
    yield Entry(f"{os_dir}/ganeti_api_version", "".join(f"{n}\n" for n in ganeti.API_VERSIONS).encode())
    yield Entry(f"{os_dir}/parameters.list", parameters_list().encode())
    yield Entry(f"{os_dir}/common.sh", _shipped("defaults", "common.sh"))
    yield Entry(f"{settings.SITE_DIR}/variants.list", _shipped("defaults", "variants.list"), site=True, offered=False)
    yield Entry(f"{os_dir}/variants.list", link=f"{settings.SITE_DIR}/variants.list")
    yield Entry(f"{settings.SITE_DIR}/variants/default.conf", _shipped("defaults", "default.conf"), site=True)
    yield Entry(settings.DEFAULTS_FILE, settings.defaults_file().encode(), site=True)
    for hook in sorted(one.name for one in (resources.files("imageos") / "hooks.d").iterdir()):
        yield Entry(f"{settings.SITE_DIR}/hooks/{hook}", _shipped("hooks.d", hook), site=True)
    for command in ("imageos", *TOOLS):
        yield Entry(f"{bin_dir}/{command}", link=f"{os_dir}/imageos")


def parameters_list() -> str:
    """The OS parameters in Ganeti's format: `name description`, no other line (ganeti-os-interface(7))."""
    return "".join(f"{name} {settings.describe(name)}\n" for name in (*settings.PARAMETERS, *settings.RESERVED))


def put(root: str, entry: Entry, known: Mapping[str, str] = {}) -> bool:  # noqa: B006
    """Make `entry` so; whether something had to be done. `known`: the files of the last install."""
    path = under(root, entry.path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if entry.link:
        if os.path.islink(path) and os.readlink(path) == entry.link:
            return False
        _replace(path, entry)
        return True
    # The ancestor has links where we have files: followed, they lead out of `root`.
    old = None if os.path.islink(path) and not entry.site else content(path)
    if old == entry.content and (entry.site or os.stat(path).st_mode & 0o7777 == entry.mode):
        return entry.site and _withdraw(path, entry, known)
    if entry.site and old is not None:
        if digest(old) == known.get(entry.path) and not os.path.islink(path):
            # a hook that the site has made executable stays so
            _replace(path, dataclasses.replace(entry, mode=os.stat(path).st_mode & 0o777))
            _withdraw(path, entry, known)
            return True
        if not entry.offered or content(path + ".new") == entry.content:
            return False
        _replace(path + ".new", entry)
        log.info(f"{path} is kept as the site has it; this version's is {path}.new")
        return True
    _replace(path, entry)
    return True


def _withdraw(path: str, entry: Entry, known: Mapping[str, str]) -> bool:
    """Take away what was put beside a file, if it is still there as it was."""
    offered = content(path + ".new")
    if offered is None or digest(offered) not in (known.get(entry.path + ".new"), digest(entry.content)):
        return False
    os.unlink(path + ".new")
    return True


# --- the record ---------------------------------------------------------------------------------------------


def record_entry(root: str, os_dir: str, wanted: Iterable[Entry]) -> Entry:
    """The file that tells the next install what the site has changed since, and uninstall what is ours."""
    files, links = {}, {}
    for entry in wanted:
        if entry.link:
            links[entry.path] = entry.link
            continue
        for path in (entry.path, entry.path + ".new"):
            if content(under(root, path)) == entry.content:
                files[path] = digest(entry.content)
    text = json.dumps(dataclasses.asdict(Record(files, links)), indent=1)
    return Entry(f"{os_dir}/{RECORD}", f"{text}\n".encode())


def read_record(root: str, os_dir: str) -> Record:
    """What the last install put there; nothing, if there was none."""
    path = under(root, f"{os_dir}/{RECORD}")
    text = content(path)
    if text is None:
        return Record()
    try:
        record = Record(**json.loads(text))
        for known in (record.files, record.links):
            if not all(isinstance(one, str) for pair in known.items() for one in pair):
                raise ValueError("not text")
        return record
    except (ValueError, TypeError, AttributeError):
        raise Failure(
            f"{path} is damaged", hint=f"remove it; what differs from this version is then kept: rm {path}"
        ) from None


def refuse_package(record: Record, os_dir: str, what: str) -> None:
    if record.package:
        raise Failure(f"{os_dir} belongs to the package {record.package}", hint=f"{what} the package instead")


def _replace(path: str, entry: Entry) -> None:
    """Temporary name and rename: whoever calls the file meanwhile finds the old or the new one, whole."""
    if os.path.isdir(path) and not os.path.islink(path):
        raise Failure(
            f"{path} is a directory, it should be a {'link' if entry.link else 'file'}",
            hint=f"move it away: mv {path} {path}.old",
        )
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        if entry.link:
            os.symlink(entry.link, temporary)
        else:
            with open(temporary, "xb") as file:
                file.write(entry.content)
                os.fchmod(file.fileno(), entry.mode)
                os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        hint = "run it with sudo" if isinstance(error, PermissionError) and os.geteuid() else None
        raise Failure(f"cannot write {path}: {error.strerror}", hint=hint) from None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError):
        return None


def under(root: str, path: str) -> str:
    """Where `path` is below `root`; Failure if that leads out of it."""
    place = os.path.join(root, path.lstrip("/"))
    directory = os.path.realpath(os.path.dirname(place))
    if ".." in path.split("/") or os.path.commonpath([os.path.realpath(root), directory]) != os.path.realpath(root):
        raise Failure(f"{place} leads out of {root}", hint="as --root, give a directory whose links stay inside it")
    return place


def _shipped(*names: str) -> bytes:
    return resources.files("imageos").joinpath("/".join(names)).read_bytes()


def _program() -> bytes:
    path = program_file()
    if not os.path.isfile(path):
        raise Failure("install works from the built file only", hint="./build.py, then dist/imageos install")
    with open(path, "rb") as file:
        return file.read()


def parser() -> Parser:
    options = Parser("imageos install", __doc__)
    options.add_argument("--root", default="/", metavar="DIR", help="put everything under this directory")
    options.add_os_dir()
    options.add_argument(
        "--bin-dir", default=BIN_DIR, metavar="DIR", help="directory of the commands (default: %(default)s)"
    )
    return options
