"""Checksums are found where publishers have them, by the names of their files and in their formats."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from http_server import Server
from support import run

from imageos.errors import Failure
from imageos.images import checksums, diskimage, fetch, imagetypes, urls, web
from imageos.images.imagefile import open_image
from imageos.settings import PARAMETERS, Settings, parse_setting

Gpg = Callable[..., bytes]

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
        get(settings._replace(cache_dir=f"{settings.cache_dir}2"))


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


LIKE = ["SHASUMS256.txt", "SHA2-256SUMS", "a.qcow2.sha2", "shasums", "hashes.txt", "SUMS", "a.qcow2.sum", "a-CHECKSUM"]


@pytest.mark.parametrize("name", LIKE)
def test_name_like_that_of_checksums(name: str) -> None:
    assert checksums.checksum_files(["a.qcow2", "summary.html", "rehashed.img", name], "a.qcow2") == [name]


def test_image_that_is_called_like_checksums(server: Server, tmp_path: Path) -> None:
    """Too large a file for checksums is none, and no reason to fail."""
    settings = publish(server, "sha256-tools.qcow2", tmp_path)
    server.put("/images/all-hashes.iso", bytes(web.SMALL + 1))
    show_index(server)
    get(settings)
    assert server.count("/images/all-hashes.iso") == server.count("/images/sha256-tools.qcow2") == 1


def test_most_of_an_index() -> None:
    listed = ["a", *(f"{number}-CHECKSUM" for number in range(100)), "a.SHA256SUM"]
    found = checksums.checksum_files(listed, "a") or []
    assert found[0] == "a.SHA256SUM" and len(found) == checksums.MOST_FURTHER


# --- signed -----------------------------------------------------------------------------------------------


@pytest.fixture
def signed(server: Server, gpg: Gpg, tmp_path: Path) -> Settings:
    """An image whose publisher is alice."""
    (tmp_path / "alice.gpg").write_bytes(gpg("alice"))
    return publish(server, "a-latest.qcow2", tmp_path)._replace(image_keyring=str(tmp_path / "alice.gpg"))


def sign(server: Server, gpg: Gpg, path: str, suffix: str, *how: str, by: str = "alice") -> None:
    server.put(path + suffix, gpg(by, server.files[path].content, *(how or ("--detach-sign",))))


IMAGE = "/images/a-latest.qcow2"


@pytest.mark.parametrize(("suffix", "how"), [(".sig", []), (".asc", ["--detach-sign", "--armor"])])
def test_signature_of_the_image(
    suffix: str, how: list[str], server: Server, signed: Settings, gpg: Gpg, capfd: pytest.CaptureFixture[str]
) -> None:
    """As Arch, Alpine and Gentoo have it; the checksum beside it, which is not signed, counts for nothing."""
    server.put(f"{IMAGE}.SHA256", PLAIN.format(name="a-latest.qcow2", **HEX).encode())
    sign(server, gpg, IMAGE, suffix, *how)
    get(signed)
    assert (
        f"verified: by {server.url}{IMAGE}{suffix}, signed by a key of {signed.image_keyring}" in capfd.readouterr().err
    )
    calls = server.count(IMAGE)
    get(signed)
    assert server.count(IMAGE) == calls == 1


@pytest.mark.parametrize("case", ["other key", "other content", "garbage", "a web page", "none", "a checksum"])
def test_image_that_is_not_signed(case: str, server: Server, signed: Settings, gpg: Gpg) -> None:
    if case == "other key":
        sign(server, gpg, IMAGE, ".sig", by="mallory")
    contents = {
        "other content": lambda: gpg("alice", b"other", "--detach-sign"),
        "garbage": lambda: b"\x88" + bytes(99),
        "a web page": lambda: b"<html>no such file</html>",
        "a checksum": lambda: HEX["sha1"].encode(),
    }
    if case in contents:
        server.put(f"{IMAGE}.sig", contents[case]())
    with pytest.raises(Failure, match="KEYRING"):
        get(signed)
    assert not list(Path(signed.cache_dir).glob("*.qcow2"))


def test_signature_of_an_image_that_has_changed(server: Server, signed: Settings, gpg: Gpg) -> None:
    """A signature tells better than the server's word, as a checksum does: the copy that it is of stays."""
    sign(server, gpg, IMAGE, ".sig")
    get(signed)
    server.put(IMAGE, CONTENT[::-1])
    get(signed)
    assert server.count(IMAGE) == 1
    with pytest.raises(Failure, match="is no good signature of it"):
        get(signed._replace(cache_dir=f"{signed.cache_dir}2"))
    sign(server, gpg, IMAGE, ".sig")
    get(signed)
    assert server.count(IMAGE) == 3
    server.put(f"{IMAGE}.sig", gpg("mallory", CONTENT[::-1], "--detach-sign"))
    with pytest.raises(Failure, match="is no good signature of it"):
        get(signed)


