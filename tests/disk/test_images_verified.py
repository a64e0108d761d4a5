"""IMAGE_CHECKSUM, and checksum files beside it, count for an image in IMAGE_DIR: checked before the first write."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from http_server import serving
from support import Node, digest, run

MakeDisk = Callable[..., Path]
NAME = f"tiny-{trees.ARCH}.tar.gz"


@pytest.fixture
def sums(node: Node) -> dict[str, str]:
    content = (node.images / NAME).read_bytes()
    return {name: hashlib.new(name, content).hexdigest() for name in ("sha256", "sha512", "sha1")}


def right(node: Node, disk: MakeDisk, said: str = "", **settings: object) -> str:
    log = node.create(disk(), **settings).ok().log
    assert ("verified: " in log) == bool(said) and said in log
    return log


def wrong(node: Node, disk: MakeDisk, *words: str, **settings: object) -> None:
    target = disk()
    before = digest(target)
    node.create(target, **settings).failed(*words)
    assert digest(target) == before


def flipped(hexadecimal: str) -> str:
    return ("0" if hexadecimal[0] != "0" else "1") + hexadecimal[1:]


def test_pin(node: Node, disk: MakeDisk, sums: dict[str, str]) -> None:
    for name in ("sha256", "sha512"):
        right(node, disk, f"{name} of IMAGE_CHECKSUM", OSP_IMAGE_CHECKSUM=f"{name}:{sums[name].upper()}")
        wrong(node, disk, NAME, f"wrong {name}", sums[name], OSP_IMAGE_CHECKSUM=f"{name}:{flipped(sums[name])}")
    node.defaults("IMAGE_VERIFY=no\n")
    right(node, disk, OSP_IMAGE_CHECKSUM=f"sha256:{flipped(sums['sha256'])}")


@pytest.mark.parametrize("file", ["SHA256SUMS", "SHA512SUMS", "CHECKSUM", f"{NAME}.sha256", f"{NAME}.sig"])
def test_file_beside_it(file: str, node: Node, disk: MakeDisk, sums: dict[str, str]) -> None:
    kind = "sha512" if "512" in file else "sha1" if file.endswith("sig") else "sha256"
    path = node.images / file
    path.write_text(f"{sums[kind]}  {NAME}\n")
    right(node, disk, f"{kind} of {path}")
    path.write_text(f"{flipped(sums[kind])}  {NAME}\n")
    wrong(node, disk, NAME, f"wrong {kind}", str(path))
    right(node, disk, OSP_IMAGE_CHECKSUM="no")
    right(node, disk, "IMAGE_CHECKSUM", OSP_IMAGE_CHECKSUM=f"sha256:{sums['sha256']}")
    path.unlink()
    os.mkfifo(path)
    wrong(node, disk, f"{path} is not a regular file")
    path.unlink()
    if NAME not in file:
        path.write_text(f"{flipped(sums[kind])}  another.tar.gz\n")
        right(node, disk)


def test_file_that_the_setting_names(node: Node, disk: MakeDisk, sums: dict[str, str]) -> None:
    path = node.images / "the sums?"
    wrong(node, disk, str(path), "is not there", OSP_IMAGE_CHECKSUM=path.name)
    path.write_text(f"{sums['sha256']}  {NAME}\n")
    right(node, disk, str(path), OSP_IMAGE_CHECKSUM=path.name)
    path.write_text(f"{flipped(sums['sha256'])}\n")
    wrong(node, disk, NAME, "wrong sha256", OSP_IMAGE_CHECKSUM=path.name)
    with serving() as server:
        server.put("/sums", f"{sums['sha512']}  {NAME}\n".encode())
        right(node, disk, f"{server.url}/sums", OSP_IMAGE_CHECKSUM=f"{server.url}/sums")
        server.put("/sums", f"{flipped(sums['sha512'])}  {NAME}\n".encode())
        wrong(node, disk, NAME, "wrong sha512", OSP_IMAGE_CHECKSUM=f"{server.url}/sums")


def test_keyring(node: Node, disk: MakeDisk, sums: dict[str, str], tmp_path: Path) -> None:
    """Without a checksum nothing is signed; with one it must be."""
    home = tmp_path / "gpg"
    home.mkdir(0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    run(*gpg, "--quick-gen-key", "alice", "ed25519", "sign", "never")
    keyring, path = tmp_path / "alice.gpg", node.images / "SHA256SUMS"
    keyring.write_bytes(subprocess.run([*gpg, "--export"], check=True, capture_output=True).stdout)
    node.defaults(f"IMAGE_KEYRING={keyring}\n")
    right(node, disk)
    path.write_text(f"{sums['sha256']}  {NAME}\n")
    wrong(node, disk, NAME, "is not signed")
    run(*gpg, "--detach-sign", "--output", f"{path}.gpg", path)
    right(node, disk, "signed by a key of")
    path.write_text(f"{sums['sha256']}  {NAME}\n# changed\n")
    wrong(node, disk, "no good signature")
    run("gpgconf", "--homedir", home, "--kill", "all")


def test_two_dumps(node: Node, disk: MakeDisk) -> None:
    for name in ("root", "boot"):
        (node.images / f"two-{trees.ARCH}-{name}.dump").write_bytes(b"no dump")
    settings = {"OSP_IMAGE_NAME": "two", "OSP_IMAGE_TYPE": "dump"}
    wrong(node, disk, "is not a dump", **settings)


def test_doctor(node: Node) -> None:
    """It judges as create does."""
    (node.images / f"{NAME}.sha256").write_text(f"{'0' * 64}\n")
    node.variant("mine", "IMAGE_NAME=tiny\n")
    done = subprocess.run([node.imageos, "doctor", "--os-dir", node.os_dir], capture_output=True, text=True)
    assert "wrong sha256" in " ".join(done.stdout.split())
