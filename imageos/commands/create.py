"""create: turn an image into the system on an instance's first disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from imageos import ganeti, hooks, log, network
from imageos.disks import blockdev, discovery, filesystem, fstab, grow, mounting, partitions
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.filesystem import Volume
from imageos.disks.layout import Layout
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import cloudboot, cloudinit, guest, hostkeys, hostname, initramfs, target
from imageos.guests.hostkeys import GetKey
from imageos.guests.target import Target
from imageos.images import diskimage, imagetypes, preview
from imageos.images.imagefile import Image
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.network import Interface, files
from imageos.node import isolation
from imageos.node.programs import require
from imageos.settings import Settings, load_settings, reserved_parameters

BY_HOOK = ("SSH_AUTHORIZED_KEYS", "ROOT_PASSWORD_HASH")  # by cloud-init, or the hook ssh
LOGINS = (*BY_HOOK, "USER_DATA")


def main(_arguments: Sequence[str]) -> int:
    instance = ganeti.instance(os.environ)
    isolation.enter()
    settings = load_settings(os.environ).with_sizes(instance.memory)
    if settings.cdinstall:
        log.info("CDINSTALL=yes: the disks are left alone, boot the instance from an installer")
        return 0
    image = reserved_parameters(os.environ).get("os-image")
    if image:
        leave_to_ganeti(instance, image)
    else:
        create(instance, settings)
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


class Context(NamedTuple):
    """The request, as checked before the first write."""

    instance: Instance
    settings: Settings
    image: Image
    interfaces: tuple[Interface, ...] | Failure  # why they cannot be planned
    hooks: Sequence[str]  # their names, in order
    layout: Layout | None  # None: the image brings its own

    @property
    def deploy(self) -> Callable[[Image, str], None] | None:
        return IMAGE_TYPES[self.settings.image_type].deploy


def create(instance: Instance, settings: Settings) -> None:
    """Check everything, then write. A failure after the first write leaves a disk that cannot boot."""
    if not instance.disks:
        raise Failure(
            f"instance {instance.name} has no disk to put an image on",
            hint="add one (gnt-instance modify --disk add:size=10G), or set CDINSTALL=yes",
        )
    names = hooks.check(settings)
    interfaces = plan_interfaces(instance, settings, names)
    with blockdev.claimed(instance.disks[0].path) as disk:
        image = imagetypes.find(settings, with_boot=not instance.kernel_path, disk_size=disk.size)
        image = imagetypes.ready(settings, image, disk.size)
        layout = plan_layout(settings, instance, disk, image)
        context = Context(instance, settings, image, interfaces, names, layout)
        with blockdev.attached(disk, direct=True) as loop, blockdev.disarmed_on_failure(loop), ExitStack() as ahead:
            volumes = format_disk(context, loop, layout) if layout else ()
            rsa: GetKey = hostkeys.no_key
            if not settings.nomount:  # it takes a processor while the image is written
                rsa = ahead.enter_context(hostkeys.rsa_made_meanwhile(instance.short_name))
            if not layout:
                volumes = write_disk_image(context, loop)
            if volumes:
                complete(context, loop, volumes, rsa)
            else:
                blockdev.flush(loop)
            isolation.ignore_signals()  # all is on the disk, which boots: this call must not fail any more
    log.info(f"instance {instance.name} is ready to boot")


def plan_interfaces(instance: Instance, settings: Settings, names: Sequence[str]) -> tuple[Interface, ...] | Failure:
    """Return the guest's interfaces; a mistake in the site's files and tags fails only what needs them."""
    untagged = replace(instance, nics=tuple(replace(nic, network={**nic.network, "TAGS": ""}) for nic in instance.nics))
    with log.muted():
        network.plan(untagged, settings)  # a mistake of Ganeti's own always fails
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


def format_disk(context: Context, loop: LoopDevice, layout: Layout) -> tuple[Volume, ...]:
    settings = context.settings
    volumes = tuple(filesystem.plan_volumes(layout, settings.filesystem, loop.partition))
    with log.phase(
        f"partitioned and formatted {log.size(loop.size)}: {settings.partition_table}, {settings.filesystem}"
    ):
        blockdev.write_table(loop, layout)
        filesystem.make(volumes)
    return volumes


def write_disk_image(context: Context, loop: LoopDevice) -> tuple[Volume, ...]:
    """Write a disk image, and grow it to the disk; return the guest's volumes, none with NOMOUNT."""
    with log.phase(f"wrote {context.image.path} to the disk of {log.size(loop.size)}"):
        diskimage.write(context.image, loop)
        blockdev.use_cache(loop)
    if context.settings.nomount:
        log.info("NOMOUNT=yes: nothing in the image is looked at or changed")
        return ()
    found = preview.find(loop)
    log.info(f"found {', '.join(discovery.describe(found))}")
    if context.settings.grow:
        grow.grow(loop, found)
    return found.volumes


