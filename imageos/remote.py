"""How the tools reach another node: over ssh, as Ganeti itself does."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Callable, Sequence

from imageos import log
from imageos.causes import cause
from imageos.errors import Failure, Interrupted, signal_name
from imageos.installation import program_there
from imageos.run import OUTPUT_LIMIT, Command, Finished, Outside, foreground, pipeline

STATE = "/var/lib/ganeti"  # Debian's place of what Ganeti tells every node
HOST = r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}"  # the name of an instance or a node


def run_on(node: str, words: Sequence[str], if_lost: str | None = None) -> None:
    """Run `imageos WORDS` on another node, and say what it says; fail, with its last line, unless its status is 0.

    `if_lost`: the hint when the connection has ended before the command, of which nothing is known then.
    """
    program = program_there()
    said: list[str] = []

    def relay(line: str) -> None:
        # one line late: the last one may be the cause
        if said:
            log.info(said.pop())
        said.append(line[len(log.PREFIX) :] if line.startswith(log.PREFIX) else line)

    try:
        ended = over_ssh(node, [program, *words], lambda ssh: pipeline(ssh, on_line=relay)[0], if_lost)
    except Interrupted:
        if if_lost:
            log.info(f"hint: {if_lost}")
        raise
    if ended.status == 127:
        raise Failure(f"node {node} has no {program}", hint=f"gnt-cluster copyfile -n {node} {program}")
    if ended.status:
        raise Failure(f"on node {node}: {said[0] if said else f'exit status {ended.status}'}")
    if said:
        log.info(said[0])


def talk_on(node: str, words: Sequence[str], if_lost: str) -> int:
    """Run `imageos WORDS`, which talks to the user, on another node; return its status. `if_lost` is as in `run_on`."""
    command = [program_there(), *words]

    def talk(ssh: Command) -> Finished:
        return Finished(ssh.argv, foreground(ssh), b"", "")

    status = over_ssh(node, command, talk, if_lost, terminal=os.isatty(0)).status
    if status == 128 + signal.SIGKILL:  # the one way to end without a word
        log.info(f"hint: {if_lost}")
        log.info(f"on node {node}: {command[0]} was killed, or the last command in its shell was (status {status})")
    return status


def over_ssh(
    node: str,
    command: Sequence[str],
    run: Callable[[Command], Finished],
    if_lost: str | None,
    terminal: bool = False,
) -> Finished:
    """Have `run` run the ssh that runs `command` on another node, as root; Failure if that is not how it has ended."""
    line = ssh_command(node, command, _told("ssconf_cluster_name"), _told("ssconf_ssh_ports"), terminal)
    ended = run(Command(line, Outside.SSH))
    if ended.status == 255 or ended.status < 0:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        of_ssh = [line for line in said if not line.startswith(log.PREFIX)]  # not of imageos there
        why = cause("ssh", "\n".join(of_ssh))
        killed = f"ssh was killed by {signal_name(-ended.status)}" if ended.status < 0 else ""
        raise Failure(
            f"cannot reach node {node} over ssh, or lost it: {killed or why or 'no answer'}",
            hint=if_lost,
            details=[line for line in said[-1:] if line not in of_ssh],
        )
    return ended


def ssh_command(node: str, command: Sequence[str], cluster: str, ports: str, terminal: bool) -> list[str]:
    """As Ganeti's ssh.py builds it: the nodes share a host key, known under the cluster's name."""
    told = re.findall(rf"(?m)^({HOST})=([0-9]{{1,5}})$", ports)
    port = next((value for name, value in told if name == node), "")
    return [
        "ssh",
        "-oLogLevel=ERROR",  # no banner, but why it failed
        *("-oBatchMode=yes", "-oEscapeChar=none", "-oConnectTimeout=10", "-oStrictHostKeyChecking=yes"),
        *("-oServerAliveInterval=7", "-oServerAliveCountMax=3"),  # a node that is gone is noticed after 28 s
        *(f"-oGlobalKnownHostsFile={STATE}/known_hosts", "-oUserKnownHostsFile=/dev/null", "-oCheckHostIp=no"),
        *([f"-oHostKeyAlias={cluster}"] if re.fullmatch(HOST, cluster) else []),
        *([f"-oPort={port}"] if port else []),
        *(["-t"] if terminal else []),
        f"root@{node}",
        shlex.join(command),
    ]


def _told(name: str) -> str:
    """A file by which Ganeti tells every node about the cluster."""
    try:
        with open(f"{STATE}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read(OUTPUT_LIMIT).strip()
    except OSError:
        return ""
