"""doctor: say whether this node can deploy its variants, and what to do where it cannot.

It looks at the OS definition, the kernel, the settings of every variant, the programs and images that they need, free
space, and what crashed runs have left. It changes nothing. Without root it looks at less, and says at what not. The
exit status is 1 if this node cannot deploy all of its variants.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from imageos import __version__, filesystem, ganeti, images, layout, log, mounts, settings, wholeness
from imageos.commandline import Parser
from imageos.commands import install
from imageos.errors import Failure
from imageos.hooks import check_overlay, find, program_file
from imageos.imagefile import Image
from imageos.layout import MIB
from imageos.mounts import Mount
from imageos.run import PACKAGES, pipeline
from imageos.settings import Settings

OK, NOTE, ERROR, UNKNOWN = "ok", "note", "error", "unknown"
COLOURS = {OK: "32", NOTE: "33", ERROR: "1;31", UNKNOWN: "2"}
SHOWN = {OK: "ok", NOTE: "note", ERROR: "ERROR", UNKNOWN: "?"}

GANETI_PATH = "/sbin:/bin:/usr/sbin:/usr/bin"  # what its scripts are called with
ALWAYS = ("sfdisk", "blkid", "tar")  # whatever the variants are, backups included
# How a program tells its version, where it is not --version. Any nonsense will do for those that print it then.
VERSION_OPTIONS = dict.fromkeys(
    ("mkfs.ext2", "mkfs.ext3", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_growfs", "ssh"), "-V"
)
NAMESPACES = ("mount", "pid", "net", "ipc", "uts")
LITTLE = 64 * MIB  # bytes: with less, whatever is written there will fail soon


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    level: str
    what: str
    hint: str = ""


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


@dataclass
class Report:
    """What was found so far; `area` is what is being looked at."""

    findings: list[Finding] = field(default_factory=list)
    area: str = ""

    def say(self, level: str, what: str, hint: str | None = "") -> None:
        self.findings.append(Finding(self.area, level, log.ascii_only(what), log.ascii_only(hint or "")))

    def failure(self, failure: Failure, of: str = "") -> None:
        """A problem; without root only a thing that could not be looked at, if that was the reason."""
        denied = os.geteuid() != 0 and "Permission denied" in str(failure)
        self.say(UNKNOWN if denied else ERROR, f"{of}{failure}", "run it as root" if denied else failure.hint)

    @property
    def errors(self) -> int:
        return sum(finding.level == ERROR for finding in self.findings)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    report = examine(options.os_dir)
    print(as_json(report) if options.json else as_text(report, colour=sys.stdout.isatty()), end="")
    return 1 if report.errors else 0


def examine(os_dir: str) -> Report:
    report = Report()
    report.area = "OS definition"
    check_definition(report, os_dir)
    report.area = "kernel"
    check_kernel(report)
    report.area = "settings"
    variants = check_settings(report)
    check_hooks(report, variants)
    report.area = "images"
    variants = [check_image(report, variant) for variant in variants]
    report.area = "programs"
    check_programs(report, variants)
    report.area = "filesystems"
    check_filesystems(report, variants)
    report.area = "space"
    check_space(report, variants)
    report.area = "leftovers"
    check_leftovers(report, mounts.current())
    return report


# --- the OS definition ------------------------------------------------------------------------------------


def check_definition(report: Report, os_dir: str) -> None:
    if not os.path.exists(f"{os_dir}/create"):
        report.say(ERROR, f"there is no OS definition in {os_dir}", "imageos install")
        return
    before = report.errors
    program = os.path.realpath(f"{os_dir}/imageos")
    for script in (*install.SCRIPTS, *(f"tools/{tool}" for tool in install.TOOLS)):
        path = f"{os_dir}/{script}"
        if os.path.realpath(path) != program or not os.access(path, os.X_OK):
            report.say(ERROR, f"{path} is not imageos", "imageos install")
    if not os.path.isfile(f"{os_dir}/variants.list"):
        report.say(ERROR, f"{os_dir}/variants.list cannot be read", "imageos install")
    if install.content(f"{os_dir}/parameters.list") != install.parameters_list().encode():
        report.say(NOTE, f"{os_dir}/parameters.list is another version's", "imageos install")
    ours = program_file()
    if os.path.isfile(ours) and install.content(program) != install.content(ours):
        report.say(NOTE, f"{program} is another version than {ours}", f"{ours} install")
    if report.errors == before:
        report.say(OK, os_dir)
    for directory, _, names in os.walk(settings.SITE_DIR):
        for name in sorted(names):
            if name.endswith(".new"):
                old = f"{directory}/{name[:-4]}"
                report.say(NOTE, f"{old} is the site's, this version's is beside it", f"diff {old} {old}.new")
    check_python(report)


def check_python(report: Report) -> None:
    """Ganeti's PATH decides which one it is."""
    python = shutil.which("python3", path=GANETI_PATH)
    if not python:
        report.say(ERROR, f"there is no python3 in Ganeti's PATH {GANETI_PATH}", "install python3")
        return
    found = version_of(python)
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    is_old = numbers < (3, 9)
    report.say(ERROR if is_old else OK, f"{python} {found}", "imageos needs Python 3.9 or newer" if is_old else "")


