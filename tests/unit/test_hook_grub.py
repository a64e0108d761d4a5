"""Kernel command lines in a guest's files, loaders on its ESP, and the decisions of the hook `grub`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hookfiles import hook_module
from hypothesis import given
from hypothesis import strategies as st

from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.guests import bootconfig, esp, initramfs
from imageos.guests.bootconfig import Change
from imageos.guests.target import READ_LIMIT, Target
from imageos.hook import Hook
from imageos.settings import Settings

OLD, NEW = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
ADD = Change(("console=tty0", "console=ttyS0,38400n8", "x=1"))
MOVE = Change(ADD.add, NEW, "xfs", "")

# Words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("  quiet\tro \n", ["quiet", "ro"]),
        ('dyndbg="file x.c +p" quiet', ['dyndbg="file x.c +p"', "quiet"]),
        ('"whole word" a"b c"d', ['"whole word"', 'a"b c"d']),
        ('open="to the end', ['open="to the end']),
    ],
)
def test_split(line: str, words: list[str]) -> None:
    assert bootconfig.split(line) == words


@given(st.text(alphabet='ab="  \t'))
def test_words_hold_all_but_spaces(line: str) -> None:
    assert "".join("".join(bootconfig.split(line)).split()) == "".join(line.split())


@pytest.mark.parametrize(
    "text", ["a='b c'", "a$b", "a;b", "`id`", "a\\b", 'a="b', "a&b", 'x="$y"', "a #b", "{x", "a }"]
)
def test_arguments_that_no_menu_passes_on(text: str) -> None:
    with pytest.raises(Failure, match="KERNEL_ARGS="):
        bootconfig.arguments(text)


@pytest.mark.parametrize(
    "text", ["", "a=b c", 'a="b;c" {x}', "memmap=1G!2G", "isolcpus=1-3,5", 'a="b c"', "a#b", 'a="{" "#b"']
)
def test_arguments(text: str) -> None:
    assert " ".join(bootconfig.arguments(text)) == text


# Whole command lines


@pytest.mark.parametrize(
    ("change", "line", "expected"),
    [
        (ADD, "root=/dev/sda1 ro", "root=/dev/sda1 ro console=tty0 console=ttyS0,38400n8 x=1"),
        (ADD, "x=1 ro x=2", "ro x=2 console=tty0 console=ttyS0,38400n8 x=1"),
        (ADD, "console=ttyS0 console=tty1", "console=tty1 console=tty0 console=ttyS0,38400n8 x=1"),
        (ADD, "console=ttyS0,115200 console=ttyS1", "console=ttyS1 console=tty0 console=ttyS0,38400n8 x=1"),
        (Change(()), "root=LABEL=x  ro", "root=LABEL=x ro"),
        (
            Change((), NEW, "xfs"),
            f"ro root=UUID={OLD} rootflags=subvol=@ rootfstype=ext4",
            f"root=UUID={NEW} ro rootfstype=xfs",
        ),
        (
            Change((), NEW),
            "cryptdevice=UUID=1:root luks.uuid=2 rd.luks.name=3=a rd.luks=0 rd.dm.uuid=4 real_root=/dev/sda3 quiet",
            f"root=UUID={NEW} rd.luks=0 quiet",
        ),
        (Change((), NEW), "root=/dev/mapper/a-b rd.lvm.lv=a/b resume=/dev/mapper/a-s rhgb", f"root=UUID={NEW} rhgb"),
        (Change((), NEW), "", f"root=UUID={NEW}"),
    ],
)  # fmt: skip
def test_whole_line(change: Change, line: str, expected: str) -> None:
    assert change.whole(line) == expected
    assert change.whole(expected) == expected


@pytest.mark.parametrize(
    ("line", "made"),
    [
        ("root=x ro console=ttyS0,38400n8 x=1", True),
        ("root=x console=tty1 console=ttyS0,115200 x=1", True),
        ("root=x console=ttyS1 x=1", False),
        ("root=x console=ttyS0", False),
        ("root=x console=ttyS0 x=12", False),
    ],
)
def test_is_made(line: str, made: bool) -> None:
    assert ADD.is_made(line) == made


# Files


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('GRUB_CMDLINE_LINUX="x=1 quiet console=ttyS0"\n', 'GRUB_CMDLINE_LINUX="quiet"\n'),
        ("GRUB_CMDLINE_LINUX='a=\"b c\" x=1' # why\n", "GRUB_CMDLINE_LINUX='a=\"b c\"' # why\n"),
        ("export GRUB_CMDLINE_LINUX_DEFAULT=x=1", "export GRUB_CMDLINE_LINUX_DEFAULT="),
        ('GRUB_CMDLINE_LINUX="x=2 console=tty1"\n', 'GRUB_CMDLINE_LINUX="x=2 console=tty1"\n'),  # comes before ours
        ('GRUB_CMDLINE_LINUX_DEFAULT="x=2 y=2 console=tty1 x"\n', 'GRUB_CMDLINE_LINUX_DEFAULT="y=2"\n'),
        ('GRUB_CMDLINE_LINUX+=" x=1"', 'GRUB_CMDLINE_LINUX+=""'),
        ('GRUB_CMDLINE_LINUX="$OTHER x=1"', 'GRUB_CMDLINE_LINUX="$OTHER"'),
        ('GRUB_CMDLINE_LINUX="a\n  x=1 b"\nB=2\n', 'GRUB_CMDLINE_LINUX="a b"\nB=2\n'),
        (f'GRUB_CMDLINE_LINUX="root=UUID={OLD} resume=/dev/x a"', 'GRUB_CMDLINE_LINUX="a"'),
    ],
)
def test_without(before: str, after: str) -> None:
    assert bootconfig.without(before, bootconfig.GRUB_VARIABLES, MOVE) == after
    assert bootconfig.without(after, bootconfig.GRUB_VARIABLES, MOVE) == after


@pytest.mark.parametrize(
    "text",
    [
        "",
        'GRUB_CMDLINE_LINUX="quiet  splash"\n',
        '# GRUB_CMDLINE_LINUX="x=1"\n',
        'GRUB_CMDLINE_LINUX_RECOVERY="x=1"\n',
        'MY_GRUB_CMDLINE_LINUX="x=1"\n',
        'GRUB_CMDLINE_LINUX="a \\"b\\" x=1"\n',
        "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX \"'x=1'\n",
        'GRUB_CMDLINE_LINUX=`echo x=1`\nGRUB_CMDLINE_LINUX=$(echo x=1)\n',
        'GRUB_CMDLINE_LINUX=x=1 command\n',
    ],
)  # fmt: skip
def test_what_is_not_understood_stays(text: str) -> None:
    assert bootconfig.without(text, bootconfig.GRUB_VARIABLES, MOVE) == text


@pytest.mark.parametrize("text", ["", "A=1", "A=1\n\n"])
def test_block(text: str) -> None:
    once = bootconfig.with_block(text, "B=1\n")
    assert once.startswith(text) and once.count("B=1") == 1
    assert bootconfig.with_block(once, "B=1\n") == once
    changed = bootconfig.with_block(once + "C=1\n", "B=2\n")
    assert "B=1" not in changed and changed.endswith("B=2\n# imageos: end\n") and "C=1\n" in changed


def test_appending_is_one_word_for_the_shell() -> None:
    (line,) = bootconfig.append_arguments("A", Change(('a="b c"', "it's")))
    assert line == """A="$A "'a="b c" it'"'"'s'"""
    assert bootconfig.append_arguments("A", Change(())) == []


ENTRY = f"""title Fedora
linux {{boot}}/vmlinuz-6
initrd {{boot}}/initramfs-6.img $tuned_initrd
options root=UUID={OLD} ro
id x
"""


@pytest.mark.parametrize("before", ["", "/boot"])
@pytest.mark.parametrize("after", ["", "/boot"])
def test_entry(before: str, after: str) -> None:
    change = Change(("x=1",), NEW, "xfs", after)
    expected = ENTRY.format(boot=after).replace(OLD, NEW).replace(" ro\n", " ro x=1\n")
    assert bootconfig.loader_entry(ENTRY.format(boot=before), change) == expected
    assert bootconfig.loader_entry(expected, change) == expected


def test_entry_of_a_disk_image_keeps_its_root() -> None:
    before = ENTRY.format(boot="/boot")
    assert bootconfig.loader_entry(before, Change(("x=1",))) == before.replace(" ro\n", " ro x=1\n")


def test_entry_with_several_options() -> None:
    text = f"options root=UUID={OLD} ro\nid x\noptions\tresume=/dev/x quiet"
    assert bootconfig.loader_entry(text, Change(("x=1",), NEW)) == f"options root=UUID={NEW} ro quiet x=1\nid x\n"


def test_entry_with_a_variable() -> None:
    text = "linux /vmlinuz\noptions $kernelopts $tuned_params\n"
    assert bootconfig.loader_entry(text, MOVE) == text


BLOCK = ("# GRUB Environment Block\nsaved_entry=0\nkernelopts=root=/dev/sda1 ro quiet \nboot_success=1\n").ljust(
    1024, "#"
)


@pytest.mark.parametrize("text", [BLOCK, BLOCK.rstrip("#"), ""])
def test_environment_block(text: str) -> None:
    made = bootconfig.environment_block(text, "kernelopts", MOVE)
    assert len(made) == 1024
    assert f"\nkernelopts=root=UUID={NEW} ro {'quiet ' * bool(text)}console=tty0 " in made
    assert ("saved_entry=0\nboot_success=1\n" in made) == bool(text)
    assert bootconfig.environment_block(made, "kernelopts", MOVE) == made


def test_environment_block_that_is_full() -> None:
    with pytest.raises(Failure, match="no room for kernelopts"):
        bootconfig.environment_block(f"a={'x' * 1000}\n", "kernelopts", MOVE)


MENU_LST = """default 0
terminal console
# kopt=root=UUID=1 ro
# groot=abc
title Old
uuid 1234-5678
kernel /boot/vmlinuz root=UUID=1 ro
title memtest
root (hd0,4)
kernel /boot/memtest86+.bin
"""


def test_menu_of_grub_legacy() -> None:
    made = bootconfig.legacy_menu(MENU_LST, Change(("x=1",), NEW), "(hd0,0)", 9600)
    assert f"# kopt=root=UUID={NEW} ro x=1\n" in made and f"vmlinuz root=UUID={NEW} ro x=1\n" in made
    assert made.count("root\t(hd0,0)") == 1 and made.count("(hd0,0)") == 2
    assert "kernel /boot/memtest86+.bin\n" in made and "terminal console" not in made
    assert bootconfig.legacy_menu(made, Change(("x=1",), NEW), "(hd0,0)", 9600) == made
    assert bootconfig.legacy_menu(MENU_LST, Change(()), "(hd0,0)", 0) == MENU_LST


GRUB_CFG = """if [ x$feature = xy ]; then
\tsearch --no-floppy --fs-uuid --set=root 1-2
fi
\tlinux\t/vmlinuz-1 root=/dev/mapper/a-b ro quiet rd.lvm.lv=a/b
\tinitrd /initrd-1
\t\tlinux16 /vmlinuz-1 root=/dev/mapper/a-b ro single
\tlinux /memtest
"""


def test_menu_of_grub_keeps_a_root_on_lvm() -> None:
    made = bootconfig.grub_menu(GRUB_CFG, Change(("quiet", "x=1")))
    assert "\tlinux\t/vmlinuz-1 root=/dev/mapper/a-b ro rd.lvm.lv=a/b quiet x=1\n" in made
    assert "\t\tlinux16 /vmlinuz-1 root=/dev/mapper/a-b ro single quiet x=1\n" in made
    assert bootconfig.grub_menu(made, Change(("quiet", "x=1"))) == made
    assert [line for line in made.splitlines() if "vmlinuz" not in line] == [
        line for line in GRUB_CFG.splitlines() if "vmlinuz" not in line
    ]


@pytest.mark.parametrize(
    ("menu", "lines"),
    [
        ("\tlinux\t/vmlinuz root=UUID=1 ro  quiet\n\tinitrd /i\n", ["root=UUID=1 ro  quiet"]),
        ("  linux16 /memtest\n  linuxefi /v root=x\n", ["root=x"]),
        ("linux /v root=x single\nlinux /v root=x recovery nomodeset\n", []),
        ("title x\nlinux /v\noptions root=x $y\n", ["root=x $y"]),
        ("LABEL a\n  LINUX v\n  APPEND root=x y\n", ["root=x y"]),
        ("kernel /xen.gz dom0\nmodule /v root=x\n", ["root=x"]),
        ("# kernel /v root=x\nset kernelopts=\"root=x\"\n", []),
        ("# GRUB Environment Block\nkernelopts=root=x ro\n###", ["root=x ro"]),
    ],
)  # fmt: skip
def test_command_lines(menu: str, lines: list[str]) -> None:
    assert bootconfig.command_lines(menu) == lines


# The ESP


@pytest.mark.parametrize(
    ("grub", "found"),
    [
        (b"..\0/EFI/debian\0..", ["debian"]),
        (b"/EFI/BOOT\0/EFI/boot\0/EFI/../x\0/EFI/a/b\0/EFI/\0", []),
        (b"".join(b"/EFI/v%d\0" % n for n in range(9)), ["v0", "v1", "v2", "v3"]),
    ],
)
def test_vendors(grub: bytes, found: list[str]) -> None:
    assert esp.vendors(grub) == found


def test_loader_that_is_too_large(guest: Path, target: Target) -> None:
    (guest / "usr/lib/shim").mkdir(parents=True)
    with (guest / "usr/lib/shim/shimx64.efi.signed").open("wb") as file:
        file.truncate(esp.LARGEST + 1)
    with pytest.raises(Failure, match="shimx64.efi.signed has 16777217 bytes"):
        esp.signed_loaders(target, esp.FIRMWARE["x86_64"], "")


def test_loader_that_leads_out_of_the_guest(guest: Path, target: Target, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the node's own")
    for name in ("usr/lib/shim/shimx64.efi.signed", "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"):
        (guest / name).parent.mkdir(parents=True)
        (guest / name).symlink_to(tmp_path / "secret")
    assert esp.signed_loaders(target, esp.FIRMWARE["x86_64"], "") == {}


# Decisions of the hook


GRUB = hook_module("grub")
MENU = "linux /vmlinuz root=UUID=1 ro console=ttyS0,115200\n"


class Seen:
    """The programs that a hook ran, and the files that it put on the ESP."""

    def __init__(self) -> None:
        self.programs: list[str] = []
        self.esp: dict[str, bytes] = {}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Record the guest's programs; those whose output is read back write it."""
    seen = Seen()

    def run(self: Target, argv: Sequence[str], input: str | None = None) -> str:
        seen.programs.append(argv[0].rpartition("/")[2])
        if argv[0].endswith("mkconfig"):
            self.write(argv[2], MENU)
        for output in [word.partition("=")[2] for word in argv if word.startswith("--output=")]:
            self.write(output, "core image")
        return ""

    monkeypatch.setattr(Target, "run", run)
    monkeypatch.setattr(esp, "write", lambda device, files: seen.esp.update(files))
    return seen


