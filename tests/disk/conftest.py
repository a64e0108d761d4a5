"""Small images and disks for the tests that deploy."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trees
from certificates import make_certificate, trust
from debian import flavours
from http_server import Server, serving
from support import MIB, Node, run

from imageos.images import web

SIZE = 160  # MiB: enough for 8 of swap, 24 of /boot and the tree


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a systemd guest with a few files."""
    return trees.guest(tmp_path_factory.mktemp("trees") / "small", trees.SYSTEMD)


@pytest.fixture(scope="session")
def odd_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.odd(trees.guest(tmp_path_factory.mktemp("trees") / "odd", trees.SYSTEMD))


@pytest.fixture(scope="session")
def images(small_tree: Path, odd_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with small.tar[.COMPRESSION] and odd.tar[.COMPRESSION]."""
    directory = tmp_path_factory.mktemp("images")
    for name, tree in (("small", small_tree), ("odd", odd_tree)):
        plain = trees.tarball(tree, directory / f"{name}.tar", "tar")
        for compression, suffix in trees.SUFFIXES.items():
            if compression != "tar":
                trees.compress(plain, directory / f"{name}.{suffix}", compression)
    return directory


@pytest.fixture(scope="session")
def debians(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Return a function that gives the tree of a Debian flavour, without a kernel."""
    top = tmp_path_factory.mktemp("debians")

    def unpacked(flavour: str) -> Path:
        tree = top / flavour
        if not tree.is_dir():
            tree.mkdir()
            image = flavours("bookworm", [flavour])[flavour].tarball
            run("tar", "-xf", image, "-C", tree, "--exclude=./boot/*", "--exclude=./usr/lib/modules/*")
        return tree

    yield unpacked
    shutil.rmtree(top)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Yield a server of images. What fails is asked for again at once."""
    monkeypatch.setattr(web, "PAUSES", (0.01, 0.01, 0.01))
    with serving() as server:
        yield server


@pytest.fixture
def certificate(etc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Key and certificate of a server; its CA is in this machine's store until the test ends."""
    ca = make_certificate(tmp_path, "ca", "ca")
    trust(ca)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return make_certificate(tmp_path, "server", "server", ca)


@pytest.fixture(scope="session")
def gpg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., bytes]]:
    """Sign as alice or mallory: gpg("alice", content, "--detach-sign"); gpg("alice") is her keyring."""
    home = tmp_path_factory.mktemp("gpg")
    home.chmod(0o700)
    command = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]

    def call(*arguments: str, input: bytes = b"") -> bytes:
        return subprocess.run([*command, *arguments], input=input, check=True, capture_output=True).stdout

    for name in ("alice", "mallory"):
        call("--quick-gen-key", f"{name} <{name}@example.org>", "ed25519", "sign", "never")

    def sign(name: str, content: bytes = b"", *how: str) -> bytes:
        what = [*how, "--local-user", name, "--output", "-"] if how else ["--export", name]
        return call(*what, input=content)

    yield sign
    run("gpgconf", "--homedir", home, "--kill", "all")


@pytest.fixture
def node(node: Node, images: Path) -> Node:
    """Return a node that has the small image under the name that every call uses."""
    node.image(images / "small.tar.gz", f"tiny-{trees.ARCH}.tar.gz")
    return node


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a sparse file: `disk()`, `disk(512)` (MiB)."""

    def make(mib: int = SIZE) -> Path:
        path = tmp_path / f"disk{len(list(tmp_path.glob('disk*')))}"
        with path.open("xb") as file:
            file.truncate(mib * MIB)
        return path

    return make


@pytest.fixture
def block_disk(disk: Callable[..., Path]) -> Iterator[Callable[..., Path]]:
    """Return a function that makes a block device, like an LVM volume."""
    devices: list[str] = []

    def make(mib: int = SIZE) -> Path:
        devices.append(run("losetup", "--find", "--show", disk(mib)).strip())
        return Path(devices[-1])

    yield make
    for device in devices:
        run("losetup", "--detach", device)
