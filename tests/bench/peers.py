"""What a user would pick instead of imageos: the same image onto the same, larger disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import by_hand as hand

SYNC = 'sync "$loop" "$disk"\n'
VIRT_RESIZE = (
    'virt-resize --quiet --format qcow2 --output-format raw --no-extra-partition --expand /dev/sda3 "$image" "$loop"\n'
)
GUESTFISH = """
guestfish --format=raw --add "$loop" <<END
run
part-disk /dev/sda mbr
mkfs ext4 /dev/sda1
mount /dev/sda1 /
tar-in $image / compress:gzip xattrs:true acls:true
umount-all
END
"""
# growpart and resize2fs run in the guest when it boots first; here on the node, which is quicker
GROWPART = """
growpart "$disk" 3 >/dev/null
blockdev --flushbufs "$loop"
partx --add "$loop"
e2fsck -fp "${loop}p3" >/dev/null
resize2fs "${loop}p3" >/dev/null 2>&1
partx --delete "$loop"
"""


@dataclass(frozen=True)
class Peer:
    name: str
    needs: str  # program
    package: str
    suffix: str  # of the image
    kind: str  # IMAGE_TYPE
    script: str

    def missing(self) -> str:
        """Return why it cannot be measured; empty if it can."""
        if not shutil.which(self.needs):
            return f"{self.needs} is not installed (Debian: {self.package})"
        return appliance() if self.package == "libguestfs-tools" else ""


PEERS = (
    Peer("virt-resize", "virt-resize", "libguestfs-tools", "-zlib.qcow2", "qcow2", VIRT_RESIZE + SYNC),
    Peer("guestfish tar-in", "guestfish", "libguestfs-tools", ".tar.gz", "tarball", GUESTFISH + SYNC),
    Peer("convert, growpart", "growpart", "cloud-guest-utils", "-zlib.qcow2", "qcow2", hand.QCOW2 + GROWPART + SYNC),
    # ganeti-instance-image 0.7.3: its commands, without its shell around them
    Peer("ancestor's way", "tar", "tar", ".tar.gz", "tarball", hand.ANCESTOR + hand.ANCESTOR_TARBALL),
    Peer("ancestor's way", "restore", "dump", "-root.dump", "dump", hand.ANCESTOR + hand.ANCESTOR_DUMP),
)
DIRECT = {"LIBGUESTFS_BACKEND": "direct"}  # not by libvirt
EMULATED = {**DIRECT, "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}


def appliance() -> str:
    """Start libguestfs, by KVM or emulated, as it is to run from now on; return why it does not start."""
    said = ""
    for how in (DIRECT, EMULATED) if Path("/dev/kvm").exists() else (EMULATED,):
        argv = ["guestfish", "--add", "/dev/null", "run"]
        done = subprocess.run(argv, env={**os.environ, **how}, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            os.environ.update(how)
            return ""
        said = next((line for line in done.stderr.splitlines() if "error:" in line), "it says nothing")
    return f"libguestfs does not start ({said})"
