"""The volume groups on the instance's disk, read and grown by lvm2, which sees this disk and nothing else of the node.

No volume is activated: device-mapper would show it to the whole node. A linear logical volume in one piece is a range
of the disk, and a loop device over that range takes its place.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from imageos.errors import Failure
from imageos.node.confinement import Room
from imageos.node.programs import available, environment
from imageos.run import OUTPUT_LIMIT, Command, Finished, pipeline

PROGRAM = "lvm"
TIMEOUT = 60.0  # seconds
PARTLY = 5  # its status where it reports some volume groups, and complains of others (ECMD_FAILED)
MOST_VOLUMES = 64  # of a disk; each takes a loop device
NAME = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]*")
# Its configuration, instead of that of the node. In the same directory is what it finds in /proc otherwise: it knows
# loop devices and their partitions. The filter lets everything pass, since its room has nothing but the disk.
FILES = {
    "devices": "Block devices:\n  7 loop\n259 blkext\n",
    "mounts": "",
    "lvm.conf": """\
devices { filter=["a|.*|"] use_devicesfile=0 scan_lvs=0 hints="none" sysfs_scan=0 multipath_component_detection=0
  md_component_detection=0 obtain_device_list_from_udev=0 external_device_info_source="none" }
activation { udev_sync=0 udev_rules=0 monitoring=0 }
backup { backup=0 archive=0 }
global { proc="%(directory)s" locking_dir="/tmp/lock" use_aio=0 use_lvmpolld=0 use_lvmlockd=0 event_activation=0 }
""",
}
REPORT = {
    "vg": "vg_name,vg_uuid,vg_extent_size,vg_exported,vg_clustered,vg_lock_type,vg_systemid,vg_missing_pv_count",
    "pv": "pv_name,pv_uuid,pe_start,pv_in_use",
    "lv": "lv_uuid,lv_name,lv_attr,lv_layout,lv_role",
    "pvseg": "pv_uuid,pvseg_start,pvseg_size,lv_uuid",
    "seg": "lv_uuid,seg_start,seg_pe_ranges",
}


class Extents(NamedTuple):
    """Extents of a physical volume, one behind the other."""

    device: str
    first: int
    length: int  # in extents

    @property
    def end(self) -> int:
        return self.first + self.length


class LogicalVolume(NamedTuple):
    name: str
    id: str  # its group's UUID and its own, as device-mapper has them
    extents: Extents | None
    obstacle: str = ""  # why it cannot be used, as in "it is not linear but striped"


class Group(NamedTuple):
    name: str
    extent_size: int  # bytes
    starts: Mapping[str, int]  # device of a physical volume -> where its first extent is, in bytes
    ends: Mapping[str, int]  # device -> how many extents it has
    volumes: tuple[LogicalVolume, ...]
    free: tuple[Extents, ...]  # none if that is not certain
    fixed: str = ""  # why it cannot be changed

    def position(self, extents: Extents) -> tuple[int, int]:
        """Return where extents begin on their device, and their size, in bytes."""
        return self.starts[extents.device] + extents.first * self.extent_size, extents.length * self.extent_size

    def volume(self, name: str) -> LogicalVolume:
        return next(volume for volume in self.volumes if volume.name == name)

    def behind(self, extents: Extents) -> Extents:
        """Return the free extents that follow, perhaps none."""
        following = (free for free in self.free if (free.device, free.first) == (extents.device, extents.end))
        return next(following, Extents(extents.device, extents.end, 0))


def read(devices: Mapping[str, str]) -> tuple[tuple[Group, ...], Failure | None]:
    """Return the volume groups of one disk, and why not all is known of them.

    `devices` are its physical volumes, with the UUID of each.
    """
    if not available(PROGRAM):
        return (), Failure(
            "lvm2 is not installed on this node: logical volumes cannot be read",
            "install lvm2 on every node; or set NOMOUNT=yes, which deploys a disk image without looking into it",
        )
    command = ["fullreport", "--readonly", "--foreign", "--shared", "--reportformat", "json", "--units", "b"]
    fields = [word for kind, names in REPORT.items() for word in ("--configreport", kind, "-o", names)]
    try:
        done = _lvm([*command, "--nosuffix", *fields], devices)
        if done.status not in (0, PARTLY):
            raise done.failure()
        groups, understood = parse(done.stdout.decode("utf-8", "replace"), devices)
    except Failure as failure:
        return (), Failure(f"logical volumes cannot be read: {failure}")
    for device, identity in devices.items():
        if device not in understood:
            said = (line for line in done.stderr.splitlines() if device in line or identity.replace("-", "") in line)
            return groups, Failure(
                f"logical volumes on {device} cannot be read: {next(said, 'lvm2 finds none').strip()}"
            )
    return groups, None


def resize(group: Group, device: str) -> None:
    """Let the physical volume `device` have all of its partition."""
    _change(["pvresize", device], group)


def extend(group: Group, volume: str, free: Extents) -> None:
    """Give the logical volume GROUP/NAME exactly these extents, so that it stays in one piece."""
    _change(["lvextend", "--extents", f"+{free.length}", volume, f"{free.device}:{free.first}-{free.end - 1}"], group)


def _change(command: Sequence[str], group: Group) -> None:
    done = _lvm(command, group.starts)
    if done.status:
        raise done.failure()


def _lvm(command: Sequence[str], devices: Iterable[str]) -> Finished:
    """Run a command of lvm(8) that has these devices, and no device-mapper."""
    program, *words = command
    with tempfile.TemporaryDirectory(prefix="lvm.", dir=os.environ.get("TMPDIR")) as directory:
        for name, text in FILES.items():
            with open(f"{directory}/{name}", "x", encoding="ascii") as file:
                file.write(text % {"directory": directory})
        argv = [PROGRAM, program, "--driverloaded", "n", *words]
        env = {**environment(), "LVM_SYSTEM_DIR": directory, "LVM_SUPPRESS_FD_WARNINGS": "1"}
        return pipeline(Command(argv, Room([*devices, directory]), env), timeout=TIMEOUT, longest=OUTPUT_LIMIT)[0]


# --- pure ------------------------------------------------------------------------------------------------


def parse(text: str, devices: Mapping[str, str]) -> tuple[tuple[Group, ...], set[str]]:
    """Return the volume groups in the output of `lvm fullreport`, and which of `devices` are understood."""
    # between them lvm2 may say "Retrying metadata scan."
    lines = [line for line in text.splitlines() if line.lstrip().startswith(tuple('{}[],"'))]
    identities = list(devices.values())
    twice = {identity for identity in identities if identities.count(identity) > 1}
    try:
        reports = json.loads("\n".join(lines), strict=False)["report"]
        # that on physical volumes in no group has no "vg"
        found = [report for report in reports if report.get("vg") and report["vg"][0]["vg_name"]]
        names = [report["vg"][0]["vg_name"] for report in found]
        groups = tuple(_group(report, devices, twice, names.count(name) > 1) for report, name in zip(found, names))
        rows = [row for report in reports for row in report["pv"] if report.get("vg") or not row["pv_in_use"]]
        understood = {row["pv_name"] for row in rows} & {*devices}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Failure(f"lvm2 says what is not understood: {error}") from None
    count = sum(len(group.volumes) for group in groups)
    if count > MOST_VOLUMES:
        raise Failure(f"there are {count} of them, more than {MOST_VOLUMES}")
    return groups, understood


def _group(report: Any, on_disk: Collection[str], twice: Collection[str], ambiguous: bool) -> Group:
    (row,) = report["vg"]
    devices = {pv["pv_uuid"]: pv["pv_name"] for pv in report["pv"]}
    starts = {pv["pv_name"]: _number(pv["pe_start"]) for pv in report["pv"] if pv["pv_name"] in on_disk}
    is_partial = _number(row["vg_missing_pv_count"]) or len(starts) < len(devices)
    obstacle = (
        "has physical volumes that are not on this disk" if is_partial
        else "has a physical volume that is on this disk twice" if {*devices} & {*twice}
        else "is exported" if row["vg_exported"]
        else "belongs to a cluster" if row["vg_clustered"] or row["vg_lock_type"] not in ("", "none")
        else "is not the only one of that name" if ambiguous
        else ""
    )  # fmt: skip
    ends: dict[str, int] = {}
    for segment in report["pvseg"]:
        device, end = devices[segment["pv_uuid"]], _number(segment["pvseg_start"]) + _number(segment["pvseg_size"])
        ends[device] = max(end, ends.get(device, 0))
    segments: dict[str, list[tuple[int, str]]] = {}
    for segment in report["seg"]:
        segments.setdefault(segment["lv_uuid"], []).append(
            (_number(segment["seg_start"]), str(segment["seg_pe_ranges"]))
        )
    name = _name(row["vg_name"])
    return Group(
        name,
        _number(row["vg_extent_size"]),
        starts,
        ends,
        tuple(
            _volume(volume, f"{row['vg_uuid']}{volume['lv_uuid']}".replace("-", ""),
                    [ranges for _, ranges in sorted(segments[volume["lv_uuid"]])], starts,
                    f"its volume group {obstacle}" if obstacle else "")
            for volume in report["lv"]
        ),
        tuple(
            Extents(
                _one_of(starts, devices[segment["pv_uuid"]]),
                _number(segment["pvseg_start"]),
                _number(segment["pvseg_size"]),
            )
            for segment in report["pvseg"]
            if not (segment["lv_uuid"] or obstacle)
        ),
        f"volume group {name} belongs to the system {row['vg_systemid']}" if row["vg_systemid"] else "",
    )  # fmt: skip


def _volume(row: Any, id: str, ranges: Sequence[str], devices: Collection[str], obstacle: str) -> LogicalVolume:
    layout, role = str(row["lv_layout"]), str(row["lv_role"])
    obstacle = obstacle or (
        f"it is not linear but {layout}" if layout != "linear"
        else "there are snapshots of it" if "origin" in role
        else f"it is no ordinary volume but {role}" if role != "public"
        else "it is read-only" if str(row["lv_attr"])[1] != "w"
        else ""
    )  # fmt: skip
    pieces: list[Extents] = []
    for match in [re.fullmatch(r"(\S+):(\d{1,19})-(\d{1,19})", text) for text in ranges]:
        if not match or match[1] not in devices:
            return LogicalVolume(_name(row["lv_name"]), id, None, obstacle or "it is on another logical volume")
        device, first, end = match[1], int(match[2]), int(match[3]) + 1
        if end <= first:
            raise ValueError(match[0])
        if pieces and (pieces[-1].device, pieces[-1].end) == (device, first):
            first = pieces.pop().first
        pieces.append(Extents(device, first, end - first))
    if len(pieces) != 1:
        obstacle = obstacle or f"it is in {len(pieces)} pieces"
    return LogicalVolume(_name(row["lv_name"]), id, pieces[0] if pieces and not obstacle else None, obstacle)


def _name(text: Any) -> str:
    if not NAME.fullmatch(str(text)):
        raise ValueError(f"the name {text!r}")
    return str(text)


def _number(text: Any) -> int:
    if not re.fullmatch("[0-9]{1,19}", str(text)):
        raise ValueError(f"the number {text!r}")
    return int(text)


def _one_of(devices: Collection[str], device: str) -> str:
    if device not in devices:
        raise ValueError(f"the device {device!r}")
    return device
