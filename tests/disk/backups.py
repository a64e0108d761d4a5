"""Call export and import as Ganeti does: with a pipe for the stream, and another for the size."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support import MIB, Call, Name, Node, Result, Stream, run

MARKER = b"deleted, but still on the disk\n"


@dataclass(frozen=True)
class Export:
    result: Result
    stream: Path
    announced: str  # text from EXP_SIZE_FD

    @property
    def size(self) -> int:
        return self.stream.stat().st_size


class Running(Call):
    """A call whose stream the test controls, with a pipe for the announced size."""

    def __init__(self, node: Node, command: str, environment: dict[str, str], stdin: Stream, stdout: Stream) -> None:
        node.calls += 1
        log = node.work / f"{command}-{node.calls}.log"
        self.size_reader, writer = os.pipe()
        environment = {**environment, "EXP_SIZE_FD": str(writer)}
        super().__init__(node.os_dir / command, environment, log, (), stdin, stdout, pass_fds=[writer])
        os.close(writer)

    def announced(self) -> str:
        """Return the announced size. Read to the end, as Ganeti does: it waits until no process has the pipe open."""
        with open(self.size_reader, "rb") as reader:
            return reader.read().decode()


def environment(node: Node, action: str, disk: Name, index: int = 0, **more: object) -> dict[str, str]:
    values = node.environment(disk, env=f"{action}-disk{index}", **more)
    values.update({f"{action.upper()}_DEVICE": os.fspath(disk), f"{action.upper()}_DISK_PATH": os.fspath(disk)})
    return values


def start_export(node: Node, disk: Name, stdout: Stream, index: int = 0, **more: object) -> Running:
    return Running(node, "export", environment(node, "export", disk, index, **more), subprocess.DEVNULL, stdout)


def export(node: Node, disk: Name, index: int = 0, **more: object) -> Export:
    stream = node.work / f"stream{node.calls}"
    with stream.open("wb") as file:
        call = start_export(node, disk, file, index, **more)
        result = call.result()
    return Export(result, stream, call.announced())


def exported(node: Node, disk: Name, index: int = 0, **more: object) -> Path:
    """Return the stream of a successful export. Fail unless it has the announced size."""
    done = export(node, disk, index, **more)
    done.result.ok()
    assert done.announced == f"{done.size}\n"
    return done.stream


def restore(node: Node, source: Path | bytes, disk: Name, index: int = 0, **more: object) -> Result:
    """Call import with a pipe as stdin, to which another process writes."""
    values = environment(node, "import", disk, index, **more)
    writer = subprocess.Popen(
        ["cat"] if isinstance(source, bytes) else ["cat", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    call = Running(node, "import", values, writer.stdout, None)
    assert writer.stdin and writer.stdout
    writer.stdout.close()
    with contextlib.suppress(BrokenPipeError), writer.stdin:
        writer.stdin.write(source if isinstance(source, bytes) else b"")
    result = call.result()
    writer.wait()
    os.close(call.size_reader)
    return result


@contextmanager
def read_only(disk: Path) -> Iterator[Path]:
    """Attach a read-only block device, like a snapshot."""
    device = run("losetup", "--find", "--show", "--read-only", disk).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


def use(top: Path, mib: int = 24) -> None:
    """Write files to a filesystem, and leave deleted data in its free blocks."""
    block = MARKER * (MIB // len(MARKER))
    for number in range(mib):
        (top / f"deleted{number}").write_bytes(block)
    for number in range(40):
        (top / f"small{number}").write_bytes(os.urandom(700 * number + 1))
    (top / "large").write_bytes(os.urandom(3 * MIB + 5))
    with (top / "sparse").open("wb") as file:
        file.seek(100 * MIB)
        file.write(b"an island")
    (top / "zeroes").write_bytes(bytes(5 * MIB))
    run("sync", "--file-system", top)
    for number in range(mib):
        (top / f"deleted{number}").unlink()
    for number in range(0, 40, 3):
        (top / f"small{number}").unlink()


def free_ranges(filesystem: Path, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the free ranges (start, end) of an ext filesystem, in bytes of the disk, from dumpe2fs(8)."""
    part = filesystem.with_name("part")
    with filesystem.open("rb") as disk, part.open("wb") as copy:
        disk.seek(offset)
        for _ in range(0, size, MIB):
            data = disk.read(MIB)
            copy.write(data) if any(data) else copy.seek(len(data), os.SEEK_CUR)
        copy.truncate(size)
    text = run("dumpe2fs", part)
    part.unlink()
    match = re.search(r"^Block size: +(\d+)", text, re.MULTILINE)
    assert match
    block = int(match[1])
    for line in re.findall(r"^  Free blocks: (\d.*)$", text, re.MULTILINE):
        for word in line.split(", "):
            first, _, last = word.partition("-")
            yield offset + int(first) * block, offset + (int(last or first) + 1) * block


def without(disk: Path, ranges: Iterator[tuple[int, int]], copy: Path) -> Path:
    """Return a copy of a disk with `ranges` set to zero."""
    run("cp", "--sparse=always", disk, copy)
    with copy.open("r+b") as file:
        for start, end in ranges:
            file.seek(start)
            file.write(bytes(end - start))
    return copy


def same(one: Path, other: Path) -> bool:
    """Return True if two disks are equal up to the end of the first, and the rest of the other is zero."""
    with one.open("rb") as left, other.open("rb") as right:
        while True:
            data = left.read(MIB)
            if right.read(len(data)) != data:
                return False
            if not data:
                break
        while True:
            data = right.read(MIB)
            if not data:
                return True
            if any(data):
                return False


def is_disarmed(disk: Path, places: list[tuple[int, int]]) -> bool:
    """Return True if both ends of a disk and of these partitions (start, size) are zero."""
    with disk.open("rb") as file:
        for start, size in [(0, file.seek(0, os.SEEK_END)), *places]:
            for offset in (start, start + max(0, size - MIB)):
                file.seek(offset)
                if any(file.read(min(MIB, size))):
                    return False
    return True
