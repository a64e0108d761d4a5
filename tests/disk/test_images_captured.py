"""Capture an image of every type from disks of every layout; deployed again, it is the same system."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import guestdisks
import pytest
import trees
from captures import BOOT, FILES, TYPES, MakeDisk, capture, unchanged
from captures import disks as disks
from captures import node as node
from support import MIB, Node, attached, describe, mounted, partitions, run

# Files that `create` changes in a system, or that belong to its old filesystem
OTHERWISE = (b"etc/fstab", b"etc/host", b"etc/machine-id", b"etc/ssh", b"var/lib/dbus", b"var/lib/cloud", b"lost+found")
SECRET = b"-- the key of this instance --"
DELETED = b"-- what was deleted long ago --"


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
    "var/spool/postfix/deferred/A/A1": "a mail\n",
    "srv/host_key": "private key of the image\n",
    "etc/cloud/cloud.cfg.d/99_ganeti.cfg": '#cloud-config\n{"users": [{"name": "tenant"}]}\n',
}
EMPTIED = {"var/log/syslog": "today\n", "var/log/app/deep/er/app.log": "today\n"}
KEPT = {
    "home/somebody/.bashrc": "alias l=ls\n",
    "root/.ssh/authorized_keys": "ssh-ed25519 AAAA operator\n",
    "etc/network/interfaces": "auto lo\n",
    "etc/ssh/sshd_config.d/keys.conf": "HostKey /srv/host_key\n",
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
