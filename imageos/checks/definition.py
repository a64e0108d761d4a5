"""The OS definition, as install has put it there, and the Python that runs it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from imageos import settings
from imageos.checks.report import ERROR, NOTE, OK, Report
from imageos.errors import Failure
from imageos.installation import content, not_in_use, parameters_list, program_file, script_links, search_path
from imageos.node.programs import GANETI_PATH
from imageos.run import Command, pipeline


def check_files(report: Report, os_dir: str) -> None:
    if not os.path.exists(f"{os_dir}/create"):
        report.say(ERROR, f"there is no OS definition in {os_dir}", "imageos install")
        return
    before = report.errors
    program = os.path.realpath(f"{os_dir}/imageos")
    for link in script_links(os_dir):
        if os.path.realpath(link.path) != program or not os.access(link.path, os.X_OK):
            report.say(ERROR, f"{link.path} is not imageos", "imageos install")
    if not os.path.isfile(f"{os_dir}/variants.list"):
        report.say(ERROR, f"{os_dir}/variants.list cannot be read", "imageos install")
    if content(f"{os_dir}/parameters.list") != parameters_list().encode():
        report.say(NOTE, f"{os_dir}/parameters.list is another version's", "imageos install")
    ours = program_file()
    if os.path.isfile(ours) and content(program) != content(ours):
        report.say(NOTE, f"{program} is another version than {ours}", f"{ours} install")
    if report.errors == before:
        report.say(OK, os_dir)


def check_in_use(report: Report, os_dir: str) -> None:
    """Check that it is what Ganeti runs; one in another place is somebody's trial if Ganeti finds none at all."""
    problem = not_in_use("/", os_dir)
    if problem:
        is_elsewhere = os.path.dirname(os_dir) not in search_path()
        report.say(NOTE if is_elsewhere else ERROR, str(problem), problem.hint)


def check_offers(report: Report) -> None:
    """Name the files of the site beside which install has put a newer version."""
    below = (f"{directory}/{name}" for directory, _, names in os.walk(settings.SITE_DIR) for name in sorted(names))
    for path in (f"{settings.DEFAULTS_FILE}.new", *below):
        if path.endswith(".new") and os.path.exists(path):
            old = path[: -len(".new")]
            report.say(NOTE, f"{old} is the site's, this version's is beside it", f"diff {old} {path}")


def check_python(report: Report) -> None:
    """Check the python3 that Ganeti's PATH finds."""
    python = shutil.which("python3", path=GANETI_PATH)
    if not python:
        report.say(ERROR, f"there is no python3 in Ganeti's PATH {GANETI_PATH}", "install python3")
        return
    report.say_version(python, version_of(python), (3, 9), "imageos needs Python 3.9 or newer")


def version_of(python: str) -> str:
    with suppress(Failure):
        output = pipeline(Command([python, "--version"]), timeout=10)[0].stdout
        return output.decode("ascii", "replace").strip().rpartition(" ")[2]
    return ""
