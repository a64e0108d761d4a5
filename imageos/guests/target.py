"""The guest's root while it is mounted: the only way to the guest's files and programs.

Every path is resolved by the kernel inside the guest's root (openat2 with RESOLVE_IN_ROOT): a guest's link,
absolute or not, never leads to the node. Only regular files of bounded size are read; writing makes a new file
and renames it into place, with the owner, mode and extended attributes of the old one.
"""

from __future__ import annotations

import errno
import fnmatch
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import BinaryIO, Protocol

from imageos.disks.filesystem import Volume
from imageos.disks.layout import MIB
from imageos.errors import Failure, repair_hint
from imageos.ganeti import Instance
from imageos.guests.sandbox import ENVIRONMENT, NO_DISK, GuestDisk, entering
from imageos.node import cgroup, linux
from imageos.run import Command, run
from imageos.settings import Settings

READ_LIMIT = MIB  # bytes; a configuration file that is larger is not one
SEARCH_LIMIT = MIB // 16  # bytes of a file that is searched
SEARCH_TOTAL, BLOCK = 64 * MIB, 4096  # bytes of all of them, and what a smaller one counts
READ_TOTAL = 256 * MIB  # of all files together: a directory may have a link to one file a million times
MOST_NAMES = 1_000_000  # in a directory that is listed
NAMES_TOTAL = 20 * MOST_NAMES  # in all of them: a directory may have a million links, too
LONGEST_PATTERN = 1000  # characters, of the name of a file
LINK_LIMIT = 40  # as the kernel's own
PROGRAM_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
COPIED_ATTRIBUTES = ("security.selinux", "system.posix_acl_access")
XFS_ACLS = "trusted.SGI_ACL_"  # ACLs once more
NODE_LABEL = "security.selinux"  # of a file of the node: means nothing in the guest


class _Visit(Protocol):
    """A function that is called as os.unlink and os.rmdir are."""

    def __call__(self, name: str, /, *, dir_fd: int) -> None: ...


