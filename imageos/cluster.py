"""What the tools ask Ganeti about an instance, and how they reach the node that has its disks.

Ganeti is asked through gnt-cluster and gnt-instance alone, on the master; another node asks there over ssh.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

from imageos import log
from imageos.errors import Failure, Interrupted, signal_name
from imageos.run import Finished, pipeline

FIELDS = (
    *("name", "os", "pnode", "disk_template", "disk.count"),
    *("status", "admin_state", "oper_state", "disks_active"),
)
STATE = "/var/lib/ganeti"  # Debian's place of what Ganeti tells every node
# A mark of each instance whose disks a tool uses: locked while it runs, kept for what mount-disks leaves mounted
MARK = "/run/imageos-disks-{}"
SILENT = "the master daemon does not answer"
ACTIVATED = b"activated\n"  # in a mark: the disks were not active before
PATIENCE = 10.0  # seconds; what Ganeti has been asked for by then, it still does


@dataclass(frozen=True)
class ClusterInstance:
    """An instance as Ganeti knows it."""

    name: str  # in full
    os: str
    node: str  # its primary node
    disk_template: str
    disk_count: int
    status: str  # as gnt-instance(8) has it: running, ADMIN_down, ERROR_nodedown, ...
    stopped: bool  # and meant to be: Ganeti will not start it by itself
    disks_active: bool

    @property
    def is_here(self) -> bool:
        """Whether this node is the one that has the disks."""
        return _is_this_node(self.node)

    @property
    def is_lost(self) -> bool:
        """Whether Ganeti does not reach that node."""
        return self.status.startswith("ERROR_node")


def instance(name: str) -> ClusterInstance:
    """The instance that Ganeti knows by `name`, which may be short; Failure if there is none, or no Ganeti."""
    check_name(name)
    command = ["gnt-instance", "list", "--no-headers", "--separator=|", "--output", ",".join(FIELDS), name]
    answer = ask(command)
    if answer.status == 0:
        return parse_instance(answer.stdout.decode("utf-8", "replace"))
    if "unknown_entity" not in answer.stderr:
        raise Failure(f"cannot ask Ganeti about instance {name}: {complaint(answer)}", hint=_hint(answer))
    raise Failure(f"there is no instance {name}", hint=_near(name))


def check_stopped(known: ClusterInstance, otherwise: str = "") -> None:
    """Failure unless the instance is down and Ganeti means it to be; `otherwise` is what its hint says besides."""
    if not known.stopped:
        what = "is running" if known.status == "running" else f"is not stopped: its status is {known.status}"
        hint = _without_node(known) if known.is_lost else f"gnt-instance stop {known.name}{otherwise}"
        raise Failure(f"instance {known.name} {what}", hint=hint)


@contextmanager
def activated(known: ClusterInstance, keep: bool = False) -> Iterator[tuple[str, ...]]:
    """The paths of the instance's disks on its primary node, in order, while no other tool uses them.

    Disks that were not active are deactivated in the end. With `keep` that is left, on success, to `deactivate`.
    """
    if not known.disk_count:
        raise Failure(f"instance {known.name} has no disks (disk template {known.disk_template})")
    if known.is_lost:
        raise Failure(
            f"instance {known.name} is on node {known.node}, which is {known.status[len('ERROR_node') :]}",
            hint=_without_node(known),
        )
    with _mark(known.name) as mark:
        if os.fstat(mark).st_size:
            raise Failure(
                f"the disks of instance {known.name} are mounted, or were left active by a tool that was killed",
                hint=f"umount-disks {known.name} takes that away",
            )
        try:
            # a tool that has ended since Ganeti was asked may have deactivated them
            was_active = known.disks_active and instance(known.name).disks_active
            os.write(mark, b"was active\n" if was_active else ACTIVATED)
            yield _activate(known)
        except BaseException as cause:
            _give_up(known.name, mark, cause)
            raise
        if not keep:
            try:
                _deactivate(known.name, mark)
            except Interrupted as cause:
                _give_up(known.name, mark, cause)
                raise


def deactivate(name: str) -> None:
    """Deactivate the disks of the instance `name` if a tool has activated them and left them so."""
    if os.path.exists(MARK.format(name)):
        with _mark(name) as mark:
            _deactivate(name, mark)


def run_on(node: str, command: Sequence[str], if_lost: str | None = None) -> None:
    """Run `command` on another node, as root; what it says is said here. Failure has its last line.

    `if_lost`: the hint when the connection has ended before the command, of which nothing is known then.
    """
    said: list[str] = []

    def relay(line: str) -> None:
        # one line late: the last one may be the cause
        if said:
            log.info(said.pop())
        said.append(line[len("imageos: ") :] if line.startswith("imageos: ") else line)

    try:
        ended = pipeline([ssh(node, command)], on_line=relay)[0]
    except Interrupted:
        if if_lost:
            log.info(f"hint: {if_lost}")
        raise
    last = said[0] if said else f"exit status {ended.status}"
    if ended.status == 255:
        raise Failure(f"cannot reach node {node} over ssh: {last}", hint=if_lost)
    if ended.status < 0:
        for line in said:
            log.info(line)
        raise Failure(f"lost node {node}: ssh was killed by {signal_name(-ended.status)}", hint=if_lost)
    if ended.status == 127:
        raise Failure(f"node {node} has no {command[0]}", hint=f"gnt-cluster copyfile -n {node} {command[0]}")
    if ended.status:
        raise Failure(f"on node {node}: {last}")
    if said:
        log.info(last)


def ssh(node: str, command: Sequence[str], terminal: bool = False) -> list[str]:
    """The command line that runs `command` on `node`, as Ganeti itself reaches its nodes."""
    return ssh_command(node, command, _told("ssconf_cluster_name"), _told("ssconf_ssh_ports"), terminal)


def ask(command: Sequence[str], seconds: float | None = None) -> Finished:
    """Run a gnt- command where it works: on the master."""
    master = _master()
    if _is_this_node(master):
        return pipeline([command], timeout=seconds)[0]
    answer = pipeline([ssh(master, command)], timeout=seconds)[0]
    if answer.status == 255:
        raise Failure(f"cannot reach the master {master} over ssh: {complaint(answer)}", hint=f"run this on {master}")
    return answer


# --- pure ------------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Fail unless `name` may be an instance's: Ganeti takes other text for a pattern or a filter."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise Failure(f"{name!r} cannot be the name of an instance")


def parse_instance(text: str) -> ClusterInstance:
    """The one line that `gnt-instance list` printed."""
    values = dict(zip(FIELDS, text.rstrip("\n").split("|")))
    if len(values) != len(FIELDS) or not values["disk.count"].isdigit():
        raise Failure(f"cannot understand what gnt-instance list printed: {text!r}")
    return ClusterInstance(
        name=values["name"],
        os=values["os"],
        node=values["pnode"],
        disk_template=values["disk_template"],
        disk_count=int(values["disk.count"]),
        status=values["status"],
        stopped=values["admin_state"] in ("down", "offline") and values["oper_state"] == "N",
        disks_active=values["disks_active"] == "Y",
    )


def parse_disks(text: str, count: int) -> tuple[str, ...]:
    """The device paths, in order, that `gnt-instance activate-disks` printed (node:disk/N:path)."""
    paths: dict[int, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"[^:]*:disk/(\d+):(.*)", line)
        if match:
            paths[int(match[1])] = match[2]
    for index in range(count):
        if index not in paths:
            raise Failure(f"gnt-instance activate-disks did not name disk {index}: {text.strip()!r}")
        if not paths[index].startswith("/"):
            raise Failure(
                f"disk {index} has no device on the node ({paths[index] or 'nothing'})",
                hint="set the instance's disk access to kernelspace: gnt-cluster modify --disk-parameters ...",
            )
    return tuple(paths[index] for index in range(count))


def complaint(answer: Finished) -> str:
    """The line of Ganeti's that says what is wrong."""
    stderr = answer.stderr
    if "Timeout while talking to the master daemon" in stderr or "Cannot communicate with the master" in stderr:
        return SILENT
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines and answer.status > 0 else str(answer.failure())


