"""The only module that starts processes.

Lists only, never a shell string; stdin closed unless given; a whitelisted environment; output captured
and bounded; every stage of a pipeline counts; children are killed when we leave early.
"""

from __future__ import annotations

import errno
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import IO

from imageos import log
from imageos.errors import Failure, TimedOut, signal_name
from imageos.node import confinement, linux
from imageos.node.confinement import Room

DEFAULT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What is kept of a stream that we only want for messages; a hostile guest may print for ever.
OUTPUT_LIMIT = 1 << 20
PIPE_SIZE = 1 << 20  # bytes between two stages: what any user may ask for (fs.pipe-max-size)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that end a command in an orderly way
TICK = 0.5  # seconds between two calls of `tick`
NOTHING = Room()  # but programs and libraries

# What runs outside: with all rights of root, and the whole node in reach. All other programs of the node are confined.
OUTSIDE = {
    "gnt-cluster": "asks Ganeti's daemons, over sockets and the network",
    "gnt-instance": "asks Ganeti's daemons, over sockets and the network",
    "ssh": "reaches other nodes, with root's keys",
    "unshare": "doctor learns by it whether namespaces can be made at all",
    "hook": "a site's own program: what it is there for is known to the site alone",
    "settings": "a site's own shell files, which may read and call whatever they need",
    "shell": "the operator's own, in mount-disks --shell",
}

# Program -> Debian package, where the names differ from each other or the program may be missing.
PACKAGES = {
    "bzip2": "bzip2",
    "lz4": "lz4",
    "xz": "xz-utils",
    "zstd": "zstd",
    "gpgv": "gpgv",
    "gzip": "gzip",
    "tar": "tar",
    "restore": "dump",
    "dump": "dump",
    "qemu-img": "qemu-utils",
    "dd": "coreutils",
    "sync": "coreutils",
    "blkid": "util-linux",
    "gnt-cluster": "ganeti",
    "gnt-instance": "ganeti",
    "ssh": "openssh-client",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "xfs_growfs": "xfsprogs",
    "btrfs": "btrfs-progs",
    "sgdisk": "gdisk",
    "sfdisk": "fdisk",
    "mkswap": "util-linux",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "mkfs.ext2": "e2fsprogs",
    "mkfs.ext3": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
}


@dataclass(frozen=True)
class Finished:
    """A process that has ended. `status` is negative for a signal, as in subprocess."""

    argv: Sequence[str]
    status: int
    stdout: bytes
    stderr: str

    def failure(self) -> Failure:
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        how = f"killed by {signal_name(-self.status)}" if self.status < 0 else f"exit status {self.status}"
        message = f"{self.argv[0]} failed ({how})"
        if lines:
            message += f": {lines[-1]}"
        return Failure(message, details=[f"$ {shlex.join(self.argv)}", *lines[-10:-1]])