# --- the kernel -------------------------------------------------------------------------------------------


def check_kernel(report: Report) -> None:
    release = os.uname().release
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    is_old = numbers < (5, 8)
    report.say(ERROR if is_old else OK, f"Linux {release}", "imageos needs Linux 5.8 or newer" if is_old else "")
    if os.geteuid() != 0:
        report.say(UNKNOWN, "namespaces and loop devices were not tried", "run it as root")
        return
    refused = unshare_error()
    report.say(
        ERROR if refused else OK,
        f"namespaces cannot be made: {refused}" if refused else f"namespaces: {', '.join(NAMESPACES)}",
        "in a container, it must be allowed to make them" if refused else "",
    )
    try:
        os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
        report.say(OK, "loop devices")
    except OSError as error:
        report.say(ERROR, f"/dev/loop-control: {error.strerror}", "modprobe loop")


def unshare_error() -> str:
    try:
        options = [f"--{name}" for name in NAMESPACES]
        done = pipeline([["unshare", *options, "--fork", "true"]], timeout=10)[0]
    except Failure as failure:
        return str(failure)
    return (done.stderr.strip() or f"status {done.status}") if done.status else ""


def check_filesystems(report: Report, variants: Iterable[Variant]) -> None:
    needed: dict[str, list[str]] = {}
    for variant in variants:
        if variant.has_image and images.IMAGE_TYPES[variant.known.image_type].deploy:
            for volume in filesystem.plan_volumes(example_layout(variant.known), variant.known.filesystem, str):
                if volume.mount_point:
                    needed.setdefault(volume.kind, []).append(variant.name)
    for kind in filesystem.FILESYSTEMS:
        if kernel_has(kind):
            report.say(OK, kind)
        elif kind in needed:
            report.say(ERROR, f"this kernel has no {kind}: needed by {listed(needed[kind])}", f"modprobe {kind}")
        else:
            report.say(NOTE, f"this kernel has no {kind}: images with it cannot be deployed")


def kernel_has(kind: str) -> bool:
    """Whether the kernel has this filesystem, or a module of it that it loads when it is mounted."""
    with open("/proc/filesystems", encoding="ascii") as file:
        if kind in file.read().split():
            return True
    modules = f"/lib/modules/{os.uname().release}"
    for name, wanted in (("modules.alias", f"alias fs-{kind} "), ("modules.dep", f"/{kind}.ko")):
        with suppress(OSError), open(f"{modules}/{name}", encoding="utf-8") as file:
            if any(wanted in line.partition(": ")[0] for line in file):
                return True
    return False


# --- settings ---------------------------------------------------------------------------------------------


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
    for variant in variants:
        try:
            check_overlay(variant.known)
        except Failure as failure:
            report.failure(failure, of=f"variant {variant.name}: ")


# --- images -----------------------------------------------------------------------------------------------


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
        image = images.find(known)
        variant = dataclasses.replace(variant, image=image)
        report_image(report, variant, image)
        if image.boot:
            report_image(report, variant, image.boot)
    except Failure as failure:
        report.failure(failure, of=f"variant {variant.name}: ")
    return variant


def report_image(report: Report, variant: Variant, image: Image) -> None:
    images.IMAGE_TYPES[variant.known.image_type].check(image)
    truncated = wholeness.why_truncated(image)
    if truncated:
        raise Failure(f"image {image.path} is truncated or damaged at its end: {truncated}", hint="copy it again")
    report.say(OK, f"variant {variant.name}: {image.path}, {log.size(image.size)}")


