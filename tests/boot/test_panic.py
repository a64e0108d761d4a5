"""A damaged filesystem that wants a panic on errors: the kernel's reaction when it is mounted with our options.

A virtual machine protects this machine's kernel. It boots Debian's kernel, and a busybox that mounts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from debian import debian
from qemu import booting
from support import MIB, run

from imageos.disks.filesystem import FILESYSTEMS

KINDS = ("ext2", "ext3", "ext4")
INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /dev /mnt
/bin/busybox --install /bin
mount -t devtmpfs dev /dev
insmod /loop.ko
meet() {
  cp /$1 /disk
  mount -t $1 -o loop,nosuid,nodev,$3 /disk /mnt || echo "cannot mount $1"
  ls /mnt/broken
  echo "$1 $2: the kernel goes on"
  umount /mnt
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with Debian's kernel, `vmlinuz`, and its `loop.ko`; ext4 is in the kernel."""
    top = tmp_path_factory.mktemp("kernel")
    wanted = ["--wildcards", "./boot/vmlinuz-*", "*/drivers/block/loop.ko"]
    run("tar", "--extract", "--directory", top, "--file", debian("bookworm").tarball, *wanted)
    for pattern, name in (("boot/vmlinuz-*", "vmlinuz"), ("**/loop.ko", "loop.ko")):
        (found,) = top.glob(pattern)
        found.rename(top / name)
    return top


def broken(path: Path, kind: str) -> Path:
    """Make a filesystem that wants a panic on errors; reading its damaged directory `broken` is one."""
    with path.open("xb") as file:
        file.truncate(4 * MIB)
    run(f"mkfs.{kind}", "-q", path)
    run("debugfs", "-w", "-R", "mkdir broken", path)
    run("tune2fs", "-e", "panic", path)
    (block,) = re.findall(r"\d+", run("debugfs", "-R", "blocks broken", path))
    (size,) = re.findall(r"Block size: +(\d+)", run("dumpe2fs", "-h", path))
    with path.open("r+b") as file:
        file.seek(int(block) * int(size))
        file.write(b"\xff\x01" * (int(size) // 2))
    return path


def initramfs(work: Path, kernel: Path, meetings: Sequence[str]) -> Path:
    top = work / "initramfs"
    (top / "bin").mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), top / "bin/busybox")
    shutil.copy(kernel / "loop.ko", top)
    for kind in KINDS:
        broken(top / kind, kind)
    (top / "init").write_text(INIT + "\n".join(meetings) + "\n")
    (top / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(top)) for path in sorted(top.rglob("*")))
    archive = work / "initramfs.cpio"
    run("sh", "-c", 'cd "$1" && busybox cpio -o -H newc >"$2"', "sh", top, archive, text=names)
    return archive


def test_errors_in_a_filesystem_that_wants_a_panic(kernel: Path, tmp_path: Path) -> None:
    """With the options in our table, mounted writable and read, nothing happens; without them there must be a panic."""
    ours = [
        f"meet {kind} {how} {','.join(filter(None, options))}"
        for kind in KINDS
        for known in (FILESYSTEMS[kind],)
        for how, options in (("written", [known.forced]), ("read", ["ro", known.look_data, known.forced]))
    ]
    archive = initramfs(tmp_path, kernel, [*ours, "meet ext4 plain rw", "echo survived", "poweroff -f"])
    more = ["-kernel", str(kernel / "vmlinuz"), "-initrd", str(archive), "-append", "console=ttyS0 panic=-1 quiet"]
    with booting(archive, tmp_path / "console", more=more) as console:
        text = console.wait_for(r"^(survived|.*Kernel panic - not syncing: EXT4-fs .*forced after error)")
    steps = re.split(r"(\w+ \w+): the kernel goes on", text)
    assert steps[1::2] == [f"{kind} {how}" for kind in KINDS for how in ("written", "read")], text
    for met in steps[::2]:
        assert re.search(r"EXT4-fs error .* comm ls: ", met), text
    assert "cannot mount" not in text, text
    assert "Kernel panic" in text, "it would have been no proof"
    assert "survived" not in text
