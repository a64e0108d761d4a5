#!/usr/bin/env python3
"""usage: sudo tests/fuzz/fuzz.py [SECONDS [SEED [NUMBER]]] [--weakened]

Restore and unpack hostile dumps and tar archives as `create` and `import` do, by the real restore(8) and tar(1), for
so many seconds, on a node to throw away. These are findings: a change to that node outside of the disk, a message that
is not ours, an unexpected error, a leftover, too much time or memory.

Each finding is printed with seed and number, which make the same image again. With NUMBER, only this image is tried and
left in the working directory, and the whole output is shown. --weakened removes the programs' own root, which must
cause findings: it proves that the fuzzer can see them.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
sys.dont_write_bytecode = True  # it would change the node
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]

import baits  # noqa: E402
import hostile_dumps  # noqa: E402
import hostile_tars  # noqa: E402
import throwaway  # noqa: E402
from leftovers import reap  # noqa: E402
from support import recorded  # noqa: E402
from throwaway import DISK, IMAGES, SECRET, Node  # noqa: E402

from imageos import outcome, run  # noqa: E402
from imageos.commands import create, import_  # noqa: E402
from imageos.disks import blockdev, filesystem, mounting  # noqa: E402
from imageos.disks.filesystem import Volume  # noqa: E402
from imageos.errors import Failure  # noqa: E402
from imageos.images import dump  # noqa: E402
from imageos.images.imagefile import open_image  # noqa: E402
from imageos.images.imagetypes import IMAGE_TYPES  # noqa: E402
from imageos.node import confinement, isolation, linux, programs  # noqa: E402
from imageos.node.children import PIPE_SIZE  # noqa: E402

SIZE = 48 << 20  # bytes of the disk
PATIENCE = 60.0  # seconds; limit for one image
MEMORY = 600 << 10  # KiB; limit for each program
LONGEST_LOG = 64 << 10  # bytes
MOST_FINDINGS = 20
PR_SET_CHILD_SUBREAPER = 36
NAMES = {"tarball": "fuzz-x86_64.tar", "dump": "fuzz-x86_64-root.dump"}
COMMANDS = {0: "create", 6: "import"}  # of a dozen images
NODE_FILES = {
    "/etc/default/ganeti-instance-image":
        f"IMAGE_DIR={IMAGES}\nARCH=x86_64\nFILESYSTEM=ext4\nSWAP=no\nCUSTOMIZE_DIR={throwaway.DISKS}/hooks\n",
    "/etc/ganeti/instance-image/variants/default.conf": "",
}  # fmt: skip


@dataclass(frozen=True)
class Image:
    kind: str  # a key of NAMES
    data: bytes
    command: str  # create, import, or none: only their handling of an image, which is faster
    careless: bool  # tar takes names unchanged, so that only its room protects the node


@dataclass
class Result:
    status: int
    log: str
    seconds: float
    told: Mapping[str, object]
    findings: list[str] = field(default_factory=list)

    def depth(self) -> str:
        """Return how far it came."""
        if self.status == 0:
            return "deployed"
        return "refused after files were made" if self.told.get("made") else "refused before"


# --- images ---------------------------------------------------------------------------------------


def image(seed: str, number: int, real: Sequence[bytes]) -> Image:
    chance = Random(f"{seed}/{number}")
    command, careless = COMMANDS.get(number % 12, ""), number % 5 < 2
    if chance.random() < 0.5 and command != "import":
        data = hostile_tars.archive(chance)
        return Image("tarball", hostile_tars.compressed(data, chance), command, careless)
    data = hostile_dumps.dump(chance, real)
    if command == "import":
        data = backup(data)
    return Image("dump", hostile_tars.compressed(data, chance) if chance.random() < 0.2 else data, command, careless)


def backup(dump: bytes) -> bytes:
    """Return a backup as ganeti-instance-image makes it of an instance's first disk."""
    with io.BytesIO() as output, tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("./root.dump")
        member.size = len(dump)
        archive.addfile(member, io.BytesIO(dump))
        archive.close()
        return output.getvalue()


# --- one image, in a process of its own -----------------------------------------------------------


def deploy(one: Image, path: str, tell: Callable[..., None]) -> None:
    """Deploy an image as `create` does, onto a disk that already has a filesystem."""
    isolation.enter()
    opened, kind = open_image(path), IMAGE_TYPES[one.kind]
    kind.check(opened)
    assert kind.deploy
    with blockdev.claimed(DISK) as device, blockdev.attached(device) as attached, ExitStack() as stack:
        stack.enter_context(mounting.mounted_all([Volume("root", "ext4", attached.path, "", "/")]))
        before = around()
        try:
            kind.deploy(opened, isolation.TARGET)
        finally:
            tell(made=inodes() > EMPTY, changed=sorted(set(before.items()) ^ set(around().items())))
        stack.close()
        blockdev.flush(attached)


EMPTY = 11  # inodes of a filesystem with only lost+found


