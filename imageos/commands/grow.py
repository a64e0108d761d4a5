"""grow: grow the filesystems of a stopped instance to its disks, after gnt-instance grow-disk.

On each disk the root, or else the last filesystem, gets what was added, with its partition and LVM: as far as nothing
lies behind it, which is refused. If nothing was added, nothing is done, and that is success.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from imageos import cluster, log, remote
from imageos.cluster import ClusterInstance
from imageos.commandline import Parser
from imageos.disks import blockdev, discovery, grow, partitions
from imageos.disks.blockdev import LoopDevice
from imageos.disks.partitions import NoSystem, Part, Table
from imageos.errors import Failure
from imageos.node import isolation
from imageos.node.children import signals_held
from imageos.node.programs import require


def parser() -> Parser:
    made = Parser("imageos grow", __doc__)
    made.add_instance()
    made.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="N|PATH",
        help="only the disk of this number; or a disk on this node: Ganeti is not asked, INSTANCE is only a name",
    )
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    cluster.check_name(options.instance)
    isolation.enter()
    require(*partitions.PROGRAMS)
    if any("/" in disk for disk in options.disk):
        grow_all(options.disk)
        return 0
    instance = cluster.find_instance(options.instance)
    cluster.check_stopped(instance)
    numbers = wanted(instance, options)
    with cluster.activated(instance) as disks:
        paths = [disks[number] for number in numbers]
        if instance.is_here:
            grow_all(paths)
        else:
            words = [f"--disk={path}" for path in paths]
            remote.run_on(instance.node, ["grow", *words, instance.name])
    return 0


def wanted(instance: ClusterInstance, options: argparse.Namespace) -> Sequence[int]:
    """Return the numbers of the disks that are meant; fail if it has disks, but not these."""
    for text in options.disk if instance.disk_count else ():
        if not (re.fullmatch("[0-9]{1,4}", text) and int(text) < instance.disk_count):
            there = f"0 to {instance.disk_count - 1}" if instance.disk_count > 1 else "0 alone"
            raise Failure(f"instance {instance.name} has no disk {text}: it has {there}")
    return sorted({int(text) for text in options.disk}) or range(instance.disk_count)


def grow_all(paths: Sequence[str]) -> None:
    """Grow all that can grow. Of several disks, those behind the first may hold nothing that is ours to grow."""
    failure = None
    for number, path in enumerate(paths):
        try:
            grow_disk(path)
        except Failure as problem:
            if path not in str(problem):
                problem.args = (f"disk {path}: {problem}",)
            if number and isinstance(problem, grow.NoFilesystem):
                log.info(str(problem))
                continue
            if failure:
                log.warning(str(failure))
            failure = problem
    if failure:
        raise failure


def grow_disk(path: str) -> None:
    """Grow one disk, and say what it has gained."""
    with blockdev.claimed(path) as disk, blockdev.attached(disk) as loop:
        table, part = find(loop)
        before = grow.size_of(part)
        with signals_held():  # what is stopped half way is damaged
            try:
                gained = grow.grow_or_refuse(loop, table, part)
            finally:  # what was done before a failure stays, too
                blockdev.flush(loop)
            tell(f"disk {path}: the {part.kind} on {part}", before, gained)


def tell(what: str, before: int, gained: int) -> None:
    if gained:
        log.info(f"{what} has grown from {log.size(before)} to {log.size(before + gained)}")
    else:
        log.info(f"{what} has all of the disk that it can have, {log.size(before)}: there is nothing to do")


def find(loop: LoopDevice) -> tuple[Table, Part]:
    """Return the root of the system on a disk; without one, the last filesystem."""
    table = partitions.read(loop)
    try:
        found = discovery.find_on(table)
        return found.table, found.root
    except NoSystem as no_system:
        if table.unread or any(part.obstacle for part in table.parts):
            raise  # the root may be there
        try:
            return table, grow.last_filesystem(table)
        except grow.NoFilesystem as nothing:
            nothing.hint, nothing.details = "grow it in the guest", no_system.details
            raise
