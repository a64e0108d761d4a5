"""The table of `imageos variants`: what the node offers, where its images are, and what the catalog has besides."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote

from imageos import __version__, log
from imageos.checks.variants import Variant, downloaded, examine, image_time, listed
from imageos.errors import Failure
from imageos.images import checksums, fetch, imagetypes
from imageos.images.urls import shown
from imageos.settings import Settings
from imageos.variants.catalog import Entry
from imageos.variants.record import day, last_trial

HEADINGS = ("VARIANT", "TYPE", "IMAGE", "SIZE", "DATE", "VERIFIED BY", "TRIED", "PLACE")
AVAILABLE = ("VARIANT", "TYPE", "USER", "SIGNED", "WHAT")
GAP = "  "
UNKNOWN = "unknown"  # to whom is not root
LEAST = 16  # characters of the last column; where there are fewer, it is left out


class Row(NamedTuple):
    """A variant that the node offers. None and empty texts: there is nothing to say."""

    name: str
    type: str = ""
    image: str = ""  # where it is: directory, cache, URL (not downloaded yet), parameter, missing or unknown
    place: str = ""  # path or URL
    size: int | None = None  # bytes
    date: float | None = None  # when it was put there, or when the server last said that it is current; seconds
    verified: str = ""  # by what
    tried: float | None = None  # seconds
    trial: str = ""  # how that ended: ok, or what went wrong
    problem: str = ""  # why it cannot be deployed
    tried_with: float | None = None  # the time of the image's file that was tried; seconds
    is_outdated: bool = False  # the image is another one now


def rows() -> list[Row]:
    """Return the rows of all variants that the node offers. No server is asked."""
    found = []
    for variant, problems in examine(listed(), lambda _: None):
        row = Row(variant.name, variant.settings.image_type, problem=str(problems[0]) if problems else "")
        if not problems:
            row = _image(variant, row)
        found.append(_tried(variant, row))
    return found


def _tried(variant: Variant, row: Row) -> Row:
    trial = last_trial(row.name)
    if not trial:
        return row
    is_there = row.image in ("directory", "cache")
    return row._replace(
        tried=trial.tried,
        trial=trial.problem or "ok",
        tried_with=trial.image_time,
        is_outdated=is_there and trial.is_of_other(image_time(variant)),
    )


def _image(variant: Variant, row: Row) -> Row:
    settings = variant.settings
    if not variant.has_image:
        return row._replace(image="installer" if settings.cdinstall else "parameter")
    if os.geteuid() != 0 and (settings.image_url or not os.access(settings.image_dir, os.R_OK | os.X_OK)):
        return row._replace(image=UNKNOWN)  # what is in the cache is root's alone
    try:
        return _downloaded(settings, row) if settings.image_url else _in_directory(settings, row)
    except Failure as failure:
        return row._replace(image="missing", problem=str(failure))


def _in_directory(settings: Settings, row: Row) -> Row:
    image = imagetypes.find(settings)
    status = os.fstat(image.descriptor)
    for file in (image, image.boot) if image.boot else (image,):
        os.close(file.descriptor)
    wanted = checksums.policy(settings, quote(image.path))
    found = unquote(wanted.file) or ("a checksum beside it" if imagetypes.has_checksum(image.path) else fetch.NOT_FOUND)
    return row._replace(
        image="directory",
        place=image.path,
        size=status.st_size,
        date=status.st_mtime,
        verified=_verified(wanted, found),
    )


def _downloaded(settings: Settings, row: Row) -> Row:
    known = downloaded(settings)
    if not known:
        return row._replace(image="URL", place=shown(settings.image_url))
    url, path, copy = known
    wanted = checksums.policy(settings, url)
    found = [verdict.found for key, verdict in copy.verdicts.items() if wanted.is_covered_by(key)]
    return row._replace(
        image="cache",
        place=path,
        size=os.path.getsize(path),
        date=copy.checked,
        verified=_verified(wanted, *found[-1:]),
    )


def _verified(wanted: checksums.Policy, *found: str) -> str:
    """Return by what an image is verified: `found` is what was published, if anybody looked for that."""
    if not (wanted.pin or wanted.is_published):
        return "nothing: the settings say so"
    return ", ".join([*([wanted.pin.source] if wanted.pin else []), *(found if wanted.is_published else [])])


def as_text(enabled: Sequence[Row], entries: Mapping[str, Entry], arch: str, width: int) -> str:
    """Return both tables, at most `width` characters wide if that is possible; 0: as wide as they are."""
    lines = list(_table(HEADINGS, [_cells(row) for row in enabled], width))
    lines += [log.ascii_only(f"{row.name}: {row.problem}") for row in enabled if row.problem]
    names = {row.name for row in enabled}
    others = [entry for entry in entries.values() if entry.name not in names and arch in entry.urls]
    if others:
        cells = [(one.name, one.type, one.user, "yes" if one.keyring else "", one.title) for one in others]
        lines += ["", "in the catalog (imageos variants enable NAME):", *_table(AVAILABLE, cells, width)]
    return "".join(f"{line}\n" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    ending = "failed" if row.trial != "ok" else "old image" if row.is_outdated else "ok"
    tried = f"{day(row.tried)} {ending}" if row.tried is not None else ""
    size = log.size(row.size) if row.size is not None else ""
    date = day(row.date) if row.date else ""
    return (row.name, row.type, row.image, size, date, _short(row.verified), tried, row.place)


def _short(verified: str) -> str:
    """Return by what an image was verified without the place of that: `SHA256SUMS, signed`."""
    if verified.startswith("nothing"):
        return "nothing"
    file, _, signed = verified.partition(", signed by ")
    return file.rpartition("/")[2] + (", signed" if signed else "")


def _table(headings: Sequence[str], cells: Iterable[Sequence[str]], width: int) -> Iterable[str]:
    """Yield the lines of a table. Its last column is cut to the width, in the middle, or left out."""
    every = [tuple(headings), *([log.ascii_only(text) or "-" for text in row] for row in cells)]
    widths = [max(len(row[column]) for row in every) for column in range(len(headings))]
    left = width - sum(widths[:-1]) - len(GAP) * len(widths[:-1]) if width else widths[-1]
    for *row, last in every:
        shown = [last if len(last) <= left else _cut(last, left)] if left >= min(LEAST, widths[-1]) else []
        yield GAP.join([*(text.ljust(wide) for text, wide in zip(row, widths)), *shown]).rstrip()


def _cut(text: str, length: int) -> str:
    end = (length - 3) * 2 // 3  # the end tells more
    return f"{text[: length - 3 - end]}...{text[len(text) - end :]}"


def as_json(enabled: Sequence[Row], entries: Mapping[str, Entry], arch: str) -> str:
    document = {
        "imageos": __version__,
        "node": os.uname().nodename,
        "arch": arch,
        "enabled": [row._asdict() for row in enabled],
        "catalog": [
            {**entry._asdict(), "urls": {name: shown(url) for name, url in entry.urls.items()}}
            for entry in entries.values()
        ],
    }
    return json.dumps(document, indent=2) + "\n"
