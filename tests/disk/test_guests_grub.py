"""The hook `grub` on guests of many distributions: its calls and files; a second run changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bootguests
import guestdisks
import pytest
import trees
from backups import exported, restore
from support import SITE, Node, Result, attached, digest, mounted, partitions, run

MakeDisk = Callable[..., Path]
ARGUMENTS = 'mitigations=off dyndbg="file drivers/x.c +p" quiet'
CONSOLE = "console=tty0 console=ttyS0,38400n8"
ADDED = f"{CONSOLE} {ARGUMENTS}"
GPT = {"OSP_PARTITION_TABLE": "gpt"}
# Save the guest's files before, between and after two runs of the hook.
LOOK = """#!/bin/sh
cd "$TARGET" && echo "state $(find etc boot -type f -exec sha256sum {} + | sort | sha256sum)"
export MTOOLS_SKIP_CHECK=1
[ ! -e "${DISK_DEV}p2" ] || echo "esp $(mdir -b -/ -i "${DISK_DEV}p2" :: 2>&1 | sort | sha256sum)"
"""


@dataclass
class Guest:
    """A guest after create: the files that the tests check, by path."""

    log: str
    files: dict[str, str]  # of the guest, and of its ESP as EFI/...
    uuid: str  # of its root
    boot_uuid: str

    def calls(self) -> list[str]:
        return self.files.get("var/log/calls", "").splitlines()

    def once(self) -> list[str]:
        """Return the calls of the first run."""
        calls = self.calls()
        assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]
        return [re.sub(r"/dev/loop\d+", "DISK", call) for call in calls[: len(calls) // 2]]


Deploy = Callable[..., Guest]


@pytest.fixture
def deploy(node: Node, disk: MakeDisk, tmp_path: Path) -> Deploy:
    """Create an instance from the guest `name` with `extra` files in its tree, and run the hook twice."""

    def make(name: str, extra: dict[str, str] | None = None, **settings: object) -> Guest:
        target = disk(300)
        result = create(node, target, tmp_path, name, extra, **settings).ok()
        states = re.findall(r"[hj]-look: ((?:state|esp) .*)", result.log)
        per_look = len(states) // 2
        assert per_look and states[:per_look] == states[per_look:], result.log
        return inspected(target, tmp_path, result.log)

    return make


def create(
    node: Node, target: Path, tmp_path: Path, name: str, extra: dict[str, str] | None = None, **settings: object
) -> Result:
    tree = bootguests.guest(tmp_path / "tree", name)
    for path, text in (extra or {}).items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    trees.tarball(tree, node.images / f"{name}-{trees.ARCH}.tar", "tar")
    (SITE / "hooks/grub").chmod(0o755)
    (SITE / "hooks/i-again").symlink_to("grub")
    node.hook("h-look", LOOK)
    node.hook("j-look", LOOK)
    given = {"OSP_IMAGE_NAME": name, "OSP_KERNEL_ARGS": ARGUMENTS, "env": "create-kvm-network", **settings}
    return node.create(target, **given)


def inspected(target: Path, tmp_path: Path, log: str) -> Guest:
    parts = partitions(target)
    esp = next((part for part in parts if part.content.get("TYPE") == "vfat"), None)
    boot = next(part for part in parts if part.content.get("LABEL") == "/boot")
    files = {}
    with mounted(target, tmp_path / "mnt", parts[-1]) as top:
        files.update(read_tree(top, ("etc", "var/log")))
    with mounted(target, tmp_path / "mnt", boot) as top:
        files.update({f"boot/{name}": text for name, text in read_tree(top, (".",)).items()})
    if esp:
        out = tmp_path / "esp"
        out.mkdir()
        run("env", "MTOOLS_SKIP_CHECK=1", "mcopy", "-s", "-n", "-i", f"{target}@@{esp.start}", "::*", out, check=False)
        files.update(read_tree(out, (".",)))
    return Guest(log, files, parts[-1].content["UUID"], boot.content["UUID"])


def read_tree(top: Path, directories: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for directory in directories:
        for where, _, names in os.walk(top / directory):
            for path in (Path(where, name) for name in names):
                if path.is_file() and not path.is_symlink():
                    found[os.path.normpath(path.relative_to(top))] = path.read_text(errors="replace")
    return found


def command_line(menu: str, word: str = "linux\t") -> str:
    """Return the only command line in a menu, without the kernel's name."""
    (line,) = re.findall(rf"^\s*{word}.*?(root=.*)$", menu, re.MULTILINE)
    return str(line)


