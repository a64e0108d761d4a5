"""create: turn an image into the system on an instance's first disk."""

import os
from collections.abc import Sequence
from contextlib import ExitStack

from imageos import disk, filesystem, ganeti, guest, hooks, images, isolation, layout, log, settings, target
from imageos.disk import Attached, Device
from imageos.errors import Failure
from imageos.filesystem import FILESYSTEMS, Volume
from imageos.ganeti import Instance
from imageos.hook import guest_disk
from imageos.images import Image
from imageos.layout import MIB, Layout
from imageos.run import require
from imageos.settings import Settings


def main(_arguments: Sequence[str]) -> int:
    instance = ganeti.instance(os.environ)
    known = settings.load(os.environ).resolved(instance.memory)
    if known.cdinstall:
        log.info("CDINSTALL=yes: the disks are left alone, boot the instance from an installer")
        return 0
    create(instance, known)
    return 0


def create(instance: Instance, known: Settings) -> None:
    """Everything is checked before the first write; whatever fails after it leaves a disk that cannot boot."""
    if not instance.disks:
        raise Failure(
            f"instance {instance.name} has no disk to put an image on",
            hint="add one (gnt-instance modify --disk add:size=10G), or set CDINSTALL=yes",
        )
    image = images.find(known)
    images.check(image)
    isolation.enter()
    with disk.claimed(instance.disks[0].path) as device:
        intended = plan(known, instance, device)
        require(*filesystem.programs(intended, known.filesystem))
        with disk.attached(device) as attached, disk.disarmed_on_failure(device, attached, intended):
            build(instance, known, image, device, attached, intended)
    log.info(f"instance {instance.name} is ready to boot")


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


def build(
    instance: Instance, known: Settings, image: Image, device: Device, attached: Attached, intended: Layout
) -> None:
    """From the first write to a system that is complete and on the disk."""
    volumes = tuple(filesystem.plan_volumes(intended, known.filesystem, attached.partition))
    with log.phase(f"partitioned and formatted {log.size(device.size)}: {known.partition_table}, {known.filesystem}"):
        disk.write_table(attached, intended)
        filesystem.make(volumes)
    with ExitStack() as stack:
        mount_all(stack, volumes)
        with log.phase(f"unpacked {image.path}"):
            images.deploy(image, isolation.TARGET)
        with log.phase(f"made it {instance.name}"):
            configure(instance, known, attached, volumes)
        context = hooks.Context("create", os.environ, known, isolation.TARGET, device, attached, volumes)
        hooks.run_all(hooks.find(known.customize_dir), context)
        with log.phase("unmounted and flushed"):
            stack.close()
            disk.flush(device, attached.descriptor)


def mount_all(stack: ExitStack, volumes: Sequence[Volume]) -> None:
    """Mount root and /boot, until `stack` is left."""
    by_role = {volume.role: volume for volume in volumes}
    root = by_role["root"]
    stack.enter_context(filesystem.mounted(root.device, isolation.TARGET, root.kind))
    if "boot" in by_role:
        # the root is fresh: nothing of a guest is in the way yet
        os.mkdir(f"{isolation.TARGET}/boot", 0o755)
        boot = by_role["boot"]
        stack.enter_context(filesystem.mounted(boot.device, f"{isolation.TARGET}/boot", boot.kind))


def configure(instance: Instance, known: Settings, attached: Attached, volumes: tuple[Volume, ...]) -> None:
    """Make the unpacked tree this instance's own system."""
    with target.opened(
        isolation.TARGET, instance.short_name, guest_disk(attached.path, volumes), known.guest_timeout
    ) as root:
        guest.check_root(root)
        if any(volume.role == "esp" for volume in volumes):
            root.mkdir("/boot/efi")
        root.write("/etc/fstab", filesystem.fstab(volumes))
        if instance.serial_console:
            guest.enable_serial_console(root, "ttyS0", instance.serial_speed)
        guest.set_identity(root, instance.name)
        guest.request_relabel(root)
