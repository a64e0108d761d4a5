#!/usr/bin/env python3
"""usage: machines.py [NAME...]

Run the commands of README.rst as a newcomer does, on new bare machines (tests/build/bare.py), which see none of this
machine's packages, Python or settings. Print a line for each at the end. Without a NAME, use all in the table MACHINES.

The bare systems and the images of the tests stay in /var/cache/imageos-machines for the next run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests/build"))
from bare import INSIDE, command_inside, environment_inside, unpack_bare  # noqa: E402

CACHE = Path("/var/cache/imageos-machines")
# A chroot as administrators make it by hand: the root directory is not a mount point.
PLAIN_CHROOT = """
root=$1; shift
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
exec chroot "$root" "$@"
"""
# These run every program of a node at least once, for nodes with other versions of the programs.
PROGRAMS = (
    "tests/disk/test_chroot.py",
    "tests/disk/test_create_layouts.py::test_layout",
    "tests/disk/test_create_layouts.py::test_filesystem",
    "tests/disk/test_create_layouts.py::test_mkfs_writes_nothing_that_old_guests_cannot_read",
    "tests/disk/test_create_tarball.py::test_tree_is_kept_with_every_compression",
    "tests/disk/test_create_guest.py::test_host_keys_are_new",
    "tests/disk/test_sandbox.py",
    "tests/disk/test_mounted.py",
    "tests/disk/test_doctor_node.py::test_healthy_node",
    "tests/disk/test_images_written.py::test_file_disk",
    "tests/disk/test_images_deployed.py::test_deployed_and_grown",
    "tests/disk/test_images_captured.py::test_a_captured_system_is_deployed",
    "tests/disk/test_images_captured.py::test_a_disk_image_is_the_same_disk",
    "tests/disk/test_images_dump.py::test_root_and_boot",
    "tests/disk/test_images_dump.py::test_compressed",
    "tests/disk/test_images_dump.py::test_full_of_zeroes",
    "tests/disk/test_image_url_verified.py::test_signed",
    "tests/disk/test_export_import.py::test_ext",
    "tests/disk/test_export_import.py::test_guests",
    "tests/disk/test_import_foreign.py::test_dumps",
    "tests/disk/test_import_foreign.py::test_disk_img",
    "tests/disk/test_rename.py::test_every_place",
)
# Tests for a cluster of Ganeti 3.1; all of tests/ganeti run with the 3.0 of Debian 12.
GANETI = (
    *("tests/ganeti/test_environments.py", "tests/ganeti/test_cluster.py", "tests/ganeti/test_backup.py"),
    *("-k", "not kvm and not killed"),
)
WORKERS = ("--numprocesses=2", "--dist=loadgroup")


class Refused(Exception):
    """A machine did not behave as README says."""


@dataclass
class Machine:
    """A bare Debian of one suite, and the results of the commands that ran there."""

    suite: str
    root: Path
    checkout: str = "/root/imageos"  # path inside
    results: list[str] = field(default_factory=list)

    def clone(self) -> Path:
        path = self.root / self.checkout.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        run("git", "clone", "--quiet", "--no-hardlinks", str(CHECKOUT), str(path))
        return path

    def run(self, *command: str, enter: str = INSIDE, user: str = "root", **environment: str) -> tuple[int, str]:
        """Run a command in the checkout and show its output as it comes; return its status and output."""
        line = f"cd {shlex.quote(self.checkout)} && {shlex.join(command)}"
        shell = ["sh", "-c", line] if user == "root" else ["su", "--shell=/bin/sh", user, "--command", line]
        print(f"--- {self.suite}: {line}", flush=True)
        printed = b""
        with subprocess.Popen(
            command_inside(self.root, *shell, enter=enter),
            env={**environment_inside(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout
            while data := os.read(process.stdout.fileno(), 1 << 16):
                printed += data
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        return process.returncode, printed.decode(errors="replace")

    def works(self, *command: str, user: str = "root", **environment: str) -> str:
        began = time.monotonic()
        status, text = self.run(*command, user=user, **environment)
        if status != 0:
            raise Refused(f"status {status} of {shlex.join(command)}")
        self.results.append(f"{outcome(command, text)} in {time.monotonic() - began:.0f} s")
        return text

    def demo(self, user: str = "root", **environment: str) -> None:
        text = self.works(*as_root(user), "./build.py", "demo", user=user, **environment)
        if "inst1.example.org was made from busybox" not in text:
            raise Refused("the demo shows no instance")

    def test(self, *arguments: str, user: str = "root", **environment: str) -> None:
        self.works(*as_root(user), "./build.py", "test", *arguments, user=user, **environment)

    def digest(self) -> str:
        """Return the sha256 of the file that was built there."""
        return hashlib.sha256((self.root / self.checkout.lstrip("/") / "dist/imageos").read_bytes()).hexdigest()

    def leaves_only_its_own(self) -> None:
        """Fail if the commands left files in the checkout outside .cache, .venv and dist, or in /var/cache."""
        path = str(self.root / self.checkout.lstrip("/"))
        status = run("git", "-c", "safe.directory=*", "-C", path, "status", "--porcelain", "--ignored")
        left = set(status.splitlines()) - {"!! .cache/", "!! .venv/", "!! dist/"}
        left |= {str(path) for path in (self.root / "var/cache").glob("imageos*")}  # even after a killed run
        if left:
            raise Refused(f"left in the checkout: {', '.join(sorted(left))}")


def as_root(user: str) -> Sequence[str]:
    return () if user == "root" else ("sudo",)


def outcome(command: Sequence[str], text: str) -> str:
    """Return the command and pytest's counts, such as `test tests/unit: 1872 passed`."""
    words = [word for word in command if word not in ("sudo", "./build.py") and not word.startswith("-")]
    name = shlex.join([*words[:2], *("..." for _ in words[2:3])]) or "build"
    counts = re.findall(r"^=* ?(\d+ [^=\n]*?) in [\d.]+s", text, re.MULTILINE)
    return f"{name}: {' and '.join(counts)}" if counts else name