BIOS = "install --target=i386-pc --boot-directory=/boot DISK"


@pytest.mark.parametrize(
    ("name", "home", "line"),
    [
        ("debian", "grub", f"{ADDED} "),
        ("ubuntu", "grub", f" {ADDED} nomodeset"),
        ("opensuse", "grub2", f" {ADDED} splash=silent"),
        ("arch", "grub", f" {ADDED} loglevel=3"),
        ("gentoo", "grub", f" {ADDED} "),
    ],
)
@pytest.mark.parametrize("table", ["msdos", "gpt"])
def test_menu_of_mkconfig(name: str, home: str, line: str, table: str, deploy: Deploy) -> None:
    guest = deploy(name, OSP_PARTITION_TABLE=table)
    menu = guest.files[f"boot/{home}/grub.cfg"]
    expected = f"root=UUID={guest.uuid} ro {line}"
    assert command_line(menu).split() == expected.split()
    assert "# terminal console serial: serial --unit=0 --speed=38400" in menu
    assert f"{home}-{BIOS}" in guest.once() and f"{home}-mkconfig -o /boot/{home}/grub.cfg" in guest.once()
    assert f"boot/{home}/device.map" not in guest.files
    if table == "msdos":
        assert not [path for path in guest.files if path.startswith("EFI")]


def test_snippet_or_not(deploy: Deploy) -> None:
    """If grub-mkconfig reads grub.d, the package's own file is not changed."""
    guest = deploy("debian")
    kept = bootguests.GUESTS["debian"]["etc/default/grub"].replace('"quiet"', '""')
    assert guest.files["etc/default/grub"] == kept
    assert f"'{ADDED}'" in guest.files["etc/default/grub.d/90-imageos.cfg"]


def test_no_snippet_where_nobody_reads_it(deploy: Deploy) -> None:
    guest = deploy("gentoo")
    assert "etc/default/grub.d/90-imageos.cfg" not in guest.files
    assert guest.files["etc/default/grub"].count("GRUB_CMDLINE_LINUX=") == 2  # the guest's own one is a comment
    assert '\n#GRUB_CMDLINE_LINUX=""\n' in guest.files["etc/default/grub"]


@pytest.mark.parametrize("name", ["debian", "arch"])
def test_core_image(name: str, deploy: Deploy) -> None:
    guest = deploy(name, **GPT)
    find = f"search.fs_uuid {guest.boot_uuid} root\nset prefix=($root)/grub\n"
    assert guest.files["EFI/BOOT/BOOTX64.EFI"] == f"core image\n{find}"
    (call,) = [one for one in guest.once() if "mkimage" in one]
    assert "--format=x86_64-efi --directory=/usr/lib/grub/x86_64-efi " in call
    assert call.endswith("core.efi part_gpt ext2 normal configfile search_fs_uuid")
    assert "boots from" not in guest.log


SHIM_NAMES = {
    "opensuse": ("shim.efi", "grub.efi", "MokManager.efi"),
    "ubuntu": ("shimx64.efi", "grubx64.efi", "mmx64.efi"),
}


