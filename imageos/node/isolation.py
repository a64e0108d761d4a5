"""Run a command in its own namespaces, so that the kernel cleans up after it.

The first process becomes a supervisor. Its child is process 1 of a new PID namespace, in a new mount namespace.
When the child ends or the supervisor is killed, the kernel kills all other processes there and drops the mounts,
and with them the loop devices (autoclear). So even SIGKILL leaves nothing behind.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn

from imageos import log
from imageos.errors import Failure, Interrupted, explained, signal_name
from imageos.node import limits, linux
from imageos.node.children import SIGNALS, signals_held

# The runtime directory is empty on the node. In our namespace a tmpfs covers it, so that mount points and
# temporary files vanish with us.
RUNTIME = "/run/imageos"
TARGET = RUNTIME + "/root"
TEMPORARY = RUNTIME + "/tmp"
MEMORY = 4 << 30  # bytes of address space that a command may take for itself
AGAIN = 1.0  # seconds until a signal is sent once more


def enter() -> None:
    """Continue in a child process in new namespaces; the calling process waits and forwards signals.

    Return in the child only. The supervisor exits with the child's status.
    """
    if os.geteuid() != 0:
        raise Failure("this needs root", hint="run it with sudo")
    alive, supervisor_end = os.pipe()  # `alive` reads end of file when the supervisor is gone
    with signals_held() as before:  # until both have their handlers; Python loses what a handler raises in fork
        with explained("cannot make a PID namespace"):
            linux.unshare(linux.CLONE_NEWPID)  # applies to the next child, not to us
            child = os.fork()
        if child:
            os.close(alive)
            _supervise(child, before)
        os.close(supervisor_end)
        linux.die_with_parent()
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)  # the supervisor died before die_with_parent
        os.close(alive)
        handle_signals()
    limit_memory()
    _private_mounts()


def call_apart(call: Callable[[], None]) -> None:
    """Call it in namespaces of its own, for a command that has none; raise the Failure that it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            enter()
            call()
            os._exit(0)
        except Exception as error:
            failure = error if isinstance(error, Failure) else Failure(f"{type(error).__name__}: {error}")
            os.write(writer, json.dumps([str(failure), failure.hint, failure.details]).encode())
        finally:  # there is no way back
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if said:
        raise Failure(*json.loads(said))
    if status:
        raise Failure("a process of our own has failed")


def limit_memory() -> None:
    """Bound our own address space: what a parser of ours forgets to count must not take the node's memory.

    Only the soft limit, which every child lifts again (node.children).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft > MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))


def handle_signals() -> None:
    """Raise Interrupted on the first of SIGNALS; ignore later ones. Our children's ends are ours to learn."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if the caller ignores it, nobody is told how a child has ended
    interrupted = False

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            return  # a second exception would abort the cleanup
        interrupted = True
        raise Interrupted(signum)

    for number in SIGNALS:
        signal.signal(number, interrupt)


def ignore_signals() -> None:
    """Ignore signals from now on, for a last step that must not stop half done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def other_processes() -> list[int]:
    """Return the PIDs of all processes in our PID namespace except this one."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _private_mounts() -> None:
    linux.unshare(linux.CLONE_NEWNS)
    try:
        # slave, not private: when the node unmounts something, our copy goes, too
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _make_root_a_mount()
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
    linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    os.makedirs(RUNTIME, mode=0o700, exist_ok=True)
    linux.mount("imageos", RUNTIME, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0700")
    os.mkdir(TARGET)
    os.mkdir(TEMPORARY, 0o700)
    os.environ["TMPDIR"] = TEMPORARY


def _make_root_a_mount() -> None:
    """In a chroot whose root is not a mount point, change to a private mount of the root."""
    root = linux.copy_mounts("/")
    linux.mount(None, "/proc", None, linux.MS_PRIVATE)
    directory = os.open("/proc", os.O_PATH)
    linux.place_mounts(root, directory)
    os.fchdir(root)
    os.chroot(".")
    os.close(directory)
    os.close(root)


def _supervise(child: int, mask: Iterable[int]) -> NoReturn:
    """Pass signals on to `child`, and exit as it does.

    A signal is sent again and again until the child has ended: one that comes just before a system call that blocks,
    such as a write to a full pipe, does not end that call.
    """
    numbers: set[int] = {signal.SIGCHLD, *SIGNALS}
    numbers.difference_update(mask)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    passed = 0
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        came = signal.sigtimedwait(numbers, AGAIN) if passed else signal.sigwaitinfo(numbers)
        if came and came.si_signo != signal.SIGCHLD:
            passed = came.si_signo
        if passed:
            os.kill(child, passed)
    if os.WIFSIGNALED(ended[1]):
        how = f"killed by {signal_name(os.WTERMSIG(ended[1]))}"
        log.info(": ".join(filter(None, (how, limits.cause(how)))))
        _exit(128 + os.WTERMSIG(ended[1]))
    _exit(os.WEXITSTATUS(ended[1]))


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(status)
