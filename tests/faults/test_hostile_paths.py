"""Any hostile object at a path that is read or written: an error or a right result, and an unchanged canary.

The paths come from a run on a good tree, so that additions to create or to a hook are covered without changes here.
"""

from __future__ import annotations

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
from credentials import HASH, public_key
from hookfiles import PYTHON_HOOKS, hook_module
from support import Node, recorded, run

from imageos import ganeti, log, network
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.guests import hostkeys, personalize, target
from imageos.guests import hostname as hostnames
from imageos.guests.sandbox import GuestDisk
from imageos.hook import Hook
from imageos.images.imagefile import Image
from imageos.node import isolation, linux
from imageos.request import Request
from imageos.settings import Settings

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
    """Return a directory in memory, so that thousands of trees take seconds. The node's own files are read-only."""
    where = tmp_path / "area"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755,size=64m", "tmpfs", where)
    yield where
    run("umount", where)


@pytest.fixture
def canary(area: Path) -> Path:
    """Return a directory of the node beside the guest's root."""
    top = area / "canary"
    (top / "directory").mkdir(parents=True)
    (top / "file").write_text("of the node\n")
    (top / "directory/hostname").write_text("of the node\n")
    return top


@pytest.fixture
def guest(area: Path) -> Path:
    return area / "guest"


@pytest.fixture(scope="session")
def settings() -> Settings:
    return (
        Settings()
        ._replace(
            image_type="tarball",
            user_data="#cloud-config\n",
            ssh_authorized_keys=public_key("a@b"),
            root_password_hash=HASH,
            kernel_args="quiet",
            dns_servers="192.0.2.53",
            dns_search="example.org",
            dns_domain="example.org",
        )
        .with_sizes(512)
    )


@pytest.fixture
def steps(guest: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """Run the steps of create, rename and the bundled hooks on a guest, without its programs."""
    overlays = guest.with_name("overlays")
    for name in ("etc/motd", "etc/ssh/sshd_config", "srv/new"):
        (overlays / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (overlays / "web" / name).write_text("of the overlay\n")
    settings = settings._replace(overlay="web", overlays_dir=str(overlays))
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
        image = Image("tiny.tar", 0, 0, "")
        interfaces = network.plan(instance, settings)
        request = Request(instance, settings, image, interfaces, [], None)
        loop = LoopDevice("/dev/null", 0, Disk("/dev/null", 0, GIB, is_file=False), [], set())
        personalize.configure(request, loop, volumes, hostkeys.no_key)

    def rename() -> None:
        with opened() as root:
            hostnames.rename(root, "image.example.net", "new.example.org")

    def hook(name: str, action: str) -> Callable[[], None]:
        module = hook_module(name)

        def call() -> None:
            with opened() as root:
                environ = {**recorded("create-kvm-network"), "TARGET": str(guest), "IMAGEOS_ACTION": action}
                module.main(Hook(action, root, settings, instance, "/dev/null", volumes, (), environ))

        return call

    calls = {"create": configure, "rename": rename}
    calls.update({name: hook(name, "create") for name in PYTHON_HOOKS})
    return calls


def make_guest(guest: Path, kind: str) -> None:
    """Make a good tree with small files only, since it is copied thousands of times."""
    shutil.rmtree(guest, ignore_errors=True)
    trees.guest(guest, TREES[kind], MORE)
    (guest / "bin/busybox").write_text("")
    for name in ("usr/bin/cloud-init", "usr/sbin/grub-install", "usr/sbin/grub-mkconfig", "usr/bin/ssh-keygen"):
        (guest / name).chmod(0o755)


def learn(guest: Path, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the paths that a call passes to any method of Target."""
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


# Objects to put at a path: functions of (path, canary)
def link(text: str) -> Callable[[Path, Path], None]:
    return lambda path, canary: path.symlink_to(text.format(canary=canary, up="../" * 30, name=path.name))


def hard_link(path: Path, canary: Path) -> None:
    os.link(canary / "file", path)


def a_socket(path: Path, canary: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_PATH)
        try:
            listener.bind(f"/proc/self/fd/{here}/{path.name[:60]}")
        finally:
            os.close(here)


def large(path: Path, canary: Path) -> None:
    with path.open("wb") as file:
        file.truncate(GIB)


def full_directory(path: Path, canary: Path) -> None:
    path.mkdir()
    for name in (b"new\nline", b"not utf-8 \xff", b"-rf", b"*", b"$(id)", b"n" * 255):
        (path / os.fsdecode(name)).write_text("x")
        (path / os.fsdecode(name + b"l")[:255]).symlink_to(canary / "file") if len(name) < 255 else None


def parent_link(text: str) -> Callable[[Path, Path], None]:
    def make(path: Path, canary: Path) -> None:
        directory = path.parent
        shutil.rmtree(directory)
        directory.symlink_to(text.format(canary=canary, up="../" * 30, name=directory.name))

    return make


def holding(data: bytes) -> Callable[[Path, Path], None]:
    return lambda path, canary: Path(path).write_bytes(data.replace(b"CANARY", os.fsencode(canary)))  # type: ignore


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
    "fifo": lambda path, canary: os.mkfifo(path),
    "socket": a_socket,
    "endless device": lambda path, canary: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    "block device": lambda path, canary: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 300)),
    "directory": lambda path, canary: path.mkdir(),
    "full directory": full_directory,
    "1 GiB": large,
    "hard link": hard_link,
    "empty": holding(b""),
    "tricks": holding(TRICKS),
    "one long line": holding(b"x" * 1_000_000),
    "many lines": holding(b"a\n" * 500_000),
}


def put(guest: Path, path: str, kind: str, canary: Path) -> bool:
    """Put something hostile at a path of a good tree; return False if that makes no sense there."""
    victim = guest / path.lstrip("/")
    if len(victim.relative_to(guest).parts) == 1 and kind.startswith("parent"):
        return False
    if not victim.parent.is_dir() or victim.parent.is_symlink():
        shutil.rmtree(victim.parent, ignore_errors=True) if victim.parent.is_dir() else victim.parent.unlink(
            missing_ok=True
        )
        victim.parent.mkdir(parents=True)
    if victim.is_dir() and not victim.is_symlink():
        shutil.rmtree(victim)
    else:
        victim.unlink(missing_ok=True)
    KINDS[kind](victim, canary)
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
