"""Ask Ganeti about an instance, and have it activate the disks.

Ganeti is asked through gnt-cluster and gnt-instance alone, on the master; another node asks there over ssh.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import NamedTuple

from imageos import log
from imageos.errors import Failure, Interrupted
from imageos.node import linux
from imageos.remote import HOST, over_ssh
from imageos.run import OUTPUT_LIMIT, Command, Finished, Outside, pipeline

FIELDS = (
    *("name", "os", "pnode", "disk_template", "disk.count"),
    *("status", "admin_state", "oper_state", "disks_active"),
)
# A mark of each instance whose disks a tool uses: locked while it runs, kept for what mount-disks leaves mounted
MARK = "/run/imageos-disks-{}"
SILENT = "the master daemon does not answer"
ACTIVATED = b"activated\n"  # in a mark; an empty one says that the disks were active before
DEACTIVATE_TIMEOUT = 10.0  # seconds; what Ganeti has been asked for by then, it still does
ANSWER = 300.0  # seconds that Ganeti may take to answer
JOB = 3600.0  # ... to do something: other jobs of the cluster may come first
MOST_NAMES = 10000  # that are compared with one that is wrong


class ClusterInstance(NamedTuple):
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
        """True if this node is the one that has the disks."""
        return _is_this_node(self.node)

    @property
    def is_lost(self) -> bool:
        """True if Ganeti does not reach that node."""
        return self.status.startswith("ERROR_node")


def find_instance(name: str) -> ClusterInstance:
    """Return the instance that Ganeti knows by `name`, which may be short; fail if there is none, or no Ganeti."""
    check_name(name)
    command = ["gnt-instance", "list", "--no-headers", "--separator=|", "--output", ",".join(FIELDS), name]
    answer = ask(command)
    if answer.status == 0:
        return parse_instance(answer.stdout.decode("utf-8", "replace"))
    if "unknown_entity" not in answer.stderr:
        raise Failure(f"cannot ask Ganeti about instance {name}: {complaint(answer)}", hint=_hint(answer))
    raise Failure(f"there is no instance {name}", hint=_near(name))


def check_stopped(instance: ClusterInstance, otherwise: str = "") -> None:
    """Fail unless the instance is down and Ganeti means it to be; add `otherwise` to the hint."""
    _check_node(instance)
    if not instance.stopped:
        what = "is running" if instance.status == "running" else f"is not stopped: its status is {instance.status}"
        raise Failure(f"instance {instance.name} {what}", hint=f"gnt-instance stop {instance.name}{otherwise}")


@contextmanager
def activated(instance: ClusterInstance, keep: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the instance's disks on its primary node, in order, while no other tool uses them.

    Disks that were not active are deactivated in the end. With `keep` that is left, on success, to `deactivate`.
    """
    _check_node(instance)
    if not instance.disk_count:
        raise Failure(f"instance {instance.name} has no disks (disk template {instance.disk_template})")
    with _mark(instance.name) as mark:
        if os.fstat(mark).st_size:
            raise Failure(
                f"the disks of instance {instance.name} are mounted, or were left active by a tool that was killed",
                hint=f"umount-disks {instance.name} takes that away",
            )
        try:
            # a tool that has ended since Ganeti was asked may have deactivated them
            was_active = instance.disks_active and find_instance(instance.name).disks_active
            if not was_active:
                os.write(mark, ACTIVATED)
            yield _activate(instance)
        except BaseException as cause:
            _give_up(instance.name, mark, cause)
            raise
        if not keep:
            try:
                _deactivate(instance.name, mark)
            except Interrupted as cause:
                _give_up(instance.name, mark, cause)
                raise


def deactivate(name: str) -> None:
    """Deactivate the disks of the instance `name` if a tool has activated them and left them so."""
    if os.path.exists(MARK.format(name)):
        with _mark(name) as mark:
            _deactivate(name, mark)


def ask(command: Sequence[str], seconds: float = ANSWER, if_lost: str | None = None) -> Finished:
    """Run a gnt- command where it works: on the master. Fail if its output is not whole.

    `if_lost`: the hint when the master cannot be reached.
    """

    def run(command: Command) -> Finished:
        return pipeline(command, timeout=seconds, longest=OUTPUT_LIMIT)[0]

    master = _master()
    if _is_this_node(master):
        return run(Command(command, Outside.GANETI))
    return over_ssh(master, command, run, if_lost or f"run this on {master}, the master")


def instances() -> list[tuple[str, str]]:
    """Return the instances of the cluster, each with its OS and variant; fail if Ganeti does not say."""
    answer = ask(["gnt-instance", "list", "--no-headers", "--separator=|", "--output", "name,os"])
    if answer.status:
        raise Failure(f"cannot ask Ganeti for its instances: {complaint(answer)}", hint=_hint(answer))
    lines = answer.stdout.decode("utf-8", "replace").splitlines()
    return [(name, used) for name, _, used in (line.partition("|") for line in lines)]


# --- pure ------------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Fail unless `name` may be an instance's: Ganeti takes other text for a pattern or a filter."""
    if not re.fullmatch(HOST, name):
        raise Failure(f"{name!r} cannot be the name of an instance")


def parse_instance(text: str) -> ClusterInstance:
    """Parse the one line that `gnt-instance list` printed."""
    words = text.rstrip("\n").split("|")
    values = dict(zip(FIELDS, words))
    if (
        len(words) != len(FIELDS)
        or not all(word.isprintable() for word in words)
        or not all(re.fullmatch(HOST, values[name]) for name in ("name", "pnode"))
        or not re.fullmatch("[0-9]{1,4}", values["disk.count"])
    ):
        raise Failure(f"cannot understand what gnt-instance list printed: {shown(text)}")
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


