"""Disk images of real Debian systems that boot, in the layouts that are met; made once, kept between runs.

They are made in namespaces of their own by programs of the node and, in a chroot, of the Debian.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from debian import CACHE as DEBIANS
from debian import Debian, cached

CACHE = DEBIANS.parent / "bootdisks"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS = "21686148-6449-6E6F-744E-656564454649"
ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
DATA = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
SERIAL = "console=tty0 console=ttyS0,115200"


@dataclass(frozen=True)
class Layout:
    """How one disk is made: shell, where $disk is the loop device and $root the place of the guest's root."""

    mib: int
    table: str  # input of sfdisk
    make: str  # filesystems made and mounted
    fstab: str  # in double quotes of the shell
    root: int  # number of its partition
    settings: str = 'GRUB_CMDLINE_LINUX=""'  # besides, of the guest's GRUB
    uefi: bool = False  # boots from it, too
    after: str = ""  # when all is unmounted


LAYOUTS = {
    # Debian's cloud images: the root has number 1 and is the last on the disk, its UUID is nowhere, its PARTUUID is all
    "cloud": Layout(
        1000,
        f"""label: gpt
14 : start=1M, size=3M, type={BIOS}
15 : size=124M, type={ESP}
1 : size=870M, type={ROOT}
""",
        """
mkfs.vfat -n ESP ${disk}p15 >&2
make_ext4 ${disk}p1
mount ${disk}p1 $root
""",
        "PARTUUID=$(partuuid 1) / ext4 rw,discard,errors=remount-ro 0 1\n"
        "PARTUUID=$(partuuid 15) /boot/efi vfat defaults 0 0\n",
        root=1,
        settings=f'GRUB_DISABLE_LINUX_UUID=true\nGRUB_DISABLE_LINUX_PARTUUID=false\nGRUB_CMDLINE_LINUX="{SERIAL}"',
        uefi=True,
    ),
    # No console in its menu: the login on it is what create adds
    "mbr": Layout(
        900,
        "label: dos\n1 : start=1M, type=83, bootable\n",
        "make_ext4 ${disk}p1\nmount ${disk}p1 $root\n",
        "UUID=$(uuid 1) / ext4 errors=remount-ro 0 1\n",
        root=1,
    ),
    # Red Hat's
    "xfs": Layout(
        1100,
        f"label: gpt\n1 : size=1M, type={BIOS}\n2 : size=200M, type={DATA}\n3 : size=890M, type={DATA}\n",
        """
make_ext4 -L boot ${disk}p2
mkfs.xfs -q -f ${disk}p3
mount ${disk}p3 $root
mkdir $root/boot
mount ${disk}p2 $root/boot
""",
        "UUID=$(uuid 3) / xfs defaults 0 0\nLABEL=boot /boot ext4 defaults 0 2\n",
        root=3,
        settings=f'GRUB_CMDLINE_LINUX="{SERIAL}"',
    ),
    # Ubuntu's and others
    "btrfs": Layout(
        1000,
        f"label: gpt\n1 : size=1M, type={BIOS}\n2 : size=990M, type={ROOT}\n",
        """
mkfs.btrfs -q -f ${disk}p2
mount ${disk}p2 $root
btrfs -q subvolume create $root/@
btrfs -q subvolume create $root/@home
umount $root
mount -o subvol=@ ${disk}p2 $root
mkdir $root/home
mount -o subvol=@home ${disk}p2 $root/home
""",
        "UUID=$(uuid 2) / btrfs subvol=@,compress=zstd 0 0\nUUID=$(uuid 2) /home btrfs subvol=/@home 0 0\n",
        root=2,
        settings=f'GRUB_CMDLINE_LINUX="{SERIAL}"',
    ),
    # What ganeti-instance-image made
    "ancestor": Layout(
        1100,
        "label: dos\n1 : start=1M, size=150M, type=83, bootable\n2 : size=64M, type=82\n3 : type=83\n",
        """
mkfs.ext3 -q -F ${disk}p1
mkswap ${disk}p2 >&2
mkfs.ext3 -q -F ${disk}p3
mount ${disk}p3 $root
mkdir $root/boot
mount ${disk}p1 $root/boot
""",
        "/dev/vda3 / ext3 defaults 0 1\n/dev/vda1 /boot ext3 defaults 0 2\n/dev/vda2 swap swap defaults 0 0\n",
        root=3,
        settings=f'GRUB_CMDLINE_LINUX="{SERIAL}"',
        after="""
for part in root:3 boot:1; do
  dump -0 -q -z1 -f $result/${part%:*}.dump ${disk}p${part#*:} >&2
done
""",
    ),
}