def test_signature_beside_an_image_of_the_node(gpg: Gpg, tmp_path: Path) -> None:
    """Root need not have put one there; but what is there counts."""
    (tmp_path / "alice.gpg").write_bytes(gpg("alice"))
    image = tmp_path / "a-x86_64.qcow2"
    image.write_bytes(CONTENT)
    settings = Settings(
        image_name="a",
        arch="x86_64",
        image_type="qcow2",
        image_dir=str(tmp_path),
        image_keyring=str(tmp_path / "alice.gpg"),
    )
    imagetypes.verify(settings, imagetypes.find(settings))
    (tmp_path / f"{image.name}.asc").write_bytes(gpg("alice", CONTENT, "--detach-sign", "--armor"))
    imagetypes.verify(settings, imagetypes.find(settings))
    image.write_bytes(CONTENT[::-1])
    with pytest.raises(Failure, match="is no good signature of it"):
        imagetypes.verify(settings, imagetypes.find(settings))


def fingerprint(gpg: Gpg, name: str) -> str:
    listed = gpg(name, b"", "--with-colons", "--list-keys", name).decode()
    return next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))


@pytest.mark.parametrize("what", ["image", "checksums", "text"])
def test_key_that_must_have_signed(what: str, server: Server, signed: Settings, gpg: Gpg) -> None:
    """A keyring of a distribution has many keys."""
    Path(signed.image_keyring).write_bytes(gpg("alice") + gpg("mallory"))
    server.put("/images/SHA256SUMS", PLAIN.format(name="a-latest.qcow2", **HEX).encode())
    if what == "text":
        server.put("/images/SHA256SUMS", gpg("alice", server.files["/images/SHA256SUMS"].content, "--clearsign"))
    else:
        sign(server, gpg, *(("/images/SHA256SUMS", ".gpg") if what == "checksums" else (IMAGE, ".sig")))
    get(signed._replace(image_signer=fingerprint(gpg, "alice")))
    get(signed._replace(image_signer=f"{'0' * 40} {fingerprint(gpg, 'alice')}"))
    with pytest.raises(Failure, match="it is by the key .*, not by IMAGE_SIGNER"):
        get(signed._replace(image_signer=fingerprint(gpg, "mallory")))


@pytest.fixture(scope="module")
def revoked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bytes, str, bytes]]:
    """A keyring of a key that was revoked, its fingerprint, and its signature of the checksums."""
    home = tmp_path_factory.mktemp("revoked")
    home.chmod(0o700)
    command = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]

    def call(*arguments: str, input: bytes = b"") -> bytes:
        return subprocess.run([*command, *arguments], input=input, check=True, capture_output=True).stdout

    call("--quick-gen-key", "carol <carol@example.org>", "ed25519", "sign", "never")
    (certificate,) = (home / "openpgp-revocs.d").glob("*.rev")
    signed = call("--detach-sign", "--output", "-", input=PLAIN.format(name="a-latest.qcow2", **HEX).encode())
    call("--import", input=certificate.read_bytes().replace(b":-----BEGIN", b"-----BEGIN"))
    yield call("--export"), certificate.stem, signed
    run("gpgconf", "--homedir", home, "--kill", "all")