class Target:
    """An open guest root. Paths are the guest's: absolute or relative to its root.

    Failure, naming the path, for everything that is not as it should be (a FIFO where a file is expected, ...).
    """

    def __init__(self, path: str, root: int, hostname: str, disk: GuestDisk, timeout: float) -> None:
        self._path = path
        self._root = root
        self._hostname = hostname
        self._disk = disk
        self._timeout = timeout
        self._left = READ_TOTAL
        self._left_names = NAMES_TOTAL

    # --- looking ---

    def exists(self, path: str) -> bool:
        """Return True if `path` leads to something, through links inside the guest."""
        return self._mode(path) != 0

    def is_file(self, path: str) -> bool:
        return stat.S_ISREG(self._mode(path))

    def is_dir(self, path: str) -> bool:
        return stat.S_ISDIR(self._mode(path))

    def which(self, program: str) -> str | None:
        """Return the path of an executable of the guest."""
        for directory in PROGRAM_PATH:
            path = f"{directory}/{program}"
            mode = self._mode(path)
            if stat.S_ISREG(mode) and mode & 0o111:
                return path
        return None

    def link(self, path: str) -> str | None:
        """Return the content of a link itself; None if there is none."""
        try:
            with self._parent(path, follow=False) as (parent, name):
                return os.readlink(name, dir_fd=parent)
        except (OSError, Failure):
            return None

    def read(self, path: str) -> str | None:
        """Return the text of a regular file, None if there is none; bytes that are not UTF-8 survive a write."""
        data = self.read_bytes(path, READ_LIMIT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def read_bytes(self, path: str, limit: int) -> bytes | None:
        """Return the content of a regular file of at most `limit` bytes, None if there is none."""
        try:
            # O_NONBLOCK: a FIFO must not stop us
            with self._opened("read", path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as descriptor:
                status = os.fstat(descriptor)
                size = status.st_size
                if not stat.S_ISREG(status.st_mode):
                    raise Failure(f"the guest's {path} is not a regular file")
                if size > limit:
                    raise Failure(f"the guest's {path} has {size} bytes, more than the {limit} that it may have")
                self._left -= size
                if self._left < 0:
                    raise Failure(f"the guest's {path}: more than {READ_TOTAL} bytes of its files were to be read")
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read(limit)
        except Missing:
            return None

    def glob(self, pattern: str) -> list[str]:
        """Return the paths in one directory whose names match: `/etc/ssh/ssh_host_*`. Only the name is a pattern."""
        directory, name = os.path.split(pattern)
        is_pattern = re.search(r"[*?[]", name) or name in ("", ".", "..")  # the last are names that nothing has
        names = self._names(directory) if is_pattern else [name] if self._is_there(pattern) else []
        return [f"{directory}/{found}" for found in sorted(names) if fits(found, name)]

    @contextmanager
    def directory(self, path: str) -> Iterator[str]:
        """Yield a path by which a process of the node reaches the guest's directory; no link leads it astray."""
        with self._opened("open", path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
            yield f"/proc/self/fd/{descriptor}"

    # --- changing ---

    def write(self, path: str, text: str, mode: int = 0o644, follow: bool = True) -> None:
        """Give `path` the content `text`; `mode` is for a new file. Missing directories are made (0755).

        Unless `follow`, replace whatever has that name: a link, a directory.
        """
        with self._replacing("write", path, follow) as (parent, name, temporary):
            old = _lstat(parent, name)
            if old and stat.S_ISDIR(old.st_mode):
                if follow:
                    raise Failure(f"the guest's {path} is a directory, not a file")
                _remove_tree(parent, name)
            with _new_file(parent, temporary) as file:
                file.write(text.encode("utf-8", "surrogateescape"))
                os.fchmod(file.fileno(), mode)
            if old and stat.S_ISREG(old.st_mode):
                _copy_attributes(parent, name, temporary, old)

    def edit(self, path: str, change: Callable[[str], str], mode: int = 0o644) -> bool:
        """Give a text file the content that `change` makes of it (of an empty text if there is none).

        Return whether that is another; `mode` is for a new file.
        """
        old = self.read(path) or ""
        new = change(old)
        if new != old:
            self.write(path, new, mode)
        return new != old

    def append_line(self, path: str, line: str) -> None:
        """Add `line` to a text file unless it is there."""
        text = self.read(path) or ""
        if line not in text.splitlines():
            self.write(path, text + ("\n" if text and not text.endswith("\n") else "") + line + "\n")

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Make a directory and those above it, where they are missing."""
        with self._parent(path.rstrip("/") + "/.", make=True, mode=mode):
            pass

    def rename(self, old: str, new: str) -> None:
        """Move `old`, a link itself, to where a file, a link or an empty directory may be."""
        with (
            self._parent(old, follow=False) as (from_, name),
            self._parent(new, follow=False) as (to, new_name),
            _reported("replace", new),
        ):
            os.rename(name, new_name, src_dir_fd=from_, dst_dir_fd=to)

    def symlink(self, text: str, path: str) -> None:
        """Make `path` itself a link with the content `text`, in the place of a link or file."""
        with self._replacing("link", path) as (parent, _, temporary):
            os.symlink(text, temporary, dir_fd=parent)

    def copy_tree(self, source: str) -> None:
        """Copy what is in the node's directory `source` over the root: owners, modes, times, extended attributes.

        A directory that the guest has keeps its own, and a link to one is followed inside the guest. Everything else
        is replaced: a link itself, not what it leads to.
        """
        made = []
        try:
            for directory, directories, files in os.walk(source, onerror=_raise):
                for name in sorted([*directories, *files]):
                    path = f"{directory[len(source) :]}/{name}"
                    if self._copy(f"{directory}/{name}", path):
                        made.append((path, os.lstat(f"{directory}/{name}")))
            for path, status in made:  # last: copying into a directory changes its time
                with self.directory(path) as copied:
                    os.utime(f"{copied}/.", ns=(status.st_atime_ns, status.st_mtime_ns))
        except OSError as error:
            raise Failure(f"cannot read {os.fsdecode(error.filename)}: {error.strerror}") from None

    def remove(self, pattern: str) -> None:
        """Remove files, links (not what they lead to) and whole directories whose names match."""
        for path in self.glob(pattern):
            self._remove(path)

    def clear(self, directory: str, keep: Sequence[str] = ()) -> None:
        """Remove everything in a directory but the names in `keep`."""
        for path in self.glob(f"{directory}/*"):
            if os.path.basename(path) not in keep:
                self._remove(path)

    def empty_files(self, directory: str) -> None:
        """Cut every regular file at any depth below a directory to nothing; owners and modes stay."""
        if self.is_dir(directory):
            # a link to a directory is none: suppressed
            with suppress(Missing), self._opened("open", directory, DIRECTORY) as top, _reported("empty", directory):
                _walk(top, _empty)

    def touch(self, path: str) -> None:
        if not self.exists(path):
            self.write(path, "")

    # --- running ---

    def run(self, argv: Sequence[str], input: str | None = None) -> str:
        """Run a program of the guest in the sandbox and return its output. Failure unless its status is 0."""
        with cgroup.limited() as join:
            enter = entering(self._path, self._hostname, self._disk, join)
            is_private = input is not None  # which may hold secrets, and a guest's program can say it again
            return run(Command(argv, enter, env=ENVIRONMENT, private=is_private), input=input, timeout=self._timeout)

    # --- inside ---

    def _names(self, directory: str) -> list[str]:
        """Return what is in a directory, in any order; nothing if there is none."""
        try:
            with (
                self._opened("list", directory, os.O_RDONLY | os.O_DIRECTORY) as descriptor,
                _reported("list", directory),
                os.scandir(descriptor) as entries,
            ):
                names = [entry.name for entry in itertools.islice(entries, MOST_NAMES + 1)]
        except Missing:
            return []
        if len(names) > MOST_NAMES:
            raise Failure(f"the guest's {directory} holds more than {MOST_NAMES} names")
        self._left_names -= len(names)
        if self._left_names < 0:
            raise Failure(f"the guest's {directory}: more than {NAMES_TOTAL} names of its files were to be listed")
        return names

    def _is_there(self, path: str) -> bool:
        """Return True if there is anything of that name, be it a link to nothing."""
        try:
            with self._parent(path, follow=False) as (parent, name), _reported("find", path):
                return _lstat(parent, name) is not None
        except Missing:
            return False

    def _copy(self, source: str, path: str) -> bool:
        """Return True if it made a directory."""
        status = os.lstat(source)
        if stat.S_ISDIR(status.st_mode):
            return self._copy_directory(source, path, status)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise Failure(f"{source} is neither a file nor a directory nor a link: it cannot be copied into the guest")
        with self._replacing(f"copy {source} to", path) as (parent, name, temporary):
            old = _lstat(parent, name)
            if old and stat.S_ISDIR(old.st_mode):
                raise Failure(f"the guest's {path} is a directory, {source} is none")
            if stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(source), temporary, dir_fd=parent)
            else:
                with open(source, "rb") as original, _new_file(parent, temporary) as copy:
                    shutil.copyfileobj(original, copy, MIB)
            _copy_metadata(source, status, f"/proc/self/fd/{parent}/{temporary}")
        return False

    def _copy_directory(self, source: str, path: str, status: os.stat_result) -> bool:
        if self.is_dir(path):
            return False
        if self.exists(path):
            raise Failure(f"{source} is a directory, the guest's {path} is none")
        self.mkdir(path)
        with self.directory(path) as made, _reported(f"copy {source} to", path):
            _copy_metadata(source, status, f"{made}/.")
        return True

    def _remove(self, path: str) -> None:
        with self._parent(path, follow=False) as (parent, name), _reported("remove", path):
            _remove_tree(parent, name)

    @contextmanager
    def _opened(self, verb: str, path: str, flags: int) -> Iterator[int]:
        with _reported(verb, path):
            descriptor = linux.open_in_root(self._root, path, flags)
        with linux.closing(descriptor):
            yield descriptor

    @contextmanager
    def _replacing(self, verb: str, path: str, follow: bool = False) -> Iterator[tuple[int, str, str]]:
        """Yield a directory, the name of `path` in it, and one to make a file under, which then replaces `path`."""
        with self._parent(path, make=True, follow=follow) as (parent, name), _reported(verb, path):
            temporary = f".imageos-{os.urandom(6).hex()}"
            try:
                yield parent, name, temporary
                _forced(parent, name, lambda: os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent))
            except OSError:
                with suppress(OSError):  # the reason why it may not be there is being reported
                    os.unlink(temporary, dir_fd=parent)
                raise

    def _mode(self, path: str) -> int:
        """Return the kind and mode of what `path` leads to; 0 if that is nothing."""
        try:
            with linux.closing(linux.open_in_root(self._root, path, os.O_PATH)) as descriptor:
                return os.fstat(descriptor).st_mode
        except OSError:
            return 0

    @contextmanager
    def _parent(
        self, path: str, make: bool = False, follow: bool = True, mode: int = 0o755
    ) -> Iterator[tuple[int, str]]:
        """Yield the directory (a descriptor) and the name that `path` leads to; unless `follow`, a link itself."""
        for _ in range(LINK_LIMIT):
            directory, name = os.path.split(path)
            if name in ("", "..") or "\0" in path:
                raise Missing(f"{path!r} is not the path of a file")
            with _reported("open", directory or "/"):
                parent = self._directory(directory, make, mode)
            with linux.closing(parent):
                link = ""
                if follow and name != ".":
                    with suppress(OSError):  # it is no link
                        link = os.readlink(name, dir_fd=parent)
                if not link:
                    yield parent, name
                    return
            path = os.path.join(directory, link)
        raise Failure(f"the guest's {path}: too many levels of symbolic links")

    def _directory(self, path: str, make: bool, mode: int) -> int:
        """Return a descriptor of the directory `path`; with `make`, first make what is missing of it.

        A link that leads to nothing is followed: what it leads to is made.
        """
        try:
            return linux.open_in_root(self._root, path, DIRECTORY & ~os.O_NOFOLLOW)
        except FileNotFoundError:
            if not make:
                raise
        to_do, done, links = path.split("/")[::-1], list[str](), 0  # `done` is real: none of it is a link
        while to_do:
            name = to_do.pop()
            if name == "..":
                del done[-1:]
            elif name not in ("", "."):
                with linux.closing(linux.open_in_root(self._root, "/".join(done) or "/", DIRECTORY)) as parent:
                    link = _link_or_made(parent, name, 0o755 if any(to_do) else mode)
                links += bool(link)
                if links > LINK_LIMIT or (links and len(done) > LINK_LIMIT):  # each level would be a directory
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                to_do += link.split("/")[::-1] if link else []
                done = [] if link.startswith("/") else done if link else [*done, name]
        return linux.open_in_root(self._root, "/".join(done) or "/", DIRECTORY)


def opened_system(
    path: str, instance: Instance, settings: Settings, disk: str, volumes: Sequence[Volume]
) -> AbstractContextManager[Target]:
    """Yield the guest mounted at `path`, as the system of `instance`: its programs see `disk` and its volumes."""
    return opened(path, instance.short_name, guest_disk(disk, volumes), settings.guest_timeout)


def guest_disk(disk: str, volumes: Sequence[Volume]) -> GuestDisk:
    nodes = dict.fromkeys([disk, *(volume.device for volume in volumes)])  # subvolumes share them
    by_uuid = {volume.uuid: volume.device for volume in reversed(volumes) if volume.uuid}
    return GuestDisk(nodes=list(nodes), uuids=tuple(reversed(by_uuid.items())))


@contextmanager
def opened(path: str, hostname: str = "", disk: GuestDisk = NO_DISK, timeout: float = 0) -> Iterator[Target]:
    """Yield the guest mounted at `path`. Leave it before unmounting: a descriptor keeps the filesystem busy."""
    with linux.closing(os.open(path, os.O_PATH | os.O_DIRECTORY)) as root:
        yield Target(path, root, hostname, disk, timeout)


class Directory:
    """The names in an open directory of the guest; links are not followed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._path = f"/proc/self/fd/{descriptor}"

    def status(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)

    def attribute(self, name: str, key: str) -> bytes | None:
        try:
            return os.getxattr(f"{self._path}/{name}", key, follow_symlinks=False)
        except OSError:
            return None

    def set_attribute(self, name: str, key: str, value: bytes) -> None:
        os.setxattr(f"{self._path}/{name}", key, value, follow_symlinks=False)

    @contextmanager
    def changeable(self, name: str) -> Iterator[None]:
        """Make a file or directory that is immutable or append-only changeable for a moment."""
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._descriptor)
        with linux.closing(descriptor), linux.changeable(descriptor):
            yield


@contextmanager
def directory_of(root: Target, path: str) -> Iterator[Directory]:
    with root._opened("open", path, DIRECTORY) as descriptor:
        yield Directory(descriptor)


def real(root: Target, path: str) -> str | None:
    """Return the path in the guest that `path` leads to, without links; None if it leads to nothing."""
    try:
        with root._opened("find", path, os.O_PATH) as descriptor:
            found, top = (os.readlink(f"/proc/self/fd/{opened}") for opened in (descriptor, root._root))
    except (OSError, Failure):
        return None
    return "/" + found[len(top) :].lstrip("/")


def fits(name: str, pattern: str) -> bool:
    """Return whether a pattern, which may be the guest's, is one of this name; none is so long, and some are none."""
    try:
        return len(pattern) <= LONGEST_PATTERN and fnmatch.fnmatchcase(name, pattern)
    except re.error:  # [z-a], before Python 3.10.6
        return False


def matches(root: Target, path: str, pattern: str) -> bool:
    """Return whether `path` is a file whose text matches; in the pattern, ^ and $ are those of a line."""
    return root.is_file(path) and re.search(pattern, root.read(path) or "", re.MULTILINE) is not None


def holding(root: Target, directory: str, words: Sequence[str], most: int = 20) -> list[str]:
    """Return at most `most` paths of text files below a directory that have one of the words, but for comments."""
    whole = "|".join(re.escape(word) for word in words)
    pattern = rf"(?im)^[ \t]*(?![ \t#;]).*?(?<![\w.-])(?:{whole})(?![\w-]|\.\w)".encode()
    plain = [word.lower().encode() for word in words]
    found: list[str] = []
    left = [SEARCH_TOTAL]

    def look(name: str, *, dir_fd: int) -> None:
        size = _lstat_size(dir_fd, name)
        if not 0 < size <= SEARCH_LIMIT or size > left[0] or len(found) >= most:
            return
        left[0] -= max(size, BLOCK)
        with linux.closing(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=dir_fd)) as descriptor:
            text = os.read(descriptor, SEARCH_LIMIT)
            lower = text.lower()
            if any(word in lower for word in plain) and b"\0" not in text and re.search(pattern, text):
                top = os.readlink(f"/proc/self/fd/{root._root}")
                found.append(os.readlink(f"/proc/self/fd/{descriptor}")[len(top.rstrip("/")) :])

    if words and root.is_dir(directory):
        with root._opened("search", directory, DIRECTORY) as top_directory, suppress(OSError):  # nothing depends on it
            _walk(top_directory, look)
    return sorted(found)


def drop_preallocated(root: Target) -> None:
    """Free the blocks of files that nothing was written to yet. They read as zero, before and after."""
    with root._opened("open", "/", DIRECTORY) as top, _reported("drop reserved blocks of", "files"):
        _walk(top, _punch)


def hidden_attributes(root: Target, most: int) -> list[str]:
    """Return at most `most` names of attributes that only root can see (trusted.*), except ACLs of xfs."""
    found: set[str] = set()

    def look(name: str, *, dir_fd: int) -> None:
        if len(found) < most:
            names = os.listxattr(f"/proc/self/fd/{dir_fd}/{name}", follow_symlinks=False)
            found.update(name for name in names if name.startswith("trusted.") and not name.startswith(XFS_ACLS))

    with root._opened("open", "/", DIRECTORY) as top, _reported("read attributes of", "files"):
        look(".", dir_fd=top)
        _walk(top, look, look)
    return sorted(found)[:most]


class Missing(Failure):
    """A path of the guest leads to nothing."""


@contextmanager
def _reported(verb: str, path: str) -> Iterator[None]:
    """Turn an OSError into a Failure."""
    try:
        yield
    except OSError as error:
        kind = Missing if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) else Failure
        raise kind(f"cannot {verb} the guest's {path}: {error.strerror}", repair_hint(error)) from None