# $1 directory for the result: disk, and what `after` makes; $2 tarball
BEGIN = """
set -euo pipefail
umask 022
result=$1 tarball=$2
root=$result/root
mkdir $root
uuid() { blkid --probe --match-tag UUID --output value ${disk}p$1; }
partuuid() { sfdisk --part-uuid $disk $1 | tr A-Z a-z; }
# What the oldest of the guests can read, whatever the node's mkfs would add
make_ext4() {
  mkfs.ext4 -q -F -O none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file,has_journal,extent \\
    -O huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize "$@"
}
attach() {
  disk=$(losetup --find --show --partscan $result/disk)
  trap 'losetup --detach $disk' EXIT
  partx --add $disk || true  # a kernel that knows the table has them already
}
detach() {
  losetup --detach $disk
  trap - EXIT
}
"""

# The loop device goes with its last user: it is let go as soon as something of it is mounted.
FILL = """
detach
tar --extract --file $tarball --directory $root --numeric-owner --xattrs --xattrs-include='*' --acls
mkdir -p $root/etc/default/grub.d $root/boot/efi

mount -t tmpfs -o mode=755 dev $root/dev
cp --archive /dev/null /dev/zero /dev/full /dev/random /dev/urandom $disk ${disk}p* $root/dev
mkdir -p $root/dev/disk/by-uuid $root/dev/disk/by-partuuid
for part in ${disk}p*; do
  for name in $(blkid --probe --match-tag UUID --output value $part || true); do
    ln -s $part $root/dev/disk/by-uuid/$name
  done
  ln -s $part $root/dev/disk/by-partuuid/$(partuuid ${part##*p})
done
mount -t proc proc $root/proc
mount -t sysfs -o ro sysfs $root/sys
"""

MENU = """
cat >$root/etc/default/grub.d/60-image.cfg <<'END'
GRUB_TIMEOUT=0
GRUB_DISABLE_OS_PROBER=true
{settings}
END
chroot $root grub-install --target=i386-pc --no-floppy $disk
chroot $root grub-mkconfig -o /boot/grub/grub.cfg
"""

# As in the cloud images: the loader at the removable path, the menu that of BIOS. Without FAT in the node's kernel.
UEFI = r"""
cp --recursive $root/usr/lib/grub/x86_64-efi $root/boot/grub/
cat >$root/boot/efi/grub.cfg <<END
search.fs_uuid $(uuid 1) root
set prefix=(\$root)/boot/grub
configfile \$prefix/grub.cfg
END
chroot $root grub-mkimage -O x86_64-efi -p /EFI/debian -o /boot/efi/BOOTX64.EFI \
  fat part_gpt ext2 normal configfile search search_fs_uuid linux
mmd -i ${disk}p15 ::/EFI ::/EFI/BOOT ::/EFI/debian
mcopy -i ${disk}p15 $root/boot/efi/BOOTX64.EFI ::/EFI/BOOT/
mcopy -i ${disk}p15 $root/boot/efi/grub.cfg ::/EFI/debian/
rm $root/boot/efi/BOOTX64.EFI $root/boot/efi/grub.cfg
"""

# The trees have no locales to make one of.
END = """
[ ! -d $root/etc/cloud ] || echo 'locale: false' >$root/etc/cloud/cloud.cfg.d/10_image.cfg
umount $root/sys $root/proc $root/dev
umount --recursive $root
rmdir $root
"""


@dataclass(frozen=True)
class BootDisk:
    layout: Layout
    image: Debian
    path: Path  # raw, sparse
    dumps: dict[str, Path]  # `root` and `boot`, where the layout has dumps


def boot_disks(wanted: dict[str, tuple[str, Debian]]) -> dict[str, BootDisk]:
    """Disks, each of a layout and what is on it, two at a time, out of the cache where they are there."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(lambda one: _boot_disk(*one), wanted.values())))


def _boot_disk(name: str, image: Debian) -> BootDisk:
    script = recipe(LAYOUTS[name])
    made_of = image.tarball.parent.name  # SUITE+FLAVOUR-KEY
    key = hashlib.sha256(f"{script}{made_of}".encode()).hexdigest()[:12]
    directory = cached(CACHE / f"{name}-{made_of.rpartition('-')[0]}-{key}", script, str(image.tarball))
    dumps = {path.stem: path for path in directory.glob("*.dump")}
    return BootDisk(LAYOUTS[name], image, directory / "disk", dumps)


def recipe(layout: Layout) -> str:
    lines = [BEGIN, f"truncate --size {layout.mib}M $result/disk"]
    lines += ["sfdisk --quiet $result/disk <<'END'", layout.table + "END", "attach", layout.make, FILL]
    lines += [f"cat >$root/etc/fstab <<END\n{layout.fstab}END", MENU.format(settings=layout.settings)]
    lines += [UEFI if layout.uefi else "", END]
    lines += ["attach", layout.after, "detach"] if layout.after else []
    return "\n".join(lines)