def check_download(report: Report, variant: Variant) -> None:
    from imageos import cache, fetch, web  # bring http and TLS

    url = web.shown(variant.known.image_url)
    reason = images.why_unreachable(variant.known)
    if not reason:
        report.say(OK, f"variant {variant.name}: {url}")
        return
    names = images.IMAGE_TYPES[variant.known.image_type].suffixes
    stem = f"{variant.known.image_name}-{variant.known.arch}"
    urls = fetch.urls(variant.known, [stem + suffix for suffix in names])
    if any(cache.load(f"{variant.known.cache_dir}/{fetch.cache_name(one)}") for one in urls):
        report.say(NOTE, f"variant {variant.name}: {reason}; there is a copy in {variant.known.cache_dir}")
    else:
        raise Failure(reason, hint="see whether the server runs, and whether this node reaches it")


# --- programs ---------------------------------------------------------------------------------------------


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
            report.say(OK, f"{program} {version_of(place)}".strip())
        elif program not in needed:
            missing.setdefault(package, []).append(program)
        else:
            where = f"is in {os.path.dirname(place)}, where Ganeti does not look" if place else "is missing"
            users = f": needed by {listed(needed[program])}" if needed[program] else ""
            report.say(ERROR, f"{program} {where}{users}", f"install {package}")
    for package, programs in missing.items():
        report.say(NOTE, f"{' '.join(programs)} missing: no variant needs it", f"install {package}")


def needed_by(variant: Variant) -> Iterator[str]:
    """The programs that a create of this variant runs."""
    if not variant.has_image:
        return
    known, image = variant.known, variant.image
    if images.IMAGE_TYPES[known.image_type].deploy:
        yield from filesystem.programs(example_layout(known), known.filesystem)
        yield {"tarball": "tar", "dump": "restore"}[known.image_type]
    elif known.image_type == "qcow2" or (
        image and not image.compression and os.pread(image.descriptor, 3, 0) == b"QFI"
    ):
        yield "qemu-img"
    elif image or known.image_type == "raw":
        yield "dd"
    yield from image.decompress[:1] if image else ()
    if known.image_keyring:
        yield "gpgv"


def example_layout(known: Settings) -> layout.Layout:
    """The partitions that a variant makes on a large disk."""
    sizes = known.resolved(memory=1024)
    return layout.plan(
        known.partition_table,
        1 << 40,
        boot=(sizes.boot_size or 0) * MIB,
        swap=(sizes.swap_size or 0) * MIB if known.swap else 0,
        arch=known.arch,
        smallest_root=0,
    )


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


# --- space ------------------------------------------------------------------------------------------------


def check_space(report: Report, variants: Sequence[Variant]) -> None:
    """An error where a deployment would stop: a download needs room, Ganeti writes a log of each."""
    downloads = {variant.known.cache_dir for variant in variants if variant.known.image_url}
    caches = {variant.known.cache_dir for variant in variants} | {settings.CACHE_DIR}
    places = {**dict.fromkeys(sorted(caches), "images"), "/var/log": "Ganeti's logs", "/run": "mount points"}
    for path, use in places.items():
        try:
            status = os.statvfs(path)
        except OSError as error:
            if path in downloads:
                report.failure(Failure(f"CACHE_DIR {path}: {error.strerror}"))
            continue
        free = status.f_bavail * status.f_frsize
        has_room = free >= LITTLE and (status.f_favail > 0 or not status.f_files)
        is_needed = use != "images" or path in downloads
        level = OK if has_room else ERROR if is_needed else NOTE
        report.say(level, f"{path} ({use}): {log.size(free)} free", "" if has_room else f"make room in {path}")


# --- leftovers --------------------------------------------------------------------------------------------


