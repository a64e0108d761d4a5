"""variants try: good variants come up; each bad one is told apart from the others; nothing of a trial stays."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from bootdisks import BootDisk, boot_disks
from debian import debian
from leftovers import descendants
from qemu import DEADLINE
from support import DEFAULTS, MIB, SITE, Node, Result, partitions, run, wait_until

# A busy machine that emulates one makes a guest's kernel doubt its timers
QUICK = "no_timer_check mitigations=off"
# name of a variant -> its settings
VARIANTS = {
    "tarball": f"IMAGE_NAME=bookworm\nIMAGE_TYPE=tarball\nSWAP=no\nKERNEL_ARGS='{QUICK}'",
    "cloud": f"IMAGE_NAME=cloud\nIMAGE_TYPE=raw\nKERNEL_ARGS='{QUICK}'",
    "no_loader": "IMAGE_NAME=empty\nIMAGE_TYPE=raw\nNOMOUNT=yes",
    "panic": f"IMAGE_NAME=mbr\nIMAGE_TYPE=raw\nKERNEL_ARGS='{QUICK} rdinit=/missing'",
    "hang": f"IMAGE_NAME=mbr\nIMAGE_TYPE=raw\nKERNEL_ARGS='{QUICK} rdinit=/bin/cat'",
    "no_console": "IMAGE_NAME=mbr\nIMAGE_TYPE=raw\nNOMOUNT=yes",  # its menu has none, and create adds none
    "no_image": "IMAGE_NAME=none\nIMAGE_TYPE=raw",
    "no_room": "IMAGE_NAME=bookworm\nIMAGE_TYPE=tarball\nPARTITION_TABLE=gpt\nBOOT_SIZE=1",
}
LIB = Path("/var/lib")


@pytest.fixture(scope="session")
def disks() -> dict[str, BootDisk]:
    return boot_disks({"mbr": ("mbr", debian("bookworm")), "cloud": ("cloud", debian("bookworm", "cloud-init"))})


@pytest.fixture
def node(disks: dict[str, BootDisk], node: Node, tmp_path: Path) -> Iterator[Node]:
    """Return a node with these variants and their images, the hook grub on, and a /var/lib of its own."""
    shipped = (node.root / DEFAULTS.relative_to("/")).read_text()
    node.write(DEFAULTS, f"{shipped}\nIMAGE_DIR={node.images}\nCACHE_DIR={node.images}\n")
    (SITE / "hooks/grub").chmod(0o755)
    (node.images / "bookworm-x86_64.tar.zst").symlink_to(debian("bookworm").tarball)
    for name, disk in disks.items():
        (node.images / f"{name}-x86_64.raw").symlink_to(disk.path)
    empty = node.images / "empty-x86_64.raw"
    with empty.open("xb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", empty)
    for name, text in VARIANTS.items():
        node.variant(name, f"{text}\n")
    layer = tmp_path / "lib"
    layer.mkdir()
    run("mount", "--bind", layer, LIB)
    yield node
    run("umount", LIB)


def attempt(node: Node, *tries: Sequence[str]) -> list[Result]:
    """Try variants at the same time, one for each core."""
    calls = [node.start_tool("variants", "try", *words) for words in tries]
    for call in calls:
        call.process.wait(DEADLINE)
    results = [call.result() for call in calls]
    kept = {path.name for path in node.images.iterdir() if path.name.startswith("try-")}
    assert kept == {f"try-{words[0]}.raw" for words in tries if "--keep" in words}
    return results


def doctor(node: Node, name: str) -> str:
    """Return what doctor says of the last trial of a variant."""
    document = node.tool("doctor", "--json").log
    start = f"variant {name} was "
    (found,) = (check for check in json.loads(document)["findings"] if check["what"].startswith(start))
    return f"{found['level']}: {found['what'].removeprefix(start)}"


def table(result: Result) -> dict[str, str]:
    """Return the rows of the table."""
    rows = (re.fullmatch(r"(\w[\w -]{15}) (.*)", line) for line in result.ok().lines)
    return {row[1].rstrip(): row[2] for row in rows if row}


def test_good_variants(node: Node) -> None:
    by_bios, by_uefi = attempt(node, ["tarball"], ["cloud", "--uefi", "--keep"])
    for result, name, firmware in ((by_bios, "tarball", "BIOS"), (by_uefi, "cloud", "UEFI")):
        rows = table(result)
        assert firmware in rows["booted in"]
        assert rows["login prompt"] == f"try-{name} login:"
        assert re.fullmatch(r"[\d.]+ s", rows["powered off in"])
        assert rows["filesystem"] == "clean"
        assert rows["machine-id"] == "made"
        assert {"ecdsa", "ed25519", "rsa"} <= set(rows["ssh host keys"].split(", "))  # cloud-init 22.4 makes dsa, too
        # cloud-init's own services fail in this image, which has no locales and no network
        assert re.fullmatch(
            "none" if name == "tarball" else r"none|[\w@.-]+\.service(, [\w@.-]+\.service)*", rows["failed units"]
        )
        assert re.fullmatch(r"ok: tried .*on [\d-]{10} with the image of [\d-]{10}: ok", doctor(node, name))
    disk = node.images / "try-cloud.raw"
    assert f"the disk is kept: {disk}" in by_uefi.log
    assert f"file={disk},format=raw" in by_uefi.log
    root = partitions(disk)[0]
    assert root.content["TYPE"] == "ext4" and root.size > 1 << 30  # it has grown
    assert disk.stat().st_mode & 0o077 == 0
    image = node.images / "bookworm-x86_64.tar.zst"
    other = node.images / "other"
    shutil.copyfile(image, other)  # itself is a link into the cache of all test runs
    other.rename(image)
    assert doctor(node, "tarball").endswith("its image is another now")


def test_variants_that_say_why(node: Node) -> None:
    no_loader, panic = attempt(node, ["no_loader"], ["panic"])
    no_loader.failed("no login prompt", "no boot loader")
    assert "| (screen) No bootable device." in no_loader.log
    panic.failed("no login prompt", "its kernel panics: VFS: Unable to mount root fs")
    assert "may be due to the emulation: it is booted once more" in panic.log
    assert doctor(node, "no_loader").startswith("note: tried on ")
    assert "no boot loader" in doctor(node, "no_loader")
    no_image, no_room = attempt(node, ["no_image"], ["no_room"])
    no_image.failed("cannot find image")
    assert "cannot find image" in doctor(node, "no_image")
    no_room.failed("it cannot be deployed: ", "/boot")  # create's last line


def test_variants_that_say_nothing_more(node: Node) -> None:
    """The kernel of one hangs after its first messages; that of the other speaks on the screen alone."""
    hang, no_console = attempt(node, ["hang", "--timeout", "40"], ["no_console", "--timeout", "40"])
    hang.failed("it hangs: the last that it said is")
    assert re.search(r"\| \[ *\d+\.\d+\]", hang.log)
    no_console.failed("no login prompt", "serial console")
    assert "console=ttyS0" in no_console.log


def test_confined_and_killed(node: Node) -> None:
    """qemu has nothing of the node; and nothing stays, as is seen after each test, nor is there a result."""
    call = node.start_tool("variants", "try", "no_console")
    call.wait_for(lambda: is_running(qemus()), "qemu runs")
    for pid in qemus():
        status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
        assert status["Seccomp"] == "2"
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        there = Path(f"/proc/{pid}/root")
        assert {path.name for path in there.iterdir()}.isdisjoint({"root", "var", "srv", "home", "boot", "run", "sys"})
        assert not (there / "etc/shadow").exists()
        assert len([path for path in (there / "dev").iterdir() if path.is_block_device()]) == 1
    call.kill(signal.SIGKILL)
    call.process.wait()
    wait_until(lambda: not qemus(), "qemu has ended")
    assert not list(LIB.rglob("*.json"))


def is_running(pids: list[int]) -> bool:
    """Return True for processes that stay: with a KVM that does not work qemu ends at once."""
    time.sleep(1)
    return bool(pids) and pids == qemus()


def qemus() -> list[int]:
    """Return the processes of virtual machines that this run has started."""
    return [pid for pid, command in descendants(os.getpid()).items() if "qemu-system" in command]
