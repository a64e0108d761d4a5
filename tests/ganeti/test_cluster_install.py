"""imageos as a single file: copied to a cluster by Ganeti, installed, and removed."""

from __future__ import annotations

from pathlib import Path

import readme
from clusters import CLUSTER, FUNCTIONS, OS_DIR, printed, started

# Ganeti reaches its nodes as root by ssh.
SSHD = """
mkdir -p /run/sshd /root/.ssh
mount -t tmpfs -o mode=700 tmpfs /root/.ssh
ssh-keygen -q -t ed25519 -N '' -f /run/host_key
ssh-keygen -q -t rsa -N '' -f /root/.ssh/id_rsa
cp /root/.ssh/id_rsa.pub /root/.ssh/authorized_keys
cp /root/.ssh/id_rsa /root/.ssh/id_dsa
echo "cluster.example.org $(cut -d' ' -f1,2 /run/host_key.pub)" >/var/lib/ganeti/known_hosts
/usr/sbin/sshd -o HostKey=/run/host_key -o PermitRootLogin=yes -o PidFile=/run/sshd.pid -o StrictModes=no -o UsePAM=no
wait_for test -e /run/sshd.pid
"""

# Makes a mount namespace with layers over these directories, so that a package can be installed. The cluster has
# its own layers over others; the kernel allows no third layer over those of the test run.
LAYERED = """
set -eu
work=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$work"
for top in usr root var; do # the last hides $work
  mkdir -p "$work/$top/upper" "$work/$top/work"
  mount -t overlay -o "lowerdir=/$top,upperdir=$work/$top/upper,workdir=$work/$top/work" overlay "/$top"
done
exec "$@"
"""


def layered(script: str, work: Path, *options: str) -> list[str]:
    """Return a command that runs `script` after FUNCTIONS on a cluster of one node without changing the machine."""
    work.mkdir()
    argv = ["unshare", "--mount", "bash", "-c", LAYERED, "bash", str(work), str(CLUSTER), *options]
    return [*argv, "bash", "-euo", "pipefail", "-c", FUNCTIONS + script]


def on_cluster(script: str, work: Path) -> str:
    """Run `script` there; return its output."""
    log = work.with_suffix(".log")
    with started(layered(script, work), log) as process:
        return printed(process, log)


LOOK = """
echo DIAGNOSE; gnt-os diagnose; echo DIAGNOSE
echo VERIFY; gnt-cluster verify --error-codes || true; echo VERIFY
echo DOCTOR; imageos doctor; echo DOCTOR
"""


def check(text: str) -> None:
    diagnosed, verified, doctor = (text.split(f"{mark}\n")[1] for mark in ("DIAGNOSE", "VERIFY", "DOCTOR"))
    assert "OS: image [global status: valid]" in diagnosed, text
    assert "Verifying node status" in verified
    assert "ENODEOS" not in verified, verified
    assert doctor.endswith("\nthis node can deploy its variants\n"), doctor
    assert f"  ok     {OS_DIR}\n" in doctor


def test_copied_and_installed_by_gnt_cluster(imageos: Path, tmp_path: Path) -> None:
    """On all nodes of the cluster at once; a second time changes nothing."""
    script = f"""
        {SSHD}
        cp {imageos} /root/imageos.pyz
        gnt-cluster copyfile /root/imageos.pyz
        {readme.block("gnt-cluster command /root/imageos.pyz install")}
        gnt-cluster command /root/imageos.pyz install
        export PATH=$PATH:/usr/local/sbin
        {LOOK}
        gnt-instance add -t diskless --no-install --no-start --no-name-check --no-ip-check -B memory=256 \
            --no-nics --ignore-ipolicy -o image+default -n node1.example.org inst1.example.org
        gnt-cluster command imageos uninstall
        echo AFTER; gnt-os diagnose; echo AFTER
    """
    text = on_cluster(script, tmp_path / "layers")
    assert "is installed in" in text
    assert "nothing had to be changed" in text
    check(text)
    assert "warning: there are instances with the OS image: inst1.example.org" in text
    assert "OS: image" not in text.split("AFTER\n")[1]
