#!/usr/bin/env python3
"""usage: ./build.py                      build dist/imageos
       sudo ./build.py demo            build it, deploy a tiny image onto a file and show the result
       sudo ./build.py demo --debian   the same with Debian, and boot it in qemu to its login prompt
       sudo ./build.py test [ARGS...]  build it and run all tests, or pytest with ARGS
       sudo ./build.py bench [NAME...] build it and measure it against the same work done by hand
       ./build.py deb                  build it and a package for Debian and its relatives, in dist
       ./build.py rpm                  the same for Fedora and its relatives
       ./build.py --help               show this

Missing programs are installed: Debian's packages by apt-get (only as root; another user is told
what to install), shiv and the tools of the tests by pip in .venv, with this machine's pip settings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support import Node

CHECKOUT = Path(__file__).resolve().parent
DIST = CHECKOUT / "dist"
CACHE = CHECKOUT / ".cache"
VENV = CHECKOUT / ".venv"
ZIPAPP = DIST / "imageos"

# --- Needed tools and packages, and why -----------------------------------------------------------

# Development tools, from PyPI. Each is the newest that runs on Python 3.9.
BUILD_TOOLS = (
    "shiv==1.0.8",  # determines the layout of the archive
    "click==8.1.8",  # for shiv; later ones need Python 3.10
    "argparse-manpage==4.8",  # the manual page
    "shtab==1.13.0",  # the completions of bash and zsh
)
TEST_TOOLS = (
    *BUILD_TOOLS,
    "pytest==8.4.2",
    "pytest-xdist==3.8.0",  # two workers
    "hypothesis==6.141.1",  # properties of the parsers
    "mypy==1.19.1",  # linters run as tests, and another version reports other errors
    "ruff==0.17.6",
)
# Versions of their dependencies, fixed so that a new release cannot break a build or a linter.
CONSTRAINTS = (
    *("attrs==26.1.0", "exceptiongroup==1.3.2", "execnet==2.1.2", "iniconfig==2.1.0", "librt==0.16.0"),
    *("mypy_extensions==1.1.0", "packaging==26.3", "pathspec==1.1.1", "pluggy==1.6.0", "Pygments==2.21.0"),
    *("sortedcontainers==2.4.0", "tomli==2.5.0", "typing_extensions==4.16.0"),
)
WORKERS = ("--numprocesses=2", "--dist=loadgroup")  # for a run of all tests; a single tier is faster without

# Command, absolute path or Python module that this machine needs -> its Debian package
VENV_NEEDS = {"python:ensurepip": "python3-venv"}
DEMO_NEEDS = {
    "busybox": "busybox-static",  # the content of the tiny image
    "tar": "tar",
    "zstd": "zstd",
    "sfdisk": "fdisk",
    "mount": "mount",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",  # reads the guest without mounting it
}
DEBIAN_NEEDS = {
    **DEMO_NEEDS,
    "debootstrap": "debootstrap",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",  # keys for debootstrap
    "qemu-system-x86_64": "qemu-system-x86",  # boots the result
    "bash": "bash",
    "setpriv": "util-linux",
    "ssh-keygen": "openssh-client",
}
PACKAGE_NEEDS = {"deb": {"dpkg-deb": "dpkg"}, "rpm": {"rpmbuild": "rpm"}}
TEST_NEEDS = {  # besides the programs that imageos runs
    **DEBIAN_NEEDS,
    **PACKAGE_NEEDS["deb"],
    **PACKAGE_NEEDS["rpm"],
    "lintian": "lintian",  # checks the Debian package
    "strace": "strace",  # shows which files and programs are used
    "ip": "iproute2",
    "sysctl": "procps",
    "zsh": "zsh",  # completion
    "groff": "groff-base",  # the manual page
    "perl": "perl-base",  # makes the system calls of a hostile guest
    "/usr/share/OVMF/OVMF_CODE_4M.fd": "ovmf",  # boots from UEFI
    "gpg": "gpg",  # makes the signatures that gpgv checks
    "gpg-agent": "gpg-agent",  # makes the keys that sign
    "openssl": "openssl",  # makes certificates for an https server
    "pigz": "pigz",
    "setfacl": "acl",
    "setfattr": "attr",
    "setcap": "libcap2-bin",
    "dnsmasq": "dnsmasq-base",  # a DHCP server that puts names into the DNS
    "/usr/share/ganeti/testsuite/qa": "ganeti-testsuite",  # Ganeti's own tests of a cluster
    "sshd": "openssh-server",
    "journalctl": "systemd",  # reads the journal of a guest that was tried
    "socat": "socat",  # serial consoles of a real cluster
}

# --- The archive ----------------------------------------------------------------------------------

# Run the distribution's Python (Ganeti's PATH has no other). It ignores PYTHON* variables and the
# node's site-packages: they are not ours, and searching them costs time.
SHEBANG = "/usr/bin/env -S python3 -IS"
# Behind it, for a file that is cut off: Python takes that for source, and complains of this.
CUT_OFF = "# coding: this-file-is-cut-off-copy-it-again"

# The time of all files in the archive: the oldest that zip can store. It is a constant, not the time
# of the commit, because a checkout without git must give the same archive.
EPOCH = 315532800  # 1980-01-01

# Run directly from the archive; shiv's own start would unpack it into ~/.shiv and run that copy.
# So there are no copies to remove, nobody can alter the code that root executes, and it works without
# a home and on a full or read-only disk. The price is compiling at each start: 5 ms for 1000 lines.
# Every Python 3 must be able to parse this, so that an old one prints the message.
MAIN = """\
import _signal
import os
import sys
import zipimport