def call(
    target: Target,
    action: str = "create",
    *,
    image_type: str = "tarball",
    kernel_path: str = "",
    serial: bool = True,
    table: str = "gpt",
    arch: str = "x86_64",
    kernel_args: str = "",
    root: str = "/dev/loop0p4",
) -> None:
    volumes = [Volume("boot", "ext4", "/dev/loop0p3", OLD, "/boot"), Volume("root", "ext4", root, NEW, "/")]
    if table == "gpt":
        volumes.append(Volume("esp", "vfat", "/dev/loop0p2", "ABCD-1234"))
    instance = Instance("inst1", "kvm", 256, (), (), kernel_path, serial, 38400, False)
    settings = Settings(image_type=image_type, kernel_args=kernel_args, arch=arch)
    GRUB.main(Hook(action, target, settings, instance, "/dev/loop0", tuple(volumes), (), {}))


def plant(guest: Path, *names: str, name: str = "grub", menu: str = "") -> None:
    """Make a guest with GRUB 2 for the platforms `names`."""
    for program in ("install", "mkconfig", "mkimage"):
        path = guest / f"usr/sbin/{name}-{program}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.chmod(0o755)
    for platform in names:
        (guest / "usr/lib/grub" / platform).mkdir(parents=True)
    if menu:
        (guest / "boot" / name).mkdir(parents=True)
        (guest / "boot" / name / "grub.cfg").write_text(menu)


