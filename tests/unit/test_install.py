"""What install puts in place: all of it, once, and never over what the site has changed."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
from hookfiles import HOOKS

import build
from imageos import settings
from imageos.commands import install, uninstall
from imageos.commands.install import Entry
from imageos.errors import Failure

OS_DIR = "/usr/share/ganeti/os/image"
SITE_DIR = "/etc/ganeti/instance-image"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    directory.mkdir()
    return directory


def put(root: Path, path: str, content: str = "new", mode: int = 0o644, site: bool = False) -> bool:
    return install.put(str(root), Entry(path, content.encode(), mode=mode, site=site))


def link(root: Path, path: str, text: str) -> bool:
    return install.put(str(root), Entry(path, link=text))


# One entry


def test_file(root: Path) -> None:
    assert put(root, "/a/b/file", mode=0o755)
    assert (root / "a/b/file").read_text() == "new"
    assert stat.S_IMODE((root / "a/b/file").stat().st_mode) == 0o755
    before = changed(root / "a/b/file")
    assert not put(root, "/a/b/file", mode=0o755)
    assert changed(root / "a/b/file") == before
    assert os.listdir(root / "a/b") == ["file"]


def test_own_file_is_replaced(root: Path) -> None:
    put(root, "/file", "old")
    old = (root / "file").open()
    assert put(root, "/file", "new")
    assert (root / "file").read_text() == "new"
    with old:
        assert old.read() == "old", "whoever has it open keeps the old one, whole"
    assert os.listdir(root) == ["file"]


def test_own_mode_is_set_right(root: Path) -> None:
    put(root, "/file", mode=0o755)
    (root / "file").chmod(0o644)
    assert put(root, "/file", mode=0o755)
    assert stat.S_IMODE((root / "file").stat().st_mode) == 0o755


def test_mode_is_not_that_of_the_umask(root: Path) -> None:
    os.umask(0o077)
    put(root, "/file", mode=0o644)
    assert stat.S_IMODE((root / "file").stat().st_mode) == 0o644


def test_site_file_is_kept(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert put(root, "/conf", "shipped 1", site=True)
    assert not put(root, "/conf", "shipped 1", site=True)
    (root / "conf").write_text("the site's")
    (root / "conf").chmod(0o600)
    assert put(root, "/conf", "shipped 2", site=True)
    assert (root / "conf").read_text() == "the site's"
    assert stat.S_IMODE((root / "conf").stat().st_mode) == 0o600
    assert (root / "conf.new").read_text() == "shipped 2"
    assert f"{root}/conf is kept" in capfd.readouterr().err
    assert not put(root, "/conf", "shipped 2", site=True)
    assert capfd.readouterr().err == ""
    assert put(root, "/conf", "shipped 3", site=True)
    assert (root / "conf.new").read_text() == "shipped 3"
    assert sorted(os.listdir(root)) == ["conf", "conf.new"]


def test_site_file_that_nobody_changed_is_replaced(root: Path) -> None:
    put(root, "/hooks/grub", "shipped 1", site=True)
    (root / "hooks/grub").chmod(0o755)
    known = {"/hooks/grub": install.digest(b"shipped 1")}
    assert install.put(str(root), Entry("/hooks/grub", b"shipped 2", site=True), known)
    assert (root / "hooks/grub").read_text() == "shipped 2"
    assert os.access(root / "hooks/grub", os.X_OK), "the site has enabled it"
    assert os.listdir(root / "hooks") == ["grub"]


def test_link_of_the_site_is_kept(root: Path) -> None:
    """Some manage /etc as links into a checkout."""
    (root / "managed").write_text("shipped 1")
    (root / "conf").symlink_to(root / "managed")
    known = {"/conf": install.digest(b"shipped 1")}
    assert install.put(str(root), Entry("/conf", b"shipped 2", site=True), known)
    assert (root / "managed").read_text() == "shipped 1"
    assert (root / "conf.new").read_text() == "shipped 2"


def test_what_was_offered_is_taken_away_once_it_is_taken_over(root: Path) -> None:
    put(root, "/conf", "the site's", site=True)
    put(root, "/conf", "shipped", site=True)
    (root / "conf").write_text("shipped")
    assert put(root, "/conf", "shipped", site=True)
    assert os.listdir(root) == ["conf"]
    (root / "conf.new").write_text("somebody's")
    assert not put(root, "/conf", "shipped", site=True)
    assert (root / "conf.new").read_text() == "somebody's"


def test_link_in_place_of_our_file_is_not_followed(root: Path, tmp_path: Path) -> None:
    """The ancestor's parameters.list is a link into /etc."""
    outside = tmp_path / "outside"
    outside.write_text("new")
    (root / "file").symlink_to(outside)
    assert put(root, "/file", "new")
    assert not (root / "file").is_symlink()
    assert outside.exists()


