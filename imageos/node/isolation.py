"""The namespaces that a command works in, so that the kernel cleans up after it.

The process that was started becomes a supervisor. Its child is process 1 of a PID namespace with a mount
namespace of its own: when it ends, or when the supervisor is killed, the kernel kills every process that
was started, drops the mounts, and with them the loop devices (autoclear). Not even SIGKILL leaves anything.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from imageos import log
from imageos.errors import Failure, Interrupted, signal_name
from imageos.node import linux
from imageos.run import SIGNALS, signals_held

# The runtime directory: on the node it is empty; in the namespace a tmpfs of ours hides it, so that
# mount points and temporary files vanish with us.
RUNTIME = "/run/imageos"
TARGET = RUNTIME + "/root"
TEMPORARY = RUNTIME + "/tmp"


def enter() -> None:
    """Go on in a child in namespaces of its own; the caller's process only waits and passes on.

    Returns in the child only. The supervisor exits with the child's status.
    """
    if os.geteuid() != 0:
        raise Failure("this needs root", hint="run it with sudo")
    alive, ours = os.pipe()
    with signals_held() as before:  # until both have their handlers: what one raises while Python forks is lost
        try:
            linux.unshare(linux.CLONE_NEWPID)  # for the next child, not for us
            child = os.fork()
        except OSError as error:
            raise Failure(f"cannot make a PID namespace: {error.strerror}") from None
        if child:
            os.close(alive)
            _supervise(child, before)
        os.close(ours)
        linux.die_with_parent()
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)  # the supervisor was gone before it could take us with it
        os.close(alive)
        handle_signals()
    _private_mounts()


def handle_signals() -> None:
    """Turn the first of SIGTERM, SIGINT and SIGHUP into Interrupted, ignore what follows."""
    interrupted = False

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            return  # a second exception would cut the cleaning up short
        interrupted = True
        raise Interrupted(signum)

    for one in SIGNALS:
        signal.signal(one, interrupt)


def ignore_signals() -> None:
    """For the last step of something that is not to be left half done."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def other_processes() -> list[int]:
    """Every process of our PID namespace but ourselves."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _private_mounts() -> None:
    linux.unshare(linux.CLONE_NEWNS)
    try:
        # slave, not private: what the node unmounts, we let go too
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
    """In a chroot whose root is a directory like any other: go to a mount of it, which nobody else sees."""
    root = linux.copy_mounts("/")
    linux.mount(None, "/proc", None, linux.MS_PRIVATE)
    place = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    linux.place_mounts(root, place)
    os.fchdir(root)
    os.chroot(".")
    os.close(place)
    os.close(root)


def _supervise(child: int, mask: Iterable[int]) -> NoReturn:
    def forward(signum: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signum)

    for one in SIGNALS:
        signal.signal(one, forward)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        log.info(f"killed by {signal_name(os.WTERMSIG(status))}")
        _exit(128 + os.WTERMSIG(status))
    _exit(os.WEXITSTATUS(status))


def _exit(status: int) -> NoReturn:
    if sys.stdout:  # None if it was closed when we were started
        sys.stdout.flush()
    os._exit(status)
