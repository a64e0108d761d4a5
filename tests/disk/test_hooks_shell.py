"""Hooks in bash with `. common.sh`, as sites wrote them for ganeti-instance-image, run unchanged."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import backups
import pytest
import trees
from support import SITE, Node, Result, mounted, partitions, run, signatures

MakeDisk = Callable[..., Path]

# The beginning of all hooks
BEGIN = """\
#!/bin/bash
set -e
. common.sh
debug set -x
if [ -z "$TARGET" -o ! -d "$TARGET" ] ; then
    log_error "Missing target directory"
    exit 1
fi
"""

# By distribution: a function for each OS_TYPE, called by its name
NETWORK = """
FQDN="${INSTANCE_NAME}"
SHORT="$(echo ${INSTANCE_NAME} | cut -d . -f 1)"
if [ -f "${NETWORKS_DIR}/instances/${FQDN}" ] ; then
    source "${NETWORKS_DIR}/instances/${FQDN}"
    source "${NETWORKS_DIR}/subnets/${SUBNET}"
fi
debian_setup() {
    $MKDIR_P ${TARGET}/etc/network
    cat > ${TARGET}/etc/network/interfaces << EOF
auto eth0
iface eth0 inet ${ADDRESS:+static}${ADDRESS:-dhcp}
    gateway ${GATEWAY:-none}
EOF
    sed -i -e "s/^image$/$SHORT/" ${TARGET}/etc/issue.net
}
redhat_setup() {
    $MKDIR_P ${TARGET}/etc/sysconfig/network-scripts
    echo "DEVICE=eth0" > ${TARGET}/etc/sysconfig/network-scripts/ifcfg-eth0
}
suse_setup() { echo "suse $OPERATING_SYSTEM"; }
gentoo_setup() { echo "gentoo $OPERATING_SYSTEM"; }
get_os_type $TARGET
get_os $TARGET
get_os_release $TARGET
echo "found $OS_TYPE $OPERATING_SYSTEM ${OS_RELEASE:-none}."
if [ "${NIC_COUNT}" -gt 0 -a -n "${OS_TYPE}" ] ; then
    ${OS_TYPE}_setup
else
    log_error "Unsupported OS_TYPE"
fi
exit 0
"""

# Mounts that the trap of common.sh undoes in reverse order, the second element first
CLEANUP = """
work=$(mktemp -d)
CLEANUP+=("rmdir $work")
mount -t tmpfs none $work
CLEANUP+=("umount $work")
mount --bind /dev $TARGET/dev
CLEANUP+=("umount $TARGET/dev")
CLEANUP+=("echo elements ${#CLEANUP[@]}")
touch $work/busy
"""

# Filesystems, with the names of tools in common.sh
UUIDS = """
root_uuid="$($VOL_ID $ROOT_DEV)"
echo "kinds $($VOL_TYPE $ROOT_DEV) $($VOL_TYPE $BOOT_DEV)."
if [ -n "$(grep 'root=UUID' $TARGET/boot/grub/menu.lst)" ] ; then
    sed --follow-symlinks -ie "s/\\(root=UUID=\\)\\([a-z0-9-]*\\)/\\1${root_uuid}/g" $TARGET/boot/grub/menu.lst
