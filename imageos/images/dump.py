"""Images made by dump(8): one of the root filesystem, and one of /boot where the guest has it apart.

restore(8) follows links that it finds. So each dump gets a place where nothing is: a link of an earlier one would lead
it out of the guest.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from imageos import log, preload
from imageos.disks import mounting
from imageos.errors import Failure
from imageos.images.dumpfile import RECORD, TAPE, Dump, Truncated, is_packed, order_of, unpack
from imageos.images.imagefile import Image, check_stages, damaged, feed, is_full, too_large
from imageos.images.restored import SYMBOL_TABLE, complete
from imageos.node import linux
from imageos.node.children import PIPE_SIZE, in_child, signals_held
from imageos.node.confinement import unpacking
from imageos.node.programs import require
from imageos.run import Command, Finished, pipeline

if TYPE_CHECKING:
    from concurrent.futures import Future

# What is compressed within the format (dump -z) needs no name of its own.
SUFFIXES = ("-root.dump", "-root.dump.gz", "-root.dump.zst", "-root.dump.xz")
RESTORE = ["restore", "-r", "-y", "-f", "-"]
LEVEL_OFFSET = 692  # in the first record
PACKED = 49  # since 0.4b49, dump writes in another way
VERSION = re.compile(r"0\.4b(\d{1,9})\b")
# What restore mutters although its status is 0 and files are missing or full of zeroes
DAMAGE = re.compile(
    r"abort\?|Incorrect block|not found on tape|End-of-input|[Rr]ead error|[Ww]rite error|"
    r"resync|[Cc]hecksum|No space left|cannot create|skipped"
)
# With this, and at the latest after so much, it has lost its way: it would look for the next file for ever, or go ever
# deeper into a directory that holds itself.
# So with names that no filesystem has: restore would climb out of where it is (and would, but for the sandbox).
LOST = re.compile(r"not at beginning of a file|unexpected inode extension|(^|[ /])\.\.(/|:|$)")
MOST_LINES, MOST_SAID = 100_000, 16 << 20  # characters
HARMLESS = re.compile(
    r"cannot open /dev/tty|Dump tape is compressed|(lost\+found|boot): File exists|"
    r"expected next file \d+, got \d+"  # it has no name, as files of ext4 itself have none
)


def check(image: Image) -> None:
    """Look at the first record: Failure unless it is a full dump that this node can restore."""
    require("restore", "tee", *image.decompress[:1])
    preload.later("concurrent.futures")
    record = image.start[:RECORD]
    order = order_of(record)
    if not order:
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


def deploy(image: Image, directory: str) -> None:
    """Restore the root and, below it, /boot, where both are mounted already."""
    boot = f"{directory}/boot"
    if image.boot:
        with mounting.alone(directory) as root:  # what was hidden under the mount point of /boot stays hidden
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
    with following(image.path, None if image.compression else image.descriptor) as follower:
        finished = feed(
            image,
            Command(RESTORE, unpacking(directory)),
            "restoring",
            between=follower.stages,
            on_line=watch(image.path),
            on_tick=follower.tick,
        )
        judge(image, directory, finished, follower)
    os.unlink(f"{directory}/{SYMBOL_TABLE}")


RESTORE_TIMEOUT = 10.0  # seconds that restore gets to say by itself what is wrong


class Follower:
    """Reads the dump that restore reads: the file `plain` for itself, or what `stages` pass on to both."""

    def __init__(self, name: str, plain: int | None, stack: ExitStack) -> None:
        self.dump = Dump(name)
        self.stages: list[Command] = []
        self._theirs = stack.enter_context(ExitStack())  # descriptors for the stages only: close them once these run
        self._ended: Callable[[], int] = lambda: 0
        self._done: Future[None] | None = None
        self._found = 0.0  # when a failure was seen first
        if plain is None:
            reader, writer = os.pipe()
            linux.enlarge_pipe(writer, PIPE_SIZE)
            self.stages = [Command(["tee", f"/dev/fd/{writer}"], keep=[writer])]
            self._theirs.callback(os.close, writer)
        else:  # with a position of its own
            reader = os.open(f"/proc/self/fd/{plain}", os.O_RDONLY)
        if plain is None or is_packed(os.pread(plain, RECORD, 0)):
            self._file, self._ended = stack.enter_context(in_child(unpack, reader))
        else:  # content is passed over, which costs next to nothing
            self._file = stack.enter_context(os.fdopen(reader, "rb", 2 * RECORD))
        with signals_held():
            from concurrent.futures import ThreadPoolExecutor  # late: preloaded, and a tarball needs none
        self._thread = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(self._file.close)  # the thread ends soon: nobody waits for what is left

    def tick(self) -> None:
        """Begin, as soon as all have been started. End restore, which may never end by itself, some time after the dump
        was found not to be whole.
        """
        self._theirs.close()
        self._done = self._done or self._thread.submit(self._read)
        failure = self.failure() if self._done.done() else None
        self._found = self._found or (time.monotonic() if failure else 0.0)
        if failure and time.monotonic() - self._found > RESTORE_TIMEOUT:
            raise failure

    def failure(self) -> Failure | None:
        """Return the defect of the dump, None if it is whole. Call it after the end of the dump."""
        assert self._done
        try:
            self._done.result()
        except Failure as failure:
            return failure
        except MemoryError:
            return self.dump.damaged("what it holds takes more memory than imageos may have")
        return None

    def _read(self) -> None:
        with self._file:  # closed when we know enough: nobody need wait for the end of what is damaged
            try:
                self.dump.read(self._file)
            except Truncated:
                self._check_unpacked()
                raise
            self._check_unpacked()

    def _check_unpacked(self) -> None:
        if self._ended():
            raise self.dump.damaged("a block of it cannot be uncompressed")


@contextmanager
def following(name: str, plain: int | None = None) -> Iterator[Follower]:
    """Yield a reader of the dump of image `name`, which runs beside restore. It explains failures inside.

    `plain` is an open file with the dump as dump(8) made it; without it the dump comes by the follower's stages.
    """
    with ExitStack() as stack:
        follower = Follower(name, plain, stack)
        try:
            yield follower
        except Failure as failure:
            if follower.dump.packed and "does not fit" not in str(failure):
                raise _too_new(name, failure) from None
            raise


def check_untouched(path: str, directory: str) -> None:
    """Fail if `directory` holds more than mounts and an empty lost+found: something of another dump is in the way."""
    for name in os.listdir(directory):
        place = f"{directory}/{name}"
        is_own = name == "lost+found" and not os.path.islink(place) and not os.listdir(place)
        if not (is_own or os.path.ismount(place)):
            raise Failure(f"{path} cannot be restored: {name} is where it is to go, from another dump")


def watch(path: str) -> Callable[[str], None]:
    """Return a listener to restore that fails on a damaged dump: with 3 of 100 truncated ones, restore never ends."""
    lines = said = 0

    def listen(line: str) -> None:
        nonlocal lines, said
        lines, said = lines + 1, said + len(line)
        if LOST.search(line) or lines > MOST_LINES or said > MOST_SAID:
            raise Failure(f"image {path} is damaged or truncated: {line}")

    return listen


def judge(image: Image, directory: str, finished: Sequence[Finished], follower: Follower) -> None:
    """Fail unless restore, the last of the stages `finished`, has put everything of the image into `directory`."""
    *upstream, restore = finished
    tee = upstream.pop() if follower.stages else None
    said = [line for line in restore.stderr.splitlines() if line.strip() and not HARMLESS.search(line)]
    if is_full(directory) or any("No space left" in line and "EA set" not in line for line in said):
        raise too_large(image, directory)
    damage = [line for line in said if DAMAGE.search(line)]
    if tee and tee.status not in (0, -signal.SIGPIPE):
        raise damaged(image, tee)
    failure = follower.failure()
    # where restore ended before the dump did, it has to say why
    if failure and not (isinstance(failure, Truncated) and tee and tee.status == -signal.SIGPIPE):
        check_stages(image, [*upstream, restore._replace(status=0)])
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
        found = VERSION.search(pipeline(Command([program]), timeout=10)[0].stderr)
        return int(found[1]) if found else None
    return None
