"""A copy in CACHE_DIR is for those alone whose questions it answers, whoever else has downloaded it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from threading import Thread

import pytest
from downloads import Gpg, get, gone
from http_server import Server, serving
from support import wait_until

from imageos.errors import Failure
from imageos.images import cache, curl, fetch
from imageos.settings import Settings

CONTENT = bytes(range(256)) * 256
OTHER = CONTENT[::-1]
SHA256, SHA512 = (hashlib.new(name, CONTENT).hexdigest() for name in ("sha256", "sha512"))


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """One image, at /a.tar; nothing else is there."""
    return Settings(image_url=server.put("/a.tar", CONTENT), image_type="tarball", cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def keyrings(gpg: Gpg, tmp_path: Path) -> dict[str, str]:
    for name in ("alice", "mallory"):
        (tmp_path / f"{name}.gpg").write_bytes(gpg(name))
    return {name: str(tmp_path / f"{name}.gpg") for name in ("alice", "mallory")}


def outcome(settings: Settings, **others: object) -> bytes | str:
    """Return the content, or why there is none."""
    try:
        return get(settings, **others)
    except curl.Unreachable:
        return "unreachable"
    except Failure:
        return "refused"


def downloads(server: Server) -> int:
    return sum(1 for one in server.requests if (one.method, one.path, one.status) == ("GET", "/a.tar", 200))


def copy_of(settings: Settings) -> Path:
    return Path(settings.cache_dir) / fetch.cache_name(settings.image_url)


# --- the table --------------------------------------------------------------------------------------------

POLICIES: dict[str, dict[str, object]] = {
    "off": {"image_verify": False},
    "no": {"image_checksum": "no"},
    "sha256": {"image_checksum": f"sha256:{SHA256}"},
    "sha512": {"image_checksum": f"sha512:{SHA512}"},
    "beside": {},
    "named": {"image_checksum": "SHA256SUMS"},
    "alice": {"image_keyring": "alice"},
    "alice and sha256": {"image_keyring": "alice", "image_checksum": f"sha256:{SHA256}"},
    "alice and named": {"image_keyring": "alice", "image_checksum": "SHA256SUMS"},
    "mallory": {"image_keyring": "mallory"},
}
# Policy of the first user -> policies for which its copy suffices while the server is down. ANYWAY needs no server:
# nothing is verified, or a pin is compared with the copy.
ANYWAY = {"off", "no", "sha256", "sha512"}
ANSWERED = {
    "beside": {"beside"},
    "named": {"named"},
    "alice and named": {"named", "alice and named"},
    "alice": {"beside", "alice", "alice and sha256"},  # who wanted a signature wanted more
    "alice and sha256": {"beside", "alice", "alice and sha256"},
    "mallory": {"beside", "mallory"},
}
BESIDE = ("nothing", "checksum", "signed", "signed by both", "wrong")


def put_beside(server: Server, what: str, gpg: Gpg, content: bytes = CONTENT) -> None:
    for path in ("/SHA256SUMS", "/SHA256SUMS.gpg"):
        server.files.pop(path, None)
    digest = hashlib.sha256(b"" if what == "wrong" else content).hexdigest()
    sums = f"{digest}  a.tar\n".encode()
    if what != "nothing":
        server.put("/SHA256SUMS", sums)
    if what.startswith("signed"):
        signers = ("alice", "mallory") if "both" in what else ("alice",)
        server.put("/SHA256SUMS.gpg", b"".join(gpg(name, sums, "--detach-sign") for name in signers))


def policies(keyrings: dict[str, str]) -> dict[str, dict[str, object]]:
    def completed(policy: dict[str, object]) -> dict[str, object]:
        return {name: keyrings.get(str(value), value) for name, value in policy.items()}

    return {name: completed(policy) for name, policy in POLICIES.items()}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("first", POLICIES)
def test_every_policy_after_every_other(
    first: str, beside: str, server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg, tmp_path: Path
) -> None:
    """With the server up it is as if the other had never been; with the server down what was asked for counts."""
    put_beside(server, beside, gpg)
    known_policies = policies(keyrings)
    for number, (second, policy) in enumerate(known_policies.items()):
        here = settings._replace(cache_dir=str(tmp_path / f"cache{number}"))
        alone = outcome(here._replace(cache_dir=str(tmp_path / f"alone{number}")), **policy)
        has_copy = outcome(here, **known_policies[first]) == CONTENT
        with gone(server):
            found = outcome(here, **policy)
        assert found in (CONTENT, "unreachable")
        answered = ANYWAY | ANSWERED.get(first, set()) if has_copy else set()
        assert (found == CONTENT) == (second in answered), f"{second} after {first}, the server is down"
        before = downloads(server)
        assert outcome(here, **policy) == alone, f"{second} after {first}"
        if alone == CONTENT and has_copy:
            assert downloads(server) == before, "what is here can be verified here"


@pytest.mark.parametrize("first", POLICIES)
def test_every_policy_after_the_server_has_changed(
    first: str, server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg, tmp_path: Path
) -> None:
    known_policies = policies(keyrings)
    for number, (second, policy) in enumerate(known_policies.items()):
        server.put("/a.tar", CONTENT)
        put_beside(server, "signed by both", gpg)
        here = settings._replace(cache_dir=str(tmp_path / f"cache{number}"))
        assert get(here, **known_policies[first]) == CONTENT
        server.put("/a.tar", OTHER)
        put_beside(server, "signed by both", gpg, OTHER)
        # who has pinned what is here has no question to the server
        expected = CONTENT if second in ("sha256", "sha512") else "refused" if "sha256" in second else OTHER
        assert outcome(here, **policy) == expected, f"{second} after {first}"


@pytest.mark.parametrize("beside", ["nothing", "checksum", "wrong"])
def test_at_the_same_time(beside: str, server: Server, settings: Settings, gpg: Gpg) -> None:
    """One downloads it unverified, others wait for that: it is downloaded once, and each looks for itself."""
    put_beside(server, beside, gpg)
    server.put("/a.tar", CONTENT, rate=20_000)
    names = ["no", "beside", "sha256", "no", "beside", "sha512", "off"]
    found: dict[int, bytes | str] = {}

    def start(number: int) -> Thread:
        thread = Thread(target=lambda: found.update({number: outcome(settings, **POLICIES[names[number]])}))
        thread.start()
        return thread

    part = Path(f"{copy_of(settings)}.part")
    threads = [start(0)]
    wait_until(lambda: part.exists() and part.stat().st_size > 0, "the first one downloads it")
    assert part.stat().st_mode & 0o777 == 0o600
    threads += [start(number) for number in range(1, len(names))]
    server.files["/a.tar"].rate = 0
    for thread in threads:
        thread.join()
    wrong = beside == "wrong"
    assert [found[number] for number in range(len(names))] == [
        "refused" if wrong and name == "beside" else CONTENT for name in names
    ]
    # whom the copy does not satisfy looks whether the server has another one
    assert downloads(server) == (3 if wrong else 1)
    assert server.count("/SHA256SUMS") == (2 if wrong else 1), "asked once for all who ask the same"


def test_unverified_copy_is_named(server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    get(settings, image_checksum="no")
    server.sums("/SHA256SUMS", "a.tar")
    with (
        gone(server),
        pytest.raises(curl.Unreachable, match="nobody has checked the copy in CACHE_DIR against a checksum"),
    ):
        get(settings)
    assert get(settings) == CONTENT
    assert f"verified: sha256 of {server.url}/SHA256SUMS" in capfd.readouterr().err
    assert downloads(server) == 1
    with gone(server):
        assert get(settings) == CONTENT


def test_one_cannot_keep_a_copy_new_for_others(server: Server, settings: Settings) -> None:
    """A copy that matches a pin is not what the server has, as far as others are concerned."""
    get(settings)
    before = cache.load(str(copy_of(settings)), settings.image_url)
    server.put("/a.tar", OTHER)
    server.put("/SHA256SUMS", f"{SHA256}  a.tar\n".encode())
    get(settings)
    get(settings, image_checksum=f"sha512:{SHA512}")
    after = cache.load(str(copy_of(settings)), settings.image_url)
    assert before and after and before.checked == after.checked
    assert get(settings, image_checksum="no") == OTHER


def test_clock_that_was_wrong(server: Server, settings: Settings) -> None:
    """A copy that was made in the future is not new for ever."""
    get(settings)
    record = Path(f"{copy_of(settings)}.json")
    notes = json.loads(record.read_text())
    notes["checked"] = notes["verdicts"]["beside"]["checked"] = 1e11
    record.write_text(json.dumps(notes))
    server.put("/a.tar", OTHER)
    assert get(settings, image_checksum="no") == OTHER


# --- a checksum file of one's own -------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["{hex}  {name}\n", "{hex} *{name}\n", "SHA256 ({name}) = {hex}\n", "{hex}\n"])
def test_named_file(line: str, server: Server, settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """Beside the image, or elsewhere; only there."""
    server.put("/SHA256SUMS", f"{'0' * 64}  a.tar\n".encode())
    server.sums("/a sum?#%.txt", "a.tar", line=line)
    server.files["/a%20sum%3F%23%25.txt"] = server.files["/a sum?#%.txt"]
    assert get(settings, image_checksum="a sum?#%.txt", image_cleanup=True) == CONTENT
    with serving() as other:
        url = other.put("/x/sums?token=t0ken", server.files["/a sum?#%.txt"].content)
        url = url.replace("http://", "http://user:s3cret@")
        assert get(settings, image_checksum=url) == CONTENT
    log = capfd.readouterr().err
    assert f"verified: sha256 of {server.url}/a%20sum%3F%23%25.txt" in log
    assert f"verified: sha256 of {other.url}/x/sums?..." in log
    assert "t0ken" not in log and "s3cret" not in log
    record = Path(f"{copy_of(settings)}.json").read_text()
    assert "t0ken" not in record and "s3cret" not in record
    assert get(settings, image_checksum=url) == CONTENT, "nobody answers there, but it has been asked"
    with pytest.raises(curl.Unreachable, match="against http://127.0.0.1:9/sums, so it is not used"):
        get(settings, image_checksum="http://127.0.0.1:9/sums")
    assert server.count("/SHA256SUMS") == 0


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "/sums is not there"),
        (b"", "has no SHA-256 or SHA-512 of a.tar"),
        (b"<html>", "is a web page, and no checksum file"),
        (f"{SHA256}  b.tar\n{SHA256}  c.tar\n".encode(), "has no SHA-256 or SHA-512 of a.tar"),
        (f"{hashlib.sha1(CONTENT).hexdigest()}  a.tar\n".encode(), "has no SHA-256 or SHA-512 of a.tar"),
        (f"{'0' * 64}  a.tar\n".encode(), "wrong sha256"),
        (f"{'0' * 64}\n".encode(), "wrong sha256"),
    ],
)
def test_named_file_that_does_not_do(content: bytes | None, words: str, server: Server, settings: Settings) -> None:
    """Whatever else there is."""
    server.sums("/SHA256SUMS", "a.tar")
    get(settings)
    if content is not None:
        server.put("/sums", content)
    for checksum in ("sums", f"{server.url}/sums"):
        with pytest.raises(Failure) as raised:
            get(settings, image_checksum=checksum)
        assert words in str(raised.value) and f"{server.url}/sums" in str(raised.value)
        assert ("IMAGE_CHECKSUM=no skips" in str(raised.value.hint)) == ("wrong" not in words)


def test_named_file_is_signed_where_it_is(
    server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg
) -> None:
    put_signed(server, "/SHA256SUMS", f"{SHA256}  a.tar\n", gpg)
    with serving() as other:
        for path in ("/sums", "/sums?token=x"):
            url = other.put(path, f"{SHA256}  a.tar\n".encode())
            signature = path.replace("sums", "sums.gpg")
            signed = {"image_checksum": url, "image_keyring": keyrings["alice"], "image_cleanup": True}
            with pytest.raises(Failure, match="/sums.* is not signed") as raised:
                get(settings, **signed)
            assert raised.value.hint and "signed by a key of" in raised.value.hint, "no does not skip that"
            for content, text in ((CONTENT, "{}  a.tar\n"), (None, "{}  b.tar\n"), (None, "{}\n")):
                put_signed(other, path, text.format(SHA256), gpg)
                other.files[signature] = other.files[f"{path}.gpg"]
                assert outcome(settings, **signed) == (content or "refused")
            other.put(signature, gpg("mallory", other.files[path].content, "--detach-sign"))
            assert outcome(settings, **signed) == "refused"


def test_named_file_of_a_dump(server: Server, settings: Settings) -> None:
    settings = settings._replace(image_type="dump", image_url=server.url, image_checksum="sums")
    for name, content in (("x-root.dump", CONTENT), ("x-boot.dump", OTHER)):
        server.put(f"/{name}", content)
    server.sums("/sums", "x-root.dump", "x-boot.dump")
    for name, content in (("x-root.dump", CONTENT), ("x-boot.dump", OTHER)):
        with open(fetch.fetched(settings, [f"{server.url}/{name}"])[1], "rb") as file:
            assert file.read() == content


# --- records of 1.0 ---------------------------------------------------------------------------------------


def record_of_1_0(settings: Settings, server: Server, verified_by: str, keyring: str = "", suffix: str = "") -> None:
    """A copy as imageos 1.0 has left it."""
    path = Path(f"{copy_of(settings)}{suffix}")
    path.parent.mkdir(exist_ok=True)
    path.touch(0o600)
    path.write_bytes(CONTENT[:1000] if suffix else CONTENT)
    status = path.stat()
    record = Path(f"{path}.json")
    record.touch(0o600)
    record.write_text(
        json.dumps(
            {
                "url": settings.image_url,
                "etag": server.files["/a.tar"].tag,
                "last_modified": "",
                "size": len(CONTENT),
                "identity": [] if suffix else [status.st_ino, status.st_size, status.st_mtime_ns],
                "digests": {} if suffix else {"sha256": SHA256},
                "verified_by": verified_by,
                "keyring": keyring,
                "checked": status.st_mtime,
            }
        )
    )


@pytest.mark.parametrize("verified_by", ["", "nothing: no checksum was found", "IMAGE_CHECKSUM", "http://h/SHA256SUMS"])
def test_copy_of_1_0(verified_by: str, server: Server, settings: Settings, keyrings: dict[str, str]) -> None:
    """Whatever it claims: its content is settings, and nothing about checksums."""
    keyring = hashlib.sha256(Path(keyrings["alice"]).read_bytes()).hexdigest()
    record_of_1_0(settings, server, verified_by, keyring)
    with gone(server):
        for name, policy in policies(keyrings).items():
            assert outcome(settings, **policy) == (CONTENT if name in ANYWAY else "unreachable"), name
    server.put("/SHA256SUMS", f"{'0' * 64}  a.tar\n".encode())
    assert outcome(settings) == "refused"
    server.sums("/SHA256SUMS", "a.tar")
    before = downloads(server)
    assert get(settings) == CONTENT
    assert downloads(server) == before
    with gone(server):
        assert get(settings) == CONTENT


def test_unfinished_download_of_1_0(server: Server, settings: Settings) -> None:
    record_of_1_0(settings, server, "", suffix=".part")
    assert get(settings) == CONTENT
    asked = [one.headers.get("Range") for one in server.requests if (one.method, one.path) == ("GET", "/a.tar")]
    assert asked == ["bytes=1000-"]


# --- whose files they are ---------------------------------------------------------------------------------


def test_modes(server: Server, settings: Settings) -> None:
    os.umask(0o022)
    get(settings)
    directory = Path(settings.cache_dir)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


@pytest.mark.parametrize("suffix", ["", ".json"])
@pytest.mark.parametrize("how", [0o604, 0o640, 0o620, 0o602, 0o666, "owner", "link", "fifo"], ids=str)
def test_what_others_may_have_written(
    how: object, suffix: str, server: Server, settings: Settings, tmp_path: Path
) -> None:
    """It is downloaded anew, into files of our own."""
    get(settings)
    path = Path(f"{copy_of(settings)}{suffix}")
    spoil(path, how, tmp_path)
    with gone(server):
        assert outcome(settings, image_checksum="no") == "unreachable"
    assert get(settings) == CONTENT
    assert downloads(server) == 2
    for one in Path(settings.cache_dir).iterdir():
        status = one.lstat()
        assert (status.st_uid, stat.filemode(status.st_mode)) == (0, "-rw-------")


@pytest.mark.parametrize("suffix", [".part", ".part.json"])
@pytest.mark.parametrize("how", [0o666, "owner", "link", "fifo"], ids=str)
def test_unfinished_download_of_others(
    how: object, suffix: str, server: Server, settings: Settings, tmp_path: Path
) -> None:
    """It is not gone on with."""
    server.put("/a.tar", CONTENT, cuts=[2000, 0, 0, 0])
    assert outcome(settings) == "unreachable"
    path = Path(f"{copy_of(settings)}{suffix}")
    spoil(path, how, tmp_path)
    assert get(settings) == CONTENT
    assert "Range" not in server.requests[-1].headers
    assert all(stat.filemode(one.lstat().st_mode) == "-rw-------" for one in Path(settings.cache_dir).iterdir())


@pytest.mark.parametrize("how", [0o666, "owner", "link", "fifo"], ids=str)
def test_lock_of_others(how: object, server: Server, settings: Settings, tmp_path: Path) -> None:
    """They could hold it for ever."""
    Path(settings.cache_dir).mkdir()
    path = Path(f"{copy_of(settings)}.lock")
    path.touch(0o600)
    spoil(path, how, tmp_path)
    assert get(settings) == CONTENT
    assert not path.exists()


def spoil(path: Path, how: object, tmp_path: Path) -> None:
    if isinstance(how, int):
        path.chmod(how)
    elif how == "owner":
        os.chown(path, 65534, 65534)
    else:
        moved = path.rename(tmp_path / f"moved-{path.name}")
        if how == "link":
            path.symlink_to(moved)
        else:
            os.mkfifo(path, 0o600)


def test_exchanged_after_it_was_verified(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By who may write to the directory: what was verified is what is read."""
    server.sums("/SHA256SUMS", "a.tar")
    get(settings)
    path = copy_of(settings)
    real = fetch._updated

    def exchanged(*arguments: object) -> object:
        copy = real(*arguments)  # type: ignore[arg-type]
        new = path.with_name("new")
        new.touch(0o600)
        new.write_bytes(OTHER)
        new.rename(path)
        return copy

    monkeypatch.setattr(fetch, "_updated", exchanged)
    with pytest.raises(Failure, match="changed by somebody else"):
        get(settings)


