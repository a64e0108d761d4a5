"""ganeti-image: make an image of a stopped instance's first disk: tarball, dump or disk image.

The instance is only read: everything happens to a copy of what is in use on its disk.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from imageos import cluster, hooks, log, settings
from imageos.cluster import ClusterInstance
from imageos.commandline import Parser
from imageos.commands.mount_disks import program_there
from imageos.images import capture
from imageos.images.capture import CAPTURED, Place
from imageos.node import isolation

TYPES = {
    "tarball": "NAME-ARCH.tar.zst: the files, for any layout and filesystem",
    "dump": "NAME-ARCH-root.dump and -boot.dump, by dump(8): ext filesystems only",
    "qemu-img": "NAME-ARCH.qcow2: the whole disk, compressed",
}


def parser() -> Parser:
    types = "; ".join(f"{name}: {what}" for name, what in TYPES.items())
    made = Parser("ganeti-image", __doc__)
    made.add_argument("-t", "--type", required=True, choices=TYPES, help=types)
    made.add_argument("-i", "--instance", metavar="INSTANCE", required=True, help="its name, as Ganeti knows it")
    made.add_argument("-d", "--image-dir", metavar="DIR", help="where the image is put, on the node that has the disk")
    add_options(made)
    made.add_disk()
    return made


def parser_of(kind: str, prog: str, about: str) -> Parser:
    """The parser of a command that makes images of one type."""
    made = Parser(prog, about, epilog=f"The image is {TYPES[kind]}.")
    made.add_instance()
    made.add_argument(
        "image_dir", metavar="IMAGE_DIR", nargs="?", help="where it is put, on the node that has the disk"
    )
    add_options(made)
    return made


def add_options(made: Parser) -> None:
    made.add_argument("-n", "--name", help="of the image (default: IMAGE_NAME of the instance's variant, or INSTANCE)")
    made.add_argument("-a", "--arch", help="of the image (default: ARCH)")
    made.add_argument(
        "--seal", action="store_true", help="make a template of the image: no machine-id, host keys, logs, histories"
    )
    made.add_argument("--force", action="store_true", help="replace an image of this name")


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    return make_image(options.type, options, options.disk)


def make_image(kind: str, options: argparse.Namespace, path: str | None = None) -> int:
    """An image of the type `kind`, of the disk `path` or of the first disk of a stopped instance."""
    cluster.check_name(options.instance)
    isolation.enter()
    if path:
        capture.capture(path, CAPTURED[kind], place(options, options.instance, ""), options.seal)
        return 0
    known = cluster.instance(options.instance)
    cluster.check_stopped(known)
    wanted = place(options, known.name, known.os)
    if known.disk_count > 1:
        log.info(f"of the {known.disk_count} disks of instance {known.name}, disk 0 is in the image")
    with cluster.activated(known) as disks:
        if known.is_here:
            capture.capture(disks[0], CAPTURED[kind], wanted, options.seal)
        else:
            make_image_there(known, disks[0], kind, wanted, options)
    return 0


def place(options: argparse.Namespace, instance: str, os_name: str) -> Place:
    """Where the image goes: as the options say, or else the settings of the instance's variant."""
    name, _, variant = os_name.partition("+")
    is_ours = name == os.path.basename(hooks.OS_DIR)
    known, problems = settings.examine({"OS_VARIANT": variant, "INSTANCE_NAME": instance} if is_ours else {})
    for problem in problems:
        log.warning(str(problem))  # what an image is called does not depend on the size of a swap partition
    log.set_debug(known.image_debug)
    image = settings.accepted("image_name", options.name, "with -n") if options.name else known.image_name or instance
    arch = settings.accepted("arch", options.arch, "with -a") if options.arch else known.arch
    directory = os.path.abspath(options.image_dir) if options.image_dir else known.image_dir
    return Place(directory, f"{image}-{arch}", options.force)


def make_image_there(known: ClusterInstance, path: str, kind: str, wanted: Place, options: argparse.Namespace) -> None:
    """The same on the node that has the disk; the image is there, too."""
    name, _, arch = wanted.name.rpartition("-")
    command = [program_there(), "ganeti-image", "--disk", path, "-i", known.name, "-t", kind]
    command += ["-d", wanted.directory, "-n", name, "-a", arch]
    command += [word for word, is_wanted in (("--seal", options.seal), ("--force", options.force)) if is_wanted]
    cluster.run_on(known.node, command)
    log.info(f"the image is on node {known.node}")
