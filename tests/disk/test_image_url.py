"""Images from a URL, from a real server that is slow, cut off, wrong or gone."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import trees
from http_server import Server, serving
from leftovers import descendants
from support import DEFAULTS, HANGS, Node, digest, partitions, run, wait_until

from imageos.errors import Failure
from imageos.images import curl, fetch, imagetypes, tarball, web
from imageos.images import imagetypes as images_module
from imageos.settings import Settings

MakeDisk = Callable[..., Path]
CHECKOUT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 4096  # 1 MiB
OTHER = CONTENT[::-1]
NAMES = ["tiny-x86_64.tar.gz", "tiny-x86_64.tar", "tiny-x86_64.tar.zst"]
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """One image, at /a.tar; nothing else is there."""
    url = server.put("/a.tar", CONTENT)
    cache = str(tmp_path / "cache")
    return Settings(image_url=url, image_type="tarball", image_name="tiny", arch="x86_64", cache_dir=cache)


def get(settings: Settings, **others: object) -> bytes:
    """Return the content of the file that `fetched` gives."""
    settings = replace(settings, **others)
    _, descriptor = fetch.fetched(settings, imagetypes.urls(settings))
    with open(descriptor, "rb") as file:
        return file.read()


def cached(settings: Settings) -> list[str]:
    """The files in the cache, without the hashes that their names begin with."""
    directory = Path(settings.cache_dir)
    return sorted(path.name.partition("-")[2] for path in directory.iterdir()) if directory.exists() else []


def notes(settings: Settings) -> dict[str, object]:
    (path,) = Path(settings.cache_dir).glob("*.json")
    return dict(json.loads(path.read_text()))


# --- once, and again --------------------------------------------------------------------------------------


def test_download(server: Server, settings: Settings) -> None:
    assert get(settings) == CONTENT
    assert cached(settings) == ["a.tar", "a.tar.json"]
    kept = notes(settings)
    assert (kept["url"], kept["size"]) == (server.url + "/a.tar", len(CONTENT))
    assert kept["digests"] == {"sha256": SHA256}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in Path(settings.cache_dir).iterdir())
    assert server.requests[0].headers["User-Agent"].startswith("imageos/")


@pytest.mark.parametrize(
    "how",
    [{}, {"etag": None, "last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"knows_head": False}, {"etag": 'W/"1"'}],
    ids=["etag", "last-modified", "no HEAD", "weak etag"],
)
def test_not_again(how: dict[str, object], server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, **how)
    assert get(settings) == CONTENT
    received = os.stat(next(Path(settings.cache_dir).glob("*.tar")))
    assert get(settings) == CONTENT
    assert os.stat(next(Path(settings.cache_dir).glob("*.tar"))).st_ino == received.st_ino
    assert server.count("/a.tar") == (3 if how.get("knows_head") is False else 1)


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, {}),
        ({"etag": None, "last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
         {"etag": None, "last_modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ({"etag": None}, {"etag": None}),
        ({"knows_head": False}, {"knows_head": False}),
    ],
    ids=["etag", "last-modified", "neither", "no HEAD"],
)  # fmt: skip
def test_changed_on_the_server(
    before: dict[str, object], after: dict[str, object], server: Server, settings: Settings
) -> None:
    server.put("/a.tar", CONTENT, **before)
    assert get(settings) == CONTENT
    server.put("/a.tar", OTHER, **after)
    assert get(settings) == OTHER
    assert cached(settings) == ["a.tar", "a.tar.json"]


def test_not_hashed_again(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    get(settings)
    hashed: list[str] = []
    monkeypatch.setattr("imageos.images.cache.digests_of", lambda path, _: hashed.append(path))
    assert get(settings) == CONTENT
    assert hashed == []
    assert server.count("/a.tar") == 1


def test_changed_in_the_cache(server: Server, settings: Settings) -> None:
    get(settings)
    path = next(Path(settings.cache_dir).glob("*.tar"))
    os.utime(path)
    assert get(settings) == CONTENT
    assert server.count("/a.tar") == 1, "touched, but the same"
    path.write_bytes(OTHER)
    assert get(settings) == CONTENT
    assert server.count("/a.tar") == 2


def test_directory(server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    server.put("/images/" + NAMES[1], CONTENT)
    server.put("/images/" + NAMES[2], OTHER)
    url = server.url + "/images"
    assert get(settings, image_url=url) == get(settings, image_url=url + "/") == CONTENT
    assert cached(settings) == [NAMES[1], NAMES[1] + ".json"]
    with pytest.raises(curl.Missing) as raised:
        get(settings, image_url=url, image_name="none")
    others = ", ".join(f"none-x86_64{suffix}" for suffix in tarball.SUFFIXES[1:])
    assert str(raised.value) == f"cannot find image {url}/none-x86_64.tar.gz: 404 Not Found (nor {others})"


def test_same_name_elsewhere(server: Server, settings: Settings) -> None:
    other = server.put("/elsewhere/a.tar", OTHER)
    assert [get(settings), get(settings, image_url=other), get(settings)] == [CONTENT, OTHER, CONTENT]
    assert cached(settings) == ["a.tar", "a.tar", "a.tar.json", "a.tar.json"]
    assert server.count("/a.tar") == 1


def test_cleanup(server: Server, settings: Settings) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    for number in (1, 2):
        assert get(settings, image_cleanup=True) == CONTENT
        assert cached(settings) == []
        assert server.count("/a.tar") == number


# --- what the server says ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 410])
def test_not_there(status: int, server: Server, settings: Settings) -> None:
    server.put("/a.tar", b"<html>Sorry</html>", status=status)
    with pytest.raises(curl.Missing, match=f"{server.url}/a.tar: {status} "):
        get(settings)
    assert cached(settings) == []


@pytest.mark.parametrize("status, attempts", [(500, 4), (503, 4), (429, 4), (400, 1), (401, 1)])
def test_errors(status: int, attempts: int, server: Server, settings: Settings) -> None:
    server.put("/a.tar", b"<html>Sorry</html>", status=status)
    with pytest.raises(Failure, match=f"{server.url}/a.tar: {status} "):
        get(settings)
    assert server.count("/a.tar") == attempts
    assert cached(settings) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects(status: int, server: Server, settings: Settings) -> None:
    server.put("/dir/b", b"", status=status, location="../a.tar")
    server.put("/b.tar", b"", status=status, location=server.url + "/dir/b")
    assert get(settings, image_url=server.url + "/b.tar") == CONTENT
    assert cached(settings) == ["b.tar", "b.tar.json"]


def test_redirects_without_end(server: Server, settings: Settings) -> None:
    server.put("/a.tar", b"", status=302, location="/a.tar")
    with pytest.raises(Failure, match="more than 10 redirects"):
        get(settings)
    assert len(server.requests) == 11


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://127.0.0.1/", "http://[", None]
)
def test_redirects_elsewhere(location: str, server: Server, settings: Settings) -> None:
    server.put("/a.tar", b"", status=302, location=location)
    with pytest.raises(Failure, match="redirect"):
        get(settings)
    assert cached(settings) == []


def test_credentials(server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """They are sent to that server alone, and nobody else gets to see them."""
    basic = "Basic " + base64.b64encode(b'user:pa ss:\xff%"').decode()
    with serving() as other:
        other.put("/a.tar", CONTENT, cuts=[1000])
        server.put("/a.tar", b"", status=302, location="/b.tar", password=basic)
        server.put("/b.tar", b"", status=302, location=other.url + "/a.tar", password=basic)
        url = server.url.replace("//", '//user:pa%20ss:\udcff%"@') + "/a.tar?token=secret"
        server.files["/a.tar?token=secret"] = server.files["/a.tar"]
        assert get(settings, image_url=url) == CONTENT
        assert [one.headers.get("Authorization") for one in other.requests] == [None] * len(other.requests)
        server.files["/a.tar?token=secret"].password = "Basic other"
        with pytest.raises(Failure, match="401") as raised:
            get(settings, image_url=url)
    seen = capfd.readouterr().err + str(raised.value) + json.dumps(notes(settings))
    for secret in ("pa ss", "pa%20ss", "secret", "user", basic[6:]):
        assert secret not in seen
    assert server.url + "/a.tar?..." in seen


def test_credentials_are_in_no_process(
    server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor what is in a query, nor the password of a proxy: not where others see them, nor in a log of everything."""
    monkeypatch.setattr("imageos.log._debug", True)
    secrets = [
        b"pa ss",
        b"pa%20ss",
        b"t0ken",
        b"s3cret",
        base64.b64encode(b"user:pa ss"),
        base64.b64encode(b"me:s3cret"),
    ]
    server.put("http://images.example.org/a.tar?t0ken", CONTENT, rate=100_000)
    proxy = {"http_proxy": server.url.replace("//", "//me:s3cret@")}
    url = "http://user:pa%20ss@images.example.org/a.tar?t0ken"
    download = Thread(target=lambda: get(settings, image_url=url, image_verify=False, unknown=proxy))
    download.start()
    wait_until(lambda: server.count("http://images.example.org/a.tar?t0ken") == 1, "it is sent")
    seen = [path.read_bytes() for path in processes("curl") for path in (path / "cmdline", path / "environ")]
    server.files["http://images.example.org/a.tar?t0ken"].rate = 0
    download.join()
    assert seen and all(seen) and not [secret for secret in secrets if any(secret in one for one in seen)]
    log = capfd.readouterr().err.encode()
    assert b"curl --" in log or b"$ curl " in log
    assert not [secret for secret in secrets if secret in log]
    request = server.requests[-1].headers
    assert secrets[-2].decode() in request["Authorization"] and secrets[-1].decode() in request["Proxy-Authorization"]


