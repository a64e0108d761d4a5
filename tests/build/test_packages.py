"""The packages: built, judged, installed in a Debian, in the place of the ancestor's, removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bare import inside, unpack_bare
from checkouts import CHECKOUT

NAME = "ganeti-instance-image"
OS_DIR = "usr/share/ganeti/os/image"
SITE = "etc/ganeti/instance-image"
DEFAULTS = "etc/default/ganeti-instance-image"
SCRIPTS = ("create", "import", "export", "rename", "verify")
TOOLS = ("mount-disks", "umount-disks", "make-dump", "make-qemu-img", "ganeti-image")
APT = ("apt-get", "--yes", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold")


def output(*argv: object) -> str:
    done = subprocess.run([str(word) for word in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def done(root: Path, *command: str) -> str:
    ended = inside(root, "env", "DEBIAN_FRONTEND=noninteractive", *command)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def packages(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both packages, by kind."""
    place = tmp_path_factory.mktemp("packages")
    for kind in ("deb", "rpm"):
        output(sys.executable, CHECKOUT / "build.py", kind)
        (built,) = (CHECKOUT / "dist").glob(f"{NAME}*.{kind}")
        shutil.copy(built, place / f"{NAME}.{kind}")
    return {kind: place / f"{NAME}.{kind}" for kind in ("deb", "rpm")}


