"""Real cloud-init of three versions in deployed guests: who can log in, and what the guest is called after a rename."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import running
from credentials import HASH
from debian import debian
from running import FAR, NEAR
from support import MIB, Node

GUESTS = {"bullseye": "cloud-init-ifupdown", "bookworm": "cloud-init", "trixie": "cloud-init"}  # 20.4, 22.4, 25.1
SIZE = 1400  # MiB


@pytest.fixture(params=GUESTS)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def create(suite: str, node: Node, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that deploys the guest and returns its disk."""
    (node.images / "cloud-x86_64.tar.zst").symlink_to(debian(suite, GUESTS[suite]).tarball)

    def deployed(**parameters: str) -> Path:
        disk = tmp_path / "disk"
        with disk.open("xb") as file:
            file.truncate(SIZE * MIB)
        given = {f"OSP_{name.upper()}": value for name, value in parameters.items()}
        node.create(disk, OSP_IMAGE_NAME="cloud", OSP_BOOT_SIZE="100", NIC_COUNT="0", **given).ok()
        return disk

    return deployed


def test_options_of_keys_are_kept(create: Callable[..., Path], tmp_path: Path) -> None:
    """One key may come from NEAR alone, the other from anywhere: for root and for the default user, at every boot."""
    limited, free = (tmp_path / name for name in ("limited", "free"))
    keys = f'from="{NEAR}",no-pty {running.new_key(limited)}\n{running.new_key(free, "ecdsa")}\n'
    with running.guest_of(create(ssh_authorized_keys=keys), tmp_path / "root") as root:
        for _ in range(2):
            running.booted(root)
            for user in ("debian", "root"):
                assert running.logins(root, limited, user) == {NEAR: True, FAR: False}, user
                assert running.logins(root, free, user) == {NEAR: True, FAR: True}, user


def test_name_after_a_rename(suite: str, create: Callable[..., Path], node: Node, tmp_path: Path) -> None:
    """cloud-init has cached the old name, and writes /etc/hosts at each boot. What was changed in the guest stays."""
    manage = "localhost" if suite == "bullseye" else "true"
    user_data = f"#cloud-config\nmanage_etc_hosts: {manage}\nwrite_files: [{{path: /etc/first-boot, content: x}}]\n"
    disk = create(user_data=user_data, ssh_authorized_keys=running.new_key(tmp_path / "key"))
    with running.guest_of(disk, tmp_path / "root") as root:
        running.booted(root)
        assert "inst1.example.org" in (root / "etc/hosts").read_text()
        before = identity(root)
        changed_by_hand(root)
    rename = node.environment(
        disk, env="rename", OLD_INSTANCE_NAME="inst1.example.org", INSTANCE_NAME="new.example.net"
    )
    node.call("rename", rename).ok()
    with running.guest_of(disk, tmp_path / "root") as root:
        for _ in range(2):
            said = running.booted(root, 'hostname; chroot "$root" hostname --fqdn; chroot "$root" getent hosts new')
            assert said.split() == ["new", "new.example.net", "127.0.1.1", "new.example.net", "new"]
            assert "inst1" not in (root / "etc/hosts").read_text() + (root / "etc/hostname").read_text()
            assert identity(root) == before
            assert_unchanged(root)


def identity(root: Path) -> object:
    names = ("etc/machine-id", "etc/ssh/ssh_host_ed25519_key", "var/lib/cloud/data/instance-id")
    return [(root / name).read_text() for name in names]


def changed_by_hand(root: Path) -> None:
    """Do what an administrator does after the first boot, and a per-instance module would undo."""
    (root / "root/.ssh/authorized_keys").write_text("")
    (root / "etc/first-boot").unlink()
    shadow = root / "etc/shadow"
    shadow.write_text(shadow.read_text().replace("root:*:", f"root:{HASH}:"))


def assert_unchanged(root: Path) -> None:
    assert (root / "root/.ssh/authorized_keys").read_text() == ""
    assert not (root / "etc/first-boot").exists()
    assert f"root:{HASH}:" in (root / "etc/shadow").read_text()
