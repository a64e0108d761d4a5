"""Boot files of guests of many distributions, with stand-ins for their programs.

A stand-in logs its command line to /var/log/calls, and makes what the next one needs. Only the programs are invented:
configuration, modules, loaders and menus have their real paths and contents.
"""

from __future__ import annotations

from pathlib import Path

import trees

OLD = "11111111-2222-4333-8444-555555555555"  # UUID of the root that the image was taken from
MACHINE = "0123456789abcdef0123456789abcdef"
RECORD = '#!/bin/sh\necho "${0##*/} $*" >>/var/log/calls\n'
# Takes the UUID of the new root from the fstab that imageos wrote; a real one asks the kernel.
MKCONFIG = (
    RECORD
    + r"""
. /etc/default/grub
SNIPPETS
uuid=$(awk '$2 == "/" { print $1 }' /etc/fstab)
[ "$GRUB_DISABLE_OS_PROBER" = true ] || exit 9
[ "${GRUB_FORCE_PARTUUID:-}" = "" ] || uuid=PARTUUID=$GRUB_FORCE_PARTUUID
[ "${GRUB_DISABLE_LINUX_UUID:-}" != true ] || uuid=/dev/sda1
{
  echo "# terminal ${GRUB_TERMINAL:-console}: ${GRUB_SERIAL_COMMAND:-}"
  if [ "${GRUB_ENABLE_BLSCFG:-}" = true ]; then echo blscfg; else
    echo "menuentry 'Linux' {"
    echo "	linux	/vmlinuz-1 root=$uuid ro $GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"
    echo "	initrd	/initrd-1"
    echo "}"
  fi
} >"$2"
"""
)
SNIPPETS = 'for x in /etc/default/grub.d/*.cfg ; do\n  if [ -e "${x}" ]; then\n    . "${x}"\n  fi\ndone'
MKIMAGE = (
    RECORD
    + r"""
for word; do
  case $word in --config=*) config=${word#*=} ;; --output=*) output=${word#*=} ;; esac
done
{ echo "core image"; cat "$config"; } >"$output"
"""
)
EXTLINUX = (
    RECORD
    + r"""
. /etc/update-extlinux.conf
printf 'SERIAL %s %s\nLABEL lts\n  LINUX vmlinuz-lts\n  APPEND root=%s modules=%s %s\n' \
  "$serial_port" "$serial_baud" "$root" "$modules" "$default_kernel_opts" >/boot/extlinux.conf
"""
)


def programs(name: str, *, snippets: bool = False) -> dict[str, str]:
    """Return grub-install and its relatives, with names that begin with `name`."""
    return {
        f"usr/sbin/{name}-install": RECORD,
        f"usr/sbin/{name}-mkconfig": MKCONFIG.replace("SNIPPETS", SNIPPETS if snippets else ""),
        f"usr/bin/{name}-mkimage": MKIMAGE,
    }


def modules(place: str, *platforms: str) -> dict[str, str]:
    names = ("normal", "part_gpt", "ext2", "search_fs_uuid", "configfile", "hello")
    return {f"{place}/{platform}/{name}.mod": "" for platform in platforms for name in names}


def loaders(directory: str, *, shim: str = "shimx64.efi", grub: str = "grubx64.efi", vendor: str) -> dict[str, str]:
    return {f"{directory}/{shim}": f"shim of {vendor}", f"{directory}/{grub}": f"PE /EFI/{vendor}\0 GRUB"}


def entry(options: str, boot: str = "") -> dict[str, str]:
    """Return an entry as kernel-install makes it; `boot` is /boot if that is a directory of the root."""
    return {
        f"boot/loader/entries/{MACHINE}-5.14.0.conf": "title Linux (5.14.0)\nversion 5.14.0\n"
        f"linux {boot}/vmlinuz-5.14.0\ninitrd {boot}/initramfs-5.14.0.img $tuned_initrd\noptions {options}\n"
        "grub_users $grub_users\ngrub_class kernel\n"
    }


