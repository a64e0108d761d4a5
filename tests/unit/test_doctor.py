"""doctor: how it reads the kernel's files, and how it shows its findings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageos.checks import definition
from imageos.checks.definition import check_in_use, check_owners, check_python
from imageos.checks.kernel import check_kernel
from imageos.checks.node import check_leftovers, leftovers
from imageos.checks.programs import limits, programs_for
from imageos.checks.report import (
    ERROR,
    NOTE,
    OK,
    UNKNOWN,
    Finding,
    Report,
    as_json,
    as_text,
    error,
    failed,
    findings,
    note,
    ok,
    verdict,
)
from imageos.checks.variants import Variant, check_hooks
from imageos.errors import Failure
from imageos.node import mounts, sysfs
from imageos.settings import Settings


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """Return a /sys/block with the leftovers of crashed runs, and with devices of other programs."""
    files = {
        "loop0/loop": {"backing_file": "/srv/ganeti/file-storage/inst1/disk0", "autoclear": "0"},
        "loop1/loop": {"backing_file": "/var/lib/snapd/snaps/core.snap", "autoclear": "1"},
        "loop2/loop": {"backing_file": "/dev/vg/disk", "autoclear": "0"},
        "loop3/loop": {"backing_file": "/srv/mounted", "autoclear": "0"},
        "loop4/loop": {"backing_file": "/srv/with partitions mounted", "autoclear": "0"},
        "loop5/loop": {"backing_file": "/srv/held", "autoclear": "0"},
        "loop5/holders": {"dm-0": ""},
        "loop6": {"size": "0"},
        "loop7/loop": {"backing_file": "/srv/a loop is over it", "autoclear": "0"},
        "loop8/loop": {"backing_file": "/dev/loop7", "autoclear": "1"},
        "dm-0/dm": {"name": "xenvg-inst1.disk0-1", "uuid": "part1-LVM-abc"},
        "dm-1/dm": {"name": "xenvg-inst1.disk0", "uuid": "LVM-abc"},
        "dm-2/dm": {"name": "mpatha-part1", "uuid": "part1-mpath-3600"},
        "dm-3/dm": {"name": "loop0-1", "uuid": "part1-devnode_7:0_x"},
        "sda": {"size": "8"},
    }
    for directory, entries in files.items():
        (tmp_path / "block" / directory).mkdir(parents=True, exist_ok=True)
        for name, text in entries.items():
            (tmp_path / "block" / directory / name).write_text(text + "\n")
    return tmp_path / "block"


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 253:2 / /tmp/tmp.aBcDeF1234 rw - ext3 /dev/mapper/xenvg-inst1.disk0-3 rw
41 22 7:9 / /tmp/inst2.example.org_root rw - ext4 /dev/loop9p3 rw
42 22 0:30 / /tmp/tmp.mine123456 rw - tmpfs tmpfs rw
45 41 7:9 / /tmp/inst2.example.org_root/boot rw - ext4 /dev/loop9p1 rw
43 22 7:3 / /mnt/with\\040space rw - ext4 /dev/loop3 rw
44 22 7:4 / /mnt/other rw - ext4 /dev/loop4p1 rw
"""


@pytest.mark.parametrize(("os_dir", "level"), [("/usr/share/ganeti/os/image", ERROR), ("/opt/trial/image", NOTE)])
def test_a_definition_that_ganeti_does_not_run(os_dir: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definition, "not_in_use", lambda root, where: Failure(f"not {where}", hint="move"))
    assert [(found.level, found.what, found.hint) for found in check_in_use(os_dir)] == [
        (level, f"not {os_dir}", "move")
    ]
    monkeypatch.setattr(definition, "not_in_use", lambda root, where: None)
    assert not list(check_in_use(os_dir))


