"""doctor on a node: every check fails once for a real reason."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import PATH, SITE, Node, attached, listing, mounted, run

from imageos.checks import variants
from imageos.settings import Settings


class Doctor:
    def __init__(self, node: Node) -> None:
        self.node, self.imageos = node, node.imageos

    def __call__(self, *arguments: str, silent: bool = True, **environment: str) -> tuple[int, str]:
        """Return its status and report. It must not write to the node's /etc; all else is read-only for it."""
        before = listing(self.node.layer)
        argv = [str(self.imageos), "doctor", "--os-dir", str(self.node.os_dir), *arguments]
        done = subprocess.run(
            argv, env={"PATH": PATH, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert not silent or done.stderr == ""
        assert done.stdout.isascii()
        assert listing(self.node.layer) == before
        return done.returncode, done.stdout

    def well(self, **environment: str) -> str:
        status, text = self(**environment)
        assert status == 0, text
        assert text.endswith("\nthis node can deploy its variants\n")
        return text

    def ill(self, *causes: str, **environment: str) -> str:
        status, text = self(**environment)
        assert status == 1, text
        (line,) = (line for line in unwrapped(text).splitlines() if line.startswith("  ERROR"))
        for cause in causes:
            assert cause in line, text
        return text


def unwrapped(text: str) -> str:
    return text.replace("\n         ", " ").replace(" -> ", "\n -> ")


@pytest.fixture
def doctor(node: Node, etc: Path) -> Doctor:
    # files of this machine's ganeti, if it has one
    shutil.rmtree(SITE / "hooks", ignore_errors=True)
    (SITE / "hooks").mkdir()
    return Doctor(node)


@pytest.fixture
def image(node: Node, tmp_path: Path) -> Path:
    """Make an image, and the variant `mine` that deploys it."""
    tree = tmp_path / "tree/etc"
    tree.mkdir(parents=True)
    (tree / "noise").write_bytes(os.urandom(1 << 20))
    node.variant("mine", "IMAGE_NAME=mine\n")
    path = node.images / "mine-x86_64.tar.zst"
    run("tar", "--create", "--zstd", "--directory", tree.parent, "--file", path, ".")
    return path


@contextmanager
def hidden(program: str, tmp_path: Path) -> Iterator[None]:
    """Hide `program` from our view of the machine."""
    executable = shutil.which(program, path=PATH)
    nothing = tmp_path / "nothing"
    nothing.touch(0o644)
    run("mount", "--bind", nothing, executable)
    try:
        yield
    finally:
        run("umount", executable)


def test_healthy_node(doctor: Doctor, image: Path) -> None:
    text = unwrapped(doctor.well())
    assert f"variant mine: {image}, " in text, text
    assert "variant default has no image of its own" in text
    assert "namespaces: mount, pid, net, ipc, uts" in text
    assert "filters of system calls" in text


def test_settings_that_are_no_shell(doctor: Doctor, node: Node) -> None:
    node.variant("broken", "IMAGE_NAME=(\n")
    doctor.ill("variant broken", str(SITE / "variants/broken.conf"))


def test_wrong_value(doctor: Doctor, node: Node) -> None:
    node.variant("broken", "FILESYSTEM=ext5\n")
    doctor.ill("variant broken", "FILESYSTEM='ext5'", "ext2, ext3")


def test_variant_without_file(doctor: Doctor) -> None:
    with open(SITE / "variants.list", "a") as known:
        known.write("absent\n")
    doctor.ill("variant absent", "absent.conf")


def test_missing_overlay(doctor: Doctor, node: Node) -> None:
    node.hook("overlays", "#!/bin/sh\n")
    node.variant("dressed", "OVERLAY=absent\n")
    doctor.ill("variant dressed", "overlays/absent")


def test_settings_may_compute_with_the_instance(doctor: Doctor, node: Node) -> None:
    node.variant("computed", "SWAP_SIZE=$((INSTANCE_BE_maxmem / 2))\n")
    doctor.well()


def test_what_is_odd_is_said_once(doctor: Doctor, node: Node) -> None:
    node.defaults("FILESYTEM=xfs\n")
    node.variant("second", "")
    Node.write(SITE / "variants/unlisted.conf", "")
    node.hook("name.with.dots", "#!/bin/sh\n")
    node.hook("mine", "#!/bin/sh\n")
    text = unwrapped(doctor.well())
    assert text.count("unknown setting FILESYTEM") == 1
    assert "unlisted.conf is not in" in text
    assert "name.with.dots does not run" in text
    assert "hooks: mine" in text


def test_missing_image(doctor: Doctor, image: Path) -> None:
    image.unlink()
    text = doctor.ill("variant mine", "cannot find image")
    assert "-> copy it there, or set IMAGE_NAME" in text


@pytest.mark.parametrize("compression", ["zstd", "gzip", "xz", "bzip2", "lz4"])
def test_truncated_image(compression: str, doctor: Doctor, image: Path, tmp_path: Path) -> None:
    run("tar", "--create", "--use-compress-program", compression, "-C", tmp_path / "tree", "--file", image, ".")
    doctor.well()
    content = image.read_bytes()
    size = len(content) * 2 // 3
    while int.from_bytes(content[size - 4 : size], "little") % 512 == 0:  # it must not look whole (gzip)
        size -= 1
    os.truncate(image, size)
    doctor.ill(str(image), "truncated")


def test_truncated_disk_images(doctor: Doctor, node: Node) -> None:
    node.variant("disk", "IMAGE_NAME=disk\nIMAGE_TYPE=qemu\nNOMOUNT=yes\n")
    raw, qcow2 = node.images / "disk-x86_64.raw", node.images / "disk-x86_64.qcow2"
    raw.write_bytes(os.urandom(8 << 20))
    run("sfdisk", "--quiet", "--wipe", "always", raw, text="start=2048\n")
    run("qemu-img", "convert", "-O", "qcow2", raw, qcow2)
    for path in (qcow2, raw):
        doctor.well()
        os.truncate(path, 4 << 20)
        doctor.ill(str(path), "truncated")
        path.unlink()


def test_missing_program(doctor: Doctor, image: Path, tmp_path: Path) -> None:
    """An error if a variant needs it, otherwise a note."""
    with hidden("zstd", tmp_path):
        text = doctor.ill("zstd is missing: needed by variant mine")
        assert f"note   variant mine: {image} cannot be looked at without zstd" in unwrapped(text)
    with hidden("mkfs.ext4", tmp_path):
        assert "-> install e2fsprogs" in doctor.ill("mkfs.ext4 is missing: needed by variant mine")
    with hidden("restore", tmp_path):
        assert "restore missing: no variant needs it" in doctor.well()


def test_program_where_ganeti_does_not_look(doctor: Doctor, image: Path, tmp_path: Path) -> None:
    directory = tmp_path / "local"
    directory.mkdir()
    shutil.copy2(str(shutil.which("mkswap", path=PATH)), directory / "mkswap")
    with hidden("mkswap", tmp_path):
        status, text = doctor(PATH=f"{directory}:{PATH}")
    assert status == 1
    assert f"mkswap is in {directory}, where Ganeti does not look" in unwrapped(text)


def test_no_os_definition(doctor: Doctor, node: Node) -> None:
    done = subprocess.run([node.imageos, "doctor", "--os-dir", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no OS definition in /nowhere" in done.stdout
    assert "-> imageos install" in done.stdout


def test_no_loop_devices(doctor: Doctor, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.touch()
    run("mount", "--bind", "-o", "nodev", nowhere, "/dev/loop-control")
    run("mount", "-o", "remount,bind,ro,nodev", "/dev/loop-control")
    try:
        doctor.ill("/dev/loop-control")
    finally:
        run("umount", "/dev/loop-control")


def test_no_space_for_a_download(doctor: Doctor, node: Node, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", full)
    try:
        node.defaults(f"CACHE_DIR={full}\n")
        assert f"{full} (images): 1 MiB free" in unwrapped(doctor.well())
        node.variant("remote", "IMAGE_NAME=x\nIMAGE_URL=http://127.0.0.1:9/\n")
        status, text = doctor(silent=False)  # a download is tried again and again
        assert status == 1
        assert f"ERROR  {full} (images): 1 MiB free -> make room" in text.replace("\n         ", " ")
        assert "variant remote: " in text, "nobody answers there, either"
    finally:
        run("umount", full)


def test_raw_image_where_files_are_not_endless(doctor: Doctor, node: Node, tmp_path: Path) -> None:
    """ext3 with blocks of 4 KiB limits files to 2 TiB."""
    node.variant("raw", "IMAGE_NAME=raw\nIMAGE_TYPE=raw\nNOMOUNT=yes\n")
    with (node.images / "raw-x86_64.raw").open("wb") as image:
        image.truncate(8 << 20)
    run("sfdisk", "--quiet", image.name, text="label: gpt\n1 : start=1M, size=4M\n")
    small = tmp_path / "small"
    with small.open("wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext3", "-q", "-b", "4096", small)
    with mounted(small, tmp_path / "tmp", options="rw") as directory:
        assert "variant raw" in doctor.well(TMPDIR=str(directory))
        os.truncate(image.name, 3 << 20)
        doctor.ill("raw-x86_64.raw", TMPDIR=str(directory))


def test_leftover_loop_and_mount(doctor: Doctor, tmp_path: Path) -> None:
    disk = tmp_path / "disk0"
    disk.write_bytes(bytes(8 << 20))
    with attached(disk) as loop:
        text = unwrapped(doctor.well())
        assert f"{loop} is attached to {disk}, and not used" in text
        assert f"-> losetup -d {loop}" in text
        run("mkfs.ext2", "-q", loop)
        mount_point = Path("/tmp/tmp.AbCdEf1234")
        mount_point.mkdir()
        run("mount", loop, mount_point)
        try:
            text = unwrapped(doctor.well())
            assert f"{loop} is mounted at {mount_point}\n -> umount -R {mount_point} && rmdir {mount_point}" in text
            assert f"losetup -d {loop} " not in text, "in use"
        finally:
            run("umount", mount_point)
            mount_point.rmdir()


def test_json(doctor: Doctor, image: Path) -> None:
    status, text = doctor("--json")
    assert (status, json.loads(text)["can_deploy"]) == (0, True)
    image.unlink()
    status, text = doctor("--json")
    assert status == 1
    report = json.loads(text)
    assert not report["can_deploy"]
    assert [one["area"] for one in report["findings"] if one["level"] == "error"] == ["images"]


def test_colour_on_a_terminal_only(doctor: Doctor, node: Node) -> None:
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", 0) as output, os.fdopen(slave, "wb", 0) as terminal:
        argv = [str(node.imageos), "doctor", "--os-dir", str(node.os_dir)]
        subprocess.run(argv, env={"PATH": PATH}, stdout=terminal, stdin=subprocess.DEVNULL, check=True)
        assert b"\x1b[32mok   \x1b[0m" in output.read(1 << 16)
    assert "\x1b" not in doctor.well()


def test_without_root(doctor: Doctor, node: Node) -> None:
    """It names the checks that it could not make, and reports no error otherwise."""
    root = Path("/var/tmp/doctor")
    try:
        run(node.imageos, "install", "--root", root)
        run("chmod", "-R", "go+rX", root, "/etc/ganeti/instance-image")
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
        os_dir = root / "usr/share/ganeti/os/image"
        done = subprocess.run(
            [*argv, os_dir / "imageos", "doctor", "--os-dir", os_dir],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "?      namespaces and loop devices were not tried" in done.stdout
        assert "mkfs.ext4" in done.stdout
        assert done.stdout.endswith("as far as could be seen\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_without_sys(doctor: Doctor, tmp_path: Path) -> None:
    """As in some chroots: a finding, and all the others."""
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    run("mount", "--bind", nothing, "/sys")
    try:
        status, text = doctor()
    finally:
        run("umount", "/sys")
    assert status == 1
    assert "there is no /sys/block: /sys is not mounted -> mount -t sysfs sysfs /sys" in text.replace(
        "\n         ", " "
    )
    assert "leftovers\n  ?      /sys/block: No such file or directory" in text
    assert "mkfs.ext4" in text


def test_path_of_cron(doctor: Doctor, image: Path) -> None:
    """Ganeti's counts: without sbin nothing is missing that create would find."""
    assert "mkfs.ext4" in doctor.well(PATH="/usr/bin:/bin")


def test_more_images_than_a_process_may_open(doctor: Doctor, node: Node, image: Path, tmp_path: Path) -> None:
    names = [f"many{number}" for number in range(30)]
    for name in names:
        (node.images / f"{name}-x86_64.tar.zst").hardlink_to(image)
        node.variant(name, f"IMAGE_NAME={name}\n")
    doctor.imageos = tmp_path / "tight"
    doctor.imageos.write_text(f'#!/bin/sh\nulimit -n 24\nexec {node.imageos} "$@"\n')
    doctor.imageos.chmod(0o755)
    text = unwrapped(doctor.well())
    assert all(f"variant {name}: {node.images}/{name}-" in text for name in names)


def test_an_image_is_looked_at_once_for_all_variants(
    node: Node, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, check = [], variants.check_image
    monkeypatch.setattr(variants, "check_image", lambda *call: [looked.append(call), *check(*call)][1:])
    mine = Settings(image_dir=str(node.images), image_name="mine", image_type="tarball", arch="x86_64")
    sharing = [variants.Variant(f"v{size}", mine._replace(swap_size=size)) for size in range(1, 4)]
    found = variants.check_images([*sharing, variants.Variant("own", mine._replace(image_verify=False))])
    assert [one.what.split(":")[0] for one in found] == ["variant v1", "variant v2", "variant v3", "variant own"]
    assert len(looked) == 2
