"""The guest's initramfs, which comes with the image and is not made anew: the swap of the image's disk in it.

initramfs-tools and dracut keep in it from which swap to resume, and wait for that at each boot, on a new disk in vain.
Only the kernel's command line tells one that is there: NORESUME.
"""

from __future__ import annotations

import re

from imageos.guests.target import Target

NORESUME = "noresume"
INITRAMFS_TOOLS = "/etc/initramfs-tools"
MAKERS = (INITRAMFS_TOOLS, "/usr/lib/dracut")
# A device, which initramfs-tools copies into the next initramfs; `auto` is the swap that the guest then has
RESUME = r"^[ \t]*(?:export[ \t]+)?RESUME=(?![\"']?(?:auto|none)?[\"']?[ \t]*(?:#|$)).*\n?"


def may_resume(target: Target) -> bool:
    """Return whether the initramfs may look for a swap of which the kernel's command line says nothing."""
    return any(map(target.is_dir, MAKERS))


def forget_swap(target: Target) -> bool:
    """Have the next initramfs look for the guest's own swap, not for the image's; return whether there is a change."""
    changed = False
    for path in (f"{INITRAMFS_TOOLS}/initramfs.conf", *target.glob(f"{INITRAMFS_TOOLS}/conf.d/*")):
        if target.is_file(path):
            changed |= target.edit(path, lambda text: re.sub(RESUME, "", text, flags=re.MULTILINE))
    return changed