def test_what_others_can_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, defaults = tmp_path / "site", tmp_path / "defaults"
    for path in (site / "hooks/grub", site / "variants/a.conf", site / "overlays/web", defaults):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (site / "hooks/link").symlink_to("/nonexistent")
    monkeypatch.setattr("imageos.settings.SITE_DIR", str(site))
    monkeypatch.setattr("imageos.settings.DEFAULTS_FILE", str(defaults))
    assert not list(check_owners())
    for path in (site / "hooks", site / "variants/a.conf"):
        path.chmod(0o777)
    os.chown(defaults, 1000, 0)
    os.chown(site / "overlays/web", 1000, 0)  # of the guest
    (found,) = check_owners()
    assert found.level == NOTE
    assert found.what.partition(": ")[2].split(", ") == [
        str(path) for path in (defaults, site / "variants/a.conf", site / "hooks")
    ]
    places = f"{defaults} {site}/variants {site}/hooks {site}/networks"
    assert found.hint == f"chown -R root {places}; chmod -R o-w {places}"


def test_leftovers_with_their_commands(block: Path) -> None:
    found = list(leftovers(mounts.parse(MOUNTS), str(block)))
    assert [each.hint.partition(" (")[0] for each in found] == [
        "umount -R /tmp/tmp.aBcDeF1234 && rmdir /tmp/tmp.aBcDeF1234",
        "umount-disks inst2.example.org",
        "dmsetup remove xenvg-inst1.disk0-1",
        "dmsetup remove loop0-1",
        "losetup -d /dev/loop0",
        "losetup -d /dev/loop2",
    ]
    assert {each.level for each in found} == {NOTE}, "it can deploy nevertheless"


@pytest.mark.parametrize("place", ["/tmp/x;id;_root", "/tmp/$(id)_root", "/tmp/x\\040y_root", "/tmp/-x_root"])
def test_no_command_is_made_of_what_is_no_name(place: str, tmp_path: Path) -> None:
    (tmp_path / "block").mkdir()
    mounted = mounts.parse(f"41 22 0:60 / {place} rw - fuse.x /dev/loop0 rw\n")
    assert not list(leftovers(mounted, str(tmp_path / "block")))


def test_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "block").mkdir()
    monkeypatch.setattr(mounts, "current", lambda: mounts.parse(MOUNTS)[:1])
    monkeypatch.setattr(sysfs, "BLOCK", str(tmp_path / "block"))
    assert [(found.level, found.what) for found in check_leftovers()] == [(OK, "none")]


@pytest.mark.parametrize(
    ("settings", "programs"),
    [
        (Settings(image_name="x", image_type="tarball", filesystem="ext4"), {"sfdisk", "mkfs.ext4", "mkswap", "tar"}),
        (Settings(image_name="x", image_type="tarball", filesystem="xfs", swap=False), {"mkfs.ext4", "mkfs.xfs"}),
        (Settings(image_name="x", image_type="dump"), {"restore", "mkfs.ext3"}),
        (Settings(image_name="x", image_type="tarball", partition_table="gpt"), {"mkfs.vfat"}),
        (Settings(image_name="x", image_type="qcow2"), {"qemu-img"}),
        (Settings(image_name="x", image_type="raw", image_keyring="/k"), {"dd", "gpgv"}),
        (Settings(image_name="x", image_url="http://h/"), {"curl"}),
    ],
)
def test_programs_of_a_variant(settings: Settings, programs: set[str]) -> None:
    assert programs <= set(programs_for(Variant("v", settings)))


@pytest.mark.parametrize(("table", "needed"), [("gpt", True), ("msdos", False)])
def test_program_that_fills_the_esp(table: str, needed: bool, tmp_path: Path) -> None:
    hook = tmp_path / "grub"
    hook.touch(0o644)
    settings = Settings(image_name="x", image_type="tarball", partition_table=table, customize_dir=str(tmp_path))
    assert "mcopy" not in programs_for(Variant("v", settings)), "the hook is off"
    hook.chmod(0o755)
    assert ("mcopy" in programs_for(Variant("v", settings))) == needed


@pytest.mark.parametrize("settings", [Settings(), Settings(image_name="x", cdinstall=True)])
def test_nothing_is_needed_where_no_image_is_named(settings: Settings) -> None:
    assert list(programs_for(Variant("v", settings))) == []