def test_site_may_enable_a_hook(root: Path) -> None:
    put(root, "/hooks/grub", "shipped", site=True)
    (root / "hooks/grub").chmod(0o755)
    assert not put(root, "/hooks/grub", "shipped", site=True)
    assert os.access(root / "hooks/grub", os.X_OK)


def test_empty_site_file_is_the_sites(root: Path) -> None:
    (root / "conf").touch()
    put(root, "/conf", site=True)
    assert (root / "conf").read_text() == ""


def test_link(root: Path) -> None:
    assert link(root, "/os/create", "imageos")
    assert os.readlink(root / "os/create") == "imageos"
    assert not link(root, "/os/create", "imageos")
    assert link(root, "/os/create", "other")
    assert os.readlink(root / "os/create") == "other"
    (root / "os/create").unlink()
    (root / "os/create").write_text("the ancestor's script")
    assert link(root, "/os/create", "imageos")
    assert os.readlink(root / "os/create") == "imageos"
    assert os.listdir(root / "os") == ["create"]


def test_link_to_a_directory_is_replaced(root: Path) -> None:
    (root / "directory").mkdir()
    (root / "link").symlink_to("directory")
    assert link(root, "/link", "imageos")
    assert os.readlink(root / "link") == "imageos"
    assert os.listdir(root / "directory") == []


@pytest.mark.parametrize("entry", [Entry("/x", link="imageos"), Entry("/x", b"text"), Entry("/x", b"text", site=True)])
def test_directory_in_the_way(entry: Entry, root: Path) -> None:
    (root / "x/y").mkdir(parents=True)
    with pytest.raises(Failure, match=f"^{root}/x is a directory, it should be a (link|file)$") as raised:
        install.put(str(root), entry)
    assert raised.value.hint == f"move it away: mv {root}/x {root}/x.old"
    assert (root / "x/y").is_dir()


