"""Make a tree one instance's own system: its name, keys, console, fstab, and what cloud-init is to know."""

from __future__ import annotations

from imageos import log
from imageos.disks import fstab
from imageos.disks.blockdev import LoopDevice
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.guests import cloudboot, cloudinit, guest, hostkeys, hostname, initramfs, target
from imageos.guests.hostkeys import GetKey
from imageos.guests.target import Target
from imageos.node import isolation
from imageos.request import Request

BY_HOOK = ("SSH_AUTHORIZED_KEYS", "ROOT_PASSWORD_HASH")  # by cloud-init, or the hook ssh
LOGINS = (*BY_HOOK, "USER_DATA")


def configure(request: Request, loop: LoopDevice, volumes: tuple[Volume, ...], rsa: GetKey) -> None:
    """Make the tree this instance's own system. A disk image keeps its fstab and its boot loader."""
    instance, settings = request.instance, request.settings
    with target.opened_system(isolation.TARGET, instance, settings, loop.path, volumes) as root:
        guest.check_root(root)
        if request.deploy:
            root.write("/etc/fstab", fstab.render(volumes))
            if any(volume.role == "esp" for volume in volumes):
                root.mkdir("/boot/efi")
            guest.forget_disk(root)
            root.remove("/.dockerenv")  # by which systemd takes any machine for a container
            forget_swap(root, request)
        if instance.serial_console:
            guest.enable_serial_console(root, "ttyS0", instance.serial_speed)
        hostname.write(root, instance.name)
        guest.forget_identity(root)
        hostkeys.replace(root, rsa)
        if cloudboot.runs(root):
            if isinstance(request.interfaces, Failure):
                raise request.interfaces
            cloudinit.write_seed(root, instance, settings, request.interfaces)
        else:
            warn_of_unread(root, request)
        guest.request_relabel(root)


def forget_swap(root: Target, request: Request) -> None:
    """Take the image's swap out of what the guest boots with; the hook grub sees to the initramfs that is there."""
    if initramfs.forget_swap(root) and not (request.instance.kernel_path or "grub" in request.hooks):
        log.warning(
            "the image's initramfs waits for the image's swap when the guest boots: have it made anew "
            f"(update-initramfs -u), or boot with {initramfs.NORESUME}, as the hook grub does"
        )


def warn_of_unread(root: Target, request: Request) -> None:
    """Name the settings that only cloud-init would have read, or the hook ssh."""
    given = {name: getattr(request.settings, name.lower()) for name in LOGINS}
    unread = [name for name in LOGINS if given[name] and not (name in BY_HOOK and "ssh" in request.hooks)]
    if unread:
        why = "does not start its cloud-init" if cloudinit.is_present(root) else "has no cloud-init"
        hook = f", and the hook ssh is off (chmod +x {request.settings.customize_dir}/ssh)"
        off = hook if set(unread) & set(BY_HOOK) else ""
        log.warning(f"{' and '.join(unread)} will have no effect: the image {why}{off}")
