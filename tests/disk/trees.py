"""Make small trees that look like a guest, and images of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from support import MIB, run

ARCH = {"i686": "x86", "i586": "x86"}.get(os.uname().machine, os.uname().machine)
COMPRESSORS = {
    "gz": ["gzip", "-1"],
    "zst": ["zstd", "-q", "-1"],
    "xz": ["xz", "-0"],
    "bz2": ["bzip2", "-1"],
    "lz4": ["lz4", "-q", "-1"],
    "tar": ["cat"],
}
SUFFIXES = {name: "tar" if name == "tar" else f"tar.{name}" for name in COMPRESSORS}
MACHINE_ID = "0123456789abcdef0123456789abcdef\n"
HOST_KEYS = [f"ssh_host_{kind}_key" for kind in ("rsa", "dsa", "ecdsa", "ed25519")]

FILES: dict[str, str] = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hostname": "image\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 image.example.net image\n",
    "etc/machine-id": MACHINE_ID,
    "etc/fstab": "LABEL=of-the-image / ext4 defaults 0 1\n",
    "etc/os-release": 'ID=tiny\nPRETTY_NAME="Tiny"\n',
    "etc/ssh/sshd_config": "PermitRootLogin no\n",
    "boot/vmlinuz-1": "not a kernel\n",
    "usr/share/doc/copyright": "free\n",
    "var/lib/dbus/machine-id": MACHINE_ID,
    "var/lib/cloud/instances/iid-of-the-image/sem/config_ssh": "",
    "var/lib/cloud/data/instance-id": "iid-of-the-image\n",
    "var/lib/cloud/seed/nocloud-net/meta-data": "instance-id: iid-of-the-image\n",
}
SYSTEMD = {
    "lib/systemd/systemd": "#!/bin/sh\n",
    "lib/systemd/system/serial-getty@.service": "[Service]\nExecStart=-/sbin/agetty -\n",
}
SYSVINIT = {
    "etc/inittab": "id:2:initdefault:\n"
    "si::sysinit:/etc/init.d/rcS\n"
    "1:2345:respawn:/sbin/getty 38400 tty1\n"
    "#T0:23:respawn:/sbin/getty -L ttyS0 9600 vt100\n",
    "sbin/init": "#!/bin/sh\n",
}
OPENRC = {
    "etc/inittab": "::sysinit:/sbin/openrc sysinit\n"
    "::wait:/sbin/openrc default\n"
    "tty1::respawn:/sbin/getty 38400 tty1\n"
    "#ttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100\n",
    "sbin/openrc": "#!/bin/sh\n",
    "etc/alpine-release": "3.19.0\n",
}


def guest(top: Path, *more: dict[str, str]) -> Path:
    """Make a tree with a few files: all that create changes or checks."""
    for directory in ("bin", "sbin", "dev", "proc", "sys", "run", "mnt", "home", "root", "tmp", "etc/ssh", "boot"):
        (top / directory).mkdir(parents=True)
    for files in (FILES, *more):
        for name, text in files.items():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(text)
    for directory, _, names in os.walk(top):
        Path(directory).chmod(0o755)
        for name in names:
            Path(directory, name).chmod(0o644)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", top / "bin/busybox")
    (top / "bin/sh").symlink_to("busybox")
    (top / "etc/shadow").write_text("root:*:19000:0:99999:7:::\n")
    (top / "etc/shadow").chmod(0o640)
    for key in HOST_KEYS:
        (top / "etc/ssh" / key).write_text("private key of the image\n")
        (top / "etc/ssh" / key).chmod(0o600)
        (top / "etc/ssh" / f"{key}.pub").write_text("public key of the image\n")
        (top / "etc/ssh" / f"{key}.pub").chmod(0o644)
    (top / "var/lib/cloud/instance").symlink_to("instances/iid-of-the-image")
    for name in ("sbin/init", "sbin/openrc", "lib/systemd/systemd"):
        if (top / name).exists():
            (top / name).chmod(0o755)
    if (top / "lib/systemd").exists():
        (top / "sbin/init").symlink_to("../lib/systemd/systemd")
    (top / "tmp").chmod(0o1777)
    (top / "root").chmod(0o700)
    return top


def odd(top: Path) -> Path:
    """Make files under /odd that archives and copies may lose or fail on."""
    home = os.fsencode(top / "odd")
    os.mkdir(home)

    def file(name: bytes, content: bytes = b"content\n", mode: int = 0o644) -> bytes:
        path = os.path.join(home, name)
        with open(path, "wb") as output:
            output.write(content)
        os.chmod(path, mode)
        return path

    for name in (
        b"sp ace",
        b"new\nline",
        b"tab\t",
        b"quote'\"",
        b"back\\slash",
        b"-rf",
        b"--help",
        b"*",
        b"$(id)",
        b"not utf-8 \xff\xfe",
        "\u00fcml\u00e4ut".encode(),
        b"n" * 255,
        b".hidden",
        b"empty",
    ):
        file(name, b"" if name == b"empty" else name)
    deep = home
    for _ in range(12):
        deep = os.path.join(deep, b"directory-of-a-long-path")
        os.mkdir(deep)
    os.symlink(b"t" * 250, os.path.join(deep, b"link"))
    os.symlink(b"/etc/passwd", os.path.join(home, b"absolute"))
    os.symlink(b"../../../../etc/passwd", os.path.join(home, b"upwards"))
    os.symlink(b"nowhere", os.path.join(home, b"dangling"))
    os.link(file(b"hard 1"), os.path.join(home, b"hard 2"))
    os.link(os.path.join(home, b"hard 1"), os.path.join(deep, b"hard 3"))
    os.chown(file(b"high ids"), 4000000000, 3000000000)
    os.chown(file(b"nobody's"), 54321, 12345)
    os.lchown(os.path.join(home, b"dangling"), 54321, 12345)
    for name, mode in ((b"setuid", 0o4755), (b"setgid", 0o2755), (b"both", 0o6711), (b"none", 0), (b"secret", 0o600)):
        file(name, mode=mode)
    os.mkdir(os.path.join(home, b"sticky"))
    os.chmod(os.path.join(home, b"sticky"), 0o3777)
    os.mkfifo(os.path.join(home, b"fifo"))
    os.mknod(os.path.join(home, b"null"), 0o020666, os.makedev(1, 3))
    os.chmod(os.path.join(home, b"null"), 0o666)
    os.mknod(os.path.join(home, b"block"), 0o060640, os.makedev(7, 300))
    with open(file(b"sparse"), "r+b") as sparse:
        sparse.truncate(64 * MIB)
        sparse.seek(33 * MIB + 5)
        sparse.write(b"an island")
    os.setxattr(file(b"user attribute"), "user.comment", b"\0binary\xff")
    os.setxattr(home, "user.of-a-directory", b"value")
    run("setcap", "cap_net_raw+ep", os.fsdecode(file(b"capable", mode=0o755)))
    run("setfacl", "-m", "u:4321:rw,g:1234:r", os.fsdecode(file(b"acl")))
    os.mkdir(os.path.join(home, b"default acl"))
    run("setfacl", "-d", "-m", "u:4321:rwx", os.fsdecode(os.path.join(home, b"default acl")))
    os.utime(file(b"from 1980"), (315532800, 315532800))
    os.utime(file(b"from 2100"), (4102444800, 4102444800))
    os.utime(os.path.join(home, b"dangling"), (1e9, 1e9), follow_symlinks=False)
    os.utime(os.path.join(home, b"sticky"), (1e9, 1e9))
    return top


def tarball(tree: Path, path: Path, compression: str = "gz") -> Path:
    """Make an image as an operator does, with all attributes."""
    archive = path.with_name(path.name + ".plain")
    run(
        "tar",
        "--create",
        "--file",
        archive,
        "--directory",
        tree,
        "--numeric-owner",
        "--sparse",
        "--acls",
        "--xattrs",
        "--xattrs-include=*",
        ".",
    )
    compress(archive, path, compression)
    archive.unlink()
    return path


def compress(source: Path, path: Path, compression: str) -> Path:
    with source.open("rb") as plain, path.open("wb") as output:
        subprocess.run(COMPRESSORS[compression], stdin=plain, stdout=output, check=True)
    return path
