"""Bare machines: a Debian with only python3 and sudo, kept between runs, and a way to run commands in it.

It has no venv module, pip, compiler, git or certificates. A command inside has its own namespaces, root directory and
environment; it shares this machine's kernel, devices and network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from checkouts import CHECKOUT

PACKAGES = "python3,sudo"
MIRROR = "http://deb.debian.org/debian"
CLEAN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
# This machine's settings for the network, if it has any
NETWORK = ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
INSIDE = """
root=$1; shift
mount --rbind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 tmpfs run
pivot_root . mnt
umount --lazy mnt
exec "$@"
"""


def unpack_bare(root: Path, work: Path, suite: str = "bookworm", cache: Path = CHECKOUT / ".cache") -> Path:
    """Unpack the Debian into the directory `root`; the first time, make it in `work`."""
    packed = cache / f"bare-{suite}-{PACKAGES.replace(',', '-')}.tar.zst"
    if not packed.exists():
        make_bare(suite, work, packed)
    subprocess.run(["tar", "--extract", f"--file={packed}", "-C", root], check=True)
    root.chmod(0o755)
    shutil.copyfile("/etc/resolv.conf", root / "etc/resolv.conf")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    # not at the usual path, where the package ca-certificates would replace them
    shutil.copyfile(CERTIFICATES, root / "etc/certificates.crt")
    (root / "etc/pip.conf").write_text("[global]\ncert = /etc/certificates.crt\n")
    # a mirror of sid may be a few weeks old
    (root / "etc/apt/apt.conf.d/mirror").write_text('Acquire::Check-Valid-Until "false";\n')
    return root


def make_bare(suite: str, work: Path, packed: Path) -> None:
    tree, unfinished = work / "tree", packed.with_name(f".{packed.name}")
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(tree), MIRROR]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    subprocess.run([*namespaces, *debootstrap], check=True)
    packed.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "--create", "--zstd", f"--file={unfinished}", "-C", str(tree), "."], check=True)
    unfinished.replace(packed)
    shutil.rmtree(tree)


def command_inside(root: Path, *command: str, enter: str = INSIDE) -> list[str]:
    """Return a command line that runs `command` inside, and ends with its parent."""
    namespaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-ec", enter, "sh", str(root), *command]


def environment_inside() -> Mapping[str, str]:
    return {**CLEAN, **{name: os.environ[name] for name in NETWORK if name in os.environ}}


def inside(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_inside(root, *command),
        env=environment_inside(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
