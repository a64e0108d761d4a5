"""import of streams that are cut off, changed or none; and what is in them, by hand."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import readme
from backups import is_disarmed, restore, same
from streams import MakeDisk, soil
from streams import backup as backup
from support import MIB, Node, digest, run


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
