"""Programs of the node that may read what a stranger has made: who takes one over has no way out, nor root's rights.

Whatever a command of the fault table runs is taken over here, but for what run.OUTSIDE names.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import guestdisks
import pytest
import trees
import wrappers
from cases import CASES
from support import PATH, Node, mounted, partitions, run
from test_fault_table import learn

from imageos.run import OUTSIDE

MakeDisk = Callable[..., Path]
# The kernel asks these for CAP_SYS_ADMIN, which does more; they make a filesystem, or hand the wish to grow one on
ADMINISTRATORS = ("mkfs.xfs", "xfs_growfs", "btrfs")
THEIRS = {"read the memory of process 1"}  # which is imageos itself as it was, in there
ESP_HOOK = """#!/usr/bin/env python3
from imageos.guests import esp
from imageos.hook import Hook


def main(hook):
    (device,) = [one.device for one in hook.volumes if one.role == "esp"]
    esp.write(device, {"EFI/BOOT/BOOTX64.EFI": b"a loader"})


Hook.run(main)
"""


@dataclass(frozen=True)
class TakenOver:
    """A PATH in which every program but those outside is taken over first; what each of them told."""

    path: str
    told: list[str]

    def found(self) -> dict[str, set[str]]:
        """Program -> in what it succeeded."""
        found: dict[str, set[str]] = {}
        for program, *what in (words.split("\n") for words in self.told):
            found.setdefault(program, set()).update(what)
        return found


@pytest.fixture
def taken_over(tmp_path: Path) -> Iterator[TakenOver]:
    place, canary = tmp_path / "taken", tmp_path / "canary"
    place.mkdir()
    canary.write_text("of the node")
    shutil.copy(Path(__file__).with_name("takeover.py"), place)
    first = f'/usr/bin/python3 -IS {place}/takeover.py "${{0##*/}}" {canary}'
    for program in wrappers.programs():
        if program.name not in (*OUTSIDE, *wrappers.INTERPRETERS) and not program.name.startswith("python"):
            (place / program.name).write_text(f'#!/bin/sh\n{first}\nPATH={PATH} exec "${{0##*/}}" "$@"\n')
            (place / program.name).chmod(0o755)
    before = socket.gethostname(), os.stat("/dev/null").st_mode
    with wrappers.listening(place) as told:
        yield TakenOver(f"{place}:{PATH}", told)
    assert canary.read_text() == "of the node"
    assert (socket.gethostname(), os.stat("/dev/null").st_mode) == before


def escapes(found: dict[str, set[str]]) -> dict[str, set[str]]:
    beyond = {program: what - (THEIRS if program in ADMINISTRATORS else set()) for program, what in found.items()}
    return {program: what for program, what in beyond.items() if what}


@pytest.mark.parametrize("name", [name for name in CASES if "elsewhere" not in name])  # with that node's PATH
def test_every_program_is_taken_over(
    name: str, node: Node, sources: Path, small_tree: Path, ganeti: None, tmp_path: Path, taken_over: TakenOver
) -> None:
    case = CASES[name]
    case.make_layout(sources, small_tree, tmp_path)
    called, places = learn(case, node, sources, tmp_path / "learn")
    disk = case.disk(tmp_path / "disk", sources)
    case.call(node, disk, taken_over.path).ok()
    found = taken_over.found()
    assert called.keys() - OUTSIDE.keys() - {"ssh-keygen"} <= found.keys()  # which may be ended too early
    assert escapes(found) == {}
    assert [(part.start, part.size) for part in partitions(disk)] == places


def test_loader_is_written(node: Node, disk: MakeDisk, images: Path, taken_over: TakenOver) -> None:
    node.image(images / "small.tar.zst", f"zst-{trees.ARCH}.tar.zst")
    node.hook("esp", ESP_HOOK)
    target = disk(400)
    node.create(target, PATH=taken_over.path, OSP_IMAGE_NAME="zst", OSP_PARTITION_TABLE="gpt").ok()
    found = taken_over.found()
    assert "mcopy" in found and escapes(found) == {}
    esp = guestdisks.place(target, 2)
    assert esp
    assert run("mtype", "-i", f"{target}@@{esp.start}", "::EFI/BOOT/BOOTX64.EFI") == "a loader"


def test_host_key_is_made(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path, taken_over: TakenOver) -> None:
    tree = tmp_path / "tree"
    run("cp", "-a", small_tree, tree)
    (tree / "etc/ssh").mkdir(exist_ok=True)
    node.write(tree / "usr/bin/ssh-keygen", "#!/bin/sh\n")
    (tree / "usr/bin/ssh-keygen").chmod(0o755)
    trees.tarball(tree, node.images / f"keys-{trees.ARCH}.tar", "tar")
    target = disk()
    node.create(target, PATH=taken_over.path, OSP_IMAGE_NAME="keys").ok()
    found = taken_over.found()
    assert "ssh-keygen" in found and escapes(found) == {}
    with mounted(target, tmp_path / "mnt", partitions(target)[-1]) as top:
        assert "BEGIN RSA" in (top / "etc/ssh/ssh_host_rsa_key").read_text()


def test_what_runs_outside(node: Node, sources: Path, ganeti: None, tmp_path: Path) -> None:
    """The list is no longer than what the commands run; the rest of it is no program, or doctor's."""
    seen: set[str] = set()
    for name in ("mount-disks here", "mount-disks elsewhere"):
        seen |= learn(CASES[name], node, sources, tmp_path / name.replace(" ", "-"))[0].keys()
    assert seen & OUTSIDE.keys() == OUTSIDE.keys() - {"unshare", "hook", "settings", "shell"}


def test_attributes_that_take_more_are_left_out(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    run("cp", "-a", small_tree, tree)
    (tree / "noted").write_text("x")
    run("setcap", "cap_net_raw+ep", tree / "noted")
    for attribute in ("trusted.note", "user.note", "security.other"):
        os.setxattr(tree / "noted", attribute, b"1")
    trees.tarball(tree, node.images / f"noted-{trees.ARCH}.tar", "tar")
    target = disk()
    result = node.create(target, OSP_IMAGE_NAME="noted").ok()
    assert "left out: security.other, trusted.note" in result.log
    with mounted(target, tmp_path / "mnt", partitions(target)[-1]) as top:
        assert set(os.listxattr(top / "noted")) == {"user.note", "security.capability"}


# What the mounts forbid, for a moment allowed: Landlock alone is left
WITHOUT_MOUNTS = """
import sys
sys.path.insert(0, sys.argv[1])
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.run import pipeline

linux.restrict_mounts = lambda path, flags: None
place = sys.argv[2]
for tries in (": >new", "echo x >>old", "rm old", "mv old new", ": >/tmp/x"):
    tries = f"cd {place}; {tries}"
    print(pipeline([["sh", "-c", tries]], room=Room([place]))[0].status)
"""


def test_second_lock(tmp_path: Path) -> None:
    """Landlock, from Linux 5.19."""
    place = tmp_path / "seen"
    place.mkdir()
    (place / "old").write_text("of the node")
    checkout = Path(__file__).resolve().parents[2]
    said = run("/usr/bin/python3", "-c", WITHOUT_MOUNTS, checkout, place).split()
    assert [status == "0" for status in said] == [False, False, False, False, True]
    assert {path.name: path.read_text() for path in place.iterdir()} == {"old": "of the node"}
