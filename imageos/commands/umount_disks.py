"""umount-disks: take away what mount-disks has mounted, and deactivate the disks that it has activated.

The kernel is asked what is there, so it does not matter how far a mount-disks came; done again, it does nothing.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress

from imageos import cluster, log, remote
from imageos.commandline import Parser
from imageos.disks import blockdev
from imageos.errors import Failure
from imageos.node import linux, mounts
from imageos.node.mounts import Mount

ATTEMPTS = 20  # users can mount (FUSE) where the guest lets them write, while we unmount
PAUSE = 0.02  # seconds until the next one, if nobody is seen to use it


def parser() -> Parser:
    made = Parser("umount-disks", __doc__)
    made.add_instance()
    made.add_argument(
        "--here", action="store_true", help="on this node only: Ganeti is not asked, the disks are left as they are"
    )
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    cluster.check_name(options.instance)
    if os.geteuid() != 0:
        raise Failure("this needs root", hint="run it with sudo")
    if options.here:
        unmount(full_name(options.instance, mounts.current()))
        return 0
    instance = cluster.find_instance(options.instance)
    if instance.is_here:
        unmount(instance.name)
    else:
        remote.run_on(instance.node, ["umount-disks", "--here", instance.name])
    cluster.deactivate(instance.name)
    return 0


def full_name(name: str, mounted: Iterable[Mount]) -> str:
    """Return the name of the instance that is mounted here and that `name` is short for; `name` if there is none."""
    # Only devices: users can mount other things there.
    loops = [mount for mount in mounted if mounts.block_device(mount) and mount.source.startswith("/dev/loop")]
    names = sorted({mount.instance for mount in loops if mount.instance})
    meant = [name] if name in names else [full for full in names if full.startswith(f"{name}.")]
    if len(meant) > 1:
        raise Failure(f"{name} is short for several instances: {', '.join(meant)}", hint="give the whole name")
    if names and not meant:
        log.info(f"mounted on this node: {', '.join(names)}")
    return meant[0] if meant else name


def unmount(name: str) -> None:
    """Unmount everything at and below the instance's mount point, and remove the mount point."""
    os.chdir("/")  # the caller may be in there
    mount_point = mounts.mount_point(name)
    there = below(mounts.current(), mount_point)
    lost: list[str] = []
    with ExitStack() as stack:
        loops = {blockdev.loop_below(mount) for mount in there if mount.path == mount_point} - {""}
        for loop in loops:
            stack.enter_context(blockdev.let_go(loop))
        take_away(mount_point, loops, lost)
    with suppress(OSError):  # not empty: somebody has put something into it
        mounts.remove_mount_point(mount_point)
    if lost:
        raise Failure(
            f"what was written last to {', '.join(lost)} is lost: its disk could not take it",
            hint=f"see the kernel's log (dmesg); umount-disks {name} again has Ganeti deactivate the disks",
        )
    log.info(f"nothing of instance {name} is mounted" + (f" at {mount_point} any more" if there else ""))


def take_away(mount_point: str, loops: set[str], lost: list[str]) -> None:
    """Unmount all at and below `mount_point`. Add to `lost` each mount of one of `loops` that lost data."""
    for attempt in range(ATTEMPTS):
        there = below(mounts.current(), mount_point)
        if not there:
            return
        for mount in in_order(there):
            if blockdev.loop_below(mount) in loops and not is_written(mount):
                lost.append(mount.path)
            if not unmount_one(mount, {other.identity for other in there}, is_last=attempt + 1 == ATTEMPTS):
                break
    raise Failure(
        f"cannot unmount {mount_point}: again and again something is mounted there",
        hint=f"findmnt -R {mount_point} shows what",
    )


def unmount_one(mount: Mount, known: set[int], is_last: bool) -> bool:
    """Return False to try again: it is busy and `is_last` is False, or mounts not in `known` are in it by now."""
    try:
        # do not wait for a user's filesystem: it goes at once, with all that is mounted in it
        unmount_at(mount.path, linux.MNT_DETACH if is_users(mount) else 0)
    except OSError as error:
        now = mounts.current()
        if any(is_below(other.path, mount.path) and other.identity not in known for other in now):
            return False
        if mount.identity not in [other.identity for other in now]:
            return True  # somebody else has unmounted it
        if error.errno != errno.EBUSY:
            raise Failure(f"cannot unmount {mount.path}: {error.strerror}") from None
        processes = list(users(mount.path))
        if not (processes or is_last):
            time.sleep(PAUSE)  # a process that looks up a path there, or mounts, keeps it busy for a moment
            return False
        using = ", ".join(processes) or "something that is not a process of this mount namespace"
        raise Failure(
            f"cannot unmount {mount.path}: in use by {using}", hint="end that, or leave the directory, and try again"
        ) from None
    return True


def is_written(mount: Mount) -> bool:
    """Write everything to the device; return False if that failed, now or before: umount(2) does not report it."""
    with ExitStack() as stack:
        try:
            top = stack.enter_context(mounts.opened(mount.path, os.O_PATH))
        except OSError as error:
            log.debug(f"{mount.path}: {error.strerror}")
            return True  # unmounting will fail, too, and say why
        if mounts.identity_of(top) != mount.identity:
            return True  # somebody has just mounted over it
        try:
            with linux.closing(os.open(f"/proc/self/fd/{top}", os.O_RDONLY | os.O_NONBLOCK)) as directory:
                linux.sync_filesystem(directory)
        except OSError as error:  # EIO already when it is opened: xfs stops after an error
            log.warning(f"{mount.path}: {error.strerror}")
            return False
    return True


def unmount_at(path: str, flags: int = 0) -> None:
    directory, name = os.path.split(path)
    with mounts.opened(directory, os.O_PATH | os.O_DIRECTORY) as parent:
        linux.umount(f"/proc/self/fd/{parent}/{name}", linux.UMOUNT_NOFOLLOW | flags)


def users(path: str) -> Iterator[str]:
    """Yield the processes that have a file or directory at or below `path` open: `bash (process 123)`."""
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            opened = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
            links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root", f"/proc/{pid}/exe", *opened]
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
                command = file.read().rstrip("\n")
            if any(is_below(os.readlink(link), path) for link in links):
                yield f"{command} (process {pid})"
        except OSError:
            continue  # it has just ended


def is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory + "/")


def is_users(mount: Mount) -> bool:
    """Return True for a kind of filesystem that users can mount."""
    return mount.kind == "fuse" or mount.kind.startswith("fuse.")


def below(mounted: Iterable[Mount], directory: str) -> list[Mount]:
    return [mount for mount in mounted if is_below(mount.path, directory)]


def in_order(found: Iterable[Mount]) -> list[Mount]:
    """Sort mounts so that inner ones go first; leave out those in a user's filesystem, which go with it."""
    inner: dict[int, list[Mount]] = {}
    known = {mount.identity for mount in found}
    # a shorter path hides longer ones: of two in the same mount it is the younger one
    for mount in sorted(found, key=lambda mount: len(mount.path)):
        inner.setdefault(mount.parent if mount.parent in known else 0, []).append(mount)
    order: list[Mount] = []
    waiting = inner.get(0, [])
    while waiting:
        mount = waiting.pop()
        order.append(mount)
        waiting += [] if is_users(mount) else inner.get(mount.identity, [])
    order.reverse()
    return order
