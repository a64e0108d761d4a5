#!/usr/bin/env python3
"""usage: ./build.py                      build dist/imageos
       sudo ./build.py demo            build it, deploy a tiny image onto a file and show the result
       sudo ./build.py demo --debian   the same with Debian, and boot it in qemu to its login prompt
       sudo ./build.py test [ARGS...]  build it and run all tests; or what ARGS say to pytest
       sudo ./build.py bench [NAME...] build it and measure it against the same work done by hand
       ./build.py deb                  build it and a package for Debian and its relatives, in dist
       ./build.py rpm                  the same for Fedora and its relatives
       ./build.py --help               show this

What is missing is installed: system packages by apt-get or dnf (only as root; another user is
told what to install), shiv and the tools of the tests in .venv, as pip is configured here.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import platform
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

CHECKOUT = Path(__file__).resolve().parent
DIST = CHECKOUT / "dist"
CACHE = CHECKOUT / ".cache"
VENV = CHECKOUT / ".venv"
ZIPAPP = DIST / "imageos"

# Where it is installed
OS_DIR = "/usr/share/ganeti/os/image"
SITE_DIR = "/etc/ganeti/instance-image"
IMAGE_DIR = "/var/cache/ganeti-instance-image"

# --- What is needed, and why ----------------------------------------------------------------------

# Development tools, from PyPI. Each is the newest that runs on Python 3.9.
BUILD_TOOLS = (
    "shiv==1.0.8",  # its layout of the archive is in the result
    "click==8.1.8",  # of shiv; later ones want Python 3.10
)
TEST_TOOLS = (
    *BUILD_TOOLS,
    "pytest==8.4.2",
    "pytest-xdist==3.8.0",  # two workers
    "hypothesis==6.141.1",  # properties of the parsers
    "mypy==1.19.1",  # linters run as tests, and another version finds other faults
    "ruff==0.17.6",
)
# What those bring, as of one day: a new release of any of them must not break a build or a linter.
CONSTRAINTS = (
    *("attrs==26.1.0", "exceptiongroup==1.3.2", "execnet==2.1.2", "iniconfig==2.1.0", "librt==0.16.0"),
    *("mypy_extensions==1.1.0", "packaging==26.3", "pathspec==1.1.1", "pluggy==1.6.0", "Pygments==2.21.0"),
    *("sortedcontainers==2.4.0", "tomli==2.5.0", "typing_extensions==4.16.0"),
)
WORKERS = ("--numprocesses=2", "--dist=loadgroup")  # of a run of all tests; for one tier they would cost more


@dataclass(frozen=True)
class Need:
    """Something this machine must have: a command, an absolute path or a Python module."""

    what: str
    deb: str
    rpm: str  # empty: not in Fedora
    why: str


VENV_NEEDS = (Need("python:ensurepip", "python3-venv", "python3-pip", "makes .venv"),)
DEMO_NEEDS = (
    Need("busybox", "busybox-static", "busybox", "is the tiny image"),
    Need("tar", "tar", "tar", "packs and unpacks images"),
    Need("zstd", "zstd", "zstd", "compresses images"),
    Need("sfdisk", "fdisk", "util-linux-core", "writes partition tables"),
    Need("unshare", "util-linux", "util-linux-core", "namespaces"),
    Need("mount", "mount", "util-linux-core", "mounts the guest"),
    Need("losetup", "mount", "util-linux-core", "loop devices"),
    Need("mkfs.ext4", "e2fsprogs", "e2fsprogs", "the guest's filesystems"),
    Need("debugfs", "e2fsprogs", "e2fsprogs", "looks into the guest without mounting it"),
)
DEBIAN_NEEDS = (
    *DEMO_NEEDS,
    Need("debootstrap", "debootstrap", "debootstrap", "makes a Debian tree"),
    Need(
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
        "debian-keyring",
        "what debootstrap trusts",
    ),
    Need("qemu-system-x86_64", "qemu-system-x86", "qemu-system-x86-core", "boots the result"),
)
DEB_NEEDS = (Need("dpkg-deb", "dpkg", "dpkg", "builds the package"),)
RPM_NEEDS = (Need("rpmbuild", "rpm", "rpm-build", "builds the package"),)
TEST_NEEDS = (
    *DEBIAN_NEEDS,
    *DEB_NEEDS,
    *RPM_NEEDS,
    Need("lintian", "lintian", "", "what Debian says of the package"),
    Need("strace", "strace", "strace", "sees which files and programs are used"),
    Need("setpriv", "util-linux", "util-linux-core", "runs as an ordinary user"),
    Need("ip", "iproute2", "iproute", "networks of namespaces"),
    Need("sysctl", "procps", "procps-ng", "networks of namespaces"),
    Need("bash", "bash", "bash", "settings files"),
    Need("zsh", "zsh", "zsh", "completion of zsh"),
    Need("groff", "groff-base", "groff-base", "the manual page"),
    Need("perl", "perl-base", "perl-interpreter", "system calls of a hostile guest"),
    Need("mkfs.xfs", "xfsprogs", "xfsprogs", "FILESYSTEM=xfs"),
    Need("mkfs.btrfs", "btrfs-progs", "btrfs-progs", "FILESYSTEM=btrfs"),
    Need("mkfs.vfat", "dosfstools", "dosfstools", "EFI system partition"),
    Need("mcopy", "mtools", "mtools", "EFI system partition"),
    Need("qemu-img", "qemu-utils", "qemu-img", "disk images"),
    Need("dump", "dump", "dump", "dump images"),
    Need("/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf", "edk2-ovmf", "boots from UEFI"),
    Need("gpg", "gpg", "gnupg2", "signs what gpgv checks"),
    Need("gpg-agent", "gpg-agent", "gnupg2", "makes the keys that sign"),
    Need("gpgv", "gpgv", "gnupg2", "IMAGE_KEYRING"),
    Need("openssl", "openssl", "openssl", "certificates of an https server"),
    Need("gzip", "gzip", "gzip", "compressed images"),
    Need("pigz", "pigz", "pigz", "compressed images"),
    Need("bzip2", "bzip2", "bzip2", "compressed images"),
    Need("xz", "xz-utils", "xz", "compressed images"),
    Need("lz4", "lz4", "lz4", "compressed images"),
    Need("setfacl", "acl", "acl", "images with ACLs"),
    Need("setfattr", "attr", "attr", "images with extended attributes"),
    Need("setcap", "libcap2-bin", "libcap", "images with capabilities"),
    Need("dnsmasq", "dnsmasq-base", "dnsmasq", "DHCP that puts names into the DNS"),
    Need("gnt-cluster", "ganeti", "", "a real cluster"),
    Need("/usr/share/ganeti/testsuite/qa", "ganeti-testsuite", "", "Ganeti's own tests of a cluster"),
    Need("ssh-keygen", "openssh-client", "openssh-clients", "ssh host keys"),
    Need("sshd", "openssh-server", "openssh-server", "a real cluster"),
    Need("socat", "socat", "socat", "serial consoles of a real cluster"),
)

# --- The archive ----------------------------------------------------------------------------------

# The distribution's Python (Ganeti's PATH has no other), deaf to PYTHON* variables and to the
# node's site-packages: they are not ours, and looking at them costs time.
SHEBANG = "/usr/bin/env -S python3 -IS"

# The time of everything in the archive: the oldest that zip can say. A constant, and not the time
# of the commit, because a checkout without git must give the same file.
EPOCH = 315532800  # 1980-01-01

# Runs straight from the archive, where shiv would first unpack it into ~/.shiv and run that copy.
# So nothing has to be pruned, nobody can alter what root executes, and it works for users without a
# home and on a full or read-only disk. The price is compiling at each start: 5 ms for 1000 lines.
# Written in what every Python 3 parses: an old one must get as far as the message.
MAIN = """\
import _signal
import os
import sys

