"""Images from a URL: names, checksum files, messages and requests. Another tier downloads from a server."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageos.errors import Failure
from imageos.images import cache, checksums, curl, dump, fetch, imagetypes, pages, urls
from imageos.images.cache import Copy, Verdict
from imageos.images.checksums import checksum_in
from imageos.settings import Settings

HEX = "0123456789abcdef" * 4
LONG = HEX * 2
SHA1 = HEX[:40]


# --- checksum files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        f"{HEX}  debian.qcow2",
        f"{HEX} *debian.qcow2",
        f"{HEX.upper()}  debian.qcow2",
        f"{HEX}  ./debian.qcow2",
        f"{HEX}\tdebian.qcow2\r",
        f"SHA256 (debian.qcow2) = {HEX}",
        f"SHA256(debian.qcow2)= {HEX}",
        f"SHA2-256(debian.qcow2)= {HEX}",  # OpenSSL 3
        f"sha256 (debian.qcow2) = {HEX.upper()}",
        f"sha256:{HEX}  debian.qcow2",
        f"\\{HEX}  a\\\\b\n{HEX}  debian.qcow2",
        f"{HEX}  debian.qcow2\n{HEX} *./debian.qcow2",  # twice the same
    ],
)
def test_formats(line: str) -> None:
    text = f"# a comment\n\n{LONG[:64]}  other.qcow2\n{line}\n{HEX[::-1]}  debian.qcow2.sig\n"
    assert checksum_in(text, "debian.qcow2", urls.STRONG) == ("sha256", HEX)


def test_strongest_counts() -> None:
    text = f"{SHA1}  a\n{HEX}  a\n{LONG}  a\n"
    assert checksum_in(text, "a", ("sha1", "sha256", "sha512")) == ("sha512", LONG)
    assert checksum_in(text, "a", ("sha1", "sha256")) == ("sha256", HEX)


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{HEX}  b\n",
        f"{HEX}  dir/a\n",
        f"{HEX[:-1]}  a\n",
        f"{SHA1}  a\n",
        f"{HEX}\n",
        f"<html>{HEX}  a</html>",
        f"MD5 (a) = {HEX[:32]}",
        f"SHA512 (a) = {HEX}",
        f"SHA512/256 (a) = {HEX}",
        f"SHA3-256 (a) = {HEX}",
        f"\\{HEX}  a",
        f"{HEX}  a.bak\n{HEX}  xa\n",
    ],
)
def test_no_checksum(text: str) -> None:
    assert checksum_in(text, "a", urls.STRONG) is None


def test_names_with_a_path() -> None:
    """Those of the image's own directories; what names more of them is meant."""
    text = f"{HEX}  arm64/a\n{LONG[1:65]}  a\n{HEX[::-1]}  ./amd64/a\n"
    assert checksum_in(text, "/images/amd64/a", urls.STRONG) == ("sha256", HEX[::-1])
    assert checksum_in(text, "/images/riscv64/a", urls.STRONG) == ("sha256", LONG[1:65])
    assert checksum_in(f"{HEX}  /images/a\n", "/images/a", urls.STRONG) == ("sha256", HEX)
    assert checksum_in(f"{HEX}  old/a\n", "/images/old.new/a", urls.STRONG) is None
    assert checksum_in(f"\\{HEX}  a\\\\b\n", "/images/a\\b", urls.STRONG) == ("sha256", HEX)


@pytest.mark.parametrize("is_only", [False, True])
def test_two_checksums_of_one_image(is_only: bool) -> None:
    for text in (f"{HEX}  a\n{HEX[::-1]}  a\n", f"{HEX}  a\n{LONG}  a\n{HEX[::-1]} *./a\n"):
        with pytest.raises(Failure, match="has different checksums of a"):
            checksum_in(text, "a", urls.STRONG, is_only)
    assert checksum_in(f"{HEX}\n{LONG}\n", "a", urls.STRONG, is_only=True) == ("sha512", LONG)


