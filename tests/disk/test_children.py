"""Processes between their fork and their program: nobody waits until that is there."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from imageos.errors import Failure, Interrupted
from imageos.guests import sandbox
from imageos.node import isolation, linux
from imageos.node.children import SIGNALS, Program, in_child, meanwhile, start
from imageos.run import Command, pipeline, run


def is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def wait() -> None:
    time.sleep(60)


def test_programs_of_a_guest_are_not_looked_for_on_the_node(tmp_path: Path) -> None:
    program = tmp_path / "bin/of-the-guest"
    program.parent.mkdir()
    program.write_bytes(b"\0")
    program.chmod(0o755)
    with pytest.raises(Failure, match=r"^of-the-guest: Exec format error$"):
        run(Command(["of-the-guest"], lambda: os.chroot(tmp_path), env={"PATH": "/sbin:/bin"}))
    with pytest.raises(Failure, match=r"^not-there: not found$"):
        run(Command(["not-there"], lambda: os.chroot(tmp_path), env={"PATH": "/sbin:/bin"}))


def test_nothing_is_imported_in_a_guest(tmp_path: Path) -> None:
    (tmp_path / "warnings.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")

    def enter() -> None:
        sys.modules.pop("warnings", None)  # not every Python needs it before
        sys.path[:] = [str(tmp_path)]

    pipeline(Command(["true"], enter))
    assert not (tmp_path / "imported").exists()


def fail(error: Exception) -> Callable[[], None]:
    def enter() -> None:
        raise error

    return enter


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (Command(["true", "a\0b"]), "ValueError: embedded null byte"),
        (Command(["true", "x" * (1 << 18)]), "Argument list too long"),
        (Command(["true"], fail(RuntimeError("lost"))), "RuntimeError: lost"),
        (Command(["true"], fail(OSError("no number"))), "OSError: no number"),
    ],
    ids=["NUL", "long", "ours", "unnumbered"],
)
def test_why_it_has_not_started(command: Command, why: str) -> None:
    with pytest.raises(Failure, match=f"^true: {why}$"):
        run(command)


def test_objects_of_the_parent_are_left_alone() -> None:
    """Else their finalizers would run twice."""
    assert pipeline(Command(["true"], lambda: os._exit(gc.isenabled())))[0].status == 0


def test_end_of_a_leader_that_leads_nothing_yet() -> None:
    with ExitStack() as stack:
        program = Program(["true"], {"PATH": os.defpath}, wait, (0, 1, 2), (), None, apart=False, leads=True)
        process = start(stack, program)
    assert not is_there(process.pid)


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let a signal come with each fork; yield the PIDs."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)}
    isolation.handle_signals()
    made: list[int] = []
    real = os.fork

    def fork() -> int:
        child = real()
        if child:
            made.append(child)
            signal.raise_signal(signal.SIGTERM)
        return child

    monkeypatch.setattr(os, "fork", fork)
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


CHILDREN: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "our own code": lambda: in_child(lambda _file, _write: wait(), os.open("/dev/null", os.O_RDONLY)),
    "a call": lambda: meanwhile(wait),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_signal_while_a_child_is_made(name: str, interrupting: list[int]) -> None:
    with pytest.raises(Interrupted), CHILDREN[name]():
        pass
    assert interrupting and not is_there(interrupting[0])


def test_guest_ends_with_a_parent_that_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may end the process that starts the guest's process 1, before this can learn of it by a signal."""
    (go, let_go), (said, say) = os.pipe(), os.pipe()
    real = linux.die_with_parent

    def die_with_parent() -> None:
        if os.getpid() == 1:
            os.write(say, b"here")
            os.read(go, 1)
        real()

    monkeypatch.setattr(linux, "die_with_parent", die_with_parent)
    child = os.fork()
    if not child:
        try:
            linux.unshare(linux.CLONE_NEWPID)
            sandbox._become_first_process()
            os.write(say, b" and goes on")
        finally:
            os._exit(0)
    os.close(say)
    assert os.read(said, 100) == b"here"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.write(let_go, b"x")
    assert os.read(said, 100) == b""
    for descriptor in (go, let_go, said):
        os.close(descriptor)
