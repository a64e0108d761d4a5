"""The fixtures of the disk tier, and a guest whose programs are hostile."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS / "disk"))

from tests.disk.conftest import block_disk, disk, images, node, odd_tree, small_tree  # noqa: E402

__all__ = ["block_disk", "disk", "images", "node", "odd_tree", "small_tree"]
