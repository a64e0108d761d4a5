"""The metadata and files of the packages for Debian and Fedora. build.py makes them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shlex
import shutil
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from imageos import __version__
from imageos.installation import COMPILED, OS_DIR, RECORD, SITE_RECORD
from imageos.settings import CACHE_DIR, SITE_DIR

PACKAGE = "ganeti-instance-image"  # that of the program that imageos replaces, so that an upgrade installs it
CHECKOUT = Path(__file__).resolve().parent
MAINTAINER = "The imageos developers <developers@imageos.example>"
SUMMARY = "OS definition of Ganeti that deploys images"
DESCRIPTION = """\
imageos turns an image (a tarball, a dump, or a disk image such as the cloud images of the distributions) into a
running Ganeti instance: grown to its disk, named, unique, booting. It exports and imports the disks of instances. It
takes the place of ganeti-instance-image 0.7 and keeps its configuration.
"""
LINTIAN_OVERRIDES = f"""\
# the node's users must not read images that were downloaded for a tenant
{PACKAGE}: non-standard-dir-perm 0700 != 0755 [{CACHE_DIR[1:]}/]
# env -S python3 -IS: ignores PYTHON* variables and the node's site-packages
{PACKAGE}: unusual-interpreter -S [usr/share/ganeti/os/image/imageos]
"""


def package_version(version: str) -> str:
    """Return `1.0.dev0` in a form that both formats sort before 1.0."""
    return version.replace(".dev", "~dev")


VERSION = package_version(__version__)
# The date is fixed, as those of the files: every build must give the same package.
CHANGELOG = f"""\
{PACKAGE} ({VERSION}) unstable; urgency=medium

  * See NEWS.rst.

 -- {MAINTAINER}  Tue, 01 Jan 1980 00:00:00 +0000
"""
# The site's files are not in the package: scripts put them in place. dpkg would ask what to do with a conffile that the
# site has changed, rpm takes the x bit from a hook that is on; both are wrong where no terminal is.
INSTALL = f"{OS_DIR}/imageos install --site-files"
# Before the package's files are there: it has a record of its own in the place of that of an `imageos install`, which
# knows what the site has changed.
KEEP_RECORD = f"""\
if [ -f {OS_DIR}/{RECORD} ] && [ ! -e {SITE_RECORD} ]; then
  mkdir -p {os.path.dirname(SITE_RECORD)}
  cp {OS_DIR}/{RECORD} {SITE_RECORD}
fi
"""
PREINST = f"#!/bin/sh\nset -e\n{KEEP_RECORD}"
POSTINST = f"""\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
  dpkg-query --show --showformat='${{Conffiles}}' {PACKAGE} | {INSTALL}
fi
"""
PRERM = f"""\
#!/bin/sh
set -e
if [ "$1" = remove ]; then
  rm -f {OS_DIR}/imageos{COMPILED}
fi
"""
# Nothing of the program is there any more.
POSTRM = f"""\
#!/bin/sh
set -e
if [ "$1" = purge ]; then
  rm -rf {os.path.dirname(SITE_RECORD)}
  for file in %s; do
    rm -f "$file" "$file.new"
  done
  for directory in hooks overlays networks/subnets networks/instances networks variants ''; do
    rmdir --ignore-fail-on-non-empty {SITE_DIR}/$directory 2>/dev/null || true
  done
