"""Does cloud-init run when the guest boots, and may it configure the network? Asked as its generator would."""

from __future__ import annotations

import re
from collections.abc import Iterator

from imageos.guests import services, yaml
from imageos.guests.bootconfig import GRUB_VARIABLES
from imageos.guests.bootloaders import DEFAULT_GRUB, command_lines
from imageos.guests.target import Target, matches

CONFIG = "/etc/cloud/cloud.cfg"
FIRST_OF_OURS = f"{CONFIG}.d/zz-imageos"
OURS = f"{FIRST_OF_OURS}-network.cfg"  # of the hook interfaces
BEFORE_OURS = f"{CONFIG}.d/zz-image-"
DISABLED = "/etc/cloud/cloud-init.disabled"
IDENTIFY = "/etc/cloud/ds-identify.cfg"
# The stages that configure the network, by their names since 0.7 and since 24.3
STAGES = ("cloud-init-local", "cloud-init", "cloud-init-main", "cloud-init-network")
# Arguments of the kernel that count more than any configuration: another source, more configuration, a network
OVERRULING = ("ds=", "ci.ds=", "ci.datasource=", "cc:", "cloud-config-url=", "network-config=")
HARMLESS = ("ds=nocloud", "network-config=disabled")  # our source; what may_configure_network() heeds
POLICY = "ci.di.policy="
GENERATOR, STARTED = "cloud-init-generator", "cloud-init.target"  # the first starts the second


def runs(target: Target) -> bool:
    """Return whether the guest has a cloud-init that nothing keeps from running, as far as we see how it is started."""
    if not target.which("cloud-init") or not target.is_dir("/etc/cloud"):
        return False
    if target.exists(DISABLED) or matches(target, IDENTIFY, r"^[ \t]*policy[ \t]*:[ \t]*disabled\b"):
        return False
    if _last_argument(target, "cloud-init=") == "disabled" or "disabled" in _last_argument(target, POLICY).split(","):
        return False
    stages = [stage for stage in STAGES if services.exists(target, stage)]
    return not stages or any(_is_started(target, stage) for stage in stages)


def may_configure_network(target: Target) -> bool:
    """Return whether neither its configuration nor the kernel's command line forbid cloud-init the network."""
    config = ""
    for path in configuration(target):
        config = yaml.scalars(target.read(path) or "").get(("network", "config"), config)
    return config != "disabled" and _last_argument(target, "network-config=") != "disabled"


def lists_renderers(target: Target) -> bool:
    """Return whether the image's configuration says for which programs cloud-init may write, and in which order."""
    texts = (target.read(path) or "" for path in configuration(target))
    return any(yaml.has(yaml.scalars(text), "system_info", "network", "renderers") for text in texts)


def drop(target: Target, *keys: str) -> list[str]:
    """Take the first of nested keys out of the files that have the last one; return the names of these."""
    found = []
    for path in configuration(target):
        text = target.read(path) or ""
        if yaml.has(yaml.scalars(text), *keys):
            target.write(path, yaml.without(text, keys[0]))
            found.append(path.rpartition("/")[2])
    return found


def read_before_ours(target: Target) -> list[str]:
    """Give files of the image that would be read after ours, and so count more, names before these; return the old."""
    later = [path for path in configuration(target) if path > FIRST_OF_OURS and not path.startswith(FIRST_OF_OURS)]
    names = [path.rpartition("/")[2] for path in later]
    for path, name in zip(later, names):
        target.rename(path, BEFORE_OURS + name)
    return names


def overruling(target: Target) -> list[str]:
    """Return the names of the kernel's arguments that count more than the seed. Their values may hold passwords."""
    words = [word for word in _arguments(target) if word.lower() not in HARMLESS]
    return [name for name in OVERRULING if any(word.startswith(name) for word in words)]


def configuration(target: Target) -> Iterator[str]:
    """Yield the files of the image's configuration of cloud-init; the last one counts."""
    paths = (path for path in (CONFIG, *target.glob(f"{CONFIG}.d/*.cfg")) if path != OURS)
    yield from filter(target.is_file, paths)


def _is_started(target: Target, stage: str) -> bool:
    reached = frozenset([STARTED] if services.has_generator(target, GENERATOR) else [])
    is_systemd = services.init(target) in ("systemd", "")
    return (is_systemd and services.is_started(target, f"{stage}.service", reached)) or services.is_enabled(
        target, stage
    )


def _last_argument(target: Target, name: str) -> str:
    words = [word for word in _arguments(target) if word.startswith(name)]
    return words[-1].partition("=")[2] if words else ""


def _arguments(target: Target) -> list[str]:
    """Return the words of the kernel command lines in the boot loader's menus; without these, what GRUB puts there."""
    lines = command_lines(target)
    if not lines:
        assignment = rf"^[ \t]*(?:export[ \t]+)?(?:{'|'.join(GRUB_VARIABLES)})\+?=(.*)$"
        paths = [DEFAULT_GRUB, *target.glob(f"{DEFAULT_GRUB}.d/*.cfg")]
        lines = [line for path in paths for line in re.findall(assignment, target.read(path) or "", re.MULTILINE)]
    return [word.strip("\"'") for line in lines for word in line.split()]
