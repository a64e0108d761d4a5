"""Whatever a guest has at a path that is read or written: an error or a right result, the canary untouched.

The paths are learnt from a run on a good tree, so what is added to create or to a hook is covered without a word here.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trees
from hookfiles import PYTHON_HOOKS, hook_module
from support import Node, recorded, run

from imageos import ganeti, log, settings
from imageos.commands import create
from imageos.disks.disk import Attached
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.guests import hostkeys, target
from imageos.guests import hostname as hostnames
from imageos.guests.sandbox import GuestDisk
from imageos.hook import Hook
from imageos.node import isolation, linux

TREES = {"systemd": trees.SYSTEMD, "sysvinit": trees.SYSVINIT}
MORE = {
    "usr/bin/cloud-init": "#!/bin/sh\n",
    "etc/cloud/cloud.cfg": "hostname: image\n",
    "etc/selinux/config": "SELINUX=enforcing\n",
    "etc/securetty": "tty1\n",
    "etc/default/grub": 'GRUB_CMDLINE_LINUX=""\n',
    "etc/resolv.conf": "nameserver 192.0.2.1\n",
    "etc/network/interfaces": "auto lo\n",
    "usr/sbin/grub-install": "#!/bin/sh\n",
    "usr/sbin/grub-mkconfig": "#!/bin/sh\n",
    "boot/grub/grub.cfg": "linux /vmlinuz-1 root=UUID=1234\n",
    "usr/bin/ssh-keygen": "#!/bin/sh\n",
    "usr/lib/grub/i386-pc/modinfo.sh": "",
}
SLOW = 60.0  # seconds
GIB = 1 << 30


@pytest.fixture
def area(node: Node, tmp_path: Path) -> Iterator[Path]:
    """Where it happens: in memory, so that thousands of trees take seconds. The node's own files are read-only."""
    where = tmp_path / "area"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755,size=64m", "tmpfs", where)
    yield where
    run("umount", where)


@pytest.fixture
def canary(area: Path) -> Path:
    """A directory of the node beside the guest's root."""
    top = area / "canary"
    (top / "directory").mkdir(parents=True)
    (top / "file").write_text("of the node\n")
    (top / "directory/hostname").write_text("of the node\n")
    return top


@pytest.fixture
def guest(area: Path) -> Path:
    return area / "guest"


@pytest.fixture(scope="session")
def known() -> settings.Settings:
    return dataclasses.replace(
        settings.Settings(),
        image_type="tarball",
        user_data="#cloud-config\n",
        ssh_authorized_keys="ssh-ed25519 AAAA a@b\n",
        root_password_hash="$6$salt$hash",
        kernel_args="quiet",
        dns_servers="192.0.2.53",
        dns_search="example.org",
        dns_domain="example.org",
    ).resolved(512)


