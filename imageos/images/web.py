"""Requests over http and https: proxies, redirects, credentials in the URL, time limits, further attempts.

What messages show of a URL never has its password, nor its query, which may be a token.
"""

from __future__ import annotations

import base64
import io
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection, IncompleteRead
from socket import socket
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from imageos import __version__, log
from imageos.errors import Failure

CONNECT_TIMEOUT = 15.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte, or with fewer than
LEAST = 32 << 10  # bytes: at that rate an image takes a week
PAUSES = (0.5, 1.0, 2.0)  # seconds before each further attempt; all of them again after
PROGRESS = 1 << 20  # bytes more than ever before
CHUNK = 1 << 20  # bytes
REDIRECTS = 10
SMALL = 1 << 20  # bytes of a file that is read into memory

PORTS = {"http": 80, "https": 443}
SENT_ON = (301, 302, 303, 307, 308)
ABSENT = (403, 404, 410)  # 403: what S3 says of a file that is not there
BUSY = (408, 425, 429, 500, 502, 503, 504)
T = TypeVar("T")


class Missing(Failure):
    """The server has no such file."""


class Unreachable(Failure):
    """The server does not answer, or not to the end, although it was asked several times."""


class Transient(Exception):
    """What may be better at the next attempt."""


class Meter(io.RawIOBase):
    """What comes from a socket; Transient if hardly anything does, or an answer does not begin.

    The socket's own limit would start anew with every byte.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._waited = 0.0  # seconds, since we last looked at how much comes
        self._received = 0  # bytes in them
        self._head: int | None = 0  # bytes of it; None after its end

    def begin_content(self) -> None:
        self._waited, self._received, self._head = 0.0, 0, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._waited > READ_TIMEOUT:
            if self._received < LEAST:
                raise Transient(f"only {log.size(self._received)} in {self._waited:.0f} s")
            self._waited, self._received = 0.0, 0
        start = time.monotonic()
        count = self._raw.readinto(buffer) or 0
        self._waited += time.monotonic() - start
        self._received += count
        if self._head is not None:
            self._head += count
            if self._head > SMALL:
                raise Transient("headers without an end")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class MeteredResponse(HTTPResponse):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._meter = Meter(self.fp.detach())
        self.fp = io.BufferedReader(self._meter)

    def begin(self) -> None:
        super().begin()
        self._meter.begin_content()


@dataclass(frozen=True)
class Answer:
    response: HTTPResponse
    connection: socket

    def read(self, most: int = CHUNK) -> bytes:
        """The next bytes of the content, empty at its end; Transient if hardly any come."""
        with network_errors():
            return self.response.read1(most)


class Web:
    """The requests of one command. `environ` may hold http_proxy, https_proxy and no_proxy."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._unreachable: Unreachable | None = None
        self._small: dict[str, bytes | None] = {}
        self.was_plain = False  # whether anything was asked over plain http

    def headers(self, url: str) -> HTTPMessage:
        """What the server says of the file now."""

        def ask() -> HTTPMessage:
            with self._answered("HEAD", url, {}) as answer:
                if answer.response.status in (200, 404, 410):
                    _check(url, answer.response)
                    return answer.response.headers
            # it does not know HEAD, or forbids it: look at the beginning of what it says to GET
            with self.get(url) as answer:
                return answer.response.headers

        return self.patiently(url, ask)

    def small(self, url: str) -> bytes | None:
        """The content of a small file; None if the server has none."""

        def ask() -> bytes:
            with self.get(url) as answer:
                announced, answer.response.length = answer.response.length, None
                most = SMALL + 1 if announced is None else min(announced, SMALL + 1)
                content = b""
                while len(content) < most and (chunk := answer.read(most - len(content))):
                    content += chunk
                if announced is not None and len(content) < most:
                    raise Transient("cut off")
                return content

        if url not in self._small:
            try:
                self._small[url] = self.patiently(url, ask)
            except Missing:
                self._small[url] = None
        content = self._small[url]
        if content and len(content) > SMALL:
            raise Failure(f"{shown(url)} is larger than {log.size(SMALL)}")
        return content

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """The answer, which has the file or the rest of it (or is 416); one attempt."""
        with self._answered("GET", url, headers or {}) as answer:
            _check(url, answer.response)
            yield answer

    def patiently(self, url: str, attempt: Callable[[], T], so_far: Callable[[], int] = lambda: 0) -> T:
        """What `attempt` returns, which is made again when it raises Transient; in the end Unreachable.

        As often as needed, while there is progress: `so_far` says how many bytes the attempts have brought.
        """
        if self._unreachable:
            raise self._unreachable
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
    def _answered(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """The answer of any status, after the redirects."""
        at = url
        for _ in range(REDIRECTS + 1):
            with ExitStack() as stack:
                answer = self._send(method, at, headers, stack)
                if answer.response.status not in SENT_ON:
                    yield answer
                    return
                at = redirected(at, answer.response.getheader("Location", ""))
        raise Failure(f"{shown(url)}: more than {REDIRECTS} redirects")

    def _send(self, method: str, url: str, headers: Mapping[str, str], stack: ExitStack) -> Answer:
        """One request; what it opens is closed by `stack`."""
        parts = urlsplit(url)
        self.was_plain |= parts.scheme == "http"
        sent = {
            **headers,
            **_authorization("Authorization", parts),
            "User-Agent": f"imageos/{__version__}",
            "Connection": "close",
        }
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = self._proxy(parts)
        peer = proxy or parts
        host, port = peer.hostname or "", peer.port or PORTS[peer.scheme]
        connection: HTTPConnection
        if parts.scheme == "https":
            connection = HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT, context=ssl.create_default_context())
            if proxy:
                authorization = _authorization("Proxy-Authorization", proxy)
                connection.set_tunnel(parts.hostname or "", parts.port or PORTS["https"], authorization)
        else:
            connection = HTTPConnection(host, port, timeout=CONNECT_TIMEOUT)
            if proxy:
                target = parts._replace(netloc=_server(parts)).geturl()
                sent.update(_authorization("Proxy-Authorization", proxy))
        connection.response_class = MeteredResponse
        stack.callback(connection.close)
        try:
            with network_errors(f"proxy {_server(proxy)}: " if proxy else ""):
                connection.connect()
                open_socket: socket = connection.sock
                open_socket.settimeout(READ_TIMEOUT)
                connection.request(method, target, headers=sent)
                response = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(
                f"{shown(url)}: its certificate is not trusted: {error.verify_message}",
                hint="add the CA to the node's store: /usr/local/share/ca-certificates and update-ca-certificates",
            ) from None
        stack.callback(response.close)
        return Answer(response, open_socket)

    def _proxy(self, parts: SplitResult) -> SplitResult | None:
        text = self._environ.get(f"{parts.scheme}_proxy", "")
        if not text or is_exempt(parts.hostname or "", self._environ.get("no_proxy", "")):
            return None
        name = f"{parts.scheme}_proxy"
        try:
            proxy = urlsplit(text if "://" in text else f"http://{text}")
            _ = proxy.port
        except ValueError:
            raise Failure(f"{name} is not a URL") from None
        if proxy.scheme != "http" or not proxy.hostname:
            raise Failure(f"{name}: only proxies that are spoken to in http are supported")
        _check_host(name, proxy.hostname)
        return proxy


