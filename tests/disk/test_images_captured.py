"""Capture an image of every type from disks of every layout; deployed again, it is the same system."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import guestdisks
import pytest
import trees
from support import (
    MIB,
    PATH,
    Call,
    Gate,
    Name,
    Node,
    Result,
    attached,
    describe,
    mounted,
    partitions,
    run,
    session,
    wait_until,
)

MakeDisk = Callable[..., Path]
TYPES = {"tarball": "tarball", "dump": "dump", "qemu-img": "qemu"}  # ganeti-image's -> IMAGE_TYPE
FILES = {
    "tarball": ["made-x86_64.tar.zst", "made-x86_64.tar.zst.sha256"],
    "dump": ["made-x86_64-root.dump", "made-x86_64-root.dump.sha256"],
    "qemu-img": ["made-x86_64.qcow2", "made-x86_64.qcow2.sha256"],
}
BOOT = ["made-x86_64-boot.dump", "made-x86_64-boot.dump.sha256"]
# Files that `create` changes in a system, or that belong to its old filesystem
OTHERWISE = (b"etc/fstab", b"etc/host", b"etc/machine-id", b"etc/ssh", b"var/lib/dbus", b"var/lib/cloud", b"lost+found")
SECRET = b"-- the key of this instance --"
DELETED = b"-- what was deleted long ago --"


@pytest.fixture(scope="module")
def disks(odd_tree: Path, small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, guestdisks.Guest]:
    """Make one disk of each layout; `ancestor` contains files that are hard to keep. Tests must not write to them."""
    top = tmp_path_factory.mktemp("guests")
    tree = {"ancestor": odd_tree}
    return {name: make(top / name, tree.get(name, small_tree), top) for name, make in guestdisks.LAYOUTS.items()}


@pytest.fixture
def node(node: Node) -> Node:
    """Return a node without images."""
    for path in node.images.iterdir():
        path.unlink()
    return node


def start(node: Node, disk: Path, kind: str, *options: str, directory: Name = "", path: str = PATH) -> Call:
    """Start the command on the node that has the disk, without a cluster."""
    node.calls += 1
    command = ["ganeti-image", "-i", "inst1.example.org", "--disk", str(disk), "-t", kind, "-n", "made"]
    command += ["-a", "x86_64", "-d", str(directory or node.images), *options]
    return Call(node.imageos, {"PATH": path}, node.work / f"capture-{node.calls}.log", command)


def capture(node: Node, disk: Path, kind: str, *options: str, directory: Name = "", path: str = PATH) -> Result:
    return start(node, disk, kind, *options, directory=directory, path=path).result()


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    before = [(run("sha256sum", path), path.stat().st_mtime_ns) for path in paths]
    yield
    assert [(run("sha256sum", path), path.stat().st_mtime_ns) for path in paths] == before


def system(disk: Path, layout: guestdisks.Guest, where: Path) -> dict[bytes, tuple]:
    """Return every file of the guest on an original disk, /boot included."""
    options = f"ro,subvol={layout.subvolume}" if layout.subvolume else "ro"
    with mounted(disk, where, guestdisks.place(disk, layout.root), options) as root:
        found = describe(root)
    if layout.path.name in ("ancestor", "xfs"):
        boot = {"ancestor": 1, "xfs": 2}[layout.path.name]
        with mounted(disk, where, guestdisks.place(disk, boot), "ro") as root:
            found.update({b"boot/" + path: entry for path, entry in describe(root).items() if path != b"."})
    return kept(found)


def kept(found: dict[bytes, tuple]) -> dict[bytes, tuple]:
    """Remove what `create` may change; make the first names of hard links relative to the root."""
    return {
        path: entry
        for path, entry in found.items()
        if path not in (b".", b"boot", b"etc") and not path.startswith(OTHERWISE) and b"lost+found" not in path
    }


def deployed(node: Node, disk: Path, kind: str, where: Path) -> dict[bytes, tuple]:
    """Return the system that `create` makes of the image on a blank disk."""
    node.create(disk, OSP_IMAGE_NAME="made", OSP_IMAGE_TYPE=TYPES[kind], OSP_SWAP="no").ok()
    table = partitions(disk)
    with mounted(disk, where, table[-1]) as root:
        found = describe(root)
    with mounted(disk, where, table[0]) as root:
        found.update({b"boot/" + path: entry for path, entry in describe(root).items() if path != b"."})
    return kept(found)


def inodes_aside(found: dict[bytes, tuple]) -> dict[bytes, tuple]:
    return {path: (*entry[:4], *entry[5:]) if path.startswith(b"boot/") else entry for path, entry in found.items()}


@pytest.mark.parametrize("kind", ["tarball", "dump"])
def test_a_captured_system_is_deployed(
    kind: str, node: Node, disks: dict[str, guestdisks.Guest], disk: MakeDisk, tmp_path: Path
) -> None:
    """All files that are hard to keep, from / and /boot; the disk is only read."""
    guest = disks["ancestor"]
    if kind == "dump":
        guest = dataclasses.replace(guest, path=tmp_path / "ancestor")
        shutil.copy2(disks["ancestor"].path, guest.path)
        with mounted(guest.path, tmp_path / "mnt", guestdisks.place(guest.path, guest.root), "rw") as root:
            (root / "odd" / "block").unlink()  # dump(8) knows only minor numbers up to 255
            os.rename(root / "odd" / ("n" * 255), root / "odd" / ("n" * 254))
    with unchanged(guest.path):
        capture(node, guest.path, kind).ok()
    assert sorted(os.listdir(node.images)) == sorted(FILES[kind] + (BOOT if kind == "dump" else []))
    run("sh", "-c", f"cd {node.images} && sha256sum --check --strict *.sha256")
    before = inodes_aside(system(guest.path, guest, tmp_path / "mnt"))
    after = inodes_aside(deployed(node, disk(), kind, tmp_path / "mnt"))
    assert after == before


@pytest.mark.parametrize("name", guestdisks.LAYOUTS)
def test_a_disk_image_is_the_same_disk(
    name: str, node: Node, disks: dict[str, guestdisks.Guest], disk: MakeDisk, tmp_path: Path
) -> None:
    guest = disks[name]
    with unchanged(guest.path):
        capture(node, guest.path, "qemu-img").ok()
    assert sorted(os.listdir(node.images)) == FILES["qemu-img"]
    image = node.images / FILES["qemu-img"][0]
    assert f"compression type: {guestdisks.best_compression(tmp_path)}\n" in run("qemu-img", "info", image)
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    assert raw.stat().st_size == guest.path.stat().st_size
    assert system(raw, guest, tmp_path / "mnt") == system(guest.path, guest, tmp_path / "mnt")
    assert table(raw) == table(guest.path)
    target = disk(guest.path.stat().st_size // MIB + 64)
    log = node.create(target, OSP_IMAGE_NAME="made", OSP_IMAGE_TYPE="qcow2").ok().log
    assert "grew" in log, log


def table(disk: Path) -> str:
    return run("sfdisk", "--dump", disk, check=False).replace(str(disk), "")


@pytest.mark.parametrize("name", guestdisks.LAYOUTS)
def test_a_tarball_of_every_layout(
    name: str, node: Node, disks: dict[str, guestdisks.Guest], small_tree: Path, tmp_path: Path
) -> None:
    guest = disks[name]
    with unchanged(guest.path):
        capture(node, guest.path, "tarball").ok()
    names = run("tar", "--list", "--file", node.images / FILES["tarball"][0]).splitlines()
    assert {"./boot/vmlinuz-1", "./etc/os-release"} <= set(names)
    assert len(names) == len(set(names))
    if name == "btrfs":
        assert "./home/somebody/" in names


def test_a_volume_of_data_is_part_of_a_tarball(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """All filesystems in the guest's fstab that are on its disk, not only those that it boots from."""
    disk = guestdisks.blank(tmp_path / "guest", 130, "label: dos\n1 : size=80M\n2 : size=40M\n")
    for number in (1, 2):
        guestdisks.make(disk, number, "ext4")
    home = tmp_path / "home"
    (home / "somebody").mkdir(parents=True)
    (home / "somebody/letter").write_text("dear all\n")
    guestdisks.fill(disk, 2, home, tmp_path)
    guestdisks.fill(disk, 1, small_tree, tmp_path, "/dev/vda1 / ext4 defaults 0 1\n/dev/vda2 /home ext4 defaults 0 2\n")
    capture(node, disk, "tarball").ok()
    names = run("tar", "--list", "--file", node.images / FILES["tarball"][0]).splitlines()
    assert "./home/somebody/letter" in names
    capture(node, disk, "dump").failed("/home", "dump")


