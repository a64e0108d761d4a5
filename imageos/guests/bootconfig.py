"""Kernel command lines, and the files of a guest that hold them: text to text, the same again the second time. Pure.

Nothing is evaluated: what a file says in a way that is not understood stays as it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from imageos.errors import Failure

LAST = "GRUB_CMDLINE_LINUX_DEFAULT"  # grub-mkconfig puts it behind the other
GRUB_VARIABLES = ("GRUB_CMDLINE_LINUX", LAST)
# Where the image's own disk was: on a disk that was made anew there is no LVM, RAID, LUKS or subvolume.
OLD_DISK = (
    *("root=", "rootflags=", "resume=", "resume_offset="),
    *("rd.lvm.lv=", "rd.lvm.vg=", "rd.md.uuid=", "rd.dm.uuid="),
    *(f"{name}.{key}=" for name in ("rd.luks", "luks") for key in ("uuid", "name", "key", "options", "partuuid")),
    *("cryptdevice=", "cryptkey=", "real_root=", "crypt_root=", "crypt_swap=", "real_resume="),  # Arch, Gentoo
)
SPECIAL = "'\\$`"  # a meaning of their own in GRUB's menu, whatever the quotes
SPECIAL_UNQUOTED = ";&|<>"
BEGIN, END = "# imageos: what this instance needs has the last word", "# imageos: end"
RECOVERY = {"single", "recovery"}
ENVIRONMENT_SIZE = 1024  # bytes of GRUB's environment block


class Change(NamedTuple):
    add: tuple[str, ...]
    root: str = ""  # UUID of the new root; empty: the guest keeps the root that it has
    kind: str = ""  # type of its filesystem
    boot: str = ""  # the directory /boot as the boot loader sees it, where there is a new root

    def keep(self, words: Iterable[str]) -> list[str]:
        kept = [word for word in words if not self._goes(word)]
        return [f"rootfstype={self.kind}" if self.root and word.startswith("rootfstype=") else word for word in kept]

    def whole(self, line: str) -> str:
        """Return a complete command line: the root, what stays of `line`, and what is added."""
        root = [f"root=UUID={self.root}"] if self.root else []
        return " ".join([*root, *self.keep(split(line)), *self.add])

    def drop_opposed(self, words: Iterable[str]) -> list[str]:
        """Return `words` without those that would give another value to what is added before them."""
        added = {word.partition("=")[0] for word in self.add if "=" in word}
        return [word for word in words if word.partition("=")[0] not in added]

    def is_made(self, line: str) -> bool:
        """Return whether a complete command line has all that is added; the speed of a console does not matter."""
        words = split(line)
        consoles = {word.partition(",")[0] for word in words if word.startswith("console=")} | {"console=tty0"}
        return all(word in words or word.partition(",")[0] in consoles for word in self.add)

    def _goes(self, word: str) -> bool:
        console = word.partition(",")[0]
        replaced = console.startswith("console=") and console in {word.partition(",")[0] for word in self.add}
        return replaced or word in self.add or bool(self.root and word.startswith(OLD_DISK))


def split(line: str) -> list[str]:
    """Return the words of a kernel command line; between double quotes, spaces belong to the word."""
    return re.findall(r'(?:[^\s"]|"[^"]*"?)+', line)


def arguments(setting: str) -> list[str]:
    """Return the words of KERNEL_ARGS; Failure for characters that boot loaders do not pass on as they are."""
    unquoted = re.sub('"[^"]*"', "", setting)
    special = [character for character in setting if character in SPECIAL]
    special += [character for character in unquoted if character in SPECIAL_UNQUOTED]
    special += re.findall(r"(?<!\S)#|[{}]", re.sub(r"\{[^\s{}]*\}", "", unquoted))  # a comment, half a block
    if special or setting.count('"') % 2:
        what = f"the character {special[0]}" if special else "a double quote that is not closed"
        raise Failure(f"KERNEL_ARGS={setting!r} has {what}, which boot loaders would not pass on")
    return split(setting)


def serial_console(speed: int) -> list[str]:
    return ["console=tty0", f"console=ttyS0,{speed}n8"]


def without(text: str, names: Sequence[str], change: Change) -> str:
    """Return a shell file (/etc/default/grub) without the words that `change` adds or drops.

    Only in plain assignments to `names`. In LAST, words that contradict the change go as well.
    """

    def cleaned(match: re.Match[str]) -> str:
        quote = match[2][:1] if match[2][:1] in ("'", '"') else ""
        words = split(match[2][1:-1] if quote else match[2])
        kept = change.keep(words)
        if match[1].rstrip("+=").endswith(LAST):
            kept = change.drop_opposed(kept)
        return match[0] if kept == words else f"{match[1]}{quote}{' '.join(kept)}{quote}{match[3]}"

    value = r"""("[^"\\`]*"|'[^'\\`]*'|[^\s"'\\`;&|<>()#]*)"""
    assignment = rf"^([ \t]*(?:export[ \t]+)?(?:{'|'.join(names)})\+?=){value}([ \t]*(?:#.*)?)$"
    return re.sub(assignment, cleaned, text, flags=re.MULTILINE)


def with_block(text: str, block: str) -> str:
    """Return a shell file with `block` at its end, instead of an earlier one."""
    others = re.sub(rf"^{BEGIN}\n(?:(?!{BEGIN}\n|{END}\n).*\n)*{END}\n", "", text, flags=re.MULTILINE)
    if others and not others.endswith("\n"):
        others += "\n"
    return f"{others}{BEGIN}\n{block}{END}\n"


def append_arguments(variable: str, change: Change) -> list[str]:
    """Return the line of shell that adds to the value of a variable, if there is anything to add."""
    return [f'{variable}="${variable} "{shlex.quote(" ".join(change.add))}'] if change.add else []


def loader_entry(text: str, change: Change) -> str:
    """Return a file of /boot/loader/entries (Boot Loader Specification, type 1), changed."""
    options = re.findall(r"^options[ \t]+(.*)$", text, re.MULTILINE)  # together they are the command line
    if options and not any("$kernelopts" in line for line in options):
        line = iter([f"options {change.whole(' '.join(options))}\n"])
        text = re.sub(r"^options[ \t].*\n?", lambda _: next(line, ""), text, flags=re.MULTILINE)
    if not change.root:
        return text
    return re.sub(r"^((?:linux|initrd)[ \t]+)(?:/boot)?/", rf"\1{change.boot}/", text, flags=re.MULTILINE)


def environment_block(text: str, name: str, change: Change) -> str:
    """Return GRUB's environment block (grubenv) whose variable `name` is a complete command line."""
    lines = [line for line in text.split("\n") if line.strip("#")] or ["# GRUB Environment Block"]
    old = next((line.partition("=")[2] for line in lines if line.startswith(f"{name}=")), "ro")
    others = [line for line in lines if not line.startswith(f"{name}=")]
    block = "\n".join([*others, f"{name}={change.whole(old)}", ""])
    if len(block) > ENVIRONMENT_SIZE:
        raise Failure(f"GRUB's environment block has no room for {name}: {len(block)} bytes, of {ENVIRONMENT_SIZE}")
    return block.ljust(ENVIRONMENT_SIZE, "#")


def grub_menu(text: str, change: Change) -> str:
    """Return grub.cfg of GRUB 2 with the kernel command lines changed; the guest makes it anew in time."""
    start = r"^([ \t]*linux(?:16|efi)?[ \t]+\S+[ \t]+(?=\S))"
    return re.sub(rf"{start}(.*\broot=.*)$", lambda match: match[1] + change.whole(match[2]), text, flags=re.MULTILINE)


def legacy_menu(text: str, change: Change, partition: str, serial_speed: int) -> str:
    """Return menu.lst of GRUB Legacy, changed, with comments that Debian's update-grub reads. Speed 0: no console."""
    text = re.sub(
        r"^([ \t]*(?:kernel|module)[ \t]+\S+[ \t]+(?=\S)|# kopt\w*=)(.*\broot=.*)$",
        lambda match: match[1] + change.whole(match[2]),
        text,
        flags=re.MULTILINE,
    )
    if change.root:
        text = re.sub(r"\(hd\d+,\d+\)", partition, text)
        text = re.sub(r"^([ \t]*)uuid[ \t]+\S+", rf"\1root\t{partition}", text, flags=re.MULTILINE)
    if serial_speed:
        text = re.sub(r"^(serial|terminal|splashimage|gfxmenu)\b.*\n", "", text, flags=re.MULTILINE)
        text = f"serial --unit=0 --speed={serial_speed}\nterminal --timeout=5 serial console\n" + text
    return text


def command_lines(menu: str) -> list[str]:
    """Return the kernel command lines in a boot loader's menu, entry or environment; not those of a recovery mode."""
    starts = r"(?:linux(?:16|efi)?|kernel|module)[ \t]+\S+[ \t]|(?:options|append)[ \t]|kernelopts="
    lines = re.findall(rf"^[ \t]*(?:{starts})(.*\broot=.*)$", menu, re.MULTILINE | re.IGNORECASE)
    return [line for line in lines if not RECOVERY & set(split(line))]