def inodes() -> int:
    status = os.statvfs(isolation.TARGET)
    return status.f_files - status.f_ffree


def around() -> dict[str, str]:
    """Return the files beside the target, which only this command sees."""
    found = {
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "processes": str(isolation.other_processes()),
    }
    for place in (isolation.RUNTIME, isolation.TEMPORARY):
        for name in (".", *os.listdir(place)):
            if name != "root":
                status = os.lstat(f"{place}/{name}")
                found[f"{place}/{name}"] = str((status.st_mode, status.st_uid, status.st_nlink))
    return found


def call(one: Image) -> None:
    """Call a command as Ganeti does, for an instance with one disk and no partition for /boot."""
    known = recorded("create" if one.command == "create" else "import-disk0")
    os.environ.clear()
    os.environ.update({name: value for name, value in known.items() if not name.startswith(("DISK_1", "OSP_"))})
    os.environ.update(DISK_COUNT="1", DISK_0_PATH=DISK, IMPORT_DEVICE=DISK, INSTANCE_HV_kernel_path="/vmlinuz")
    os.environ.update(OSP_IMAGE_NAME="fuzz", OSP_IMAGE_TYPE=one.kind)
    (create if one.command == "create" else import_).main([])


def child(one: Image, path: str, stdin: int, log: int, told: int) -> int:
    def tell(**facts: object) -> None:
        os.write(told, json.dumps(facts).encode() + b"\n")

    def work() -> int:
        try:
            call(one) if one.command else deploy(one, path, tell)
        except Failure:
            raise
        except BaseException as error:
            tell(unexpected=f"{type(error).__name__}: {error}")
            raise
        return 0

    os.setsid()
    for ours, theirs in ((stdin, 0), (log, 1), (log, 2)):
        os.dup2(ours, theirs)
    isolation.handle_signals()
    if one.careless:
        environment = run.environment
        run.environment = lambda: {**environment(), "TAR_OPTIONS": "--absolute-names"}
    return outcome.guard(work)


def attempt(node: Node, one: Image, template: Sequence[tuple[int, bytes]]) -> Result:
    path = f"{IMAGES}/{NAMES[one.kind]}"
    for name in NAMES.values():
        with suppress(FileNotFoundError):
            os.unlink(f"{IMAGES}/{name}")
    Path(path).write_bytes(one.data)
    write_disk(template)
    before, stdin = node.state(), filled_pipe(one.data if one.command == "import" else b"")
    log, told = os.memfd_create("log"), os.memfd_create("told")
    try:
        began = time.monotonic()
        pid = os.fork()
        if not pid:
            status = 70
            try:
                status = child(one, path, stdin, log, told)
            finally:
                os._exit(status)
        ended = wait_for(pid)
        _, code, usage = os.wait4(pid, 0)
        lines = contents(told).decode().splitlines()
        facts = {key: value for line in lines for key, value in json.loads(line).items()}
        said = contents(log).decode("utf-8", "backslashreplace")
        result = Result(os.waitstatus_to_exitcode(code), said, time.monotonic() - began, facts)
        if not ended:
            result.findings.append(f"not ended after {PATIENCE:.0f} s")
        if usage.ru_maxrss > MEMORY:
            result.findings.append(f"{usage.ru_maxrss >> 10} MiB of memory were taken")
        result.findings += [*differences(node, before), *objections(one, result)]
        return result
    finally:
        for descriptor in (stdin, log, told):
            os.close(descriptor)


def filled_pipe(data: bytes) -> int:
    """Return a pipe that ends after `data`."""
    reader, writer = os.pipe()
    linux.enlarge_pipe(writer, PIPE_SIZE)
    os.write(writer, data[:PIPE_SIZE])
    os.close(writer)
    return reader


def wait_for(pid: int) -> bool:
    """Return True if a process ends in time; kill it if not. Show partitions meanwhile."""
    descriptor, deadline = os.pidfd_open(pid), time.monotonic() + PATIENCE
    try:
        while not select.select([descriptor], [], [], 0.02)[0]:
            throwaway.show_partitions()
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return False
        return True
    finally:
        os.close(descriptor)


def contents(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


# --- findings -------------------------------------------------------------------------------------


def differences(node: Node, before: Mapping[str, object]) -> Iterator[str]:
    deadline = time.monotonic() + 10  # the kernel takes its time to remove processes, mounts and loop devices
    while time.monotonic() < deadline:
        after, left = node.state(), children()
        if not left and all(after[name] == before[name] for name in ("mounts", "loop devices")):
            break
        time.sleep(0.01)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            how = "was made" if name not in before else "is gone" if name not in after else "was changed"
            yield f"{name} {how}"
    for pid in left:
        yield f"process {pid} is left: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}"
        os.kill(pid, signal.SIGKILL)


def children() -> list[int]:
    """Return the remaining processes, orphans included, which we adopt."""
    reap()
    return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]


