"""A signal in any phase: the right status, soon; the kernel keeps nothing; the same call then works.

The check after each test finds leftovers. These tests stop the call in a phase by something that waits:
a settings file, a tool in PATH, a hook.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trees
from hookfiles import CHECKOUT
from support import HANGS, PATH, Call, Gate, Node, attached, digest, partitions, run, session, wait_until

MakeDisk = Callable[..., Path]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL]
# phase -> program that waits before its work
TOOLS = {"table": "sfdisk", "filesystem": "mkfs.ext4", "swap": "mkswap", "deploy": "tar", "decompress": "zstd"}
PHASES = ["settings", *TOOLS, "hook"]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "fake/gate")


@pytest.fixture
def stopped_in(
    node: Node, disk: MakeDisk, images: Path, tmp_path: Path, gate: Gate
) -> Callable[..., tuple[Call, Path, dict]]:
    """Start a create that waits in a phase; return the call, its disk and its environment."""

    def start(phase: str, before_waiting: str = "") -> tuple[Call, Path, dict[str, str]]:
        wait = f"{before_waiting}\n{gate.shell}\n"
        node.image(images / "small.tar.zst", f"same-{trees.ARCH}.tar.zst")
        target = disk()
        environment = node.environment(target, OSP_IMAGE_NAME="same", PATH=f"{tmp_path}/fake:{PATH}")
        if phase == "settings":
            node.variant("default", wait)
        elif phase == "hook":
            node.hook("waits", f"#!/bin/sh\n{wait}")
        else:
            fake = tmp_path / "fake" / TOOLS[phase]
            real = run("sh", "-c", f"PATH={PATH} command -v {fake.name}").strip()
            # only when it works on the disk or archive, not for its version or for a few bytes
            node.write(fake, f'#!/bin/sh\n{wait}exec {real} "$@"\n')
            fake.chmod(0o755)
        call = node.start("create", environment)
        call.wait_for(gate.reached, f"in {phase}")
        return call, target, environment

    yield start


def assert_ended(call: Call, number: int) -> None:
    """Fail unless it ends with 128+n (a shell's view of SIGKILL) in time, and its children are gone."""
    result = call.result()
    assert result.status == 128 + number, result.log
    wait_until(lambda: not session(call.process.pid), "all processes of the call are gone")


# Every phase gets SIGTERM and SIGKILL. One phase gets all signals, to the process and to its group, which suffices:
# the supervisor that reacts does not know the phase.
MOMENTS = [
    *((phase, number, False) for phase in PHASES for number in (signal.SIGTERM, signal.SIGKILL)),
    *(("deploy", number, group) for number in SIGNALS for group in (False, True)),
]


@pytest.mark.parametrize(("phase", "number", "group"), dict.fromkeys(MOMENTS))
def test_signal(
    phase: str,
    number: signal.Signals,
    group: bool,
    node: Node,
    tmp_path: Path,
    gate: Gate,
    stopped_in: Callable[..., tuple[Call, Path, dict[str, str]]],
) -> None:
    call, target, environment = stopped_in(phase)
    before = digest(target)
    call.kill(number, group)
    assert_ended(call, number)
    if number != signal.SIGKILL:
        assert number.name in call.log().splitlines()[-1], call.log()
    if phase == "settings":
        assert digest(target) == before, "written to before the settings were known"
    if number != signal.SIGKILL or group:
        return
    # a new run must succeed
    gate.open()
    run("rm", "-rf", tmp_path / "fake")
    node.variant("default")
    Path("/etc/ganeti/instance-image/hooks/waits").unlink(missing_ok=True)
    node.call("create", environment).ok()
    assert partitions(target)[-1].content["TYPE"] == "ext4"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", ["settings", "filesystem", "decompress", "hook"])
def test_children_that_ignore_signals(
    phase: str, number: signal.Signals, stopped_in: Callable[..., tuple[Call, Path, dict[str, str]]]
) -> None:
    call, _, _ = stopped_in(phase, "trap '' TERM INT HUP")
    call.kill(number)
    assert_ended(call, number)


@pytest.mark.parametrize("phase", ["filesystem", "hook"])
def test_terminated_run_disarms(phase: str, stopped_in: Callable[..., tuple[Call, Path, dict[str, str]]]) -> None:
    from support import signatures

    call, target, _ = stopped_in(phase)
    call.kill(signal.SIGTERM)
    assert_ended(call, signal.SIGTERM)
    assert signatures(target) == []
    with target.open("rb") as file:
        assert not any(file.read(1 << 20))


def test_terminated_twice(stopped_in: Callable[..., tuple[Call, Path, dict[str, str]]]) -> None:
    """An impatient operator, or Ganeti's SIGTERM to a whole group, which the supervisor forwards again."""
    call, _, _ = stopped_in("hook", "trap '' TERM")
    for _ in range(3):
        call.kill(signal.SIGTERM, group=True)
    assert_ended(call, signal.SIGTERM)


MISSES_TWO = """
import os, signal
from imageos.node import isolation
isolation.enter()
came = []
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
os.write(1, b"ready")
while len(came) < 3:
    signal.pause()
os._exit(7)
"""


def test_signal_that_was_missed_comes_again() -> None:
    """One that comes just before a system call that blocks does not end that call."""
    process = subprocess.Popen([sys.executable, "-c", MISSES_TWO], stdout=subprocess.PIPE, cwd=CHECKOUT)
    Call.unburied.append(process)
    assert process.stdout and process.stdout.read(5) == b"ready"
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANGS) == 7
    process.stdout.close()