# --- The steps on each machine --------------------------------------------------------------------


def all_tests(machine: Machine) -> None:
    """Run all in root's home, which no other user may enter; then test again in the used checkout."""
    checkout = machine.clone()
    (machine.root / "root").chmod(0o700)
    kept = CACHE / "guests"
    if kept.exists():
        kept.rename(checkout / ".cache")
    try:
        machine.demo()
        machine.test()
        machine.test("tests/unit")
        machine.leaves_only_its_own()
    finally:
        if (checkout / ".cache").exists():
            (checkout / ".cache").rename(kept)


def with_sudo(machine: Machine) -> None:
    """Use an ordinary user's checkout, with a space in its path, in a home that no other user may enter."""
    machine.checkout = "/home/builder/my checkouts/imageos"
    machine.clone()
    enter(machine, "useradd", "builder")
    enter(machine, "chown", "-R", "builder:", "/home/builder")
    enter(machine, "chmod", "0700", "/home/builder")
    (machine.root / "etc/sudoers.d/builder").write_text("builder ALL=(ALL) NOPASSWD: ALL\n")
    status, text = machine.run("./build.py", user="builder")
    if status != 1 or ": sudo apt-get update && sudo apt-get install --yes" not in text.splitlines()[-1]:
        raise Refused("an ordinary user is not told what to install")
    machine.demo(user="builder")
    machine.works("./build.py", user="builder")
    machine.test("tests/unit", *PROGRAMS, *WORKERS, user="builder")
    machine.leaves_only_its_own()


def killed_and_doubled(machine: Machine) -> None:
    """Run two at once, after a killed run; Python writes no bytecode."""
    machine.clone()
    machine.demo(PYTHONDONTWRITEBYTECODE="1")
    machine.test("tests/unit", *PROGRAMS, *WORKERS, PYTHONDONTWRITEBYTECODE="1")
    killed = "timeout --signal=KILL 6 ./build.py test tests/lint tests/unit; test $? = 137"
    machine.works("sh", "-c", killed)
    unit = "./build.py test tests/unit"
    machine.works("sh", "-c", f"{unit} & {unit} && wait $!")
    machine.leaves_only_its_own()


def plain_chroot(machine: Machine) -> None:
    """In a chroot whose root is no mount point, expect a refusal before any installation. Also test Ganeti 3.1."""
    machine.clone()
    status, text = machine.run("./build.py", "demo", enter=PLAIN_CHROOT)
    if status != 1 or "mount --bind DIRECTORY DIRECTORY" not in text or "apt-get" in text:
        raise Refused("a plain chroot is not told what it lacks")
    machine.demo()
    machine.test("tests/unit", *PROGRAMS, *WORKERS)
    machine.test(*GANETI)
    machine.leaves_only_its_own()


MACHINES: dict[str, Callable[[Machine], None]] = {
    "bullseye": killed_and_doubled,
    "trixie": plain_chroot,
    "sid": with_sudo,
    "bookworm": all_tests,
}


# --- Running them ---------------------------------------------------------------------------------


def main(names: Sequence[str]) -> int:
    lines = []
    digests = set()
    failed = 0
    for name in names or MACHINES:
        began = time.monotonic()
        machine = None
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=CACHE) as top:
                (Path(top) / "root").mkdir()
                machine = Machine(name, unpack_bare(Path(top) / "root", Path(top), name, CACHE))
                MACHINES[name](machine)
                digests.add(machine.digest())
            if len(digests) != 1:
                raise Refused("built another file than the machines before")
            ended = "ok"
        except (Refused, subprocess.CalledProcessError) as error:
            failed += 1
            ended = f"FAILED: {error}"
        results = machine.results if machine else ["cannot be made: does the mirror answer?"]
        lines.append(f"{name}: {'; '.join([*results, ended])}, {time.monotonic() - began:.0f} s in all")
    print("", *lines, f"machines: {len(lines) - failed} passed, {failed} failed", sep="\n", flush=True)
    return 1 if failed else 0


def enter(machine: Machine, *command: str) -> None:
    run(*command_inside(machine.root, *command))


def run(*command: str) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
