"""export: write a backup of one disk of the instance to stdout.

It copies blocks, so that it works for any content, also on a read-only snapshot. It writes no temporary files: it first
finds the used blocks, because Ganeti wants to know the size of the backup in advance.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from imageos import __version__, ganeti, log
from imageos.backups import stream
from imageos.backups.stream import Manifest, Volume
from imageos.disks import blockdev, partitions, usage
from imageos.disks.blockdev import Disk
from imageos.disks.partitions import Table
from imageos.disks.usage import Map
from imageos.errors import Failure, explained
from imageos.node import isolation, linux
from imageos.settings import examine_settings


def main(_arguments: Sequence[str]) -> int:
    ganeti.check_api(os.environ)
    backup = ganeti.backup(os.environ, "EXPORT")
    output = keep_stdout()
    isolation.enter()
    settings, problems = examine_settings(os.environ)
    for problem in problems:
        log.warning(str(problem))  # a wrong setting must not prevent a backup
    log.set_debug(settings.image_debug)
    with blockdev.claimed(backup.device, read_only=True) as disk:
        export(disk, backup, output)
    return 0


def keep_stdout() -> int:
    """Return a descriptor for the stream; from now on, all other output to stdout goes to the log."""
    output = os.dup(1)
    os.dup2(2, 1)
    return output


def export(disk: Disk, backup: ganeti.Backup, output: int) -> None:
    table = survey(disk)
    with log.phase(f"looked at disk {backup.number} of {log.size(disk.size)}"):
        used = usage.find(disk, table.parts)
    runs, count, members = stream.count(used.extents())
    manifest = describe(disk, backup, table, runs, count)
    announce(backup.size_descriptor, stream.length(manifest, members))
    with log.phase(f"sent {log.size(count)} of disk {backup.number}"):
        send(output, manifest, disk, used)


def survey(disk: Disk) -> Table:
    """Return the partition table. If it cannot be read, return an empty one, so that all blocks are sent."""
    try:
        with blockdev.attached(disk, read_only=True) as loop:
            table = partitions.read(loop)
            if table.unread:
                log.info(f"disk {disk.path} is sent with all that LVM has not allocated: {table.unread}")
            return table
    except (Failure, OSError) as error:
        log.info(f"disk {disk.path} is sent with all free blocks: {error}")
        return Table("", (), disk.size)


def describe(disk: Disk, backup: ganeti.Backup, table: Table, runs: int, count: int) -> Manifest:
    volumes = tuple(Volume(part.number, part.start, part.size, part.type, part.kind) for part in table.partitions)
    return Manifest(
        disk_size=disk.size,
        table=table.kind,
        volumes=volumes,
        runs=runs,
        bytes=count,
        created=int(time.time()),
        instance=backup.instance,
        index=backup.number,
        exporter=f"imageos {__version__}",
    )


def announce(descriptor: int | None, length: int) -> None:
    """Tell Ganeti the length of the stream in bytes."""
    if descriptor is None:
        return
    with explained(f"cannot write to EXP_SIZE_FD={descriptor}"):
        os.write(descriptor, f"{length}\n".encode())
        os.close(descriptor)


def send(output: int, manifest: Manifest, disk: Disk, used: Map) -> None:
    linux.enlarge_pipe(output, stream.RUN)
    progress = log.Progress(f"sending disk {manifest.index}", manifest.bytes)

    def read_into(offset: int, buffer: memoryview) -> None:
        usage.read_into(disk, offset, buffer)

    for done in stream.write(output, manifest, usage.read_ahead(disk, used.extents()), read_into):
        progress.update(done)
