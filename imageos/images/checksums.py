"""Check images against the checksum in the settings or beside them, and that against its signature."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urlsplit

from imageos import log
from imageos.causes import cause
from imageos.errors import Failure, explained
from imageos.images.urls import CHECKSUMS, FURTHER_CHECKSUMS, LIKE_CHECKSUMS, STRONG, beside, cleaned, linked, shown
from imageos.images.web import SMALL, Web
from imageos.node.confinement import Room
from imageos.node.linux import CAP_DAC_OVERRIDE
from imageos.node.programs import require
from imageos.run import Command, pipeline
from imageos.settings import Settings, is_pin

SIGNATURES = (".gpg", ".sign", ".asc", ".sig")
MOST_FURTHER = 8  # files of an index that are looked into
ALGORITHMS = {40: "sha1", 64: "sha256", 128: "sha512"}  # by the number of digits
CHUNK = 1 << 20  # bytes
INLINE = "-----BEGIN PGP SIGNED MESSAGE-----"


@dataclass(frozen=True)
class Checksum:
    algorithm: str
    hex: str
    source: str  # for messages


@dataclass(frozen=True)
class Policy:
    """The demands of the settings on one image before it is used."""

    pin: Checksum | None = None  # that it must have, whatever the server says
    is_published: bool = False  # whether a checksum is looked for at a server, or in IMAGE_DIR
    file: str = ""  # URL of the only file that may have it; without that, one of CHECKSUMS
    keyring: str = ""  # that which must have signed it
    keyring_id: str = ""

    @property
    def key(self) -> str:
        """The name under which an answer is kept: policies with the same key get the same answer."""
        asked = f"file {hashlib.sha256(self.file.encode()).hexdigest()}" if self.file else "beside"
        return f"{asked}, signed: {self.keyring_id}" if self.keyring else asked

    def is_covered_by(self, key: str) -> bool:
        """Return True if an answer that is kept under `key` is enough: it asked for the same, or for more."""
        return key == self.key or (not self.keyring and key.startswith(f"{self.key}, signed: "))

    def __str__(self) -> str:
        wanted = [self.pin.source] if self.pin else []
        if self.is_published:
            file = shown(self.file) if self.file else "a checksum beside it"
            wanted.append(file + (f", signed by a key of {self.keyring}" if self.keyring else ""))
        return " and ".join(wanted)


class Node(Web):
    """The web, and files of the node: a quoted path instead of a URL."""

    def small(self, url: str) -> bytes | None:
        if "://" in url:
            return super().small(url)
        try:
            descriptor = os.open(unquote(url), os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Failure(f"{unquote(url)} is not a regular file")
                content = file.read(SMALL + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Failure(f"cannot read {unquote(url)}: {error.strerror}") from None
        if len(content) > SMALL:
            raise Failure(f"{unquote(url)} is larger than {log.size(SMALL)}")
        return content


def verify_file(settings: Settings, path: str, descriptor: int) -> None:
    """Fail if the image `path` of this node, open as `descriptor`, has another checksum than it must have.

    Nobody need have published an image that root has put there: without a checksum beside it, there is nothing to sign.
    """
    url = quote(path)
    wanted = policy(settings, url)
    node = Node({**os.environ, **settings.unknown})
    checksums = expected(node, replace(wanted, keyring=""), url)
    if checksums and wanted.keyring:
        checksums = expected(node, wanted, url)
    if not checksums:
        return
    with log.phase(f"verified {path}"):
        found = digests_of(f"/proc/self/fd/{descriptor}", {checksum.algorithm for checksum in checksums})
        check(path, checksums, found)


def check(name: str, checksums: Iterable[Checksum], found: Mapping[str, str]) -> None:
    """Fail unless `found` (algorithm -> hex) of the image `name` has all `checksums`."""
    for checksum in checksums:
        if found[checksum.algorithm] != checksum.hex:
            raise Failure(
                f"image {name} has the wrong {checksum.algorithm}: "
                f"expected {checksum.hex} ({checksum.source}), found {found[checksum.algorithm]}",
                hint="the image has changed, or its checksum is of another one: replace what is wrong",
            )
        log.info(f"verified: {checksum.algorithm} of {checksum.source}")


def policy(settings: Settings, url: str) -> Policy:
    """Return what the settings demand of the image at `url`."""
    if not settings.image_verify:
        return Policy()
    text, keyring = settings.image_checksum, settings.image_keyring
    file = ""
    if text not in ("", "no") and not is_pin(text):
        file = cleaned(text) if "://" in text else beside(url, quote(text, safe=""))
    is_published = bool(keyring or file or not text)
    return Policy(pinned(settings), is_published, file, keyring, keyring_id(keyring) if keyring else "")


def expected(web: Web, wanted: Policy, url: str, *, further: bool = False) -> list[Checksum]:
    """Return the checksums that the image at `url` must have; fail if they must be signed, and nothing is.

    `further`: look also where other publishers have theirs.
    """
    found = [wanted.pin] if wanted.pin else []
    return found + _published(web, url, wanted, further) if wanted.is_published else found


def pinned(settings: Settings) -> Checksum | None:
    """Return the checksum that is a setting."""
    if not settings.image_verify or not is_pin(settings.image_checksum):
        return None
    algorithm, _, digest = settings.image_checksum.partition(":")
    return Checksum(algorithm, digest.lower(), "IMAGE_CHECKSUM")


def keyring_id(path: str) -> str:
    """Return a hash of a keyring's content."""
    with explained(f"IMAGE_KEYRING {path}"), open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def digests_of(path: str, algorithms: Iterable[str]) -> dict[str, str]:
    """Return algorithm -> hex of a file, which is read once."""
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with open(path, "rb", buffering=0) as file:
        progress = log.Progress("verifying", os.fstat(file.fileno()).st_size)
        while chunk := file.read(CHUNK):
            for digest in hashes.values():
                digest.update(chunk)
            progress.update(file.tell())
        progress.close()
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def checksum_in(text: str, name: str, algorithms: Sequence[str], is_only: bool = False) -> tuple[str, str] | None:
    """Return the strongest (algorithm, hex) that a checksum file has for `name`.

    `is_only`: the file is about one image, as its own name says; a single entry counts whatever it names, or nothing.
    """
    entries = [entry for entry in _entries(text) if entry[1] in algorithms]
    if not (is_only and len(entries) == 1):
        entries = [entry for entry in entries if entry[0] in (name, f"./{name}")]
    return max(((algorithm, digest) for _, algorithm, digest in entries), key=lambda entry: len(entry[1]), default=None)


