"""Turn a site's node with ganeti-instance-image 0.7.3 into one with imageos, by the steps in README.rst."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import guestdisks
import pytest
import readme
import trees
from support import DEFAULTS, SITE, Node, attached, mounted, partitions, run

MakeDisk = Callable[..., Path]
OS_DIR = "usr/share/ganeti/os/image"
# All settings of its defaults file, with the values shown there; the original file has them as comments.
SHIPPED = {
    "CDINSTALL": "no",
    "SWAP": "yes",
    "SWAP_SIZE": "",
    "BOOT_SIZE": "",
    "FILESYSTEM": "ext3",
    "KERNEL_ARGS": "",
    "IMAGE_NAME": "",
    "IMAGE_TYPE": "dump",
    "IMAGE_DIR": "",
    "TARBALL_COMPRESS": "gzip",
    "NOMOUNT": "",
    "OVERLAY": "",
    "EXPORT_DIR": "/tmp",
    "ARCH": "",
    "CUSTOMIZE_DIR": "/etc/ganeti/instance-image/hooks",
    "IMAGE_DEBUG": "0",
    "IMAGE_URL": "",
    "CACHE_DIR": "",
    "IMAGE_VERIFY": "yes",
    "IMAGE_CLEANUP": "no",
}
OLD_HOOK = '#!/bin/bash\n. common.sh\nlog_error "the old $SCRIPT_NAME ran"\nexit 1\n'
OWN_HOOK = """#!/bin/bash
set -e
. common.sh
echo "$SCRIPT_NAME $instance $IMAGE_TYPE" > ${TARGET}/etc/own
"""


def defaults(images: Path, comments: bool) -> str:
    lines = [f'{name}="{value}"' for name, value in SHIPPED.items() if name != "IMAGE_DIR"]
    return "\n".join([*((f"# {line}" if comments else line) for line in lines), f'IMAGE_DIR="{images}"', ""])


@pytest.fixture
def ancestors(imageos: Path, etc: Path, read_only_root: None, tmp_path: Path) -> Node:
    """Return a node with its files, some changed by the site, and without imageos."""
    root, work = tmp_path / "root", tmp_path / "node"
    work.mkdir()
    for name in ("create", "import", "export", "rename", "verify", "tools/mount-disks", "common.sh"):
        Node.write(root / OS_DIR / name, "#!/bin/bash\necho the old one; exit 1\n")
    Node.write(root / OS_DIR / "ganeti_api_version", "20\n15\n10\n")
    site = root / str(SITE)[1:]
    Node.write(site / "variants.list", "default\nold\n")
    Node.write(site / "variants/default.conf", "")
    Node.write(site / "variants/old.conf", 'IMAGE_NAME="old"\nSWAP_SIZE="16"\n')
    Node.write(site / "parameters.list", "img_id The id of the image\n")
    for name in ("variants.list", "parameters.list"):
        (root / OS_DIR / name).symlink_to(SITE / name)
    for name, text in {"grub": OLD_HOOK, "interfaces": OLD_HOOK, "ssh": OLD_HOOK, "own": OWN_HOOK}.items():
        Node.write(site / "hooks" / name, text)
    (site / "hooks/own").chmod(0o755)
    shutil.rmtree(SITE, ignore_errors=True)
    node = Node(imageos, root, work, layer=etc)
    Node.write(root / str(DEFAULTS)[1:], defaults(node.images, comments=True))
    return node


@pytest.fixture
def dumps(ancestors: Node, small_tree: Path, tmp_path: Path) -> None:
    """Make the site's images with its tools: dumps of root and /boot."""
    disk = guestdisks.ancestor(tmp_path / "captured", small_tree, tmp_path).path
    for part, number in (("boot", 1), ("root", 3)):
        place = guestdisks.place(disk, number)
        assert place
        with attached(disk, place.start, place.size) as device:
            run("dump", "-0", "-z9", "-q", "-f", ancestors.images / f"old-{trees.ARCH}-{part}.dump", device)


@pytest.mark.parametrize("comments", [True, False], ids=["as shipped", "all set"])
def test_the_way_here(comments: bool, ancestors: Node, dumps: None, disk: MakeDisk, tmp_path: Path) -> None:
    root = ancestors.root
    Node.write(root / str(DEFAULTS)[1:], defaults(ancestors.images, comments))
    kept = {path: path.read_bytes() for path in (root / "etc").rglob("*") if path.is_file()}
    run(ancestors.imageos, "install", "--root", root)
    assert {path: path.read_bytes() for path in kept} == kept
    assert os.readlink(root / OS_DIR / "create") == os.readlink(root / OS_DIR / "verify") == "imageos"
    assert os.readlink(root / OS_DIR / "tools/mount-disks") == "../imageos"
    assert "filesystem " in (root / OS_DIR / "parameters.list").read_text()
    shutil.copytree(root / "etc", "/etc", symlinks=True, dirs_exist_ok=True)

    doctor = [ancestors.imageos, "doctor", "--os-dir", root / OS_DIR]
    beside = f"{SITE}/hooks/grub is the site's, this version's is beside it"
    assert beside in run(*doctor, check=False)
    run("sh", "-euc", readme.block("cd /etc/ganeti/instance-image/hooks"))
    assert beside not in run(*doctor, check=False)
    assert [name for name in sorted(os.listdir(SITE / "hooks")) if os.access(SITE / "hooks" / name, os.X_OK)] == [
        "grub",
        "own",
        "ssh",
    ]

    (SITE / "hooks/grub").chmod(0o644)  # the small guest has no boot loader
    target = disk(500)
    environment = ancestors.environment(target, OS_VARIANT="old", OSP_IMAGE_NAME=None)
    verify = ancestors.environment(target, env="verify", OS_VARIANT="old", OSP_IMAGE_NAME=None)
    assert "warning" not in ancestors.call("verify", verify, "parameters").ok().log
    log = ancestors.call("create", environment).ok().log
    assert "warning" not in log and "the old" not in log, log
    boot, swap, system = partitions(target)
    assert [boot.size >> 20, swap.size >> 20] == [100, 16]
    assert [part.content["TYPE"] for part in (boot, swap, system)] == ["ext3", "swap", "ext3"]
    with mounted(target, tmp_path / "guest", system) as guest:
        assert (guest / "etc/own").read_text() == "own inst1.example.org dump\n"
        assert (guest / "etc/hostname").read_text() == "inst1\n"