def test_hooks_of_variants(tmp_path: Path) -> None:
    """Each directory is checked once. A missing one does not prevent a deployment, a file in its place does."""
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/mine").write_text("#!/bin/sh\n")
    (tmp_path / "hooks/mine").chmod(0o755)
    (tmp_path / "file").touch()
    (tmp_path / "windows").mkdir()
    (tmp_path / "windows/theirs").write_bytes(b"#!/bin/sh\r\n")
    (tmp_path / "windows/theirs").chmod(0o755)
    directories = ("file", "hooks", "hooks", "missing", "windows")
    found = check_hooks([Variant("v", Settings(customize_dir=f"{tmp_path}/{name}")) for name in directories])
    assert [(each.level, each.what.replace(str(tmp_path), "")) for each in found] == [
        (ERROR, "cannot list CUSTOMIZE_DIR /file: Not a directory"),
        (OK, "hooks: mine"),
        (NOTE, "there is no CUSTOMIZE_DIR /missing: no hook runs"),
        (ERROR, "hook /windows/theirs cannot be run: its lines end in CRLF, as those of Windows do"),
    ]


def example() -> Report:
    missing = error("zstd is missing: needed by variant a", "install zstd")
    return {"programs": [ok("tar 1.34"), missing, ok("sfdisk 2.38")], "images": [note("caf\u00e9 " * 30)]}


def test_text() -> None:
    text = as_text(example(), colour=False)
    assert "  ok     tar 1.34, sfdisk 2.38\n  ERROR  zstd is missing" in text
    assert "         -> install zstd\n" in text
    assert text.endswith("\n1 error: this node cannot deploy all its variants\n")
    assert text.isascii() and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_colour() -> None:
    text = as_text(example(), colour=True)
    assert "\x1b[1;31mERROR\x1b[0m" in text
    assert "\x1b[32mok   \x1b[0m" in text


def test_json() -> None:
    found = json.loads(as_json(example()))
    assert found["can_deploy"] is False
    assert found["findings"][1] == {
        "area": "programs",
        "level": "error",
        "what": "zstd is missing: needed by variant a",
        "hint": "install zstd",
    }


@pytest.mark.parametrize(
    "release, level", [("5.7.19-generic", ERROR), ("5.8.0", OK), ("4.19.0-27-amd64", ERROR), ("6.12.1", OK)]
)
def test_oldest_kernel(release: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    first = next(check_kernel())
    assert (first.level, first.what) == (level, f"Linux {release}")
    assert ("5.8 or newer" in first.hint) == (level == ERROR)


@pytest.mark.parametrize("version, level", [("3.8.18", ERROR), ("3.9.2", OK), ("3.10.0", OK), ("2.7.18", ERROR)])
def test_oldest_python(version: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/bin/python3")
    monkeypatch.setattr("imageos.checks.definition.version_of", lambda _: version)
    assert [(found.level, found.what) for found in check_python()] == [(level, f"/bin/python3 {version}")]


def test_what_a_user_may_not_read_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    unread = failed(Failure("cannot read image /x: Permission denied"))
    assert unread.level == UNKNOWN
    assert verdict({"images": [unread]}) == "this node can deploy its variants, as far as could be seen"
    assert failed(Failure("cannot find image /y")).level == ERROR


def test_a_check_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    """The checks after it are made nevertheless."""

    def cannot_look() -> Iterator[Finding]:
        yield ok("before")
        yield from map(ok, (tmp_path / "missing").read_text())

    def fails() -> Iterator[Finding]:
        if tmp_path.exists():
            raise Failure("it fails", "mend it")
        yield ok("it works")

    found = list(findings([cannot_look(), fails(), iter([ok("after")])]))
    assert [(each.level, each.hint) for each in found] == [(OK, ""), (UNKNOWN, ""), (ERROR, "mend it"), (OK, "")]
    assert found[1].what == f"{tmp_path}/missing: No such file or directory: not all was looked at"


@pytest.mark.parametrize("program, version, said", [
    ("restore", 46, ["cannot read", "attributes of directories"]),
    ("restore", 47, ["cannot read", "attributes of directories"]),
    ("restore", 49, ["capabilities of files"]),
    ("dump", 47, []),
    ("dump", 49, ["cannot read"]),
    ("dump", None, []),
])  # fmt: skip
def test_what_is_to_be_known_of_dump(program: str, version: int | None, said: list[str]) -> None:
    assert [word in line for word, line in zip(said, limits(program, version))] == [True] * len(said)
    assert len(list(limits(program, version))) == len(said)