@pytest.fixture
def steps(guest: Path, known: settings.Settings, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """What create, rename and the bundled hooks do to a guest, without its programs."""
    overlays = guest.with_name("overlays")
    for name in ("etc/motd", "etc/ssh/sshd_config", "srv/new"):
        (overlays / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (overlays / "web" / name).write_text("of the overlay\n")
    known = dataclasses.replace(known, overlay="web", overlays_dir=str(overlays))
    monkeypatch.setattr(isolation, "TARGET", str(guest))
    monkeypatch.setattr(target, "run", lambda *_, **__: "")
    monkeypatch.setattr("imageos.guests.sandbox.os.stat", os.stat)
    monkeypatch.setattr(target, "entering", lambda *_: None)
    monkeypatch.setattr(log, "_write", lambda _: None)
    instance = ganeti.instance(recorded("create-kvm-network"))
    volumes = (Volume("root", "ext4", "/dev/null", "11111111-1111-1111-1111-111111111111", "/"),)

    def opened() -> Any:
        return target.opened(str(guest), "inst1", GuestDisk(["/dev/null"], []), 1)

    def configure() -> None:
        create.configure(instance, known, Attached("/dev/null", 0, GIB), volumes, hostkeys.no_key)

    def rename() -> None:
        with opened() as root:
            hostnames.rename(root, "image.example.net", "new.example.org")

    def hook(name: str, action: str) -> Callable[[], None]:
        module = hook_module(name)

        def call() -> None:
            with opened() as root:
                environ = {**recorded("create-kvm-network"), "TARGET": str(guest), "IMAGEOS_ACTION": action}
                module.main(Hook(action, root, known, instance, "/dev/null", volumes, (), environ))

        return call

    calls = {"create": configure, "rename": rename}
    calls.update({name: hook(name, "create") for name in PYTHON_HOOKS})
    return calls


def make_guest(guest: Path, kind: str) -> None:
    """A good tree; nothing large, since it is copied thousands of times."""
    shutil.rmtree(guest, ignore_errors=True)
    trees.guest(guest, TREES[kind], MORE)
    (guest / "bin/busybox").write_text("")
    for name in ("usr/bin/cloud-init", "usr/sbin/grub-install", "usr/sbin/grub-mkconfig", "usr/bin/ssh-keygen"):
        (guest / name).chmod(0o755)


def learn(guest: Path, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that a call asks for, through whatever method of Target."""
    seen: set[str] = set()
    open_in_root, parent = linux.open_in_root, target.Target._parent

    def opening(root: int, path: str, *arguments: Any, **options: Any) -> int:
        seen.add(os.path.normpath("/" + path.lstrip("/")))
        return open_in_root(root, path, *arguments, **options)

    def parent_of(self: target.Target, path: str, *arguments: Any, **options: Any) -> Any:
        seen.add(os.path.normpath("/" + path.lstrip("/")))
        return parent(self, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(linux, "open_in_root", opening)
        patch.setattr(target.Target, "_parent", parent_of)
        call()
    return sorted(path for path in seen if path != "/")


# What is put at a path: (place, canary)
def link(text: str) -> Callable[[Path, Path], None]:
    return lambda place, canary: place.symlink_to(text.format(canary=canary, up="../" * 30, name=place.name))


def hard_link(place: Path, canary: Path) -> None:
    os.link(canary / "file", place)


def a_socket(place: Path, canary: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(place.parent, os.O_PATH)
        try:
            one.bind(f"/proc/self/fd/{here}/{place.name[:60]}")
        finally:
            os.close(here)


def large(place: Path, canary: Path) -> None:
    with place.open("wb") as file:
        file.truncate(GIB)


def full_directory(place: Path, canary: Path) -> None:
    place.mkdir()
    for name in (b"new\nline", b"not utf-8 \xff", b"-rf", b"*", b"$(id)", b"n" * 255):
        (place / os.fsdecode(name)).write_text("x")
        (place / os.fsdecode(name + b"l")[:255]).symlink_to(canary / "file") if len(name) < 255 else None


def parent_link(text: str) -> Callable[[Path, Path], None]:
    def make(place: Path, canary: Path) -> None:
        directory = place.parent
        shutil.rmtree(directory)
        directory.symlink_to(text.format(canary=canary, up="../" * 30, name=directory.name))

    return make


def holding(data: bytes) -> Callable[[Path, Path], None]:
    return lambda place, canary: Path(place).write_bytes(data.replace(b"CANARY", os.fsencode(canary)))  # type: ignore


TRICKS = (
    b"$(touch CANARY/new)`touch CANARY/new`;touch CANARY/new\n\"'\\\n\0\xff\xfe\r\n"
    b'ID="$(touch CANARY/new)"\nUUID=../../.. /proc ext4 defaults 0 0\nLABEL=\\000 /a\\000b ext4\n'
    b'127.0.1.1 \n127.0.1.1\t\x1b[2J\n::respawn:\nGRUB_CMDLINE_LINUX="a\n- {a: [\nSELINUX=enforcing\nhostname: \n'
)
KINDS: dict[str, Callable[[Path, Path], None]] = {
    "absolute link": link("{canary}/file"),
    "absolute link to a directory": link("{canary}/directory"),
    "absolute dangling link": link("{canary}/new"),
    "upwards": link("{up}{canary}/file"),
    "upwards dangling": link("{up}{canary}/directory/new"),
    "loop": link("{name}"),
    "link to the root": link("/"),
    "link to dots": link("../.."),
    "magic link": link("/proc/self/root{canary}/file"),
    "magic cwd": link("/proc/self/cwd"),
    "magic descriptor": link("/proc/self/fd/1"),
    "long link": link("a/" * 2000),
    "odd link": link("new\nline \udcff $(id)"),
    "parent absolute": parent_link("{canary}/directory"),
    "parent upwards": parent_link("{up}{canary}/directory"),
    "parent loop": parent_link("{name}"),
    "parent magic": parent_link("/proc/1/root{canary}/directory"),
    "fifo": lambda place, canary: os.mkfifo(place),
    "socket": a_socket,
    "endless device": lambda place, canary: os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    "block device": lambda place, canary: os.mknod(place, stat.S_IFBLK | 0o666, os.makedev(7, 300)),
    "directory": lambda place, canary: place.mkdir(),
    "full directory": full_directory,
    "1 GiB": large,
    "hard link": hard_link,
    "empty": holding(b""),
    "tricks": holding(TRICKS),
    "one long line": holding(b"x" * 1_000_000),
    "many lines": holding(b"a\n" * 500_000),
}


def put(guest: Path, path: str, kind: str, canary: Path) -> bool:
    """Put something hostile at a path of a good tree; whether that makes sense there."""
    place = guest / path.lstrip("/")
    if len(place.relative_to(guest).parts) == 1 and kind.startswith("parent"):
        return False
    if not place.parent.is_dir() or place.parent.is_symlink():
        shutil.rmtree(place.parent, ignore_errors=True) if place.parent.is_dir() else place.parent.unlink(
            missing_ok=True
        )
        place.parent.mkdir(parents=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    KINDS[kind](place, canary)
    return True


def snapshot(top: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for directory, directories, files in os.walk(top):
        for name in [".", *directories, *files]:
            path = os.path.join(directory, name)
            entry = os.lstat(path)
            content = Path(path).read_bytes() if stat.S_ISREG(entry.st_mode) else b""
            found[path] = (entry.st_mode, entry.st_uid, entry.st_gid, entry.st_size, entry.st_mtime_ns, content)
    return found


def test_nothing_is_reached(
    steps: dict[str, Callable[[], None]], guest: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[str] = []
    done: set[tuple[str, str]] = set()
    good = guest.with_name("good")
    tried = 0
    for tree in TREES:
        make_guest(good, tree)
        for name, call in steps.items():
            renew(guest, good)
            paths = learn(guest, call, monkeypatch)
            assert paths, f"{name} asks for nothing"
            for path in paths:
                for kind in KINDS if (name, path) not in done else ():
                    renew(guest, good)
                    if put(guest, path, kind, canary):
                        tried += 1
                        problems += [f"{name}: {kind} at {path}: {problem}" for problem in attempt(call, canary)]
                done.add((name, path))
    print(f"{tried} hostile paths: {sorted({path for _, path in done})}")
    assert tried > 500 and not problems, "\n".join(problems)


def renew(guest: Path, good: Path) -> None:
    if guest.exists():
        shutil.rmtree(guest)
    shutil.copytree(good, guest, symlinks=True)


def attempt(call: Callable[[], None], canary: Path) -> Iterator[str]:
    before, links = snapshot(canary), os.stat(canary / "file").st_nlink
    started = time.monotonic()
    try:
        call()
    except Failure:
        pass
    except Exception as error:
        yield f"{type(error).__name__}: {error}"
    if time.monotonic() - started > SLOW:
        yield f"took {time.monotonic() - started:.0f} s"
    if snapshot(canary) != before or os.stat(canary / "file").st_nlink > links:
        yield "the canary is another"
