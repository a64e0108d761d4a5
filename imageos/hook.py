"""For hooks written in Python.

    from imageos.hook import Failure, Hook

    def main(hook: Hook) -> None:
        if not hook.instance.nics:
            raise Failure("the instance has no network", hint="gnt-instance modify --net add INSTANCE")
        hook.target.write("/etc/motd", f"This is {hook.instance.name}\\n")
        hook.log("greeted")

    if __name__ == "__main__":
        Hook.run(main)

The same is in the environment, for hooks in any language; see README.rst.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from imageos import ganeti, log
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests.target import Target, opened_system
from imageos.outcome import guard
from imageos.settings import Settings, settings_from_variables

__all__ = ["Failure", "Hook"]  # for hooks to import


class Hook(NamedTuple):
    """One call of a hook."""

    action: str  # create, import or rename
    target: Target  # the guest's files and programs
    settings: Settings
    instance: Instance
    disk: str  # the whole disk, as the sandbox sees it: /dev/loop0
    volumes: tuple[Volume, ...]  # the guest's partitions that have a role
    arguments: tuple[str, ...]  # `-r` on rename
    environ: Mapping[str, str]

    def log(self, message: str) -> None:
        """Add a line to the log of the command, after the name of the hook."""
        log.info(message)

    def warning(self, message: str) -> None:
        log.warning(message)

    @staticmethod
    def run(main: Callable[[Hook], None]) -> NoReturn:
        """Call `main` for the call in the environment, and exit: 0, or 1 with the cause on the last line."""

        def call() -> int:
            settings = settings_from_variables(os.environ)
            log.set_debug(settings.image_debug)
            instance = ganeti.instance(os.environ)
            volumes = tuple(_volumes(os.environ.get("IMAGEOS_VOLUMES", "")))
            disk = os.environ.get("DISK_DEV", "")
            with opened_system(os.environ["TARGET"], instance, settings, disk, volumes) as target:
                arguments, environ = tuple(sys.argv[1:]), dict(os.environ)
                main(Hook(environ["IMAGEOS_ACTION"], target, settings, instance, disk, volumes, arguments, environ))
            return 0

        sys.exit(guard(call))


def _volumes(text: str) -> list[Volume]:
    fields = [line.split(" ", 3) for line in text.splitlines()]
    return [Volume(role, kind, device, uuid) for role, kind, uuid, device in fields]
