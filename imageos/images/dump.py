"""Images made by dump(8): one of the root filesystem, and one of /boot where the guest has it apart.

restore(8) follows links that it finds. So each dump gets a place where nothing is: a link of an earlier one would lead
it out of the guest.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Callable, Sequence

from imageos import log
from imageos.disks import filesystem
from imageos.errors import Failure
from imageos.guests.sandbox import unpacking
from imageos.images.imagefile import Image, beginning, check_stages, feed, is_full, too_large
from imageos.run import Finished, require

# What is compressed within the format (dump -z) needs no name of its own.
SUFFIXES = ("-root.dump", "-root.dump.gz", "-root.dump.zst", "-root.dump.xz")
# protocols/dumprestore.h: the first record, struct s_spcl
RECORD = 1024  # bytes
MAGIC, MAGIC_OFFSET = 60012, 24
LEVEL_OFFSET = 692
CHECKSUM = 84446  # of the record's 256 integers
# What restore mutters although its status is 0 and files are missing or full of zeroes
DAMAGE = re.compile(
    r"Unknown EA index|abort\?|Incorrect block|not found on tape|End-of-input|[Rr]ead error|[Ww]rite error|"
    r"resync|[Cc]hecksum|No space left|cannot create|skipped"
)
# With this, and at the latest after so many lines, it has lost its way: it would look for the next file for ever.
# So with names that no filesystem has: restore would climb out of where it is (and would, but for the sandbox).
LOST = re.compile(r"not at beginning of a file|unexpected inode extension|(^|[ /])\.\.(/|:|$)")
MOST_LINES = 100_000
HARMLESS = re.compile(r"cannot open /dev/tty|Dump tape is compressed|(lost\+found|boot): File exists")
SYMBOL_TABLE = "restoresymtable"


def check(image: Image) -> None:
    """Look at the first record: Failure unless it is a full dump that this node can restore."""
    require("restore", *image.decompress[:1])
    record = beginning(image, RECORD)
    order = next((one for one in "<>" if _is_header(record, one)), None)
    if order is None:
        raise Failure(f"image {image.path} is not a dump, or damaged at its beginning")
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
    # TMPDIR, where it keeps a list of all directories, is ours alone (isolation)
    restore = ["restore", "-r", "-y", "-f", "-"]
    finished = feed(image, restore, "restoring", prepare=unpacking(directory), on_line=watch(image.path))
    judge(image, directory, finished)
    os.unlink(f"{directory}/{SYMBOL_TABLE}")


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


def judge(image: Image, directory: str, finished: Sequence[Finished]) -> None:
    """Fail unless restore, the last of the stages `finished`, has put everything of the image into `directory`."""
    said = [line for line in finished[-1].stderr.splitlines() if line.strip() and not HARMLESS.search(line)]
    if is_full(directory) or any("No space left" in line for line in said):
        raise too_large(image, directory)
    damage = [line for line in said if DAMAGE.search(line)]
    check_stages(image, finished)
    if damage:
        raise Failure(f"image {image.path} is damaged or truncated: {damage[0]}", details=damage[1:10])
    for line in said[:10]:
        log.warning(f"restore: {line}")


def _is_header(record: bytes, order: str) -> bool:
    if len(record) < RECORD:
        return False
    magic: int = struct.unpack_from(order + "i", record, MAGIC_OFFSET)[0]
    return magic == MAGIC and sum(struct.unpack(order + "256i", record)) & 0xFFFFFFFF == CHECKSUM
