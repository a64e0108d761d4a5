"""Make a tree one instance's own system: its name, keys, console, fstab, and what cloud-init is to know."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from imageos import log
from imageos.disks import fstab
from imageos.disks.blockdev import LoopDevice
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.guests import cloudboot, cloudinit, guest, hostkeys, hostname, initramfs, target
from imageos.guests.hostkeys import GetKey
from imageos.guests.target import Target, holding
from imageos.node import isolation
from imageos.request import Request

BY_HOOK = ("SSH_AUTHORIZED_KEYS", "ROOT_PASSWORD_HASH")  # by cloud-init, or the hook ssh
CHANGED_BY_GRUB = ("/etc/default/grub", "/etc/kernel/cmdline")
LOGINS = (*BY_HOOK, "USER_DATA")


def configure(request: Request, loop: LoopDevice, volumes: tuple[Volume, ...], rsa: GetKey) -> None:
    """Make the tree this instance's own system. A disk image keeps its fstab and its boot loader."""
    instance, settings = request.instance, request.settings
    with target.opened_system(isolation.TARGET, instance, settings, loop.path, volumes) as root:
        guest.check_root(root)
        if request.deploy:
            guest.forget_disk(root)
            root.remove("/.dockerenv")  # by which systemd takes any machine for a container
            forget_swap(root, request)
            replace_fstab(root, volumes)
        if instance.serial_console:
            guest.enable_serial_console(root, "ttyS0", instance.serial_speed)
        guest.forget_identity(root)
        hostname.write(root, instance.name)
        hostkeys.replace(root, rsa)
        if cloudboot.runs(root):
            if isinstance(request.interfaces, Failure):
                raise request.interfaces
            cloudinit.write_seed(root, instance, settings, request.interfaces)
        else:
            warn_of_unread(root, request)
        guest.request_relabel(root)


def replace_fstab(root: Target, volumes: tuple[Volume, ...]) -> None:
    """Write an fstab for the new volumes; what the image's mounts of no disk stays: tmpfs, network, a swap file."""
    old = ""
    with suppress(Failure):  # whatever is there gives way
        old = root.read("/etc/fstab") or ""
    kept = [line for line, source in fstab.others(old) if not fstab.names_file(source) or root.exists(source)]
    root.write("/etc/fstab", fstab.render(volumes) + "".join(f"{line}\n" for line in kept))
    if any(volume.role == "esp" for volume in volumes):
        root.mkdir("/boot/efi")
    warn_of_disk(root, fstab.parse(old))


def warn_of_disk(root: Target, entries: Sequence[fstab.Entry]) -> None:
    """Say what of the image's fstab is mounted no more, and which files still name the image's disk."""
    named = [path for path in holding(root, "/etc", fstab.ids(entries)) if not path.startswith(CHANGED_BY_GRUB)]
    if named:
        log.warning(f"the image's disk, which the guest does not have, is named in {log.few(named)}")
    own = {entry.source for entry in entries if entry.mount_point == "/"}  # other subvolumes of it are in the image
    left = [
        entry.mount_point
        for entry in entries
        if fstab.names_device(entry.source)
        and entry.source not in own
        and entry.mount_point not in ("/boot", "/boot/efi")
        and not {"noauto", "nofail"}.intersection(entry.options)
    ]
    if left:
        log.warning(f"the guest mounts {log.few(left)} no more: the image's fstab has that on a disk of its own")


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
