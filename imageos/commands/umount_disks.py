"""umount-disks: take away what mount-disks has mounted, and deactivate the disks that it has activated.

The kernel is asked what is there, so it does not matter how far a mount-disks came; done again, it does nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress

from imageos import cluster, log
from imageos.commandline import Parser
from imageos.commands.mount_disks import program_there, remove_directory
from imageos.disks import disk
from imageos.errors import Failure
from imageos.node import linux, mounts
from imageos.node.mounts import Mount


def parser() -> Parser:
    made = Parser("umount-disks", __doc__)
    made.add_instance()
    made.add_argument(
        "--here",
        action="store_true",
        help="on this node only: Ganeti is not asked, the disks are left as they are",
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
    known = cluster.instance(options.instance)
    if known.is_here:
        unmount(known.name)
    else:
        cluster.run_on(known.node, [program_there(), "umount-disks", "--here", known.name])
    cluster.deactivate(known.name)
    return 0


def full_name(name: str, mounted: Iterable[Mount]) -> str:
    """The name of the instance that is mounted here and that `name` is short for; `name` if there is none."""
    # a name is enough for what is only named; users mount no devices
    loops = [mount for mount in mounted if mounts.block_device(mount) and mount.source.startswith("/dev/loop")]
    names = sorted({mount.instance for mount in loops if mount.instance})
    meant = [name] if name in names else [one for one in names if one.startswith(f"{name}.")]
    if len(meant) > 1:
        raise Failure(f"{name} is short for several instances: {', '.join(meant)}", hint="give the whole name")
    if names and not meant:
        log.info(f"mounted on this node: {', '.join(names)}")
    return meant[0] if meant else name


def unmount(name: str) -> None:
    """Everything at and below the mount point, and the mount point."""
    os.chdir("/")  # it may be called from there
    place = mounts.mount_point(name)
    there = below(mounts.current(), place)
    lost = []
    with ExitStack() as stack:
        loops = {disk.loop_below(mount) for mount in there if mount.place == place} - {""}
        for loop in loops:
            stack.enter_context(disk.let_go(loop))
        for mount in there:
            if disk.loop_below(mount) in loops and not is_written(mount):
                lost.append(mount)
            unmount_one(mount)
    with suppress(OSError):  # not empty: somebody has put something into it
        remove_directory(place)
    if lost:
        raise Failure(
            f"what was written last to {', '.join(mount.place for mount in lost)} is lost: its disk could not take it",
            hint=f"see the kernel's log (dmesg); umount-disks {name} again has Ganeti deactivate the disks",
        )
    log.info(f"nothing of instance {name} is mounted" + (f" at {place} any more" if there else ""))


def unmount_one(mount: Mount) -> None:
    try:
        unmount_at(mount.place)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise Failure(f"cannot unmount {mount.place}: {error.strerror}") from None
        using = ", ".join(users(mount.place)) or "something that is not a process of this mount namespace"
        raise Failure(
            f"cannot unmount {mount.place}: in use by {using}", hint="end that, or leave the directory, and try again"
        ) from None


def is_written(mount: Mount) -> bool:
    """Whether everything could be written to the device, of which umount(2) does not tell."""
    node = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        directory = linux.open_in_root(
            node, mount.place, os.O_RDONLY | os.O_NONBLOCK, resolve=linux.RESOLVE_NO_SYMLINKS
        )
    except OSError as error:
        log.debug(f"{mount.place}: {error.strerror}")
        return True  # not to be seen: unmounting will say why
    finally:
        os.close(node)
    try:
        linux.sync_filesystem(directory)
    except OSError as error:
        log.warning(f"{mount.place}: {error.strerror}")
        return False
    finally:
        os.close(directory)
    return True


def unmount_at(place: str) -> None:
    """Never through a link: the directories above may be a user's, who can put one there at any moment."""
    directory, name = os.path.split(place)
    node = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        parent = linux.open_in_root(node, directory, os.O_PATH | os.O_DIRECTORY, resolve=linux.RESOLVE_NO_SYMLINKS)
    finally:
        os.close(node)
    try:
        linux.umount(f"/proc/self/fd/{parent}/{name}", linux.UMOUNT_NOFOLLOW)
    finally:
        os.close(parent)


def users(place: str) -> Iterator[str]:
    """The processes that have a file or directory below `place` open: `bash (process 123)`."""
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            opened = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
            links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root", f"/proc/{pid}/exe", *opened]
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
                command = file.read().rstrip("\n")
            if any(is_below(os.readlink(link), place) for link in links):
                yield f"{command} (process {pid})"
        except OSError:
            continue  # it has just ended


def is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place + "/")


def below(mounted: Iterable[Mount], place: str) -> list[Mount]:
    """What is mounted at or below `place`, what has to go first first."""
    found = [mount for mount in mounted if is_below(mount.place, place)]
    found.reverse()  # of several at one place the last one is on top
    found.sort(key=lambda mount: -len(mount.place))
    return found
