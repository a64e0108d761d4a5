"""The contract on the settings, and ways to load them."""

from __future__ import annotations

from imageos import settings
from imageos.settings import Settings

SITE = "/etc/ganeti/instance-image"
CACHE = "/var/cache/ganeti-instance-image"
SECRET = "$6$never$" + "shown".ljust(86, ".")

# The contract: setting, its default as text (empty: none), and whether it is an OS parameter.
CONTRACT = [
    ("CDINSTALL", "no", True),
    ("SWAP", "yes", True),
    ("SWAP_SIZE", "", True),  # the instance's memory
    ("BOOT_SIZE", "", True),  # 100, or 512 with PARTITION_TABLE=gpt
    ("FILESYSTEM", "ext3", True),
    ("PARTITION_TABLE", "msdos", True),
    ("KERNEL_ARGS", "", True),
    ("IMAGE_NAME", "", True),
    ("ARCH", "", True),  # the node's
    ("IMAGE_TYPE", "dump", True),
    ("IMAGE_DIR", CACHE, False),
    ("IMAGE_URL", "", True),
    ("IMAGE_CHECKSUM", "", True),
    ("IMAGE_KEYRING", "", False),
    ("IMAGE_SIGNER", "", False),
    ("IMAGE_SIGNED_NAME", "", False),
    ("IMAGE_VERIFY", "yes", False),
    ("IMAGE_CLEANUP", "no", False),
    ("CACHE_DIR", CACHE, False),
    ("EXPORT_DIR", "/tmp", False),
    ("FDISK", "sfdisk", False),
    ("GROW", "yes", True),
    ("NOMOUNT", "no", True),
    ("OVERLAY", "", True),
    ("CUSTOMIZE_DIR", f"{SITE}/hooks", False),
    ("VARIANTS_DIR", f"{SITE}/variants", False),
    ("NETWORKS_DIR", f"{SITE}/networks", False),
    ("OVERLAYS_DIR", f"{SITE}/overlays", False),
    ("IMPORT_HOOKS", "grub", False),
    ("RENAME_HOOKS", "zz_ddns", False),
    ("DNS_SERVERS", "", True),
    ("DNS_SEARCH", "", True),
    ("DNS_DOMAIN", "", True),
    ("SSH_AUTHORIZED_KEYS", "", True),
    ("ROOT_PASSWORD_HASH", "", True),
    ("USER_DATA", "", True),
    ("HOOK_TIMEOUT", "3600", False),
    ("GUEST_TIMEOUT", "600", False),
    ("IMAGE_DEBUG", "no", True),
]


def given_values(**parameters: str) -> dict[str, str]:
    """Return Ganeti's environment with these OS parameters."""
    return {f"OSP_{name.upper()}": value for name, value in parameters.items()}


def load(**parameters: str) -> Settings:
    return settings.load_settings(given_values(**parameters), "/nonexistent")
