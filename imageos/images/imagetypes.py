"""Images: found by name, checked before the disk is touched, deployed. One table of their types."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from imageos.errors import Failure
from imageos.images import diskimage, dump, tarball
from imageos.images.imagefile import Image, open_image
from imageos.settings import Settings


@dataclass(frozen=True)
class ImageType:
    """What IMAGE_TYPE stands for."""

    suffixes: tuple[str, ...]  # behind NAME-ARCH, in the order in which they are looked for
    check: Callable[[Image], None]
    deploy: Callable[[Image, str], None] | None = None  # into a directory; None: it is a whole disk


IMAGE_TYPES = {
    "tarball": ImageType(tarball.SUFFIXES, tarball.check, tarball.deploy),
    "dump": ImageType(dump.SUFFIXES, dump.check, dump.deploy),
    "qemu": ImageType(diskimage.ANY_SUFFIXES, diskimage.check),
    "qcow2": ImageType(diskimage.QCOW2_SUFFIXES, diskimage.check_qcow2),
    "raw": ImageType(diskimage.RAW_SUFFIXES, diskimage.check_raw),
}


def find(settings: Settings, with_boot: bool = True) -> Image:
    """The image that the settings name, opened; Failure says which files were looked for.

    `with_boot`: of a dump, the file for /boot too, if there is one.
    """
    if settings.image_url:
        return _find_at_url(settings, with_boot)
    _require_name(settings)
    suffixes = IMAGE_TYPES[settings.image_type].suffixes
    stem = f"{settings.image_dir}/{settings.image_name}-{settings.arch}"
    path = next((stem + suffix for suffix in suffixes if os.path.lexists(stem + suffix)), None)
    if path is None:
        raise Failure(
            f"cannot find image {stem}{suffixes[0]} (nor {', '.join(suffixes[1:])})",
            hint=_others(settings),
        )
    image = open_image(path)
    boot_path = dump.boot_path(path)
    if settings.image_type == "dump" and with_boot and os.path.lexists(boot_path):
        image = dataclasses.replace(image, boot=open_image(boot_path))
    return image


def _find_at_url(settings: Settings, with_boot: bool) -> Image:
    from imageos.images import fetch, web  # bring http and TLS, which an image in IMAGE_DIR does not need

    if not fetch.is_one_image(settings.image_url):
        _require_name(settings)
    image = open_image(*fetch.fetched(settings, _names(settings)))
    if settings.image_type == "dump" and with_boot:
        with suppress(web.Missing):
            boot = fetch.fetched(settings, [dump.boot_path(name) for name in _names(settings)])
            image = dataclasses.replace(image, boot=open_image(*boot))
    return image


def why_unreachable(settings: Settings) -> str | None:
    """What stands in the way of a download from IMAGE_URL now; None if the server has the image."""
    from imageos.images import fetch, web

    server = web.Web(settings.unknown)
    for url in fetch.urls(settings, _names(settings)):
        try:
            server.headers(url)
            return None
        except web.Missing as missing:
            reason = str(missing)
        except Failure as failure:
            return str(failure)
    return reason


def _names(settings: Settings) -> list[str]:
    """The files in which the image may be."""
    suffixes = IMAGE_TYPES[settings.image_type].suffixes
    return [f"{settings.image_name}-{settings.arch}{suffix}" for suffix in suffixes]


def _require_name(settings: Settings) -> None:
    if not settings.image_name:
        raise Failure("IMAGE_NAME is not set", hint="set it in the variant's file, or as the OS parameter image_name")


def _others(settings: Settings) -> str:
    """A hint that lists what is there instead."""
    try:
        names: list[str] = sorted(os.listdir(settings.image_dir))
    except OSError as error:
        return f"IMAGE_DIR {settings.image_dir}: {error.strerror}"
    there = ", ".join(_shown(names)) or "no image"
    return f"copy it there, or set IMAGE_NAME, ARCH, IMAGE_TYPE or IMAGE_DIR; {settings.image_dir} holds {there}"


def _shown(names: list[str], most: int = 8) -> tuple[str, ...]:
    return (*names[:most], f"and {len(names) - most} more") if len(names) > most else tuple(names)
