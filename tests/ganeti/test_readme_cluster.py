"""README.rst followed to the letter: each of its commands for a cluster, in its order, on a real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import readme
from clusters import between
from debian import debian
from test_cluster_install import LOOK, SSHD, check, on_cluster

# What a cluster of one node in a container lacks: LVM, and Ganeti's usual bridge. A name is said in the DNS.
PREPARE = f"""
export PATH=/usr/local/sbin:$PATH
{SSHD}
gnt-cluster modify --nic-parameters mode=bridged,link=eth0 >&2
echo 192.0.2.201 web1.example.org web1 >>/etc/hosts
echo 192.0.2.202 template1.example.org template1 >>/etc/hosts
mount -t tmpfs tmpfs /mnt
mkdir /mnt/system /mnt/images
cd {readme.CHECKOUT}
"""
ROOT = "/tmp/web1.example.org_root"


@pytest.fixture(scope="module")
def followed(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is printed by somebody who goes through it, with a look at the result here and there."""
    install = readme.block("./build.py\n")
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
        {readme.block("gnt-instance stop template1")}
        echo CAPTURED; ls /var/cache/ganeti-instance-image; echo CAPTURED
        mount --bind /dev/null /usr/sbin/restore
        echo centos-9 >>/etc/ganeti/instance-image/variants.list
        printf 'IMAGE_NAME=centos-9\\nIMAGE_TYPE=qemu\\n' >/etc/ganeti/instance-image/variants/centos-9.conf
        echo DOCTOR; imageos doctor || true; echo DOCTOR
    """
    return on_cluster(script, tmp_path_factory.mktemp("followed") / "layers")


def is_shown(line: str, text: str) -> bool:
    """Whether a line of an example is in `text`: `...` stands for anything, a number for any other."""
    pattern = re.sub(r"\d+(\\\.\d+)*", r"\\d[\\d.]*", re.escape(line.strip()))
    return re.search(re.sub(r"(\\ )?\\\.\\\.\\\.", ".*", pattern), text) is not None


def test_install(followed: str) -> None:
    assert "OS: image [global status: valid]" in between(followed, "INSTALL")


def test_phases_of_create(followed: str) -> None:
    """What the picture shows is what the log says, in this order."""
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
    """Mounted, away, in a shell that ends at once, read-only."""
    said = re.findall(r"imageos: (instance|nothing of|this directory) ", between(followed, "TOOLS"))
    assert said == ["instance", "nothing of", "this directory", "instance"]


def test_captured(followed: str) -> None:
    names = between(followed, "CAPTURED").split()
    assert "debian-12-web-x86_64.qcow2" in names and "debian-12-web-x86_64.qcow2.sha256" in names


def test_doctor(followed: str) -> None:
    """Every line of the example is what it says here."""
    for line in readme.block("imageos 1.0 on").splitlines():
        assert is_shown(line, between(followed, "DOCTOR")), f"{line!r} is not in\n{followed}"


PACKAGE = f"""
{SSHD}
echo 'APT::Install-Recommends "false";' >/etc/apt/apt.conf.d/99-offline
cd {readme.CHECKOUT}
mount -t tmpfs tmpfs dist  # tests/build makes packages in the checkout's
"""


def test_package(imageos: Path, tmp_path: Path) -> None:
    """apt-get finds all that the package depends on; what it recommends would have to be downloaded."""
    check(on_cluster(f"{PACKAGE}\n{readme.block('./build.py deb')}\n{LOOK}\nman --path imageos", tmp_path / "layers"))
