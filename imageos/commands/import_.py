"""import: restore one disk of the instance from a backup on stdin.

The beginning tells what the stream is: one of `export`, one of ganeti-instance-image, or a bare disk; the last two
perhaps compressed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from imageos import ganeti, hooks, log
from imageos.backups import legacy, restore, stream
from imageos.backups.legacy import Member
from imageos.backups.stream import Source
from imageos.disks import blockdev, discovery, filesystem, fstab, grow, mounting, partitions
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.discovery import Found
from imageos.disks.filesystem import Volume
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import guest, hostkeys, initramfs
from imageos.guests.target import Target, opened_system
from imageos.images import diskimage, dump, tarball, wholeness
from imageos.images.imagefile import compression_of, exact
from imageos.images.restored import SYMBOL_TABLE
from imageos.node import isolation
from imageos.node.programs import require
from imageos.settings import Settings, load_settings


def main(_arguments: Sequence[str]) -> int:
    backup = ganeti.backup(os.environ, "IMPORT")
    instance = ganeti.instance(os.environ)
    isolation.enter()
    settings = load_settings(os.environ).with_sizes(instance.memory)
    if backup.number == 0 and not settings.nomount:
        require(*partitions.PROGRAMS)
        hooks.load(settings, hooks.chosen(settings, settings.import_hooks))
    with blockdev.claimed(backup.device) as disk:
        with log.phase(f"restored disk {backup.number}"):
            restored = restore_any(Source(0), disk, instance, settings)
        if backup.number == 0:
            settings = settings._replace(image_type=restored.image_type)
            adapt(disk, instance, settings, is_larger=restored.size < disk.size, origin=restored.instance)
    return 0


class Restored(NamedTuple):
    """The disk that a stream held."""

    size: int  # bytes of the disk in it
    instance: str = ""  # whose disk it was; empty if the stream does not say
    image_type: str = "raw"  # for the hooks: as of a create from such an image, which brings its boot loader


def restore_any(source: Source, disk: Disk, instance: Instance, settings: Settings, unpacked: bool = False) -> Restored:
    """Restore any kind of stream. Refuse what is none, if possible before the first write."""
    begin = source.peek(tarball.BLOCK)
    if not begin:
        source.end()  # raises a better reason if the writer failed
        raise Failure("the backup stream is empty", hint="see the messages of the export, at the other end")
    compression = compression_of(begin)
    if stream.is_ours(begin):
        return restore_stream(source, disk)
    if compression and unpacked:  # a few bytes could hold hundreds of layers, each of which takes a process
        raise Failure(f"the stream is compressed with {compression} twice")
    if compression:
        log.info(f"the stream is compressed with {compression}")
        with legacy.decompressed(source, compression) as inner:
            return restore_any(inner, disk, instance, settings, unpacked=True)
    if tarball.is_header(begin):
        return restore_archive(source, disk, instance, settings)
    return Restored(restore_plain(source, disk, source.end))


def restore_stream(source: Source, disk: Disk) -> Restored:
    """Restore a stream of `export`. Check every byte before it is written."""
    manifest = stream.read_manifest(source)
    if manifest.disk_size > disk.size:
        raise too_small(disk, manifest.disk_size)
    log.info(
        f"disk {manifest.index} of {manifest.instance}: {log.size(manifest.disk_size)}, "
        f"{log.size(manifest.bytes)} in use, exported by {manifest.exporter}"
    )
    progress = log.Progress("restoring", manifest.bytes)
    done = 0
    volumes = [(volume.start, volume.size) for volume in manifest.volumes]
    with restore.writing(disk, volumes) as writer, restore.write_behind(writer) as write:
        for offset, data in stream.read_runs(source, manifest):
            write(offset, data)
            done += len(data)
            progress.update(done)
    return Restored(manifest.disk_size, manifest.instance)


def restore_plain(source: Source, disk: Disk, finish: Callable[[], None], size: int | None = None) -> int:
    """Restore a bare disk of `size` bytes (None: to the end of the stream); return the bytes received.

    Call `finish` to check the rest of the stream before the disk can boot.
    """
    begin = source.peek(MIB if size is None else min(MIB, size))
    if len(begin) < MIB and not any(begin):  # tar writes such an archive of no file
        raise Failure(f"the backup stream holds nothing: it is {len(begin)} bytes of zeroes")
    table = legacy.read_table(begin)
    if table is None:
        what, hint = legacy.foreign(begin)
        raise Failure(f"the stream at byte {source.position} is no backup and no disk: it {what}", hint)
    least = max(size or 0, legacy.least_size(table, begin))
    if least > disk.size:
        raise too_small(disk, least)
    log.info("the stream is a bare disk: it has no checksums, so only its length is checked")
    with restore.writing(disk, [(part.start, part.size) for part in table.parts if part.number]) as writer:
        received = restore.copy_plain(source, writer, disk.size, size)
        if received < least:
            raise source.truncated(least)
        finish()
    return received


def restore_archive(source: Source, disk: Disk, instance: Instance, settings: Settings) -> Restored:
    """Restore an archive of ganeti-instance-image: dumps of the filesystems, or an image of the disk."""
    members = legacy.members(source)
    first = next(members, None)
    if first and first.name == legacy.IMAGE:
        return Restored(restore_image(source, first, members, disk, settings))
    if first and first.name in legacy.DUMPS:
        restore_dumps(source, itertools.chain([first], members), disk, instance, settings)
        return Restored(disk.size, image_type="dump")
    name = f"'{first.name}'" if first else "nothing"
    raise Failure(
        f"the tar archive in the stream is no backup: it holds {name} "
        f"instead of {legacy.IMAGE} or {' and '.join(legacy.DUMPS)}"
    )


def restore_image(
    source: Source, image_member: Member, others: Iterator[Member], disk: Disk, settings: Settings
) -> int:
    def finish() -> None:
        if next(others, None):
            raise Failure(f"the archive in the stream holds more than {legacy.IMAGE}")

    size = legacy.disk_size(source, image_member, disk.size)
    if size is None:
        return restore_plain(source, disk, finish, image_member.size)
    if size > disk.size:
        raise too_small(disk, size)
    # qcow2 cannot be read from its first byte to its last
    with legacy.staged(source, image_member, settings.export_dir) as image:
        finish()
        wholeness.check(image)
        diskimage.check_size(image, disk.size)
        with blockdev.attached(disk, direct=True) as loop, blockdev.disarmed_on_failure(loop):
            diskimage.write(image, loop)
            blockdev.flush(loop)
        return diskimage.inspect(image).size


def restore_dumps(
    source: Source, members: Iterable[Member], disk: Disk, instance: Instance, settings: Settings
) -> None:
    """Restore dumps onto partitions as `create` makes them."""
    intended = filesystem.plan_layout(settings, disk.size, has_boot=not instance.kernel_path)
    require("head", "tee", "restore", *filesystem.programs(intended, settings.filesystem))
    with blockdev.attached(disk, direct=True) as loop, blockdev.disarmed_on_failure(loop):
        volumes = tuple(filesystem.plan_volumes(intended, settings.filesystem, loop.partition))
        blockdev.write_table(loop, intended)
        filesystem.make(volumes)
        with mounting.mounted_all(volumes):
            with opened_system(isolation.TARGET, instance, settings, loop.path, volumes) as root:
                restore_both(source, members, root, any(volume.role == "boot" for volume in volumes))
                fit(root, volumes)
            blockdev.use_cache(loop)
        blockdev.flush(loop)


def restore_both(source: Source, members: Iterable[Member], root: Target, separate_boot: bool) -> None:
    """Unpack root.dump and boot.dump, in any order, each where nothing is (see images.dump).

    Files of the root filesystem below the mount point of /boot were hidden: they give way to boot.dump.
    """
    aside = f"/.imageos-{os.urandom(6).hex()}"  # a name that the other dump cannot know
    boot = "/boot" if separate_boot else aside
    done: list[str] = []
    for member in members:
        if member.name not in legacy.DUMPS:
            raise Failure(f"the archive in the stream holds '{member.name}', which is no backup")
        if member.name in done:
            raise Failure(f"the archive in the stream holds {member.name} twice")
        path = boot if member.name == "boot.dump" else "/"
        root.mkdir(path)
        with log.phase(f"restored {member.name}"), ExitStack() as stack:
            directory = stack.enter_context(root.directory(path))
            if member.name == "boot.dump":
                root.clear(path, keep=["lost+found"])
                dump.check_untouched("boot.dump of the backup", directory)
            elif done:
                directory = stack.enter_context(mounting.alone(directory))
            legacy.unpack_dump(source, member, directory)
        root.remove(os.path.join(path, SYMBOL_TABLE))
        done.append(member.name)
    if "root.dump" not in done:
        raise Failure("the archive in the stream holds no root.dump")
    if "boot.dump" in done and boot == aside:
        root.mkdir("/boot")
        root.clear("/boot")
        root.rename(aside, "/boot")


def fit(root: Target, volumes: tuple[Volume, ...]) -> None:
    """Adapt a guest that was restored onto new filesystems: fstab, swap, and names of interfaces."""
    kept = legacy.other_mounts(root.read("/etc/fstab") or "", ["/", "/boot", "/boot/efi"])
    root.write("/etc/fstab", fstab.render(volumes) + "".join(f"{line}\n" for line in kept))
    root.remove("/etc/udev/rules.d/z*_persistent-net.rules")
    initramfs.forget_swap(root)
    guest.request_relabel(root)


def adapt(disk: Disk, instance: Instance, settings: Settings, is_larger: bool, origin: str = "") -> None:
    """Grow the root of the guest on the first disk, and run hooks. A failure leaves the disk whole.

    `origin` is the instance whose backup it is: that of another makes a clone, with an identity of its own.
    """
    names = hooks.chosen(settings, settings.import_hooks)
    if instance.nics and "interfaces" not in names and not settings.nomount:
        how = (
            ""
            if "interfaces" in hooks.find(settings.customize_dir)
            else f" (first: chmod +x {settings.customize_dir}/interfaces)"
        )
        log.info(f"the guest's network is as in the backup; IMPORT_HOOKS with interfaces fits it to this instance{how}")
    is_clone = origin not in ("", instance.name)
    if not origin and not settings.nomount:
        log.info("the backup does not say whose it is: machine-id and ssh host keys stay, a clone would share them")
    if settings.nomount or not (names or is_clone or (is_larger and settings.grow)):
        return
    with blockdev.attached(disk) as loop:
        found = discovery.find_if_any(loop, "the disk is left as it was in the backup")
        if not found:
            return
        if is_larger and settings.grow:
            try:
                grow.grow(loop, found)
            except grow.Damaged as failure:
                log.warning(f"{failure}: the disk is left as it was in the backup")
                return
        if is_clone:
            renew(instance, settings, loop, found, origin)
        if names:
            with mounting.mounted_all(found.volumes):
                context = hooks.Context("import", os.environ, settings, isolation.TARGET, loop, found.volumes)
                hooks.run_all(names, context)
                with opened_system(isolation.TARGET, instance, settings, loop.path, found.volumes) as root:
                    guest.request_relabel(root)
        blockdev.flush(loop)


def renew(instance: Instance, settings: Settings, loop: LoopDevice, found: Found, origin: str) -> None:
    """Give a clone a machine-id and ssh host keys of its own: its original may be running."""
    system = opened_system(isolation.TARGET, instance, settings, loop.path, found.volumes)
    try:
        with mounting.mounted_all(found.volumes), system as root:
            guest.forget_machine(root)
            hostkeys.replace(root)
            guest.request_relabel(root)
    except Failure as failure:  # it is restored nevertheless
        log.warning(f"machine-id and ssh host keys are those of {origin}: {failure}")
    else:
        log.info(f"the backup is of {origin}: machine-id and ssh host keys are made anew, DHCP leases forgotten")


def too_small(disk: Disk, size: int) -> Failure:
    return Failure(
        f"disk {disk.path} of {exact(disk.size)} is smaller than the one of the backup, {exact(size)}",
        hint="give the instance a disk that is as large or larger",
    )
