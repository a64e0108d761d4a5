"""Try a variant: have create deploy it onto a scratch disk, boot that, and look at what the guest has made of it.

The disk is a file without a name under a loop device, so nothing of it is left, however a trial ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from imageos import ganeti, log
from imageos.disks import blockdev, discovery, mounting, partitions
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.discovery import ESP_TYPES
from imageos.disks.filesystem import FILESYSTEMS
from imageos.disks.layout import ESP_SIZE, MIB, SECTOR
from imageos.errors import Failure, explained
from imageos.guests import hostkeys, target
from imageos.guests.target import Target
from imageos.images import diskimage, imagetypes
from imageos.images.imagefile import Image
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.images.urls import shown
from imageos.installation import program_file
from imageos.node import isolation, space
from imageos.node.programs import GANETI_PATH
from imageos.run import Command, Outside, pipeline
from imageos.settings import Settings, load_settings
from imageos.variants import console, guestboot, journal, record
from imageos.variants.guestboot import Booted, NoPrompt
from imageos.variants.record import Trial

GROWTH = 1 << 30  # bytes that a disk is larger than its image: the root has to grow
ROOT = 2 << 30  # bytes for what a guest writes, on a disk that is made of files
EXPANDED = 8  # times as large as its file may be what was compressed; the disk is sparse
CODE = 440  # bytes at the beginning of the first sector, before the partition table
NO_CODE = "there is a partition table and no code before it: the hook grub installs some on tarballs and dumps"
ELSEWHERE = "/var/tmp"  # where the scratch disk is if CACHE_DIR has less room
SPEED = 115200  # of the serial console, as the images of the distributions have it
Row = tuple[str, str]


def try_variant(options: Namespace) -> list[Row]:
    """Try the variant `options.name`; return the rows of a table, or fail if the guest has no login prompt."""
    isolation.enter()
    os.environ["PATH"] = GANETI_PATH  # what create finds counts
    firmware = "uefi" if options.uefi else "bios"
    environ = environment(options.name)
    settings = load_settings(environ).with_sizes(guestboot.MEMORY)
    guestboot.check(settings.arch, firmware)
    trial = Trial(time.time(), firmware=firmware)
    try:
        if settings.cdinstall:
            raise Failure("CDINSTALL=yes: there is nothing to boot", hint="try the installer in an instance")
        image = imagetypes.find(settings)
        trial = trial._replace(image=shown(image.path), image_time=os.fstat(image.descriptor).st_mtime)
        rows = try_image(options, settings, environ, image, firmware)
    except Failure as failure:
        record.keep(options.name, trial._replace(problem=str(failure)))
        raise
    record.keep(options.name, trial)
    return rows


def try_image(
    options: Namespace, settings: Settings, environ: Mapping[str, str], image: Image, firmware: str
) -> list[Row]:
    size = disk_size(settings, image)
    with scratch([settings.cache_dir, ELSEWHERE], image.size, size) as (directory, file), ExitStack() as at_end:
        disk = Disk("for the trial", file.fileno(), size, is_file=True)
        with blockdev.attached(disk) as loop:
            began = time.monotonic()
            fcntl.flock(loop.descriptor, fcntl.LOCK_UN)  # create locks it, as it does any disk
            deploy({**environ, "DISK_0_PATH": loop.path, "DISK_0_SIZE": str(size // MIB)})
            fcntl.flock(loop.descriptor, fcntl.LOCK_EX)
            deployed_in = time.monotonic() - began
            if options.keep:
                path = f"{directory}/try-{options.name}.raw"
                at_end.callback(keep, file, path, guestboot.typed(firmware, path))
            log.info(f"waiting for a login prompt, at most {log.duration(options.timeout)}")
            booted = guestboot.boot(loop.path, firmware, options.timeout, other_firmware(loop, firmware))
            blockdev.flush(loop)
        rows = [
            ("deployed in", f"{deployed_in:.1f} s, on a disk of {log.size(size)}"),
            *boot_rows(booted, host_name(options.name).partition(".")[0], firmware),
            *([] if settings.nomount else system_rows(disk)),
        ]
    return [(label, log.ascii_only(value)) for label, value in rows]


# --- the instance ----------------------------------------------------------------------------------------


def host_name(variant: str) -> str:
    """Return the name of the instance: no image has it by itself, so whoever sees it at the prompt knows it was set."""
    return f"try-{re.sub('[_.]', '-', variant).strip('-')}"[:63].rstrip("-") + ".example"


def environment(variant: str) -> dict[str, str]:
    """Return what Ganeti would tell create of an instance with one NIC that asks DHCP, and one disk to be named."""
    name = host_name(variant)
    return {
        "PATH": GANETI_PATH,
        "OS_API_VERSION": str(ganeti.API_VERSIONS[0]),
        "OS_NAME": "image",
        "OS_VARIANT": variant,
        "DEBUG_LEVEL": "0",
        "HYPERVISOR": "kvm",
        "INSTANCE_NAME": name,
        "INSTANCE_OS": f"image+{variant}",
        "INSTANCE_BE_maxmem": str(guestboot.MEMORY),
        "INSTANCE_BE_minmem": str(guestboot.MEMORY),
        "INSTANCE_BE_vcpus": "1",
        "INSTANCE_HV_acpi": "True",
        "INSTANCE_HV_boot_order": "disk",
        "INSTANCE_HV_disk_type": "paravirtual",
        "INSTANCE_HV_kernel_path": "",
        "INSTANCE_HV_nic_type": "paravirtual",
        "INSTANCE_HV_serial_console": "True",
        "INSTANCE_HV_serial_speed": str(SPEED),
        "DISK_COUNT": "1",
        "DISK_0_ACCESS": "rw",
        "DISK_0_FRONTEND_TYPE": "paravirtual",
        "NIC_COUNT": "1",
        "NIC_0_FRONTEND_TYPE": "paravirtual",
        "NIC_0_MAC": guestboot.MAC,
        "NIC_0_MODE": "bridged",
        "NIC_0_LINK": "",
    }


def deploy(environ: Mapping[str, str]) -> None:
    """Call create as Ganeti does, and pass on what it says; its last line is our failure."""
    held: list[str] = []

    def relay(line: str) -> None:
        held.append(line.removeprefix(log.PREFIX))
        while len(held) > 2:  # the hint and the cause may be the last
            log.info(held.pop(0))

    done = pipeline(Command([program_file(), "create"], Outside.CREATE, env=environ, private=True), on_line=relay)[0]
    if done.status:
        *before, cause = held or ["create says nothing"]
        hint = before.pop().removeprefix("hint: ") if before and before[-1].startswith("hint: ") else None
        for line in before:
            log.info(line)
        raise Failure(f"it cannot be deployed: {cause}", hint)
    for line in held:
        log.info(line)


# --- the disk --------------------------------------------------------------------------------------------


def disk_size(settings: Settings, image: Image) -> int:
    """Return how many bytes the disk gets: those that the image needs, as far as that is known, and a little more."""
    told, is_exact = image.unpacked_size if image.compression else (image.size, True)
    files = told if is_exact else max(told, EXPANDED * image.size)
    if IMAGE_TYPES[settings.image_type].deploy:
        others = (settings.boot_size or 0) + ((settings.swap_size or 0) if settings.swap else 0)
        return _whole(files + ROOT + ESP_SIZE + others * MIB)
    return _whole((diskimage.inspect(image).size or files) + GROWTH)


def _whole(size: int) -> int:
    return -(-size // MIB) * MIB


@contextmanager
def scratch(directories: Sequence[str], need: int, size: int) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield a sparse file of `size` bytes without a name, and where it is: where most room is of where one can be.

    Fail without room for `need` bytes and a bit more.
    """
    there = [os.path.realpath(directory) for directory in directories if os.path.isdir(directory)]
    # asked once of each filesystem: others write meanwhile
    room = {os.stat(path).st_dev: os.statvfs(path) for path in there}
    there.sort(key=lambda path: -room[os.stat(path).st_dev].f_bavail * room[os.stat(path).st_dev].f_frsize)
    hint = f"free room in {' or '.join(there)}, or set CACHE_DIR to a place with room"
    with ExitStack() as stack:
        while True:
            directory = there.pop(0)
            try:
                with explained(f"cannot make a disk of {log.size(size)} in {directory}", hint):
                    space.check(directory, need + GROWTH)
                    # not tempfile, which asks for a file that can never have a name
                    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
                    file = stack.enter_context(open(descriptor, "r+b", 0))
                    file.truncate(size)
                    break
            except Failure:  # NFS has no files without a name
                if not there:
                    raise
        yield directory, file


