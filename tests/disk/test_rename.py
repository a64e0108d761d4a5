"""rename: the guest gets the instance's new name wherever it had the old one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import guestdisks
import pytest
from guestdisks import place
from support import Node, Result, attached, digest, locked, mounted, recorded, run

OLD, NEW = "inst2.example.org", "inst1.example.org"
PLACES = {
    "etc/hostname": ("inst2\n", "inst1\n"),
    "etc/HOSTNAME": ("inst2.example.org\n", "inst1.example.org\n"),
    "etc/mailname": ("inst2.example.org\n", "inst1.example.org\n"),
    "etc/hosts": (
        "127.0.0.1 localhost\n127.0.1.1 inst2.example.org inst2\n192.0.2.7 other inst2.example.com # inst2\n",
        "127.0.0.1 localhost\n127.0.1.1 inst1.example.org inst1\n192.0.2.7 other inst2.example.com # inst2\n",
    ),
    "etc/sysconfig/network": ('HOSTNAME="inst2"\nGATEWAY=192.0.2.1\n', 'HOSTNAME="inst1"\nGATEWAY=192.0.2.1\n'),
    "etc/conf.d/hostname": ("# the name\nhostname='inst2'\n", "# the name\nhostname='inst1'\n"),
    "var/lib/cloud/seed/nocloud-net/meta-data": (
        "instance-id: inst2\nlocal-hostname: inst2\n",
        "instance-id: inst2\nlocal-hostname: inst1\n",
    ),
    "etc/cloud/cloud.cfg.d/90-site.cfg": ("fqdn: inst2.example.org\n", "fqdn: inst1.example.org\n"),
    "etc/motd": ("welcome to inst2\n", "welcome to inst2\n"),
}


def rename(node: Node, disk: Path, **overrides: object) -> Result:
    return node.call("rename", node.environment(disk, env="rename", **overrides))


def write(guest: guestdisks.Guest, files: dict[str, str], work: Path) -> None:
    with mounted(guest.path, work / "mnt", place(guest.path, guest.root), "rw") as top:
        for name, text in files.items():
            path = top / guest.subvolume / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def read(guest: guestdisks.Guest, names: object, work: Path) -> dict[str, str]:
    with mounted(guest.path, work / "mnt", place(guest.path, guest.root)) as top:
        return {name: (top / guest.subvolume / name).read_text() for name in names}  # type: ignore[attr-defined]


@pytest.fixture
def guest(small_tree: Path, tmp_path: Path) -> guestdisks.Guest:
    return guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)


@pytest.mark.parametrize("layout", guestdisks.LAYOUTS)
def test_every_place(layout: str, node: Node, small_tree: Path, tmp_path: Path) -> None:
    guest = guestdisks.LAYOUTS[layout](tmp_path / f"{layout}.img", small_tree, tmp_path)
    write(guest, {name: before for name, (before, _) in PLACES.items()}, tmp_path)
    log = rename(node, guest.path).ok().log
    assert OLD in log and NEW in log and "/etc/hostname" in log
    assert read(guest, PLACES, tmp_path) == {name: after for name, (_, after) in PLACES.items()}
    assert rename(node, guest.path).ok()  # again, nothing to do
    assert read(guest, PLACES, tmp_path) == {name: after for name, (_, after) in PLACES.items()}


def test_after_create(node: Node, disk: Callable[..., Path], tmp_path: Path) -> None:
    """rename finds everything that create wrote."""
    target = disk()
    node.create(target, INSTANCE_NAME=OLD).ok()
    rename(node, target).ok()
    with mounted(target, tmp_path / "mnt", guestdisks.by_number(target)[-1]) as top:
        for name in ("etc/hostname", "etc/hosts"):
            assert "inst1" in (top / name).read_text() and "inst2" not in (top / name).read_text()


def test_modes_stay(node: Node, guest: guestdisks.Guest, tmp_path: Path) -> None:
    write(guest, {"etc/hostname": "inst2\n"}, tmp_path)
    with mounted(guest.path, tmp_path / "mnt", place(guest.path, 1), "rw") as top:
        (top / "etc/hostname").chmod(0o640)
        before = sorted(entry.name for entry in (top / "etc").iterdir())
    rename(node, guest.path).ok()
    with mounted(guest.path, tmp_path / "mnt", place(guest.path, 1)) as top:
        assert (top / "etc/hostname").stat().st_mode & 0o777 == 0o640
        assert sorted(entry.name for entry in (top / "etc").iterdir()) == before


def test_links_stay_inside(node: Node, guest: guestdisks.Guest, tmp_path: Path) -> None:
    """Resolve an absolute link inside the guest."""
    write(guest, {"data/name": "inst2\n"}, tmp_path)
    with mounted(guest.path, tmp_path / "mnt", place(guest.path, 1), "rw") as top:
        (top / "etc/hostname").unlink()
        (top / "etc/hostname").symlink_to("/data/name")
    rename(node, guest.path).ok()
    with mounted(guest.path, tmp_path / "mnt", place(guest.path, 1)) as top:
        assert (top / "etc/hostname").is_symlink() and (top / "data/name").read_text() == "inst1\n"


def test_another_hostname(node: Node, guest: guestdisks.Guest, tmp_path: Path) -> None:
    files = {"etc/hostname": "mail\n", "etc/hosts": "127.0.1.1 mail\n192.0.2.3 inst2\n"}
    write(guest, files, tmp_path)
    log = rename(node, guest.path).ok().log
    assert "warning: the guest is called mail" in log
    assert read(guest, files, tmp_path) == files


def test_same_name(node: Node, guest: guestdisks.Guest, tmp_path: Path) -> None:
    files = {"etc/hostname": "inst1\n", "etc/hosts": "127.0.1.1 inst1\n"}
    write(guest, files, tmp_path)
    assert "stays as it is" in rename(node, guest.path, OLD_INSTANCE_NAME=NEW).ok().log
    assert read(guest, files, tmp_path) == files


def test_no_guest(node: Node, disk: Callable[..., Path]) -> None:
    empty, swap, weird = disk(16), disk(16), disk(16)
    guestdisks.make(swap, 0, "swap")
    weird.write_bytes(b"\x55\xaa" * (8 << 20))
    for path in (empty, swap, weird):
        before = digest(path)
        assert "no guest to rename" in rename(node, path).ok().log
        assert digest(path) == before


@pytest.mark.parametrize("directory", ["/etc", "/etc/cloud/cloud.cfg.d"])
def test_damaged_directory(directory: str, node: Node, guest: guestdisks.Guest, tmp_path: Path) -> None:
    """The first is read to find the system, the other later."""
    write(
        guest, {"etc/cloud/cloud.cfg.d/90-site.cfg": "fqdn: inst2.example.org\n", "etc/hostname": "inst2\n"}, tmp_path
    )
    part = place(guest.path, guest.root)
    assert part
    with attached(guest.path, part.start, part.size) as device:
        block = int(run("debugfs", "-R", f"bmap {directory} 0", device))
        size = int(run("blkid", "--probe", "-s", "BLOCK_SIZE", "-o", "value", device))
        run("dd", "if=/dev/urandom", f"of={device}", f"bs={size}", f"seek={block}", "count=1", "conv=notrunc")
    result = rename(node, guest.path).failed()
    assert "hint: " in result.lines[-2] and "repair" in result.lines[-2], result.log


def test_nomount(node: Node, guest: guestdisks.Guest) -> None:
    before = digest(guest.path)
    with locked(guest.path):  # it does not even read it
        assert "NOMOUNT=yes" in rename(node, guest.path, OSP_NOMOUNT="yes").ok().log
    assert digest(guest.path) == before


def test_no_disk(node: Node) -> None:
    values = {**recorded("rename"), "DISK_COUNT": "0"}
    assert "no disk" in node.call("rename", values).ok().log


def test_disk_in_use(node: Node, guest: guestdisks.Guest) -> None:
    with locked(guest.path):
        rename(node, guest.path).failed("in use")


def test_old_name_is_missing(node: Node, guest: guestdisks.Guest) -> None:
    rename(node, guest.path, OLD_INSTANCE_NAME=None).failed("OLD_INSTANCE_NAME")


def test_hooks(node: Node, guest: guestdisks.Guest, tmp_path: Path) -> None:
    """RENAME_HOOKS run with -r after the change of the name; also for the same name."""
    write(guest, {"etc/hostname": "inst2\n"}, tmp_path)
    script = '#!/bin/sh\necho "$IMAGEOS_ACTION $* $OLD_INSTANCE_NAME $(cat $TARGET/etc/hostname)" >&2\n'
    node.hook("zz_ddns", script)
    node.hook("other", script)
    log = rename(node, guest.path).ok().log
    assert "zz_ddns: rename -r inst2.example.org inst1" in log and "other:" not in log
    assert "zz_ddns: rename -r" in rename(node, guest.path, OLD_INSTANCE_NAME=NEW).ok().log


def test_hook_that_fails(node: Node, guest: guestdisks.Guest, tmp_path: Path) -> None:
    """The guest survives: finished changes stay, and no journal needs recovery."""
    write(guest, {"etc/hostname": "inst2\n"}, tmp_path)
    node.hook("zz_ddns", "#!/bin/sh\necho done >$TARGET/etc/by-hook\nexit 7\n")
    rename(node, guest.path).failed("zz_ddns", "status 7")
    root = place(guest.path, guest.root)
    assert root
    with attached(guest.path, root.start, root.size) as device:
        assert "needs_recovery" not in run("dumpe2fs", "-h", device)
    found = read(guest, ["etc/hostname", "etc/by-hook"], tmp_path)
    assert found == {"etc/hostname": "inst1\n", "etc/by-hook": "done\n"}
