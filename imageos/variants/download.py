"""Fetch the images of variants before anybody needs them: as create does, for all variants of the node."""

from __future__ import annotations

import os
from collections.abc import Sequence

from imageos import log
from imageos.checks.variants import Variant, examine, listed
from imageos.errors import Failure, explained
from imageos.images import cache, fetch, imagetypes
from imageos.settings import is_pin
from imageos.variants.catalog import nearest


def fetch_all(names: Sequence[str]) -> None:
    """Download and verify the images of the variants `names`, or of all; fail in the end if one has failed."""
    wanted = list(dict.fromkeys(names)) or listed()
    failed: dict[str, Failure] = {}
    outcomes: dict[tuple[object, ...], str | Failure] = {}
    enabled = listed()
    for variant, problems in examine(wanted, log.warning):
        try:
            log.info(f"variant {variant.name}{_fetched(_right(variant, problems, enabled), outcomes)}")
        except Failure as failure:
            failed[variant.name] = failure
            report(f"variant {variant.name}", failure)
    if failed:
        what = f"{len(failed)} of {len(wanted)} variants could not be fetched: {', '.join(failed)}"
        hint = "run it with sudo" if os.geteuid() else None
        if len(failed) == 1:
            (only,) = failed.values()
            raise Failure(f"{what}; {only}", hint or only.hint)
        raise Failure(what, hint)


def _right(variant: Variant, problems: Sequence[Failure], enabled: Sequence[str]) -> Variant:
    check_enabled(variant.name, enabled)
    if problems:
        raise problems[0]
    return variant


def check_enabled(name: str, enabled: Sequence[str]) -> None:
    if name not in enabled:
        near = nearest(name, enabled)
        raise Failure(
            f"{name} is not enabled",
            hint=f"imageos variants enable {name}{f', or did you mean {near}?' if near else ''}",
        )


def _fetched(variant: Variant, outcomes: dict[tuple[object, ...], str | Failure]) -> str:
    """Return what is to be said of a variant. Those that share an image share an outcome: its server is asked once."""
    if variant.of_image not in outcomes:
        try:
            outcomes[variant.of_image] = fetch_one(variant)
        except Failure as failure:
            outcomes[variant.of_image] = failure
    outcome = outcomes[variant.of_image]
    if isinstance(outcome, Failure):
        raise outcome
    return outcome


def fetch_one(variant: Variant) -> str:
    settings = variant.settings
    if not variant.has_image:
        return " has no image of its own"
    if settings.image_url and settings.image_cleanup:
        return ": IMAGE_CLEANUP=yes, so downloads are not kept"
    image = imagetypes.find(settings)
    try:
        imagetypes.check_found(settings, image)
        imagetypes.verify(settings, image)
    finally:
        for file in (image, image.boot) if image.boot else (image,):
            os.close(file.descriptor)
    return f" is on this node: {image.path}, {log.size(image.size)}"


def report(what: str, failure: Failure) -> None:
    """Log a failure that is not the end."""
    for line in failure.details:
        log.info(f"| {line}")
    if failure.hint:
        log.info(f"hint: {failure.hint}")
    log.info(f"{what}: {failure}")


def prune() -> None:
    """Remove from the caches what no enabled variant names; fail if a variant does not say what it names."""
    variants = []
    for variant, problems in examine(listed(), log.warning):
        if problems:
            raise Failure(f"nothing is removed: variant {variant.name}: {problems[0]}", hint=problems[0].hint)
        variants.append(variant)
    keep = {fetch.cache_name(url) for variant in variants for url in _urls(variant)}
    for directory in sorted({variant.settings.cache_dir for variant in variants}):
        total = 0
        with explained(f"CACHE_DIR {directory}"):
            for name, size in cache.prune(directory, keep):
                log.info(f"{directory}/{name}: " + ("in use, kept" if size is None else f"removed, {log.size(size)}"))
                total += size or 0
        log.info(f"{log.size(total)} of {directory} are free again" if total else f"{directory}: nothing to remove")


def _urls(variant: Variant) -> list[str]:
    """Return the URLs at which the images of a variant may be."""
    settings = variant.settings
    if not variant.has_image or not settings.image_url:
        return []
    boot_path = imagetypes.IMAGE_TYPES[settings.image_type].boot_path
    boot = imagetypes.urls(settings, boot_path) if boot_path and not is_pin(settings.image_checksum) else []
    return [*imagetypes.urls(settings), *boot]
