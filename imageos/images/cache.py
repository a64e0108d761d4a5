"""Downloads in CACHE_DIR: each file, the facts about it (FILE.json), and its lock.

All of them belong to root alone: files that others may have written are ignored.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from imageos import log
from imageos.errors import Failure
from imageos.images.checksums import Checksum, digests_of
from imageos.images.urls import shown
from imageos.node import linux

# The name of a file that belongs to a download (fetch.cache_name), and in it that of the download
DOWNLOAD = r"([0-9a-f]{16}-.+?)(?:\.part)?(?:\.json|\.lock)?"
MOST_VERDICTS = 32  # of one copy: whoever may set OS parameters can ask for any number


class Verdict(NamedTuple):
    """A server's answer to the question for a checksum, which the copy satisfies."""

    found: str  # where, for messages; or that there was none
    checked: float  # when


class Copy(NamedTuple):
    """The facts about a downloaded file, or about the whole of a partial one."""

    url: str  # without secrets
    etag: str
    last_modified: str
    size: int | None  # bytes of the whole
    digests: dict[str, str]  # algorithm -> hex; more are added when they are asked for
    identity: tuple[int, ...] = ()  # inode, size and time of change of the file that the rest is about
    source: str = ""  # SHA-256 of the whole URL
    checked: float = 0.0  # when the server last said that this is what it has
    verdicts: Mapping[str, Verdict] = {}  # by the key of the policy that asked

    @property
    def condition(self) -> str:
        """For If-Range; empty if nothing tells one content from another for certain."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def is_of(self, headers: Mapping[str, str]) -> bool:
        """Return True if an answer with these headers is about the same content, as far as the server says."""
        if self.etag and headers.get("etag"):
            return self.etag == headers["etag"]
        is_same_size = headers.get("content-length", str(self.size)) == str(self.size)
        return bool(self.last_modified) and self.last_modified == headers.get("last-modified") and is_same_size

    def judged(self, key: str, verdict: Verdict) -> Copy:
        """With what those get to know who ask as the policy `key` does."""
        others = sorted(
            ((other, verdict) for other, verdict in self.verdicts.items() if other != key),
            key=lambda entry: entry[1].checked,
        )
        return self._replace(verdicts={**dict(others[1 - MOST_VERDICTS :]), key: verdict})


def source_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def load(path: str, url: str) -> Copy | None:
    """Return the facts about `path`, a copy of `url`; None if it is missing, or not the file of these facts."""
    try:
        with open(opened(path + ".json"), encoding="utf-8") as file:
            copy = _parsed(json.load(file))
        found = identity(path)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not copy.source:
        copy = copy._replace(source=source_of(url))  # of 1.0, which did not say for whom it was verified
    if copy.source != source_of(url):
        return None
    if copy.identity and copy.identity != found:  # touched, or brought from another node
        if digests(path, found, ["sha256"])["sha256"] != copy.digests.get("sha256"):
            return None
        copy = copy._replace(identity=found)
        save(path, copy)
    return copy


def _parsed(values: dict[str, Any]) -> Copy:
    """A record; of what is none, one of many errors."""
    for name in ("verified_by", "keyring"):  # of 1.0
        values.pop(name, None)
    verdicts = {key: Verdict(**verdict) for key, verdict in values.pop("verdicts", {}).items()}
    identity = tuple(values.pop("identity", ()))
    values.setdefault("digests", {})
    copy = Copy(**values, identity=identity, verdicts=verdicts)
    texts = [copy.url, copy.etag, copy.last_modified, copy.source, *copy.digests.values()]
    numbers = [copy.size or 0, copy.checked, *identity]
    for verdict in verdicts.values():
        texts.append(verdict.found)
        numbers.append(verdict.checked)
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(number, (int, float)) for number in numbers
    ):
        raise ValueError
    return copy


def save(path: str, copy: Copy) -> None:
    name = path + ".json"
    _unlink(name)  # whoever has that open must not write to the new one
    with open(opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
        verdicts = {key: verdict._asdict() for key, verdict in copy.verdicts.items()}
        json.dump({**copy._asdict(), "verdicts": verdicts}, file, indent=1)


def opened(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file in the cache; OSError if it is not a file of ours, or not ours alone."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    if not _is_private(os.fstat(descriptor)):
        os.close(descriptor)
        raise OSError(errno.EPERM, f"{os.path.basename(path)} belongs to others, or is open to them")
    return descriptor


def _is_private(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def identity(path: str) -> tuple[int, ...]:
    with linux.closing(opened(path)) as descriptor:
        return identity_of(descriptor)


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


def digests(path: str, expected: tuple[int, ...], wanted: Sequence[str | Checksum]) -> dict[str, str]:
    """As `digests_of`, of the copy that is known as `expected`."""
    with linux.closing(reading(path, expected)) as descriptor:
        return digests_of(f"/proc/self/fd/{descriptor}", wanted)


def remove(path: str) -> None:
    for name in (path, path + ".json"):
        _unlink(name)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def locked(path: str, url: str, wait: bool = True) -> Iterator[None]:
    """Be the only one who looks at `path`. With `wait` False, BlockingIOError if another process does."""
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
                if not wait:
                    raise
                if is_first:
                    log.info(f"waiting for another process that downloads {shown(url)}")
                is_first = False
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                # Removed while it is held: whoever waits for it sees that it is not the lock any more.
                stack.callback(_unlink, name)
                yield
                return


def prune(directory: str, keep: Collection[str]) -> Iterator[tuple[str, int | None]]:
    """Remove the downloads whose names are not in `keep`. Yield each with its bytes, or with None if it is in use."""
    with suppress(FileNotFoundError):
        names = {match[1] for name in os.listdir(directory) if (match := re.fullmatch(DOWNLOAD, name))}
        for name in sorted(names - set(keep)):
            path = f"{directory}/{name}"
            try:
                with locked(path, "", wait=False):
                    files = [file for file in (path, path + ".part") if os.path.exists(file)]
                    size = sum(os.path.getsize(file) for file in files)
                    remove(path)
                    remove(path + ".part")
            except BlockingIOError:
                yield name, None
            except OSError as error:
                raise Failure(f"cannot remove {path}: {error.strerror}") from None
            else:
                yield name, size
        sync(directory)


def sync(directory: str) -> None:
    with linux.closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        os.fsync(descriptor)
