"""create from images at a URL, as an operator sees it."""

from __future__ import annotations

import gzip
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from downloads import CONTENT, OTHER
from downloads import settings as settings
from http_server import Server
from support import DEFAULTS, Node, digest, partitions, run

from imageos.images import imagetypes as images_module
from imageos.settings import Settings

MakeDisk = Callable[..., Path]


# --- create -----------------------------------------------------------------------------------------------


@pytest.fixture
def repository(server: Server, images: Path) -> Server:
    """The small image as tiny-ARCH.tar.zst, with its checksum."""
    server.put(f"/images/tiny-{trees.ARCH}.tar.zst", (images / "small.tar.zst").read_bytes())
    server.sums("/images/SHA256SUMS", f"tiny-{trees.ARCH}.tar.zst")
    return server


@pytest.fixture
def empty_node(node: Node) -> Node:
    """Its CACHE_DIR, which is IMAGE_DIR too, has no image."""
    for path in node.images.iterdir():
        path.unlink()
    node.defaults(f"CACHE_DIR={node.images}")
    return node


def test_create_from_os_parameter(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    target = disk()
    result = empty_node.create(target, OSP_IMAGE_URL=repository.url + "/images/").ok()
    assert f"verified: sha256 of {repository.url}/images/SHA256SUMS" in result.log
    assert partitions(target)[-1].content["TYPE"] == "ext4"
    url = f"{repository.url}/images/tiny-{trees.ARCH}.tar.zst"
    empty_node.create(disk(), OSP_IMAGE_URL=repository.url + "/images").ok()
    empty_node.create(disk(), OSP_IMAGE_URL=url, OSP_IMAGE_NAME=None).ok()
    assert repository.count(f"/images/tiny-{trees.ARCH}.tar.zst") == 1


def test_create_from_defaults_file(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    """Proxy and all: Ganeti gives create no environment."""
    path = f"http://images.example.org/images/tiny-{trees.ARCH}.tar.zst"
    repository.files[path] = repository.files[f"/images/tiny-{trees.ARCH}.tar.zst"]
    with DEFAULTS.open("a") as file:
        file.write(f"http_proxy={repository.url}\nIMAGE_URL=http://images.example.org/images\nIMAGE_CLEANUP=yes\n")
    result = empty_node.create(disk()).ok()
    assert "warning: image http://images.example.org/images/tiny" in result.log
    assert repository.count(path) == 1
    assert os.listdir(empty_node.images) == []


def test_create_that_finds_nothing(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    target = disk()
    before = digest(target)
    url = repository.url.replace("//", "//user:secret@")
    result = empty_node.create(target, OSP_IMAGE_URL=url, OSP_IMAGE_NAME="none").failed(
        f"cannot find image {repository.url}/none-{trees.ARCH}.tar.gz: 404"
    )
    assert "secret" not in result.log
    empty_node.create(target, OSP_IMAGE_URL=url + "/images", OSP_IMAGE_CHECKSUM="sha256:" + "0" * 64).failed(
        "expected 0000", f"{repository.url}/images/tiny-{trees.ARCH}.tar.zst"
    )
    empty_node.create(target, OSP_IMAGE_URL=url, OSP_IMAGE_NAME=None).failed("IMAGE_NAME is not set")
    empty_node.create(target, OSP_IMAGE_URL="http://[bad").failed("not a URL")
    assert digest(target) == before
    assert os.listdir(empty_node.images) == []


def test_create_disk_image(server: Server, empty_node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """qemu-img reads it although its name is gone already."""
    raw = tmp_path / "raw"
    raw.write_bytes(CONTENT * 3)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "qcow2")
    url = server.put("/windows.qcow2", (tmp_path / "qcow2").read_bytes())
    with DEFAULTS.open("a") as file:
        file.write("IMAGE_CLEANUP=yes\n")
    target = disk()
    empty_node.create(target, OSP_IMAGE_URL=url, OSP_IMAGE_TYPE="qcow2", OSP_IMAGE_NAME=None, OSP_NOMOUNT="yes").ok()
    with target.open("rb") as file:
        assert file.read(len(CONTENT) * 3) == CONTENT * 3
    assert os.listdir(empty_node.images) == []


@pytest.mark.parametrize("is_directory", [True, False], ids=["directory", "one file"])
def test_dump(is_directory: bool, server: Server, settings: Settings) -> None:
    """Two files; the second may be missing, and is not wanted without a /boot."""
    root, boot = (gzip.compress(content) for content in (CONTENT, OTHER))
    server.put("/d/x-x86_64-root.dump.gz", root)
    server.put("/d/x-x86_64-boot.dump.gz", boot)
    url = server.url + ("/d" if is_directory else "/d/x-x86_64-root.dump.gz")
    settings = settings._replace(
        image_url=url, image_type="dump", image_name="x" if is_directory else "", arch="x86_64"
    )
    image = images_module.find(settings)
    assert image.boot and os.pread(image.boot.descriptor, len(boot) + 1, 0) == boot
    assert os.pread(image.descriptor, len(root) + 1, 0) == root
    assert images_module.find(settings, with_boot=False).boot is None
    del server.files["/d/x-x86_64-boot.dump.gz"]
    assert images_module.find(settings).boot is None


def test_dump_that_does_not_say_of_what(server: Server, settings: Settings) -> None:
    """It is that of the root, and must not go onto /boot, too."""
    url = server.put("/d/debian.dump.gz", gzip.compress(CONTENT))
    assert images_module.find(settings._replace(image_url=url, image_type="dump")).boot is None


def test_create_eight_at_once(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    path = f"/images/tiny-{trees.ARCH}.tar.zst"
    repository.files[path].rate = len(repository.files[path].content) // 3
    url = repository.url + "/images"
    calls = [empty_node.start("create", empty_node.environment(disk(), OSP_IMAGE_URL=url)) for _ in range(8)]
    for call in calls:
        call.result().ok()
    assert repository.count(path) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_create_is_ended_while_downloading(
    number: signal.Signals, repository: Server, empty_node: Node, disk: MakeDisk
) -> None:
    path = f"/images/tiny-{trees.ARCH}.tar.zst"
    repository.files[path].rate = len(repository.files[path].content) // 20
    target = disk()
    before = digest(target)
    environment = empty_node.environment(target, OSP_IMAGE_URL=repository.url + "/images")
    call = empty_node.start("create", environment)
    call.wait_for(lambda: any(part.stat().st_size for part in empty_node.images.glob("*.part")), "a part is there")
    call.kill(number)
    assert call.result().status == 128 + number
    assert digest(target) == before
    repository.files[path].rate = 0
    assert "going on with a download" in empty_node.call("create", environment).ok().log
    assert sorted(name[17:] for name in os.listdir(empty_node.images)) == [
        f"tiny-{trees.ARCH}.tar.zst",
        f"tiny-{trees.ARCH}.tar.zst.json",
    ]


def test_local_image_costs_nothing(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """No module for the network is loaded."""
    trace = tmp_path / "trace"
    environment = node.environment(disk())
    run(
        "strace",
        "-f",
        "-e",
        "trace=openat",
        "-o",
        trace,
        "env",
        "-i",
        *(f"{name}={value}" for name, value in environment.items()),
        str(node.os_dir / "create"),
    )
    opened = trace.read_text()
    assert "/images/" in opened and "libssl" not in opened and "_ssl" not in opened
