"""Upgrades by install, and uninstall: what the site has changed stays."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from definitions import OS_DIR, SITE_DIR, call
from definitions import root as root
from definitions import shipped as shipped

from imageos import installation, settings
from imageos.commands import install
from imageos.errors import Failure


def tree(root: Path) -> dict[str, object]:
    """Return every path with its type and content."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes(), path.stat().st_mode)
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


def newer(package: Path) -> None:
    """Give the package another default.conf, defaults file and hook."""
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
    trials = root / installation.TRIALS.lstrip("/")
    trials.mkdir(parents=True)
    for name in ("debian-13.json", "debian-13.json.1234.tmp"):  # the second of a trial that was killed
        (trials / name).write_text("{}")
    assert call("uninstall", root) == 0
    assert [path for path in root.rglob("*") if not path.is_dir()] == []
    for directory in (OS_DIR, SITE_DIR, settings.CACHE_DIR, os.path.dirname(installation.TRIALS)):
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
        file = root / path.lstrip("/")
        file.unlink(missing_ok=True)
        file.write_text(text)
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


@pytest.mark.parametrize("kind", ["script", "link", "dangling link"])
def test_a_command_of_the_sites_is_kept(
    kind: str, shipped: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = root / "usr/local/sbin/make-dump"
    command.parent.mkdir(parents=True)
    if kind == "script":
        command.write_text("#!/bin/sh\n")
    else:
        command.symlink_to("/bin/true" if kind == "link" else "/opt/site/make-dump")
    before = tree(command.parent)
    call("install", root)
    assert f"warning: {command} is the site's own, and kept" in capfd.readouterr().err
    assert tree(command.parent)["make-dump"] == before["make-dump"]
    call("uninstall", root)
    assert tree(command.parent) == before


@pytest.mark.parametrize("leads_to", [f"{OS_DIR}/tools/make-dump", "/srv/ganeti/os/image/imageos"])
def test_a_command_that_leads_to_an_old_definition_is_replaced(leads_to: str, shipped: Path, root: Path) -> None:
    command = root / "usr/local/sbin/make-dump"
    command.parent.mkdir(parents=True)
    command.symlink_to(leads_to)
    call("install", root)
    assert os.readlink(command) == f"{OS_DIR}/imageos"


def test_another_place_for_the_commands(shipped: Path, root: Path) -> None:
    """What the first install has put there stays ours, and is removed with the rest."""
    install.main(["--root", str(root), "--bin-dir", "/opt/bin"])
    call("install", root)
    assert sorted(os.listdir(root / "opt/bin")) == sorted(os.listdir(root / "usr/local/sbin"))
    call("uninstall", root)
    assert [path for path in root.rglob("*") if not path.is_dir()] == []


def test_what_a_killed_install_has_left(shipped: Path, root: Path) -> None:
    call("install", root)
    before = tree(root)
    for path in (f"{OS_DIR}/imageos", f"{SITE_DIR}/hooks/grub", "/usr/local/sbin/mount-disks"):
        (root / f"{path[1:]}.0123abcd.tmp").write_text("half")
    (root / f"{SITE_DIR[1:]}/hooks/grub.mine.tmp").write_text("the site's")
    call("install", root)
    (root / f"{SITE_DIR[1:]}/hooks/grub.mine.tmp").unlink()
    assert tree(root) == before


@pytest.mark.parametrize(
    ("there", "ours", "warns"),
    [
        *[("1.1", "1.0", True), ("1.1", "1.1.dev0", True), ("1.10", "1.9", True), ("1.1.1", "1.1", True)],
        *[("1.0", "1.1", False), ("1.1.dev0", "1.1", False), ("1.1", "1.1", False), ("", "1.0", False)],
    ],
)
def test_an_older_version(
    there: str, ours: str, warns: bool, shipped: Path, root: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It is installed, with a warning; a file that is no program of ours is just replaced."""
    program = root / OS_DIR[1:] / "imageos"
    program.parent.mkdir(parents=True)
    program.write_text("something else")
    if there:
        program.write_bytes(b"#!\n\xff" + f'"""imageos"""\n\n__version__ = "{there}"\n'.encode() + b"PK\xff")
    monkeypatch.setattr(install, "__version__", ours)
    call("install", root)
    warning = f"warning: imageos {there} is replaced by an older version, {ours}"
    assert (warning in capfd.readouterr().err) is warns
    assert program.read_bytes() == Path(installation.program_file()).read_bytes()


def test_a_record_of_a_newer_version(shipped: Path, root: Path) -> None:
    call("install", root)
    record = root / OS_DIR[1:] / installation.RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "more": 1}))
    call("install", root)
    call("uninstall", root)
    assert [path for path in root.rglob("*") if not path.is_dir()] == []


def test_two_at_once(shipped: Path, root: Path) -> None:
    """The second waits until the first has ended."""
    os_dir = root / OS_DIR[1:]
    with install.alone(str(os_dir)):
        descriptor = os.open(os_dir, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_uninstall_knows_where_the_commands_are(shipped: Path, root: Path) -> None:
    install.main(["--root", str(root), "--bin-dir", "/opt/bin"])
    call("uninstall", root)
    assert list((root / "opt/bin").iterdir()) == []


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_a_package_has_installed_is_left_to_it(command: str, shipped: Path, root: Path) -> None:
    call("install", root)
    record = root / OS_DIR.lstrip("/") / installation.RECORD
    record.write_text('{"package": "ganeti-instance-image"}')
    before = tree(root)
    with pytest.raises(Failure, match="belongs to the package ganeti-instance-image"):
        call(command, root)
    assert tree(root) == before


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"files": 1}', '{"links": {"/x": 1}}', '{"files": {"/x": null}}'])
def test_damaged_record(text: str, shipped: Path, root: Path) -> None:
    call("install", root)
    (root / OS_DIR.lstrip("/") / installation.RECORD).write_text(text)
    for command in ("install", "uninstall"):
        with pytest.raises(Failure, match="installed.json is damaged"):
            call(command, root)


@pytest.mark.parametrize("name", ["/../outside/{}", "../outside/{}", "/etc/../../outside/{}", "/leads/{}"])
def test_nothing_is_removed_outside(name: str, shipped: Path, root: Path, tmp_path: Path) -> None:
    """For any record, and wherever links lead."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("text")
    (outside / "link").symlink_to("target")
    (root / "leads").symlink_to(outside)
    with_file = json.dumps({"files": {name.format("file"): installation.digest(b"text")}, "links": {"/x": "y"}})
    for record in (with_file, json.dumps({"links": {name.format("link"): "target"}})):
        file = root / OS_DIR.lstrip("/") / installation.RECORD
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record)
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
    """Its scripts are replaced, also if they are links; its files in /etc and /var stay unchanged."""
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
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ancestor.get(path, "#!/bin/bash\n"))
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
    assert (os_dir / "parameters.list").read_text() == installation.parameters_list()
    assert not (os_dir / "parameters.list").is_symlink()
    call("uninstall", root)
    for path, text in ancestor.items():
        assert (root / path.lstrip("/")).read_text() == text, path