@pytest.mark.parametrize(
    "path",
    [
        "/{a,b}[1-3].tar",
        "/x/../a.tar",
        "/./a.tar",
        '/d%2Fx/a.tar?x="&y=[1]{2}',
        "/a'$(id)`.tar",
        '/a.tar?q=\\"',
    ],
)
def test_paths_are_sent_as_they_are(path: str, server: Server, settings: Settings) -> None:
    """But for what must be quoted; nothing in them is an option of curl, nor a pattern."""
    sent = path.replace('"', "%22").replace("\\", "%5C").replace("`", "%60").replace("{", "%7B").replace("}", "%7D")
    server.put(sent, CONTENT)
    assert get(settings, image_url=server.url + path, image_verify=False) == CONTENT
    assert {one.path for one in server.requests} == {sent}


@pytest.mark.parametrize("etag", ['"1"', '"a\\"', '"x" "y', '"\xe9"'])
def test_etag_is_sent_back_as_it_came(etag: str, server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, etag=etag, cuts=[300_000])
    assert get(settings) == CONTENT
    assert server.requests[-1].headers["If-Range"] == etag
    assert server.requests[-1].status == 206


def processes(name: str) -> list[Path]:
    """The directories in /proc of our descendants of that name."""
    found = [Path(f"/proc/{pid}") for pid in descendants(os.getpid())]
    return [path for path in found if path.exists() and (path / "comm").read_text() == f"{name}\n"]


def test_without_curl(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match="missing on this node: curl") as raised:
        get(settings)
    assert raised.value.hint and "install curl" in raised.value.hint
    assert cached(settings) == []


def test_stalled(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curl, "READ_TIMEOUT", 0.2)
    server.put("/a.tar", CONTENT, stalls_at=100_000)
    with pytest.raises(Failure, match="timed out"):
        get(settings)
    assert cached(settings) == ["a.tar.part", "a.tar.part.json"]


