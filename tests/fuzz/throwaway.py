"""A node to throw away: it looks like this machine, but all writes go to a separate place, where they are found.

Its root is an overlay of the machine's. Its /dev has harmless devices, loop devices, and a disk that none of the
tested programs owns. This process's view contains nothing writable of the machine.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imageos.node import linux
from imageos.node.confinement import DEVICES

SECRET = b"of the node, which no guest may see "
# Directories of the node that an image may lead to; each contains a file `victim` and a directory
CANARIES = ("/etc/canary", "/tmp/canary", "/root/canary", "/usr/canary", "/var/cache/canary", "/dev/canaries")
# Path of the disk for an image, and of its directory; the kernel reports the backing file of a loop device by path
DISKS, LINK = f"/mnt/fuzz-{os.getpid()}", "/mnt/disk"
DISK, OTHER_DISK = f"{DISKS}/disk", "/dev/canary"
IMAGES = "/srv/images"
TEMPORARY = f"{DISKS}/tmp"  # for programs without their own room
ROOM = "size=1g,mode=0755"
LOOPS = 256

# Below `stage`: the overlay's working directory, and the files that may be written
IGNORED = ("work/", "disks/disk", "disks/tmp")

Status = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    stage: int  # descriptor of the directory of all writes
    other_disk: int

    def state(self) -> Mapping[str, object]:
        """Return the state of the node without the content of the disk. Any change to the node changes it."""
        found: dict[str, object] = {f"/{path}": status for path, status in below(self.stage)}
        with_dev = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
        try:
            found.update({f"/dev/{path}": status for path, status in below(with_dev)})
        finally:
            os.close(with_dev)
        found["content of the other disk"] = os.pread(self.other_disk, 1 << 20, 0)
        found["mounts"] = Path("/proc/self/mountinfo").read_text()
        found["loop devices"] = sorted(loops())
        return found


def below(directory: int, prefix: str = "") -> Iterator[tuple[str, Status]]:
    """Return path and status of all files; any change but a read alters ctime."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries)
    for name in [".", *names] if not prefix else names:
        path = prefix + name
        if path.startswith(IGNORED) or re.match("loop[0-9]+p", path):
            continue
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        facts = (status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev)
        if not re.match("loop[0-9]|[.]$", name):  # other programs use these, too
            facts += (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        yield path, facts
        if stat.S_ISDIR(status.st_mode) and name != ".":
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            try:
                yield from below(descriptor, f"{path}/")
            finally:
                os.close(descriptor)


def show_partitions() -> None:
    """Make the device nodes of the current partitions, as udev does."""
    there = {f"/dev/{path.parent.name}": path for path in Path("/sys/block").glob("loop*/loop*p*/dev")}
    for node in glob.glob("/dev/loop*p*"):
        if node not in there:
            os.unlink(node)
    for node, path in there.items():
        if not os.path.exists(node):
            with suppress(OSError):  # it has vanished
                major, minor = path.read_text().split(":")
                make_node(node, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))


def loops() -> Iterator[str]:
    """Return the loop devices of this node."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if f"{DISKS}/" in path.read_text():
                yield f"{path.parts[3]} over {path.read_text().strip()}"
        except OSError:  # it has vanished
            continue


def enter() -> Node:
    """Move this process to the node; it must not have started any other."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("fuzz", "/tmp", "tmpfs", 0, ROOM)
    os.umask(0o022)
    for name in ("upper", "work", "root", "disks"):
        os.mkdir(f"/tmp/{name}")
    stage = os.open("/tmp", os.O_RDONLY | os.O_DIRECTORY)
    options = "lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work"
    linux.mount("fuzz", "/tmp/root", "overlay", 0, options)
    os.mkdir(f"/tmp/root{DISKS}")
    os.symlink(DISK, f"/tmp/root{LINK}")
    linux.mount("/tmp/disks", f"/tmp/root{DISKS}", None, linux.MS_BIND)
    linux.mount("proc", "/tmp/root/proc", "proc", 0)
    linux.mount("/sys", "/tmp/root/sys", None, linux.MS_BIND | linux.MS_REC)
    linux.restrict_mounts("/tmp/root/sys", linux.MS_RDONLY)
    linux.mount("fuzz", "/tmp/root/dev", "tmpfs", 0, ROOM)
    os.chdir("/tmp/root")
    linux.pivot_root(".", ".")
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")
    make_devices()
    other = make_other_disk()
    for place in CANARIES:
        make_canary(Path(place))
    for place in (IMAGES, TEMPORARY, f"{DISKS}/hooks", "/run/imageos"):
        os.makedirs(place, exist_ok=True)
    return Node(stage, other)


def make_devices() -> None:
    for name, (major, minor) in DEVICES.items():
        make_node(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    make_node("/dev/loop-control", stat.S_IFCHR | 0o600, os.makedev(10, 237))
    for number in range(LOOPS):
        make_node(f"/dev/loop{number}", stat.S_IFBLK | 0o600, os.makedev(7, number))
    os.symlink("/proc/self/fd", "/dev/fd")


def make_node(path: str, mode: int, device: int) -> None:
    os.mknod(path, mode, device)
    os.chmod(path, stat.S_IMODE(mode))


def make_other_disk() -> int:
    """Make a disk of the node; return its descriptor."""
    with open(f"{DISKS}/other", "w+b") as file:
        file.write((SECRET * 40_000)[: 1 << 20])
    loop = loop_over(f"{DISKS}/other")
    make_node(OTHER_DISK, stat.S_IFBLK | 0o660, os.fstat(loop).st_rdev)
    return loop


def loop_over(path: str) -> int:
    """Attach a loop device, which exists as long as its descriptor is open."""
    with open(path, "r+b") as file:
        while True:
            loop = os.open(f"/dev/loop{linux.free_loop()}", os.O_RDWR | os.O_CLOEXEC)
            try:
                linux.configure_loop(loop, file.fileno(), linux.LO_FLAGS_AUTOCLEAR)
                return loop
            except OSError:  # another process was faster
                os.close(loop)


def make_canary(place: Path) -> None:
    (place / "sub").mkdir(parents=True)
    for path in (place / "victim", place / "sub/victim"):
        path.write_bytes(SECRET)
        path.chmod(0o640)
    (place / "link").symlink_to("victim")
    os.mkfifo(place / "fifo")