@contextmanager
def network_errors(where: str = "") -> Iterator[None]:
    """Turn what the network does to us into Transient."""
    try:
        yield
    except ssl.SSLCertVerificationError:
        raise
    except OSError as error:
        raise Transient(where + (error.strerror or str(error) or type(error).__name__)) from None
    except IncompleteRead:
        raise Transient(where + "cut off") from None
    except HTTPException as error:
        raise Transient(where + f"not what an http server says ({type(error).__name__})") from None


def _check(url: str, response: HTTPResponse) -> None:
    status = f"{shown(url)}: {response.status} {response.reason}"
    if response.status in ABSENT:
        raise Missing(status)
    if response.status in BUSY:
        raise Transient(f"{response.status} {response.reason}")
    if response.status not in (200, 206, 416):
        raise Failure(status)


# --- URLs -------------------------------------------------------------------------------------------------


def shown(url: str) -> str:
    """A URL as messages show it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return url.partition(":")[0] + "://..."  # a password with a slash looks like this
    return f"{parts.scheme}://{_server(parts)}{parts.path}" + ("?..." if parts.query else "")


def cleaned(url: str) -> str:
    """`url` as it is sent, special characters quoted; Failure if it is none of http or https."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise Failure(f"{shown(url)} is not a URL") from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise Failure(f"{shown(url)}: only http and https are supported")
    _check_host(shown(url), parts.hostname)
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~[]", errors="surrogateescape")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~[]?", errors="surrogateescape")
    return parts._replace(path=path, query=query, fragment="").geturl()


def _check_host(where: str, host: str) -> None:
    """Failure for what the resolver, or http.client, would not even try."""
    try:
        host.encode("idna")
        is_name = not re.search(r"[\0-\x20\x7f]", host)
    except UnicodeError:
        is_name = False
    if not is_name:
        raise Failure(f"{where}: {host!r} cannot be the name of a host")


def redirected(url: str, location: str) -> str:
    """Where a redirect leads. Credentials go along within one server only."""
    old = urlsplit(url)
    try:
        new = urlsplit(cleaned(urljoin(url, location)))
    except (Failure, ValueError) as error:
        raise Failure(f"{shown(url)}: refused to be redirected: {error}") from None
    is_same = (old.scheme, _server(old)) == (new.scheme, new.netloc)
    return (new._replace(netloc=old.netloc) if is_same else new).geturl()


def beside(url: str, name: str) -> str:
    """The URL of the file `name` (quoted) in the directory of `url`."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()


def is_exempt(host: str, no_proxy: str) -> bool:
    """Whether `no_proxy` (hosts and domains, separated by commas, or *) names the host."""
    names = [name.strip().lstrip(".").lower() for name in no_proxy.split(",")]
    return "*" in names or any(name and (host == name or host.endswith("." + name)) for name in names)


def _server(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _authorization(header: str, parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    text = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: "Basic " + base64.b64encode(text.encode()).decode()}
