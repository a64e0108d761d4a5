"""Parse Ganeti's output, recorded on 3.0.2; build the command line that reaches another node."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from imageos import cluster, remote
from imageos.cluster import ClusterInstance, parse_disks, parse_instance
from imageos.commands import ganeti_image, mount_disks, umount_disks
from imageos.errors import Failure
from imageos.remote import ssh_command
from imageos.run import Finished

# gnt-instance list --no-headers --separator='|' -o FIELDS
DOWN = "inst1.example.org|image+debian-12|node1.example.org|file|2|ADMIN_down|down|N|N\n"
RUNNING = "inst1.example.org|image+debian-12|node1.example.org|plain|1|running|up|Y|Y\n"
DISKS = """\
node1.example.org:disk/0:/srv/ganeti/file-storage/inst1.example.org/893f7303.file.disk0
node1.example.org:disk/1:/dev/vg/e8a99085.disk1
"""
UNKNOWN = """\
Failure: prerequisites not met for this operation:
error type: unknown_entity, error details:
Instance name nosuch.example.org not found
"""
STOPPED_GANETI = """\
Timeout while talking to the master daemon. Jobs might have been submitted and will continue to run even if the call \
timed out. Useful commands in this situation are "gnt-job list", "gnt-job cancel" and "gnt-job watch". Error:
Connect timed out
"""
FAILOVER = "if another one has the disks too, gnt-instance failover inst1.example.org"


def test_instance() -> None:
    assert parse_instance(DOWN) == ClusterInstance(
        *("inst1.example.org", "image+debian-12", "node1.example.org", "file", 2, "ADMIN_down"),
        stopped=True,
        disks_active=False,
    )
    assert parse_instance(RUNNING).disks_active


@pytest.mark.parametrize(
    ("states", "stopped"),
    [
        ("ADMIN_down|down|N", True),
        ("ADMIN_offline|offline|N", True),
        ("running|up|Y", False),
        ("ERROR_down|up|N", False),  # Ganeti's watcher will start it
        ("ERROR_up|down|Y", False),
        ("ERROR_nodedown|down|?", False),
    ],
)
def test_stopped(states: str, stopped: bool) -> None:
    assert parse_instance(DOWN.replace("ADMIN_down|down|N", states)).stopped == stopped


@pytest.mark.parametrize("text", ["", "inst1.example.org", DOWN.replace("|2|", "|?|")])
def test_instance_that_is_not_understood(text: str) -> None:
    with pytest.raises(Failure, match="cannot understand what gnt-instance list printed"):
        parse_instance(text)


@pytest.mark.parametrize("name", ["", "-x", "inst*", "a b", "../inst1", 'name == "x"', "inst1\n"])
def test_no_name_is_taken_for_a_filter_or_a_path(name: str) -> None:
    with pytest.raises(Failure, match="cannot be the name of an instance"):
        cluster.check_name(name)


def test_disks() -> None:
    paths = ("/srv/ganeti/file-storage/inst1.example.org/893f7303.file.disk0", "/dev/vg/e8a99085.disk1")
    assert parse_disks(DISKS, 2) == paths
    assert parse_disks("".join(reversed(DISKS.splitlines(keepends=True))), 2) == paths
    assert parse_disks("a warning: nothing\n" + DISKS, 2) == paths
    with pytest.raises(Failure, match="did not name disk 2"):
        parse_disks(DISKS, 3)


def test_disk_without_a_device() -> None:
    with pytest.raises(Failure, match=r"disk 0 has no device on the node \(None\)"):
        parse_disks("node1.example.org:disk/0:None\n", 1)


def test_complaint() -> None:
    def complaint(status: int, stderr: str) -> str:
        return cluster.complaint(Finished(["gnt-instance", "list"], status, b"", stderr))

    assert complaint(1, UNKNOWN) == "Instance name nosuch.example.org not found"
    assert complaint(1, STOPPED_GANETI) == "the master daemon does not answer"
    assert complaint(2, "\n") == "gnt-instance failed (exit status 2)"
    assert complaint(-9, "a warning\n") == "gnt-instance failed (killed by SIGKILL): a warning"


def test_ssh() -> None:
    command = ["umount-disks", "a b", "$(reboot)"]
    line = ssh_command(
        "node2.example.org", command, "c.example.org", "node1.example.org=22\nnode2.example.org=2222", False
    )
    assert line[0] == "ssh"
    assert line[-2] == "root@node2.example.org"
    assert shlex.split(line[-1]) == command
    assert {"-oHostKeyAlias=c.example.org", "-oPort=2222", "-oBatchMode=yes", "-oServerAliveInterval=7"} <= set(line)
    assert "-t" not in line


def test_a_node_that_is_gone_is_noticed() -> None:
    """ssh gives up when so many probes were not answered, at the time of the next one."""
    words = dict(re.findall(r"-oServerAlive(Interval|CountMax)=([0-9]+)", " ".join(ssh_command("n", [], "", "", True))))
    assert int(words["Interval"]) * (int(words["CountMax"]) + 1) <= 30


def test_ssh_without_what_ganeti_tells() -> None:
    line = ssh_command("node2", ["true"], "", "", True)
    assert not [word for word in line if word.startswith(("-oHostKeyAlias", "-oPort"))]
    assert "-t" in line


def test_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "node1.example.org")
    assert parse_instance(DOWN).is_here
    monkeypatch.setattr(socket, "getfqdn", lambda: "Node1.Example.org")  # Ganeti has small letters
    assert parse_instance(DOWN).is_here
    monkeypatch.setattr(socket, "getfqdn", lambda: "node2.example.org")
    assert not parse_instance(DOWN).is_here
    assert parse_instance(DOWN.replace("node1.example.org", os.uname().nodename)).is_here


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        ("running|up|Y", "gnt-instance stop inst1.example.org, or else"),
        ("ERROR_down|up|N", "gnt-instance stop inst1.example.org, or else"),
        ("ERROR_nodedown|down|?", f"repair node node1.example.org, or, {FAILOVER}"),
        ("ERROR_nodeoffline|up|?", f"repair node node1.example.org, or, {FAILOVER}"),
    ],
)
def test_what_to_do_about_an_instance_that_is_not_stopped(status: str, hint: str) -> None:
    with pytest.raises(Failure) as failure:
        cluster.check_stopped(parse_instance(DOWN.replace("ADMIN_down|down|N", status)), ", or else")
    assert failure.value.hint == hint


def test_what_to_do_about_a_node_that_is_down() -> None:
    known = parse_instance(DOWN.replace("ADMIN_down|down|N", "ERROR_nodeoffline|down|?"))
    with (
        pytest.raises(
            Failure, match="node node1.example.org, which has the disks of instance inst1.example.org, is offline"
        ) as failure,
        cluster.activated(known),
    ):
        pass
    assert failure.value.hint == f"repair node node1.example.org, or, {FAILOVER}"


@pytest.mark.parametrize(("status", "stderr"), [(1, "no such file\n"), (0, "")])
def test_what_to_do_without_ganeti(status: int, stderr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Finished(["gnt-cluster", "getmaster"], status, b"", stderr)
    monkeypatch.setattr(cluster, "pipeline", lambda *_, **__: [answer])
    with pytest.raises(Failure, match="not a node of a Ganeti cluster") as failure:
        cluster._master.__wrapped__()
    assert failure.value.hint is not None
    for words, known in (
        ("mount-disks --disk PATH", mount_disks.parser()),
        ("umount-disks --here", umount_disks.parser()),
        ("ganeti-image --disk PATH", ganeti_image.parser()),
    ):
        assert words in failure.value.hint
        assert words.split()[1] in known.format_help()


@pytest.mark.parametrize(
    ("stderr", "hint"),
    [
        ("Disk activation failed\n", "gnt-instance info inst1.example.org shows them"),
        (STOPPED_GANETI, "systemctl start ganeti.target, on the master"),
    ],
)
def test_what_to_do_about_disks_that_are_not_activated(stderr: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Finished(["gnt-instance", "activate-disks"], 1, b"", stderr)
    monkeypatch.setattr(cluster, "ask", lambda *_: answer)
    with pytest.raises(Failure, match="cannot activate the disks") as failure:
        cluster._activate(parse_instance(DOWN))
    assert (failure.value.hint or "").startswith(hint)


def test_what_to_do_about_another_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the hint is the one that the other tool has open."""
    monkeypatch.setattr(cluster, "MARK", f"{tmp_path}/disks-{{}}")
    with cluster._mark("inst1"), pytest.raises(Failure, match="another tool") as failure, cluster._mark("inst1"):
        pass
    assert failure.value.hint == f"wait for it; fuser -v {tmp_path}/disks-inst1 shows which"


