"""The boot loaders of guests: how each is recognised, its menus, how it is installed and configured (LOADERS)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from imageos import log
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.guests import bootconfig, esp
from imageos.guests.bootconfig import Change
from imageos.guests.target import Target
from imageos.node import linux

DEFAULT_GRUB = "/etc/default/grub"
GRUB_SNIPPET = f"{DEFAULT_GRUB}.d/90-imageos.cfg"  # where grub-mkconfig reads that directory: Debian, Ubuntu
ENTRIES = "/boot/loader/entries/*.conf"  # Boot Loader Specification: Fedora, RHEL
KERNEL_INSTALL = "/etc/kernel/cmdline"  # the command line of new entries
EXTLINUX = "/etc/update-extlinux.conf"
EXTLINUX_MENUS = ("/boot/extlinux.conf", "/boot/extlinux/extlinux.conf", "/boot/syslinux/syslinux.cfg")
# The boot code that starts the active partition of an msdos table: Alpine, Debian
MBR = ("/usr/share/syslinux/mbr.bin", "/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/EXTLINUX/mbr.bin")
MENU_LST = ("/boot/grub/menu.lst", "/boot/grub/grub.conf")  # GRUB Legacy: Debian, RHEL
STAGES = ("/usr/lib/grub/x86_64-pc", "/usr/lib/grub/i386-pc", "/usr/share/grub/x86_64-redhat", "/usr/lib/grub")
# GRUB Legacy makes the name of a partition by adding a number, which is wrong for /dev/loop0. The links are in the
# /dev of the sandbox.
AS_SDA = 'ln -s "$1" /dev/sda && ln -s "$1p$2" "/dev/sda$2" && exec grub --batch --no-floppy --device-map=/dev/null'
ERROR = re.compile(r"^[ \t]*Error \d+", re.MULTILINE)  # of GRUB Legacy


class CannotBoot(Failure):
    """The guest has no boot loader that could start it from its disk."""


class Boot(NamedTuple):
    guest: Target
    change: Change  # of its kernel command lines; with a new root, imageos has made the disk
    disk: str
    boot: Volume  # that holds /boot
    esp: Volume | None
    arch: str
    serial_speed: int  # 0: no serial console
    on_lvm: bool = False  # the root or /boot


class BootLoader(NamedTuple):
    is_in: Callable[[Target], object]
    menus: tuple[str, ...]  # patterns of paths
    configure: Callable[[Boot], object]
    install: Callable[[Boot], None] | None = None  # onto a new disk
    reads_gpt: bool = False


def find(target: Target) -> BootLoader | None:
    return next((loader for loader in LOADERS if loader.is_in(target)), None)


def command_lines(target: Target) -> list[str]:
    paths = [path for loader in LOADERS for pattern in loader.menus for path in target.glob(pattern)]
    return [line for path in paths for line in bootconfig.command_lines(target.read(path) or "")]


def install(loader: BootLoader | None, boot: Boot) -> None:
    """Install the boot loader on a disk that imageos made; CannotBoot if that is impossible."""
    if not loader or not loader.install:
        raise CannotBoot("the guest has no GRUB (grub-install, grub-mkconfig) nor another boot loader that is known")
    if boot.esp and not loader.reads_gpt:
        raise Failure("the guest's boot loader cannot read a gpt", hint="set PARTITION_TABLE=msdos")
    loader.install(boot)


def install_grub(name: str, platforms: Sequence[str], boot: Boot) -> None:
    """Install the GRUB 2 whose programs are `name`-install, ...; its platforms are in one of the directories."""
    program, bios = boot.guest.which(f"{name}-install"), _platform(boot.guest, platforms, "i386-pc")
    loaders = uefi_loaders(name, platforms, boot) if boot.esp else {}
    if program and bios:
        boot.guest.remove(f"/boot/{name}/device.map")  # names a disk of another machine
        boot.guest.run([program, "--target=i386-pc", "--boot-directory=/boot", boot.disk])
    elif loaders:
        log.info("boots from UEFI only: the guest has no GRUB for BIOS (Debian: grub-pc-bin)")
    else:
        firmware = "BIOS nor UEFI" if boot.esp else "BIOS (UEFI takes PARTITION_TABLE=gpt)"
        raise CannotBoot(f"the guest has no GRUB for {firmware}: no i386-pc in {' or '.join(platforms)}")
    if boot.esp and loaders:
        esp.write(boot.esp.device, loaders)
    elif boot.esp:
        log.info("boots from BIOS only: the guest has no GRUB for UEFI (Debian: grub-efi-amd64-bin)")


def uefi_loaders(name: str, platforms: Sequence[str], boot: Boot) -> dict[str, bytes]:
    """Return path on the ESP -> content: the distribution's signed loaders, or a core image of the guest's GRUB."""
    firmware = esp.FIRMWARE.get(boot.arch)
    if not firmware:
        return {}
    find = esp.find_menu(boot.boot.uuid, f"/boot/{name}" if boot.boot.role == "root" else f"/{name}")
    mkimage, modules = boot.guest.which(f"{name}-mkimage"), _platform(boot.guest, platforms, firmware.platform)
    loaders = esp.signed_loaders(boot.guest, firmware, find)
    if mkimage and modules and not loaders:
        return esp.core_image(boot.guest, firmware, mkimage, modules, f"/boot/{name}/{firmware.platform}", find)
    return loaders


def _platform(target: Target, directories: Sequence[str], name: str) -> str | None:
    return next((f"{directory}/{name}" for directory in directories if target.is_dir(f"{directory}/{name}")), None)


def configure_grub(name: str, boot: Boot) -> None:
    target, change, menu = boot.guest, boot.change, f"/boot/{name}/grub.cfg"
    mkconfig = target.which(f"{name}-mkconfig") or ""
    reads_snippets = "/default/grub.d" in (target.read(mkconfig) or "")
    for path in [DEFAULT_GRUB, *target.glob(f"{DEFAULT_GRUB}.d/*.cfg")]:
        if path != GRUB_SNIPPET:
            target.edit(path, lambda text: bootconfig.without(text, bootconfig.GRUB_VARIABLES, change))
    block = grub_settings(boot)
    target.edit(GRUB_SNIPPET if reads_snippets else DEFAULT_GRUB, lambda text: bootconfig.with_block(text, block))
    has_entries = update_entries(name, boot)
    if boot.on_lvm:  # without device-mapper, grub-mkconfig would not see it, and write a menu for something else
        target.edit(menu, lambda text: bootconfig.grub_menu(text, change))
    elif change.root or not has_entries:
        target.mkdir(f"/boot/{name}")
        target.run([mkconfig, "-o", menu])
        update_entries(name, boot)
    text = target.read(menu) or ""
    if f"root={boot.disk}" in text or not (has_entries or bootconfig.command_lines(text)):
        raise Failure(
            f"the menu that the guest's {mkconfig} wrote starts no system by the UUID of its root",
            hint="is there a kernel in /boot of the image, with an initramfs?",
        )


def grub_settings(boot: Boot) -> str:
    """Return the lines that /etc/default/grub needs; the guest's shell reads them, hence the quotes."""
    lines = ["GRUB_DISABLE_OS_PROBER=true"]
    if boot.change.root:
        lines += ["GRUB_DISABLE_LINUX_UUID=false", "GRUB_DISABLE_LINUX_PARTUUID=false", "GRUB_FORCE_PARTUUID="]
    if boot.serial_speed:
        options = f"--unit=0 --speed={boot.serial_speed} --word=8 --parity=no --stop=1"
        lines += ['GRUB_TERMINAL="console serial"', f'GRUB_SERIAL_COMMAND="serial {options}"']
    lines += bootconfig.append_arguments("GRUB_CMDLINE_LINUX", boot.change)
    return "".join(f"{line}\n" for line in lines)


