"""Images from a URL: checksums, signatures, and what counts of them while the server is down."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from downloads import CONTENT, NAMES, OTHER, SHA256, Gpg, cached, get, gone, notes
from downloads import settings as settings
from http_server import Server, serving

from imageos.errors import Failure
from imageos.images import curl
from imageos.settings import Settings

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
        settings = settings._replace(image_checksum=f"{algorithm}:{wrong}")
    else:
        server.put(f"/{algorithm.upper()}SUMS", f"{wrong}  a.tar\n".encode())
    for _ in range(2):
        with pytest.raises(Failure) as raised:
            get(settings)
        for word in (server.url + "/a.tar", f"expected {wrong}", f"found {right}"):
            assert word in str(raised.value)
        assert cached(settings) == []


def test_pinned_needs_no_server(server: Server, settings: Settings) -> None:
    settings = settings._replace(image_checksum=f"sha256:{SHA256}")
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


@pytest.fixture
def signed(gpg: Gpg, settings: Settings, tmp_path: Path) -> Settings:
    keyring = tmp_path / "alice.gpg"
    keyring.write_bytes(gpg("alice"))
    return settings._replace(image_keyring=str(keyring))


@pytest.mark.parametrize("suffix, how", [(".gpg", ["--detach-sign"]), (".sign", ["--detach-sign", "--armor"]),
                                         (".asc", ["--detach-sign", "--armor"])])  # fmt: skip
def test_signed(
    suffix: str,
    how: list[str],
    server: Server,
    signed: Settings,
    gpg: Gpg,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    server.put("/SHA256SUMS" + suffix, gpg("alice", server.files["/SHA256SUMS"].content, *how))
    assert get(signed) == CONTENT
    assert f"signed by a key of {signed.image_keyring}" in capfd.readouterr().err
    assert get(signed) == CONTENT
    assert server.count("/a.tar") == 1


def test_signed_text(server: Server, signed: Settings, gpg: Gpg) -> None:
    """The signature is inside; only what it is of counts."""
    text = gpg("alice", f"{SHA256}  a.tar\n".encode(), "--clearsign")
    server.put("/SHA256SUMS", text)
    assert get(signed, image_cleanup=True) == CONTENT
    server.put("/a.tar", OTHER)
    server.put("/SHA256SUMS", text + f"{hashlib.sha256(OTHER).hexdigest()}  a.tar\n".encode())
    with pytest.raises(Failure):
        get(signed)


def test_several_signatures(server: Server, signed: Settings, gpg: Gpg) -> None:
    """One by a key that we have is enough, unless another one is wrong."""
    server.sums("/SHA256SUMS", "a.tar")
    sums = server.files["/SHA256SUMS"].content
    good, unknown = (gpg(name, sums, "--detach-sign") for name in ("alice", "mallory"))
    server.put("/SHA256SUMS.gpg", unknown + good)
    assert get(signed, image_cleanup=True) == CONTENT
    server.put("/SHA256SUMS.gpg", good + gpg("alice", b"other", "--detach-sign"))
    with pytest.raises(Failure, match="KEYRING"):
        get(signed)


def test_second_file_is_signed(server: Server, signed: Settings, gpg: Gpg) -> None:
    server.sums("/SHA256SUMS", "a.tar")
    server.sums("/SHA512SUMS", "a.tar", algorithm="sha512")
    server.put("/SHA512SUMS.gpg", gpg("alice", server.files["/SHA512SUMS"].content, "--detach-sign"))
    assert get(signed) == CONTENT


@pytest.mark.parametrize(
    "case", ["unsigned", "no checksum", "other key", "other content", "garbage", "forged", "forged text", "no keyring",
             "armored keyring"],
)  # fmt: skip
def test_not_signed(case: str, server: Server, signed: Settings, gpg: Gpg, tmp_path: Path) -> None:
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
        signed = signed._replace(image_keyring=str(tmp_path / "none.gpg"))
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
        settings = settings._replace(image_url=server.url + "/d")
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


def test_copy_that_is_not_signed(server: Server, signed: Settings, gpg: Gpg) -> None:
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
