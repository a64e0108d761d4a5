"""Check the variants: their settings, hooks and images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from imageos import ganeti, log
from imageos.checks.report import ERROR, NOTE, OK, Report
from imageos.disks import filesystem
from imageos.disks.layout import Layout
from imageos.errors import Failure
from imageos.hooks import check_overlay, check_scripts, find
from imageos.images import imagetypes, preview
from imageos.images.imagefile import Image
from imageos.node import isolation
from imageos.node.programs import available
from imageos.settings import SITE_DIR, Settings, examine_settings


@dataclass(frozen=True)
class Variant:
    """A variant with its settings, and with its image if this is a file on the node."""

    name: str
    settings: Settings
    image: Image | None = None

    @property
    def has_image(self) -> bool:
        """Return False if OS parameters decide on the image, so that nothing can be checked."""
        return bool(self.settings.image_name or self.settings.image_url) and not self.settings.cdinstall

    @property
    def layout(self) -> Layout | None:
        """The partitions that it makes on a disk of 1 TiB; None if its image brings its own."""
        if not self.has_image or not imagetypes.IMAGE_TYPES[self.settings.image_type].deploy:
            return None
        return filesystem.plan_layout(self.settings.with_sizes(memory=1024), 1 << 40, has_boot=True)


def check_settings(report: Report) -> list[Variant]:
    """Report wrong settings, and return the variants whose settings are right."""
    listing = f"{SITE_DIR}/variants.list"
    try:
        with open(listing, encoding="utf-8", errors="backslashreplace") as file:
            names = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    except OSError as error:
        report.failure(Failure(f"{listing}: {error.strerror}", hint="imageos install"))
        return []
    if not names:
        report.say(ERROR, f"{listing} names no variant: Ganeti takes the OS for invalid")
    warned: list[str] = []
    variants = []
    for name in names:
        try:
            settings, problems = examine_settings({**ganeti.EXAMPLE, "OS_VARIANT": name}, warn=warned.append)
        except Failure as failure:
            problems = [failure]
        for problem in problems:
            report.failure(problem, of=f"variant {name}: ")
        if not problems:
            variants.append(Variant(name, settings))
            report.say(OK, f"variant {name}")
    for warning in dict.fromkeys(warned):
        report.say(NOTE, warning)
    directory = variants[0].settings.variants_dir if variants else Settings.variants_dir
    with suppress(OSError):
        for name in sorted(os.listdir(directory)):
            if name.endswith(".conf") and name[: -len(".conf")] not in names:
                report.say(NOTE, f"{directory}/{name} is not in {listing}: Ganeti does not offer it")
    return variants


def check_hooks(report: Report, variants: Iterable[Variant]) -> None:
    for directory in sorted({variant.settings.customize_dir for variant in variants}):
        if not os.path.lexists(directory):
            report.say(NOTE, f"there is no CUSTOMIZE_DIR {directory}: no hook runs", f"mkdir -p {directory}")
            continue
        try:
            names = find(directory)
            check_scripts(directory, names)
            report.say(OK, f"hooks: {' '.join(names) or 'none is enabled'}")
            for name in sorted(os.listdir(directory)):
                path = f"{directory}/{name}"
                if name not in names and os.path.isfile(path) and os.access(path, os.X_OK):
                    report.say(NOTE, f"hook {path} does not run: only letters, digits, _ and - may be in its name")
        except OSError as error:
            report.failure(Failure(f"CUSTOMIZE_DIR {directory}: {error.strerror}"))
        except Failure as failure:
            report.failure(failure)


def check_overlays(report: Report, variants: Iterable[Variant]) -> None:
    for variant in variants:
        try:
            if variant.settings.overlay:
                check_overlay(variant.settings, find(variant.settings.customize_dir))
        except Failure as failure:
            report.failure(failure, of=f"variant {variant.name}: ")


def check_images(report: Report, variants: Iterable[Variant]) -> list[Variant]:
    """Report on the images, and return the variants with those that are files on this node."""
    return [check_image(report, variant) for variant in variants]


def check_image(report: Report, variant: Variant) -> Variant:
    settings = variant.settings
    if not variant.has_image:
        reason = "CDINSTALL=yes" if settings.cdinstall else "it takes what the OS parameter image_name says"
        report.say(OK, f"variant {variant.name} has no image of its own: {reason}")
        return variant
    try:
        if settings.image_url:
            check_download(report, variant)
            return variant
        image = imagetypes.find(settings)
        variant = dataclasses.replace(variant, image=image)
        report_image(report, variant, image)
    except Failure as failure:
        report.failure(failure, of=f"variant {variant.name}: ")
    return variant


def report_image(report: Report, variant: Variant, image: Image) -> None:
    files = (image, image.boot) if image.boot else (image,)
    missing = sorted({program for file in files for program in file.decompress[:1] if not available(program)})
    if missing:
        report.say(NOTE, f"variant {variant.name}: {image.path} cannot be looked at without {' '.join(missing)}")
        return
    image_type = imagetypes.IMAGE_TYPES[variant.settings.image_type]
    imagetypes.check(image_type, image)
    imagetypes.verify(variant.settings, image)
    if not image_type.deploy and os.geteuid() == 0:
        isolation.call_apart(lambda: _look(variant.settings, image))
    for file in files:
        report.say(OK, f"variant {variant.name}: {file.path}, {log.size(file.size)}")


def _look(settings: Settings, image: Image) -> None:
    with log.muted():  # the report says it
        preview.check(settings, image)


def check_download(report: Report, variant: Variant) -> None:
    from imageos.images import fetch, urls

    url = urls.shown(variant.settings.image_url)
    if not available("curl"):
        report.say(NOTE, f"variant {variant.name}: {url} cannot be looked at without curl")
        return
    reason = imagetypes.why_unreachable(variant.settings)
    if not reason:
        report.say(OK, f"variant {variant.name}: {url}")
        return
    if any(fetch.is_kept(variant.settings, url) for url in imagetypes.urls(variant.settings)):
        report.say(NOTE, f"variant {variant.name}: {reason}; there is a copy in {variant.settings.cache_dir}")
    else:
        raise Failure(reason, hint="see whether the server runs, and whether this node reaches it")


def name_variants(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return f"{'variant' if len(unique) == 1 else 'variants'} {', '.join(unique)}"