def update_entries(name: str, boot: Boot) -> bool:
    """Change the guest's entries (Boot Loader Specification), and return whether it has any."""
    target, change, environment = boot.guest, boot.change, f"/boot/{name}/grubenv"
    entries = target.glob(ENTRIES)
    for path in entries:
        target.edit(path, lambda text: bootconfig.loader_entry(text, change))
    if any("$kernelopts" in (target.read(path) or "") for path in entries):  # RHEL 8
        text = target.read(environment) or ""
        # may be a link into the ESP
        target.write(environment, bootconfig.environment_block(text, "kernelopts", change), follow=False)
    if target.is_file(KERNEL_INSTALL):
        target.edit(KERNEL_INSTALL, lambda text: change.whole(text) + "\n")
    return bool(entries)


def install_extlinux(boot: Boot) -> None:
    code = next(filter(boot.guest.is_file, MBR), None)
    if not code:
        raise Failure("the guest's extlinux has no boot code: mbr.bin is missing", hint="install syslinux in the image")
    boot.guest.run(["extlinux", "--install", "/boot"])
    boot.guest.run(["dd", f"if={code}", f"of={boot.disk}", "bs=440", "count=1", "conv=notrunc"])


def configure_extlinux(boot: Boot) -> None:
    block = [f"root=UUID={boot.change.root}"] if boot.change.root else []
    block += ["serial_port=0", f"serial_baud={boot.serial_speed}"] if boot.serial_speed else []
    block += bootconfig.append_arguments("default_kernel_opts", boot.change)
    boot.guest.edit(EXTLINUX, lambda text: bootconfig.without(text, ["default_kernel_opts"], boot.change))
    boot.guest.edit(EXTLINUX, lambda text: bootconfig.with_block(text, "\n".join(block) + "\n"))
    boot.guest.run(["update-extlinux"])


