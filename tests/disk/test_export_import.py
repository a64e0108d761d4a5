"""Backups: export and import every kind of disk, and refuse every kind of stream that must not become a disk."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import backups
import guestdisks
import pytest
import readme
from backups import MARKER, exported, free_ranges, is_disarmed, read_only, restore, same, start_export, use, without
from guestdisks import blank, make, place
from support import (
    MIB,
    Node,
    attached,
    digest,
    locked,
    mounted,
    partitions,
    probe,
    recorded,
    run,
    session,
    signatures,
    wait_until,
)

MakeDisk = Callable[..., Path]

EXT = {
    "ext2-1k": ["-t", "ext2", "-b", "1024"],
    "ext2-4k": ["-t", "ext2", "-b", "4096"],
    "ext2-old": ["-t", "ext2", "-O", "none", "-I", "128", "-b", "1024"],  # and then of revision 0
    "ext2-no-sparse_super": ["-t", "ext2", "-O", "^sparse_super,^resize_inode", "-b", "1024"],
    "ext3-1k": ["-t", "ext3", "-b", "1024"],
    "ext3-2k": ["-t", "ext3", "-b", "2048"],
    "ext3-4k": ["-t", "ext3", "-b", "4096"],
    "ext4-1k": ["-t", "ext4", "-b", "1024"],
    "ext4-4k": ["-t", "ext4", "-b", "4096"],
    "ext4-32bit": ["-t", "ext4", "-O", "^64bit", "-b", "1024"],
    "ext4-no-flex_bg": ["-t", "ext4", "-O", "^flex_bg", "-b", "1024"],
    "ext4-uninit_bg": ["-t", "ext4", "-O", "uninit_bg,^metadata_csum", "-b", "1024"],
    "ext4-meta_bg": ["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"],
    "ext4-meta_bg-32bit": ["-t", "ext4", "-O", "meta_bg,^resize_inode,^64bit,^metadata_csum", "-b", "1024"],
    "ext4-sparse_super2": ["-t", "ext4", "-O", "sparse_super2,^resize_inode", "-b", "1024"],
    "ext4-no-journal": ["-t", "ext4", "-O", "^has_journal", "-b", "4096"],
    "ext4-lazy": ["-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-b", "1024"],
    "ext4-smaller": ["-t", "ext4", "-b", "4096", "DEVICE", "60M"],
}


def soil(disk: Path) -> Path:
    """Fill a disk with data that must not remain."""
    with disk.open("r+b") as file:
        for _ in range(disk.stat().st_size // MIB):
            file.write((MARKER * (MIB // len(MARKER) + 1))[:MIB])
    return disk


def make_ext(disk: Path, number: int, words: list[str]) -> None:
    part = place(disk, number)
    with attached(disk, part.start if part else 0, part.size if part else 0) as device:
        known = [str(device) if word == "DEVICE" else word for word in words]
        run("mke2fs", "-q", "-F", "-E", "nodiscard", *known, *([] if "DEVICE" in words else [device]))


# --- export and import ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXT)
def test_ext(kind: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The used blocks come back bit by bit; the free ones are not even sent."""
    source = soil(disk(160))
    with source.open("r+b") as file:
        file.write(bytes(MIB))
    run("sfdisk", "--quiet", source, text="1 : start=2048, size=300000\n")
    make_ext(source, 1, EXT[kind])
    part = partitions(source)[0]
    if kind == "ext2-old":  # mke2fs can no longer make revision 0
        run("debugfs", "-w", "-R", "set_super_value rev_level 0", f"{source}?offset={part.start}")
        assert probe(source, part.start, part.size)["VERSION"] == "0.0"
    with mounted(source, tmp_path / "mnt", part, "rw") as top:
        use(top, 8)
    free = list(free_ranges(source, part.start, part.size))
    assert sum(end - start for start, end in free) > 20 * MIB
    stream = exported(node, source)
    behind = (part.start + part.size, source.stat().st_size)
    expected = without(source, iter(free), tmp_path / "expected")
    target = soil(disk(160))
    restore(node, stream, target).ok()
    assert same(expected, target)
    with attached(target, part.start, part.size, read_only=True) as device:
        run("e2fsck", "-f", "-n", device)
    if kind != "ext4-smaller":
        with source.open("rb") as file:
            file.seek(behind[0])
            assert stream.stat().st_size < file.seek(0, os.SEEK_END) - sum(e - s for s, e in free) - 3 * MIB


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("feature needs_recovery", "journal"),
        ("set_super_value state 0", "cleanly"),
        ("set_block_group 1 free_blocks_count 17", "group 1"),
        ("feature bigalloc", "features"),
    ],
)
def test_ext_that_cannot_be_trusted(change: str, why: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """All blocks are sent."""
    source = disk(64)
    make_ext(source, 0, ["-t", "ext4", "-O", "^metadata_csum,^uninit_bg", "-b", "1024"])
    with mounted(source, tmp_path / "mnt", None, "rw") as top:
        use(top, 8)
    run("debugfs", "-w", "-R", change, source)
    done = backups.export(node, source)
    assert why in done.result.ok().log and "with the free blocks" in done.result.log
    assert MARKER * 100 in done.stream.read_bytes()
    target = disk(64)
    restore(node, done.stream, target, index=1).ok()
    assert same(source, target)


@pytest.mark.parametrize("layout", guestdisks.LAYOUTS)
def test_guests(layout: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """xfs, btrfs, vfat, swap, msdos and gpt: import restores the whole content."""
    guest = guestdisks.LAYOUTS[layout](tmp_path / f"{layout}.img", small_tree, tmp_path)
    stream = exported(node, guest.path)
    target = disk(guest.path.stat().st_size // MIB)
    restore(node, stream, target, index=1).ok()
    expected = guest.path
    for part in [part for part in by_place(guest.path) if part[2].startswith("ext")]:
        expected = without(expected, free_ranges(expected, part[0], part[1]), tmp_path / f"expected{part[0]}")
    assert same(expected, target)
    assert not subprocess.run(["cmp", target, expected]).returncode


def by_place(disk: Path) -> list[tuple[int, int, str]]:
    parts = guestdisks.by_number(disk) if signatures(disk)[-1:] in (["gpt"], ["PMBR"], ["dos"]) else []
    if not parts:
        return [(0, disk.stat().st_size, "ext4")]
    return [(part.start, part.size, part.content.get("TYPE", "")) for part in parts]


def test_swap(node: Node, disk: MakeDisk) -> None:
    source = disk(64)
    run("sfdisk", "--quiet", source, text="label: gpt\n,30M,S\n,20M,S\n")
    for part in partitions(source):
        with source.open("r+b") as file:
            file.seek(part.start + MIB)
            file.write(MARKER * 9000)
        make(source, part.number, "swap")
    with source.open("r+b") as file:  # a guest is hibernated in the second partition
        file.seek(partitions(source)[1].start + 4096 - 10)
        file.write(b"S1SUSPEND\0")
    target = disk(64)
    stream = exported(node, source)
    restore(node, stream, target, index=1).ok()
    first, second = partitions(target)
    assert (first.content["TYPE"], second.content["TYPE"]) == ("swap", "swsuspend")
    with source.open("rb") as one, target.open("rb") as other:
        one.seek(first.start), other.seek(first.start)
        assert one.read(4096) == other.read(4096) and not any(other.read(20 * MIB))
        one.seek(second.start), other.seek(second.start)
        assert one.read(20 * MIB) == other.read(20 * MIB)
    assert stream.stat().st_size < 2 * MIB


@pytest.mark.parametrize("size", [1, 513, 4 * MIB - 1, 33 * MIB + 512])
def test_anything(size: int, node: Node, tmp_path: Path) -> None:
    """Any bytes: LVM, encrypted data, no partition table."""
    source, target = tmp_path / "source", tmp_path / "target"
    data = bytearray(os.urandom(size))
    data[size // 3 : size // 2] = bytes(size // 2 - size // 3)
    source.write_bytes(data)
    target.write_bytes(b"\xaa" * (size + 4097))
    restore(node, exported(node, source, DISK_0_SIZE=1), target, index=1, DISK_0_SIZE=1).ok()
    assert same(source, target)


def test_zeroes_and_holes_are_left_out(node: Node, disk: MakeDisk) -> None:
    empty = disk(512)
    assert exported(node, empty).stat().st_size < 20_000
    written = disk(48)
    written.write_bytes(bytes(48 * MIB))
    with written.open("r+b") as file:
        file.seek(40 * MIB + 5)
        file.write(b"x")
    stream = exported(node, written)
    assert stream.stat().st_size < 40_000
    target = soil(disk(48))
    restore(node, stream, target, index=1).ok()
    assert same(written, target)
    assert target.stat().st_blocks * 512 < 4 * MIB, "zeroes were written instead of holes"


def test_logical_partitions(node: Node, disk: MakeDisk) -> None:
    source = disk(96)
    run("sfdisk", "--quiet", source, text="label: dos\n,20M\n,,E\n,20M\n,20M\n")
    for part in guestdisks.by_number(source):
        if part.number != 2:
            make(source, part.number, "ext4")
    target = disk(96)
    restore(node, exported(node, source), target, index=1).ok()
    assert run("sfdisk", "--dump", source).splitlines()[5:] == [
        line.replace(str(target), str(source)) for line in run("sfdisk", "--dump", target).splitlines()[5:]
    ]
    for part in guestdisks.by_number(target):
        if part.number != 2:
            with attached(target, part.start, part.size, read_only=True) as device:
                run("e2fsck", "-f", "-n", device)


def test_table_that_cannot_be_trusted(node: Node, disk: MakeDisk) -> None:
    """If partitions overlap, all blocks are sent."""
    source = disk(64)
    run(
        "sfdisk",
        "--quiet",
        "--force",
        source,
        text="label: dos\n1 : start=2048, size=60000\n2 : start=70000, size=20000\n",
    )
    make(source, 1, "ext4")
    with source.open("r+b") as file:
        file.seek(446 + 16 + 8)
        file.write((40000).to_bytes(4, "little"))
        file.seek(20 * MIB)
        file.write(MARKER * 1000)
    done = backups.export(node, source)
    assert "overlap" in done.result.ok().log
    target = disk(64)
    restore(node, done.stream, target, index=1).ok()
    assert same(source, target)


def test_read_only_block_device(node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path) -> None:
    """A snapshot as source; a used volume as target."""
    source = disk(64)
    run("sfdisk", "--quiet", source, text="label: gpt\n,50M\n")
    make(source, 1, "ext4")
    with read_only(source) as snapshot:
        before = run("sha256sum", source)
        stream = exported(node, snapshot)
        assert run("sha256sum", source) == before
    target = block_disk(70)
    with target.open("r+b") as device:
        device.write(MARKER * (70 * MIB // len(MARKER)))
    restore(node, stream, target, index=1).ok()
    os.close(os.open(target, os.O_RDWR | os.O_EXCL))  # it is free at once
    part = partitions(source)[0]
    assert same(without(source, free_ranges(source, part.start, part.size), tmp_path / "expected"), target)
    direct = run("sh", "-c", f"dd if={target} iflag=direct bs=1M status=none | sha256sum")
    assert direct == run("sh", "-c", f"dd if={target} bs=1M status=none | sha256sum")


def test_device_of_the_snapshot_counts(node: Node, disk: MakeDisk) -> None:
    """EXPORT_DEVICE may differ from DISK_0_PATH, which is then in use."""
    source, snapshot = disk(8), disk(8)
    snapshot.write_bytes(b"snapshot" * MIB)
    values = backups.environment(node, "export", source)
    values["EXPORT_DEVICE"] = str(snapshot)
    with locked(source), (node.work / "stream").open("wb") as file:
        call = backups.Running(node, "export", values, subprocess.DEVNULL, file)
        call.result().ok()
    call.announced()
    assert b"snapshot" * 1000 in (node.work / "stream").read_bytes()


def test_all_disks_at_once(node: Node, disk: MakeDisk) -> None:
    sources = [disk(32) for _ in range(6)]
    for number, source in enumerate(sources):
        make_ext(source, 0, ["-t", "ext4", "-U", f"{number:08}-0000-4000-8000-000000000000"])
    streams = [source.with_suffix(".stream") for source in sources]
    calls = []
    for source, stream in zip(sources, streams):
        with stream.open("wb") as file:
            calls.append(start_export(node, source, file))
    for call in calls:
        call.result().ok()
        assert call.announced().strip().isdigit()
    for source, stream in zip(sources, streams):
        target = disk(32)
        restore(node, stream, target, index=1).ok()
        assert probe(target)["UUID"] == probe(source)["UUID"]


def test_memory_is_constant(node: Node, disk: MakeDisk) -> None:
    """For any disk: also for 8 TiB with data at the end, and for many small ranges."""
    source = disk(1)
    with source.open("r+b") as file:
        file.truncate(8 << 40)
        for number in range(2000):
            file.seek(number * 300_000)
            file.write(b"x" * 1000)
        file.seek(-4096, os.SEEK_END)
        file.write(b"the end of it all")
    target = disk(1)
    with target.open("r+b") as file:
        file.truncate(8 << 40)
    for command, stdin, stdout, disk_of in (
        ("export", "/dev/null", node.work / "stream", source),
        ("import", node.work / "stream", "/dev/null", target),
    ):
        values = backups.environment(node, command, disk_of, 1)
        values.pop("EXP_SIZE_FD", None)
        usage = run(
            "env", "-i", *(f"{name}={value}" for name, value in values.items()), "sh", "-c",
            f"exec /usr/bin/env python3 -c '{MEASURE}' {node.os_dir / command} <{stdin} >{stdout}",
        )  # fmt: skip
        assert not usage
        assert int((node.work / "memory").read_text()) < 60 * 1024, "KiB"
    with target.open("rb") as file:
        file.seek(-4096, os.SEEK_END)
        assert file.read(17) == b"the end of it all"


# the largest resident size of any process of the command
MEASURE = (
    "import os, resource, subprocess, sys; status = subprocess.call(sys.argv[1:]); "
    'open("MEMORY", "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(status)'
)


@pytest.fixture(autouse=True)
def memory_file(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.MEASURE", MEASURE.replace("MEMORY", str(node.work / "memory")))


# --- a larger disk, a smaller one ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["cloud", "mbr", "xfs", "btrfs", "bare", "ancestor"])
def test_first_disk_is_grown(layout: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.LAYOUTS[layout](tmp_path / f"{layout}.img", small_tree, tmp_path)
    mib = guest.path.stat().st_size // MIB
    target = soil(disk(mib + 100))
    restore(node, exported(node, guest.path), target).ok()
    old, new = place(guest.path, guest.root), place(target, guest.root)
    if old and new:
        assert new.start == old.start and new.size >= old.size + 97 * MIB
        for name in ("TYPE", "UUID", "LABEL"):
            assert new.content.get(name) == old.content.get(name)
    with mounted(target, tmp_path / "mnt", new) as top:
        stat = os.statvfs(top)
        assert stat.f_blocks * stat.f_frsize > 80 * MIB + (old.size if old else mib * MIB) * 0.7
        assert (top / guest.subvolume / "usr/share/doc/copyright").read_text() == "free\n"


@pytest.mark.parametrize(("index", "grow"), [(0, "no"), (1, "yes")])
def test_other_disks_are_not_grown(
    index: int, grow: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    guest = guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)
    target = soil(disk(300))
    stream = exported(node, guest.path, index)
    restore(node, stream, target, index, OSP_GROW=grow, INSTANCE_NAME=recorded("export-disk0")["INSTANCE_NAME"]).ok()
    part = partitions(guest.path)[0]
    assert same(without(guest.path, free_ranges(guest.path, part.start, part.size), tmp_path / "expected"), target)


def test_smaller_disk_is_not_touched(node: Node, disk: MakeDisk) -> None:
    stream = exported(node, disk(64))
    target = soil(disk(63))
    before = digest(target)
    restore(node, stream, target).failed("smaller", str(64 * MIB), str(63 * MIB))
    assert digest(target) == before


# --- incomplete streams ----------------------------------------------------------------------------------


@pytest.fixture
def backup(node: Node, disk: MakeDisk, tmp_path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """Make a small stream; return it with the ranges of the partitions."""
    source = disk(32)
    run("sfdisk", "--quiet", source, text="label: gpt\n,10M\n,15M\n")
    places = [(part.start, part.size) for part in partitions(source)]
    make(source, 1, "ext4")
    with source.open("r+b") as file:
        file.seek(places[1][0])
        file.write(os.urandom(9 * MIB))
    return exported(node, source).read_bytes(), places


@pytest.mark.parametrize("where", [0, 1, 511, 512, 1536, 2048, 0.1, 0.5, 0.999, -1, -1024, -1025, -2560])
def test_truncated(where: float, node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]]) -> None:
    data, places = backup
    end = int(where * len(data)) if isinstance(where, float) else where % len(data)
    target = soil(disk(32))
    before = digest(target)
    result = restore(node, data[:end], target)
    result.failed(f"truncated: it ends at byte {end}" if end else "empty")
    assert is_disarmed(target, places) if end > 4096 else digest(target) == before


@pytest.mark.parametrize("where", [0, 100, 600, 1600, 0.2, 0.7, -1500, -600, -1])
def test_bit_flipped(where: float, node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]]) -> None:
    data, places = bytearray(backup[0]), backup[1]
    place = int(where * len(data)) if isinstance(where, float) else where % len(data)
    data[place] ^= 0x10
    target = soil(disk(32))
    before = digest(target)
    result = restore(node, bytes(data), target).failed("byte ")
    offset = int(result.last.split("byte ")[1].split()[0].rstrip(":"))
    assert offset <= place and place - offset < 2 * MIB
    assert is_disarmed(target, places) if place > 4096 else digest(target) == before


def test_reordered(node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]], tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(backup[0])
    with tarfile.open(tmp_path / "stream") as archive:
        starts = [member.offset for member in archive]
    parts = [backup[0][start:end] for start, end in zip(starts, [*starts[1:], None])]
    parts[3], parts[4] = parts[4], parts[3]
    target = soil(disk(32))
    restore(node, b"".join(parts), target).failed("damaged at byte", "does not belong there")
    assert is_disarmed(target, backup[1])


GARBAGE = {
    "text": b"export failed: no such file\n",
    "noise": bytes(range(1, 256)) * 4000,
    "short": b"x",
    "qcow2": b"QFI\xfb\0\0\0\3" + bytes(1000) + b"\1" * 99999,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_foreign(kind: str, node: Node, disk: MakeDisk) -> None:
    target = soil(disk(32))
    before = digest(target)
    restore(node, GARBAGE[kind], target).failed("byte 0", "no backup")
    assert digest(target) == before


def test_foreign_archive(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    run("tar", "--create", "--file", tmp_path / "etc.tar", "--directory", "/etc", "passwd")
    target = soil(disk(32))
    before = digest(target)
    restore(node, tmp_path / "etc.tar", target).failed("passwd", "no backup")
    assert digest(target) == before


# --- streams of other programs ---------------------------------------------------------------------------


def compressed(data: Path, *command: str) -> Path:
    return guestdisks.compress(data, data.with_suffix(".compressed"), *command)


@pytest.mark.parametrize("command", [["cat"], ["zstd", "-q", "-c"], ["gzip", "-1", "-c"]], ids=lambda one: one[0])
def test_bare_disk(command: list[str], node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)
    target = soil(disk(110))
    restore(node, compressed(guest.path, *command), target, index=1).ok()
    assert same(guest.path, target)
    short = tmp_path / "short"
    short.write_bytes(compressed(guest.path, *command).read_bytes()[:-400_000])
    restore(node, short, target, index=1).failed("truncated")
    assert is_disarmed(target, [(part.start, part.size) for part in partitions(guest.path)])
    small = soil(disk(90))
    before = digest(small)
    restore(node, compressed(guest.path, *command), small, index=1).failed("smaller")
    assert digest(small) == before


@pytest.mark.parametrize("command", [["zstd", "-q", "-c", "--check"], ["gzip", "-1", "-c"]], ids=lambda one: one[0])
def test_checksum_of_the_compression(command: list[str], node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The checksum comes last: everything is already written, and must not remain."""
    source = disk(32)
    make(source, 0, "ext4")
    stream = compressed(source, *command)
    data = bytearray(stream.read_bytes())
    data[-4 if command[0] == "zstd" else -8] ^= 1
    stream.write_bytes(data)
    target = disk(32)
    restore(node, stream, target, index=1).failed("damaged or truncated")
    assert is_disarmed(target, [])


def test_compressed_backup(
    node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]], tmp_path: Path
) -> None:
    stream, one, other = tmp_path / "backup", disk(32), disk(32)
    stream.write_bytes(backup[0])
    restore(node, stream, one, index=1).ok()
    restore(node, compressed(stream, "gzip", "-1", "-c"), other, index=1).ok()
    assert same(one, other)


def test_compressed_again_and_again(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """A stream of few bytes could start a process for each of hundreds of layers."""
    stream, target = tmp_path / "backup", disk(32)
    stream.write_bytes(gzip.compress(gzip.compress(os.urandom(4096))))
    before = digest(target)
    restore(node, stream, target, index=1).failed("compressed with gzip twice")
    assert digest(target) == before


@pytest.mark.parametrize("count", [512, 1000, 10240, MIB - 1])
def test_backup_of_nothing(count: int, node: Node, disk: MakeDisk) -> None:
    """tar writes this for no files; it must not become a disk of zeroes."""
    target = disk(32)
    target.write_bytes(b"a system" + bytes(32 * MIB - 8))
    restore(node, bytes(count), target, index=1).failed("holds nothing", f"{count} bytes")
    assert target.read_bytes()[:8] == b"a system"


@pytest.mark.parametrize("version", ["10", "15"])
def test_older_interfaces(version: str, node: Node, disk: MakeDisk) -> None:
    """API 10 has no variants."""
    source, target = disk(8), disk(8)
    source.write_bytes(os.urandom(8 * MIB))
    more = {"OS_API_VERSION": version, "OS_VARIANT": None if version == "10" else "default"}
    restore(node, exported(node, source, **more), target, **more).ok()
    assert same(source, target)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "swap", "vfat"])
def test_bare_filesystem(kind: str, node: Node, tmp_path: Path) -> None:
    source = blank(tmp_path / "source", 340)
    make(source, 0, kind)
    target = blank(tmp_path / "target", 350)
    restore(node, source, target, index=1).ok()
    assert same(source, target)


def test_bare_disk_that_turns_out_larger(node: Node, disk: MakeDisk) -> None:
    source = disk(40)
    run("sfdisk", "--quiet", source, text="label: dos\n,20M\n")
    with source.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    target = disk(39)
    restore(node, source, target, index=1).failed("larger")
    assert is_disarmed(target, [])


@pytest.fixture
def ancestor(small_tree: Path, tmp_path: Path) -> Path:
    """Make a directory as ganeti-instance-image staged it: with dumps of both filesystems."""
    guest = guestdisks.ancestor(tmp_path / "ancestor.img", small_tree, tmp_path)
    stage = tmp_path / "stage"
    stage.mkdir()
    for name, number in (("boot", 1), ("root", 3)):
        part = place(guest.path, number)
        assert part
        with attached(guest.path, part.start, part.size, read_only=True) as device:
            run("dump", "-0", "-q", "-z9", "-f", stage / f"{name}.dump", device)
    return stage


def archive(stage: Path, *names: str) -> Path:
    """Return the output of `tar -cf - .` with the members in this order."""
    path = stage.with_suffix(".tar")
    run(
        "tar", "--create", "--file", path, "--directory", stage, "--no-recursion", ".", *(f"./{name}" for name in names)
    )
    return path


@pytest.mark.parametrize("order", [["boot.dump", "root.dump"], ["root.dump", "boot.dump"]])
@pytest.mark.parametrize("kernel_path", [None, "/boot/vmlinuz"])
def test_dumps(
    order: list[str], kernel_path: str | None, node: Node, disk: MakeDisk, ancestor: Path, tmp_path: Path
) -> None:
    target = soil(disk(160))
    restore(node, archive(ancestor, *order), target, INSTANCE_HV_kernel_path=kernel_path).ok()
    parts = partitions(target)
    assert [part.content["TYPE"] for part in parts] == (["swap", "ext4"] if kernel_path else ["ext4", "swap", "ext4"])
    with mounted(target, tmp_path / "mnt", parts[-1]) as top:
        assert (top / "usr/share/doc/copyright").read_text() == "free\n"
        assert f"UUID={parts[-1].content['UUID']}" in (top / "etc/fstab").read_text()
        assert "/dev/sda" not in (top / "etc/fstab").read_text()
        assert not (top / "restoresymtable").exists()
        boot = sorted(entry.name for entry in (top / "boot").iterdir())
    if not kernel_path:
        with mounted(target, tmp_path / "mnt", parts[0]) as top:
            boot = sorted(entry.name for entry in top.iterdir())
    assert "vmlinuz-1" in boot and "restoresymtable" not in boot


def test_root_dump_alone(node: Node, disk: MakeDisk, ancestor: Path, tmp_path: Path) -> None:
    target = disk(160)
    restore(node, archive(ancestor, "root.dump"), target).ok()
    with mounted(target, tmp_path / "mnt", partitions(target)[-1]) as top:
        assert (top / "usr/share/doc/copyright").read_text() == "free\n"


def test_dumps_that_are_not_whole(node: Node, disk: MakeDisk, ancestor: Path) -> None:
    whole = archive(ancestor, "boot.dump", "root.dump").read_bytes()
    target = disk(160)
    restore(node, archive(ancestor, "boot.dump"), target).failed("no root.dump")
    assert is_disarmed(target, [])
    for end in (600, 2000, len(whole) // 2, len(whole) - 15000):
        restore(node, whole[:end], target).failed("truncated")
        assert is_disarmed(target, [])


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_disk_img(image_format: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)
    stage = tmp_path / "stage"
    stage.mkdir()
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, guest.path, stage / "disk.img")
    whole = archive(stage, "disk.img")
    target = soil(disk(110))
    restore(node, whole, target, index=1).ok()
    assert same(guest.path, target)
    small = soil(disk(100))
    before = digest(small)
    restore(node, whole, small, index=1).failed(str(100 * MIB))
    assert digest(small) == before
    for end in (-10240, -200_000):
        restore(node, whole.read_bytes()[:end], target, index=1).failed("truncated")
        assert is_disarmed(target, []) or image_format == "qcow2"  # qcow2 is written only after all data has arrived


def test_disk_img_with_a_backing_file(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """It would make qemu-img copy files of the node into the guest."""
    stage = tmp_path / "stage"
    stage.mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", stage / "disk.img", "8M")
    target = soil(disk(32))
    before = digest(target)
    restore(node, archive(stage, "disk.img"), target).failed("backing file")
    assert digest(target) == before


# --- failures on the way ---------------------------------------------------------------------------------


@pytest.fixture
def large(disk: MakeDisk) -> Path:
    """Return a disk with more data than any pipe holds."""
    path = disk(1)
    path.write_bytes(os.urandom(24 * MIB))
    return path


def test_nobody_reads(node: Node, large: Path) -> None:
    reader, writer = os.pipe()
    call = start_export(node, large, writer)
    os.close(writer)
    os.read(reader, 100_000)
    os.close(reader)
    call.result().failed("Broken pipe")
    call.announced()


# what is piped into import -> what the message calls it, and a word of the hint
FOREIGN: dict[str, tuple[list[str], str, str]] = {
    "lzop": (["printf", r"\211LZO\0\r\n\032\n"], "compressed by lzop", "lzop -dc"),
    "zip": (["printf", r"PK\3\4"], "a zip archive", "unzip"),
    "dump": (["dump", "-0", "-q", "-f", "-", "{device}"], "a dump of one filesystem", "it is an image"),
    "qcow2": (["cat", "{qcow2}"], "a disk image (qcow2)", "qemu-img convert -O raw"),
    "qcow2, packed": (["gzip", "-c", "{qcow2}"], "a disk image (qcow2)", "qemu-img convert -O raw"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_backup(what: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """It is named, with what to do, before anything is written."""
    command, name, word = FOREIGN[what]
    source, qcow2 = blank(tmp_path / "source", 32), tmp_path / "qcow2"
    make(source, 0, "ext4")
    run("qemu-img", "convert", "-O", "qcow2", source, qcow2)
    with attached(source) as device:
        argv = [word.format(device=device, qcow2=qcow2) for word in command]
        stream = subprocess.run(argv, capture_output=True, check=True).stdout
    target = disk()
    before = digest(target)
    result = restore(node, stream, target).failed("is no backup and no disk: it is", name)
    assert word in result.lines[-2], result.log
    assert digest(target) == before


@pytest.mark.parametrize("command", ["export", "import"])
def test_disk_of_no_bytes(command: str, node: Node, disk: MakeDisk) -> None:
    empty = disk(0)
    done = backups.export(node, empty).result if command == "export" else restore(node, b"x" * 512, empty)
    done.failed(f"disk {empty} has 0 bytes: that is no disk")


def test_disk_that_cannot_be_read_on(node: Node, large: Path) -> None:
    reader, writer = os.pipe()
    call = start_export(node, large, writer)
    os.close(writer)
    os.read(reader, 1000)
    os.truncate(large, 12 * MIB)
    with open(reader, "rb") as stream:
        stream.read()
    call.result().failed(str(large), "byte")
    call.announced()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_export_is_killed(number: signal.Signals, group: bool, node: Node, large: Path) -> None:
    """Both pipes are closed at once, as Ganeti waits only for that."""
    reader, writer = os.pipe()
    call = start_export(node, large, writer)
    os.close(writer)
    os.read(reader, 1000)
    (os.killpg if group else os.kill)(call.process.pid, number)
    result = call.result()  # the full pipe blocks it until the signal arrives
    with open(reader, "rb") as stream:
        stream.read()
    call.announced()
    assert result.status == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_import_is_killed(
    number: signal.Signals, node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]]
) -> None:
    """The partly written disk is not recognised as one."""
    target = soil(disk(32))
    reader, writer = os.pipe()
    call = backups.Running(node, "import", backups.environment(node, "import", target), reader, None)
    os.close(reader)
    with open(writer, "wb") as stream:
        stream.write(backup[0][: len(backup[0]) // 2])
        stream.flush()
        os.kill(call.process.pid, number)
        call.announced()
        assert call.result().status == 128 + number
    assert not signatures(target)
    assert number == signal.SIGKILL or is_disarmed(target, backup[1])


def test_disk_in_use(node: Node, disk: MakeDisk, block_disk: MakeDisk) -> None:
    source, target = disk(32), disk(32)
    stream = exported(node, source)
    with locked(source):
        done = backups.export(node, source)
        done.result.failed("in use", str(source))
        assert not done.size and not done.announced
    with locked(target):
        restore(node, stream, target).failed("in use", str(target))
    with source.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # like another export
        exported(node, source)
        node.create(source).failed("in use")
        restore(node, stream, source).failed("in use")


def test_stray_prints(node: Node, large: Path) -> None:
    """Output of a settings file goes to the log."""
    node.defaults("echo stray print")
    done = backups.export(node, large)
    assert "stray print" not in done.stream.read_bytes().decode("latin-1")
    assert done.announced == f"{done.size}\n" and done.result.status == 0


def test_broken_settings_do_not_stop_a_backup(node: Node, large: Path) -> None:
    node.defaults("FILESYSTEM=ext5")
    done = backups.export(node, large)
    assert "ext5" in done.result.ok().log
    node.defaults("if")
    backups.export(node, large).result.ok()


@pytest.mark.parametrize("command", ["export", "import"])
def test_called_by_hand(command: str, node: Node) -> None:
    node.call(command, {"PATH": "/usr/bin:/bin"}).failed("OS_API_VERSION")
    values = recorded(f"{command}-disk0")
    name = f"{command.upper()}_DEVICE"
    node.call(command, {**values, name: "", "EXP_SIZE_FD": ""}).failed(name)
    node.call(command, {**values, name: "", f"{command.upper()}_DISK_URI": "rbd:x", "EXP_SIZE_FD": ""}).failed("URI")
    node.call(command, {**values, name: "/nonexistent", "EXP_SIZE_FD": ""}).failed("/nonexistent")


# --- hooks -----------------------------------------------------------------------------------------------

HOOK = '#!/bin/sh\necho "$IMAGEOS_ACTION $IMPORT_SCRIPT $# $(cat $TARGET/etc/os-release | head -1) $ROOT_DEV" >&2\n'


def test_hooks(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Hooks in IMPORT_HOOKS run for the first disk, if that contains a system."""
    guest = guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)
    stream = exported(node, guest.path)
    for name in ("chosen", "other"):
        node.hook(name, HOOK)
    node.defaults("IMPORT_HOOKS=chosen")
    target = disk(101)
    log = restore(node, stream, target).ok().log
    assert "chosen: import 1 0 ID=tiny /dev/loop" in log and "other" not in log
    assert "chosen" not in restore(node, stream, target, index=1).ok().log
    assert "chosen" not in restore(node, stream, target, OSP_NOMOUNT="yes").ok().log
    node.hook("chosen", "#!/bin/sh\nexit 3\n")
    restore(node, stream, target).failed("chosen", "status 3")
    with mounted(target, tmp_path / "mnt", partitions(target)[0], "ro,noload") as top:
        assert (top / "etc/os-release").exists(), "the disk was whole, and should have stayed so"
    empty = exported(node, disk(16))
    assert "no root filesystem" in restore(node, empty, disk(16)).ok().log


# --- without imageos, by the steps in README.rst ---------------------------------------------------------


def test_tar_lists_it(node: Node, backup: tuple[bytes, list[tuple[int, int]]], tmp_path: Path) -> None:
    stream = tmp_path / "backup"
    stream.write_bytes(backup[0])
    names = run("tar", "--list", "--file", stream).split()
    assert names[0] == "manifest.json" and names[-1] == "end.json"
    manifest = json.loads(run("tar", "-xOf", stream, "manifest.json"))
    assert manifest["disk_size"] == 32 * MIB and manifest["table"] == "gpt"
    assert manifest["runs"] == len(names) - 2


def test_restored_by_hand(
    node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]], tmp_path: Path
) -> None:
    stream, target, expected = tmp_path / "backup", disk(32), disk(32)
    stream.write_bytes(backup[0])
    restore(node, stream, expected, index=1).ok()
    script = readme.block("tar -xOf BACKUP").replace("BACKUP", str(stream)).replace("/dev/vg/new", str(target))
    assert '"disk_size": 33554432' in run("sh", "-euc", script)
    assert same(expected, target)


def test_checked_by_hand(node: Node, backup: tuple[bytes, list[tuple[int, int]]], tmp_path: Path) -> None:
    stream = tmp_path / "backup"
    stream.write_bytes(backup[0])
    unpack, check = readme.block("mkdir unpacked").replace("BACKUP", str(stream)).split("\n", 1)
    run("sh", "-euc", f"cd {tmp_path}\n{unpack}")
    counted = run("sh", "-euc", f"cd {tmp_path}/unpacked\n{check}").split()[0]
    assert counted == json.loads((tmp_path / "unpacked/end.json").read_text())["sha256"]
    (tmp_path / "unpacked/disk/0").write_bytes(b"changed")
    changed = run("sh", "-c", f"cd {tmp_path}/unpacked\n{check}", check=False)
    assert "disk/0: FAILED" in changed and counted not in changed


def test_create_waits_for_nobody(node: Node, disk: MakeDisk) -> None:
    """A stopped export leaves the disk free."""
    source = disk(160)
    source.write_bytes(os.urandom(8 * MIB))
    os.truncate(source, 160 * MIB)
    reader, writer = os.pipe()
    call = start_export(node, source, writer)
    os.close(writer)
    os.read(reader, 1000)
    node.create(source).failed("in use")
    os.kill(call.process.pid, signal.SIGKILL)
    call.result()
    os.close(reader)
    call.announced()
    wait_until(lambda: not session(call.process.pid), "the disk is free")
    node.create(source).ok()
