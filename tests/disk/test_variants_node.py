"""`imageos variants` on a node, as the operator calls it, with a publisher's server."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from http_server import Server, serving
from support import DEFAULTS, HANGS, SITE, Node, Result, make_odd, run, wait_until

MakeDisk = Callable[..., Path]
LISTING = SITE / "variants.list"
WITHOUT_GANETI = "/usr/bin:/bin"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image of a disk of 4 MiB, which nobody mounts."""
    directory = tmp_path_factory.mktemp("image")
    (directory / "raw").write_bytes(os.urandom(1 << 20) + bytes(3 << 20))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", directory / "raw", directory / "qcow2")
    return (directory / "qcow2").read_bytes()


@pytest.fixture
def publisher(certificate: Path, image: bytes) -> Iterator[Server]:
    """It speaks https, and sends on from a link to the latest image, as publishers do."""
    with serving(certificate) as server:
        server.put("/images/1.0/guest.qcow2", image)
        server.put("/images/latest/guest.qcow2", b"", status=302, location="/images/1.0/guest.qcow2")
        server.put("/images/latest/SHA256SUMS", f"{hashlib.sha256(image).hexdigest()} *guest.qcow2\n".encode())
        server.put("/images/broken.qcow2", b"<!DOCTYPE html><title>Please log in</title>" * 99)
        server.put("/images/other.qcow2", image)
        yield server


@pytest.fixture
def site(node: Node, publisher: Server) -> Node:
    """A node whose site has added entries of that publisher to the catalog."""
    entries = {"guest": "latest/guest", "again": "latest/guest", "broken": "broken", "other": "other"}
    text = "".join(
        f"[{name}]\ntitle = {name.title()} of ours\nnomount = yes\n"
        + "".join(f"{arch} = {publisher.url}/images/{path}.qcow2\n" for arch in ("x86_64", "aarch64"))
        for name, path in entries.items()
    )
    node.write(SITE / "catalog.conf", text)
    node.defaults(f"CACHE_DIR={node.work}/cache\n")
    return node


def call(node: Node, *arguments: str) -> Result:
    return node.tool("variants", "--os-dir", str(node.os_dir), *arguments, path=WITHOUT_GANETI)


def rows(node: Node) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [node.os_dir / "imageos", "variants", "--os-dir", node.os_dir, "--json"], check=True, capture_output=True
    )
    return {row["name"]: row for row in json.loads(done.stdout)["enabled"]}


def state() -> dict[str, str]:
    return {path.name: path.read_text() for path in (LISTING, *(SITE / "variants").iterdir())}


def test_the_three_lines(site: Node, publisher: Server, disk: MakeDisk, image: bytes) -> None:
    """From the catalog to a disk, of which create has downloaded nothing."""
    call(site, "enable", "guest").ok()
    log = call(site, "fetch", "guest").ok().log
    assert f"verified: sha256 of {publisher.url}/images/latest/SHA256SUMS" in log
    assert f"variant guest is on this node: {site.work}/cache/" in log
    before = publisher.count("/images/1.0/guest.qcow2")
    target = disk(16)
    result = site.create(target, OS_VARIANT="guest", OSP_IMAGE_NAME=None).ok()
    assert "the copy in CACHE_DIR is current" in result.log
    assert publisher.count("/images/1.0/guest.qcow2") == before == 1
    written = run(
        "qemu-img", "compare", "-f", "qcow2", "-F", "raw", next((site.work / "cache").glob("*.qcow2")), target
    )
    assert "identical" in written
    row = rows(site)["guest"]
    assert (row["image"], row["size"], row["problem"]) == ("cache", len(image), "")
    assert str(row["verified"]).endswith("/images/latest/SHA256SUMS")


def test_enable_and_disable(site: Node) -> None:
    before = state()
    call(site, "enable", "guest", "other").ok()
    enabled = state()
    assert enabled["variants.list"] == before["variants.list"] + "guest\nother\n"
    assert "IMAGE_URL=https://" in enabled["guest.conf"] and "NOMOUNT=yes" in enabled["guest.conf"]
    assert "was enabled already" in call(site, "enable", "guest").ok().log
    assert state() == enabled
    call(site, "disable", "guest", "other").ok()
    assert state() == before
    assert "variant guest is not enabled" in call(site, "disable", "guest").ok().log
    assert state() == before