# Content of an image


def switched_off(running: Path, work: Path) -> str:
    """Copy a disk to `off` while a file is in its journal only; return the name of that file.

    The kernel of a busy machine may write it back before the copy; then try again.
    """
    for attempt in range(20):
        name = f"last-words-{attempt}"
        with mounted(running, work / "mnt", guestdisks.place(running, 1), "rw,commit=300") as root:
            with (root / name).open("w") as file:
                file.write("saved\n")
                file.flush()
                os.fsync(file.fileno())
            run("cp", "--sparse=always", running, work / "off")
        with mounted(work / "off", work / "mnt", guestdisks.place(work / "off", 1), "ro,noload") as root:
            if not (root / name).exists():
                return name
    raise AssertionError("the kernel has always written it back")


@pytest.mark.parametrize("kind", TYPES)
def test_what_the_journal_holds_is_in_the_image(
    kind: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    """The guest was switched off, so its last file is in the journal only."""
    last_words = switched_off(guestdisks.mbr(tmp_path / "running", small_tree, tmp_path).path, tmp_path)
    with unchanged(tmp_path / "off"):
        capture(node, tmp_path / "off", kind).ok()
    target = disk()
    node.create(
        target, OSP_IMAGE_NAME="made", OSP_IMAGE_TYPE=TYPES[kind], OSP_SWAP="no", INSTANCE_HV_kernel_path="/k"
    ).ok()
    with mounted(target, tmp_path / "mnt", partitions(target)[-1]) as root:
        assert (root / last_words).read_text() == "saved\n"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("options", [[], ["--seal"]], ids=["whole", "sealed"])
def test_deleted_files_are_not_in_a_disk_image(
    options: list[str], kind: str, node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path
) -> None:
    """It contains neither files that the guest had deleted, nor keys removed by sealing, nor swapped memory."""
    layout = {"ext4": "ancestor", "xfs": "xfs", "btrfs": "btrfs"}[kind]
    guest = disks[layout]
    disk = tmp_path / "guest"
    shutil.copy2(guest.path, disk)
    mount = f"rw,subvol={guest.subvolume}" if guest.subvolume else "rw"
    with mounted(disk, tmp_path / "mnt", guestdisks.place(disk, guest.root), mount) as root:
        (root / "deleted").write_bytes(DELETED.ljust(8192) * 128)
        (root / "etc/ssh/ssh_host_rsa_key").write_bytes(SECRET.ljust(8192) * 4)
        run("sync", "-f", root)
        (root / "deleted").unlink()
    if kind == "ext4":
        swap = guestdisks.place(disk, 2)
        assert swap
        with disk.open("r+b") as file:
            file.seek(swap.start + MIB)
            file.write(DELETED)
    assert contains(disk, DELETED) and contains(disk, SECRET)
    capture(node, disk, "qemu-img", *options).ok()
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", node.images / FILES["qemu-img"][0], raw)
    assert not contains(raw, DELETED)
    assert contains(raw, SECRET) == (not options)
    if kind == "ext4":
        assert guestdisks.by_number(raw)[1].content["TYPE"] == "swap"
    for part in guestdisks.by_number(raw):
        if part.content.get("TYPE", "").startswith("ext"):
            with attached(raw, part.start, part.size, read_only=True) as device:
                run("e2fsck", "-f", "-n", device)


def contains(path: Path, text: bytes) -> bool:
    return text in path.read_bytes()


PRIVATE = {
    "etc/udev/rules.d/70-persistent-net.rules": 'SUBSYSTEM=="net", NAME="eth0"\n',
    "root/.bash_history": "mysql -pSecret\n",
    "home/somebody/.zsh_history": "ls\n",
    "home/somebody/.viminfo": "x\n",
    "var/lib/dhcp/dhclient.eth0.leases": "lease {}\n",
    "var/lib/systemd/random-seed": "seed",
    "var/lib/cloud/seed/nocloud/user-data": "#cloud-config\npassword: x\n",
    "etc/cloud/cloud.cfg.d/zz-imageos.cfg": "datasource_list: [NoCloud, None]\n",
    "var/log/journal/0123/system.journal": "x" * 100,
    "var/log/syslog.1": "old\n",
    "tmp/scratch": "x\n",
}
EMPTIED = {"var/log/syslog": "today\n", "var/log/app/deep/er/app.log": "today\n"}
KEPT = {
    "home/somebody/.bashrc": "alias l=ls\n",
    "root/.ssh/authorized_keys": "ssh-ed25519 AAAA operator\n",
    "etc/network/interfaces": "auto lo\n",
    "outside/of/log": "kept\n",
}


@pytest.mark.parametrize("kind", TYPES)
def test_sealing(kind: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """It changes the image, not the instance; the target of a link in /var/log is left alone."""
    tree = trees.guest(tmp_path / "tree", trees.SYSTEMD, PRIVATE, EMPTIED, KEPT)
    (tree / "var/log/link").symlink_to("/outside")
    (tree / "var/log/syslog").chmod(0o640)
    os.chown(tree / "var/log/syslog", 104, 4)
    guest = guestdisks.mbr(tmp_path / "guest", tree, tmp_path)
    with unchanged(guest.path):
        capture(node, guest.path, kind, "--seal").ok()
    with contents(node, kind, tmp_path) as root:
        for name in (
            *PRIVATE,
            *(f"etc/ssh/{key}" for key in trees.HOST_KEYS),
            "var/lib/dbus/machine-id",
            "var/lib/cloud/data",
        ):
            assert not (root / name).exists(), name
        assert (root / "etc/machine-id").read_text() == ""
        for name in EMPTIED:
            assert (root / name).read_text() == "", name
        assert (root / "var/log/syslog").stat().st_uid == 104
        assert (root / "var/log/syslog").stat().st_mode & 0o7777 == 0o640
        for name, text in KEPT.items():
            assert (root / name).read_text() == text, name
        assert (root / "etc/shadow").read_text() == (tree / "etc/shadow").read_text()
        assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777


@contextmanager
def contents(node: Node, kind: str, tmp_path: Path) -> Iterator[Path]:
    """Return the files in an image, without `create`."""
    root = tmp_path / "contents"
    root.mkdir()
    image = node.images / FILES[kind][0]
    if kind == "tarball":
        run("tar", "--extract", "--numeric-owner", "--file", image, "--directory", root)
        yield root
    elif kind == "dump":
        run("sh", "-c", f"cd {root} && restore -r -f {image}")
        yield root
    else:
        raw = tmp_path / "raw"
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
        with mounted(raw, tmp_path / "mnt", guestdisks.place(raw, 1)) as where:
            yield where


# Other disks


@pytest.mark.parametrize("content", ["nothing", "ext4", "lvm"])
def test_a_disk_without_a_system(content: str, node: Node, tmp_path: Path) -> None:
    """It becomes a disk image without changes; a tarball or sealing is refused."""
    disk = guestdisks.blank(tmp_path / "guest", 64, "label: gpt\n1 : size=40M\n")
    if content != "nothing":
        guestdisks.make(disk, 1, content)
    with unchanged(disk):
        for arguments in (["tarball"], ["qemu-img", "--seal"]):
            lines = capture(node, disk, *arguments).failed("no root filesystem", "(1 partition, listed above)").lines
            assert lines[-2] == "imageos: hint: make-qemu-img, without --seal, takes a disk as it is"
        assert os.listdir(node.images) == []
        assert "partition 1: 40 MiB" in capture(node, disk, "qemu-img").ok().log
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", node.images / FILES["qemu-img"][0], raw)
    run("cmp", disk, raw)


@pytest.mark.parametrize("name, word", [("xfs", "xfs"), ("btrfs", "btrfs")])
def test_a_dump_of_what_dump_does_not_know(
    name: str, word: str, node: Node, disks: dict[str, guestdisks.Guest]
) -> None:
    result = capture(node, disks[name].path, "dump").failed(word, "dump(8)")
    assert "make-qemu-img" in result.lines[-2]
    assert os.listdir(node.images) == []


@pytest.mark.parametrize("feature", ["inline_data", "ea_inode", "verity", "encrypt", "bigalloc"])
def test_a_dump_that_would_lose_files(feature: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """It is refused before anything is written; a disk image of the same disk works."""
    disk = guestdisks.blank(tmp_path / "guest", 90)
    run("mkfs.ext4", "-q", "-F", "-I", "256", "-O", feature, disk)
    with mounted(disk, tmp_path / "mnt", options="rw") as root:
        run("cp", "--archive", f"{small_tree}/.", root)
    capture(node, disk, "dump").failed(feature, "dump(8)")
    assert os.listdir(node.images) == []
    capture(node, disk, "qemu-img").ok()


def test_a_dump_of_reserved_blocks(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """dump 0.4b47 takes old data in reserved blocks for a file's content."""
    guest = disk(100)
    with guest.open("r+b") as file:
        file.write(b"of a deleted file" * (90 * MIB // 17))
    run("mkfs.ext4", "-q", "-E", "nodiscard", guest)
    with mounted(guest, tmp_path / "guest", None, "rw") as top:
        run("cp", "-a", f"{small_tree}/.", top)
        (top / "half").write_bytes(b"written")
        for name in ("whole", "half"):
            run("fallocate", "--length", "100000", top / name)
        with (top / "sparse").open("wb") as sparse:
            sparse.truncate(MIB)
            sparse.seek(500_000)
            sparse.write(b"island")
        os.utime(top / "half", (1, 2))
        (top / "fixed").write_text("fixed")
        run("fallocate", "--length", "50000", top / "fixed")
        run("chattr", "+i", top / "fixed")
        before = {path: entry for path, entry in describe(top).items() if path != b"."}
    capture(node, guest, "dump").ok()
    target = disk(160)
    node.create(target, OSP_IMAGE_NAME="made", OSP_IMAGE_TYPE="dump", INSTANCE_HV_kernel_path="/vmlinuz").ok()
    with mounted(target, tmp_path / "made", partitions(target)[-1]) as top:
        assert (top / "whole").read_bytes() == bytes(100_000)
        after = describe(top)
        for name in (b"whole", b"half", b"sparse", b"fixed"):
            assert after[name] == before[name]


@pytest.mark.parametrize("kind", ["tarball", "dump"])
def test_attributes_that_only_root_may_see(
    kind: str, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    guest, target = disk(100), disk(160)
    run("mkfs.ext4", "-q", guest)
    with mounted(guest, tmp_path / "guest", None, "rw") as top:
        run("cp", "-a", f"{small_tree}/.", top)
        os.setxattr(top / "etc", "trusted.overlay.opaque", b"y")
        os.setxattr(top / "etc/passwd", "trusted.note\n", b"1")
        os.setxattr(top / "etc/passwd", "user.note", b"2")
    left_out = "which a dump would keep: trusted.note\\x0a, trusted.overlay.opaque"
    assert (left_out in capture(node, guest, kind).ok().log) == (kind == "tarball")
    settings = {"OSP_IMAGE_NAME": "made", "OSP_IMAGE_TYPE": TYPES[kind], "INSTANCE_HV_kernel_path": "/vmlinuz"}
    result = node.create(target, **settings).ok()
    assert "left out" not in result.log and "cannot be kept" not in result.log
    with mounted(target, tmp_path / "made", partitions(target)[-1]) as top:
        assert os.getxattr(top / "etc/passwd", "user.note") == b"2"
        names = {name for path in ("etc", "etc/passwd") for name in os.listxattr(top / path)} - {"user.note"}
    assert names == ({"trusted.overlay.opaque", "trusted.note\n"} if kind == "dump" else set())


def test_a_dump_of_the_longest_name(node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    """restore(8) then reads the rest of the directory wrongly."""
    capture(node, disks["ancestor"].path, "dump").failed("255", "dump(8)")
    assert os.listdir(node.images) == []


# Files in the way


@pytest.mark.parametrize("kind", TYPES)
def test_an_image_is_never_overwritten_silently(kind: str, node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    path = node.images / FILES[kind][0]
    path.write_text("precious")
    disk = disks["mbr"].path
    capture(node, disk, kind).failed(str(path))
    assert path.read_text() == "precious" and os.listdir(node.images) == [path.name]
    if kind == "dump":
        (node.images / BOOT[0]).write_text("would be deployed with the new one")
    capture(node, disk, kind, "--force").ok()
    assert sorted(os.listdir(node.images)) == FILES[kind]
    assert path.stat().st_size > 10000


@pytest.mark.parametrize("kind, other", [("tarball", ".tar.gz"), ("qemu-img", ".img")])
def test_an_image_that_would_be_deployed_instead(
    kind: str, other: str, node: Node, disks: dict[str, guestdisks.Guest]
) -> None:
    (node.images / f"made-x86_64{other}").write_text("precious")
    for options in ([], ["--force"]):
        capture(node, disks["mbr"].path, kind, *options).failed(f"made-x86_64{other}")
    assert os.listdir(node.images) == [f"made-x86_64{other}"]


def test_the_directory_is_missing(node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    capture(node, disks["mbr"].path, "tarball", directory=nowhere).failed(str(nowhere), "No such file")
    assert not nowhere.exists()
    nowhere.write_text("a file")
    capture(node, disks["mbr"].path, "tarball", directory=nowhere).failed(str(nowhere), "Not a directory")


@pytest.mark.parametrize("kind", TYPES)
def test_a_block_device(kind: str, node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    """Like those of LVM and DRBD."""
    disk = disks["mbr"].path
    with unchanged(disk), attached(disk) as device:
        capture(node, device, kind).ok()
    assert sorted(os.listdir(node.images)) == FILES[kind]


def test_the_disk_is_in_use(node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    with attached(disks["mbr"].path, read_only=True) as device:
        capture(node, disks["mbr"].path, "tarball").failed("in use", str(device))


def test_the_instance_is_started_meanwhile(node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Data read before and after a write is inconsistent."""
    disk = guestdisks.mbr(tmp_path / "guest", small_tree, tmp_path).path
    fake, gate = tmp_path / "fake/blkid", Gate(tmp_path / "fake/gate")
    real = run("sh", "-c", f"PATH={PATH} command -v blkid").strip()
    node.write(fake, f'#!/bin/sh\n{gate.shell}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    call = start(node, disk, "tarball", path=f"{fake.parent}:{PATH}")
    call.wait_for(gate.reached, "in blkid")
    with disk.open("r+b") as file:
        file.seek(90 * MIB)
        file.write(b"a log entry")
    fake.unlink()
    gate.open()
    call.result().failed(str(disk), "was written to")
    assert os.listdir(node.images) == []


@contextmanager
def small(where: Path, mib: int) -> Iterator[Path]:
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={mib}M,mode=755", "tmpfs", where)
    try:
        yield where
    finally:
        run("umount", where)


@pytest.fixture(scope="module")
def full_disk(small_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a disk with 40 MiB of data that cannot be compressed."""
    top = tmp_path_factory.mktemp("full")
    disk = guestdisks.mbr(top / "full", small_tree, top).path
    with mounted(disk, top / "mnt", guestdisks.place(disk, 1), "rw") as root:
        (root / "noise").write_bytes(os.urandom(40 * MIB))
    return disk


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "mib, words",
    [(32, ["is full", "free"]), (80, ["is full", "free"]), (86, ["is full", "4.3 MiB have to stay free"])],
    ids=["copy", "image", "reserve"],
)
def test_no_room(mib: int, words: list[str], kind: str, node: Node, full_disk: Path, tmp_path: Path) -> None:
    """For the copy it is known in advance, for the image found on the way; neither remains."""
    with small(tmp_path / "small", mib) as directory, unchanged(full_disk):
        capture(node, full_disk, kind, directory=directory).failed(str(directory), *words)
        assert os.listdir(directory) == []
        # Landlock releases a file a moment after its program has ended
        wait_until(lambda: os.statvfs(directory).f_bfree == os.statvfs(directory).f_blocks, "nothing is left of it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize(
    "kind, tool", [("tarball", "tar"), ("dump", "dump"), ("qemu-img", "qemu-img"), ("tarball", "blkid")]
)
def test_killed(
    kind: str, tool: str, number: signal.Signals, node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path
) -> None:
    """While it reads the disk, and while it writes the image: nothing remains, and the next call works."""
    gate = Gate(tmp_path / "fake/gate")
    fake = tmp_path / "fake" / tool
    real = run("sh", "-c", f"PATH={PATH} command -v {tool}").strip()
    work = '[ "$1" = create ]' if tool == "qemu-img" else "false"  # its trial run
    node.write(fake, f'#!/bin/sh\nif ! {work}; then {gate.shell}; fi\nexec {real} "$@"\n')
    fake.chmod(0o755)
    disk = disks["mbr"].path
    with unchanged(disk):
        call = start(node, disk, kind, path=f"{fake.parent}:{PATH}")
        call.wait_for(gate.reached, f"in {tool}")
        call.kill(number)
        assert call.result().status == 128 + number
        assert os.listdir(node.images) == []
        wait_until(lambda: not session(call.process.pid), "the disk is free")
    capture(node, disk, kind).ok()


def test_a_tool_that_fails(node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path) -> None:
    """At any position in the pipe: the last line says why, and there is no image."""
    for tool, kind in (("tar", "tarball"), ("zstd", "tarball"), ("dump", "dump"), ("qemu-img", "qemu-img")):
        fake = tmp_path / f"fake-{tool}" / tool
        node.write(fake, "#!/bin/sh\nhead -c 100 /dev/zero\necho out of order >&2\nexit 7\n")
        fake.chmod(0o755)
        result = capture(node, disks["mbr"].path, kind, path=f"{fake.parent}:{PATH}").failed(tool, "out of order")
        assert os.listdir(node.images) == [], result.log


def test_without_zstd(node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path) -> None:
    """It uses gzip."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for directory in reversed(PATH.split(":")):
        for name in os.listdir(directory):
            if name not in ("zstd", "pigz") and not (tools / name).is_symlink():
                (tools / name).symlink_to(f"{directory}/{name}")
    capture(node, disks["mbr"].path, "tarball", path=str(tools)).ok()
    assert sorted(os.listdir(node.images)) == ["made-x86_64.tar.gz", "made-x86_64.tar.gz.sha256"]
    run("gzip", "--test", node.images / "made-x86_64.tar.gz")


def test_an_image_is_roots_alone(node: Node, disks: dict[str, guestdisks.Guest]) -> None:
    """The image contains password hashes and keys."""
    capture(node, disks["mbr"].path, "tarball").ok()
    assert (node.images / FILES["tarball"][0]).stat().st_mode & 0o7777 == 0o600
    assert (node.images / FILES["tarball"][1]).stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["new", "replaced"])
def test_the_directory_is_a_users(
    options: list[str], node: Node, disks: dict[str, guestdisks.Guest], tmp_path: Path
) -> None:
    """He puts a link to another directory in its place, meanwhile: nothing is made, replaced or removed there."""
    own, other = tmp_path / "users", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    for name in (*FILES["dump"], *BOOT):
        (other / name).write_text("of the node")
    fake, gate = tmp_path / "fake/dump", Gate(tmp_path / "fake/gate")
    real = run("sh", "-c", f"PATH={PATH} command -v dump").strip()
    node.write(fake, f'#!/bin/sh\n{gate.shell}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    disk = disks["mbr"].path
    call = start(node, disk, "dump", *options, directory=own, path=f"{fake.parent}:{PATH}")
    call.wait_for(gate.reached, "in dump")
    own.rename(tmp_path / "moved")
    own.symlink_to(other)
    fake.unlink()
    gate.open()
    call.result().ok()
    assert {path.read_text() for path in other.iterdir()} == {"of the node"}
    assert sorted(os.listdir(other)) == sorted([*FILES["dump"], *BOOT])
    assert sorted(os.listdir(tmp_path / "moved")) == FILES["dump"]
