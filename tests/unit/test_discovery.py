"""Tables, fstabs and what blkid prints, as values."""

from __future__ import annotations

import json

import pytest

from imageos.disks import discovery
from imageos.disks.discovery import Found, FstabEntry, Part, Table, parse_fstab, parse_probe, parse_table, resolve
from imageos.disks.filesystem import Volume
from imageos.disks.layout import MIB
from imageos.errors import Failure

DISK = 100 * MIB
SECTORS = DISK // 512


def entry(number: int, start: int, size: int, /, **more: object) -> dict[str, object]:
    return {"node": f"/dev/loop7p{number}", "start": start, "size": size, "type": "83", **more}


def table(*entries: dict[str, object], **more: object) -> str:
    head = {"label": "dos", "id": "0xdeadbeef", "device": "/dev/loop7", "unit": "sectors", "sectorsize": 512}
    return json.dumps({"partitiontable": {**head, "partitions": entries, **more}})


def parsed(*entries: dict[str, object], **more: object) -> Table:
    return parse_table(table(*entries, **more), "/dev/loop7", DISK)


def test_gpt() -> None:
    root = {"type": "4F68BCE3", "uuid": "AA-01", "name": "root"}
    found = parsed(entry(14, 2048, 8192), entry(1, 10240, 4096, **root), label="gpt", lastlba=SECTORS - 34)
    assert found.kind == "gpt"
    assert found.end == (SECTORS - 33) * 512
    assert found.parts[1] == Part(1, 5 * MIB, 2 * MIB, "4F68BCE3", "AA-01", "root", "/dev/loop7p1")


def test_partuuids_of_an_msdos_table_are_the_kernels() -> None:
    assert parsed(entry(1, 2048, 8)).parts[0].partuuid == "deadbeef-01"


def test_logical_partitions() -> None:
    found = parsed(entry(1, 2048, 2048), entry(2, 4096, 8192, type="5"), entry(5, 6144, 2048))
    assert [part.number for part in found.parts] == [1, 5]
    assert [part.number for part in found.extended] == [2]


def test_end_of_an_msdos_table() -> None:
    assert parsed(entry(1, 2048, 8)).end == DISK
    large = parse_table(table(entry(1, 2048, 8)), "/dev/loop7", 1 << 42)
    assert large.end == ((1 << 32) - 1) * 512


def test_no_partitions() -> None:
    assert parsed().parts == ()


@pytest.mark.parametrize(
    "entries, reason",
    [
        ([entry(1, 2048, 4096), entry(2, 4096, 4096)], "1 and 2 overlap"),
        ([entry(2, 2048, 4096), entry(1, 2048, 8)], "overlap"),
        ([entry(1, 2048, SECTORS)], "not for this disk"),
        ([entry(1, 1 << 60, 8)], "not for this disk"),
        ([entry(1, 0, 8)], "damaged"),
        ([entry(1, 2048, 0)], "damaged"),
        ([entry(1, 2048, -5)], "damaged"),
        ([entry(number, 2048 + 8 * number, 8) for number in range(1, 131)], "130 partitions"),
        ([entry(4000, 2048, 8)], "numbers over 128"),
        ([entry(1, 1, 40, type="ee")], "GPT that cannot be read"),
        ([entry(1, 2048, 8, node="/dev/sda1")], "no partition number"),
        ([entry(1, 2048, 8, start="many")], "cannot understand"),
        ([{}], "cannot understand"),
        ([7], "cannot understand"),
    ],
)
def test_tables_that_cannot_be_trusted(entries: list[dict[str, object]], reason: str) -> None:
    with pytest.raises(Failure, match=reason):
        parsed(*entries)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"partitiontable": 5}', "{" * 10000, table(unit="furlongs"),
                                  table(sectorsize=4096), table(label="gpt")])  # fmt: skip
def test_output_that_is_not_a_table(text: str) -> None:
    with pytest.raises(Failure, match="cannot understand"):
        parse_table(text, "/dev/loop7", DISK)


@pytest.mark.parametrize("label", ["sun", "bsd", "mac"])
def test_other_kinds_of_tables(label: str) -> None:
    with pytest.raises(Failure, match=label):
        parsed(label=label)


def test_probe() -> None:
    text = 'DEVNAME=/dev/loop7\nLABEL=my\\ \\"la\\\\bel\nUUID=1-2\nTYPE=ext4\nodd\n'
    assert parse_probe(text)["LABEL"] == 'my "la\\bel'
    assert parse_probe(text)["TYPE"] == "ext4"


def test_fstab() -> None:
    text = (
        "# comment\n\n   # another\nUUID=a / ext4 defaults,noatime 0 1\n/dev/vda2\t/boot/ ext4\n"
        "LABEL=x\\040y /with\\040space btrfs subvol=/@a,compress 0 0\nswap none swap sw\nproc /proc\n"
        "tmpfs //tmp// tmpfs\n/dev/vda9 /../../etc ext4\n/dev/vda9 relative ext4\n"
    )
    assert parse_fstab(text) == (
        FstabEntry("UUID=a", "/", "ext4", ("defaults", "noatime")),
        FstabEntry("/dev/vda2", "/boot", "ext4", ()),
        FstabEntry("LABEL=x y", "/with space", "btrfs", ("subvol=/@a", "compress")),
        FstabEntry("tmpfs", "/tmp", "tmpfs", ()),
    )


