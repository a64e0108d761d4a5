"""Mounted disks on the node: recognised by the kernel's numbers, whatever names users give to their mounts."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import guestdisks
import pytest
from support import MIB, PATH, Gate, Node, run

from imageos.commands import umount_disks
from imageos.node import linux, mounts

MakeDisk = Callable[..., Path]


@pytest.fixture
def name() -> Iterator[str]:
    """Return an instance's name, and remove its mount point afterwards."""
    yield f"inst{os.getpid()}.example.org"
    place = Path(f"/tmp/inst{os.getpid()}.example.org_root")
    run("umount", "--recursive", place, check=False)
    if place.is_dir():
        place.rmdir()


@pytest.mark.parametrize("layout", ["cloud", "btrfs", "lvm"])
def test_a_mount_with_the_name_of_a_loop_device(
    layout: str, name: str, node: Node, block_disk: MakeDisk, small_tree: Path, tmp_path: Path
) -> None:
    """It is no disk, so do not wait for that loop device (a tmpfs here; users would use FUSE)."""
    loop = block_disk()
    place = Path(f"/tmp/{name}_root")
    place.mkdir(0o700)
    run("mount", "-t", "tmpfs", loop, place)
    node.tool("umount-disks", "--here", name).ok()
    assert run("losetup", loop), "it is attached still"
    assert not place.exists()

    guest = guestdisks.LAYOUTS[layout](tmp_path / "guest.raw", small_tree, tmp_path)
    node.tool("mount-disks", name, "--disk", str(guest.path)).ok()
    (place / "written").touch()
    assert f"it is mounted at {place}" in node.create(guest.path).failed().last
    node.tool("umount-disks", "--here", name).ok()
    assert run("losetup", "--associated", guest.path) == ""


def test_what_the_operator_has_mounted_below(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """As before chroot(8): files and directories of the node, a tmpfs, and a part of the guest again."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    place = Path(f"/tmp/{name}_root")
    node.tool("mount-disks", name, "--disk", str(guest.path)).ok()
    own = tmp_path / "resolv.conf"
    own.write_text("nameserver 192.0.2.1\n")
    (place / "etc/resolv.conf").touch()
    run("mount", "--bind", own, place / "etc/resolv.conf")
    run("mount", "--bind", "/usr/share", place / "mnt")
    run("mount", "-t", "tmpfs", "none", place / "run")
    run("mount", "--bind", place / "etc", place / "home")
    run("mount", "--bind", place / "etc/hostname", place / "etc/hosts")
    node.tool("umount-disks", "--here", name).ok()
    assert not place.exists()
    assert own.read_text() == "nameserver 192.0.2.1\n"


def test_in_a_chroot(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Mounts appear inside, not outside, where their path may belong to another user."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    root, place = tmp_path / "root", f"/tmp/{name}_root"
    root.mkdir()
    steps = [
        'mount --rbind / "$1"',
        'chroot "$1" "$2" "$3" --disk "$4" >&2',
        'ls "$1$5"',
        'echo outside:; ls "$5"',
    ]
    tool = node.os_dir / "tools/mount-disks"
    output = run("unshare", "--mount", "sh", "-ec", "\n".join(steps), "sh", root, tool, name, guest.path, place)
    inside, outside = output.split("outside:\n")
    assert "etc" in inside.split()
    assert outside == ""


# What a user of the node puts there. He may mount what he likes (FUSE) over a directory that he may write to; such a
# filesystem says what he likes, or never answers, and lets root in only where user_allow_other is set.


@contextmanager
def silent(place: Path, options: str = "") -> Iterator[None]:
    """A user's filesystem that never answers, as fusermount(1) mounts it for him. It ends in errors."""
    node = Path(tempfile.mkdtemp()) / "fuse"  # as on nodes; a container's /dev may lack it
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(10, 229))
    descriptor = os.open(node, os.O_RDWR)
    shutil.rmtree(node.parent)
    try:
        data = f"fd={descriptor},rootmode=40000,user_id=65534,group_id=65534{options}"
        linux.mount("/dev/loop0", str(place), "fuse", linux.MS_NOSUID | linux.MS_NODEV, data)
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("options", ["", ",allow_other"])
def test_a_users_filesystem_at_the_mount_point(
    options: str, name: str, node: Node, small_tree: Path, tmp_path: Path
) -> None:
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    place = Path(f"/tmp/{name}_root")
    place.mkdir(0o700)
    with silent(place, options):
        result = node.tool("mount-disks", name, "--disk", str(guest.path))
        result.failed(f"something else is mounted at {place} already")
        assert f"hint: umount-disks {name} takes it away" in result.log
        node.tool("umount-disks", "--here", name).ok()
    assert not place.exists()
    node.tool("mount-disks", name, "--disk", str(guest.path)).ok()
    node.tool("umount-disks", "--here", name).ok()


