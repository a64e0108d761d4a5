"""The programs that deployments run: whether they are there, where, and of which version."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress

from imageos import hooks
from imageos.checks.report import ERROR, NOTE, OK, Report
from imageos.checks.variants import Variant, listed
from imageos.disks import filesystem
from imageos.errors import Failure
from imageos.images import dump, qcow2
from imageos.run import PACKAGES, pipeline
from imageos.settings import Settings

GANETI_PATH = "/sbin:/bin:/usr/sbin:/usr/bin"  # what its scripts are called with
ALWAYS = ("sfdisk", "blkid", "tar")  # whatever the variants are, backups included
# How a program tells its version, where it is not --version. Any nonsense will do for those that print it then.
VERSION_OPTIONS = dict.fromkeys(
    ("mkfs.ext2", "mkfs.ext3", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_growfs", "ssh"), "-V"
)


def check_programs(report: Report, variants: Iterable[Variant]) -> None:
    """Those that a variant needs have to be there; others are only named."""
    needed: dict[str, list[str]] = {program: [] for program in ALWAYS}
    for variant in variants:
        for program in needed_by(variant):
            needed.setdefault(program, []).append(variant.name)
    missing: dict[str, list[str]] = {}
    for program in dict.fromkeys([*needed, *PACKAGES]):
        place = shutil.which(program, path=search_path())
        package = PACKAGES.get(program, program)
        if place and shutil.which(program, path=GANETI_PATH):
            version = version_of(place)
            report.say(OK, f"{program} {version}".strip())
            for what in about(program, version):
                report.say(NOTE, f"{program} {version} {what}")
        elif program not in needed:
            missing.setdefault(package, []).append(program)
        else:
            where = f"is in {os.path.dirname(place)}, where Ganeti does not look" if place else "is missing"
            users = f": needed by {listed(needed[program])}" if needed[program] else ""
            report.say(ERROR, f"{program} {where}{users}", f"install {package}")
    for package, programs in missing.items():
        report.say(NOTE, f"{' '.join(programs)} missing: no variant needs it", f"install {package}")


def about(program: str, version: str) -> Iterator[str]:
    """What is to be known of a version of dump(8)'s programs."""
    found = dump.VERSION.match(version) if program in ("dump", "restore") else None
    if not found:
        return
    number = int(found[1])
    if program == "dump" and number >= dump.PACKED:
        yield "makes what an older restore (before Debian 13) cannot read"
    if program == "restore" and number < dump.PACKED:
        yield f"cannot read what dump 0.4b{dump.PACKED} (Debian 13) makes"
    if program == "restore":
        lost = "capabilities of files" if number >= dump.PACKED else "attributes of directories"
        yield f"loses {lost}: create and import set them again"


def needed_by(variant: Variant) -> Iterator[str]:
    """The programs that a create of this variant runs."""
    if not variant.has_image:
        return
    known, image = variant.known, variant.image
    if variant.layout:
        yield from filesystem.programs(variant.layout, known.filesystem)
        yield {"tarball": "tar", "dump": "restore"}[known.image_type]
        if variant.layout.find("esp") and "grub" in enabled_hooks(known):
            yield "mcopy"
    elif known.image_type == "qcow2" or (image and os.pread(image.descriptor, 4, 0) == qcow2.MAGIC):
        yield "qemu-img"
    elif image or known.image_type == "raw":
        yield "dd"
    for file in (image, image.boot) if image else ():
        yield from file.decompress[:1] if file else ()
    if known.image_keyring:
        yield "gpgv"


def enabled_hooks(known: Settings) -> list[str]:
    """None where they cannot be listed, which another check says."""
    with suppress(Failure):
        return hooks.find(known.customize_dir)
    return []


def search_path() -> str:
    """Where programs are looked for: the PATH of users often has no sbin."""
    own = os.environ.get("PATH", GANETI_PATH)
    return own if os.geteuid() == 0 else f"{own}:{GANETI_PATH}"


def version_of(program: str) -> str:
    option = VERSION_OPTIONS.get(os.path.basename(program), "--version")
    with suppress(Failure):
        done = pipeline([[program, option]], timeout=10)[0]
        found = re.search(r"\d+\.\d[\w.]*", done.stdout.decode("utf-8", "replace") + done.stderr)
        return found[0] if found else ""
    return ""
