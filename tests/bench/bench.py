"""Measure the time of imageos as a ratio to the same work by hand. `./build.py bench [NAME...]`; `peers` and
`scale` run only by their names.

Both sides run in turn on the same disk, a sparse file behind a loop device, and end when the data is on it. Only the
ratios count, as seconds depend on the machine. This asserts nothing; tests/disk/test_cost.py guards against growing
cost.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent / "build"), str(HERE.parent)]

import by_hand as hand  # noqa: E402
import scale  # noqa: E402
import support  # noqa: E402
from inputs import DISK, NAME, Inputs, inputs  # noqa: E402
from machine import GIB, Measured, by_hand, compare, disk, forget_cache, own_node, pipe, seconds, timed  # noqa: E402
from peers import PEERS  # noqa: E402
from support import SITE, Node, run  # noqa: E402
from test_startup import empty_zipapp, seconds_of  # noqa: E402

ROUNDS = 5
FLAVOURS = {  # operation -> suffix of the image, IMAGE_TYPE, by hand, goal
    "create tar.gz": (".tar.gz", "tarball", hand.TARBALL, 1.00),
    "create tar.zst": (".tar.zst", "tarball", hand.TARBALL, 0.85),
    "create dump": ("-root.dump", "dump", hand.DUMP, 1.05),
    "create qcow2 (zlib)": ("-zlib.qcow2", "qcow2", hand.QCOW2, 1.05),
    "create qcow2 (zstd)": ("-zstd.qcow2", "qcow2", hand.QCOW2, 1.05),
    "create raw.zst": (".raw.zst", "raw", hand.RAW, 1.05),
}


@dataclass(frozen=True)
class Row:
    operation: str
    against: str
    measured: Measured
    goal: float

    def __str__(self) -> str:
        measured = self.measured
        missed = "" if measured.ratio <= self.goal else "  missed"
        return (
            f"{self.operation:24} {self.against:24} {measured.other:8.2f} s {measured.ours:8.2f} s"
            f"   {measured.ratio:5.2f}   {self.goal:5.2f}   {measured.peak / (1 << 20):5.0f} MiB{missed}"
        )


@dataclass(frozen=True)
class Limit:
    """Seconds of a command whose cost does not depend on an image or a disk."""

    operation: str
    seconds: float  # median
    goal: float

    def __str__(self) -> str:
        missed = "" if self.seconds <= self.goal else "  missed"
        return f"{self.operation:24} {'(seconds)':24} {'':10} {self.seconds:8.2f} s   {'':5}   {self.goal:5.2f}{missed}"


HEAD = (
    f"{'operation':24} {'measured against':24} {'that':>10} {'imageos':>10}"
    f"   {'ratio':>5}   {'goal':>5}   {'memory':>9}"
)


class Bench:
    """The machine, the inputs, and a method for each group of rows."""

    def __init__(self, node: Node, images: Inputs, work: Path) -> None:
        self.node, self.images, self.work = node, images, work

    def create(self, size: int, kernel: str = "None", **settings: str) -> float:
        target = disk(self.work, size)
        environment = self.node.environment(target, **{f"OSP_{name}": value for name, value in settings.items()})
        return seconds(self.node.start("create", {**environment, "INSTANCE_HV_kernel_path": kernel}))

    def by_hand(self, script: str, size: int, **variables: object) -> float:
        return by_hand(self.work, hand.ATTACH + script, disk=disk(self.work, size), **variables)

    def settings(self, suffix: str, kind: str) -> dict[str, str]:
        """Return settings that select the image with this suffix, from a directory with only this file."""
        directory = self.work / "images" / suffix.strip("-.")
        if not directory.exists():
            directory.mkdir(parents=True)
            for path in self.images.directory.glob(f"{NAME}*"):
                if path.name.endswith((suffix, suffix.replace("-root", "-boot"))):
                    name = NAME + (suffix if kind != "qcow2" else ".qcow2")
                    (directory / (path.name if kind == "dump" else name)).symlink_to(path)
        self.node.defaults(f"IMAGE_DIR={directory}\nBOOT_SIZE=256")
        return {"IMAGE_NAME": "bench", "IMAGE_TYPE": kind}

    # --- the groups ---

    def images_deployed(self) -> Iterator[Row]:
        for operation, (suffix, kind, script, goal) in FLAVOURS.items():
            settings = self.settings(suffix, kind)
            image = self.images.path(suffix)
            measured = compare(
                lambda settings=settings: self.create(DISK, **settings),
                lambda script=script, image=image: self.by_hand(script, DISK, image=image),
                ROUNDS,
            )
            yield Row(operation, "the same by hand", measured, goal)

    def fixed_cost(self) -> Iterator[Row | Limit]:
        self.node.defaults(f"IMAGE_DIR={self.images.directory}")
        image = self.images.directory / "empty-x86_64.tar.zst"
        measured = compare(
            lambda: self.create(DISK, IMAGE_NAME="empty"),
            lambda: self.by_hand(hand.WHOLE, DISK, image=image),
            2 * ROUNDS,
        )
        yield Row("create, empty image", "the same by hand", measured, 1.25)
        yield Limit("create, empty image", measured.ours, 0.15)

        tree = self.work / "tree"
        (tree / "usr/bin").mkdir(parents=True)
        (tree / "etc/cloud").mkdir(parents=True)
        (tree / "usr/bin/cloud-init").write_text("#!/bin/sh\n")
        (tree / "usr/bin/cloud-init").chmod(0o755)
        run("tar", "--create", "--zstd", "--file", self.work / "hooked-x86_64.tar.zst", "-C", tree, ".")
        self.node.defaults(f"IMAGE_DIR={self.work}")

        def create(mode: int) -> float:
            """Without a kernel of its own, as the image has no boot loader."""
            for path in (SITE / "hooks").iterdir():
                path.chmod(mode)
            return self.create(DISK, kernel="/boot/vmlinuz", IMAGE_NAME="hooked")

        with_hooks = compare(lambda: create(0o755), lambda: create(0o644), 2 * ROUNDS)
        create(0o644)
        yield Limit("all bundled hooks", with_hooks.ours - with_hooks.other, 0.25)

    def start_up(self) -> Iterator[Row | Limit]:
        empty = empty_zipapp(self.work)
        measured = compare(lambda: seconds_of(self.node.imageos, "--version"), lambda: seconds_of(empty), 8 * ROUNDS)
        yield Row("--version", "an empty shiv zipapp", measured, 1.2)
        self.node.defaults(f"IMAGE_DIR={self.images.directory}\nIMAGE_NAME=empty\nIMAGE_TYPE=tarball")
        imageos, os_dir = self.node.os_dir / "imageos", self.node.os_dir
        for words in ([imageos, "--version"], [os_dir / "verify"], [imageos, "variants", "--os-dir", os_dir]):
            called = {"OS_VARIANT": "default", "OS_API_VERSION": "20", "OS_NAME": "image+default"}
            times = [timed(*words, **called) for _ in range(4 * ROUNDS)]
            yield Limit(Path(words[min(1, len(words) - 1)]).name, statistics.median(times), 0.06)

    def backups(self) -> Iterator[Row]:
        """A disk of 2 GiB, half of it random data; neither side finds it in the cache."""
        used = self.work / "used"
        with used.open("wb") as file:
            for _ in range(1024):
                file.write(os.urandom(1 << 20))
        source = self.work / "source"
        shutil.copyfile(used, source)
        os.truncate(source, 2 * GIB)
        stream = self.work / "stream"

        def export(sink: Path) -> float:
            forget_cache()
            environment = self.environment("export-disk0", EXPORT_DEVICE=source, DISK_0_PATH=source)
            return pipe([str(self.node.os_dir / "export")], environment, Path("/dev/null"), sink)

        def restore() -> float:
            target = disk(self.work, 2 * GIB)
            forget_cache()
            environment = self.environment("import-disk0", IMPORT_DEVICE=target, DISK_0_PATH=target, OSP_NOMOUNT="yes")
            return pipe([str(self.node.os_dir / "import")], environment, stream, Path("/dev/null"))

        def read() -> float:
            forget_cache()
            return by_hand(self.work, hand.READ, used=used)

        def write() -> float:
            target = disk(self.work, 2 * GIB)
            forget_cache()
            return by_hand(self.work, hand.ATTACH + hand.WRITE, disk=target, used=used)

        export(stream)
        yield Row(
            "export 1 GiB of 2 GiB",
            "dd of the used bytes",
            compare(lambda: export(Path("/dev/null")), read, ROUNDS),
            1.25,
        )
        yield Row("import 1 GiB of 2 GiB", "dd of the used bytes", compare(restore, write, ROUNDS), 1.25)
        for path in (used, source, stream):
            path.unlink()

    def ancestor(self) -> Iterator[Row]:
        """Compare with ganeti-instance-image; a ratio of 0.4 means 2.5 times as fast."""
        gzip, dump = self.images.path(".tar.gz"), self.images.path("-root.dump")
        for operation, suffix, kind, script, image in (
            ("create tar.gz", ".tar.gz", "tarball", hand.ANCESTOR_TARBALL, gzip),
            ("create tar.zst", ".tar.zst", "tarball", hand.ANCESTOR_TARBALL, gzip),
            ("create dump", "-root.dump", "dump", hand.ANCESTOR_DUMP, dump),
        ):
            settings = self.settings(suffix, kind)
            measured = compare(
                lambda settings=settings: self.create(DISK, **settings),
                lambda script=script, image=image: self.by_hand(hand.ANCESTOR + script, DISK, image=image),
                ROUNDS,
            )
            yield Row(operation, f"ancestor's way, {image.name.partition(NAME)[2]}", measured, 0.4)

    def disk_sizes(self) -> Iterator[Row | Limit]:
        """Deploy and export the same image on larger disks: the cost must depend on the used bytes only."""
        self.node.defaults(f"IMAGE_DIR={self.images.directory}\nPARTITION_TABLE=gpt\nIMAGE_NAME=empty")

        def export(size: int) -> float:
            path = self.work / f"made-{size}"
            if not path.exists():
                self.create(size, IMAGE_NAME="empty")
                (self.work / "disk").rename(path)
            environment = self.environment("export-disk0", EXPORT_DEVICE=path, DISK_0_PATH=path)
            return pipe([str(self.node.os_dir / "export")], environment, Path("/dev/null"), Path("/dev/null"))

        for what, step in (("create", lambda size: self.create(size, IMAGE_NAME="empty")), ("export", export)):
            for size in (100 * GIB, 2048 * GIB):
                measured = compare(lambda: step(size), lambda: step(3 * GIB), ROUNDS)  # noqa: B023
                yield Row(f"{what} on {size // GIB} GiB", "the same on 3 GiB", measured, 1.5)
                if (what, size) == ("export", 2048 * GIB):
                    yield Limit("export of empty 2 TiB", measured.ours, 0.4)
        for path in self.work.glob("made-*"):
            path.unlink()

    def several_at_once(self) -> Iterator[Row]:
        """Compare N creates at once with N in a row."""
        settings = self.settings(".tar.zst", "tarball")

        def many(count: int) -> float:
            targets = []
            for number in range(count):
                targets.append(disk(self.work, DISK).rename(self.work / f"disk-{number}"))
            calls = [
                self.node.start(
                    "create", self.node.environment(path, **{f"OSP_{name}": value for name, value in settings.items()})
                )
                for path in targets
            ]
            took = max(seconds(call) for call in calls)
            for path in targets:
                path.unlink()
            return took

        for count in (2, 4, 8):
            measured = compare(lambda: many(count), lambda: count * many(1), 2)  # noqa: B023
            yield Row(f"{count} creates at once", f"{count} in a row", measured, 1.0)

    def peers(self) -> Iterator[Row | str]:
        """Compare with what a user would pick instead, onto a disk that is larger than the image."""
        support.HANGS = 3600.0  # an emulated appliance takes its time
        for peer in PEERS:
            if why := peer.missing():
                yield f"{peer.name}: skipped, {why}"
                continue
            settings, image = self.settings(peer.suffix, peer.kind), self.images.path(peer.suffix)
            try:
                measured = compare(
                    lambda settings=settings: self.create(2 * DISK, **settings),
                    lambda peer=peer, image=image: self.by_hand(peer.script, 2 * DISK, image=image),
                    1,
                )
            except AssertionError as error:
                yield f"{peer.name}: not measured, {str(error).splitlines()[0]}"
            else:
                yield Row(f"create {peer.suffix.lstrip('-.')}", peer.name, measured, 1.0)

    def scale(self) -> Iterator[scale.Scaled]:
        image = self.images.path(".tar.zst")
        yield from scale.variants_and_files(self.node, self.work, image)
        yield from scale.exports_at_once(self.node, self.work)
        yield from scale.creates_at_once(self.node, self.work, image)

    def environment(self, name: str, **values: object) -> dict[str, str]:
        environment = self.node.environment(Path(str(values["DISK_0_PATH"])), env=name, **values)
        return {key: value for key, value in environment.items() if key != "EXP_SIZE_FD"}


GROUPS = {
    "images": Bench.images_deployed,
    "empty": Bench.fixed_cost,
    "start": Bench.start_up,
    "backups": Bench.backups,
    "ancestor": Bench.ancestor,
    "sizes": Bench.disk_sizes,
    "parallel": Bench.several_at_once,
    "peers": Bench.peers,
    "scale": Bench.scale,
}
BY_NAME_ONLY = ("peers", "scale")  # they take long


def main(names: Sequence[str]) -> None:
    unknown = set(names) - set(GROUPS)
    if unknown:
        sys.exit(f"bench: unknown group {sorted(unknown)}; there are {', '.join(GROUPS)}")
    with tempfile.TemporaryDirectory(prefix="imageos-bench.", dir="/var/cache") as directory:
        work = Path(directory)
        shutil.copy2(HERE.parent.parent / "dist/imageos", work / "imageos")
        with own_node(work / "imageos", work) as node:
            bench = Bench(node, inputs(node), work)
            print(
                f"\nThe tree has {bench.images.tree_size >> 20} MiB; medians of {ROUNDS} rounds, interleaved.\n\n{HEAD}"
            )
            for name in names or [name for name in GROUPS if name not in BY_NAME_ONLY]:
                for row in GROUPS[name](bench):
                    print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
