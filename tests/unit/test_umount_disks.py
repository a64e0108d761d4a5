"""The mounts at and below a directory, in the order in which they can be unmounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imageos.commands.umount_disks import below, full_name, in_order, is_below, unmount_at
from imageos.disks import blockdev
from imageos.errors import Failure
from imageos.node import linux, mounts

# /proc/self/mountinfo: two filesystems, one more over the second, one in a directory with a space
MOUNTS = """\
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
65 27 259:2 / /tmp/inst1_root rw,nosuid,nodev,relatime shared:30 - ext4 /dev/loop0p3 rw
66 65 259:0 / /tmp/inst1_root/boot rw,nosuid,nodev,relatime - ext4 /dev/loop0p1 rw
67 65 0:50 / /tmp/inst1_root/a\\040b rw - tmpfs my\\040tmpfs rw
68 66 0:51 / /tmp/inst1_root/boot rw master:3 propagate_from:2 - tmpfs over rw
69 27 259:9 / /tmp/inst1_root2 rw - ext4 /dev/loop1p3 rw
"""


def test_mounts() -> None:
    found = in_order(below(mounts.parse(MOUNTS), "/tmp/inst1_root"))
    assert [(mount.path, mount.source) for mount in found] == [
        ("/tmp/inst1_root/a b", "my tmpfs"),
        ("/tmp/inst1_root/boot", "over"),
        ("/tmp/inst1_root/boot", "/dev/loop0p1"),
        ("/tmp/inst1_root", "/dev/loop0p3"),
    ]
    assert below(mounts.parse(MOUNTS), "/tmp/inst2_root") == []


def test_what_is_hidden_comes_after_what_hides_it() -> None:
    """/home is mounted over /home/x, FUSE over everything; in /srv there are two of a user's, one in the other."""
    lines = """\
65 27 259:2 / /tmp/a_root rw - ext4 /dev/loop0p3 rw
66 65 259:0 / /tmp/a_root/home/x rw - ext4 /dev/loop0p1 rw
67 65 0:50 / /tmp/a_root/home rw - tmpfs new rw
68 65 0:51 / /tmp/a_root/srv rw - fuse.sshfs outer rw
69 68 0:52 / /tmp/a_root/srv/in rw - fuse inner rw
70 65 0:53 / /tmp/a_root rw - fuse top rw
"""
    order = [mount.source for mount in in_order(mounts.parse(lines))]
    assert order == ["top", "outer", "new", "/dev/loop0p1", "/dev/loop0p3"]


def test_a_carriage_return_in_a_path(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTS.replace("/tmp/inst1_root/boot", "/tmp/inst1_root/bo\rot").encode())
    places = [mount.path for mount in mounts.current(str(tmp_path / "mountinfo"))]
    assert len(places) == 6
    assert "/tmp/inst1_root/bo\rot" in places


@pytest.mark.parametrize(
    ("place", "instance"),
    [
        *(("/tmp/a.b_root", "a.b"), ("/tmp/a.b_root/boot", "a.b"), ("/tmp/a_root_root", "a_root")),
        *((one, "") for one in ("/tmp/a_root2", "/tmp/_root", "/tmp/-a_root", "/mnt/a_root", "/tmp/a/b_root", "/tmp")),
    ],
)
def test_whose_mount_it_is(place: str, instance: str) -> None:
    assert mounts.Mount(place, "/dev/loop0", "ext4", 0).instance == instance


def test_a_link_above_a_mount_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmounted = []
    monkeypatch.setattr(linux, "umount", lambda path, flags: unmounted.append((os.path.realpath(path), flags)))
    (tmp_path / "node/boot").mkdir(parents=True)
    (tmp_path / "guest").symlink_to("node")
    with pytest.raises(OSError, match="symbolic links"):
        unmount_at(f"{tmp_path}/guest/boot")
    assert unmounted == []
    unmount_at(f"{tmp_path}/node/boot")
    assert unmounted == [(f"{tmp_path}/node/boot", linux.UMOUNT_NOFOLLOW)]


def test_below() -> None:
    assert is_below("/tmp/a_root", "/tmp/a_root")
    assert is_below("/tmp/a_root/x", "/tmp/a_root")
    assert not is_below("/tmp/a_root2", "/tmp/a_root")


HERE = mounts.parse(
    """\
65 27 259:2 / /tmp/inst1.example.org_root rw - ext4 /dev/loop0p3 rw
66 65 259:0 / /tmp/inst1.example.org_root/boot rw - ext4 /dev/loop0p1 rw
67 27 259:5 / /tmp/inst2.example.org_root rw - ext4 /dev/loop1p3 rw
68 27 259:5 / /tmp/inst2.example.net_root rw - ext4 /dev/loop2p3 rw
69 27 0:60 / /tmp/inst3.example.org_root rw - tmpfs tmpfs rw
70 27 259:8 / /tmp/inst1_root rw - ext4 /dev/vda8 rw
71 27 259:9 / /tmp/inst4.example.org_root rw - ext4 /dev/loop3p3 rw
72 27 259:9 / /tmp/inst4_root rw - ext4 /dev/loop4p3 rw
"""
)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        *(("inst1", "inst1.example.org"), ("inst1.example", "inst1.example.org")),
        *(
            (one, one)
            for one in ("inst1.example.org", "inst2.example.net", "inst", "inst1.", "example.org", "inst3", "inst4")
        ),
    ],
)
def test_short_name(name: str, full: str) -> None:
    assert full_name(name, HERE) == full


def test_short_name_of_several() -> None:
    with pytest.raises(Failure, match="^inst2 is short for several instances: inst2.example.net, inst2.example.org$"):
        full_name("inst2", HERE)


def test_what_is_mounted_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    full_name("inst1", HERE)
    full_name("inst4", HERE)
    full_name("inst1", HERE[5:6])
    assert capfd.readouterr().err == ""
    full_name("other", HERE)
    assert capfd.readouterr().err == (
        "imageos: mounted on this node: inst1.example.org, inst2.example.net, inst2.example.org, inst4, "
        "inst4.example.org\n"
    )


def test_a_name_is_not_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user can mount something with the name of a device (FUSE): only the device number is reliable."""
    lines = """\
65 27 0:50 / /tmp/a_root rw - fuse.x /dev/loop3 rw
66 27 0:51 / /tmp/b_root rw - btrfs /dev/null rw
67 27 0:52 / /tmp/c_root rw - btrfs /nowhere rw
68 27 259:2 / /tmp/d_root rw - ext4 /dev/root rw
"""
    numbers = [mounts.block_device(mount) for mount in mounts.parse(lines)]
    assert numbers == [0, os.stat("/dev/null").st_rdev, 0, os.makedev(259, 2)]

    places = {"259:2": "/sys/devices/virtual/block/loop3/loop3p2", "1:3": "/sys/devices/virtual/mem/null"}
    monkeypatch.setattr(os.path, "realpath", lambda path: places.get(os.path.basename(path), path))
    assert [blockdev.loop_below(mount) for mount in mounts.parse(lines)] == ["", "", "", "/dev/loop3"]
