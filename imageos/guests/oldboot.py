"""The boot loaders of old and of small guests: GRUB Legacy, and extlinux as Alpine has it. For BIOS."""

from __future__ import annotations

import re
from collections.abc import Callable

from imageos.errors import Failure
from imageos.guests import bootconfig
from imageos.guests.bootconfig import Change
from imageos.guests.target import Target
from imageos.node import linux

EXTLINUX = "/etc/update-extlinux.conf"
EXTLINUX_MENUS = ("/boot/extlinux.conf", "/boot/extlinux/extlinux.conf", "/boot/syslinux/syslinux.cfg")
# What starts the active partition of an msdos table: Alpine, Debian
MBR = ("/usr/share/syslinux/mbr.bin", "/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/EXTLINUX/mbr.bin")
MENU_LST = ("/boot/grub/menu.lst", "/boot/grub/grub.conf")  # Debian, RHEL
STAGES = ("/usr/lib/grub/x86_64-pc", "/usr/lib/grub/i386-pc", "/usr/share/grub/x86_64-redhat", "/usr/lib/grub")
# It makes the name of a partition by adding a number, which is wrong for /dev/loop0; /dev is the sandbox's own.
AS_SDA = 'ln -s "$1" /dev/sda && ln -s "$1p$2" "/dev/sda$2" && exec grub --batch --no-floppy --device-map=/dev/null'
MENUS = (*EXTLINUX_MENUS, *MENU_LST)

# The guest, what becomes of its command line, its disk, the number of the partition of /boot, speed of the serial
# console or 0. With a new root in the change, the loader is installed.
Loader = Callable[[Target, Change, str, int, int], None]


def find(target: Target) -> Loader | None:
    """What sets up the boot loader that the guest has."""
    if target.which("update-extlinux"):
        return set_up_extlinux
    if target.which("grub") and any(map(target.is_file, MENU_LST)):
        return set_up_grub_legacy
    return None


def set_up_extlinux(target: Target, change: Change, disk: str, _partition: int, serial_speed: int) -> None:
    block = [f"root=UUID={change.root}"] if change.root else []
    block += ["serial_port=0", f"serial_baud={serial_speed}"] if serial_speed else []
    block += bootconfig.appending("default_kernel_opts", change)
    target.edit(EXTLINUX, lambda text: bootconfig.without(text, ["default_kernel_opts"], change))
    target.edit(EXTLINUX, lambda text: bootconfig.with_block(text, "\n".join(block) + "\n"))
    if change.root:
        code = next(filter(target.is_file, MBR), None)
        if not code:
            raise Failure(
                "the guest's extlinux has no boot code: mbr.bin is missing", hint="install syslinux in the image"
            )
        target.run(["extlinux", "--install", "/boot"])
        target.run(["dd", f"if={code}", f"of={disk}", "bs=440", "count=1", "conv=notrunc"])
    target.run(["update-extlinux"])


def set_up_grub_legacy(target: Target, change: Change, disk: str, partition: int, serial_speed: int) -> None:
    place = f"(hd0,{partition - 1})"
    for path in filter(target.is_file, MENU_LST):
        target.edit(path, lambda text: bootconfig.legacy_menu(text, change, place, serial_speed))
    if not change.root:
        return
    stages = next((found for one in STAGES if (found := target.glob(f"{one}/*stage*"))), None)
    if stages:
        target.run(["cp", *stages, "/boot/grub/"])
    if not target.exists("/boot/boot"):
        target.symlink(".", "/boot/boot")  # the menu may say /boot/vmlinuz
    target.run(["sync"])
    with open(disk, "rb") as device:
        linux.flush_buffers(device.fileno())  # it reads the whole disk, which has a cache of its own
    script = f"device (hd0) /dev/sda\nroot {place}\nsetup (hd0)\nquit\n"
    said = target.run(["sh", "-c", AS_SDA, "sh", disk, str(partition)], input=script)
    if re.search(r"^\s*Error \d+", said, re.MULTILINE):
        raise Failure("the guest's GRUB Legacy cannot install itself", details=said.splitlines()[-10:])
