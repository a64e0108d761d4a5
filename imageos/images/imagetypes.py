"""Find images by name, and check them before the disk is touched. One table of their types."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from imageos import log
from imageos.errors import Failure
from imageos.images import archive, diskimage, dump, formats, pages, tarball, wholeness
from imageos.images.imagefile import AGAIN, Image, compression_of, open_image
from imageos.images.urls import CHECKSUMS, SIGNATURES, cleaned, shown
from imageos.node import linux
from imageos.node.programs import require
from imageos.settings import Settings, is_pin


class ImageType(NamedTuple):
    """One type of image, by its name in IMAGE_TYPE."""

    suffixes: tuple[str, ...]  # behind NAME-ARCH, in the order in which they are looked for
    url_ends: tuple[str, ...]  # behind a dot, before that of a compression, at the end of the URL of one image
    check: Callable[[Image], None]
    programs: Callable[[Image | None], Sequence[str]]  # that deploy it; of a file not seen yet, those that are certain
    deploy: Callable[[Image, str], None] | None = None  # into a directory; None: it is a whole disk
    boot_path: Callable[[str], str] | None = None  # path -> that of the image of /boot which belongs to it


IMAGE_TYPES = {
    "tarball": ImageType(tarball.SUFFIXES, ("tar", "tgz", "txz"), tarball.check, lambda _: ["tar"], tarball.deploy),
    "dump": ImageType(dump.SUFFIXES, ("dump",), dump.check, lambda _: dump.RESTORE[:1], dump.deploy, dump.boot_path),
    "qemu": ImageType(
        diskimage.suffixes(diskimage.ANY_SUFFIXES, diskimage.OTHERS),
        diskimage.URL_ENDS,
        diskimage.check,
        diskimage.programs,
    ),
    "qcow2": ImageType(
        diskimage.suffixes(diskimage.QCOW2_SUFFIXES, diskimage.ARCHIVES),
        diskimage.URL_ENDS,
        diskimage.check_qcow2,
        lambda _: ["qemu-img"],
    ),
    "raw": ImageType(
        diskimage.suffixes(diskimage.RAW_SUFFIXES, diskimage.ARCHIVES),
        diskimage.URL_ENDS,
        diskimage.check_raw,
        lambda _: ["dd"],
    ),
}
# A URL that ends so is one image; any other is the directory of the images.
ONE_IMAGE = re.compile(
    rf"\.({'|'.join(end for image_type in IMAGE_TYPES.values() for end in image_type.url_ends)})"
    r"(\.(gz|zst|xz|bz2|lz4))?$",
    re.IGNORECASE,
)


def find(settings: Settings, with_boot: bool = True, disk_size: int | None = None) -> Image:
    """Return the image that the settings name, opened; Failure says which files were looked for.

    `with_boot`: with the image of /boot, if there is one. `disk_size`: do not download what is seen to be larger.
    """
    if settings.image_url:
        return _find_at_url(settings, with_boot, disk_size)
    _require_name(settings)
    image_type = IMAGE_TYPES[settings.image_type]
    paths = [f"{settings.image_dir}/{name}" for name in _names(settings)]
    path = next((path for path in paths if os.path.lexists(path)), None)
    if path is None:
        others = log.few(image_type.suffixes[1:])
        raise Failure(f"cannot find image {paths[0]} (nor {others})", hint=_others(settings))
    image = open_image(path)
    boot_path = image_type.boot_path(path) if image_type.boot_path and with_boot else ""
    if os.path.lexists(boot_path):
        image = image._replace(boot=open_image(boot_path))
    return image


def check(image_type: ImageType, image: Image) -> None:
    """Fail unless an image is of its type and whole, as far as can be seen without unpacking it."""
    require(*image.decompress[:1])
    wholeness.check_packed(image)
    if image.whole:
        check_page(image)
    if image_type.deploy == tarball.deploy and archive.begins_with_disk(image):
        raise Failure(f"image {image.path} is an archive of a disk image, not of a system", hint="set IMAGE_TYPE=qemu")
    image_type.check(image)
    if image.whole:
        check_kind(image)
    wholeness.check(image)
    if not image_type.deploy:
        diskimage.check_readable(image)
    if image.boot:
        check(image_type, image.boot)


def check_found(settings: Settings, image: Image) -> None:
    """Fail as `check` does; a copy that the server's word keeps in the cache says how to get rid of it."""
    try:
        check(IMAGE_TYPES[settings.image_type], image)
    except Failure as failure:
        if settings.image_url and failure.hint == AGAIN:
            failure.hint = f"rm {image.path}: then it is downloaded again"
        raise


def verify(settings: Settings, image: Image) -> None:
    """Fail if an image of IMAGE_DIR has another checksum than it must have. Reads all of it, if it has to have one."""
    if settings.image_url:
        return  # it was verified when it was downloaded
    if image.boot and is_pin(settings.image_checksum):
        raise _one_of_two()
    for file in (image, image.boot) if image.boot else (image,):
        if settings.image_checksum or has_checksum(file.path):
            from imageos.images import checksums  # late: most images have none

            checksums.verify_file(settings, file.path, file.descriptor)


def has_checksum(path: str) -> bool:
    """Return True if a checksum or a signature is beside an image in IMAGE_DIR."""
    directory, name = os.path.split(path)
    patterns = [*(pattern for pattern, _ in CHECKSUMS), *(f"{{}}{suffix}" for suffix in SIGNATURES)]
    return any(os.path.lexists(f"{directory}/{pattern.format(name)}") for pattern in patterns)


def _one_of_two() -> Failure:
    return Failure(
        "IMAGE_CHECKSUM is of one file, but a dump consists of two", hint="put a SHA256SUMS beside them instead"
    )