# --- what is no image -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"\n" * 2000 + b"<html>", "text"),
        (b"\xef\xbb\xbf <div>Login</div>", "a web page"),
        ("<!DOCTYPE html>".encode("utf-16"), "a web page"),
        (b"<Error><Code>NoSuchKey</Code></Error>", "a web page"),
        (b"<html>".ljust(4096, b"\0"), "a web page"),
        (b'{"error": "not found"}', "text"),
        ("404 \xe4\n".encode("latin-1"), "text"),
        (b"PK\3\4" + bytes(99), "a zip archive"),
        (b"\x89LZO\0\r\n\x1a\n" + bytes(99), "packed by lzop"),
        (bytes.fromhex("455646090d0aff00") + bytes(99), "an EWF image (of EnCase)"),  # as the programs of each make it
        (bytes.fromhex("41464631300d0a00") + bytes(99), "an AFF image"),
        (bytes.fromhex("467341306b140e6b") + bytes(99), "a fsarchiver archive"),
        (bytes.fromhex("78465364756d703000000003") + bytes(99), "a dump by xfsdump"),
        (bytes.fromhex("62747266732d73747265616d0001") + bytes(99), "a stream of btrfs send"),
        (bytes.fromhex("27051956 99c958fe") + bytes(99), "an image for U-Boot"),
        (b"age-encryption.org/v1\n->" + bytes(99), "encrypted by age"),
        (b"Salted__" + bytes(99), "encrypted by openssl"),
        (b"LRZI\0\6" + bytes(99), "packed by lrzip"),
        (b"\xeb\x63\x90" + bytes(510), ""),
        (b"<\0" + bytes(510), ""),
        (b"\xff\xfe" + random.Random(0).randbytes(1022), ""),  # as UTF-16 it has no control characters
        (b"", ""),
        (b"etc/passwd".ljust(512, b"\0"), ""),
    ],
)
def test_what_is_no_image(content: bytes, kind: str) -> None:
    assert pages.kind(content) == kind


@given(st.binary(min_size=512))
def test_any_content(content: bytes) -> None:
    pages.kind(content)
    assert not pages.kind(b"\0" + content)


def test_file_about_one_image() -> None:
    for text in (HEX, f"{HEX}\n", f"{HEX}  build/another-name-1.2\n"):
        assert checksum_in(text, "a", urls.STRONG, is_only=True) == ("sha256", HEX)
    two = f"{HEX}  a\n{HEX[::-1]}  b\n"
    assert checksum_in(two, "a", urls.STRONG, is_only=True) == ("sha256", HEX)
    assert checksum_in(two, "c", urls.STRONG, is_only=True) is None


@given(st.text(), st.text())
def test_any_text(text: str, name: str) -> None:
    found = checksum_in(text, name, urls.STRONG, is_only=True)
    assert found is None or len(found[1]) in (64, 128)


@pytest.mark.parametrize("verify, text, digest", [(True, "sha256:" + HEX.upper(), HEX), (True, "no", None),
                                                  (True, "", None), (False, "sha256:" + HEX, None)])  # fmt: skip
def test_pinned(verify: bool, text: str, digest: object) -> None:
    found = checksums.pinned(Settings(image_checksum=text, image_verify=verify))
    assert (found.hex if found else None) == digest


# --- URLs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, shown",
    [
        ("http://host/a", "http://host/a"),
        ("https://user:pass@host:8443/a?token=secret#part", "https://host:8443/a?..."),
        ("http://user:pa@ss@host/a", "http://host/a"),
        ("http://[2001:db8::1]:80/a", "http://[2001:db8::1]:80/a"),
        ("http://user:pa/ss@host/a", "http://..."),
        ("http://[bad", "http://..."),
    ],
)
def test_shown(url: str, shown: str) -> None:
    assert urls.shown(url) == shown


@given(st.text(alphabet=st.characters(exclude_characters="/?#[]@", exclude_categories=("C", "Z")), min_size=6))
def test_password_is_never_shown(password: str) -> None:
    assert f":{password}@" not in urls.shown(f"http://user:{password}@host/a?b={password}")