def _entries(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the entries of a checksum file; in Gentoo's form a comment names the algorithm of those that follow."""
    is_ours = True
    for line in map(str.strip, text.splitlines()):
        named = re.fullmatch(r"# ?(\S+) HASH", line)
        is_ours = named[1].lower() in ALGORITHMS.values() if named else is_ours
        entry = _entry(line)
        if entry and is_ours:
            yield entry


def _entry(line: str) -> tuple[str, str, str] | None:
    """Return (name, algorithm, hex) of a line of sha256sum, binary or not, with --tag or not."""
    tagged = re.fullmatch(r"SHA\d+ ?\((.+)\) ?= ?([0-9a-fA-F]+)", line)
    plain = re.fullmatch(r"([0-9a-fA-F]+)(?:\s+\*?(.+))?", line)
    if tagged:
        name, digest = tagged.groups()
    elif plain:
        digest, name = plain.groups(default="")
    else:
        return None
    algorithm = ALGORITHMS.get(len(digest))
    return (name, algorithm, digest.lower()) if algorithm else None


def _places(web: Web, url: str, further: bool) -> Iterator[tuple[str, Sequence[str], bool]]:
    """Yield where the checksum of an image may be, which algorithms count there, and whether that is of it alone."""
    quoted = urlsplit(url).path.rpartition("/")[2]
    for pattern, algorithms in CHECKSUMS:
        yield beside(url, pattern.format(quoted)), algorithms, "{}" in pattern
    if not further:
        return
    image = unquote(quoted)
    names = checksum_files(linked(web.index(url), url), image)
    if names is None:
        names = [pattern.format(image) for pattern in FURTHER_CHECKSUMS]
    for name in names:
        yield beside(url, quote(name, safe="")), STRONG, name.startswith(image)


def checksum_files(listed: Sequence[str], image: str) -> list[str] | None:
    """Return which names of an index may be of files with the checksum of `image`; None if it does not list that.

    What begins with the name of another file is about that one.
    """
    if image not in listed:
        return None
    files = sorted((name for name in listed if not LIKE_CHECKSUMS.search(name)), key=len, reverse=True)
    about = {name: next((file for file in files if name.startswith(file)), "") for name in listed if name not in files}
    names = [name for name, file in about.items() if file in ("", image) and not name.endswith(SIGNATURES)]
    return sorted(names, key=lambda name: (about[name] != image, name))[:MOST_FURTHER]


def _published(web: Web, url: str, wanted: Policy, further: bool) -> list[Checksum]:
    keyring, name = wanted.keyring, unquote(urlsplit(url).path.rpartition("/")[2])
    problems = []
    places = [(wanted.file, STRONG, True)] if wanted.file else _places(web, url, further)
    for place, algorithms, is_only in places:
        content = web.small(place)
        if content is None:
            continue
        text: str | None = content.decode("utf-8", "replace")
        entry = checksum_in(text or "", name, algorithms, is_only)
        if entry and keyring:
            text = _signed(web, place, content, keyring)
            # Who has signed a checksum says what it is of in the same breath: a server could call anything as it likes.
            entry = checksum_in(text or "", name, algorithms)
            problems.append(f"{shown(place)} " + ("is not signed" if text is None else f"does not name {name}"))
        if entry:
            if entry[0] == "sha1":
                log.warning(f"{shown(place)} holds a SHA-1, which is weak: make a SHA256SUMS")
            return [Checksum(*entry, shown(place) + (f", signed by a key of {keyring}" if keyring else ""))]
    if wanted.file:
        problem = problems[0] if problems else f"{shown(wanted.file)} is not there, or has no checksum of {name}"
        more = f", signed by a key of {keyring}" if keyring else "; IMAGE_CHECKSUM=no skips the check"
        raise Failure(f"image {shown(url)}: {problem}", hint=f"correct IMAGE_CHECKSUM, or publish that file{more}")
    if keyring:
        raise Failure(
            f"image {shown(url)}: {(problems or ['no checksum beside it'])[0]}, but IMAGE_KEYRING is set",
            hint=f"put beside it what `sha256sum {shlex.quote(name)} > SHA256SUMS` and "
            "`gpg --detach-sign SHA256SUMS` make, or set IMAGE_KEYRING to nothing in the variant's file",
        )
    return []


def _signed(web: Web, url: str, content: bytes, keyring: str) -> str | None:
    """Return the signed part of the checksum file; None without a signature. Fail if the signature is wrong."""
    if content.startswith(INLINE.encode()):
        return _verified(url, ["--output", "-"], [content], keyring)
    for suffix in SIGNATURES:
        parts = urlsplit(url)
        signature = web.small(parts._replace(path=parts.path + suffix).geturl())
        if signature is not None:
            _verified(url, [], [signature, content], keyring)
            return content.decode("utf-8", "replace")
    return None


def _verified(url: str, options: Sequence[str], contents: Sequence[bytes], keyring: str) -> str:
    """Return the output of gpgv for `contents`: a signature and its text, or a text with its signature inside."""
    require("gpgv")
    keyring_id(keyring)  # it can be read
    with ExitStack() as stack:
        files = [stack.enter_context(_stored(content)) for content in contents]
        check = ["gpgv", "--status-fd", "2", "--keyring", keyring, *options, *files]
        done = pipeline(Command(check, Room([keyring, *files], capabilities=[CAP_DAC_OVERRIDE])))[0]
    lines = done.stderr.splitlines()
    verdicts = {line.split()[1] for line in lines if line.startswith("[GNUPG:] ") and len(line.split()) > 1}
    if "GOODSIG" not in verdicts or "BADSIG" in verdicts:  # not its status: keys that we do not have are no fault
        said = [line for line in lines if line.startswith("gpgv: ")]
        why = cause("gpgv", "\n".join(said)).replace("gpgv: ", "", 1)
        raise Failure(
            f"{shown(url)} has no good signature by a key of IMAGE_KEYRING {keyring}" + (f": {why}" if why else ""),
            hint="the keyring must be as gpg --export writes it (an armored one: gpg --dearmor)",
            details=said[:-1],
        )
    return done.stdout.decode("utf-8", "replace")


@contextmanager
def _stored(content: bytes) -> Iterator[str]:
    """Yield the path of a file with this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name
