"""Find the site's hooks, and run them one after the other in the environment that README.rst promises."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from types import CodeType
from typing import Any, NamedTuple, NoReturn

from imageos import ganeti, log, logins
from imageos.disks.blockdev import LoopDevice
from imageos.disks.filesystem import Volume
from imageos.errors import Failure, TimedOut, explained, signal_name
from imageos.guests import bootconfig
from imageos.guests.sandbox import devices
from imageos.installation import OS_DIR, program_file
from imageos.node import linux
from imageos.node.children import signals_held
from imageos.node.isolation import limit_memory, other_processes
from imageos.node.programs import environment, script_fault
from imageos.outcome import guard
from imageos.run import Command, Outside, pipeline
from imageos.settings import Settings

LONGEST = 1 << 20  # bytes of a hook of ours


class Context(NamedTuple):
    """A command that runs hooks, and its guest."""

    action: str  # create, import or rename
    environ: Mapping[str, str]  # of the command
    settings: Settings
    target: str  # where the root is mounted
    loop: LoopDevice
    volumes: Sequence[Volume]


def find(directory: str) -> list[str]:
    """Return the names of the hooks in `directory`, in the order in which they run."""
    with explained(f"cannot list CUSTOMIZE_DIR {directory}"):
        names = os.listdir(directory) if os.path.exists(directory) else []
    return sorted(
        name
        for name in names
        if re.fullmatch(r"[A-Za-z0-9_-]+", name)
        and os.path.isfile(f"{directory}/{name}")
        and os.access(f"{directory}/{name}", os.X_OK)
    )


def chosen(settings: Settings, names: str) -> list[str]:
    """Return those of the hooks that run which are in `names`, separated by spaces."""
    return [name for name in find(settings.customize_dir) if name in names.split()]


def load(settings: Settings, names: Iterable[str]) -> None:
    """Load hooks of ours as they are now: before they run, an install may replace them, and the file we run from."""
    for name in names:
        _shipped(f"{settings.customize_dir}/{name}")


def check(settings: Settings) -> list[str]:
    """Return the names of the hooks; fail, or warn, before the first write, if they cannot run as the settings want."""
    if settings.nomount:
        return []
    if settings.customize_dir != Settings().customize_dir and not os.path.lexists(settings.customize_dir):
        log.warning(f"there is no CUSTOMIZE_DIR {settings.customize_dir}: no hook runs")
    names = find(settings.customize_dir)
    check_scripts(settings.customize_dir, names)
    check_overlay(settings, names)
    if "grub" in names:
        bootconfig.arguments(settings.kernel_args)
    if "cloud-init" in names:
        check_user_keys(settings.unknown.get("CINIT_SSH_KEY", ""))
    return names


def check_scripts(directory: str, names: Iterable[str]) -> None:
    """Fail if the kernel will not run one of these hooks."""
    for name in names:
        what, hint = script_fault(f"{directory}/{name}")
        if what:
            raise Failure(f"hook {directory}/{name} cannot be run: {what}", hint)


def check_user_keys(keys: str) -> None:
    """Fail if what the hook `cloud-init` will give its user are no keys."""
    try:
        logins.authorized_keys(keys)
    except ValueError as error:
        raise Failure(f"CINIT_SSH_KEY is not accepted: it must be {error}") from None


def check_overlay(settings: Settings, names: Collection[str]) -> None:
    """Fail if the overlay that the hook `overlays` will copy is missing; warn if it is set, but not among `names`."""
    if not settings.overlay or settings.nomount:
        return
    overlay = f"{settings.overlays_dir}/{settings.overlay}"
    if "overlays" not in names:
        log.warning(
            f"OVERLAY={settings.overlay} is for the hook overlays, which is off: "
            f"chmod +x {settings.customize_dir}/overlays"
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
    """Return the environment of a hook: Ganeti's variables, the settings, and what the command knows."""
    device_of = {volume.role: volume.device for volume in context.volumes}
    return {
        **environment(),
        **ganeti.variables(context.environ),
        **context.settings.variables(),
        "TARGET": context.target,
        "BLOCKDEV": context.loop.disk.path,
        "DISK_DEV": context.loop.path,
        "ROOT_DEV": device_of.get("root", ""),
        "BOOT_DEV": device_of.get("boot", ""),
        "SWAP_DEV": device_of.get("swap", ""),
        "IMAGEOS": program_file(),
        "IMAGEOS_ACTION": context.action,
        # for imageos.hook: role, type, UUID and device of each volume
        "IMAGEOS_VOLUMES": "\n".join(
            f"{volume.role} {volume.kind} {volume.uuid} {volume.device}" for volume in context.volumes
        ),
        "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        **({"IMPORT_SCRIPT": "1"} if context.action == "import" else {}),
    }


