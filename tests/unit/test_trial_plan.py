"""variants try: the instance that it tells create of, its disk and its machine."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from imageos import ganeti
from imageos.checks.report import NOTE, OK
from imageos.checks.variants import Variant, check_trials
from imageos.disks import layout, partitions
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.partitions import Table
from imageos.errors import Failure
from imageos.images.imagefile import Image, open_image
from imageos.settings import Settings
from imageos.variants import guestboot, record, trial
from imageos.variants.record import Trial

GIB = 1 << 30
MIB = 1 << 20


@pytest.mark.parametrize(
    "variant, name",
    [
        ("debian-12", "try-debian-12.example"),
        ("my_variant-", "try-my-variant.example"),
        ("ubuntu-24.04", "try-ubuntu-24-04.example"),
        ("x" * 80, f"try-{'x' * 59}.example"),
        ("x" * 58 + "_" + "y" * 20, f"try-{'x' * 58}.example"),
    ],
)
def test_host_names(variant: str, name: str) -> None:
    assert trial.host_name(variant) == name


def test_create_takes_it_for_an_instance() -> None:
    environ = {**trial.environment("debian-12"), "DISK_0_PATH": "/dev/loop9", "DISK_0_SIZE": "2048"}
    instance = ganeti.instance(environ)
    assert instance.name == "try-debian-12.example" and instance.short_name == "try-debian-12"
    assert environ["OS_VARIANT"] == "debian-12"
    assert [(disk.path, disk.size) for disk in instance.disks] == [("/dev/loop9", 2 * GIB)]
    assert [nic.mac for nic in instance.nics] == [guestboot.MAC]
    assert instance.serial_console and not instance.kernel_path and not instance.reinstall
    assert instance.memory == guestboot.MEMORY


def image_of(tmp_path: Path, content: bytes = b"", size: int = 0) -> Image:
    path = tmp_path / "image"
    path.write_bytes(content)
    os.truncate(path, size or len(content))
    return open_image(str(path))


def test_the_disk_of_a_disk_image_has_room_to_grow(tmp_path: Path) -> None:
    settings = Settings(image_type="raw", arch="x86_64")
    assert trial.disk_size(settings, image_of(tmp_path, size=3 * GIB + 512)) == 4 * GIB + MIB


def test_the_disk_of_files_has_room_for_all_partitions(tmp_path: Path) -> None:
    settings = Settings(image_type="tarball", arch="x86_64").with_sizes(guestboot.MEMORY)
    plain = trial.disk_size(settings, image_of(tmp_path, size=GIB))
    assert plain == GIB + trial.ROOT + layout.ESP_SIZE + (100 + 1024) * MIB
    without = trial.disk_size(settings._replace(swap=False), image_of(tmp_path, size=GIB))
    assert plain - without == GIB
    packed = trial.disk_size(settings, image_of(tmp_path, b"\x28\xb5\x2f\xfd" + bytes(32), size=GIB))
    assert packed == plain + (trial.EXPANDED - 1) * GIB


def test_the_machine_reaches_nothing(tmp_path: Path) -> None:
    for firmware, accelerator in (("bios", "kvm"), ("bios", "tcg")):
        words = guestboot.machine(firmware, accelerator, "max", "/dev/loop9")
        assert {"-nodefaults", "-no-user-config"} <= set(words)
        assert words[words.index("-netdev") + 1] == "user,id=net,restrict=on"
        assert words[words.index("-accel") + 1] == accelerator
        assert "spawn=deny" in words[words.index("-sandbox") + 1]
        assert [word for word in words if "/" in word and "file=" in word] == [
            "file=/dev/loop9,format=raw,if=none,id=disk,cache=unsafe,discard=unmap"
        ]
    assert "file=/a b,format" in guestboot.typed("bios", "/a b") and "'" in guestboot.typed("bios", "/a b")


def test_a_disk_is_where_one_can_be(tmp_path: Path) -> None:
    """Not every filesystem has files without a name: /proc has none at all."""
    (tmp_path / "other").mkdir()
    for places in (["/proc", str(tmp_path), "/missing"], [str(tmp_path), str(tmp_path / "other")]):
        with trial.scratch(places, 0, MIB) as (directory, file):
            assert directory == os.path.realpath(tmp_path) and os.fstat(file.fileno()).st_size == MIB
    with pytest.raises(Failure, match="cannot make a disk of 1 MiB in /proc"), trial.scratch(["/proc"], 0, MIB):
        pass
    with pytest.raises(Failure, match=r"TiB needed.*have to stay free"), trial.scratch([str(tmp_path)], 1 << 60, MIB):
        pass


def test_a_kept_disk_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "try-a.raw"
    for size in (1, 2):
        with trial.scratch([str(tmp_path)], 0, size) as (_, file):
            trial.keep(file, str(path), "qemu")
        assert path.stat().st_size == size and path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    path.mkdir()
    with trial.scratch([str(tmp_path)], 0, 1) as (_, file), pytest.raises(Failure, match="Is a directory"):
        trial.keep(file, str(path), "qemu")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "sector, uefi, bios",
    [
        (bytes(510) + b"\x55\xaa", "None", "no boot loader"),
        (b"\xeb" + bytes(509) + b"\x55\xaa", "without --uefi", ""),
        (bytes(512), "None", ""),
    ],
    ids=["table", "code", "nothing"],
)
def test_bios_takes_zeroes_for_code(
    sector: bytes, uefi: str, bios: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "read_table", lambda *_: Table("dos", (), len(sector)))
    image = image_of(tmp_path, sector)
    device = Disk("/dev/vg/a", image.descriptor, len(sector), is_file=False)
    loop = LoopDevice("/dev/loop9", image.descriptor, device, [], set())
    assert uefi in str(trial.other_firmware(loop, "uefi"))
    with pytest.raises(Failure, match=bios) if bios else nullcontext():
        assert trial.other_firmware(loop, "bios") is None


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="aarch64"):
        guestboot.check("aarch64", "bios")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match="qemu-system-x86_64") as caught:
        guestboot.check("x86_64", "bios")
    assert "install qemu-system-x86 " in str(caught.value.hint)
    (tmp_path / "qemu-system-x86_64").touch(0o755)
    guestboot.check("x86_64", "bios")
    monkeypatch.setattr(guestboot, "UEFI", ((str(tmp_path / "none"), "/"),))
    with pytest.raises(Failure) as caught:
        guestboot.check("x86_64", "uefi")
    assert caught.value.hint == "install ovmf"


def test_doctor_says_how_the_last_trial_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "TRIALS", str(tmp_path))
    image = image_of(tmp_path, b"x")
    time = os.fstat(image.descriptor).st_mtime
    record.keep("good", Trial(time, "/image", time))
    record.keep("older", Trial(time, "/image", time - 86400))
    record.keep("bad", Trial(time, "/image", time, problem="it hangs"))
    variants = [Variant(name, Settings()) for name in ("good", "older", "bad", "never")]
    monkeypatch.setattr(Variant, "opened", lambda _variant: nullcontext(image))
    good, older, bad = check_trials(variants)
    assert (good.level, good.hint) == (OK, "") and good.what.endswith(": ok")
    assert (older.level, older.hint) == (NOTE, "imageos variants try older") and "another now" in older.what
    assert (bad.level, bad.hint) == (NOTE, "imageos variants try bad") and bad.what.endswith(": it hangs")
