"""What a serial console is taken for. The files in consoles are what real guests have printed, or the end of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from imageos.variants import console

CONSOLES = Path(__file__).parent / "consoles"
# file -> what its verdict says; None: none before the guest's time is over
VERDICTS = {
    "no-loader": "no boot loader",
    "uefi-shell": "no boot loader",
    "grub-rescue": "`grub rescue>`",
    "grub-prompt": "`grub>`",
    "grub-only": None,
    "initramfs": "initramfs does not find the root filesystem",
    "emergency": "emergency mode",
    "panic": "its kernel panics: VFS: Unable to mount root fs on unknown-block(0,0)",
    "hang": None,
    "good": None,
}


def text_of(name: str) -> str:
    return console.clean((CONSOLES / name).read_bytes())


def test_all_consoles_are_judged() -> None:
    assert {path.name for path in CONSOLES.iterdir()} == set(VERDICTS)


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    verdict, expected = console.hopeless(text_of(name), "uefi"), VERDICTS[name]
    assert bool(verdict) == bool(expected)
    if verdict and expected:
        assert expected in verdict.problem
        assert verdict.hint and "{" not in verdict.problem + verdict.hint


@pytest.mark.parametrize("name", VERDICTS)
def test_no_beginning_of_a_good_console_is_hopeless(name: str) -> None:
    """And no bad one has a prompt, wherever it is cut."""
    raw = (CONSOLES / name).read_bytes()
    for end in range(0, len(raw), 7):
        text = console.clean(raw[:end])
        assert name == "good" or console.prompt(text) is None
        assert VERDICTS[name] or console.hopeless(text, "bios") is None


def test_emergency_mode_names_what_has_failed() -> None:
    lines = "[ TIME ] Timed out waiting for device dev-vdb1 - /dev/vdb1.\n[DEPEND] Dependency failed for data.mount.\n"
    verdict = console.hopeless(console.clean(lines.encode()) + text_of("emergency"), "bios")
    assert verdict and verdict.problem.endswith("emergency mode: Timed out waiting for device dev-vdb1 - /dev/vdb1.")


@pytest.mark.parametrize(
    "name, obeyed, problem",
    [
        ("grub-only", True, "says nothing on a serial console"),
        ("grub-only", False, "kernel says nothing on the serial console"),
        ("hang", True, "no login on the serial console"),
        ("hang", False, "it hangs: the last that it said is '[    9.677991] ledtrig-cpu"),
    ],
)
def test_silence(name: str, obeyed: bool, problem: str) -> None:
    assert problem in console.silent(text_of(name), "", obeyed).problem


def dump_of(lines: list[str]) -> str:
    """Return what `xp /1000hx 0xb8000` prints of a screen."""
    words = [f"0x07{ord(character):02x}" for line in lines for character in line.ljust(80)]
    rows = range(0, len(words), 8)
    return "\r\n".join(f"{0xB8000 + 2 * start:016x}: {' '.join(words[start : start + 8])}" for start in rows)


def test_a_screen() -> None:
    lines = ["SeaBIOS (version 1.16.2)", "", "Booting from Hard Disk...", *[""] * 21, "x" * 80]
    text = console.screen(dump_of(lines))
    assert text.split("\n") == lines
    assert console.screen(dump_of(["\0\x1b[2J\xff", *[""] * 24])).strip() == "[2J"
    assert console.screen("") == console.screen("unknown command") == ""


@pytest.mark.parametrize("line", ["debian login: ", "[    1.0] Linux version 6.1"])
def test_a_guest_that_speaks_on_its_screen(line: str) -> None:
    for obeyed in (True, False):
        assert "on its screen" in console.silent(text_of("grub-only"), line, obeyed).problem
    problem = console.silent(text_of("hang"), line, False).problem
    assert ("login prompt is on its screen" if "login" in line else "hangs") in problem


def test_a_console_that_says_nothing() -> None:
    assert "nothing at all" in console.silent("", "", False).problem
    assert console.last_lines("") == []


# What loaders, kernels and systems say at their end -> its verdict
ENDS = {
    "[    1.0] Initramfs unpacking failed: write error\n[    1.2] Kernel panic - not syncing: VFS": "too little",
    "error: out of memory.\n[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs": "too little",
    "[    2.0] Kernel panic - not syncing: System is deadlocked on memory\n": "too little",
    "Failed to execute /init (error -8)\n[ 1.0] Kernel panic - not syncing: No working init": "another architecture",
    "Fatal glibc error: CPU does not support x86-64-v3\n[ 1.0] Kernel panic - not syncing: Attempted": "newer CPU",
    "panic: running without device atpic requires a local APIC\ncpuid = 0\n": "panics: running without device atpic",
    "Mounting from ufs:/dev/vtbd9 failed with error 19.\n\nmountroot> ": "does not find the root filesystem",
    "can't load 'kernel'\n\nType '?' for a list of commands\nOK ": "does not find what it is to load: can't load",
    "error: file `/boot/vmlinuz' not found.\nerror: ../loader/linux.c:1:you need to load the kernel first.\n": "kernel",
    "Could not find kernel image: /boot/vmlinuz\nboot: ": "does not find what it is to load: Could not find kernel",
    "No DEFAULT or UI configuration directive found!\nboot: ": "does not find what it is to load: No DEFAULT",
    "Error loading \\vmlinuz-6.1: Not found\n": "does not find what it is to load: Error loading",
    "/dev/vda1: UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY.\n(initramfs) ": "filesystem is damaged",
    "Welcome to emergency mode! After logging in, type\n": "emergency mode",
    "[!!!!!!] Failed to mount API filesystems.\n": "its systemd gives up: Failed to mount",
    "Missing operating system\n": "no boot loader",
}
GOES_ON = (
    "error: no such device: 1234-5678.\n",  # GRUB, of a place that it looks at first
    "error: file `/boot/grub/fonts/unicode.pf2' not found.\n",
    "Failed to open \\EFI\\BOOT\\mmx64.efi - Not Found\n",  # shim
    "[   9.0] Out of memory: Killed process 7 (x)\n",
    "[   9.0] x[7]: panic: runtime error\npanic: runtime error: index out of range\n",
    "[   9.0] Initramfs unpacking failed: Decoding failed\n",
)


@pytest.mark.parametrize("text", ENDS)
def test_ends(text: str) -> None:
    verdict = console.hopeless(text, "bios")
    assert verdict and ENDS[text] in f"{verdict.problem}; {verdict.hint}"
    assert "{" not in verdict.problem + verdict.hint


@pytest.mark.parametrize("text", GOES_ON)
def test_no_end(text: str) -> None:
    assert console.hopeless(text, "bios") is None


def test_what_a_guest_says_is_cut() -> None:
    long = "x" * (1 << 18)
    verdict = console.hopeless(f"Kernel panic - not syncing: {long}", "bios")
    assert verdict and len(verdict.problem) < 300
    assert len(console.silent(f"[ 1.0] {long}", "", False).problem) < 300


MENU = "      Use the ^ and v keys to select which entry is highlighted.\n      Press enter to boot the selected OS\n"


@pytest.mark.parametrize(
    "text, screen, obeyed, problem",
    [
        ("[ 1.0] x\nweb1 login: \nwaits\n", "", False, "does not answer"),
        ("[ 1.0] Linux\n", "web1 login: ", True, "login prompt is on its screen"),
        (MENU, "", False, "waits in its menu"),
        ("", MENU, False, "waits in its menu"),
        ("SYSLINUX 6.04\nboot: ", "", False, "waits in its menu"),
        (f"{MENU}The highlighted entry will be executed automatically in 5s.", "", False, "hangs"),
        ("what no system known here says", "", False, "hangs: the last that it said is 'what no"),
    ],
)
def test_what_was_said_last(text: str, screen: str, obeyed: bool, problem: str) -> None:
    assert problem in console.silent(text, screen, obeyed).problem
    assert "--timeout" in console.silent("[ 1.0] x", "", False, speaks=True).hint


PROMPTS = {
    "\nDebian GNU/Linux 12 try-a ttyS0\n\ntry-a login: ": "try-a",
    "\r\n\x1b[?2004hlocalhost login: ": "localhost",
    "\nWelcome to Alpine Linux 3.20\nKernel 6.6 on an x86_64 (/dev/ttyS0)\n\nweb1.example login: ": "web1.example",
    "\nFreeBSD/amd64 (freebsd) (ttyu0)\n\nlogin: ": "",
    "\nfedora login: [   23.345678] random: crng init done\n": "fedora",
    "\nLast login: Mon Nov 30 12:00:00 on ttyS0": None,
    "\nlast login: Mon": None,
    "\n[  OK  ] Started systemd-logind.service - User Login Management.\n": None,
    "\ncloud-init: login:x": None,
    "\nroot@try-a's login: ": None,
}


@pytest.mark.parametrize("raw", PROMPTS)
def test_prompts(raw: str) -> None:
    assert console.prompt(console.clean(raw.encode())) == PROMPTS[raw]


def test_the_prompt_of_a_real_guest() -> None:
    assert console.prompt(text_of("good")) == "image"


def test_nothing_is_left_that_a_terminal_obeys() -> None:
    raw = b"\x1b[31mred\x1b[0m \x1b]0;title\x07\x1b]52;c;aGk=\x1b\\\x1bP1$r\x1b\\\x1bc\x1b(B\x9b31m a\0b"
    text = console.clean(raw + b"\x1b[2;1Hnext\r\n\x1b")
    assert "\x1b" not in text and "\0" not in text
    assert "title" not in text and "aGk" not in text
    assert text.startswith("red ") and text.endswith("ab\nnext\n")
    for name in VERDICTS:
        assert "\x1b" not in text_of(name)


def test_a_console_is_cleaned_in_linear_time() -> None:
    """Whoever controls the guest chooses what it says."""
    for piece in (b"\x1b[", b"\x1b]", b"\x1b[;", b"[ 1.1] ", b"login: ", b"\r", b"Kernel panic"):
        text = console.clean(piece * (1 << 16))
        console.prompt(text)
        console.hopeless(text, "bios")
        console.silent(text, text, False)
