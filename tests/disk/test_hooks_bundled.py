"""The bundled hooks, enabled, as create, import and rename run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import backups
import pytest
import readme
import trees
from credentials import HASH, public_key
from support import SITE, Node, Result, describe, digest, mounted, partitions, run, signatures
from test_installed import verify

MakeDisk = Callable[..., Path]
KEYS = f"{public_key('first@site')}\n{public_key('second@site', 'ssh-rsa')}\n"
OVERLAYS = SITE / "overlays"
SELINUX = {"etc/selinux/config": "# policy\nSELINUX=enforcing\nSELINUXTYPE=targeted\n"}


def enable(*names: str) -> None:
    for name in names:
        (SITE / "hooks" / name).chmod(0o755)


@contextmanager
def guest_of(disk: Path, where: Path, options: str = "ro") -> Iterator[Path]:
    with mounted(disk, where, partitions(disk)[-1], options) as top:
        yield top


def image_with(node: Node, tree: Path, files: dict[str, str], work: Path, modes: int = 0o644) -> None:
    """Add these files to the node's image."""
    copy = work / "tree"
    run("cp", "--archive", tree, copy)
    for name, text in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
        (copy / name).chmod(modes)
    trees.tarball(copy, node.images / f"tiny-{trees.ARCH}.tar.gz")


def imported(node: Node, disk: Path, **overrides: object) -> Result:
    """Export `disk`, and import it again."""
    stream = backups.exported(node, disk, INSTANCE_NAME="inst1.example.org")
    return backups.restore(node, stream, disk, **overrides)


# ssh


