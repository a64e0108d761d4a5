"""The only module that starts programs.

Lists only, never a shell string; stdin closed unless given; a whitelisted environment; output captured
and bounded; every stage of a pipeline counts; children are killed when we leave early.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import selectors
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import BinaryIO, NamedTuple

from imageos import log, preload
from imageos.causes import cause
from imageos.errors import Failure, TimedOut, signal_name
from imageos.node import children, confinement, linux
from imageos.node.children import PIPE, PIPE_SIZE, Process
from imageos.node.confinement import NOTHING, Room
from imageos.node.programs import DEFAULT_PATH, available, cannot_start, environment

# What is kept of a stream that we only want for messages; a hostile guest may print for ever.
OUTPUT_LIMIT = 1 << 20
MOST_AT_ONCE = 8
SHOWN_LIMIT = 1 << 16  # of that, what the debug log gets: an empty line becomes one of 16 bytes there
TICK = 0.5  # seconds between two calls of `tick`, at most


class Outside(Enum):
    """Programs with all rights of root, and the whole node in reach. All other programs of the node are confined."""

    GANETI = "gnt-cluster and gnt-instance ask Ganeti's daemons, over sockets and the network"
    SSH = "reaches other nodes, with root's keys"
    CREATE = "our own, called as Ganeti calls it: it makes its own namespaces"
    HOOK = "a site's own program: what it is there for is known to the site alone"
    SETTINGS = "a site's own shell files, which may read and call whatever they need"
    SHELL = "the operator's own, in mount-disks --shell"


class Command(NamedTuple):
    """A program of the node and what it has to itself; or one outside, or one that a function of its own confines.

    That function runs in the child, before the program.
    """

    argv: Sequence[str]
    room: Room | Outside | Callable[[], None] = NOTHING
    env: Mapping[str, str] | None = None  # default: `environment()`
    cwd: str | None = None  # of a program outside; the others are where their room is
    keep: Sequence[int] = ()  # descriptors that it inherits
    private: bool = False  # its output stays out of the debug log


class Finished(NamedTuple):
    """A process that has ended. `status` is negative for a signal, as in subprocess."""

    argv: Sequence[str]
    status: int
    stdout: bytes
    stderr: str

    def failure(self) -> Failed:
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        how = f"killed by {signal_name(-self.status)}" if self.status < 0 else f"exit status {self.status}"
        said = cause(self.argv[0], self.stderr, _text(self.stdout))
        message = f"{self.argv[0]} failed ({how})" + (f": {said}" if said else "")
        others = [line for line in lines[-10:] if line != said]
        return Failed(self, message, details=[f"$ {shlex.join(self.argv)}", *others])


class Failed(Failure):
    """A program failed: `finished` says how."""

    def __init__(self, finished: Finished, message: str, details: Sequence[str]) -> None:
        super().__init__(message, details=details)
        self.finished = finished


def run(
    command: Command,
    *,
    input: str | None = None,
    timeout: float | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run one command to its end and return what it printed; raise Failure unless its status is 0.

    The rest is as in `pipeline`.
    """
    finished = pipeline(command, input=input, timeout=timeout, on_line=on_line)[0]
    if finished.status != 0:
        raise finished.failure()
    return finished.stdout.decode("utf-8", "surrogateescape")


def pipeline(
    *commands: Command,
    stdin: int | None = None,
    input: str | None = None,
    timeout: float | None = None,
    longest: int | None = None,
    on_line: Callable[[str], None] | None = None,
    tick: Callable[[], None] | None = None,
    on_exit: Callable[[], None] | None = None,
    leaves: bool = False,
) -> list[Finished]:
    """Run commands with each one's stdout as the next one's stdin; judge nothing. `stdin` of the first: a descriptor.

    `timeout` in seconds and `longest`, the bytes that they may say: whoever takes more is ended, and that is a Failure.
    `on_line` gets each line that they say as it comes. `tick` is called when all have been started, and often from then
    on; `on_exit` when the last one has ended, while a process that it left behind may still hold its output open.
    With `leaves`, that process is not waited for.
    """
    with ExitStack() as stack:
        given = None if input is None else input.encode()
        processes = _start_all(stack, commands, stdin, given, [PIPE] * len(commands))
        return _finish(stack, commands, processes, timeout, longest, on_line, tick, on_exit, leaves)