if sys.version_info < (3, 9):
    sys.stderr.write("imageos: needs Python 3.9 or later; python3 in PATH is %d.%d\\n"
                     % sys.version_info[:2])
    sys.exit(1)

# Until the program handles signals itself, SIGINT ends it without a traceback, as other signals do.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)

# Absolute, because commands change directory before they import their last modules.
program = os.path.realpath(sys.path[0])
sys.path[0] = program + "/site-packages"

# What `install` has compiled of this build (imageos/bytecode.py), where only root can have put it.
BUILD = "@BUILD@"
directory = os.stat(os.path.dirname(program))
if directory.st_uid == 0 and not directory.st_mode & 0o022:
    sys.path.insert(0, program + ".compiled/" + BUILD)


class Archive(zipimport.zipimporter):
    # zipimport itself loads a module to say how its file is called, and then once more
    def get_filename(self, name):
        file = "/__init__.py" if self.is_package(name) else ".py"
        return self.archive + "/" + self.prefix + name.rpartition(".")[2] + file

sys.path_hooks.insert(0, Archive)

from imageos.cli import main

# At once: Python takes all objects apart first, one by one, which takes longer than many a command.
os._exit(main())
"""

# --- The demonstration ----------------------------------------------------------------------------

DEMO_HOOK = """\
#!/bin/sh
# A site can change each new instance here. The guest's root is mounted at $TARGET.
set -eu
echo "$INSTANCE_NAME was made from $IMAGE_NAME; its root is on $ROOT_DEV" >"$TARGET/etc/motd"
cat "$TARGET/etc/motd"
"""

# Path that every node has -> how to get it in a chroot
MOUNTED = {
    "/proc/self/mountinfo": "mount -t proc proc /proc",
    "/sys/block": "mount -t sysfs sysfs /sys",
    "/dev/loop-control": "outside, mount --rbind /dev DIRECTORY/dev; without that file: modprobe loop",
}
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
            say("hint: remove the files of an earlier run as root: sudo rm -r dist .venv .cache")
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
    elif arguments in (["demo"], ["demo", "--debian"]):
        demo(debian="--debian" in arguments)
    elif arguments in (["deb"], ["rpm"]):
        package(arguments[0])
    elif arguments[0] == "test":
        return run_tool("test", "-m", "pytest", *(arguments[1:] or WORKERS))
    elif arguments[0] == "bench":
        return run_tool("bench", "tests/bench/bench.py", *arguments[1:])
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
        write_manual(python, work / "stage/imageos/manual")
        run_shiv(python, work / "stage", work / "shiv")
        write_archive(archive_members(work / "shiv"))
    say_built(ZIPAPP)


def demo(debian: bool) -> None:
    if debian and platform.machine() != "x86_64":
        raise BuildError(f"demo --debian needs an x86_64 machine; this is {platform.machine()}")
    prepare("demo --debian" if debian else "demo", DEBIAN_NEEDS if debian else DEMO_NEEDS)
    build()
    with scratch_directory() as work, helpers_of_the_tests():
        from machine import own_node

        image = debian_image(work) if debian else busybox_image(work)
        disk = work / "disk0"
        run(["truncate", f"--size={3 if debian else 1}G", str(disk)])
        with own_node(ZIPAPP, work) as node:
            create(node, disk, image, hooks=("grub",) if debian else ())
        show_disk(disk)
        if debian:
            boot(disk, work / "console")


def run_tool(name: str, *command: str) -> int:
    """Run a command with the Python of .venv; return its status. Keep root's bytecode out of the checkout, in CACHE."""
    from imageos.node.programs import PACKAGES

    prepare(name, {**PACKAGES, **TEST_NEEDS})
    python = virtual_environment(TEST_TOOLS)
    build()
    make_directory(CACHE)
    say(f"running {shlex.join([str(python), *command])}")
    # Not run(), which would hold the output back.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(CACHE / "bytecode")}
    return subprocess.run([str(python), *command], cwd=CHECKOUT, env=environment).returncode


