"""restore(8) does not report what it loses: imageos detects it, and corrects or refuses it, on any node.

Its stand-ins run the real one and then lose what other versions lose: 0.4b49 (Debian 13) the capabilities of files,
0.4b47 (Debian 12) attributes of directories. The dumps are made record by record.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import backups
import dumps
import pytest
import trees
from backups import is_disarmed
from dumps import DIRECTORY, INLINE, LINK, RECORD, REGULAR, File, attributes
from support import PATH, Node, Result, mounted, partitions, run

MakeDisk = Callable[..., Path]
CAPABILITY = b"\1\0\0\2\0 \0\0" + bytes(12)
LABEL = b"system_u:object_r:bin_t:s0"
DISK_ACL = struct.pack("<IHHHHIHHHHHH", 1, 1, 7, 2, 5, 4321, 4, 5, 16, 5, 32, 5)
IMMUTABLE = 0x10
GUEST = [
    File(2, DIRECTORY | 0o755),
    File(12, DIRECTORY | 0o755, names=[(2, b"etc")]),
    File(13, DIRECTORY | 0o755, names=[(2, b"bin")]),
    File(14, DIRECTORY | 0o2755, names=[(2, b"srv")], owner=(33, 44), attributes=[
        attributes((2, b"", DISK_ACL), (3, b"", DISK_ACL)), attributes((1, b"x", b"1"), in_inode=False)]),
    File(20, REGULAR | 0o755, b"ping", [(13, b"ping"), (13, b"ping6")], (7, 8), [
        attributes((6, b"capability", CAPABILITY), (6, b"selinux", LABEL), (1, b"x", b"\0\xff"))]),
    File(21, REGULAR | 0o755, b"fixed", [(13, b"fixed")], (0, 0), [
        attributes((6, b"capability", CAPABILITY))], flags=IMMUTABLE),
    File(22, REGULAR | 0o4755, os.urandom(70_000), [(13, b"su")], (1, 2)),
    File(23, LINK | 0o777, b"ping", [(13, b"sh")], (5, 6), [attributes((6, b"selinux", LABEL))]),
    File(24, REGULAR | 0o644, b"of an earlier restore", [(2, b"restoresymtable")]),
    File(15, REGULAR | 0o600, bytes(1016) + b"\x04\xca\x10\x0b" + bytes(4)),  # ext4's orphan_file
    File(25, REGULAR | 0o644, b"", [(12, b"new\nline\xff")], (3, 0), [attributes((6, b"capability", CAPABILITY))]),
]  # fmt: skip
STAND_IN = """\
#!/usr/bin/python3
import fcntl, os, shutil, struct, subprocess, sys

def lose(*names):
    for top, directories, files in os.walk("."):
        for path in (os.path.join(top, name) for name in directories + files):
            flags = None
            if os.path.isfile(path) and not os.path.islink(path):
                descriptor = os.open(path, os.O_RDONLY)
                flags = struct.unpack("l", fcntl.ioctl(descriptor, 0x80086601, bytes(8)))[0]
                fcntl.ioctl(descriptor, 0x40086602, struct.pack("l", flags & ~0x30))
            for name in os.listxattr(path, follow_symlinks=False):
                if name in names or not names:
                    os.removexattr(path, name, follow_symlinks=False)
            if flags is not None:
                fcntl.ioctl(descriptor, 0x40086602, struct.pack("l", flags))
                os.close(descriptor)

