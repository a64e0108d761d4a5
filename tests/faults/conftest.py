"""The fixtures of the disk tier, and the sources of the cases."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS / "disk"))

import cases  # noqa: E402
import standins  # noqa: E402
from support import Node  # noqa: E402

from tests.disk.conftest import block_disk, disk, images, node, odd_tree, small_tree  # noqa: E402

__all__ = ["block_disk", "disk", "images", "node", "odd_tree", "small_tree"]


@pytest.fixture(scope="session")
def all_sources(images: Path, small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_sources(tmp_path_factory.mktemp("sources"), images / "small.tar.gz", small_tree)


@pytest.fixture
def sources(node: Node, all_sources: Path) -> Path:
    """Return the directory with the sources of the cases, which is the node's IMAGE_DIR."""
    import backups

    node.images = all_sources
    node.defaults()
    if not (all_sources / "stream").exists():
        backups.exported(node, all_sources / "guest.raw").rename(all_sources / "stream")
    return all_sources


@pytest.fixture
def ganeti(node: Node, tmp_path: Path) -> Iterator[None]:
    """Replace Ganeti's commands and ssh by stand-ins for calls in directories of `tmp_path`."""
    with standins.ganeti(tmp_path / "ganeti"):
        yield
