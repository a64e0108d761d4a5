"""Let real programs fail as they do in life, and expect the cause, not what they say after it."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from imageos.causes import cause

# Makes the input of the commands below, of a file `noise`
PREPARE = """
mkdir tree; cp noise tree/a; cp noise tree/b; tar -cf plain.tar tree
head -c 400000 plain.tar >cut.tar
for program in gzip xz zstd bzip2 lz4; do $program -c noise >whole; head -c 200000 whole >cut.$program; done
head -c 1m /dev/zero | zstd -q -1 --long=31 -c >wide.zstd
truncate -s 20M root; mkfs.ext4 -q -F root; truncate -s 40M disk; mkfs.ext4 -q -F -O bigalloc disk; truncate -s 80M disk
cp root no-directory; debugfs -w -R 'set_inode_field <2> mode 0100644' no-directory
cp root shorter; truncate -s 10M shorter
cp root bad; dd if=noise of=bad bs=1k count=8 conv=notrunc
mkfs.ext4 -q -F -O ^extent,^64bit -d tree twice 20M
debugfs -w -R "set_inode_field /b block[0] $(debugfs -R 'blocks /a' twice | cut -d ' ' -f 1)" twice
cp root strange; debugfs -w -R 'set_super_value feature_incompat 0xffff' strange
cp root marked; debugfs -w -R 'set_super_value state 2' marked
mkfs.ext4 -q -F -b 1024 -g 1024 -O ^resize_inode small 20M; truncate -s 70G small
truncate -s 10M table; printf 'label: gpt\\nsize=1M\\n' | sfdisk -q table
truncate -s 8k tiny; truncate -s 4M full.ext2; mkfs.ext2 -q -F full.ext2
mkdir empty; echo no signature >text
"""
# command -> how its cause begins
FAILURES = {
    "e2fsck -f -p no-directory": "no-directory: Root inode is not a directory.",
    "e2fsck -f -p shorter": "shorter: The filesystem size (according to the superblock) is 20480 blocks "
    "The physical size of the device is 10240 blocks "
    "Either the superblock or the partition table is likely to be corrupt!",
    "e2fsck -f -p twice": "twice: File /a (inode #12, mod time ",
    "e2fsck -f -p bad": "e2fsck: Bad magic number in super-block while trying to open bad",
    "e2fsck -f -p strange": "strange has unsupported feature(s): ",
    "e2fsck -f -p missing": "e2fsck: No such file or directory while trying to open missing",
    "e2fsck -Z": "e2fsck: invalid option -- 'Z'",
    "resize2fs disk": "Resizing bigalloc file systems has not been fully tested. Proceed at your own risk! "
    "Use the force option if you want to go ahead anyway.",
    "resize2fs small": "resize2fs: New size results in too many block group descriptors.",
    "resize2fs marked": "Please run 'e2fsck -f marked' first.",
    "resize2fs shorter": "Please run 'e2fsck -f shorter' first.",
    "mkfs.ext4 -F -q tiny": "tiny: Not enough space to build proposed filesystem while setting up superblock",
    "mkfs.ext4 -F -q -O nonsense tiny": "Invalid filesystem option set: nonsense",
    "mkfs.xfs -f -q tiny": "size ",
    "mkfs.xfs -f -q -m nonsense=1 noise": "unknown option -m nonsense=1",
    "mkfs.btrfs -f -q tiny": "ERROR: 'tiny' is too small to make a usable filesystem ERROR: minimum size for each",
    "mkfs.vfat -F 32 tiny": "mkfs.vfat: Too few blocks for viable filesystem",
    "mkswap tiny": "mkswap: error: swap area needs to be at least 40 KiB",
    "mkswap missing": "mkswap: cannot open missing: No such file or directory",
    "tar -xf noise": "tar: This does not look like a tar archive",
    "tar -C empty -xf cut.tar": "tar: Unexpected EOF in archive",
    "tar -xf missing": "tar: missing: Cannot open: No such file or directory",
    "tar -xzf noise": "gzip: stdin: not in gzip format",
    "tar -x --nonsense": "tar: unrecognized option '--nonsense'",
    "tar -cf /dev/full tree": "tar: /dev/full: Cannot write: No space left on device",
    "gzip -dc cut.gzip": "gzip: cut.gzip: unexpected end of file",
    "pigz -dc cut.gzip": "pigz: skipping: cut.gzip: corrupted -- incomplete deflate data",
    "gzip -dc noise": "gzip: noise: ",
    "xz -dcq <cut.xz": "xz: (stdin): Unexpected end of input",
    "xz -dcq <noise": "xz: (stdin): File format not recognized",
    "xz --nonsense": "xz: unrecognized option '--nonsense'",
    "zstd -dcq <cut.zstd": "/*stdin*\\ : Read error (39) : premature end",
    "zstd -dcq <noise": "zstd: /*stdin*\\: unsupported format",
    "zstd -dcq <wide.zstd": "/*stdin*\\ : Window size larger than maximum : 2147483648 > 134217728",
    "ulimit -v 1000000; zstd -dcq --long=31 <wide.zstd": "/*stdin*\\ : Decoding error (36) : Allocation error",
    "bzip2 -dc <cut.bzip2": "bzip2: Compressed file ends unexpectedly;",
    "bzip2 -dc <noise": "bzip2: (stdin) is not a bzip2 file.",
    "lz4 -dcq <cut.lz4": "Error ",
    "restore -r -y -f noise": "restore: Tape is not a dump tape",
    "restore -r -y -f missing": "restore: missing: No such file or directory",
    "dump -0 -f - tiny": ("DUMP: ", "tiny: "),  # where /etc/mtab names the filesystem of the file, and where not
    "qemu-img convert -f qcow2 -O raw noise made": "qemu-img: Could not open 'noise': Image is not in qcow2 format",
    "qemu-img convert --nonsense": "qemu-img: unrecognized option '--nonsense'",
    "echo ', 999999' | sfdisk -q --partno 1 table": "Failed to resize partition #1.",
    "sfdisk -q missing": "sfdisk: cannot open missing: No such file or directory",
    "sfdisk --nonsense": "sfdisk: unrecognized option '--nonsense'",
    "btrfs filesystem resize max .": "ERROR: not a btrfs filesystem: .",
    "xfs_growfs -d .": "xfs_growfs: . is not a mounted XFS filesystem",
    "dd if=noise of=/dev/full": "dd: writing to '/dev/full': No space left on device",
    "dd if=missing": "dd: failed to open 'missing': No such file or directory",
    "gpgv --keyring ./text text text": "gpgv: no valid OpenPGP data found.",
    "curl -sSf http://127.0.0.1:9/": "curl: (7) ",
    "curl --nonsense": "curl: option --nonsense: is unknown",
    "mcopy -i noise tiny ::": "init :: non DOS media Cannot initialize '::'",
    "lvm pvs --nonsense": "pvs: unrecognized option '--nonsense'",
    "sync --file-system missing": "sync: error opening 'missing': No such file or directory",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causes")
    (path / "noise").write_bytes(random.Random(1).randbytes(300_000))  # the same each time: so is what mcopy says of it
    subprocess.run(["sh", "-c", PREPARE], cwd=path, check=True, capture_output=True)
    return path


def test_real_failures(place: Path) -> None:
    wrong = []
    for command, expected in FAILURES.items():
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(place)},
        )
        program = command.rpartition("; ")[2].rpartition(" | ")[2].split()[0]
        told = cause(program, done.stderr, done.stdout)
        if not done.returncode or not told.startswith(expected):
            wrong.append(f"{command}: status {done.returncode}: {told!r}, not {expected!r}\n{done.stderr[-600:]}")
    assert not wrong, "\n".join(wrong)
