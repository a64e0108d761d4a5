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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from imageos import log
from imageos.errors import Failure, TimedOut, signal_name
from imageos.node import linux

DEFAULT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What is kept of a stream that we only want for messages; a hostile guest may print for ever.
OUTPUT_LIMIT = 1 << 20
PIPE_SIZE = 1 << 20  # bytes between two stages: what any user may ask for (fs.pipe-max-size)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that end a command in an orderly way
TICK = 0.5  # seconds between two calls of `tick`

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
    cwd: str | None = None,
    timeout: float | None = None,
    prepare: Callable[[], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run one command to its end and return what it printed; raise Failure unless its status is 0.

    `timeout` in seconds; `prepare` runs in the child before the program; `on_line` gets each line of
    stdout and stderr as it comes.
    """
    finished = pipeline(
        [argv], input=input, stdin=stdin, env=env, cwd=cwd, timeout=timeout, prepare=prepare, on_line=on_line
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
    prepare: Callable[[], None] | None = None,
    upstream: Callable[[], None] | None = None,
    on_line: Callable[[str], None] | None = None,
    tick: Callable[[], None] | None = None,
    on_exit: Callable[[], None] | None = None,
    private: bool = False,
    keep: Sequence[int] = (),
    on_start: Callable[[], None] | None = None,
) -> list[Finished]:
    """Run `stages` with each one's stdout as the next one's stdin; judge nothing.

    `env` replaces the environment (default: `environment()`); it, `cwd` and `prepare` are for every stage, but before
    the last one `upstream`, if given, takes the place of `prepare`.
    `tick` is called every now and then; `on_exit` when the last stage has ended, while a process that it left behind
    may still hold its output open; the output of a `private` command stays out of the debug log. `keep`: descriptors
    that all stages but the last inherit; `on_start` is called when all have been started.
    """
    log.debug("$ " + " | ".join(shlex.join(stage) for stage in stages))
    processes: list[subprocess.Popen[bytes]] = []
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
                keep=() if stage is stages[-1] else keep,
                prepare=prepare if stage is stages[-1] or upstream is None else upstream,
            )
            source = process.stdout.fileno() if process.stdout else subprocess.DEVNULL
            if stage is not stages[-1]:
                linux.enlarge_pipe(source, PIPE_SIZE)
        if input is not None and processes[0].stdin:
            _feed(processes[0], input)
        if on_start:
            on_start()

        def at_exit() -> None:
            _run_dry(processes)
            if on_exit:
                on_exit()

        captured = _capture(processes, timeout, on_line, tick, at_exit)
        finished = [
            Finished(stage, process.wait(), captured.get(2 * n, b""), _text(captured[2 * n + 1]))
            for n, (stage, process) in enumerate(zip(stages, processes))
        ]
        for one in finished:
            if not private:
                log.debug(_text(one.stdout) + one.stderr)
        return finished
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
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
    prepare: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Callable[[], None]]]:
    """Run `stages` as in `pipeline`; the descriptor of the last one's stdout, and a function to call at its end.

    That function raises Failure unless every status is 0. `keep`: descriptors that the stages inherit.
    """
    log.debug("$ " + " | ".join(shlex.join(stage) for stage in stages))
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
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
                prepare=prepare,
            )
            if processes and processes[-1].stdout:
                processes[-1].stdout.close()
            processes.append(process)
            assert process.stdout
            stdin = process.stdout.fileno()
            linux.enlarge_pipe(stdin, PIPE_SIZE)

        def check() -> None:
            failed = [n for n, process in enumerate(processes) if process.wait()]
            # what stops because nobody reads any more is not at fault: who should have read is
            failed = [n for n in failed if processes[n].returncode != -signal.SIGPIPE] or failed
            for n in failed[:1]:
                errors[n].seek(0)
                raise Finished(stages[n], processes[n].returncode, b"", _text(errors[n].read(OUTPUT_LIMIT))).failure()

        yield stdin, check


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def head(argv: Sequence[str], stdin: int, count: int, prepare: Callable[[], None] | None = None) -> bytes:
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
            prepare=prepare,
        )
        data = process.stdout.read(count) if process.stdout else b""
        if len(data) < count and process.wait():
            errors.seek(0)
            raise Finished(argv, process.returncode, b"", _text(errors.read(OUTPUT_LIMIT))).failure()
    return data


def _start(
    register: Callable[[subprocess.Popen[bytes]], object],
    argv: Sequence[str],
    *,
    stdin: int,
    stderr: int | IO[bytes],
    env: Mapping[str, str],
    cwd: str | None = None,
    keep: Sequence[int] = (),
    prepare: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process and hand it to `register`, which is to end it. A signal waits until that is done: one that came
    in between would leave a process that goes on writing to the disk.
    """
    with signals_held() as before:

        def enter() -> None:
            for one in SIGNALS:
                signal.signal(one, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if prepare:
                prepare()

        try:
            process = subprocess.Popen(
                list(argv),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(env),
                cwd=cwd,
                pass_fds=keep,
                preexec_fn=enter,
            )
        except OSError as error:
            raise _missing(argv[0], error) from None
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
    processes: list[subprocess.Popen[bytes]],
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
        exited = os.pidfd_open(processes[-1].pid)  # readable once it has ended
        stack.callback(os.close, exited)
        selector.register(exited, selectors.EVENT_READ, on_exit)
        for n, process in enumerate(processes):
            for key, pipe in ((2 * n, process.stdout), (2 * n + 1, process.stderr)):
                if pipe and (process is processes[-1] or pipe is process.stderr):
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
                raise TimedOut(f"{processes[0].args[0]}: not finished after {timeout:.0f} s, ended")  # type: ignore
            for event, _ in ready:
                if event.data is on_exit:
                    selector.unregister(event.fileobj)
                    processes[-1].wait()  # before `on_exit` can meet it as a zombie
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


def _run_dry(processes: list[subprocess.Popen[bytes]]) -> None:
    """The last stage has ended: if it wants no more of good input, let those before it come to their own end.

    tar stops at the end of its archive; only the decompressor's end tells whether what it gave was right.
    """
    for process in processes[:-1]:
        if process.stdout:
            while processes[-1].returncode == 0 and os.read(process.stdout.fileno(), 1 << 16):
                pass
            process.stdout.close()  # if more comes: SIGPIPE


def _emit_lines(pending: bytearray, data: bytes, on_line: Callable[[str], None]) -> None:
    pending += data
    # a carriage return ends a line of progress, and nothing where a newline follows
    *complete, rest = bytes(pending).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    pending[:] = rest[-OUTPUT_LIMIT:]
    for line in complete:
        on_line(line.decode("utf-8", "backslashreplace"))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
