"""The requests of one command: follow redirects, try again while that helps, and remember small answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from imageos import log
from imageos.errors import Failure
from imageos.images import curl, pages
from imageos.images.curl import Answer, Missing, Transient, Unreachable
from imageos.images.urls import beside, redirected, shown

PAUSES = (0.5, 1.0, 2.0)  # seconds before each further attempt; all of them again after
PROGRESS = 1 << 20  # bytes more than ever before
REDIRECTS = 10
SMALL = 1 << 20  # bytes of a file that is read into memory
SMALL_TIME = 120  # seconds for one attempt at it
INDEX_TIME = 15  # seconds for an index that nobody needs

# Content-Encoding -> the ends of names of files that are so by themselves
ENCODINGS = {"gzip": (".gz", ".tgz"), "x-gzip": (".gz", ".tgz"), "zstd": (".zst",), "br": (".br",), "deflate": ()}
MAGIC = {"gzip": b"\x1f\x8b", "x-gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
SENT_ON = (301, 302, 303, 307, 308)
ABSENT = (403, 404, 410)  # 403: what S3 says of a file that is not there
BUSY = (408, 425, 429, 500, 502, 503, 504)
T = TypeVar("T")


class Web:
    """The requests of one command. `environ` may hold http_proxy, https_proxy and no_proxy."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._unreachable: Unreachable | None = None
        self._small: dict[str, bytes | None] = {}
        self._absent: dict[str, int] = {}  # status
        self.was_plain = False  # whether anything was asked over plain http
        self.led: dict[str, str] = {}  # URL -> where its redirects have led
        self.pages: set[str] = set()  # URLs of small files in whose places were web pages

    def in_turn(self, urls: Iterable[str]) -> Iterator[str]:
        """Yield the places of a file, to be asked for one by one. If the first does not do, look at all others at once.

        What the server does not have there is asked for no more; all else, as if nobody had looked.
        """
        urls = list(urls)
        yield from urls[:1]
        remote = [url for url in urls[1:] if "://" in url]
        if len(remote) > 1 and not self._unreachable:
            answers = curl.statuses(remote, self._environ)
            self._absent.update((url, status) for url, status in answers.items() if status in ABSENT)
        yield from urls[1:]

    def headers(self, url: str) -> Mapping[str, str]:
        """Return the headers of the server's current answer for the file."""

        def ask() -> Mapping[str, str]:
            with self._answered(url, {}, curl.HEAD) as answer:
                if answer.status in (200, 404, 410):
                    return _checked(url, answer).headers
            # it does not know HEAD, or forbids it: look at the beginning of what it says to GET
            with self.get(url) as answer:
                return answer.headers

        return self.patiently(url, ask)

    def small(self, url: str, is_guess: bool = False) -> bytes | None:
        """The content of a small file; None if the server has none, or a web page in its place.

        `is_guess`: something else may have that name; what is too large is none.
        """

        def ask(more: str = "") -> bytes:
            with self._answered(url, {}, f"max-time = {SMALL_TIME}\n{more}") as answer:
                content = _content(_checked(url, answer), is_unpacked=bool(more))
                encoding = answer.headers.get("content-encoding", "").lower()
            return ask(curl.UNPACKED) if not more and _is_packed(content, encoding) else content

        if url not in self._small:
            try:
                content: bytes | None = self.patiently(url, ask)
            except Missing:
                content = None
            if content is not None and pages.is_page(content):  # by which some say that they have none
                self.pages.add(url)
                content = None
            self._small[url] = content
        content = self._small[url]
        if content and len(content) > SMALL:
            if is_guess:
                return None
            raise Failure(f"{shown(url)} is larger than {log.size(SMALL)}")
        return content

    def index(self, url: str) -> str:
        """The page that the server shows for the directory of a file; empty if it shows none. One attempt."""
        try:
            with self._answered(beside(url, ""), {}, f"max-time = {INDEX_TIME}\n{curl.UNPACKED}") as answer:
                return _content(answer, is_unpacked=True).decode("utf-8", "replace") if answer.status == 200 else ""
        except (Transient, Failure):
            return ""

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """The answer, which has the file or the rest of it (or is 416); one attempt."""
        with self._answered(url, headers or {}) as answer:
            if not _is_encoded(url, answer):
                yield _checked(url, answer)
                return
        log.info(f"{shown(url)}: the server packs it, although nobody has asked for that")
        with self._answered(url, {}, curl.UNPACKED) as answer:  # all of it: its ranges are of what is packed
            known = {name: value for name, value in answer.headers.items() if name != "content-length"}
            yield _checked(url, answer._replace(headers=known))

    def patiently(self, url: str, attempt: Callable[[], T], so_far: Callable[[], int] = lambda: 0) -> T:
        """Return the result of `attempt`; repeat it when it raises Transient. In the end raise Unreachable.

        Do not give up while there is progress: `so_far` returns how many bytes the attempts have brought.
        """
        if self._unreachable:
            raise self._unreachable
        if url in self._absent:
            raise Missing(f"{shown(url)}: {self._absent[url]}")
        most, pauses = so_far(), iter(PAUSES)
        while True:
            try:
                return attempt()
            except Transient as error:
                problem = f"{shown(url)}: {error}"
            if so_far() >= most + PROGRESS:
                most, pauses = so_far(), iter(PAUSES)
            pause = next(pauses, None)
            if pause is None:
                self._unreachable = Unreachable(problem)
                raise self._unreachable
            log.info(f"{problem}; trying again")
            time.sleep(pause)

    @contextmanager
    def _answered(self, url: str, headers: Mapping[str, str], more: str = "") -> Iterator[Answer]:
        """The answer of any status, after the redirects. `more`: options of curl."""
        at = url
        for _ in range(REDIRECTS + 1):
            self.was_plain |= at.startswith("http:")
            with curl.answered(at, headers, self._environ, more) as answer:
                if answer.status not in SENT_ON:
                    self.led[url] = at
                    yield answer
                    return
                at = redirected(at, answer.headers.get("location", ""))
        raise Failure(f"{shown(url)}: more than {REDIRECTS} redirects")


def _is_encoded(url: str, answer: Answer) -> bool:
    """Return True if the content was packed on its way; a file that is packed anyway may be announced as if it were."""
    encoding = answer.headers.get("content-encoding", "").lower()
    return encoding in ENCODINGS and not urlsplit(url).path.lower().endswith(ENCODINGS[encoding])


def _is_packed(content: bytes, encoding: str) -> bool:
    """Return True if a small file is packed as announced: Apache announces so, too, a FILE.gz.asc, which is not."""
    mark = MAGIC.get(encoding)
    return content.startswith(mark) if mark else encoding not in ("", "identity") and not pages.TEXT.fullmatch(content)


def _content(answer: Answer, is_unpacked: bool) -> bytes:
    """Return all of a small answer, or of a larger one a byte more than is allowed."""
    # of what is unpacked nobody says it
    size = None if is_unpacked and "content-encoding" in answer.headers else answer.size
    most = SMALL + 1 if size is None else min(size, SMALL + 1)
    content = b""
    while len(content) < most and (chunk := answer.read(most - len(content))):
        content += chunk
    if size is not None and len(content) < most:
        raise Transient("cut off")
    return content


def _checked(url: str, answer: Answer) -> Answer:
    status = f"{answer.status} {answer.reason}"
    if answer.status in ABSENT:
        raise Missing(f"{shown(url)}: {status}")
    if answer.status in BUSY:
        raise Transient(status)
    if answer.status not in (200, 206, 416):
        raise Failure(f"{shown(url)}: {status}")
    return answer
