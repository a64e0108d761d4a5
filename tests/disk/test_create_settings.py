"""Sources of settings, allowed content of files, and messages about wrong settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import DEFAULTS, MIB, SITE, Node, digest, partitions

from imageos import settings
from imageos.errors import Failure

MakeDisk = Callable[..., Path]
SHOW = '#!/bin/sh\nset | grep -a "^[A-Z]"\n'


@pytest.fixture
def swap_size(node: Node, disk: MakeDisk) -> Callable[..., int]:
    def deploy(**overrides: object) -> int:
        target = disk(512)
        node.create(target, **overrides).ok()
        swap = [part for part in partitions(target) if part.content.get("TYPE") == "swap"]
        return swap[0].size // MIB if swap else 0

    return deploy


def test_precedence(node: Node, swap_size: Callable[..., int]) -> None:
    node.defaults("SWAP_SIZE=")
    assert swap_size() == 256, "built-in: the memory of the instance"
    node.defaults("SWAP_SIZE=11")
    assert swap_size() == 11
    node.variant("default", "SWAP_SIZE=12\n")
    assert swap_size() == 12
    assert swap_size(OSP_SWAP_SIZE="13") == 13
    node.variant("other", "SWAP=no\n")
    assert swap_size(OS_VARIANT="other") == 0
    assert swap_size(OS_VARIANT="other", OSP_SWAP="yes") == 11


def test_no_variant_at_all(node: Node, swap_size: Callable[..., int]) -> None:
    """API 10 has no variants; API 15 and 20 pass an empty one if the OS has none."""
    node.variant("default", "SWAP_SIZE=12\n")
    assert swap_size(OS_VARIANT=None) == 8
    assert swap_size(OS_VARIANT="") == 8


def test_without_defaults_file(node: Node, swap_size: Callable[..., int]) -> None:
    DEFAULTS.unlink()
    node.variant("default", f"IMAGE_DIR={node.images}\nIMAGE_TYPE=tarball\nBOOT_SIZE=24\n")
    assert swap_size() == 256


def test_memory_of_old_ganeti(node: Node, swap_size: Callable[..., int]) -> None:
    node.defaults("SWAP_SIZE=")
    assert swap_size(INSTANCE_BE_maxmem=None, INSTANCE_BE_minmem=None, INSTANCE_BE_memory="64") == 64


@pytest.mark.parametrize("version", ["10", "15", "20"])
def test_api_versions(version: str, node: Node, swap_size: Callable[..., int]) -> None:
    """OS parameters exist since API 20, variants since 15."""
    node.variant("default", "SWAP_SIZE=12\nIMAGE_NAME=tiny\n")
    less: dict[str, object] = {"OS_API_VERSION": version}
    if version != "20":
        less["OSP_IMAGE_NAME"] = None
    if version == "10":
        node.defaults("IMAGE_NAME=tiny")
        less["OS_VARIANT"] = None
    assert swap_size(**less) == (8 if version == "10" else 12)


@pytest.mark.parametrize(
    "text, size",
    [
        ("SWAP_SIZE=$((2 * 7))", 14),
        ('SWAP_SIZE=$(printf %s "1$DISK_COUNT")', 11),
        ('if [ "$INSTANCE_NAME" = inst1.example.org ]; then\n  SWAP_SIZE=15\nfi', 15),
        ('SWAP_SIZE="9"  # a comment', 9),
        ("export SWAP_SIZE='10'", 10),
        (": ${SWAP_SIZE:=99}", 8),
        ("half=5; SWAP_SIZE=$((half + INSTANCE_BE_maxmem / 64))", 9),
        ("set -e; false || true; SWAP_SIZE=13", 13),
        ("grep -q nothing /dev/null\nSWAP_SIZE=13", 13),
        ("echo talkative; SWAP_SIZE=13", 13),
        ("case $OS_VARIANT in default) SWAP_SIZE=16;; esac", 16),
        (". /etc/default/more", 17),
    ],
)
def test_files_are_shell(text: str, size: int, node: Node, disk: MakeDisk) -> None:
    node.write(Path("/etc/default/more"), "SWAP_SIZE=17\n")
    node.defaults(text)
    assert settings.load_settings(node.environment(disk())).swap_size == size


def test_variant_sees_the_defaults(node: Node, swap_size: Callable[..., int]) -> None:
    node.defaults("SWAP_SIZE=20\nMY_OWN=3")
    node.variant("default", "SWAP_SIZE=$((SWAP_SIZE + MY_OWN))\n")
    assert swap_size() == 23


def test_ganetis_variables_win(node: Node, disk: MakeDisk) -> None:
    """A file that sets Ganeti's own variables cannot make us write to another disk."""
    first, other = disk(), disk()
    before = digest(other)
    node.defaults(f"DISK_0_PATH={other}\nINSTANCE_NAME=evil\nDISK_COUNT=0")
    node.create(first).ok()
    assert digest(other) == before
    assert len(partitions(first)) == 3