def run(
    argv: Sequence[str],
    *,
    input: str | None = None,
    stdin: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    room: Room = NOTHING,
    prepare: Callable[[], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run one command to its end and return what it printed; raise Failure unless its status is 0.

    `timeout` in seconds; `room` is what it has to itself, or `prepare` runs in the child to confine a program that is
    not the node's; `on_line` gets each line of stdout and stderr as it comes.
    """
    finished = pipeline(
        [argv], input=input, stdin=stdin, env=env, timeout=timeout, room=room, prepare=prepare, on_line=on_line
    )[0]
    if finished.status != 0:
        raise finished.failure()
    return finished.stdout.decode("utf-8", "surrogateescape")


def pipeline(
    stages: Sequence[Sequence[str]],
    *,
    input: str | None = None,
    stdin: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout: float | None = None,
    room: Room = NOTHING,
    prepare: Callable[[], None] | None = None,
    outside: str = "",
    keep: Sequence[int] = (),
    on_line: Callable[[str], None] | None = None,
    tick: Callable[[], None] | None = None,
    on_exit: Callable[[], None] | None = None,
    private: bool = False,
    keep_upstream: Sequence[int] = (),
    on_start: Callable[[], None] | None = None,
) -> list[Finished]:
    """Run `stages` with each one's stdout as the next one's stdin; judge nothing.

    `env` replaces the environment (default: `environment()`). `room` is what the last stage has to itself: those before
    it have nothing. `outside`: what of OUTSIDE it is, where its name does not tell; `cwd` is for that.
    `keep`: descriptors that the stages inherit.
    `tick` is called every now and then; `on_exit` when the last stage has ended, while a process that it left behind
    may still hold its output open; the output of a `private` command stays out of the debug log.
    `keep_upstream`: descriptors that all stages but the last inherit; `on_start` is called when all have been started.
    """
    log.debug("$ " + " | ".join(shlex.join(stage) for stage in stages))
    processes: list[Process] = []
    try:
        source = stdin if stdin is not None else subprocess.PIPE if input is not None else subprocess.DEVNULL
        for stage in stages:
            process = _start(
                processes.append,
                stage,
                stdin=source,
                stderr=subprocess.PIPE,
                env=environment() if env is None else env,
                cwd=cwd,
                keep=keep if stage is stages[-1] else [*keep, *keep_upstream],
                room=room if stage is stages[-1] else NOTHING,
                prepare=prepare,
                outside=outside,
            )
            source = process.popen.stdout.fileno() if process.popen.stdout else subprocess.DEVNULL
            if stage is not stages[-1]:
                linux.enlarge_pipe(source, PIPE_SIZE)
        if input is not None and processes[0].popen.stdin:
            _feed(processes[0].popen, input)
        if on_start:
            on_start()

        def at_exit() -> None:
            _run_dry(processes)
            if on_exit:
                on_exit()

        captured = _capture(processes, timeout, on_line, tick, at_exit)
        finished = [
            Finished(stage, process.status(), captured.get(2 * n, b""), _text(captured[2 * n + 1]))
            for n, (stage, process) in enumerate(zip(stages, processes))
        ]
        for one in finished:
            if not private:
                log.debug(_text(one.stdout) + one.stderr)
        return finished
    finally:
        for process in processes:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
            for pipe in (process.popen.stdin, process.popen.stdout, process.popen.stderr):
                if pipe and not pipe.closed:
                    with suppress(BrokenPipeError):  # of what it was to be told when a signal came
                        pipe.close()


def foreground(argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a command that talks to the user: with our stdin, stdout and stderr. Its status is as the shell shows it."""
    log.debug(f"$ {shlex.join(argv)}")
    try:
        with subprocess.Popen(list(argv), cwd=cwd, env=dict(environment() if env is None else env)) as process:
            try:
                status = process.wait()
            finally:
                process.kill()
    except OSError as error:
        raise _missing(argv[0], error) from None
    return status if status >= 0 else 128 - status


@contextmanager
def output_of(
    stages: Sequence[Sequence[str]],
    stdin: int = subprocess.DEVNULL,
    keep: Sequence[int] = (),
    room: Room = NOTHING,
) -> Iterator[tuple[int, Callable[[], None]]]:
    """Run `stages`; the descriptor of the last one's stdout, and a function to call at its end.

    That function raises Failure unless every status is 0. `keep`: descriptors that the stages inherit. `room` is what
    the first stage has to itself: those after it have nothing.
    """
    log.debug("$ " + " | ".join(shlex.join(stage) for stage in stages))
    with ExitStack() as stack:
        processes: list[Process] = []
        errors = []
        for stage in stages:
            # a file: nobody empties a pipe while the output is read
            errors.append(stack.enter_context(tempfile.TemporaryFile()))
            process = _start(
                lambda process: stack.callback(_end, process),
                stage,
                stdin=stdin,
                stderr=errors[-1],
                env=environment(),
                keep=keep,
                room=room if stage is stages[0] else NOTHING,
            )
            if processes and processes[-1].popen.stdout:
                processes[-1].popen.stdout.close()
            processes.append(process)
            assert process.popen.stdout
            stdin = process.popen.stdout.fileno()
            linux.enlarge_pipe(stdin, PIPE_SIZE)

        def check() -> None:
            ended = [
                Finished(stage, process.status(), b"", _said(error))
                for stage, process, error in zip(stages, processes, errors)
            ]
            failed = [one for one in ended if one.status]
            # what stops because nobody reads any more is not at fault: who should have read is
            for one in ([one for one in failed if one.status != -signal.SIGPIPE] or failed)[:1]:
                raise one.failure()

        yield stdin, check


def _end(process: Process) -> None:
    process.popen.kill()
    process.popen.wait()
    if process.popen.stdout:
        process.popen.stdout.close()


def head(argv: Sequence[str], stdin: int, count: int) -> bytes:
    """The first `count` bytes that `argv` writes, or fewer if it ends before; Failure if it fails before.

    It is killed when it has written them.
    """
    with ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile())
        process = _start(
            lambda process: stack.callback(_end, process),
            argv,
            stdin=stdin,
            stderr=errors,
            env=environment(),
        )
        data = process.popen.stdout.read(count) if process.popen.stdout else b""
        status = process.status() if len(data) < count else 0
        said = _said(errors)
        if status:
            raise Finished(argv, status, b"", said).failure()
    return data


@dataclass(frozen=True)
class Process:
    popen: subprocess.Popen[bytes]
    confined: bool

    def status(self) -> int:
        """How it has ended, once it has: negative for a signal."""
        status = self.popen.wait()
        # process 1 of its namespace has ended with it, and as a shell would (confinement.exit_as)
        return 128 - status if self.confined and 128 < status <= 128 + signal.NSIG else status


def _start(
    register: Callable[[Process], object],
    argv: Sequence[str],
    *,
    stdin: int,
    stderr: int | IO[bytes],
    env: Mapping[str, str],
    cwd: str | None = None,
    keep: Sequence[int] = (),
    room: Room = NOTHING,
    prepare: Callable[[], None] | None = None,
    outside: str = "",
) -> Process:
    """Start a process and hand it to `register`, which is to end it. A signal waits until that is done: one that came
    in between would leave a process that goes on writing to the disk.
    """
    assert not outside or outside in OUTSIDE
    confined = not (prepare or outside or argv[0] in OUTSIDE)
    env = dict(env)
    if confined:
        prepare = confinement.entering(room, env["PATH"], keep)
        env["TMPDIR"] = confinement.TEMPORARY
    with signals_held() as before:

        def enter() -> None:
            for one in SIGNALS:
                signal.signal(one, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if prepare:
                prepare()

        try:
            with linux.children_apart() if confined and os.geteuid() == 0 else nullcontext():
                popen = subprocess.Popen(
                    list(argv),
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=env,
                    cwd=cwd,
                    pass_fds=keep,
                    preexec_fn=enter,
                )
        except OSError as error:
            raise _missing(argv[0], error) from None
        process = Process(popen, confined)
        register(process)
        return process


@contextmanager
def signals_held() -> Iterator[Iterable[int]]:
    """Let signals wait until the end of the context, in this thread; gives what was held before, for a child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def environment() -> dict[str, str]:
    """What tools of the node get: nothing of the caller's but PATH and TMPDIR."""
    env = {"PATH": os.environ.get("PATH", DEFAULT_PATH), "LC_ALL": "C", "HOME": "/root"}
    if "TMPDIR" in os.environ:
        env["TMPDIR"] = os.environ["TMPDIR"]
    return env


def require(*programs: str) -> None:
    """Fail, naming all of them, if one of `programs` is not there."""
    missing = [program for program in programs if not available(program)]
    if missing:
        packages = sorted({PACKAGES.get(program, program) for program in missing})
        raise Failure(
            f"missing on this node: {' '.join(missing)}",
            hint=f"install {' '.join(packages)} (doing so on every node is best)",
        )


def available(program: str) -> bool:
    return shutil.which(program, path=os.environ.get("PATH", DEFAULT_PATH)) is not None


def _missing(program: str, error: OSError) -> Failure:
    if "/" in program:  # a hook, a shell
        is_script = error.errno in (errno.ENOENT, errno.ENOEXEC) and os.path.exists(program)
        hint = "its first line has to name an interpreter, as #!/bin/sh does" if is_script else None
        return Failure(f"{program} cannot be run: {error.strerror}", hint=hint)
    if isinstance(error, FileNotFoundError):
        return Failure(f"{program}: not found", hint=f"install {PACKAGES.get(program, program)} on this node")
    return Failure(f"{program}: {error.strerror or error}")


def _feed(process: subprocess.Popen[bytes], text: str) -> None:
    # Only for short scripts: less than a pipe holds (64 KiB), so that this cannot block.
    assert process.stdin and len(text) < 60000
    try:
        process.stdin.write(text.encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # its status says why it did not read


def _capture(
    processes: list[Process],
    timeout: float | None,
    on_line: Callable[[str], None] | None,
    tick: Callable[[], None] | None,
    on_exit: Callable[[], None],
) -> dict[int, bytes]:
    """Read the last stage's stdout (key 2n) and every stage's stderr (key 2n+1) until all are closed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    buffers: dict[int, bytearray] = {}
    lines: dict[int, bytearray] = {}
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        exited = os.pidfd_open(processes[-1].popen.pid)  # readable once it has ended
        stack.callback(os.close, exited)
        selector.register(exited, selectors.EVENT_READ, on_exit)
        for n, process in enumerate(processes):
            for key, pipe in ((2 * n, process.popen.stdout), (2 * n + 1, process.popen.stderr)):
                if pipe and (process is processes[-1] or pipe is process.popen.stderr):
                    selector.register(pipe, selectors.EVENT_READ, key)
                    buffers[key], lines[key] = bytearray(), bytearray()
        while selector.get_map():
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if tick:
                wait = TICK if wait is None else min(wait, TICK)
            ready = selector.select(wait)
            if tick:
                tick()
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(f"{processes[0].popen.args[0]}: not finished after {timeout:.0f} s, ended")  # type: ignore
            for event, _ in ready:
                if event.data is on_exit:
                    selector.unregister(event.fileobj)
                    processes[-1].popen.wait()  # before `on_exit` can meet it as a zombie
                    event.data()
                    continue
                data = os.read(event.fd, 1 << 16)
                if not data:
                    selector.unregister(event.fileobj)
                    data = b"\n" if lines[event.data] else b""
                else:
                    buffers[event.data] += data
                    if len(buffers[event.data]) > 2 * OUTPUT_LIMIT:
                        del buffers[event.data][:-OUTPUT_LIMIT]
                if on_line:
                    _emit_lines(lines[event.data], data, on_line)
    return {key: bytes(buffer) for key, buffer in buffers.items()}


def _run_dry(processes: list[Process]) -> None:
    """The last stage has ended: if it wants no more of good input, let those before it come to their own end.

    tar stops at the end of its archive; only the decompressor's end tells whether what it gave was right.
    """
    for process in processes[:-1]:
        if process.popen.stdout:
            while processes[-1].status() == 0 and os.read(process.popen.stdout.fileno(), 1 << 16):
                pass
            process.popen.stdout.close()  # if more comes: SIGPIPE


def _emit_lines(pending: bytearray, data: bytes, on_line: Callable[[str], None]) -> None:
    pending += data
    # a carriage return ends a line of progress, and nothing where a newline follows
    *complete, rest = bytes(pending).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    pending[:] = rest[-OUTPUT_LIMIT:]
    for line in complete:
        on_line(line.decode("utf-8", "backslashreplace"))


def _said(file: IO[bytes]) -> str:
    """What a program has written to a file so far, whose position is the program's own."""
    said = _text(os.pread(file.fileno(), OUTPUT_LIMIT, 0))
    log.debug(said)
    return said


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