@pytest.mark.parametrize(
    "url, sent",
    [
        ("http://host/a b/ä?q=ö#f", "http://host/a%20b/%C3%A4?q=%C3%B6"),
        ("http://host/a%20b", "http://host/a%20b"),
        ("http://host", "http://host"),
        ("http://host/\udcff", "http://host/%FF"),
    ],
)
def test_cleaned(url: str, sent: str) -> None:
    assert urls.cleaned(url) == sent


@pytest.mark.parametrize("proxy", ["http://[", "host:port", "http://a..b:3128", "https://proxy", "http://"])
def test_proxy_that_is_none(proxy: str) -> None:
    with pytest.raises(Failure, match="^http_proxy"), curl.answered("http://host/a", {}, {"http_proxy": proxy}):
        pass


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "http:///a", "http://host:port/", "http://[",
                                 "http://images..example.org/a", f"http://{'a' * 64}/", "http://a\x01b/"])  # fmt: skip
def test_not_a_url(url: str) -> None:
    with pytest.raises(Failure):
        urls.cleaned(url)


@pytest.mark.parametrize(
    "location, to",
    [
        ("/b", "https://u:p@host/b"),
        ("c", "https://u:p@host/dir/c"),
        ("https://host/b", "https://u:p@host/b"),
        ("https://host:444/b", "https://host:444/b"),
        ("http://host/b", "http://host/b"),
        ("//other/b", "https://other/b"),
        ("https://x:y@other/b", "https://x:y@other/b"),
    ],
)
def test_redirects_keep_credentials_within_one_server(location: str, to: str) -> None:
    assert urls.redirected("https://u:p@host/dir/a", location) == to


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://host/a", "javascript:1", "http://[", "data:,x"])
def test_redirects_elsewhere(location: str) -> None:
    with pytest.raises(Failure, match="refused to be redirected"):
        urls.redirected("https://u:secret@host/a", location)


@pytest.mark.parametrize(
    "no_proxy, is_exempt",
    [("", False), ("*", True), ("example.org", True), (".example.org", True), ("other, a.Example.org", True),
     ("ample.org", False), ("b.a.example.org", False), (" , ", False)],
)  # fmt: skip
def test_no_proxy(no_proxy: str, is_exempt: bool) -> None:
    assert urls.is_exempt("a.example.org", no_proxy) is is_exempt


@pytest.mark.parametrize(
    ("url", "peer"),
    [
        ("http://u:p@Host:8080/a", "u:p@host:8080"),
        ("http://[2001:DB8::1]/a", "[2001:db8::1]"),
        ("http://[::1]:81/", "[::1]:81"),
        ("http://bücher.example:80/", "xn--bcher-kva.example:80"),
    ],
)
def test_peer(url: str, peer: str) -> None:
    assert urls.peer(urlsplit(url)) == peer


def test_credentials() -> None:
    """As curl decodes them."""
    assert urls.peer(urlsplit('http://us%3Aer:p%40 :"@host/')) == "us%3Aer:p%40%20:%22@host"
    assert urls.peer(urlsplit("http://a@b:x@host:80/")) == "a%40b:x@host:80"
    assert urls.peer(urlsplit("http://\udcff:x@host/")) == "%FF:x@host"  # a byte that is no UTF-8


@given(st.text())
def test_nothing_leaves_its_quotes(value: str) -> None:
    """The ETag of a server becomes an option of curl later, so it must stay one line and one value."""
    quoted = curl._quoted(value)
    assert quoted[0] == quoted[-1] == '"' and not re.search(r"[\0-\x1f\x7f]", quoted)
    assert re.fullmatch(r'([^"\\]|\\.)*', quoted[1:-1])
    assert re.sub(r"\\(.)", r"\1", quoted[1:-1]) == re.sub(r"[\0-\x1f\x7f]", "", value)


def test_beside() -> None:
    assert urls.beside("http://u:p@h/d/a.img?t=1", "SHA256SUMS") == "http://u:p@h/d/SHA256SUMS?t=1"


# --- names ------------------------------------------------------------------------------------------------