def test_revoked_key(server: Server, signed: Settings, gpg: Gpg, revoked: tuple[bytes, str, bytes]) -> None:
    """Nor does a good signature by another key of the keyring make it the one that must have signed."""
    keyring, carol, signature = revoked
    Path(signed.image_keyring).write_bytes(gpg("alice") + keyring)
    server.put("/images/SHA256SUMS", PLAIN.format(name="a-latest.qcow2", **HEX).encode())
    server.put("/images/SHA256SUMS.gpg", signature)
    with pytest.raises(Failure, match="its key was revoked"):
        get(signed)
    server.put("/images/SHA256SUMS.gpg", gpg("alice", server.files["/images/SHA256SUMS"].content, "-b") + signature)
    with pytest.raises(Failure, match=f"not by IMAGE_SIGNER {carol}"):
        get(signed._replace(image_signer=carol))
    get(signed._replace(image_signer=fingerprint(gpg, "alice")))


@pytest.mark.parametrize("case", ["page", "other key", "inline", "lines before", "image"])
def test_signature_among_others(case: str, server: Server, signed: Settings, gpg: Gpg) -> None:
    """One that is good is enough, and a web page is none."""
    path, how = "/images/SHA256SUMS", ["--detach-sign", "--armor"]
    server.put(path, PLAIN.format(name="a-latest.qcow2", **HEX).encode())
    sums = server.files[path].content
    if case == "page":
        server.put(f"{path}.gpg", b"\xef\xbb\xbf<html>no such file</html>")
    elif case == "other key":
        server.put(f"{path}.gpg", gpg("mallory", sums, *how))
    elif case == "inline":  # a second copy of the text, as of CentOS 7
        how = ["--clearsign"]
    elif case == "lines before":
        server.put(path, b"\n" + gpg("alice", sums, "--clearsign"))
    elif case == "image":
        path = IMAGE
        server.put(f"{path}.gpg", gpg("mallory", CONTENT, "--detach-sign"))
    if case != "lines before":
        sign(server, gpg, path, ".asc", *how)
    get(signed)


PATTERN = "a.x86_64-*-Build*.qcow2"


@pytest.mark.parametrize(
    ("names", "pattern", "is_right"),
    [
        (["a.x86_64-1.0-Build7.qcow2"], PATTERN, True),  # as openSUSE has it behind a link to the latest
        (["a.x86_64-1.0-Build7.qcow2"], "", False),
        (["b.x86_64-1.0-Build7.qcow2"], PATTERN, False),
        (["a.x86_64-1.0-Build7.qcow2", "b.qcow2"], PATTERN, True),
        (["a.x86_64-1.0-Build7.qcow2", "a.x86_64-1.0-Build8.qcow2"], PATTERN, False),  # which one?
    ],
)
def test_signed_under_another_name(
    names: list[str], pattern: str, is_right: bool, server: Server, signed: Settings, gpg: Gpg
) -> None:
    path = f"{IMAGE}.sha256"
    server.put(path, "".join(PLAIN.format(name=name, **HEX) for name in names).encode())
    sign(server, gpg, path, ".asc", "--detach-sign", "--armor")
    signed = signed._replace(image_signed_name=pattern)
    if is_right:
        get(signed)
        server.put(IMAGE, CONTENT[::-1])
        with pytest.raises(Failure, match="has the wrong sha256"):
            get(signed._replace(cache_dir=f"{signed.cache_dir}2"))
    else:
        with pytest.raises(Failure, match="KEYRING"):
            get(signed)


def test_what_a_user_may_not_say() -> None:
    """Who must have signed, and under which name, is the site's business."""
    assert not {"image_keyring", "image_signer", "image_signed_name"} & set(PARAMETERS)


# --- servers as they are ----------------------------------------------------------------------------------


def test_image_that_is_packed_on_its_way(server: Server, tmp_path: Path) -> None:
    """Although identity was asked for; also when the connection breaks in the middle."""
    settings = publish(server, "a.qcow2", tmp_path)
    server.put("/images/a.qcow2", gzip.compress(CONTENT), encoding="gzip", cuts=[50, 50, 50])
    server.put("/images/SHA256SUMS", PLAIN.format(name="a.qcow2", **HEX).encode())
    path, _ = fetch.fetched(settings, imagetypes.urls(settings))
    assert Path(path).read_bytes() == CONTENT
    get(settings)


def test_packed_image_that_is_announced_as_such(server: Server, tmp_path: Path) -> None:
    """Apache says so of every FILE.gz; it is to be kept as it is."""
    settings = publish(server, "a.raw.gz", tmp_path)._replace(image_type="raw")
    packed = gzip.compress(CONTENT)
    server.put("/images/a.raw.gz", packed, encoding="x-gzip")
    path, _ = fetch.fetched(settings, imagetypes.urls(settings))
    assert Path(path).read_bytes() == packed