@pytest.mark.parametrize(("active", "deactivated"), [("Y", False), ("N", True)])
def test_another_tool_that_ends_meanwhile(
    active: str, deactivated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disks were active when Ganeti was first asked, and are inactive now: a tool has ended, or it was none."""
    monkeypatch.setattr(cluster, "MARK", f"{tmp_path}/disks-{{}}")
    answers = {"list": DOWN.replace("|N|N", f"|N|{active}"), "activate-disks": DISKS, "deactivate-disks": ""}
    asked: list[str] = []

    def ask(command: Sequence[str], _seconds: float | None = None, _if_lost: str | None = None) -> Finished:
        asked.append(command[1])
        return Finished(list(command), 0, answers[command[1]].encode(), "")

    monkeypatch.setattr(cluster, "ask", ask)
    with cluster.activated(parse_instance(DOWN.replace("|N|N", "|N|Y"))):
        pass
    assert asked == ["list", "activate-disks", *(["deactivate-disks"] if deactivated else [])]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("status", "is_told"), [(0, False), (3, False), (137, True)])
def test_a_shell_there_that_was_killed(status: int, is_told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there could say so: the last line here does."""
    monkeypatch.setattr(remote, "over_ssh", lambda *words, **more: Finished([], status, b"", ""))
    said: list[str] = []
    monkeypatch.setattr("imageos.log.info", said.append)
    assert remote.talk_on("node2", ["mount-disks"], "do that") == status
    assert bool(said) == is_told
    if is_told:
        assert said[0] == "hint: do that" and "imageos was killed" in said[-1]


@pytest.mark.parametrize("number", [9, 15])
def test_ssh_that_was_killed(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "foreground", lambda command: -number)
    with pytest.raises(Failure, match="lost it: ssh was killed by SIG(KILL|TERM)") as told:
        remote.talk_on("node2", ["mount-disks"], "do that")
    assert told.value.hint == "do that"