def test_own_file_of_the_site(site: Node) -> None:
    """It is never touched, whether it was the site's from the beginning or has become so."""
    own = SITE / "variants/guest.conf"
    site.write(own, "IMAGE_NAME=ours\n")
    assert "is the site's own" in call(site, "enable", "guest").ok().log
    assert own.read_text() == "IMAGE_NAME=ours\n" and "guest" in LISTING.read_text().split()
    site.write(SITE / "variants/mine.conf", "IMAGE_NAME=mine\n")
    call(site, "enable", "mine", "other").ok()  # it is in no catalog
    other = SITE / "variants/other.conf"
    other.write_text(other.read_text() + "GROW=no\n")
    changed = other.read_text()
    call(site, "enable", "other").ok()
    log = call(site, "disable", "guest", "mine", "other").ok().log
    assert log.count("is the site's own, and kept") == 3
    assert other.read_text() == changed and own.read_text() == "IMAGE_NAME=ours\n"
    assert LISTING.read_text().split() == ["default"]


def test_catalog_has_changed(site: Node) -> None:
    """What was not changed since is brought up to date."""
    call(site, "enable", "guest").ok()
    path = SITE / "catalog.conf"
    path.write_text(path.read_text().replace("latest/guest", "1.0/guest"))
    call(site, "enable", "guest").ok()
    assert "/1.0/guest.qcow2" in (SITE / "variants/guest.conf").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["enable", "other", "gues"], ["the catalog has no 'gues'", "did you mean guest"]),
        (["enable", "../default"], ["the catalog has no"]),
        (["disable", "default"], ["would leave Ganeti without a variant"]),
        (["fetch", "guest"], ["variant guest: guest is not enabled", "1 of 1 variants could not be fetched"]),
    ],
)
def test_refused(arguments: list[str], words: list[str], site: Node) -> None:
    before = state()
    log = call(site, *arguments).failed().log
    assert all(word in log for word in words), log
    assert state() == before, "all of it, or nothing"


def test_list_that_is_a_link(site: Node) -> None:
    """A site's configuration management may have its files elsewhere; comments and blank lines are its own."""
    elsewhere = SITE / "managed"
    elsewhere.write_text("# ours\n\ndefault\n")
    LISTING.unlink()
    LISTING.symlink_to(elsewhere)
    call(site, "enable", "guest").ok()
    assert LISTING.is_symlink() and elsewhere.read_text() == "# ours\n\ndefault\nguest\n"
    assert elsewhere.stat().st_mode & 0o777 == 0o644


def test_list_of_the_site(site: Node) -> None:
    """What is in it stays as it is, byte by byte; what Ganeti takes for a comment is no variant."""
    for text in (b"# ours\r\ndefault\r\n", b"  # indented\n\ndefault\n\tother \n# f\xfcr uns\x0c\n"):
        LISTING.write_bytes(text)
        LISTING.chmod(0o440)
        call(site, "enable", "guest").ok()
        assert LISTING.read_bytes() == text + b"guest\n"
        assert set(rows(site)) <= {"default", "other", "guest"}
        call(site, "disable", "guest").ok()
        assert LISTING.read_bytes() == text and LISTING.stat().st_mode & 0o777 == 0o440


def test_list_without_a_last_newline(site: Node) -> None:
    LISTING.write_text("default")
    call(site, "enable", "guest", "guest").ok()
    assert LISTING.read_text() == "default\nguest\n"


def test_something_else_in_the_place_of_a_file(site: Node) -> None:
    """It is the site's, and known before the first write."""
    path = SITE / "variants/guest.conf"
    for kind in ("fifo", "dangling link"):
        make_odd(path, kind)
        call(site, "enable", "other", "guest").failed(f"{path} is no file, nor a link to one")
        assert LISTING.read_text() == "default\n" and not (SITE / "variants/other.conf").exists()
        LISTING.write_text("default\nguest\n")
        assert "is the site's own, and kept" in call(site, "disable", "guest").ok().log
        assert LISTING.read_text() == "default\n"
        path.unlink()