BIOS, UEFI = "i386-pc", "x86_64-efi"
INSTALL, MKIMAGE, MKCONFIG = "grub-install", "grub-mkimage", "grub-mkconfig"


@pytest.mark.parametrize(
    ("has", "table", "programs", "said"),
    [
        ([BIOS, UEFI], "gpt", [MKIMAGE, INSTALL, MKCONFIG], ""),
        ([BIOS, UEFI], "msdos", [INSTALL, MKCONFIG], ""),
        ([BIOS], "gpt", [INSTALL, MKCONFIG], "from BIOS only"),
        ([UEFI], "gpt", [MKIMAGE, MKCONFIG], "from UEFI only"),
    ],
)
def test_firmware(
    has: list[str], table: str, programs: list[str], said: str, guest: Path, target: Target, seen: Seen,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plant(guest, *has)
    call(target, table=table)
    assert seen.programs == programs
    assert seen.esp == ({"EFI/BOOT/BOOTX64.EFI": b"core image"} if MKIMAGE in programs else {})
    printed = capfd.readouterr().err
    assert said in printed and bool(said) == bool(printed)


@pytest.mark.parametrize(
    ("maker", "image_type", "arguments", "added"),
    [
        ("etc/initramfs-tools", "tarball", "", True),
        ("usr/lib/dracut", "dump", "quiet", True),
        ("etc/initramfs-tools", "qcow2", "", False),  # its swap is where it was
        ("etc/initramfs-tools", "tarball", "resume=/dev/vda2", False),
        ("etc/mkinitfs", "tarball", "", False),
    ],
)
def test_initramfs_does_not_wait_for_the_swap_of_the_image(
    maker: str, image_type: str, arguments: str, added: bool, guest: Path, target: Target, seen: Seen
) -> None:
    plant(guest, BIOS, menu=GRUB_CFG)
    (guest / maker).mkdir(parents=True)
    call(target, image_type=image_type, kernel_args=arguments, table="msdos", root="/dev/loop0p1")
    assert (" noresume'" in (guest / "etc/default/grub").read_text()) == added


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("RESUME=UUID=1\n", ""),
        ("# RESUME=x\n export RESUME='/dev/sda5'\nBUSYBOX=y\n", "# RESUME=x\nBUSYBOX=y\n"),
        ("RESUME=none\n", "RESUME=none\n"),
        ('RESUME="auto" # comment\n', 'RESUME="auto" # comment\n'),
        ("RESUME=\n", "RESUME=\n"),
        ("RESUME=autofs\nX=1", "X=1"),
    ],
)
def test_swap_of_the_image_is_forgotten(before: str, after: str, guest: Path, target: Target) -> None:
    for path in ("initramfs.conf", "conf.d/resume"):
        target.write(f"/etc/initramfs-tools/{path}", before)
    assert initramfs.forget_swap(target) == (before != after)
    for path in ("initramfs.conf", "conf.d/resume"):
        assert target.read(f"/etc/initramfs-tools/{path}") == after
    assert not initramfs.forget_swap(target)


