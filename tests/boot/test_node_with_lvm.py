"""A node with udev and lvm2: while imageos works on a guest with LVM, they activate nothing of it.

A virtual machine is the node: this machine's kernel may have no device-mapper. Of the guest's disk all is one physical
volume: the rules of lvm2 activate that on a loop device, but not one on a partition of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bootdisks import BootDisk, boot_disks
from debian import debian
from qemu import booting
from support import TESTS, mounted, partitions, recorded, run

sys.path.insert(0, str(TESTS / "disk"))

import guestdisks
import trees

GROUP = "guest"  # not the node's: lvm2 would take that for the one which it has activated
DISK = "/dev/node/disk"
STEPS = (
    "create ended with status 0",
    "create: the same volumes as before",
    "mount-disks: the same volumes as before",
    "umount-disks ended with status 0",
    "the disk is free",
)
SCRIPT = f"""#!/bin/sh
exec >/dev/ttyS0 2>&1
cd /srv
volumes() {{ dmsetup ls | sort; }}
udevadm settle
volumes >before
env -i $(cat environment) /usr/share/ganeti/os/image/create
echo "create ended with status $?"
udevadm settle
volumes | diff before - && echo "create: the same volumes as before"
mount-disks inst1.example.org --disk {DISK}
sleep 8
volumes | diff before - && echo "mount-disks: the same volumes as before"
umount-disks --here inst1.example.org
echo "umount-disks ended with status $?"
lvchange -an {DISK} && echo "the disk is free"
echo THE-END
"""
HOOK = "#!/bin/sh\nsleep 5\ndmsetup ls | sort | diff /srv/before -\n"
UNIT = """[Unit]
After=multi-user.target
[Service]
Type=exec
ExecStart=/srv/script
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(scope="module")
def system() -> BootDisk:
    return boot_disks({"node": ("mbr", debian("bookworm", "node"))})["node"]


def test_a_guest_with_lvm(system: BootDisk, imageos: Path, tmp_path: Path) -> None:
    tree = trees.guest(tmp_path / "tree", trees.SYSTEMD)
    image = guestdisks.blank(tmp_path / "image", 64)
    guestdisks.volume_group(image, 0, GROUP, {"root": 56})
    guestdisks.make(image, f"{GROUP}/root", "ext4")
    guestdisks.fill(image, f"{GROUP}/root", tree, tmp_path, f"/dev/{GROUP}/root / ext4 defaults 0 1\n")
    own = guestdisks.blank(tmp_path / "own", 160)
    guestdisks.volume_group(own, 0, "node", {"disk": 96})
    disk = tmp_path / "node"
    run("cp", "--sparse=always", system.path, disk)
    with mounted(disk, tmp_path / "mnt", partitions(disk)[0], "rw") as root:
        furnish(root, imageos, image)
    with booting(
        disk, tmp_path / "console", more=["-drive", f"file={own},format=raw,if=virtio,snapshot=on"]
    ) as console:
        text = console.wait_for("^THE-END")
    for step in STEPS:
        assert step in text, text


def furnish(root: Path, imageos: Path, image: Path) -> None:
    """Install imageos on the node, with an image and what is to happen after it has booted."""
    run(imageos, "install", "--root", root, "--bin-dir", "/usr/bin")
    run("cp", "--sparse=always", image, root / f"var/cache/ganeti-instance-image/guest-{trees.ARCH}.raw")
    values = {name: value for name, value in recorded("create").items() if not name.startswith("DISK_1_")}
    values.update(DISK_COUNT="1", DISK_0_PATH=DISK, OSP_IMAGE_NAME="guest", OSP_IMAGE_TYPE="raw")
    site = root / "etc/ganeti/instance-image"
    (site / "variants/default.conf").write_text("")
    for path, text in {
        root / "srv/environment": "\n".join(f"{name}={value}" for name, value in values.items()),
        root / "srv/script": SCRIPT,
        site / "hooks/look": HOOK,
        root / "etc/systemd/system/script.service": UNIT,
    }.items():
        path.write_text(text)
        path.chmod(0o755)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    (wants / "script.service").symlink_to("../script.service")
    (wants / "report-facts.service").unlink()
