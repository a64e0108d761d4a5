"""Deploy a cloud image by the lines in README.rst, from a server that has the publisher's files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import guestdisks
import readme
from credentials import public_key
from http_server import serving
from support import SITE, Node, mounted, partitions, run

MakeDisk = Callable[..., Path]
MIB = 1 << 20
KEY = public_key("admin")
# Ganeti's commands: their arguments go to a file, one a line.
STAND_IN = '#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" >>"$CALLED"\n'


def test_ten_lines(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    text = readme.block("cat > /etc/ganeti/instance-image/variants/debian-12-cloud.conf")
    directory, name = re.findall(r"IMAGE_URL=(https://\S*)/(\S+)", text)[0]
    image = publish(small_tree, tmp_path, name)
    with serving() as server:
        server.put(f"/{name}", image)
        server.sums("/SHA512SUMS", name, algorithm="sha512")
        called = follow(text.replace(directory, server.url), tmp_path)
        options = dict(re.findall(r"-O\n(\w+)=(.*)", called))
        assert options == {"ssh_authorized_keys": KEY}
        assert "gnt-cluster\ncopyfile\n/etc/ganeti/instance-image/variants/debian-12-cloud.conf\n" in called
        assert "-o\nimage+debian-12-cloud\n" in called

        target = disk(300)
        parameters = {f"OSP_{option.upper()}": value for option, value in options.items()}
        node.defaults(f"CACHE_DIR={tmp_path}/cache")
        created = node.create(target, OS_VARIANT="debian-12-cloud", OSP_IMAGE_NAME=None, **parameters).ok()
    assert f"verified: sha512 of {server.url}/SHA512SUMS" in created.log
    assert max(part.size for part in partitions(target)) > 200 * MIB, "the root has not grown"
    with mounted(target, tmp_path / "guest", guestdisks.place(target, 1)) as guest:
        seed = json.loads((guest / "var/lib/cloud/seed/nocloud/meta-data").read_text())
    assert seed["public-keys"] == [KEY]


def publish(tree: Path, work: Path, name: str) -> bytes:
    """Return a qcow2 of a small guest with cloud-init."""
    guest = work / "guest"
    run("cp", "--archive", tree, guest)
    for path, mode in (("usr/bin/cloud-init", 0o755), ("etc/cloud/cloud.cfg", 0o644)):
        Node.write(guest / path, "#!/bin/sh\n")
        (guest / path).chmod(mode)
    raw = guestdisks.cloud(work / "raw", guest, work).path
    shutil.rmtree(guest)
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, work / name)
    return (work / name).read_bytes()


def follow(text: str, work: Path) -> str:
    """Run the lines as an administrator who has an ssh key; return how they called Ganeti."""
    programs, home = work / "programs", work / "home"
    for program in ("gnt-cluster", "gnt-instance"):
        Node.write(programs / program, STAND_IN)
        (programs / program).chmod(0o755)
    Node.write(home / ".ssh/id_ed25519.pub", f"{KEY}\n")
    environment = f"PATH={programs}:{os.environ['PATH']}", f"HOME={home}", f"CALLED={work}/called"
    run("env", *environment, "sh", "-euc", text)
    assert "debian-12-cloud" in (SITE / "variants.list").read_text().splitlines()
    return (work / "called").read_text()
