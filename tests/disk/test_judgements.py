"""doctor and verify judge an image as create does: the same files, good and bad, for all three."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diskformats
import guestdisks
import pytest
import trees
from http_server import serving
from support import MIB, SITE, Node, attached, run

SIZE = 160  # MiB


@dataclass(frozen=True)
class Sources:
    """Whole images, to be copied or spoilt."""

    tar: bytes
    raw: Path
    work: Path

    def packed(self, how: str) -> bytes:
        return subprocess.run(trees.COMPRESSORS[how], input=self.tar, capture_output=True, check=True).stdout

    def disk(self, form: str, *options: str) -> bytes:
        path = self.work / f"made.{form}"
        run("qemu-img", "convert", "-f", "raw", "-O", form, *options, self.raw, path)
        return path.read_bytes()

    def dump(self) -> bytes:
        path = self.work / "made.dump"
        with attached(self.raw, read_only=True) as device:
            run("dump", "-0", "-q", "-f", path, device)
        return path.read_bytes()


@pytest.fixture(scope="module")
def sources(small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    work = tmp_path_factory.mktemp("judged")
    guest = guestdisks.bare(work / "guest.raw", small_tree, work)
    return Sources(trees.tarball(small_tree, work / "small.tar", "tar").read_bytes(), guest.path, work)


def shortened(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3 + 7]  # no multiple of a sector


def archived(name: str, data: bytes) -> bytes:
    with io.BytesIO() as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        return packed.getvalue()


def members(data: bytes) -> bytes:
    """Compress it in several members of gzip, of which the last is short."""
    return b"".join(gzip.compress(data[at : at + 5000]) for at in range(0, len(data), 5000))


GOOD: dict[str, tuple[str, str, Callable[[Sources], bytes]]] = {  # -> IMAGE_TYPE, suffix, content
    **{how: ("tarball", f".{suffix}", lambda the, how=how: the.packed(how)) for how, suffix in trees.SUFFIXES.items()},  # type: ignore[misc]
    "several members": ("tarball", ".tar.gz", lambda the: members(the.tar)),
    "an empty member": ("tarball", ".tar.gz", lambda the: gzip.compress(the.tar) + gzip.compress(b"")),
    "another suffix": ("tarball", ".tar.gz", lambda the: the.packed("xz")),
    "dump": ("dump", "-root.dump", lambda the: the.dump()),
    "raw": ("raw", ".raw", lambda the: the.raw.read_bytes()),
    "raw.gz": ("raw", ".raw.gz", lambda the: gzip.compress(the.raw.read_bytes(), 1)),
    "qcow2": ("qcow2", ".qcow2", lambda the: the.disk("qcow2")),
    "compressed qcow2": ("qcow2", ".qcow2", lambda the: the.disk("qcow2", "-c")),
    "qcow2 with subclusters": (
        "qcow2",
        ".qcow2",
        lambda the: the.disk("qcow2", "-o", "extended_l2=on,cluster_size=128k"),
    ),
    "ova": ("qemu", ".ova", lambda the: archived("disk.vmdk", the.disk("vmdk", "-o", "subformat=streamOptimized"))),
    "raw in an archive": ("raw", ".tar", lambda the: archived("disk.raw", the.raw.read_bytes())),
    "vmdk": ("qemu", ".vmdk", lambda the: the.disk("vmdk", "-o", "subformat=streamOptimized")),
    "vdi": ("qemu", ".vdi", lambda the: the.disk("vdi")),
    "vhdx": ("qemu", ".vhdx", lambda the: the.disk("vhdx")),
}
BAD: dict[str, tuple[str, str, Callable[[Sources], bytes]]] = {
    **{
        f"{how}, truncated": ("tarball", f".{suffix}", lambda the, how=how: shortened(the.packed(how)))  # type: ignore[misc]
        for how, suffix in trees.SUFFIXES.items()
    },
    "dump, truncated": ("dump", "-root.dump", lambda the: shortened(the.dump())),
    "several members, truncated": ("tarball", ".tar.gz", lambda the: shortened(members(the.tar))),
    "raw, truncated": ("raw", ".raw", lambda the: shortened(the.raw.read_bytes())),
    "qcow2, truncated": ("qcow2", ".qcow2", lambda the: shortened(the.disk("qcow2"))),
    "vmdk, truncated": ("qemu", ".vmdk", lambda _: shortened(diskformats.vmdk())),
    "vdi, truncated": ("qemu", ".vdi", lambda the: shortened(the.disk("vdi"))),
    "vhdx, truncated": ("qemu", ".vhdx", lambda the: shortened(the.disk("vhdx"))),
    "no tarball": ("tarball", ".tar.gz", lambda the: the.raw.read_bytes()[: 4 * MIB]),
    "a web page": ("tarball", ".tar.gz", lambda _: b"<!DOCTYPE html>not found" * 99),
    "no dump": ("dump", "-root.dump", lambda the: the.tar),
    "no qcow2": ("qcow2", ".qcow2", lambda the: the.raw.read_bytes()),
    "a qcow2 for raw": ("raw", ".raw", lambda the: the.disk("qcow2")),
    "zeroes": ("raw", ".raw", lambda _: bytes(2 * MIB)),
    "qcow2 with subclusters, truncated": (
        "qcow2",
        ".qcow2",
        lambda the: shortened(the.disk("qcow2", "-o", "extended_l2=on,cluster_size=128k")),
    ),
    "one byte": ("raw", ".raw", lambda _: b"x"),
    "empty": ("tarball", ".tar.gz", lambda _: b""),
}


def judge(node: Node, image_type: str, disk: Path, more: str = "") -> tuple[str, str, str]:
    """Return the last line of create, and what doctor and verify say against the image; nothing where it is right."""
    node.variant("judged", f"IMAGE_NAME=judged\nIMAGE_TYPE={image_type}\n{more}")
    created = node.create(disk, OS_VARIANT="judged", OSP_IMAGE_NAME=None)
    argv = [str(node.imageos), "doctor", "--json", "--os-dir", str(node.os_dir)]
    done = subprocess.run(argv, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    findings = [one for one in json.loads(done.stdout)["findings"] if one["level"] in ("error", "unknown")]
    assert all(one["area"] == "images" for one in findings), done.stdout
    environment = {**node.environment(disk), "OS_VARIANT": "judged"}
    for name in [name for name in environment if name.startswith("OSP_")]:
        del environment[name]
    verified = node.call("verify", environment, "parameters")
    return (
        created.last.removeprefix("imageos: ") if created.status else "",
        " ".join(one["what"].removeprefix("variant judged: ") for one in findings),
        verified.last.removeprefix("imageos: ") if verified.status else "",
    )


@pytest.fixture
def node(node: Node, etc: Path) -> Node:
    shutil.rmtree(SITE / "hooks", ignore_errors=True)
    (SITE / "hooks").mkdir()
    return node


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_files(name: str, node: Node, disk: Callable[..., Path], sources: Sources) -> None:
    image_type, suffix, content = {**GOOD, **BAD}[name]
    (node.images / f"judged-{trees.ARCH}{suffix}").write_bytes(content(sources))
    created, doctor, verified = judge(node, image_type, disk(), f"CACHE_DIR={node.work}/cache\n")
    assert created == doctor == verified
    assert bool(created) == (name in BAD), created


PLACES: dict[str, tuple[bool, Callable[[Path, Path], object]]] = {  # -> whether it is right, what is done to the image
    "symlink": (True, lambda path, other: (shutil.move(path, other), path.symlink_to(other))),
    "two symlinks": (
        True,
        lambda path, other: (
            shutil.move(path, other),
            other.with_name("second").symlink_to(other.name),
            path.symlink_to(other.with_name("second")),
        ),
    ),
    "of another user, who alone may read it": (True, lambda path, _: (os.chown(path, 1, 1), path.chmod(0o400))),
    "symlink to nothing": (False, lambda path, _: (path.unlink(), path.symlink_to("nothing"))),
    "symlink to itself": (False, lambda path, _: (path.unlink(), path.symlink_to(path))),
    "symlink to a directory": (False, lambda path, _: (path.unlink(), path.symlink_to("/etc"))),
    "FIFO": (False, lambda path, _: (path.unlink(), os.mkfifo(path))),
    "directory": (False, lambda path, _: (path.unlink(), path.mkdir())),
    "device": (False, lambda path, _: (path.unlink(), path.symlink_to("/dev/zero"))),
    "missing": (False, lambda path, _: path.unlink()),
}


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("name", PLACES)
def test_places(
    name: str, compression: str, node: Node, disk: Callable[..., Path], sources: Sources, tmp_path: Path
) -> None:
    path = node.images / f"judged-{trees.ARCH}.{trees.SUFFIXES[compression]}"
    path.write_bytes(sources.packed(compression))
    is_right, change = PLACES[name]
    change(path, tmp_path / "elsewhere")
    created, doctor, verified = judge(node, "tarball", disk())
    assert created == doctor == verified
    assert bool(created) != is_right, created


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("where", ["IMAGE_CHECKSUM=sha256:", "judged.sha256", "SHA256SUMS"])
def test_checksums(where: str, is_right: bool, node: Node, disk: Callable[..., Path], sources: Sources) -> None:
    """verify leaves it to create: it may take longer than Ganeti gives it."""
    path = node.images / f"judged-{trees.ARCH}.tar.gz"
    path.write_bytes(sources.packed("gz"))
    digest = hashlib.sha256(path.read_bytes() if is_right else b"another").hexdigest()
    if "IMAGE_CHECKSUM" not in where:
        name = f"{path.name}.sha256" if where == "judged.sha256" else where
        (node.images / name).write_text(f"{digest}  {path.name}\n")
    more = f"{where}{digest}\n" if "IMAGE_CHECKSUM" in where else ""
    created, doctor, verified = judge(node, "tarball", disk(), more)
    assert created == doctor and not verified
    assert bool(created) != is_right, created


@pytest.mark.parametrize("is_there", [True, False])
def test_url(is_there: bool, node: Node, disk: Callable[..., Path], sources: Sources) -> None:
    """verify only warns: the server may have it in time for the create."""
    with serving() as server:
        if is_there:
            server.put(f"/judged-{trees.ARCH}.tar.gz", sources.packed("gz"))
        more = f"IMAGE_URL={server.url}\nCACHE_DIR={node.work}/cache\n"
        created, doctor, verified = judge(node, "tarball", disk(), more)
    assert (not created, not doctor, not verified) == (is_there, is_there, True), (created, doctor)
