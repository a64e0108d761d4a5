"""What a guest's serial console says: its login prompt, or why there is none. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# ECMA-48: what places the cursor in the first column, or clears the screen, begins another line; all else is dropped
_PLACED = re.compile(r"\x1b\[(?:\d*;)?0*1?[Hf]|\x1b\[\d*[EJ]")
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")
# Of any getty: `NAME login: `; the kernel may say something behind it.
_PROMPT = re.compile(r"^(?:([A-Za-z0-9][A-Za-z0-9._-]*) )?login: *(?:\[ *\d+\.\d+\].*)?$", re.MULTILINE)
# Of the kernel, or of an init that the kernel has started
_KERNEL = re.compile(
    r"^\[(?: *\d+\.\d+|  OK  |FAILED|DEPEND)\] |^Linux version |^Welcome to (?!GRUB)\S|systemd\[1\]: ", re.MULTILINE
)
_LOADER = re.compile(
    r"SeaBIOS|BdsDxe|^Booting from|GRUB|SYSLINUX|Loading (?:Linux|initial ramdisk)|Decompressing Linux"
)
# What systemd could not start, or waited for in vain
_FAILED = re.compile(r"^\[(?:FAILED| TIME |DEPEND)\] ([^\n]*)", re.MULTILINE)
COLUMNS = 80  # of a screen
SHOWN = 15  # lines of a console


@dataclass(frozen=True)
class Verdict:
    """Why there is no login prompt, and what may be done about it."""

    problem: str
    hint: str


PANIC = "its kernel panics: "
# What a guest says that will never have a prompt -> the verdict; {} is what the group matched. The first that fits.
HOPELESS = (
    (r"Kernel panic - not syncing: ([^\n]*)", PANIC + "{}", "see the lines before: what it looked for"),
    (
        r"grub rescue>",
        "GRUB does not find its files on the disk, and waits at `grub rescue>`",
        "its core image looks for another /boot: the hook grub installs it anew on tarballs and dumps",
    ),
    (
        r"^grub> ",
        "GRUB has no menu, and waits at `grub>`",
        "grub.cfg is missing in the image: the hook grub makes it for tarballs and dumps",
    ),
    (
        r"\(initramfs\) |^dracut:/|rdsosreport\.txt|ALERT!  ?\S+ does not exist|initramfs emergency recovery shell"
        r"|^\[rootfs [^\n]*\]#|You are now being dropped into an emergency shell|^Target filesystem doesn't have",
        "its initramfs does not find the root filesystem, or no system on it, and waits in a shell",
        "root= of the kernel's command line, and the drivers in the initramfs (virtio_blk, the filesystem)",
    ),
    (
        r"You are in (?:emergency|rescue) mode|Give root password for|Press Enter for (?:maintenance|system maint)"
        r"|Cannot open access to console, the root account is locked",
        "it is in emergency mode: {}",
        "often a filesystem in /etc/fstab that is on no disk of the instance",
    ),
    (
        r"No bootable device|No bootable option or device was found|UEFI Interactive Shell|^Shell>|iPXE initiali[sz]ing"
        r"|>>Start (?:PXE|HTTP Boot) over|No more network devices",
        "the firmware finds no boot loader on its disk",
        "the hook grub installs one on tarballs and dumps (chmod +x); a disk image has to bring one for {firmware}",
    ),
)


NO_CONSOLE = "KERNEL_ARGS=console=ttyS0 with the hook grub, and a login there: gnt-instance console needs them"


def clean(raw: bytes) -> str:
    """Return what is read on a console, without the sequences that move and colour."""
    text = raw.decode("utf-8", "backslashreplace").replace("\0", "")
    text = _SEQUENCES.sub("", _PLACED.sub("\n", text))
    return re.sub(r"\r+\n?", "\n", text)


def screen(dump: str) -> str:
    """Return the lines of a screen in text mode from what the monitor prints of its memory, as words in hex."""
    words = [int(word, 16) for word in re.findall(r"\b0x([0-9a-f]{4})\b", dump)]
    text = "".join(chr(word & 0xFF) if 0x20 <= word & 0xFF < 0x7F else " " for word in words)
    return "\n".join(text[start : start + COLUMNS].rstrip() for start in range(0, len(text), COLUMNS)).strip("\n")


def prompt(text: str) -> str | None:
    """Return the name in the login prompt, which may be empty; None if there is no prompt."""
    found = _PROMPT.search(text)
    return (found[1] or "") if found else None


def hopeless(text: str, firmware: str) -> Verdict | None:
    """Return what the guest says that will have no prompt any more; `firmware` is bios or uefi."""
    for pattern, problem, hint in HOPELESS:
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            failed = _FAILED.search(text)
            what = found[1] if found.re.groups else failed[1] if failed else "something that it needs has failed"
            return Verdict(problem.replace("{}", what.strip()), hint.replace("{firmware}", firmware.upper()))
    return None


def silent(text: str, screen: str, obeyed: bool) -> Verdict:
    """Return why a guest that ran until its time was over said nothing more: `text` on its console, `screen` beside.

    `obeyed`: it powered itself off when asked to, so a system runs there.
    """
    if not _KERNEL.search(text) and (prompt(screen) is not None or _KERNEL.search(screen)):
        return Verdict("it speaks on its screen, and not on a serial console", NO_CONSOLE)
    if obeyed and _KERNEL.search(text):
        return Verdict(
            "its system is up, since it powers off when asked to, but there is no login on the serial console",
            "enable serial-getty@ttyS0 in the image, or a getty on ttyS0 in /etc/inittab",
        )
    if obeyed:
        return Verdict(
            "its system is up, since it powers off when asked to, but says nothing on a serial console",
            NO_CONSOLE,
        )
    if _KERNEL.search(text):
        said = last_lines(text, 1)
        return Verdict(
            f"it hangs: the last that it said is {said[0]!r}" if said else "it hangs", "see the lines before"
        )
    return Verdict(
        "its kernel says nothing on the serial console, and it does not power off when asked to"
        if _LOADER.search(f"{screen}\n{text}")
        else "nothing at all is said on its serial console, and it does not power off when asked to",
        "it hangs, needs more time (--timeout), or has no serial console: KERNEL_ARGS=console=ttyS0 with the hook grub",
    )


def last_lines(text: str, most: int = SHOWN) -> Sequence[str]:
    """Return the last lines that are not blank."""
    return [line.rstrip() for line in text.splitlines() if line.strip()][-most:]
