"""The rest of the node: room, and what crashed runs have left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from imageos import log, settings
from imageos.checks.report import ERROR, NOTE, OK, Report
from imageos.checks.variants import Variant
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.node import mounts, space
from imageos.node.mounts import Mount

LITTLE = 64 * MIB  # bytes: with less, whatever is written there will fail soon


def check_space(report: Report, variants: Sequence[Variant]) -> None:
    """An error where a deployment would stop: a download needs room, Ganeti writes a log of each."""
    downloads = {variant.known.cache_dir for variant in variants if variant.known.image_url}
    caches = {variant.known.cache_dir for variant in variants} | {settings.CACHE_DIR}
    places = {**dict.fromkeys(sorted(caches), "images"), "/var/log": "Ganeti's logs", "/run": "mount points"}
    for path, use in places.items():
        try:
            status = os.statvfs(path)
        except OSError as error:
            if path in downloads:
                report.failure(Failure(f"CACHE_DIR {path}: {error.strerror}"))
            continue
        free = status.f_bavail * status.f_frsize
        kept = space.reserve(status) if use == "images" else 0
        has_room = free - kept >= LITTLE and (status.f_favail > 0 or not status.f_files)
        is_needed = use != "images" or path in downloads
        level = OK if has_room else ERROR if is_needed else NOTE
        report.say(level, f"{path} ({use}): {log.size(free)} free", "" if has_room else f"make room in {path}")


def check_leftovers(report: Report, mounted: Sequence[Mount], sys_block: str = "/sys/block") -> None:
    """What runs of ganeti-instance-image leave when they crash, with the commands that take it away, in order."""
    before = len(report.findings)
    on_disks = [one for one in mounted if mounts.block_device(one)]
    for one in on_disks:
        # nothing but names: the command is there to be pasted into root's shell, and anybody can mount in /tmp (fuse)
        is_mktemp = re.fullmatch(r"/tmp/tmp\.[A-Za-z0-9]{6,}", one.place)
        is_root = one.instance and one.place == mounts.mount_point(one.instance)
        if (is_root or is_mktemp) and one.source.startswith(("/dev/mapper/", "/dev/loop", "/dev/dm-")):
            command = f"umount-disks {one.instance}" if is_root else f"umount -R {one.place} && rmdir {one.place}"
            report.say(NOTE, f"{one.source} is mounted at {one.place}", command)
    for name in partition_maps(sys_block):
        report.say(NOTE, f"/dev/mapper/{name} is a map of an instance's partition", f"dmsetup remove {name}")
    used = {one.source for one in on_disks}
    for device, backing in leftover_loops(sys_block, used):
        report.say(
            NOTE, f"{device} is attached to {backing}, and not used", f"losetup -d {device} (unless an instance has it)"
        )
    if len(report.findings) == before:
        report.say(OK, "none")


def partition_maps(sys_block: str) -> Iterator[str]:
    """Names of the device-mapper maps that kpartx has made of LVs and loop devices."""
    for block in sorted(os.listdir(sys_block)):
        name = first_line(f"{sys_block}/{block}/dm/name")
        uuid = first_line(f"{sys_block}/{block}/dm/uuid")
        if re.match(r"part\d+-", uuid) and "mpath-" not in uuid:  # multipath's are the node's own
            yield name


def leftover_loops(sys_block: str, mounted: set[str]) -> Iterator[tuple[str, str]]:
    """Loop devices that stay when their last user is gone, and have none: device and what it is attached to."""
    blocks = sorted(os.listdir(sys_block))
    backings = {block: first_line(f"{sys_block}/{block}/loop/backing_file") for block in blocks}
    used = mounted | set(backings.values())
    for block, backing in backings.items():
        device = f"/dev/{block}"
        is_used = any(source == device or source.startswith(f"{device}p") for source in used)
        with suppress(FileNotFoundError):
            is_used = is_used or bool(os.listdir(f"{sys_block}/{block}/holders"))
        if backing and first_line(f"{sys_block}/{block}/loop/autoclear") == "0" and not is_used:
            yield device, backing


def first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.readline().rstrip("\n")
    except OSError:
        return ""
