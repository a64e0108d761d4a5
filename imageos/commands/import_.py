"""import: restore one disk of the instance from a backup on stdin.

The beginning tells what the stream is: one of `export`, one of ganeti-instance-image, or a bare disk; the last two
perhaps compressed.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from imageos import ganeti, hooks, log, run, settings
from imageos.backups import legacy, restore, stream
from imageos.backups.legacy import Member
from imageos.backups.stream import Source
from imageos.commands import create
from imageos.disks import discovery, disk, filesystem, grow
from imageos.disks.disk import Device
from imageos.disks.filesystem import Volume
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import guest
from imageos.guests import target as targets
from imageos.guests.target import Target
from imageos.hook import guest_disk
from imageos.images import diskimage, dump
from imageos.images.restored import SYMBOL_TABLE
from imageos.node import isolation
from imageos.settings import Settings


def main(_arguments: Sequence[str]) -> int:
    backup = ganeti.backup(os.environ, "IMPORT")
    instance = ganeti.instance(os.environ)
    isolation.enter()
    known = settings.load(os.environ).resolved(instance.memory)
    if backup.index == 0 and not known.nomount:
        run.require(*discovery.PROGRAMS)
    with disk.claimed(backup.device) as device:
        with log.phase(f"restored disk {backup.index}"):
            restored = restore_any(Source(0), device, instance, known)
        if backup.index == 0:
            known = dataclasses.replace(known, image_type=restored.image_type)
            adapt(device, instance, known, is_larger=restored.size < device.size)
    return 0


class Restored(NamedTuple):
    """What a stream was."""

    size: int  # bytes of the disk in it
    image_type: str = "raw"  # for the hooks, as if it had been created from such an image: a boot loader is on it


def restore_any(
    source: Source, device: Device, instance: Instance, known: Settings, unpacked: bool = False
) -> Restored:
    """Restore whatever comes.

    Failure, before the first write if possible, if it is nothing that can be restored.
    """
    begin = source.peek(legacy.BLOCK)
    if not begin:
        source.end()  # which knows a better reason, if what should have written has failed
        raise Failure("the backup stream is empty", hint="see the messages of the export, at the other end")
    compression = legacy.compression(begin)
    if stream.is_ours(begin):
        return Restored(restore_stream(source, device))
    if compression and unpacked:  # each layer takes a process, which a stream of few bytes could have hundreds of
        raise Failure(f"the stream is compressed with {compression} twice")
    if compression:
        log.info(f"the stream is compressed with {compression}")
        with legacy.decompressed(source, compression) as inner:
            return restore_any(inner, device, instance, known, unpacked=True)
    if legacy.is_archive(begin):
        return restore_archive(source, device, instance, known)
    return Restored(restore_plain(source, device, source.end))


def restore_stream(source: Source, device: Device) -> int:
    """A stream of `export`: every byte is checked before it is written."""
    manifest = stream.read_manifest(source)
    if manifest.disk_size > device.size:
        raise too_small(device, manifest.disk_size)
    log.info(
        f"disk {manifest.index} of {manifest.instance}: {log.size(manifest.disk_size)}, "
        f"{log.size(manifest.bytes)} in use, exported by {manifest.exporter}"
    )
    progress = log.Progress("restoring", manifest.bytes)
    done = 0
    with restore.writing(device, [(one.start, one.size) for one in manifest.volumes]) as writer:
        with restore.write_behind(writer) as write:
            for offset, data in stream.read_runs(source, manifest):
                write(offset, data)
                done += len(data)
                progress.update(done)
        progress.close()
    return manifest.disk_size


def restore_plain(source: Source, device: Device, finish: Callable[[], None], size: int | None = None) -> int:
    """A bare disk of `size` bytes, if that is known; else the stream ends where it does.

    `finish` checks the rest of the stream, before the disk becomes one that can boot.
    """
    begin = source.peek(MIB if size is None else min(MIB, size))
    if len(begin) < MIB and not any(begin):  # what tar writes of no file at all
        raise Failure(f"the backup stream holds nothing: it is {len(begin)} bytes of zeroes")
    table = legacy.read_table(begin)
    if table is None:
        raise Failure(
            f"the stream at byte {source.position} is no backup and no disk: it begins with '{legacy.printable(begin)}'"
        )
    least = max(size or 0, legacy.least_size(table))
    if least > device.size:
        raise too_small(device, least)
    log.info("the stream is a bare disk: it has no checksums, so only its length is checked")
    with restore.writing(device, [(part.start, part.size) for part in table.parts if part.number]) as writer:
        received = restore.copy_plain(source, writer, device.size, size)
        legacy.check_complete(received, table)
        finish()
    return received


def restore_archive(source: Source, device: Device, instance: Instance, known: Settings) -> Restored:
    """What ganeti-instance-image exported: dumps of the filesystems, or an image of the disk."""
    members = legacy.members(source)
    first = next(members, None)
    if first and first.name == legacy.IMAGE:
        return Restored(restore_image(source, first, members, device, known))
    if first and first.name in legacy.DUMPS:
        restore_dumps(source, itertools.chain([first], members), device, instance, known)
        return Restored(device.size, "dump")
    name = f"'{first.name}'" if first else "nothing"
    raise Failure(
        f"the tar archive in the stream is no backup: it holds {name} "
        f"instead of {legacy.IMAGE} or {' and '.join(legacy.DUMPS)}"
    )


def restore_image(
    source: Source, image_member: Member, others: Iterator[Member], device: Device, known: Settings
) -> int:
    def finish() -> None:
        if next(others, None):
            raise Failure(f"the archive in the stream holds more than {legacy.IMAGE}")

    size = legacy.disk_size(source, image_member, device.size)
    if size is None:
        return restore_plain(source, device, finish, image_member.size)
    if size > device.size:
        raise too_small(device, size)
    # qcow2 cannot be read from its first byte to its last
    with legacy.staged(source, image_member, known.export_dir) as image:
        finish()
        diskimage.check_size(image, device.size)
        with disk.attached(device, direct=True) as attached, disk.disarmed_on_failure(device, attached):
            diskimage.write(image, device, attached)
            disk.flush(device, attached.descriptor)
        return diskimage.inspect(image).size


def restore_dumps(
    source: Source, members: Iterable[Member], device: Device, instance: Instance, known: Settings
) -> None:
    """Dumps go onto partitions as `create` makes them."""
    intended = create.plan(known, instance, device)
    run.require("head", "tee", "restore", *filesystem.programs(intended, known.filesystem))
    with (
        disk.attached(device, direct=True) as attached,
        disk.disarmed_on_failure(device, attached),
        ExitStack() as stack,
    ):
        volumes = tuple(filesystem.plan_volumes(intended, known.filesystem, attached.partition))
        disk.write_table(attached, intended)
        filesystem.make(volumes)
        filesystem.mount_all(stack, volumes, isolation.TARGET)
        with targets.opened(
            isolation.TARGET, instance.short_name, guest_disk(attached.path, volumes), known.guest_timeout
        ) as root:
            restore_both(source, members, root, any(volume.role == "boot" for volume in volumes))
            fit(root, volumes)
        disk.use_cache(attached)
        stack.close()
        disk.flush(device, attached.descriptor)


def restore_both(source: Source, members: Iterable[Member], root: Target, separate_boot: bool) -> None:
    """Unpack root.dump and boot.dump, in any order, each where nothing is (see images.dump).

    What the root filesystem has under the mount point of /boot nobody could see: it gives way to boot.dump.
    """
    aside = f"/.imageos-{os.urandom(6).hex()}"  # what the other dump cannot know
    boot = "/boot" if separate_boot else aside
    done: list[str] = []
    for member in members:
        if member.name not in legacy.DUMPS:
            raise Failure(f"the archive in the stream holds '{member.name}', which is no backup")
        if member.name in done:
            raise Failure(f"the archive in the stream holds {member.name} twice")
        place = boot if member.name == "boot.dump" else "/"
        root.mkdir(place)
        with log.phase(f"restored {member.name}"), ExitStack() as stack:
            directory = stack.enter_context(root.directory(place))
            if member.name == "boot.dump":
                root.clear(place, keep=["lost+found"])
                dump.check_untouched("boot.dump of the backup", directory)
            elif done:
                directory = stack.enter_context(filesystem.alone(directory))
            legacy.unpack_dump(source, member, directory)
        root.remove(os.path.join(place, SYMBOL_TABLE))
        done.append(member.name)
    if "root.dump" not in done:
        raise Failure("the archive in the stream holds no root.dump")
    if "boot.dump" in done and boot == aside:
        root.mkdir("/boot")
        root.clear("/boot")
        root.rename(aside, "/boot")


def fit(root: Target, volumes: tuple[Volume, ...]) -> None:
    """Change what names the old disk in a guest that was restored onto new filesystems."""
    kept = legacy.other_mounts(root.read("/etc/fstab") or "", ["/", "/boot", "/boot/efi"])
    root.write("/etc/fstab", filesystem.fstab(volumes) + "".join(f"{line}\n" for line in kept))
    root.remove("/etc/udev/rules.d/z*_persistent-net.rules")
    guest.request_relabel(root)


def adapt(device: Device, instance: Instance, known: Settings, is_larger: bool) -> None:
    """What an import changes in the guest on the first disk: the size of its root, and what hooks do.

    The disk is whole by now: what fails here leaves it so.
    """
    names = [name for name in hooks.find(known.customize_dir) if name in known.import_hooks.split()]
    if known.nomount or not (names or (is_larger and known.grow)):
        return
    with disk.attached(device) as attached:
        found = discovery.find_if_any(attached, "the disk is left as it was in the backup")
        if not found:
            return
        if is_larger and known.grow:
            with log.phase("grew the root filesystem"):
                grow.grow(attached, found)
        with ExitStack() as stack:
            if names:
                filesystem.mount_all(stack, found.volumes, isolation.TARGET)
                context = hooks.Context("import", os.environ, known, isolation.TARGET, device, attached, found.volumes)
                hooks.run_all(names, context)
                seen = guest_disk(attached.path, found.volumes)
                with targets.opened(isolation.TARGET, instance.short_name, seen, known.guest_timeout) as root:
                    guest.request_relabel(root)
        disk.flush(device, attached.descriptor)


def too_small(device: Device, size: int) -> Failure:
    return Failure(
        f"disk {device.path} of {log.size(device.size)} ({device.size} bytes) is smaller than the one of the backup, "
        f"{log.size(size)} ({size} bytes)",
        hint="give the instance a disk that is as large or larger",
    )