def paths(url: str, name: str = "a", image_type: str = "tarball", changed: Callable[[str], str] = str) -> list[str]:
    settings = Settings(image_url=url, image_type=image_type, image_name=name, arch="x86_64")
    return [urlsplit(url).path for url in imagetypes.urls(settings, changed)]


def test_directory_url() -> None:
    for url in ("http://h/images", "http://h/images/"):
        assert paths(url)[:2] == ["/images/a-x86_64.tar.gz", "/images/a-x86_64.tar"]
    assert paths("http://h")[0] == "/a-x86_64.tar.gz"
    assert paths("http://h/d", "a b?#%")[1] == "/d/a%20b%3F%23%25-x86_64.tar"


@pytest.mark.parametrize(
    "path, image_type",
    [("/x.tar.zst", "tarball"), ("/x.qcow2", "qemu"), ("/x.img", "raw"), ("/x.raw.xz", "raw"), ("/x.vmdk", "qcow2"),
     ("/x-root.dump", "dump"), ("/x-root.dump.gz", "dump"), ("/x.tgz", "tarball"),
     ("/x.OVA", "qemu"), ("/X.VHD.GZ", "raw")],
)  # fmt: skip
def test_url_of_one_image(path: str, image_type: str) -> None:
    assert imagetypes.ONE_IMAGE.search(path)
    assert paths("http://h" + path, "ignored", image_type=image_type) == [path]


def test_dump_of_boot() -> None:
    found = paths("http://h/root.dump/x-root.dump.gz", image_type="dump", changed=dump.boot_path)
    assert found == ["/root.dump/x-boot.dump.gz"]
    assert paths("http://h/d", image_type="dump", changed=dump.boot_path)[0] == "/d/a-x86_64-boot.dump"


@pytest.mark.parametrize(
    "path, image_type, fitting",
    [("/x.tar.gz", "dump", "tarball"), ("/x.qcow2", "dump", "qemu"), ("/x.dump", "tarball", "dump")],
)
def test_url_that_does_not_fit(path: str, image_type: str, fitting: str) -> None:
    with pytest.raises(Failure, match=f"does not fit IMAGE_TYPE={image_type}") as raised:
        paths("http://u:secret@h" + path, image_type=image_type)
    assert raised.value.hint == f"set IMAGE_TYPE={fitting}"


def test_one_checksum_for_two_files() -> None:
    settings = Settings(image_url="http://h/d", image_type="dump", image_checksum="sha256:" + HEX)
    with pytest.raises(Failure, match="a dump consists of two"):
        imagetypes.urls(settings)


def test_cache_names() -> None:
    names = [
        fetch.cache_name(url)
        for url in ("http://h/d/a.img", "http://h/e/a.img", "http://h/d/a.img?b", "http://u@h/d/a.img")
    ]
    assert len(set(names)) == 4
    assert all(name.endswith("-a.img") and len(name) == 16 + 1 + 5 for name in names)
    long = fetch.cache_name("http://h/" + 300 * "%C3%A4" + ".qcow2")
    assert len(long) < 200 and long.endswith(".qcow2")


@pytest.mark.parametrize("path", ["/", "", "/.hidden", "/a%2Fb", "/%2e%2e", "/a%00b", "/a%0Ab", "/a%FF%1b"])
def test_names_that_are_none(path: str) -> None:
    with pytest.raises(Failure, match="name of a file"):
        fetch.cache_name("http://h/d" + path if path else "http://h")


@given(st.text(min_size=1))
def test_cache_names_stay_in_the_directory(name: str) -> None:
    try:
        found = fetch.cache_name(urls.cleaned("http://h/d/" + name))
    except Failure:
        return
    assert "/" not in found and found.isascii() and len(found) < 200


# --- what is known of a copy ------------------------------------------------------------------------------


def message(**headers: str) -> dict[str, str]:
    return {name.replace("_", "-").lower(): value for name, value in headers.items()}