def test_signal_after_the_last_write(gate: Gate, stopped_in: Callable[..., tuple[Call, Path, dict[str, str]]]) -> None:
    """After a reported failure the disk must not boot: such a signal comes too late to report one."""
    call, target, _ = stopped_in("hook")
    with Path(loops_over(target)[0]).open("rb") as loop:  # create waits for this user
        gate.open()
        fcntl.flock(loop, fcntl.LOCK_SH)  # we get this lock when the create has released its own
        call.kill(signal.SIGTERM)
        wait_until(lambda: not pending(call, signal.SIGTERM), "the supervisor has passed it on")
    result = call.result().ok()
    assert result.log.splitlines()[-1].endswith("is ready to boot")
    assert partitions(target)[-1].content["TYPE"] == "ext4"


def loops_over(disk: Path) -> list[str]:
    return run("losetup", "--noheadings", "--output", "NAME", "--associated", disk).split()


def pending(call: Call, number: signal.Signals) -> bool:
    """Return True if a process of the call has not handled such a signal yet (proc_pid_status(5))."""
    masks: list[str] = []
    for process in session(call.process.pid):
        with suppress(OSError):  # it has ended
            text = Path("/proc", process.split()[1], "status").read_text()
            masks += re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", text, re.MULTILINE)
    return any(int(mask, 16) & 1 << number - 1 for mask in masks)


def test_block_device_is_free_after_kill(node: Node, disk: MakeDisk, gate: Gate) -> None:
    """Ganeti's next step with the volume of a killed create must not find it busy."""
    node.hook("waits", f"#!/bin/sh\n{gate.shell}\n")
    with attached(disk()) as device:
        call = node.start("create", node.environment(device))
        call.wait_for(gate.reached, "the hook runs")
        call.kill(signal.SIGKILL)
        assert_ended(call, signal.SIGKILL)
        wait_until(lambda: exclusively(device), "the volume is free")


def exclusively(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("number", SIGNALS[:3], ids=lambda number: number.name)
def test_signal_while_it_says_why_it_failed(number: signal.Signals, node: Node) -> None:
    """Nobody reads its output for a while: the messages are complete, and the status belongs to them."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n")
    os.set_blocking(writer, True)
    process = subprocess.Popen([node.imageos, "umount-disks", "--here", "../x"], stdout=writer, stderr=writer)
    Call.unburied.append(process)
    os.close(writer)
    waits = Path(f"/proc/{process.pid}/wchan")
    wait_until(lambda: "pipe_write" in waits.read_text(), "it wants to say why it failed")
    process.send_signal(number)
    with open(reader) as output:
        assert output.read().lstrip("\n") == "imageos: '../x' cannot be the name of an instance\n"
    assert process.wait() == 1