done = subprocess.run([{real!r}, *sys.argv[1:]], capture_output={mute})
if done.returncode and not {mute}:
    sys.exit(done.returncode)
{then}
"""
LIKE_0_4B49 = "lose('security.capability')"
RestoreThat = Callable[..., str]


@pytest.fixture
def restore_that(tmp_path: Path) -> RestoreThat:
    """Return a PATH with a restore that runs the real one, then a command in its directory."""

    def make(then: str = "", mute: bool = False) -> str:
        directory = tmp_path / "stand-in"
        directory.mkdir(exist_ok=True)
        real = shutil.which("restore", path=PATH)
        (directory / "restore").write_text(STAND_IN.format(real=real, then=then, mute=mute))
        (directory / "restore").chmod(0o755)
        return f"{directory}:{PATH}"

    return make


def deploy(command: str, node: Node, target: Path, dump: bytes, path: str = PATH) -> Result:
    """create an instance from a dump, or import ganeti-instance-image's backup, without a partition for /boot."""
    more = {"PATH": path, "INSTANCE_HV_kernel_path": "/vmlinuz"}
    image = node.images / f"quiet-{trees.ARCH}-root.dump"
    if command == "create":
        image.write_bytes(dump)
        return node.create(target, OSP_IMAGE_NAME="quiet", OSP_IMAGE_TYPE="dump", **more)
    (node.work / "root.dump").write_bytes(dump)
    run("tar", "--create", "--file", node.work / "stream", "--directory", node.work, "./root.dump")
    return backups.restore(node, node.work / "stream", target, **more)


def refused(result: Result, target: Path, *words: str) -> None:
    name = "root.dump" if "backup" in result.lines[-1] else "quiet-"
    result.failed(name, *words)
    assert is_disarmed(target, [])


def check(target: Path, work: Path) -> None:
    with mounted(target, work / "made", partitions(target)[-1]) as top:
        acl = os.getxattr(top / "srv", "system.posix_acl_access")
        assert acl == os.getxattr(top / "srv", "system.posix_acl_default")
        assert struct.pack("<HHI", 2, 5, 4321) in acl and os.getxattr(top / "srv", "user.x") == b"1"
        for name in ("bin/ping", "bin/ping6", "bin/fixed", "etc/new\nline\udcff"):
            assert os.getxattr(top / name, "security.capability") == CAPABILITY, name
        assert os.getxattr(top / "bin/ping", "user.x") == b"\0\xff"
        assert os.getxattr(top / "bin/ping", "security.selinux") == LABEL
        assert os.getxattr(top / "bin/sh", "security.selinux", follow_symlinks=False) == LABEL
        assert "i" in run("lsattr", top / "bin/fixed").split()[0]
        assert (top / "bin/ping").stat().st_ino == (top / "bin/ping6").stat().st_ino
        assert oct((top / "bin/su").stat().st_mode) == "0o104755"
        assert not (top / "restoresymtable").exists()


@pytest.mark.parametrize("command", ["create", "import"])
@pytest.mark.parametrize("then", ["", LIKE_0_4B49, "lose()"])
def test_attributes(then: str, command: str, node: Node, disk: MakeDisk, restore_that: RestoreThat,
                    tmp_path: Path) -> None:  # fmt: skip
    target = disk()
    result = deploy(command, node, target, dumps.make(GUEST), restore_that(then)).ok()
    assert "warning" not in result.log
    if then:
        assert "attributes, which are set now: " in result.log
    check(target, tmp_path)


LOSSES = {
    "os.remove('bin/su')": "/bin/su is missing",
    "os.rename('bin', 'away')": "/bin is missing",
    "os.truncate('bin/su', 0)": "/bin/su has 0 bytes, not 70000",
    "os.chmod('bin/su', 0o755)": "/bin/su has mode 100755, not 104755",
    "os.chown('bin/su', 0, 2)": "/bin/su belongs to 0:2, not 1:2",
    "os.chown('srv', 0, 0)": "/srv belongs to 0:0, not 33:44",
    "os.remove('bin/su'); os.symlink('/etc/passwd', 'bin/su')": "/bin/su is of another kind",
    "os.rename('bin', 'away'); os.symlink('/usr/bin', 'bin')": "/bin is of another kind",
    "os.remove('bin/ping6'); shutil.copy('bin/ping', 'bin/ping6')": "is not one with its other names",
    "os.chmod('.', 0o700)": "/ has mode 40700, not 40755",
}


@pytest.mark.parametrize("command", ["create", "import"])
@pytest.mark.parametrize("then", LOSSES)
def test_what_cannot_be_mended(then: str, command: str, node: Node, disk: MakeDisk, restore_that: RestoreThat) -> None:
    target = disk()
    refused(deploy(command, node, target, dumps.make(GUEST), restore_that(then)), target, LOSSES[then])


