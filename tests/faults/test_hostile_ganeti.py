"""Hostile output of gnt-cluster, gnt-instance and ssh: it gives a message soon, and nothing is done.

They are stand-ins in PATH. The check after each test finds a mark of the instance and a directory in /tmp.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import PATH, Node

from imageos import cluster
from imageos.errors import Failure

HERE = os.uname().nodename
GOOD = f"inst1.example.org|image+default|{HERE}|file|1|ADMIN_down|down|N|N"
TOOLS = {
    "mount-disks": ("mount-disks", "inst1.example.org"),
    "umount-disks": ("umount-disks", "inst1.example.org"),
    "ganeti-image": ("ganeti-image", "-t", "qemu-img", "-i", "inst1.example.org"),
}
ENDLESS = {
    "lines without end": "exec yes inst1.example.org",
    "one line without end": "exec tr '\\0' x </dev/zero",
    "errors without end": "exec yes inst1.example.org >&2",
}
# the output, for printf(1)
WORDS = {
    "nothing": "",
    "a line too many": f"{GOOD}\\n{GOOD}\\n",
    "a field too many": f"{GOOD}|x\\n",
    "fields missing": "inst1.example.org|image\\n",
    "a name that leads out": GOOD.replace("inst1.example.org", "../../srv/x"),
    "a name that is an option": GOOD.replace("inst1.example.org", "--read-only"),
    "a name of two lines": GOOD.replace("inst1.example.org", "inst1\\nimageos: all is well"),
    "a name without end": GOOD.replace("inst1.example.org", "x" * 5000),
    "a node that is an option": GOOD.replace(f"|{HERE}|", "|-oProxyCommand=id|"),
    "a node that is a command": GOOD.replace(f"|{HERE}|", "|$(id)|"),
    "a node of two lines": GOOD.replace(f"|{HERE}|", "|a\\nb|"),
    "no UTF-8": GOOD.replace("inst1.example.org", "inst1\\377\\376"),
    "what a terminal obeys": GOOD.replace("inst1.example.org", "\\033[2J\\033]0;x\\007inst1"),
    "very many disks": GOOD.replace("|file|1|", f"|file|{'9' * 5000}|"),
    "a number that is none": GOOD.replace("|file|1|", "|file|\\302\\262|"),
    "no disks": GOOD.replace("|file|1|", "|file|-1|"),
}
PATHS = {
    "nothing": "",
    "another disk": f"{HERE}:disk/1:/dev/null\\n",
    "a number without end": f"{HERE}:disk/{'9' * 5000}:/dev/null\\n",
    "a number that is none": f"{HERE}:disk/\\302\\262:/dev/null\\n",
    "an option": f"{HERE}:disk/0:--help\\n",
    "a path that climbs": f"{HERE}:disk/0:/dev/../etc/shadow\\n",
    "what a terminal obeys": f"{HERE}:disk/0:/dev/\\033[2Jx\\n",
    "no disk": f"{HERE}:disk/0:/etc/shadow.d\\n",
    "no UTF-8": f"{HERE}:disk/0:/dev/\\377\\n",
    "a path without end": f"{HERE}:disk/0:/{'x' * 5000}\\n",
}


def ganeti(node: Node, top: Path, **scripts: str) -> str:
    """Return a PATH with these scripts as programs; gnt-instance has one script for each subcommand."""
    work = {
        "master": f"echo {HERE}",
        "list": f"echo '{GOOD}'",
        "activate": f"echo {HERE}:disk/0:/dev/null",
        "ssh": "exit 255",
        **scripts,
    }
    top.mkdir()
    programs = {
        "gnt-cluster": work["master"],
        "ssh": work["ssh"],
        "gnt-instance": f'echo "$1" >>"{top}/asked"\ncase $1 in\nlist) {work["list"]} ;;\n'
        f"activate-disks) {work['activate']} ;;\nesac",
    }
    for name, script in programs.items():
        node.write(top / name, f"#!/bin/sh\n{script}\n")
        (top / name).chmod(0o755)
    return f"{top}:{PATH}"


def refused(node: Node, tool: str, path: str) -> str:
    result = node.tool(*TOOLS[tool], path=path).failed()
    assert "internal error" not in result.log
    assert all(len(line) < 2000 and line.startswith("imageos: ") for line in result.lines), result.log
    assert "all is well" not in [line.removeprefix("imageos: ") for line in result.lines]
    assert result.seconds < 60
    return result.last


@pytest.mark.parametrize("tool", TOOLS)
def test_an_answer_without_end(tool: str, node: Node, tmp_path: Path) -> None:
    for name, script in ENDLESS.items():
        assert "it printed more than 1 MiB" in refused(node, tool, ganeti(node, tmp_path / name, list=script)), name
        path = ganeti(node, tmp_path / f"master, {name}", master=script)
        assert "it printed more than 1 MiB" in refused(node, tool, path), name


@pytest.mark.parametrize("tool", TOOLS)
def test_an_instance_that_is_none(tool: str, node: Node, tmp_path: Path) -> None:
    for name, words in WORDS.items():
        path = ganeti(node, tmp_path / name, list=f"printf -- '{words}'", ssh=f"touch {tmp_path}/reached")
        assert "cannot understand what gnt-instance list printed" in refused(node, tool, path), name
    assert not (tmp_path / "reached").exists()


@pytest.mark.parametrize("tool", ["mount-disks", "ganeti-image"])
def test_a_disk_that_is_none(tool: str, node: Node, tmp_path: Path) -> None:
    """Disks that Ganeti has activated on request are deactivated."""
    for name, words in PATHS.items():
        last = refused(node, tool, ganeti(node, tmp_path / name, activate=f"printf -- '{words}'"))
        assert "disk" in last, name
        assert (tmp_path / name / "asked").read_text().split()[-1] == "deactivate-disks", name


@pytest.mark.parametrize("tool", TOOLS)
def test_a_master_that_is_none(tool: str, node: Node, tmp_path: Path) -> None:
    for words in ("-oProxyCommand=id", "a\\nb", "a b", "\\033[2J", "\\377", "x" * 5000):
        path = ganeti(node, tmp_path / words[:9], master=f"printf -- '{words}'", ssh=f"touch {tmp_path}/reached")
        assert "names no master" in refused(node, tool, path), words
    assert not (tmp_path / "reached").exists()


ELSEWHERE = GOOD.replace(f"|{HERE}|", "|node2.example.org|")


@pytest.mark.parametrize("options", [(), ("--shell",)])
@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("kill -KILL $$", "ssh was killed by SIGKILL"),
        ("exit 255", "no answer"),
        ("echo no route >&2; exit 255", "no route"),
    ],
)
def test_connection_that_ends(options: tuple[str, ...], end: str, cause: str, node: Node, tmp_path: Path) -> None:
    """What our tool on the other node has said before is not the cause."""
    said = "echo 'imageos: the last words' >&2"
    path = ganeti(node, tmp_path / "path", list=f"echo '{ELSEWHERE}'", ssh=f"{said}; {end}")
    result = node.tool("mount-disks", *options, "inst1.example.org", path=path).failed()
    shown = "no answer" if options and "route" in end else cause  # then ssh itself has shown it
    assert result.last == f"imageos: cannot reach node node2.example.org over ssh, or lost it: {shown}"
    assert "the last words" in result.log and (cause in result.log)
    assert "hint: umount-disks inst1.example.org takes away what may be mounted there" in result.log
    assert (tmp_path / "path/asked").read_text().split()[-1] == "deactivate-disks"


@pytest.mark.parametrize("state", ["offline", "down"])
def test_node_that_ganeti_does_not_reach(state: str, node: Node, tmp_path: Path) -> None:
    """Whatever is asked for, the node is the cause, and nothing is tried."""
    message = f"imageos: node node2.example.org, which has the disks of instance inst1.example.org, is {state}"
    line = ELSEWHERE.replace("ADMIN_down|down|N", f"ERROR_node{state}|up|?")
    path = ganeti(node, tmp_path / "path", list=f"echo '{line}'", ssh=f"touch {tmp_path}/reached")
    for tool in (("mount-disks",), ("mount-disks", "--read-only"), ("ganeti-image", "-t", "dump", "-i")):
        result = node.tool(*tool, "inst1.example.org", path=path).failed()
        assert result.last == message
        assert "warning" not in result.log
    assert set((tmp_path / "path/asked").read_text().split()) == {"list"}
    assert not (tmp_path / "reached").exists()


def test_no_answer(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ganeti(node, tmp_path / "path", list="exec sleep 1000")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(cluster, "_master", lambda: HERE)
    with pytest.raises(Failure, match="gnt-instance was ended: not finished after 1 s"):
        cluster.ask(["gnt-instance", "list"], 1)
