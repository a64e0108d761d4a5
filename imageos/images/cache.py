"""What is kept of downloads in CACHE_DIR: each file, what is known of it beside it (FILE.json), and its lock."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from email.message import Message

from imageos import log
from imageos.images.checksums import digests_of
from imageos.images.web import shown


@dataclasses.dataclass(frozen=True)
class Copy:
    """What is known of a downloaded file, or of what a partial one will be."""

    url: str  # without secrets
    etag: str
    last_modified: str
    size: int | None  # bytes of the whole
    identity: Sequence[int] = ()  # inode, size and time of change of the file that the rest is about
    digests: dict[str, str] = dataclasses.field(default_factory=dict)  # algorithm -> hex
    verified_by: str = ""  # empty: nobody wanted to know
    keyring: str = ""  # SHA-256 of the keyring that the checksum was signed with
    checked: float = 0.0  # when the server was last asked for it

    @property
    def condition(self) -> str:
        """For If-Range; empty if nothing tells one content from another for certain."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def is_of(self, headers: Message) -> bool:
        """Whether an answer with these headers is about the same content, as far as the server says."""
        if self.etag and headers.get("ETag"):
            return self.etag == headers["ETag"]
        is_same_size = headers.get("Content-Length", str(self.size)) == str(self.size)
        return bool(self.last_modified) and self.last_modified == headers.get("Last-Modified") and is_same_size


def load(path: str) -> Copy | None:
    """What is known of the file `path`; None if it is not there, or not the one that is known."""
    try:
        with open(path + ".json", encoding="utf-8") as file:
            copy = Copy(**json.load(file))
        found = identity(path)
    except (OSError, ValueError, TypeError):
        return None
    if copy.identity and list(copy.identity) != found:  # touched, or brought from another node
        if digests_of(path, ["sha256"])["sha256"] != copy.digests.get("sha256"):
            return None
        copy = dataclasses.replace(copy, identity=found)
        save(path, copy)
    return copy


def save(path: str, copy: Copy) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path + ".json", flags, 0o600), "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(copy), file, indent=1)


def identity(path: str) -> list[int]:
    status = os.lstat(path)
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def remove(path: str) -> None:
    for name in (path, path + ".json"):
        with suppress(FileNotFoundError):
            os.unlink(name)


@contextmanager
def locked(path: str, url: str) -> Iterator[None]:
    """Be the only one who looks at `path`."""
    name = path + ".lock"
    is_first = True
    while True:
        with ExitStack() as stack:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if is_first:
                    log.info(f"waiting for another process that downloads {shown(url)}")
                is_first = False
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, name):
                # Removed while it is held: whoever waits for it sees that it is not the lock any more.
                stack.callback(os.unlink, name)
                yield
                return


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
