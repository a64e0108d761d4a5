"""A Debian instance becomes a sealed disk image, which becomes another instance, which boots with its own identity."""

from __future__ import annotations

from pathlib import Path

import pytest
from debian import debian
from qemu import booting
from support import DEFAULTS, MIB, PATH, SITE, Call, Node, partitions


@pytest.fixture
def node(node: Node) -> Node:
    shipped = (node.root / DEFAULTS.relative_to("/")).read_text()
    node.write(DEFAULTS, f"{shipped}\nIMAGE_DIR={node.images}\nIMAGE_TYPE=tarball\n")
    (node.images / "bookworm-x86_64.tar.zst").symlink_to(debian("bookworm").tarball)
    return node


def test_a_sealed_disk_image_boots(node: Node, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for disk, mib in ((first, 1536), (second, 2048)):
        with disk.open("xb") as file:
            file.truncate(mib * MIB)
    (SITE / "hooks/grub").chmod(0o755)
    node.create(first, env="create-kvm-network", OSP_IMAGE_NAME="bookworm").ok()
    (SITE / "hooks/grub").chmod(0o644)  # the boot loader comes with the image
    words = ["ganeti-image", "-t", "qemu-img", "-i", "inst1", "--disk", str(first), "-n", "template", "--seal"]
    Call(node.imageos, {"PATH": PATH}, tmp_path / "capture.log", words).result().ok()
    assert (node.images / "template-x86_64.qcow2").stat().st_size < 400 * MIB
    log = node.create(second, env="create-kvm-network", OSP_IMAGE_NAME="template", OSP_IMAGE_TYPE="qcow2").ok()
    assert "grew" in log.log
    with booting(second, tmp_path / "console") as console:
        console.wait_for(r"^Debian GNU/Linux 12 inst1 ttyS0$", r"^inst1 login: ")
        facts = console.facts()
    assert facts.failed == []
    assert facts["state"] == "running"
    assert facts["sshd"] == "active"
    assert facts["machine-id"] != debian("bookworm").machine_id
    assert facts.host_keys and not facts.host_keys & debian("bookworm").host_keys
    assert facts.swaps == ["/dev/vda2"]
    root = partitions(second)[2]
    assert facts.mounts["/"].source == "/dev/vda3"
    assert facts.sizes["/dev/vda3"] == root.size > 1400 * MIB
