"""Check the variants: their settings, hooks and images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from imageos import ganeti, log
from imageos.checks.report import Finding, error, failed, note, ok
from imageos.disks import filesystem
from imageos.disks.layout import Layout
from imageos.errors import Failure, explained
from imageos.hooks import check_overlay, check_scripts, find
from imageos.images import imagetypes, preview
from imageos.images.cache import Copy
from imageos.images.imagefile import Image
from imageos.node import isolation
from imageos.node.programs import available
from imageos.settings import SITE_DIR, TABLE, Settings, examine_each
from imageos.variants.record import last_trial

LISTING = f"{SITE_DIR}/variants.list"


class Variant(NamedTuple):
    name: str
    settings: Settings

    @property
    def has_image(self) -> bool:
        """Return False if OS parameters decide on the image, so that nothing can be checked."""
        return bool(self.settings.image_name or self.settings.image_url) and not self.settings.cdinstall

    @contextmanager
    def opened(self) -> Iterator[Image | None]:
        """Yield the image, open for as long as it is looked at; None if it is no file on this node."""
        image = imagetypes.find(self.settings) if self.has_image and not self.settings.image_url else None
        try:
            yield image
        finally:
            for file in filter(None, (image, image.boot) if image else ()):
                os.close(file.descriptor)

    @property
    def of_image(self) -> tuple[object, ...]:
        """What the checks of an image depend on: variants that have the same share one check."""
        settings = self.settings
        names = [name for name in TABLE if name.startswith("image_")]
        about = [getattr(settings, name) for name in (*names, "cdinstall", "arch", "cache_dir", "nomount")]
        return (*about, *sorted(settings.unknown.items()))

    @property
    def layout(self) -> Layout | None:
        """The partitions that it makes on a disk of 1 TiB; None if its image brings its own."""
        if not self.has_image or not imagetypes.IMAGE_TYPES[self.settings.image_type].deploy:
            return None
        return filesystem.plan_layout(self.settings.with_sizes(memory=1024), 1 << 40, has_boot=True)


def listed() -> list[str]:
    """Return the names of the variants that Ganeti offers; fail if there is no list of them."""
    with explained(LISTING, "imageos install"), open(LISTING, encoding="utf-8", errors="backslashreplace") as file:
        lines = [line.strip() for line in file]  # as Ganeti reads it
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def examine(names: Sequence[str], warn: Callable[[str], None]) -> Iterator[tuple[Variant, list[Failure]]]:
    """Yield each variant, and what is wrong with its settings."""
    environs = [{**ganeti.EXAMPLE, "OS_VARIANT": name} for name in names]
    for name, (settings, problems) in zip(names, examine_each(environs, warn)):
        yield Variant(name, settings), problems


def check_settings(variants: list[Variant]) -> Iterator[Finding]:
    """Report wrong settings, and add the variants whose settings are right to `variants`."""
    names = listed()
    if not names:
        yield error(f"{LISTING} names no variant: Ganeti takes the OS for invalid")
    warned: list[str] = []
    for variant, problems in examine(names, warned.append):
        for problem in problems:
            yield failed(problem, of=f"variant {variant.name}: ")
        if not problems:
            variants.append(variant)
            yield ok(f"variant {variant.name}")
    for warning in dict.fromkeys(warned):
        yield note(warning)
    offered = {*names}
    directory = variants[0].settings.variants_dir if variants else Settings().variants_dir
    with suppress(OSError):
        for name in sorted(os.listdir(directory)):
            if name.endswith(".conf") and name[: -len(".conf")] not in offered:
                yield note(f"{directory}/{name} is not in {LISTING}: Ganeti does not offer it")


def check_hooks(variants: Iterable[Variant]) -> Iterator[Finding]:
    for directory in sorted({variant.settings.customize_dir for variant in variants}):
        if not os.path.lexists(directory):
            yield note(f"there is no CUSTOMIZE_DIR {directory}: no hook runs", f"mkdir -p {directory}")
            continue
        try:
            names = find(directory)
            check_scripts(directory, names)
            yield ok(f"hooks: {' '.join(names) or 'none is enabled'}")
            for name in sorted(os.listdir(directory)):
                path = f"{directory}/{name}"
                if name not in names and os.path.isfile(path) and os.access(path, os.X_OK):
                    yield note(f"hook {path} does not run: only letters, digits, _ and - may be in its name")
        except OSError as problem:
            yield failed(Failure(f"CUSTOMIZE_DIR {directory}: {problem.strerror}"))
        except Failure as failure:
            yield failed(failure)


def check_overlays(variants: Iterable[Variant]) -> Iterator[Finding]:
    for variant in variants:
        try:
            if variant.settings.overlay:
                check_overlay(variant.settings, find(variant.settings.customize_dir))
        except Failure as failure:
            yield failed(failure, of=f"variant {variant.name}: ")


def check_images(variants: Iterable[Variant]) -> Iterator[Finding]:
    checked: dict[tuple[object, ...], list[Finding]] = {}
    for variant in variants:
        found = checked.setdefault(variant.of_image, [])
        found += [] if found else _of_image(variant)
        yield from (finding._replace(what=f"variant {variant.name}{finding.what}") for finding in found)


def _of_image(variant: Variant) -> Iterator[Finding]:
    """Yield what is found of a variant's image, without the name of the variant."""
    try:
        with variant.opened() as image:
            if image:
                yield from check_image(variant.settings, image)
            elif variant.has_image:
                yield check_download(variant.settings)
            else:
                is_installer = variant.settings.cdinstall
                reason = "CDINSTALL=yes" if is_installer else "it takes what the OS parameter image_name says"
                yield ok(f" has no image of its own: {reason}")
    except Failure as failure:
        yield failed(failure, of=": ")


