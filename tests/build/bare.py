"""A Debian 12 with python3, sudo and nothing else, kept between runs, and commands in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from checkouts import CHECKOUT

CACHED = CHECKOUT / ".cache/bare-bookworm-python3-sudo.tar.zst"
# How this machine reaches the network, which the bare one is given too: files and variables.
NETWORK_FILES = ("/etc/resolv.conf", "/etc/pip.conf")
NETWORK = ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
INSIDE = """\
mount --bind "$1" "$1" # a machine's root is a mount point
mount -t proc proc "$1/proc"
mount -t sysfs sysfs "$1/sys"
mount --rbind /dev "$1/dev"
exec chroot "$@"
"""


def unpack_bare(root: Path, work: Path) -> Path:
    """That Debian in the directory `root`, with this machine's network; `work` is for making it the first time."""
    if not CACHED.exists():
        make_bare(work)
    subprocess.run(["tar", "--extract", f"--file={CACHED}", "-C", root], check=True)
    root.chmod(0o755)
    for name in NETWORK_FILES:
        if Path(name).exists():
            shutil.copyfile(name, root / name[1:])
    # Not where the package ca-certificates would replace them
    shutil.copyfile(CERTIFICATES, root / "etc/certificates.crt")
    return root


def make_bare(work: Path) -> None:
    tree, unfinished = work / "tree", CACHED.with_name(f".{CACHED.name}")
    debootstrap = ["debootstrap", "--variant=minbase", "--include=python3,sudo", "bookworm", str(tree)]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    subprocess.run([*namespaces, *debootstrap], check=True)
    CACHED.parent.mkdir(exist_ok=True)
    pack = ["tar", "--create", "--zstd", f"--file={unfinished}", "-C", str(tree), "."]
    subprocess.run(pack, check=True)
    unfinished.replace(CACHED)
    shutil.rmtree(tree)


def inside(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "PIP_CERT": "/etc/certificates.crt",
        **{name: os.environ[name] for name in NETWORK if name in os.environ},
    }
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    return subprocess.run(
        [*namespaces, "sh", "-ec", INSIDE, "sh", str(root), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
