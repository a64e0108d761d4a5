"""A disk that is a file, as far as tests need no root: claim, refuse, wipe it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import make_odd

from imageos.disks import blockdev
from imageos.disks.blockdev import SIGNATURES, Disk, LoopDevice
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.node import linux

F_OFD_SETLK = 37  # fcntl.h


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk0"
    file.write_bytes(b"\xaa" * (5 * MIB))
    return file


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a lock that is never released."""
    monkeypatch.setattr(blockdev, "BUSY_TIMEOUT", 0.01)


@pytest.fixture
def attached(path: Path) -> Iterator[LoopDevice]:
    """The file in the place of the loop device and of its disk."""
    with path.open("r+b", buffering=0) as file:
        disk = Disk(str(path), file.fileno(), path.stat().st_size, is_file=True)
        yield LoopDevice("/dev/loop7", file.fileno(), disk, [], set())


# Claim


def test_claimed(path: Path) -> None:
    with blockdev.claimed(str(path)) as device:
        assert (device.path, device.size, device.is_file) == (str(path), 5 * MIB, True)
        os.fstat(device.descriptor)
        assert not os.get_inheritable(device.descriptor)
    with pytest.raises(OSError):
        os.fstat(device.descriptor)


def test_two_runs_on_one_disk(path: Path, impatient: None) -> None:
    with blockdev.claimed(str(path)), pytest.raises(Failure) as raised, blockdev.claimed(str(path)):
        pass
    assert str(raised.value) == f"disk {path} is in use: another process has locked it"
    assert "stop the instance first" in str(raised.value.hint)


