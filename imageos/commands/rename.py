"""rename: give the guest the instance's new name. Ganeti calls it after a rename, and after every import."""

from __future__ import annotations

import os
from collections.abc import Sequence

from imageos import ganeti, hooks, log
from imageos.disks import blockdev, discovery, mounting
from imageos.disks.blockdev import LoopDevice
from imageos.disks.discovery import Found
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import guest, hostname, target
from imageos.node import isolation
from imageos.settings import Settings, load_settings


def main(_arguments: Sequence[str]) -> int:
    instance = ganeti.instance(os.environ)
    old = ganeti.instance_name(os.environ, "OLD_INSTANCE_NAME")
    isolation.enter()
    settings = load_settings(os.environ)
    if settings.nomount or not instance.disks:
        reason = "NOMOUNT=yes" if settings.nomount else "the instance has no disk"
        log.info(f"{reason}: there is no guest to rename")
        return 0
    hooks.load(settings, hooks.chosen(settings, settings.rename_hooks))
    with blockdev.claimed(instance.disks[0].path) as disk, blockdev.attached(disk) as loop:
        found = discovery.find_if_any(loop, "there is no guest to rename")
        if not found:
            return 0
        failure = rename(instance, old, settings, loop, found)
        blockdev.flush(loop)
    if failure:
        raise failure
    return 0


def rename(instance: Instance, old: str, settings: Settings, loop: LoopDevice, found: Found) -> Failure | None:
    """Return the failure of a hook instead of raising it: the guest lives on, and its new name must be flushed."""
    failure = None
    system = target.opened_system(isolation.TARGET, instance, settings, loop.path, found.volumes)
    with mounting.mounted_all(found.volumes), system as root:
        changed = False
        if old == instance.name:
            log.info(f"the guest's name {old} stays as it is")
        else:
            changed = hostname.rename(root, old, instance.name)
        names = hooks.chosen(settings, settings.rename_hooks)
        context = hooks.Context("rename", os.environ, settings, isolation.TARGET, loop, found.volumes)
        try:
            hooks.run_all(names, context, ["-r"])
        except Failure as problem:
            failure = problem
        if changed or names:
            guest.request_relabel(root)
    return failure