@pytest.mark.parametrize("name", ["a.tar", "SHA256SUMS"])
def test_trickles(name: str, server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps no create waiting for days."""
    monkeypatch.setattr(curl, "READ_TIMEOUT", 0.2)
    server.sums("/SHA256SUMS", "a.tar")
    server.files[f"/{name}"].rate = 20
    with pytest.raises(curl.Unreachable, match=f"{server.url}/{name}: timed out"):
        get(settings)
    assert server.count(f"/{name}") == 4


def test_small_file_that_takes_long(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes fast enough for an image, but others wait for the cache meanwhile."""
    monkeypatch.setattr(curl, "LEAST", 1)
    monkeypatch.setattr(web, "SMALL_TIME", 0.3)
    server.sums("/SHA256SUMS", "a.tar")
    server.files["/SHA256SUMS"].rate = 20
    with pytest.raises(curl.Unreachable, match=f"{server.url}/SHA256SUMS: timed out"):
        get(settings)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"babble": b"X", "rate": 20}, "not what an http server says"),
        (
            {"babble": b"HTTP/1.1 100 Continue\r\n\r\n"},
            "(headers without an end|Too large response headers)",
        ),  # curl has a limit of its own, too
        ({"babble": b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n", "rate": 20}, "timed out"),
        ({"chunked": True, "rate": 20}, "timed out"),
    ],
    ids=["no answer", "headers", "slow headers", "chunks"],
)
def test_never_ends(
    how: dict[str, object], problem: str, server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte is there in time, but there is always another one."""
    monkeypatch.setattr(curl, "READ_TIMEOUT", 0.2)
    server.put("/a.tar", CONTENT, **how)
    with pytest.raises(curl.Unreachable, match=f"{server.url}/a.tar: {problem}"):
        get(settings)


def test_status_that_only_curl_reads(server: Server, settings: Settings) -> None:
    """Nobody reads what follows: curl must not be waited for."""
    server.put("/a.tar", CONTENT, babble=b"HTTP/1.1  200 OK\r\n\r\n" + bytes(4 << 20))
    asking = Thread(target=lambda: pytest.raises(curl.Unreachable, get, settings, image_verify=False))
    asking.daemon = True  # it would never end
    asking.start()
    asking.join(20)
    assert not asking.is_alive() and server.count("/a.tar") == 4


def test_connection_that_stays_open(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes have come; that the server does not close is no fault."""
    monkeypatch.setattr(fetch, "GRACE", 0.1)
    server.put("/a.tar", CONTENT, stalls_at=len(CONTENT))
    assert get(settings) == CONTENT
    assert server.count("/a.tar") == 1


# --- cut off, and lies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{}, {"etag": None, "last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"knows_ranges": False}, {"etag": None}],
    ids=["etag", "last-modified", "no ranges", "no validator"],
)
def test_cut_off(how: dict[str, object], server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, cuts=[300_000, 300_000], **how)
    assert get(settings) == CONTENT
    ranges = [one.headers.get("Range") for one in server.requests if (one.method, one.path) == ("GET", "/a.tar")]
    resumes = "no validator" not in str(how) and how != {"etag": None}
    first = "bytes=300000-" if resumes else None
    second = ("bytes=600000-" if how.get("knows_ranges", True) else first) if resumes else None
    assert ranges == [None, first, second]
    assert cached(settings) == ["a.tar", "a.tar.json"]


def test_resumed_by_the_next_run(server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, cuts=[100_000] * 4)
    with pytest.raises(curl.Unreachable, match="cut off after 400000 of 1048576 bytes"):
        get(settings)
    assert cached(settings) == ["a.tar.part", "a.tar.part.json"]
    assert get(settings) == CONTENT
    assert server.requests[-1].headers["Range"] == "bytes=400000-"
    assert server.requests[-1].headers["If-Range"] == server.files["/a.tar"].tag