@pytest.mark.parametrize("name", ["ubuntu", "fedora", "rhel8", "opensuse"])
def test_signed_loaders(name: str, deploy: Deploy) -> None:
    guest = deploy(name, **GPT)
    vendor = "redhat" if name == "rhel8" else name
    home = "grub" if name == "ubuntu" else "grub2"
    shim, grub, manager = SHIM_NAMES.get(name, ("shimx64.efi", "grubx64.efi", ""))
    config = f"search.fs_uuid {guest.boot_uuid} root\nset prefix=($root)/{home}\nconfigfile $prefix/grub.cfg\n"
    on_esp = {path: text for path, text in guest.files.items() if path.startswith("EFI/")}
    expected = {grub: f"PE /EFI/{vendor}\0 GRUB", "grub.cfg": config}
    if manager:
        expected[manager] = on_esp[f"EFI/BOOT/{manager}"]
    assert on_esp == {
        **{f"EFI/BOOT/{file}": text for file, text in {"BOOTX64.EFI": f"shim of {vendor}", **expected}.items()},
        **{f"EFI/{vendor}/{file}": text for file, text in {shim: f"shim of {vendor}", **expected}.items()},
    }
    assert not [call for call in guest.calls() if "mkimage" in call]


ENTRY = f"boot/loader/entries/{bootguests.MACHINE}-5.14.0.conf"


def test_fedora(deploy: Deploy) -> None:
    guest = deploy("fedora", **GPT)
    expected = f"root=UUID={guest.uuid} ro rhgb {ADDED}"
    assert f"\noptions {expected}\n" in guest.files[ENTRY]
    assert guest.files["etc/kernel/cmdline"] == f"{expected}\n"
    assert guest.files["boot/grub2/grub.cfg"].endswith("blscfg\n")
    assert 'GRUB_CMDLINE_LINUX="rhgb"\n' in guest.files["etc/default/grub"]


def test_rhel_8(deploy: Deploy) -> None:
    """The entries use a variable in GRUB's environment, which was on the ESP of the image."""
    guest = deploy("rhel8", **GPT)
    assert "\noptions $kernelopts $tuned_params\n" in guest.files[ENTRY]
    block = guest.files["boot/grub2/grubenv"]
    assert len(block) == 1024 and block.startswith("# GRUB Environment Block\nsaved_entry=")
    assert f"\nkernelopts=root=UUID={guest.uuid} ro crashkernel=auto rhgb {ADDED}\n#" in block
    assert "boot_success=0\n" in block
    assert 'GRUB_CMDLINE_LINUX="crashkernel=auto rhgb"\n' in guest.files["etc/default/grub"]


def test_rhel_9(deploy: Deploy) -> None:
    """/boot was a directory of the root, and is a partition now; the menu has the console at another speed."""
    guest = deploy("rhel9")
    entry = guest.files[ENTRY]
    assert "\nlinux /vmlinuz-5.14.0\ninitrd /initramfs-5.14.0.img $tuned_initrd\n" in entry
    kept = "no_timer_check crashkernel=1G-4G:192M $tuned_params"
    assert f"\noptions root=UUID={guest.uuid} {kept} {ADDED}\n" in entry


def test_alpine(deploy: Deploy) -> None:
    guest = deploy("alpine", **GPT)
    line = command_line(guest.files["boot/grub/grub.cfg"])
    assert line == f"root=UUID={guest.uuid} ro  {ADDED} modules=sd-mod,usb-storage,ext4 rootfstype=ext4"
    assert "boots from UEFI only" in guest.log and not [call for call in guest.calls() if "install" in call]


def test_alpine_with_extlinux(deploy: Deploy) -> None:
    guest = deploy("alpine-extlinux")
    menu = guest.files["boot/extlinux.conf"]
    assert menu.startswith("SERIAL 0 38400\n")
    assert command_line(menu, "APPEND").split() == (
        f"root=UUID={guest.uuid} modules=sd-mod,usb-storage,ext4 rootfstype=ext4 {ADDED}".split()
    )
    assert guest.once() == ["extlinux --install /boot", "update-extlinux "]


def test_extlinux_has_its_boot_code(deploy: Deploy, tmp_path: Path) -> None:
    deploy("alpine-extlinux")
    (path,) = tmp_path.glob("disk*")
    with path.open("rb") as disk:
        start = disk.read(512)
    assert start.startswith(b"boot code\0") and start[510:] == b"\x55\xaa" and len(partitions(path)) == 3


