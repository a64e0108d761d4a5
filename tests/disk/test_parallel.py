"""Several creates at once."""

from pathlib import Path
from typing import Callable

import pytest
from support import Node, attached, mounted, partitions, run, wait_until

MakeDisk = Callable[..., Path]


@pytest.mark.parametrize("kind", ["file", "block device"])
def test_two_on_one_disk(kind: str, node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    node.hook("waits", f"#!/bin/sh\n: > {gate}\nwhile [ -e {gate} ]; do sleep 0.05; done\n")
    target = disk() if kind == "file" else block_disk()
    first = node.start("create", node.environment(target))
    first.wait_for(gate.exists, "the first one's hook runs")
    node.create(target).failed(str(target), "in use")
    gate.unlink()
    first.result().ok()
    assert_whole(target, tmp_path)


@pytest.mark.parametrize("kind", ["file", "block device"])
def test_three_on_one_disk_at_the_same_moment(
    kind: str, node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path
) -> None:
    """One gets the disk, and keeps it until the others have given up."""
    gate = tmp_path / "gate"
    node.hook("waits", f"#!/bin/sh\nwhile [ -e {gate} ]; do sleep 0.05; done\n")
    target = disk() if kind == "file" else block_disk()
    for _ in range(3):
        gate.write_text("")
        calls = [node.start("create", node.environment(target)) for _ in range(3)]
        wait_until(lambda calls=calls: sum(call.process.poll() is not None for call in calls) >= 2, 30, "two ended")
        gate.unlink()
        results = [call.result() for call in calls]
        assert sorted(result.status for result in results) == [0, 1, 1], [result.log for result in results]
        for result in results:
            if result.status:
                result.failed(str(target), "in use")
        assert_whole(target, tmp_path)


def test_four_on_four_disks(node: Node, disk: MakeDisk, block_disk: MakeDisk, tmp_path: Path) -> None:
    node.hook("slow", "#!/bin/sh\nsleep 1\n")
    targets = [disk(), block_disk(), disk(), block_disk()]
    calls = [
        node.start("create", node.environment(target, INSTANCE_NAME=f"inst{number}.example.org"))
        for number, target in enumerate(targets, 1)
    ]
    for call in calls:
        call.result().ok()
    for number, target in enumerate(targets, 1):
        assert_whole(target, tmp_path)
        with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
            assert f"inst{number}" in (guest / "etc/hostname").read_text()


def assert_whole(target: Path, work: Path) -> None:
    boot, swap, root = partitions(target)
    for part in (boot, root):
        with attached(target, part.start, part.size, read_only=True) as device:
            run("e2fsck", "-f", "-n", device)
    with mounted(target, work / "root", root) as guest:
        assert (guest / "usr/share/doc/copyright").read_text() == "free\n"
