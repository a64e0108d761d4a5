"""Make an image of a stopped instance's first disk, on the node that has it; and the options that say what image."""

from __future__ import annotations

import argparse
import os

from imageos import cluster, log, remote
from imageos.cluster import ClusterInstance
from imageos.commandline import Parser
from imageos.images import capture
from imageos.images.capture import CAPTURED, Destination
from imageos.installation import OS_DIR
from imageos.node import isolation
from imageos.settings import examine_settings, parse_setting


def parser_of(kind: str, prog: str, about: str) -> Parser:
    """Return the parser of a command that makes images of one type."""
    made = Parser(prog, about, epilog=f"The image is {CAPTURED[kind].description}.")
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


def make_image(kind: str, options: argparse.Namespace, path: str | None = None) -> int:
    """Make an image of the type `kind`: of the disk `path`, or else of the first disk of a stopped instance."""
    cluster.check_name(options.instance)
    isolation.enter()
    if path:
        capture.capture(path, CAPTURED[kind], destination_of(options, options.instance, ""), options.seal)
        return 0
    instance = cluster.find_instance(options.instance)
    cluster.check_stopped(instance)
    wanted = destination_of(options, instance.name, instance.os)
    if instance.disk_count > 1:
        log.info(f"of the {instance.disk_count} disks of instance {instance.name}, disk 0 is in the image")
    with cluster.activated(instance) as disks:
        if instance.is_here:
            capture.capture(disks[0], CAPTURED[kind], wanted, options.seal)
        else:
            make_image_there(instance, disks[0], kind, wanted, options)
    return 0


def destination_of(options: argparse.Namespace, instance: str, os_name: str) -> Destination:
    """Return where the image goes: as the options say, or else the settings of the instance's variant."""
    name, _, variant = os_name.partition("+")
    is_ours = name == os.path.basename(OS_DIR)
    settings, problems = examine_settings({"OS_VARIANT": variant, "INSTANCE_NAME": instance} if is_ours else {})
    for problem in problems:
        log.warning(str(problem))  # most settings do not matter here
    log.set_debug(settings.image_debug)
    image = parse_setting("image_name", options.name, "with -n") if options.name else settings.image_name or instance
    arch = parse_setting("arch", options.arch, "with -a") if options.arch else settings.arch
    directory = os.path.abspath(options.image_dir) if options.image_dir else settings.image_dir
    return Destination(directory, f"{image}-{arch}", options.force)


def make_image_there(
    instance: ClusterInstance, path: str, kind: str, wanted: Destination, options: argparse.Namespace
) -> None:
    """Have the node that has the disk make the image, and keep it there."""
    name, _, arch = wanted.name.rpartition("-")
    words = ["ganeti-image", "--disk", path, "-i", instance.name, "-t", kind]
    # with `=`: a value may begin with a dash
    words += [f"--image-dir={wanted.directory}", f"--name={name}", f"--arch={arch}"]
    words += [word for word, is_wanted in (("--seal", options.seal), ("--force", options.force)) if is_wanted]
    remote.run_on(instance.node, words)
    log.info(f"the image is on node {instance.node}")
