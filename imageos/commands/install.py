"""install: put the OS definition, the defaults and the hooks in place on this node.

Done again, it changes nothing; done by a newer version, it upgrades. What belongs to imageos is replaced; a file of
the site's is replaced if it is still as install has put it there, else it is kept, and the newer version is put beside
it as FILE.new. There is no cache to prune: imageos runs from its file.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from imageos import __version__, installation, log, settings
from imageos.commandline import Parser
from imageos.errors import Failure, Usage
from imageos.installation import COMPILED, Entry, Record, content, digest, under
from imageos.node import linux

EPOCH = 315532800  # of all files in packages (build.py)
UNFINISHED = ".{}.tmp"  # behind the name of a file that is being written


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    for option, directory in {"--os-dir": options.os_dir, "--bin-dir": options.bin_dir}.items():
        if not re.fullmatch("(/+[^/]+)+/*", directory):
            raise Usage(f"{option}={directory}: it must be an absolute path, below / or --root")
    if not options.root:
        raise Usage("--root is empty")
    root = os.path.abspath(options.root)
    with alone(under(root, options.os_dir)):
        if options.site_files:
            install_site_files(root, list(installation.entries(options.os_dir, options.bin_dir)))
        else:
            install(root, options.os_dir, list(installation.entries(options.os_dir, options.bin_dir)))
    problem = installation.not_in_use(root, options.os_dir)
    if problem:
        log.info(f"hint: {problem.hint}")
        log.warning(str(problem))
    return 0


def install(root: str, os_dir: str, wanted: Sequence[Entry]) -> None:
    before = installation.read_record(root, os_dir, "upgrade")
    warn_of_older(under(root, f"{os_dir}/imageos"))
    changed = put_all(root, wanted, before, f"{os_dir}/{installation.RECORD}")
    log.info(
        f"imageos {__version__} is installed in {under(root, os_dir)}"
        + ("" if changed else ": nothing had to be changed")
    )


def install_site_files(root: str, wanted: Sequence[Entry]) -> None:
    """Put in place what a package has not: the files that the site may change, and the bytecode."""
    files = [entry for entry in wanted if (entry.site or entry.path.endswith(COMPILED)) and not entry.link]
    known = {**told_by_package(root, files), **installation.read(root, installation.SITE_RECORD).files}
    put_all(root, files, Record(known), installation.SITE_RECORD)


def put_all(root: str, wanted: Sequence[Entry], before: Record, record: str) -> bool:
    for directory in installation.DIRECTORIES:
        path = under(root, directory)
        try:
            os.makedirs(path, 0o700 if directory == settings.CACHE_DIR else 0o755, exist_ok=True)
        except FileExistsError as error:
            where = str(error.filename)
            what = f"is a link to {os.readlink(where)}, which is not there" if os.path.islink(where) else "is a file"
            raise Failure(f"{where} {what}: it should be a directory", hint=f"make it one, or: rm {where}") from None
    remove_unfinished(root, wanted)
    changed = [put(root, entry, before.files) for entry in wanted]
    put(root, record_entry(root, record, wanted, before))
    return any(changed)


@contextmanager
def alone(os_dir: str) -> Iterator[None]:
    """Wait for another install; others wait for us."""
    os.makedirs(os_dir, exist_ok=True)
    with linux.closing(os.open(os_dir, os.O_RDONLY)) as directory:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield


def told_by_package(root: str, wanted: Iterable[Entry]) -> dict[str, str]:
    """Return the files that are still as another version's package has put them there, with their SHA-256.

    stdin says which files Debian's had, with their MD5 (`Conffiles` in dpkg-query(1)). The rpm's had the time EPOCH.
    """
    sums = {words[0]: words[1] for line in sys.stdin or () if len(words := line.split()) > 1}
    found = {}
    for entry in wanted:
        path = under(root, entry.path)
        data = content(path)
        if data is not None and (
            hashlib.md5(data).hexdigest() == sums.get(entry.path) or os.stat(path).st_mtime == EPOCH
        ):
            found[entry.path] = digest(data)
    return found


def warn_of_older(program: str) -> None:
    """Warn if the installed program, an archive without compression, is of a newer version."""
    version = re.search(rb'(?m)^__version__ = "([0-9a-z.]+)"$', content(program) or b"")
    if version and order(version[1].decode()) > order(__version__):
        log.warning(f"imageos {version[1].decode()} is replaced by an older version, {__version__}")


def order(version: str) -> list[int]:
    """Return what sorts 1.1.dev0 before 1.1, and that before 1.1.1."""
    return [int(part) if part.isdigit() else -1 for part in version.split(".")] + [0]


def remove_unfinished(root: str, wanted: Iterable[Entry]) -> None:
    """Remove what an install that was killed has left."""
    for path in (under(root, entry.path) for entry in wanted):
        for left in glob.glob(f"{glob.escape(path)}{UNFINISHED.format('[0-9a-f]' * 8)}"):
            os.unlink(left)


def put(root: str, entry: Entry, known: Mapping[str, str] = {}) -> bool:  # noqa: B006
    """Put `entry` in place, and return whether anything had to be done. `known`: the files of the last install."""
    path = under(root, entry.path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if entry.link:
        if _is_link(path, entry.link):
            return False
        if entry.site and os.path.lexists(path) and not _leads_to_a_definition(path):
            log.warning(f"{path} is the site's own, and kept: ours is called by imageos {os.path.basename(path)}")
            return False
        _replace(path, entry)
        return True
    # The ancestor has links where we have files: followed, they lead out of `root`.
    old = None if os.path.islink(path) and not entry.site else content(path)
    if old == entry.content and (entry.site or os.stat(path).st_mode & 0o7777 == entry.mode):
        return entry.site and _withdraw(path, entry, known)
    if entry.site and (old is not None or os.path.islink(path)):  # a link leads perhaps to what is not mounted yet
        if old is not None and digest(old) == known.get(entry.path) and not os.path.islink(path):
            # a hook that the site has made executable stays so
            _replace(path, entry._replace(mode=os.stat(path).st_mode & 0o777))
            _withdraw(path, entry, known)
            return True
        if not entry.offered or content(path + ".new") == entry.content:
            return False
        _replace(path + ".new", entry)
        log.info(f"{path} is kept as the site has it; this version's is {path}.new")
        return True
    _replace(path, entry)
    return True


def _leads_to_a_definition(path: str) -> bool:
    """Return whether a command is a link to a program or tool of an OS definition: ours, or the ancestor's."""
    return os.path.islink(path) and bool(re.search(r"/(imageos|tools/[a-z-]+)$", os.readlink(path)))


