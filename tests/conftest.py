"""Fixtures for all tiers but `unit`: a private view of the machine, the built file, and a check after each test.

These tests run in their own mount namespace, where /run, /tmp and /var/tmp are overlays: they can read the machine's
files there, but only this run sees what it writes. So the check can tell a test's mounts and temporary files from those
of other programs. It finds processes by descent (this process adopts orphans), and loop devices by their backing file.
Keep caches and big files out of /tmp; `tmp_path` is on the disk, under /var/cache.

While a test uses a `node`, the machine's root filesystem is read-only for it, so that code that writes outside the
guest by mistake cannot harm the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from leftovers import PRIVATE, Leftovers  # noqa: E402
from support import Call, Node, Result, private_mounts, run  # noqa: E402

TESTS = Path(__file__).resolve().parent
CACHE = TESTS.parent / ".cache"
BASE = Path("/var/cache")
PREFIX = "imageos-tests-"
ALONE = {
    "boot",  # its guests come in pairs, one for each core
    "build",  # makes the packages in dist and their caches
    "ganeti",  # eight daemons each
}
PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 120  # seconds that the kernel may take to remove things
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0 and config.option.basetemp is None:
        base, lock = own_base()
        config.option.basetemp = str(base / "pytest")  # not `base`: pytest would replace the locked directory

        def remove() -> None:
            shutil.rmtree(base, ignore_errors=True)
            os.close(lock)

        config.add_cleanup(remove)


def own_base() -> tuple[Path, int]:
    """Return a new directory, and the descriptor whose lock shows that it is in use, even to another container.

    Remove the directories of killed runs.
    """
    making = os.open(BASE, os.O_RDONLY)
    fcntl.flock(making, fcntl.LOCK_EX)  # no other run may remove our directory before we lock it
    for old in BASE.glob(PREFIX + "*"):
        with contextlib.suppress(FileNotFoundError):  # its run has just ended
            unused = os.open(old, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(unused, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            os.close(unused)
    base = Path(tempfile.mkdtemp(prefix=PREFIX, dir=BASE))
    lock = os.open(base, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.close(making)
    return base, lock


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Return a short id for a long text; pytest would use all of it, up to a megabyte."""
    return f"{argname} of {len(val)}" if isinstance(val, (str, bytes)) and len(val) > 100 else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, let only one of them run a tier that needs more than one core or fixed paths."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in ALONE:
            item.add_marker(pytest.mark.xdist_group(tier))


# The view of the machine


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Make this process's view private; yield the directories that receive its writes to /run, /tmp and /var/tmp."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.geteuid() != 0:
        yield []
        return
    private_mounts()
    base = tmp_path_factory.getbasetemp()
    own = BASE / base.relative_to(BASE).parts[0] if base.is_relative_to(BASE) else base  # shared with other workers
    CACHE.mkdir(exist_ok=True)
    writable = (own, CACHE)  # even while the root is read-only
    for top in writable:
        run("mount", "--bind", top, top)
    layers = tmp_path_factory.mktemp("layers")
    run("mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", layers)
    uppers = [overlay(Path(top), layers / top.strip("/").replace("/", "-")) for top in PRIVATE]
    try:
        yield uppers
    finally:
        for path in (*PRIVATE, layers, *writable):
            run("umount", "--lazy", path)


def overlay(top: Path, layer: Path) -> Path:
    """Mount a writable layer over `top`; return the directory that receives the writes."""
    upper, work = layer / "upper", layer / "work"
    for directory in (upper, work):
        directory.mkdir(parents=True)
    mode = top.stat().st_mode & 0o7777
    upper.chmod(mode)
    run("mount", "-t", "overlay", "-o", f"lowerdir={top},upperdir={upper},workdir={work}", "overlay", top)
    return upper


# After each test


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, mount, loop device or temporary file, and remove it. Remove `tmp_path`."""
    if request.path.relative_to(TESTS).parts[0] == "unit":
        yield
        return
    uppers = request.getfixturevalue("machine")
    base = str(request.config.option.basetemp or "")
    before = Leftovers(uppers, base)
    yield
    deadline = time.monotonic() + PATIENCE
    while True:
        left = Leftovers(uppers, base).minus(before)
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if left:
        report = "\n".join(left.describe())
        left.remove()
        for process in Call.unburied:
            process.wait()
        pytest.fail(f"left behind:\n{report}", pytrace=False)
    # All disks of a run would fill the machine's. pytest's own policy removes before anybody has looked for mounts.
    if path := request.node.funcargs.get("tmp_path"):
        run("rm", "--recursive", "--force", "--one-file-system", path, check=False)  # rmtree fails in deep trees


# The product


@pytest.fixture(scope="session")
def imageos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the file once per run; return its path."""
    checkout = TESTS.parent
    built = tmp_path_factory.mktemp("built") / "imageos"
    run(sys.executable, checkout / "build.py")
    shutil.copy2(checkout / "dist/imageos", built)
    return built


@pytest.fixture(scope="session")
def installed(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root directory with imageos installed in it. Tests must not change it."""
    root = tmp_path_factory.mktemp("root")
    run(imageos, "install", "--root", root)
    return root


@pytest.fixture
def etc(machine: list[Path], tmp_path: Path) -> Iterator[Path]:
    """Make /etc a private layer for one test; yield the directory that receives the writes."""
    assert os.geteuid() == 0, "these tests need root"
    layer = tmp_path / "etc"
    layer.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", layer)
    try:
        yield overlay(Path("/etc"), layer)
    finally:
        run("umount", "/etc", check=False)
        run("umount", "--lazy", layer)


@pytest.fixture
def read_only_root(machine: list[Path]) -> Iterator[None]:
    """Make the root filesystem read-only in this process's view, except our layers and directories."""
    run("mount", "-o", "remount,bind,ro", "/")
    yield
    run("mount", "-o", "remount,bind,rw", "/")


@pytest.fixture
def node(imageos: Path, installed: Path, etc: Path, read_only_root: None, tmp_path: Path) -> Node:
    """Return a node with a new installation of imageos and small defaults."""
    shutil.rmtree("/etc/ganeti/instance-image", ignore_errors=True)
    shutil.copytree(installed / "etc", "/etc", symlinks=True, dirs_exist_ok=True)
    work = tmp_path / "node"
    work.mkdir()
    return Node(imageos, installed, work, layer=etc)


__all__ = ["Node", "Result"]
