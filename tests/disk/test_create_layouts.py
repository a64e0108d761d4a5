"""The partition layouts of the contract, their filesystems, and the guest's fstab."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support import MIB, Node, attached, mounted, partitions, probe, run, signatures, table_of

MakeDisk = Callable[..., Path]
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX_SWAP = "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F"
LINUX = {
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4",  # Linux filesystem data
    "BC13C2FF-59E6-4262-A352-B275FD6F7172",  # extended boot loader partition: /boot
    "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
}  # root of x86-64
GIB = 1024


def roles(table: str, swap: bool, kernel: bool) -> list[str]:
    """Return the contract's roles: for msdos as listed there; for gpt BIOS boot, ESP, then the same in order."""
    msdos = {
        (True, False): ["boot", "swap", "root"],
        (False, False): ["boot", "root"],
        (True, True): ["swap", "root"],
        (False, True): ["root"],
    }[swap, kernel]
    return msdos if table == "msdos" else ["bios", "esp", *msdos]


def fstab(guest: Path) -> list[tuple[str, ...]]:
    lines = (guest / "etc/fstab").read_text().splitlines()
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("kernel", [False, True], ids=["own-kernel", "kernel_path"])
@pytest.mark.parametrize("swap", [True, False], ids=["swap", "no-swap"])
@pytest.mark.parametrize("table", ["msdos", "gpt"])
def test_layout(table: str, swap: bool, kernel: bool, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk(400)
    node.create(
        target,
        OSP_PARTITION_TABLE=table,
        OSP_SWAP="yes" if swap else "no",
        INSTANCE_HV_kernel_path="/boot/vmlinuz" if kernel else "",
    ).ok()
    expected = roles(table, swap, kernel)
    by_role = dict(zip(expected, partitions(target)))
    assert len(partitions(target)) == len(expected)
    check_table(table, target, by_role)
    check_contents(by_role)
    with mounted(target, tmp_path / "root", by_role["root"]) as guest:
        check_fstab(guest, by_role)


def check_table(table: str, target: Path, by_role: dict) -> None:
    head = table_of(target)
    assert head["label"] == {"msdos": "dos", "gpt": "gpt"}[table]
    parts = list(by_role.values())
    assert [part for part in parts if part.start % MIB or part.size % MIB] == (
        [parts[-1]] if parts[-1].size % MIB else []
    )
    assert all(part.start + part.size <= other.start for part, other in zip(parts, parts[1:])), "not in order"
    end = target.stat().st_size - (parts[-1].start + parts[-1].size)
    assert 0 <= end <= MIB, f"{end} bytes behind root"
    if "swap" in by_role:
        assert by_role["swap"].size == 8 * MIB
    if "boot" in by_role:
        assert by_role["boot"].size == 24 * MIB
    if table == "msdos":
        types = {"boot": "83", "swap": "82", "root": "83"}
        assert {role: part.type for role, part in by_role.items()} == {role: types[role] for role in by_role}
        assert [role for role, part in by_role.items() if part.bootable] == [("boot" if "boot" in by_role else "root")]
        assert signatures(target) == ["dos"]
    else:
        assert by_role["bios"].type == BIOS_BOOT and by_role["esp"].type == ESP
        assert by_role["bios"].size >= MIB
        assert all(by_role[role].type in LINUX for role in ("boot", "root") if role in by_role)
        assert "swap" not in by_role or by_role["swap"].type == LINUX_SWAP
        assert sorted(signatures(target)) == ["PMBR", "gpt", "gpt"]


def check_contents(by_role: dict) -> None:
    types = {"boot": "ext4", "root": "ext4", "swap": "swap", "esp": "vfat", "bios": None}
    assert {role: part.content.get("TYPE") for role, part in by_role.items()} == {role: types[role] for role in by_role}
    identifiers = [part.content["UUID"] for part in by_role.values() if "UUID" in part.content]
    assert len(set(identifiers)) == len(identifiers)


def check_fstab(guest: Path, by_role: dict) -> None:
    places = {"root": "/", "boot": "/boot", "swap": "none", "esp": "/boot/efi"}
    entries = {(source, place, kind) for source, place, kind, *_ in fstab(guest) if source.startswith("UUID=")}
    expected = {
        (f"UUID={by_role[role].content['UUID']}", places[role], by_role[role].content["TYPE"])
        for role in by_role
        if role in places
    }
    assert entries == expected
    rest = [entry for entry in fstab(guest) if not entry[0].startswith("UUID=")]
    assert all(entry[2] in ("proc", "tmpfs", "sysfs", "devpts") for entry in rest)
    assert all(re.fullmatch(r"[012]", entry[5]) for entry in fstab(guest))


@pytest.mark.parametrize(
    "filesystem, size", [("ext2", 160), ("ext3", 160), ("ext4", 160), ("xfs", 384), ("btrfs", 256)]
)
def test_filesystem(filesystem: str, size: int, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk(size)
    node.create(target, OSP_FILESYSTEM=filesystem).ok()
    boot, swap, root = partitions(target)
    assert root.content["TYPE"] == filesystem
    assert swap.content["TYPE"] == "swap"
    assert boot.content["TYPE"] in ("ext2", "ext3", "ext4", filesystem)
    with mounted(target, tmp_path / "root", root) as guest:
        kinds = {place: (source, kind) for source, place, kind, *_ in fstab(guest)}
        assert kinds["/"] == (f"UUID={root.content['UUID']}", filesystem)
        assert kinds["/boot"] == (f"UUID={boot.content['UUID']}", boot.content["TYPE"])


@pytest.mark.parametrize("table, boot_size", [("msdos", 100), ("gpt", 512)])
def test_built_in_sizes(table: str, boot_size: int, node: Node, disk: MakeDisk) -> None:
    """Swap has the size of the memory (256 MiB in the recorded environment), /boot the default of the table."""
    node.defaults("SWAP_SIZE=\nBOOT_SIZE=")
    target = disk(1200)
    node.create(target, OSP_PARTITION_TABLE=table).ok()
    boot, swap, _ = partitions(target)[-3:]
    assert (boot.size // MIB, swap.size // MIB) == (boot_size, 256)


# How a filesystem's own program shows what it has; a word that is always there; what the newest mkfs would make
FEATURES = {
    "ext4": (["dumpe2fs", "-h"], r"has_journal", r"metadata_csum_seed|orphan_file"),
    "xfs": (["xfs_info"], r"\bcrc *=1", r"\b(bigtime|inobtcount|nrext64|exchange|parent|metadir|rmapbt) *=1"),
    "btrfs": (["btrfs", "inspect-internal", "dump-super"], r"SKINNY_METADATA", r"\w+_TREE(?<!FREE_SPACE_TREE)\b|QUOTA"),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_mkfs_writes_nothing_that_old_guests_cannot_read(kind: str, node: Node, disk: MakeDisk) -> None:
    target = disk(384)
    node.create(target, OSP_FILESYSTEM=kind).ok()
    boot, _, root = partitions(target)
    for part, kind_of_part in ((boot, "ext4"), (root, kind)):
        show, always, too_new = FEATURES[kind_of_part]
        with attached(target, part.start, part.size, read_only=True) as device:
            shown = run(*show, device)
        assert re.search(always, shown), shown
        assert not re.search(too_new, shown), shown


def test_two_instances_share_no_identifier(node: Node, disk: MakeDisk) -> None:
    seen = []
    for _ in range(2):
        target = disk(400)
        node.create(target, OSP_PARTITION_TABLE="gpt").ok()
        table = table_of(target)
        seen.append(
            {
                str(table["id"]),
                *(part.content["UUID"] for part in partitions(target) if "UUID" in part.content),
                *(probe(target, part.start, part.size).get("PART_ENTRY_UUID", "") for part in partitions(target)),
                *(entry["uuid"] for entry in table["partitions"]),
            }
            - {""}
        )
    assert len(seen[0]) > 8
    assert not seen[0] & seen[1]
