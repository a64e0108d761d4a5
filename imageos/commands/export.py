"""export: write a backup of one disk of the instance to stdout.

Blockwise, so that it works for whatever is on the disk, and on a read-only snapshot. Nothing is staged: what is used
is decided first, because Ganeti wants to know how much will come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from imageos import __version__, ganeti, log, settings
from imageos.backups import stream
from imageos.backups.stream import Manifest, Volume
from imageos.disks import discovery, disk, usage
from imageos.disks.discovery import Table
from imageos.disks.disk import Device
from imageos.disks.usage import Map
from imageos.errors import Failure
from imageos.node import isolation, linux


def main(_arguments: Sequence[str]) -> int:
    ganeti.check_api(os.environ)
    backup = ganeti.backup(os.environ, "EXPORT")
    output = keep_stdout()
    isolation.enter()
    known, problems = settings.examine(os.environ)
    for problem in problems:
        log.warning(str(problem))  # no reason not to make a backup
    log.set_debug(known.image_debug)
    with disk.claimed(backup.device, read_only=True) as device:
        export(device, backup, output)
    return 0


def keep_stdout() -> int:
    """A descriptor for the stream; what anything else prints to stdout goes to the log."""
    output = os.dup(1)
    os.dup2(2, 1)
    return output


def export(device: Device, backup: ganeti.Backup, output: int) -> None:
    table = survey(device)
    with log.phase(f"looked at disk {backup.index} of {log.size(device.size)}"):
        used = usage.find(device, table.parts)
    runs, count, members = stream.count(used.runs())
    manifest = describe(device, backup, table, runs, count)
    announce(backup.size_descriptor, stream.length(manifest, members))
    with log.phase(f"sent {log.size(count)} of disk {backup.index}"):
        send(output, manifest, device, used)


def survey(device: Device) -> Table:
    """The partitions and what they hold. A table that cannot be trusted is as good as none: all is sent."""
    try:
        with disk.attached(device, read_only=True) as attached:
            return discovery.read(attached)
    except (Failure, OSError) as error:
        log.info(f"disk {device.path} is sent with all free blocks: {error}")
        return Table("", (), device.size)


def describe(device: Device, backup: ganeti.Backup, table: Table, runs: int, count: int) -> Manifest:
    volumes = tuple(Volume(part.number, part.start, part.size, part.type, part.kind) for part in table.parts)
    return Manifest(
        disk_size=device.size,
        table=table.kind,
        volumes=volumes,
        runs=runs,
        bytes=count,
        created=int(time.time()),
        instance=backup.instance,
        index=backup.index,
        exporter=f"imageos {__version__}",
    )


def announce(descriptor: int | None, length: int) -> None:
    """Tell Ganeti how many bytes will come."""
    if descriptor is None:
        return
    try:
        os.write(descriptor, f"{length}\n".encode())
        os.close(descriptor)
    except OSError as error:
        raise Failure(f"cannot write to EXP_SIZE_FD={descriptor}: {error.strerror}") from None


def send(output: int, manifest: Manifest, device: Device, used: Map) -> None:
    linux.enlarge_pipe(output, stream.RUN)
    progress = log.Progress(f"sending disk {manifest.index}", manifest.bytes)

    def read_into(offset: int, buffer: memoryview) -> None:
        usage.read_into(device, offset, buffer)

    for done in stream.write(output, manifest, usage.read_ahead(device, used.runs()), read_into):
        progress.update(done)
    progress.close()
