"""Check the rest of the node: free space, and leftovers of crashed runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from imageos import log, settings
from imageos.checks.report import ERROR, NOTE, OK, Finding, failed, finding, note, ok
from imageos.checks.variants import Variant
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.node import mounts, space, sysfs
from imageos.node.mounts import Mount

LOW_SPACE = 64 * MIB  # bytes; with less, writing will fail soon


def check_space(variants: Sequence[Variant]) -> Iterator[Finding]:
    """Report an error where a deployment would fail: downloads need space, Ganeti writes a log of each."""
    downloads = {variant.settings.cache_dir for variant in variants if variant.settings.image_url}
    caches = {variant.settings.cache_dir for variant in variants} | {settings.CACHE_DIR}
    directories = {**dict.fromkeys(sorted(caches), "images"), "/var/log": "Ganeti's logs", "/run": "mount points"}
    for path, use in directories.items():
        try:
            status = os.statvfs(path)
        except OSError as error:
            if path in downloads:
                yield failed(Failure(f"CACHE_DIR {path}: {error.strerror}"))
            continue
        free = status.f_bavail * status.f_frsize
        reserved = space.reserve(status) if use == "images" else 0
        has_room = free - reserved >= LOW_SPACE and (status.f_favail > 0 or not status.f_files)
        is_needed = use != "images" or path in downloads
        level = OK if has_room else ERROR if is_needed else NOTE
        yield finding(level, f"{path} ({use}): {log.size(free)} free", "" if has_room else f"make room in {path}")


def check_leftovers() -> Iterator[Finding]:
    yield from [*leftovers(mounts.current(), sysfs.BLOCK)] or [ok("none")]


def leftovers(mounted: Sequence[Mount], sys_block: str) -> Iterator[Finding]:
    """Report what crashed runs of ganeti-instance-image left, and the commands that remove it, in order."""
    on_disks = [mount for mount in mounted if mounts.block_device(mount)]
    for mount in on_disks:
        # root will paste the command into a shell, and any user can mount in /tmp (FUSE): accept plain names only
        is_mktemp = re.fullmatch(r"/tmp/tmp\.[A-Za-z0-9]{6,}", mount.path)
        is_root = mount.instance and mount.path == mounts.mount_point(mount.instance)
        if (is_root or is_mktemp) and mount.source.startswith(("/dev/mapper/", "/dev/loop", "/dev/dm-")):
            command = f"umount-disks {mount.instance}" if is_root else f"umount -R {mount.path} && rmdir {mount.path}"
            yield note(f"{mount.source} is mounted at {mount.path}", command)
    for name in partition_maps(sys_block):
        yield note(f"/dev/mapper/{name} is a map of an instance's partition", f"dmsetup remove {name}")
    used = {mount.source for mount in on_disks}
    for device, backing in leftover_loops(sys_block, used):
        yield note(
            f"{device} is attached to {backing}, and not used", f"losetup -d {device} (unless an instance has it)"
        )


def partition_maps(sys_block: str) -> Iterator[str]:
    """Yield the names of device-mapper maps that kpartx made of LVs and loop devices."""
    for block in sorted(os.listdir(sys_block)):
        name, uuid = (sysfs.attribute(f"{sys_block}/{block}/dm/{file}") for file in ("name", "uuid"))
        if re.match(r"part\d+-", uuid) and "mpath-" not in uuid:  # the maps of multipath are the node's own
            yield name


def leftover_loops(sys_block: str, mounted: set[str]) -> Iterator[tuple[str, str]]:
    """Yield unused loop devices that the kernel will not detach by itself, each with its backing file."""
    backings = sysfs.backing_files(sys_block)
    used = mounted | set(backings.values())
    for block, backing in backings.items():
        device = f"/dev/{block}"
        is_used = any(source == device or source.startswith(f"{device}p") for source in used)
        with suppress(FileNotFoundError):
            is_used = is_used or bool(os.listdir(f"{sys_block}/{block}/holders"))
        if sysfs.attribute(f"{sys_block}/{block}/loop/autoclear") == "0" and not is_used:
            yield device, backing
