"""The OS definition, as install has put it there, and the Python that runs it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress

from imageos import bytecode, log, settings
from imageos.checks.report import ERROR, NOTE, Finding, error, finding, note, ok, version
from imageos.errors import Failure
from imageos.installation import (
    COMPILED,
    content,
    not_in_use,
    parameters_list,
    program_file,
    script_links,
    search_path,
)
from imageos.node.programs import GANETI_PATH
from imageos.run import Command, pipeline


def check_files(os_dir: str) -> Iterator[Finding]:
    if not os.path.exists(f"{os_dir}/create"):
        yield error(f"there is no OS definition in {os_dir}", "imageos install")
        return
    program, ours = os.path.realpath(f"{os_dir}/imageos"), program_file()
    links = [link.path for link in script_links(os_dir)]
    errors = [f"{path} is not imageos" for path in links if os.path.realpath(path) != program]
    data = content(program) or b""
    if not bytecode.is_whole(data):
        yield error(f"{program} is cut off, or no program", f"{ours} install, or the package again")
        return
    if not os.access(program, os.X_OK):
        yield error(f"{program} cannot be executed", f"chmod 755 {program}")
    if not os.path.isfile(f"{os_dir}/variants.list"):
        errors.append(f"{os_dir}/variants.list cannot be read")
    yield from (error(what, "imageos install") for what in errors)
    if content(f"{os_dir}/parameters.list") != parameters_list().encode():
        yield note(f"{os_dir}/parameters.list is another version's", "imageos install")
    if os.path.isfile(ours) and data != content(ours):
        yield note(f"{program} is another version than {ours}", f"{ours} install")
    elif not bytecode.is_compiled(data, program + COMPILED):
        yield note(f"{program} is compiled anew at each start", f"{program} install, or the package again")
    if not errors:
        yield ok(os_dir)


def check_in_use(os_dir: str) -> Iterator[Finding]:
    """Check that it is what Ganeti runs; one in another place is somebody's trial if Ganeti finds none at all."""
    problem = not_in_use("/", os_dir)
    if problem:
        is_elsewhere = os.path.dirname(os_dir) not in search_path()
        yield finding(NOTE if is_elsewhere else ERROR, str(problem), problem.hint)


def check_offers() -> Iterator[Finding]:
    """Name the files of the site beside which install has put a newer version."""
    below = (f"{directory}/{name}" for directory, _, names in os.walk(settings.SITE_DIR) for name in sorted(names))
    for path in (f"{settings.DEFAULTS_FILE}.new", *below):
        if path.endswith(".new") and os.path.exists(path):
            old = path[: -len(".new")]
            yield note(f"{old} is the site's, this version's is beside it", f"diff {old} {path}")


def check_owners() -> Iterator[Finding]:
    """Name the files of the site that root runs, as shell or hooks, and that others can change."""
    tops = [f"{settings.SITE_DIR}/{name}" for name in ("variants", "hooks", "networks")]
    below = (f"{top}/{name}" for start in tops for top, _, names in os.walk(start) for name in [".", *sorted(names)])
    loose = []
    for path in (settings.DEFAULTS_FILE, *below):
        with suppress(OSError):  # a link to nowhere, which others report
            status = os.stat(path)
            if status.st_uid or status.st_mode & 0o002:
                loose.append(os.path.normpath(path))
    if loose:
        places = shlex.join([settings.DEFAULTS_FILE, *tops])
        hint = f"chown -R root {places}; chmod -R o-w {places}"
        yield note(f"root runs what others than root can change: {log.few(loose)}", hint)


def check_python() -> Iterator[Finding]:
    python = shutil.which("python3", path=GANETI_PATH)
    if not python:
        yield error(f"there is no python3 in Ganeti's PATH {GANETI_PATH}", "install python3")
        return
    yield version(python, version_of(python), (3, 9), "imageos needs Python 3.9 or newer")


def version_of(python: str) -> str:
    with suppress(Failure):
        output = pipeline(Command([python, "--version"]), timeout=10)[0].stdout
        return output.decode("ascii", "replace").strip().rpartition(" ")[2]
    return ""
