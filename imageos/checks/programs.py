"""Check the programs that deployments run: whether Ganeti's PATH has them, and what dump and restore cannot do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress

from imageos import hooks
from imageos.checks.report import Finding, error, note, ok
from imageos.checks.variants import Variant, name_variants
from imageos.disks import filesystem
from imageos.errors import Failure
from imageos.images import dump
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.node.programs import PACKAGES, available
from imageos.settings import Settings

ALWAYS = ("sfdisk", "blkid", "tar")  # for any variant, and for backups


def check_programs(variants: Iterable[Variant], callers_path: str) -> Iterator[Finding]:
    """Report an error for a missing program that a variant needs, and a note for any other.

    `callers_path` is where the caller would find it.
    """
    needed: dict[str, list[str]] = {program: [] for program in ALWAYS}
    for variant in variants:
        for program in programs_for(variant):
            needed.setdefault(program, []).append(variant.name)
    missing: dict[str, list[str]] = {}
    for program in dict.fromkeys([*needed, *PACKAGES]):
        package = PACKAGES.get(program, program)
        if available(program):
            version = dump.version(program) if package == "dump" else None
            yield ok(f"{program} 0.4b{version}" if version else program)
            for limit in limits(program, version):
                yield note(limit)
        elif program not in needed:
            missing.setdefault(package, []).append(program)
        else:
            elsewhere = shutil.which(program, path=callers_path)
            where = f"is in {os.path.dirname(elsewhere)}, where Ganeti does not look" if elsewhere else "is missing"
            users = f": needed by {name_variants(needed[program])}" if needed[program] else ""
            yield error(f"{program} {where}{users}", f"install {package}")
    for package, programs in missing.items():
        yield note(f"{' '.join(programs)} missing: no variant needs it", f"install {package}")


def limits(program: str, version: int | None) -> Iterator[str]:
    """Yield the limits of this version of dump(8) or restore(8)."""
    if version is None:
        return
    is_packed, name = version >= dump.PACKED, f"{program} 0.4b{version}"
    if program == "dump":
        if is_packed:
            yield f"{name} makes what an older restore (before Debian 13) cannot read"
        return
    if not is_packed:
        yield f"{name} cannot read what dump 0.4b{dump.PACKED} (Debian 13) makes"
    lost = "capabilities of files" if is_packed else "attributes of directories"
    yield f"{name} loses {lost}: create and import set them again"


def programs_for(variant: Variant) -> Iterator[str]:
    if not variant.has_image:
        return
    settings, layout, image = variant.settings, variant.layout, None
    if layout:
        yield from filesystem.programs(layout, settings.filesystem)
    with ExitStack() as stack:
        with suppress(Failure):  # which check_images reports
            image = stack.enter_context(variant.opened())
        yield from IMAGE_TYPES[settings.image_type].programs(image)
    if layout and layout.find("esp") and "grub" in enabled_hooks(settings):
        yield "mcopy"
    for file in (image, image.boot) if image else ():
        yield from file.decompress[:1] if file else ()
    if settings.image_url:
        yield "curl"
    if settings.image_keyring:
        yield "gpgv"


def enabled_hooks(settings: Settings) -> list[str]:
    """Return the hooks that run; none if they cannot be listed, which check_hooks reports."""
    with suppress(Failure):
        return hooks.find(settings.customize_dir)
    return []