def install_grub_legacy(boot: Boot) -> None:
    target, number = boot.guest, _partition_number(boot)
    stages = next((found for directory in STAGES if (found := target.glob(f"{directory}/*stage*"))), None)
    if stages:
        target.run(["cp", *stages, "/boot/grub/"])
    if not target.exists("/boot/boot"):
        target.symlink(".", "/boot/boot")  # the menu may say /boot/vmlinuz
    target.run(["sync"])
    with open(boot.disk, "rb") as device:
        linux.flush_buffers(device.fileno())  # it reads the whole disk, which has a cache of its own
    script = f"device (hd0) /dev/sda\nroot (hd0,{number - 1})\nsetup (hd0)\nquit\n"
    output = target.run(["sh", "-c", AS_SDA, "sh", boot.disk, str(number)], input=script)
    if ERROR.search(output):
        raise Failure("the guest's GRUB Legacy cannot install itself", details=output.splitlines()[-10:])


def configure_grub_legacy(boot: Boot) -> None:
    partition = f"(hd0,{_partition_number(boot) - 1})"
    for path in filter(boot.guest.is_file, MENU_LST):
        boot.guest.edit(path, lambda text: bootconfig.legacy_menu(text, boot.change, partition, boot.serial_speed))


def _has_grub_legacy(target: Target) -> bool:
    return target.which("grub") is not None and any(map(target.is_file, MENU_LST))


def _partition_number(boot: Boot) -> int:
    return int(boot.boot.device.rpartition("p")[2])


def _grub_2(name: str, *platforms: str) -> BootLoader:
    return BootLoader(
        lambda target: target.which(f"{name}-mkconfig"),
        (f"/boot/{name}/grub.cfg", f"/boot/{name}/grubenv"),
        partial(configure_grub, name),
        partial(install_grub, name, platforms),
        reads_gpt=True,
    )


# The first that the guest has counts.
LOADERS = (
    _grub_2("grub2", "/usr/lib/grub", "/usr/share/grub2", "/usr/lib/grub2"),  # Fedora, RHEL, SUSE
    _grub_2("grub", "/usr/lib/grub"),  # Debian, Ubuntu, Arch, Alpine, Gentoo
    BootLoader(lambda target: target.which("update-extlinux"), EXTLINUX_MENUS, configure_extlinux, install_extlinux),
    BootLoader(_has_grub_legacy, MENU_LST, configure_grub_legacy, install_grub_legacy),
    # any boot loader that reads entries, on the disk that it came with
    BootLoader(lambda target: target.glob(ENTRIES), (ENTRIES,), partial(update_entries, "grub2")),
)
