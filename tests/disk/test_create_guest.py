"""The changes that make a deployed tree a separate instance: names, identity, console."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from support import PATH, Node, mounted, partitions, run

MakeDisk = Callable[..., Path]


@pytest.fixture
def deploy(node: Node, disk: MakeDisk, tmp_path: Path) -> Callable[..., Path]:
    """Deploy a tree, and return the result (a copy to look at)."""
    count = iter(range(100))

    def make(tree: Path, **overrides: object) -> Path:
        name = f"made{next(count)}"
        trees.tarball(tree, node.images / f"{name}-{trees.ARCH}.tar.gz")
        target = disk()
        node.create(
            target, OSP_IMAGE_NAME=name, OSP_SWAP="no", INSTANCE_HV_kernel_path="/boot/vmlinuz", **overrides
        ).ok()
        copy = tmp_path / f"deployed-{name}"
        with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
            run("cp", "-a", guest, copy)
        return copy

    return make


def guest(tmp_path: Path, *more: dict[str, str]) -> Path:
    return trees.guest(tmp_path / "guest", *more)


def test_hostname_and_hosts(deploy: Callable[..., Path], small_tree: Path) -> None:
    made = deploy(small_tree)
    assert (made / "etc/hostname").read_text() in ("inst1.example.org\n", "inst1\n")
    hosts = [line.split() for line in (made / "etc/hosts").read_text().splitlines()]
    assert ["127.0.0.1", "localhost"] in hosts
    own = [words for words in hosts if "inst1.example.org" in words]
    assert own and "inst1" in own[0], "short name missing"
    assert not [words for words in hosts if "image.example.net" in words], "the image's own name is left"


def test_identity_of_the_image_is_gone(deploy: Callable[..., Path], small_tree: Path) -> None:
    made = deploy(small_tree)
    assert (made / "etc/machine-id").read_text() == ""
    dbus = made / "var/lib/dbus/machine-id"
    assert not dbus.exists() or dbus.is_symlink() or dbus.read_text() == ""
    for key in trees.HOST_KEYS:
        for name in (key, f"{key}.pub"):
            file = made / "etc/ssh" / name
            assert not file.exists() or "of the image" not in file.read_text(), name
    assert not (made / "var/lib/cloud/instance").exists()
    assert not (made / "var/lib/cloud/instances/iid-of-the-image").exists()
    assert (made / "etc/ssh/sshd_config").exists()


@pytest.mark.parametrize("node_can", [True, False])
def test_host_keys_are_new(node_can: bool, node: Node, deploy: Callable[..., Path], tmp_path: Path) -> None:
    """The node makes the RSA key if it can; the guest's own ssh-keygen makes the missing ones."""
    tree = with_program(guest(tmp_path), "ssh-keygen")
    ahead = tmp_path / "asked/ssh-keygen"
    real = "exec /usr/bin/ssh-keygen" if node_can else "false"
    node.write(ahead, f'#!/bin/sh\n{real} "$@"\n')
    ahead.chmod(0o755)
    made = deploy(tree, PATH=f"{ahead.parent}:{PATH}") / "etc/ssh"
    # the node's keys are PEM, which every OpenSSH reads
    assert ("BEGIN RSA" in (made / "ssh_host_rsa_key").read_text()) == node_can
    for kind in ("rsa", "ecdsa", "ed25519"):
        key = made / f"ssh_host_{kind}_key"
        text = Path(f"{key}.pub").read_text().split()
        assert text[:2] == run("ssh-keygen", "-y", "-f", key).split()[:2], "not the public key of this private one"
        assert text[2] == "root@inst1"
        assert (key.stat().st_mode & 0o777, Path(f"{key}.pub").stat().st_mode & 0o777) == (0o600, 0o644)
    assert run("ssh-keygen", "-l", "-f", made / "ssh_host_rsa_key").startswith("3072 ")
    kind = "RSA" if node_can else "OPENSSH"  # the guest's ssh-keygen uses its own format
    assert (made / "ssh_host_rsa_key").read_text().startswith(f"-----BEGIN {kind} PRIVATE KEY-----")
    assert not [path for path in made.glob("ssh_host_*") if "of the image" in path.read_text()]


def with_program(tree: Path, name: str) -> Path:
    """Return the tree with a program of this machine and its libraries."""
    program = run("which", name).strip()
    libraries = re.findall(r"/\S+", run("ldd", program))
    # glibc before 2.34 loads this at run time to look up the user
    names = [path.replace("/libc.so.6", "/libnss_files.so.2") for path in libraries if path.endswith("/libc.so.6")]
    for path in (program, *libraries, *names):
        place = tree / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return tree


def test_guest_without_any_of_the_identity_files(deploy: Callable[..., Path], tmp_path: Path) -> None:
    """An image may have none of them; a guest without systemd does not get a machine-id."""
    tree = guest(tmp_path)
    for name in ("etc/hostname", "etc/hosts", "etc/machine-id", "etc/fstab"):
        (tree / name).unlink()
    run("rm", "-rf", tree / "var", tree / "etc/ssh")
    made = deploy(tree)
    assert "inst1" in (made / "etc/hostname").read_text()
    assert "UUID=" in (made / "etc/fstab").read_text()


def getty_lines(made: Path) -> list[str]:
    lines = (made / "etc/inittab").read_text().splitlines()
    return [line for line in lines if "ttyS0" in line and not line.startswith("#")]


