"""Deployment: turn an image into the system on an instance's first disk, step by step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from imageos import hooks, log, network
from imageos.disks import blockdev, discovery, filesystem, grow, mounting, partitions
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.filesystem import Volume
from imageos.disks.layout import Layout
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import hostkeys
from imageos.guests.hostkeys import GetKey
from imageos.images import diskimage, imagetypes, preview
from imageos.images.imagefile import Image
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.network import Interface, files
from imageos.node import isolation
from imageos.node.programs import require
from imageos.request import Request
from imageos.settings import Settings


def create(instance: Instance, settings: Settings) -> None:
    """Check everything, then write. A failure after the first write leaves a disk that cannot boot."""
    if not instance.disks:
        raise Failure(
            f"instance {instance.name} has no disk to put an image on",
            hint="add one (gnt-instance modify --disk add:size=10G), or set CDINSTALL=yes",
        )
    names = hooks.check(settings)
    hooks.load(settings, names)
    interfaces = plan_interfaces(instance, settings, names)
    with blockdev.claimed(instance.disks[0].path) as disk:
        image = imagetypes.find(settings, with_boot=not instance.kernel_path, disk_size=disk.size)
        image = imagetypes.ready(settings, image, disk.size)
        layout = plan_layout(settings, instance, disk, image)
        request = Request(instance, settings, image, interfaces, names, layout)
        with blockdev.attached(disk, direct=True) as loop, blockdev.disarmed_on_failure(loop), ExitStack() as ahead:
            volumes = format_disk(request, loop, layout) if layout else ()
            rsa: GetKey = hostkeys.no_key
            if not settings.nomount:  # it takes a processor while the image is written
                rsa = ahead.enter_context(hostkeys.rsa_made_meanwhile(instance.short_name))
            if not layout:
                volumes = write_disk_image(request, loop)
            if volumes:
                complete(request, loop, volumes, rsa)
            else:
                blockdev.flush(loop)
            isolation.ignore_signals()  # all is on the disk, which boots: this call must not fail any more
    log.info(f"instance {instance.name} is ready to boot")


def plan_interfaces(instance: Instance, settings: Settings, names: Sequence[str]) -> tuple[Interface, ...] | Failure:
    """Return the guest's interfaces; a mistake in the site's files and tags fails only what needs them."""
    nics = tuple(nic._replace(network={**nic.network, "TAGS": ""}) for nic in instance.nics)
    with log.muted():
        network.plan(instance._replace(nics=nics), settings)  # a mistake of Ganeti's own always fails
    try:
        return network.plan(instance, settings, files.read(instance, settings))
    except Failure as failure:
        if "interfaces" in names:
            raise
        log.warning(f"{failure} (the hook interfaces is off: only a guest with cloud-init needs that)")
        return failure


def plan_layout(settings: Settings, instance: Instance, disk: Disk, image: Image) -> Layout | None:
    """Return the partitions for an image that brings none; fail if it, or what handles it, does not fit this node."""
    if IMAGE_TYPES[settings.image_type].deploy:
        intended = filesystem.plan_layout(settings, disk.size, has_boot=not instance.kernel_path)
        require(*filesystem.programs(intended, settings.filesystem))
        return intended
    diskimage.check_size(image, disk.size)
    require(*(() if settings.nomount else partitions.PROGRAMS))
    preview.check(settings, image, now=True)
    return None


def format_disk(request: Request, loop: LoopDevice, layout: Layout) -> tuple[Volume, ...]:
    settings = request.settings
    volumes = tuple(filesystem.plan_volumes(layout, settings.filesystem, loop.partition))
    with log.phase(
        f"partitioned and formatted {log.size(loop.size)}: {settings.partition_table}, {settings.filesystem}"
    ):
        blockdev.write_table(loop, layout)
        filesystem.make(volumes)
    return volumes


def write_disk_image(request: Request, loop: LoopDevice) -> tuple[Volume, ...]:
    """Write a disk image, and grow it to the disk; return the guest's volumes, none with NOMOUNT."""
    with log.phase(f"wrote {request.image.path} to the disk of {log.size(loop.size)}"):
        diskimage.write(request.image, loop)
        blockdev.use_cache(loop)
    if request.settings.nomount:
        log.info("NOMOUNT=yes: nothing in the image is looked at or changed")
        return ()
    found = preview.find(loop)
    log.info(f"found {', '.join(discovery.describe(found))}")
    if request.settings.grow:
        grow.grow(loop, found)
    return found.volumes


def complete(request: Request, loop: LoopDevice, volumes: tuple[Volume, ...], rsa: GetKey) -> None:
    """Turn filesystems into this instance's own system, and unmount them."""
    from imageos.guests import personalize  # late: preloaded

    with ExitStack() as stack:
        stack.enter_context(mounting.mounted_all(volumes))
        if request.deploy:
            with log.phase(f"unpacked {request.image.path}"):
                request.deploy(request.image, isolation.TARGET)
        with mounting.writing_back(isolation.TARGET):
            with log.phase(f"made it {request.instance.name}"):
                personalize.configure(request, loop, volumes, rsa)
            hooks.run_all(
                request.hooks, hooks.Context("create", os.environ, request.settings, isolation.TARGET, loop, volumes)
            )
        with log.phase("unmounted and flushed"):
            blockdev.use_cache(loop)
            stack.close()
            blockdev.flush(loop)