def ssh_command(node: str, command: Sequence[str], cluster: str, ports: str, terminal: bool) -> list[str]:
    """As Ganeti's ssh.py builds it: the nodes share a host key, known under the cluster's name."""
    port = next((value for name, _, value in (line.partition("=") for line in ports.split()) if name == node), "")
    return [
        "ssh",
        "-oLogLevel=ERROR",  # no banner, but why it failed
        *("-oBatchMode=yes", "-oEscapeChar=none", "-oConnectTimeout=10", "-oStrictHostKeyChecking=yes"),
        *(f"-oGlobalKnownHostsFile={STATE}/known_hosts", "-oUserKnownHostsFile=/dev/null", "-oCheckHostIp=no"),
        *([f"-oHostKeyAlias={cluster}"] if cluster else []),
        *([f"-oPort={port}"] if port else []),
        *(["-t"] if terminal else []),
        f"root@{node}",
        shlex.join(command),
    ]


def _without_node(known: ClusterInstance) -> str:
    return f"repair node {known.node}, or, if another one has the disks too, gnt-instance failover {known.name}"


def _hint(answer: Finished) -> str | None:
    answers = complaint(answer) != SILENT
    return None if answers else "systemctl start ganeti.target, on the master"


# --- the node --------------------------------------------------------------------------------------------


