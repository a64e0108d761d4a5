"""A Debian 12 with python3 and nothing else: no venv module, no pip, no compiler, no git."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkouts import CHECKOUT, copied

CACHED = CHECKOUT / ".cache/bare-bookworm-python3.tar.zst"
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


@pytest.fixture(scope="module")
def bare(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CACHED.exists():
        make_bare(tmp_path_factory.mktemp("debootstrap"))
    root = tmp_path_factory.mktemp("bare")
    subprocess.run(["tar", "--extract", f"--file={CACHED}", "-C", root], check=True)
    root.chmod(0o755)
    for name in NETWORK_FILES:
        if Path(name).exists():
            shutil.copyfile(name, root / name[1:])
    # Not where the package ca-certificates would replace them
    shutil.copyfile(CERTIFICATES, root / "etc/certificates.crt")
    copied(root / "home/builder/imageos", with_tools=False)
    inside(root, "useradd", "builder")
    inside(root, "chown", "-R", "builder:", "/home/builder")
    return root


def make_bare(work: Path) -> None:
    tree, unfinished = work / "tree", CACHED.with_name(f".{CACHED.name}")
    debootstrap = ["debootstrap", "--variant=minbase", "--include=python3", "bookworm", str(tree)]
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


def as_builder(root: Path, line: str) -> subprocess.CompletedProcess[str]:
    return inside(root, "su", "builder", "-c", f"cd /home/builder/imageos && {line}")


def test_bare_machine(bare: Path, imageos: Path) -> None:
    """In the order in which somebody would meet it."""
    told = as_builder(bare, "./build.py")
    assert told.returncode == 1
    command = "sudo apt-get install --yes --no-install-recommends python3-venv"
    assert told.stdout.splitlines()[-1].endswith(f": sudo apt-get update && {command}"), told.stdout

    built = inside(bare, "/home/builder/imageos/build.py")
    assert built.returncode == 0, built.stdout
    assert "--no-install-recommends python3-venv" in built.stdout
    assert (bare / "home/builder/imageos/dist/imageos").read_bytes() == imageos.read_bytes()
    assert not (bare / "usr/sbin/policy-rc.d").exists()

    again = as_builder(bare, "./build.py")
    assert again.returncode == 0, again.stdout
    assert "installing" not in again.stdout

    demo = inside(bare, "/home/builder/imageos/build.py", "demo")
    assert demo.returncode == 0, demo.stdout
    assert "inst1.example.org was made from busybox" in demo.stdout

    ran = as_builder(bare, "dist/imageos --version")
    assert ran.stdout.startswith("imageos "), ran.stdout
