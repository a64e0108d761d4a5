"""cloud-init in the guest: its files, and the NoCloud seed that tells it the instance's name, keys and network.

Format: cloud-init's documentation, datasource NoCloud and network configuration version 2. JSON, which is YAML.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from imageos import log, logins
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import accounts, cloudboot, yaml
from imageos.guests.services import is_enabled
from imageos.guests.target import Target
from imageos.network import RESOLV_CONF, Interface, existing, render, resolver
from imageos.settings import Settings

STATE = "/var/lib/cloud"
SEED = f"{STATE}/seed/nocloud"
NETWORK_CONFIG, VENDOR_DATA = f"{SEED}/network-config", f"{SEED}/vendor-data"
CONFIG = "/etc/cloud/cloud.cfg"
NAMED = (CONFIG, f"{CONFIG}.d/*.cfg", f"{STATE}/seed/*/meta-data", f"{STATE}/seed/*/user-data")  # may hold the hostname
# User-data begins with one of these, in any case.
HEADERS = (
    *("#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "#upstart-job", "## template:"),
    "content-type:",
)
LISTS = ("#cloud-config-archive", "#cloud-config-jsonp")  # YAML without keys
# Says where a text is wrong, and none of it
LOAD = """
import sys, yaml
try:
    loaded = yaml.safe_load(sys.stdin)
    print("" if loaded is None or isinstance(loaded, dict) else "it is a " + type(loaded).__name__)
except yaml.YAMLError as error:
    mark = getattr(error, "problem_mark", None)
    print(f"line {mark.line + 1}, column {mark.column + 1}" if mark else type(error).__name__)
