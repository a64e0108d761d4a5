"""A guest's partition, logical volume and filesystem, grown to the end of the disk; every identifier is kept."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from imageos import log
from imageos.disks import blockdev, lvm, mounting, partitions, superblock
from imageos.disks.blockdev import LoopDevice
from imageos.disks.discovery import Found
from imageos.disks.filesystem import FILESYSTEMS
from imageos.disks.layout import GPT_BACKUP, MIB, SECTOR
from imageos.disks.lvm import Extents, Group
from imageos.disks.partitions import Part, Table
from imageos.errors import Failure
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.node.programs import environment, require
from imageos.run import Command, Failed, pipeline, run

CORRECTED, UNCORRECTED = 1, 4  # statuses of fsck(8)
# resize2fs asks /sys if the kernel clears new inode tables later, as it has done since 2.6.37; its room has no /sys.
# 1 TiB of them can be 64 GiB.
LAZY = {"RESIZE2FS_FORCE_LAZY_ITABLE_INIT": "1"}
MMP_PATIENCE = 60  # seconds that checking and growing may wait, together
STEPS = 32  # that the space which a filesystem could grow into is cut into, to find how far it can


class Damaged(Failure):
    """The filesystem has errors that nobody but a person should mend. It had them before it was to grow."""


class Unsound(Failure):
    """Growing has left the disk damaged."""


class _Kept(Failure):
    """The filesystem is not to grow."""


class _Full(_Kept):
    """There is nothing that it could grow into."""

    def __init__(self) -> None:
        super().__init__("it has all of the disk that it can have")


def grow(loop: LoopDevice, found: Found) -> None:
    """Grow the root to the end of the disk, if nothing lies behind it. Nothing of the disk may be mounted.

    A disk that is sound is worth more than one that is full: what keeps the root from growing is told, and no failure.
    """
    try:
        with log.phase("grew the root filesystem"), _table_kept(loop, found.table):
            partly = _grow(loop, found.table, found.root)
            if partly:
                log.warning(str(partly))
    except _Kept as obstacle:
        log.info(f"the root filesystem is not grown: {obstacle}")
    except Damaged as failure:
        failure.hint = "repair the image; GROW=no deploys it as it is"
        raise
    except (Unsound, mounting.NotWritten):
        raise
    except Failure as failure:
        log.warning(f"the root filesystem is not grown: {failure}")
        if failure.hint:
            log.info(f"hint: {failure.hint}")


def grow_or_refuse(loop: LoopDevice, table: Table, part: Part) -> int:
    """As `grow`, of any filesystem on a disk; fail if it could have more, but cannot grow.

    Return the bytes that it has gained. If there is nothing to gain, nothing is written.
    """
    row = FILESYSTEMS[part.kind]
    before = size_of(part)
    spare = _behind(loop, table, part)
    obstacle = why_not(table, part)
    if spare + (0 if obstacle else part.size - before) < MIB:
        return 0
    if obstacle:
        raise Failure(
            f"the {part.kind} on {part} cannot grow by {log.size(spare)}: {obstacle}",
            hint="move what is in its way, in the guest; nothing has been changed",
        )
    require(*row.check[:1], row.grow(part.device)[0])
    try:
        with _table_kept(loop, table):
            partly = _grow(loop, table, part)
        if partly:
            raise partly
    except _Full:
        return 0
    except Damaged as failure:
        failure.hint = f"repair it with {row.repair} in the guest, or restore a backup; then try again"
        raise
    except _Kept as obstacle:
        raise Failure(f"the {part.kind} on {part} cannot grow: {obstacle}") from None
    return size_of(part) - before


def last_filesystem(table: Table) -> Part:
    """Return the filesystem of a disk without a system that can grow: the last one, or that of its logical volume."""
    filesystems = [part for part in table.parts if part.kind in FILESYSTEMS and part.device]
    volumes = [part for part in filesystems if part.volume]
    if table.unread:
        raise Failure(table.unread, table.remedy)
    if len(volumes) > 1:
        raise Failure(
            f"which one should grow: {log.few([str(part) for part in volumes])}?",
            hint="pvresize, and lvextend --resizefs of one of them, in the guest",
        )
    if not filesystems:
        raise NoFilesystem("it holds nothing that imageos can grow")
    return max(volumes or filesystems, key=lambda part: part.start)


def size_of(part: Part) -> int:
    """Return the bytes that the filesystem on `part` covers."""
    with open(part.device, "rb") as file:
        linux.flush_buffers(file.fileno())  # while it was mounted, the kernel may have written past this cache
    return blockdev.ask(part.device, FILESYSTEMS[part.kind].size)


class NoFilesystem(Failure):
    """A disk holds nothing that could grow here."""


@contextmanager
def _table_kept(loop: LoopDevice, table: Table) -> Iterator[None]:
    """On a failure in growing, fail with that if the partition table is damaged."""
    try:
        yield
    except (_Kept, Damaged, Unsound, mounting.NotWritten):
        raise
    except Failure:
        _check_table(loop, table)
        raise
    finally:
        partitions.hide_physical(loop, table)


def _grow(loop: LoopDevice, table: Table, root: Part) -> Failure | None:
    """Grow the filesystem on `root`, whatever that is, and what is below it; return why it has not grown to the end."""
    if table.kind == "gpt":
        _move_backup_header(loop)
        table = table._replace(end=partitions.read_table(loop.path, loop.size).end)
    if root.volume:
        _show_partitions(loop, table, root, root.size)
        table = _grow_holder(loop, table, root)
    obstacle = why_not(table, root) or protection(root)
    if obstacle:
        raise _Kept(obstacle)
    row = FILESYSTEMS[root.kind]
    before = size_of(root)
    if row.check:
        _check(root)
    size = root.size
    if root.volume:
        size = _extend_volume(loop, table, root)
    elif table.kind:
        size = new_size(table, root)
        _grow_partition(loop, table, root, size)
    partly = _grow_filesystem(root, size)
    if size_of(root) <= before:
        raise _Full
    return partly


def _behind(loop: LoopDevice, table: Table, part: Part) -> int:
    """Return the bytes that nothing has, and that a filesystem on `part` could have if nothing were in its way."""
    end = max((other.end for other in table.partitions), default=0)
    spare = max(0, _last_end(loop, table) // MIB * MIB - end) if table.kind else 0
    if not part.volume:
        return spare
    group, extents = _extents(table.groups, part)
    holder = _holder(table, part)
    unknown = holder.size - group.starts[holder.device] - group.ends[holder.device] * group.extent_size
    # what lvm2 rounds away is no room
    return group.behind(extents).length * group.extent_size + spare + unknown // group.extent_size * group.extent_size


def _last_end(loop: LoopDevice, table: Table) -> int:
    """Return where the last partition may end, in bytes, once the backup of a gpt is where it belongs."""
    return max(table.end, loop.size // SECTOR * SECTOR - GPT_BACKUP) if table.kind == "gpt" else table.end


def why_not(table: Table, root: Part) -> str:
    """Return what keeps the root from growing, or nothing. Numbers say nothing about the order on the disk."""
    if root.volume:
        return _why_not_volume(table, root)
    behind = [part for part in table.partitions if part.start > root.start]
    if behind:
        kinds = ", ".join(f"{part} ({part.kind or 'unknown'})" for part in behind)
        return f"behind {root} lies {kinds}"
    return ""


def _why_not_volume(table: Table, root: Part) -> str:
    """As `why_not`: a logical volume grows into free extents behind it, and stays in one piece."""
    group, extents = _extents(table.groups, root)
    free = group.behind(extents)
    if group.fixed or free.length:
        return group.fixed
    if free.end == group.ends[free.device]:
        return why_not(table, _holder(table, root))
    following = [
        f"{group.name}/{volume.name}"
        for volume in group.volumes
        if volume.extents and (volume.extents.device, volume.extents.first) == (free.device, free.end)
    ]
    return f"behind {root} lies {' '.join(['logical volume', *following]) if following else 'what is not free'}"


def _holder(table: Table, root: Part) -> Part:
    return next(part for part in table.partitions if part.start <= root.start < part.end)


def _extents(groups: Iterable[Group], root: Part) -> tuple[Group, Extents]:
    name, _, volume = root.volume.partition("/")
    group = next(group for group in groups if group.name == name)
    extents = group.volume(volume).extents
    assert extents
    return group, extents


def protection(root: Part) -> str:
    """Return why a filesystem that is protected against being mounted twice (mmp) does not grow; empty if it does."""
    row = FILESYSTEMS[root.kind]
    check_wait = row.check_wait
    if not check_wait:
        return ""
    objection, wait = blockdev.ask(root.device, lambda read: (row.objection(read, True), 2 * check_wait(read)))
    if objection or not wait:
        return objection
    programs = f"{row.check[0]} and {row.grow(root.device)[0]}"
    if wait > MMP_PATIENCE:
        return f"it is protected against being mounted twice (mmp), by which {programs} would wait {wait} s"
    log.info(f"{programs} wait {wait} s: {root} is protected against being mounted twice (mmp)")
    return ""


def new_size(table: Table, root: Part) -> int:
    """Return the bytes of a root that ends with the last whole MiB that it may use; never less than it has."""
    return max(root.size, table.end // MIB * MIB - root.start)


def _move_backup_header(loop: LoopDevice) -> None:
    linux.flush_buffers(loop.descriptor)
    move = ["sfdisk", "--relocate", "gpt-bak-std", "--no-reread", "--no-tell-kernel", loop.path]
    run(Command(move, Room([loop.path])))


def _grow_partition(loop: LoopDevice, table: Table, root: Part, size: int) -> None:
    if size == root.size:
        return
    for extended in table.extended:
        if extended.start < root.start < extended.end:  # the root is a logical one
            _resize(loop, extended, max(extended.size, root.start + size - extended.start))
    _resize(loop, root, size)
    _show_partitions(loop, table, root, size)


def _show_partitions(loop: LoopDevice, table: Table, root: Part, size: int) -> None:
    parts = [(part.number, part.start, size if part is root else part.size) for part in table.partitions if part.number]
    blockdev.set_partitions(loop, parts)


def _grow_holder(loop: LoopDevice, table: Table, root: Part) -> Table:
    """Grow what a logical volume is on; return the table with the volume group as it is then.

    The guest can read all in between, and use what the root cannot have.
    """
    group, _ = _extents(table.groups, root)
    holder = _holder(table, root)
    if group.fixed or why_not(table, holder):
        return table
    size = new_size(table, holder) if table.kind else holder.size
    if table.kind:
        _grow_partition(loop, table, holder, size)
    lvm.resize(group, holder.device)
    log.info(f"{holder} and its physical volume have {log.size(size)}")
    groups, problem = lvm.read({part.device: part.uuid for part in table.partitions if part.device in group.starts})
    if problem:
        raise problem
    return table._replace(groups=groups)


def _extend_volume(loop: LoopDevice, table: Table, root: Part) -> int:
    """Give a logical volume the free extents behind it; return its size in bytes."""
    group, extents = _extents(table.groups, root)
    free = group.behind(extents)
    if free.length:
        lvm.extend(group, root.volume, free)
        blockdev.grow_range(loop, root.device, root.size + free.length * group.extent_size)
    return root.size + free.length * group.extent_size


def _resize(loop: LoopDevice, part: Part, size: int) -> None:
    # What is not given here stays: start, type, name, attributes and the identifiers.
    resize = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe", "never", "--wipe-partitions", "never",
              "--partno", str(part.number), loop.path]  # fmt: skip
    run(Command(resize, Room([loop.path])), input=f", {size // SECTOR}\n")


def _check_table(loop: LoopDevice, before: Table) -> None:
    """Fail unless every partition is still there, as large as it was, or larger."""
    linux.flush_buffers(loop.descriptor)
    try:
        after = partitions.read_table(loop.path, loop.size)
    except Failure as failure:
        raise Unsound(f"growing has damaged the partition table: {failure}") from None
    sizes = {(part.number, part.start): part.size for part in after.partitions}
    lost = [part for part in before.partitions if sizes.get((part.number, part.start), 0) < part.size]
    if lost:
        raise Unsound(f"growing has damaged the partition table: {lost[0]} is not what it was")


def _grow_filesystem(root: Part, size: int) -> Failure | None:
    row = FILESYSTEMS[root.kind]
    if size < row.smallest_grown:
        raise _Kept(f"Linux refuses to grow a {root.kind} to less than {log.size(row.smallest_grown)}")
    if row.check:
        return _grow_by_steps(root, size)
    with mounting.mounted_somewhere(root.device, root.kind) as (directory, _):
        # the program only hands our wish to the kernel, which demands the capability
        room = Room([root.device], mount=directory, capabilities=[linux.CAP_SYS_ADMIN])
        grown = pipeline(Command([*row.grow(root.device), directory], room))[0]
    # judged once it is unmounted and all is written: a kernel that refuses leaves a filesystem as it was
    if grown.status:
        raise grown.failure()
    return None


def _grow_by_steps(root: Part, size: int) -> Failure | None:
    """Grow it to `size`, or as far as its program does: some tables of a filesystem cannot describe that much.

    Return why it has not grown all the way.
    """
    before = blockdev.ask(root.device, superblock.ext_size)
    refusal = _attempt(root)
    if refusal and not blockdev.ask(root.device, superblock.check_wait):
        # from above: to refuse takes no time; in the lowest step once more, by smaller ones
        for step in ((size - before) // STEPS, (size - before) // STEPS**2):
            sizes = range(before + (STEPS - 1) * step, before, -step) if step >= MIB else ()
            if any(not _attempt(root, f"{size // 1024}K") for size in sizes):
                break
    if refusal or blockdev.ask(root.device, superblock.has_orphan_file):
        _prove(root)
    reached = blockdev.ask(root.device, superblock.ext_size)
    if refusal and reached <= before:
        raise refusal
    partly = f"the {root.kind} on {root} has grown to {log.size(reached)}, not to {log.size(size)}: {refusal}"
    return Failure(partly, details=refusal.details) if refusal else None


def _attempt(root: Part, *size: str) -> Failure | None:
    """Grow to the end of the device, or to `size`; return why that was not done."""
    words = [*FILESYSTEMS[root.kind].grow(root.device), root.device, *size]
    done = pipeline(Command(words, _room(root), env={**environment(), **LAZY}))[0]
    return done.failure() if done.status else None


def _check(root: Part) -> None:
    """Check it, as its program demands before it grows it."""
    checked = _fsck(root, "-f")
    if checked and checked.finished.status > 0 and checked.finished.status & UNCORRECTED:
        # it would start with a shell that asks to repair it, at best
        raise Damaged(f"the {root.kind} on {root} is damaged: {checked}", details=checked.details)
    if checked:
        raise checked


def _prove(root: Part) -> None:
    """Fail unless it is sound, or was easily made so."""
    # A program that gave up half way has left a mark, without which a check is over at once. None tells of
    # the list of orphans, with whose checksums as resize2fs 1.47.0 leaves them Linux does not mount it.
    checked = _fsck(root, *(["-f"] if blockdev.ask(root.device, superblock.has_orphan_file) else []))
    if checked:
        raise Unsound(f"growing has damaged the {root.kind} on {root}: {checked}", details=checked.details)


def _fsck(root: Part, *options: str) -> Failed | None:
    """Return why it is not sound, although its program has corrected what is easily corrected."""
    checked = pipeline(Command([*FILESYSTEMS[root.kind].check, *options, root.device], _room(root)))[0]
    return None if checked.status in (0, CORRECTED) else checked.failure()


def _room(root: Part) -> Room:
    return Room([root.device], memory=resource.RLIM_INFINITY)  # what they need grows with the disk