@pytest.mark.parametrize("scheme", ["HTTP", "Http"])
def test_url_as_people_write_it(scheme: str, server: Server, tmp_path: Path) -> None:
    publish(server, "my image.qcow2", tmp_path)
    url = f"{scheme}{server.url[4:]}/images/my image.qcow2"
    text = parse_setting("image_url", url, "here")
    get(Settings(image_url=text, image_type="qcow2", cache_dir=str(tmp_path / "cache")))
    with pytest.raises(Failure, match="IMAGE_URL"):
        parse_setting("image_url", url + "\nX", "here")


def test_file_that_is_announced_as_packed(server: Server, signed: Settings, gpg: Gpg, tmp_path: Path) -> None:
    """Apache says so of every FILE.gz.asc, and others what nobody knows."""
    settings = publish(server, "a.raw.gz", tmp_path)._replace(image_type="raw", image_keyring=signed.image_keyring)
    server.put("/images/a.raw.gz.sha256", PLAIN.format(name="a.raw.gz", **HEX).encode(), encoding="utf-8")
    for suffix, how in ((".asc", ["--detach-sign", "--armor"]), (".gpg", ["--detach-sign"])):
        sign(server, gpg, "/images/a.raw.gz.sha256", suffix, *how)
        server.files[f"/images/a.raw.gz.sha256{suffix}"].encoding = "x-gzip"
        get(settings._replace(image_cleanup=True))


def test_checksum_with_a_byte_order_mark(server: Server, tmp_path: Path) -> None:
    """As Windows writes text; only what is seen may differ from what is there."""
    settings = publish(server, "a.qcow2", tmp_path)._replace(image_cleanup=True)
    for encoding in ("utf-8-sig", "utf-16"):
        server.put("/images/SHA256SUMS", f"{'0' * 64}  a.qcow2\r\n".encode(encoding))
        with pytest.raises(Failure, match="has the wrong sha256"):
            get(settings)


def test_checksum_under_the_name_behind_a_link(server: Server, tmp_path: Path) -> None:
    """Where nothing is signed the server may say what the latest one is called."""
    settings = publish(server, "latest.qcow2", tmp_path)
    server.put("/images/latest.qcow2", b"", status=302, location="/2/a-1.2.qcow2")
    server.put("/2/a-1.2.qcow2", CONTENT)
    server.put("/images/SHA256SUMS", f"{'0' * 64}  a-1.2.qcow2\n{HEX['sha256']}  a-1.1.qcow2\n".encode())
    with pytest.raises(Failure, match="has the wrong sha256"):
        get(settings)


@pytest.mark.parametrize("named", [False, True])
def test_web_page_instead_of_a_checksum_file(named: bool, server: Server, signed: Settings) -> None:
    server.put("/images/SHA256SUMS", b"<html>Login</html>")
    with pytest.raises(Failure, match="/images/SHA256SUMS is a web page, and no checksum file"):
        get(signed._replace(image_checksum="SHA256SUMS" if named else ""))


@pytest.mark.parametrize(
    ("image", "content", "words"),
    [
        ("a.raw", b'{"error": "not found"}\n', "is text, which a server sends"),
        ("a.raw.gz", gzip.compress(b"<html>Login</html>"), "is a web page, which a server sends"),
        ("a.raw.gz", gzip.compress(gzip.compress(bytes(9999))), "is compressed twice"),
        ("a.img", b"PK\3\4" + bytes(9999), "is a zip archive"),
        ("a.zip", b"PK\3\4" + bytes(9999), "is a zip archive"),
        ("a.raw.gz", gzip.compress(b"VMA\0\0\0\0\1" + bytes(9999)), "is a VMA archive"),
        ("a.raw", b"LZIP\1" + bytes(9999), "is packed by lzip"),
    ],
    ids=[
        "text",
        "packed-page",
        "packed-twice",
        "zip-named-img",
        "zip",
        "backup of Proxmox",
        "lzip",
    ],  # what is packed holds the time
)
def test_no_image(image: str, content: bytes, words: str, server: Server, tmp_path: Path) -> None:
    """Also when nobody would look into it (NOMOUNT)."""
    settings = publish(server, image, tmp_path)._replace(image_type="qemu", nomount=True, image_checksum="no")
    server.put(f"/images/{image}", content)
    with pytest.raises(Failure, match=words):
        imagetypes.check(imagetypes.IMAGE_TYPES["qemu"], imagetypes.find(settings))


