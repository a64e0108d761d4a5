"""An installation: the paths that it consists of, and the record of what `install` has put in place."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from imageos import ganeti, settings
from imageos.errors import Failure

OS_DIR = "/usr/share/ganeti/os/image"
TOOLS = ("mount-disks", "umount-disks", "make-dump", "make-qemu-img", "ganeti-image")
COMPILED = ".compiled"  # behind the path of the program: the archive of its bytecode
RECORD = "installed.json"  # in the directory of the OS definition
# With a package: the record of the site's files, which are in no package: a package manager would ask what to do with
# those that the site has changed, and Ganeti's gnt-cluster command has no terminal to ask at.
SITE_RECORD = "/var/lib/ganeti-instance-image/installed.json"
TRIALS = f"{os.path.dirname(SITE_RECORD)}/trials"  # a file for each variant that was tried here
# Where Ganeti looks for OS definitions, the first first; how a node's was built is in its _constants.py.
SEARCH_PATH = ("/srv/ganeti/os", "/usr/local/lib/ganeti/os", "/usr/lib/ganeti/os", "/usr/share/ganeti/os")
GANETI_CONSTANTS = (
    "/etc/ganeti/share/ganeti/_constants.py",  # Debian's link to the version in use
    "/usr/share/ganeti/*/ganeti/_constants.py",
    "/usr/lib*/python3*/*-packages/ganeti/_constants.py",
    "/usr/local/lib*/python3*/*-packages/ganeti/_constants.py",
)
DIRECTORIES = (
    f"{settings.SITE_DIR}/variants",
    f"{settings.SITE_DIR}/hooks",
    f"{settings.SITE_DIR}/overlays",
    f"{settings.SITE_DIR}/networks/subnets",
    f"{settings.SITE_DIR}/networks/instances",
    settings.CACHE_DIR,
)


class Entry(NamedTuple):
    """One path that is put in place: a file with `content`, or a link with the text `link`."""

    path: str
    content: bytes = b""
    link: str = ""
    mode: int = 0o644
    site: bool = False  # the site may change it, or have its own: never overwritten
    offered: bool = True  # a newer version is put beside it then


class Record(NamedTuple):
    """The paths that install has put in place, or the package that did so instead."""

    files: Mapping[str, str] = {}  # SHA-256 of the content
    links: Mapping[str, str] = {}  # text of the link
    package: str = ""


def entries(os_dir: str, bin_dir: str) -> Iterator[Entry]:
    """Yield all that is put in place, in an order in which no link dangles."""
    yield Entry(f"{os_dir}/imageos", _program(), mode=0o755)
    yield compiled(os_dir)
    site, defaults = settings.SITE_DIR, _shipped("defaults")
    yield from script_links(os_dir)
    yield Entry(f"{os_dir}/ganeti_api_version", "".join(f"{n}\n" for n in ganeti.API_VERSIONS).encode())
    yield Entry(f"{os_dir}/parameters.list", parameters_list().encode())
    yield Entry(f"{os_dir}/common.sh", defaults["common.sh"])
    yield Entry(f"{os_dir}/catalog.conf", defaults["catalog.conf"])
    yield Entry(f"{site}/variants.list", defaults["variants.list"], site=True, offered=False)
    yield Entry(f"{os_dir}/variants.list", link=f"{site}/variants.list")
    yield Entry(f"{site}/variants/default.conf", defaults["default.conf"], site=True)
    yield Entry(settings.DEFAULTS_FILE, settings.defaults_file().encode(), site=True)
    for name, hook in sorted(_shipped("hooks.d").items()):
        yield Entry(f"{site}/hooks/{name}", hook, site=True)
    for command in ("imageos", *TOOLS):
        yield Entry(f"{bin_dir}/{command}", link=f"{os_dir}/imageos", site=command != "imageos")


def compiled(os_dir: str) -> Entry:
    from imageos import bytecode  # late: of all commands, only install needs it

    path = f"{os_dir}/imageos{COMPILED}"
    return Entry(path, bytecode.compiled(_program(), path))


def script_links(os_dir: str) -> Iterator[Entry]:
    """Yield the links by which the OS definition calls imageos."""
    for script in ganeti.SCRIPTS:
        yield Entry(f"{os_dir}/{script}", link="imageos")
    for tool in TOOLS:
        yield Entry(f"{os_dir}/tools/{tool}", link="../imageos")


def parameters_list() -> str:
    """Return the OS parameters in Ganeti's format: `name description`, no other line (ganeti-os-interface(7))."""
    return "".join(f"{name} {settings.ENTRIES[name].doc}\n" for name in (*settings.PARAMETERS, *settings.RESERVED))


