"""The system in a guest: its name, its identity, its console.

What differs between distributions is found by looking at the guest's files, never at its name in the settings.
"""

from __future__ import annotations

import re

from imageos import log
from imageos.errors import Failure
from imageos.guests.target import Target

# Directories that a kernel and a first process expect, should an image have left them out
MOUNT_POINTS = ("/dev", "/proc", "/sys", "/run")
# Distributions (os-release's ID or ID_LIKE) that keep the full name in /etc/hostname
FULL_HOSTNAME = ("rhel", "fedora", "centos", "suse", "sles", "opensuse")
# Where older ones keep their name, and whether the full one; changed where it is set
OTHER_HOSTNAMES = {
    "/etc/HOSTNAME": (r"^()\S+", True),  # SUSE
    "/etc/sysconfig/network": (r"^(HOSTNAME=[\"']?)[^\"'\s]*", True),  # Red Hat up to 6
    "/etc/conf.d/hostname": (r"^((?:hostname|HOSTNAME)=[\"']?)[^\"'\s]*", False),  # OpenRC, and Gentoo before it
}
RANDOM_SEEDS = (
    "/var/lib/systemd/random-seed",
    "/var/lib/urandom/random-seed",
    "/var/lib/misc/random-seed",
    "/var/lib/seedrng/*",
)
SYSTEMD_UNITS = ("/usr/lib/systemd/system", "/lib/systemd/system")


def check_root(target: Target) -> None:
    """Fail if this cannot be the root of a system; make the mount points that every one needs."""
    if not (target.is_dir("/etc") and (target.exists("/bin") or target.exists("/usr/bin"))):
        raise Failure(
            "the image holds no Linux system: /etc or /bin is missing in its root",
            hint="make the tarball from within the system's root: tar --create ... -C ROOT .",
        )
    for directory in MOUNT_POINTS:
        target.mkdir(directory)


def forget_identity(target: Target) -> None:
    """Remove what the guest makes anew, and what no two instances may share."""
    forget_machine_id(target)
    for seed in RANDOM_SEEDS:
        target.remove(seed)
    target.clear("/var/lib/cloud", keep=["seed"])  # as `cloud-init clean` does


def set_hostname(target: Target, instance_name: str) -> None:
    """Name the guest, in /etc/hostname and in /etc/hosts, and where older ones keep it."""
    short = instance_name.split(".")[0]
    kept = instance_name if _is_like(target, FULL_HOSTNAME) else short
    target.write("/etc/hostname", kept + "\n")
    target.write("/etc/hosts", hosts(target.read("/etc/hosts") or "", instance_name))
    for path, (pattern, full) in OTHER_HOSTNAMES.items():
        if target.is_file(path):
            name = instance_name if full else short
            text = target.read(path) or ""
            target.write(path, re.sub(pattern, rf"\g<1>{name}", text, flags=re.MULTILINE))


def hosts(text: str, instance_name: str) -> str:
    """The text of /etc/hosts with the instance's name on Debian's own line for it, 127.0.1.1."""
    short = instance_name.split(".")[0]
    names = instance_name if short == instance_name else f"{instance_name} {short}"
    ours = f"127.0.1.1\t{names}"
    lines = text.splitlines() or ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    place = [n for n, line in enumerate(lines) if line.split()[:1] == ["127.0.1.1"]]
    if place:
        lines[place[0]] = ours
    else:
        first = next((n for n, line in enumerate(lines) if line.split()[:1] == ["127.0.0.1"]), -1)
        lines.insert(first + 1, ours)
    others = set(place[1:])
    kept = [line for n, line in enumerate(lines) if n not in others]
    return "\n".join(kept) + "\n"


def forget_machine_id(target: Target) -> None:
    """Have the guest make a new machine-id when it boots; DHCP leases and journals are tied to it."""
    if target.exists("/etc/machine-id") or _systemd_units(target):
        target.write("/etc/machine-id", "", mode=0o444)
    target.remove("/var/lib/dbus/machine-id")


def enable_serial_console(target: Target, terminal: str, speed: int) -> None:
    """A login on the serial console, in whatever way the guest starts its terminals."""
    units = _systemd_units(target)
    if units:
        target.symlink(
            f"{units}/serial-getty@.service", f"/etc/systemd/system/getty.target.wants/serial-getty@{terminal}.service"
        )
    elif target.is_file("/etc/inittab"):
        target.write(
            "/etc/inittab",
            inittab(
                target.read("/etc/inittab") or "",
                terminal,
                speed,
                target.which("agetty") or target.which("getty") or "/sbin/getty",
            ),
        )
    else:
        log.warning("no login on the serial console: the guest has neither systemd nor /etc/inittab")
    if target.is_file("/etc/securetty"):
        target.append_line("/etc/securetty", terminal)


def inittab(text: str, terminal: str, speed: int, getty: str) -> str:
    """The text of /etc/inittab with exactly one getty on `terminal`: sysvinit's syntax or busybox's."""
    # Only sysvinit has run levels (inittab(5)); in busybox's the first field is the terminal.
    sysvinit = re.search(r"^[^#:\n]*:[^:\n]*:initdefault:", text, re.MULTILINE)
    start = f"{getty} -L {speed} {terminal} vt100"
    line = f"S{terminal[-1]}:2345:respawn:{start}" if sysvinit else f"{terminal}::respawn:{start}"
    others = [
        one
        for one in text.splitlines()
        if not re.match(rf"#?\s*({terminal}:|[^:]*:[^:]*:respawn:.*\b{terminal}\b)", one)
    ]
    return "\n".join([*others, line]) + "\n"


def request_relabel(target: Target) -> None:
    """What we wrote has no SELinux label: let a guest that enforces them label everything at boot."""
    if re.search(r"^SELINUX=(enforcing|permissive)\s*$", target.read("/etc/selinux/config") or "", re.MULTILINE):
        target.touch("/.autorelabel")


def _systemd_units(target: Target) -> str:
    """The directory of systemd's unit files, or an empty string where the guest has no systemd."""
    return next((path for path in SYSTEMD_UNITS if target.is_file(f"{path}/serial-getty@.service")), "")


def _is_like(target: Target, families: tuple[str, ...]) -> bool:
    text = target.read("/etc/os-release") or target.read("/usr/lib/os-release") or ""
    words = re.findall(r"^ID(?:_LIKE)?=[\"']?([^\"'\n]*)", text, re.MULTILINE)
    return any(word.split("-")[0] in families for value in words for word in value.split())