def check_trials(variants: Iterable[Variant]) -> Iterator[Finding]:
    """Say how the last trial of each variant ended, and whether its image is another now."""
    for variant in variants:
        trial = last_trial(variant.name)
        if not trial:
            continue
        now = None
        with suppress(Failure):  # check_images names it
            now = image_time(variant)
        is_other = trial.is_ok and trial.is_of_other(now)
        what = f"variant {variant.name} was {trial}{'; its image is another now' if is_other else ''}"
        yield note(what, f"imageos variants try {variant.name}") if is_other or not trial.is_ok else ok(what)


def image_time(variant: Variant) -> float | None:
    """Return when the image's file on this node was last changed; None if there is none."""
    with variant.opened() as image:
        if image:
            return os.fstat(image.descriptor).st_mtime
    copy = downloaded(variant.settings) if variant.has_image else None
    return os.stat(copy[1]).st_mtime if copy else None


def downloaded(settings: Settings) -> tuple[str, str, Copy] | None:
    """Return the URL, the path and the facts of the copy of an image in CACHE_DIR; None if there is none."""
    from imageos.images import cache, fetch

    for url in imagetypes.urls(settings):
        path = f"{settings.cache_dir}/{fetch.cache_name(url)}"
        copy = cache.load(path, url)
        if copy:
            return url, path, copy
    return None


def check_image(settings: Settings, image: Image) -> Iterator[Finding]:
    files = (image, image.boot) if image.boot else (image,)
    missing = sorted({program for file in files for program in file.decompress[:1] if not available(program)})
    if missing:
        yield note(f": {image.path} cannot be looked at without {' '.join(missing)}")
        return
    image_type = imagetypes.IMAGE_TYPES[settings.image_type]
    imagetypes.check(image_type, image)
    imagetypes.verify(settings, image)
    if not image_type.deploy and os.geteuid() == 0:
        isolation.call_apart(lambda: _look(settings, image))
    for file in files:
        yield ok(f": {file.path}, {log.size(file.size)}")


def _look(settings: Settings, image: Image) -> None:
    with log.muted():  # the report says it
        preview.check(settings, image)


def check_download(settings: Settings) -> Finding:
    from imageos.images import fetch, urls

    url = urls.shown(settings.image_url)
    if not available("curl"):
        return note(f": {url} cannot be looked at without curl")
    reason = imagetypes.why_unreachable(settings)
    if not reason:
        return ok(f": {url}")
    if any(fetch.is_kept(settings, url) for url in imagetypes.urls(settings)):
        return note(f": {reason}; there is a copy in {settings.cache_dir}")
    raise Failure(reason, hint="see whether the server runs, and whether this node reaches it")


def name_variants(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return f"{'variant' if len(unique) == 1 else 'variants'} {', '.join(unique)}"
