"""The packages: build, check, install in a Debian, replace ganeti-instance-image's, remove."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import readme
from bare import inside, unpack_bare
from checkouts import CHECKOUT

NAME = "ganeti-instance-image"
OS_DIR = "usr/share/ganeti/os/image"
SITE = "etc/ganeti/instance-image"
DEFAULTS = "etc/default/ganeti-instance-image"
SCRIPTS = ("create", "import", "export", "rename", "verify")
TOOLS = ("mount-disks", "umount-disks", "make-dump", "make-qemu-img", "ganeti-image")
PACKAGE = "/root/ganeti-instance-image.deb"  # as README names it


def output(*argv: object) -> str:
    done = subprocess.run([str(word) for word in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def readme_install(root: Path) -> str:
    """Install or upgrade by the command of README, as `gnt-cluster command` runs it: without a terminal."""
    (command,) = re.findall(r"gnt-cluster command (apt-get .*)", readme.block("./build.py deb"))
    assert command.endswith(PACKAGE) and "Dpkg" not in command
    return done(root, "sh", "-c", command)


def done(root: Path, *command: str) -> str:
    ended = inside(root, *command)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def packages(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both packages; return them by kind."""
    place = tmp_path_factory.mktemp("packages")
    for kind in ("deb", "rpm"):
        output(sys.executable, CHECKOUT / "build.py", kind)
        (built,) = (CHECKOUT / "dist").glob(f"{NAME}*.{kind}")
        shutil.copy(built, place / f"{NAME}.{kind}")
    return {kind: place / f"{NAME}.{kind}" for kind in ("deb", "rpm")}


