"""A new cluster and a new smallest image for each test."""

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
    """Return a tiny image with 1 MiB of random data, which does not compress."""
    return tiny_image(tmp_path, {"etc/noise": os.urandom(1 << 20)})