def search_path(root: str = "/") -> tuple[str, ...]:
    """Return the directories in which the node's Ganeti looks for OS definitions."""
    for pattern in GANETI_CONSTANTS:
        for path in sorted(glob.glob(os.path.join(glob.escape(root), pattern[1:]))):
            match = re.search(rb"(?m)^OS_SEARCH_PATH = (\[.*\])$", content(path) or b"")
            with suppress(ValueError):
                if match:
                    return tuple(str(directory) for directory in json.loads(match[1]))
    return SEARCH_PATH


def not_in_use(root: str, os_dir: str) -> Failure | None:
    """Return a Failure if Ganeti takes another OS definition of this name, or does not look for one there."""
    name = os.path.basename(os_dir)
    places = search_path(root)
    for place in (f"{directory}/{name}" for directory in places):
        if os.path.realpath(under(root, place)) == os.path.realpath(under(root, os_dir)):
            return None
        if os.path.isdir(under(root, place)):
            away = f"{os.path.dirname(os.path.dirname(place))}/{name}.old"
            return Failure(
                f"Ganeti uses the OS definition in {place}, not that in {os_dir}: it looks there first",
                hint=f"on every node, move it away: mv {place} {away}",
            )
    return Failure(
        f"Ganeti does not find the OS definition in {os_dir}: it looks in {', '.join(places)}",
        hint=f"imageos install --os-dir {places[-1] if places else OS_DIR}/{name}",
    )


def digest(data: bytes) -> str:
    import hashlib  # late: of all commands, only install needs it

    return hashlib.sha256(data).hexdigest()


def content(path: str) -> bytes | None:
    """Return what is in a file; None if it is not there, or is no regular file."""
    try:
        # a FIFO would have us wait
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except (FileNotFoundError, IsADirectoryError):
        return None


def under(root: str, path: str) -> str:
    """Return `path` below `root`; Failure if that leads out of it."""
    joined = os.path.join(root, path.lstrip("/"))
    directory = os.path.realpath(os.path.dirname(joined))
    if ".." in path.split("/") or os.path.commonpath([os.path.realpath(root), directory]) != os.path.realpath(root):
        raise Failure(f"{joined} leads out of {root}", hint="as --root, give a directory whose links stay inside it")
    return joined


def program_file() -> str:
    """Return the file that we run from: the zipapp, or in a source tree the package's directory."""
    package = os.path.dirname(os.path.abspath(__file__))
    archive = os.path.dirname(os.path.dirname(package)).removesuffix(COMPILED)
    return archive if os.path.isfile(archive) else package


def program_there() -> str:
    """Return the path of imageos on another node: it is the same on all nodes that `install` has set up."""
    return os.path.realpath(program_file())


def _shipped(directory: str) -> dict[str, bytes]:
    """Return name -> content of the files that a directory of the package has."""
    from importlib import resources  # late: of all commands, only install needs it

    return {file.name: file.read_bytes() for file in (resources.files("imageos") / directory).iterdir()}


def _program() -> bytes:
    program = content(program_file())
    if program is None:
        raise Failure("install works from the built file only", hint="./build.py, then dist/imageos install")
    return program


def read_record(root: str, os_dir: str, verb: str) -> Record:
    """Return what the last install put there, nothing if there was none; fail if a package did, naming what to do."""
    record = read(root, f"{os_dir}/{RECORD}")
    if record.package:
        raise Failure(f"{os_dir} belongs to the package {record.package}", hint=f"{verb} the package instead")
    return record


def read(root: str, path: str) -> Record:
    path = under(root, path)
    text = content(path)
    if text is None:
        return Record()
    try:
        fields = Record._fields  # a newer version may have written more
        record = Record(**{name: value for name, value in json.loads(text).items() if name in fields})
        for paths in (record.files, record.links):
            if not all(isinstance(text, str) for pair in paths.items() for text in pair):
                raise ValueError("not text")
    except (ValueError, TypeError, AttributeError):
        raise Failure(
            f"{path} is damaged", hint=f"remove it; what differs from this version is then kept: rm {path}"
        ) from None
    return record