def ready(settings: Settings, image: Image, disk_size: int) -> Image:
    """Return an image checked, and as it is deployed: a disk image that has to be unpacked before is unpacked."""
    image_type = IMAGE_TYPES[settings.image_type]
    check_found(settings, image)
    verify(settings, image)
    plain = image if image_type.deploy else diskimage.ready(image, settings.cache_dir, disk_size)
    if plain is not image:
        check(image_type, plain)
    return plain


def _find_at_url(settings: Settings, with_boot: bool, disk_size: int | None) -> Image:
    from imageos.images import curl, fetch  # what an image in IMAGE_DIR does not need

    if not ONE_IMAGE.search(urlsplit(cleaned(settings.image_url)).path):
        _require_name(settings)

    def judge(url: str, beginning: bytes, size: int) -> None:
        check_beginning(IMAGE_TYPES[settings.image_type], url, beginning, size, disk_size)

    candidates = urls(settings)
    image = open_image(*fetch.fetched(settings, candidates, judge))
    boot_path = IMAGE_TYPES[settings.image_type].boot_path
    # the URL of one dump need not say that it is of the root: then nothing tells where that of /boot is
    of_boot = [url for url in urls(settings, boot_path) if url not in candidates] if boot_path and with_boot else []
    if of_boot:
        with suppress(curl.Missing):
            boot = fetch.fetched(settings, of_boot, judge)
            image = image._replace(boot=open_image(*boot))
    return image


def check_beginning(image_type: ImageType, url: str, beginning: bytes, size: int, disk_size: int | None) -> None:
    """Fail if an image that begins so, and has at least `size` bytes, is known not to be what it should."""
    with linux.closing(os.memfd_create("imageos", os.MFD_CLOEXEC)) as descriptor:
        os.pwrite(descriptor, beginning, 0)
        image = open_image(url, descriptor)._replace(size=size, whole=False)
        if not image.compression:
            check_page(image)
        elif image_type.deploy:
            return  # its beginning cannot be unpacked alone
        image_type.check(image)
        if not image.compression:
            check_kind(image)
        if disk_size is not None and not image_type.deploy:
            diskimage.check_size(image, disk_size)


def check_page(image: Image) -> None:
    """Fail if an image is a web page, also packed."""
    _check_is_not(image, pages.kind(image.start) if pages.is_page(image.start) else "")


def check_kind(image: Image) -> None:
    """Fail if an image that its type takes is another thing, also packed: nobody else would notice with NOMOUNT."""
    kind = pages.kind(image.start)
    if kind in pages.MARKS.values():
        raise Failure(f"image {image.path} is {kind}", hint="unpack it, and deploy the disk image that is in it")
    _check_is_not(image, kind)
    if image.stages and compression_of(image.start):
        raise Failure(f"image {image.path} is compressed twice", hint="unpack it once")


def _check_is_not(image: Image, kind: str) -> None:
    if kind and not formats.recognise(image.read, min(image.size, len(image.start))):
        raise Failure(
            f"image {image.path} is {kind}, which a server sends instead of an image",
            hint="look at it with a browser: a login page, or an error that the server sends as if all were well",
        )


def why_unreachable(settings: Settings) -> str | None:
    """Return what prevents a download from IMAGE_URL now; None if the server has the image."""
    from imageos.images import curl, web

    server = web.Web(settings.unknown)
    for url in server.in_turn(urls(settings)):
        try:
            server.headers(url)
            return None
        except curl.Missing as missing:
            reason = str(missing)
        except Failure as failure:
            return str(failure)
    return reason


def urls(settings: Settings, changed: Callable[[str], str] = str) -> list[str]:
    """Return where the image may be; `changed` is applied to what its path or name is."""
    image_type, url = IMAGE_TYPES[settings.image_type], urlsplit(cleaned(settings.image_url))
    if image_type.boot_path and is_pin(settings.image_checksum):
        raise _one_of_two()
    one = ONE_IMAGE.search(url.path)
    if not one:
        directory = url.path.rstrip("/")
        return [url._replace(path=f"{directory}/{quote(changed(name))}").geturl() for name in _names(settings)]
    end = one[1].lower()
    if end not in image_type.url_ends:
        fitting = next(name for name, other in IMAGE_TYPES.items() if end in other.url_ends)
        raise Failure(
            f"IMAGE_URL {shown(settings.image_url)} does not fit IMAGE_TYPE={settings.image_type}",
            hint=f"set IMAGE_TYPE={fitting}",
        )
    return [url._replace(path=changed(url.path)).geturl()]


def _names(settings: Settings) -> list[str]:
    suffixes = IMAGE_TYPES[settings.image_type].suffixes
    return [f"{settings.image_name}-{settings.arch}{suffix}" for suffix in suffixes]


def _require_name(settings: Settings) -> None:
    ends = IMAGE_TYPES[settings.image_type].url_ends
    if settings.image_url and not settings.image_name:
        raise Failure(
            f"IMAGE_URL {shown(settings.image_url)} is taken for a directory of images, and IMAGE_NAME is not set",
            hint=f"the URL of one image ends as its file does: {log.few([f'.{end}' for end in ends])}",
        )
    if not settings.image_name:
        raise Failure("IMAGE_NAME is not set", hint="set it in the variant's file, or as the OS parameter image_name")


def _others(settings: Settings) -> str:
    """Return a hint that lists the files in IMAGE_DIR."""
    try:
        names: list[str] = sorted(os.listdir(settings.image_dir))
    except OSError as error:
        return f"IMAGE_DIR {settings.image_dir}: {error.strerror}"
    there = log.few(names) or "no image"
    return f"copy it there, or set IMAGE_NAME, ARCH, IMAGE_TYPE or IMAGE_DIR; {settings.image_dir} holds {there}"