def package(kind: str) -> None:
    install_packages(PACKAGE_NEEDS[kind])
    build()
    import packages

    zsh_completions, pack = packages.KINDS[kind]
    with scratch_directory() as work:
        tree, built = work / "tree", work / "built"
        for directory in (tree, built):
            directory.mkdir()
        run([str(ZIPAPP), "install", "--root", str(tree), "--bin-dir", "/usr/sbin"])
        packages.complete(tree, ZIPAPP, zsh_completions)
        run(pack(tree, built), SOURCE_DATE_EPOCH=str(EPOCH))
        (file,) = built.glob(f"*.{kind}")
        for old in DIST.glob(f"{packages.PACKAGE}*.{kind}"):
            old.unlink()  # so that `dist/*.deb` is only the new version
        shutil.move(str(file), DIST)
    say_built(DIST / file.name)


def prepare(command: str, needs: Mapping[str, str]) -> None:
    """Fail unless we are root on a suitable machine; install the missing packages."""
    if os.geteuid() != 0:
        raise BuildError(f"{command} needs root", hint=f"sudo ./build.py {command}")
    require_machine()
    install_packages(needs)


def require_machine() -> None:
    """Fail if a chroot or container lacks something that every node has, before anything is installed."""
    for path, remedy in MOUNTED.items():
        if not Path(path).exists():
            raise BuildError(f"there is no {path}", hint=f"in a chroot: {remedy}")
    if not any(line.split()[4] == "/" for line in Path("/proc/self/mountinfo").read_text().splitlines()):
        raise BuildError(
            "the root directory is not a mount point, so mounts made here would be visible outside",
            hint="make it one, outside and before chroot: mount --bind DIRECTORY DIRECTORY",
        )


# --- System packages and the virtual environment --------------------------------------------------


def install_packages(needs: Mapping[str, str]) -> None:
    absent = [need for need in needs if not present(need)]
    if not absent:
        return
    say(f"missing: {', '.join(absent)}")
    commands = install_commands([needs[need] for need in absent])
    if os.geteuid() != 0:
        line = " && ".join(f"sudo {shlex.join(command)}" for command in commands)
        raise BuildError(f"system packages are missing; install them with: {line}")
    with no_daemons_started():
        for command in commands:
            say(f"running {shlex.join(command)}")
            run(command, DEBIAN_FRONTEND="noninteractive")
    absent = [need for need in absent if not present(need)]
    if absent:
        raise BuildError(f"still missing after the installation: {', '.join(absent)}")


def present(need: str) -> bool:
    kind, _, name = need.rpartition(":")
    if kind == "python":
        importlib.invalidate_caches()
        return importlib.util.find_spec(name) is not None
    return shutil.which(need) is not None or (need.startswith("/") and Path(need).exists())


def install_commands(names: Sequence[str]) -> list[list[str]]:
    names = sorted({*names})
    if not shutil.which("apt-get"):
        raise BuildError(f"there is no apt-get here; install what Debian has in {', '.join(names)}")
    return [["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *names]]


@contextmanager
def no_daemons_started() -> Iterator[None]:
    """Keep Debian's packages from starting their services: tests need the program sshd, not a running server."""
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
    """Return the Python of .venv, which has `tools`. Use the network only if one is missing."""
    python = VENV / "bin/python3"
    stamp = VENV / "tools"  # written last, so that an interrupted installation has none
    if has_tools(python, stamp, tools):
        return python
    install_packages(VENV_NEEDS)
    say(f"installing {' '.join(tools)} in {shown(VENV)}")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    with scratch_directory() as work:
        environment = {"TMPDIR": str(work)}  # old versions of pip leave a file there
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], **environment)
        constraints = work / "constraints.txt"
        constraints.write_text("\n".join(CONSTRAINTS))
        run([*pip, "--constraint", str(constraints), *tools], **environment)
    stamp.write_text("\n".join((*tools, *CONSTRAINTS)) + "\n")
    return python


