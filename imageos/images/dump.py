"""Images made by dump(8): one of the root filesystem, and one of /boot where the guest has it apart.

restore(8) follows links that it finds. So each dump gets a place where nothing is: a link of an earlier one would lead
it out of the guest.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

from imageos import log
from imageos.disks import filesystem
from imageos.errors import Failure
from imageos.images.dumpfile import RECORD, TAPE, Dump, Truncated, is_header
from imageos.images.imagefile import Image, beginning, check_stages, damaged, feed, is_full, too_large
from imageos.images.restored import SYMBOL_TABLE, complete
from imageos.node import linux
from imageos.node.confinement import unpacking
from imageos.run import PIPE_SIZE, Finished, pipeline, require

# What is compressed within the format (dump -z) needs no name of its own.
SUFFIXES = ("-root.dump", "-root.dump.gz", "-root.dump.zst", "-root.dump.xz")
RESTORE = ["restore", "-r", "-y", "-f", "-"]
LEVEL_OFFSET = 692  # in the first record
PACKED = 49  # since 0.4b49, dump writes in another way
VERSION = re.compile(r"0\.4b(\d+)")
# What restore mutters although its status is 0 and files are missing or full of zeroes
DAMAGE = re.compile(
    r"abort\?|Incorrect block|not found on tape|End-of-input|[Rr]ead error|[Ww]rite error|"
    r"resync|[Cc]hecksum|No space left|cannot create|skipped"
)
# With this, and at the latest after so many lines, it has lost its way: it would look for the next file for ever.
# So with names that no filesystem has: restore would climb out of where it is (and would, but for the sandbox).
LOST = re.compile(r"not at beginning of a file|unexpected inode extension|(^|[ /])\.\.(/|:|$)")
MOST_LINES = 100_000
HARMLESS = re.compile(
    r"cannot open /dev/tty|Dump tape is compressed|(lost\+found|boot): File exists|"
    r"expected next file \d+, got \d+"  # it has no name, as files of ext4 itself have none
)


def check(image: Image) -> None:
    """Look at the first record: Failure unless it is a full dump that this node can restore."""
    require("restore", "tee", *image.decompress[:1])
    record = beginning(image, RECORD)
    order = next((one for one in "<>" if is_header(record, one)), None)
    if order is None:
        raise Failure(f"image {image.path} is not a dump, or damaged at its beginning")
    kind, volume = struct.unpack_from(order + "i8xi", record)
    if (kind, volume) != (TAPE, 1):
        raise Failure(f"image {image.path} is not the first volume of a dump")
    level = struct.unpack_from(order + "i", record, LEVEL_OFFSET)[0]
    if level:
        raise Failure(
            f"image {image.path} is a dump of level {level}: only what changed since another dump",
            hint="make it with level 0: dump -0",
        )
    if image.boot:
        check(image.boot)


def deploy(image: Image, directory: str) -> None:
    """Restore the root and, below it, /boot, where both are mounted already."""
    boot = f"{directory}/boot"
    if image.boot:
        with filesystem.alone(directory) as root:  # what was hidden under the mount point of /boot stays hidden
            _restore(image, root)
        check_untouched(image.boot.path, boot)
        _restore(image.boot, boot)
        return
    _restore(image, directory)
    if os.path.ismount(boot) and not set(os.listdir(boot)) - {"lost+found"}:
        raise Failure(
            f"image {image.path} has nothing for /boot, and there is no {boot_path(image.path)}",
            hint="make both with make-dump, or set kernel_path so that there is no /boot",
        )


def boot_path(path: str) -> str:
    """The file for /boot that belongs to the file `path` for the root."""
    return "-boot.dump".join(path.rsplit("-root.dump", 1))


def _restore(image: Image, directory: str) -> None:
    # TMPDIR, where it keeps a list of all directories, is its alone
    with following(image.path) as follower:
        finished = feed(
            image,
            RESTORE,
            "restoring",
            room=unpacking(directory),
            on_line=watch(image.path),
            between=[follower.stage],
            keep_upstream=follower.keep,
            on_start=follower.start,
            on_tick=follower.give_up,
        )
        judge(image, directory, finished, follower)
    os.unlink(f"{directory}/{SYMBOL_TABLE}")


PATIENCE = 10.0  # seconds that restore gets to say by itself what is wrong


class Follower:
    """Reads along what restore reads, which `stage` passes on to both."""

    def __init__(self, name: str, thread: Executor) -> None:
        self.dump = Dump(name)
        self._thread = thread
        self._reader, self._writer = os.pipe()
        linux.enlarge_pipe(self._writer, PIPE_SIZE)
        self.keep = [self._writer]
        self.stage = ["tee", f"/dev/fd/{self._writer}"]
        self._done: Future[None] | None = None
        self._found = 0.0  # when a failure was seen first

    def start(self) -> None:
        """What passes everything on has been started."""
        os.close(self._writer)
        self._done = self._thread.submit(self._read)

    def give_up(self) -> None:
        """End restore, which may never end by itself, some time after the dump was found not to be whole."""
        failure = self.failure() if self._done and self._done.done() else None
        self._found = self._found or (time.monotonic() if failure else 0.0)
        if failure and time.monotonic() - self._found > PATIENCE:
            raise failure

    def failure(self) -> Failure | None:
        """What the dump lacks, once its end has passed; None if it is whole."""
        assert self._done
        try:
            self._done.result()
        except Failure as failure:
            return failure
        return None

    def close(self) -> None:
        if not self._done:
            os.close(self._reader)
            os.close(self._writer)

    def _read(self) -> None:
        # closed when we know enough: nobody need wait for the end of what is damaged
        with open(self._reader, "rb", buffering=PIPE_SIZE) as file:
            self.dump.read(file)


@contextmanager
def following(name: str) -> Iterator[Follower]:
    """What reads along a dump, the image `name`; what fails meanwhile gets the cause that it knows."""
    with ThreadPoolExecutor(1) as thread:
        follower = Follower(name, thread)
        try:
            yield follower
        except Failure as failure:
            if follower.dump.packed and "does not fit" not in str(failure):
                raise _too_new(name, failure) from None
            raise
        finally:
            follower.close()


def check_untouched(path: str, directory: str) -> None:
    """Failure if something is where the dump `path` is to go, but for an empty lost+found and mounts."""
    for name in os.listdir(directory):
        place = f"{directory}/{name}"
        is_own = name == "lost+found" and not os.path.islink(place) and not os.listdir(place)
        if not (is_own or os.path.ismount(place)):
            raise Failure(f"{path} cannot be restored: {name} is where it is to go, from another dump")


def watch(path: str) -> Callable[[str], None]:
    """What listens to restore, and ends it with a Failure when it will not end by itself: 3 of 100 truncated dumps."""
    lines = itertools.count(1)

    def listen(line: str) -> None:
        if LOST.search(line) or next(lines) > MOST_LINES:
            raise Failure(f"image {path} is damaged or truncated: {line}")

    return listen


def judge(image: Image, directory: str, finished: Sequence[Finished], follower: Follower) -> None:
    """Fail unless restore, the last of the stages `finished`, has put everything of the image into `directory`."""
    *upstream, tee, restore = finished
    said = [line for line in restore.stderr.splitlines() if line.strip() and not HARMLESS.search(line)]
    if is_full(directory) or any("No space left" in line and "EA set" not in line for line in said):
        raise too_large(image, directory)
    damage = [line for line in said if DAMAGE.search(line)]
    if tee.status not in (0, -signal.SIGPIPE):
        raise damaged(image, tee)
    failure = follower.failure()
    # where restore ended before the dump did, it has to say why
    if failure and not (isinstance(failure, Truncated) and tee.status == -signal.SIGPIPE):
        check_stages(image, [*upstream, replace(tee, status=0), replace(restore, status=0)])
        failure.details = (*failure.details, *damage[:10])
        raise failure
    check_stages(image, finished)
    if damage:
        raise Failure(f"image {image.path} is damaged or truncated: {damage[0]}", details=damage[1:10])
    complete(follower.dump, directory)
    for line in said[:10]:
        log.warning(f"restore: {line}")


def _too_new(name: str, failure: Failure) -> Failure:
    """The failure of a dump in the way of 0.4b49, if this node's restore cannot read it."""
    ours = version("restore")
    if ours is None or ours >= PACKED:
        return failure
    return Failure(
        f"image {name} was made by dump 0.4b{PACKED} or newer, which restore 0.4b{ours} of this node cannot read",
        hint="use a node with restore of Debian 13, or make a tarball instead of a dump",
        details=[str(failure), *failure.details],
    )


def version(program: str) -> int | None:
    """49 of dump or restore 0.4b49; None if it cannot be told."""
    with suppress(Failure):
        found = VERSION.search(pipeline([[program]], timeout=10)[0].stderr)
        return int(found[1]) if found else None
    return None
