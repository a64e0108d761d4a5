"""Partitions: their positions and types, and the script for sfdisk."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageos.disks import layout
from imageos.disks.layout import MIB, SECTOR, Layout, Partition
from imageos.errors import Failure

GIB = 1 << 30
TIB = 1 << 40


def plan(
    table: str = "msdos",
    disk: int = 10 * GIB,
    boot: int = 100 * MIB,
    swap: int = 256 * MIB,
    arch: str = "x86_64",
    smallest_root: int = 16 * MIB,
) -> Layout:
    return layout.plan(table, disk, boot=boot, swap=swap, arch=arch, smallest_root=smallest_root)


def part(made: Layout, role: str) -> Partition:
    found = made.find(role)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("table", "boot", "swap", "roles"),
    [
        ("msdos", 100, 256, ["boot", "swap", "root"]),
        ("msdos", 100, 0, ["boot", "root"]),
        ("msdos", 0, 256, ["swap", "root"]),
        ("msdos", 0, 0, ["root"]),
        ("gpt", 512, 256, ["bios", "esp", "boot", "swap", "root"]),
        ("gpt", 512, 0, ["bios", "esp", "boot", "root"]),
        ("gpt", 0, 256, ["bios", "esp", "swap", "root"]),
        ("gpt", 0, 0, ["bios", "esp", "root"]),
    ],
)
def test_roles_in_their_order(table: str, boot: int, swap: int, roles: list[str]) -> None:
    made = plan(table, boot=boot * MIB, swap=swap * MIB)
    assert made.table == table
    assert [partition.role for partition in made.partitions] == roles
    assert [partition.number for partition in made.partitions] == list(range(1, len(roles) + 1))
    if boot:
        assert part(made, "boot").size == boot * MIB
    if swap:
        assert part(made, "swap").size == swap * MIB
    active = [partition.role for partition in made.partitions if partition.bootable]
    assert active == ([] if table == "gpt" else ["boot" if boot else "root"])


def test_role_that_is_not_there() -> None:
    assert plan(boot=0).find("boot") is None


@given(
    table=st.sampled_from(["msdos", "gpt"]),
    disk=st.integers(300 * MIB, 2 * TIB),
    boot=st.integers(0, 60 * MIB),
    swap=st.integers(0, 60 * MIB),
)
def test_partitions_fill_the_disk(table: str, disk: int, boot: int, swap: int) -> None:
    """They are aligned, adjacent, and leave almost nothing free, for any size of the disk."""
    made = plan(table, disk, boot, swap)
    place = MIB
    for partition in made.partitions:
        assert partition.start == place
        assert partition.size > 0
        assert partition.size % MIB == 0
        place += partition.size
    backup = 33 * SECTOR if table == "gpt" else 0
    assert disk - backup - MIB < place <= disk - backup
    assert made.partitions[-1].role == "root"
    assert boot <= sum(partition.size for partition in made.partitions if partition.role == "boot") < boot + MIB
    assert swap <= sum(partition.size for partition in made.partitions if partition.role == "swap") < swap + MIB


@pytest.mark.parametrize("extra", [0, 1, 511, 512, MIB - 1])
def test_odd_end_of_the_disk_is_not_used(extra: int) -> None:
    root = part(plan(disk=GIB + extra), "root")
    assert root.start + root.size == GIB


def test_gpt_keeps_room_for_its_backup() -> None:
    root = part(plan("gpt", GIB), "root")
    assert root.start + root.size == GIB - MIB
    root = part(plan("gpt", GIB + 33 * SECTOR), "root")
    assert root.start + root.size == GIB


# Impossible layouts


@pytest.mark.parametrize("table", ["msdos", "gpt"])
def test_smallest_disk(table: str) -> None:
    fixed = 2 * MIB + (layout.BIOS_SIZE + layout.ESP_SIZE if table == "gpt" else -MIB)
    fits = fixed + (100 + 256 + 16) * MIB
    assert part(plan(table, fits), "root").size == 16 * MIB
    with pytest.raises(Failure, match="too small"):
        plan(table, fits - (33 * SECTOR if table == "gpt" else 1) - MIB)


@pytest.mark.parametrize("disk", [0, 1, MIB, 100 * MIB])
def test_too_small_says_why(disk: int) -> None:
    with pytest.raises(Failure) as raised:
        plan("gpt", disk)
    message = str(raised.value)
    assert "esp 128 MiB" in message
    assert "boot 100 MiB" in message
    assert "swap 256 MiB" in message
    assert "leaves 0 bytes for /, which needs 16 MiB" in message
    assert "SWAP_SIZE" in str(raised.value.hint)


def test_too_small_without_any_other_partition() -> None:
    with pytest.raises(Failure, match="the partition table leaves 1 MiB for /"):
        plan(disk=2 * MIB, boot=0, swap=0)


def test_msdos_ends_at_2_tib() -> None:
    root = part(plan(disk=2 * TIB), "root")
    assert (root.start + root.size) // SECTOR == 1 << 32
    assert root.size // SECTOR < 1 << 32
    with pytest.raises(Failure) as raised:
        plan(disk=2 * TIB + MIB)
    assert "msdos" in str(raised.value)
    assert raised.value.hint == "set PARTITION_TABLE=gpt"
    assert part(plan("gpt", 20 * TIB), "root").size > 19 * TIB


# Identity


def test_every_disk_has_an_id_of_its_own() -> None:
    assert plan().disk_id != plan().disk_id
    assert re.fullmatch(r"0x[0-9a-f]{8}", plan().disk_id)
    assert re.fullmatch(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}", plan("gpt").disk_id)


# The script for sfdisk


def script(table: str, disk_id: str, arch: str = "x86_64", boot: int | None = None, swap: int = 256) -> str:
    boot = (512 if table == "gpt" else 100) if boot is None else boot
    made = plan(table, boot=boot * MIB, swap=swap * MIB, arch=arch)
    return layout.sfdisk_script(made._replace(disk_id=disk_id))


def test_msdos_script() -> None:
    assert script("msdos", "0x1234abcd") == (
        "label: dos\n"
        "label-id: 0x1234abcd\n"
        "unit: sectors\n"
        "1 : start=2048, size=204800, type=83, bootable\n"
        "2 : start=206848, size=524288, type=82\n"
        "3 : start=731136, size=20240384, type=83\n"
    )


def test_msdos_script_for_a_kernel_of_the_node() -> None:
    assert script("msdos", "0x1234abcd", boot=0) == (
        "label: dos\n"
        "label-id: 0x1234abcd\n"
        "unit: sectors\n"
        "1 : start=2048, size=524288, type=82\n"
        "2 : start=526336, size=20445184, type=83, bootable\n"
    )


def test_gpt_script() -> None:
    assert script("gpt", "6C2A6A3B-9C3D-4F3B-8B1B-5C6A0D9B2E01") == (
        "label: gpt\n"
        "label-id: 6C2A6A3B-9C3D-4F3B-8B1B-5C6A0D9B2E01\n"
        "unit: sectors\n"
        "1 : start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649\n"
        "2 : start=4096, size=262144, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n"
        "3 : start=266240, size=1048576, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n"
        "4 : start=1314816, size=524288, type=0657FD6D-A4AB-43C4-84E5-0933C84B4F4F\n"
        "5 : start=1839104, size=19130368, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709\n"
    )


@pytest.mark.parametrize(
    ("arch", "guid"),
    [
        ("x86_64", "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"),
        ("x86", "44479540-F297-41B2-9AF7-D131D5F0458A"),
        ("aarch64", "B921B045-1DF0-41C3-AF44-4C6F280D3FAE"),
        ("an_unknown_one", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"),  # plain Linux data
    ],
)
def test_gpt_type_of_the_root(arch: str, guid: str) -> None:
    assert script("gpt", "x", arch).endswith(f"type={guid}\n")
    assert script("msdos", "x", arch).endswith("type=83\n")