def keep(file: IO[bytes], path: str, command: str) -> None:
    """Give the disk a name; a disk of an earlier trial goes."""
    with explained(f"cannot keep the disk as {path}"), record.replacing(path) as new:
        # with a directory it is linkat(2), which follows the link in /proc
        os.link(f"/proc/self/fd/{file.fileno()}", new, src_dir_fd=file.fileno(), follow_symlinks=True)
    log.info(f"the disk is kept: {path}")
    log.info(f"boot it again: {command}")


def other_firmware(loop: LoopDevice, firmware: str) -> str | None:
    """Return what to do if `firmware` finds no boot loader, as the disk looks as if another one might.

    Fail if it takes zeroes for a boot loader, which run for ever: BIOS only looks at the last two bytes of the sector.
    """
    sector = os.pread(loop.descriptor, SECTOR, 0)
    has_code = any(sector[:CODE])
    if firmware == "uefi":
        return "it has one for BIOS: try it without --uefi; PARTITION_TABLE=gpt is for both" if has_code else None
    try:
        parts = partitions.read_table(loop.path, loop.size).parts
    except Failure:
        parts = ()
    has_esp = any(part.type in ESP_TYPES for part in parts)
    other = "it has an EFI system partition: try it with --uefi" if has_esp else None
    if sector.endswith(b"\x55\xaa") and not has_code:
        raise NoPrompt(f"the guest has no login prompt: {console.NO_LOADER}", other or NO_CODE)
    return other