def test_a_filesystem_that_appears_meanwhile(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """It says that it is root's (a tmpfs here): who had mounted it could take it away later, and the guest with it."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    gate = Gate(tmp_path / "fake/gate")
    fake = tmp_path / "fake/blkid"
    node.write(fake, f'#!/bin/sh\n{gate.shell}\nPATH={PATH} exec blkid "$@"\n')
    fake.chmod(0o755)
    place = Path(f"/tmp/{name}_root")
    call = node.start_tool("mount-disks", name, "--disk", str(guest.path), path=f"{fake.parent}:{PATH}")
    call.wait_for(gate.reached, "in blkid")
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=700", "none", place)
    gate.open()
    call.result().failed(f"cannot mount anything at {place}: something is mounted there")
    assert os.listdir(place) == []


def test_users_filesystems_in_the_guest(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """Over its root, so that /boot is hidden; in a directory, and one more in that."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    place = Path(f"/tmp/{name}_root")
    node.tool("mount-disks", name, "--disk", str(guest.path)).ok()
    with ExitStack() as stack:
        for where in (place / "home", place / "boot", place):
            stack.enter_context(silent(where, ",allow_other"))
        node.tool("umount-disks", "--here", name).ok()
    assert not place.exists()
    assert run("losetup", "--associated", guest.path) == ""


def test_who_goes_on_mounting(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """In the guest's /home, while that is unmounted."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    place = Path(f"/tmp/{name}_root")
    node.tool("mount-disks", name, "--disk", str(guest.path)).ok()
    gone = threading.Event()

    def mount_again(times: int) -> None:
        with ExitStack() as stack:
            while times and not gone.is_set():
                try:
                    if not any(one.path == f"{place}/home" for one in mounts.current()):
                        stack.enter_context(silent(place / "home"))
                        times -= 1
                except OSError:
                    pass  # it is not a directory of ours, or not there any more

    user = threading.Thread(target=mount_again, args=(15,))
    user.start()
    try:
        node.tool("umount-disks", "--here", name).ok()
    finally:
        gone.set()
        user.join()
    assert not place.exists()


NOBODY = 65534


def take_turns(place: Path, led_to: Path) -> None:
    """Whatever a user can put at `place`, for as short as he likes; for ever."""
    own = Path(f"{place}.own")
    own.mkdir()
    while True:
        for put in (
            lambda: place.symlink_to(led_to),
            lambda: own.rename(place),
            lambda: os.mkfifo(place),
            lambda: place.touch(),
        ):
            try:
                put()
            except OSError:
                continue  # root's directory is there
            if place.is_dir() and not place.is_symlink():
                place.rename(own)
            else:
                place.unlink()


def test_who_puts_something_at_the_mount_point(name: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    """All the time, as fast as he can: it fails, or is done where root alone had a directory."""
    guest = guestdisks.mbr(tmp_path / "guest.raw", small_tree, tmp_path)
    place = Path(f"/tmp/{name}_root")
    led_to = Path(tempfile.mkdtemp())
    led_to.chmod(0o700)
    user = os.fork()
    if not user:
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            take_turns(place, led_to)
        finally:
            os._exit(1)
    try:
        for _ in range(5):
            result = node.tool("mount-disks", name, "--disk", str(guest.path))
            where = [one.path for one in mounts.current() if one.kind == "ext4" and one.path.startswith("/tmp/")]
            if result.status:
                result.failed(str(place))
                assert not where
            else:
                assert str(place) in where
            node.tool("umount-disks", "--here", name).ok()
            assert os.listdir(led_to) == []
    finally:
        os.kill(user, signal.SIGKILL)
        os.waitpid(user, 0)
        led_to.rmdir()
        for one in (place, Path(f"{place}.own")):
            run("rm", "-rf", one)


def test_a_filesystem_that_has_stopped(tmp_path: Path) -> None:
    """After an error, xfs refuses even to open its root directory."""
    disk, top = tmp_path / "disk", tmp_path / "root"
    top.mkdir()
    with disk.open("wb") as file:
        file.truncate(320 * MIB)
    run("mkfs.xfs", "-q", disk)
    run("mount", "-o", "loop", disk, top)
    try:
        (mount,) = (mount for mount in mounts.current() if mount.path == str(top))
        assert umount_disks.is_written(mount)
        linux.shut_down_filesystem(str(top))
        assert not umount_disks.is_written(mount)
    finally:
        run("umount", top)