def test_link_of_the_site(site: Node) -> None:
    """Its configuration management has the file elsewhere, even if enable has once written what is in it."""
    call(site, "enable", "guest").ok()
    path, elsewhere = SITE / "variants/guest.conf", SITE / "managed.conf"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert "is the site's own, and stays" in call(site, "enable", "guest").ok().log
    assert "is the site's own, and kept" in call(site, "disable", "guest").ok().log
    assert path.is_symlink() and elsewhere.exists()


def test_list_that_cannot_be_written(site: Node) -> None:
    """The files that were written before are as they were: new ones gone, one of an older catalog still of that."""
    call(site, "enable", "other").ok()
    before = state()
    path = SITE / "catalog.conf"
    path.write_text(path.read_text().replace("/other.qcow2", "/newer.qcow2"))
    run("mount", "--bind", LISTING, LISTING)
    try:
        call(site, "enable", "other", "guest").failed(f"cannot write {LISTING}")
    finally:
        run("umount", LISTING)
    assert state() == before and not list(SITE.rglob("*.tmp"))


def test_file_without_a_line(site: Node) -> None:
    """As after an enable or disable that was killed half way."""
    call(site, "enable", "guest").ok()
    LISTING.write_text("default\n")
    assert "variant guest is disabled" in call(site, "disable", "guest").ok().log
    assert not (SITE / "variants/guest.conf").exists()


def test_names_that_are_like_others(site: Node) -> None:
    call(site, "enable", "guest").ok()
    assert "variant gest is not enabled (did you mean guest?)" in call(site, "disable", "gest").ok().log
    assert "or did you mean guest?" in call(site, "fetch", "gest").failed("gest is not enabled").log
    assert "imageos variants enable other" in call(site, "try", "other").failed("other is not enabled").log


def test_many_at_once(site: Node) -> None:
    """Each waits until the one before has ended, so that no line of it is lost."""
    names = ["guest", "again", "other"]
    with closing(os.open(SITE, os.O_RDONLY)) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        calls = [site.start_tool("variants", "--os-dir", str(site.os_dir), "enable", name) for name in names]
        wanted = re.compile(rf"-> FLOCK .*:{os.stat(SITE).st_ino} ")
        wait_until(lambda: len(wanted.findall(Path("/proc/locks").read_text())) == len(names), HANGS)
        assert LISTING.read_text() == "default\n"
    for one in calls:
        one.result().ok()
    assert sorted(LISTING.read_text().split()) == sorted(["default", *names])
    assert not list(SITE.rglob("*.tmp"))


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    yield descriptor
    os.close(descriptor)


def test_key_of_the_publisher(site: Node) -> None:
    """Without it, that is said, and how to get it; with it, the signature is demanded."""
    with (SITE / "catalog.conf").open("a") as file:
        arch = "".join(f"{name} = https://example.org/a.qcow2\n" for name in ("x86_64", "aarch64"))
        file.write(f"[signed]\n{arch}keyring = us\nkey = {'A' * 40}\nkey_from = hkps://keys.example.org\n")
    log = call(site, "enable", "signed").ok().log
    assert "its publisher signs" in log and f"gpg --export {'A' * 40} > {SITE}/us.gpg" in log
    assert "IMAGE_KEYRING" not in (SITE / "variants/signed.conf").read_text()
    site.write(SITE / "us.gpg", "")
    assert "its publisher signs" not in call(site, "enable", "signed").ok().log
    text = (SITE / "variants/signed.conf").read_text()
    assert f"IMAGE_KEYRING={SITE}/us.gpg\nIMAGE_SIGNER={'A' * 40}\n" in text
    (SITE / "us.gpg").unlink()
    call(site, "enable", "signed").ok()
    assert (SITE / "variants/signed.conf").read_text() == text, "it is still demanded"


def test_fetch_all(site: Node, publisher: Server) -> None:
    """After one that fails the others are tried; what two name is downloaded once; a local one is looked at."""
    call(site, "enable", "guest", "again", "broken", "other").ok()
    with DEFAULTS.open("a") as file:
        file.write(f"IMAGE_NAME=tiny\nIMAGE_DIR={site.images}\n")
    result = call(site, "fetch").failed("1 of 5 variants could not be fetched: broken")
    assert "variant broken: image" in result.log and "a web page, which a server sends" in result.log
    assert result.log.index("variant broken") < result.log.index("variant other is on this node")
    assert f"variant default is on this node: {site.images}/tiny" in result.log
    assert publisher.count("/images/1.0/guest.qcow2") == 1
    assert [row["image"] for row in rows(site).values()] == ["directory", "cache", "cache", "URL", "cache"]