def os_directory() -> str:
    """Return the directory where Ganeti called us; for a command typed by hand, the installed OS definition."""
    for directory in (os.path.dirname(os.path.abspath(sys.argv[0])), OS_DIR):
        if os.path.exists(f"{directory}/ganeti_api_version"):
            return directory
    return "/"


class _Relay:
    """Pass lines of a hook to the log, but hold back a hint and the line after it: the failure may repeat them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.cause = ""  # the last line that is no hint
        self.held: list[str] = []

    def add(self, line: str) -> None:
        line = line.removeprefix(log.PREFIX)  # of a hook that uses ours
        is_hint = line.startswith("hint: ")
        if line.strip() and not is_hint:
            self.cause = line
        if is_hint or len(self.held) == 2:
            self.release()
        if is_hint or self.held:
            self.held.append(line)
        else:
            log.info(f"{self._name}: {line}")

    def release(self) -> None:
        while self.held:
            log.info(f"{self._name}: {self.held.pop(0)}")


@cache
def _shipped(path: str) -> CodeType | None:
    """Return a hook if it is one of ours, unchanged, and all that it imports imported; else nothing."""
    loader: Any = __spec__.loader
    try:
        with open(path, "rb") as file:
            source = file.read(LONGEST)
        ours = loader.get_data(f"{os.path.dirname(__file__)}/hooks.d/{os.path.basename(path)}")
    except (OSError, ImportError):  # the site's, for root only; or our file is replaced: it runs as the new one's
        return None
    if source != ours:
        return None
    code = compile(source, path, "exec", dont_inherit=True)
    with signals_held():  # Python may lose an exception that a handler raises during an import
        exec(code, {"__name__": ""})  # without its main
    return code


def _calling(argv: Sequence[str], env: Mapping[str, str], code: CodeType) -> Callable[[], None]:
    """Return the function by which a child is such a hook: most of what it imports, half of its time, is there."""

    def main() -> int:
        exec(code, {"__name__": "__main__"})
        return 0

    def call() -> NoReturn:
        status = 1
        try:
            linux.close_all(3)  # as the start of a program does
            limit_memory()  # it is ours, and reads what a stranger has made
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does
            os.environ.clear()
            os.environ.update(env)
            sys.argv[:] = argv
            status = guard(main)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)  # there is no way back

    return call


def _run_one(name: str, argv: Sequence[str], env: Mapping[str, str], timeout: int) -> None:
    def end_others() -> None:
        end_leftovers(f"hook {name}", ours)

    relay = _Relay(name)
    ours = other_processes()  # they write back meanwhile
    try:
        code = _shipped(argv[0])
        # private: its output is in the log already
        command = Command(
            argv, _calling(argv, env, code) if code else Outside.HOOK, env=env, cwd=os_directory(), private=True
        )
        finished = pipeline(command, timeout=timeout, on_line=relay.add, on_exit=end_others)[0]
    except TimedOut:
        relay.release()
        end_others()
        raise Failure(
            f"hook {name} was ended: it took longer than {timeout} s",
            hint="HOOK_TIMEOUT in /etc/default/ganeti-instance-image says how long a hook may take",
        ) from None
    status = finished.status
    if not status:
        relay.release()
        return
    hint = relay.held[0].removeprefix("hint: ") if relay.held else f"see {argv[0]} and its messages above"
    how = f"was killed by {signal_name(-status)}" if status < 0 else f"failed with status {status}"
    raise Failure(f"hook {name} {how}{': ' if relay.cause else ''}{relay.cause}", hint=hint)


def end_leftovers(who: str, ours: Collection[int] = ()) -> None:
    """End processes that a hook (or shell) left: they would keep the guest's filesystems busy, and gnt-backup waiting.

    `ours` were there before it.
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
    """Return the name of a process; empty if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="backslashreplace") as file:
            before, _, after = file.read().rpartition(")")
    except OSError:
        return ""
    return "" if after.split()[0] in "ZX" else before.partition("(")[2]
