"""The OS definition, as install has put it there, and the Python that runs it."""

from __future__ import annotations

import os
import shutil

from imageos import settings
from imageos.checks.programs import GANETI_PATH, version_of
from imageos.checks.report import ERROR, NOTE, OK, Report
from imageos.commands import install
from imageos.hooks import program_file


def check_files(report: Report, os_dir: str) -> None:
    if not os.path.exists(f"{os_dir}/create"):
        report.say(ERROR, f"there is no OS definition in {os_dir}", "imageos install")
        return
    before = report.errors
    program = os.path.realpath(f"{os_dir}/imageos")
    for script in (*install.SCRIPTS, *(f"tools/{tool}" for tool in install.TOOLS)):
        path = f"{os_dir}/{script}"
        if os.path.realpath(path) != program or not os.access(path, os.X_OK):
            report.say(ERROR, f"{path} is not imageos", "imageos install")
    if not os.path.isfile(f"{os_dir}/variants.list"):
        report.say(ERROR, f"{os_dir}/variants.list cannot be read", "imageos install")
    if install.content(f"{os_dir}/parameters.list") != install.parameters_list().encode():
        report.say(NOTE, f"{os_dir}/parameters.list is another version's", "imageos install")
    ours = program_file()
    if os.path.isfile(ours) and install.content(program) != install.content(ours):
        report.say(NOTE, f"{program} is another version than {ours}", f"{ours} install")
    if report.errors == before:
        report.say(OK, os_dir)


def check_offers(report: Report) -> None:
    """Files of the site's beside which install has put a newer version."""
    for directory, _, names in os.walk(settings.SITE_DIR):
        for name in sorted(names):
            if name.endswith(".new"):
                old = f"{directory}/{name[:-4]}"
                report.say(NOTE, f"{old} is the site's, this version's is beside it", f"diff {old} {old}.new")


def check_python(report: Report) -> None:
    """Ganeti's PATH decides which one it is."""
    python = shutil.which("python3", path=GANETI_PATH)
    if not python:
        report.say(ERROR, f"there is no python3 in Ganeti's PATH {GANETI_PATH}", "install python3")
        return
    report.say_version(python, version_of(python), (3, 9), "imageos needs Python 3.9 or newer")