def test_fetch_asks_once_for_what_variants_share(site: Node, publisher: Server) -> None:
    call(site, "enable", "guest", "again", "broken").ok()
    for number in range(5):
        for name in ("guest", "broken"):
            shutil.copy(SITE / f"variants/{name}.conf", SITE / f"variants/{name}{number}.conf")
            with LISTING.open("a") as file:
                file.write(f"{name}{number}\n")
    call(site, "fetch", "guest").ok()
    log = call(site, "fetch", "guest").ok().log
    assert "copy in CACHE_DIR is current" in log
    before = len(publisher.requests)
    call(site, "fetch", "guest").ok()
    alone = len(publisher.requests) - before
    assert alone
    names = [f"guest{number}" for number in range(5)]
    log = call(site, "fetch", "guest", *names).ok().log
    assert len(publisher.requests) == before + 2 * alone
    assert all(f"variant {name} is on this node: " in log for name in ("guest", *names))
    result = call(site, "fetch", *(f"broken{number}" for number in range(5)))
    result.failed("5 of 5 variants could not be fetched: broken0, broken1")
    assert result.log.count("a web page, which a server sends") == 5


def test_fetch_shows_progress_and_goes_on(site: Node, publisher: Server, image: bytes) -> None:
    call(site, "enable", "guest").ok()
    publisher.put("/images/1.0/guest.qcow2", image, stalls_at=len(image) // 2, cuts=[len(image) // 2])
    running = site.start_tool("variants", "--os-dir", str(site.os_dir), "fetch", path=WITHOUT_GANETI)
    part = site.work / "cache"
    wait_until(lambda: any(path.stat().st_size > 500_000 for path in part.glob("*.part")), HANGS)
    running.kill(signal.SIGKILL)
    publisher.put("/images/1.0/guest.qcow2", image)
    log = call(site, "fetch").ok().log
    assert "going on with a download of" in log
    assert re.search(r"downloaded https://\S+ \([0-9.]+ s\)", log)


def test_prune(site: Node, publisher: Server, image: bytes) -> None:
    call(site, "enable", "guest", "other").ok()
    call(site, "fetch", "guest", "other").ok()
    cache = site.work / "cache"
    own = [cache / "debian-12-x86_64.qcow2", cache / "notes.json", cache / "backup.lock"]
    for path in own:
        path.write_text("the site's own")
    orphan = cache / f"{'0' * 16}-old.img.part"
    orphan.write_bytes(bytes(1 << 20))
    call(site, "disable", "other").ok()
    log = call(site, "fetch", "--prune").ok().log
    assert "-other.qcow2: removed" in log and "-old.img: removed, 1 MiB" in log
    kept = {path.name for path in cache.iterdir()} - {path.name for path in own}
    assert {name.partition("-")[2] for name in kept} == {"guest.qcow2", "guest.qcow2.json"}
    assert all(path.exists() for path in own)
    assert "nothing to remove" in call(site, "fetch", "--prune").ok().log


def test_prune_leaves_what_is_in_use(site: Node, publisher: Server, image: bytes) -> None:
    call(site, "enable", "guest", "other").ok()
    publisher.put("/images/other.qcow2", image, stalls_at=len(image) // 2)
    running = site.start_tool("variants", "--os-dir", str(site.os_dir), "fetch", "other", path=WITHOUT_GANETI)
    cache = site.work / "cache"
    wait_until(lambda: any(cache.glob("*other.qcow2.part")), HANGS)
    call(site, "disable", "other").ok()
    assert "-other.qcow2: in use, kept" in call(site, "fetch", "--prune").ok().log
    assert list(cache.glob("*other.qcow2.part"))
    running.kill(signal.SIGKILL)


def test_prune_without_knowing_what_is_named(site: Node) -> None:
    call(site, "enable", "guest").ok()
    site.variant("wrong", "IMAGE_TYPE=iso\n")
    cache = site.work / "cache"
    cache.mkdir()
    (cache / f"{'0' * 16}-old.img").write_bytes(b"x")
    call(site, "fetch", "guest", "--prune").failed("nothing is removed: variant wrong: IMAGE_TYPE='iso'")
    assert (cache / f"{'0' * 16}-old.img").exists()


def test_prune_after_a_failure_and_after_a_signal(site: Node, publisher: Server, image: bytes) -> None:
    """The cause of a fetch that fails stays on the last line. Who interrupts it wants nothing more to be done."""
    call(site, "enable", "guest", "broken").ok()
    orphan = site.work / "cache" / f"{'0' * 16}-old.img"
    orphan.parent.mkdir()
    orphan.write_bytes(b"x")
    publisher.put("/images/1.0/guest.qcow2", image, stalls_at=len(image) // 2)
    running = site.start_tool("variants", "--os-dir", str(site.os_dir), "fetch", "--prune", path=WITHOUT_GANETI)
    wait_until(lambda: any(orphan.parent.glob("*guest.qcow2.part")), HANGS)
    running.kill(signal.SIGINT)
    assert running.result().status == 130
    assert orphan.exists()
    result = call(site, "fetch", "broken", "--prune")
    result.failed("1 of 1 variants could not be fetched: broken; image ", "is a web page")
    assert not orphan.exists()
    site.variant("wrong", "IMAGE_TYPE=iso\n")
    result = call(site, "fetch", "broken", "--prune").failed("could not be fetched: broken; image ")
    assert "--prune: nothing is removed: variant wrong" in result.log


def test_by_what_it_is_verified(site: Node, publisher: Server, image: bytes) -> None:
    """By what the settings ask for, whatever the copy was verified by for others."""
    url, pin = f"{publisher.url}/images/latest/guest.qcow2", f"sha256:{hashlib.sha256(image).hexdigest()}"
    site.write(site.images / "local-x86_64.qcow2", "")
    (site.images / "local-x86_64.qcow2").write_bytes(image)
    remote, local = f"IMAGE_URL={url}\n", f"ARCH=x86_64\nIMAGE_NAME=local\nIMAGE_DIR={site.images}\n"
    expected = {}
    for place, where, published in (("remote", remote, "SHA256SUMS"), ("local", local, "nothing")):
        settings = {"IMAGE_CHECKSUM=": published, "IMAGE_VERIFY=no": "nothing", "IMAGE_CHECKSUM=no": "nothing"}
        settings[f"IMAGE_CHECKSUM={pin}"] = "IMAGE_CHECKSUM"
        for number, (setting, verified) in enumerate(settings.items()):
            site.variant(f"{place}{number}", f"IMAGE_TYPE=qcow2\nNOMOUNT=yes\n{where}{setting}\n")
            expected[f"{place}{number}"] = verified
    call(site, "fetch", *expected).ok()
    text = run(site.os_dir / "imageos", "variants", "--os-dir", site.os_dir)
    shown = {line.split()[0]: line for line in text.partition("\n\n")[0].splitlines()}
    for name, verified in expected.items():
        assert re.search(rf"\d\d  {verified}  ", shown[name]), (name, shown[name])
    assert pin not in text, "it would fill the line"


def test_last_trial_of_a_download(site: Node, publisher: Server, image: bytes) -> None:
    """The publisher has another image since: table and doctor say that it was not tried."""
    call(site, "enable", "guest").ok()
    call(site, "fetch", "guest").ok()
    (copy,) = (site.work / "cache").glob("*.qcow2")
    image_time = copy.stat().st_mtime
    site.write(
        site.work / "lib/ganeti-instance-image/trials/guest.json",
        json.dumps({"tried": image_time, "image_time": image_time}),
    )

    def doctor() -> str:
        return site.tool("doctor", "--os-dir", str(site.os_dir), path=WITHOUT_GANETI).log

    run("mount", "--bind", site.work / "lib", "/var/lib")
    try:
        row = rows(site)["guest"]
        assert (row["trial"], row["tried_with"], row["is_outdated"]) == ("ok", image_time, False)
        assert "its image is another now" not in doctor()
        publisher.put("/images/1.0/guest.qcow2", image + bytes(1 << 16))
        digest = hashlib.sha256(image + bytes(1 << 16)).hexdigest()
        publisher.put("/images/latest/SHA256SUMS", f"{digest} *guest.qcow2\n".encode())
        call(site, "fetch", "guest").ok()
        assert rows(site)["guest"]["is_outdated"] is True
        assert "its image is another now" in " ".join(doctor().split())
    finally:
        run("umount", "/var/lib")


def test_not_root(site: Node) -> None:
    """Who cannot see the images does not say that they are missing, nor that they have to be downloaded."""
    call(site, "enable", "guest").ok()
    call(site, "fetch", "guest").ok()
    root = Path("/var/tmp/for-everybody")
    os_dir = root / "usr/share/ganeti/os/image"
    argv = ["setpriv", "--reuid=65534", "--clear-groups", os_dir / "imageos", "variants", "--os-dir", os_dir]
    try:
        run(site.imageos, "install", "--root", root)
        run("chmod", "-R", "go+rX", root, SITE)
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        assert re.search("(?m)^guest +qcow2 +unknown ", done.stdout) and "run it with sudo" in done.stderr
        for action in ("fetch", "enable"):
            done = subprocess.run([*argv, action, "guest", "other"], check=False, capture_output=True, text=True)
            assert "hint: run it with sudo" in done.stderr.splitlines()[-2], done.stderr
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_output_that_cannot_be_written(site: Node) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [site.os_dir / "imageos", "variants", "--os-dir", site.os_dir],
            check=False, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "imageos: cannot print: No space left on device\n")


def test_table(site: Node) -> None:
    """It asks no server; a variant that is wrong is a line, not the end."""
    call(site, "enable", "guest").ok()
    site.variant("wrong", "IMAGE_TYPE=iso\n")
    done = subprocess.run(
        [site.os_dir / "imageos", "variants", "--os-dir", site.os_dir],
        check=True, capture_output=True, text=True, env={"PATH": WITHOUT_GANETI},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["VARIANT", "TYPE", "IMAGE", "SIZE", "DATE", "VERIFIED", "BY", "TRIED", "PLACE"]
    assert lines[2].split()[:3] == ["guest", "qcow2", "URL"]
    assert any(line.startswith("wrong: IMAGE_TYPE='iso'") for line in lines)
    assert any(line.startswith("debian-13 ") for line in lines), "in the catalog"
    assert done.stderr == ""
    (SITE / "catalog.conf").write_text("nothing\n")
    call(site, "enable", "mine").failed(f"cannot read the catalog {SITE}/catalog.conf")
    result = call(site).failed(f"cannot read the catalog {SITE}/catalog.conf")
    assert re.search("(?m)^guest +qcow2 +URL ", result.log), "of this node"


# Ganeti: what it says is that of gnt-instance on a real cluster


def with_ganeti(node: Node, answer: str) -> str:
    """Return a PATH on which this node is the master of a cluster whose gnt-instance gives an answer."""
    directory = node.work / "ganeti"
    for name, text in {"gnt-cluster": f"echo {os.uname().nodename}", "gnt-instance": answer}.items():
        node.write(directory / name, f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    return f"{directory}:{WITHOUT_GANETI}"


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("echo 'web1.example.org|image+guest'", "variant guest is used by web1.example.org"),
        ("echo 'web1.example.org|image+guest2'", ""),
        ("echo 'web1.example.org|other+guest'", ""),
        ("true", ""),
    ],
)
def test_variant_in_use(answer: str, refusal: str, site: Node) -> None:
    call(site, "enable", "guest").ok()
    path = with_ganeti(site, answer)
    result = site.tool("variants", "--os-dir", str(site.os_dir), "disable", "guest", path=path)
    if refusal:
        result.failed(refusal)
    else:
        result.ok()
    assert ("guest" in LISTING.read_text().split()) == bool(refusal)


def test_ganeti_that_does_not_answer(site: Node) -> None:
    call(site, "enable", "guest").ok()
    path = with_ganeti(site, "echo 'Cannot communicate with the master daemon.' >&2; exit 1")
    result = site.tool("variants", "--os-dir", str(site.os_dir), "disable", "guest", path=path).ok()
    assert "whether instances use variant guest is not known" in result.log
