"""Partition tables, fstabs and blkid's output, as values."""

from __future__ import annotations

import json

import pytest

from imageos.disks import discovery, fstab
from imageos.disks.discovery import Found
from imageos.disks.filesystem import Volume
from imageos.disks.layout import MIB
from imageos.disks.partitions import Part, Table, parse_probe, parse_table
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
    table = parsed(entry(14, 2048, 8192), entry(1, 10240, 4096, **root), label="gpt", lastlba=SECTORS - 34)
    assert table.kind == "gpt"
    assert table.end == (SECTORS - 33) * 512
    assert table.parts[1] == Part(1, 5 * MIB, 2 * MIB, "4F68BCE3", "AA-01", "root", "/dev/loop7p1")


def test_partuuids_of_an_msdos_table_are_the_kernels() -> None:
    assert parsed(entry(1, 2048, 8)).parts[0].partuuid == "deadbeef-01"


def test_logical_partitions() -> None:
    table = parsed(entry(1, 2048, 2048), entry(2, 4096, 8192, type="5"), entry(5, 6144, 2048))
    assert [part.number for part in table.parts] == [1, 5]
    assert [part.number for part in table.extended] == [2]


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
    assert fstab.parse(text) == (
        fstab.Entry("UUID=a", "/", "ext4", ("defaults", "noatime")),
        fstab.Entry("/dev/vda2", "/boot", "ext4", ()),
        fstab.Entry("LABEL=x y", "/with space", "btrfs", ("subvol=/@a", "compress")),
        fstab.Entry("tmpfs", "/tmp", "tmpfs", ()),
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
        ("/dev/mmcblk0p1", 1), ("/dev/cciss/c0d0p5", 5), ("/dev/sdb1", None), ("/dev/vda2", None), ("/dev/vda", None),
        ("/dev/vg/root", None), ("/dev/mapper/vg-root", None),
        ("/dev/disk/by-uuid/AB-cd", 1), ("/dev/disk/by-partuuid/deadbeef-05", 5),
        ("/dev/disk/by-label/same", 1), ("tmpfs", None), ("host:/export", None), ("", None),
    ],
)  # fmt: skip
def test_resolve(source: str, number: int | None) -> None:
    match = fstab.resolve(source, PARTS)
    assert (match.number if match else None) == number


ID, PATH, OTHER = "/dev/disk/by-id/scsi-0QEMU_1-part", "/dev/disk/by-path/pci-0000:00-0-part", "/dev/disk/by-id/b-part"


@pytest.mark.parametrize(
    "text, names",
    [
        (f"{ID}1 / ext3\n{ID}2 /boot ext3\n", {"id/scsi-0QEMU_1"}),
        (f"{ID}1 / ext3\n{OTHER}2 /boot ext3\n", {"id/scsi-0QEMU_1"}),
        (f"{ID}7 / ext3\n{ID}2 /boot ext3\n", set()),  # of another machine
        (f"UUID=u1 / ext3\n{ID}2 /boot ext3\n", {"id/scsi-0QEMU_1"}),
        (f"UUID=u1 / ext3\n{ID}2 /var ext3\n", set()),
        (f"UUID=u1 / ext3\n{ID}2 /boot ext3\n{OTHER}2 /srv ext3\n", set()),
        (f"{ID}1 / ext3\n{PATH}2 /boot ext3\n", {"id/scsi-0QEMU_1", "path/pci-0000:00-0"}),
        ("/dev/disk/by-id/scsi-0QEMU_1 / ext3\n", set()),
        ("UUID=u1 / ext3\n", set()),
    ],
)
def test_names_of_disk(text: str, names: set[str]) -> None:
    assert fstab.names_of_disk(fstab.parse(text), PARTS[0]) == names


def test_links_to_partitions() -> None:
    assert fstab.resolve(f"{ID}5", PARTS, {"id/scsi-0QEMU_1"}) == PARTS[1]
    assert fstab.resolve(f"{ID}2", PARTS, {"id/scsi-0QEMU_1"}) is None
    assert fstab.resolve(f"{OTHER}5", PARTS, {"id/scsi-0QEMU_1"}) is None
    assert fstab.resolve(f"{ID}5", PARTS) is None