@pytest.mark.parametrize("console", ["True", "False"])
def test_serial_console_of_systemd(console: str, deploy: Callable[..., Path], small_tree: Path) -> None:
    made = deploy(small_tree, INSTANCE_HV_serial_console=console)
    link = made / "etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service"
    assert os.path.lexists(link) == (console == "True")
    if console == "True":
        assert os.readlink(link).endswith("/systemd/system/serial-getty@.service")
    assert not (made / "etc/inittab").exists()


@pytest.mark.parametrize("console", ["True", "False"])
@pytest.mark.parametrize("init", [trees.SYSVINIT, trees.OPENRC], ids=["sysvinit", "openrc"])
def test_serial_console_of_inittab(
    init: dict[str, str], console: str, deploy: Callable[..., Path], tmp_path: Path
) -> None:
    tree = guest(tmp_path, init)
    made = deploy(tree, INSTANCE_HV_serial_console=console)
    if console == "False":
        assert (made / "etc/inittab").read_text() == init["etc/inittab"]
        return
    lines = getty_lines(made)
    assert len(lines) == 1, lines
    assert ":respawn:" in lines[0] and "getty" in lines[0]
    if init is trees.OPENRC:
        assert lines[0].startswith("ttyS0::respawn:")
    else:
        name, levels, action, _ = lines[0].split(":", 3)
        assert name and "2" in levels and action == "respawn"
    kept = [line for line in init["etc/inittab"].splitlines() if "ttyS0" not in line]
    assert [line for line in (made / "etc/inittab").read_text().splitlines() if line in kept] == kept


def test_serial_console_again_over_one_that_is_there(deploy: Callable[..., Path], tmp_path: Path) -> None:
    """The image was captured from a deployed instance: there is no second getty."""
    tree = guest(tmp_path, {**trees.SYSVINIT, "etc/inittab": trees.SYSVINIT["etc/inittab"].replace("#T0", "T0")})
    assert len(getty_lines(deploy(tree, INSTANCE_HV_serial_console="True"))) == 1


def test_console_files_of_another_init_do_not_matter(deploy: Callable[..., Path], tmp_path: Path) -> None:
    """A systemd guest may have an old inittab; a guest without init is no error."""
    made = deploy(guest(tmp_path, trees.SYSTEMD), INSTANCE_HV_serial_console="True")
    assert os.path.lexists(made / "etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service")


@pytest.mark.parametrize(
    "prepare",
    [
        "rm etc/hostname && ln -s {node} etc/hostname",
        "mkdir etc.d && mv etc/* etc.d && rmdir etc && ln -s /etc.d etc",
        "rm etc/hosts && ln -s /../../../../../{node} etc/hosts",
        "rm etc/machine-id && ln -s {node} etc/machine-id",
        "rm etc/fstab && ln -s {node} etc/fstab",
        "rm -rf var/lib/cloud && ln -s {directory} var/lib/cloud",
        "rm -rf etc/ssh && ln -s {directory} etc/ssh",
        "mkdir -p etc/systemd && ln -s {directory} etc/systemd/system",
    ],
)
def test_links_of_the_guest_do_not_lead_to_the_node(
    prepare: str, deploy: Callable[..., Path], node: Node, disk: MakeDisk, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "instances").mkdir(parents=True)
    for name in ("file", "ssh_host_rsa_key", "instances/keep"):
        (outside / name).write_text("the node's\n")
    tree = guest(tmp_path, trees.SYSTEMD)
    command = prepare.format(node=outside / "file", directory=outside)
    run("sh", "-ec", f"cd {tree} && {command}")
    trees.tarball(tree, node.images / f"links-{trees.ARCH}.tar.gz")
    result = node.create(disk(), OSP_IMAGE_NAME="links", INSTANCE_HV_serial_console="True")
    assert result.status in (0, 1), result.log
    assert {
        str(path.relative_to(outside)): path.read_text() for path in outside.rglob("*") if path.is_file()
    } == dict.fromkeys(("file", "ssh_host_rsa_key", "instances/keep"), "the node's\n")
    assert not (outside / "getty.target.wants").exists()


def make_strange(file: Path, kind: str) -> None:
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        os.mknod(file, 0o020666, os.makedev(1, 5))
    elif kind == "directory":
        file.mkdir()
        (file / "occupied").write_text("")
    else:
        file.symlink_to(file.name)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_something_else_where_a_file_is_written(kind: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """A file that imageos owns is replaced."""
    names = ("etc/hostname", "etc/fstab", "etc/machine-id")
    tree = guest(tmp_path, trees.SYSTEMD)
    for name in names:
        make_strange(tree / name, kind)
    trees.tarball(tree, node.images / f"strange-{trees.ARCH}.tar.gz")
    target = disk()
    node.create(target, OSP_IMAGE_NAME="strange").ok()
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as made:
        for name in names:
            assert (made / name).is_file() and not (made / name).is_symlink(), name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("directory", name) for name in ("etc/hostname", "etc/hosts", "etc/fstab", "etc/machine-id")),
        *(("loop of links", name) for name in ("etc/hosts", "etc/fstab")),
        *((kind, "etc/hosts") for kind in ("fifo", "device")),  # it is read before it is written
    ],
)
def test_something_else_that_stays(kind: str, name: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The call neither hangs nor shows a traceback: it names what it cannot read or replace."""
    tree = guest(tmp_path, trees.SYSTEMD)
    make_strange(tree / name, kind)
    trees.tarball(tree, node.images / f"strange-{trees.ARCH}.tar.gz")
    node.create(disk(), OSP_IMAGE_NAME="strange").failed(name)