def test_grub_legacy(deploy: Deploy) -> None:
    guest = deploy("grub-legacy")
    menu = guest.files["boot/grub/menu.lst"]
    assert menu.startswith("serial --unit=0 --speed=38400\nterminal --timeout=5 serial console\n")
    assert "splashimage" not in menu and "(hd0,4)" not in menu
    assert f"\n# kopt=root=UUID={guest.uuid} ro {ADDED}\n# groot=(hd0,0)\n" in menu
    assert f"\nroot\t(hd0,0)\nkernel\t/boot/vmlinuz-2.6.32 root=UUID={guest.uuid} ro {ADDED}\n" in menu
    assert guest.files["boot/grub/e2fs_stage1_5"] == "1.5"
    calls = guest.once()
    assert calls[0] == "grub --batch --no-floppy --device-map=/dev/null"
    assert calls[1:] == ["device (hd0) /dev/sda", "root (hd0,0)", "setup (hd0)", "quit"]


# --- files of a guest -------------------------------------------------------------------------------------


def test_bios_only(deploy: Deploy) -> None:
    guest = deploy("gentoo", **GPT)
    assert "boots from BIOS only: the guest has no GRUB for UEFI" in guest.log
    assert not [path for path in guest.files if path.startswith("EFI")]


@pytest.mark.parametrize(
    ("name", "table", "why"),
    [("alpine", "msdos", "no GRUB for BIOS (UEFI takes PARTITION_TABLE=gpt)"), ("none", "gpt", "no GRUB")],
)
def test_nothing_to_boot_with(
    name: str, table: str, why: str, node: Node, disk: MakeDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bootguests.GUESTS, "none", {})
    result = create(node, disk(300), tmp_path, name, OSP_PARTITION_TABLE=table).failed("hook grub", why)
    assert "install GRUB 2 in the image" in result.log


