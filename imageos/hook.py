"""What a hook written in Python imports.

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
from dataclasses import dataclass
from typing import NoReturn

from imageos import ganeti, log, settings
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests.sandbox import GuestDisk
from imageos.guests.target import Target, opened
from imageos.outcome import guard
from imageos.settings import Settings

__all__ = ["Failure", "Hook"]  # what a hook imports from here


@dataclass(frozen=True)
class Hook:
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
        """A line in the log of the command; the name of the hook is put before it."""
        log.info(message)

    def warning(self, message: str) -> None:
        log.warning(message)

    @staticmethod
    def run(main: Callable[[Hook], None]) -> NoReturn:
        """Call `main` with what the environment says, and exit: 0, or 1 with the cause on the last line."""

        def call() -> int:
            known = settings.from_variables(os.environ)
            log.set_debug(known.image_debug)
            instance = ganeti.instance(os.environ)
            volumes = tuple(_volumes(os.environ.get("IMAGEOS_VOLUMES", "")))
            disk = os.environ.get("DISK_DEV", "")
            with opened(
                os.environ["TARGET"], instance.short_name, guest_disk(disk, volumes), known.guest_timeout
            ) as target:
                main(
                    Hook(
                        os.environ["IMAGEOS_ACTION"],
                        target,
                        known,
                        instance,
                        disk,
                        volumes,
                        tuple(sys.argv[1:]),
                        dict(os.environ),
                    )
                )
            return 0

        sys.exit(guard(call))


def guest_disk(disk: str, volumes: tuple[Volume, ...]) -> GuestDisk:
    """The guest's disk as its sandbox shows it."""
    by_uuid = {volume.uuid: volume.device for volume in volumes if volume.uuid}  # subvolumes share both
    return GuestDisk(nodes=[disk, *by_uuid.values()], uuids=tuple(by_uuid.items()))


def _volumes(text: str) -> list[Volume]:
    fields = [line.split(" ", 3) for line in text.splitlines()]
    return [Volume(role, kind, device, uuid) for role, kind, uuid, device in fields]
