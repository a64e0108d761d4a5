"""Children of this process: what each of them does first, and our own code in one that has nothing."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO, NoReturn

from imageos.node import confinement, linux
from imageos.node.confinement import NOTHING
from imageos.node.programs import environment

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
    with signals_held() as before, linux.children_apart() if os.geteuid() == 0 else nullcontext():
        child = os.fork()
        if not child:
            _work(work, source, writer, enter, before)  # there is no way back
    os.close(source)
    os.close(writer)
    with _ending(child), os.fdopen(reader, "rb", PIPE_SIZE) as output:
        yield output, lambda: _status(child)


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Have a child wait for a system call of ours; yield a function that waits for it, and raises its OSError."""
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

    def finish() -> None:
        status = _status(child)
        if status:
            raise OSError(status, os.strerror(status))

    with _ending(child):
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