"""
# What is repeated of that: the guest's Python might say anything, the secrets in the text, too
WRONG = r"line \d{1,9}, column \d{1,9}|it is a (?:str|list|int|float|bool|bytes|date|datetime)"
INSTANCES = f"{STATE}/instances"
CACHE = "obj.pkl"  # in the directory of an instance: what cloud-init has read of its data source
INSTANCE_ID = r"""^[ \t{,]*["']?instance-id["']?[ \t]*:[ \t]*["']?([^"',\s]+)"""
# In CONFIG.d the last one wins; Ubuntu's installer leaves a 99-installer.cfg.
DATASOURCE = f"{cloudboot.FIRST_OF_OURS}.cfg"
USERS = f"{CONFIG}.d/99_ganeti.cfg"  # of the hook cloud-init
UPDATES = f"{CONFIG}.d/99-imageos-network.cfg"  # of the hook interfaces
DEFAULT_USER = f"{cloudboot.FIRST_OF_OURS}-user.cfg"  # keys with options
NAME = f"{cloudboot.FIRST_OF_OURS}-name.cfg"
# The seed, and files that cloud-init wrote from it
INSTANCE_FILES = (
    *(f"{SEED}*", DATASOURCE, DEFAULT_USER),
    *(cloudboot.OURS, "/etc/netplan/50-cloud-init.yaml", "/etc/network/interfaces.d/50-cloud-init*"),
)
# A guest's text: no pattern may have two ways to match the same blanks, or it takes hours.
CHOSEN_SOURCE = r"^[ \t]*datasource[ \t]*:.*\n?"  # of ds-identify, which then looks for no other
# in USER_DATA, which has the last word
ROOT_DISABLED = r"^(?:[^#\n]*[{,])?[ \t]*[\"']?disable_root[\"']?:\s*[\"']?(true|yes|on|1)\b"


def is_present(target: Target) -> bool:
    return target.which("cloud-init") is not None and target.is_dir("/etc/cloud")


def forget_instance(target: Target) -> None:
    """Remove what cloud-init knows of an instance, as `cloud-init clean` does, and what tells it to read it again."""
    target.clear(STATE, keep=["seed"])
    for path in (UPDATES, NAME, USERS):
        target.remove(path)


def rename(target: Target, name: str) -> None:
    """Have cloud-init learn the new name, which is in the files NAMED already. To it, the instance stays the same.

    With another instance-id it would make users, keys and passwords as on the first boot, over what the guest has now.
    So it only reads its seed again; if its data source is another, its configuration has the name.
    """
    known = (target.read(f"{STATE}/data/instance-id") or "").strip()
    cache = f"{INSTANCES}/{known}/{CACHE}"
    if f"{INSTANCES}/{known}" not in target.glob(f"{INSTANCES}/*") or not target.exists(cache):
        return  # it has not run yet
    seeds = [target.read(f"{directory}/meta-data") or "" for directory in target.glob(f"{STATE}/seed/*")]
    if known in (found for seed in seeds for found in re.findall(INSTANCE_ID, seed, re.MULTILINE)):
        target.remove(cache)
    else:
        target.write(NAME, "#cloud-config\n" + _document({"hostname": name.split(".")[0], "fqdn": name}))


def write_seed(target: Target, instance: Instance, settings: Settings, interfaces: Sequence[Interface]) -> None:
    """Seed cloud-init for a new instance; forget_instance() removes what it knew of another."""
    target.clear(SEED)  # a file that the image has may be readable to all, and would stay so
    forget_sources(target, interfaces)
    target.write(f"{SEED}/meta-data", meta_data(instance.name, settings, f"iid-{uuid.uuid4()}"), mode=0o600)
    target.write(f"{SEED}/user-data", settings.user_data or "#cloud-config\n{}\n", mode=0o600)
    target.write(VENDOR_DATA, vendor_data(settings), mode=0o600)
    if interfaces:
        target.write(NETWORK_CONFIG, network_config(target, interfaces), mode=0o600)
        if any(interface.dns for interface in interfaces) and needs_resolv_conf(target):
            target.write(RESOLV_CONF, render.resolv_conf(interfaces), follow=False)
    # With only these two to choose from, nothing is probed: no time is lost, and no other source can speak up.
    sources = "datasource_list: [NoCloud, None]\nvendor_data: {enabled: true}\n"
    target.write(DATASOURCE, f"# Written by imageos: the seed is in {SEED}\n{sources}")
    let_in(target, settings, [interface.address.partition("/")[0] for interface in interfaces])
    warn_of_user_data(target, settings)


def warn_of_user_data(target: Target, settings: Settings) -> None:
    """Say what of USER_DATA cloud-init would ignore, or what it overrules; the guest's own parser judges YAML."""
    text = settings.user_data
    if text and not is_known(text):
        log.warning("USER_DATA does not begin with a line that cloud-init knows, such as #cloud-config: it is ignored")
    if text.startswith("#!") and "\r\n" in text:
        log.warning("USER_DATA is a script whose lines end as on Windows: the guest will not find its interpreter")
    if not text.lower().startswith("#cloud-config") or text.lower().startswith(LISTS):
        return
    python = target.which("python3")
    try:
        said = target.run([python, "-c", LOAD], input=text).strip() if python else ""
    except Failure:
        log.debug("the guest's Python cannot judge USER_DATA: it may have no PyYAML")
        return
    if said:
        why = f": {said}" if re.fullmatch(WRONG, said) else ""
        log.warning(f"USER_DATA is no YAML with keys: cloud-init will ignore all of it{why}")
    elif settings.root_password_hash and yaml.has(yaml.scalars(text), "users"):
        log.warning("ROOT_PASSWORD_HASH has no effect: USER_DATA has users of its own")


def forget_sources(target: Target, interfaces: Sequence[Interface]) -> None:
    """Remove what counts more than the seed: the image's choice of a source, what it says of ours, name and network.

    What the kernel's command line says cannot be contradicted: a warning names it.
    """
    target.edit(cloudboot.IDENTIFY, lambda text: re.sub(CHOSEN_SOURCE, "", text, flags=re.MULTILINE))
    keys = (("datasource", "NoCloud"), ("hostname",), ("fqdn",))
    found = [path for key in keys for path in cloudboot.drop(target, *key)]
    if interfaces:
        found += existing.cloud_init(target, interfaces)
    if found:
        files = ", ".join(dict.fromkeys(found))
        log.info(f"cloud-init is to read its seed: what says otherwise is removed from {files}")
    later = cloudboot.read_before_ours(target)
    if later:
        log.info(f"cloud-init is to read imageos's configuration last: {', '.join(later)} has another name now")
    opposed = cloudboot.overruling(target)
    if opposed:
        log.warning(
            f"cloud-init heeds the kernel's {', '.join(opposed)} more than its seed: take that out of the image's "
            "boot loader (for GRUB, /etc/default/grub), or this instance may have another name, network and logins"
        )


def is_known(user_data: str) -> bool:
    """Return whether cloud-init sees what this is: it ignores blanks and case, and a mail may have other headers."""
    text = user_data.lstrip().lower()
    return text.startswith(HEADERS) or "mime-version:" in text[:4096]


def let_in(target: Target, settings: Settings, addresses: Sequence[str]) -> None:
    """Give the keys to whom cloud-init does not, and see that root's account lets in at all.

    Root gets every key of the meta-data without its options (20.4 to 25.1: "no-pty" and the like are replaced by those
    of disable_root, or none). So keys with options are not there: they are in root's file, which cloud-init leaves, and
    in the configuration of the default user, who gets them as they are.
    """
    keys = logins.authorized_keys(settings.ssh_authorized_keys)
    limited = [key for key in keys if key.options]
    target.remove(DEFAULT_USER)
    if limited:
        user = {"default_user": {"ssh_authorized_keys": [key.line for key in limited]}}
        target.write(DEFAULT_USER, "#cloud-config\n" + _document({"system_info": user}), mode=0o600)
        if not re.search(ROOT_DISABLED, settings.user_data, re.MULTILINE | re.IGNORECASE):
            accounts.authorize(target, limited)
    if keys or logins.admits(settings.root_password_hash):
        accounts.admit(target)
        expired = cloudboot.drop(target, "chpasswd")  # it expires what it sets, unless told otherwise
        if expired:
            log.info(f"cloud-init is to set no passwords of the image's: they are removed from {', '.join(expired)}")
        if target.which("sshd"):
            for obstacle in accounts.obstacles(target, keys, settings.root_password_hash, addresses):
                log.warning(obstacle)
        log.info(f"cloud-init gives root {accounts.describe(keys, settings.root_password_hash)}")


def meta_data(instance_name: str, settings: Settings, instance_id: str) -> str:
    keys = [key.line for key in logins.authorized_keys(settings.ssh_authorized_keys) if not key.options]
    return _document({"instance-id": instance_id, "local-hostname": instance_name, "public-keys": keys})


def vendor_data(settings: Settings) -> str:
    """Return the vendor-data that the settings ask for; user-data has the last word. The keys are root's too."""
    config: dict[str, Any] = {"ssh_deletekeys": False}  # the host keys are new already
    if settings.ssh_authorized_keys:
        config.update(disable_root=False, allow_public_ssh_keys=True)
    if settings.root_password_hash:
        # The only way that 20.4 knows and 25 does not call deprecated; a user that is there gets the password, too.
        root = {"name": "root", "lock_passwd": False, "hashed_passwd": settings.root_password_hash}
        config["users"] = ["default", root]
    return "#cloud-config\n" + _document(config)


def network_files(target: Target, interfaces: Sequence[Interface], programs: Sequence[str]) -> dict[str, str]:
    """Return the network-config for a seed that is there (path -> text); `programs`: for what cloud-init writes."""
    if not target.is_file(f"{SEED}/meta-data"):
        log.warning(f"cloud-init has no seed in {SEED}: the guest's network is left as it is")
        return {}
    if not programs:
        return {NETWORK_CONFIG: network_config(target, interfaces)}
    if programs[0] == "ifupdown":
        return {NETWORK_CONFIG: _document(version1(interfaces))}
    return {NETWORK_CONFIG: _document(render.version2(interfaces, programs[-1]))}


def network_config(target: Target, interfaces: Sequence[Interface]) -> str:
    """Return the network configuration, in the version that this guest's network programs can follow."""
    if _understands_routes(target):
        return _document(render.version2(interfaces, existing.netplan_renderer(target)))
    return _document(version1(interfaces, not target.which("ifup")))


def _understands_routes(target: Target) -> bool:
    """Return whether cloud-init writes for a program that can have routes on the link: netplan, or networkd alone.

    cloud-init takes the first of: ifupdown, the scripts of Red Hat and SUSE, netplan, NetworkManager, networkd.
    """
    if target.which("ifup"):
        return False
    return target.which("netplan") is not None or not target.which("NetworkManager")


def version1(interfaces: Sequence[Interface], for_network_manager: bool = False) -> dict[str, Any]:
    """Return the network for ifupdown and NetworkManager. They reach any gateway on the link, and need one for a route.

    With version 2, cloud-init would hand the gateway to route(8), which a guest need not have. NetworkManager refuses
    the whole profile if it has an IPv6 server, but no IPv6 address: 22.4 writes such a one.
    """
    config: list[dict[str, Any]] = []
    for interface in interfaces:
        subnet: dict[str, Any] = {"type": "dhcp4"}
        if interface.address:
            subnet = {"type": "static", "address": interface.address}
            gateway = interface.gateway or (render.LINK_GATEWAY if interface.on_link else "")
            subnet.update({"gateway": gateway} if gateway else {})
        is_ipv4 = for_network_manager and not interface.address6
        servers = [server for server in interface.dns if not (is_ipv4 and ":" in server)]
        subnet.update({"dns_nameservers": servers} if servers else {})
        subnet.update({"dns_search": list(interface.search)} if interface.search else {})
        subnets = [subnet]
        if interface.address6:
            subnets.append({"type": "static6", "address": interface.address6})
            subnets[1].update({"gateway": interface.gateway6} if interface.gateway6 else {})
        config.append({"type": "physical", "name": interface.name, "mac_address": interface.mac, "subnets": subnets})
    return {"version": 1, "config": config}


def needs_resolv_conf(target: Target) -> bool:
    """Return whether the guest has ifupdown, and no program that tells it its DNS servers."""
    has_resolvconf = target.which("resolvconf") is not None and not resolver.has_only_resolvectl(target)
    return bool(target.which("ifup")) and not (has_resolvconf or is_enabled(target, resolver.RESOLVED))


def _document(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