fi
echo "same $root_dev $ROOT_DEV $boot_dev $BOOT_DEV $blockdev $BLOCKDEV."
echo "about $instance $INSTANCE_MEM $SCRIPT_NAME kernel=$KERNEL_PATH. $IMAGE_TYPE $HYPERVISOR ${old_name:-new}"
cleanup
trap - EXIT
exit 0
"""

FILES = {
    "etc/issue.net": "image\n",
    "boot/grub/menu.lst": "kernel /vmlinuz root=UUID=00000000-1111-2222-3333-444444444444 ro\n",
}


def hook(text: str) -> str:
    return BEGIN + textwrap.dedent(text)


@contextmanager
def guest_of(disk: Path, where: Path, number: int = -1) -> Iterator[Path]:
    with mounted(disk, where, partitions(disk)[number]) as top:
        yield top


@pytest.fixture
def image(node: Node, small_tree: Path, tmp_path: Path) -> Callable[..., None]:
    """Make the image one with these files, and with those that all tests here need."""

    def make(files: dict[str, str]) -> None:
        copy = tmp_path / "tree"
        run("rm", "-rf", copy)
        run("cp", "--archive", small_tree, copy)
        (copy / "etc/os-release").unlink()
        for name, text in {**FILES, **files}.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_text(text)
        trees.tarball(copy, node.images / f"tiny-{trees.ARCH}.tar.gz")

    make({"etc/debian_version": "12.5\n"})
    return make


def said(result: Result, pattern: str) -> str:
    found = re.search(pattern, result.log)
    assert found, f"{pattern}\n{result.log}"
    return found[1]


DISTRIBUTIONS = {
    "debian 6": ({"etc/debian_version": "6.0.10\n"}, "debian debian 6.0.10"),
    "debian 12": (
        {"etc/debian_version": "12.5\n", "usr/lib/os-release": 'ID=debian\nVERSION_ID="12"\n'},
        "debian debian 12",
    ),
    "ubuntu": (
        {"etc/debian_version": "bookworm/sid\n", "etc/os-release": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n'},
        "debian ubuntu 24.04",
    ),
    "centos 5": ({"etc/redhat-release": "CentOS release 5.11 (Final)\n"}, "redhat centos 5.11"),
    "rocky": (
        {"etc/redhat-release": "Rocky Linux release 9.3\n", "etc/os-release": 'ID="rocky"\nVERSION_ID="9.3"\n'},
        "redhat rocky 9.3",
    ),
    "rhel": (
        {"etc/redhat-release": "Red Hat Enterprise Linux\n", "etc/os-release": 'ID="rhel"\nVERSION_ID="9.3"\n'},
        "redhat redhat 9.3",
    ),
    "gentoo": ({"etc/gentoo-release": "Gentoo Base System release 2.14\n"}, "gentoo gentoo none"),
    "suse 11": ({"etc/SuSE-release": "SUSE Linux Enterprise Server 11\n"}, "suse suse none"),
    "leap": (
        {"etc/os-release": 'ID="opensuse-leap"\nID_LIKE="suse opensuse"\nVERSION_ID="15.6"\n'},
        "suse opensuse-leap 15.6",
    ),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_distributions(kind: str, node: Node, disk: MakeDisk, image: Callable[..., None]) -> None:
    files, expected = DISTRIBUTIONS[kind]
    image(files)
    node.hook("interfaces", hook(NETWORK))
    result = node.create(disk()).ok()
    assert said(result, r"found (.*)\.") == expected


def test_guest_that_is_unknown(node: Node, disk: MakeDisk, image: Callable[..., None]) -> None:
    image({})
    node.hook("interfaces", hook(NETWORK))
    assert "interfaces: Unsupported OS_TYPE" in node.create(disk()).ok().log


def test_network(node: Node, disk: MakeDisk, image: Callable[..., None], tmp_path: Path) -> None:
    node.hook("interfaces", hook(NETWORK))
    Node.write(SITE / "networks/instances/inst1.example.org", "ADDRESS=192.0.2.9\nSUBNET=vlan42\n")
    Node.write(SITE / "networks/subnets/vlan42", "NETMASK=255.255.255.0\nGATEWAY=192.0.2.1\n")
    target = disk()
    node.create(target).ok()
    with guest_of(target, tmp_path / "root") as top:
        assert (top / "etc/network/interfaces").read_text() == (
            "auto eth0\niface eth0 inet static192.0.2.9\n    gateway 192.0.2.1\n"
        )
        assert (top / "etc/issue.net").read_text() == "inst1\n"
        assert (top / "etc/network").stat().st_mode & 0o777 == 0o755


def test_filesystems_and_cleanup(node: Node, disk: MakeDisk, image: Callable[..., None], tmp_path: Path) -> None:
    node.hook("grub", hook(CLEANUP + UUIDS))
    target = disk()
    result = node.create(target, INSTANCE_BE_maxmem="300", INSTANCE_HV_kernel_path="").ok()
    assert said(result, r"elements (\d)") == "3"
    assert said(result, r"kinds (.*)\.") == "ext4 ext4"
    same = said(result, r"same (.*)\.").split()
    assert same[::2] == same[1::2]
    assert same[-1] == str(target)
    assert said(result, r"(about .*)") == "about inst1.example.org 300 grub kernel=. tarball fake new"
    with guest_of(target, tmp_path / "root", 0) as top:
        uuid = partitions(target)[-1].content["UUID"]
        assert (top / "grub/menu.lst").read_text() == f"kernel /vmlinuz root=UUID={uuid} ro\n"


@pytest.mark.parametrize("end", ["exit 3", "false", "kill -9 $$"])
def test_cleanup_after_a_failure(end: str, node: Node, disk: MakeDisk, image: Callable[..., None]) -> None:
    """The trap undoes what it can; leftovers of a killed hook vanish with the command."""
    node.hook("bad", hook(f"{CLEANUP}\n{end}\n"))
    target = disk()
    result = node.create(target).failed("bad")
    assert ("elements 3" in result.log) == (end != "kill -9 $$")
    assert signatures(target) == []


def test_order_and_settings(node: Node, disk: MakeDisk, image: Callable[..., None]) -> None:
    """Hooks get variables of the site's files, exported or not, and our settings under their names."""
    node.defaults("PROXY=http://proxy:3128\nexport MIRROR=mirror.example.org\nCINIT_USER=admin")
    node.variant("default", "PROXY=http://other:3128\nKERNEL_ARGS='quiet splash'\n")
    for name in ("zz_last", "10-first", "Upper", "grub"):
        node.hook(name, hook('echo "says $SCRIPT_NAME $PROXY $MIRROR $CINIT_USER $KERNEL_ARGS."'))
    found = re.findall(r"says (.*)\.", node.create(disk()).ok().log)
    assert [line.split()[0] for line in found] == ["10-first", "Upper", "grub", "zz_last"]
    assert {line.partition(" ")[2] for line in found} == {"http://other:3128 mirror.example.org admin quiet splash"}


