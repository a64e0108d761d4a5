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
from fnmatch import fnmatchcase
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from imageos import log
from imageos.causes import cause
from imageos.errors import Failure, explained
from imageos.images import pages
from imageos.images.urls import (
    CHECKSUMS,
    FURTHER_CHECKSUMS,
    LIKE_CHECKSUMS,
    SIGNATURES,
    STRONG,
    beside,
    cleaned,
    linked,
    shown,
)
from imageos.images.web import SMALL, Web
from imageos.node.confinement import Room
from imageos.node.linux import CAP_DAC_OVERRIDE
from imageos.node.programs import require
from imageos.run import Command, pipeline
from imageos.settings import Settings, is_pin

LONGEST_NAME = 255  # characters
MOST_FURTHER = 8  # files of an index that are looked into
ALGORITHMS = {40: "sha1", 64: "sha256", 128: "sha512"}  # by the number of digits
CHUNK = 1 << 20  # bytes
INLINE = b"-----BEGIN PGP SIGNED MESSAGE-----"
DETACHED = b"-----BEGIN PGP SIGNATURE-----"
# What gpgv says of a signature that would be good -> why it is not
NO_MORE = {"EXPSIG": "it has expired", "EXPKEYSIG": "its key has expired", "REVKEYSIG": "its key was revoked"}
GOOD = "good"  # what is found of a signature that verifies; else it is the reason
KEYRING_HINT = "the keyring must be as gpg --export writes it (an armored one: gpg --dearmor)"


class Signer(NamedTuple):
    """A key that may sign."""

    keyring: str = ""  # path; empty: nothing need be signed
    keyring_id: str = ""
    keys: str = ""  # fingerprints of those that count; empty: all

    def __str__(self) -> str:
        return f"signed by a key of {self.keyring}"


class Signature(NamedTuple):
    """A detached signature of the image itself."""

    contents: Sequence[bytes]  # one that verifies is enough
    signer: Signer


class Checksum(NamedTuple):
    """A checksum of an image; or a signature of it, of which is kept what is found of it (GOOD or not)."""

    algorithm: str
    hex: str
    source: str  # for messages
    signature: Signature | None = None


class Policy(NamedTuple):
    """The demands of the settings on one image before it is used."""

    pin: Checksum | None = None  # that it must have, whatever the server says
    is_published: bool = False  # whether a checksum is looked for at a server, or in IMAGE_DIR
    file: str = ""  # URL of the only file that may have it; without that, one of CHECKSUMS
    signer: Signer = Signer()
    signed_name: str = ""  # pattern of a name that is as good as the image's, in what is signed

    @property
    def key(self) -> str:
        """The name under which an answer is kept: policies with the same key get the same answer."""
        asked = f"file {hashlib.sha256(self.file.encode()).hexdigest()}" if self.file else "beside"
        signed = " ".join(filter(None, (self.signer.keyring_id, self.signer.keys, self.signed_name)))
        return f"{asked}, signed: {signed}" if signed else asked

    def is_covered_by(self, key: str) -> bool:
        """Return True if an answer that is kept under `key` is enough: it asked for the same, or for more."""
        return key == self.key or (not self.signer.keyring and key.startswith(f"{self.key}, signed: "))

    def __str__(self) -> str:
        wanted = [self.pin.source] if self.pin else []
        if self.is_published:
            file = shown(self.file) if self.file else "a checksum beside it"
            wanted.append(f"{file}, {self.signer}" if self.signer.keyring else file)
        return " and ".join(wanted)


