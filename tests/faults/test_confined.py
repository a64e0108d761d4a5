"""Programs of the node that read untrusted data: an attacker in one cannot get out, and does not have root's rights.

These tests take over all programs that the commands of the fault table run, except those in OUTSIDE.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import guestdisks
import pytest
import trees
import wrappers
from cases import CASES
from readme import Rights, rights
from support import PATH, Node, mounted, partitions, run
from test_fault_table import learn

from imageos.errors import Failure
from imageos.node import linux
from imageos.run import OUTPUT_LIMIT, Command, output_of

MakeDisk = Callable[..., Path]
# The kernel asks these for CAP_SYS_ADMIN, which does more; they make a filesystem, or hand the wish to grow one on
CAPABILITIES = {name[len("CAP_") :]: number for name, number in vars(linux).items() if name.startswith("CAP_")}
ADMINISTRATORS = ("mkfs.xfs", "xfs_growfs", "btrfs")
OUTSIDE = {"gnt-cluster", "gnt-instance", "ssh"}  # see run.Outside
THEIRS = {
    **dict.fromkeys(ADMINISTRATORS, {"read the memory of process 1"}),  # which is imageos itself as it was, in there
    "curl": {"read /etc/hosts"},  # where names are
}
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
    """A PATH in which every program except those outside is taken over first, and the reports of each."""

    path: str
    told: list[str]

    def found(self) -> dict[str, set[str]]:
        """Return program -> its successful attempts."""
        found: dict[str, set[str]] = {}
        for program, *what in (words.split("\n") for words in self.told):
            found.setdefault(program, set()).update(what[1:])
        return found

    def beyond_the_readme(self) -> set[str]:
        """Return the rights that a program reported, but that no row of the README's table has."""
        known = may_have()
        had = {tuple(words.split("\n")[:2]) for words in self.told}
        return {f"{program} {facts}" for program, facts in had if facts not in map(told, known(program))}


def may_have() -> Callable[[str], list[Rights]]:
    """Return a function that gives a program's rows in the README: those that name it, and those for all others."""
    rows = [row for row in rights(CAPABILITIES) if not row.who.startswith("a guest's")]
    return lambda program: [row for row in rows if program in row.programs or not row.programs]


def told(row: Rights) -> str:
    return f"has {row.capabilities} {' '.join(sorted(row.devices))}"


@pytest.fixture
def taken_over(tmp_path: Path) -> Iterator[TakenOver]:
    place, canary = tmp_path / "taken", tmp_path / "canary"
    place.mkdir()
    canary.write_text("of the node")
    shutil.copy(Path(__file__).with_name("takeover.py"), place)
    known = may_have()
    for program in wrappers.programs():
        if program.name not in (*OUTSIDE, *wrappers.INTERPRETERS) and not program.name.startswith("python"):
            most = 0
            for row in known(program.name):
                most |= row.capabilities
            first = f'/usr/bin/python3 -BIS {place}/takeover.py "${{0##*/}}" {canary} {most}'
            (place / program.name).write_text(f'#!/bin/sh\n{first}\nPATH={PATH} exec "${{0##*/}}" "$@"\n')
            (place / program.name).chmod(0o755)
    before = socket.gethostname(), os.stat("/dev/null").st_mode
    with wrappers.listening(place) as told:
        yield TakenOver(f"{place}:{PATH}", told)
    assert canary.read_text() == "of the node"
    assert (socket.gethostname(), os.stat("/dev/null").st_mode) == before


def escapes(found: dict[str, set[str]]) -> dict[str, set[str]]:
    beyond = {program: what - THEIRS.get(program, set()) for program, what in found.items()}
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
    assert called.keys() - OUTSIDE - {"ssh-keygen"} <= found.keys()  # which may be ended too early
    assert escapes(found) == {}
    assert taken_over.beyond_the_readme() == set()
    assert [(part.start, part.size) for part in partitions(disk)] == places


# What none of these programs says: it does its work, and says that before and behind its own words
LIES = """\
UUID={path}
{nines} bytes copied
  ({nines}.0/100%)
"required": {nines}
-rw-r--r-- 0/0 {nines} 2026-01-01 00:00:00 disk.img
totals\t1\t1\t1\t{nines}
"""
LIARS = {"create raw": ["dd", "blkid"], "create qcow2": ["qemu-img"]}
LIAR = """#!/bin/sh
cat {said}
cat {said} >&2
PATH={path} "${{0##*/}}" "$@"
status=$?
cat {said}
cat {said} >&2
exit $status
"""
RUNS_ONE = """#!/usr/bin/env python3
from imageos.hook import Hook
Hook.run(lambda hook: hook.target.run(["/bin/sh", "-c", "exit"]))
"""


@pytest.mark.parametrize("name", LIARS)
def test_what_they_say(name: str, node: Node, sources: Path, small_tree: Path, tmp_path: Path) -> None:
    """Numbers and names of a program that was taken over."""
    case, place, made = CASES[name], tmp_path / "taken", tmp_path / "made"
    place.mkdir()
    (place / "said").write_text(LIES.format(path="../" * 12 + str(made)[1:], nines="9" * 5000))
    for program in LIARS[name]:
        node.write(place / program, LIAR.format(said=place / "said", path=PATH))
        (place / program).chmod(0o755)
    node.hook("one", RUNS_ONE)
    case.make_layout(sources, small_tree, tmp_path)
    result = case.call(node, case.disk(tmp_path / "disk", sources), f"{place}:{PATH}")
    assert result.status in (0, 1) and "internal error" not in result.log, result.log
    assert not os.path.lexists(made)


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
    """The list contains only programs that the commands run."""
    seen: set[str] = set()
    for name in ("mount-disks here", "mount-disks elsewhere"):
        seen |= learn(CASES[name], node, sources, tmp_path / name.replace(" ", "-"))[0].keys()
    assert seen >= OUTSIDE


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


