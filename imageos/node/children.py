"""Children of this process: programs, and our own code in one that has nothing."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import BinaryIO, NamedTuple, NoReturn

from imageos.node import confinement, linux
from imageos.node.confinement import NOTHING
from imageos.node.programs import DEFAULT_PATH, cannot_start, environment

PIPE = -1  # instead of a descriptor: one end of a new pipe, whose other end is ours
MISSING = (errno.ENOENT, errno.ENOTDIR)
LONGEST_FAULT = 1 << 12  # bytes
PIPE_SIZE = 1 << 20  # bytes between two processes: what any user may ask for (fs.pipe-max-size)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that end a command in an orderly way
Work = Callable[[BinaryIO, Callable[[bytes], object]], None]


@contextmanager
def signals_held() -> Iterator[Iterable[int]]:
    """Let signals wait until the end of the context, in this thread; gives what was held before, for a child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forget_ours(mask: Iterable[int]) -> None:
    """In a child: end by signals, but let those in `mask` wait; have no limit that is for our own memory alone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


# --- programs --------------------------------------------------------------------------------------------


class Program(NamedTuple):
    argv: Sequence[str]
    env: Mapping[str, str]
    enter: Callable[[], None]  # the child calls it before the program
    streams: tuple[int, int, int]  # its stdin, stdout and stderr: descriptors, or PIPE
    keep: Sequence[int]  # other descriptors that it inherits
    cwd: str | None
    apart: bool  # it is process 1 of a PID namespace, or that one's child
    leads: bool  # a process group of its own, which ends with it if we end it


class Process(NamedTuple):
    """A program that has been started, or is about to start. No other process gets its PID until `stack` ends."""

    program: Program
    pid: int
    pipes: Mapping[int, BinaryIO]  # its stdout, its stderr: our ends
    fault: int  # descriptor of a file: why it did not start, as the number and text of an error; empty: it did

    @property
    def stdout(self) -> BinaryIO:
        return self.pipes[1]

    @property
    def stderr(self) -> BinaryIO:
        return self.pipes[2]

    def status(self) -> int:
        """Wait for its end, and return its status, negative for a signal; raise Failure if it did not start."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended
        fault = os.pread(self.fault, LONGEST_FAULT, 0).decode("utf-8", "replace")
        if fault:
            number, _, why = fault.partition(" ")
            raise cannot_start(self.program.argv[0], OSError(int(number), why))
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        # process 1 of its namespace has ended with it, and as a shell would (confinement.exit_as)
        return 128 - status if self.program.apart and 128 < status <= 128 + signal.NSIG else status

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def start(stack: ExitStack, program: Program) -> Process:
    """Start a program that ends with `stack`; do not wait until it is there, which takes as long as a fork again.

    A signal waits until its end is sure: one that came in between would leave a process that goes on writing.
    """
    with signals_held() as mask:
        return stack.enter_context(_started(program, mask))


@contextmanager
def _started(program: Program, mask: Iterable[int]) -> Iterator[Process]:
    with ExitStack() as stack:
        pipes = {number: os.pipe() for number, stream in enumerate(program.streams) if stream == PIPE}
        ours = {number: stack.enter_context(os.fdopen(reader, "rb", 0)) for number, (reader, _) in pipes.items()}
        theirs = [pipes[number][1] if number in pipes else stream for number, stream in enumerate(program.streams)]
        fault = stack.enter_context(linux.closing(os.memfd_create("fault", os.MFD_CLOEXEC)))
        try:
            pid = _fork(program, theirs, fault, mask)
        finally:
            for _, writer in pipes.values():
                os.close(writer)
        process = Process(program, pid, ours, fault)
        stack.callback(_end, process)
        yield process


def _fork(program: Program, streams: Sequence[int], fault: int, mask: Iterable[int]) -> int:
    with ExitStack() as stack:
        try:
            if program.apart and os.geteuid() == 0:
                stack.enter_context(linux.children_apart())
            child = os.fork()
        except OSError as error:
            raise cannot_start(program.argv[0], error) from None
        if not child:
            _become(program, streams, fault, mask)
    return child


