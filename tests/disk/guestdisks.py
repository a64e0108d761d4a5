"""Make disk images of small guests, in common layouts, with sfdisk and mkfs."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lvmdisks
from support import MIB, Partition, attached, mounted, partitions, run

BIOS = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
DATA = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
# For the filesystem on a partition, by its number. Random, because the kernel identifies a btrfs by its UUID alone,
# and runs in two containers may have the same PIDs.
UUID = f"{secrets.token_hex(4)}-9e1b-4c5c-{secrets.token_hex(2)}-{{:012}}"
MAKE = {
    "ext2": ["mkfs.ext2", "-q", "-F", "-U", "{uuid}", "-L", "{label}"],
    "ext3": ["mkfs.ext3", "-q", "-F", "-U", "{uuid}", "-L", "{label}"],
    "ext4": ["mkfs.ext4", "-q", "-F", "-U", "{uuid}", "-L", "{label}"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "uuid={uuid}", "-L", "{label}"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-U", "{uuid}", "-L", "{label}"],
    "swap": ["mkswap", "-U", "{uuid}", "-L", "{label}"],
    "vfat": ["mkfs.vfat", "-i", "c0ffee15", "-n", "{label}"],
    "lvm": ["pvcreate", "-q"],
}
CLOUD = f"""label: gpt
label-id: 11111111-2222-3333-4444-555555555555
14 : start=2048, size=8192, type={BIOS}, uuid=AAAAAAAA-0000-0000-0000-000000000014
15 : start=10240, size=40960, type={ESP}, uuid=AAAAAAAA-0000-0000-0000-000000000015, name=efi
1 : start=51200, size=163840, type={ROOT}, uuid=AAAAAAAA-0000-0000-0000-000000000001, name="the root", attrs="GUID:59"
"""


@dataclass(frozen=True)
class Guest:
    """A raw disk image of a guest."""

    path: Path
    root: int | str  # number of the root's partition, or GROUP/NAME of its logical volume; 0 without a table
    subvolume: str = ""

    @property
    def fstab(self) -> str:
        return self.path.with_suffix(".fstab").read_text()


def place(disk: Path, number: int | str) -> Partition | None:
    """Return where a partition or a logical volume is; None for the whole disk."""
    if isinstance(number, str):
        return lvmdisks.volumes(disk)[number]
    return next(part for part in by_number(disk) if part.number == number) if number else None


def by_number(disk: Path) -> list[Partition]:
    """Like `partitions`, but with the numbers in the table, which may have gaps."""
    import dataclasses

    from support import table_of

    numbers = [int(entry["node"][len(str(disk)) :].lstrip("p")) for entry in table_of(disk)["partitions"]]  # type: ignore
    return [dataclasses.replace(part, number=number) for part, number in zip(partitions(disk), numbers)]


def blank(path: Path, mib: int, script: str = "") -> Path:
    with path.open("xb") as file:
        file.truncate(mib * MIB)
    if script:
        run("sfdisk", "--quiet", path, text=script)
    return path


def make(disk: Path, number: int | str, kind: str, label: str = "") -> None:
    part = place(disk, number)
    identity = number if isinstance(number, int) else sum(number.encode())
    words = [word.format(uuid=UUID.format(identity), label=label or f"l{identity}") for word in MAKE[kind]]
    with attached(disk, part.start if part else 0, part.size if part else 0) as device:
        run(*words, device)


def fill(disk: Path, number: int | str, tree: Path, work: Path, fstab: str | None = None, options: str = "rw") -> None:
    """Copy `tree` to the filesystem on a partition."""
    with mounted(disk, work / "fill", place(disk, number), options) as where:
        run("cp", "--archive", f"{tree}/.", where)
        if fstab is not None:
            (where / "etc/fstab").write_text(fstab)
            disk.with_suffix(".fstab").write_text(fstab)


def cloud(path: Path, tree: Path, work: Path) -> Guest:
    """As Debian and Ubuntu: 14 is BIOS boot, 15 the ESP, and 1, at the end of the disk, the root."""
    blank(path, 106, CLOUD)
    make(path, 15, "vfat", "UEFI")
    make(path, 1, "ext4", "cloudimg-rootfs")
    fill(path, 1, tree, work, "LABEL=cloudimg-rootfs / ext4 discard,errors=remount-ro 0 1\n"
                              "LABEL=UEFI /boot/efi vfat umask=0077 0 1\n")  # fmt: skip
    return Guest(path, 1)


def mbr(path: Path, tree: Path, work: Path) -> Guest:
    blank(path, 101, "label: dos\nlabel-id: 0xdeadbeef\n1 : start=2048, size=204800, type=83, bootable\n")
    make(path, 1, "ext4")
    fill(path, 1, tree, work, f"UUID={UUID.format(1)} / ext4 defaults 0 1\n")
    return Guest(path, 1)


def xfs(path: Path, tree: Path, work: Path) -> Guest:
    """As Red Hat: /boot on ext4, the root on xfs."""
    blank(path, 402, f"label: gpt\n1 : size=4M, type={BIOS}\n2 : size=40M, type={DATA}\n3 : size=352M, type={DATA}\n")
    make(path, 2, "ext4", "boot")
    make(path, 3, "xfs", "root")
    fstab = "PARTUUID={} / xfs defaults 0 0\nUUID={} /boot ext4 defaults 1 2\n"
    entries = {part.number: part.content["PART_ENTRY_UUID"] for part in _with_entries(path)}
    bare = work / "bare"
    run("cp", "--archive", tree, bare)
    shutil.rmtree(bare / "boot")
    (bare / "boot").mkdir()
    fill(path, 3, bare, work, fstab.format(entries[3], UUID.format(2)))
    fill(path, 2, tree / "boot", work)
    shutil.rmtree(bare)
    return Guest(path, 3)


def _with_entries(disk: Path) -> list[Partition]:
    import dataclasses

    from support import table_of

    return [dataclasses.replace(part, content={"PART_ENTRY_UUID": entry["uuid"]})
            for part, entry in zip(by_number(disk), table_of(disk)["partitions"])]  # type: ignore  # fmt: skip


def btrfs(path: Path, tree: Path, work: Path) -> Guest:
    """As openSUSE and others: everything on subvolumes."""
    blank(path, 262, f"label: gpt\n1 : size=4M, type={BIOS}\n2 : size=252M, type={ROOT}\n")
    make(path, 2, "btrfs")
    with mounted(path, work / "fill", place(path, 2), "rw") as where:
        for name in ("@", "@home"):
            run("btrfs", "subvolume", "create", where / name)
        run("cp", "--archive", f"{tree}/.", where / "@")
        (where / "@home/somebody").mkdir()
        fstab = "".join(f"UUID={UUID.format(2)} {place} btrfs subvol={name},compress=zstd 0 0\n"
                        for place, name in (("/", "@"), ("/home", "/@home")))  # fmt: skip
        (where / "@/etc/fstab").write_text(fstab)
        path.with_suffix(".fstab").write_text(fstab)
    return Guest(path, 2, "@")


def ancestor(path: Path, tree: Path, work: Path) -> Guest:
    """As ganeti-instance-image: /boot, swap and root, and nothing else in the fstab."""
    blank(path, 130, "label: dos\n1 : start=1M, size=24M, type=83, bootable\n2 : size=16M, type=82\n3 : size=80M\n")
    make(path, 1, "ext3")
    make(path, 2, "swap")
    make(path, 3, "ext3")
    fstab = "/dev/sda3 / ext3 defaults 0 1\n/dev/sda1 /boot ext3 defaults 0 2\n/dev/sda2 swap swap defaults 0 0\n"
    bare = work / "bare"
    run("cp", "--archive", tree, bare)
    shutil.rmtree(bare / "boot")
    (bare / "boot").mkdir()
    fill(path, 3, bare, work, fstab)
    fill(path, 1, tree / "boot", work)
    shutil.rmtree(bare)
    return Guest(path, 3)


def lvm(path: Path, tree: Path, work: Path) -> Guest:
    """As the installers of Red Hat and Ubuntu: /boot on a partition, all else in a volume group."""
    blank(path, 240, f"label: gpt\n1 : size=2M, type={BIOS}\n2 : size=40M, type={DATA}\n"
                     f"3 : size=194M, type={lvmdisks.LVM}\n")  # fmt: skip
    make(path, 2, "ext4", "boot")
    volume_group(path, 3, "vg-main", {"swap": 16, "home-1": 32, "root": 88})
    for name, kind in {"swap": "swap", "home-1": "ext4", "root": "ext4"}.items():
        make(path, f"vg-main/{name}", kind)
    bare = work / "bare"
    run("cp", "--archive", tree, bare)
    shutil.rmtree(bare / "boot")
    (bare / "boot").mkdir()
    fstab = (
        "/dev/mapper/vg--main-root / ext4 defaults 0 1\nLABEL=boot /boot ext4 defaults 0 2\n"
        "/dev/vg-main/home-1 /home ext4 defaults 0 2\n/dev/mapper/vg--main-swap none swap sw 0 0\n"
    )
    fill(path, "vg-main/root", bare, work, fstab)
    fill(path, 2, tree / "boot", work)
    shutil.rmtree(bare)
    return Guest(path, "vg-main/root")


def volume_group(path: Path, number: int, name: str, sizes: dict[str, int]) -> None:
    """Make a volume group on a partition, or with number 0 on the whole disk, of logical volumes (name -> MiB)."""
    part = place(path, number)
    with attached(path, part.start if part else 0, part.size if part else 0) as device:
        lvmdisks.lvm([device], "pvcreate", device)
        lvmdisks.lvm([device], "vgcreate", name, device)
        for volume, mib in sizes.items():
            lvmdisks.lvm([device], "lvcreate", *lvmdisks.NEW, "-L", f"{mib}M", "-n", volume, name)


def bare(path: Path, tree: Path, work: Path) -> Guest:
    """A filesystem without a partition table."""
    blank(path, 80)
    make(path, 0, "ext4")
    fill(path, 0, tree, work, "/dev/vda / ext4 defaults 0 1\n")
    return Guest(path, 0)


LAYOUTS: dict[str, Callable[[Path, Path, Path], Guest]] = {
    layout.__name__: layout for layout in (cloud, mbr, xfs, btrfs, lvm, ancestor, bare)
}


def best_compression(directory: Path) -> str:
    """Return zstd if this qemu-img supports it for qcow2 (that of Debian 11 does not), otherwise zlib."""
    trial = directory / "trial.qcow2"
    options = ["-q", "-f", "qcow2", "-o", "compression_type=zstd"]
    done = subprocess.run(["qemu-img", "create", *options, trial, "1M"], capture_output=True)
    trial.unlink(missing_ok=True)
    return "zlib" if done.returncode else "zstd"


def qcow2(source: Path, path: Path, *options: str) -> Path:
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, source, path)
    return path


def soiled(disk: Path, mib: int) -> Path:
    """Fill a disk as a last tenant may leave it: with partitions, filesystems, and data in every block."""
    pattern = b"secret of the last tenant\n".ljust(4096, b"\xa5")
    with disk.open("wb") as file:
        for _ in range(mib):
            file.write(pattern * 256)
    fifth = mib // 5 - 1
    run("sfdisk", "--quiet", disk, text="label: gpt\n" + f",{fifth}M\n" * 4)
    for number, kind in ((1, "ext4"), (2, "swap"), (4, "ext2")):
        make(disk, number, kind)
    return disk


def compress(source: Path, path: Path, *command: str) -> Path:
    with source.open("rb") as plain, path.open("wb") as output:
        subprocess.run(command, stdin=plain, stdout=output, check=True)
    return path
