"""create: turn an image into the system on an instance's first disk."""

from __future__ import annotations

import os
from collections.abc import Sequence

from imageos import ganeti, log, preload
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.node import isolation
from imageos.settings import load_settings, reserved_parameters


def main(_arguments: Sequence[str]) -> int:
    instance = ganeti.instance(os.environ)
    isolation.enter()
    preload.later("imageos.deployment", "imageos.guests.personalize")  # soon: an install may replace the file
    settings = load_settings(os.environ).with_sizes(instance.memory)
    if settings.cdinstall:
        log.info("CDINSTALL=yes: the disks are left alone, boot the instance from an installer")
        return 0
    image = reserved_parameters(os.environ).get("os-image")
    if image:
        leave_to_ganeti(instance, image)
    else:
        preload.load()  # without settings files, no shell has run
        from imageos import deployment

        deployment.create(instance, settings)
    return 0


def leave_to_ganeti(instance: Instance, image: str) -> None:
    """Do nothing: with os-image Ganeti writes the first disk itself, and calls create only on a reinstall.

    Refuse an os-image that is set for the whole OS: Ganeti ignores it there, so nobody has written anything.
    """
    if not instance.reinstall:
        raise Failure(
            f"os-image={image}: Ganeti ignores an os-image that is set for the OS, so no image was written",
            hint="give it to instances (gnt-instance add -O os-image=...), and take it from the OS: gnt-os modify",
        )
    log.info(f"os-image={image}: Ganeti has written that to the first disk itself; the disks are left as it made them")