def objections(one: Image, result: Result) -> Iterator[str]:
    lines = result.log.splitlines()
    if result.told.get("unexpected"):
        yield f"no Failure, but {result.told['unexpected']}"
    for change in result.told.get("changed") or ():  # type: ignore[attr-defined]
        yield f"beside the target: {change}"
    if result.status not in (0, 1):
        yield f"status {result.status}"
    if result.status and not lines:
        yield "no message"
    if [line for line in lines if not re.fullmatch("imageos: [ -~]*", line)] or len(result.log) > LONGEST_LOG:
        yield "messages that are not ours, not ASCII, or too long"
    if lines and (len(lines[-1]) > outcome.LONGEST + 20 or re.match("imageos: ([|] |internal error|ended)", lines[-1])):
        yield f"the last line is {lines[-1][:200]}"
    if "Traceback" in result.log:
        yield "a traceback"
    if SECRET in disk_contents():
        yield "the disk holds what is the node's"


# --- the disk -------------------------------------------------------------------------------------


def extents(descriptor: int) -> Iterator[tuple[int, bytes]]:
    at, end = 0, os.fstat(descriptor).st_size
    while True:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, os.pread(descriptor, min(at, end) - start, start)


def disk_contents() -> bytes:
    with open(DISK, "rb") as file:
        return b"".join(data for _, data in extents(file.fileno()))


def write_disk(template: Sequence[tuple[int, bytes]]) -> None:
    with open(DISK, "wb") as file:
        file.truncate(SIZE)
        for at, data in template:
            os.pwrite(file.fileno(), data, at)


def made_template() -> list[tuple[int, bytes]]:
    """Record the writes of mkfs to an empty disk, to repeat them for each image."""
    write_disk([])
    volume = Volume("root", "ext4", DISK, "00000000-0000-4000-8000-000000000001", "/")
    subprocess.run(filesystem.make_command(volume), check=True)
    with open(DISK, "rb") as file:
        return list(extents(file.fileno()))


# --- all of it ------------------------------------------------------------------------------------


def prepare(weakened: bool) -> tuple[Node, list[bytes], list[tuple[int, bytes]]]:
    """Make a node to throw away, dumps as sources of others, and an empty filesystem."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    node = throwaway.enter()
    number = os.fstat(node.other_disk).st_rdev
    baits.DEVICES[0] = (os.major(number), os.minor(number))
    for path, text in NODE_FILES.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    os.environ["PATH"] = programs.DEFAULT_PATH
    with tempfile.TemporaryDirectory() as work:
        real = hostile_dumps.dumped(Path(work))
    tempfile.tempdir = None  # a command has another one
    dump.RESTORE_TIMEOUT /= 10  # many images never end
    if weakened:
        confinement.TEMPORARY = throwaway.TEMPORARY
        confinement.entering = lambda room, path, kept=(): lambda: os.chdir(room.work or "/")
    return node, real, made_template()


def main(arguments: Sequence[str]) -> int:
    weakened = "--weakened" in arguments
    words = [word for word in arguments if word != "--weakened"]
    if any(word.startswith("-") for word in words) or len(words) > 3:
        print(__doc__)
        return 2
    seconds = float(words[0]) if words else 60.0
    seed = words[1] if words[1:] else str(time.time_ns() % 1_000_000)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY) if words[2:] else -1
    node, real, template = prepare(weakened)
    if words[2:]:
        return try_one(node, image(seed, int(words[2]), real), template, here)
    depths: Counter[tuple[str, str]] = Counter()
    found: list[str] = []  # the kind of each image with a finding
    number, slowest, began = 0, (0.0, 0), time.monotonic()
    while time.monotonic() - began < seconds and len(found) < MOST_FINDINGS:
        number += 1
        one = image(seed, number, real)
        result = attempt(node, one, template)
        depths[one.kind, result.depth()] += 1
        slowest = max(slowest, (result.seconds, number))
        found += [one.kind] * bool(result.findings)
        for finding in result.findings:
            print(f"{seed} {number} ({one.kind}): {finding}", flush=True)
        if weakened and set(found) == set(NAMES):
            break
    counts = "; ".join(f"{kind} {depth}: {count}" for (kind, depth), count in sorted(depths.items()))
    print(f"seed {seed}: {number} images in {time.monotonic() - began:.0f} s: {counts}")
    print(f"slowest: {seed} {slowest[1]}, {slowest[0]:.1f} s; images with findings: {len(found)}")
    return 1 if found else 0


def try_one(node: Node, one: Image, template: Sequence[tuple[int, bytes]], directory: int) -> int:
    descriptor = os.open(NAMES[one.kind], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=directory)
    with open(descriptor, "wb") as file:
        file.write(one.data)
    result = attempt(node, one, template)
    print(
        result.log, f"status {result.status} after {result.seconds:.1f} s, {result.depth()}", *result.findings, sep="\n"
    )
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