# --- the table -------------------------------------------------------------------------------------------


def boot_rows(booted: Booted, name: str, firmware: str) -> Iterator[Row]:
    yield "booted in", f"{booted.booted_in:.1f} s ({firmware.upper()}, {booted.accelerator})"
    given = "" if booted.name.partition(".")[0] == name else f" (it was to be called {name})"
    yield "login prompt", f"{booted.name} login:".lstrip() + given
    off = booted.powered_off_in
    yield "powered off in", "it did not when asked to, and was ended" if off is None else f"{off:.1f} s"


def system_rows(disk: Disk) -> Iterator[Row]:
    """Yield what is found on the disk of a guest that has run."""
    with blockdev.attached(disk, read_only=True) as loop, log.muted(), ExitStack() as stack:
        try:
            found = discovery.find(loop)
            stack.enter_context(mounting.mounted_all(found.volumes, read_only=True))
        except Failure as failure:
            yield "filesystem", str(failure)
            return
        root = found.volumes[0]
        size = blockdev.ask(root.device, FILESYSTEMS[root.kind].size)
        yield "root filesystem", f"{root.kind}, {log.size(size)}"
        yield "filesystem", "clean" if found.is_replayed else "not cleanly unmounted"
        with target.opened(isolation.TARGET) as guest:
            yield "machine-id", machine_id(guest)
            yield "ssh host keys", host_keys(guest)
            yield "failed units", journal.failed_units(guest)


def machine_id(guest: Target) -> str:
    text = guest.read("/etc/machine-id")
    if text is None:
        return "none: it has no systemd"
    return "made" if re.fullmatch(r"[0-9a-f]{32}\n?", text) else "not made"


def host_keys(guest: Target) -> str:
    kinds = (re.fullmatch(r".*/ssh_host_(\w+)_key", path) for path in guest.glob(hostkeys.KEYS))
    return ", ".join(sorted(kind[1] for kind in kinds if kind)) or "none"