CHATTY = Command(["sh", "-c", "while :; do head -c 1M /dev/zero >&2; echo said; done"])


def stored() -> int:
    """Return the bytes of the unlinked files that this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            status = os.stat(f"/proc/self/fd/{name}")
            found += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) and not status.st_nlink else 0
    return found


def test_talk_without_end_is_bounded() -> None:
    """While a program's output is read, its other messages do not fill the node's memory."""
    before = stored()
    with output_of(CHATTY) as (output, _), open(output, closefd=False) as said:
        assert [said.readline() for _ in range(5)] == ["said\n"] * 5
        assert 0 < stored() - before <= OUTPUT_LIMIT
    assert stored() == before
    with (
        pytest.raises(Failure, match="last words"),
        output_of(Command(["sh", "-c", "echo last words >&2; exit 1"])) as (_, end),
    ):
        end()


# Allow for a moment what the mounts forbid: only Landlock is left
WITHOUT_MOUNTS = """
import sys
sys.path.insert(0, sys.argv[1])
from imageos.node import linux
from imageos.node.confinement import Room
from imageos.run import Command, pipeline

linux.restrict_mounts = lambda path, flags: None
place = sys.argv[2]
for tries in (": >new", "echo x >>old", "rm old", "mv old new", ": >/tmp/x"):
    tries = f"cd {place}; {tries}"
    print(pipeline(Command(["sh", "-c", tries], Room([place])))[0].status)
"""


def test_place_to_write_that_is_moved() -> None:
    """Where a program's messages go it shares with us: it may be sent to the end of all numbers."""
    moves = Command(["perl", "-e", "sysseek(STDERR, 0x7fffffffffffffff, 0); exit 1"])
    with output_of(moves) as (_, check), pytest.raises(Failure, match="exit status 1"):
        check()


def test_second_lock(tmp_path: Path) -> None:
    """Landlock forbids it, from Linux 5.19 on."""
    place = tmp_path / "seen"
    place.mkdir()
    (place / "old").write_text("of the node")
    checkout = Path(__file__).resolve().parents[2]
    said = run("/usr/bin/python3", "-c", WITHOUT_MOUNTS, checkout, place).split()
    assert [status == "0" for status in said] == [False, False, False, False, True]
    assert {path.name: path.read_text() for path in place.iterdir()} == {"old": "of the node"}


# Our own code that reads untrusted data, taken over: `takeover.py` runs instead of it
OWN_CODE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from imageos.node.children import in_child

with open(sys.argv[2]) as file:
    attempts = compile(file.read(), "takeover", "exec")
secret = os.open(sys.argv[3], os.O_RDONLY)

def work(file, write):
    sys.argv = ["takeover", "own code", sys.argv[3], "0"]
    names = {"__name__": "takeover"}
    more = [f"had descriptor {number}" for number in range(3, 64) if is_open(number)]
    exec(attempts, names)
    write("\\n".join([file.read().decode(), *more, *names["said"]]).encode())

def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True

reader, writer = os.pipe()
os.write(writer, b"what it may read")
os.close(writer)
with in_child(work, reader) as (said, status):
    print(said.read().decode(), status())
with in_child(lambda file, write: write(1 // 0), os.open("/dev/null", os.O_RDONLY)) as (said, status):
    print(said.read().decode(), status())
"""


def test_own_code_is_taken_over(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("of the node")
    checkout, takeover = Path(__file__).resolve().parents[2], Path(__file__).with_name("takeover.py")
    before = socket.gethostname(), os.stat("/dev/null").st_mode
    said = run("/usr/bin/python3", "-BIS", "-c", OWN_CODE, checkout, takeover, canary)
    has = [told(row) for row in rights(CAPABILITIES) if not row.capabilities and not row.programs]
    assert said.splitlines() == ["what it may read", "own code", f"{has[0]} 0", " 1"]
    assert (canary.read_text(), socket.gethostname(), os.stat("/dev/null").st_mode) == ("of the node", *before)


# A command that takes memory without an end, and what the programs, and hooks of ours, that it starts may take
OWN_MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
from imageos import hooks, outcome
from imageos.node import isolation
from imageos.run import Command, Outside, foreground, pipeline

LIMIT = "import os, resource; os.write(1, b'%d' % (resource.getrlimit(resource.RLIMIT_AS)[0] >> 10))"

def work():
    isolation.enter()
    limit = ["sh", "-c", "ulimit -v"]
    inside, outside = Command(limit), Command(limit, Outside.HOOK)
    hook = Command(["hook"], hooks._calling(["hook"], {}, compile(LIMIT, "hook", "exec")))
    print(*(pipeline(command)[0].stdout.decode().strip() for command in (inside, outside, hook)), flush=True)
    foreground(outside)
    bytearray(5 << 30)

sys.exit(outcome.guard(work))
"""


def test_own_memory_is_bounded() -> None:
    checkout = Path(__file__).resolve().parents[2]
    command = ["/usr/bin/python3", "-BIS", "-c", OWN_MEMORY, str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(4 << 20), "unlimited", str(4 << 20), "unlimited"]
    message = "imageos: imageos needs more memory than its limit of 4 GiB"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, message)
