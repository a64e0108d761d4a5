"""A program of the guest can reach its own root and disk, and nothing of the node."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from readme import rights, rows
from support import Node

from imageos.node import linux

CAPABILITIES = {name[len("CAP_") :]: number for name, number in vars(linux).items() if name.startswith("CAP_")}
MakeDisk = Callable[..., Path]

# Runs `hook.target.run` on /probe, a shell script in the image; its output is in the log as `guest: ...`.
HOOK = """#!/usr/bin/env python3
from imageos.hook import Hook


def main(hook):
    hook.target.write("/probe", open("{probe}").read(), mode=0o755)
    for line in hook.target.run(["/bin/busybox", "sh", "/probe"]).splitlines():
        print("guest:", line)


Hook.run(main)
"""
# One line for each attempt: `NAME refused` or `NAME DONE`
ATTEMPTS: dict[str, str] = {
    "mknod": "busybox mknod /node b 7 0",
    "mount": "busybox mount -t tmpfs none /mnt",
    "remount-proc": "busybox mount -o remount,rw /proc",
    "unmount": "busybox umount /proc",
    "namespace": "busybox unshare -m true",
    "user-namespace": "busybox unshare -U true",
    "chroot": "busybox chroot / /bin/busybox true",
    "sysctl": "echo 1 > /proc/sys/kernel/sysrq",
    "sysrq": "echo h > /proc/sysrq-trigger",
    "sysfs": "echo 1 > /sys/block/loop0/uevent",
    "hostname": "busybox hostname other",
    "modules": "busybox insmod /probe",
    "canary": "cat {canary} /proc/1/root/{canary} /proc/self/cwd/../..{canary}",
    "loop-control": "busybox test -e /dev/loop-control",
}


def probe(node: Node, disk: Path, script: str) -> list[str]:
    """Return the facts that the guest's script prints."""
    path = node.work / "probe"
    path.write_text(script)
    node.hook("probe", HOOK.format(probe=path))
    lines = node.create(disk, IMAGE_DEBUG=None).ok().lines
    return [line.partition("guest: ")[2] for line in lines if "guest: " in line]


def test_a_guest_program_is_refused_what_is_not_its_own(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("of the node\n")
    attempts = {name: command.format(canary=canary) for name, command in ATTEMPTS.items()}
    script = "".join(
        f"(exec >/dev/null 2>&1; {command}) && echo {name} DONE || echo {name} refused\n"
        for name, command in attempts.items()
    )
    said = probe(node, disk(), script)
    assert said == [f"{name} refused" for name in attempts]


def test_a_guest_program_sees_only_its_own(node: Node, disk: MakeDisk) -> None:
    said = probe(
        node,
        disk(),
        """
        echo pid $$
        echo net $(busybox ls /sys/class/net)
        echo dev $(busybox ls /dev)
        echo caps $(busybox grep CapBnd /proc/self/status)
        echo hostname $(busybox hostname)
        echo stdin $(busybox readlink /proc/$$/fd/0)
        echo open $(for one in /proc/$$/fd/*; do busybox readlink $one; done)
        echo environment $(busybox env | busybox cut -d= -f1 | busybox sort)
        busybox sleep 1000 &
    """,
    )
    facts = dict(line.split(" ", 1) for line in said)
    assert facts["pid"] == "2"  # process 1 is ours
    assert facts["net"] == "lo"
    assert facts["hostname"] == "inst1"
    assert facts["stdin"].startswith("pipe:"), "the node's /dev/null could be given another mode through it"
    (allowed,) = (row for row in rights(CAPABILITIES) if row.who.startswith("a guest's"))
    assert int(facts["caps"].split()[-1], 16) == allowed.capabilities, "README says otherwise"
    disk_nodes = [name for name in facts["dev"].split() if name.startswith("loop")]
    whole = min(disk_nodes, key=len)
    assert sorted(disk_nodes) == [whole, f"{whole}p1", f"{whole}p2", f"{whole}p3"]
    others = set(facts["dev"].split()) - set(disk_nodes)
    assert others - {"disk", "fd", "stderr", "stdin", "stdout"} == allowed.devices, "README says otherwise"
    assert {name.partition(":")[0] for name in facts["open"].split()} <= {"/dev/null", "/probe", "pipe"}
    assert set(facts["environment"].split()) <= {"DEBIAN_FRONTEND", "HOME", "LANG", "PATH", "PWD", "SHLVL", "TERM", "_"}


def test_a_hook_has_all_that_root_has(node: Node, disk: MakeDisk) -> None:
    """As the README's table says: it is the site's own."""
    (hook,) = (row for row in rows("program") if row[0].startswith("a hook"))
    assert hook[1:] == ["all that root has", "the node's"]
    node.hook("own", "#!/bin/sh\necho caps $(grep CapEff /proc/self/status)\necho dev $(ls /dev)\n")
    lines = [line.partition("own: ")[2] for line in node.create(disk()).ok().lines]
    said = dict(line.split(" ", 1) for line in lines if " " in line)
    with open("/proc/self/status", encoding="ascii") as file:
        (ours,) = (line.split()[1] for line in file if line.startswith("CapEff:"))
    assert said["caps"].split()[-1] == ours
    devices = {name for name in os.listdir("/dev") if not name.startswith("loop")}
    assert devices <= set(said["dev"].split())


def test_a_guest_program_that_does_not_end_is_ended(node: Node, disk: MakeDisk) -> None:
    node.defaults("GUEST_TIMEOUT=1\n")
    path = node.work / "probe"
    path.write_text("busybox sleep 1000 & busybox sleep 1000\n")
    node.hook("probe", HOOK.format(probe=path))
    node.create(disk()).failed("hook probe", "1 s")


@pytest.mark.parametrize("name", ["dev", "proc"])
def test_a_link_in_the_place_of_a_mount_point_is_refused(
    node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path, name: str
) -> None:
    """A mount that followed it would be on the node."""
    import shutil

    import trees

    tree = tmp_path / "hostile"
    shutil.copytree(small_tree, tree, symlinks=True)
    (tree / name).rmdir()
    (tree / name).symlink_to("/mnt")
    trees.tarball(tree, node.images / f"tiny-{trees.ARCH}.tar.gz")
    path = node.work / "probe"
    path.write_text("true\n")
    node.hook("probe", HOOK.format(probe=path))
    # the /dev of shell hooks is mounted before any hook runs
    node.create(disk()).failed(*(["the guest's /dev"] if name == "dev" else ["hook probe", "cannot enter the sandbox"]))
