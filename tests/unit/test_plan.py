"""The layouts of the contract, from settings and instances."""

from __future__ import annotations

from pathlib import Path

import pytest

from imageos import deployment
from imageos.commands import create
from imageos.disks import filesystem
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.settings import Settings


def instance(kernel_path: str = "") -> Instance:
    return Instance("inst1.example.org", "kvm", 256, (), (), kernel_path, True, 38400, False)


def sizes(settings: Settings, kernel_path: str = "") -> dict[str, int]:
    """Return role -> MiB, in the order on the disk."""
    guest = instance(kernel_path)
    made = filesystem.plan_layout(settings.with_sizes(guest.memory), 10 << 30, not guest.kernel_path)
    return {part.role: part.size // MIB for part in made.partitions if part.role not in ("bios", "esp", "root")}


@pytest.mark.parametrize(
    ("settings", "kernel_path", "expected"),
    [
        (Settings(), "", {"boot": 100, "swap": 256}),
        (Settings(swap=False), "", {"boot": 100}),
        (Settings(), "/boot/vmlinuz", {"swap": 256}),
        (Settings(swap=False), "/boot/vmlinuz", {}),
        (Settings(partition_table="gpt"), "", {"boot": 512, "swap": 256}),
        (Settings(partition_table="gpt"), "/boot/vmlinuz", {"swap": 256}),
        (Settings(partition_table="gpt", swap=False), "/boot/vmlinuz", {}),
        (Settings(boot_size=64, swap_size=32), "", {"boot": 64, "swap": 32}),
        (Settings(partition_table="gpt", boot_size=64, swap_size=32), "", {"boot": 64, "swap": 32}),
    ],
)
def test_sizes(settings: Settings, kernel_path: str, expected: dict[str, int]) -> None:
    assert sizes(settings, kernel_path) == expected


@pytest.mark.parametrize(("kind", "needs"), [("ext4", "16 MiB"), ("btrfs", "128 MiB"), ("xfs", "300 MiB")])
def test_each_filesystem_has_a_smallest_root(kind: str, needs: str) -> None:
    settings = Settings(filesystem=kind, swap_size=10200).with_sizes(256)
    with pytest.raises(Failure, match=f"needs {needs}"):
        filesystem.plan_layout(settings, 10304 << 20, has_boot=True)


def test_instance_without_a_disk() -> None:
    with pytest.raises(Failure, match="inst1.example.org has no disk") as raised:
        deployment.create(instance(), Settings())
    assert "CDINSTALL=yes" in str(raised.value.hint)


def test_installer_leaves_the_disks_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("the disk was touched")

    environment = {"OS_API_VERSION": "20", "INSTANCE_NAME": "inst1.example.org", "OSP_CDINSTALL": "yes"}
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("imageos.settings.load_settings.__defaults__", (str(tmp_path / "none"),))
    monkeypatch.setattr("imageos.node.isolation.enter", lambda: None)
    monkeypatch.setattr(deployment, "create", touched)
    assert create.main([]) == 0
