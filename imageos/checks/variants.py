"""The variants: their settings, their hooks, their images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from imageos import ganeti, log, settings
from imageos.checks import wholeness
from imageos.checks.report import ERROR, NOTE, OK, Report
from imageos.disks import layout
from imageos.disks.layout import MIB, Layout
from imageos.errors import Failure
from imageos.hooks import check_overlay, find
from imageos.images import imagetypes
from imageos.images.imagefile import Image
from imageos.run import available
from imageos.settings import Settings


@dataclass(frozen=True)
class Variant:
    """A variant with the settings that it has, and its image if that is a file on this node."""

    name: str
    known: Settings
    image: Image | None = None

    @property
    def has_image(self) -> bool:
        """Without one it depends on OS parameters, and nothing can be said of it."""
        return bool(self.known.image_name or self.known.image_url) and not self.known.cdinstall

    @property
    def layout(self) -> Layout | None:
        """The partitions that it makes on a large disk; None if its image has its own."""
        if not self.has_image or not imagetypes.IMAGE_TYPES[self.known.image_type].deploy:
            return None
        sizes = self.known.resolved(memory=1024)
        return layout.plan(
            self.known.partition_table,
            1 << 40,
            boot=(sizes.boot_size or 0) * MIB,
            swap=(sizes.swap_size or 0) * MIB if self.known.swap else 0,
            arch=self.known.arch,
            smallest_root=0,
        )


def check_settings(report: Report) -> list[Variant]:
    """The variants whose settings are right."""
    listing = f"{settings.SITE_DIR}/variants.list"
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
            known, problems = settings.examine({**ganeti.EXAMPLE, "OS_VARIANT": name}, warn=warned.append)
        except Failure as failure:
            problems = [failure]
        for problem in problems:
            report.failure(problem, of=f"variant {name}: ")
        if not problems:
            variants.append(Variant(name, known))
            report.say(OK, f"variant {name}")
    for warning in dict.fromkeys(warned):
        report.say(NOTE, warning)
    directory = variants[0].known.variants_dir if variants else settings.Settings.variants_dir
    with suppress(OSError):
        for name in sorted(os.listdir(directory)):
            if name.endswith(".conf") and name[: -len(".conf")] not in names:
                report.say(NOTE, f"{directory}/{name} is not in {listing}: Ganeti does not offer it")
    return variants


def check_hooks(report: Report, variants: Iterable[Variant]) -> None:
    for directory in sorted({variant.known.customize_dir for variant in variants}):
        if not os.path.lexists(directory):
            report.say(NOTE, f"there is no CUSTOMIZE_DIR {directory}: no hook runs", f"mkdir -p {directory}")
            continue
        try:
            names = find(directory)
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
            check_overlay(variant.known)
        except Failure as failure:
            report.failure(failure, of=f"variant {variant.name}: ")


def check_images(report: Report, variants: Iterable[Variant]) -> list[Variant]:
    """The variants with what is known of their images now."""
    return [check_image(report, variant) for variant in variants]


def check_image(report: Report, variant: Variant) -> Variant:
    known = variant.known
    if not variant.has_image:
        why = "CDINSTALL=yes" if known.cdinstall else "it takes what the OS parameter image_name says"
        report.say(OK, f"variant {variant.name} has no image of its own: {why}")
        return variant
    try:
        if known.image_url:
            check_download(report, variant)
            return variant
        image = imagetypes.find(known)
        variant = dataclasses.replace(variant, image=image)
        report_image(report, variant, image)
        if image.boot:
            report_image(report, variant, image.boot)
    except Failure as failure:
        report.failure(failure, of=f"variant {variant.name}: ")
    return variant


def report_image(report: Report, variant: Variant, image: Image) -> None:
    program = next(iter(image.decompress), None)
    if program and not available(program):
        report.say(NOTE, f"variant {variant.name}: {image.path} cannot be looked at without {program}")
        return
    imagetypes.IMAGE_TYPES[variant.known.image_type].check(image)
    truncated = wholeness.why_truncated(image)
    if truncated:
        raise Failure(f"image {image.path} is truncated or damaged at its end: {truncated}", hint="copy it again")
    report.say(OK, f"variant {variant.name}: {image.path}, {log.size(image.size)}")


def check_download(report: Report, variant: Variant) -> None:
    from imageos.images import fetch, web  # bring http and TLS

    url = web.shown(variant.known.image_url)
    reason = imagetypes.why_unreachable(variant.known)
    if not reason:
        report.say(OK, f"variant {variant.name}: {url}")
        return
    names = imagetypes.IMAGE_TYPES[variant.known.image_type].suffixes
    stem = f"{variant.known.image_name}-{variant.known.arch}"
    urls = fetch.urls(variant.known, [stem + suffix for suffix in names])
    if any(fetch.is_kept(variant.known, one) for one in urls):
        report.say(NOTE, f"variant {variant.name}: {reason}; there is a copy in {variant.known.cache_dir}")
    else:
        raise Failure(reason, hint="see whether the server runs, and whether this node reaches it")


def listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return f"{'variant' if len(unique) == 1 else 'variants'} {', '.join(unique)}"
