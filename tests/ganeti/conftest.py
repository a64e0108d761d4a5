"""A cluster and the smallest image, for each test anew."""

import os
from pathlib import Path

import pytest
from clusters import Cluster
from support import run


@pytest.fixture
def cluster(imageos: Path, tmp_path: Path) -> Cluster:
    return Cluster(imageos, tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """An image with as little in it as a system can have."""
    tree = tmp_path / "tree"
    for directory in ("bin", "boot", "etc"):
        (tree / directory).mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=tiny\n")
    (tree / "etc/hostname").write_text("image\n")
    (tree / "etc/noise").write_bytes(os.urandom(1 << 20))
    image = tmp_path / "tiny-x86_64.tar.gz"
    run("tar", "--create", "--gzip", "--numeric-owner", "--directory", tree, "--file", image, ".")
    return image
