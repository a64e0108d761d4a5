"""mount-disks: mount the filesystems of an instance's guest at /tmp/INSTANCE_root, or for a shell only.

They are found and mounted out of sight, and appear on the node all at once: there is no half of it to clean up. The
loop device under them goes with the last mount.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from imageos import cluster, hooks, log, remote
from imageos.cluster import ClusterInstance
from imageos.commandline import Parser
from imageos.disks import blockdev, discovery, mounting
from imageos.disks.blockdev import LoopDevice
from imageos.errors import Failure, Interrupted
from imageos.node import isolation, linux, mounts
from imageos.run import Command, Outside, foreground


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
    instance = cluster.find_instance(options.instance)
    if instance.is_here:
        check_free(instance.name, options)
    if not options.read_only:
        cluster.check_stopped(instance, ", or --read-only, which writes nothing")
    elif not (instance.stopped or instance.is_lost):
        log.warning(f"instance {instance.name} is not stopped ({instance.status}): what you see may contradict itself")
    with cluster.activated(instance, keep=not options.shell) as disks:
        if instance.is_here:
            return mount(instance.name, disks[0], options, node)
        return mount_there(instance, disks[0], options)


def mount(name: str, path: str, options: argparse.Namespace, node: tuple[int, int]) -> int:
    """Mount the filesystems on the disk `path`, for a shell or for everybody on the node."""
    mount_point = mounts.mount_point(name)
    with ExitStack() as held:
        disk = held.enter_context(blockdev.claimed(path, options.read_only, shared=options.read_only))
        loop = held.enter_context(blockdev.attached(disk, options.read_only))
        found = discovery.find(loop, mounted=("/",))
        with ExitStack() as copied:  # as long as it is open, it keeps the disk
            with ExitStack() as mounted:
                mounted.enter_context(mounting.mounted_all(found.volumes, options.read_only))
                log.info(f"found {', '.join(discovery.describe(found))}")
                if options.shell:
                    return shell(name, mounted, loop)
                tree = linux.copy_mounts(isolation.TARGET)
                copied.callback(os.close, tree)
            publish(tree, node, mount_point)
        held.pop_all()  # the mounts keep the loop device from now on: nobody waits for its end
    end = "in the end" if options.read_only else "before you start it"
    log.info(f"instance {name} is mounted at {mount_point}; umount-disks {name} {end}")
    return 0


def publish(tree: int, node: tuple[int, int], mount_point: str) -> None:
    """Show the mounts `tree` at `mount_point` to everybody on the node."""
    isolation.ignore_signals()  # from here on it is done or fails, nothing in between
    try:
        linux.enter_mount_view(node)
        with suppress(FileExistsError):
            os.mkdir(mount_point, 0o700)
        with linux.closing(mounts.open_mount_point(mount_point, os.O_PATH)) as directory:
            linux.place_mounts(tree, directory)  # over the directory that was checked
    except OSError as error:
        mounts.remove_mount_point(mount_point)
        raise Failure(f"cannot mount anything at {mount_point}: {error.strerror}") from None


def shell(name: str, mounted: ExitStack, loop: LoopDevice) -> int:
    """Run a shell in the guest's root. On return, all that it wrote is on the disk, even after a signal."""
    log.info(f"this directory has the filesystems of instance {name}, until you leave this shell")
    program = os.environ.get("SHELL") or "/bin/sh"
    env = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    interrupted = None
    try:
        status = foreground(Command([program], Outside.SHELL, env=env, cwd=isolation.TARGET))
    except Interrupted as signal:
        interrupted = signal
    hooks.end_leftovers("the shell")
    mounted.close()
    os.fsync(loop.descriptor)
    if interrupted:
        raise interrupted
    return status if status >= 0 else 128 - status  # as another shell would tell it


def mount_there(instance: ClusterInstance, path: str, options: argparse.Namespace) -> int:
    """Have the node that has the disks do it."""
    words = ["mount-disks", "--disk", path]
    words += [word for word, wanted in (("--read-only", options.read_only), ("--shell", options.shell)) if wanted]
    words.append(instance.name)
    if_lost = f"umount-disks {instance.name} takes away what may be mounted there"
    if options.shell:
        return remote.talk_on(instance.node, words, if_lost)
    remote.run_on(instance.node, words, if_lost)
    log.info(f"that is on node {instance.node}")
    return 0


def check_free(name: str, options: argparse.Namespace) -> None:
    """Fail if the mount point exists. Accept the empty directory that a killed mount-disks may have left."""
    if options.shell:
        return
    mount_point = mounts.mount_point(name)
    there = [mount for mount in mounts.current() if mount.path == mount_point]
    if there:
        what = f"instance {name}" if mounts.block_device(there[-1]) else "something else"
        raise Failure(f"{what} is mounted at {mount_point} already", hint=f"umount-disks {name} takes it away")
    try:
        with linux.closing(mounts.open_mount_point(mount_point)) as directory:
            is_free = not os.listdir(directory)
    except OSError as error:
        is_free = error.errno == errno.ENOENT
    if not is_free:
        raise Failure(f"{mount_point} exists, and mount-disks has not made it", hint="look at it, and move it away")