def test_kernel_of_the_node(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk(300)
    create(node, target, tmp_path, "debian", INSTANCE_HV_kernel_path="/boot/vmlinuz").ok()
    with mounted(target, tmp_path / "mnt", partitions(target)[-1]) as top:
        assert not (top / "var/log/calls").exists()
        assert not (top / "etc/default/grub.d").exists()


def test_menu_without_a_system(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    broken = {"usr/sbin/grub-mkconfig": "#!/bin/sh\necho 'menuentry memtest { linux16 /memtest }' >\"$2\"\n"}
    create(node, disk(300), tmp_path, "arch", broken).failed("starts no system")


@pytest.mark.parametrize("arguments", ["a='b c'", "$(reboot)", "a;b", 'open="quote'])
def test_arguments_that_no_boot_loader_passes_on(arguments: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    target = disk(300)
    before = digest(target)
    create(node, target, tmp_path, "arch", OSP_KERNEL_ARGS=arguments).failed("KERNEL_ARGS", "boot loaders")
    assert digest(target) == before, "written to"


def test_hostile_loader(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """A loader larger than any real one, or a FIFO instead: the node does not read it."""
    target = disk(300)
    create(node, target, tmp_path, "fedora", {"boot/efi/EFI/fedora/mmx64.efi": "x" * (17 << 20)}, **GPT).failed(
        "/boot/efi/EFI/fedora/mmx64.efi", "bytes"
    )


# --- disks made elsewhere ---------------------------------------------------------------------------------

IMAGE = {"OSP_IMAGE_TYPE": "raw", "OSP_IMAGE_NAME": "image", "env": "create-kvm-network"}


def disk_image(
    node: Node, tmp_path: Path, layout: str, name: str, menu: str
) -> tuple[guestdisks.Guest, Callable[[Path], str]]:
    """Return a disk image of the guest `name`, and a function that reads the menu of a disk made from it."""
    tree = bootguests.guest(tmp_path / "tree", name)
    (tree / menu).parent.mkdir(parents=True, exist_ok=True)
    if not (tree / menu).exists():
        (tree / menu).write_text("\tlinux\t/boot/vmlinuz root=PARTUUID=1 ro console=tty1 console=ttyS0\n")
    made = guestdisks.LAYOUTS[layout](tmp_path / "image.raw", tree, tmp_path)
    made.path.rename(node.images / f"image-{trees.ARCH}.raw")
    (SITE / "hooks/grub").chmod(0o755)
    of_boot = layout == "xfs"

    def read(disk: Path) -> str:
        with mounted(disk, tmp_path / "mnt", guestdisks.place(disk, 2 if of_boot else made.root)) as top:
            return (top / (menu.replace("boot/", "", 1) if of_boot else menu)).read_text()

    return made, read


@pytest.mark.parametrize("arguments", ["", "x=1"])
def test_disk_image(arguments: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """The menu already has the console; the guest's own mkconfig adds the rest."""
    made, menu = disk_image(node, tmp_path, "cloud", "debian", "boot/grub/grub.cfg")
    target = disk(160)
    node.create(target, OSP_KERNEL_ARGS=arguments, **IMAGE).ok()
    with mounted(target, tmp_path / "mnt", guestdisks.place(target, made.root)) as top:
        calls = top / "var/log/calls"
        assert calls.exists() == bool(arguments)
        if arguments:
            assert calls.read_text() == "grub-mkconfig -o /boot/grub/grub.cfg\n"
    line = command_line(menu(target))
    if arguments:
        assert " ".join(line.split()) == f"root=LABEL=cloudimg-rootfs ro {CONSOLE} x=1 quiet"
    else:
        assert line == "root=PARTUUID=1 ro console=tty1 console=ttyS0"


def test_disk_image_with_entries(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    made, menu = disk_image(node, tmp_path, "xfs", "rhel9", ENTRY)
    target = disk(450)
    node.create(target, OSP_KERNEL_ARGS="x=1", **IMAGE).ok()
    kept = f"root=UUID={bootguests.OLD} no_timer_check crashkernel=1G-4G:192M $tuned_params"
    assert f"\noptions {kept} {CONSOLE} x=1\n" in menu(target)
    assert "\nlinux /boot/vmlinuz-5.14.0\n" in menu(target)
    with mounted(target, tmp_path / "mnt", guestdisks.place(target, made.root), "ro,nouuid") as top:
        assert not (top / "var/log/calls").exists()


def test_import_of_dumps(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """Backups of ganeti-instance-image contain no boot loader."""
    old = guestdisks.ancestor(tmp_path / "old.img", bootguests.guest(tmp_path / "tree", "gentoo"), tmp_path)
    stage = tmp_path / "stage"
    stage.mkdir()
    for name, number in (("boot", 1), ("root", 3)):
        part = guestdisks.place(old.path, number)
        assert part
        with attached(old.path, part.start, part.size, read_only=True) as device:
            run("dump", "-0", "-q", "-z9", "-f", stage / f"{name}.dump", device)
    stream = tmp_path / "stream"
    run("tar", "--create", "--file", stream, "--directory", stage, "boot.dump", "root.dump")
    (SITE / "hooks/grub").chmod(0o755)
    target = disk(300)
    restore(node, stream, target, INSTANCE_HV_serial_console="True", INSTANCE_HV_serial_speed="9600").ok()
    guest = inspected(target, tmp_path, "")
    line = command_line(guest.files["boot/grub/grub.cfg"])
    assert line.split() == f"root=UUID={guest.uuid} ro console=tty0 console=ttyS0,9600n8".split()
    assert len(guest.calls()) == 2


def test_import_of_a_whole_disk(node: Node, disk: MakeDisk, tmp_path: Path, deploy: Deploy) -> None:
    """The disk has its boot loader: no program runs, whatever IMAGE_TYPE and KERNEL_ARGS are."""
    before = deploy("gentoo").calls()
    (path,) = tmp_path.glob("disk*")
    stream = exported(node, path)
    target = disk(300)
    node.hook("hook", '#!/bin/sh\necho "$IMAGEOS_ACTION of $IMAGE_TYPE"\n')
    node.defaults("IMPORT_HOOKS='grub hook'")
    log = restore(node, stream, target, OSP_KERNEL_ARGS="other=1").ok().log
    assert "hook: import of raw" in log and "hook grub" in log
    assert inspected(target, tmp_path, "").calls() == before
