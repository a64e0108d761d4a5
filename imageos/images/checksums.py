"""What a downloaded image must be: the checksum in the settings, or the one beside it, and its signature."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from imageos import log
from imageos.errors import Failure
from imageos.images.web import Web, beside, cleaned, shown
from imageos.node.confinement import Room
from imageos.node.linux import CAP_DAC_OVERRIDE
from imageos.run import pipeline, require
from imageos.settings import Settings, is_pin

# Where the checksum of NAME may be, and the algorithms that are believed there. The last is of
# ganeti-instance-image, which knew SHA-1 only.
STRONG = ("sha256", "sha512")
FILES: Sequence[tuple[str, Sequence[str]]] = (
    ("SHA256SUMS", STRONG),
    ("SHA512SUMS", STRONG),
    ("CHECKSUM", STRONG),
    ("{}.sha256", STRONG),
    ("{}.sha512", STRONG),
    ("{}.sig", (*STRONG, "sha1")),
)
SIGNATURES = (".gpg", ".sign", ".asc")
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
    """What the settings want to know of the image at one URL before it is used."""

    pin: Checksum | None = None  # that it must have, whatever the server says
    is_published: bool = False  # whether a server must be asked for a checksum
    file: str = ""  # URL of the only file that may have it; without that, one of FILES
    keyring: str = ""  # that which must have signed it
    keyring_id: str = ""

    @property
    def key(self) -> str:
        """Under which the answer is kept; who asks with the same key would get the same answer."""
        asked = f"file {hashlib.sha256(self.file.encode()).hexdigest()}" if self.file else "beside"
        return f"{asked}, signed: {self.keyring_id}" if self.keyring else asked

    def is_covered_by(self, key: str) -> bool:
        """Whether an answer that is kept under `key` is enough: the same question, or one that asked for more."""
        return key == self.key or (not self.keyring and key.startswith(f"{self.key}, signed: "))

    def __str__(self) -> str:
        wanted = [self.pin.source] if self.pin else []
        if self.is_published:
            file = shown(self.file) if self.file else "a checksum beside it"
            wanted.append(file + (f", signed by a key of {self.keyring}" if self.keyring else ""))
        return " and ".join(wanted)


def policy(settings: Settings, url: str) -> Policy:
    """For the image at `url`."""
    if not settings.image_verify:
        return Policy()
    text, keyring = settings.image_checksum, settings.image_keyring
    file = ""
    if text not in ("", "no") and not is_pin(text):
        file = cleaned(text) if "://" in text else beside(url, quote(text, safe=""))
    is_published = bool(keyring or file or not text)
    return Policy(pinned(settings), is_published, file, keyring, keyring_id(keyring) if keyring else "")


def expected(web: Web, wanted: Policy, url: str) -> list[Checksum]:
    """The checksums that the image at `url` must have. Failure if they must be signed, and nothing is."""
    found = [wanted.pin] if wanted.pin else []
    return found + _published(web, url, wanted) if wanted.is_published else found


def pinned(settings: Settings) -> Checksum | None:
    """The checksum that is a setting."""
    if not settings.image_verify or not is_pin(settings.image_checksum):
        return None
    algorithm, _, digest = settings.image_checksum.partition(":")
    return Checksum(algorithm, digest.lower(), "IMAGE_CHECKSUM")


def keyring_id(path: str) -> str:
    """Tells one keyring from another, by its content."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise Failure(f"IMAGE_KEYRING {path}: {error.strerror}") from None


def digests_of(path: str, algorithms: Iterable[str]) -> dict[str, str]:
    """algorithm -> hex, of a file that is read once."""
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with open(path, "rb", buffering=0) as file:
        progress = log.Progress("verifying", os.fstat(file.fileno()).st_size)
        while chunk := file.read(CHUNK):
            for one in hashes.values():
                one.update(chunk)
            progress.update(file.tell())
        progress.close()
    return {name: one.hexdigest() for name, one in hashes.items()}


def checksum_in(text: str, name: str, algorithms: Sequence[str], is_only: bool = False) -> tuple[str, str] | None:
    """The strongest (algorithm, hex) that a checksum file has for `name`.

    `is_only`: the file is about one image, as its own name says; a single entry counts whatever it names, or nothing.
    """
    entries = [entry for line in text.splitlines() if (entry := _entry(line.strip())) and entry[1] in algorithms]
    if not (is_only and len(entries) == 1):
        entries = [entry for entry in entries if entry[0] in (name, f"./{name}")]
    return max(((algorithm, digest) for _, algorithm, digest in entries), key=lambda one: len(one[1]), default=None)


def _entry(line: str) -> tuple[str, str, str] | None:
    """(name, algorithm, hex) of a line of sha256sum, binary or not, with --tag or not."""
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


def _published(web: Web, url: str, wanted: Policy) -> list[Checksum]:
    quoted, keyring = urlsplit(url).path.rpartition("/")[2], wanted.keyring
    name = unquote(quoted)
    problems = []
    places = [(beside(url, pattern.format(quoted)), algorithms, "{}" in pattern) for pattern, algorithms in FILES]
    for place, algorithms, is_only in [(wanted.file, STRONG, True)] if wanted.file else places:
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
        raise Failure(f"image {shown(url)}: {problem}", hint="see IMAGE_CHECKSUM")
    if keyring:
        raise Failure(
            f"image {shown(url)}: {(problems or ['no checksum beside it'])[0]}, but IMAGE_KEYRING is set",
            hint=f"put beside it what `sha256sum {shlex.quote(name)} > SHA256SUMS` and "
            "`gpg --detach-sign SHA256SUMS` make, or set IMAGE_KEYRING to nothing in the variant's file",
        )
    return []


def _signed(web: Web, url: str, content: bytes, keyring: str) -> str | None:
    """What of the checksum file is signed; None if it has no signature, Failure if that is wrong."""
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
    """What gpgv prints of `contents`: a signature and what it is of, or a text with its signature inside."""
    require("gpgv")
    keyring_id(keyring)  # it can be read
    with ExitStack() as stack:
        files = [stack.enter_context(_stored(content)) for content in contents]
        check = ["gpgv", "--status-fd", "2", "--keyring", keyring, *options, *files]
        done = pipeline([check], room=Room([keyring, *files], capabilities=[CAP_DAC_OVERRIDE]))[0]
    lines = done.stderr.splitlines()
    verdicts = {line.split()[1] for line in lines if line.startswith("[GNUPG:] ") and len(line.split()) > 1}
    if "GOODSIG" not in verdicts or "BADSIG" in verdicts:  # not its status: keys that we do not have are no fault
        said = [line for line in lines if line.startswith("gpgv: ")]
        raise Failure(
            f"{shown(url)} has no good signature by a key of IMAGE_KEYRING {keyring}"
            + (f": {said[-1][len('gpgv: ') :]}" if said else ""),
            hint="the keyring must be as gpg --export writes it (an armored one: gpg --dearmor)",
            details=said[:-1],
        )
    return done.stdout.decode("utf-8", "replace")


@contextmanager
def _stored(content: bytes) -> Iterator[str]:
    """The path of a file with this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name