@pytest.fixture(scope="module")
def bare(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Debian that can install the package, which is there where README says."""
    root = unpack_bare(tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("debootstrap"))
    shutil.copy(packages["deb"], root / PACKAGE[1:])
    # not this test's: half of Debian
    (root / "etc/apt/apt.conf.d/small").write_text('APT::Install-Recommends "false";\n')
    done(root, "apt-get", "update")
    return root


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def listing(tree: Path) -> dict[str, object]:
    """Return every file and link below `tree`, and the empty directories."""
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
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # dpkg-deb leaves files there
    assert output("lintian", "--allow-root", packages["deb"]) == ""


def test_what_is_in_both_is_what_install_puts_in_place(
    packages: dict[str, Path], imageos: Path, tmp_path: Path
) -> None:
    tree, deb, rpm = tmp_path / "wanted", tmp_path / "deb", tmp_path / "rpm"
    for directory in (tree, rpm):
        directory.mkdir()
    output(imageos, "install", "--root", tree, "--bin-dir", "/usr/sbin")
    output("dpkg-deb", "--extract", packages["deb"], deb)
    output("rpm", "--root", rpm, "--nodeps", "--noscripts", "--install", packages["rpm"])
    for link in (tree / "usr/sbin").iterdir():
        link.unlink()
        link.symlink_to("../share/ganeti/os/image/imageos")
    (tree / OS_DIR / "imageos.compiled").unlink()  # the scripts make it
    (tree / OS_DIR / "installed.json").write_text(f'{{"package": "{NAME}"}}\n')
    everything = {path: what for path, what in listing(tree).items() if not path.startswith("etc/")}
    for tree in (deb, rpm):
        assert {path: what for path, what in listing(tree).items() if path in everything} == everything
    extra = {path for path in listing(deb) if path not in everything}
    assert {path.split("/")[2] for path in extra} == {"bash-completion", "doc", "lintian", "man", "zsh"}


def test_the_sites_files_are_the_package_managers_to_know_only(packages: dict[str, Path]) -> None:
    """dpkg would ask about them; rpm would make those anew that are only enabled."""
    assert "conffiles" not in output("dpkg-deb", "--info", packages["deb"])
    assert "./etc" not in output("dpkg-deb", "--contents", packages["deb"])
    known = output("rpm", "-qp", "--configfiles", packages["rpm"]).split()
    assert {f"/{DEFAULTS}", f"/{SITE}/variants.list", f"/{SITE}/variants/default.conf", f"/{SITE}/hooks/grub"} <= {
        *known
    }
    flags = output("rpm", "-qp", "--qf", "[%{FILENAMES} %{FILEFLAGS:fflags}\n]", packages["rpm"]).splitlines()
    assert {f"{path} cng" for path in known} <= {*flags}


def test_same_bytes_again(packages: dict[str, Path]) -> None:
    for kind, package in packages.items():
        output(sys.executable, CHECKOUT / "build.py", kind)
        (built,) = (CHECKOUT / "dist").glob(f"{NAME}*.{kind}")
        assert built.read_bytes() == package.read_bytes(), kind


def test_installed_by_apt(bare: Path) -> None:
    """With its dependencies, and with all paths that automation for ganeti-instance-image uses; until it is purged."""
    readme_install(bare)
    assert done(bare, "imageos", "--version").startswith("imageos ")
    assert (bare / OS_DIR / "imageos.compiled").is_file()
    for program in ("sfdisk", "mkfs.ext4", "mkswap", "tar"):
        done(bare, "which", program)
    for directory in ("variants", "hooks", "overlays", "networks/instances", "networks/subnets"):
        assert (bare / SITE / directory).is_dir()
    assert (bare / SITE / "variants.list").read_text() == "default\n"
    assert "FILESYSTEM" in (bare / DEFAULTS).read_text()
    assert done(bare, "dpkg", "--verify", NAME) == ""
    for command in ("install", "uninstall"):
        refused = inside(bare, "imageos", command)
        assert refused.returncode == 1
        assert refused.stdout.splitlines()[-1].endswith(f"belongs to the package {NAME}")
    (bare / SITE / "variants/debian.conf").write_text("IMAGE_NAME=debian\n")
    (bare / DEFAULTS).write_text("SWAP=no\n")
    readme_install(bare)  # again
    assert (bare / DEFAULTS).read_text() == "SWAP=no\n"
    done(bare, "apt-get", "--yes", "purge", NAME)
    left = [path for top in ("etc/ganeti", "usr/share/ganeti") for path in listing(bare / top)]
    assert left == ["instance-image/variants/debian.conf"]
    assert not list((bare / "etc/default").glob(f"{NAME}*"))
    assert not (bare / "var/lib" / NAME).exists()
    shutil.rmtree(bare / SITE)


ANCESTOR = f"""\
Package: {NAME}
Version: 0.7.3
Architecture: all
Maintainer: Somebody <somebody@example.org>
Description: the ancestor
"""


def ancestor(place: Path) -> Path:
    """Make a package like ganeti-instance-image's: scripts, links into /etc, configuration files."""
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
    """Files that the administrator changed stay unchanged; all others are replaced."""
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
    readme_install(bare)
    assert "Status: install ok installed" in done(bare, "dpkg", "--status", NAME)
    for path, text in site.items():
        assert (bare / path).read_text() == text, path
    for path in (DEFAULTS, f"{SITE}/hooks/interfaces"):
        assert "imageos" in (bare / f"{path}.new").read_text()
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
    done(bare, "apt-get", "--yes", "purge", NAME)
    shutil.rmtree(bare / SITE)


CONTROL = f"""\
Package: {NAME}
Version: 1.0
Architecture: all
Maintainer: Somebody <somebody@example.org>
Description: with conffiles
"""
SPEC = f"""\
Name: {NAME}
Version: 1.0
Release: 1
Summary: with config files
License: none
BuildArch: noarch
AutoReqProv: no
%description
The same.
%install
cp -a {{tree}}/. %{{{{buildroot}}}}
%files
%defattr(-,root,root,-)
/usr
%config(noreplace) /etc
"""


@pytest.mark.parametrize("kind", ["deb", "rpm"])
def test_over_an_install(kind: str, bare: Path, packages: dict[str, Path], imageos: Path, tmp_path: Path) -> None:
    """Until now, `imageos install` of an older version was used: what nobody has changed since is renewed."""
    rpm = ("rpm", "--root", bare, "--nodeps", "--define=_dbpath /over")
    older = tmp_path / "older"
    with zipfile.ZipFile(imageos) as ours, zipfile.ZipFile(older, "w") as archive:
        for name in ours.namelist():
            data = ours.read(name)
            if name == "__main__.py":
                data = data.replace(b'BUILD = "', b'BUILD = "0')
            if name.startswith("site-packages/imageos/hooks.d/"):
                data += b"# of the older version\n"
            archive.writestr(name, data)
    shutil.copy(older, bare / "root/older")
    done(bare, "python3", "-IS", "/root/older", "install", "--bin-dir", "/usr/sbin")
    hooks = bare / SITE / "hooks"
    assert (hooks / "grub").read_text().endswith("# of the older version\n")
    (hooks / "grub").chmod(0o755)
    (hooks / "ssh").write_text("#!/bin/sh\n")
    if kind == "deb":
        readme_install(bare)
    else:
        output(*rpm, "--install", packages["rpm"])
    assert [name for name in os.listdir(hooks) if name.endswith(".new")] == ["ssh.new"]
    assert "of the older version" not in "".join(path.read_text() for path in hooks.iterdir())
    assert (hooks / "ssh").read_text() == "#!/bin/sh\n"
    assert os.access(hooks / "grub", os.X_OK)
    assert done(bare, "imageos", "--version").startswith("imageos ")
    if kind == "deb":
        done(bare, "apt-get", "--yes", "purge", NAME)
        assert not (bare / SITE).exists() and not (bare / OS_DIR).exists()
    else:
        output(*rpm, "--erase", NAME)
        assert not (bare / OS_DIR).exists() and os.listdir(hooks) == ["ssh"]
        shutil.rmtree(bare / SITE)
        shutil.rmtree(bare / "var/lib" / NAME, ignore_errors=True)


def version_1(kind: str, imageos: Path, place: Path) -> Path:
    """Make a package as 1.0 was: with the site's files in it, each somewhat different from ours."""
    tree = place / kind
    output(imageos, "install", "--root", tree, "--bin-dir", "/usr/sbin")
    shutil.rmtree(tree / "var")
    shutil.rmtree(tree / SITE / "overlays")
    shutil.rmtree(tree / SITE / "networks")
    write(tree, {f"{OS_DIR}/installed.json": f'{{"package": "{NAME}"}}\n'})
    files = [path for path in (tree / "etc").rglob("*") if path.is_file()]
    for path in files:
        path.write_text(path.read_text() + "# of 1.0\n")
        os.utime(path, (315532800, 315532800))
    if kind == "deb":
        write(tree, {"DEBIAN/control": CONTROL})
        (tree / "DEBIAN/conffiles").write_text("".join(f"/{path.relative_to(tree)}\n" for path in files))
        output("dpkg-deb", "--root-owner-group", "--build", tree, place / "old.deb")
        return place / "old.deb"
    (place / "spec").write_text(SPEC.format(tree=tree))
    defines = [f"--define={name} {place}" for name in ("_topdir", "_rpmdir")]
    output("rpmbuild", "-bb", *defines, "--define=__os_install_post %{nil}", place / "spec")
    (built,) = place.rglob("*.rpm")
    return built


@pytest.mark.parametrize("kind", ["deb", "rpm"])
def test_upgrade_of_version_1(kind: str, bare: Path, packages: dict[str, Path], imageos: Path, tmp_path: Path) -> None:
    """From a package with conffiles: what nobody has changed is renewed, enabled or not; the rest is kept."""
    rpm = ("rpm", "--root", bare, "--nodeps", "--define=_dbpath /rpm")
    old = version_1(kind, imageos, tmp_path)
    if kind == "deb":
        shutil.copy(old, bare / "old.deb")
        done(bare, "dpkg", "--install", "/old.deb")
    else:
        output(*rpm, "--install", old)
    site = {DEFAULTS: "SWAP=no\n", f"{SITE}/variants.list": "default\nmine\n", f"{SITE}/hooks/ssh": "#!/bin/sh\n"}
    write(bare, site)
    for name in ("grub", "ssh"):
        (bare / SITE / "hooks" / name).chmod(0o755)
    if kind == "deb":
        readme_install(bare)
    else:
        output(*rpm, "--upgrade", packages["rpm"])
    for path, text in site.items():
        assert (bare / path).read_text() == text, path
    assert sorted(str(path.relative_to(bare)) for path in (bare / "etc").rglob(f"{NAME}*") if path.is_file()) == [
        DEFAULTS,
        f"{DEFAULTS}.new",
    ]
    hooks = {path.name: path for path in (bare / SITE / "hooks").iterdir()}
    assert set(hooks) == {"cloud-init", "grub", "interfaces", "overlays", "ssh", "ssh.new", "zz_ddns"}
    assert not [name for name, path in hooks.items() if "of 1.0" in path.read_text()]
    assert [name for name, path in sorted(hooks.items()) if os.access(path, os.X_OK)] == ["grub", "ssh"]
    if kind == "deb":
        done(bare, "apt-get", "--yes", "purge", NAME)
        assert not (bare / SITE).exists()
    else:
        output(*rpm, "--erase", NAME)
        assert [path for path in site if (bare / path).exists()] == [*site]
        assert not (bare / SITE / "hooks/grub").exists()
        assert not (bare / OS_DIR).exists()
        shutil.rmtree(bare / SITE)
