"""cloud-init in the guest: a NoCloud seed, so that it finds the instance's name, keys and network, and asks nobody.

Format: cloud-init's documentation, datasource NoCloud and network configuration version 2. JSON, which is YAML.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from imageos.ganeti import Instance
from imageos.guests.target import Target
from imageos.network import Interface, render
from imageos.settings import Settings

SEED = "/var/lib/cloud/seed/nocloud"
# The node answers ARP for whatever it has a route to (proxy ARP): where a guest must have a gateway, this one will do.
LINK_GATEWAY = "169.254.1.1"
DATASOURCE = "/etc/cloud/cloud.cfg.d/zz-imageos.cfg"  # the last one wins; Ubuntu's installer leaves a 99-installer.cfg


def present(target: Target) -> bool:
    return target.which("cloud-init") is not None and target.is_dir("/etc/cloud")


def write_seed(target: Target, instance: Instance, settings: Settings, interfaces: Sequence[Interface]) -> None:
    """Seed cloud-init for a new instance; what it knew of another is forgotten elsewhere (guest.forget_identity)."""
    target.clear(SEED)  # a file that the image has may be readable to all, and would stay so
    target.write(f"{SEED}/meta-data", meta_data(instance.name, settings, f"iid-{uuid.uuid4()}"), mode=0o600)
    target.write(f"{SEED}/user-data", settings.user_data or "#cloud-config\n{}\n", mode=0o600)
    target.write(f"{SEED}/vendor-data", vendor_data(settings), mode=0o600)
    if interfaces:
        target.write(f"{SEED}/network-config", network_config(target, interfaces), mode=0o600)
        if any(one.dns for one in interfaces) and needs_resolv_conf(target):
            target.remove("/etc/resolv.conf")  # it may lead to what will not be there
            target.write("/etc/resolv.conf", render.resolv_conf(interfaces))
    # With only these two to choose from, nothing is probed: no time is lost, and no other source can speak up.
    target.write(DATASOURCE, "# Written by imageos: the seed is in " + SEED + "\ndatasource_list: [NoCloud, None]\n")


def meta_data(instance_name: str, settings: Settings, instance_id: str) -> str:
    keys = [line for line in settings.ssh_authorized_keys.splitlines() if line.strip()]
    return _document({"instance-id": instance_id, "local-hostname": instance_name, "public-keys": keys})


def vendor_data(settings: Settings) -> str:
    """What the settings ask for; user-data has the last word. The keys are root's too."""
    config: dict[str, Any] = {"ssh_deletekeys": False}  # the host keys are new already
    if settings.ssh_authorized_keys:
        config["disable_root"] = False
    if settings.root_password_hash:
        # The only way that 20.4 knows and 25 does not call deprecated; a user that is there gets the password, too.
        root = {"name": "root", "lock_passwd": False, "hashed_passwd": settings.root_password_hash}
        config["users"] = ["default", root]
    return "#cloud-config\n" + _document(config)


def network_config(target: Target, interfaces: Sequence[Interface]) -> str:
    """The network, in the version that what rules it in this guest can follow."""
    return _document((render.version2 if _understands_routes(target) else version1)(interfaces))


def _understands_routes(target: Target) -> bool:
    """Whether what cloud-init will write for can have routes on the link: netplan, or networkd alone.

    It takes the first of: ifupdown, the scripts of Red Hat and SUSE, netplan, NetworkManager, networkd.
    """
    if target.which("ifup"):
        return False
    return target.which("netplan") is not None or not target.which("NetworkManager")


def version1(interfaces: Sequence[Interface]) -> dict[str, Any]:
    """For ifupdown and NetworkManager, which reach any gateway on the link, but are told of no route without one.

    Version 2 has no gateway here: cloud-init hands its routes to route(8), which a guest need not have.
    """
    config: list[dict[str, Any]] = []
    for one in interfaces:
        subnet: dict[str, Any] = {"type": "dhcp4"}
        if one.address:
            subnet = {"type": "static", "address": one.address}
            gateway = one.gateway or (LINK_GATEWAY if one.on_link else "")
            subnet.update({"gateway": gateway} if gateway else {})
        subnet.update({"dns_nameservers": list(one.dns)} if one.dns else {})
        subnet.update({"dns_search": list(one.search)} if one.search else {})
        subnets = [subnet]
        if one.address6:
            subnets.append({"type": "static6", "address": one.address6})
            subnets[1].update({"gateway": one.gateway6} if one.gateway6 else {})
        config.append({"type": "physical", "name": one.name, "mac_address": one.mac, "subnets": subnets})
    return {"version": 1, "config": config}


def needs_resolv_conf(target: Target) -> bool:
    """Whether it is ifupdown, and without anybody who would tell the guest its DNS servers."""
    resolved = [
        f"/etc/systemd/system/{level}.target.wants/systemd-resolved.service" for level in ("multi-user", "sysinit")
    ]
    helpers = [target.which("resolvconf"), *(target.glob(link) for link in resolved)]
    return target.which("ifup") is not None and not any(helpers)


def _document(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
