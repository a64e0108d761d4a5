"""imageos at the size of a site: what must not grow faster than its input."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from http_server import serving
from machine import GIB, disk, peak_memory, seconds, timed
from support import MIB, SITE, Node, run


@dataclass(frozen=True)
class Scaled:
    """The same for a few and for many: seconds of both, and the largest process of ours."""

    what: str
    few: tuple[int, float]
    many: tuple[int, float]
    peak: int
    also: str = ""

    def __str__(self) -> str:
        (fewer, short), (more, long) = self.few, self.many
        each = (long - short) / (more - fewer) * 1000
        text = f"{self.what:32} {fewer:5} {short:7.2f} s {more:6} {long:7.2f} s {each:8.1f} ms each more"
        return f"{text} {self.peak / MIB:5.0f} MiB  {self.also}"


def scaled(what: str, counts: tuple[int, int], step: Callable[[int], float], also: Callable[[], str] = str) -> Scaled:
    few = step(counts[0])
    with peak_memory() as peak:
        many = step(counts[1])
    return Scaled(what, (counts[0], few), (counts[1], many), peak[0], also())


def creates_at_once(node: Node, work: Path, image: Path) -> Iterator[Scaled]:
    """N creates from one URL, of an image that nobody has downloaded: one download, and no loop device left."""
    with serving() as server:
        url = server.put("/image.tar.zst", image.read_bytes())

        def creates(count: int) -> float:
            server.requests.clear()
            node.defaults(f"CACHE_DIR={work}/cache-{count}\nIMAGE_URL={url}\nBOOT_SIZE=256")
            targets = [disk(work, 3 * GIB).rename(work / f"disk-{number}") for number in range(count)]
            calls = [node.start("create", node.environment(path, OSP_IMAGE_NAME=None)) for path in targets]
            took = max(seconds(call) for call in calls)
            for path in targets:
                path.unlink()
            return took

        def also() -> str:
            left = run("losetup", "--list", "--noheadings", "--output=BACK-FILE").count(f"{work}/disk-")
            return f"{server.count('/image.tar.zst')} download(s), {left} loop devices left"

        yield scaled("creates at once from one URL", (1, 32), creates, also)


def variants_and_files(node: Node, work: Path, image: Path) -> Iterator[Scaled]:
    images = work / "many"
    images.mkdir()
    (images / "one-x86_64.tar.zst").symlink_to(image)
    node.defaults(f"IMAGE_DIR={images}\nIMAGE_NAME=one")

    def with_variants(count: int, *argv: object) -> float:
        names = [f"v{number}" for number in range(count)]
        for number, name in enumerate(names):
            (SITE / "variants" / f"{name}.conf").write_text(f"SWAP_SIZE={number + 1}\n")
        (SITE / "variants.list").write_text("".join(f"{name}\n" for name in names))
        return timed(*argv, OS_VARIANT="v0", OS_API_VERSION="20", OS_NAME="image+v0")

    def with_files(count: int) -> float:
        for number in range(count):
            (images / f"other-{number}-x86_64.tar.zst").touch()
        return timed(node.imageos, "variants", "--os-dir", node.os_dir)

    for command in ("variants", "doctor"):
        argv = (node.imageos, command, "--os-dir", node.os_dir)
        yield scaled(f"{command}, N variants", (10, 1000), lambda count: with_variants(count, *argv))  # noqa: B023
    yield scaled("verify, N variants", (10, 1000), lambda count: with_variants(count, node.os_dir / "verify"))
    with_variants(1, "true")
    yield scaled("variants, N files in IMAGE_DIR", (1, 2000), with_files)


def exports_at_once(node: Node, work: Path) -> Iterator[Scaled]:
    """An export of each of N disks, 64 MiB used, all at once, as Ganeti calls it."""
    first = work / "exported-0"
    run("dd", "if=/dev/urandom", f"of={first}", "bs=1M", "count=64", "status=none")

    def exports(count: int) -> float:
        disks = [work / f"exported-{number}" for number in range(count)]
        for path in disks[1:]:
            run("cp", first, path)
        start = time.monotonic()
        calls: Sequence[subprocess.Popen[bytes]] = [
            subprocess.Popen(
                [str(node.os_dir / "export")],
                env={
                    **node.environment(*disks, env="export-disk0", EXPORT_DEVICE=path, EXP_SIZE_FD=None),
                    "EXPORT_INDEX": str(number),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for number, path in enumerate(disks)
        ]
        for call in calls:
            assert call.wait() == 0, call.communicate()[1].decode()
        return time.monotonic() - start

    yield scaled("disks exported at once", (1, 16), exports)
    for path in work.glob("exported-*"):
        path.unlink()
