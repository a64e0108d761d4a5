"""rename: give the guest the instance's new name. Ganeti calls it after a rename, and after every import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from imageos import ganeti, hooks, log, settings
from imageos.disks import discovery, disk, filesystem
from imageos.disks.discovery import Found
from imageos.disks.disk import Attached, Device
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import guest, hostname, target
from imageos.hook import guest_disk
from imageos.node import isolation
from imageos.settings import Settings


def main(_arguments: Sequence[str]) -> int:
    instance = ganeti.instance(os.environ)
    old = ganeti.old_name(os.environ)
    isolation.enter()
    known = settings.load(os.environ)
    if known.nomount or not instance.disks:
        reason = "NOMOUNT=yes" if known.nomount else "the instance has no disk"
        log.info(f"{reason}: there is no guest to rename")
        return 0
    with disk.claimed(instance.disks[0].path) as device, disk.attached(device) as attached:
        found = discovery.find_if_any(attached, "there is no guest to rename")
        if not found:
            return 0
        failure = rename(instance, old, known, device, attached, found)
        disk.flush(device, attached.descriptor)
    if failure:
        raise failure
    return 0


def rename(
    instance: Instance, old: str, known: Settings, device: Device, attached: Attached, found: Found
) -> Failure | None:
    """Why a hook failed, if one did: the guest lives on, and keeps its new name."""
    failure = None
    with ExitStack() as stack:
        filesystem.mount_all(stack, found.volumes, isolation.TARGET)
        disk_seen = guest_disk(attached.path, found.volumes)
        root = stack.enter_context(target.opened(isolation.TARGET, instance.short_name, disk_seen, known.guest_timeout))
        changed = False
        if old == instance.name:
            log.info(f"the guest's name {old} stays as it is")
        else:
            changed = hostname.rename(root, old, instance.name)
        names = [name for name in hooks.find(known.customize_dir) if name in known.rename_hooks.split()]
        context = hooks.Context("rename", os.environ, known, isolation.TARGET, device, attached, found.volumes)
        try:
            hooks.run_all(names, context, ["-r"])
        except Failure as problem:
            failure = problem
        if changed or names:
            guest.request_relabel(root)
    return failure