GUESTS: dict[str, dict[str, str]] = {
    "debian": {
        **programs("grub", snippets=True),
        **modules("usr/lib/grub", "i386-pc", "x86_64-efi"),
        "etc/default/grub": "GRUB_DEFAULT=0\nGRUB_TIMEOUT=5\nGRUB_DISTRIBUTOR=`lsb_release -i -s 2> /dev/null || echo "
        'Debian`\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX=""\n',
    },
    # an unpacked cloud image: its snippets override /etc/default/grub
    "ubuntu": {
        **programs("grub", snippets=True),
        **modules("usr/lib/grub", "i386-pc", "x86_64-efi"),
        **loaders("usr/lib/shim", shim="shimx64.efi.signed", grub="mmx64.efi.signed", vendor="ubuntu"),
        "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed": "PE /EFI/ubuntu\0 GRUB",
        "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet splash"\nGRUB_CMDLINE_LINUX=""\nGRUB_TERMINAL=console\n',
        "etc/default/grub.d/50-cloudimg-settings.cfg": "GRUB_RECORDFAIL_TIMEOUT=0\nGRUB_TIMEOUT=0\n"
        'GRUB_CMDLINE_LINUX_DEFAULT="console=tty1 console=ttyS0 nomodeset"\nGRUB_TERMINAL=console\n',
        "etc/default/grub.d/40-force-partuuid.cfg": "GRUB_FORCE_PARTUUID=01020304-0506-0708\n",
    },
    "fedora": {
        **programs("grub2"),
        **modules("usr/lib/grub", "i386-pc"),
        **loaders("boot/efi/EFI/fedora", vendor="fedora"),
        **entry(f"root=UUID={OLD} ro rootflags=subvol=root rhgb quiet"),
        "etc/default/grub": 'GRUB_TIMEOUT=5\nGRUB_DISTRIBUTOR="$(sed \'s, release .*$,,g\' /etc/system-release)"\n'
        'GRUB_TERMINAL_OUTPUT="console"\nGRUB_CMDLINE_LINUX="rhgb quiet"\nGRUB_ENABLE_BLSCFG=true\n',
        "etc/kernel/cmdline": f"root=UUID={OLD} ro rootflags=subvol=root rhgb quiet\n",
    },
    "rhel8": {
        **programs("grub2"),
        **modules("usr/lib/grub", "i386-pc"),
        **loaders("boot/efi/EFI/redhat", vendor="redhat"),
        **entry("$kernelopts $tuned_params"),
        "boot/efi/EFI/redhat/grubenv": f"# GRUB Environment Block\nsaved_entry={MACHINE}-5.14.0\nkernelopts=root=/dev/"
        "mapper/rhel-root ro crashkernel=auto resume=/dev/mapper/rhel-swap rd.lvm.lv=rhel/root rhgb \nboot_success=0\n",
        "etc/default/grub": 'GRUB_DEFAULT=saved\nGRUB_DISABLE_SUBMENU=true\nGRUB_TERMINAL_OUTPUT="console"\n'
        'GRUB_CMDLINE_LINUX="crashkernel=auto resume=/dev/mapper/rhel-swap rd.lvm.lv=rhel/root rhgb"\n'
        'GRUB_ENABLE_BLSCFG=true\n',
    },
    "rhel9": {
        **programs("grub2"),
        **modules("usr/lib/grub", "i386-pc"),
        **entry(
            f"root=UUID={OLD} console=tty0 console=ttyS0,115200n8 no_timer_check crashkernel=1G-4G:192M $tuned_params",
            "/boot",
        ),
        "etc/default/grub": 'GRUB_TERMINAL_OUTPUT="console"\nGRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200n8 '
        'no_timer_check"\nGRUB_ENABLE_BLSCFG=true\n',
    },
    "opensuse": {
        **programs("grub2"),
        **modules("usr/share/grub2", "i386-pc", "x86_64-efi"),
        **loaders("usr/share/efi/x86_64", shim="shim.efi", grub="grub.efi", vendor="opensuse"),
        "usr/share/efi/x86_64/MokManager.efi": "MokManager of opensuse",
        "boot/grub2/device.map": "(hd0) /dev/disk/by-id/ata-of-the-image\n",
        "etc/default/grub": 'GRUB_CMDLINE_LINUX=""\nGRUB_CMDLINE_LINUX_DEFAULT="splash=silent '
        'resume=/dev/disk/by-uuid/1 mitigations=auto quiet"\nGRUB_TERMINAL="gfxterm"\n',
    },
    "arch": {
        **programs("grub"),
        **modules("usr/lib/grub", "i386-pc", "x86_64-efi"),
        "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="loglevel=3 quiet"\nGRUB_CMDLINE_LINUX=""\n'
        '#GRUB_TERMINAL_OUTPUT=console\n#GRUB_DISABLE_LINUX_UUID=true\n',
    },
    "alpine": {
        **programs("grub"),
        **modules("usr/lib/grub", "x86_64-efi"),
        "etc/default/grub": 'GRUB_TIMEOUT=2\nGRUB_DISABLE_SUBMENU=y\nGRUB_DISABLE_RECOVERY=true\n'
        'GRUB_CMDLINE_LINUX_DEFAULT="modules=sd-mod,usb-storage,ext4 quiet rootfstype=ext2"\n',
    },
    "alpine-extlinux": {
        "sbin/update-extlinux": EXTLINUX,
        "sbin/extlinux": RECORD,
        "usr/share/syslinux/mbr.bin": "boot code",
        "etc/update-extlinux.conf": '# configuration for extlinux config builder\noverwrite=1\nvesa_menu=0\n'
        f'default_kernel_opts="quiet rootfstype=ext2"\nmodules=sd-mod,usb-storage,ext4\nroot=UUID={OLD}\nverbose=0\n'
        'default=lts\nserial_port=\nserial_baud=115200\n',
    },
    "gentoo": {
        **programs("grub"),
        **modules("usr/lib/grub", "i386-pc"),
        "etc/default/grub": '# Copyright 1999-2023 Gentoo Authors\nGRUB_DISTRIBUTOR="Gentoo"\n\n'
        '# Append parameters to the linux kernel command line\n#GRUB_CMDLINE_LINUX=""\nGRUB_DISABLE_LINUX_UUID=true',
    },
    "grub-legacy": {
        "usr/sbin/grub": RECORD + "cat >>/var/log/calls\n",
        "usr/lib/grub/x86_64-pc/stage1": "1",
        "usr/lib/grub/x86_64-pc/stage2": "2",
        "usr/lib/grub/x86_64-pc/e2fs_stage1_5": "1.5",
        "boot/grub/menu.lst": "default\t0\ntimeout\t5\nsplashimage=(hd0,4)/grub/splash.xpm.gz\n## ## Start Default "
        "Options ##\n# kopt=root=/dev/sda5 ro\n# groot=(hd0,4)\n# defoptions=quiet\n\ntitle\tDebian GNU/Linux\n"
        "root\t(hd0,4)\nkernel\t/boot/vmlinuz-2.6.32 root=/dev/sda5 ro quiet\ninitrd\t/boot/initrd.img-2.6.32\n",
    },
}  # fmt: skip


def guest(top: Path, name: str) -> Path:
    root = trees.guest(top, trees.SYSTEMD, GUESTS[name])
    for applet in ("awk", "cat", "cp", "dd", "sync", "rm", "ln"):
        (root / "bin" / applet).symlink_to("busybox")
    for path in (*root.glob("usr/*bin/*"), *root.glob("sbin/*extlinux")):
        path.chmod(0o755)
    (root / "var/log").mkdir(exist_ok=True)
    if name == "rhel8":
        (root / "boot/grub2").mkdir()
        (root / "boot/grub2/grubenv").symlink_to("../efi/EFI/redhat/grubenv")
    return root