def test_ssh(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    enable("ssh")
    target = disk()
    for _ in range(2):  # a reinstall gives the same result
        result = node.create(target, OSP_SSH_AUTHORIZED_KEYS=KEYS, OSP_ROOT_PASSWORD_HASH=HASH, OSP_IMAGE_DEBUG="1")
        result.ok()
        assert HASH not in result.log and "AAAAC3" not in result.log
        with guest_of(target, tmp_path / "root") as top:
            keys = top / "root/.ssh/authorized_keys"
            assert keys.read_text() == KEYS
            for path, mode in ((keys, 0o600), (keys.parent, 0o700), (top / "root", 0o700), (top / "etc/shadow", 0o640)):
                entry = path.stat()
                assert (stat.S_IMODE(entry.st_mode), entry.st_uid, entry.st_gid) == (mode, 0, 0)
            assert (top / "etc/shadow").read_text() == f"root:{HASH}:19000:0:99999:7:::\n"
            assert (top / "etc/passwd").read_text() == trees.FILES["etc/passwd"]


def test_ssh_on_import_replaces_host_keys(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    enable("ssh")
    node.defaults("IMPORT_HOOKS=ssh")
    target = disk()
    node.create(target).ok()
    with guest_of(target, tmp_path / "root", "rw") as top:
        for kind in ("rsa", "ecdsa", "ed25519"):
            (top / f"etc/ssh/ssh_host_{kind}_key").write_text("of the backup")
    imported(node, target, OSP_SSH_AUTHORIZED_KEYS=KEYS).ok()
    with guest_of(target, tmp_path / "root") as top:
        assert list((top / "etc/ssh").glob("ssh_host_*")) == []  # the small guest has no ssh-keygen
        assert (top / "root/.ssh/authorized_keys").read_text() == KEYS


@pytest.mark.parametrize("name", ["inst1.example.org", "clone.example.org"])
def test_identity_of_a_clone(name: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """A backup that is imported under another name is a clone; its original may be running."""
    target = disk()
    node.create(target, INSTANCE_NAME="inst1.example.org").ok()
    own = {"etc/machine-id": trees.MACHINE_ID, "etc/ssh/ssh_host_rsa_key": "its own", "var/lib/dhcp/leases": "its own"}
    with guest_of(target, tmp_path / "root", "rw") as top:
        for path, text in own.items():
            (top / path).parent.mkdir(exist_ok=True)
            (top / path).unlink(missing_ok=True)
            (top / path).write_text(text)
    log = imported(node, target, INSTANCE_NAME=name).ok().log
    is_clone = name.startswith("clone")
    assert ("the backup is of inst1.example.org" in log) == is_clone
    with guest_of(target, tmp_path / "root") as top:
        found = {path: (top / path).read_text() for path in own if (top / path).exists()}
    assert found == ({"etc/machine-id": ""} if is_clone else own)


@pytest.mark.parametrize("value", ["plain text", "$6$salt$hash:0:0:", "$6$salt$hash\nroot::0:0:::::"])
def test_ssh_password_that_is_none_is_refused_before_the_first_write(value: str, node: Node, disk: MakeDisk) -> None:
    enable("ssh")
    target = disk()
    before = digest(target)
    result = node.create(target, OSP_ROOT_PASSWORD_HASH=value).failed("ROOT_PASSWORD_HASH", "openssl passwd -6")
    assert value.split("\n")[0] not in result.log
    assert digest(target) == before


def test_settings_that_nobody_reads(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Neither cloud-init nor the hook ssh: one line says so, unless nothing is set."""
    target = disk()
    given = {"OSP_SSH_AUTHORIZED_KEYS": KEYS, "OSP_ROOT_PASSWORD_HASH": HASH, "OSP_USER_DATA": "#cloud-config\n"}
    off = f"and the hook ssh is off (chmod +x {SITE}/hooks/ssh)"

    def said(**given: str) -> list[str]:
        return re.findall("warning: (.* will have no effect: .*)", node.create(target, **given).ok().log)

    names = "SSH_AUTHORIZED_KEYS and ROOT_PASSWORD_HASH and USER_DATA"
    assert said(**given) == [f"{names} will have no effect: the image has no cloud-init, {off}"]
    assert said() == []
    enable("ssh")
    assert said(**given) == ["USER_DATA will have no effect: the image has no cloud-init"]
    (SITE / "hooks/ssh").chmod(0o644)
    cloud = {"usr/bin/cloud-init": "#!/bin/sh\n", "etc/cloud/cloud.cfg": "", "etc/cloud/cloud-init.disabled": ""}
    image_with(node, small_tree, cloud, tmp_path, 0o755)
    del given["OSP_USER_DATA"], given["OSP_ROOT_PASSWORD_HASH"]
    said_of_cloud = f"SSH_AUTHORIZED_KEYS will have no effect: the image does not start its cloud-init, {off}"
    assert said(**given) == [said_of_cloud]
    (tmp_path / "tree/etc/cloud/cloud-init.disabled").unlink()
    trees.tarball(tmp_path / "tree", node.images / f"tiny-{trees.ARCH}.tar.gz")
    assert said(**given) == []


def test_swap_of_the_image(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    """Without the hook grub, nobody tells the initramfs that is there."""
    resume = "etc/initramfs-tools/conf.d/resume"
    mounts = "tmpfs /srv tmpfs size=1M 0 0\n"
    image_with(node, small_tree, {resume: "RESUME=UUID=1\n", "etc/fstab": f"LABEL=x / ext4 ro 0 1\n{mounts}"}, tmp_path)
    target = disk()
    assert "initramfs waits for the image's swap" in node.create(target).ok().log
    with guest_of(target, tmp_path / "root") as top:
        assert (top / resume).read_text() == ""
        fstab = (top / "etc/fstab").read_text()
        assert fstab.endswith(f"\n{mounts}") and "LABEL=x" not in fstab  # what names no disk stays
    kernel = {"INSTANCE_HV_kernel_path": "/boot/vmlinuz"}
    assert "initramfs waits" not in node.create(target, **kernel).ok().log


def test_network_on_import(node: Node, disk: MakeDisk) -> None:
    """It stays that of the backup unless the site says otherwise: one line says how."""
    target = disk()
    node.create(target).ok()
    stream = backups.exported(node, target, INSTANCE_NAME="inst1.example.org")

    def said(**given: object) -> str:
        log = backups.restore(node, stream, target, **given).ok().log
        return "".join(re.findall("the guest's network is as in the backup; (.*)", log))

    how = "IMPORT_HOOKS with interfaces fits it to this instance"
    assert said() == f"{how} (first: chmod +x {SITE}/hooks/interfaces)"
    enable("interfaces")
    assert said() == how
    assert said(NIC_COUNT="0") == said(OSP_NOMOUNT="yes") == ""


# overlays


@pytest.fixture
def overlay(node: Node) -> Path:
    """Make an overlay with all that a copy may lose, also in linked directories of the guest."""
    top = OVERLAYS / "web"
    top.mkdir(parents=True)
    trees.odd(top)
    for name in ("null", "block", "fifo", "hard 2"):  # not copied, or no longer the same file
        os.unlink(top / "odd" / name)
    deep = next(Path(directory) for directory, _, files in os.walk(top) if "hard 3" in files)
    (deep / "hard 3").unlink()
    (top / "etc").mkdir()
    (top / "etc/motd").write_text("of the overlay\n")
    (top / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
    (top / "lib").mkdir()
    (top / "lib/by-overlay").write_text("x")
    (top / "root").mkdir()
    (top / "root/.profile").write_text("umask 077\n")
    return top


def test_overlays(overlay: Path, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    enable("overlays")
    node.variant("default", "OVERLAY=web\n")
    tree = tmp_path / "tree"
    run("cp", "--archive", small_tree, tree)
    run("mv", tree / "lib", tree / "usr-lib")
    (tree / "lib").symlink_to("/usr-lib")
    (tree / "etc/resolv.conf").symlink_to("../run/stub.conf")
    trees.tarball(tree, node.images / f"tiny-{trees.ARCH}.tar.gz")
    target = disk(320)
    result = node.create(target).ok()
    assert f"copied {overlay}" in result.log
    with guest_of(target, tmp_path / "root") as top:
        assert (top / "etc/motd").read_text() == "of the overlay\n"
        assert (top / "etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"
        assert not (top / "etc/resolv.conf").is_symlink() and not (top / "run/stub.conf").exists()
        assert os.readlink(top / "lib") == "/usr-lib" and (top / "usr-lib/by-overlay").read_text() == "x"
        assert (top / "etc/hostname").read_text() == "inst1\n"
        assert stat.S_IMODE((top / "root").stat().st_mode) == 0o700, "the guest's directory, not the overlay's"
        assert describe(top / "odd") == describe(overlay / "odd")
        assert (top / "odd").stat().st_mtime_ns == (overlay / "odd").stat().st_mtime_ns
    node.hook("overlays-again", (SITE / "hooks/overlays").read_text())
    node.create(target).ok()
    with guest_of(target, tmp_path / "root") as top:
        assert describe(top / "odd") == describe(overlay / "odd")
        assert not list(top.rglob(".imageos-*"))


def test_overlays_never_leave_the_guest(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    enable("overlays")
    outside = tmp_path / "outside"
    outside.mkdir()
    tree = tmp_path / "tree"
    run("cp", "--archive", small_tree, tree)
    (tree / "srv").symlink_to(outside)
    (tree / "opt").symlink_to("../../../../../../.." + str(outside))
    trees.tarball(tree, node.images / f"tiny-{trees.ARCH}.tar.gz")
    for name in ("srv/file", "opt/file"):
        Node.write(OVERLAYS / "web" / name, "x")
    target = disk()
    node.create(target, OSP_OVERLAY="web").ok()
    assert list(outside.iterdir()) == []
    with mounted(target, tmp_path / "look", partitions(target)[-1]) as guest:
        assert (guest / outside.relative_to("/") / "file").read_text() == "x", "where the links lead in the guest"


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_overlay_that_is_missing(kind: str, node: Node, disk: MakeDisk) -> None:
    enable("overlays")
    if kind == "a file":
        Node.write(OVERLAYS / "web", "")
    target = disk()
    before = digest(target)
    node.create(target, OSP_OVERLAY="web").failed(f"cannot find overlay {OVERLAYS}/web")
    assert digest(target) == before, "written to"
    verify(node, OSP_OVERLAY="web").failed(f"cannot find overlay {OVERLAYS}/web")


def test_overlay_without_its_hook(node: Node, disk: MakeDisk) -> None:
    for result in (node.create(disk(), OSP_OVERLAY="web"), verify(node, OSP_OVERLAY="web")):
        assert f"chmod +x {SITE}/hooks/overlays" in result.ok().log


@pytest.mark.parametrize("kind", ["fifo", "device", "directory-for-a-file", "file-for-a-directory"])
def test_overlays_that_cannot_be_copied(kind: str, node: Node, disk: MakeDisk) -> None:
    enable("overlays")
    (OVERLAYS / "web/etc").mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(OVERLAYS / "web/etc/x")
    elif kind == "device":
        os.mknod(OVERLAYS / "web/etc/x", 0o020666, os.makedev(1, 3))
    elif kind == "directory-for-a-file":
        (OVERLAYS / "web/etc/passwd").mkdir()
    else:
        (OVERLAYS / "web/etc/ssh").touch()
    target = disk()
    result = node.create(target, OSP_OVERLAY="web").failed("overlays", f"{OVERLAYS}/web/etc/")
    assert {"fifo": "neither", "device": "neither"}.get(kind, "the guest's /etc/") in result.last
    assert signatures(target) == [], "not disarmed"


# cloud-init and zz_ddns


def test_cloud_init(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    enable("cloud-init")
    key = public_key("a")
    node.defaults(f"CINIT_USER=admin\nCINIT_SSH_KEY='{key}'\nCINIT_MANAGE_RESOLV_CONF=yes")
    target = disk()
    node.create(target).failed("cloud-init", "the guest has no cloud-init")
    image_with(
        node, small_tree, {"usr/bin/cloud-init": "#!/bin/sh\n", "etc/cloud/cloud.cfg": "users: []\n"}, tmp_path, 0o755
    )
    result = node.create(target, OSP_DNS_SERVERS="192.0.2.1").ok()
    assert "unknown setting" not in result.log
    with guest_of(target, tmp_path / "root") as top:
        config = json.loads((top / "etc/cloud/cloud.cfg.d/99_ganeti.cfg").read_text().partition("\n")[2])
        assert config["users"][0]["name"] == "admin"
        assert config["users"][0]["ssh_authorized_keys"] == [key]
        assert config["resolv_conf"]["nameservers"] == ["192.0.2.1"]
        assert "datasource_list" not in config, "the seed is what cloud-init shall find"


def test_ddns_on_create_and_rename(node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    enable("zz_ddns")
    image_with(node, small_tree, {"etc/dhcp/dhclient.conf": "send host-name = gethostname();\n"}, tmp_path)
    target = disk()
    node.create(target, env="create-kvm-network").ok()
    with guest_of(target, tmp_path / "root", "rw") as top:
        assert (top / "etc/dhcp/dhclient.conf").read_text() == 'send host-name "inst1";\n'
        (top / "etc/dhcp/dhclient.conf").write_text("send host-name = gethostname();\n")
    names = {"OLD_INSTANCE_NAME": "inst1.example.org", "INSTANCE_NAME": "inst9.example.org", "NIC_COUNT": "1"}
    log = node.call("rename", node.environment(target, env="rename", **names)).ok().log
    assert "hook zz_ddns" in log
    with guest_of(target, tmp_path / "root") as top:
        assert (top / "etc/dhcp/dhclient.conf").read_text() == 'send host-name "inst9";\n'


# A DHCP server and the DHCP client of a guest (Debian), alone in a network; both end together
ASK = """
cd "$1"
ip link set lo up
ip link add server type veth peer name guest
ip addr add 192.0.2.1/24 dev server
ip link set server up
ip link set guest up
dnsmasq --conf-file=/dev/null --no-resolv --no-hosts --user=root --interface=server --bind-interfaces \\
    --dhcp-authoritative --no-ping --dhcp-range=192.0.2.100,192.0.2.100 --domain=example.org \\
    --dhcp-leasefile="$1/leases" --pid-file="$1/dnsmasq.pid"
chroot "$2" dhclient -1 -sf /bin/true guest
busybox nslookup -type=a inst1.example.org 192.0.2.1
"""


def test_ddns_gets_the_name_into_the_dns(
    node: Node, disk: MakeDisk, small_tree: Path, debians: Callable[[str], Path], tmp_path: Path
) -> None:
    enable("zz_ddns")
    image_with(node, small_tree, {"etc/dhcp/dhclient.conf": "request subnet-mask, routers;\n"}, tmp_path)
    target, debian = disk(), debians("ifupdown")
    node.create(target, env="create-kvm-network").ok()
    with guest_of(target, tmp_path / "root") as top:
        shutil.copy(top / "etc/dhcp/dhclient.conf", debian / "etc/dhcp")
    alone = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    answer = run(*alone, "bash", "-e", "-c", ASK, "ask", tmp_path, debian)
    assert answer.split()[-4:] == ["Name:", "inst1.example.org", "Address:", "192.0.2.100"]


# The hook in README.rst


def test_example_of_the_readme(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    node.hook("motd", readme.block("#!/usr/bin/env python3"))
    target = disk()
    log = node.create(target, env="create-kvm-network").ok().log
    assert "imageos: motd: the guest knows that it is inst1.example.org\n" in log
    with guest_of(target, tmp_path / "root") as top:
        assert (top / "etc/motd").read_text().startswith("This is inst1.example.org (")
    result = node.create(target, NIC_COUNT="0").failed("hook motd", "the instance has no network")
    assert result.lines[-2].startswith("imageos: hint: gnt-instance modify --net add")
    assert result.log.count("the instance has no network") == result.log.count("hint: ") == 1


# SELinux: files that were written have no label


def relabels(disk: Path, where: Path) -> bool:
    """Return True if the guest labels its files at the next boot, but not at the boot after that."""
    with guest_of(disk, where, "rw") as top:
        found = (top / ".autorelabel").exists()
        (top / ".autorelabel").unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("mode, expected", [("enforcing", True), ("permissive", True), ("disabled", False)])
def test_selinux(mode: str, expected: bool, node: Node, disk: MakeDisk, small_tree: Path, tmp_path: Path) -> None:
    files = {name: text.replace("enforcing", mode) for name, text in SELINUX.items()}
    image_with(node, small_tree, files, tmp_path)
    target, where = disk(), tmp_path / "root"
    node.create(target).ok()
    assert relabels(target, where) == expected
    names = {"OLD_INSTANCE_NAME": "inst1.example.org", "INSTANCE_NAME": "inst9.example.org"}
    rename = node.environment(target, env="rename", **names)
    node.call("rename", rename).ok()
    assert relabels(target, where) == expected, "rename"
    node.call("rename", rename).ok()
    assert not relabels(target, where), "nothing was written"
    imported(node, target).ok()
    assert not relabels(target, where), "nothing was written"
    node.hook("write", "#!/bin/sh\necho x >$TARGET/etc/by-hook\n")
    node.defaults("IMPORT_HOOKS=write\nRENAME_HOOKS=write")
    node.call("rename", rename).ok()
    assert relabels(target, where) == expected, "a hook of rename"
    imported(node, target).ok()
    assert relabels(target, where) == expected, "a hook of import"
