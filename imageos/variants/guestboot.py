"""Boot a disk in qemu as Ganeti's KVM would, wait for the login prompt on its serial console, and power it off.

qemu has a room of its own, as every program that reads what a stranger has made, with the disk and nothing else of the
node. It talks to us by pipes and a socket, and ends with us: its PID namespace is in ours.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from imageos import log
from imageos.errors import Failure
from imageos.node import linux
from imageos.node.children import PIPE_SIZE
from imageos.node.confinement import KVM, Room
from imageos.node.programs import require
from imageos.run import Command, Finished, pipeline
from imageos.variants import console
from imageos.variants.console import Verdict

ARCHITECTURES = ("x86_64", "x86")
PROGRAM = "qemu-system-x86_64"
MEMORY = console.MEMORY
ADDRESS_SPACE = 8 << 30  # bytes that qemu may take: the guest's memory, translated code, stacks
MAC = "52:54:00:00:00:01"
CHIPSETS = {"bios": "pc", "uefi": "q35"}
# UEFI and the variables that it begins with: of Debian, and of older ones, then of Fedora
UEFI = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
)
VARIABLES = "variables.fd"  # the guest's own
SERIAL = "serial"  # what its pipes are called, as qemu wants them: with .in and .out
# Accelerator and CPU, one after the other. Without KVM a guest has all that qemu can emulate, as RHEL 9 needs more than
# the first x86-64 had. But kernels panic now and then under emulation; Linux 6.12 does so each second time where
# qemu 7.2 (Debian 12) emulates the flags of cmpxchg16b.
ATTEMPTS = (("kvm", "host"), ("tcg", "max"), ("tcg", "max,-cx16"))
ACCELERATORS = {"kvm": "KVM", "tcg": "software emulation"}
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

POWER_OFF = 60.0  # seconds that a guest may take to power off
PRESSED_AGAIN = 5.0  # seconds until a button or a key is pressed once more: nobody may have listened yet
KEYBOARD = 30.0  # seconds until Ctrl-Alt-Delete is pressed, which every init knows
LOOKS = 2.0  # seconds between two looks at the screen, on which BIOS and boot loaders speak
SCREEN = "xp /1000hx 0xb8000"  # 25 lines of 80 characters with their colours: VGA's text mode
SETTLED = 3.0  # seconds without a word, after which what a hopeless guest says is complete
SPEAKS = 20.0  # seconds until any firmware has said something: a KVM under which it does not does not work
FEW_RESETS = 1  # SELinux labels a disk at the first boot, and starts it again
MOST_RESETS = 3  # that are waited for
MOST_SAID = 1 << 18  # bytes of a console that are kept


class Booted(NamedTuple):
    """A guest that came up, and how that went; times in seconds."""

    name: str  # in its prompt
    accelerator: str
    booted_in: float
    powered_off_in: float | None  # None: it did not when asked to


class NoPrompt(Failure):
    """The guest did not come up."""


def check(arch: str, firmware: str) -> None:
    """Fail if this node cannot boot a guest of the architecture `arch` by `firmware`, bios or uefi."""
    if arch not in ARCHITECTURES:
        raise Failure(f"an image for {arch} cannot be tried: only those for {' and '.join(ARCHITECTURES)} can")
    require(PROGRAM)
    if firmware == "uefi" and not uefi_files():
        raise Failure(f"missing on this node: {UEFI[0][0]}", hint="install ovmf")


def uefi_files() -> tuple[str, str] | None:
    return next((files for files in UEFI if all(map(os.path.exists, files))), None)


def boot(disk: str, firmware: str, timeout: float, others: str | None = None) -> Booted:
    """Boot the block device `disk`, and return when the guest is off; NoPrompt says why it did not come up.

    `timeout` in seconds is for the login prompt; to power off it may take POWER_OFF more. `others` is the hint if the
    firmware finds no boot loader, but another one might.
    """
    attempts = ATTEMPTS if os.path.exists(KVM) else ATTEMPTS[1:]
    for number, (accelerator, cpu) in enumerate(attempts, 1):
        session, ended = _run(disk, firmware, accelerator, cpu, timeout)
        if accelerator == "kvm" and not session.has_spoken:
            said = console.last_lines(ended.stderr, 1) if ended else ()
            log.info(
                f"KVM does not work on this node, so software emulation has to do{': ' if said else ''}{''.join(said)}"
            )
        elif accelerator == "kvm" or number == len(attempts) or not session.panics:
            break
        else:
            log.info("its kernel panics, which may be due to the emulation: it is booted once more")
    if ended and ended.status:
        raise ended.failure()
    if session.name is None:
        verdict = session.judge()
        hint = others if others and verdict.problem == console.NO_LOADER else verdict.hint
        raise NoPrompt(f"the guest has no login prompt: {verdict.problem}", hint, session.last_lines())
    off = session.ended - session.asked if session.is_off else None
    return Booted(session.name, ACCELERATORS[accelerator], session.asked - session.started, off)


def _run(disk: str, firmware: str, accelerator: str, cpu: str, timeout: float) -> tuple[_Session, Finished | None]:
    """Boot it, and return what was learnt when qemu has ended; None: it was ended."""
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            stack.enter_context(end)
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix="boot.", dir=os.environ.get("TMPDIR")))
        # for the serial port pipes, not a socket, in which every byte would take the room of a packet
        serial, keys = (stack.enter_context(_pipe(f"{work}/{SERIAL}.{end}")) for end in ("out", "in"))
        argv = machine(firmware, accelerator, cpu, disk)
        argv += ["-chardev", f"pipe,id=serial,path={SERIAL}", "-serial", "chardev:serial"]
        argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        if firmware == "uefi":
            with open(_uefi()[1], "rb") as original, open(f"{work}/{VARIABLES}", "xb") as own:
                shutil.copyfileobj(original, own)
            argv += ["-drive", f"if=pflash,format=raw,readonly=on,file={_uefi()[0]}"]
            argv += ["-drive", f"if=pflash,format=raw,file={VARIABLES}"]
        room = Room([disk, *([KVM] if accelerator == "kvm" else [])], work=work, memory=ADDRESS_SPACE)
        session = _Session(serial, keys, ours, firmware, accelerator, timeout)
        command = Command(argv, room, keep=[theirs.fileno()])
        try:
            ended = pipeline(command, tick=session.step)[0]
        except _Over:
            ended = None
        session.end(itself=ended is not None and ended.status == 0)
        return session, ended


@contextmanager
def _pipe(path: str) -> Iterator[int]:
    """Make a pipe with a name; yield a descriptor that does not wait for the other end."""
    os.mkfifo(path, 0o600)
    with linux.closing(os.open(path, os.O_RDWR | os.O_NONBLOCK)) as descriptor:
        linux.enlarge_pipe(descriptor, PIPE_SIZE)
        yield descriptor


def machine(firmware: str, accelerator: str, cpu: str, disk: str) -> list[str]:
    """Return the command of a machine with one disk, one serial port, and a network where it is alone with qemu."""
    argv = [PROGRAM, "-nodefaults", "-no-user-config", "-sandbox", SANDBOX, "-display", "none"]
    argv += ["-machine", CHIPSETS[firmware], "-accel", accelerator, "-cpu", cpu]
    argv += ["-m", str(MEMORY), "-boot", "strict=on", "-device", "VGA"]
    argv += ["-drive", f"file={disk},format=raw,if=none,id=disk,cache=unsafe,discard=unmap"]
    argv += ["-device", "virtio-blk-pci,drive=disk,bootindex=0"]
    argv += ["-netdev", "user,id=net,restrict=on", "-device", f"virtio-net-pci,netdev=net,mac={MAC},romfile="]
    return argv


def typed(firmware: str, disk: str) -> str:
    """Return the command by which an operator boots the file `disk`, with its console in the terminal."""
    argv = [PROGRAM, "-machine", f"{CHIPSETS[firmware]},accel=kvm:tcg", "-cpu", "max", "-m", str(MEMORY), "-nographic"]
    argv += ["-drive", f"file={disk},format=raw,if=virtio", "-nic", "user,model=virtio-net-pci,restrict=on"]
    if firmware == "uefi":
        argv += ["-drive", f"if=pflash,format=raw,readonly=on,file={_uefi()[0]}"]
        argv += ["-drive", f"if=pflash,format=raw,snapshot=on,file={_uefi()[1]}"]
    return shlex.join(argv)


def _uefi() -> tuple[str, str]:
    files = uefi_files()
    assert files  # `check` has looked
    return files


class _Over(Exception):
    """There is nothing more to be learnt of this guest."""


class _Session:
    """A running guest: what it says, and what it is asked."""

    def __init__(
        self, serial: int, keys: int, qmp: socket.socket, firmware: str, accelerator: str, timeout: float
    ) -> None:
        self._serial, self._keys, self._qmp = serial, keys, qmp
        self._firmware, self._accelerator, self._timeout = firmware, accelerator, timeout
        qmp.setblocking(False)
        self._answers = b""
        self.raw = b""  # all that the console said since the last reset
        self.text = ""  # the same, to be read
        self.screen = ""
        self._answer: bytes | None = None  # what the console has said since Enter was pressed
        self._before: tuple[str, str] = "", ""  # text and screen at the last reset
        self.name: str | None = None  # in its prompt
        self.is_off = False  # it powered itself off
        self._verdict: Verdict | None = None
        self._resets = 0
        self.started = self._heard = self.ended = time.monotonic()
        self.asked = self._pressed = 0.0  # to power off
        self._looked = 0.0

    def step(self) -> None:
        """Take what has come, and do what is due; _Over ends the guest."""
        self._listen()
        now = time.monotonic()
        if self.asked:
            self._wait_for_end(now)
        else:
            self._wait_for_prompt(now)

    def end(self, itself: bool) -> None:
        """Hear the last of it; `itself`: nobody has ended qemu, so the guest is off."""
        self._listen()
        self.is_off = itself
        self.ended = time.monotonic()

    def judge(self) -> Verdict:
        """Return why there was no prompt."""
        if self._verdict:
            return self._verdict
        if self.is_off and not self.asked:
            return Verdict("it powers itself off", console.SEE)
        if self._resets > FEW_RESETS:
            return self._loops()
        return self._hopeless() or console.silent(
            self.text, self.screen, self.is_off, self._heard + SETTLED > self.started + self._timeout
        )

    @property
    def has_spoken(self) -> bool:
        return self._heard > self.started

    @property
    def panics(self) -> bool:
        return self.name is None and self.judge().problem.startswith(console.PANIC)

    def last_lines(self) -> list[str]:
        text, screen = (self.text, self.screen) if self.text.strip() or self.screen else self._before
        shown = [f"(screen) {line}" for line in console.last_lines(screen)]
        return [*shown, *console.last_lines(text)]

    def _hopeless(self) -> Verdict | None:
        return console.hopeless(f"{self.screen}\n{self.text}", self._firmware)

    def _loops(self) -> Verdict:
        text, screen = self._before
        why = console.hopeless(f"{screen}\n{text}", self._firmware)
        again = "it starts again and again"
        return Verdict(f"{why.problem}, and {again}", why.hint) if why else Verdict(again, console.SEE)

    def _wait_for_prompt(self, now: float) -> None:
        self._knock(now)
        if self.name is not None or now > self.started + self._timeout:
            self.asked = now
            self._press(now)
            return
        if self._firmware == "bios" and now > self._looked + LOOKS:
            self._looked = now
            self._say("human-monitor-command", **{"command-line": SCREEN})
        if not self.has_spoken and self._accelerator == "kvm" and now > self.started + SPEAKS:
            raise _Over
        if self._resets > MOST_RESETS:
            self._verdict = self._loops()
        elif now > self._heard + SETTLED:
            self._verdict = self._hopeless()
        if self._verdict:
            raise _Over

    def _knock(self, now: float) -> None:
        """Press Enter at what may be a login prompt: a getty asks once more, a message of the boot does not."""
        if self._answer is not None:
            self.name = console.prompt(console.clean(self._answer))
        if console.LOGIN in self.text and now > self._pressed + PRESSED_AGAIN:
            self._pressed, self._answer = now, b""
            with suppress(OSError):  # nobody has read what was typed before
                os.write(self._keys, b"\r")

    def _wait_for_end(self, now: float) -> None:
        if now > self.asked + min(POWER_OFF, self._timeout):
            raise _Over
        if now > self._pressed + PRESSED_AGAIN:
            self._press(now)
            if self.name is not None and now > self.asked + KEYBOARD:  # of a kernel that hangs it proves nothing
                keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
                self._say("send-key", keys=keys)

    def _press(self, now: float) -> None:
        self._pressed = now
        self._say("system_powerdown")

    def _say(self, command: str, **arguments: object) -> None:
        with suppress(OSError):  # it has just ended
            self._qmp.send(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def _listen(self) -> None:
        said = _received(self._serial)
        if said:
            self._heard = time.monotonic()
            self.raw = (self.raw + said)[-MOST_SAID:]
            if self._answer is not None:
                self._answer = (self._answer + said)[-MOST_SAID:]
            self.text = console.clean(self.raw)
        *lines, self._answers = (self._answers + _received(self._qmp.fileno())).split(b"\n")
        try:
            if len(self._answers) > MOST_SAID:
                raise ValueError
            for line in lines:
                answer = json.loads(line)
                if "QMP" in answer:
                    self._say("qmp_capabilities")
                if isinstance(answer.get("return"), str):
                    self._see(console.screen(answer["return"]))
                self._note(answer.get("event"), answer.get("data") or {})
        except (ValueError, AttributeError, TypeError, RecursionError):  # the guest may have taken it over
            raise Failure(f"{PROGRAM} does not answer as it should") from None

    def _see(self, screen: str) -> None:
        if screen and screen != self.screen:  # in a graphics mode there is no text
            self._heard = time.monotonic()
            self.screen = screen

    def _note(self, event: object, data: dict[str, object]) -> None:
        if event == "RESET" and data.get("guest"):
            if self.asked and self.name is not None:  # Ctrl-Alt-Delete: all is written
                self._say("quit")
            self._resets += 1
            if self.text.strip() or self.screen:
                self._before = self.text, self.screen
            self.raw, self.text, self.screen, self._answer = b"", "", "", None


def _received(descriptor: int) -> bytes:
    """Return what has come, but not all at once of who floods us; empty if that is nothing."""
    try:
        return os.read(descriptor, PIPE_SIZE)
    except BlockingIOError:
        return b""
