"""create: turn an image into the system on an instance's first disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from imageos import ganeti, hooks, log, network, settings
from imageos.disks import discovery, disk, filesystem, grow, layout
from imageos.disks.disk import Attached, Device
from imageos.disks.filesystem import FILESYSTEMS, Volume
from imageos.disks.layout import MIB, Layout
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import cloudinit, guest, hostkeys, target
from imageos.guests.hostkeys import GetKey
from imageos.guests.target import Target
from imageos.hook import guest_disk
from imageos.images import diskimage, imagetypes
from imageos.images.imagefile import Image
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.network import Interface, files
from imageos.node import isolation
from imageos.run import require
from imageos.settings import Settings


def main(_arguments: Sequence[str]) -> int:
    instance = ganeti.instance(os.environ)
    isolation.enter()
    known = settings.load(os.environ).resolved(instance.memory)
    if known.cdinstall:
        log.info("CDINSTALL=yes: the disks are left alone, boot the instance from an installer")
        return 0
    image = settings.given_to_ganeti(os.environ).get("os-image")
    if image:
        leave_to_ganeti(instance, image)
    else:
        create(instance, known)
    return 0


def leave_to_ganeti(instance: Instance, image: str) -> None:
    """With os-image Ganeti writes the first disk itself; only when it reinstalls does it call create all the same.

    A default for the OS it does not look at, but gives it to create: then nobody has written anything.
    """
    if not instance.reinstall:
        raise Failure(
            f"os-image={image} is set for the OS, where Ganeti does not look at it: no image was written",
            hint="give it to instances (gnt-instance add -O os-image=...), and take it from the OS: gnt-os modify",
        )
    log.info(f"os-image={image}: Ganeti has written that to the first disk itself; the disks are left as it made them")


def create(instance: Instance, known: Settings) -> None:
    """Everything is checked before the first write; whatever fails after it leaves a disk that cannot boot."""
    if not instance.disks:
        raise Failure(
            f"instance {instance.name} has no disk to put an image on",
            hint="add one (gnt-instance modify --disk add:size=10G), or set CDINSTALL=yes",
        )
    hooks.check(known)
    interfaces(instance, known)  # addresses that make no sense are no reason to lose what the disk holds
    image_type = IMAGE_TYPES[known.image_type]
    image = imagetypes.find(known, with_boot=not instance.kernel_path)
    image_type.check(image)
    with disk.claimed(instance.disks[0].path) as device:
        if image_type.deploy:
            intended = plan(known, instance, device)
            require(*filesystem.programs(intended, known.filesystem), *filesystem.WRITE_BACK)
        else:
            intended = None
            diskimage.check_size(image, device.size)
            require(*(() if known.nomount else (*discovery.PROGRAMS, *filesystem.WRITE_BACK)))
        with (
            disk.attached(device, direct=True) as attached,
            disk.disarmed_on_failure(device, attached),
            ExitStack() as ahead,
        ):
            rsa: GetKey = hostkeys.no_key
            if not known.nomount:
                rsa = ahead.enter_context(hostkeys.rsa_made_meanwhile(instance.short_name))
            if intended:
                volumes = format_disk(known, device, attached, intended)
            else:
                volumes = write_disk_image(known, image, device, attached)
            if volumes:
                complete(instance, known, image, device, attached, volumes, rsa)
            else:
                disk.flush(device, attached.descriptor)
            isolation.ignore_signals()  # all is on the disk: whoever sees this call fail would see it boot
    log.info(f"instance {instance.name} is ready to boot")


def interfaces(instance: Instance, known: Settings) -> tuple[Interface, ...]:
    return network.plan(instance, known, files.read(instance, known))


def plan(known: Settings, instance: Instance, device: Device) -> Layout:
    """The partitions that the settings ask for, on a disk of this size."""
    internal_kernel = not instance.kernel_path
    return layout.plan(
        known.partition_table,
        device.size,
        boot=(known.boot_size or 0) * MIB if internal_kernel else 0,
        swap=(known.swap_size or 0) * MIB if known.swap else 0,
        arch=known.arch,
        smallest_root=FILESYSTEMS[known.filesystem].smallest,
    )


def format_disk(known: Settings, device: Device, attached: Attached, intended: Layout) -> tuple[Volume, ...]:
    """The volumes of a fresh disk, empty."""
    volumes = tuple(filesystem.plan_volumes(intended, known.filesystem, attached.partition))
    with log.phase(f"partitioned and formatted {log.size(device.size)}: {known.partition_table}, {known.filesystem}"):
        disk.write_table(attached, intended)
        filesystem.make(volumes)
    return volumes


def write_disk_image(known: Settings, image: Image, device: Device, attached: Attached) -> tuple[Volume, ...]:
    """The volumes of the guest in a disk image, once it is on the disk and grown; none with NOMOUNT."""
    with log.phase(f"wrote {image.path} to the disk of {log.size(device.size)}"):
        diskimage.write(image, device, attached)
        disk.use_cache(attached)
    if known.nomount:
        log.info("NOMOUNT=yes: nothing in the image is looked at or changed")
        return ()
    try:
        found = discovery.find(attached)
    except discovery.NoSystem as failure:
        failure.hint = failure.hint or "set NOMOUNT=yes if this is not Linux, or cannot be read (LVM, encrypted)"
        raise
    log.info(f"found {', '.join(discovery.describe(found))}")
    if known.grow:
        with log.phase("grew it to the disk"):
            grow.grow(attached, found)
    return found.volumes


def complete(
    instance: Instance,
    known: Settings,
    image: Image,
    device: Device,
    attached: Attached,
    volumes: tuple[Volume, ...],
    rsa: GetKey,
) -> None:
    """From filesystems to this instance's own system, unmounted."""
    deploy = IMAGE_TYPES[known.image_type].deploy
    with ExitStack() as stack:
        filesystem.mount_all(stack, volumes, isolation.TARGET)
        if deploy:
            with log.phase(f"unpacked {image.path}"):
                deploy(image, isolation.TARGET)
        with filesystem.writing_back(isolation.TARGET):
            with log.phase(f"made it {instance.name}"):
                configure(instance, known, attached, volumes, rsa)
            context = hooks.Context("create", os.environ, known, isolation.TARGET, device, attached, volumes)
            hooks.run_all(hooks.find(known.customize_dir), context)
        with log.phase("unmounted and flushed"):
            disk.use_cache(attached)
            stack.close()
            disk.flush(device, attached.descriptor)


def configure(
    instance: Instance,
    known: Settings,
    attached: Attached,
    volumes: tuple[Volume, ...],
    rsa: GetKey,
) -> None:
    """Make the tree this instance's own system. A disk image keeps its fstab and its boot loader."""
    disk_seen = guest_disk(attached.path, volumes)
    with target.opened(isolation.TARGET, instance.short_name, disk_seen, known.guest_timeout) as root:
        guest.check_root(root)
        if IMAGE_TYPES[known.image_type].deploy:
            write_fstab(root, volumes)
        if instance.serial_console:
            guest.enable_serial_console(root, "ttyS0", instance.serial_speed)
        guest.set_hostname(root, instance.name)
        guest.forget_identity(root)
        hostkeys.replace(root, rsa)
        if cloudinit.present(root):
            cloudinit.write_seed(root, instance, known, interfaces(instance, known))
        guest.request_relabel(root)


def write_fstab(root: Target, volumes: tuple[Volume, ...]) -> None:
    if any(volume.role == "esp" for volume in volumes):
        root.mkdir("/boot/efi")
    root.write("/etc/fstab", filesystem.fstab(volumes))