def test_unknown_setting(node: Node, disk: MakeDisk) -> None:
    node.defaults("SWAP_SISE=40\nSITE_NOTE='two words'\n")
    node.variant("default", "SWAP_SISE=41\n")
    node.hook("show", SHOW)
    result = node.create(disk()).ok()
    warnings = [line for line in result.lines if "SWAP_SISE" in line and "warning" in line]
    assert len(warnings) == 1, "warned about once"
    assert "SWAP_SIZE" in warnings[0], "the nearest known name"
    assert "SWAP_SISE='41'" in result.log and "SITE_NOTE='two words'" in result.log, "passed to hooks"


def test_known_settings_are_not_warned_about(node: Node, disk: MakeDisk) -> None:
    node.defaults(
        "FDISK=sfdisk\nEXPORT_DIR=/tmp\nCACHE_DIR=/tmp/cache\nIMAGE_VERIFY=no\nIMAGE_CLEANUP=no\n"
        "NETWORKS_DIR=/etc/ganeti/instance-image/networks\n"
    )
    assert "warning" not in node.create(disk()).ok().log


def test_unknown_os_parameter(node: Node, disk: MakeDisk) -> None:
    """The recorded environment contains one: OSP_ROOT_PASSWORD."""
    result = node.create(disk(), OSP_ROOT_PASSWORD="hunter2").ok()
    assert "root_password" in result.log.lower()
    assert "hunter2" not in result.log


@pytest.mark.parametrize(
    "setting, value, accepted",
    [
        ("SWAP", "maybe", "yes or no"),
        ("SWAP_SIZE", "lots", "MiB"),
        ("SWAP_SIZE", "-5", "MiB"),
        ("BOOT_SIZE", "1G", "MiB"),
        ("FILESYSTEM", "zfs", "btrfs"),
        ("PARTITION_TABLE", "bsd", "gpt"),
        ("IMAGE_TYPE", "iso", "tarball"),
        ("IMAGE_NAME", "../../etc/shadow", "name"),
        ("IMAGE_NAME", ".hidden", "name"),
        ("OVERLAY", "../..", "name"),
        ("ARCH", "../x", "architecture"),
        ("IMAGE_URL", "file:///etc", "http"),
        ("IMAGE_CHECKSUM", "md5:00", "sha256"),
        ("GROW", "2", "yes or no"),
        ("KERNEL_ARGS", "quiet\nevil", ""),
    ],
)
@pytest.mark.parametrize("where", ["defaults", "variant", "parameter"])
def test_wrong_value(setting: str, value: str, accepted: str, where: str, node: Node, disk: MakeDisk) -> None:
    overrides = {}
    source = ""
    if where == "defaults":
        node.defaults(f"{setting}='{value}'")
        source = str(DEFAULTS)
    elif where == "variant":
        node.variant("default", f"{setting}='{value}'\n")
        source = str(SITE / "variants/default.conf")
    else:
        overrides[f"OSP_{setting}"] = value
    if setting == "IMAGE_NAME" and where != "parameter":
        overrides["OSP_IMAGE_NAME"] = None
    target = disk()
    with pytest.raises(Failure) as raised:
        settings.load_settings(node.environment(target, **overrides))
    for word in (setting, value.splitlines()[0], source, accepted):
        assert word in str(raised.value)
    if setting == "SWAP":
        before = digest(target)
        node.create(target, **overrides).failed(setting, value, source, accepted)
        assert digest(target) == before


@pytest.mark.parametrize(
    "setting",
    [
        "IMAGE_DIR",
        "CUSTOMIZE_DIR",
        "VARIANTS_DIR",
        "OVERLAYS_DIR",
        "NETWORKS_DIR",
        "CACHE_DIR",
        "EXPORT_DIR",
        "IMAGE_KEYRING",
        "IMAGE_SIGNER",
        "IMAGE_SIGNED_NAME",
        "HOOK_TIMEOUT",
        "GUEST_TIMEOUT",
        "IMPORT_HOOKS",
    ],
)
def test_settings_of_the_node_are_no_os_parameters(setting: str, node: Node, disk: MakeDisk) -> None:
    with pytest.raises(Failure, match=setting):
        settings.load_settings(node.environment(disk(), **{f"OSP_{setting}": "/tmp"}))


def test_os_parameters_are_values_not_shell(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    node.hook("show", '#!/bin/sh\nprintf "<%s>\\n" "$KERNEL_ARGS" "$USER_DATA"\n')
    nasty = f"$(touch {witness}) `touch {witness}` ; touch {witness} \" ' \\ %s *"
    result = node.create(disk(), OSP_KERNEL_ARGS=nasty, OSP_USER_DATA=nasty).ok()
    assert result.log.count(f"<{nasty}>") == 2
    node.create(disk(), OSP_DNS_SEARCH=nasty).failed("DNS_SEARCH", "is not accepted: it must be DNS domains")
    assert not witness.exists()