def at_once(commands: Sequence[Command], timeout: float) -> list[Finished]:
    """Run commands, which say little, at the same time; judge nothing. `timeout` in seconds, for each."""
    finished: list[Finished] = []
    for first in range(0, len(commands), MOST_AT_ONCE):
        with ExitStack() as stack:
            some = commands[first : first + MOST_AT_ONCE]
            started = [_start_all(stack, [command], None, None, [PIPE]) for command in some]
            for command, processes in zip(some, started):
                finished += _finish(stack, [command], processes, timeout)
    return finished


@contextmanager
def output_of(
    *commands: Command, stdin: int | None = None, input: bytes | None = None
) -> Iterator[tuple[int, Callable[[], None]]]:
    """Run commands as in `pipeline`; yield the descriptor of the last one's stdout, and a function to call at its end.

    That function raises Failed unless every status is 0.
    """
    with ExitStack() as stack:
        errors = [stack.enter_context(_memory(OUTPUT_LIMIT)) for _ in commands]
        processes = _start_all(stack, commands, stdin, input, errors)

        def check() -> None:
            for process in processes[:-1]:
                process.stdout.close()
            for process in processes:
                process.status()  # until it has ended, it may have more to say
            # the position of a file from `_memory`, which the program writes to, is ours, too; it may be anywhere
            lengths = [min(os.lseek(error, 0, os.SEEK_CUR), OUTPUT_LIMIT) for error in errors]
            said = [_text(os.pread(error, length, 0)) for error, length in zip(errors, lengths)]
            ended = map(_finished, commands, processes, [b""] * len(commands), said)
            failed = [program for program in ended if program.status]
            # what stops because nobody reads any more is not at fault: who should have read is
            for culprit in ([program for program in failed if program.status != -signal.SIGPIPE] or failed)[:1]:
                raise culprit.failure()

        yield processes[-1].stdout.fileno(), check


def foreground(command: Command) -> int:
    """Run a command with our stdin, stdout and stderr, and return its status; negative for a signal."""
    log.debug(f"$ {shlex.join(command.argv)}")
    with ExitStack() as stack:
        return _start(stack, command, (0, 1, 2)).status()


# --- starting --------------------------------------------------------------------------------------------


def _start_all(
    stack: ExitStack, commands: Sequence[Command], stdin: int | None, input: bytes | None, errors: Sequence[int]
) -> list[Process]:
    """Start commands, each one's stdout the next one's stdin, each with its stderr, that end with `stack`.

    Then import what is needed later: they need a while to start.
    """
    log.debug("$ " + " | ".join(shlex.join(command.argv) for command in commands))
    processes: list[Process] = []
    if input is not None:
        stdin = stack.enter_context(_memory(len(input)))
        os.pwrite(stdin, input, 0)
    elif stdin is None:
        stdin, writer = os.pipe()
        stack.callback(os.close, stdin)
        os.close(writer)
    for command, stderr in zip(commands, errors):
        process = _start(stack, command, (stdin, PIPE, stderr))
        stdin = process.stdout.fileno()
        linux.enlarge_pipe(stdin, PIPE_SIZE)
        processes.append(process)
    preload.load()
    return processes


