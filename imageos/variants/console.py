"""What a guest's serial console says: its login prompt, or why there is none. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# ECMA-48: what places the cursor in the first column, or clears the screen, begins another line; all else is dropped
_PLACED = re.compile(r"\x1b\[(?:\d*;)?0*1?[Hf]|\x1b\[\d*[EJ]")
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")
LOGIN = "login:"  # what may be a prompt; others may have gone on behind it
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
_MENU = re.compile(r"^ *Use the [^\n]* keys to select which entry is highlighted|^boot: *\Z", re.MULTILINE)
_COUNTS = "automatically in"  # GRUB, in a menu that does not wait for ever
MEMORY = 1024  # MiB that the guest has
COLUMNS = 80  # of a screen
SHOWN = 15  # lines of a console


class Verdict(NamedTuple):
    """Why there is no login prompt, and what may be done about it."""

    problem: str
    hint: str


SEE = "see the lines before"
PANIC = "its kernel panics: "
NO_LOADER = "the firmware finds no boot loader on its disk"
# What a guest says that will never have a prompt -> the verdict; {} is what the group matched. The first that fits.
HOPELESS = (
    # Linux, then FreeBSD
    (r"Kernel panic - not syncing: ([^\n]*)|^panic: ([^\n]*)\ncpuid = ", PANIC + "{}", SEE + ": what it looked for"),
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
    # GRUB goes on after other errors
    (r"^error: [^\n]*you need to load the kernel first", "GRUB does not find the kernel that its menu names", SEE),
    # extlinux, systemd-boot, FreeBSD's loader
    (
        r"^(Could not find kernel image[^\n]*|No DEFAULT or UI configuration directive found[^\n]*"
        r"|Failed to load (?:COM32 file|ldlinux)[^\n]*|No loader found[^\n]*|can't load 'kernel'"
        r"|Error (?:loading|opening) [^\n]*Not [Ff]ound)",
        "its boot loader does not find what it is to load: {}",
        "its menu is missing, or names what is not in the image",
    ),
    (
        r"UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY",
        "a filesystem is damaged, and it waits for somebody who repairs that",
        "see whether the image is damaged where it comes from",
    ),
    (
        r"\(initramfs\) |^dracut:/|rdsosreport\.txt|ALERT!  ?\S+ does not exist|initramfs emergency recovery shell"
        r"|^\[rootfs [^\n]*\]#|You are now being dropped into an emergency shell|^Target filesystem doesn't have",
        "its initramfs does not find the root filesystem, or no system on it, and waits in a shell",
        "root= of the kernel's command line, and the drivers in the initramfs (virtio_blk, the filesystem)",
    ),
    (
        r"You are in (?:emergency|rescue) mode|Welcome to (?:emergency|rescue) mode|Give root password for"
        r"|Press Enter for (?:maintenance|system maint)|Cannot open access to console, the root account is locked"
        r"|^Enter full pathname of shell",
        "it is in emergency mode: {}",
        "often a filesystem in /etc/fstab that is on no disk of the instance",
    ),
    (r"^mountroot> ", "its kernel does not find the root filesystem, and waits", "vfs.root.mountfrom, or /etc/fstab"),
    (r"^\[!!!!!!\] ([^\n]*)|systemd\[1\]: (Freezing execution)", "its systemd gives up: {}", SEE),
    (
        r"No bootable device|No bootable option or device was found|UEFI Interactive Shell|^Shell>|iPXE initiali[sz]ing"
        r"|>>Start (?:PXE|HTTP Boot) over|No more network devices"
        r"|^(?:Missing operating system|Error loading operating system|Invalid partition table)",
        NO_LOADER,
        "the hook grub installs one on tarballs and dumps (chmod +x); a disk image has to bring one for {firmware}",
    ),
)
# What a kernel that panics has said before -> a better hint
CAUSES = (
    (
        r"Initramfs unpacking failed: write error|[Oo]ut of memory|deadlocked on memory",
        f"it has {MEMORY} MiB of memory, which is too little for its initramfs, or for what it starts",
    ),
    (
        r"\(error -8\)|^This kernel requires |CPU does not support x86-64-v",
        "its programs are for another architecture, or for a newer CPU than it has here",
    ),
)
LONGEST = 200  # characters of what a guest says, in a verdict
NO_CONSOLE = "KERNEL_ARGS=console=ttyS0 with the hook grub, and a login there: gnt-instance console needs them"
NO_GETTY = "enable serial-getty@ttyS0 in the image, or a getty on ttyS0 in /etc/inittab"


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
            said = next(filter(None, found.groups()), failed[1] if failed else "something that it needs has failed")
            causes = [better for cause, better in CAUSES if problem.startswith(PANIC) and re.search(cause, text, re.M)]
            hint = causes[0] if causes else hint.replace("{firmware}", firmware.upper())
            return Verdict(problem.replace("{}", said.strip()[:LONGEST]), hint)
    return None


def silent(text: str, screen: str, obeyed: bool, speaks: bool = False) -> Verdict:
    """Return why a guest ran until its time was over without a prompt: `text` on its console, `screen` beside.

    `obeyed`: it powered itself off when asked to, so a system runs there. `speaks`: it had not fallen silent before.
    """
    is_up = "its system is up, since it powers off when asked to"
    if prompt(text) is not None:
        return Verdict(
            "what looks like its login prompt does not answer", "a message of the boot, or a getty that fails"
        )
    if prompt(screen) is not None:
        return Verdict("its login prompt is on its screen, and not on a serial console", NO_CONSOLE)
    if not _KERNEL.search(text) and _KERNEL.search(screen):
        return Verdict("it speaks on its screen, and not on a serial console", NO_CONSOLE)
    if obeyed and _KERNEL.search(text):
        return Verdict(f"{is_up}, but there is no login on the serial console", NO_GETTY)
    if obeyed:
        return Verdict(f"{is_up}, but says nothing on a serial console", NO_CONSOLE)
    if (_MENU.search(text) or _MENU.search(screen)) and not (_KERNEL.search(text) or _COUNTS in text + screen):
        return Verdict("its boot loader waits in its menu", "GRUB_TIMEOUT in the image: nobody chooses at a boot")
    said = last_lines(text, 1)
    if said and not _LOADER.search(said[0]):
        hint = "it was still speaking, and may need more time: --timeout" if speaks else SEE
        return Verdict(f"it hangs: the last that it said is {said[0][:LONGEST]!r}", hint)
    return Verdict(
        "its kernel says nothing on the serial console, and it does not power off when asked to"
        if _LOADER.search(f"{screen}\n{text}")
        else "nothing at all is said on its serial console, and it does not power off when asked to",
        "it hangs, needs more time (--timeout), or has no serial console: KERNEL_ARGS=console=ttyS0 with the hook grub",
    )


def last_lines(text: str, most: int = SHOWN) -> Sequence[str]:
    """Return the last lines that are not blank."""
    return [line.rstrip() for line in text.splitlines() if line.strip()][-most:]