def parse_names(text: str) -> list[str]:
    """Return the names of instances that `gnt-instance list` printed, as many as can be compared in a moment."""
    return [word for word in text.split() if re.fullmatch(HOST, word)][:MOST_NAMES]


def parse_disks(text: str, count: int) -> tuple[str, ...]:
    """Return the device paths, in order, that `gnt-instance activate-disks` printed (node:disk/N:path)."""
    paths: dict[int, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"[^:]*:disk/([0-9]{1,4}):(.*)", line)
        if match:
            paths[int(match[1])] = match[2]
    for index in range(count):
        if index not in paths:
            raise Failure(f"gnt-instance activate-disks did not name disk {index}: {shown(text.strip())}")
        if not paths[index].startswith("/"):
            raise Failure(
                f"disk {index} has no device on the node ({shown(paths[index]) if paths[index] else 'nothing'})",
                hint="set the instance's disk access to kernelspace: gnt-cluster modify --disk-parameters ...",
            )
        if not paths[index].isprintable() or ".." in paths[index].split("/"):
            raise Failure(f"{shown(paths[index])} cannot be the path of disk {index}")
    return tuple(paths[index] for index in range(count))


def shown(text: str) -> str:
    """Shorten the unexpected output of a program for a message."""
    return log.shorten(text, 200)


def complaint(answer: Finished) -> str:
    """Return the line of Ganeti's that says what is wrong."""
    stderr = answer.stderr
    if "Timeout while talking to the master daemon" in stderr or "Cannot communicate with the master" in stderr:
        return SILENT
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines and answer.status > 0 else str(answer.failure())


def _check_node(instance: ClusterInstance) -> None:
    if instance.is_lost:
        node, state = instance.node, instance.status[len("ERROR_node") :]
        raise Failure(
            f"node {node}, which has the disks of instance {instance.name}, is {state}",
            hint=f"repair node {node}, or, if another one has the disks too, gnt-instance failover {instance.name}",
        )


def _hint(answer: Finished) -> str | None:
    return "systemctl start ganeti.target, on the master" if complaint(answer) == SILENT else None


# --- the node --------------------------------------------------------------------------------------------


@cache
def _master() -> str:
    command = Command(["gnt-cluster", "getmaster"], Outside.GANETI)
    answer = pipeline(command, timeout=ANSWER, longest=OUTPUT_LIMIT)[0]
    name = answer.stdout.decode("utf-8", "replace").strip()
    if answer.status or not re.fullmatch(HOST, name):
        said = f" ({shown(name)})" if name else ""
        raise Failure(
            f"this is not a node of a Ganeti cluster: gnt-cluster getmaster names no master{said}",
            hint="mount-disks --disk PATH, umount-disks --here and ganeti-image --disk PATH work without Ganeti",
            details=answer.stderr.splitlines()[-10:],
        )
    return name


def _near(name: str) -> str:
    import difflib

    try:
        answer = ask(["gnt-instance", "list", "--no-headers", "--output", "name"])
    except Failure:
        return "gnt-instance list shows all of them"
    names = parse_names(answer.stdout.decode("utf-8", "replace"))
    short = {name.split(".")[0]: name for name in names}
    near = difflib.get_close_matches(name, [*names, *short], 3, 0.7)
    found = sorted({short.get(match, match) for match in near})
    return f"did you mean {' or '.join(found)}?" if found else "gnt-instance list shows all of them"


def _activate(instance: ClusterInstance) -> tuple[str, ...]:
    answer = ask(["gnt-instance", "activate-disks", instance.name], JOB)
    if answer.status:
        raise Failure(
            f"cannot activate the disks of instance {instance.name}: {complaint(answer)}",
            hint=_hint(answer) or f"gnt-instance info {instance.name} shows them, gnt-cluster verify-disks checks all",
        )
    return parse_disks(answer.stdout.decode("utf-8", "replace"), instance.disk_count)


def _give_up(name: str, mark: int, cause: BaseException) -> None:
    """Deactivate because of `cause`, to which the last line belongs; after a signal without much patience."""
    try:
        _deactivate(name, mark, DEACTIVATE_TIMEOUT if isinstance(cause, Interrupted) else JOB)
    except Failure as failure:
        log.warning(f"{failure}; umount-disks {name} does it later")


def _deactivate(name: str, mark: int, seconds: float = JOB) -> None:
    """Undo what `mark` says, and take it away."""
    if os.fstat(mark).st_size:
        hint = f"umount-disks {name}, when nothing uses them any more"
        answer = ask(["gnt-instance", "deactivate-disks", name], seconds, hint)
        # started meanwhile, or removed: then the disks are Ganeti's business
        if answer.status and "is marked to be up" not in answer.stderr and "unknown_entity" not in answer.stderr:
            raise Failure(f"cannot deactivate the disks of instance {name}: {complaint(answer)}", hint=hint)
    with suppress(FileNotFoundError):  # a signal has come just after this, the first time
        os.unlink(MARK.format(name))


@contextmanager
def _mark(name: str) -> Iterator[int]:
    """Yield the mark of the instance, locked; fail if another tool has it."""
    path = MARK.format(name)
    while True:
        with linux.closing(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)) as descriptor:
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


def _is_this_node(name: str) -> bool:
    return name.lower() in (os.uname().nodename.lower(), socket.getfqdn().lower())  # Ganeti has small letters
