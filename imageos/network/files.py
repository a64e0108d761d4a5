"""The addresses that the site wrote down itself, in the files of ganeti-instance-image, which are shell."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from imageos import shellfiles
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.settings import Settings


def read(instance: Instance, settings: Settings) -> Mapping[str, str]:
    """What the instance's file, and the file of the subnet that it names, set; nothing if the instance has none.

    The names of instances are host names: no path is made of anything else that is not the site's own.
    """
    path = f"{settings.networks_dir}/instances/{instance.name}"
    if not os.path.lexists(path):
        return {}
    subnet = shlex.quote(f"{settings.networks_dir}/subnets/") + '"$SUBNET"'
    try:
        layers = shellfiles.evaluate("network file", [shlex.quote(path), subnet], {"INSTANCE_NAME": instance.name})
    except shellfiles.MissingFile as missing:
        raise Failure(
            f"network file {path} names a subnet that has no file: {missing.path}",
            hint=f"SUBNET must name a file in {settings.networks_dir}/subnets, which sets NETMASK and GATEWAY",
        ) from None
    found = {name: value for _, variables in layers for name, value in variables.items()}
    if not found.get("ADDRESS"):
        raise Failure(f"network file {path} does not set ADDRESS")
    return found
