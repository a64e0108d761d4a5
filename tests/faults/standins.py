"""Stand-ins for gnt-cluster, gnt-instance and ssh, which the tools call, mounted over the real ones.

Each instance has a directory with these files: its `disk` (a path), its `node`, and `active` while its disks are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from support import PATH, Node, run

# The last word is the instance or, for ssh, the command. ssh leads to the test's own view of the machine.
SCRIPTS = {
    "gnt-cluster": "cat {top}/master",
    "gnt-instance": """
read -r disk <{top}/$last/disk && read -r node <{top}/$last/node || {{ echo unknown_entity >&2; exit 1; }}
[ -e {top}/$last/active ] && active=Y || active=N
case $1 in
  list) echo "$last|image+default|$node|file|1|ADMIN_down|down|N|$active" ;;
  activate-disks) : >{top}/$last/active; echo "$node:disk/0:$disk" ;;
  deactivate-disks) rm -f {top}/$last/active ;;
esac""",
    "ssh": 'exec nsenter --mount={top}/namespaces/mnt sh -c "$last"',
}


@dataclass(frozen=True)
class Instance:
    """A stopped instance that Ganeti knows."""

    name: str
    state: Path

    @property
    def place(self) -> Path:
        return Path(f"/tmp/{self.name}_root")

    def left(self) -> list[Path]:
        """Return what a tool has made and not removed."""
        traces = (self.state / "active", Path(f"/run/imageos-disks-{self.name}"), self.place)
        return [path for path in traces if path.exists()]


def instance(node: Node, disk: Path, elsewhere: bool) -> Instance:
    """Return an instance on this node, the master. If `elsewhere`: on a second node, with a third as master."""
    top = node.work.parent / "ganeti"
    instance = Instance(f"{node.work.name}.example.org", top / f"{node.work.name}.example.org")
    instance.state.mkdir(exist_ok=True)
    (instance.state / "disk").write_text(f"{disk}\n")
    (instance.state / "node").write_text("node2.example.org\n" if elsewhere else f"{os.uname().nodename}\n")
    # replace it in one step, so that a call at the same time never finds it empty
    master = instance.state / "master"
    master.write_text("node3.example.org\n" if elsewhere else f"{os.uname().nodename}\n")
    master.rename(top / "master")
    return instance


@contextmanager
def ganeti(top: Path) -> Iterator[None]:
    """Mount the stand-ins over the real programs, so that wrappers, too, find them."""
    top.mkdir()
    (top / "namespaces").mkdir()
    with ExitStack() as stack:
        mounts = {Path(f"/proc/{os.getpid()}/ns"): top / "namespaces"}
        for name, script in SCRIPTS.items():
            file = top / name
            file.write_text(f"#!/bin/sh\nPATH={PATH}\nfor last; do :; done\n{script.format(top=top)}\n")
            file.chmod(0o755)
            real = shutil.which(name, path=PATH)
            assert real, f"{name}: not found"
            mounts[file] = Path(real).resolve()
        for source, path in mounts.items():
            run("mount", "--bind", source, path)
            stack.callback(run, "umount", path)
        yield
