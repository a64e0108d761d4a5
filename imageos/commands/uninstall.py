"""uninstall: take away what install has put on this node, and nothing else.

What the site has made or changed stays, and is named; so do images. Instances need no OS definition to run, only to be
made, reinstalled, renamed, exported or imported. Done again, it changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from imageos import cluster, installation, log
from imageos.commandline import Parser
from imageos.errors import Failure
from imageos.installation import DIRECTORIES, RECORD, SITE_RECORD, Record, content, digest, read, read_record, under
from imageos.node.programs import available
from imageos.settings import CACHE_DIR, DEFAULTS_FILE, SITE_DIR

MOST_SHOWN = 20
SITE_DIRECTORIES = (*DIRECTORIES, f"{SITE_DIR}/networks", SITE_DIR)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    root = os.path.abspath(options.root)
    if options.site_files:
        remove(root, read(root, SITE_RECORD))
        with suppress(FileNotFoundError):
            os.unlink(under(root, SITE_RECORD))
        remove_trials(root)
        remove_directories(root, [*SITE_DIRECTORIES, os.path.dirname(SITE_RECORD)])
        return 0
    record = read_record(root, options.os_dir, "remove")
    if not record.links:
        log.info(f"imageos is not installed in {under(root, options.os_dir)}: nothing to remove")
        return 0
    if root == "/":
        warn_of_instances(os.path.basename(options.os_dir))
    # We may run from one of these files: no module is imported any more.
    remove(root, record)
    with suppress(FileNotFoundError):
        os.unlink(under(root, f"{options.os_dir}/{RECORD}"))
    remove_trials(root)
    tops = (options.os_dir, SITE_DIR, CACHE_DIR)
    remove_directories(root, [*SITE_DIRECTORIES, f"{options.os_dir}/tools", *tops])
    left = sorted(files_below(root, [*tops, DEFAULTS_FILE]))
    for path in left[:MOST_SHOWN]:
        log.info(f"left: {path}")
    if left[MOST_SHOWN:]:
        log.info(f"left: {len(left) - MOST_SHOWN} more")
    log.info(f"removed imageos from {under(root, options.os_dir)}")
    return 0


def warn_of_instances(os_name: str) -> None:
    """Name the instances that cannot be reinstalled any more."""
    if not available("gnt-instance"):
        return
    with suppress(Failure):
        names = [name for name, os_ in cluster.instances() if os_.partition("+")[0] == os_name]
        if names:
            log.warning(f"there are instances with the OS {os_name}: {' '.join(names)}")


def remove(root: str, record: Record) -> None:
    """Remove what is as install has left it; the program itself goes last."""
    for path, text in reversed(list(record.links.items())):
        link = under(root, path)
        if os.path.islink(link) and os.readlink(link) == text:
            os.unlink(link)
    for path, expected in reversed(list(record.files.items())):
        file = under(root, path)
        found = None if os.path.islink(file) else content(file)
        if found is not None and digest(found) == expected:
            os.unlink(file)


def remove_trials(root: str) -> None:
    """Remove what `variants try` has noted: nobody shows it any more."""
    with suppress(OSError):  # nothing was tried
        for file in os.scandir(under(root, installation.TRIALS)):
            os.unlink(file.path)
    remove_directories(root, [installation.TRIALS, os.path.dirname(SITE_RECORD)])


def remove_directories(root: str, directories: Sequence[str]) -> None:
    """Remove the empty ones, the deepest first."""
    for directory in sorted((under(root, directory) for directory in directories), key=len, reverse=True):
        with suppress(OSError):  # not empty, not there, a link of the site's
            os.rmdir(directory)


def files_below(root: str, tops: Sequence[str]) -> Iterator[str]:
    """Yield all files in the directories `tops`, and those of `tops` that are files."""
    for top in (under(root, top) for top in tops):
        if os.path.isfile(top):
            yield top
        for directory, _, names in os.walk(top):
            yield from (f"{directory}/{name}" for name in names)


def parser() -> Parser:
    options = Parser("imageos uninstall", __doc__)
    options.add_argument("--root", default="/", metavar="DIR", help="take it away from under this directory")
    options.add_os_dir()
    options.add_site_files()
    return options