class Node(Web):
    """The web, and files of the node: a quoted path instead of a URL."""

    def small(self, url: str, is_guess: bool = False) -> bytes | None:
        if "://" in url:
            return super().small(url, is_guess)
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

    Nobody need have published an image that root has put there: it may have neither checksum nor signature beside it.
    """
    url = quote(path)
    wanted = policy(settings, url)
    node = Node({**os.environ, **settings.unknown})
    checksums = expected(node, wanted._replace(signer=Signer()), url)
    if wanted.signer.keyring and (checksums or _signature(node, url, wanted.signer)):
        checksums = expected(node, wanted, url)
    if not checksums:
        return
    with log.phase(f"verified {path}"):
        found = digests_of(f"/proc/self/fd/{descriptor}", checksums)
        check(path, checksums, found)


def check(name: str, checksums: Iterable[Checksum], found: Mapping[str, str]) -> None:
    """Fail unless `found` (algorithm -> hex) of the image `name` has all `checksums`."""
    for checksum in checksums:
        if checksum.signature:
            if found[checksum.algorithm] != GOOD:
                raise Failure(
                    f"image {name}: {checksum.source} is no good signature of it by a key of IMAGE_KEYRING "
                    f"{checksum.signature.signer.keyring}: {found[checksum.algorithm]}",
                    hint=KEYRING_HINT,
                )
            log.info(f"verified: by {checksum.source}")
            continue
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
    if not keyring:
        return Policy(pinned(settings), is_published, file)
    signer = Signer(keyring, keyring_id(keyring), settings.image_signer)
    return Policy(pinned(settings), is_published, file, signer, settings.image_signed_name)


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


def digests_of(path: str, wanted: Sequence[str | Checksum]) -> dict[str, str]:
    """Return algorithm -> what is found of a file: hex, or of a Signature, GOOD or what is wrong."""
    signatures = {one.algorithm: one.signature for one in wanted if not isinstance(one, str) and one.signature}
    names = {one if isinstance(one, str) else one.algorithm for one in wanted}
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in names - set(signatures)}
    with open(path, "rb", buffering=0) as file:
        progress = log.Progress("verifying", os.fstat(file.fileno()).st_size)
        while hashes and (chunk := file.read(CHUNK)):
            for digest in hashes.values():
                digest.update(chunk)
            progress.update(file.tell())
        progress.close()
        found = {name: digest.hexdigest() for name, digest in hashes.items()}
        for name, signature in signatures.items():
            problems = []
            for content in signature.contents:
                os.lseek(file.fileno(), 0, os.SEEK_SET)
                problems.append(_judge(signature.signer, [content], stdin=file.fileno()).problem)
            found[name] = GOOD if "" in problems else problems[0]
    return found


def checksum_in(
    text: str, path: str, algorithms: Sequence[str], is_only: bool = False, pattern: str = ""
) -> tuple[str, str] | None:
    """Return the strongest (algorithm, hex) that a checksum file has for the image at `path`; Failure if it has two.

    It may have names, or the ends of paths; or one name that fits `pattern`. `is_only`: the file is about one image, as
    its own name says; entries of a single name count whatever that is, and such without one.
    """
    entries = [entry for entry in _entries(text) if entry[1] in algorithms]
    if not (is_only and len({entry[0] for entry in entries}) == 1):
        fitting = [entry for entry in entries if entry[0] and fnmatchcase(entry[0], pattern)]
        entries = [entry for entry in entries if entry[0] and f"/{path}".endswith(f"/{entry[0]}")]
        if not entries and len({entry[0] for entry in fitting}) == 1:
            entries = fitting
    most = max((len(entry[0]) for entry in entries), default=0)  # a longer path says better which one is meant
    found = {(algorithm, digest) for name, algorithm, digest in entries if len(name) == most}
    if len({algorithm for algorithm, _ in found}) < len(found):
        raise Failure(f"has different checksums of {path.rpartition('/')[2]}")
    return max(found, key=lambda entry: len(entry[1]), default=None)


def _text(content: bytes) -> str:
    return pages.decoded(content).decode("utf-8", "replace")


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
    """Return (name, algorithm, hex) of a line of sha256sum, binary or not, with --tag or not, or of openssl."""
    tagged = re.fullmatch(r"SHA(?:2-)?(\d+) ?\((.+)\) ?= ?([0-9a-f]+)", line, re.IGNORECASE)
    plain = re.fullmatch(r"(\\?)(?:sha(?:256|512):)?([0-9a-f]+)(?:\s+\*?(.+))?", line, re.IGNORECASE)
    if tagged:
        name, digest = tagged[2], tagged[3]
    elif plain:
        digest, name = plain[2], plain[3] or ""
        if plain[1]:  # by which sha256sum says that it has escaped the name
            if "\\" not in name:
                return None
            name = name.replace("\\\\", "\\")
    else:
        return None
    algorithm = ALGORITHMS.get(len(digest))
    if not algorithm or (tagged and algorithm != f"sha{tagged[1]}"):
        return None
    return re.sub(r"^(\./|/)+", "", name), algorithm, digest.lower()


def _places(web: Web, url: str, further: bool) -> Iterator[tuple[str, Sequence[str], bool, bool]]:
    """Yield where the checksum of an image may be, which algorithms count there, if it is of it alone, if a guess."""
    quoted = urlsplit(url).path.rpartition("/")[2]
    usual = {beside(url, pattern.format(quoted)): (algorithms, "{}" in pattern) for pattern, algorithms in CHECKSUMS}
    for place in web.in_turn(usual):
        yield (place, *usual[place], False)
    if not further:
        return
    image = unquote(quoted)
    names = checksum_files(linked(web.index(url), url), image)
    if names is None:
        names = [pattern.format(image) for pattern in FURTHER_CHECKSUMS]
    others = {beside(url, quote(name, safe="")): name.startswith(image) for name in names}
    for place in web.in_turn(others):
        yield place, STRONG, others[place], True


def checksum_files(listed: Sequence[str], image: str) -> list[str] | None:
    """Return which names of an index may be of files with the checksum of `image`; None if it does not list that.

    What begins with the name of another file is about that one.
    """
    if image not in listed:
        return None
    files = {name for name in listed if not LIKE_CHECKSUMS.search(name)}
    others = (name for name in listed if name not in files and len(name) <= LONGEST_NAME)
    about = {name: next((name[:end] for end in range(len(name), 0, -1) if name[:end] in files), "") for name in others}
    about.pop(image, None)  # it may be called like one itself
    names = [name for name, file in about.items() if file in ("", image) and not name.endswith(SIGNATURES)]
    return sorted(names, key=lambda name: (about[name] != image, name))[:MOST_FURTHER]


def _published(web: Web, url: str, wanted: Policy, further: bool) -> list[Checksum]:
    signer, path = wanted.signer, unquote(urlsplit(url).path)
    # Without a keyring the server's word counts, also on how the image is called behind a link to the latest one.
    paths = [path] if signer.keyring else [path, unquote(urlsplit(web.led.get(url, url)).path)]
    problems, absent = [], []
    places = [(wanted.file, STRONG, True, False)] if wanted.file else _places(web, url, further)
    for place, algorithms, is_only, is_guess in places:
        content = web.small(place, is_guess)
        if content is None:
            absent += [f"{shown(place)} is a web page, and no checksum file"] if place in web.pages else []
            continue
        try:
            entries = (checksum_in(_text(content), one, algorithms, is_only, wanted.signed_name) for one in paths)
            entry = next(filter(None, entries), None)
        except Failure as failure:
            raise Failure(f"{shown(place)} {failure}", hint="ask who has published it") from None
        if entry and signer.keyring:
            signed = _signed(web, place, content, signer)
            # Who has signed a checksum says what it is of in the same breath: a server could call anything as it likes.
            entry = checksum_in(_text(signed or b""), path, algorithms, pattern=wanted.signed_name)
            does = "is not signed" if signed is None else f"does not name {path.rpartition('/')[2]}"
            problems.append(f"{shown(place)} {does}")
        if entry:
            if entry[0] == "sha1":
                log.warning(f"{shown(place)} holds a SHA-1, which is weak: make a SHA256SUMS")
            if place.startswith("https:") and web.led.get(place, place).startswith("http:") and not signer.keyring:
                log.warning(f"{shown(place)} came over plain http in the end: who sends the image could send that, too")
            return [Checksum(*entry, shown(place) + (f", {signer}" if signer.keyring else ""))]
    if signer.keyring and not wanted.file:
        signature = _signature(web, url, signer)
        if signature:
            return [signature]
    _fail_unpublished(url, wanted, problems + absent)
    return []


def _fail_unpublished(url: str, wanted: Policy, problems: Sequence[str]) -> None:
    """Fail if there had to be a checksum of the image, or a signature."""
    keyring, name = wanted.signer.keyring, unquote(urlsplit(url).path.rpartition("/")[2])
    if wanted.file:
        problem = (
            problems[0] if problems else f"{shown(wanted.file)} is not there, or has no SHA-256 or SHA-512 of {name}"
        )
        more = f", {wanted.signer}" if keyring else "; IMAGE_CHECKSUM=no skips the check"
        raise Failure(f"image {shown(url)}: {problem}", hint=f"correct IMAGE_CHECKSUM, or publish that file{more}")
    if keyring:
        raise Failure(
            f"image {shown(url)}: {(problems or ['no checksum beside it'])[0]}, but IMAGE_KEYRING is set",
            hint=f"put beside it what `sha256sum {shlex.quote(name)} > SHA256SUMS` and "
            "`gpg --detach-sign SHA256SUMS` make, or set IMAGE_KEYRING to nothing in the variant's file",
        )


def _signature(web: Web, url: str, signer: Signer) -> Checksum | None:
    """Return the signature beside the image itself; what else is there under such a name is none."""
    # RFC 4880, 4.2: of a packet
    found = {place: one for place, one in _beside(web, url) if DETACHED in one or one[:1] >= b"\x80"}
    if not found:
        return None
    facts = " ".join([signer.keyring_id, signer.keys, *(hashlib.sha256(one).hexdigest() for one in found.values())])
    algorithm = f"signature {hashlib.sha256(facts.encode()).hexdigest()}"
    source = f"{' or '.join(map(shown, found))}, {signer}"
    return Checksum(algorithm, GOOD, source, Signature(list(found.values()), signer))


def _beside(web: Web, url: str) -> Iterator[tuple[str, bytes]]:
    """Yield the URL and the content of the files that may be the signature of `url`."""
    parts = urlsplit(url)
    for place in web.in_turn(parts._replace(path=parts.path + suffix).geturl() for suffix in SIGNATURES):
        content = web.small(place)
        if content is not None:
            yield place, content


def _signed(web: Web, url: str, content: bytes, signer: Signer) -> bytes | None:
    """Return the signed part of the checksum file; None without a signature. Fail if the signature is wrong."""
    if INLINE in content:
        return _verified(url, _judge(signer, [content], ["--output", "-"]))
    verdicts = []
    for _, signature in _beside(web, url):
        if INLINE in signature:  # a second copy of the text
            verdict = _judge(signer, [signature], ["--output", "-"])
            if not verdict.problem and verdict.signed.split() != content.split():
                verdict = verdict._replace(problem="what is signed is another text")
        else:
            verdict = _judge(signer, [signature, content])
        if not verdict.problem:
            return content
        verdicts.append(verdict)
    return _verified(url, verdicts[0]) if verdicts else None


class _Verdict(NamedTuple):
    """What gpgv says of a signature."""

    signer: Signer
    problem: str  # empty: it is good
    signed: bytes = b""  # the text, if the signature is inside
    details: Sequence[str] = ()


def _judge(
    signer: Signer, contents: Sequence[bytes], options: Sequence[str] = (), stdin: int | None = None
) -> _Verdict:
    """Ask gpgv about `contents`: a signature and its text, or a text with its signature inside.

    `stdin`: descriptor of what a signature alone is of.
    """
    require("gpgv")
    keyring_id(signer.keyring)  # it can be read
    with ExitStack() as stack:
        files = [stack.enter_context(_stored(content)) for content in contents]
        check = ["gpgv", "--status-fd", "2", "--keyring", signer.keyring, *options, *files]
        command = Command(
            [*check, *([] if stdin is None else ["-"])],
            Room([signer.keyring, *files], capabilities=[CAP_DAC_OVERRIDE]),
        )
        done = (pipeline(command) if stdin is None else pipeline(command, stdin=stdin))[0]
    lines = done.stderr.splitlines()
    status = [line.split()[1:] for line in lines if line.startswith("[GNUPG:] ")]
    verdicts = {words[0] for words in status if words}
    said = [line for line in lines if line.startswith("gpgv: ")]
    if "GOODSIG" not in verdicts or "BADSIG" in verdicts:  # not its status: keys that we do not have are no fault
        why = (
            next((why for verdict, why in NO_MORE.items() if verdict in verdicts), "")
            or cause("gpgv", "\n".join(said)).replace("gpgv: ", "", 1)
            or "no signature was found"
        )
        return _Verdict(signer, why, details=said[:-1])
    keys = _good_keys(status)
    if signer.keys and not any(set(known) & set(signer.keys.split()) for known in keys):
        others = " and ".join(sorted({primary for _, primary in keys}))
        return _Verdict(signer, f"it is by the key {others}, not by IMAGE_SIGNER {signer.keys}")
    return _Verdict(signer, "", done.stdout)


def _good_keys(status: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Return of each good signature the fingerprints of the key that signed, and of the primary key it belongs to.

    A signature by a key that was revoked or has expired is VALIDSIG, too.
    """
    keys, is_good = [], False
    for words in status:
        if words and words[0].endswith("SIG") and words[0] != "VALIDSIG":
            is_good = words[0] == "GOODSIG"
        elif len(words) > 1 and words[0] == "VALIDSIG" and is_good:
            keys.append((words[1], words[-1]))
    return keys


def _verified(url: str, verdict: _Verdict) -> bytes:
    """Return the text that is signed; fail if the signature is not good."""
    if verdict.problem:
        keyring = verdict.signer.keyring
        raise Failure(
            f"{shown(url)} has no good signature by a key of IMAGE_KEYRING {keyring}: {verdict.problem}",
            hint=KEYRING_HINT,
            details=verdict.details,
        )
    return verdict.signed


@contextmanager
def _stored(content: bytes) -> Iterator[str]:
    """Yield the path of a file with this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name