def test_a_root_on_lvm_keeps_its_name(guest: Path, target: Target, seen: Seen) -> None:
    """Its loop device has a name that begins like that of the disk, and is none of its partitions."""
    plant(guest, BIOS, menu=GRUB_CFG)
    call(target, image_type="qcow2", root="/dev/loop01", kernel_args="x=1")
    assert seen.programs == []
    assert "root=/dev/mapper/a-b ro quiet rd.lvm.lv=a/b console=tty0" in (guest / "boot/grub/grub.cfg").read_text()
    assert "x=1" in (guest / "etc/default/grub").read_text()
    call(target, image_type="qcow2", kernel_args="x=2")
    assert seen.programs == [MKCONFIG]


@pytest.mark.parametrize(
    ("arch", "platform", "loader"),
    [
        ("aarch64", "arm64-efi", "BOOTAA64.EFI"),
        ("arm64", "arm64-efi", "BOOTAA64.EFI"),
        ("x86", "i386-efi", "BOOTIA32.EFI"),
    ],
)
def test_architectures(arch: str, platform: str, loader: str, guest: Path, target: Target, seen: Seen) -> None:
    plant(guest, platform, "x86_64-efi")
    call(target, arch=arch)
    assert list(seen.esp) == [f"EFI/BOOT/{loader}"]