def _become(program: Program, streams: Sequence[int], fault: int, mask: Iterable[int]) -> NoReturn:
    """In the child: turn into the program."""
    gc.disable()  # what is left of our parent's objects is the parent's to end
    try:
        forget_ours(mask)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
            signal.signal(ignored, signal.SIG_DFL)
        # first out of the way: what is to be one of them may have the number of another
        above = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, len(streams)) for stream in streams]
        for number, descriptor in enumerate(above):
            os.dup2(descriptor, number)
        for descriptor in program.keep:
            os.set_inheritable(descriptor, True)
        if program.cwd is not None:
            os.chdir(program.cwd)
        program.enter()
        first = len(streams)
        for descriptor in sorted({*program.keep, fault}):  # the rest may be our caller's
            os.closerange(first, descriptor)
            first = descriptor + 1
        linux.close_all(first)
        _execute(program)
    except Exception as error:
        known = isinstance(error, OSError) and error.errno
        told = f"{known} {os.strerror(known)}" if known else f"0 {type(error).__name__}: {error}"
        os.write(fault, told.encode("utf-8", "replace")[:LONGEST_FAULT])
    finally:  # there is no way back
        os._exit(126)


def _execute(program: Program) -> NoReturn:
    """As os.execvpe, which may import a module for that: in the root of a guest, it would be the guest's."""
    name, path = program.argv[0], program.env.get("PATH", DEFAULT_PATH)
    failed = []
    for place in [name] if "/" in name else [os.path.join(directory, name) for directory in path.split(":")]:
        try:
            os.execve(place, list(program.argv), program.env)
        except OSError as error:
            failed.append(error)
    raise next((error for error in failed if error.errno not in MISSING), failed[0])


def _end(process: Process) -> None:
    with_group = process.program.leads and not process.has_ended()
    os.kill(process.pid, signal.SIGKILL)  # first: from now on it makes no group, and starts nothing
    if with_group:
        with suppress(ProcessLookupError):  # it had not made one yet
            os.killpg(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)


# --- our own code ----------------------------------------------------------------------------------------


@contextmanager
def in_child(work: Work, source: int) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Have our own code read a stranger's bytes as a program of the node would: in a process that has nothing.

    `work` gets the file `source`, a descriptor that is the child's alone now, and a function to write with. Gives the
    file of what it writes, and a function that tells, at its end, with which status: 0 unless something was raised.
    To be called while there is no other thread, whose locks and files nobody would take care of in the child.
    """
    reader, writer = os.pipe()
    linux.enlarge_pipe(writer, PIPE_SIZE)
    enter = confinement.entering(NOTHING, environment()["PATH"])
    with ExitStack() as stack:
        output = stack.enter_context(os.fdopen(reader, "rb", PIPE_SIZE))
        with signals_held() as before:
            with linux.children_apart() if os.geteuid() == 0 else nullcontext():
                child = os.fork()
                if not child:
                    _work(work, source, writer, enter, before)  # there is no way back
            stack.enter_context(_ending(child))
            os.close(source)
            os.close(writer)
        yield output, lambda: _status(child)


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Have a child wait for a system call of ours; yield a function that waits for it, and raises its OSError."""

    def finish() -> None:
        status = _status(child)
        if status:
            raise OSError(status, os.strerror(status))

    with ExitStack() as stack:
        with signals_held() as before:
            child = os.fork()
            if not child:
                try:
                    forget_ours(before)
                    call()
                    os._exit(0)
                except OSError as error:
                    os._exit(error.errno or errno.EIO)
                finally:
                    os._exit(errno.EIO)
            stack.enter_context(_ending(child))
        yield finish


@contextmanager
def _ending(child: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _status(child: int) -> int:
    """The status that a child has ended with, or the signal that has ended it; it can be asked for again."""
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert ended
    return ended.si_status


def _work(work: Work, source: int, writer: int, enter: Callable[[], None], mask: Iterable[int]) -> NoReturn:
    """In the child of `in_child`: let go of everything that is open but for two files, and do it."""
    try:
        forget_ours(mask)
        for number, descriptor in enumerate((source, writer, writer)):
            os.dup2(descriptor, number)
        linux.close_all(3)  # secrets, disks, whatever it was
        enter()
        linux.close_all(3)  # ways out, which the start of a program would have closed
        with os.fdopen(0, "rb", PIPE_SIZE) as file, os.fdopen(1, "wb", PIPE_SIZE) as into:
            work(file, into.write)
        os._exit(0)
    except BaseException:  # whatever it is: nothing may go on here as if this were the parent
        os._exit(1)
