"""Backups: export and import every kind of disk, and refuse every kind of stream that must not become a disk."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import backups
import guestdisks
import pytest
from backups import MARKER, exported, free_ranges, read_only, restore, same, start_export, use, without
from guestdisks import make, place
from streams import MakeDisk, soil
from support import MIB, Node, attached, digest, locked, mounted, partitions, probe, recorded, run, signatures

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
