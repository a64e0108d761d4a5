"""Requests over http or https, made by curl(1) in a room of its own.

It is told on its stdin what to do: its arguments and its environment hold no secrets.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from imageos import __version__
from imageos.errors import Failure, TimedOut
from imageos.images.urls import peer, proxy_for, server, shown
from imageos.node.confinement import Room
from imageos.node.programs import require
from imageos.run import Command, Failed, output_of, pipeline

CONNECT_TIMEOUT = 15  # seconds
READ_TIMEOUT = 30  # seconds; give up if fewer than LEAST bytes arrive in them
LEAST = 32 << 10  # bytes: at that rate an image takes a week
CHUNK = 1 << 20  # bytes
LONGEST_HEAD = 1 << 20  # bytes
# Redirects are left to the caller: which credentials go along does not depend on curl's version. It reads on behind the
# announced end, where nothing should come. Without HTTP/2 there is less that a server can break.
OPTIONS = """\
silent
show-error
include
no-buffer
globoff
path-as-is
http1.1
ignore-content-length
suppress-connect-headers
proto = "=http,https"
proto-redir = "=http,https"
header = "Accept-Encoding: identity"
header = "Connection: close"
"""
# One more:
HEAD = "head\n"  # no content, please
# Undo a Content-Encoding, which some servers choose although we ask for none; its end is for curl to find then.
UNPACKED = "compressed\nno-ignore-content-length\n"
# Only its status, please. The size is looked at before the content: a server may not know ranges.
STATUS_TIME = 15  # seconds for each
STATUS = f"""\
no-ignore-content-length
range = "0-0"
max-filesize = {LEAST}
max-time = {STATUS_TIME}
output = "/dev/null"
"""
AT_ONCE = "parallel\nparallel-max = 8\n"
# Exit status of curl -> in our words, with its own in the place of {}
WORDS = {1: "not what an http server says ({})", 7: "Connection refused, or no route", 28: "timed out ({})"}
STORE = "/usr/local/share/ca-certificates and update-ca-certificates"
NOT_TRUSTED = {60: f"add the CA to the node's store: {STORE}", 77: "install ca-certificates on this node"}


class Missing(Failure):
    """The server has no such file."""


class Unreachable(Failure):
    """The server does not answer, or not to the end, although it was asked several times."""


class Transient(Exception):
    """A failure that may not happen at the next attempt."""


class Answer(NamedTuple):
    """The head of a server's answer; read the content from it."""

    status: int
    reason: str
    headers: Mapping[str, str]  # by their names in lower case
    output: int
    finish: Callable[[], None]  # to be called at the end of the content; Failed if that is not all

    @property
    def size(self) -> int | None:
        """Bytes of the content; None if the server does not say."""
        said = re.fullmatch(r"[0-9]{1,30}", self.headers.get("content-length", ""))
        return int(said[0]) if said and "transfer-encoding" not in self.headers else None

    def read(self, most: int = CHUNK, patience: float | None = None) -> bytes:
        """Return the next bytes; none at the end, or after `patience` seconds without any."""
        if not select.select([self.output], [], [], patience)[0]:
            return b""
        chunk = os.read(self.output, most)
        if not chunk:
            self.finish()
        return chunk


@contextmanager
def answered(url: str, headers: Mapping[str, str], environ: Mapping[str, str], more: str = "") -> Iterator[Answer]:
    """Yield the answer, whatever its status. Transient if network or server fails before the end of the context.

    `environ` may hold http_proxy, https_proxy and no_proxy. `more`: options of curl.
    """
    config = _config(url, headers, environ) + more
    with output_of(_curl(), input=config.encode("latin-1")) as (output, finish):
        try:
            first, *fields = _head(output) or [""]
            status = re.fullmatch(r"HTTP/\S+ ([0-9]{3}) ?(.*)", first)
            if not status:
                if not first:  # else it may have more to say, and waits for us to read it
                    finish()
                raise Transient("not what an http server says")
            pairs = (field.partition(":") for field in fields)
            known = {name.lower(): value.strip() for name, _, value in pairs}
            yield Answer(int(status[1]), status[2], known, output, finish)
        except Failed as failed:
            proxy = proxy_for(urlsplit(url), environ)
            raise _meaning(failed, url, f"proxy {server(proxy)}: " if proxy else "") from None


def statuses(urls: Sequence[str], environ: Mapping[str, str]) -> dict[str, int]:
    """Return the statuses of those URLs that were answered at once, without redirects. One curl asks for all."""
    told = [f'write-out = "{number} %{{http_code}}\\n"\n' for number in range(len(urls))]
    requests = [_config(url, {}, environ) + STATUS + tell for url, tell in zip(urls, told)]
    try:
        done = pipeline(_curl(), input=AT_ONCE + "next\n".join(requests), timeout=READ_TIMEOUT)[0]
    except TimedOut:
        return {}
    said = dict(re.findall(rb"^(\d+) (\d{3})$", done.stdout, re.MULTILINE))
    return {url: int(said[b"%d" % number]) for number, url in enumerate(urls) if b"%d" % number in said}


def _curl() -> Command:
    require("curl")
    return Command(["curl", "-q", "--config", "-"], Room(network=True))  # -q: no .curlrc


def _config(url: str, headers: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Return curl's configuration for a request."""
    parts = urlsplit(url)
    proxy = proxy_for(parts, environ)
    options = [
        ("url", parts._replace(netloc=peer(parts), path=parts.path or "/").geturl()),
        ("user-agent", f"imageos/{__version__}"),
        ("connect-timeout", str(CONNECT_TIMEOUT)),
        ("speed-time", str(max(1, round(READ_TIMEOUT)))),
        ("speed-limit", str(round(LEAST / READ_TIMEOUT))),
        *(("header", f"{name}: {value}") for name, value in headers.items()),
        *([("proxy", f"http://{peer(proxy)}")] if proxy else []),
    ]
    return OPTIONS + "".join(f"{name} = {_quoted(value)}\n" for name, value in options)


def _quoted(value: str) -> str:
    """Quote a value for curl's configuration, where a newline would begin another option."""
    return '"' + re.sub(r'(["\\])', r"\\\1", re.sub(r"[\0-\x1f\x7f]", "", value)) + '"'


def _head(output: int) -> list[str]:
    """Return the lines before the content, without interim answers (1xx); none if it does not begin."""
    lines: list[str] = []
    left = LONGEST_HEAD
    with os.fdopen(output, "rb", 0, closefd=False) as stream:
        while line := stream.readline(left):
            left -= len(line)
            if not left:
                raise Transient("headers without an end")
            if line not in (b"\r\n", b"\n"):
                lines.append(line.decode("latin-1").rstrip("\r\n"))
            elif not lines or re.match(r"HTTP/\S+ [^1]", lines[0]):
                return lines
            else:
                lines = []
    return []


def _meaning(failed: Failed, url: str, where: str) -> Exception:
    """Return the meaning of a failure of curl. Messages about the network begin with `where`."""
    status = failed.finished.status
    said = re.search(r"^curl: \([0-9]+\) (?:SSL certificate problem: )?(.*)", failed.finished.stderr, re.MULTILINE)
    if not said:
        return failed
    if status in NOT_TRUSTED:
        return Unreachable(f"{shown(url)}: its certificate is not trusted: {said[1]}", hint=NOT_TRUSTED[status])
    return Transient(where + WORDS.get(status, "{}").format(said[1]))