def has_tools(python: Path, stamp: Path, tools: Sequence[str]) -> bool:
    if not stamp.exists() or not {*tools, *CONSTRAINTS} <= set(stamp.read_text().split()):
        return False
    # The machine's Python may have been removed or upgraded since .venv was made.
    check = [str(python), "-Ic", "import shiv.cli"]
    return python.exists() and subprocess.run(check, capture_output=True).returncode == 0


# --- Building -------------------------------------------------------------------------------------


def stage_sources(stage: Path) -> None:
    """Copy the files for shiv: the package, with hooks and defaults where importlib finds them."""
    for source in ("imageos", "hooks.d", "defaults"):
        for path in sorted((CHECKOUT / source).rglob("*")):
            name = path.relative_to(CHECKOUT)
            if path.is_file() and is_source(name):
                target = stage / staged_name(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def is_source(name: PurePath) -> bool:
    """Return True for a file to pack, and False for what editors and Python leave in a checkout."""
    if name.parts[0] == "imageos" and name.suffix != ".py":
        return False
    return all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) and part != "__pycache__" for part in name.parts)


def staged_name(name: PurePath) -> PurePath:
    return name if name.parts[0] == "imageos" else PurePath("imageos") / name


def write_manual(python: Path, directory: Path) -> None:
    directory.mkdir()
    run([str(python), "-EB", str(CHECKOUT / "manual.py"), str(directory)])


def run_shiv(python: Path, stage: Path, output: Path) -> None:
    shiv = [str(python), "-Im", "shiv", "--uncompressed", "--reproducible", "-p", SHEBANG]
    arguments = ["-e", "imageos.cli:main", "--site-packages", str(stage), "-o", str(output)]
    run([*shiv, *arguments], SOURCE_DATE_EPOCH=str(EPOCH))


def archive_members(shiv_file: Path) -> dict[str, bytes]:
    """Return the files of shiv's archive, with MAIN instead of its bootstrap."""
    with zipfile.ZipFile(shiv_file) as archive:
        names = [name for name in archive.namelist() if not name.startswith(("_bootstrap/", "__main__.py"))]
        members = {name: archive.read(name) for name in names}
    members["__main__.py"] = MAIN.replace("@BUILD@", build_name(members)).encode()
    return members


def build_name(members: Mapping[str, bytes]) -> str:
    """Return a digest of these files and their names."""
    sums = "".join(f"{hashlib.sha256(members[name]).hexdigest()}  {name}\n" for name in sorted(members))
    return hashlib.sha256(sums.encode()).hexdigest()[:32]


def write_archive(members: Mapping[str, bytes]) -> None:
    make_directory(DIST)
    unfinished = DIST / f".{ZIPAPP.name}.{os.getpid()}"
    try:
        with open(unfinished, "wb") as file:
            file.write(f"#!{SHEBANG}\n{CUT_OFF}\n".encode())
            # Not compressed, because zlib and zlib-ng, which are both in use, give different bytes.
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in sorted(members):
                    archive.writestr(member_header(name), members[name])
        unfinished.chmod(0o755)
        unfinished.replace(ZIPAPP)
    finally:
        unfinished.unlink(missing_ok=True)


def member_header(name: str) -> zipfile.ZipInfo:
    """Return the same header for any umask, system and Python of the builder."""
    header = zipfile.ZipInfo(name, time.gmtime(EPOCH)[:6])
    header.create_system = 3  # Unix
    header.external_attr = 0o100644 << 16
    return header


# --- The demonstration ----------------------------------------------------------------------------


@contextmanager
def helpers_of_the_tests() -> Iterator[None]:
    """Let the demonstration import helpers of the tests, and turn their errors into BuildError."""
    sys.path[:0] = [str(CHECKOUT / "tests" / name) for name in ("", "disk", "bench")]
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        raise BuildError(str(error)) from error


