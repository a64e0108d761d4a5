"""Make disks with LVM in them by lvm2, without device-mapper, and look into them. No other device is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support import Partition, attached, probe, run, table_of

LVM = "E6D6D379-F507-44C2-A23C-238F2A3DF928"  # the type of a partition in a gpt
NEW = ("-an", "-Zn", "-Wn")  # options of lvcreate, where nothing can be activated
# Instead of the node's own
CONFIG = """devices {{ use_devicesfile=0 filter=[{devices}"r|.*|"] scan_lvs=0 hints="none" }}
activation {{ udev_sync=0 udev_rules=0 monitoring=0 }} backup {{ backup=0 archive=0 }}"""


def lvm(devices: Sequence[object], command: str, *words: object) -> str:
    """Run a command of lvm(8) that sees these devices only."""
    config = CONFIG.format(devices="".join(f'"a|^{device}$|",' for device in devices))
    return run("lvm", command, "--driverloaded", "n", "--config", config, *map(str, words))


def report(devices: Sequence[object], command: str, fields: str) -> list[dict[str, str]]:
    words = ["--readonly", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]
    (rows,) = json.loads(lvm(devices, command, *words))["report"][0].values()
    return list(rows)


def places(disk: Path) -> dict[int, tuple[int, int]]:
    """Return number -> (start, size) of each partition with a physical volume; 0 is the whole disk."""
    if probe(disk).get("TYPE") == "LVM2_member":
        return {0: (0, disk.stat().st_size)}
    found = {}
    for entry in table_of(disk)["partitions"]:  # type: ignore[attr-defined]
        match = re.search(r"p?(\d+)$", str(entry["node"])[len(str(disk)) :])
        assert match
        found[int(match[1])] = (entry["start"] * 512, entry["size"] * 512)
    return {number: place for number, place in found.items() if probe(disk, *place).get("TYPE") == "LVM2_member"}


@contextmanager
def physical(disk: Path, places: Mapping[int, tuple[int, int]]) -> Iterator[list[str]]:
    """Attach these parts of a disk (number -> start, size), each as a loop device."""
    with ExitStack() as stack:
        yield [str(stack.enter_context(attached(disk, start, size))) for start, size in places.values()]


def mapped_uuid(disk: Path, name: str) -> str:
    """Return the name by UUID which the node of the logical volume GROUP/NAME has in /dev/disk/by-id."""
    with physical(disk, places(disk)) as devices:
        rows = report(devices, "lvs", "vg_name,lv_name,vg_uuid,lv_uuid")
    (row,) = (row for row in rows if f"{row['vg_name']}/{row['lv_name']}" == name)
    return "dm-uuid-LVM-" + f"{row['vg_uuid']}{row['lv_uuid']}".replace("-", "")


def volumes(disk: Path) -> dict[str, Partition]:
    """Return GROUP/NAME -> the place on the disk of each linear logical volume in one piece."""
    holders = places(disk)
    found: dict[str, list[tuple[int, int]]] = {}
    with physical(disk, holders) as devices:
        beginnings = dict(zip(devices, (start for start, _ in holders.values())))
        for row in report(devices, "pvs", "pv_name,pe_start"):
            beginnings[row["pv_name"]] += int(row["pe_start"])
        for row in report(devices, "lvs", "vg_name,lv_name,seg_size,seg_pe_ranges,vg_extent_size,segtype"):
            device, _, extents = row["seg_pe_ranges"].partition(":")
            if row["segtype"] == "linear":
                start = beginnings[device] + int(extents.partition("-")[0]) * int(row["vg_extent_size"])
                found.setdefault(f"{row['vg_name']}/{row['lv_name']}", []).append((start, int(row["seg_size"])))
    return {
        name: Partition(0, *pieces[0], "", False, probe(disk, *pieces[0]))
        for name, pieces in found.items()
        if len(pieces) == 1
    }
