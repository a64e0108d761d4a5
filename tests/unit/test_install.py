"""install puts everything in place, once, and never overwrites changes of the site."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from definitions import OS_DIR, SITE_DIR, call
from definitions import root as root
from definitions import shipped as shipped
from hookfiles import HOOKS

import build
from imageos import installation, settings
from imageos.commands import install
from imageos.errors import Failure, Usage
from imageos.installation import Entry, Record


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
    record = {"/hooks/grub": installation.digest(b"shipped 1")}
    assert install.put(str(root), Entry("/hooks/grub", b"shipped 2", site=True), record)
    assert (root / "hooks/grub").read_text() == "shipped 2"
    assert os.access(root / "hooks/grub", os.X_OK), "the site has enabled it"
    assert os.listdir(root / "hooks") == ["grub"]


def test_link_of_the_site_is_kept(root: Path) -> None:
    """Some sites have links from /etc into a checkout."""
    (root / "managed").write_text("shipped 1")
    (root / "conf").symlink_to(root / "managed")
    record = {"/conf": installation.digest(b"shipped 1")}
    assert install.put(str(root), Entry("/conf", b"shipped 2", site=True), record)
    assert (root / "managed").read_text() == "shipped 1"
    assert (root / "conf.new").read_text() == "shipped 2"


def test_link_of_the_site_that_leads_nowhere_is_kept(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What it leads to is perhaps not mounted yet."""
    path = root / "etc/default/site"
    path.parent.mkdir(parents=True)
    path.symlink_to("/nonexistent/site")
    assert install.put(str(root), Entry("/etc/default/site", b"two", site=True), {})
    assert os.readlink(path) == "/nonexistent/site"
    assert Path(f"{path}.new").read_bytes() == b"two"
    assert f"{path} is kept" in capfd.readouterr().err


@pytest.mark.parametrize("link", ["", "/nonexistent"])
def test_what_is_no_directory_is_named(link: str, root: Path) -> None:
    path = root / "etc/ganeti/instance-image/overlays"
    path.parent.mkdir(parents=True)
    path.symlink_to(link) if link else path.write_text("")
    with pytest.raises(Failure, match=f"{path} is a .*: it should be a directory") as raised:
        install.put_all(str(root), [], Record(), "/installed.json")
    assert f"rm {path}" in str(raised.value.hint)


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
    """ganeti-instance-image has a link into /etc as parameters.list."""
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


@pytest.mark.parametrize("entry", [Entry("/x", link="imageos"), Entry("/x", b"text"), Entry("/x", b"text", site=True)])
def test_fifo_in_the_way(entry: Entry, root: Path) -> None:
    os.mkfifo(root / "x")
    with pytest.raises(Failure, match=f"^{root}/x is no regular file, it should be a (link|file)$"):
        install.put(str(root), entry)