def _withdraw(path: str, entry: Entry, known: Mapping[str, str]) -> bool:
    """Take away what was put beside a file, if it is still there as it was; return whether it was."""
    offered = content(path + ".new")
    if offered is None or digest(offered) not in (known.get(entry.path + ".new"), digest(entry.content)):
        return False
    os.unlink(path + ".new")
    return True


def record_entry(root: str, record: str, wanted: Iterable[Entry], before: Record) -> Entry:
    """Return the file by which the next install knows what the site has changed, and uninstall what is ours.

    What is still there of an install with another --bin-dir, or of another version, stays ours.
    """
    files = {**before.files}
    links = {**before.links}
    for entry in wanted:
        if entry.link:
            links[entry.path] = entry.link
        else:
            files.update(dict.fromkeys((entry.path, entry.path + ".new"), digest(entry.content)))
    files = {path: known for path, known in files.items() if digest(content(under(root, path)) or b"") == known}
    links = {path: text for path, text in links.items() if _is_link(under(root, path), text)}
    text = json.dumps(Record(files, links)._asdict(), indent=1)
    return Entry(record, f"{text}\n".encode())


def _is_link(path: str, text: str) -> bool:
    return os.path.islink(path) and os.readlink(path) == text


def _replace(path: str, entry: Entry) -> None:
    """Write a temporary file and rename it: whoever calls the file meanwhile finds the old or the new one, whole."""
    if os.path.lexists(path) and not os.path.islink(path) and not os.path.isfile(path):
        what = "a directory" if os.path.isdir(path) else "no regular file"
        raise Failure(
            f"{path} is {what}, it should be a {'link' if entry.link else 'file'}",
            hint=f"move it away: mv {path} {path}.old",
        )
    temporary = path + UNFINISHED.format(secrets.token_hex(4))
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


def parser() -> Parser:
    options = Parser("imageos install", __doc__)
    options.add_argument("--root", default="/", metavar="DIR", help="put everything under this directory")
    options.add_os_dir()
    options.add_argument(
        "--bin-dir", default="/usr/local/sbin", metavar="DIR", help="directory of the commands (default: %(default)s)"
    )
    options.add_site_files()
    return options
