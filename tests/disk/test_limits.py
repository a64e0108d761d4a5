"""Limits that a command is started with: kept, and named in the last line where they end it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from support import MIB, PATH, Call, Node, Result, run

MakeDisk = Callable[..., Path]
# ulimit -> words of the last line; none: it is enough
LIMITS = {
    "-v 20000": ("needs more memory than its limit of", "ulimit -v"),
    "-v 400000": (),
    "-f 1": ("the limit on the size of a file (ulimit -f) is ",),
    "-f 4000": ("cannot be unpacked", "SIGXFSZ", "the limit on the size of a file (ulimit -f) is "),
    "-n 9": ("the limit on open files (ulimit -n) is 9",),
    "-n 15": ("the limit on open files (ulimit -n) is 15",),
    "-n 20": ("the limit on open files (ulimit -n) is 20",),
    "-c 0": (),
    "-l 0": (),
    "-u 1": (),
}
WITHOUT_RAISING = "setpriv --bounding-set=-sys_resource --inh-caps=-sys_resource"


@pytest.fixture
def image(node: Node, small_tree: Path, tmp_path: Path) -> Path:
    """Make an image with a file of 8 MiB."""
    tree = tmp_path / "tree"
    run("cp", "--archive", small_tree, tree)
    (tree / "etc/large").write_bytes(os.urandom(8 * MIB))
    return trees.tarball(tree, node.images / f"large-{trees.ARCH}.tar.gz")


def limited(node: Node, limit: str, before: str, disk: Path, command: str = "create") -> Result:
    script = f'ulimit {limit} && exec {before} "$0"'
    environment = node.environment(disk, OSP_IMAGE_NAME="large")
    log = node.work / "limited.log"
    return Call(Path("/bin/bash"), environment, log, ["-c", script, str(node.os_dir / command)]).result()


@pytest.mark.parametrize("before", ["", WITHOUT_RAISING])
@pytest.mark.parametrize("limit", LIMITS)
def test_create(limit: str, before: str, node: Node, image: Path, disk: MakeDisk) -> None:
    result = limited(node, limit, before, disk())
    if LIMITS[limit]:
        result.failed(*LIMITS[limit])
        assert "is damaged" not in result.log and "internal error" not in result.log, result.log
    else:
        result.ok()


def test_processor_time(node: Node, image: Path, disk: MakeDisk, tmp_path: Path) -> None:
    """A program that never ends, under a limit of a second; the hard limit is the soft one, so that it is SIGKILL."""
    fake = tmp_path / "fake/tar"
    Node.write(fake, "#!/bin/sh\nwhile :; do :; done\n")
    fake.chmod(0o755)
    environment = node.environment(disk(), OSP_IMAGE_NAME="large", PATH=f"{fake.parent}:{PATH}")
    for limit, number in (("-t 1", "SIGKILL"), ("-S -t 1", "SIGXCPU")):
        argv = ["-c", f'ulimit {limit} && exec "$0"', str(node.os_dir / "create")]
        result = Call(Path("/bin/bash"), environment, node.work / "limited.log", argv).result()
        result.failed(number, "the limit on processor time (ulimit -t) is 1 s")
        assert "is damaged" not in result.last