def _link_or_made(parent: int, name: str, mode: int) -> str:
    """Return the content of a link; where there is neither link nor directory, make one, and return an empty text."""
    with suppress(OSError):
        return os.readlink(name, dir_fd=parent)
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
        os.chmod(name, mode, dir_fd=parent)
    return ""


def _lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _lstat_size(parent: int, name: str) -> int:
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _new_file(parent: int, name: str) -> BinaryIO:
    return open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent), "wb")


def _copy_attributes(parent: int, old_name: str, new_name: str, old: os.stat_result) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with (
        linux.closing(os.open(old_name, flags, dir_fd=parent)) as source,
        linux.closing(os.open(new_name, flags, dir_fd=parent)) as copy,
    ):
        os.fchown(copy, old.st_uid, old.st_gid)
        os.fchmod(copy, stat.S_IMODE(old.st_mode))
        for attribute in os.listxattr(source):
            if attribute in COPIED_ATTRIBUTES or attribute.startswith("user."):
                os.setxattr(copy, attribute, os.getxattr(source, attribute))


def _copy_metadata(source: str, status: os.stat_result, copy: str) -> None:
    # in this order: a new owner takes away set-user-ID and capabilities, a new mode changes an ACL
    os.chown(copy, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(copy, stat.S_IMODE(status.st_mode))
    for attribute in os.listxattr(source, follow_symlinks=False):
        if attribute != NODE_LABEL:
            value = os.getxattr(source, attribute, follow_symlinks=False)
            os.setxattr(copy, attribute, value, follow_symlinks=False)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _raise(error: OSError) -> None:
    raise error


def _forced(parent: int, name: str, act: Callable[[], None]) -> None:
    """Replace or remove a file by `act`, even an immutable one: forums advise `chattr +i /etc/resolv.conf`."""
    try:
        act()
    except PermissionError as error:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
        except OSError:
            raise error from None
        with linux.closing(descriptor), linux.changeable(descriptor):
            act()


def _remove_tree(parent: int, name: str) -> None:
    """Remove a file, a link or a directory with all in it: any depth, with two descriptors."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        _forced(parent, name, lambda: os.unlink(name, dir_fd=parent))
        return
    with linux.closing(os.open(name, DIRECTORY, dir_fd=parent)) as top:
        _walk(top, os.unlink, os.rmdir)
    os.rmdir(name, dir_fd=parent)


def _walk(top: int, on_file: _Visit, on_left: _Visit | None = None) -> None:
    """Call `on_file` for everything but directories below `top`, and `on_left` for each directory after its content.

    It follows no link, and needs two descriptors at any depth.
    """
    current = os.dup(top)
    way: list[str] = []  # the names that lead from the top to `current`
    below = []  # on each level, the directories that are still to go
    try:
        below.append(_visit_files(current, on_file))
        while way or below[-1]:
            if below[-1]:
                way.append(below[-1].pop())
                current = _move(current, way[-1])
                below.append(_visit_files(current, on_file))
            else:
                current = _move(current, "..")
                name = way.pop()
                if on_left:
                    on_left(name, dir_fd=current)
                below.pop()
    finally:
        os.close(current)


def _move(current: int, name: str) -> int:
    """Change from one open directory to another, as cd does."""
    new = os.open(name, DIRECTORY, dir_fd=current)
    os.close(current)
    return new


def _visit_files(directory: int, on_file: _Visit) -> list[str]:
    """Call `on_file` for everything in a directory but directories; return the names of these."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        if not is_directory:
            on_file(name, dir_fd=directory)
    return [name for name, is_directory in found if is_directory]


def _empty(name: str, *, dir_fd: int) -> None:
    if not stat.S_ISREG(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        return
    # O_NONBLOCK: a FIFO may have taken its place meanwhile
    with linux.closing(os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=dir_fd)) as descriptor:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, 0)


def _punch(name: str, *, dir_fd: int) -> None:
    status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or not status.st_blocks:
        return
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW
    with ExitStack() as stack:
        reader = stack.enter_context(linux.closing(os.open(name, flags & ~os.O_RDWR, dir_fd=dir_fd)))
        holes = list(linux.gaps(linux.data_ranges(reader, 0, status.st_size), status.st_size))
        if not holes:
            return
        stack.enter_context(linux.changeable(reader))
        writer = stack.enter_context(linux.closing(os.open(name, flags, dir_fd=dir_fd)))
        for start, end in holes:
            # to the end of the last block, however large it is
            linux.punch_hole(writer, start, (end if end < status.st_size else (end | 0xFFFF) + 1) - start)
        os.utime(writer, ns=(status.st_atime_ns, status.st_mtime_ns))
