"""What lvm2 reports of a disk, as values. Whatever a stranger's metadata makes it say, nothing else comes of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from imageos.disks import fstab, lvm, partitions
from imageos.disks.grow import why_not
from imageos.disks.layout import MIB
from imageos.disks.lvm import Extents, LogicalVolume
from imageos.disks.partitions import Part, Table
from imageos.errors import Failure

PV = "/dev/loop7p3"
EXTENT = 4 * MIB


def volume(name: str, **more: str) -> dict[str, str]:
    usual = {"lv_uuid": f"id-{name}", "lv_name": name, "lv_attr": "-wi-XX----", "lv_layout": "linear"}
    return {**usual, "lv_role": "public", **more}


def piece(name: str, first: int, end: int, start: int = 0, device: str = PV) -> dict[str, str]:
    return {"lv_uuid": f"id-{name}", "seg_start": str(start), "seg_pe_ranges": f"{device}:{first}-{end - 1}"}


def allocated(first: int, end: int, name: str = "") -> dict[str, str]:
    owner = f"id-{name}" if name else ""
    return {"pv_uuid": "id-pv", "pvseg_start": str(first), "pvseg_size": str(end - first), "lv_uuid": owner}


def report(**group: str) -> dict[str, Any]:
    """Return the report on a group of 50 extents: swap has the first 10, root the following 20."""
    usual = {
        "vg_name": "a-b",
        "vg_uuid": "id-group",
        "vg_extent_size": str(EXTENT),
        "vg_exported": "",
        "vg_clustered": "",
    }
    return {
        "vg": [{**usual, "vg_lock_type": "", "vg_systemid": "", "vg_missing_pv_count": "0", **group}],
        "pv": [{"pv_name": PV, "pv_uuid": "id-pv", "pe_start": str(MIB)}],
        "lv": [volume("root"), volume("swap")],
        "pvseg": [allocated(0, 10, "swap"), allocated(10, 30, "root"), allocated(30, 50)],
        "seg": [piece("swap", 0, 10), piece("root", 10, 30)],
    }


def parsed(*reports: dict[str, Any], **more: str) -> tuple[lvm.Group, ...]:
    return lvm.parse(json.dumps({"report": reports}), {PV: "id-pv", **more})[0]


def test_a_group() -> None:
    (group,) = parsed(report())
    root = Extents(PV, 10, 20)
    assert group.volumes == (
        LogicalVolume("root", "idgroupidroot", root),
        LogicalVolume("swap", "idgroupidswap", Extents(PV, 0, 10)),
    )
    assert group.position(root) == (MIB + 10 * EXTENT, 20 * EXTENT)
    assert group.behind(root) == Extents(PV, 30, 20)
    assert group.behind(Extents(PV, 0, 10)).length == 0
    assert group.ends == {PV: 50}


def test_physical_volumes_in_no_group() -> None:
    unused = {"pv_name": "/dev/loop7p4", "pv_uuid": "x", "pe_start": "0", "pv_in_use": ""}
    damaged = {"pv_name": "/dev/loop7p5", "pv_uuid": "y", "pe_start": "0", "pv_in_use": "used"}
    orphan = {"pv": [unused, damaged], "pvseg": []}
    devices = {PV: "id-pv", "/dev/loop7p4": "x", "/dev/loop7p5": "y"}
    groups, known = lvm.parse(json.dumps({"report": [report(), orphan]}), devices)
    assert [group.name for group in groups] == ["a-b"]
    assert known == {PV, "/dev/loop7p4"}


def test_what_lvm2_says_besides() -> None:
    text = json.dumps({"report": [report()]}, indent=4).replace('"vg":', '"vg":\n', 1)
    spoiled = text.replace("    {", "  Retrying metadata scan.\n    {", 1)
    assert spoiled != text
    assert lvm.parse(spoiled, {PV: "id-pv"}) == lvm.parse(text, {PV: "id-pv"})


def test_segments_that_follow_each_other_are_one_piece() -> None:
    text = report()
    text["seg"][1:] = [piece("root", 25, 30, start=15 * EXTENT), piece("root", 10, 25)]
    assert parsed(text)[0].volumes[0].extents == Extents(PV, 10, 20)


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"lv_layout": "raid,raid1"}, "it is not linear but raid,raid1"),
        ({"lv_role": "public,origin,thickorigin"}, "there are snapshots of it"),
        ({"lv_role": "public,snapshot,thicksnapshot"}, "it is no ordinary volume but public,snapshot,thicksnapshot"),
        ({"lv_attr": "-ri-XX----"}, "it is read-only"),
    ],
)
def test_odd_volumes(more: dict[str, str], reason: str) -> None:
    text = report()
    text["lv"][0].update(more)
    assert parsed(text)[0].volumes[0] == LogicalVolume("root", "idgroupidroot", None, reason)


@pytest.mark.parametrize(
    "pieces, reason",
    [
        ([piece("root", 10, 20), piece("root", 21, 31, start=10 * EXTENT)], "it is in 2 pieces"),
        ([piece("root", 20, 30), piece("root", 10, 20, start=10 * EXTENT)], "it is in 2 pieces"),
        ([piece("root", 10, 30, device="pvmove0")], "it is on another logical volume"),
        ([{**piece("root", 0, 1), "seg_pe_ranges": f"{PV}:1-2 {PV}:8-9"}], "it is on another logical volume"),
    ],
)
def test_places_of_which_a_loop_device_cannot_be_made(pieces: list[dict[str, str]], reason: str) -> None:
    text = report()
    text["seg"][1:] = pieces
    assert parsed(text)[0].volumes[0] == LogicalVolume("root", "idgroupidroot", None, reason)


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"vg_missing_pv_count": "1"}, "physical volumes that are not on this disk"),
        ({"vg_exported": "exported"}, "exported"),
        ({"vg_clustered": "clustered"}, "cluster"),
        ({"vg_lock_type": "sanlock"}, "cluster"),
    ],
)
def test_groups_that_cannot_be_used(more: dict[str, str], reason: str) -> None:
    (group,) = parsed(report(**more))
    assert all(reason in volume.obstacle and not volume.extents for volume in group.volumes)
    assert group.free == (), "who knows what else has them"


def test_groups_that_cannot_be_told_from_each_other() -> None:
    assert all("not the only one" in group.volumes[0].obstacle for group in parsed(report(), report()))
    assert "on this disk twice" in parsed(report(), copy="id-pv")[0].volumes[0].obstacle


def test_a_device_that_was_not_given() -> None:
    text = report()
    text["pv"].append({"pv_name": "/dev/sda", "pv_uuid": "id-other", "pe_start": "0"})
    text["seg"][1]["seg_pe_ranges"] = "/dev/sda:10-29"
    (group,) = parsed(text)
    assert not any(volume.extents for volume in group.volumes) and not group.free


def changed(kind: str, **values: object) -> str:
    text = copy.deepcopy(report())
    text[kind][0].update(values)
    return json.dumps({"report": [text]})


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"report": 5}', '{"report": [7]}', '{"report": [{}]}', "[" * 10000),
        changed("vg", vg_name="../../etc"),
        changed("vg", vg_name="-y"),
        changed("vg", vg_name=["a"]),
        changed("lv", lv_name="a b"),
        changed("lv", lv_name="a/b"),
        changed("lv", lv_uuid="another"),
        changed("lv", lv_attr=""),
        changed("seg", seg_pe_ranges=f"{PV}:9-8"),
        changed("pv", pv_name=["a"]),
        changed("pvseg", pv_uuid="another"),
        changed("pvseg", pvseg_start="many"),
        changed("pv", pe_start=None),
        changed("vg", vg_extent_size="1e400"),
        changed("vg", vg_extent_size="-4096"),
        changed("pv", pe_start="-1"),
        json.dumps({"report": [{**report(), "pv": [*report()["pv"], {**report()["pv"][0], "pv_name": "/dev/sda"}]}]}),
    ],
)
def test_output_that_makes_no_sense(text: str) -> None:
    with pytest.raises(Failure, match="lvm2 says what is not understood"):
        lvm.parse(text, {PV: "id-pv"})


def test_too_many_volumes() -> None:
    text = report()
    names = [f"v{number}" for number in range(lvm.MOST_VOLUMES + 1)]
    text["lv"], text["seg"] = [volume(name) for name in names], [piece(name, 0, 1) for name in names]
    with pytest.raises(Failure, match="more than"):
        parsed(text)


# On the disk


def disk(size: int = 250 * MIB, *more: Part) -> Table:
    """Return a disk whose partition 3 has the volume group, from its second MiB on."""
    groups = parsed(report())
    holder = Part(3, MIB, size, "", "", "", PV, partitions.PHYSICAL)
    volumes = [partitions._place(groups[0], volume, {PV: holder}) for volume in groups[0].volumes]
    return Table("gpt", (holder, *more, *volumes), 1000 * MIB, groups=groups)


def test_place() -> None:
    root, swap = disk().parts[1:]
    assert str(root) == "logical volume a-b/root"
    assert (root.start, root.size) == (MIB + MIB + 10 * EXTENT, 20 * EXTENT)
    assert swap.start == 2 * MIB


def test_a_volume_that_ends_behind_its_partition() -> None:
    root = disk(size=100 * MIB).parts[1]
    assert root.obstacle == "it ends behind partition 3"


@pytest.mark.parametrize("source", ["/dev/a-b/root", "/dev/mapper/a--b-root", "/dev/disk/by-id/dm-name-a--b-root",
                                    "/dev/disk/by-id/dm-uuid-LVM-idgroupidroot"])  # fmt: skip
def test_names_in_the_fstab(source: str) -> None:
    parts = disk().parts
    assert fstab.resolve(source, parts) is parts[1]


@pytest.mark.parametrize(
    "source", ["/dev/mapper/a-b-root", "/dev/a/b-root", "/dev/mapper/a--b--root", "a-b/root", "/dev/sda0"]
)
def test_other_names(source: str) -> None:
    part = fstab.resolve(source, disk().parts)
    assert not (part and part.volume)


def test_what_keeps_a_logical_volume_from_growing() -> None:
    table = disk()
    root, swap = table.parts[1:]
    assert not why_not(table, root)
    assert why_not(table, swap) == "behind logical volume a-b/swap lies logical volume a-b/root"
    behind = Part(4, 300 * MIB, MIB, "", "", "", "/dev/loop7p4", "ext4")
    assert not why_not(disk(250 * MIB, behind), root), "there are free extents"
