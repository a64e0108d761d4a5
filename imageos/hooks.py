"""The site's hooks: found, and run one after the other with what they may rely on."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from imageos import ganeti, log
from imageos.disks.disk import Attached, Device
from imageos.disks.filesystem import Volume
from imageos.errors import Failure, TimedOut, signal_name
from imageos.guests import bootconfig
from imageos.guests.sandbox import devices
from imageos.node.isolation import other_processes
from imageos.run import environment, pipeline
from imageos.settings import Settings

OS_DIR = "/usr/share/ganeti/os/image"


@dataclass(frozen=True)
class Context:
    """What the hooks of one command are told."""

    action: str  # create, import or rename
    environ: Mapping[str, str]  # of the command
    settings: Settings
    target: str  # where the root is mounted
    device: Device
    disk: Attached
    volumes: Sequence[Volume]


def find(directory: str) -> list[str]:
    """The names of the hooks in `directory`, in the order in which they run."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Failure(f"cannot list CUSTOMIZE_DIR {directory}: {error.strerror}") from None
    return sorted(
        name
        for name in names
        if re.fullmatch(r"[A-Za-z0-9_-]+", name)
        and os.path.isfile(f"{directory}/{name}")
        and os.access(f"{directory}/{name}", os.X_OK)
    )


def check(known: Settings) -> None:
    """Fail, or warn, before anything is written, if hooks cannot run as the settings want."""
    if known.nomount:
        return
    if known.customize_dir != Settings.customize_dir and not os.path.lexists(known.customize_dir):
        log.warning(f"there is no CUSTOMIZE_DIR {known.customize_dir}: no hook runs")
    find(known.customize_dir)
    check_overlay(known)
    if "grub" in find(known.customize_dir):
        bootconfig.arguments(known.kernel_args)


def check_overlay(known: Settings) -> None:
    """Fail if the overlay that the hook `overlays` will copy is missing; warn if there is one, but not the hook."""
    if not known.overlay or known.nomount:
        return
    overlay = f"{known.overlays_dir}/{known.overlay}"
    if "overlays" not in find(known.customize_dir):
        log.warning(
            f"OVERLAY={known.overlay} is for the hook overlays, which is off: chmod +x {known.customize_dir}/overlays"
        )
    elif not os.path.isdir(overlay):
        raise Failure(f"cannot find overlay {overlay}", hint="make that directory on every node, or correct OVERLAY")


def run_all(names: Sequence[str], context: Context, arguments: Sequence[str] = ()) -> None:
    """Run the hooks `names`; the first that fails raises Failure with its name and status."""
    if not names:
        return
    env = variables(context)
    with devices(context.target):
        for name in names:
            with log.phase(f"hook {name}"):
                command = [f"{context.settings.customize_dir}/{name}", *arguments]
                _run_one(name, command, env, context.settings.hook_timeout)


def variables(context: Context) -> dict[str, str]:
    """The environment of a hook: Ganeti's variables, the settings, and what the command knows."""
    device_of = {volume.role: volume.device for volume in context.volumes}
    python = program_file()
    known = {
        **environment(),
        **ganeti.variables(context.environ),
        **context.settings.variables(),
        "TARGET": context.target,
        "BLOCKDEV": context.device.path,
        "DISK_DEV": context.disk.path,
        "ROOT_DEV": device_of.get("root", ""),
        "BOOT_DEV": device_of.get("boot", ""),
        "SWAP_DEV": device_of.get("swap", ""),
        "IMAGEOS": python,
        "IMAGEOS_ACTION": context.action,
        # for imageos.hook: role, type, UUID and device of each volume
        "IMAGEOS_VOLUMES": "\n".join(f"{one.role} {one.kind} {one.uuid} {one.device}" for one in context.volumes),
        "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    }
    if context.action == "import":
        known["IMPORT_SCRIPT"] = "1"
    return known


def program_file() -> str:
    """The file that we run from: the zipapp, or in a source tree the package's directory."""
    package = os.path.dirname(os.path.abspath(__file__))
    archive = os.path.dirname(os.path.dirname(package))
    return archive if os.path.isfile(archive) else package


def os_directory() -> str:
    """Where Ganeti called us; a command typed by hand finds the installed OS definition."""
    for directory in (os.path.dirname(os.path.abspath(sys.argv[0])), OS_DIR):
        if os.path.exists(f"{directory}/ganeti_api_version"):
            return directory
    return "/"


def _run_one(name: str, argv: Sequence[str], env: Mapping[str, str], timeout: int) -> None:
    said = ""
    held: list[str] = []  # a hint and what follows it: if the hook fails then, they are said of its failure

    def pass_on(line: str) -> None:
        nonlocal said
        line = line.removeprefix(log.PREFIX)  # of a hook that uses ours
        is_hint = line.startswith("hint: ")
        said = line if line.strip() and not is_hint else said
        if is_hint or len(held) == 2:
            release()
        if is_hint or held:
            held.append(line)
        else:
            log.info(f"{name}: {line}")

    def release() -> None:
        while held:
            log.info(f"{name}: {held.pop(0)}")

    ours = other_processes()  # what writes back meanwhile
    try:
        # private: its output is in the log already
        finished = pipeline(
            [argv],
            env=env,
            cwd=os_directory(),
            timeout=timeout,
            on_line=pass_on,
            on_exit=lambda: end_leftovers(f"hook {name}", ours),
            private=True,
            outside="hook",
        )[0]
    except TimedOut:
        release()
        end_leftovers(f"hook {name}", ours)
        raise Failure(
            f"hook {name} was ended: it took longer than {timeout} s",
            hint="HOOK_TIMEOUT in /etc/default/ganeti-instance-image says how long a hook may take",
        ) from None
    if not finished.status:
        release()
        return
    hint = f"see {argv[0]} and its messages above"
    if held:
        hint = held[0].removeprefix("hint: ")
    how = (
        f"was killed by {signal_name(-finished.status)}"
        if finished.status < 0
        else f"failed with status {finished.status}"
    )
    raise Failure(f"hook {name} {how}{': ' if said else ''}{said}", hint=hint)


def end_leftovers(who: str, ours: Collection[int] = ()) -> None:
    """End what a hook (or shell) left running: it would keep the guest's filesystems busy, and gnt-backup waiting.

    `ours`: processes that were there before it.
    """
    reported: set[int] = set()
    while running := {pid: command for pid in other_processes() if pid not in ours and (command := _command(pid))}:
        for pid, command in running.items():
            with suppress(OSError):  # gone by itself
                os.kill(pid, signal.SIGKILL)
                if pid not in reported:
                    log.warning(f"{who} left {command} running (process {pid}): ended")
                reported.add(pid)
        for pid in running:
            with suppress(OSError):  # not ours yet: its parent, which is just ending, is
                os.waitpid(pid, 0)  # we are process 1: orphans are our children


def _command(pid: int) -> str:
    """The name of a process; empty if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="backslashreplace") as file:
            before, _, after = file.read().rpartition(")")
    except OSError:
        return ""
    return "" if after.split()[0] in "ZX" else before.partition("(")[2]