def test_debug(node: Node, disk: MakeDisk, image: Callable[..., None]) -> None:
    node.hook("loud", hook("true as-a-trace"))
    assert "true as-a-trace" not in node.create(disk()).ok().log
    assert "+ true as-a-trace" in node.create(disk(), OSP_IMAGE_DEBUG="1").ok().log


def test_import(node: Node, disk: MakeDisk, image: Callable[..., None]) -> None:
    """Only the hook grub runs, with IMPORT_SCRIPT."""
    target = disk()
    node.create(target).ok()
    node.hook("grub", hook(f'echo "import=$IMPORT_SCRIPT mode=$IMAGEOS_ACTION args=$#."\n{UUIDS}'))
    node.hook("interfaces", hook(NETWORK))
    result = backups.restore(node, backups.exported(node, target), target).ok()
    assert said(result, r"(import=.*)") == "import=1 mode=import args=0."
    assert said(result, r"kinds (.*)\.") == "ext4 ext4"
    assert "hook interfaces" not in result.log


DDNS = """
if [ "$1" = "-r" ] ; then
    sed -i -e "s/^send host-name .*/send host-name ${instance%%.*};/" ${TARGET}/etc/dhclient.conf
    echo "from $old_name to $instance."
else
    echo "send host-name ${instance%%.*};" >> ${TARGET}/etc/dhclient.conf
fi
"""


def test_rename(node: Node, disk: MakeDisk, image: Callable[..., None], tmp_path: Path) -> None:
    """Only the hook zz_ddns runs, with -r."""
    node.hook("zz_ddns", hook(DDNS))
    node.hook("interfaces", hook(NETWORK))
    target = disk()
    node.create(target, INSTANCE_NAME="old.example.org").ok()
    names = {"OLD_INSTANCE_NAME": "old.example.org", "INSTANCE_NAME": "inst9.example.org"}
    result = node.call("rename", node.environment(target, env="rename", **names)).ok()
    assert said(result, r"from (.*)\.\n") == "old.example.org to inst9.example.org"
    assert "hook interfaces" not in result.log
    with guest_of(target, tmp_path / "root") as top:
        assert (top / "etc/dhclient.conf").read_text() == "send host-name inst9;\n"


CHROOT = """
chroot $TARGET /bin/sh -c 'echo thrown away >/dev/null; b=/bin/busybox
    echo in $(pwd) $($b head -c 3 /dev/zero | $b wc -c)'
mknod ${TARGET}/dev/vda b $(stat -L -c "0x%t 0x%T" $DISK_DEV)
CLEANUP+=("rm -f ${TARGET}/dev/vda")
mknod ${TARGET}/dev/vda1 b $(stat -L -c "0x%t 0x%T" $BOOT_DEV)
CLEANUP+=("rm -f ${TARGET}/dev/vda1")
echo "magic $(chroot $TARGET /bin/busybox dd if=/dev/vda bs=1 skip=510 count=2 2>/dev/null | od -An -tx1)."
"""


def test_chroot(node: Node, disk: MakeDisk, image: Callable[..., None], small_tree: Path, tmp_path: Path) -> None:
    """Programs of the guest find devices, also those of the disk; the guest's own /dev stays empty."""
    node.hook("grub", hook(CHROOT))
    target = disk()
    result = node.create(target).ok()
    assert "grub: in / 3" in result.log, result.log
    assert said(result, r"magic (.*)\.").split() == ["55", "aa"]
    with guest_of(target, tmp_path / "root") as top:
        assert list((top / "dev").iterdir()) == []