def test_somebody_who_only_glances_at_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """udev locks the disk for a moment, with a shared lock."""
    refusals = [BlockingIOError(), BlockingIOError()]
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if refusals:
            raise refusals.pop()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with blockdev.claimed(str(path)), path.open("rb") as file, pytest.raises(BlockingIOError):
        real(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_loop_device_that_is_another_disks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process took the device first, and keeps it for longer than we wait."""
    backings = ["/srv/ours", "/srv/ours", "/srv/theirs"]
    monkeypatch.setattr(blockdev, "_attribute", lambda *_: backings.pop(0) if len(backings) > 1 else backings[0])
    blockdev._await_detached("/dev/loop7", "/srv/ours")
    monkeypatch.setattr(blockdev, "DEADLINE", 0.1)
    backings = ["/srv/ours"]
    with pytest.raises(Failure, match="still attached"):
        blockdev._await_detached("/dev/loop7", "/srv/ours")


def test_readers_share(path: Path, impatient: None) -> None:
    reader = blockdev.claimed(str(path), read_only=True)
    with reader, blockdev.claimed(str(path), read_only=True), pytest.raises(Failure, match="in use"):
        blockdev.claimed(str(path)).__enter__()
    with blockdev.claimed(str(path)):
        pass


def test_virtual_machine_uses_it(path: Path) -> None:
    """qemu locks single bytes of its images, with locks on open file descriptions."""
    with path.open("r+b") as other:
        fcntl.fcntl(other, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0))
        with pytest.raises(Failure, match="in use: an instance, or another program"), blockdev.claimed(str(path)):
            pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "No such file or directory"),
        ("dangling link", "No such file or directory"),
        ("directory", "is neither a block device nor a regular file"),
        ("fifo", "is neither a block device nor a regular file"),
    ],
)
def test_no_disk(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    make_odd(path, kind)
    with pytest.raises(Failure) as raised, blockdev.claimed(str(path)):
        pass
    assert str(raised.value).startswith(f"disk {path}")
    assert message in str(raised.value)


def test_no_descriptor_stays(path: Path, impatient: None) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with blockdev.claimed(str(path)), pytest.raises(Failure), blockdev.claimed(str(path)):
        pass
    with pytest.raises(RuntimeError), blockdev.claimed(str(path)):
        raise RuntimeError
    assert sorted(os.listdir("/proc/self/fd")) == before


# Wipe


def zeroed(path: Path) -> list[int]:
    """Return which MiB of the file are zero."""
    content = path.read_bytes()
    return [n for n in range(len(content) // MIB) if not any(content[n * MIB : (n + 1) * MIB])]


def test_both_ends_of_each_range(path: Path, attached: LoopDevice) -> None:
    blockdev.wipe(attached.descriptor, [(0, 5 * MIB)])
    assert zeroed(path) == [0, 4]
    blockdev.wipe(attached.descriptor, [(2 * MIB, MIB)])
    assert zeroed(path) == [0, 2, 4]
    assert path.stat().st_size == 5 * MIB


def test_small_range_is_all_that_is_wiped(path: Path, attached: LoopDevice) -> None:
    blockdev.wipe(attached.descriptor, [(MIB, SIGNATURES // 2)])
    content = path.read_bytes()
    assert content.count(b"\0") == SIGNATURES // 2
    assert content.find(b"\0") == MIB


@pytest.fixture
def partitioned(attached: LoopDevice, monkeypatch: pytest.MonkeyPatch) -> LoopDevice:
    """The same, of which the kernel knows one partition."""
    monkeypatch.setattr(blockdev, "_kernel_partitions", lambda _: {1: (MIB, 3 * MIB)})
    return attached


def test_failure_disarms(path: Path, partitioned: LoopDevice) -> None:
    with pytest.raises(RuntimeError), blockdev.disarmed_on_failure(partitioned):
        raise RuntimeError
    assert zeroed(path) == [0, 1, 3, 4]


def test_success_leaves_it_as_it_is(path: Path, partitioned: LoopDevice) -> None:
    with blockdev.disarmed_on_failure(partitioned):
        pass
    assert zeroed(path) == []


def test_root_cause_is_not_hidden(
    partitioned: LoopDevice, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(Failure, match="^the real cause$"), blockdev.disarmed_on_failure(partitioned):
        raise Failure("the real cause")
    assert f"disk {partitioned.disk.path} may still look bootable" in capfd.readouterr().err


def test_partition_node() -> None:
    assert LoopDevice("/dev/loop7", -1, Disk("", -1, 0, is_file=False), [], set()).partition(15) == "/dev/loop7p15"


# Structures for the kernel: their sizes (include/uapi/linux/loop.h, blkpg.h)


def test_loop_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *arguments: calls.append(arguments))
    linux.configure_loop(7, 8, linux.LO_FLAGS_AUTOCLEAR | linux.LO_FLAGS_PARTSCAN)
    ((descriptor, request, config),) = calls
    assert (descriptor, request, len(config)) == (7, 0x4C0A, 304)
    backing, block_size = struct.unpack_from("=II", config)
    (flags,) = struct.unpack_from("=I", config, 8 + 5 * 8 + 3 * 4)
    assert (backing, block_size, flags) == (8, 512, 4 | 8)


@pytest.mark.parametrize("operation", ["add", "delete", "resize"])
def test_partition_is_told(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def ioctl(descriptor: int, request: int, argument: bytes) -> None:
        code, _, length, pointer = struct.unpack("@iiiP", argument)
        data = ctypes.string_at(pointer, length)
        seen.append((descriptor, request, code, length, struct.unpack_from("@qqi", data)))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    if operation == "add":
        linux.change_partition(7, linux.BLKPG_ADD_PARTITION, 3, MIB, 4 * MIB)
        assert seen == [(7, 0x1269, 1, 152, (MIB, 4 * MIB, 3))]
    elif operation == "resize":
        linux.change_partition(7, linux.BLKPG_RESIZE_PARTITION, 3, MIB, 4 * MIB)
        assert seen == [(7, 0x1269, 3, 152, (MIB, 4 * MIB, 3))]
    else:
        linux.change_partition(7, linux.BLKPG_DEL_PARTITION, 3)
        assert seen == [(7, 0x1269, 2, 152, (0, 0, 3))]
