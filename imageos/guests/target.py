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
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

from imageos.errors import Failure
from imageos.guests.sandbox import ENVIRONMENT, GuestDisk, entering
from imageos.node import cgroup, linux
from imageos.run import run

MIB = 1 << 20
READ_LIMIT = MIB  # bytes; a configuration file that is larger is not one
READ_TOTAL = 256 * MIB  # of all files together: a directory may have a link to one file a million times
MOST_NAMES = 1_000_000  # in a directory that is listed
LINK_LIMIT = 40  # as the kernel's own
PROGRAM_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
COPIED_ATTRIBUTES = ("security.selinux", "system.posix_acl_access")
NODE_LABEL = "security.selinux"  # of a file of the node: means nothing in the guest


class _Visit(Protocol):
    """What is done to a name in an open directory, as os.unlink and os.rmdir are called."""

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

    # --- looking ---

    def exists(self, path: str) -> bool:
        """Whether `path` leads to something, through links inside the guest."""
        return self._mode(path) is not None

    def is_file(self, path: str) -> bool:
        mode = self._mode(path)
        return mode is not None and stat.S_ISREG(mode)

    def is_dir(self, path: str) -> bool:
        mode = self._mode(path)
        return mode is not None and stat.S_ISDIR(mode)

    def which(self, program: str) -> str | None:
        """The path of an executable of the guest, by name."""
        for directory in PROGRAM_PATH:
            path = f"{directory}/{program}"
            mode = self._mode(path)
            if mode is not None and stat.S_ISREG(mode) and mode & 0o111:
                return path
        return None

    def read(self, path: str) -> str | None:
        """The text of a regular file, None if there is none; bytes that are not UTF-8 survive a write."""
        data = self.read_bytes(path, READ_LIMIT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def read_bytes(self, path: str, limit: int) -> bytes | None:
        """The content of a regular file of at most `limit` bytes, None if there is none."""
        try:
            # O_NONBLOCK: a FIFO must not stop us
            descriptor = linux.open_in_root(self._root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise _failure("read", path, error) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Failure(f"the guest's {path} is not a regular file")
            if status.st_size > limit:
                raise Failure(f"the guest's {path} has {status.st_size} bytes, more than the {limit} that it may have")
            self._left -= status.st_size
            if self._left < 0:
                raise Failure(f"the guest's {path}: more than {READ_TOTAL} bytes of its files were to be read")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(limit)
        finally:
            os.close(descriptor)  # open() itself would leave that of a directory open, and its filesystem busy

    def glob(self, pattern: str) -> list[str]:
        """The paths in one directory whose names match: `/etc/ssh/ssh_host_*`. Only the name is a pattern."""
        directory, name = os.path.split(pattern)
        try:
            descriptor = linux.open_in_root(self._root, directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return []
            raise _failure("list", directory, error) from None
        try:
            with os.scandir(descriptor) as entries:
                names = [entry.name for entry in itertools.islice(entries, MOST_NAMES + 1)]
        finally:
            os.close(descriptor)
        if len(names) > MOST_NAMES:
            raise Failure(f"the guest's {directory} holds more than {MOST_NAMES} names")
        return [f"{directory}/{found}" for found in sorted(names) if fnmatch.fnmatchcase(found, name)]

    @contextmanager
    def directory(self, path: str) -> Iterator[str]:
        """A path by which a process that we start reaches the guest's directory `path`; no link leads it astray."""
        try:
            descriptor = linux.open_in_root(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise _failure("open", path, error) from None
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)

    # --- changing ---

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Give `path` the content `text`; `mode` is for a new file. Missing directories are made (0755)."""
        data = text.encode("utf-8", "surrogateescape")
        with self._parent(path, make=True) as (parent, name):
            temporary = f".imageos-{os.urandom(6).hex()}"
            try:
                old = _lstat(parent, name)
                if old and stat.S_ISDIR(old.st_mode):
                    raise Failure(f"the guest's {path} is a directory, not a file")
                _write_new(parent, temporary, data, mode)
                if old and stat.S_ISREG(old.st_mode):
                    _copy_attributes(parent, name, temporary, old)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                _remove_quietly(parent, temporary)
                raise _failure("write", path, error) from None

    def edit(self, path: str, change: Callable[[str], str]) -> None:
        """Give a text file the content that `change` makes of it (of an empty text if there is none)."""
        old = self.read(path)
        new = change(old or "")
        if new != (old or ""):
            self.write(path, new)

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
        with self._parent(old, follow=False) as (from_, name), self._parent(new, follow=False) as (to, new_name):
            try:
                os.rename(name, new_name, src_dir_fd=from_, dst_dir_fd=to)
            except OSError as error:
                raise _failure("replace", new, error) from None

    def symlink(self, text: str, path: str) -> None:
        """Make `path` itself a link with the content `text`, in the place of a link or file."""
        with self._parent(path, make=True, follow=False) as (parent, name):
            temporary = f".imageos-{os.urandom(6).hex()}"
            try:
                os.symlink(text, temporary, dir_fd=parent)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                _remove_quietly(parent, temporary)
                raise _failure("link", path, error) from None

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
            for path, status in made:  # only now: what is copied into a directory changes its time
                with self.directory(path) as place:
                    os.utime(f"{place}/.", ns=(status.st_atime_ns, status.st_mtime_ns))
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
        try:
            top = linux.open_in_root(self._root, directory, DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return
            raise _failure("open", directory, error) from None
        try:
            _walk(top, _empty)
        except OSError as error:
            raise _failure("empty", directory, error) from None

    def touch(self, path: str) -> None:
        if not self.exists(path):
            self.write(path, "")

    # --- running ---

    def run(self, argv: Sequence[str], input: str | None = None) -> str:
        """Run a program of the guest in the sandbox; its output. Failure unless its status is 0."""
        with cgroup.limited() as join:
            return run(
                argv,
                input=input,
                env=ENVIRONMENT,
                timeout=self._timeout,
                prepare=entering(self._path, self._hostname, self._disk, join),
            )

    # --- inside ---

    def _copy(self, source: str, path: str) -> bool:
        """Whether a directory was made of `source`."""
        status = os.lstat(source)
        if stat.S_ISDIR(status.st_mode):
            return self._copy_directory(source, path, status)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise Failure(f"{source} is neither a file nor a directory nor a link: it cannot be copied into the guest")
        with self._parent(path, follow=False) as (parent, name):
            temporary = f".imageos-{os.urandom(6).hex()}"
            try:
                old = _lstat(parent, name)
                if old and stat.S_ISDIR(old.st_mode):
                    raise Failure(f"the guest's {path} is a directory, {source} is none")
                if stat.S_ISLNK(status.st_mode):
                    os.symlink(os.readlink(source), temporary, dir_fd=parent)
                else:
                    _copy_content(source, parent, temporary)
                _copy_metadata(source, status, f"/proc/self/fd/{parent}/{temporary}")
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                _remove_quietly(parent, temporary)
                raise Failure(f"cannot copy {source} to the guest's {path}: {error.strerror}") from None
        return False

    def _copy_directory(self, source: str, path: str, status: os.stat_result) -> bool:
        if self.is_dir(path):
            return False
        if self.exists(path):
            raise Failure(f"{source} is a directory, the guest's {path} is none")
        self.mkdir(path)
        with self.directory(path) as made:
            try:
                _copy_metadata(source, status, f"{made}/.")
            except OSError as error:
                raise Failure(f"cannot copy {source} to the guest's {path}: {error.strerror}") from None
        return True

    def _remove(self, path: str) -> None:
        with self._parent(path, follow=False) as (parent, name):
            try:
                _remove_tree(parent, name)
            except OSError as error:
                raise _failure("remove", path, error) from None

    def _mode(self, path: str) -> int | None:
        try:
            descriptor = linux.open_in_root(self._root, path, os.O_PATH)
        except OSError:
            return None
        try:
            return os.fstat(descriptor).st_mode
        finally:
            os.close(descriptor)

    @contextmanager
    def _parent(
        self, path: str, make: bool = False, follow: bool = True, mode: int = 0o755
    ) -> Iterator[tuple[int, str]]:
        """The directory (as a descriptor) and the name that `path` leads to, through a link at its end too."""
        for _ in range(LINK_LIMIT):
            directory, name = os.path.split(path)
            if name in ("", ".."):
                raise Failure(f"{path!r} is not the path of a file")
            try:
                parent = self._directory(directory, make, mode)
            except OSError as error:
                raise _failure("open", directory or "/", error) from None
            try:
                link = os.readlink(name, dir_fd=parent) if follow and name != "." else None
            except OSError:
                link = None
            if link is None:
                break
            os.close(parent)
            path = os.path.join(directory, link)
        else:
            raise Failure(f"the guest's {path}: too many levels of symbolic links")
        try:
            yield parent, name
        finally:
            os.close(parent)

    def _directory(self, path: str, make: bool, mode: int) -> int:
        """A descriptor of the directory `path`; with `make`, what is missing of it is made first."""
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            return linux.open_in_root(self._root, path, flags)
        except FileNotFoundError:
            if not make:
                raise
        names = [name for name in path.split("/") if name]
        current = linux.open_in_root(self._root, "/", flags)
        for depth, name in enumerate(names, 1):
            try:
                try:
                    below = linux.open_in_root(self._root, "/".join(names[:depth]), flags)
                except FileNotFoundError:
                    os.mkdir(name, dir_fd=current)
                    os.chmod(name, mode if depth == len(names) else 0o755, dir_fd=current)
                    below = linux.open_in_root(self._root, "/".join(names[:depth]), flags)
            finally:
                os.close(current)
            current = below
        return current


@contextmanager
def opened(path: str, hostname: str, disk: GuestDisk, timeout: float) -> Iterator[Target]:
    """The guest mounted at `path`. Left before unmounting: a descriptor keeps the filesystem busy."""
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Target(path, root, hostname, disk, timeout)
    finally:
        os.close(root)


class Directory:
    """The names in an open directory of the guest; what they lead to is not followed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._place = f"/proc/self/fd/{descriptor}"

    def status(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)

    def attribute(self, name: str, key: str) -> bytes | None:
        try:
            return os.getxattr(f"{self._place}/{name}", key, follow_symlinks=False)
        except OSError:
            return None

    def set_attribute(self, name: str, key: str, value: bytes) -> None:
        os.setxattr(f"{self._place}/{name}", key, value, follow_symlinks=False)

    @contextmanager
    def changeable(self, name: str) -> Iterator[None]:
        """A file or directory that is immutable or append-only is neither for a moment."""
        descriptor = os.open(name, DIRECTORY & ~os.O_DIRECTORY | os.O_NONBLOCK, dir_fd=self._descriptor)
        try:
            with linux.changeable(descriptor):
                yield
        finally:
            os.close(descriptor)


@contextmanager
def directory_of(root: Target, path: str) -> Iterator[Directory]:
    try:
        descriptor = linux.open_in_root(root._root, path, DIRECTORY)
    except OSError as error:
        raise _failure("open", path, error) from None
    try:
        yield Directory(descriptor)
    finally:
        os.close(descriptor)


def drop_preallocated(root: Target) -> None:
    """Give back the blocks of files that nothing was written to yet: they read as zero, and go on doing so."""
    try:
        _walk(linux.open_in_root(root._root, "/", DIRECTORY), _punch)
    except OSError as error:
        raise _failure("drop reserved blocks of", "files", error) from None


def _failure(verb: str, path: str, error: OSError) -> Failure:
    return Failure(f"cannot {verb} the guest's {path}: {error.strerror}")


def _lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _write_new(parent: int, name: str, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=parent), "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)


def _copy_attributes(parent: int, old_name: str, new_name: str, old: os.stat_result) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    source = os.open(old_name, flags, dir_fd=parent)
    copy = os.open(new_name, flags, dir_fd=parent)
    try:
        os.fchown(copy, old.st_uid, old.st_gid)
        os.fchmod(copy, stat.S_IMODE(old.st_mode))
        for attribute in os.listxattr(source):
            if attribute in COPIED_ATTRIBUTES or attribute.startswith("user."):
                os.setxattr(copy, attribute, os.getxattr(source, attribute))
    finally:
        os.close(source)
        os.close(copy)


def _copy_content(source: str, parent: int, name: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(source, "rb") as original, open(os.open(name, flags, 0o600, dir_fd=parent), "wb") as copy:
        shutil.copyfileobj(original, copy, MIB)


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


def _remove_tree(parent: int, name: str) -> None:
    """Remove a file, a link or a directory with all in it: any depth, with two descriptors."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    _walk(os.open(name, DIRECTORY, dir_fd=parent), os.unlink, os.rmdir)
    os.rmdir(name, dir_fd=parent)


def _walk(top: int, on_file: _Visit, on_left: _Visit | None = None) -> None:
    """Call `on_file` for all that is no directory below `top` (which is closed), `on_left` for each directory left.

    Any depth, with two descriptors; never through a link.
    """
    current = top
    way: list[str] = []  # the names that lead from the top to `current`
    below = []  # on each level, the directories that are still to go
    try:
        below.append(_visit_files(current, on_file))
        while way or below[-1]:
            if below[-1]:
                way.append(below[-1].pop())
                current = _moved(current, way[-1])
                below.append(_visit_files(current, on_file))
            else:
                current = _moved(current, "..")
                name = way.pop()
                if on_left:
                    on_left(name, dir_fd=current)
                below.pop()
    finally:
        os.close(current)


def _moved(current: int, name: str) -> int:
    """Change from one open directory to another, as cd does."""
    new = os.open(name, DIRECTORY, dir_fd=current)
    os.close(current)
    return new


def _visit_files(directory: int, on_file: _Visit) -> list[str]:
    """Call `on_file` for everything in a directory but directories; gives their names."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        if not is_directory:
            on_file(name, dir_fd=directory)
    return [name for name, is_directory in found if is_directory]


def _empty(name: str, *, dir_fd: int) -> None:
    if not stat.S_ISREG(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        return
    # what has taken its place meanwhile must not stop us (a FIFO)
    descriptor = os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _punch(name: str, *, dir_fd: int) -> None:
    status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or not status.st_blocks:
        return
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with ExitStack() as stack:
        reader = os.open(name, flags & ~os.O_RDWR, dir_fd=dir_fd)
        stack.callback(os.close, reader)
        holes = list(_holes(reader, status.st_size))
        if not holes:
            return
        stack.enter_context(linux.changeable(reader))
        writer = os.open(name, flags, dir_fd=dir_fd)
        stack.callback(os.close, writer)
        for start, end in holes:
            linux.punch_hole(writer, start, end - start)
        os.utime(writer, ns=(status.st_atime_ns, status.st_mtime_ns))


def _holes(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file without data: not stored, or not written to."""
    place = 0
    while place < size:
        start = os.lseek(descriptor, place, os.SEEK_HOLE)
        if start >= size:
            return
        try:
            place = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            place = (size | 0xFFFF) + 1  # no data any more; whole blocks, however large they are
        yield start, place


def _remove_quietly(parent: int, name: str) -> None:
    with suppress(OSError):  # the reason why it may not be there is being reported
        os.unlink(name, dir_fd=parent)
