"""Images of other makers, compressed or in archives: deployed byte for byte, and kept off the node's files."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import diskformats
import guestdisks
import pytest
import trees
from http_server import serving
from support import MIB, Node, Result, digest, run, session, wait_until

from imageos.disks import blockdev
from imageos.errors import Failure
from imageos.images import diskimage, formats, imagefile

MakeDisk = Callable[..., Path]
SIZE, DISK = 12 * MIB + 512, 24  # bytes of the images, MiB of the disks
CANARY = b"a secret of the node " * 100


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a disk with holes and data, up to its last sector."""
    path = tmp_path_factory.mktemp("content") / "disk.raw"
    with path.open("wb") as file:
        file.write(b"no table, no filesystem".ljust(512, b"\1"))
        for start in (3 * MIB, 7 * MIB + 4096):
            file.seek(start)
            file.write(os.urandom(MIB // 2))
        file.truncate(SIZE)
        file.seek(SIZE - 512)
        file.write(b"the end".ljust(512, b"\2"))
    return path


def image_path(node: Node, suffix: str) -> Path:
    return node.images / f"other-{trees.ARCH}{suffix}"


def suffix_of(kind: str) -> str:
    return f".{kind.rpartition('.')[2]}"


def convert(source: Path, path: Path, driver: str, *options: str) -> Path:
    more = ["-o", ",".join(options)] if options else []
    run("qemu-img", "convert", "-f", "raw", "-O", driver, *more, source, path)
    return path


def compressed(source: Path, path: Path, program: str) -> Path:
    guestdisks.compress(source, path, program)
    return path


def create(node: Node, target: Path, image_type: str = "qemu", **settings: object) -> Result:
    return node.create(target, OSP_IMAGE_NAME="other", OSP_IMAGE_TYPE=image_type, OSP_NOMOUNT="yes", **settings)


def deployed(node: Node, target: Path, content: Path, image_type: str = "qemu", **settings: object) -> None:
    """Deploy to a disk full of an old tenant's data, and compare."""
    guestdisks.soiled(target, DISK)
    create(node, target, image_type, **settings).ok()
    assert target.read_bytes() == content.read_bytes().ljust(DISK * MIB, b"\0")
    assert no_scratch(node)


def no_scratch(node: Node) -> bool:
    return not any((node.work / "cache").glob("*"))


@pytest.fixture(autouse=True)
def cache(node: Node) -> None:
    node.defaults(f"CACHE_DIR={node.work}/cache\n")


# suffix -> qemu-img's driver and options
OTHERS = {
    ".vmdk": ("vmdk",),
    ".stream.vmdk": ("vmdk", "subformat=streamOptimized"),
    ".vdi": ("vdi",),
    ".static.vdi": ("vdi", "static=on"),
    ".vhdx": ("vhdx",),
    ".fixed.vhdx": ("vhdx", "subformat=fixed"),
    ".vhd": ("vpc", "force_size=on"),
    ".fixed.vhd": ("vpc", "subformat=fixed", "force_size=on"),
}
PROGRAMS = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd", ".lz4": "lz4"}


def made(content: Path, work: Path, kind: str) -> Path:
    path = work / f"made{kind}"
    if kind in (".raw", ".img"):
        shutil.copy(content, path)
    elif kind == ".qcow2":
        guestdisks.qcow2(content, path)
    else:
        convert(content, path, *OTHERS[kind])
    return path


@pytest.mark.parametrize("kind", OTHERS)
def test_deployed(kind: str, node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    made(content, tmp_path, kind).rename(image_path(node, suffix_of(kind)))
    deployed(node, disk(DISK), content)


def test_content_decides(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    """Whatever the name says; IMAGE_TYPE=raw and qcow2 take nothing else."""
    made(content, tmp_path, ".vdi").rename(image_path(node, ".img"))
    deployed(node, disk(DISK), content)
    result = create(node, disk(DISK), "raw")
    result.failed("is a VDI image, not raw")
    create(node, disk(DISK), "qcow2").failed("is not a qcow2 image")


@pytest.mark.parametrize(
    ("kind", "packed", "image_type"),
    [
        (".raw", ".bz2", "raw"), (".img", ".gz", "raw"), (".img", ".bz2", "qemu"), (".img", ".zst", "qemu"),
        (".qcow2", ".xz", "qemu"), (".qcow2", ".gz", "qcow2"), (".vdi", ".lz4", "qemu"), (".vhdx", ".zst", "qemu"),
        (".stream.vmdk", ".gz", "qemu"), (".vmdk", ".bz2", "qemu"), (".vhd", ".xz", "qemu"),
        (".fixed.vhd", ".gz", "qemu"),
    ],
)  # fmt: skip
def test_compressed(
    kind: str, packed: str, image_type: str, node: Node, disk: MakeDisk, content: Path, tmp_path: Path
) -> None:
    compressed(made(content, tmp_path, kind), image_path(node, suffix_of(kind) + packed), PROGRAMS[packed])
    deployed(node, disk(DISK), content, image_type)


def archive(path: Path, work: Path, *files: Path, options: tuple[str, ...] = ()) -> Path:
    run("tar", "--create", *options, "--auto-compress", "--file", path, "-C", work, *(file.name for file in files))
    return path


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (".stream.vmdk", ".ova", ["--format=ustar"]), (".vmdk", ".ova", []), (".vmdk", ".tar.xz", []),
        (".raw", ".tar", ["--sparse"]), (".raw", ".tar.gz", ["--sparse", "--format=oldgnu"]), (".raw", ".tar.zst", []),
        (".qcow2", ".tar.gz", []), (".fixed.vhd", ".tar.gz", []), (".vhdx", ".tgz", ["--gzip"]),
    ],
)  # fmt: skip
def test_archive(
    kind: str, name: str, options: list[str], node: Node, disk: MakeDisk, content: Path, tmp_path: Path
) -> None:
    """Also with what is beside the disk in an OVA, and names that tar quotes."""
    disk_file = made(content, tmp_path, kind)
    odd = disk_file.rename(tmp_path / f"-di\nsk \\ \\n*[x]\u00fc{suffix_of(kind)}")
    other = tmp_path / "disk.ovf"
    other.write_text("<Envelope/>")
    run("tar", "--create", *options, "--auto-compress" if not options or options[0] != "--gzip" else "--gzip",
        "--no-unquote", "--file", image_path(node, name),
        "-C", tmp_path, "--", other.name, f"./{odd.name}")  # fmt: skip
    deployed(node, disk(DISK), content)


def test_archive_with_a_compressed_disk(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    for kind, program, name in ((".vmdk", "gzip", ".ova"), (".raw", "zstd", ".tar.gz")):
        inner = compressed(made(content, tmp_path, kind), tmp_path / f"in{kind}.{program[:2]}", program)
        inner = inner.rename(tmp_path / f"disk{kind}{'.gz' if program == 'gzip' else '.zst'}")
        path = archive(image_path(node, name), tmp_path, inner)
        deployed(node, disk(DISK), content)
        path.unlink()


def test_archive_with_one_file_of_any_name(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    shutil.copy(content, tmp_path / "DISK")
    archive(image_path(node, ".tar"), tmp_path, tmp_path / "DISK")
    deployed(node, disk(DISK), content, "raw")


def test_archives_that_hold_no_one_disk(
    node: Node, disk: MakeDisk, content: Path, tmp_path: Path, images: Path
) -> None:
    target = disk(DISK)
    before = digest(target)
    for name in ("a.vmdk", "b.vmdk", "text", "notes"):
        (tmp_path / name).write_bytes(bytes(3 * MIB))
    two = archive(image_path(node, ".ova"), tmp_path, tmp_path / "a.vmdk", tmp_path / "b.vmdk")
    result = create(node, target)
    result.failed("holds 2 disk images: a.vmdk (3 MiB), b.vmdk (3 MiB)")
    assert "tar --extract" in result.log
    two.unlink()
    archive(image_path(node, ".ova"), tmp_path, tmp_path / "text", tmp_path / "notes")
    create(node, target).failed("without a disk image: it holds text (3 MiB)")
    (tmp_path / "c.vmdk").symlink_to("/etc/shadow")
    archive(image_path(node, ".ova"), tmp_path, tmp_path / "text", tmp_path / "c.vmdk")
    create(node, target).failed("without a disk image: it holds text (3 MiB), c.vmdk -> /etc/shadow")
    archive(tmp_path / "in.img", tmp_path, tmp_path / "a.vmdk")
    for name in (".ova", ".tar.gz"):
        inner = archive(image_path(node, name), tmp_path, tmp_path / "in.img")
        create(node, target).failed(f"{name}:in.img is an archive in an archive")
        inner.unlink()
    shutil.copy(images / "small.tar.gz", image_path(node, ".ova"))
    result = create(node, target)
    result.failed("an archive")
    assert "IMAGE_TYPE=tarball" in result.log
    for _ in range(2):
        run("tar", "--append", "--file", image_path(node, ".tar"), "-C", tmp_path, "a.vmdk")
    image_path(node, ".ova").unlink()
    create(node, target).failed("holds 2 disk images")
    assert digest(target) == before


@pytest.mark.parametrize("kind", [".vdi", ".stream.vmdk", ".vhdx", ".fixed.vhd"])
def test_larger_than_the_disk(kind: str, node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    path = made(content, tmp_path, kind)
    target = disk(12)
    before = digest(target)
    for packed in (False, True):
        suffix = suffix_of(kind)
        if packed:
            compressed(path, image_path(node, suffix + ".gz"), "gzip")
            image_path(node, suffix).unlink()
        else:
            shutil.copy(path, image_path(node, suffix))
        create(node, target).failed(str(SIZE), str(12 * MIB))
    assert digest(target) == before and no_scratch(node)


@pytest.mark.parametrize("kind", OTHERS)
def test_truncated(kind: str, node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    path = made(content, tmp_path, kind)
    whole = path.read_bytes()
    target = guestdisks.soiled(disk(DISK), DISK)
    before = digest(target)
    # the last block of the disk need not be whole, and a VHDX has blocks of 8 MiB
    for cut in (len(whole) // 2, len(whole) - (8 if kind.endswith("vhdx") else 1) * MIB - 1024):
        if kind == ".fixed.vhd":
            continue  # raw without its footer: only its table would tell
        image_path(node, suffix_of(kind)).write_bytes(whole[:cut])
        result = create(node, target)
        result.failed(f"other-{trees.ARCH}", "is truncated", f"({cut} bytes)")
        assert digest(target) == before


def test_truncated_within(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    """In a compression, or an archive, that is whole."""
    path = made(content, tmp_path, ".vdi")
    os.truncate(path, path.stat().st_size - 2 * MIB)
    target = guestdisks.soiled(disk(DISK), DISK)
    before = digest(target)
    compressed(path, image_path(node, ".vdi.gz"), "gzip")
    create(node, target).failed("is truncated")
    image_path(node, ".vdi.gz").unlink()
    archive(image_path(node, ".tar.gz"), tmp_path, path)
    create(node, target).failed("is truncated")
    assert digest(target) == before and no_scratch(node)


def test_by_url(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    """An archive may be larger than the disk in it."""
    shutil.copy(content, tmp_path / "disk.raw")
    (tmp_path / "more").write_bytes(os.urandom(14 * MIB))
    archive(tmp_path / "x.ova", tmp_path, tmp_path / "disk.raw", tmp_path / "more")
    compressed(made(content, tmp_path, ".stream.vmdk"), tmp_path / "x.vmdk.gz", "gzip")
    shutil.copy(made(content, tmp_path, ".fixed.vhd"), tmp_path / "x.vhd")
    with serving() as server:
        for name in ("x.ova", "x.vmdk.gz", "x.vhd"):
            server.put(f"/{name}", (tmp_path / name).read_bytes())
            target = guestdisks.soiled(disk(DISK), DISK)
            create(node, target, OSP_IMAGE_URL=f"{server.url}/{name}").ok()
            assert target.read_bytes() == content.read_bytes().ljust(DISK * MIB, b"\0")


def test_no_room_to_unpack(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    compressed(made(content, tmp_path, ".fixed.vhdx"), image_path(node, ".vhdx.gz"), "gzip")
    run("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", small)
    try:
        node.defaults(f"CACHE_DIR={small}\n")
        result = create(node, disk(DISK))
        result.failed("cannot keep", f"CACHE_DIR {small}", "needed")
        assert os.statvfs(small).f_bavail * os.statvfs(small).f_frsize == MIB
    finally:
        run("umount", small)


def test_bombs(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """Of zeroes, which take no room in a sparse file: what the disk could ever need is the limit."""
    target = disk(DISK)
    before = digest(target)
    guestdisks.qcow2(guestdisks.blank(tmp_path / "blank", 2), tmp_path / "disk.raw")
    os.truncate(tmp_path / "disk.raw", 1200 * MIB)
    compressed(tmp_path / "disk.raw", image_path(node, ".qcow2.zst"), "zstd")
    create(node, target).failed(f"other-{trees.ARCH}.qcow2.zst", "too much for the disk")
    assert no_scratch(node)
    image_path(node, ".qcow2.zst").unlink()
    archive(image_path(node, ".tar.zst"), tmp_path, tmp_path / "disk.raw")
    create(node, target).failed(f"other-{trees.ARCH}.tar.zst", "too much for the disk")
    assert digest(target) == before


def test_killed_while_it_unpacks(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        for _ in range(400):
            file.write(os.urandom(MIB // 64) * 64)
    compressed(convert(raw, tmp_path / "x.vdi", "vdi", "static=on"), image_path(node, ".vdi.gz"), "gzip")
    values = node.environment(disk(500), OSP_IMAGE_NAME="other", OSP_IMAGE_TYPE="qemu", OSP_NOMOUNT="yes")
    call = node.start("create", values)

    def is_unpacking() -> bool:
        processes = [line.split()[1] for line in session(call.process.pid)]
        names = run("sh", "-c", "readlink /proc/$0/fd/* /proc/$1/fd/*", *(processes * 2)[:2], check=False)
        return f"{node.work}/cache/#" in names

    call.wait_for(is_unpacking, "unpacked")
    call.kill(signal.SIGKILL)
    call.process.wait()
    wait_until(lambda: not any((node.work / "cache").iterdir()), "gone")


# What names other files


def flat_vmdk(canary: Path, path: Path) -> None:
    path.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW {2 * MIB // 512} FLAT "{canary}" 0\n'
    )


def device_vmdk(canary: Path, path: Path) -> None:
    flat_vmdk(canary, path)
    path.write_text(path.read_text().replace("monolithicFlat", "fullDevice"))


def sparse_vmdk_of_its_descriptor(canary: Path, path: Path) -> None:
    """With a capacity of 0 qemu-img reads the descriptor within instead."""
    convert_empty(path, "vmdk")
    flat_vmdk(canary, text := path.with_suffix(".text"))
    data = bytearray(path.read_bytes())
    data[12:20] = bytes(8)
    data[512 : 512 + 20 * 512] = text.read_bytes().ljust(20 * 512, b"\0")
    path.write_bytes(data)
    text.unlink()


def vmdk_with_a_parent(canary: Path, path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", convert_empty(canary.with_suffix(".vmdk"), "vmdk"),
        "-F", "vmdk", path)  # fmt: skip


def vhdx_with_a_parent(canary: Path, path: Path) -> None:
    convert_empty(path, "vhdx")
    data = bytearray(path.read_bytes())
    item = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")  # file parameters
    place = data.index(item)
    (offset,) = struct.unpack_from("<I", data, place + 16)
    data[place // MIB * MIB + offset + 4] |= 2
    path.write_bytes(data)


def vdi_difference(canary: Path, path: Path) -> None:
    convert_empty(path, "vdi")
    data = bytearray(path.read_bytes())
    data[0x4C] = 4
    path.write_bytes(data)


def vhd_difference(canary: Path, path: Path) -> None:
    convert_empty(path, "vpc")
    data = bytearray(path.read_bytes())
    data[63] = data[len(data) - 512 + 63] = 4
    path.write_bytes(data)


def convert_empty(path: Path, driver: str) -> Path:
    run("qemu-img", "create", "-q", "-f", driver, path, "2M")
    return path


EVIL: dict[Callable[[Path, Path], None], str] = {
    flat_vmdk: "VMDK descriptor", device_vmdk: "VMDK descriptor", sparse_vmdk_of_its_descriptor: "damaged",
    vmdk_with_a_parent: "has a parent", vhdx_with_a_parent: "has a parent", vdi_difference: "has a parent",
    vhd_difference: "has a parent",
}  # fmt: skip


@pytest.mark.parametrize("how", EVIL)
def test_refused_by_its_header(how: Callable[[Path, Path], None], node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_bytes(CANARY.ljust(2 * MIB))
    evil = tmp_path / "evil"
    how(canary, evil)
    target = disk(DISK)
    before = digest(target)
    shutil.copy(evil, image_path(node, ".img"))
    create(node, target).failed(EVIL[how])
    image_path(node, ".img").unlink()
    archive(image_path(node, ".ova"), tmp_path, evil)
    create(node, target).failed(EVIL[how])
    image_path(node, ".ova").unlink()
    compressed(evil, image_path(node, ".vmdk.gz"), "gzip")
    create(node, target).failed(EVIL[how])
    assert digest(target) == before


def test_tables_that_make_no_sense(node: Node, disk: MakeDisk) -> None:
    """Found only when the end of the image is looked for."""
    image_path(node, ".img").write_bytes(diskformats.vhd(block=1))
    create(node, disk(DISK)).failed("other-", "cannot be deployed: its header is damaged")


@pytest.mark.parametrize("how", [flat_vmdk, device_vmdk, sparse_vmdk_of_its_descriptor, vmdk_with_a_parent])
def test_out_of_reach_even_so(how: Callable[[Path, Path], None], disk: MakeDisk, tmp_path: Path) -> None:
    """Without the check of the header qemu-img finds no other file; outside it would copy the canary."""
    canary = tmp_path / "canary"
    canary.write_bytes(CANARY.ljust(2 * MIB))
    evil = tmp_path / "evil"
    how(canary, evil)
    if how not in (vmdk_with_a_parent, device_vmdk):  # qemu-img knows no devices
        run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", evil, tmp_path / "copied")
        assert (tmp_path / "copied").read_bytes().startswith(CANARY), "no canary"
    form = next(form for form in formats.FORMATS if form.name == "VMDK")
    image = imagefile.open_image(str(evil))
    target = disk(DISK)
    with blockdev.claimed(str(target)) as claimed, blockdev.attached(claimed) as loop, pytest.raises(Failure):
        diskimage._convert(image, form, 2 * MIB, loop)
    os.close(image.descriptor)
    assert CANARY[:20] not in target.read_bytes()


def test_names_that_are_protocols(node: Node, disk: MakeDisk, content: Path, tmp_path: Path) -> None:
    """A file's name is never one that qemu-img interprets, and those of an archive are only tar's."""
    name = 'json:{"driver":"raw"}.raw'
    shutil.copy(content, tmp_path / name)
    run("tar", "--create", "--file", image_path(node, ".tar"), "-C", tmp_path, f"./{name}")
    deployed(node, disk(DISK), content)
    image_path(node, ".tar").unlink()
    shutil.copy(made(content, tmp_path, ".qcow2"), node.images / f"nbd:host:1-{trees.ARCH}.qcow2")
    target = guestdisks.soiled(disk(DISK), DISK)
    node.create(target, OSP_IMAGE_NAME="nbd:host:1", OSP_IMAGE_TYPE="qemu", OSP_NOMOUNT="yes").ok()
    assert target.read_bytes() == content.read_bytes().ljust(DISK * MIB, b"\0")
