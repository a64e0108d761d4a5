"""Disk images of real Debian systems that boot, in common layouts; made once, kept between runs.

Programs of the node and, in a chroot, of the Debian make them in their own namespaces.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from debian import CACHE as DEBIANS
from debian import Debian, cached
from lvmdisks import LVM

CACHE = DEBIANS.parent / "bootdisks"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS = "21686148-6449-6E6F-744E-656564454649"
ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
DATA = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
SERIAL = "console=tty0 console=ttyS0,115200"


@dataclass(frozen=True)
class Layout:
    """How to make one disk, in shell: $disk is the loop device, $root is the mount point of the guest's root."""

    mib: int
    table: str  # input of sfdisk
    make: str  # makes and mounts the filesystems
    fstab: str  # in double quotes for the shell
    root: int  # number of its partition, or of that with its volume group
    settings: str = 'GRUB_CMDLINE_LINUX=""'  # besides, of the guest's GRUB
    uefi: bool = False  # boots from it, too
    boot: int = 0  # number of the partition with /boot, if it has one and boots from UEFI
    filled: str = ""  # when all files are there
    configured: str = ""  # when the menu is there
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
    # As the installers of Ubuntu and Red Hat; names with a hyphen, which device-mapper doubles
    "lvm": Layout(
        1100,
        f"""label: gpt
1 : start=1M, size=1M, type={BIOS}
15 : size=40M, type={ESP}
2 : size=200M, type={DATA}
3 : size=850M, type={LVM}
""",
        r"""
mkfs.vfat -n ESP ${disk}p15 >&2
make_ext4 -L boot ${disk}p2
lvm() {
  command lvm "$@" --driverloaded n --config "devices { use_devicesfile=0 filter=[\"a|^${disk}p3\$|\",\"r|.*|\"] }
    activation { udev_sync=0 udev_rules=0 monitoring=0 } backup { backup=0 archive=0 }" 2>/dev/null
}
lvm pvcreate ${disk}p3 >&2
lvm vgcreate vg-main ${disk}p3 >&2
lvm lvcreate -an -Zn -Wn -L 64M -n swap-1 vg-main >&2
lvm lvcreate -an -Zn -Wn -L 700M -n root vg-main >&2
start=$(lvm pvs --noheadings --units b --nosuffix -o pe_start ${disk}p3)
volume() {  # attach a logical volume
  lvm lvs --noheadings --units b --nosuffix -o seg_pe_ranges,vg_extent_size,seg_size vg-main/$1 |
    { read -r range extent size; range=${range##*:}
      losetup --find --show --offset $((start + ${range%-*} * extent)) --sizelimit $size ${disk}p3; }
}
swap=$(volume swap-1)
mkswap $swap >&2
losetup --detach $swap
volume=$(volume root)
make_ext4 $volume
mount $volume $root
losetup --detach $volume
mkdir $root/boot
mount ${disk}p2 $root/boot
""",
        "/dev/mapper/vg--main-root / ext4 errors=remount-ro 0 1\nUUID=$(uuid 2) /boot ext4 defaults 0 2\n"
        "/dev/mapper/vg--main-swap--1 none swap sw 0 0\n",
        root=3,
        settings=f'GRUB_CMDLINE_LINUX="{SERIAL}"',
        uefi=True,
        boot=2,
        filled="""
cp --archive $volume $root/dev
ln -s $volume $root/dev/disk/by-uuid/$(blkid --probe --match-tag UUID --output value $volume)
""",
        # where device-mapper is, update-grub writes this
        configured="""
sed --in-place 's|root=UUID=[^ ]*|root=/dev/mapper/vg--main-root|' $root/boot/grub/grub.cfg
""",
    ),
    # as ganeti-instance-image made it
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

# Red Hat's installer's default
LAYOUTS["lvm-xfs"] = replace(
    LAYOUTS["lvm"],
    make=LAYOUTS["lvm"].make.replace("make_ext4 $volume", "mkfs.xfs -q -f $volume"),
    fstab=LAYOUTS["lvm"].fstab.replace("/ ext4 errors=remount-ro 0 1", "/ xfs defaults 0 0"),
)

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

# The loop device vanishes with its last user, so detach it as soon as one of its filesystems is mounted.
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

# As in the cloud images: the loader is at the removable path, the menu is that of BIOS. mtools need no kernel with FAT.
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

# cloud-init must not make a locale, as the trees have no sources for one.
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
    path: Path  # a raw, sparse file
    dumps: dict[str, Path]  # `root` and `boot`, where the layout has dumps


def boot_disks(recipes: dict[str, tuple[str, Debian]]) -> dict[str, BootDisk]:
    """Return a disk for each (layout, system), by the same keys. Make two at a time, or take them from the cache."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(recipes, pool.map(lambda pair: _boot_disk(*pair), recipes.values())))


def _boot_disk(name: str, image: Debian) -> BootDisk:
    script = recipe(LAYOUTS[name])
    source = image.tarball.parent.name  # SUITE+FLAVOUR-KEY
    key = hashlib.sha256(f"{script}{source}".encode()).hexdigest()[:12]
    directory = cached(CACHE / f"{name}-{source.rpartition('-')[0]}-{key}", script, str(image.tarball))
    dumps = {path.stem: path for path in directory.glob("*.dump")}
    return BootDisk(LAYOUTS[name], image, directory / "disk", dumps)


def recipe(layout: Layout) -> str:
    uefi = UEFI
    if layout.boot:
        uefi = uefi.replace("$(uuid 1)", f"$(uuid {layout.boot})").replace("prefix=(\\$root)/boot", "prefix=(\\$root)")
    lines = [BEGIN, f"truncate --size {layout.mib}M $result/disk"]
    lines += ["sfdisk --quiet $result/disk <<'END'", layout.table + "END", "attach", layout.make, FILL]
    lines += [layout.filled] if layout.filled else []
    lines += [f"cat >$root/etc/fstab <<END\n{layout.fstab}END", MENU.format(settings=layout.settings)]
    lines += [uefi if layout.uefi else ""]
    lines += [layout.configured] if layout.configured else []
    lines += [END]
    lines += ["attach", layout.after, "detach"] if layout.after else []
    return "\n".join(lines)