def test_names_that_collide(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name holds half of a hash: who finds another URL with the same one gets that one's image, not ours."""
    monkeypatch.setattr(fetch, "cache_name", lambda _: "same-name")
    other = server.put("/b/a.tar", OTHER, etag=server.files["/a.tar"].tag)
    for _ in range(2):
        assert get(settings, image_checksum="no") == CONTENT
        assert get(settings, image_url=other, image_checksum="no") == OTHER
    with gone(server):
        assert outcome(settings, image_checksum="no") == "unreachable"
    get(settings, image_url=other, image_cleanup=True)
    server.files["/b/a.tar"].cuts = [1000, 0, 0, 0]
    assert outcome(settings, image_url=other) == "unreachable"
    assert get(settings) == CONTENT, "nor is its download gone on with"


# --- what is signed ---------------------------------------------------------------------------------------


def put_signed(server: Server, path: str, text: str, gpg: Gpg, is_inline: bool = False) -> None:
    if is_inline:
        server.put(path, gpg("alice", text.encode(), "--clearsign"))
    else:
        server.put(path, text.encode())
        server.put(f"{path}.gpg", gpg("alice", text.encode(), "--detach-sign"))


NAMED = [
    *("{}  a.tar", "{} *a.tar", "{}  ./a.tar", "{} *./a.tar", "SHA256 (a.tar) = {}", "SHA256 (./a.tar) = {}"),
    "{}  b.tar\n{}  a.tar",
]
NOT_NAMED = [
    *("{}", "{}  ", "{}  old.tar", "{} *old.tar", "SHA256 (old.tar) = {}", "SHA256 () = {}", "{}  old/a.tar"),
    *("{}  a.tar.old", "{}  A.TAR", "{}  a.tar/", "{}  old.tar  a.tar", "SHA256 (old.tar) = {} (a.tar)"),
    "\\{}  a.tar",
]


@pytest.mark.parametrize("is_inline", [False, True], ids=["detached", "inline"])
@pytest.mark.parametrize("file", ["a.tar.sha256", "SHA256SUMS"])
def test_signed_with_its_name(
    file: str, is_inline: bool, server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg
) -> None:
    for line in NAMED:
        put_signed(server, f"/{file}", line.replace("{}", SHA256) + "\n", gpg, is_inline)
        assert get(settings, image_keyring=keyrings["alice"], image_cleanup=True) == CONTENT, line


@pytest.mark.parametrize("is_inline", [False, True], ids=["detached", "inline"])
@pytest.mark.parametrize("file", ["a.tar.sha256", "a.tar.sha512", "SHA256SUMS"])
def test_signed_without_its_name(
    file: str, is_inline: bool, server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg
) -> None:
    """A mirror gives an old image the name of a new one, and that the publisher's word on the old one."""
    for line in NOT_NAMED:
        put_signed(server, f"/{file}", line.replace("{}", SHA256) + "\n", gpg, is_inline)
        with pytest.raises(Failure) as raised:
            get(settings, image_keyring=keyrings["alice"])
        assert "a.tar: " in str(raised.value) and "IMAGE_KEYRING is set" in str(raised.value), line
        assert raised.value.hint and "sha256sum a.tar" in raised.value.hint
        assert downloads(server) == 0, line
    put_signed(server, "/a.tar.sha256", f"{SHA256}  old.tar\n", gpg)
    with pytest.raises(Failure, match=f"{server.url}/a.tar.sha256 does not name a.tar"):
        get(settings, image_keyring=keyrings["alice"])
    server.files.pop(f"/{file}", None)
    server.put("/a.tar.sha256", f"{SHA256}  old.tar\n".encode())
    assert get(settings) == CONTENT, "without a keyring the file's name says what it is of"


def test_signed_name_is_that_of_the_url(server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg) -> None:
    """Not that of what it leads to."""
    settings = settings._replace(image_keyring=keyrings["alice"])
    server.put("/old/b.tar", CONTENT)
    server.put("/a.tar", b"", status=302, location="/old/b.tar")
    put_signed(server, "/SHA256SUMS", f"{SHA256}  b.tar\n", gpg)
    put_signed(server, "/old/SHA256SUMS", f"{SHA256}  b.tar\n", gpg)
    assert outcome(settings) == "refused"
    assert get(settings, image_url=f"{server.url}/old/b.tar") == CONTENT
    put_signed(server, "/SHA256SUMS", f"{SHA256}  a.tar\n", gpg)
    assert get(settings) == CONTENT
    put_signed(server, "/SHA256SUMS", f"{SHA256}  \xe4 b.tar\n", gpg)
    server.put("/%C3%A4%20b.tar", CONTENT)
    assert get(settings, image_url=f"{server.url}/%C3%A4%20b.tar") == CONTENT


def test_signed_dump_of_boot(server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg) -> None:
    """A signature for the root's dump does not cover that of /boot."""
    settings = settings._replace(image_type="dump", image_keyring=keyrings["alice"], image_url=server.url)
    for name in ("x-root.dump", "x-boot.dump"):
        server.put(f"/{name}", CONTENT)
        put_signed(server, f"/{name}.sha256", f"{SHA256}  x-root.dump\n", gpg)
    fetch.fetched(settings, [f"{server.url}/x-root.dump"])
    with pytest.raises(Failure, match="x-boot.dump.sha256 does not name x-boot.dump"):
        fetch.fetched(settings, [f"{server.url}/x-boot.dump"])


def test_second_signed_file_names_it(server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg) -> None:
    put_signed(server, "/a.tar.sha256", f"{SHA256}\n", gpg)
    put_signed(server, "/a.tar.sha512", f"{SHA512}  a.tar\n", gpg)
    assert get(settings, image_keyring=keyrings["alice"]) == CONTENT


@pytest.mark.parametrize("order", [("alice", "mallory"), ("mallory", "alice")], ids=str)
def test_two_signed_texts(
    order: tuple[str, str], server: Server, settings: Settings, keyrings: dict[str, str], gpg: Gpg
) -> None:
    """A good signature is of one of them only."""
    server.put("/a.tar", OTHER)
    wrong = hashlib.sha256(OTHER).hexdigest()
    texts = {"alice": f"{SHA256}  b.tar\n", "mallory": f"{wrong}  a.tar\n"}
    server.put("/SHA256SUMS", b"\n".join(gpg(name, texts[name].encode(), "--clearsign") for name in order))
    assert outcome(settings, image_keyring=keyrings["alice"]) == "refused"
