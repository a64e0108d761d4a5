"""Run all commands of README.rst for a cluster, in order, on a real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import readme
from clusters import between
from debian import debian
from test_cluster_install import LOOK, SSHD, check, on_cluster

from imageos import __version__

# A cluster of one node in a container lacks LVM and Ganeti's usual bridge. A name must be in the DNS.
PREPARE = f"""
export PATH=/usr/local/sbin:$PATH
{SSHD}
gnt-cluster modify --nic-parameters mode=bridged,link=eth0 >&2
echo 192.0.2.201 web1.example.org web1 >>/etc/hosts
echo 192.0.2.202 template1.example.org template1 >>/etc/hosts
echo 192.0.2.203 web2.example.org web2 >>/etc/hosts
mount -t tmpfs tmpfs /mnt
mkdir /mnt/system /mnt/images
cd {readme.CHECKOUT}
"""
ROOT = "/tmp/web1.example.org_root"
# What doctor says there; `...` stands for any text
FOUND = f"""\
imageos {__version__} on node1.example.org

OS definition
  ok     /usr/share/ganeti/os/image
  ok     /bin/python3 3.11.2

images
  ok     variant debian-12: /var/cache/ganeti-instance-image/debian-12-x86_64.tar.zst, 131 MiB
  ERROR  variant centos-9: cannot find image /var/cache/ganeti-instance-image/centos-9-x86_64.img
         (nor .qcow2, .raw, ...
         -> copy it there, or set IMAGE_NAME, ARCH, IMAGE_TYPE or IMAGE_DIR; ...

programs
  ok     sfdisk..., blkid..., tar..., mkfs.ext4..., mkswap..., zstd...
  note   restore missing: no variant needs it
         -> install dump
"""


@pytest.fixture(scope="module")
def followed(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the output of all its commands, with some checks between them."""
    install = "\n".join([*readme.block("./build.py && cp").splitlines()[:3], "gnt-os diagnose", ""])
    add = readme.block("gnt-instance add -t plain").replace("-t plain", "-t file")
    script = f"""
        {PREPARE}
        tar --extract --numeric-owner --xattrs --xattrs-include='*' --file {debian("bookworm").tarball} -C /mnt/system
        echo INSTALL; {install} echo INSTALL
        cd /mnt/images
        {readme.block("tar --create")}
        {readme.block("cp debian-12-x86_64.tar.zst")}
        {readme.block("gnt-cluster command chmod +x")}
        {readme.block("cat > /etc/ganeti/instance-image/networks")}
        chmod +x /etc/ganeti/instance-image/hooks/interfaces
        {add}
        echo CREATE; cat /var/log/ganeti/os/add-*; echo CREATE
        gnt-instance stop web1
        mount-disks web1
        echo NETWORK; cat {ROOT}/etc/systemd/network/00-imageos-eth0.network; echo NETWORK
        umount-disks web1
        echo TOOLS; {readme.block("mount-disks web1")} echo TOOLS
        umount-disks web1
        gnt-instance rename web1 template1.example.org
        gnt-instance start template1
        {readme.block("gnt-instance stop template1").replace("-t plain", "-t file")}
        echo CAPTURED; ls /var/cache/ganeti-instance-image; echo CAPTURED
        mount --bind /dev/null /usr/sbin/restore
        echo centos-9 >>/etc/ganeti/instance-image/variants.list
        printf 'IMAGE_NAME=centos-9\\nIMAGE_TYPE=qemu\\n' >/etc/ganeti/instance-image/variants/centos-9.conf
        echo DOCTOR; imageos doctor || true; echo DOCTOR
    """
    return on_cluster(script, tmp_path_factory.mktemp("followed") / "layers")


def is_shown(line: str, text: str) -> bool:
    """Return True if a line of an example is in `text`; `...` stands for any text, a number for any other number."""
    pattern = re.sub(r"\d+(\\\.\d+)*", r"\\d[\\d.]*", re.escape(line.strip()))
    return re.search(re.sub(r"(\\ )?\\\.\\\.\\\.", ".*", pattern), text) is not None


def test_install(followed: str) -> None:
    assert "OS: image [global status: valid]" in between(followed, "INSTALL")


def test_phases_of_create(followed: str) -> None:
    """The log shows the phases in the picture, in this order."""
    shown = re.findall(r"imageos: .*", readme.block("settings, image "))
    log = between(followed, "CREATE")
    assert len(shown) > 5
    for line in shown:
        assert is_shown(line, log), f"{line!r} is not in\n{log}"


def test_network_files(followed: str) -> None:
    lines = between(followed, "NETWORK").splitlines()
    for line in ("Address=192.0.2.10/24", "Gateway=192.0.2.1", "DNS=192.0.2.53", "DNS=192.0.2.54"):
        assert line in lines


def test_tools(followed: str) -> None:
    """Mount, unmount, run a shell that ends at once, mount read-only."""
    said = re.findall(r"imageos: (instance|nothing of|this directory) ", between(followed, "TOOLS"))
    assert said == ["instance", "nothing of", "this directory", "instance"]


def test_captured(followed: str) -> None:
    names = between(followed, "CAPTURED").split()
    assert "debian-12-web-x86_64.qcow2" in names and "debian-12-web-x86_64.qcow2.sha256" in names


def test_doctor(followed: str) -> None:
    for line in FOUND.splitlines():
        assert is_shown(line, between(followed, "DOCTOR")), f"{line!r} is not in\n{followed}"


PACKAGE = f"""
{SSHD}
echo 'APT::Install-Recommends "false";' >/etc/apt/apt.conf.d/99-offline
cd {readme.CHECKOUT}
mount -t tmpfs tmpfs dist  # tests/build makes packages in the checkout's
"""


def test_package(imageos: Path, tmp_path: Path) -> None:
    """apt-get finds all dependencies of the package; its recommendations would need a download."""
    check(on_cluster(f"{PACKAGE}\n{readme.block('./build.py deb')}\n{LOOK}\nman --path imageos", tmp_path / "layers"))
