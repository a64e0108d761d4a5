"""What is kept of downloads in CACHE_DIR: each file, what is known of it beside it (FILE.json), and its lock.

All of them are root's alone: what others may have written is not there, as far as we are concerned.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from email.message import Message
from typing import Any

from imageos import log
from imageos.images.checksums import digests_of
from imageos.images.web import shown

MOST_VERDICTS = 32  # of one copy: whoever may set OS parameters can ask for any number


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the server said to a caller who asked for a checksum, and the copy has."""

    found: str  # where, for messages; or that there was none
    checked: float  # when


@dataclasses.dataclass(frozen=True)
class Copy:
    """What is known of a downloaded file, or of what a partial one will be."""

    url: str  # without secrets
    etag: str
    last_modified: str
    size: int | None  # bytes of the whole
    identity: tuple[int, ...] = ()  # inode, size and time of change of the file that the rest is about
    digests: dict[str, str] = dataclasses.field(default_factory=dict)  # algorithm -> hex
    source: str = ""  # SHA-256 of the whole URL
    checked: float = 0.0  # when the server last said that this is what it has
    verdicts: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)  # by the key of the policy that asked

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

    def judged(self, key: str, verdict: Verdict) -> Copy:
        """With what those get to know who ask as the policy `key` does."""
        others = sorted(
            ((other, one) for other, one in self.verdicts.items() if other != key), key=lambda one: one[1].checked
        )
        return dataclasses.replace(self, verdicts={**dict(others[1 - MOST_VERDICTS :]), key: verdict})


def source_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def load(path: str, url: str) -> Copy | None:
    """What is known of the file `path`, a copy of what is at `url`; None if it is not there, or not the one known."""
    try:
        with open(opened(path + ".json"), encoding="utf-8") as file:
            copy = _parsed(json.load(file))
        found = identity(path)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not copy.source:
        copy = dataclasses.replace(copy, source=source_of(url))  # of 1.0, which did not say for whom it was verified
    if copy.source != source_of(url):
        return None
    if copy.identity and copy.identity != found:  # touched, or brought from another node
        if digests(path, found, ["sha256"])["sha256"] != copy.digests.get("sha256"):
            return None
        copy = dataclasses.replace(copy, identity=found)
        save(path, copy)
    return copy


def _parsed(values: dict[str, Any]) -> Copy:
    """A record; of what is none, one of many errors."""
    for name in ("verified_by", "keyring"):  # of 1.0
        values.pop(name, None)
    verdicts = {key: Verdict(**one) for key, one in values.pop("verdicts", {}).items()}
    identity = tuple(values.pop("identity", ()))
    copy = Copy(**values, identity=identity, verdicts=verdicts)
    texts = [copy.url, copy.etag, copy.last_modified, copy.source, *copy.digests.values()]
    numbers = [copy.size or 0, copy.checked, *identity]
    for one in verdicts.values():
        texts.append(one.found)
        numbers.append(one.checked)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(one, (int, float)) for one in numbers):
        raise ValueError
    return copy


def save(path: str, copy: Copy) -> None:
    name = path + ".json"
    _unlink(name)  # whoever has that open must not write to the new one
    with open(opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(copy), file, indent=1)


def opened(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file in the cache; OSError if it is not a file of ours, or not ours alone."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not _is_private(os.fstat(descriptor)):
        os.close(descriptor)
        raise OSError(errno.EPERM, f"{os.path.basename(path)} belongs to others, or is open to them")
    return descriptor


def _is_private(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def identity(path: str) -> tuple[int, ...]:
    descriptor = opened(path)
    try:
        return identity_of(descriptor)
    finally:
        os.close(descriptor)


def identity_of(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def reading(path: str, expected: tuple[int, ...]) -> int:
    """A descriptor of the copy that is known as `expected`: what was verified is what is read."""
    descriptor = opened(path)
    if identity_of(descriptor) != expected:
        os.close(descriptor)
        raise OSError(errno.EPERM, f"{os.path.basename(path)} was changed by somebody else")
    return descriptor


def digests(path: str, expected: tuple[int, ...], algorithms: Iterable[str]) -> dict[str, str]:
    """algorithm -> hex, of the copy that is known as `expected`."""
    descriptor = reading(path, expected)
    try:
        return digests_of(f"/proc/self/fd/{descriptor}", algorithms)
    finally:
        os.close(descriptor)


def remove(path: str) -> None:
    for name in (path, path + ".json"):
        _unlink(name)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def locked(path: str, url: str) -> Iterator[None]:
    """Be the only one who looks at `path`."""
    name = path + ".lock"
    is_first = True
    with suppress(FileNotFoundError):
        if not _is_private(os.lstat(name)):
            os.unlink(name)  # others could hold it for ever
    while True:
        with ExitStack() as stack:
            descriptor = opened(name, os.O_RDWR | os.O_CREAT)
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
                stack.callback(_unlink, name)
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
