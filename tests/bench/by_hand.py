"""The same work in shell, as a careful administrator does it, to compare imageos with.

Each script gets `image` and a new disk, attached at $loop. It ends when everything is on the disk.
"""

from __future__ import annotations

EXT4 = "none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file,has_journal,extent,huge_file,flex_bg,"
EXT4 += "metadata_csum,64bit,dir_nlink,extra_isize"  # as imageos makes it, so that both write the same

ATTACH = f"""
mkfs() {{ mkfs.ext4 -F -q -O {EXT4} "$1"; }}
case $image in
  *.gz) unpack() {{ pigz -dc "$1" 2>/dev/null || gzip -dc "$1"; }} ;;
  *) unpack() {{ zstd -dcq "$1"; }} ;;
esac
untar() {{
  tar --extract --directory "$1" --numeric-owner --preserve-permissions --acls --xattrs --xattrs-include='*'
}}
loop=$(losetup --find --show "$disk")
end() {{ losetup --detach "$loop"; }}
trap end EXIT
""".replace("$image in", "${image-} in")

_MOUNTED = """
mkfs "$loop"
target=$(mktemp -d)
mount "$loop" "$target"
{}
umount "$target"
rmdir "$target"
sync "$loop" "$disk"
"""
TARBALL = _MOUNTED.format('unpack "$image" | untar "$target"')
DUMP = _MOUNTED.format('cd "$target"; restore -r -y -f "$image"; rm restoresymtable; cd /')

QCOW2 = """
qemu-img convert -n --target-is-zero -W -m 16 -t none -f qcow2 -O raw "$image" "$loop"
sync "$loop" "$disk"
"""
RAW = """
zstd -dcq "$image" | dd of="$loop" bs=1M iflag=fullblock conv=sparse,notrunc status=none
sync "$loop" "$disk"
"""

# Everything that create does for a tarball
WHOLE = """
sfdisk --quiet --no-reread --no-tell-kernel "$loop" <<END
label: dos
size=24MiB, type=83, bootable
size=8MiB, type=82
type=83
END
partx --add "$loop"
mkfs "${loop}p1"
mkswap "${loop}p2"
mkfs "${loop}p3"
target=$(mktemp -d)
mount "${loop}p3" "$target"
mkdir "$target/boot"
mount "${loop}p1" "$target/boot"
unpack "$image" | untar "$target"
echo "UUID=$(blkid -o value -s UUID "${loop}p3") / ext4 defaults 0 1" >"$target/etc/fstab"
echo inst1 >"$target/etc/hostname"
umount "$target/boot" "$target"
rmdir "$target"
partx --delete "$loop"
sync "$loop" "$disk"
"""

READ = 'dd if="$used" bs=1M status=none | cat >/dev/null'
WRITE = 'dd if="$used" of="$loop" bs=1M conv=notrunc,fsync status=none; sync "$disk"'

# The steps of ganeti-instance-image, with its sleep and its syncs of the whole machine, but with partx instead of
# kpartx, which needs device-mapper.
ANCESTOR = """
sfdisk --quiet --no-reread --no-tell-kernel "$loop" <<END
label: dos
size=256MiB, type=83, bootable
size=8MiB, type=82
type=83
END
partx --add "$loop"
mkfs.ext4 -Fq -L / "${loop}p3"
mkfs.ext4 -Fq -L /boot "${loop}p1"
mkswap -f "${loop}p2"
sync
sleep 2
blkid -c /dev/null -o value -s UUID "${loop}p3" "${loop}p1" "${loop}p2"
target=$(mktemp -d)
mount "${loop}p3" "$target"
mkdir -p "$target/boot"
mount "${loop}p1" "$target/boot"
"""
_ANCESTOR_END = """
sync
umount "$target/boot"
umount "$target"
partx --delete "$loop"
sync "$loop" "$disk"
"""
ANCESTOR_TARBALL = 'tar pzxf "$image" -C "$target"\n' + _ANCESTOR_END
ANCESTOR_DUMP = (
    '(cd "$target"; restore -r -y -f "$image")\n'
    '(cd "$target/boot"; restore -r -y -f "${image/root.dump/boot.dump}")\n' + _ANCESTOR_END
)
