"""Images from a URL: a cache that is full, shared by many processes, or not ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from downloads import CONTENT, SHA256, cached, get
from downloads import settings as settings
from http_server import Server
from support import HANGS, run, wait_until

from imageos.errors import Failure
from imageos.images import curl, fetch
from imageos.settings import Settings

CHECKOUT = Path(__file__).resolve().parents[2]


# --- the disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(settings: Settings) -> Iterator[Settings]:
    """CACHE_DIR has 512 KiB."""
    os.mkdir(settings.cache_dir)
    run("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", settings.cache_dir)
    yield settings
    run("umount", settings.cache_dir)


@pytest.mark.parametrize("how", [{}, {"announced": -1}], ids=["announced", "not announced"])
def test_disk_full(how: dict[str, object], server: Server, small: Settings) -> None:
    server.put("/a.tar", CONTENT, **how)
    with pytest.raises(Failure, match=f"CACHE_DIR {small.cache_dir} has no space left for image {server.url}/a.tar"):
        get(small)
    assert cached(small) == []


def test_disk_full_while_resuming(server: Server, small: Settings) -> None:
    server.put("/a.tar", CONTENT[: 400 << 10], cuts=[300 << 10] * 4)
    server.files["/a.tar"].cuts[1:] = [0, 0, 0]
    with pytest.raises(curl.Unreachable):
        get(small)
    (Path(small.cache_dir) / "other-x").write_bytes(bytes(150 << 10))
    with pytest.raises(Failure, match="no space left"):
        get(small)
    assert cached(small) == ["x"]


def test_cache_that_is_none(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Failure, match=f"CACHE_DIR {tmp_path}/file: "):
        get(settings, cache_dir=str(tmp_path / "file"))


def test_links_in_the_cache(server: Server, settings: Settings, tmp_path: Path) -> None:
    """Of a directory where others may write: nothing is followed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    get(settings)
    path = next(Path(settings.cache_dir).glob("*.tar"))
    for suffix in (".lock", ".part", ".part.json"):
        path.unlink(missing_ok=True)
        Path(f"{path}{suffix}").symlink_to(victim)
        try:
            get(settings)
        except Failure as failure:
            assert "CACHE_DIR" in str(failure)
        Path(f"{path}{suffix}").unlink(missing_ok=True)
        assert victim.read_bytes() == b"precious"


# --- several processes ------------------------------------------------------------------------------------

CLIENT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from imageos.images import fetch
from imageos.settings import Settings
cleanup = sys.argv[3] == "yes"
settings = Settings(image_url=sys.argv[1], cache_dir=sys.argv[2], image_type="tarball", image_cleanup=cleanup)
path, descriptor = fetch.fetched(settings, [settings.image_url])
import hashlib
print(hashlib.sha256(open(descriptor, "rb").read()).hexdigest())
"""


def client(settings: Settings, cleanup: str = "no") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, settings.image_url, settings.cache_dir, cleanup],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def waiting_for_locks(processes: Sequence[subprocess.Popen[str]]) -> int:
    """How many of them wait for a lock that somebody has (proc_locks(5))."""
    waiting = re.findall(r"-> FLOCK\s+\S+\s+\S+\s+(\d+)", Path("/proc/locks").read_text())
    return len({str(process.pid) for process in processes} & set(waiting))


@pytest.mark.parametrize("how", [{}, {"knows_head": False, "etag": None}], ids=["good server", "bad server"])
def test_twenty_at_once(how: dict[str, object], server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, rate=10_000, **how)
    clients = [client(settings) for _ in range(20)]
    wait_until(lambda: waiting_for_locks(clients) == 19, "one loads it, the others wait")
    server.files["/a.tar"].rate = 0
    said = [one.communicate(timeout=HANGS) for one in clients]
    assert [(one.returncode, out.strip()) for one, (out, _) in zip(clients, said)] == [(0, SHA256)] * 20
    assert sum("waiting for another process" in err for _, err in said) == 19
    opened = server.count("/a.tar") - (0 if how == {} else 1)  # one look instead of HEAD
    assert opened == 1
    assert cached(settings) == ["a.tar", "a.tar.json"]


def test_some_at_once_with_cleanup(server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, rate=2_000_000)
    clients = [client(settings, "yes") for _ in range(4)]
    assert [one.communicate(timeout=HANGS)[0].strip() for one in clients] == [SHA256] * 4
    assert cached(settings) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_killed(number: signal.Signals, server: Server, settings: Settings) -> None:
    server.put("/a.tar", CONTENT, rate=10_000)
    first = client(settings)
    part = Path(settings.cache_dir) / (fetch.cache_name(settings.image_url) + ".part")
    wait_until(lambda: part.exists() and part.stat().st_size > 0, "a part is there")
    waiting = client(settings)
    wait_until(lambda: waiting_for_locks([waiting]) == 1, "another one waits for it")
    first.send_signal(number)
    first.communicate(timeout=HANGS)
    server.files["/a.tar"].rate = 0
    out, err = waiting.communicate(timeout=HANGS)
    assert out.strip() == SHA256, err
    assert "going on with a download of" in err
    assert server.requests[-1].status == 206
    assert cached(settings) == ["a.tar", "a.tar.json"]


def test_progress(
    server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imageos.log.Progress.INTERVAL", 0.2)
    server.put("/a.tar", CONTENT, rate=1_000_000)
    get(settings)
    lines = [line for line in capfd.readouterr().err.splitlines() if "% of 1 MiB" in line]
    assert len(lines) >= 2
    assert lines[0].startswith("imageos: downloading a.tar: ")
