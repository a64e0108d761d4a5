"""The EFI system partition: FAT, filled by mtools(1) and never mounted. A node may have no driver for it.

The firmware finds a loader there without any variable of its own (NVRAM) at the removable path, EFI/BOOT.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from imageos.disks.filesystem import FILESYSTEMS
from imageos.errors import Failure
from imageos.guests.target import Target
from imageos.node.confinement import Room
from imageos.node.programs import environment, require
from imageos.run import Command, run

LARGEST = 16 << 20  # bytes of a loader; the largest ones have 5 MB
TIMEOUT = 120.0  # seconds


class Firmware(NamedTuple):
    """The names of an architecture in UEFI's world."""

    platform: str  # of GRUB
    suffix: str  # of loaders (UEFI specification, 3.5.1.1)
    machine: str

    @property
    def removable(self) -> str:
        """Return the file in EFI/BOOT that a firmware without any variables starts."""
        return f"BOOT{self.suffix.upper()}.EFI"


FIRMWARE = {
    **dict.fromkeys(("x86_64", "amd64"), Firmware("x86_64-efi", "x64", "x86_64")),
    **dict.fromkeys(("x86", "i386", "i686"), Firmware("i386-efi", "ia32", "i686")),
    **dict.fromkeys(("aarch64", "arm64"), Firmware("arm64-efi", "aa64", "aarch64")),
}


# The modules that a core image needs to read /boot and show a menu by itself, as far as the guest has them. They are
# built in: the guest may update the modules on /boot, and those do not fit an older core.
CORE = (
    *("part_gpt", "part_msdos", "fat", "lvm", "diskfilter", "mdraid09", "mdraid1x"),
    *dict.fromkeys(filesystem.grub for filesystem in FILESYSTEMS.values()),
    *("normal", "configfile", "search", "search_fs_uuid", "search_fs_file", "search_label", "linux", "loadenv"),
    *("blscfg", "gzio", "xzio", "lzopio", "zstd", "test", "true", "echo", "sleep", "regexp", "probe", "minicmd", "ls"),
    *("cat", "help", "halt", "reboot", "chain", "efifwsetup", "gettext", "font", "gfxterm", "gfxmenu", "video"),
    *("all_video", "efi_gop", "efi_uga", "png", "jpeg", "serial", "terminal", "terminfo", "keystatus"),
)


class Signed(NamedTuple):
    """The files of a distribution that Secure Boot accepts; MokManager may be missing."""

    shim: str
    grub: str
    manager: str


SIGNED = (
    # Debian, Ubuntu
    Signed(
        "/usr/lib/shim/shim{suffix}.efi.signed",
        "/usr/lib/grub/{platform}-signed/grub{suffix}.efi.signed",
        "/usr/lib/shim/mm{suffix}.efi.signed",
    ),
    # Fedora, RHEL and their kin: their packages own files on the ESP, which are in the image's tree
    Signed("{vendor}/shim{suffix}.efi", "{vendor}/grub{suffix}.efi", "{vendor}/mm{suffix}.efi"),
    # SUSE
    Signed(
        "/usr/share/efi/{machine}/shim.efi",
        "/usr/share/efi/{machine}/grub.efi",
        "/usr/share/efi/{machine}/MokManager.efi",
    ),
)


def find_menu(uuid: str, prefix: str) -> str:
    """Return GRUB commands: its files are in the directory `prefix` of the filesystem `uuid`."""
    return f"search.fs_uuid {uuid} root\nset prefix=($root){prefix}\n"


def signed_loaders(target: Target, firmware: Firmware, find: str) -> dict[str, bytes]:
    """Return path on the ESP -> content of the guest's signed loaders, if it has them.

    Besides the removable path they are where the guest's own packages put them: after an update, shim may start its
    fallback loader, which boots from there. Such a GRUB reads a grub.cfg in its own directory.
    """
    config = f"{find}configfile $prefix/grub.cfg\n".encode()
    for vendor in ["", *target.glob("/boot/efi/EFI/*")]:
        for signed in SIGNED:
            paths = [path.format(vendor=vendor, **firmware._asdict()) for path in signed]
            shim, grub, manager = (target.read_bytes(path, LARGEST) for path in paths)
            if not (shim and grub):
                continue
            names = [os.path.basename(path).replace(".signed", "") for path in paths]
            files = {names[1]: grub, "grub.cfg": config, **({names[2]: manager} if manager else {})}
            found = {f"EFI/BOOT/{name}": data for name, data in {firmware.removable: shim, **files}.items()}
            for directory in vendors(grub):
                found.update({f"EFI/{directory}/{name}": data for name, data in {names[0]: shim, **files}.items()})
            return found
    return {}


def core_image(
    target: Target, firmware: Firmware, mkimage: str, modules: str, home: str, find: str
) -> dict[str, bytes]:
    """Return path on the ESP -> content of an image that the guest's GRUB makes of its `modules`.

    The image and its configuration are in `home`, as those of grub-install are.
    """
    target.write(f"{home}/load.cfg", find)
    core = [module for module in CORE if target.is_file(f"{modules}/{module}.mod")]
    options = [f"--format={firmware.platform}", f"--directory={modules}", f"--prefix={os.path.dirname(home)}"]
    target.run([mkimage, *options, f"--config={home}/load.cfg", f"--output={home}/core.efi", *core])
    image = target.read_bytes(f"{home}/core.efi", LARGEST)
    if not image:
        raise Failure(f"the guest's {mkimage} wrote no {home}/core.efi")
    return {f"EFI/BOOT/{firmware.removable}": image}


def vendors(grub: bytes) -> list[str]:
    """Return the directories on the ESP in which a GRUB was made to look for its grub.cfg."""
    found = {name.decode() for name in re.findall(rb"/EFI/([A-Za-z0-9_-]{2,32})\0", grub)}
    return sorted(name for name in found if name.upper() != "BOOT")[:4]


def write(device: str, files: Mapping[str, bytes]) -> None:
    """Put files (path -> content) on the ESP at `device`; others stay."""
    require("mcopy")
    with tempfile.TemporaryDirectory() as scratch:
        for path, data in files.items():
            copy = os.path.join(scratch, path)
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            with open(copy, "wb") as file:
                file.write(data)
        tops = [os.path.join(scratch, name) for name in sorted(os.listdir(scratch))]
        # use no configuration of root's or of the environment
        env = {**environment(), "MTOOLSRC": "/dev/null", "HOME": scratch, "MTOOLS_SKIP_CHECK": "1"}
        try:
            copying = ["mcopy", "-s", "-o", "-i", device, *tops, "::"]
            run(Command(copying, Room([device, scratch]), env=env), timeout=TIMEOUT)
        except Failure as failure:
            raise Failure(f"cannot write to the EFI system partition: {failure}", details=failure.details) from None
