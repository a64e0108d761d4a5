"""mount-disks: mount the filesystems of an instance's guest at /tmp/INSTANCE_root, or for a shell only.

They are found and mounted out of sight, and appear on the node all at once: there is no half of it to clean up. The
loop device under them goes with the last mount.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack

from imageos import cluster, hooks, log
from imageos.cluster import ClusterInstance
from imageos.commandline import Parser
from imageos.disks import discovery, disk, filesystem
from imageos.disks.disk import Attached
from imageos.errors import Failure, Interrupted
from imageos.node import isolation, linux
from imageos.node.mounts import mount_point
from imageos.run import foreground


def parser() -> Parser:
    made = Parser("mount-disks", __doc__)
    made.add_instance()
    made.add_argument(
        "--read-only", action="store_true", help="write nothing, not even a journal; allows a running instance"
    )
    made.add_argument("--shell", action="store_true", help="open a shell there, which alone sees it; clean up after it")
    made.add_disk()
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    cluster.check_name(options.instance)
    node = linux.mount_view()
    isolation.enter()
    if options.disk:
        check_free(options.instance, options)
        return mount(options.instance, options.disk, options, node)
    known = cluster.instance(options.instance)
    if known.is_here:
        check_free(known.name, options)
    if not options.read_only:
        cluster.check_stopped(known, ", or --read-only, which writes nothing")
    elif not known.stopped:
        log.warning(f"instance {known.name} is not stopped ({known.status}): what you see may contradict itself")
    with cluster.activated(known, keep=not options.shell) as disks:
        if known.is_here:
            return mount(known.name, disks[0], options, node)
        return mount_there(known, disks[0], options)


def mount(name: str, path: str, options: argparse.Namespace, node: tuple[int, int]) -> int:
    """The filesystems on the disk `path`, for a shell or for everybody on the node."""
    place = mount_point(name)
    with ExitStack() as held:
        device = held.enter_context(disk.claimed(path, options.read_only, shared=options.read_only))
        attached = held.enter_context(disk.attached(device, options.read_only))
        found = discovery.find(attached, mounted=("/",))
        with ExitStack() as copied:  # as long as it is open, it keeps the disk
            with ExitStack() as mounts:
                filesystem.mount_all(mounts, found.volumes, isolation.TARGET, options.read_only)
                log.info(f"found {', '.join(discovery.describe(found))}")
                if options.shell:
                    return shell(name, mounts, attached)
                tree = linux.copy_mounts(isolation.TARGET)
                copied.callback(os.close, tree)
            publish(tree, node, place)
        held.pop_all()  # the mounts keep the loop device from now on: nobody waits for its end
    end = "in the end" if options.read_only else "before you start it"
    log.info(f"instance {name} is mounted at {place}; umount-disks {name} {end}")
    return 0


def publish(tree: int, node: tuple[int, int], place: str) -> None:
    """Let the mounts `tree` appear at `place`, for everybody on the node."""
    isolation.ignore_signals()  # from here on it is done or fails, nothing in between
    try:
        linux.enter_mount_view(node)
        if not is_our_directory(place):
            os.mkdir(place, 0o700)
        directory = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            linux.place_mounts(tree, directory)
        finally:
            os.close(directory)
    except OSError as error:
        remove_directory(place)
        raise Failure(f"cannot mount anything at {place}: {error.strerror}") from None


def shell(name: str, mounts: ExitStack, attached: Attached) -> int:
    """A shell in the guest's root; what it has written is on the disk in the end, even after a signal."""
    log.info(f"this directory has the filesystems of instance {name}, until you leave this shell")
    program = os.environ.get("SHELL") or "/bin/sh"
    env = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    interrupted = None
    try:
        status = foreground([program], cwd=isolation.TARGET, env=env)
    except Interrupted as signal:
        interrupted = signal
    hooks.end_leftovers("the shell")
    mounts.close()
    os.fsync(attached.descriptor)
    if interrupted:
        raise interrupted
    return status


def mount_there(known: ClusterInstance, path: str, options: argparse.Namespace) -> int:
    """The same on the node that has the disks."""
    command = [program_there(), "mount-disks", "--disk", path]
    command += [word for word, wanted in (("--read-only", options.read_only), ("--shell", options.shell)) if wanted]
    command.append(known.name)
    if_lost = f"umount-disks {known.name} takes away what may be mounted there"
    if options.shell:
        status = foreground(cluster.ssh(known.node, command, terminal=os.isatty(0)))
        if status == 255:
            raise Failure(f"cannot reach node {known.node} over ssh, or lost it", hint=if_lost)
        return status
    cluster.run_on(known.node, command, if_lost)
    log.info(f"that is on node {known.node}")
    return 0


def program_there() -> str:
    """imageos on another node: the same path as here, which `imageos install` makes so."""
    return os.path.realpath(hooks.program_file())


def check_free(name: str, options: argparse.Namespace) -> None:
    """Failure if the mount point exists, but for the empty directory that a killed mount-disks may have left."""
    place = mount_point(name)
    if options.shell:
        return
    if os.path.ismount(place):
        raise Failure(f"instance {name} is mounted at {place} already", hint=f"umount-disks {name}")
    if os.path.lexists(place) and not (is_our_directory(place) and not os.listdir(place)):
        raise Failure(f"{place} exists, and mount-disks has not made it", hint="look at it, and move it away")


def is_our_directory(place: str) -> bool:
    """Whether it is a directory as we make it; /tmp is open to everybody."""
    try:
        status = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and stat.S_IMODE(status.st_mode) == 0o700


def remove_directory(place: str) -> None:
    if is_our_directory(place):
        os.rmdir(place)