@pytest.mark.parametrize(("has", "table"), [([], "gpt"), ([UEFI], "msdos"), (["arm64-efi"], "gpt")])
def test_no_firmware(has: list[str], table: str, guest: Path, target: Target, seen: Seen) -> None:
    plant(guest, *has)
    with pytest.raises(Failure, match="no GRUB for BIOS") as raised:
        call(target, table=table)
    assert "chmod -x /etc/ganeti/instance-image/hooks/grub" in str(raised.value.hint) and not seen.programs


def test_no_boot_loader(target: Target, seen: Seen) -> None:
    with pytest.raises(Failure, match="no GRUB .* nor another boot loader"):
        call(target)


@pytest.mark.parametrize("program", ["update-extlinux", "grub"])
def test_boot_loader_that_cannot_read_a_gpt(program: str, guest: Path, target: Target, seen: Seen) -> None:
    plant(guest, name="none")
    (guest / "usr/sbin" / program).touch(0o755)
    (guest / "boot/grub").mkdir(parents=True)
    (guest / "boot/grub/menu.lst").touch()
    with pytest.raises(Failure, match="cannot read a gpt") as raised:
        call(target)
    assert raised.value.hint == "set PARTITION_TABLE=msdos" and not seen.programs


@pytest.mark.parametrize(
    ("action", "image_type", "kernel_path", "works"),
    [
        ("create", "tarball", "", True),
        ("create", "dump", "", True),
        ("create", "tarball", "/boot/vmlinuz", False),
        ("import", "dump", "", True),
        ("import", "dump", "/boot/vmlinuz", True),
        ("import", "raw", "", False),
        ("rename", "tarball", "", False),
    ],
)
def test_when(
    action: str, image_type: str, kernel_path: str, works: bool, guest: Path, target: Target, seen: Seen
) -> None:
    plant(guest, BIOS, menu="linux /v root=x\n")
    call(target, action, image_type=image_type, kernel_path=kernel_path)
    assert seen.programs == ([INSTALL, MKCONFIG] if works else [])
    assert (guest / "etc/default").exists() == works