PARTS = (
    Part(1, MIB, MIB, "83", "deadbeef-01", "", "/dev/loop7p1", "ext4", "AB-cd", "same"),
    Part(5, 2 * MIB, MIB, "83", "deadbeef-05", "na me", "/dev/loop7p5", "xfs", "", "same"),
)


@pytest.mark.parametrize(
    "source, number",
    [
        ("UUID=ab-CD", 1), ('UUID="AB-cd"', 1), ("UUID=", None), ("UUID=x", None), ("LABEL=same", 1),
        ("LABEL=SAME", None), ("PARTUUID=DEADBEEF-05", 5), ("PARTLABEL=na me", 5), ("ID=x", None),
        ("/dev/vda1", 1), ("/dev/sda5", 5), ("/dev/xvda1", 1), ("/dev/hda5", 5), ("/dev/nvme0n1p5", 5),
        ("/dev/mmcblk0p1", 1), ("/dev/sdb1", None), ("/dev/vda2", None), ("/dev/vda", None),
        ("/dev/vg/root", None), ("/dev/mapper/vg-root", None),
        ("/dev/disk/by-uuid/AB-cd", 1), ("/dev/disk/by-partuuid/deadbeef-05", 5),
        ("/dev/disk/by-label/same", 1), ("tmpfs", None), ("host:/export", None), ("", None),
    ],
)  # fmt: skip
def test_resolve(source: str, number: int | None) -> None:
    found = resolve(source, PARTS)
    assert (found.number if found else None) == number


def volumes(root: Part, fstab: str, *parts: Part) -> list[tuple[str, str, str, str]]:
    system = discovery._System(root, "", parse_fstab(fstab))
    found = discovery._volumes(Table("gpt", (root, *parts), DISK), system)
    return [(one.role, one.device[-1], one.mount_point, one.options) for one in found]


def part(number: int, kind: str, type: str = "83") -> Part:
    return Part(number, number * MIB, MIB, type, f"p{number}", "", f"/dev/loop7p{number}", kind, f"u{number}", "")


def test_volumes() -> None:
    text = "UUID=u1 / ext4\nUUID=u2 /boot ext4\nUUID=u3 /var/lib xfs\nUUID=u4 /home ext4\nUUID=u9 /srv ext4\n"
    found = volumes(part(1, "ext4"), text, part(2, "ext4"), part(3, "xfs"), part(4, "ext4"), part(5, "swap"),
                    part(6, "vfat", discovery.ESP_TYPES[0]), part(7, "vfat"))  # fmt: skip
    assert found == [("root", "1", "/", ""), ("boot", "2", "/boot", ""), ("data", "3", "/var/lib", ""),
                     ("swap", "5", "", ""), ("esp", "6", "", "")]  # fmt: skip


def test_volumes_of_btrfs() -> None:
    text = "UUID=u1 / btrfs subvol=@\nUUID=u1 /home btrfs noatime,subvol=@home\nUUID=u1 /srv btrfs subvolid=260\n"
    assert volumes(part(1, "btrfs"), text) == [
        ("root", "1", "/", ""), ("data", "1", "/home", "subvol=@home"), ("data", "1", "/srv", "subvolid=260"),
    ]  # fmt: skip


def test_volumes_without_end(capfd: pytest.CaptureFixture[str]) -> None:
    """A guest may name as many subvolumes as its fstab has room for; what it boots from is found all the same."""
    text = "UUID=u1 / btrfs\n" + "".join(f"UUID=u1 /x{n} btrfs subvol=@\n" for n in range(20000))
    found = volumes(part(1, "btrfs"), text, part(2, "swap"))
    assert [one[2] for one in found] == ["/", *(f"/x{n}" for n in range(discovery.MOST_MOUNTED - 1)), ""]
    assert capfd.readouterr().err.count("/x63 and on are left out") == 1


def test_boot_without_an_fstab() -> None:
    xbootldr = "BC13C2FF-59E6-4262-A352-B275FD6F7172"  # as systemd's specification has it
    assert volumes(part(1, "ext4"), "", part(2, "ext4", xbootldr))[1] == ("boot", "2", "/boot", "")


def test_what_the_guest_cannot_mount_twice() -> None:
    assert volumes(part(1, "ext4"), "UUID=u1 / ext4\nUUID=u1 /var ext4\nUUID=u2 /boot ext4\nUUID=u2 /boot ext4\n",
                   part(2, "ext4")) == [("root", "1", "/", ""), ("boot", "2", "/boot", "")]  # fmt: skip


def test_what_was_found_in_words() -> None:
    parts = tuple(Part(number, 0, 0, "", "", "", f"/dev/loop0p{number}") for number in (1, 2))
    volumes = (
        Volume("root", "btrfs", "/dev/loop0p1", "", "/", "subvol=@"),
        Volume("boot", "ext4", "/dev/loop0p2", "", "/boot"),
        Volume("swap", "swap", "/dev/loop0p2", ""),
    )
    assert discovery.describe(Found(Table("gpt", parts, 0), parts[0], volumes)) == [
        "/ on partition 1 (btrfs, subvol=@)",
        "/boot on partition 2 (ext4)",
        "swap on partition 2",
    ]