if sys.version_info < (3, 9):
    sys.stderr.write("imageos: needs Python 3.9 or later; python3 in PATH is %d.%d\\n"
                     % sys.version_info[:2])
    sys.exit(1)

# Until the program takes care of signals itself, SIGINT ends it as the others do, without a traceback.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)

# Absolute, because commands change directory before they import the last of their modules.
sys.path[0] = os.path.join(os.path.realpath(sys.path[0]), "site-packages")

from imageos.cli import main

sys.exit(main())
"""

# --- The packages: what they say ------------------------------------------------------------------

PACKAGE = "ganeti-instance-image"  # the ancestor's name: what installs that installs this
MAINTAINER = "The imageos developers <developers@imageos.example>"
SUMMARY = "OS definition of Ganeti that deploys images"
DESCRIPTION = """\
imageos turns an image (a tarball, a dump, or a disk image such as the cloud images of the distributions) into a
running Ganeti instance: grown to its disk, named, unique, booting. It exports and imports the disks of instances. It
takes the place of ganeti-instance-image 0.7 and keeps its configuration.
"""
LINTIAN_OVERRIDES = f"""\
# optional hooks are off until the site makes them executable
{PACKAGE}: script-not-executable [etc/ganeti/instance-image/hooks/*]
# what is downloaded for one tenant is not for the node's users to read
{PACKAGE}: non-standard-dir-perm 0700 != 0755 [{IMAGE_DIR[1:]}/]
# env -S python3 -IS: deaf to PYTHON* variables and to the node's own modules
{PACKAGE}: unusual-interpreter -S [usr/share/ganeti/os/image/imageos]
"""


@dataclass(frozen=True)
class Dependency:
    """What the package wants on a node."""

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
    Dependency("Recommends", "dosfstools", "dosfstools", "PARTITION_TABLE=gpt: the EFI system partition"),
    Dependency("Recommends", "dump", "dump", "IMAGE_TYPE=dump"),
    Dependency("Recommends", "gdisk", "gdisk", "sgdisk grows a disk image with a GPT"),
    Dependency("Recommends", "gpgv", "gnupg2", "IMAGE_KEYRING"),
    Dependency("Recommends", "lz4", "lz4", "compressed images"),
    Dependency("Recommends", "mtools", "mtools", "PARTITION_TABLE=gpt: files on the EFI system partition"),
    Dependency("Recommends", "openssh-client", "openssh-clients", "ssh host keys; tools, for another node"),
    Dependency("Recommends", "qemu-utils", "qemu-img", "qcow2 images"),
    Dependency("Recommends", "xfsprogs", "xfsprogs", "FILESYSTEM=xfs, disk images with it"),
    Dependency("Recommends", "xz-utils", "xz", "compressed images"),
    Dependency("Recommends", "zstd", "zstd", "compressed images"),
    Dependency("Suggests", "lbzip2", "lbzip2", "unpacks bzip2 on all processors"),
    Dependency("Suggests", "pigz", "pigz", "unpacks gzip faster"),
    Dependency("Enhances", "ganeti", "ganeti", "which calls it"),
)

# --- The demonstration: what it consists of -------------------------------------------------------

RECORDED = CHECKOUT / "tests/env/create-kvm-network.env"  # what a real cluster set

# Runs `$@` where the files that were installed under $1 are the machine's. In a mount namespace of
# its own, so that the machine sees nothing of it, and read-only. `env`: Ganeti sets no PWD.
AS_INSTALLED = f"""\
set -eu
root=$1; shift
for top in etc usr; do mount -t overlay -o "lowerdir=$root/$top:/$top" overlay "/$top"; done
cd {OS_DIR}
exec env -u PWD -u OLDPWD "$@"
"""

DEMO_HOOK = """\
#!/bin/sh
# Whatever a site wants to do to each new instance. The guest's root is mounted at $TARGET.
set -eu
echo "$INSTANCE_NAME was made from $IMAGE_NAME; its root is on $ROOT_DEV" >"$TARGET/etc/motd"
cat "$TARGET/etc/motd"
"""

DEBIAN_PACKAGES = (
    "systemd-sysv",
    "udev",
    "login",
    "linux-image-cloud-amd64",
    # not grub-pc: it wants to know a disk, and the one that makes the image is the wrong one
    "grub-pc-bin",
    "grub2-common",
)
# What every node has
MOUNTED = {
    "/proc/self/mountinfo": "mount -t proc proc /proc",
    "/sys/block": "mount -t sysfs sysfs /sys",
    "/dev/loop-control": "outside, mount --rbind /dev DIRECTORY/dev; without that file: modprobe loop",
}
BOOT_DEADLINE = 300  # seconds; 25 to 60 under software emulation
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class BuildError(Exception):
    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.hint = hint


def main(arguments: list[str]) -> int:
    os.umask(0o022)
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return dispatch(arguments)
    except BuildError as error:
        if error.hint:
            say(f"hint: {error.hint}")
        say(str(error))
        return 1
    except OSError as error:
        if isinstance(error, PermissionError):
            say("hint: take away what a run as root has made: sudo rm -r dist .venv .cache")
        say(f"{error.filename}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT


def dispatch(arguments: list[str]) -> int:
    if sys.version_info < (3, 9):  # noqa: UP036
        raise BuildError(f"needs Python 3.9 or later; this is {platform.python_version()}")
    if arguments in (["--help"], ["-h"]):
        print(__doc__, end="")
    elif arguments == []:
        build()
    elif arguments == ["demo"]:
        demo()
    elif arguments == ["demo", "--debian"]:
        demo_debian()
    elif arguments == ["deb"]:
        deb()
    elif arguments == ["rpm"]:
        rpm()
    elif arguments[0] == "test":
        return test(arguments[1:])
    elif arguments[0] == "bench":
        return bench(arguments[1:])
    else:
        print(__doc__, file=sys.stderr)
        say(f"unknown arguments: {shlex.join(arguments)}")
        return 2
    return 0


# --- The commands ---------------------------------------------------------------------------------


def build() -> None:
    python = virtual_environment(BUILD_TOOLS)
    with scratch_directory() as work:
        stage_sources(work / "stage")
        run_shiv(python, work / "stage", work / "shiv")
        write_archive(archive_members(work / "shiv"))
    digest = hashlib.sha256(ZIPAPP.read_bytes()).hexdigest()
    say(f"built {shown(ZIPAPP)}: {ZIPAPP.stat().st_size} bytes, sha256 {digest}")


def demo() -> None:
    require_root("demo")
    require_machine()
    install_packages(DEMO_NEEDS)
    build()
    with scratch_directory() as work:
        image = busybox_image(work)
        root = installed_root(work, image, hooks=())
        disk = empty_disk(work, gib=1)
        create(root, disk, image)
        show_disk(disk)


def demo_debian() -> None:
    require_root("demo --debian")
    require_machine()
    if platform.machine() != "x86_64":
        raise BuildError(f"demo --debian needs an x86_64 machine; this is {platform.machine()}")
    install_packages(DEBIAN_NEEDS)
    build()
    with scratch_directory() as work:
        image = debian_image(work)
        root = installed_root(work, image, hooks=("grub",))
        disk = empty_disk(work, gib=3)
        create(root, disk, image)
        show_disk(disk)
        boot(disk)


def test(arguments: list[str]) -> int:
    require_root("test")
    require_machine()
    install_packages(TEST_NEEDS)
    python = virtual_environment(TEST_TOOLS)
    build()
    make_directory(CACHE)
    command = [str(python), "-m", "pytest", *(arguments or WORKERS)]
    say(f"running {shlex.join(command)}")
    # Not run(): its output is for the reader, as it comes. Bytecode goes where root may leave something.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(CACHE / "bytecode")}
    status = subprocess.run(command, cwd=CHECKOUT, env=environment).returncode
    if status == 5:  # pytest's EXIT_NOTESTSCOLLECTED
        say("pytest found no tests")
    return status


def bench(names: list[str]) -> int:
    require_root("bench")
    require_machine()
    install_packages(TEST_NEEDS)
    python = virtual_environment(TEST_TOOLS)
    build()
    return subprocess.run([str(python), str(CHECKOUT / "tests/bench/bench.py"), *names], cwd=CHECKOUT).returncode


def deb() -> None:
    install_packages(DEB_NEEDS)
    build()
    with scratch_directory() as work:
        tree = package_tree(work, zsh_completions="usr/share/zsh/vendor-completions")
        write_debian_parts(tree)
        remove_packages("deb")
        package = DIST / f"{PACKAGE}_{package_version()}_all.deb"
        # xz: what every Debian and Ubuntu can read
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(package)]
        run(command, environment={"SOURCE_DATE_EPOCH": str(EPOCH)})
    say(f"built {shown(package)}: {package.stat().st_size} bytes")


def rpm() -> None:
    install_packages(RPM_NEEDS)
    build()
    with scratch_directory() as work:
        tree = package_tree(work, zsh_completions="usr/share/zsh/site-functions")
        spec = work / f"{PACKAGE}.spec"
        spec.write_text(rpm_spec(tree))
        definitions = [f"--define={name} {value}" for name, value in rpm_macros(work).items()]
        run(["rpmbuild", "-bb", *definitions, str(spec)], environment={"SOURCE_DATE_EPOCH": str(EPOCH)})
        (built,) = work.glob("rpms/*.rpm")
        remove_packages("rpm")
        package = DIST / built.name
        shutil.move(built, package)
    say(f"built {shown(package)}: {package.stat().st_size} bytes")


# --- System packages and the virtual environment --------------------------------------------------


def install_packages(needs: Sequence[Need]) -> None:
    absent = [need for need in needs if not present(need.what)]
    if not absent:
        return
    for need in absent:
        say(f"missing: {need.what} ({need.why})")
    commands = install_commands(absent)
    if os.geteuid() != 0:
        line = " && ".join(f"sudo {shlex.join(command)}" for command in commands)
        raise BuildError(f"system packages are missing; install them with: {line}")
    with no_daemons_started():
        for command in commands:
            say(f"running {shlex.join(command)}")
            run(command, environment={"DEBIAN_FRONTEND": "noninteractive"})
    still = [need.what for need in absent if not present(need.what)]
    if still:
        raise BuildError(f"still missing after the installation: {', '.join(still)}")


def present(what: str) -> bool:
    kind, _, name = what.rpartition(":")
    if kind == "python":
        importlib.invalidate_caches()
        return importlib.util.find_spec(name) is not None
    return shutil.which(what) is not None or (what.startswith("/") and Path(what).exists())


def install_commands(needs: Sequence[Need]) -> list[list[str]]:
    if shutil.which("apt-get"):
        debs = sorted({need.deb for need in needs})
        return [
            ["apt-get", "update"],
            ["apt-get", "install", "--yes", "--no-install-recommends", *debs],
        ]
    if shutil.which("dnf"):
        rpms = sorted({need.rpm for need in needs if need.rpm})
        return [["dnf", "install", "--assumeyes", "--setopt=install_weak_deps=False", *rpms]]
    names = ", ".join(need.what for need in needs)
    raise BuildError(f"neither apt-get nor dnf is here to install {names}")


@contextmanager
def no_daemons_started() -> Iterator[None]:
    """Keep Debian's packages from starting what they bring: tests need sshd, not a server."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists() or not shutil.which("dpkg"):
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def virtual_environment(tools: Sequence[str]) -> Path:
    """The Python of .venv, which has `tools`. Uses the network only when one is missing."""
    python = VENV / "bin/python3"
    stamp = VENV / "tools"  # written last: an interrupted installation has none
    if has_tools(python, stamp, tools):
        return python
    install_packages(VENV_NEEDS)
    say(f"installing {' '.join(tools)} in {shown(VENV)}")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    with scratch_directory() as work:
        elsewhere = {"TMPDIR": str(work)}  # older ones leave a file in there
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], environment=elsewhere)
        constraints = work / "constraints.txt"
        constraints.write_text("\n".join(CONSTRAINTS))
        run([*pip, "--constraint", str(constraints), *tools], environment=elsewhere)
    stamp.write_text("\n".join((*tools, *CONSTRAINTS)) + "\n")
    return python


def has_tools(python: Path, stamp: Path, tools: Sequence[str]) -> bool:
    if not stamp.exists() or not {*tools, *CONSTRAINTS} <= set(stamp.read_text().split()):
        return False
    # The Python that .venv was made from may be gone, or another one now.
    check = [str(python), "-Ic", "import shiv.cli"]
    return python.exists() and subprocess.run(check, capture_output=True).returncode == 0


# --- Building -------------------------------------------------------------------------------------


def stage_sources(stage: Path) -> None:
    """What shiv shall pack: the package, with hooks and defaults where importlib finds them."""
    for source in ("imageos", "hooks.d", "defaults"):
        for path in sorted((CHECKOUT / source).rglob("*")):
            name = path.relative_to(CHECKOUT)
            if path.is_file() and is_source(name):
                target = stage / staged_name(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def is_source(name: PurePath) -> bool:
    """Whether a file of the checkout is packed: nothing that editors and Python leave there."""
    ours = all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in name.parts)
    if name.parts[0] == "imageos":
        ours = ours and name.suffix == ".py"
    return ours and "__pycache__" not in name.parts


def staged_name(name: PurePath) -> PurePath:
    return name if name.parts[0] == "imageos" else PurePath("imageos") / name


def run_shiv(python: Path, stage: Path, output: Path) -> None:
    shiv = [str(python), "-Im", "shiv", "--uncompressed", "--reproducible", "-p", SHEBANG]
    what = ["-e", "imageos.cli:main", "--site-packages", str(stage), "-o", str(output)]
    run([*shiv, *what], environment={"SOURCE_DATE_EPOCH": str(EPOCH)})


def archive_members(shiv_file: Path) -> dict[str, bytes]:
    """shiv's archive, with our own start instead of its bootstrap."""
    with zipfile.ZipFile(shiv_file) as archive:
        names = [name for name in archive.namelist() if not name.startswith("_bootstrap/")]
        members = {name: archive.read(name) for name in names}
    members["__main__.py"] = MAIN.encode()
    return members


def write_archive(members: Mapping[str, bytes]) -> None:
    make_directory(DIST)
    unfinished = DIST / f".{ZIPAPP.name}.{os.getpid()}"
    try:
        with open(unfinished, "wb") as file:
            file.write(f"#!{SHEBANG}\n".encode())
            # Not compressed: zlib and zlib-ng, both in use, give different bytes.
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in sorted(members):
                    archive.writestr(member_header(name), members[name])
        unfinished.chmod(0o755)
        unfinished.replace(ZIPAPP)
    finally:
        unfinished.unlink(missing_ok=True)


def member_header(name: str) -> zipfile.ZipInfo:
    """The same bytes whatever the umask, system and Python of the builder."""
    header = zipfile.ZipInfo(name, time.gmtime(EPOCH)[:6])
    header.create_system = 3  # Unix
    header.external_attr = 0o100644 << 16
    return header


# --- The packages ---------------------------------------------------------------------------------


def remove_packages(kind: str) -> None:
    """Those of other versions: whoever takes `dist/*.deb` means the new one."""
    for old in DIST.glob(f"{PACKAGE}*.{kind}"):
        old.unlink()


def package_version() -> str:
    """`1.0.dev0` as both formats say it, where it comes before 1.0."""
    return run([str(ZIPAPP), "--version"]).split()[1].replace(".dev", "~dev")


def package_tree(work: Path, zsh_completions: str) -> Path:
    """What the package puts on a node: what `imageos install` does, the manual, the completions."""
    tree = work / "tree"
    tree.mkdir()
    run([str(ZIPAPP), "install", "--root", str(tree), "--bin-dir", "/usr/sbin"])
    # From now on the package is asked what the site has changed.
    record = tree / OS_DIR[1:] / "installed.json"
    record.write_text(json.dumps({"package": PACKAGE}) + "\n")
    for link in (tree / "usr/sbin").iterdir():
        relink(link, os.path.relpath(os.readlink(link), "/usr/sbin"))
    write_compressed(tree / "usr/share/man/man8/imageos.8.gz", run([str(ZIPAPP), "--man"]))
    bash = tree / "usr/share/bash-completion/completions"
    write(bash / "imageos", run([str(ZIPAPP), "--completion", "bash"]))
    write(tree / zsh_completions / "_imageos", run([str(ZIPAPP), "--completion", "zsh"]))
    for tool in (tree / OS_DIR[1:] / "tools").iterdir():
        (bash / tool.name).symlink_to("imageos")  # bash looks for a file of the command's name
        (tree / f"usr/share/man/man8/{tool.name}.8.gz").symlink_to("imageos.8.gz")
    for name in ("README.rst", "NEWS.rst"):
        write(tree / f"usr/share/doc/{PACKAGE}/{name}", (CHECKOUT / name).read_text())
    return tree


def relink(link: Path, text: str) -> None:
    link.unlink()
    link.symlink_to(text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_compressed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def configuration(tree: Path) -> list[str]:
    """The files that the site may change."""
    return sorted(f"/{path.relative_to(tree)}" for path in (tree / "etc").rglob("*") if path.is_file())


def requirements(strength: str, column: str) -> list[str]:
    """Of the packages in one column of DEPENDENCIES those of this strength, each once."""
    names = [getattr(one, column) for one in DEPENDENCIES if one.strength == strength]
    return sorted({name for name in names if name})


def write_debian_parts(tree: Path) -> None:
    """What makes a tree a Debian package: see deb-control(5), deb-conffiles(5)."""
    doc = tree / f"usr/share/doc/{PACKAGE}"
    write(doc / "copyright", (CHECKOUT / "LICENSE").read_text())
    write(tree / f"usr/share/lintian/overrides/{PACKAGE}", LINTIAN_OVERRIDES)
    write_compressed(doc / "changelog.gz", debian_changelog())
    # before DEBIAN exists: it is no part of what is installed
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    sums = "".join(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n" for path in files)
    size = sum(-(-path.stat().st_size // 1024) for path in files)
    write(tree / "DEBIAN/md5sums", sums)
    write(tree / "DEBIAN/conffiles", "".join(f"{path}\n" for path in configuration(tree)))
    write(tree / "DEBIAN/control", debian_control(size))


def debian_control(size: int) -> str:
    fields = {
        "Package": PACKAGE,
        "Version": package_version(),
        "Architecture": "all",
        "Section": "admin",
        "Priority": "optional",
        "Maintainer": MAINTAINER,
        "Installed-Size": str(size),  # KiB
        **{name: ", ".join(requirements(name, "deb")) for name in ("Depends", "Recommends", "Suggests", "Enhances")},
        "Description": f"{SUMMARY}\n{textwrap.indent(textwrap.fill(DESCRIPTION, 76), ' ')}",
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def debian_changelog() -> str:
    when = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(EPOCH))
    head = f"{PACKAGE} ({package_version()}) unstable; urgency=medium"
    return f"{head}\n\n  * See NEWS.rst.\n\n -- {MAINTAINER}  {when}\n"


def rpm_macros(work: Path) -> dict[str, str]:
    return {
        "_topdir": str(work),
        "_rpmdir": str(work / "rpms"),
        "_build_name_fmt": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
        "_binary_payload": "w9.gzdio",  # what every rpm can read
        # The same bytes wherever it is built
        "_buildhost": "localhost",
        "use_source_date_epoch_as_buildtime": "1",
        "clamp_mtime_to_source_date_epoch": "1",
        "build_mtime_policy": "clamp_to_source_date_epoch",
        # Nothing is compiled; what is in the tree is complete
        "__os_install_post": "%{nil}",
        "debug_package": "%{nil}",
    }


def rpm_spec(tree: Path) -> str:
    strengths = {"Requires": "Depends", "Recommends": "Recommends", "Suggests": "Suggests", "Enhances": "Enhances"}
    wants = [f"{name}: {one}" for name, strength in strengths.items() for one in requirements(strength, "rpm")]
    header = {
        "Name": PACKAGE,
        "Version": package_version(),
        "Release": "1",
        "Summary": SUMMARY,
        "License": "BSD-2-Clause",
        "BuildArch": "noarch",
        "AutoReqProv": "no",
    }
    return "\n".join(
        [
            *(f"{name}: {value}" for name, value in header.items()),
            *wants,
            *("%description", DESCRIPTION),
            *("%install", f"cp -a {shlex.quote(str(tree))}/. %{{buildroot}}"),
            *("%files", "%defattr(-,root,root,-)", *rpm_files(tree), ""),
        ]
    )


def rpm_files(tree: Path) -> Iterator[str]:
    """The lines of %files: every file, and the directories that are the package's own."""
    conffiles = configuration(tree)
    for path in sorted(tree.rglob("*")):
        name = f"/{path.relative_to(tree)}"
        if path.is_dir() and not path.is_symlink():
            if {OS_DIR, SITE_DIR, IMAGE_DIR, f"/usr/share/doc/{PACKAGE}"} & {name, *map(str, PurePath(name).parents)}:
                yield f"%dir {name}"
        else:
            yield f"{'%config(noreplace) ' if name in conffiles else ''}{name}"


# --- The demonstration ----------------------------------------------------------------------------


def busybox_image(work: Path) -> Path:
    tree = work / "tree"
    files = {
        "etc/hostname": "localhost\n",
        "etc/os-release": 'ID=busybox\nPRETTY_NAME="imageos demonstration"\n',
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
        "etc/group": "root:x:0:\n",
        "etc/inittab": "::sysinit:/bin/mount -a\n",
    }
    for directory in ("bin", "boot", "dev", "etc", "proc", "root", "sbin", "sys", "tmp", "var"):
        (tree / directory).mkdir(parents=True)
    for name, text in files.items():
        (tree / name).write_text(text)
    shutil.copy(str(shutil.which("busybox")), tree / "bin/busybox")
    for applet in ("sh", "ls", "cat", "mount", "hostname"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "sbin/init").symlink_to("../bin/busybox")
    return packed(tree, work / f"images/busybox-{platform.machine()}.tar.zst")


def debian_image(work: Path) -> Path:
    """A bookworm that boots, kept in .cache: debootstrap takes minutes."""
    recipe = hashlib.sha256(" ".join(DEBIAN_PACKAGES).encode()).hexdigest()[:8]
    image = CACHE / f"debian-12-{recipe}-x86_64.tar.zst"
    if image.exists():
        return image
    say("running debootstrap; this takes minutes")
    tree = work / "tree"
    include = f"--include={','.join(DEBIAN_PACKAGES)}"
    debootstrap = ["debootstrap", "--variant=minbase", include, "bookworm", str(tree)]
    # In namespaces, because an interrupted debootstrap leaves mounts in the tree.
    run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *debootstrap])
    run(["chroot", str(tree), "apt-get", "clean"])
    return packed(tree, image)


def packed(tree: Path, image: Path) -> Path:
    make_directory(image.parent)
    unfinished = image.with_name(f".{image.name}")
    attributes = ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls"]
    run(["tar", "--create", "--zstd", f"--file={unfinished}", *attributes, "-C", str(tree), "."])
    unfinished.replace(image)
    say(f"made {image.name}: {image.stat().st_size / 1e6:.1f} MB")
    return image


def installed_root(work: Path, image: Path, hooks: Sequence[str]) -> Path:
    """A root directory with the OS definition as `imageos install` puts it, then configured."""
    root = work / "root"
    root.mkdir()
    run([str(ZIPAPP), "install", "--root", str(root)])
    site = root / "etc/ganeti/instance-image"
    with open(root / "etc/default/ganeti-instance-image", "a") as defaults:
        defaults.write(f"IMAGE_DIR={shlex.quote(str(image.parent))}\n")
    for name in hooks:
        (site / "hooks" / name).chmod(0o755)
    (site / "hooks/zz_demo").write_text(DEMO_HOOK)
    (site / "hooks/zz_demo").chmod(0o755)
    return root


def empty_disk(work: Path, gib: int) -> Path:
    disk = work / "disk0"
    with open(disk, "wb") as file:
        file.truncate(gib << 30)
    return disk


def create(root: Path, disk: Path, image: Path) -> None:
    environment = create_environment(RECORDED.read_text(), disk, image)
    say(f"{OS_DIR}/create, as Ganeti calls it for {environment['INSTANCE_NAME']}")
    start = time.monotonic()
    process = subprocess.run(
        ["unshare", "--mount", "sh", "-c", AS_INSTALLED, "sh", str(root), f"{OS_DIR}/create"],
        env=environment,
        umask=0o077,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    if process.returncode != 0:
        raise BuildError(f"create ended with status {process.returncode}")
    say(f"created in {time.monotonic() - start:.1f} s")


def create_environment(recorded: str, disk: Path, image: Path) -> dict[str, str]:
    """The recorded environment of a `create`, with one disk, and the image as OS parameters."""
    lines = [line for line in recorded.splitlines() if not line.startswith(("#", "DISK_1_"))]
    return {
        **dict(line.split("=", 1) for line in lines),
        "DISK_COUNT": "1",
        "DISK_0_PATH": str(disk),
        "DISK_0_SIZE": str(disk.stat().st_size >> 20),  # MiB
        "INSTANCE_OS": "image+default",
        "OS_NAME": "image",
        "OSP_IMAGE_TYPE": "tarball",
        "OSP_IMAGE_NAME": image.name.rpartition("-")[0],
    }


def show_disk(disk: Path) -> None:
    """Print what is on the disk; debugfs reads it in place, so nothing is mounted."""
    show("partition table", run(["sfdisk", "--list", str(disk)]))
    root = root_start(run(["sfdisk", "--dump", str(disk)]))
    for path in ("/etc/fstab", "/etc/hostname", "/etc/hosts", "/etc/motd"):
        text = debugfs(disk, root, f"cat {path}")
        if not text:
            raise BuildError(f"create succeeded, but the guest has no {path}")
        show(f"{path} of the guest", text)
    show("files of the guest", debugfs(disk, root, "ls -l /"))


def root_start(dump: str) -> int:
    """Bytes before the last partition, which is the root, in what `sfdisk --dump` printed."""
    return 512 * int(re.findall(r"start= *([0-9]+)", dump)[-1])


def debugfs(disk: Path, offset: int, request: str) -> str:
    return run(["debugfs", "-R", request, f"{disk}?offset={offset}"])


def show(title: str, text: str) -> None:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    print(f"\n--- {title}", *lines, sep="\n", flush=True)


def boot(disk: Path) -> None:
    say("booting it in qemu (software emulation)")
    machine = ["-accel", "tcg", "-cpu", "max,-cx16", "-m", "512", "-nic", "none", "-no-reboot"]
    console = ["-display", "none", "-monitor", "none", "-serial", "stdio"]
    drive = ["-drive", f"file={disk},format=raw,if=virtio"]
    # --pdeathsig: no qemu survives us, however we end.
    command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *machine, *console, *drive]
    start = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        try:
            show_console_until_login(qemu)
        finally:
            qemu.kill()
    say(f"login prompt after {time.monotonic() - start:.0f} s")


def show_console_until_login(qemu: subprocess.Popen[bytes]) -> None:
    assert qemu.stdout is not None
    console = ""
    shown = line = 0
    deadline = time.monotonic() + BOOT_DEADLINE
    with selectors.DefaultSelector() as selector:
        selector.register(qemu.stdout, selectors.EVENT_READ)
        while " login:" not in console[line:]:
            line = shown  # where the last one begins that was not complete: the prompt may be, with what comes next
            if not selector.select(deadline - time.monotonic()):
                raise BuildError(f"no login prompt within {BOOT_DEADLINE} s")
            data = os.read(qemu.stdout.fileno(), 65536)
            if not data:
                raise BuildError("qemu ended before the login prompt")
            console += data.decode("ascii", "replace")
            complete = console.rfind("\n") + 1
            show_console(console[shown:complete])
            shown = max(shown, complete)
    show_console(console[shown:])


def show_console(text: str) -> None:
    """Print what a guest wrote on its console, a line where it moved the cursor (GRUB's menu)."""
    text = re.sub(r"\x1b\[[0-9;]*H", "\n", text)
    text = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|.)|[^ -~\n]", "", text)
    for line in text.splitlines():
        if line.strip(" |"):
            print(line.rstrip(), flush=True)


# --- Helpers --------------------------------------------------------------------------------------


def run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return its stdout; if it fails, say the last lines that it printed."""
    process = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if process.returncode != 0:
        for line in (process.stdout + process.stderr).splitlines()[-15:]:
            say(f"| {line}")
        raise BuildError(f"failed with status {process.returncode}: {shlex.join(command)}")
    return process.stdout


@contextmanager
def scratch_directory() -> Iterator[Path]:
    # Not /tmp, which may be in memory: the disk of a demonstration is large.
    place = os.environ.get("TMPDIR", "/var/tmp")
    # A signal waits while the directory is made or taken away, which would be left half done.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with tempfile.TemporaryDirectory(prefix="imageos-", dir=place) as name:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                yield Path(name)
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_directory(path: Path) -> None:
    """As root, too, what is made in a checkout belongs to whom the checkout belongs to."""
    path.mkdir(exist_ok=True)
    if os.geteuid() == 0 and path.is_relative_to(CHECKOUT):
        os.chown(path, CHECKOUT.stat().st_uid, CHECKOUT.stat().st_gid)


def require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise BuildError(f"{command} needs root", hint=f"sudo ./build.py {command}")


def require_machine() -> None:
    """Say what a chroot or a container lacks that every node has, before anything is installed."""
    for path, remedy in MOUNTED.items():
        if not Path(path).exists():
            raise BuildError(f"there is no {path}", hint=f"in a chroot: {remedy}")
    if not any(line.split()[4] == "/" for line in Path("/proc/self/mountinfo").read_text().splitlines()):
        raise BuildError(
            "the root directory is not a mount point, so whatever is mounted here would be seen outside",
            hint="outside, make it one before chroot: mount --bind DIRECTORY DIRECTORY",
        )


def shown(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def say(text: str) -> None:
    print(f"build: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
