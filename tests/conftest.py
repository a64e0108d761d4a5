"""What all tiers but `unit` run in: a private view of the machine, the built file, and a check after each test.

Tests of these tiers run in a mount namespace of their own, where /run, /tmp and /var/tmp are overlays: what is there
can be read, what is written is seen by this run only. So mounts and temporary files that a test leaves are told
from those of other programs; processes are told by descent (this process adopts orphans), loop devices by what they
are over. Keep caches and big files out of /tmp; `tmp_path` is on the disk, under /var/cache.

While a test has a `node`, the machine's root filesystem is read-only for it: code that is wrong about where the
guest ends cannot harm the machine that it is tested on.
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
PATIENCE = 120  # seconds that the kernel gets to take things away
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0 and config.option.basetemp is None:
        base, lock = own_base()
        config.option.basetemp = str(base / "pytest")  # not `base` itself: pytest makes it anew, and the lock is gone

        def remove() -> None:
            shutil.rmtree(base, ignore_errors=True)
            os.close(lock)

        config.add_cleanup(remove)


def own_base() -> tuple[Path, int]:
    """A new directory, and the descriptor whose lock says that it is in use, in whatever container its user is.

    Takes away those of runs that were killed.
    """
    making = os.open(BASE, os.O_RDONLY)
    fcntl.flock(making, fcntl.LOCK_EX)  # nobody takes away what is made and not locked yet
    for old in BASE.glob(PREFIX + "*"):
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
    """A short name for a case that is a long text: pytest would take all of it, up to a megabyte."""
    return f"{argname} of {len(val)}" if isinstance(val, (str, bytes)) and len(val) > 100 else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, a tier that needs more than one core or a place of its own is for one of them."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in ALONE:
            item.add_marker(pytest.mark.xdist_group(tier))


# The view of the machine


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Make this process's view private; the directories that hold what it writes to /run, /tmp and /var/tmp."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.geteuid() != 0:
        yield []
        return
    private_mounts()
    base = tmp_path_factory.getbasetemp()
    own = BASE / base.relative_to(BASE).parts[0] if base.is_relative_to(BASE) else base  # shared with other workers
    CACHE.mkdir(exist_ok=True)
    writable = (own, CACHE)  # also while the root is not
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
    """Mount a writable layer over `top`; the directory that gets what is written."""
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
    """Fail the test that leaves a process, mount, loop device or temporary file; then take it away."""
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


# The product


@pytest.fixture(scope="session")
def imageos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built file, built once per run."""
    checkout = TESTS.parent
    built = tmp_path_factory.mktemp("built") / "imageos"
    run(sys.executable, checkout / "build.py")
    shutil.copy2(checkout / "dist/imageos", built)
    return built


@pytest.fixture(scope="session")
def installed(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory with imageos installed in it; not to be changed."""
    root = tmp_path_factory.mktemp("root")
    run(imageos, "install", "--root", root)
    return root


@pytest.fixture
def etc(machine: list[Path], tmp_path: Path) -> Iterator[Path]:
    """/etc as a private layer for one test; what is written there is found in the directory returned."""
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
    """Whatever is not a layer or a directory of ours cannot be written to; only in this process's view."""
    run("mount", "-o", "remount,bind,ro", "/")
    yield
    run("mount", "-o", "remount,bind,rw", "/")


@pytest.fixture
def node(imageos: Path, installed: Path, etc: Path, read_only_root: None, tmp_path: Path) -> Node:
    """A node with imageos freshly installed and small defaults."""
    shutil.rmtree("/etc/ganeti/instance-image", ignore_errors=True)
    shutil.copytree(installed / "etc", "/etc", symlinks=True, dirs_exist_ok=True)
    work = tmp_path / "node"
    work.mkdir()
    return Node(imageos, installed, work, layer=etc)


__all__ = ["Node", "Result"]
