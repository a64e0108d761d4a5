"""Checksums are found where publishers have them, by the names of their files and in their formats."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from http_server import Server

from imageos.errors import Failure
from imageos.images import checksums, fetch, imagetypes, urls, web
from imageos.settings import Settings

CONTENT = b"QFI\xfb" + bytes(range(256)) * 256
HEX = {name: hashlib.new(name, CONTENT).hexdigest() for name in ("md5", "sha1", "sha256", "sha512", "blake2b")}
PLAIN, TAGGED = "{sha256}  {name}\n", "SHA256 ({name}) = {sha256}\n"
SECTIONS = "# MD5 HASH\n{md5}  {name}\n# SHA1 HASH\n{sha1}  {name}\n# SHA512 HASH\n{sha512}  {name}\n"
# publisher -> image, checksum file, its format, whether the server shows an index
PUBLISHERS = {
    "Debian": ("debian-13-genericcloud-amd64.qcow2", "SHA512SUMS", "{sha512}  {name}\n", True),
    "Ubuntu": ("noble-server-cloudimg-amd64.img", "SHA256SUMS", "{sha256} *{name}\n", True),
    "AlmaLinux": ("AlmaLinux-9-GenericCloud-latest.x86_64.qcow2", "CHECKSUM", PLAIN, True),
    "Rocky": ("Rocky-9-GenericCloud.latest.x86_64.qcow2", "{}.CHECKSUM", "# {name}: 66 bytes\n" + TAGGED, False),
    "CentOS": ("CentOS-Stream-GenericCloud-9-latest.x86_64.qcow2", "{}.SHA256SUM", TAGGED, False),
    "Fedora": ("Fedora-Cloud-Base.x86_64-40-1.14.qcow2", "Fedora-Cloud-40-1.14-x86_64-CHECKSUM", TAGGED, True),
    "openSUSE": ("openSUSE-Leap-15.6.x86_64-NoCloud.qcow2", "{}.sha256", PLAIN, True),
    "Arch": ("Arch-Linux-x86_64-cloudimg.qcow2", "{}.SHA256", PLAIN, False),
    "Alpine": ("nocloud_alpine-3.20.2-x86_64-bios-tiny-r0.qcow2", "{}.sha512", "{sha512}\n", False),
    "FreeBSD": ("FreeBSD-14.1-RELEASE-amd64.qcow2", "CHECKSUM.SHA256", TAGGED, False),
    "OpenWrt": ("openwrt-23.05.4-x86-64-generic-ext4-combined.img", "sha256sums", "{sha256} *{name}\n", False),
    "Flatcar": ("flatcar_production_qemu_image.img", "{}.DIGESTS", SECTIONS, False),
    "Gentoo": ("di-amd64-cloudinit.qcow2", "{}.DIGESTS", "# BLAKE2B HASH\n{blake2b}  {name}\n" + SECTIONS, False),
    "Void": ("void-x86_64.qcow2", "sha256sum.txt", TAGGED, False),
    "a space": ("my image.qcow2", "my sums of sha256", PLAIN, True),
}


def publish(server: Server, image: str, tmp_path: Path) -> Settings:
    """Put an image there; return the settings that name it as a user would write it."""
    server.put(f"/images/{quote(image)}", CONTENT)
    kind = "qemu" if image.endswith(".img") else "qcow2"
    return Settings(image_url=f"{server.url}/images/{image}", image_type=kind, cache_dir=str(tmp_path / "cache"))


def show_index(server: Server, *more: str) -> None:
    """Show an index of the images as Apache does."""
    names = [path.rpartition("/")[2] for path in server.files if path.startswith("/images/")]
    links = "".join(f'<a href="{name}">{name}</a>\n' for name in ("?C=N;O=D", "/", *names, *more))
    server.put("/images/", f"<html><h1>Index of /images</h1>{links}</html>".encode())


def get(settings: Settings) -> None:
    fetch.fetched(settings, imagetypes.urls(settings))


@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_found(publisher: str, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image, file, form, has_index = PUBLISHERS[publisher]
    settings, at = publish(server, image, tmp_path), f"/images/{quote(file.format(image))}"
    other = form.format(name="other.qcow2", **{name: "0" * len(digest) for name, digest in HEX.items()})
    both = form.format(name=image, **HEX) + ("" if "{}" in file else other)
    server.put(at, both.encode())
    if has_index:
        show_index(server)
    get(settings)
    assert f"of {server.url}{at}" in capfd.readouterr().err
    server.put(at, both.replace(HEX["sha256"], "1" * 64).replace(HEX["sha512"], "1" * 128).encode())
    with pytest.raises(Failure, match="has the wrong sha"):
        get(replace(settings, cache_dir=f"{settings.cache_dir}2"))


def test_of_other_images(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that is about another one may hold a digest alone."""
    settings = publish(server, "a.qcow2", tmp_path)
    for name in ("a.qcow2.xz", "a", "b.qcow2"):
        server.put(f"/images/{name}", b"x")
        server.put(f"/images/{name}.SHA256SUM", b"1" * 64)
    show_index(server)
    get(settings)
    assert "no checksum beside it" in capfd.readouterr().err
    assert not [request.path for request in server.requests if request.path.endswith(".SHA256SUM")]


