"""Images from a URL: downloaded once for all who want them, verified, kept in CACHE_DIR.

FILE.part there is an unfinished download, which the next run goes on with.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import unquote, urlsplit

from imageos import log
from imageos.errors import Failure
from imageos.images import cache
from imageos.images.cache import Copy, Verdict
from imageos.images.checksums import Checksum, Policy, check, expected, policy
from imageos.images.curl import Answer, Missing, Transient, Unreachable
from imageos.images.pages import BEGINNING
from imageos.images.urls import shown
from imageos.images.web import Web
from imageos.node import linux, space
from imageos.run import Failed
from imageos.settings import Settings

GRACE = 2.0  # seconds that a server gets to close the connection after the last byte

NOT_FOUND = "nothing: no checksum was found"
# Raises Failure if a file that begins so, and has at least so many bytes, is not wanted; the first is its name
Judge = Callable[[str, bytes, int], None]


def accept(_url: str, _beginning: bytes, _size: int) -> None:
    """Accept everything."""


def fetched(settings: Settings, urls: Sequence[str], judge: Judge = accept) -> tuple[str, int]:
    """Return the path in CACHE_DIR of the first of `urls` where a file is, and a descriptor to read it.

    `judge` is asked before the first byte of a download is stored. Missing if there is none. With IMAGE_CLEANUP the
    path is gone, and the blocks are when the descriptor is closed.
    """
    start = time.time()
    web = Web({**os.environ, **settings.unknown})
    problems: list[Missing | Unreachable] = []
    for url in web.in_turn(urls):
        path, wanted = f"{settings.cache_dir}/{cache_name(url)}", policy(settings, url)
        try:
            os.makedirs(settings.cache_dir, mode=0o700, exist_ok=True)
            with cache.locked(path, url):
                copy = _updated(web, wanted, url, path, start, judge)
                _warn_unverified(copy, wanted, web, url)
                descriptor = cache.reading(path, copy.identity)
                if settings.image_cleanup:
                    cache.remove(path)
                return path, descriptor
        except (Missing, Unreachable) as problem:
            problems.append(problem)  # another one may be there, or in the cache
        except OSError as error:
            raise Failure(f"CACHE_DIR {settings.cache_dir}: {error.strerror or error}") from None
    silent = next((server for server in problems if isinstance(server, Unreachable)), None)
    if silent:
        raise Unreachable(f"cannot download image {silent}", hint=silent.hint)
    others = f" (nor {log.few([unquote(_last(url)) for url in urls[1:]])})" if urls[1:] else ""
    hint = "set IMAGE_URL, IMAGE_NAME, ARCH or IMAGE_TYPE" if urls[1:] else "set IMAGE_URL to where it is now"
    raise Missing(f"cannot find image {problems[0]}{others}", hint)


def cache_name(url: str) -> str:
    """Return the name of the file in the cache: readable, and another one for each URL."""
    quoted = _last(url)
    name = unquote(quoted)
    if not name or name.startswith(".") or "/" in name or not name.isprintable():
        raise Failure(f"IMAGE_URL {shown(url)} does not end in the name of a file")
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{quoted[-160:]}"


def _last(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


# --- the copy in the cache --------------------------------------------------------------------------------


def _updated(web: Web, wanted: Policy, url: str, path: str, start: float, judge: Judge) -> Copy:
    """Make the file `path` what the URL has and the policy accepts."""
    copy = cache.load(path, url)
    if copy and _is_enough(copy, path, wanted, start):
        return copy
    is_new = copy is not None and start <= copy.checked <= time.time()  # while we waited for the lock
    is_same = False
    try:
        if not is_new and (copy or wanted.is_published):  # else the download will tell
            headers = web.headers(url)
            is_same = copy is not None and copy.is_of(headers)
        before = copy.verdicts.get(wanted.key) if copy and is_same else None
        # where the same file had no checksum anywhere, not all these places are asked again
        checksums = expected(web, wanted, url, further=not before or before.found != NOT_FOUND)
    except Unreachable as problem:
        if not copy or not _is_enough(copy, path, wanted):
            why = f"; nobody has checked the copy in CACHE_DIR against {wanted}, so it is not used" if copy else ""
            raise Unreachable(f"{problem}{why}", hint=problem.hint) from None
        log.warning(f"{problem}: the copy in CACHE_DIR is used, of {time.strftime('%F', time.localtime(copy.checked))}")
        return copy
    # A checksum tells better than the server's word: mirrors have other ETags for the same file.
    if copy and (_matches(copy, path, checksums) if checksums else is_new or is_same):
        log.info(f"image {shown(url)}: the copy in CACHE_DIR is current")
        check(shown(url), checksums, copy.digests)
    else:
        copy, is_same = _downloaded(web, url, path, checksums, judge), True
    if is_same:
        copy = copy._replace(checked=time.time())
    if wanted.is_published:
        found = ", ".join(checksum.source for checksum in checksums) or NOT_FOUND
        copy = copy.judged(wanted.key, Verdict(found, time.time()))
    cache.save(path, copy)
    return copy


def _is_enough(copy: Copy, path: str, wanted: Policy, since: float | None = None) -> bool:
    """Return True if the server need not be asked: the content is pinned, or the same was asked `since` then.

    Ignore the pins and policies of other callers.
    """
    if wanted.pin and not _matches(copy, path, [wanted.pin]):
        return False
    if wanted.pin and not wanted.is_published:
        return True
    answers = [verdict.checked for key, verdict in copy.verdicts.items() if wanted.is_covered_by(key)]
    asked = answers if wanted.is_published else [copy.checked]
    return any(since is None or since <= moment <= time.time() for moment in asked)


def _matches(copy: Copy, path: str, wanted: Iterable[Checksum]) -> bool:
    missing = [checksum for checksum in wanted if checksum.algorithm not in copy.digests]
    if missing:
        copy.digests.update(cache.digests(path, copy.identity, missing))
        cache.save(path, copy)
    return all(copy.digests[checksum.algorithm] == checksum.hex for checksum in wanted)


def _warn_unverified(copy: Copy, wanted: Policy, web: Web, url: str) -> None:
    found = [verdict.found for key, verdict in copy.verdicts.items() if wanted.is_covered_by(key)]
    if not wanted.is_published or set(found) != {NOT_FOUND}:
        return
    if web.was_plain or url.startswith("http:"):
        log.warning(f"image {shown(url)} is not verified: no checksum beside it, and plain http")
    else:
        log.info(f"image {shown(url)}: no checksum beside it")


def is_kept(settings: Settings, url: str) -> bool:
    """Return True if the cache has the image, for when the server does not answer."""
    path = f"{settings.cache_dir}/{cache_name(url)}"
    copy = cache.load(path, url)
    return copy is not None and _is_enough(copy, path, policy(settings, url))


# --- downloading ------------------------------------------------------------------------------------------


def _downloaded(web: Web, url: str, path: str, wanted: Sequence[Checksum], judge: Judge) -> Copy:
    """Download the file to `path`, where it appears once it is whole and right."""
    part = path + ".part"
    try:
        with log.phase(f"downloaded {shown(url)}"):
            copy = web.patiently(url, lambda: _receive(web, url, part, judge), lambda: _size(part))
        copy = copy._replace(identity=cache.identity(part))
        copy.digests.update(cache.digests(part, copy.identity, ["sha256", *wanted]))
        try:
            check(shown(url), wanted, copy.digests)
        except Failure:
            cache.remove(part)
            raise
        os.rename(part, path)
        cache.remove(part)
        cache.save(path, copy)
        cache.sync(os.path.dirname(path))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        cache.remove(part)
        raise Failure(
            f"CACHE_DIR {os.path.dirname(path)} has no space left for image {shown(url)}: {error.strerror}",
            hint="make room there, or set CACHE_DIR to another directory",
        ) from None
    return copy


def _receive(web: Web, url: str, part: str, judge: Judge) -> Copy:
    """Begin the download to `part`, or go on with it; one attempt."""
    known = cache.load(part, url)
    have = _size(part) if known and known.condition else 0
    ask = {"Range": f"bytes={have}-", "If-Range": known.condition} if known and have else {}
    with web.get(url, ask) as answer:
        if answer.status == 200:
            have = 0
            etag, last_modified = answer.headers.get("etag", ""), answer.headers.get("last-modified", "")
            known = Copy(shown(url), etag, last_modified, answer.size, {}, source=cache.source_of(url))
            cache.remove(part)
        elif not (known and _is_rest(known, have, answer)):
            cache.remove(part)
            raise Transient("this is not the rest of what was downloaded before: starting over")
        elif answer.status == 416:
            return known  # nothing was missing
        else:
            log.info(f"going on with a download of {log.size(have)}")
            if known.size is None and answer.size is not None:
                known = known._replace(size=have + answer.size)
        beginning, first = _begun(answer, part, have, known)

        def judge_size(size: int) -> None:
            try:
                judge(shown(url), beginning, size)
            except Failure:
                cache.remove(part)
                raise

        judge_size(known.size or have + len(first))
        space.check(os.path.dirname(part), max(0, (known.size or have) - have))
        if not have:
            cache.save(part, known)
        have = _receive_body(answer, url, part, have, known, first, judge_size if known.size is None else None)
    if known.size is not None and have < known.size:
        raise Transient(f"cut off after {have} of {known.size} bytes")
    if known.size is not None and have > known.size:
        cache.remove(part)
        raise Failure(f"{shown(url)}: the server sends more than the {known.size} bytes that it announced")
    return known


def _begun(answer: Answer, part: str, have: int, copy: Copy) -> tuple[bytes, bytes]:
    """Return the first bytes of the file, of which `part` may have some, and the first of the answer."""
    beginning = first = b""
    if have:
        with linux.closing(cache.opened(part)) as descriptor:
            beginning = os.pread(descriptor, BEGINNING, 0)
    end = BEGINNING if copy.size is None else min(BEGINNING, copy.size)
    while len(beginning) + len(first) < end and (chunk := answer.read()):
        first += chunk
    if copy.size is not None and len(beginning) + len(first) < end:
        raise Transient(f"cut off after {have + len(first)} of {copy.size} bytes")
    return (beginning + first)[:BEGINNING], first


def _receive_body(
    answer: Answer, url: str, part: str, have: int, copy: Copy, first: bytes, check: Callable[[int], None] | None
) -> int:
    """Append `first` and what comes to the `have` bytes of `part`, to the end or one byte more; return their number.

    Call `check` with each new number before the bytes are written.
    """
    progress = log.Progress(f"downloading {copy.url.rpartition('/')[2]}", copy.size or 0)
    with linux.closing(cache.opened(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND)) as descriptor:
        while copy.size is None or have <= copy.size:
            try:
                chunk = first or answer.read(patience=GRACE if have == copy.size else None)
            except Failed:
                if have == copy.size:
                    break
                raise
            if not chunk:
                break
            first = b""
            have += len(chunk)
            if check:
                check(have)
            space.check(os.path.dirname(part), len(chunk))  # others write there, too
            linux.write_all(descriptor, chunk)
            progress.update(have)
        os.fsync(descriptor)
    progress.close()
    return have


def _size(part: str) -> int:
    """Return the bytes that were downloaded so far."""
    return os.path.getsize(part) if os.path.exists(part) else 0


def _is_rest(known: Copy, have: int, answer: Answer) -> bool:
    """Return True if an answer to Range continues the `have` bytes that we have."""
    place = answer.headers.get("content-range", "")
    if answer.status == 416:
        return have == known.size and place == f"bytes */{have}"
    begins, _, total = place.partition("/")
    is_same_size = total == "*" or known.size is None or total == str(known.size)
    is_same = answer.headers.get("etag", known.etag) == known.etag and (
        bool(known.etag) or answer.headers.get("last-modified", known.last_modified) == known.last_modified
    )
    return begins.startswith(f"bytes {have}-") and is_same_size and is_same
