"""A cluster and the smallest image, for each test anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from clusters import Cluster, tiny_image


@pytest.fixture
def cluster(imageos: Path, tmp_path: Path) -> Cluster:
    return Cluster(imageos, tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """An image that does not compress to nothing."""
    return tiny_image(tmp_path, {"etc/noise": os.urandom(1 << 20)})