@cache
def _master() -> str:
    answer = pipeline([["gnt-cluster", "getmaster"]])[0]
    name = answer.stdout.decode("utf-8", "replace").strip()
    if answer.status or not name:
        raise Failure(
            "this is not a node of a Ganeti cluster: gnt-cluster getmaster names no master",
            hint="mount-disks --disk PATH, umount-disks --here and ganeti-image --disk PATH work without Ganeti",
            details=answer.stderr.splitlines()[-10:],
        )
    return name


def _near(name: str) -> str:
    import difflib

    answer = ask(["gnt-instance", "list", "--no-headers", "--output", "name"])
    names = answer.stdout.decode("utf-8", "replace").split()
    short = {one.split(".")[0]: one for one in names}
    near = difflib.get_close_matches(name, [*names, *short], 3, 0.7)
    found = sorted({short.get(one, one) for one in near})
    return f"did you mean {' or '.join(found)}?" if found else "gnt-instance list shows all of them"


def _activate(known: ClusterInstance) -> tuple[str, ...]:
    answer = ask(["gnt-instance", "activate-disks", known.name])
    if answer.status:
        raise Failure(
            f"cannot activate the disks of instance {known.name}: {complaint(answer)}",
            hint=_hint(answer) or f"gnt-instance info {known.name} shows them, gnt-cluster verify-disks checks all",
        )
    return parse_disks(answer.stdout.decode("utf-8", "replace"), known.disk_count)


def _give_up(name: str, mark: int, cause: BaseException) -> None:
    """Deactivate because of `cause`, to which the last line belongs; after a signal without much patience."""
    try:
        _deactivate(name, mark, PATIENCE if isinstance(cause, Interrupted) else None)
    except Failure as failure:
        log.warning(f"{failure}; umount-disks {name} does it later")


def _deactivate(name: str, mark: int, seconds: float | None = None) -> None:
    """Undo what `mark` says, and take it away."""
    if os.pread(mark, 100, 0) == ACTIVATED:
        answer = ask(["gnt-instance", "deactivate-disks", name], seconds)
        # started meanwhile, or removed: then the disks are Ganeti's business
        if answer.status and "is marked to be up" not in answer.stderr and "unknown_entity" not in answer.stderr:
            raise Failure(
                f"cannot deactivate the disks of instance {name}: {complaint(answer)}",
                hint=f"umount-disks {name}, when nothing uses them any more",
            )
    with suppress(FileNotFoundError):  # a signal has come just after this, the first time
        os.unlink(MARK.format(name))


@contextmanager
def _mark(name: str) -> Iterator[int]:
    """The mark of the instance, locked; Failure if another tool has it. An empty one does not stay."""
    path = MARK.format(name)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failure(
                    f"another tool is working on the disks of instance {name}",
                    hint=f"wait for it; fuser -v {path} shows which",
                ) from None
            if not os.fstat(descriptor).st_nlink:
                continue  # the other one has just taken it away
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _is_this_node(name: str) -> bool:
    return name in (os.uname().nodename, socket.getfqdn())


def _told(name: str) -> str:
    """A file by which Ganeti tells every node about the cluster."""
    try:
        with open(f"{STATE}/{name}", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