def _start(stack: ExitStack, command: Command, streams: tuple[int, int, int]) -> Process:
    """Start a process that ends with `stack`."""
    room, name = command.room, command.argv[0]
    env = dict(environment() if command.env is None else command.env)
    # told at once; but where a function leads, such as a guest, there are other programs
    if isinstance(room, (Room, Outside)) and "/" not in name and not available(name, env.get("PATH", DEFAULT_PATH)):
        raise cannot_start(name, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if isinstance(room, Room):
        env["TMPDIR"] = confinement.TEMPORARY
        enter = confinement.entering(room, env["PATH"], command.keep)
    else:
        enter = os.setpgrp if room is Outside.SETTINGS else (lambda: None) if isinstance(room, Outside) else room
    program = children.Program(
        command.argv,
        env,
        enter,
        streams,
        command.keep,
        command.cwd,
        apart=isinstance(room, Room),
        leads=room is Outside.SETTINGS,  # a shell has others work
    )
    return children.start(stack, program)


def _finish(
    stack: ExitStack,
    commands: Sequence[Command],
    processes: Sequence[Process],
    timeout: float | None,
    longest: int | None = None,
    on_line: Callable[[str], None] | None = None,
    tick: Callable[[], None] | None = None,
    on_exit: Callable[[], None] | None = None,
    leaves: bool = False,
) -> list[Finished]:
    """Take what the processes of one pipeline say until they have ended."""
    has_ended = False

    def at_exit() -> int:
        nonlocal has_ended
        has_ended = True
        _run_dry(processes)
        if on_exit:
            on_exit()
        return 0

    selector = stack.enter_context(selectors.DefaultSelector())
    pipes = [processes[-1].stdout, *(process.stderr for process in processes)]
    printed, *said = streams = [_Stream(pipe, on_line) for pipe in pipes]
    for pipe, stream in zip(pipes, streams):
        selector.register(pipe, selectors.EVENT_READ, stream.read)
    ended = os.pidfd_open(processes[-1].pid)  # readable once it has ended
    stack.callback(os.close, ended)
    selector.register(ended, selectors.EVENT_READ, at_exit)
    _attend(selector, commands[0].argv[0], timeout, longest, tick, lambda: leaves and has_ended)
    outputs = [*[b""] * (len(commands) - 1), bytes(printed.kept)]
    return [
        _finished(command, process, stdout, _text(stderr.kept))
        for command, process, stdout, stderr in zip(commands, processes, outputs, said)
    ]


# --- what they say ---------------------------------------------------------------------------------------


class _Stream:
    """The output from a pipe: the end of it is kept, and every line handed on."""

    def __init__(self, pipe: BinaryIO, on_line: Callable[[str], None] | None) -> None:
        self._pipe = pipe
        self._on_line = on_line
        self._line = bytearray()  # that has no end yet
        self.kept = bytearray()

    def read(self) -> int:
        """Take what is there, and return how many bytes that is."""
        data = os.read(self._pipe.fileno(), 1 << 16)
        self.kept += data
        if len(self.kept) > 2 * OUTPUT_LIMIT:
            del self.kept[:-OUTPUT_LIMIT]
        if self._on_line:
            self._line += data or (b"\n" if self._line else b"")
            # a carriage return ends a line of progress, and nothing where a newline follows
            *complete, rest = bytes(self._line).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            self._line[:] = rest[-OUTPUT_LIMIT:]
            for line in complete:
                self._on_line(_text(line))
        return len(data)


def _attend(
    selector: selectors.BaseSelector,
    who: str,
    timeout: float | None,
    longest: int | None,
    tick: Callable[[], None] | None,
    is_over: Callable[[], bool],
) -> None:
    """Call what is registered when there is something to read, until nothing is left to be read anywhere.

    Once it is over, take what is there, and wait for no more.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    said = 0
    while selector.get_map():
        if tick:
            tick()
        ready = selector.select(0 if is_over() else min(TICK, max(0.0, deadline - time.monotonic())))
        if is_over() and not ready:
            return
        if time.monotonic() >= deadline:
            raise TimedOut(f"{who} was ended: not finished after {timeout:.0f} s")
        for key, _ in ready:
            count = key.data()
            said += count
            if longest is not None and said > longest:
                raise Failure(f"{who} was ended: it printed more than {log.size(longest)}")
            if not count:
                selector.unregister(key.fileobj)


def _run_dry(processes: Sequence[Process]) -> None:
    """After the end of the last stage, let those before it come to their own end if it wants no more of good input.

    tar stops at the end of its archive; only the decompressor's end tells whether what it gave was right.
    """
    status = processes[-1].status()
    for process in processes[:-1]:
        while status == 0 and os.read(process.stdout.fileno(), 1 << 16):
            pass
        process.stdout.close()  # if more comes: SIGPIPE


@contextmanager
def _memory(size: int) -> Iterator[int]:
    """Yield a file in memory, for what would fill a pipe that nobody empties meanwhile.

    It cannot grow: who writes more than `size` bytes gets an error (EPERM, memfd_create(2)).
    """
    with linux.closing(os.memfd_create("imageos", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as descriptor:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        yield descriptor


def _finished(command: Command, process: Process, stdout: bytes, stderr: str) -> Finished:
    """Wait for the end of a process that has said this."""
    if not command.private:
        log.debug(_text(stdout[-SHOWN_LIMIT:]) + stderr[-SHOWN_LIMIT:])
    return Finished(command.argv, process.status(), stdout, stderr)


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "backslashreplace")