def test_import_without_a_boot_loader_for_a_kernel_of_the_node(
    target: Target, seen: Seen, capfd: pytest.CaptureFixture[str]
) -> None:
    call(target, "import", image_type="dump", kernel_path="/boot/vmlinuz")
    assert "it boots a kernel of the node" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("menu", "arguments", "serial", "programs"),
    [
        (MENU, "", True, []),  # the console is already set
        (MENU, "", False, []),
        (MENU, "ro", True, []),
        (MENU, "x=1", True, [MKCONFIG]),
        ("linux /v root=x\n", "", True, [MKCONFIG]),
        ("linux /v root=x\n", "", False, []),
        (MENU + "linux /v root=x\n", "", True, [MKCONFIG]),  # each system counts
    ],
)
def test_disk_image(
    menu: str, arguments: str, serial: bool, programs: list[str], guest: Path, target: Target, seen: Seen
) -> None:
    plant(guest, BIOS, UEFI, menu=menu)
    call(target, image_type="qcow2", kernel_args=arguments, serial=serial)
    assert seen.programs == programs and not seen.esp
    settings = (guest / "etc/default/grub").read_text() if programs else ""
    assert "GRUB_DISABLE_LINUX_UUID" not in settings, "its root is its own business"


def test_disk_image_with_entries(guest: Path, target: Target, seen: Seen) -> None:
    """mkconfig does not run: it would write to a place where the guest's menu may not be."""
    plant(guest, BIOS, name="grub2", menu="blscfg\n")
    entry = guest / "boot/loader/entries/a.conf"
    entry.parent.mkdir(parents=True)
    entry.write_text(ENTRY.format(boot=""))
    call(target, image_type="qemu", kernel_args="x=1", serial=False)
    assert entry.read_text() == ENTRY.format(boot="").replace(" ro\n", " ro x=1\n")
    assert seen.programs == []


def test_disk_image_with_a_menu_elsewhere(
    guest: Path, target: Target, seen: Seen, capfd: pytest.CaptureFixture[str]
) -> None:
    plant(guest, UEFI)
    call(target, image_type="raw", kernel_args="x=1")
    assert "no boot menu of the guest is known that could have console=tty0" in capfd.readouterr().err
    assert seen.programs == [] and not (guest / "etc").exists()


def test_menu_that_names_a_device_of_the_node(
    guest: Path, target: Target, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(guest, BIOS)
    monkeypatch.setattr(f"{__name__}.MENU", "linux /vmlinuz root=/dev/loop0p4 ro\n")
    with pytest.raises(Failure, match="starts no system by the UUID of its root"):
        call(target)


def test_own_console(guest: Path, target: Target, seen: Seen) -> None:
    """A console in KERNEL_ARGS replaces the default console."""
    plant(guest, BIOS)
    call(target, kernel_args="console=ttyS1,9600")
    line = (guest / "etc/default/grub").read_text().splitlines()[-2]
    assert line == 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX "console=ttyS1,9600'


@pytest.mark.parametrize(
    "change",
    [
        lambda text: bootconfig.legacy_menu(f"kernel x{' ' * len(text)}\n{text}", MOVE, "(hd0,0)", 9600),
        lambda text: bootconfig.with_block(f"{bootconfig.BEGIN}\n" * (len(text) // len(bootconfig.BEGIN)), "x\n"),
    ],
)
def test_a_text_that_takes_hours(change: Callable[[str], str]) -> None:
    begin = time.process_time()
    change("a" * READ_LIMIT)
    assert time.process_time() - begin < 5