fi
"""
STRENGTHS = ("Depends", "Recommends", "Suggests", "Enhances")


class Dependency(NamedTuple):
    """A program that the package uses on a node."""

    strength: str  # a field of both formats; in an rpm, Depends is Requires
    deb: str  # empty: every Debian has it (Essential)
    rpm: str
    why: str


DEPENDENCIES = (
    Dependency("Depends", "python3 (>= 3.9)", "python3 >= 3.9", "runs imageos"),
    Dependency("Depends", "", "util-linux", "blkid, mkswap; on Fedora sfdisk, too"),
    Dependency("Depends", "", "coreutils", "dd writes raw images"),
    Dependency("Depends", "", "tar", "tarballs"),
    Dependency("Depends", "", "gzip", "compressed images"),
    Dependency("Depends", "fdisk", "util-linux", "sfdisk reads and writes partition tables"),
    Dependency("Depends", "e2fsprogs", "e2fsprogs", "FILESYSTEM=ext4 and its relatives, and growing them"),
    Dependency("Recommends", "btrfs-progs", "btrfs-progs", "FILESYSTEM=btrfs, disk images with it"),
    Dependency("Recommends", "bzip2", "bzip2", "compressed images"),
    Dependency("Recommends", "ca-certificates", "ca-certificates", "IMAGE_URL=https://..."),
    Dependency("Recommends", "curl", "curl", "IMAGE_URL"),
    Dependency("Recommends", "dosfstools", "dosfstools", "PARTITION_TABLE=gpt: the EFI system partition"),
    Dependency("Recommends", "dump", "dump", "IMAGE_TYPE=dump"),
    Dependency("Recommends", "gpgv", "gnupg2", "IMAGE_KEYRING"),
    Dependency("Recommends", "lvm2", "lvm2", "disk images with LVM"),
    Dependency("Recommends", "lz4", "lz4", "compressed images"),
    Dependency("Recommends", "mtools", "mtools", "PARTITION_TABLE=gpt: files on the EFI system partition"),
    Dependency("Recommends", "openssh-client", "openssh-clients", "ssh host keys; tools, for another node"),
    Dependency("Recommends", "qemu-utils", "qemu-img", "qcow2 images"),
    Dependency("Recommends", "xfsprogs", "xfsprogs", "FILESYSTEM=xfs, disk images with it"),
    Dependency("Recommends", "xz-utils", "xz", "compressed images"),
    Dependency("Recommends", "zstd", "zstd", "compressed images"),
    Dependency("Suggests", "lbzip2", "lbzip2", "unpacks bzip2 on all processors"),
    Dependency("Suggests", "ovmf", "edk2-ovmf", "variants try --uefi"),
    Dependency("Suggests", "pigz", "pigz", "unpacks gzip faster"),
    Dependency("Suggests", "qemu-system-x86", "qemu-system-x86-core", "variants try"),
    Dependency("Enhances", "ganeti", "ganeti", "which calls it"),
)


def deb(tree: Path, built: Path) -> list[str]:
    """Add a Debian package's files to the tree (deb-control(5), deb-conffiles(5)); return the command that packs it."""
    doc = tree / f"usr/share/doc/{PACKAGE}"
    removed = " ".join(configuration(tree))
    shutil.rmtree(tree / "etc")
    write(doc / "copyright", (CHECKOUT / "LICENSE").read_text())
    write(tree / f"usr/share/lintian/overrides/{PACKAGE}", LINTIAN_OVERRIDES)
    write(doc / "changelog.gz", CHANGELOG)
    # before DEBIAN exists, which is not installed
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    sums = "".join(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n" for path in files)
    size = sum(-(-path.stat().st_size // 1024) for path in files)
    write(tree / "DEBIAN/md5sums", sums)
    for name, script in {"preinst": PREINST, "postinst": POSTINST, "prerm": PRERM, "postrm": POSTRM % removed}.items():
        write(tree / "DEBIAN" / name, script)
        (tree / "DEBIAN" / name).chmod(0o755)
    write(tree / "DEBIAN/control", debian_control(size))
    # every Debian and Ubuntu can read xz
    return ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(built)]


def rpm(tree: Path, built: Path) -> list[str]:
    """Write the spec file of the rpm; return the command that packs the tree."""
    spec = built / f"{PACKAGE}.spec"
    write(spec, rpm_spec(tree))
    return ["rpmbuild", "-bb", *(f"--define={name} {value}" for name, value in rpm_macros(built).items()), str(spec)]


# Kind -> zsh's directory of completions, function that prepares the tree
KINDS: dict[str, tuple[str, Callable[[Path, Path], list[str]]]] = {
    "deb": ("usr/share/zsh/vendor-completions", deb),
    "rpm": ("usr/share/zsh/site-functions", rpm),
}


def complete(tree: Path, zipapp: Path, zsh_completions: str) -> None:
    """Add the manual page, completions and documents to the tree of `imageos install`, and make its links relative."""
    (tree / OS_DIR[1:] / f"imageos{COMPILED}").unlink()  # of the builder's Python
    # This tells `imageos` to ask the package manager which files the site has changed.
    write(tree / OS_DIR[1:] / RECORD, json.dumps({"package": PACKAGE}) + "\n")
    for link in (tree / "usr/sbin").iterdir():
        target = os.path.relpath(os.readlink(link), "/usr/sbin")
        link.unlink()
        link.symlink_to(target)
    bash, man = tree / "usr/share/bash-completion/completions", tree / "usr/share/man/man8"
    with zipfile.ZipFile(zipapp) as archive:
        for path, name in (
            (man / "imageos.8.gz", "imageos.8"),
            (bash / "imageos", "imageos.bash"),
            (tree / zsh_completions / "_imageos", "imageos.zsh"),
        ):
            write(path, archive.read(f"site-packages/imageos/manual/{name}").decode())
    for tool in (tree / OS_DIR[1:] / "tools").iterdir():
        (bash / tool.name).symlink_to("imageos")  # bash looks for a file of the command's name
        (man / f"{tool.name}.8.gz").symlink_to("imageos.8.gz")
    for name in ("README.rst", "NEWS.rst"):
        write(tree / f"usr/share/doc/{PACKAGE}/{name}", (CHECKOUT / name).read_text())


def write(path: Path, text: str) -> None:
    """Write a file; compress it if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def configuration(tree: Path) -> list[str]:
    """Return the files that the site may change, which scripts put in place."""
    return sorted(f"/{path.relative_to(tree)}" for path in (tree / "etc").rglob("*") if path.is_file())


def requirements(strength: str, column: str) -> list[str]:
    """Return the packages of this strength in a column of DEPENDENCIES, without duplicates."""
    names = {getattr(dependency, column) for dependency in DEPENDENCIES if dependency.strength == strength}
    return sorted(names - {""})


def debian_control(size: int) -> str:
    fields = {
        "Package": PACKAGE,
        "Version": VERSION,
        "Architecture": "all",
        "Section": "admin",
        "Priority": "optional",
        "Maintainer": MAINTAINER,
        "Installed-Size": str(size),  # KiB
        **{name: ", ".join(requirements(name, "deb")) for name in STRENGTHS},
        "Description": f"{SUMMARY}\n{textwrap.indent(textwrap.fill(DESCRIPTION, 76), ' ')}",
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def rpm_macros(work: Path) -> dict[str, str]:
    return {
        "_topdir": str(work),
        "_rpmdir": str(work),
        "_build_name_fmt": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
        "_binary_payload": "w9.gzdio",  # every rpm can read gzip
        # every machine must build the same bytes
        "_buildhost": "localhost",
        "use_source_date_epoch_as_buildtime": "1",
        "clamp_mtime_to_source_date_epoch": "1",
        "build_mtime_policy": "clamp_to_source_date_epoch",
        # nothing is compiled, and the tree is complete
        "__os_install_post": "%{nil}",
        "debug_package": "%{nil}",
    }


def rpm_spec(tree: Path) -> str:
    header = {
        "Name": PACKAGE,
        "Version": VERSION,
        "Release": "1",
        "Summary": SUMMARY,
        "License": "BSD-2-Clause",
        "BuildArch": "noarch",
        "AutoReqProv": "no",
    }
    wants = [(strength, name) for strength in STRENGTHS for name in requirements(strength, "rpm")]
    return "\n".join(
        [
            *(f"{name}: {value}" for name, value in header.items()),
            *(f"{strength.replace('Depends', 'Requires')}: {name}" for strength, name in wants),
            *("%description", DESCRIPTION),
            *("%install", f"cp -a {shlex.quote(str(tree))}/. %{{buildroot}}"),
            *("%pre", KEEP_RECORD),
            *("%posttrans", f"{INSTALL} </dev/null"),
            *("%preun", f'if [ "$1" = 0 ]; then {INSTALL.replace("install", "uninstall")}; fi'),
            *("%files", "%defattr(-,root,root,-)", *rpm_files(tree), ""),
        ]
    )


def rpm_files(tree: Path) -> Iterator[str]:
    """Yield the lines of %files: all files, and the package's own directories."""
    conffiles = configuration(tree)
    for path in sorted(tree.rglob("*")):
        name = f"/{path.relative_to(tree)}"
        if path.is_dir() and not path.is_symlink():
            if {OS_DIR, SITE_DIR, CACHE_DIR, f"/usr/share/doc/{PACKAGE}"} & {name, *map(str, PurePath(name).parents)}:
                yield f"%dir {name}"
        else:
            # a ghost is nothing but a name: rpm leaves what the package before had there, too
            yield f"{'%ghost %config(noreplace) ' if name in conffiles else ''}{name}"
