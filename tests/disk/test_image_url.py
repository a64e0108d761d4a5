"""Images from a URL, from a real server that is slow, cut off, wrong or gone."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from threading import Thread

import pytest
from downloads import CONTENT, NAMES, OTHER, SHA256, cached, get, notes, processes
from downloads import settings as settings
from http_server import Server, serving
from support import wait_until

from imageos.errors import Failure
from imageos.images import curl, fetch, imagetypes, tarball, web
from imageos.settings import Settings

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


@pytest.mark.parametrize("image_type", ["qemu", "dump"])
def test_a_server_is_asked_for_many_names_by_one_curl(
    server: Server, settings: Settings, image_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index and each first name of a list are asked for alone."""
    started: list[str] = []
    monkeypatch.setattr(curl, "require", started.append)
    many = settings._replace(image_url=f"{server.url}/images", image_type=image_type)
    names = [f"/images/{url.rpartition('/')[2]}" for url in imagetypes.urls(many)]
    with pytest.raises(curl.Missing, match=re.escape(f"cannot find image {server.url}{names[0]}: 404 ")):
        get(many)
    assert {one.path for one in server.requests} == {*names}
    assert len(server.requests) == len(names) and len(started) <= 2, "one for the first, one for all others"
    server.put(names[-1], CONTENT)
    started.clear()
    assert get(many) == CONTENT
    assert len(started) == 9, "first, others; HEAD; checksums: first, others; index; more: first, others; GET"
