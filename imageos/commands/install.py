"""install: put the OS definition, the defaults and the hooks in place on this node.

Done again, it changes nothing. What belongs to imageos is replaced; what belongs to the site is made where it is
missing, and never changed: a newer version is put beside it as FILE.new.
"""

import argparse
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Optional

from imageos import __version__, ganeti, log, settings
from imageos.errors import Failure
from imageos.hooks import OS_DIR, program_file

SCRIPTS = ("create", "import", "export", "rename", "verify")
BIN_DIR = "/usr/local/sbin"
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


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    root = os.path.abspath(options.root)
    changed = 0
    for directory in DIRECTORIES:
        os.makedirs(_under(root, directory), exist_ok=True)
    for entry in entries(options.os_dir, options.bin_dir):
        changed += put(root, entry)
    log.info(
        f"imageos {__version__} is installed in {_under(root, options.os_dir)}"
        + ("" if changed else ": nothing had to be changed")
    )
    return 0


def entries(os_dir: str, bin_dir: str) -> Iterator[Entry]:
    """All that is put in place, in an order in which no link dangles."""
    yield Entry(f"{os_dir}/imageos", _program(), mode=0o755)
    for script in SCRIPTS:
        yield Entry(f"{os_dir}/{script}", link="imageos")
    yield Entry(f"{os_dir}/ganeti_api_version", "".join(f"{n}\n" for n in ganeti.API_VERSIONS).encode())
    yield Entry(f"{os_dir}/parameters.list", parameters_list().encode())
    yield Entry(f"{os_dir}/common.sh", _shipped("defaults", "common.sh"))
    yield Entry(f"{settings.SITE_DIR}/variants.list", _shipped("defaults", "variants.list"), site=True, offered=False)
    yield Entry(f"{os_dir}/variants.list", link=f"{settings.SITE_DIR}/variants.list")
    yield Entry(f"{settings.SITE_DIR}/variants/default.conf", _shipped("defaults", "default.conf"), site=True)
    yield Entry(settings.DEFAULTS_FILE, settings.defaults_file().encode(), site=True)
    for hook in sorted(one.name for one in (resources.files("imageos") / "hooks.d").iterdir()):
        yield Entry(f"{settings.SITE_DIR}/hooks/{hook}", _shipped("hooks.d", hook), site=True)
    yield Entry(f"{bin_dir}/imageos", link=f"{os_dir}/imageos")


def parameters_list() -> str:
    """The OS parameters in Ganeti's format: `name description`, no other line (ganeti-os-interface(7))."""
    return "".join(f"{name} {settings.describe(name)}\n" for name in settings.PARAMETERS)


def put(root: str, entry: Entry) -> bool:
    """Make `entry` so; whether something had to be done."""
    path = _under(root, entry.path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if entry.link:
        if os.path.islink(path) and os.readlink(path) == entry.link:
            return False
        _replace(path, entry)
        return True
    old = _content(path)
    if old == entry.content and (entry.site or os.stat(path).st_mode & 0o7777 == entry.mode):
        return False
    if entry.site and old is not None:
        if not entry.offered:
            return False
        if _content(path + ".new") == entry.content:
            return False
        _replace(path + ".new", entry)
        log.info(f"{path} is kept as the site has it; this version's is {path}.new")
        return True
    _replace(path, entry)
    return True


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
        raise Failure(f"cannot write {path}: {error.strerror}") from None


def _content(path: str) -> Optional[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError):
        return None


def _under(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))


def _shipped(*names: str) -> bytes:
    return resources.files("imageos").joinpath("/".join(names)).read_bytes()


def _program() -> bytes:
    path = program_file()
    if not os.path.isfile(path):
        raise Failure("install works from the built file only", hint="./build.py, then dist/imageos install")
    with open(path, "rb") as file:
        return file.read()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="imageos install", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="/", help="put everything under this directory")
    parser.add_argument("--os-dir", default=OS_DIR, help="directory of the OS definition (default: %(default)s)")
    parser.add_argument("--bin-dir", default=BIN_DIR, help="directory of the commands (default: %(default)s)")
    return parser