@pytest.fixture(scope="module")
def bare(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian that can install the package, which is /new.deb there."""
    root = unpack_bare(tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("debootstrap"))
    shutil.copy(packages["deb"], root / "new.deb")
    done(root, "apt-get", "update")
    return root


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def listing(tree: Path) -> dict[str, object]:
    """Every file and link below `tree`, and the empty directories."""
    found: dict[str, object] = {}
    for directory, directories, names in os.walk(tree):
        for name in names + [one for one in directories if os.path.islink(os.path.join(directory, one))]:
            path = Path(directory, name)
            content = os.readlink(path) if path.is_symlink() else (path.read_bytes(), path.stat().st_mode)
            found[str(path.relative_to(tree))] = content
        if not names and not directories:
            found[str(Path(directory).relative_to(tree))] = None
    return found


def test_lintian_has_nothing_to_say(packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # it leaves files in there
    assert output("lintian", "--allow-root", packages["deb"]) == ""


def test_what_is_in_both_is_what_install_puts_in_place(
    packages: dict[str, Path], imageos: Path, tmp_path: Path
) -> None:
    wanted, deb, rpm = tmp_path / "wanted", tmp_path / "deb", tmp_path / "rpm"
    for directory in (wanted, rpm):
        directory.mkdir()
    output(imageos, "install", "--root", wanted, "--bin-dir", "/usr/sbin")
    output("dpkg-deb", "--extract", packages["deb"], deb)
    output("rpm", "--root", rpm, "--nodeps", "--noscripts", "--install", packages["rpm"])
    for link in (wanted / "usr/sbin").iterdir():
        link.unlink()
        link.symlink_to("../share/ganeti/os/image/imageos")
    (wanted / OS_DIR / "installed.json").write_text(f'{{"package": "{NAME}"}}\n')
    everything = listing(wanted)
    for tree in (deb, rpm):
        assert {path: what for path, what in listing(tree).items() if path in everything} == everything
    extra = {path for path in listing(deb) if path not in everything}
    assert {path.split("/")[2] for path in extra} == {"bash-completion", "doc", "lintian", "man", "zsh"}


def test_configuration_is_marked_as_such(packages: dict[str, Path]) -> None:
    conffiles = output("dpkg-deb", "--info", packages["deb"], "conffiles").split()
    assert {f"/{DEFAULTS}", f"/{SITE}/variants.list", f"/{SITE}/variants/default.conf", f"/{SITE}/hooks/grub"} <= {
        *conffiles
    }
    assert output("rpm", "-qp", "--configfiles", packages["rpm"]).split() == conffiles


def test_same_bytes_again(packages: dict[str, Path]) -> None:
    for kind, package in packages.items():
        output(sys.executable, CHECKOUT / "build.py", kind)
        (built,) = (CHECKOUT / "dist").glob(f"{NAME}*.{kind}")
        assert built.read_bytes() == package.read_bytes(), kind


def test_installed_by_apt(bare: Path) -> None:
    """With what it depends on; where automation that was written for the ancestor looks for it; until it is purged."""
    done(bare, *APT, "install", "/new.deb")
    assert done(bare, "imageos", "--version").startswith("imageos ")
    for program in ("sfdisk", "mkfs.ext4", "mkswap", "tar"):
        done(bare, "which", program)
    for directory in ("variants", "hooks", "overlays", "networks/instances", "networks/subnets"):
        assert (bare / SITE / directory).is_dir()
    assert (bare / SITE / "variants.list").read_text() == "default\n"
    assert done(bare, "dpkg", "--verify", NAME) == ""
    for command in ("install", "uninstall"):
        refused = inside(bare, "imageos", command)
        assert refused.returncode == 1
        assert refused.stdout.splitlines()[-1].endswith(f"belongs to the package {NAME}")
    (bare / SITE / "variants/debian.conf").write_text("IMAGE_NAME=debian\n")
    done(bare, "apt-get", "--yes", "purge", NAME)
    left = [path for top in ("etc/ganeti", "usr/share/ganeti") for path in listing(bare / top)]
    assert left == ["instance-image/variants/debian.conf"]
    assert not (bare / DEFAULTS).exists()
    shutil.rmtree(bare / SITE)


ANCESTOR = f"""\
Package: {NAME}
Version: 0.7.3
Architecture: all
Maintainer: Somebody <somebody@example.org>
Description: the ancestor
"""


def ancestor(place: Path) -> Path:
    """A package as the ancestor's is: scripts, links into /etc, configuration files."""
    tree = place / "ancestor"
    write(
        tree,
        {
            **{
                f"{OS_DIR}/{name}": "#!/bin/bash\n. common.sh\n"
                for name in (*SCRIPTS, *(f"tools/{one}" for one in TOOLS))
            },
            f"{OS_DIR}/common.sh": "# the ancestor's\n",
            f"{OS_DIR}/ganeti_api_version": "20\n",
            DEFAULTS: '# SWAP="yes"\n',
            f"{SITE}/variants.list": "default\n",
            f"{SITE}/parameters.list": "swap Whether to make swap\n",
            f"{SITE}/variants/default.conf": "",
            f"{SITE}/hooks/grub": "#!/bin/bash\n# the ancestor's grub\n",
            f"{SITE}/hooks/interfaces": "#!/bin/bash\n# the ancestor's interfaces\n",
            "DEBIAN/control": ANCESTOR,
        },
    )
    for name in ("variants.list", "parameters.list"):
        (tree / OS_DIR / name).symlink_to(f"/{SITE}/{name}")
    files = [path for path in (tree / "etc").rglob("*") if path.is_file()]
    (tree / "DEBIAN/conffiles").write_text("".join(f"/{path.relative_to(tree)}\n" for path in files))
    package = place / "ancestor.deb"
    output("dpkg-deb", "--root-owner-group", "--build", tree, package)
    return package


def test_upgrade_of_the_ancestors_package(bare: Path, tmp_path: Path) -> None:
    """Files that the admin changed stay as they are, those that nobody changed become the new ones."""
    shutil.copy(ancestor(tmp_path), bare / "old.deb")
    done(bare, "dpkg", "--install", "/old.deb")
    site = {
        DEFAULTS: 'SWAP="no"\nIMAGE_DIR="/srv/images"\n',
        f"{SITE}/variants.list": "default\ncentos-6\n",
        f"{SITE}/variants/centos-6.conf": 'IMAGE_NAME="centos-6.6"\n',
        f"{SITE}/hooks/interfaces": "#!/bin/bash\n# the site's\n",
        f"{SITE}/networks/subnets/vlan100": 'NETMASK="255.255.255.0"\n',
    }
    write(bare, site)
    (bare / SITE / "hooks/grub").chmod(0o755)
    done(bare, *APT, "install", "/new.deb")
    assert "Status: install ok installed" in done(bare, "dpkg", "--status", NAME)
    for path, text in site.items():
        assert (bare / path).read_text() == text, path
    grub = bare / SITE / "hooks/grub"
    assert "ancestor" not in grub.read_text()
    assert os.access(grub, os.X_OK), "it was enabled"
    for name in (*SCRIPTS, *(f"tools/{one}" for one in TOOLS)):
        assert (bare / OS_DIR / name).resolve() == bare / OS_DIR / "imageos"
    assert not (bare / OS_DIR / "parameters.list").is_symlink()
    assert "filesystem " in (bare / OS_DIR / "parameters.list").read_text()
    assert (bare / OS_DIR / "ganeti_api_version").read_text() == "20\n15\n10\n"
    done(bare, "apt-get", "--yes", "remove", NAME)
    for path, text in site.items():
        assert (bare / path).read_text() == text, path