@pytest.mark.parametrize(
    "how", [{"status": 503}, {"status": 401}, {"stalls_at": 0}, {"announced": 1 << 40}, {"cuts": [1]}]
)
def test_index_that_does_not_work(
    how: dict[str, object], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs it."""
    monkeypatch.setattr(web, "INDEX_TIME", 1)
    settings = publish(server, "a.qcow2", tmp_path)
    server.put("/images/", b"<a href=a.qcow2>" * 100_000, **how)
    get(settings)


def test_without_a_checksum_not_everything_is_asked_again(server: Server, tmp_path: Path) -> None:
    settings = publish(server, "a.qcow2", tmp_path)
    get(settings)
    server.requests.clear()
    get(settings)
    assert len(server.requests) == 1 + len(urls.CHECKSUMS)


def test_packed_checksum_file(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Some servers choose a Content-Encoding although nobody has asked for one."""
    settings = publish(server, "a.qcow2", tmp_path)
    text = "".join(f"{number:064x}  {number}.qcow2\n" for number in range(1000)) + f"{HEX['sha256']}  a.qcow2\n"
    server.put("/images/SHA256SUMS", gzip.compress(text.encode()), encoding="gzip")
    get(settings)
    assert f"verified: sha256 of {server.url}/images/SHA256SUMS" in capfd.readouterr().err
    server.put("/images/SHA256SUMS", gzip.compress(bytes(web.SMALL + 1)), encoding="gzip")
    with pytest.raises(Failure, match="SHA256SUMS is larger than 1 MiB"):
        get(settings)


@pytest.mark.parametrize(
    "href, names",
    [
        ("a.qcow2", ["a.qcow2"]),
        ("./a%20b", ["a b"]),
        ("/images/a&amp;b", ["a&b"]),
        ("http://h/images/a", ["a"]),
        ("//other/images/a", ["a"]),  # only its name counts: it is asked for at our server
        ("../a", []),
        ("sub/a", []),
        ("/images/", []),
        ("?C=N;O=D", []),
        ("http://[", []),
    ],
)
def test_links(href: str, names: list[str]) -> None:
    assert urls.linked(f"<A HREF='{href}'>", "http://h/images/x.qcow2?token") == names


def test_most_of_an_index() -> None:
    listed = ["a", *(f"{number}-CHECKSUM" for number in range(100)), "a.SHA256SUM"]
    found = checksums.checksum_files(listed, "a") or []
    assert found[0] == "a.SHA256SUM" and len(found) == checksums.MOST_FURTHER
