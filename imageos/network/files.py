"""Read the site's own addresses from the shell files of ganeti-instance-image."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping

from imageos import log, shellfiles
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.settings import Settings
from imageos.shellfiles import Rules

READ = ("ADDRESS", "SUBNET", "NETMASK", "GATEWAY", "ADDRESS6", "NETMASK6", "GATEWAY6")
READ_TOO = ("DNS_SERVERS", "DNS_SEARCH", "DNS_DOMAIN")
ALIKE = 0.8  # NETWORK, which a site's own hook may read, is no mistake for NETMASK


def read(instance: Instance, settings: Settings) -> Mapping[str, str]:
    """Return the variables that the instance's file and its subnet's file set; none if the instance has no file.

    The path is safe: it consists of the site's own text and the instance's name, which is a checked host name.
    """
    path = f"{settings.networks_dir}/instances/{instance.name}"
    if not os.path.lexists(path):
        return {}
    subnet = shlex.quote(f"{settings.networks_dir}/subnets/") + '"$SUBNET"'
    try:
        layers = shellfiles.evaluate(
            "network file",
            [shlex.quote(path), subnet],
            {"INSTANCE_NAME": instance.name},
            Rules(settings=(*READ, *READ_TOO)),
        )
    except shellfiles.MissingFile as missing:
        raise Failure(
            f"network file {path} names a subnet that has no file: {missing.path}",
            hint=f"SUBNET must name a file in {settings.networks_dir}/subnets, which sets NETMASK and GATEWAY",
        ) from None
    for file, variables in layers:
        warn_of_misspelt(file, variables)
    values = {name: value for _, variables in layers for name, value in variables.items()}
    if not values.get("ADDRESS"):
        raise Failure(f"network file {path} does not set ADDRESS")
    return values


def warn_of_misspelt(file: str, names: Iterable[str]) -> None:
    """Name variables that nearly are those that we read. Others are the site's own."""
    import difflib  # late: few instances have files

    for name in names:
        near = difflib.get_close_matches(name, (*READ, *READ_TOO), 1, ALIKE)
        if near and name != near[0]:
            log.warning(f"unknown variable {name} in {file} (did you mean {near[0]}?)")