def test_is_it_current() -> None:
    copy = Copy("http://h/a", etag='"1"', last_modified="Mon", size=5, digests={})
    assert copy.is_of(message(ETag='"1"', Last_Modified="Tue"))
    assert not copy.is_of(message(ETag='"2"', Last_Modified="Mon"))
    assert copy.is_of(message(Last_Modified="Mon"))
    assert copy.is_of(message(Last_Modified="Mon", Content_Length="5"))
    assert not copy.is_of(message(Last_Modified="Mon", Content_Length="6"))
    assert not copy.is_of(message(Content_Length="5")), "the size alone tells nothing"


def test_condition_of_a_resume() -> None:
    assert Copy("", '"1"', "Mon", 5, {}).condition == '"1"'
    assert Copy("", 'W/"1"', "Mon", 5, {}).condition == "Mon"
    assert Copy("", 'W/"1"', "", 5, {}).condition == ""


def write(path: Path, content: bytes) -> Path:
    path.touch(0o600)
    path.write_bytes(content)
    return path


def test_kept_beside_the_file(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a", b"content"))
    digests = checksums.digests_of(path, ["sha256"])
    copy = Copy("http://h/a?...", '"1"', "Mon", 7, digests, cache.identity(path), cache.source_of("http://h/a?b"), 1.5)
    copy = copy.judged("beside", Verdict("SHA256SUMS", 2.5))
    cache.save(path, copy)
    assert cache.load(path, "http://h/a?b") == copy
    assert cache.load(path, "http://h/a?c") is None
    assert os.stat(path + ".json").st_mode & 0o777 == 0o600


WHOLE = {"url": "", "etag": "", "last_modified": "", "size": 7}


@pytest.mark.parametrize(
    "record",
    [
        {"url": 1},
        {"etag": "", "unknown": 1},
        {**WHOLE, "unknown": 1},
        {**WHOLE, "etag": 1},
        {**WHOLE, "size": "7"},
        {**WHOLE, "checked": "now"},
        {**WHOLE, "identity": 1},
        {**WHOLE, "identity": ["1"]},
        {**WHOLE, "digests": []},
        {**WHOLE, "digests": {"sha256": 1}},
        {**WHOLE, "verdicts": []},
        {**WHOLE, "verdicts": {"beside": {}}},
        {**WHOLE, "verdicts": {"beside": {"found": "", "checked": ""}}},
        {**WHOLE, "verdicts": {"beside": None}},
    ],
)
def test_damaged_notes(record: object, tmp_path: Path) -> None:
    write(tmp_path / "a", b"content")
    write(tmp_path / "a.json", json.dumps(record).encode())
    assert cache.load(str(tmp_path / "a"), "http://h/a") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "[" * 100_000, "\xff"])
def test_notes_that_are_none(text: str, tmp_path: Path) -> None:
    write(tmp_path / "a", b"content")
    write(tmp_path / "a.json", text.encode("latin-1"))
    assert cache.load(str(tmp_path / "a"), "http://h/a") is None


def test_verdicts_are_bounded() -> None:
    """Anyone who may set OS parameters can ask in any number of ways."""
    copy = Copy("", "", "", 7, {})
    for number in range(3 * cache.MOST_VERDICTS):
        copy = copy.judged(f"key {number}", Verdict("", float(number)))
    assert list(copy.verdicts) == [f"key {number}" for number in range(number + 1 - cache.MOST_VERDICTS, number + 1)]


def test_touched_or_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"content")
    digests = checksums.digests_of(str(path), ["sha256"])
    cache.save(str(path), Copy("", '"1"', "", 7, digests, cache.identity(str(path))))
    os.utime(path, (1, 1))
    touched = cache.load(str(path), "http://h/a")
    assert touched and touched.identity == cache.identity(str(path))
    assert json.loads((tmp_path / "a.json").read_text())["identity"] == list(touched.identity)
    path.write_bytes(b"CONTENT")
    assert cache.load(str(path), "http://h/a") is None


def test_lock_leaves_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    for _ in range(2):
        with cache.locked(path, "http://h/a"):
            assert os.listdir(tmp_path) == ["a.lock"]
        assert os.listdir(tmp_path) == []
