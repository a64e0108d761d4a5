"""export and import that are stopped, or cannot go on; and their hooks."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import backups
import guestdisks
import pytest
from backups import exported, is_disarmed, restore, start_export
from streams import MakeDisk, soil
from streams import backup as backup
from support import MIB, Node, locked, mounted, partitions, recorded, session, signatures, wait_until


@pytest.fixture
def large(disk: MakeDisk) -> Path:
    """Return a disk with more data than any pipe holds."""
    path = disk(1)
    path.write_bytes(os.urandom(24 * MIB))
    return path


def test_nobody_reads(node: Node, large: Path) -> None:
    reader, writer = os.pipe()
    call = start_export(node, large, writer)
    os.close(writer)
    os.read(reader, 100_000)
    os.close(reader)
    call.result().failed("Broken pipe")
    call.announced()


def test_disk_that_cannot_be_read_on(node: Node, large: Path) -> None:
    reader, writer = os.pipe()
    call = start_export(node, large, writer)
    os.close(writer)
    os.read(reader, 1000)
    os.truncate(large, 12 * MIB)
    with open(reader, "rb") as stream:
        stream.read()
    call.result().failed(str(large), "byte")
    call.announced()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_export_is_killed(number: signal.Signals, group: bool, node: Node, large: Path) -> None:
    """Both pipes are closed at once, as Ganeti waits only for that."""
    reader, writer = os.pipe()
    call = start_export(node, large, writer)
    os.close(writer)
    os.read(reader, 1000)
    (os.killpg if group else os.kill)(call.process.pid, number)
    result = call.result()  # the full pipe blocks it until the signal arrives
    with open(reader, "rb") as stream:
        stream.read()
    call.announced()
    assert result.status == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_import_is_killed(
    number: signal.Signals, node: Node, disk: MakeDisk, backup: tuple[bytes, list[tuple[int, int]]]
) -> None:
    """The partly written disk is not recognised as one."""
    target = soil(disk(32))
    reader, writer = os.pipe()
    call = backups.Running(node, "import", backups.environment(node, "import", target), reader, None)
    os.close(reader)
    with open(writer, "wb") as stream:
        stream.write(backup[0][: len(backup[0]) // 2])
        stream.flush()
        os.kill(call.process.pid, number)
        call.announced()
        assert call.result().status == 128 + number
    assert not signatures(target)
    assert number == signal.SIGKILL or is_disarmed(target, backup[1])


def test_disk_in_use(node: Node, disk: MakeDisk, block_disk: MakeDisk) -> None:
    source, target = disk(32), disk(32)
    stream = exported(node, source)
    with locked(source):
        done = backups.export(node, source)
        done.result.failed("in use", str(source))
        assert not done.size and not done.announced
    with locked(target):
        restore(node, stream, target).failed("in use", str(target))
    with source.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # like another export
        exported(node, source)
        node.create(source).failed("in use")
        restore(node, stream, source).failed("in use")


def test_stray_prints(node: Node, large: Path) -> None:
    """Output of a settings file goes to the log."""
    node.defaults("echo stray print")
    done = backups.export(node, large)
    assert "stray print" not in done.stream.read_bytes().decode("latin-1")
    assert done.announced == f"{done.size}\n" and done.result.status == 0


def test_broken_settings_do_not_stop_a_backup(node: Node, large: Path) -> None:
    node.defaults("FILESYSTEM=ext5")
    done = backups.export(node, large)
    assert "ext5" in done.result.ok().log
    node.defaults("if")
    backups.export(node, large).result.ok()


@pytest.mark.parametrize("command", ["export", "import"])
def test_called_by_hand(command: str, node: Node) -> None:
    node.call(command, {"PATH": "/usr/bin:/bin"}).failed("OS_API_VERSION")
    values = recorded(f"{command}-disk0")
    name = f"{command.upper()}_DEVICE"
    node.call(command, {**values, name: "", "EXP_SIZE_FD": ""}).failed(name)
    node.call(command, {**values, name: "", f"{command.upper()}_DISK_URI": "rbd:x", "EXP_SIZE_FD": ""}).failed("URI")
    node.call(command, {**values, name: "/nonexistent", "EXP_SIZE_FD": ""}).failed("/nonexistent")


# --- hooks -----------------------------------------------------------------------------------------------

HOOK = '#!/bin/sh\necho "$IMAGEOS_ACTION $IMPORT_SCRIPT $# $(cat $TARGET/etc/os-release | head -1) $ROOT_DEV" >&2\n'


def test_hooks(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Hooks in IMPORT_HOOKS run for the first disk, if that contains a system."""
    guest = guestdisks.mbr(tmp_path / "mbr.img", small_tree, tmp_path)
    stream = exported(node, guest.path)
    for name in ("chosen", "other"):
        node.hook(name, HOOK)
    node.defaults("IMPORT_HOOKS=chosen")
    target = disk(101)
    log = restore(node, stream, target).ok().log
    assert "chosen: import 1 0 ID=tiny /dev/loop" in log and "other" not in log
    assert "chosen" not in restore(node, stream, target, index=1).ok().log
    assert "chosen" not in restore(node, stream, target, OSP_NOMOUNT="yes").ok().log
    node.hook("chosen", "#!/bin/sh\nexit 3\n")
    restore(node, stream, target).failed("chosen", "status 3")
    with mounted(target, tmp_path / "mnt", partitions(target)[0], "ro,noload") as top:
        assert (top / "etc/os-release").exists(), "the disk was whole, and should have stayed so"
    empty = exported(node, disk(16))
    assert "no root filesystem" in restore(node, empty, disk(16)).ok().log


def test_create_waits_for_nobody(node: Node, disk: MakeDisk) -> None:
    """A stopped export leaves the disk free."""
    source = disk(160)
    source.write_bytes(os.urandom(8 * MIB))
    os.truncate(source, 160 * MIB)
    reader, writer = os.pipe()
    call = start_export(node, source, writer)
    os.close(writer)
    os.read(reader, 1000)
    node.create(source).failed("in use")
    os.kill(call.process.pid, signal.SIGKILL)
    call.result()
    os.close(reader)
    call.announced()
    wait_until(lambda: not session(call.process.pid), "the disk is free")
    node.create(source).ok()
