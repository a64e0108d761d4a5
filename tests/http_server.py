"""A real HTTP server on loopback that can be slow, unreliable and wrong."""

from __future__ import annotations

import hashlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STEP = 1 << 14  # bytes per write


@dataclass
class File:
    """The content at one path, and the behaviour of the server there."""

    content: bytes = b""
    etag: str | None = "of the content"
    last_modified: str | None = None
    status: int = 200
    location: str | None = None
    knows_head: bool = True
    knows_ranges: bool = True
    minds_if_range: bool = True
    announced: int | None = None  # a wrong Content-Length; -1: no Content-Length
    chunked: bool = False
    rate: int = 0  # bytes per second
    cuts: list[int] = field(default_factory=list)  # the next responses end after so many bytes
    stalls_at: int | None = None  # send no more after so many bytes, but keep the connection
    encoding: str | None = None  # Content-Encoding of the content
    password: str | None = None  # `Basic ...` that the client must send
    babble: bytes = b""  # sent again and again instead of a response; with a rate, byte by byte

    @property
    def tag(self) -> str | None:
        return f'"{hashlib.md5(self.content).hexdigest()}"' if self.etag == "of the content" else self.etag


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, File] = {}
        self.requests: list[Request] = []
        self.scheme = "http"
        self.is_closing = threading.Event()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def put(self, path: str, content: bytes, **how: object) -> str:
        """Serve `content` at `path`; return its URL."""
        self.files[path] = File(content, **how)  # type: ignore[arg-type]
        return self.url + path

    def sums(self, path: str, *names: str, algorithm: str = "sha256", line: str = "{hex}  {name}\n") -> None:
        """Serve a checksum file of files `names` in the same directory."""
        top = path.rpartition("/")[0]
        text = "".join(
            line.format(hex=hashlib.new(algorithm, self.files[f"{top}/{name}"].content).hexdigest(), name=name)
            for name in names
        )
        self.put(path, text.encode())

    def count(self, path: str, method: str = "GET") -> int:
        """Return how often a file was asked for; a look at its first byte does not count."""
        asked = [request for request in self.requests if (request.method, request.path) == (method, path)]
        return sum(request.headers.get("Range") != "bytes=0-0" for request in asked)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore that clients close connections early."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        request = Request(self.command, self.path, dict(self.headers.items()))
        self.server.requests.append(request)
        file = self.server.files.get(self.path) or File(b"<html>no such file</html>", status=404)
        request.status, start, headers = self.decide(file)
        body = file.content[start:] if request.status != 416 else b""
        self.close_connection = True
        while file.babble and not self.server.is_closing.wait(1 / file.rate if file.rate else 0):
            self.wfile.write(file.babble)
        self.send_response(request.status)
        for name, value in headers.items():
            self.send_header(name, value)
        if file.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif file.announced != -1:
            self.send_header("Content-Length", str(len(body) if file.announced is None else file.announced - start))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.send_body(file, body)

    def decide(self, file: File) -> tuple[int, int, dict[str, str]]:
        """Return the status, the offset of the first byte, and the headers."""
        headers = {"Last-Modified": file.last_modified, "ETag": file.tag, "Location": file.location,
                   "Content-Encoding": file.encoding}  # fmt: skip
        sent = {name: value for name, value in headers.items() if value}
        if file.password and self.headers.get("Authorization") != file.password:
            return 401, 0, {}
        if self.command == "HEAD" and not file.knows_head:
            return 501, 0, {}
        asked = self.headers.get("Range")
        if not asked or not file.knows_ranges or file.status != 200:
            return file.status, 0, sent
        if file.minds_if_range and self.headers.get("If-Range") not in (None, file.tag, file.last_modified):
            return 200, 0, sent
        start, size = int(asked.partition("=")[2].rstrip("-")), len(file.content)
        if start >= size:
            return 416, 0, {"Content-Range": f"bytes */{size}"}
        return 206, start, {**sent, "Content-Range": f"bytes {start}-{size - 1}/{file.announced or size}"}

    def send_body(self, file: File, body: bytes) -> None:
        end = file.cuts.pop(0) if file.cuts else len(body)
        stop = min(end, len(body) if file.stalls_at is None else file.stalls_at)
        step = min(STEP, max(1, file.rate // 20)) if file.rate else STEP
        for at in range(0, stop, step):
            piece = body[at : min(at + step, stop)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if file.chunked else piece)
            rate = file.rate  # read it each time, as the test may change it
            if rate:
                time.sleep(len(piece) / rate)
        if file.chunked and end >= len(body):
            self.wfile.write(b"0\r\n\r\n")
        if file.stalls_at is not None:
            self.wfile.flush()
            self.server.is_closing.wait(60)

    def do_CONNECT(self) -> None:
        """Act as a proxy for https, to this or another server of the test."""
        self.server.requests.append(Request("CONNECT", self.path, dict(self.headers.items())))
        host, _, port = self.path.rpartition(":")
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with socket.create_connection((host, int(port))) as other:
            ends = {self.connection: other, other: self.connection}
            while True:
                for ready in select.select(list(ends), [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    ends[ready].sendall(data)


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[Server]:
    """Run a server in a thread; with a file that contains key and certificate, use https."""
    with Server() as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # the thread that responds does the handshake
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            server.scheme = "https"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.is_closing.set()
            server.shutdown()
            thread.join()