@pytest.mark.parametrize("entry", [Entry("/x", link="imageos"), Entry("/x", b"text")])
def test_failed_write_leaves_nothing(entry: Entry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(Failure, match=f"^cannot write {root}/x: No space left on device$"):
        install.put(str(root), entry)
    assert os.listdir(root) == []


# All of it


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as it is in the built file: with defaults and hooks in it."""
    build.stage_sources(tmp_path / "stage")
    package = tmp_path / "stage/imageos"
    program = tmp_path / "imageos"
    program.write_text("the built file")
    monkeypatch.setattr("importlib.resources.files", lambda _: package)
    monkeypatch.setattr(install, "program_file", lambda: str(program))
    return package


def everything() -> list[Entry]:
    return list(install.entries(OS_DIR, "/usr/local/sbin"))


def test_paths_of_the_contract(shipped: Path) -> None:
    made = {entry.path: entry for entry in everything()}
    for name in ("create", "import", "export", "rename", "verify"):
        assert made[f"{OS_DIR}/{name}"].link
    for name in ("mount-disks", "umount-disks", "make-dump", "make-qemu-img", "ganeti-image"):
        assert made[f"{OS_DIR}/tools/{name}"].link == "../imageos"
        assert made[f"/usr/local/sbin/{name}"].link == f"{OS_DIR}/imageos"
    assert made[f"{OS_DIR}/variants.list"].link == f"{SITE_DIR}/variants.list"
    assert made[f"{OS_DIR}/ganeti_api_version"].content == b"20\n15\n10\n"
    assert made["/usr/local/sbin/imageos"].link == f"{OS_DIR}/imageos"
    for path in ("/etc/default/ganeti-instance-image", f"{SITE_DIR}/variants.list"):
        assert made[path].site
    for directory in ("variants", "hooks", "networks/subnets", "networks/instances", "overlays"):
        assert f"{SITE_DIR}/{directory}" in install.DIRECTORIES
    assert "/var/cache/ganeti-instance-image" in install.DIRECTORIES


def test_every_hook_is_installed_without_the_execute_bit(shipped: Path, root: Path) -> None:
    for entry in everything():
        install.put(str(root), entry)
    hooks = root / SITE_DIR.lstrip("/") / "hooks"
    assert sorted(os.listdir(hooks)) == list(HOOKS)
    for hook in hooks.iterdir():
        assert not hook.stat().st_mode & 0o111


def test_what_is_of_the_site(shipped: Path) -> None:
    for entry in everything():
        if not entry.link:
            assert entry.site is (not entry.path.startswith(OS_DIR))


def test_no_link_dangles_at_any_time(shipped: Path, root: Path) -> None:
    for entry in everything():
        install.put(str(root), entry)
        if entry.link:
            place = os.path.join(os.path.dirname(entry.path), entry.link)
            assert os.path.exists(f"{root}{place}"), f"{entry.path} -> {entry.link}"


def changed(path: Path) -> tuple[int, int]:
    """What any change changes; looking does not, unlike the time of the last access."""
    return path.lstat().st_ino, path.lstat().st_ctime_ns


def test_again_changes_nothing(shipped: Path, root: Path) -> None:
    assert {install.put(str(root), entry) for entry in everything()} == {True}
    before = {path: changed(path) for path in root.rglob("*")}
    assert {install.put(str(root), entry) for entry in everything()} == {False}
    assert {path: changed(path) for path in root.rglob("*")} == before


def test_no_path_twice(shipped: Path) -> None:
    paths = [entry.path for entry in everything()]
    assert len(paths) == len(set(paths))


def test_command(shipped: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert install.main(["--root", str(root), "--os-dir", "/srv/ganeti/os/image", "--bin-dir", "/usr/sbin"]) == 0
    assert stat.S_IMODE((root / "var/cache/ganeti-instance-image").stat().st_mode) == 0o700, "images hold secrets"
    assert "nothing had to be changed" not in capfd.readouterr().err
    assert os.readlink(root / "usr/sbin/imageos") == "/srv/ganeti/os/image/imageos"
    assert (root / "srv/ganeti/os/image/imageos").read_text() == "the built file"
    assert not (root / "usr/share/ganeti").exists()
    assert install.main(["--root", str(root), "--os-dir", "/srv/ganeti/os/image", "--bin-dir", "/usr/sbin"]) == 0
    assert "nothing had to be changed" in capfd.readouterr().err


def test_source_tree_cannot_be_installed(root: Path) -> None:
    with pytest.raises(Failure, match="from the built file only") as raised:
        install.main(["--root", str(root)])
    assert "build.py" in str(raised.value.hint)


# Upgrades, and the end


def call(command: str, root: Path) -> int:
    main = {"install": install.main, "uninstall": uninstall.main}[command]
    return main(["--root", str(root)])


def tree(root: Path) -> dict[str, object]:
    """Every path with what it is."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes(), path.stat().st_mode)
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


def newer(package: Path) -> None:
    """Make the package one with another default.conf, defaults file and hook."""
    for path in (package / "defaults/default.conf", package / "defaults/variants.list", package / "hooks.d/grub"):
        path.write_text(path.read_text() + "# of version 2\n")


def test_upgrade_replaces_what_nobody_changed(shipped: Path, root: Path) -> None:
    call("install", root)
    newer(shipped)
    call("install", root)
    site = root / SITE_DIR.lstrip("/")
    for name in ("variants/default.conf", "variants.list", "hooks/grub"):
        assert "of version 2" in (site / name).read_text()
    assert not list(root.rglob("*.new"))


def test_upgrade_keeps_what_the_site_changed(shipped: Path, root: Path) -> None:
    call("install", root)
    site = root / SITE_DIR.lstrip("/")
    for name in ("variants/default.conf", "variants.list", "hooks/grub"):
        (site / name).write_text(f"the site's {name}\n")
    newer(shipped)
    call("install", root)
    for name in ("variants/default.conf", "variants.list", "hooks/grub"):
        assert (site / name).read_text() == f"the site's {name}\n"
    assert sorted(path.name for path in root.rglob("*.new")) == ["default.conf.new", "grub.new"]
    before = tree(root)
    call("install", root)
    assert tree(root) == before


def test_what_was_removed_comes_back(shipped: Path, root: Path) -> None:
    call("install", root)
    before = tree(root)
    (root / SITE_DIR.lstrip("/") / "variants.list").unlink()
    (root / OS_DIR.lstrip("/") / "create").unlink()
    call("install", root)
    assert tree(root) == before


def test_uninstall_leaves_nothing_of_its_own(shipped: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call("install", root)
    assert call("uninstall", root) == 0
    assert [path for path in root.rglob("*") if not path.is_dir()] == []
    for directory in (OS_DIR, SITE_DIR, settings.CACHE_DIR):
        assert not (root / directory.lstrip("/")).exists()
    for directory in ("usr/share/ganeti/os", "etc/ganeti", "etc/default", "usr/local/sbin", "var/cache"):
        assert (root / directory).is_dir(), "not ours"
    assert "left" not in capfd.readouterr().err
    assert call("uninstall", root) == 0
    assert "nothing to remove" in capfd.readouterr().err


def test_uninstall_leaves_what_the_site_made(shipped: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call("install", root)
    kept = {
        f"{SITE_DIR}/variants/default.conf": "changed",
        f"{SITE_DIR}/hooks/mine": "made",
        "/etc/default/ganeti-instance-image": "changed",
        "/var/cache/ganeti-instance-image/debian-12-x86_64.tar.gz": "an image",
        f"{OS_DIR}/verify": "the site's own script",
    }
    for path, text in kept.items():
        place = root / path.lstrip("/")
        place.unlink(missing_ok=True)
        place.write_text(text)
    assert call("uninstall", root) == 0
    said = capfd.readouterr().err
    for path, text in kept.items():
        assert (root / path.lstrip("/")).read_text() == text
        assert f"left: {root}{path}\n" in said
    assert len([path for path in root.rglob("*") if not path.is_dir()]) == len(kept)
    assert not (root / SITE_DIR.lstrip("/") / "networks").exists()
    call("install", root)
    assert (root / SITE_DIR.lstrip("/") / "variants/default.conf").read_text() == "changed"


def test_uninstall_leaves_a_command_of_the_sites(shipped: Path, root: Path) -> None:
    call("install", root)
    command = root / "usr/local/sbin/make-dump"
    command.unlink()
    command.symlink_to("/opt/site/make-dump")
    call("uninstall", root)
    assert os.readlink(command) == "/opt/site/make-dump"
    assert os.listdir(command.parent) == ["make-dump"]


def test_uninstall_knows_where_the_commands_are(shipped: Path, root: Path) -> None:
    install.main(["--root", str(root), "--bin-dir", "/opt/bin"])
    call("uninstall", root)
    assert list((root / "opt/bin").iterdir()) == []


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_a_package_has_installed_is_left_to_it(command: str, shipped: Path, root: Path) -> None:
    call("install", root)
    record = root / OS_DIR.lstrip("/") / install.RECORD
    record.write_text('{"package": "ganeti-instance-image"}')
    before = tree(root)
    with pytest.raises(Failure, match="belongs to the package ganeti-instance-image"):
        call(command, root)
    assert tree(root) == before


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"files": 1}', '{"links": {"/x": 1}}', '{"files": {"/x": null}}'])
def test_damaged_record(text: str, shipped: Path, root: Path) -> None:
    call("install", root)
    (root / OS_DIR.lstrip("/") / install.RECORD).write_text(text)
    for command in ("install", "uninstall"):
        with pytest.raises(Failure, match="installed.json is damaged"):
            call(command, root)


@pytest.mark.parametrize("name", ["/../outside/{}", "../outside/{}", "/etc/../../outside/{}", "/leads/{}"])
def test_nothing_is_removed_outside(name: str, shipped: Path, root: Path, tmp_path: Path) -> None:
    """Whatever the record says, and wherever links lead."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("text")
    (outside / "link").symlink_to("target")
    (root / "leads").symlink_to(outside)
    known = json.dumps({"files": {name.format("file"): install.digest(b"text")}, "links": {"/x": "y"}})
    for record in (known, json.dumps({"links": {name.format("link"): "target"}})):
        place = root / OS_DIR.lstrip("/") / install.RECORD
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(record)
        with pytest.raises(Failure, match="leads out of"):
            call("uninstall", root)
    assert sorted(os.listdir(outside)) == ["file", "link"]


def test_nothing_is_installed_outside(shipped: Path, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "etc").symlink_to(outside)
    with pytest.raises(Failure, match="leads out of"):
        call("install", root)
    assert os.listdir(outside) == []


def test_ancestor_is_taken_over_with_its_configuration(shipped: Path, root: Path) -> None:
    """Its scripts are replaced, also where they are links; what is in /etc and /var stays as it was."""
    ancestor = {
        "/etc/default/ganeti-instance-image": 'SWAP="no"\n',
        f"{SITE_DIR}/variants.list": "centos-6\n",
        f"{SITE_DIR}/parameters.list": "swap Make swap\n",
        f"{SITE_DIR}/variants/default.conf": "",
        f"{SITE_DIR}/variants/centos-6.conf": 'IMAGE_NAME="centos-6.6"\n',
        f"{SITE_DIR}/hooks/grub": "#!/bin/bash\n. common.sh\n",
        f"{SITE_DIR}/networks/subnets/vlan100": "NETMASK=255.255.255.0\n",
        "/var/cache/ganeti-instance-image/centos-6.6-x86_64.tgz": "image",
    }
    scripts = ("create", "import", "export", "rename", "verify", "common.sh", "tools/mount-disks")
    for path in (*ancestor, *(f"{OS_DIR}/{name}" for name in scripts)):
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(ancestor.get(path, "#!/bin/bash\n"))
    (root / SITE_DIR.lstrip("/") / "hooks/grub").chmod(0o755)
    os_dir = root / OS_DIR.lstrip("/")
    for name in ("variants.list", "parameters.list"):
        (os_dir / name).symlink_to(f"{SITE_DIR}/{name}")
    (root / "usr/sbin").mkdir()

    call("install", root)
    for path, text in ancestor.items():
        assert (root / path.lstrip("/")).read_text() == text, path
    assert os.access(root / SITE_DIR.lstrip("/") / "hooks/grub", os.X_OK)
    for name in ("create", "import", "export", "rename", "verify", "tools/mount-disks"):
        assert (os_dir / name).resolve() == os_dir / "imageos"
    assert (os_dir / "parameters.list").read_text() == install.parameters_list()
    assert not (os_dir / "parameters.list").is_symlink()
    call("uninstall", root)
    for path, text in ancestor.items():
        assert (root / path.lstrip("/")).read_text() == text, path


# Ganeti's formats


def test_parameters_list() -> None:
    """One `name description` a line: anything else breaks gnt-cluster verify or gnt-os info."""
    text = install.parameters_list()
    lines = text.splitlines()
    assert text.endswith("\n")
    assert all(re.fullmatch(r"[a-z_-]+ [!-~][ -~]*", line) for line in lines)
    assert [line.split()[0] for line in lines] == [*settings.PARAMETERS, *settings.RESERVED]


def test_variants_list() -> None:
    text = (build.CHECKOUT / "defaults/variants.list").read_text()
    assert "default" in text.splitlines()
    for line in text.splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_-]+", line)