def check_leftovers(report: Report, mounted: Sequence[Mount], sys_block: str = "/sys/block") -> None:
    """What runs of ganeti-instance-image leave when they crash, with the commands that take it away, in order."""
    before = len(report.findings)
    for one in mounted:
        # nothing but names: the command is there to be pasted into root's shell, and anybody can mount in /tmp (fuse)
        is_mktemp = re.fullmatch(r"/tmp/tmp\.[A-Za-z0-9]{6,}", one.place)
        is_root = one.instance and one.place == mounts.mount_point(one.instance)
        if (is_root or is_mktemp) and one.source.startswith(("/dev/mapper/", "/dev/loop", "/dev/dm-")):
            command = f"umount-disks {one.instance}" if is_root else f"umount -R {one.place} && rmdir {one.place}"
            report.say(NOTE, f"{one.source} is mounted at {one.place}", command)
    for name in partition_maps(sys_block):
        report.say(NOTE, f"/dev/mapper/{name} is a map of an instance's partition", f"dmsetup remove {name}")
    used = {one.source for one in mounted}
    for device, backing in leftover_loops(sys_block, used):
        report.say(
            NOTE, f"{device} is attached to {backing}, and not used", f"losetup -d {device} (unless an instance has it)"
        )
    if len(report.findings) == before:
        report.say(OK, "none")


def partition_maps(sys_block: str) -> Iterator[str]:
    """Names of the device-mapper maps that kpartx has made of LVs and loop devices."""
    for block in sorted(os.listdir(sys_block)):
        name = first_line(f"{sys_block}/{block}/dm/name")
        uuid = first_line(f"{sys_block}/{block}/dm/uuid")
        if re.match(r"part\d+-", uuid) and "mpath-" not in uuid:  # multipath's are the node's own
            yield name


def leftover_loops(sys_block: str, mounted: set[str]) -> Iterator[tuple[str, str]]:
    """Loop devices that stay when their last user is gone, and have none: device and what it is attached to."""
    blocks = sorted(os.listdir(sys_block))
    backings = {block: first_line(f"{sys_block}/{block}/loop/backing_file") for block in blocks}
    used = mounted | set(backings.values())
    for block, backing in backings.items():
        device = f"/dev/{block}"
        is_used = any(source == device or source.startswith(f"{device}p") for source in used)
        with suppress(FileNotFoundError):
            is_used = is_used or bool(os.listdir(f"{sys_block}/{block}/holders"))
        if backing and first_line(f"{sys_block}/{block}/loop/autoclear") == "0" and not is_used:
            yield device, backing


def first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.readline().rstrip("\n")
    except OSError:
        return ""


# --- the report -------------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    document = {
        "imageos": __version__,
        "node": socket.gethostname(),
        "can_deploy": not report.errors,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
    }
    return json.dumps(document, indent=2) + "\n"


def as_text(report: Report, colour: bool) -> str:
    lines = [f"imageos {__version__} on {socket.gethostname()}"]
    for area in dict.fromkeys(finding.area for finding in report.findings):
        lines += ["", area]
        for finding in joined([one for one in report.findings if one.area == area]):
            mark = painted(f"{SHOWN[finding.level]:<5}", COLOURS[finding.level], colour)
            first, *rest = wrapped(finding.what)
            lines += [f"  {mark}  {first}", *(f"         {line}" for line in rest)]
            lines += [f"         -> {finding.hint}"] if finding.hint else []
    return "\n".join([*lines, "", verdict(report)]) + "\n"


def wrapped(text: str) -> list[str]:
    """Lines of it; a number stays with what it is a number of."""
    kept = re.sub(r" (?=\d)|(?<=\d) (?=[KMGT]iB|bytes)", "\0", text)
    lines = textwrap.wrap(kept, 90, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\0", " ") for line in lines]


def joined(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Findings as they are shown: the good ones that are a word or two each, together."""
    short = [one for one in findings if one.level == OK and len(one.what) < 30 and not one.what.startswith("/")]
    if short:
        yield dataclasses.replace(short[0], what=", ".join(one.what for one in short))
    yield from (one for one in findings if one not in short)


def verdict(report: Report) -> str:
    unknown = any(finding.level == UNKNOWN for finding in report.findings)
    if report.errors:
        return (
            f"{report.errors} {'error' if report.errors == 1 else 'errors'}: this node cannot deploy all its variants"
        )
    return "this node can deploy its variants" + (", as far as could be seen" if unknown else "")


def painted(text: str, colour: str, enabled: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if enabled else text


def listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return f"{'variant' if len(unique) == 1 else 'variants'} {', '.join(unique)}"


def parser() -> Parser:
    options = Parser("imageos doctor", __doc__)
    options.add_argument("--json", action="store_true", help="for programs: one JSON object")
    options.add_os_dir()
    return options
