"""A signal in any phase: the right status, soon; nothing is left by the kernel; the same call works then.

That nothing is left is the check after each test; here the call is stopped in a phase by something that waits:
a settings file, a tool in PATH, a hook.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trees
from support import PATH, Call, Gate, Node, attached, digest, partitions, run, session, wait_until

MakeDisk = Callable[..., Path]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]
# phase -> program that waits before it does its work
TOOLS = {"table": "sfdisk", "filesystem": "mkfs.ext4", "swap": "mkswap", "deploy": "tar", "decompress": "zstd"}
PHASES = ["settings", *TOOLS, "hook"]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "fake/gate")


@pytest.fixture
def stopped_in(
    node: Node, disk: MakeDisk, images: Path, tmp_path: Path, gate: Gate
) -> Callable[..., tuple[Call, Path, dict]]:
    """Start a create that waits in a phase; gives the call, its disk and its environment."""

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
            # only when it works on the disk or the archive, not when asked for its version or a few bytes
            node.write(fake, f'#!/bin/sh\n{wait}exec {real} "$@"\n')
            fake.chmod(0o755)
        call = node.start("create", environment)
        call.wait_for(gate.reached, f"in {phase}")
        return call, target, environment

    yield start


def assert_ended(call: Call, number: int) -> None:
    """Ended with 128+n (a shell's view of SIGKILL) in time; and what it started is gone."""
    result = call.result()
    assert result.status == 128 + number, result.log
    wait_until(lambda: not session(call.process.pid), "all processes of the call are gone")


# Every phase gets one that can be handled and the one that cannot; all of them, to the process or to its group, come
# in one phase: the supervisor that answers does not know the phase.
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
    # a new run finds nothing in its way
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
    """An impatient operator, or Ganeti's SIGTERM to a whole group, which the supervisor passes on again."""
    call, _, _ = stopped_in("hook", "trap '' TERM")
    for _ in range(3):
        call.kill(signal.SIGTERM, group=True)
    assert_ended(call, signal.SIGTERM)


def test_signal_after_the_last_write(gate: Gate, stopped_in: Callable[..., tuple[Call, Path, dict[str, str]]]) -> None:
    """Who is told that a create has failed must not find a disk that boots: such a signal comes too late."""
    call, target, _ = stopped_in("hook")
    with Path(loops_over(target)[0]).open("rb") as loop:  # while it has a user, the create waits for its end
        gate.open()
        fcntl.flock(loop, fcntl.LOCK_SH)  # had when the create has let go of it
        call.kill(signal.SIGTERM)
        wait_until(lambda: not pending(call, signal.SIGTERM), "the supervisor has passed it on")
    result = call.result().ok()
    assert result.log.splitlines()[-1].endswith("is ready to boot")
    assert partitions(target)[-1].content["TYPE"] == "ext4"


def loops_over(disk: Path) -> list[str]:
    return run("losetup", "--noheadings", "--output", "NAME", "--associated", disk).split()


def pending(call: Call, number: signal.Signals) -> bool:
    """Whether a process of the call has still to take such a signal (proc_pid_status(5))."""
    masks: list[str] = []
    for process in session(call.process.pid):
        with suppress(OSError):  # it has ended
            text = Path("/proc", process.split()[1], "status").read_text()
            masks += re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", text, re.MULTILINE)
    return any(int(mask, 16) & 1 << number - 1 for mask in masks)


def test_block_device_is_free_after_kill(node: Node, disk: MakeDisk, gate: Gate) -> None:
    """What Ganeti does next with the volume of a killed create must not find it busy."""
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
    """Nobody has read its output for a while: the words are whole, and the status is theirs."""
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
