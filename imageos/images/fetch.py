"""Images from a URL: downloaded once for all who want them, verified, kept in CACHE_DIR.

FILE.part there is an unfinished download, which the next run goes on with.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from http.client import HTTPResponse
from urllib.parse import quote, unquote, urlsplit

from imageos import log
from imageos.errors import Failure
from imageos.images.cache import (
    Copy,
    Verdict,
    digests,
    identity,
    load,
    locked,
    opened,
    reading,
    remove,
    save,
    source_of,
    sync,
)
from imageos.images.checksums import Checksum, Policy, expected, policy
from imageos.images.web import Answer, Missing, Transient, Unreachable, Web, cleaned, shown
from imageos.node import space
from imageos.settings import Settings, is_pin

GRACE = 2.0  # seconds that a server gets to close the connection after the last byte

# A URL that ends so is one image; any other is the directory of the images. The word tells the kind of image.
ONE_IMAGE = re.compile(r"\.(tar|tgz|txz|dump|img|qcow2?|raw|vmdk|vdi|vhdx?)(\.(gz|zst|xz|bz2|lz4))?$")
KINDS = {"tar": "tarball", "tgz": "tarball", "txz": "tarball", "dump": "dump"}  # the others: images of a disk
NOT_FOUND = "nothing: no checksum was found"


def is_one_image(url: str) -> bool:
    return bool(ONE_IMAGE.search(urlsplit(cleaned(url)).path))


def fetched(settings: Settings, names: Sequence[str]) -> tuple[str, int]:
    """The first of the files `names` that is at IMAGE_URL: its path in CACHE_DIR, and a descriptor to read it.

    Missing if there is none. With IMAGE_CLEANUP the path is gone, and the blocks are when the descriptor is closed.
    """
    start = time.time()
    web = Web({**os.environ, **settings.unknown})
    problems: list[Missing | Unreachable] = []
    for url in urls(settings, names):
        path, wanted = f"{settings.cache_dir}/{cache_name(url)}", policy(settings, url)
        try:
            os.makedirs(settings.cache_dir, mode=0o700, exist_ok=True)
            with locked(path, url):
                copy = _updated(web, wanted, url, path, start)
                _warn_unverified(copy, wanted, web, url)
                return path, _opened(copy, path, settings)
        except (Missing, Unreachable) as problem:
            problems.append(problem)  # another one may be there, or in the cache
        except OSError as error:
            raise Failure(f"CACHE_DIR {settings.cache_dir}: {error.strerror or error}") from None
    first = next((one for one in problems if isinstance(one, Unreachable)), problems[0])
    others = ", ".join(names[1:]) if len(problems) > 1 and isinstance(first, Missing) else ""
    if isinstance(first, Unreachable):
        raise Unreachable(f"cannot download image {first}", hint=first.hint)
    raise Missing(
        f"cannot find image {first}" + (f" (nor {others})" if others else ""),
        hint="set IMAGE_URL, IMAGE_NAME, ARCH or IMAGE_TYPE",
    )


# --- names ------------------------------------------------------------------------------------------------


def urls(settings: Settings, names: Sequence[str]) -> list[str]:
    """Where the image may be."""
    base = urlsplit(cleaned(settings.image_url))
    if settings.image_type == "dump" and is_pin(settings.image_checksum):
        raise Failure(
            "IMAGE_CHECKSUM is of one file, but a dump consists of two", hint="put a SHA256SUMS beside them instead"
        )
    one = ONE_IMAGE.search(base.path)
    if not one:
        return [base._replace(path=f"{base.path.rstrip('/')}/{quote(name)}").geturl() for name in names]
    kind = KINDS.get(one.group(1), "disk")
    if kind != (settings.image_type if settings.image_type in KINDS.values() else "disk"):
        raise Failure(
            f"IMAGE_URL {shown(settings.image_url)} does not fit IMAGE_TYPE={settings.image_type}",
            hint=f"set IMAGE_TYPE={'qemu' if kind == 'disk' else kind}",
        )
    if "-boot.dump" in names[0]:
        base = base._replace(path="-boot.dump".join(base.path.rsplit("-root.dump", 1)))
    return [base.geturl()]


def cache_name(url: str) -> str:
    """The name of the file in the cache: readable, and another one for each URL."""
    quoted = urlsplit(url).path.rpartition("/")[2]
    name = unquote(quoted)
    if not name or name.startswith(".") or "/" in name or not name.isprintable():
        raise Failure(f"IMAGE_URL {shown(url)} does not end in the name of a file")
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{quoted[-160:]}"


# --- the copy in the cache --------------------------------------------------------------------------------


def _updated(web: Web, wanted: Policy, url: str, path: str, start: float) -> Copy:
    """Make the file `path` what the URL has and the policy accepts."""
    copy = load(path, url)
    if copy and _is_enough(copy, path, wanted, start):
        return copy
    is_new = copy is not None and start <= copy.checked <= time.time()  # while we waited for the lock
    is_same = False
    try:
        if not is_new:
            headers = web.headers(url)
            is_same = copy is not None and copy.is_of(headers)
        checksums = expected(web, wanted, url)
    except Unreachable as problem:
        if not copy or not _is_enough(copy, path, wanted):
            raise _not_used(copy, wanted, problem) from None
        log.warning(f"{problem}: the copy in CACHE_DIR is used, of {time.strftime('%F', time.localtime(copy.checked))}")
        return copy
    # A checksum tells better than the server's word: mirrors have other ETags for the same file.
    if copy and (_matches(copy, path, checksums) if checksums else is_new or is_same):
        log.info(f"image {shown(url)}: the copy in CACHE_DIR is current")
        _tell(checksums)
    else:
        copy, is_same = _downloaded(web, url, path, checksums), True
    if is_same:
        copy = dataclasses.replace(copy, checked=time.time())
    if wanted.is_published:
        found = ", ".join(one.source for one in checksums) or NOT_FOUND
        copy = copy.judged(wanted.key, Verdict(found, time.time()))
    save(path, copy)
    return copy


def _is_enough(copy: Copy, path: str, wanted: Policy, since: float | None = None) -> bool:
    """Whether the server need not be asked: the content is pinned, or somebody has asked the same, `since` then.

    What others have pinned, or were content with, is nothing to us.
    """
    if wanted.pin and not _matches(copy, path, [wanted.pin]):
        return False
    if not wanted.is_published:
        asked = [copy.checked]
    else:
        asked = [one.checked for key, one in copy.verdicts.items() if wanted.is_covered_by(key)]
    is_pinned = bool(wanted.pin) and not wanted.is_published
    return is_pinned or any(since is None or since <= one <= time.time() for one in asked)


def _not_used(copy: Copy | None, wanted: Policy, problem: Unreachable) -> Unreachable:
    if not copy:
        return problem
    why = f"nobody has checked the copy in CACHE_DIR against {wanted}"
    return Unreachable(f"{problem}; {why}, so it is not used", hint=problem.hint)


def _matches(copy: Copy, path: str, wanted: Iterable[Checksum]) -> bool:
    missing = {one.algorithm for one in wanted} - set(copy.digests)
    if missing:
        copy.digests.update(digests(path, copy.identity, missing))
        save(path, copy)
    return all(copy.digests[one.algorithm] == one.hex for one in wanted)


def _tell(wanted: Iterable[Checksum]) -> None:
    for one in wanted:
        log.info(f"verified: {one.algorithm} of {one.source}")


def _warn_unverified(copy: Copy, wanted: Policy, web: Web, url: str) -> None:
    found = [one.found for key, one in copy.verdicts.items() if wanted.is_covered_by(key)]
    if not wanted.is_published or set(found) != {NOT_FOUND}:
        return
    if web.was_plain or url.startswith("http:"):
        log.warning(f"image {shown(url)} is not verified: no checksum beside it, and plain http")
    else:
        log.info(f"image {shown(url)}: no checksum beside it")


def _opened(copy: Copy, path: str, settings: Settings) -> int:
    descriptor = reading(path, copy.identity)
    if settings.image_cleanup:
        remove(path)
    return descriptor


def is_kept(settings: Settings, url: str) -> bool:
    """Whether the image would be there if the server did not answer."""
    path = f"{settings.cache_dir}/{cache_name(url)}"
    copy = load(path, url)
    return copy is not None and _is_enough(copy, path, policy(settings, url))


# --- downloading ------------------------------------------------------------------------------------------


def _downloaded(web: Web, url: str, path: str, wanted: Sequence[Checksum]) -> Copy:
    """Download the file to `path`, where it appears once it is whole and right."""
    part = path + ".part"
    try:
        with log.phase(f"downloaded {shown(url)}"):
            copy = web.patiently(url, lambda: _receive(web, url, part), lambda: _size(part))
        copy = dataclasses.replace(copy, identity=identity(part))
        copy.digests.update(digests(part, copy.identity, {"sha256", *(one.algorithm for one in wanted)}))
        for one in wanted:
            found = copy.digests[one.algorithm]
            if found != one.hex:
                remove(part)
                raise Failure(
                    f"image {shown(url)} has the wrong {one.algorithm}: "
                    f"expected {one.hex} ({one.source}), found {found}"
                )
        _tell(wanted)
        os.rename(part, path)
        remove(part)
        save(path, copy)
        sync(os.path.dirname(path))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remove(part)
        raise _full(os.path.dirname(path), url) from None
    return copy


def _receive(web: Web, url: str, part: str) -> Copy:
    """Begin the download to `part`, or go on with it; one attempt."""
    known = load(part, url)
    have = _size(part) if known and known.condition else 0
    ask = {"Range": f"bytes={have}-", "If-Range": known.condition} if known and have else {}
    with web.get(url, ask) as answer:
        response = answer.response
        if response.status == 200:
            have = 0
            etag, last_modified = response.getheader("ETag", ""), response.getheader("Last-Modified", "")
            known = Copy(shown(url), etag, last_modified, response.length, source=source_of(url))
            remove(part)
            save(part, known)
        elif not (known and _is_rest(known, have, response)):
            remove(part)
            raise Transient("this is not the rest of what was downloaded before: starting over")
        elif response.status == 416:
            return known  # nothing was missing
        else:
            log.info(f"going on with a download of {log.size(have)}")
            if known.size is None and response.length is not None:
                known = dataclasses.replace(known, size=have + response.length)
        _check_room(part, max(0, (known.size or have) - have), url)
        have = _receive_body(answer, url, part, have, known)
    if known.size is not None and have < known.size:
        raise Transient(f"cut off after {have} of {known.size} bytes")
    if known.size is not None and have > known.size:
        remove(part)
        raise Failure(f"{shown(url)}: the server sends more than the {known.size} bytes that it announced")
    return known


def _receive_body(answer: Answer, url: str, part: str, have: int, copy: Copy) -> int:
    """Append what comes to the `have` bytes of `part`, to the end or one byte more; their number then."""
    answer.response.length = None  # read on behind the announced end, where nothing should come
    progress = log.Progress(f"downloading {copy.url.rpartition('/')[2]}", copy.size or 0)
    descriptor = opened(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while copy.size is None or have <= copy.size:
            try:
                if have == copy.size:
                    answer.connection.settimeout(GRACE)
                chunk = answer.read()
            except Transient:
                if have == copy.size:
                    break
                raise
            if not chunk:
                break
            have += len(chunk)
            _check_room(
                part, len(chunk), url
            )  # the server may not have said how much it sends; others write there, too
            while chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
            progress.update(have)
        os.fsync(descriptor)
    finally:
        progress.close()
        os.close(descriptor)
    return have


def _size(part: str) -> int:
    """Of what was downloaded so far, in bytes."""
    try:
        return os.path.getsize(part)
    except FileNotFoundError:
        return 0


def _is_rest(known: Copy, have: int, response: HTTPResponse) -> bool:
    """Whether an answer to Range begins where we are, in the content that we have the beginning of."""
    place = response.getheader("Content-Range", "")
    if response.status == 416:
        return have == known.size and place == f"bytes */{have}"
    begins, _, total = place.partition("/")
    is_same_size = total == "*" or known.size is None or total == str(known.size)
    is_same = response.getheader("ETag", known.etag) == known.etag and (
        bool(known.etag) or response.getheader("Last-Modified", known.last_modified) == known.last_modified
    )
    return begins.startswith(f"bytes {have}-") and is_same_size and is_same


def _check_room(part: str, need: int, url: str) -> None:
    why = space.lacking(os.path.dirname(part), need)
    if why:
        remove(part)
        raise _full(os.path.dirname(part), url, f": {why}")


def _full(directory: str, url: str, how: str = "") -> Failure:
    return Failure(
        f"CACHE_DIR {directory} has no space left for image {shown(url)}{how}",
        hint="make room there, or set CACHE_DIR to another directory",
    )
