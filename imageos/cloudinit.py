"""cloud-init in the guest: a NoCloud seed, so that it finds the instance's name, keys and network, and asks nobody.

Format: cloud-init's documentation, datasource NoCloud and network configuration version 2. JSON, which is YAML.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from imageos.ganeti import Instance
from imageos.network import Interface
from imageos.settings import Settings
from imageos.target import Target

SEED = "/var/lib/cloud/seed/nocloud"
DATASOURCE = "/etc/cloud/cloud.cfg.d/99-imageos.cfg"


def present(target: Target) -> bool:
    return target.which("cloud-init") is not None and target.is_dir("/etc/cloud")


def write_seed(target: Target, instance: Instance, settings: Settings, interfaces: Sequence[Interface]) -> None:
    """Seed cloud-init for a new instance; what it knew of another is forgotten elsewhere (guest.set_identity)."""
    target.write(f"{SEED}/meta-data", meta_data(instance.name, settings, f"iid-{uuid.uuid4()}"), mode=0o600)
    target.write(f"{SEED}/user-data", settings.user_data or "#cloud-config\n{}\n", mode=0o600)
    target.write(f"{SEED}/vendor-data", vendor_data(settings), mode=0o600)
    if interfaces:
        target.write(f"{SEED}/network-config", _document(network_config(interfaces)), mode=0o600)
    # With only these two to choose from, nothing is probed: no time is lost, and no other source can speak up.
    target.write(DATASOURCE, "# Written by imageos: the seed is in " + SEED + "\ndatasource_list: [NoCloud, None]\n")


def meta_data(instance_name: str, settings: Settings, instance_id: str) -> str:
    keys = [line for line in settings.ssh_authorized_keys.splitlines() if line.strip()]
    return _document({"instance-id": instance_id, "local-hostname": instance_name, "public-keys": keys})


def vendor_data(settings: Settings) -> str:
    """What the settings ask for; user-data has the last word. The keys are root's too."""
    config: dict[str, Any] = {}
    if settings.ssh_authorized_keys:
        config["disable_root"] = False
    return "#cloud-config\n" + _document(config)


def network_config(interfaces: Sequence[Interface]) -> dict[str, Any]:
    return {"version": 2, "ethernets": {one.name: _ethernet(one) for one in interfaces}}


def _ethernet(interface: Interface) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "match": {"macaddress": interface.mac},
        "set-name": interface.name,
        "dhcp4": interface.dhcp,
    }
    if interface.address:
        entry["addresses"] = [interface.address]
    if interface.gateway:
        entry["routes"] = [{"to": "0.0.0.0/0", "via": interface.gateway}]
        if interface.on_link:
            entry["routes"][0]["on-link"] = True
    elif interface.on_link:
        entry["routes"] = [{"to": "0.0.0.0/0", "scope": "link"}]
    nameservers = {
        name: list(values) for name, values in (("addresses", interface.dns), ("search", interface.search)) if values
    }
    if nameservers:
        entry["nameservers"] = nameservers
    return entry


def _document(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
