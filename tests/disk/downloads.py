"""An image at a server, as the tests of downloads want it, and keys that sign its checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from http_server import Server
from leftovers import descendants

from imageos.images import fetch, imagetypes
from imageos.settings import Settings

CONTENT = bytes(range(256)) * 4096  # 1 MiB
OTHER = CONTENT[::-1]
NAMES = ["tiny-x86_64.tar.gz", "tiny-x86_64.tar", "tiny-x86_64.tar.zst"]
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Gpg = Callable[..., bytes]


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """One image, at /a.tar; nothing else is there."""
    url = server.put("/a.tar", CONTENT)
    cache = str(tmp_path / "cache")
    return Settings(image_url=url, image_type="tarball", image_name="tiny", arch="x86_64", cache_dir=cache)


def get(settings: Settings, **others: object) -> bytes:
    """Return the content of the file that `fetched` gives."""
    settings = settings._replace(**others)
    _, descriptor = fetch.fetched(settings, imagetypes.urls(settings))
    with open(descriptor, "rb") as file:
        return file.read()


def cached(settings: Settings) -> list[str]:
    """The files in the cache, without the hashes that their names begin with."""
    directory = Path(settings.cache_dir)
    return sorted(path.name.partition("-")[2] for path in directory.iterdir()) if directory.exists() else []


def notes(settings: Settings) -> dict[str, object]:
    (path,) = Path(settings.cache_dir).glob("*.json")
    return dict(json.loads(path.read_text()))


def processes(name: str) -> list[Path]:
    """The directories in /proc of our descendants of that name."""
    found = [Path(f"/proc/{pid}") for pid in descendants(os.getpid())]
    return [path for path in found if path.exists() and (path / "comm").read_text() == f"{name}\n"]


@contextmanager
def gone(server: Server) -> Iterator[None]:
    """It answers nobody."""
    files, server.files = server.files, {}
    for path in files:
        server.put(path, b"", status=503)
    yield
    server.files = files