def test_links_to_other_disks(capfd: pytest.CaptureFixture[str]) -> None:
    text = f"{ID}1 / ext3\n{ID}2 /boot ext4\n{OTHER}2 /usr ext4\n{OTHER}1 /var ext4\n{OTHER}3 /srv ext4\n"
    mounted = volumes(part(1, "ext4"), text, part(2, "ext4"), part(3, "ext4"))
    assert mounted == [("root", "1", "/", ""), ("boot", "2", "/boot", "")]
    (line,) = capfd.readouterr().err.splitlines()
    assert "warning: left out" in line and f"{OTHER}2 at /usr, {OTHER}1 at /var" in line and "/srv" not in line


def volumes(root: Part, text: str, *parts: Part) -> list[tuple[str, str, str, str]]:
    system = discovery._System(root, "", fstab.parse(text))
    mounted = discovery._volumes(Table("gpt", (root, *parts), DISK), system)
    return [(volume.role, volume.device[-1], volume.mount_point, volume.options) for volume in mounted]


def part(number: int, kind: str, type: str = "83") -> Part:
    return Part(number, number * MIB, MIB, type, f"p{number}", "", f"/dev/loop7p{number}", kind, f"u{number}", "")


def test_volumes() -> None:
    text = "UUID=u1 / ext4\nUUID=u2 /boot ext4\nUUID=u3 /var/lib xfs\nUUID=u4 /home ext4\nUUID=u9 /srv ext4\n"
    mounted = volumes(part(1, "ext4"), text, part(2, "ext4"), part(3, "xfs"), part(4, "ext4"), part(5, "swap"),
                    part(6, "vfat", discovery.ESP_TYPES[0]), part(7, "vfat"))  # fmt: skip
    assert mounted == [("root", "1", "/", ""), ("boot", "2", "/boot", ""), ("data", "3", "/var/lib", ""),
                     ("swap", "5", "", ""), ("esp", "6", "", "")]  # fmt: skip


def test_volumes_of_btrfs() -> None:
    text = "UUID=u1 / btrfs subvol=@\nUUID=u1 /home btrfs noatime,subvol=@home\nUUID=u1 /srv btrfs subvolid=260\n"
    assert volumes(part(1, "btrfs"), text) == [
        ("root", "1", "/", ""), ("data", "1", "/home", "subvol=@home"), ("data", "1", "/srv", "subvolid=260"),
    ]  # fmt: skip


def test_subvolumes_beside_the_root() -> None:
    text = "UUID=u1 / ext4\nUUID=u2 /var btrfs subvol=v\nUUID=u2 /usr btrfs subvol=u\nUUID=u3 /boot ext4 subvol=b\n"
    assert volumes(part(1, "ext4"), text, part(2, "btrfs"), part(3, "ext4")) == [
        ("root", "1", "/", ""), ("var", "2", "/var", "subvol=v"), ("usr", "2", "/usr", "subvol=u"),
        ("boot", "3", "/boot", ""),
    ]  # fmt: skip


def test_volumes_without_end(capfd: pytest.CaptureFixture[str]) -> None:
    """An fstab may name any number of subvolumes; the volumes for booting are still found."""
    text = "UUID=u1 / btrfs\n" + "".join(f"UUID=u1 /x{n} btrfs subvol=@\n" for n in range(20000))
    mounted = volumes(part(1, "btrfs"), text, part(2, "swap"))
    assert [volume[2] for volume in mounted] == ["/", *(f"/x{n}" for n in range(discovery.MOST_MOUNTED - 1)), ""]
    assert capfd.readouterr().err.count("/x63 and on are left out") == 1


def test_boot_without_an_fstab() -> None:
    xbootldr = "BC13C2FF-59E6-4262-A352-B275FD6F7172"  # from systemd's specification
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