def test_url_that_is_taken_for_a_directory(server: Server, tmp_path: Path) -> None:
    settings = publish(server, "download?a.qcow2", tmp_path)._replace(image_name="")
    with pytest.raises(Failure, match="is taken for a directory of images, and IMAGE_NAME is not set") as raised:
        imagetypes.find(settings)
    assert ".qcow2" in str(raised.value.hint)


def test_copy_that_is_not_whole(server: Server, tmp_path: Path) -> None:
    """The server's word would keep it."""
    settings = publish(server, "a.img", tmp_path)
    server.put("/images/a.img", bytes(9999))
    image = imagetypes.find(settings)
    with pytest.raises(Failure, match="nothing but zeroes") as raised:
        imagetypes.check_found(settings, image)
    assert raised.value.hint == f"rm {image.path}: then it is downloaded again"


def test_disk_in_a_tarball(server: Server, tmp_path: Path) -> None:
    """As Debian has it: no system would be found in it, after the disk was written."""
    (tmp_path / "disk.raw").write_bytes(CONTENT)
    run("tar", "-C", tmp_path, "-cJf", tmp_path / "a.tar.xz", "disk.raw")
    settings = publish(server, "a.tar.xz", tmp_path)._replace(image_type="tarball", image_checksum="no")
    server.put("/images/a.tar.xz", (tmp_path / "a.tar.xz").read_bytes())
    image = imagetypes.find(settings)
    with pytest.raises(Failure, match="is an archive of a disk image") as raised:
        imagetypes.check(imagetypes.IMAGE_TYPES["tarball"], image)
    assert raised.value.hint == "set IMAGE_TYPE=qemu"


@pytest.mark.parametrize("name", ["initrd.img", "swap.img", "disk.raw", "disk.raw.xz"])
def test_system_that_begins_like_a_disk(name: str, tmp_path: Path) -> None:
    """Who packs a system in another order than by name begins with any file: Ubuntu has /swap.img."""
    if name == "initrd.img":
        (tmp_path / name).symlink_to("boot/initrd.img-6.1")
    else:
        (tmp_path / name).write_bytes(b"070701" if name == "disk.raw" else bytes(9999))
    (tmp_path / "etc").mkdir()
    run("tar", "-C", tmp_path, "-cf", tmp_path / "a.tar", name, "etc")
    imagetypes.check(imagetypes.IMAGE_TYPES["tarball"], open_image(str(tmp_path / "a.tar")))


PAGES = [b"<html>", b"\n <!-- a comment -->\n<HTML>", b"<head>", b"<title>Login</title>", b"<script>", b"<?xml ?>"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("form", ["a.raw", "a.qcow2", "a.raw.gz", "a.img"])
def test_web_page_instead_of_an_image(page: bytes, form: str, server: Server, tmp_path: Path) -> None:
    """A login page, or an error with status 200: also when nobody would look into the image (NOMOUNT)."""
    kind = "qcow2" if "qcow2" in form else "raw" if "raw" in form else "qemu"
    settings = publish(server, form, tmp_path)._replace(image_type=kind, nomount=True, image_checksum="no")
    server.put(f"/images/{form}", page.ljust(4096))
    with pytest.raises(Failure, match="is a web page, which a server sends"):
        imagetypes.find(settings)


def test_bytes_behind_a_gzip_are_no_size(server: Server, tmp_path: Path) -> None:
    """OpenWrt appends what its own upgrade reads: as a size it would be huge."""
    settings = publish(server, "a.img.gz", tmp_path)._replace(image_type="qemu", image_checksum="no")
    raw = bytes(1 << 20)
    server.put("/images/a.img.gz", gzip.compress(raw) + (0xFFFFFE00).to_bytes(4, "little"))
    image = imagetypes.find(settings, disk_size=4 << 20)
    diskimage.check_size(image, 4 << 20)
    assert image.unpacked_size == (0, False)