@pytest.mark.parametrize("entry", [Entry("/x", link="imageos"), Entry("/x", b"text")])
def test_failed_write_leaves_nothing(entry: Entry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(Failure, match=f"^cannot write {root}/x: No space left on device$"):
        install.put(str(root), entry)
    assert os.listdir(root) == []


# The whole definition


def everything() -> list[Entry]:
    return list(installation.entries(OS_DIR, "/usr/local/sbin"))


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
        assert f"{SITE_DIR}/{directory}" in installation.DIRECTORIES
    assert "/var/cache/ganeti-instance-image" in installation.DIRECTORIES


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
            path = os.path.join(os.path.dirname(entry.path), entry.link)
            assert os.path.exists(f"{root}{path}"), f"{entry.path} -> {entry.link}"


def changed(path: Path) -> tuple[int, int]:
    """Return attributes that every change alters; reading alters only the access time, which is not among them."""
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
    assert (root / "srv/ganeti/os/image/imageos").read_bytes() == Path(installation.program_file()).read_bytes()
    assert not (root / "usr/share/ganeti").exists()
    assert install.main(["--root", str(root), "--os-dir", "/srv/ganeti/os/image", "--bin-dir", "/usr/sbin"]) == 0
    assert "nothing had to be changed" in capfd.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--root="], ["--os-dir="], ["--os-dir=image"], ["--bin-dir="], ["--bin-dir=sbin"], ["--os-dir=/"]]
)
def test_wrong_directories(wrong: list[str], shipped: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a variable that is not set; nothing is put there, or where we are."""
    monkeypatch.chdir(root)
    with pytest.raises(Usage, match=wrong[0].partition("=")[0]):
        install.main([f"--root={root}", *wrong])
    assert not list(root.iterdir())


def test_source_tree_cannot_be_installed(root: Path) -> None:
    with pytest.raises(Failure, match="from the built file only") as raised:
        install.main(["--root", str(root)])
    assert "build.py" in str(raised.value.hint)


# Ganeti's formats


def test_parameters_list() -> None:
    """Each line is `name description`: anything else breaks gnt-cluster verify or gnt-os info."""
    text = installation.parameters_list()
    lines = text.splitlines()
    assert text.endswith("\n")
    assert all(re.fullmatch(r"[a-z_-]+ [!-~][ -~]*", line) for line in lines)
    assert [line.split()[0] for line in lines] == [*settings.PARAMETERS, *settings.RESERVED]


def test_variants_list() -> None:
    text = (build.CHECKOUT / "defaults/variants.list").read_text()
    assert "default" in text.splitlines()
    for line in text.splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_-]+", line)


# What Ganeti runs

CONSTANTS = 'OS_NAME = 1\nOS_SEARCH_PATH = ["/opt/os","/usr/share/ganeti/os"]\n'


def told(root: Path, os_dir: str = OS_DIR) -> str:
    problem = installation.not_in_use(str(root), os_dir)
    return f"{problem} ({problem.hint})" if problem else ""


@pytest.mark.parametrize("first", ["/srv/ganeti/os", "/usr/local/lib/ganeti/os", "/usr/lib/ganeti/os"])
def test_an_old_definition_is_found_first(
    first: str, shipped: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty or broken one, too: Ganeti takes the first directory of the name."""
    (root / first[1:] / "image").mkdir(parents=True)
    call("install", root)
    move = f"mv {first}/image {os.path.dirname(first)}/image.old"
    assert capfd.readouterr().err.splitlines()[-2:] == [
        f"imageos: hint: on every node, move it away: {move}",
        f"imageos: warning: Ganeti uses the OS definition in {first}/image, not that in {OS_DIR}: it looks there first",
    ]
    os.rename(root / first[1:] / "image", root / os.path.dirname(first)[1:] / "image.old")
    call("install", root)
    assert "warning" not in capfd.readouterr().err


def test_a_link_to_ours_is_ours(shipped: Path, root: Path) -> None:
    call("install", root)
    (root / "srv/ganeti/os").mkdir(parents=True)
    (root / "srv/ganeti/os/image").symlink_to(f"{root}{OS_DIR}")
    assert told(root) == ""


@pytest.mark.parametrize(
    "place",
    [
        "etc/ganeti/share/ganeti",
        "usr/share/ganeti/3.1/ganeti",
        "usr/lib/python3.12/site-packages/ganeti",
        "usr/lib64/python3/dist-packages/ganeti",
    ],
)
def test_how_ganeti_was_built(place: str, root: Path) -> None:
    assert told(root) == ""
    (root / place).mkdir(parents=True)
    (root / place / "_constants.py").write_text(CONSTANTS)
    assert installation.search_path(str(root)) == ("/opt/os", "/usr/share/ganeti/os")
    (root / "opt/os/image").mkdir(parents=True)
    assert "Ganeti uses the OS definition in /opt/os/image" in told(root)
    looks = "it looks in /opt/os, /usr/share/ganeti/os (imageos install --os-dir /usr/share/ganeti/os/other)"
    assert told(root, "/srv/ganeti/os/other").endswith(looks)


@pytest.mark.parametrize("text", ["", "OS_SEARCH_PATH = [x]\n", "OS_SEARCH_PATH = 3\n"])
def test_constants_that_cannot_be_read(text: str, root: Path) -> None:
    (root / "etc/ganeti/share/ganeti").mkdir(parents=True)
    (root / "etc/ganeti/share/ganeti/_constants.py").write_text(text)
    assert installation.search_path(str(root)) == installation.SEARCH_PATH
