"""A deployed guest's own programs, run as if it had booted: cloud-init's stages, sshd and its logins.

No kernel boots. The guest's root is entered in namespaces of its own, with an empty /run and the name that its
/etc/hostname says; the network has a loopback alone, with two addresses to log in from.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import mounted, partitions, run

NEAR, FAR = "192.0.2.1", "198.51.100.1"
STAGES = ("init --local", "init")  # make the name, users, passwords and keys
ENTER = f"""
root=$1
mount --make-rprivate /
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 run "$root/run"
mount --rbind /dev "$root/dev"
ip link set lo up
for address in {NEAR} {FAR}; do ip address add "$address/32" dev lo; done
hostname "$(cat "$root/etc/hostname")"
mkdir -p "$root/run/sshd" "$root/run/lock"
"""
NAMESPACES = ("--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")


@contextmanager
def guest_of(disk: Path, where: Path) -> Iterator[Path]:
    """Mount the root of a disk that create has made."""
    with mounted(disk, where, partitions(disk)[-1], "rw") as top:
        yield top


def inside(root: Path, script: str) -> str:
    """Run a script of bash in the guest, which has `$root` only outside; return what it prints."""
    words = ["unshare", *NAMESPACES, "bash", "-euc", f"{ENTER}\n{script}", "bash", root]
    return run("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *words)


def booted(root: Path, script: str = "") -> str:
    """Have cloud-init run as at boot, then run a script outside the guest's root; return what the script prints."""
    stages = "".join(f'chroot "$root" cloud-init {stage} >>"$root/run/said" 2>&1 || true\n' for stage in STAGES)
    return inside(root, f"{stages}\n{script}")


def logins(root: Path, key: Path, user: str = "root") -> dict[str, bool]:
    """Return from which address a user can log in with a private key, as the guest's sshd says."""
    ssh = f"ssh -F none -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes"
    ssh += " -o ConnectionAttempts=20"  # sshd listens only after its parent has ended
    tries = "".join(
        f"{ssh} -b {source} {user}@{NEAR} true && echo {source} yes || echo {source} no\n" for source in (NEAR, FAR)
    )
    said = inside(root, f'chroot "$root" /usr/sbin/sshd\n{tries}')
    return {source: answer == "yes" for source, answer in (line.split() for line in said.splitlines())}


def new_key(path: Path, kind: str = "ed25519") -> str:
    """Make a pair of keys; return the public one."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", path.name, "-f", path], check=True)
    return path.with_name(f"{path.name}.pub").read_text().strip()
