"""The catalog's form, the files that are made of it, and the table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import readme

from imageos import settings
from imageos.commands import variants
from imageos.errors import Failure, Usage
from imageos.images import fetch, imagetypes
from imageos.settings import Settings, is_pin
from imageos.variants import catalog, table
from imageos.variants.catalog import Entry
from imageos.variants.table import Row

CHECKOUT = Path(__file__).resolve().parents[2]
SHIPPED = CHECKOUT / "defaults" / catalog.FILE
ENTRIES = catalog.read(str(SHIPPED)) or {}
MINE = "[mine]\nx86_64 = https://example.org/mine-x86_64.qcow2\n"


DISTRIBUTIONS = (
    *("debian", "ubuntu", "fedora", "centos-stream", "rocky", "almalinux", "oraclelinux"),
    *("opensuse", "archlinux", "alpine", "amazonlinux", "freebsd"),
)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_catalog_has(distribution: str) -> None:
    assert [name for name in ENTRIES if name.startswith(distribution)]


@pytest.mark.parametrize("name", ENTRIES)
def test_entry(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.title.isascii() and entry.page.startswith("https://")
    assert "x86_64" in entry.urls
    for arch, url in entry.urls.items():
        parts = urlsplit(url)
        assert parts.scheme == "https" and not parts.query
        one = imagetypes.ONE_IMAGE.search(parts.path)
        assert one and one[1] in imagetypes.IMAGE_TYPES[entry.type].url_ends
        file = parts.path.rpartition("/")[2]
        assert re.search({"x86_64": "amd64|x86_64", "aarch64": "arm64|aarch64"}[arch], file), "of another architecture"
        wanted = entry.settings(arch, is_key_there=True)
        assert fetch.cache_name(url)
        checksum = wanted.get("IMAGE_CHECKSUM", "")
        assert checksum or entry.keyring, "nothing says what the image must be"
        assert is_pin(checksum) or re.search("(?i)sums$|checksum|sha(256|512)(sum)?$", checksum or "sums"), checksum
    if entry.keyring:
        assert re.fullmatch("[0-9A-F]{40}", entry.key)
        assert re.match("(hkps|https)://", entry.key_from)
        assert entry.keyring_path.startswith(settings.SITE_DIR)
    assert entry.keyring or not entry.signed_names


def test_everything_in_the_file_is_explained() -> None:
    text = SHIPPED.read_text()
    head = text.partition("\n[")[0]
    used = set(re.findall(r"(?m)^([a-z_0-9]+)(?:\.[a-z0-9_]+)? = ", text))
    assert used <= set(re.findall(r"[a-z_0-9]+", head))
    assert text.isascii()


@pytest.mark.parametrize("is_key_there", [True, False])
@pytest.mark.parametrize("name", ENTRIES)
def test_file_of_a_variant(name: str, is_key_there: bool) -> None:
    text = ENTRIES[name].variant_file("x86_64", is_key_there)
    assert catalog.is_as_written(text.encode())
    assert ("IMAGE_KEYRING" in text) == ("IMAGE_SIGNER" in text) == (is_key_there and bool(ENTRIES[name].keyring))
    first, *lines = text.splitlines(keepends=True)
    for changed in (
        "".join(lines),
        text + "GROW=no\n",
        text.replace("IMAGE_URL=", "IMAGE_URL= "),
        "",
        "IMAGE_NAME=a\n",
    ):
        assert not catalog.is_as_written(changed.encode())


def test_other_architecture() -> None:
    with pytest.raises(Failure, match="archlinux is not for aarch64, but for x86_64"):
        ENTRIES["archlinux"].variant_file("aarch64", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mine]\ntitle = x\n", "no URL"),
        (MINE + "ur = x\n", "ur is not known there"),
        (MINE + "type = iso\n", "IMAGE_TYPE='iso'"),
        (MINE.replace("https:", "ftp:"), "must be a URL"),
        (MINE + "checksum = md5:0\n", "IMAGE_CHECKSUM"),
        (MINE.replace("qcow2", "iso"), "is not the URL of a file of IMAGE_TYPE=qcow2"),
        (MINE + "type = tarball\n", "is not the URL of a file of IMAGE_TYPE=tarball"),
        (MINE.replace("qcow2", "qcow2 # ours"), "is not the URL of a file of IMAGE_TYPE=qcow2"),
        ("[mine]\nx86_64 =\n", "no URL"),
        (MINE + "disk = 3\n", "disk must be a number and M or G"),
        (MINE + "nomount = maybe\n", "nomount yes or no"),
        (MINE + "keyring = k\n", "a keyring needs"),
        (MINE + "keyring = k\nkey = 0\nkey_from = hkps://h\n", "IMAGE_SIGNER"),
        (MINE + MINE, "already exists"),
        (MINE.replace("mine]", "../mine]"), "cannot be the name of a variant"),
        ("nothing\n", "no section headers"),
    ],
)
def test_mistakes_of_a_site(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "catalog.conf"
    path.write_text(text)
    with pytest.raises(Failure, match=re.escape(message)) as raised:
        catalog.read(str(path))
    assert str(path) in str(raised.value)


def test_own_entries_come_before_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "SITE_DIR", str(tmp_path / "site"))
    with pytest.raises(Failure, match="there is no catalog"):
        catalog.load(str(tmp_path))
    (tmp_path / "catalog.conf").write_text(SHIPPED.read_text())
    assert catalog.load(str(tmp_path)) == ENTRIES
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "catalog.conf").write_text(MINE + MINE.replace("mine]", "debian-13]"))
    found = catalog.load(str(tmp_path))
    assert set(found) == {*ENTRIES, "mine"}
    assert found["debian-13"].urls == found["mine"].urls


def test_nearest() -> None:
    with pytest.raises(Failure, match="the catalog has no 'debian13'") as raised:
        catalog.choose(ENTRIES, "debian13")
    assert raised.value.hint and "debian-13" in raised.value.hint
    assert catalog.nearest("DEBIAN-13", list(ENTRIES)).startswith("debian-13")


# The table

CACHE = "/var/cache/ganeti-instance-image"
ROWS = [
    Row("default", "dump", "parameter"),
    Row("debian-13", "qcow2", "cache", f"{CACHE}/0123456789abcdef-debian-13-genericcloud-amd64.qcow2",
        338 << 20, 1.79e9, "https://cloud.debian.org/images/cloud/trixie/latest/SHA512SUMS", 1.79e9, "ok"),
    Row("ours", "tarball", "missing", problem="cannot find image /a"),
    Row("ubuntu-24.04", "qemu", "URL", "https://h/a.img", verified="https://h/SHA256SUMS, signed by a key of /k"),
    Row("plain", "qemu", "cache", "/c/a.img", 1, 1.79e9, fetch.NOT_FOUND, 1.79e9, "no login prompt"),
]  # fmt: skip


def test_table() -> None:
    text = table.as_text(ROWS, {name: ENTRIES[name] for name in ("debian-12", "debian-13", "archlinux")}, "aarch64", 0)
    above, below = text.split("\n\n")
    lines = above.splitlines()
    assert len({line.index(word) for line, word in zip(lines, ("IMAGE", "parameter", "cache", "missing", "URL"))}) == 1
    assert (
        "338 MiB" in lines[2] and "SHA512SUMS" in lines[2] and " ok " in lines[2] and lines[2].endswith("amd64.qcow2")
    )
    assert "SHA256SUMS, signed" in lines[4] and "nothing" in lines[5] and "failed" in lines[5]
    assert lines[6] == "ours: cannot find image /a"
    assert "debian-12" in below and "debian-13" not in below, "it is enabled"
    assert "archlinux" not in below, "it is for another architecture"


@pytest.mark.parametrize(("width", "has_place"), [(80, False), (90, True), (100, True), (140, True)])
def test_table_fits_the_terminal(width: int, has_place: bool) -> None:
    lines = table.as_text(ROWS[1:2], ENTRIES, "x86_64", width).splitlines()
    assert max(map(len, lines)) <= width
    assert ("PLACE" in lines[0]) == has_place
    if has_place:
        assert len(lines[1]) == width and "..." in lines[1] and lines[1].endswith(".qcow2"), "the end tells more"


def test_json() -> None:
    known = json.loads(table.as_json(ROWS, {"mine": Entry("mine", {"x86_64": "https://h/a.qcow2"})}, "x86_64"))
    assert [row["name"] for row in known["enabled"]] == [row.name for row in ROWS]
    assert known["enabled"][1]["verified"].endswith("/SHA512SUMS")
    assert known["catalog"][0]["urls"] == {"x86_64": "https://h/a.qcow2"}
    assert "secret" not in table.as_json([], {"mine": Entry("mine", {"x86_64": "https://u:secret@h/a.qcow2"})}, "x86")


def test_terminal_gets_no_control_characters() -> None:
    assert "\x1b" not in table.as_text([Row("a\x1b[2J", "qcow2", problem="b\x1b[2J")], {}, "x86_64", 0)


def test_image_that_was_not_tried() -> None:
    """A new one has come since: that the old one was good tells nothing."""
    row = ROWS[1]._replace(is_outdated=True)
    assert "2026-09-21 old image" in table.as_text([row], {}, "x86_64", 0)
    assert "failed" in table.as_text([row._replace(trial="no login")], {}, "x86_64", 0)


@pytest.mark.parametrize("seconds", ["-5", "0", "1.5", "ten", "9999999"])
def test_wrong_timeout(seconds: str) -> None:
    with pytest.raises(Usage, match=re.escape(f"'{seconds}' is no number of seconds")):
        variants.parser().parse_args(["try", "--timeout", seconds, "debian-13"])


def test_settings_of_an_entry_are_settings() -> None:
    names = {name for entry in ENTRIES.values() for arch in entry.urls for name in entry.settings(arch, True)}
    assert {name.lower() for name in names} <= set(Settings().variables() and settings.TABLE)


def test_picture_in_readme() -> None:
    directory = "/var/cache/ganeti-instance-image"
    midnight = 20787 * 86400.0
    shown = [
        Row(
            "debian-13",
            "qcow2",
            "cache",
            f"{directory}/0123456789abcdef-https%3A%2F%2Fcloud.debian.org%2Fdebian-13-genericcloud-amd64.qcow2",
            338 << 20,
            midnight,
            "sha512 of https://cloud.debian.org/images/cloud/trixie/latest/SHA512SUMS",
            midnight,
            "ok",
        ),
        Row("ubuntu-24.04", "qemu", "URL", ENTRIES["ubuntu-24.04"].urls["x86_64"]),
        Row(
            "web",
            "tarball",
            "directory",
            f"{directory}/web-x86_64.tar.zst",
            212 << 20,
            midnight,
            "a checksum beside it",
        ),
    ]
    assert readme.block("VARIANT ") == table.as_text(shown, {}, "x86_64", 108)