def complete(context: Context, loop: LoopDevice, volumes: tuple[Volume, ...], rsa: GetKey) -> None:
    """Turn filesystems into this instance's own system, and unmount them."""
    with ExitStack() as stack:
        stack.enter_context(mounting.mounted_all(volumes))
        if context.deploy:
            with log.phase(f"unpacked {context.image.path}"):
                context.deploy(context.image, isolation.TARGET)
        with mounting.writing_back(isolation.TARGET):
            with log.phase(f"made it {context.instance.name}"):
                configure(context, loop, volumes, rsa)
            hooks.run_all(
                context.hooks, hooks.Context("create", os.environ, context.settings, isolation.TARGET, loop, volumes)
            )
        with log.phase("unmounted and flushed"):
            blockdev.use_cache(loop)
            stack.close()
            blockdev.flush(loop)


def configure(context: Context, loop: LoopDevice, volumes: tuple[Volume, ...], rsa: GetKey) -> None:
    """Make the tree this instance's own system. A disk image keeps its fstab and its boot loader."""
    instance, settings = context.instance, context.settings
    with target.opened_system(isolation.TARGET, instance, settings, loop.path, volumes) as root:
        guest.check_root(root)
        if context.deploy:
            root.write("/etc/fstab", fstab.render(volumes))
            if any(volume.role == "esp" for volume in volumes):
                root.mkdir("/boot/efi")
            guest.forget_disk(root)
            forget_swap(root, context)
        if instance.serial_console:
            guest.enable_serial_console(root, "ttyS0", instance.serial_speed)
        hostname.write(root, instance.name)
        guest.forget_identity(root)
        hostkeys.replace(root, rsa)
        if cloudboot.runs(root):
            if isinstance(context.interfaces, Failure):
                raise context.interfaces
            cloudinit.write_seed(root, instance, settings, context.interfaces)
        else:
            warn_of_unread(root, context)
        guest.request_relabel(root)


def forget_swap(root: Target, context: Context) -> None:
    """Take the image's swap out of what the guest boots with; the hook grub sees to the initramfs that is there."""
    if initramfs.forget_swap(root) and not (context.instance.kernel_path or "grub" in context.hooks):
        log.warning(
            "the image's initramfs waits for the image's swap when the guest boots: have it made anew "
            f"(update-initramfs -u), or boot with {initramfs.NORESUME}, as the hook grub does"
        )


def warn_of_unread(root: Target, context: Context) -> None:
    """Name the settings that only cloud-init would have read, or the hook ssh."""
    given = {name: getattr(context.settings, name.lower()) for name in LOGINS}
    unread = [name for name in LOGINS if given[name] and not (name in BY_HOOK and "ssh" in context.hooks)]
    if unread:
        why = "does not start its cloud-init" if cloudinit.is_present(root) else "has no cloud-init"
        hook = f", and the hook ssh is off (chmod +x {context.settings.customize_dir}/ssh)"
        off = hook if set(unread) & set(BY_HOOK) else ""
        log.warning(f"{' and '.join(unread)} will have no effect: the image {why}{off}")
