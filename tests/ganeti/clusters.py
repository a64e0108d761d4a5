"""Run scripts on a real cluster of one node (see one-node-cluster) with imageos installed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from support import PATH, TESTS, run

CLUSTER = TESTS / "ganeti/one-node-cluster"
OS_DIR = "/usr/share/ganeti/os/image"
SITE = "/etc/ganeti/instance-image"
MINUTES = 20  # a cluster that runs longer counts as hanging
IMAGES = "/var/cache/ganeti-instance-image"
# For every script:
#   say WHAT COMMAND...: print two lines WHAT around its output, the last line of which is its status (see `said`)
#   wait_for COMMAND...: repeat it until it succeeds
#   loops: list the loop devices over disks of instances and over copies of them
#   detached: succeed if there is none
FUNCTIONS = """
say() {
  what=$1; shift
  echo "$what"; { "$@" 2>&1 && status=0 || status=$?; echo "status $status"; }; echo "$what"
}
wait_for() {
  for _ in {1..3000}; do ! "$@" >/dev/null 2>&1 || return 0; sleep 0.1; done
  echo "in vain: wait_for $*"; return 1
}
loops() { losetup --list --noheadings --output NAME,BACK-FILE | grep -e /srv/ganeti/file -e 'ganeti-instance-image/#'; }
detached() { ! loops; }
"""
ADD = (
    "gnt-instance add -t file --no-start --no-name-check --no-ip-check -B memory=256"
    " --net 0:mode=routed,link=100,ip=192.0.2.50 -n node1.example.org"
)


def tiny_image(work: Path, files: Mapping[str, str | bytes] = {}) -> Path:  # noqa: B006
    """Make an image of the smallest possible system, with these files in addition."""
    tree, image = work / "tree", work / "tiny-x86_64.tar.gz"
    for directory in ("bin", "boot", "etc", "root"):
        (tree / directory).mkdir(parents=True)
    for name, content in {"etc/os-release": "ID=tiny\n", "etc/hostname": "image\n", **files}.items():
        (tree / name).write_bytes(content.encode() if isinstance(content, str) else content)
    run("tar", "--create", "--gzip", "--numeric-owner", "--directory", tree, "--file", image, ".")
    return image


class Cluster:
    """Start throw-away clusters with imageos installed, and run a script on each."""

    def __init__(self, imageos: Path, work: Path) -> None:
        self.imageos, self.work = imageos, work

    @contextmanager
    def running(self, script: str, kvm: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """Yield the process and the file that receives its output; the cluster ends with the context."""
        log = self.work / f"cluster-{len(list(self.work.glob('cluster-*')))}.log"
        argv = [str(CLUSTER), *(["--kvm"] if kvm else [])]
        argv += ["bash", "-euo", "pipefail", "-c", f"{FUNCTIONS}{self.imageos} install\n{script}"]
        with started(argv, log) as process:
            yield process, log

    def run(self, script: str) -> str:
        """Return the output of the script. If a command fails, the script stops and the test fails."""
        with self.running(script) as (process, log):
            return printed(process, log)


@contextmanager
def started(argv: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that ends with the context, or with this process."""
    argv = ["setpriv", "--pdeathsig", "KILL", *argv]
    environment = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}
    with log.open("wb") as output:
        process = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    with process:
        try:
            yield process
        finally:
            process.kill()


def printed(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the end, and return the output. Fail unless the status is 0."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(MINUTES * 60)
    text = log.read_text(errors="backslashreplace")
    assert process.returncode is not None, f"not finished within {MINUTES} minutes\n{text}"
    assert process.returncode == 0, text
    return text


def between(text: str, mark: str) -> str:
    """Return the text between two lines `mark`."""
    return text.split(f"{mark}\n")[1]


def said(log: str, what: str) -> tuple[int, list[str]]:
    """Return status and messages of a command that `say` ran."""
    *lines, status = between(log, what).splitlines()
    return int(status.split()[1]), [line.removeprefix("imageos: ") for line in lines]
