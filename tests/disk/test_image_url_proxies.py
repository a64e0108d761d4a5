"""Images from a URL, over https and through proxies."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from certificates import make_certificate
from downloads import CONTENT, get
from downloads import settings as settings
from http_server import Server, serving

from imageos.errors import Failure
from imageos.images import curl
from imageos.settings import Settings

# --- proxies and https ------------------------------------------------------------------------------------


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
    settings = settings._replace(image_url="http://u:pw@images.example.org/a.tar", unknown={"http_proxy": proxy})
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