WHOLE = dumps.make(GUEST)
END = next(at for at in range(0, len(WHOLE), RECORD) if WHOLE[at : at + 8] == dumps.header(dumps.END, 0)[:8])
HEADERS = [at for at in range(0, END, RECORD) if WHOLE[at + 24 : at + 28] == WHOLE[24:28]]
MIDDLE = HEADERS[len(HEADERS) // 2]
DAMAGED = {
    "its end": WHOLE[:END],
    "its second half": WHOLE[: len(WHOLE) // 2],
    "zeroes in its middle": WHOLE[:MIDDLE] + bytes(10 * RECORD) + WHOLE[MIDDLE + 10 * RECORD :],
    "zeroes to its end": WHOLE[:MIDDLE].ljust(len(WHOLE), b"\0"),
    "a directory of zeroes": WHOLE[: 6 * RECORD] + bytes(RECORD) + WHOLE[7 * RECORD :],
    "one record": WHOLE[:MIDDLE] + WHOLE[MIDDLE + RECORD :],
    "a file of its own list": dumps.make(GUEST, missing=[30]),
    "the name of a file": dumps.make([*GUEST, File(30, REGULAR | 0o644, b"lost")]),
    "the other volumes": b"".join(
        [WHOLE[:MIDDLE], dumps.header(dumps.TAPE, MIDDLE // RECORD, volume=2), WHOLE[MIDDLE + RECORD :]]
    ),
}


@pytest.mark.parametrize("command", ["create", "import"])
@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("packing", ["", "zlib"])
def test_dump_that_lacks(what: str, packing: str, command: str, node: Node, disk: MakeDisk,
                         restore_that: RestoreThat) -> None:  # fmt: skip
    """restore reports no error."""
    dump = DAMAGED[what]
    if packing:
        first = dumps.header(dumps.TAPE, 0, flags=0x83)
        dump = dumps.packed(first + dump[RECORD:], packing)
    target = disk()
    result = deploy(command, node, target, dump, restore_that(mute=True))
    refused(result, target, "several volumes" if "volumes" in what else "damaged or truncated")


@pytest.mark.parametrize("command", ["create", "import"])
def test_content_in_inodes(command: str, node: Node, disk: MakeDisk, restore_that: RestoreThat, tmp_path: Path) -> None:
    """From an ext4 with inline_data, restore 0.4b47 makes zeroes, 0.4b49 does not; zeroes must not stay unreported."""
    text = b"0123456789" * 10
    small = File(30, REGULAR | 0o644, text, [(12, b"small")], flags=INLINE, blocks=text[:60],
                 attributes=[attributes((7, b"data", text[60:]))])  # fmt: skip
    dump = dumps.make([*GUEST, small])
    zeroes = "open('etc/small', 'r+b').write(bytes(100))"
    target = disk()
    refused(deploy(command, node, target, dump, restore_that(zeroes)), target, "/etc/small", "inline_data", "damaged")
    right = f"open('etc/small', 'r+b').write({text!r})"
    deploy(command, node, target, dump, restore_that(right)).ok()


@pytest.mark.parametrize("command", ["create", "import"])
def test_dump_of_a_newer_version(command: str, node: Node, disk: MakeDisk) -> None:
    """dump 0.4b49 writes runs of records, which older versions read wrongly: report it, or be right."""
    runs = File(30, REGULAR | 0o644, os.urandom(4 * RECORD), [(2, b"big")], map=b"\7")
    target = disk()
    result = deploy(command, node, target, dumps.make([*GUEST, runs]))
    version = run("sh", "-c", "restore 2>&1 || :").partition("0.4b")[2][:2]
    if int(version) < 49:
        refused(result, target, "made by dump 0.4b49 or newer", f"restore 0.4b{version} of this node cannot read")
    else:
        result.ok()


def test_trailing_zeroes(node: Node, disk: MakeDisk, restore_that: RestoreThat, tmp_path: Path) -> None:
    """More zeroes than pipes hold, after the end."""
    target = disk()
    deploy("create", node, target, dumps.make(GUEST) + bytes(16 << 20), restore_that(LIKE_0_4B49)).ok()
    check(target, tmp_path)