def busybox_image(work: Path) -> Path:
    import trees

    image = work / f"busybox-{trees.ARCH}.tar.zst"
    trees.tarball(trees.guest(work / "tree", trees.SYSVINIT), image, "zst")
    return image


def debian_image(work: Path) -> Path:
    """Return a bookworm that boots. The tests keep it in .cache, because debootstrap takes minutes."""
    from debian import debian

    make_directory(CACHE)
    say("taking a Debian from .cache, or making it by debootstrap, which takes minutes")
    image = work / "debian-12-x86_64.tar.zst"
    image.symlink_to(debian("bookworm").tarball)
    return image


def create(node: Node, disk: Path, image: Path, hooks: Sequence[str]) -> None:
    """Call `create` as Ganeti does, with its recorded environment and the image as OS parameters."""
    from support import SITE

    node.defaults(f"IMAGE_DIR={shlex.quote(str(image.parent))}\nSWAP_SIZE=\nBOOT_SIZE=")
    node.hook("zz_demo", DEMO_HOOK)
    for name in hooks:
        (SITE / "hooks" / name).chmod(0o755)
    parameters = {"OSP_IMAGE_TYPE": "tarball", "OSP_IMAGE_NAME": image.name.rpartition("-")[0]}
    environment = node.environment(disk, env="create-kvm-network", **parameters)
    say(f"{node.os_dir}/create, as Ganeti calls it for {environment['INSTANCE_NAME']}")
    start = time.monotonic()
    process = subprocess.run(
        [node.os_dir / "create"],
        env=environment,
        cwd=node.os_dir,
        umask=0o077,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    if process.returncode != 0:
        raise BuildError(f"create ended with status {process.returncode}")
    say(f"created in {time.monotonic() - start:.1f} s")


def show_disk(disk: Path) -> None:
    """Print the content of the disk. debugfs reads it in place, so that nothing is mounted."""
    from support import table_of

    show("partition table", run(["sfdisk", "--list", str(disk)]))
    root = f"{disk}?offset={512 * table_of(disk)['partitions'][-1]['start']}"
    for path in ("/etc/fstab", "/etc/hostname", "/etc/hosts", "/etc/motd"):
        text = run(["debugfs", "-R", f"cat {path}", root])
        if not text:
            raise BuildError(f"create succeeded, but the guest has no {path}")
        show(f"{path} of the guest", text)
    show("files of the guest", run(["debugfs", "-R", "ls -l /", root]))


def boot(disk: Path, log: Path) -> None:
    from qemu import booting

    say("booting it in qemu (software emulation), which takes a minute")
    start = time.monotonic()
    with booting(disk, log) as console:
        show("console of the guest", console.wait_for(" login:"))
    say(f"login prompt after {time.monotonic() - start:.0f} s")


def show(title: str, text: str) -> None:
    text = re.sub(r"[^\t\n -~]", "", text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    print(f"\n--- {title}", *lines, sep="\n", flush=True)


# --- Helpers --------------------------------------------------------------------------------------


def run(command: list[str], **environment: str) -> str:
    """Run a command and return its stdout. If it fails, print its last 15 lines of output."""
    process = subprocess.run(
        command,
        env={**os.environ, **environment},
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
    # Not in /tmp, which may be in memory: the disk of a demonstration is large.
    parent = os.environ.get("TMPDIR", "/var/tmp")
    # Block signals while the directory is made or removed, so that neither stops half done.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with tempfile.TemporaryDirectory(prefix="imageos-", dir=parent) as name:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                yield Path(name)
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_directory(path: Path) -> None:
    """Make a directory. If it is in the checkout, give it to the owner of the checkout, also as root."""
    path.mkdir(exist_ok=True)
    if os.geteuid() == 0 and path.is_relative_to(CHECKOUT):
        os.chown(path, CHECKOUT.stat().st_uid, CHECKOUT.stat().st_gid)


def shown(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def say_built(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    say(f"built {shown(path)}: {path.stat().st_size} bytes, sha256 {digest}")


def say(text: str) -> None:
    print(f"build: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # leave no files beside imported modules of the checkout
    sys.path.insert(0, str(CHECKOUT))  # with PYTHONSAFEPATH too
    sys.exit(main(sys.argv[1:]))
