"""variants try: good variants come up; each bad one is told apart from the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bootdisks import BootDisk, boot_disks
from debian import debian
from support import DEFAULTS, MIB, SITE, Node, Result, run

# name of a variant -> its settings
VARIANTS = {
    "tarball": "IMAGE_NAME=bookworm\nIMAGE_TYPE=tarball\nSWAP=no",
    "cloud": "IMAGE_NAME=cloud\nIMAGE_TYPE=raw",
    "no_loader": "IMAGE_NAME=empty\nIMAGE_TYPE=raw\nNOMOUNT=yes",
    "panic": "IMAGE_NAME=mbr\nIMAGE_TYPE=raw\nKERNEL_ARGS=rdinit=/missing",
    "hang": "IMAGE_NAME=mbr\nIMAGE_TYPE=raw\nKERNEL_ARGS=rdinit=/bin/cat",
    "silent": "IMAGE_NAME=mbr\nIMAGE_TYPE=raw\nNOMOUNT=yes",
}


@pytest.fixture(scope="session")
def disks() -> dict[str, BootDisk]:
    return boot_disks({"mbr": ("mbr", debian("bookworm")), "cloud": ("cloud", debian("bookworm", "cloud-init"))})


@pytest.fixture
def node(disks: dict[str, BootDisk], node: Node, tmp_path: Path) -> Iterator[Node]:
    """Return a node with these variants and their images, the hook grub on, and a /var/lib of its own."""
    shipped = (node.root / DEFAULTS.relative_to("/")).read_text()
    node.write(DEFAULTS, f"{shipped}\nIMAGE_DIR={node.images}\nCACHE_DIR={node.images}\n")
    (SITE / "hooks/grub").chmod(0o755)
    (node.images / "bookworm-x86_64.tar.zst").symlink_to(debian("bookworm").tarball)
    for name, disk in disks.items():
        (node.images / f"{name}-x86_64.raw").symlink_to(disk.path)
    empty = node.images / "empty-x86_64.raw"
    with empty.open("xb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", empty)
    for name, text in VARIANTS.items():
        node.variant(name, f"{text}\n")
    layer = tmp_path / "lib"
    layer.mkdir()
    run("mount", "--bind", layer, "/var/lib")
    yield node
    run("umount", "/var/lib")


def attempt(node: Node, name: str, *more: str) -> Result:
    return node.tool("variants", "try", name, *more)


@pytest.mark.parametrize("name", VARIANTS)
def test_one(node: Node, name: str) -> None:
    result = attempt(node, name, *(["--uefi"] if name == "cloud" else []), *(["--timeout", "60"] if name == "silent" else ["--timeout", "20"] if name == "hang" else []))
    print(result.log)
    print(result.seconds)
    print(list(Path("/var/lib").rglob("*.json"))[0].read_text())