def test_cut_off_again_and_again(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad line brings all of it, bit by bit; one that brings nothing new is given up."""
    monkeypatch.setattr(web, "PROGRESS", 100_000)
    server.put("/a.tar", CONTENT, cuts=[60_000] * 12)
    assert get(settings) == CONTENT
    assert server.count("/a.tar") == 13
    server.put("/b.tar", CONTENT, knows_ranges=False, cuts=[600_000] * 12)
    with pytest.raises(curl.Unreachable, match="cut off after 600000 of"):
        get(settings, image_url=server.url + "/b.tar")
    assert server.count("/b.tar") == 4


@pytest.mark.parametrize("minds_if_range", [True, False])
def test_changed_while_resuming(minds_if_range: bool, server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, cuts=[200_000] * 4)
    with pytest.raises(curl.Unreachable):
        get(settings)
    server.put("/a.tar", OTHER, minds_if_range=minds_if_range)
    assert get(settings) == OTHER


def test_shorter_than_the_part(server: Server, settings: Settings) -> None:
    """416: there is no rest."""
    server.put("/a.tar", CONTENT, cuts=[250_000] * 4, etag='"the same"')
    server.files["/a.tar"].cuts[3] = 10
    with pytest.raises(curl.Unreachable):
        get(settings)
    server.put("/a.tar", CONTENT[:1000], etag='"the same"')
    assert get(settings) == CONTENT[:1000]
    assert 416 in [one.status for one in server.requests]


def test_killed_before_the_rename(server: Server, settings: Settings) -> None:
    """416: nothing is missing."""
    server.put("/a.tar", CONTENT, cuts=[200_000] * 4)
    with pytest.raises(curl.Unreachable):
        get(settings)
    next(Path(settings.cache_dir).glob("*.part")).write_bytes(CONTENT)
    assert get(settings) == CONTENT
    assert server.requests[-1].status == 416


def test_announces_too_much(server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, announced=len(CONTENT) + 10)
    with pytest.raises(Failure, match=f"{server.url}/a.tar"):
        get(settings)
    assert "a.tar" not in cached(settings)
    assert server.count("/a.tar") == 4


def test_announces_too_little(server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, announced=len(CONTENT) - 10)
    with pytest.raises(Failure, match="sends more than the 1048566 bytes that it announced"):
        get(settings)
    assert cached(settings) == []


@pytest.mark.parametrize("how", [{"announced": -1}, {"chunked": True}], ids=["till the end", "chunked"])
def test_announces_nothing(how: dict[str, object], server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, **how)
    assert get(settings) == CONTENT


def test_cut_off_in_chunks(server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, chunked=True, cuts=[300_000])
    assert get(settings) == CONTENT
    assert server.requests[-1].headers["Range"] == "bytes=300000-"


# --- verified ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, algorithm, line",
    [
        ("SHA256SUMS", "sha256", "{hex}  {name}\n"),
        ("SHA256SUMS", "sha256", "{hex} *{name}\n"),
        ("SHA512SUMS", "sha512", "{hex}  {name}\n"),
        ("CHECKSUM", "sha256", "SHA256 ({name}) = {hex}\n"),
        ("a.tar.sha256", "sha256", "{hex}\n"),
        ("a.tar.sha512", "sha512", "{hex}  another-name\n"),
        ("a.tar.sig", "sha1", "{hex}  {name}\n"),
        ("a.tar.sig", "sha1", "{hex}"),
    ],
)
def test_checksum_files(
    name: str, algorithm: str, line: str, server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    server.sums("/" + name, "a.tar", algorithm=algorithm, line=line)
    assert get(settings) == CONTENT
    log = capfd.readouterr().err
    assert f"verified: {algorithm} of {server.url}/{name}" in log
    assert ("SHA-1, which is weak" in log) == (algorithm == "sha1")
    assert ("warning" in log) == (algorithm == "sha1")
    assert get(settings) == CONTENT
    assert server.count("/a.tar") == 1
    server.put("/a.tar", OTHER, etag='"same"')
    server.sums("/" + name, "a.tar", algorithm=algorithm, line=line)
    assert get(settings) == OTHER, "a new checksum"


@pytest.mark.parametrize("where", ["setting", "beside"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_wrong_checksum(where: str, algorithm: str, server: Server, settings: Settings) -> None:
    wrong, right = (hashlib.new(algorithm, content).hexdigest() for content in (OTHER, CONTENT))
    if where == "setting":
        settings = replace(settings, image_checksum=f"{algorithm}:{wrong}")
    else:
        server.put(f"/{algorithm.upper()}SUMS", f"{wrong}  a.tar\n".encode())
    for _ in range(2):
        with pytest.raises(Failure) as raised:
            get(settings)
        for word in (server.url + "/a.tar", f"expected {wrong}", f"found {right}"):
            assert word in str(raised.value)
        assert cached(settings) == []


def test_pinned_needs_no_server(server: Server, settings: Settings) -> None:
    settings = replace(settings, image_checksum=f"sha256:{SHA256}")
    assert get(settings) == CONTENT
    before = len(server.requests)
    assert get(settings) == CONTENT
    assert len(server.requests) == before
    with pytest.raises(Failure, match="expected"):
        get(settings, image_checksum="sha512:" + "0" * 128)


def test_other_etag_of_the_same_file(server: Server, settings: Settings) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    get(settings)
    server.files["/a.tar"].etag = '"of another mirror"'
    assert get(settings) == CONTENT
    assert server.count("/a.tar") == 1


def test_no_checksum(server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    server.put("/SHA256SUMS", f"{SHA256}  other.tar\n".encode())
    for _ in range(2):
        assert get(settings) == CONTENT
        assert "warning: image" in capfd.readouterr().err
    for others in ({"image_verify": False}, {"image_checksum": "no"}, {"image_checksum": f"sha256:{SHA256}"}):
        assert get(settings, **others) == CONTENT
        assert "warning" not in capfd.readouterr().err


def test_not_verified(server: Server, settings: Settings) -> None:
    server.put("/SHA256SUMS", f"{'0' * 64}  a.tar\n".encode())
    assert get(settings, image_verify=False) == CONTENT
    assert get(settings, image_checksum="no") == CONTENT
    assert [one.path for one in server.requests if one.method == "GET"] == ["/a.tar"]
    with pytest.raises(Failure, match="expected 0000"):
        get(settings)


def test_huge_checksum_file(server: Server, settings: Settings) -> None:
    server.put("/SHA256SUMS", bytes(2 << 20))
    with pytest.raises(Failure, match="SHA256SUMS is larger than 1 MiB"):
        get(settings)


def test_checksum_file_cut_off(server: Server, settings: Settings) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    server.files["/SHA256SUMS"].cuts = [20]
    get(settings)
    assert "/SHA256SUMS" in str(notes(settings)["verdicts"])


@pytest.fixture(scope="session")
def gpg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., bytes]]:
    """Sign: gpg("alice", content, "--detach-sign"); `gpg("alice")` is the keyring."""
    home = tmp_path_factory.mktemp("gpg")
    home.chmod(0o700)
    command = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    for name in ("alice", "mallory"):
        subprocess.run(
            [*command, "--quick-gen-key", f"{name} <{name}@example.org>", "ed25519", "sign", "never"],
            check=True,
            capture_output=True,
        )

    def sign(name: str, content: bytes = b"", *how: str) -> bytes:
        what = [*how, "--local-user", name, "--output", "-"] if how else ["--export", name]
        return subprocess.run([*command, *what], input=content, check=True, capture_output=True).stdout

    yield sign
    run("gpgconf", "--homedir", home, "--kill", "all")


@pytest.fixture
def signed(gpg: Callable[..., bytes], settings: Settings, tmp_path: Path) -> Settings:
    keyring = tmp_path / "alice.gpg"
    keyring.write_bytes(gpg("alice"))
    return replace(settings, image_keyring=str(keyring))


@pytest.mark.parametrize("suffix, how", [(".gpg", ["--detach-sign"]), (".sign", ["--detach-sign", "--armor"]),
                                         (".asc", ["--detach-sign", "--armor"])])  # fmt: skip
def test_signed(
    suffix: str,
    how: list[str],
    server: Server,
    signed: Settings,
    gpg: Callable[..., bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    server.put("/SHA256SUMS" + suffix, gpg("alice", server.files["/SHA256SUMS"].content, *how))
    assert get(signed) == CONTENT
    assert f"signed by a key of {signed.image_keyring}" in capfd.readouterr().err
    assert get(signed) == CONTENT
    assert server.count("/a.tar") == 1


def test_signed_text(server: Server, signed: Settings, gpg: Callable[..., bytes]) -> None:
    """The signature is inside; only what it is of counts."""
    text = gpg("alice", f"{SHA256}  a.tar\n".encode(), "--clearsign")
    server.put("/SHA256SUMS", text)
    assert get(signed, image_cleanup=True) == CONTENT
    server.put("/a.tar", OTHER)
    server.put("/SHA256SUMS", text + f"{hashlib.sha256(OTHER).hexdigest()}  a.tar\n".encode())
    with pytest.raises(Failure):
        get(signed)


def test_several_signatures(server: Server, signed: Settings, gpg: Callable[..., bytes]) -> None:
    """One by a key that we have is enough, unless another one is wrong."""
    server.sums("/SHA256SUMS", "a.tar")
    sums = server.files["/SHA256SUMS"].content
    good, unknown = (gpg(name, sums, "--detach-sign") for name in ("alice", "mallory"))
    server.put("/SHA256SUMS.gpg", unknown + good)
    assert get(signed, image_cleanup=True) == CONTENT
    server.put("/SHA256SUMS.gpg", good + gpg("alice", b"other", "--detach-sign"))
    with pytest.raises(Failure, match="KEYRING"):
        get(signed)


def test_second_file_is_signed(server: Server, signed: Settings, gpg: Callable[..., bytes]) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    server.sums("/SHA512SUMS", "a.tar", algorithm="sha512")
    server.put("/SHA512SUMS.gpg", gpg("alice", server.files["/SHA512SUMS"].content, "--detach-sign"))
    assert get(signed) == CONTENT


@pytest.mark.parametrize(
    "case", ["unsigned", "no checksum", "other key", "other content", "garbage", "forged", "forged text", "no keyring",
             "armored keyring"],
)  # fmt: skip
def test_not_signed(case: str, server: Server, signed: Settings, gpg: Callable[..., bytes], tmp_path: Path) -> None:
    wrong = f"{hashlib.sha256(OTHER).hexdigest()}  a.tar\n".encode()
    if case != "no checksum":
        server.sums("/SHA256SUMS", "a.tar")
    sums = f"{SHA256}  a.tar\n".encode()
    signature = {
        "other key": lambda: gpg("mallory", sums, "--detach-sign"),
        "other content": lambda: gpg("alice", wrong, "--detach-sign"),
        "garbage": lambda: b"<html>\xff",
        # a good signature, but of a text that is in there too
        "forged": lambda: gpg("alice", wrong, "--sign"),
        "forged text": lambda: gpg("alice", wrong, "--clearsign"),
        "no keyring": lambda: gpg("alice", sums, "--detach-sign"),
        "armored keyring": lambda: gpg("alice", sums, "--detach-sign"),
    }.get(case)
    if signature:
        server.put("/SHA256SUMS.gpg", signature())
    if case == "no keyring":
        signed = replace(signed, image_keyring=str(tmp_path / "none.gpg"))
    if case == "armored keyring":
        Path(signed.image_keyring).write_bytes(gpg("alice", b"", "--armor", "--export", "alice"))
    with pytest.raises(Failure, match="KEYRING") as raised:
        get(signed)
    assert server.count("/a.tar") == 0
    if case == "armored keyring":
        assert raised.value.hint and "--dearmor" in raised.value.hint


def test_os_parameters_do_not_replace_the_signature(server: Server, signed: Settings) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    for checksum in ("no", f"sha256:{SHA256}"):
        with pytest.raises(Failure, match="not signed, but IMAGE_KEYRING is set"):
            get(signed, image_checksum=checksum)
    assert get(signed, image_keyring="") == CONTENT
    with pytest.raises(Failure, match="not signed"):
        get(signed)
    assert get(signed, image_verify=False) == CONTENT


# --- without the server -----------------------------------------------------------------------------------


@contextmanager
def gone(server: Server) -> Iterator[None]:
    """It answers nobody."""
    files, server.files = server.files, {}
    for path in files:
        server.put(path, b"", status=503)
    yield
    server.files = files


def test_verified_copy(server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    get(settings)
    with gone(server):
        assert get(settings) == CONTENT
    assert (
        f"warning: {server.url}/a.tar: 503 Service Unavailable: the copy in CACHE_DIR is used" in capfd.readouterr().err
    )


def test_server_is_down(settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        server.put("/d/" + NAMES[1], CONTENT)
        settings = replace(settings, image_url=server.url + "/d")
        get(settings)
    assert get(settings) == CONTENT
    with pytest.raises(
        curl.Unreachable, match=r"cannot download image http://127.0.0.1:\d+/d/other-x86_64.tar.gz: Connection refused"
    ):
        get(settings, image_name="other")


def test_copy_that_is_not_verified(server: Server, settings: Settings) -> None:
    get(settings, image_verify=False)
    server.sums("/SHA256SUMS", "a.tar")
    with gone(server):
        with pytest.raises(curl.Unreachable):
            get(settings)
        assert get(settings, image_verify=False) == CONTENT


def test_copy_that_is_not_signed(server: Server, signed: Settings, gpg: Callable[..., bytes]) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    get(signed, image_keyring="")
    with gone(server), pytest.raises(curl.Unreachable):
        get(signed)
    server.put("/SHA256SUMS.gpg", gpg("alice", server.files["/SHA256SUMS"].content, "--detach-sign"))
    get(signed)
    with gone(server):
        assert get(signed) == CONTENT
        Path(signed.image_keyring).write_bytes(gpg("mallory"))
        with pytest.raises(curl.Unreachable):
            get(signed)


def test_name_that_does_not_resolve(settings: Settings) -> None:
    with pytest.raises(curl.Unreachable, match="http://images.invalid/a.tar: "):
        get(settings, image_url="http://images.invalid/a.tar")


# --- the disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(settings: Settings) -> Iterator[Settings]:
    """CACHE_DIR has 512 KiB."""
    os.mkdir(settings.cache_dir)
    run("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", settings.cache_dir)
    yield settings
    run("umount", settings.cache_dir)


@pytest.mark.parametrize("how", [{}, {"announced": -1}], ids=["announced", "not announced"])
def test_disk_full(how: dict[str, object], server: Server, small: Settings) -> None:
    server.put("/a.tar", CONTENT, **how)
    with pytest.raises(Failure, match=f"CACHE_DIR {small.cache_dir} has no space left for image {server.url}/a.tar"):
        get(small)
    assert cached(small) == []


def test_disk_full_while_resuming(server: Server, small: Settings) -> None:
    server.put("/a.tar", CONTENT[: 400 << 10], cuts=[300 << 10] * 4)
    server.files["/a.tar"].cuts[1:] = [0, 0, 0]
    with pytest.raises(curl.Unreachable):
        get(small)
    (Path(small.cache_dir) / "other-x").write_bytes(bytes(150 << 10))
    with pytest.raises(Failure, match="no space left"):
        get(small)
    assert cached(small) == ["x"]


def test_cache_that_is_none(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Failure, match=f"CACHE_DIR {tmp_path}/file: "):
        get(settings, cache_dir=str(tmp_path / "file"))


def test_links_in_the_cache(server: Server, settings: Settings, tmp_path: Path) -> None:
    """Of a directory where others may write: nothing is followed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    get(settings)
    path = next(Path(settings.cache_dir).glob("*.tar"))
    for suffix in (".lock", ".part", ".part.json"):
        path.unlink(missing_ok=True)
        Path(f"{path}{suffix}").symlink_to(victim)
        try:
            get(settings)
        except Failure as failure:
            assert "CACHE_DIR" in str(failure)
        Path(f"{path}{suffix}").unlink(missing_ok=True)
        assert victim.read_bytes() == b"precious"


# --- several processes ------------------------------------------------------------------------------------

CLIENT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from imageos.images import fetch
from imageos.settings import Settings
cleanup = sys.argv[3] == "yes"
settings = Settings(image_url=sys.argv[1], cache_dir=sys.argv[2], image_type="tarball", image_cleanup=cleanup)
path, descriptor = fetch.fetched(settings, [settings.image_url])
import hashlib
print(hashlib.sha256(open(descriptor, "rb").read()).hexdigest())
"""


def client(settings: Settings, cleanup: str = "no") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, settings.image_url, settings.cache_dir, cleanup],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def waiting_for_locks(processes: Sequence[subprocess.Popen[str]]) -> int:
    """How many of them wait for a lock that somebody has (proc_locks(5))."""
    waiting = re.findall(r"-> FLOCK\s+\S+\s+\S+\s+(\d+)", Path("/proc/locks").read_text())
    return len({str(process.pid) for process in processes} & set(waiting))


@pytest.mark.parametrize("how", [{}, {"knows_head": False, "etag": None}], ids=["good server", "bad server"])
def test_twenty_at_once(how: dict[str, object], server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, rate=10_000, **how)
    clients = [client(settings) for _ in range(20)]
    wait_until(lambda: waiting_for_locks(clients) == 19, "one loads it, the others wait")
    server.files["/a.tar"].rate = 0
    said = [one.communicate(timeout=HANGS) for one in clients]
    assert [(one.returncode, out.strip()) for one, (out, _) in zip(clients, said)] == [(0, SHA256)] * 20
    assert sum("waiting for another process" in err for _, err in said) == 19
    opened = server.count("/a.tar") - (0 if how == {} else 1)  # one look instead of HEAD
    assert opened == 1
    assert cached(settings) == ["a.tar", "a.tar.json"]


def test_some_at_once_with_cleanup(server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, rate=2_000_000)
    clients = [client(settings, "yes") for _ in range(4)]
    assert [one.communicate(timeout=HANGS)[0].strip() for one in clients] == [SHA256] * 4
    assert cached(settings) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_killed(number: signal.Signals, server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, rate=10_000)
    first = client(settings)
    part = Path(settings.cache_dir) / (fetch.cache_name(settings.image_url) + ".part")
    wait_until(lambda: part.exists() and part.stat().st_size > 0, "a part is there")
    waiting = client(settings)
    wait_until(lambda: waiting_for_locks([waiting]) == 1, "another one waits for it")
    first.send_signal(number)
    first.communicate(timeout=HANGS)
    server.files["/a.tar"].rate = 0
    out, err = waiting.communicate(timeout=HANGS)
    assert out.strip() == SHA256, err
    assert "going on with a download of" in err
    assert server.requests[-1].status == 206
    assert cached(settings) == ["a.tar", "a.tar.json"]


def test_progress(
    server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imageos.log.Progress.INTERVAL", 0.2)
    server.put("/a.tar", CONTENT, rate=1_000_000)
    get(settings)
    lines = [line for line in capfd.readouterr().err.splitlines() if "% of 1 MiB" in line]
    assert len(lines) >= 2
    assert lines[0].startswith("imageos: downloading a.tar: ")


# --- proxies and https ------------------------------------------------------------------------------------


def make_certificate(directory: Path, name: str, extensions: str, ca: Path | None = None) -> Path:
    """A key, and a certificate signed with the key of `ca` or its own; both are in the file returned."""
    config, key, request, made = (directory / f"{name}.{suffix}" for suffix in ("cnf", "key", "csr", "pem"))
    config.write_text(
        "[req]\ndistinguished_name=dn\n[dn]\n"
        "[server]\nsubjectAltName=IP:127.0.0.1\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid:always\n"
        "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n"
    )
    run(
        "openssl",
        "req",
        "-new",
        "-config",
        config,
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        request,
        "-subj",
        f"/CN={name}",
        "-sha256",
    )
    signer = ["-CA", ca, "-CAkey", ca, "-CAcreateserial"] if ca else ["-signkey", key]
    run("openssl", "x509", "-req", "-in", request, "-out", made, "-extfile", config, "-extensions", extensions, *signer)
    made.write_text(key.read_text() + made.read_text())
    return made


@pytest.fixture
def certificate(etc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Key and certificate of a server; its CA is in this machine's store until the test ends."""
    ca = make_certificate(tmp_path, "ca", "ca")
    trust(ca)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return make_certificate(tmp_path, "server", "server", ca)


def trust(ca: Path) -> None:
    """As update-ca-certificates does it, in what is a private layer over /etc."""
    paths = ssl.get_default_verify_paths()
    certificate = run("openssl", "x509", "-in", ca)
    name = run("openssl", "x509", "-noout", "-hash", "-in", ca).strip()
    # .0: OpenSSL does not look for .1 where there is none, and Debian 11's has no file, only this directory
    bundles = (os.path.realpath(paths.openssl_cafile), "/etc/ssl/certs/ca-certificates.crt")  # Debian's curl wants that
    for path in dict.fromkeys((*bundles, f"{os.path.realpath(paths.openssl_capath)}/{name}.0")):
        if path.startswith("/etc/"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "a") as file:
                file.write(certificate)


def test_https(certificate: Path, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(certificate) as server:
        url = server.put("/a.tar", CONTENT, cuts=[400_000])
        assert get(settings, image_url=url) == get(settings, image_url=url) == CONTENT
        log = capfd.readouterr().err
        assert "warning" not in log and log.count("no checksum beside it") == 2
        with serving() as plain:
            plain.put("/b.tar", CONTENT)
            server.put("/b.tar", b"", status=302, location=plain.url + "/b.tar")
            assert get(settings, image_url=server.url + "/b.tar") == CONTENT
        assert "warning: image" in capfd.readouterr().err, "it came over plain http in the end"


def test_certificate_that_nobody_trusts(certificate: Path, settings: Settings, tmp_path: Path) -> None:
    with serving(make_certificate(tmp_path, "own", "server")) as server:
        url = server.put("/a.tar", CONTENT)
        with pytest.raises(curl.Unreachable, match="certificate is not trusted: self.signed certificate") as raised:
            get(settings, image_url=url)
        assert raised.value.hint and "update-ca-certificates" in raised.value.hint
    with serving(certificate) as server, pytest.raises(curl.Unreachable, match="not trusted: .*localhost"):
        get(settings, image_url=server.put("/a.tar", CONTENT).replace("127.0.0.1", "localhost"))


def test_proxy(server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    server.put("http://images.example.org/a.tar", CONTENT, cuts=[300_000])
    proxy = server.url.replace("//", "//me:s%20ecret@")
    settings = replace(settings, image_url="http://u:pw@images.example.org/a.tar", unknown={"http_proxy": proxy})
    assert get(settings) == CONTENT
    request = server.requests[-1]
    assert request.path == "http://images.example.org/a.tar"
    assert request.headers["Host"] == "images.example.org"
    assert base64.b64decode(request.headers["Proxy-Authorization"].split()[1]) == b"me:s ecret"
    assert base64.b64decode(request.headers["Authorization"].split()[1]) == b"u:pw"
    with pytest.raises(Failure, match="proxy 127.0.0.1:9: Connection refused") as raised:
        get(
            settings,
            image_url="http://images.example.org/b.tar",
            unknown={"http_proxy": "http://me:secret@127.0.0.1:9"},
        )
    assert "ecret" not in capfd.readouterr().err + str(raised.value)


def test_no_proxy(server: Server, settings: Settings) -> None:
    assert get(settings, unknown={"http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost, 127.0.0.1"}) == CONTENT


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_https_through_a_proxy(scheme: str, certificate: Path, server: Server, settings: Settings) -> None:
    with serving(certificate) as secure:
        url = secure.put("/a.tar", CONTENT)
        proxy = server.url.replace("http://", scheme + "me:secret@")
        assert get(settings, image_url=url, unknown={"https_proxy": proxy}) == CONTENT
        assert {one.method for one in server.requests} == {"CONNECT"}
        assert all("Proxy-Authorization" in one.headers for one in server.requests)
        assert not any("Proxy-Authorization" in one.headers for one in secure.requests)


def test_proxy_of_another_kind(settings: Settings) -> None:
    with pytest.raises(Failure, match="http_proxy: only proxies"):
        get(settings, unknown={"http_proxy": "socks5://127.0.0.1:1080"})


# --- create -----------------------------------------------------------------------------------------------


@pytest.fixture
def repository(server: Server, images: Path) -> Server:
    """The small image as tiny-ARCH.tar.zst, with its checksum."""
    server.put(f"/images/tiny-{trees.ARCH}.tar.zst", (images / "small.tar.zst").read_bytes())
    server.sums("/images/SHA256SUMS", f"tiny-{trees.ARCH}.tar.zst")
    return server


@pytest.fixture
def empty_node(node: Node) -> Node:
    """Its CACHE_DIR, which is IMAGE_DIR too, has no image."""
    for path in node.images.iterdir():
        path.unlink()
    node.defaults(f"CACHE_DIR={node.images}")
    return node


def test_create_from_os_parameter(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    target = disk()
    result = empty_node.create(target, OSP_IMAGE_URL=repository.url + "/images/").ok()
    assert f"verified: sha256 of {repository.url}/images/SHA256SUMS" in result.log
    assert partitions(target)[-1].content["TYPE"] == "ext4"
    url = f"{repository.url}/images/tiny-{trees.ARCH}.tar.zst"
    empty_node.create(disk(), OSP_IMAGE_URL=repository.url + "/images").ok()
    empty_node.create(disk(), OSP_IMAGE_URL=url, OSP_IMAGE_NAME=None).ok()
    assert repository.count(f"/images/tiny-{trees.ARCH}.tar.zst") == 1


def test_create_from_defaults_file(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    """Proxy and all: Ganeti gives create no environment."""
    path = f"http://images.example.org/images/tiny-{trees.ARCH}.tar.zst"
    repository.files[path] = repository.files[f"/images/tiny-{trees.ARCH}.tar.zst"]
    with DEFAULTS.open("a") as file:
        file.write(f"http_proxy={repository.url}\nIMAGE_URL=http://images.example.org/images\nIMAGE_CLEANUP=yes\n")
    result = empty_node.create(disk()).ok()
    assert "warning: image http://images.example.org/images/tiny" in result.log
    assert repository.count(path) == 1
    assert os.listdir(empty_node.images) == []


def test_create_that_finds_nothing(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    target = disk()
    before = digest(target)
    url = repository.url.replace("//", "//user:secret@")
    result = empty_node.create(target, OSP_IMAGE_URL=url, OSP_IMAGE_NAME="none").failed(
        f"cannot find image {repository.url}/none-{trees.ARCH}.tar.gz: 404"
    )
    assert "secret" not in result.log
    empty_node.create(target, OSP_IMAGE_URL=url + "/images", OSP_IMAGE_CHECKSUM="sha256:" + "0" * 64).failed(
        "expected 0000", f"{repository.url}/images/tiny-{trees.ARCH}.tar.zst"
    )
    empty_node.create(target, OSP_IMAGE_URL=url, OSP_IMAGE_NAME=None).failed("IMAGE_NAME is not set")
    empty_node.create(target, OSP_IMAGE_URL="http://[bad").failed("not a URL")
    assert digest(target) == before
    assert os.listdir(empty_node.images) == []


def test_create_disk_image(server: Server, empty_node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """qemu-img reads it although its name is gone already."""
    raw = tmp_path / "raw"
    raw.write_bytes(CONTENT * 3)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "qcow2")
    url = server.put("/windows.qcow2", (tmp_path / "qcow2").read_bytes())
    with DEFAULTS.open("a") as file:
        file.write("IMAGE_CLEANUP=yes\n")
    target = disk()
    empty_node.create(target, OSP_IMAGE_URL=url, OSP_IMAGE_TYPE="qcow2", OSP_IMAGE_NAME=None, OSP_NOMOUNT="yes").ok()
    with target.open("rb") as file:
        assert file.read(len(CONTENT) * 3) == CONTENT * 3
    assert os.listdir(empty_node.images) == []


@pytest.mark.parametrize("is_directory", [True, False], ids=["directory", "one file"])
def test_dump(is_directory: bool, server: Server, settings: Settings) -> None:
    """Two files; the second may be missing, and is not wanted without a /boot."""
    root, boot = (gzip.compress(content) for content in (CONTENT, OTHER))
    server.put("/d/x-x86_64-root.dump.gz", root)
    server.put("/d/x-x86_64-boot.dump.gz", boot)
    url = server.url + ("/d" if is_directory else "/d/x-x86_64-root.dump.gz")
    settings = replace(
        settings, image_url=url, image_type="dump", image_name="x" if is_directory else "", arch="x86_64"
    )
    image = images_module.find(settings)
    assert image.boot and os.pread(image.boot.descriptor, len(boot) + 1, 0) == boot
    assert os.pread(image.descriptor, len(root) + 1, 0) == root
    assert images_module.find(settings, with_boot=False).boot is None
    del server.files["/d/x-x86_64-boot.dump.gz"]
    assert images_module.find(settings).boot is None


def test_dump_that_does_not_say_of_what(server: Server, settings: Settings) -> None:
    """It is that of the root, and must not go onto /boot, too."""
    url = server.put("/d/debian.dump.gz", gzip.compress(CONTENT))
    assert images_module.find(replace(settings, image_url=url, image_type="dump")).boot is None


def test_create_eight_at_once(repository: Server, empty_node: Node, disk: MakeDisk) -> None:
    path = f"/images/tiny-{trees.ARCH}.tar.zst"
    repository.files[path].rate = len(repository.files[path].content) // 3
    url = repository.url + "/images"
    calls = [empty_node.start("create", empty_node.environment(disk(), OSP_IMAGE_URL=url)) for _ in range(8)]
    for call in calls:
        call.result().ok()
    assert repository.count(path) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_create_is_ended_while_downloading(
    number: signal.Signals, repository: Server, empty_node: Node, disk: MakeDisk
) -> None:
    path = f"/images/tiny-{trees.ARCH}.tar.zst"
    repository.files[path].rate = len(repository.files[path].content) // 20
    target = disk()
    before = digest(target)
    environment = empty_node.environment(target, OSP_IMAGE_URL=repository.url + "/images")
    call = empty_node.start("create", environment)
    call.wait_for(lambda: any(part.stat().st_size for part in empty_node.images.glob("*.part")), "a part is there")
    call.kill(number)
    assert call.result().status == 128 + number
    assert digest(target) == before
    repository.files[path].rate = 0
    assert "going on with a download" in empty_node.call("create", environment).ok().log
    assert sorted(name[17:] for name in os.listdir(empty_node.images)) == [
        f"tiny-{trees.ARCH}.tar.zst",
        f"tiny-{trees.ARCH}.tar.zst.json",
    ]


def test_local_image_costs_nothing(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """No module for the network is loaded."""
    trace = tmp_path / "trace"
    environment = node.environment(disk())
    run(
        "strace",
        "-f",
        "-e",
        "trace=openat",
        "-o",
        trace,
        "env",
        "-i",
        *(f"{name}={value}" for name, value in environment.items()),
        str(node.os_dir / "create"),
    )
    opened = trace.read_text()
    assert "/images/" in opened and "libssl" not in opened and "_ssl" not in opened
