#!/usr/bin/env python3
"""Real Debian systems as images for the tests: made by debootstrap, packed by tar, kept between runs.

`debian("bookworm")` returns one and makes it first if it does not exist; `debian("bookworm", "netplan")` returns one
with a few packages more; `python3 tests/debian.py` makes all suites. A system is made on a tmpfs in its own namespaces,
so that an interrupted run leaves neither mounts nor a tree.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITES = ("bullseye", "bookworm", "trixie")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "debian"
INSIDE = "/boot"  # recipes see the cache there, because debootstrap fails on a path with a space
ATTEMPTS = 3  # to make an image: a mirror may be unreachable for a moment
KEEP = 86400  # seconds; images of other recipes stay in the cache so long
PACKAGES = (
    "linux-image-cloud-amd64",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
    "grub2-common",
    "e2fsprogs",
    "iproute2",
    "systemd-sysv",
    "udev",
    "dbus",
    "login",
    "passwd",
    "openssh-server",
)
# Additional packages of a system, for its network or boot loader.
FLAVOURS = {
    "ifupdown": ("ifupdown", "isc-dhcp-client"),
    "networkd": ("systemd-resolved",),
    "netplan": ("netplan.io", "systemd-resolved"),
    "network-manager": ("network-manager",),
    # Secure Boot accepts these
    "signed": ("shim-signed", "grub-efi-amd64-signed"),
    "cloud-init": ("cloud-init", "netplan.io", "systemd-resolved"),
    "cloud-init-ifupdown": ("cloud-init", "ifupdown", "isc-dhcp-client"),  # as in the cloud images of Debian 11
    # All that may rule a guest's network; a test enables what it is about.
    "networks": (
        *("cloud-init", "netplan.io", "systemd-resolved", "network-manager", "connman", "dhcpcd"),
        *("ifupdown", "isc-dhcp-client"),
    ),
    "lvm": ("lvm2",),
    "node": ("lvm2", "python3", "fdisk"),  # deploys others itself
    "large": ("build-essential", "git", "vim"),  # for the benchmark: about 600 MB
}
# Packages that would take the place of others: they lie in /var/cache/others of a system, for a test to install
OTHERS = {
    "networks": (
        *("ifupdown2", "ifupdown-ng", "ifupdown-ng-compat"),
        *(
            "sysvinit-core",
            "initscripts",
            "sysv-rc",
            "startpar",
            "insserv",
            "openrc",
            "libeinfo1",
            "librc1",
            "librc1t64",
        ),
    ),
}

# Once the guest is up, it reports on the serial console: `FACT NAME VALUE` lines between two marks.
# It waits for the getty, because systemd hangs up the terminal before it starts one.
REPORT = r"""#!/bin/sh
dmesg --console-off  # a message of the kernel would go into the middle of a line; a panic is shown nevertheless
state=$(systemctl is-system-running --wait 2>/dev/null)
tries=30
while [ $tries -gt 0 ]; do
  getty=$(systemctl show --property MainPID --value serial-getty@ttyS0.service)
  [ "$(cat "/proc/$getty/comm" 2>/dev/null)" = agetty ] && break
  sleep 1
  tries=$((tries - 1))
done
# An address may still be on its way from a DHCP server.
tries=20
while [ $tries -gt 0 ] && [ "$(ip -o link show | grep -c ether)" -gt "$(ip -o -4 addr show scope global | wc -l)" ]; do
  sleep 1
  tries=$((tries - 1))
done
fact() { printf 'FACT %s\n' "$*"; }
{
  echo
  echo FACTS-BEGIN
  fact state "$state"
  fact hostname "$(cat /proc/sys/kernel/hostname)"
  fact fqdn "$(hostname --fqdn 2>&1)"
  fact cmdline "$(cat /proc/cmdline)"
  fact machine-id "$(cat /etc/machine-id)"
  findmnt --noheadings --raw --bytes --output TARGET,SOURCE,FSTYPE,UUID,SIZE --types ext2,ext3,ext4,xfs,btrfs |
    while read -r line; do fact mount "$line"; done
  lsblk --noheadings --raw --bytes --output PATH,SIZE,TYPE | while read -r line; do fact block "$line"; done
  tail -n +2 /proc/swaps | while read -r line; do fact swap "$line"; done
  systemctl list-units --failed --no-legend --plain --full | while read -r line; do fact failed "$line"; done
  fact sshd "$(systemctl is-active ssh.service)"
  for key in /etc/ssh/ssh_host_*_key.pub; do fact host-key "$(ssh-keygen -l -f "$key")"; done
  ip -o link show | grep ether | while read -r line; do fact link "$line"; done
  ip -o addr show scope global | while read -r _ name _ address _; do fact address "$name $address"; done
  { ip -4 route show; ip -6 route show default; } | while read -r line; do fact route "$line"; done
  { resolvectl dns 2>/dev/null | sed 's/^[^:]*://'; sed -n 's/^nameserver//p' /etc/resolv.conf; } | tr ' ' '\n' |
    sort -u | while read -r line; do [ -z "$line" ] || fact dns "$line"; done
  fact firmware "$([ -d /sys/firmware/efi ] && echo uefi || echo bios)"
  if command -v cloud-init >/dev/null; then fact cloud-init "$(cloud-init status --wait)"; fi
  echo FACTS-END
} >/run/report-facts
cat /run/report-facts >/dev/ttyS0
"""

UNIT = """[Unit]
Description=Say on the serial console what became of this system

[Service]
Type=exec
ExecStart=/usr/local/sbin/report-facts

[Install]
WantedBy=multi-user.target
"""

# $1 directory for the result: image.tar.zst, machine-id, host-keys; $2 suite; for a flavour: $3 the image to extend,
# $4... the packages to add
BEGIN = """
set -euo pipefail
result=$1 suite=$2
work=$result/tree
mkdir "$work"
mount -t tmpfs -o mode=755,size=3G debian "$work"
"""

SYSTEM = f"""
debootstrap --variant=minbase --include={",".join(PACKAGES)} "$suite" "$work" http://deb.debian.org/debian
cat >"$work/usr/local/sbin/report-facts" <<'END'
{REPORT}END
chmod 755 "$work/usr/local/sbin/report-facts"
cat >"$work/etc/systemd/system/report-facts.service" <<'END'
{UNIT}END
chroot "$work" systemctl --quiet enable report-facts.service
echo image >"$work/etc/hostname"
"""

FLAVOUR = """
tar --extract --file "$3" --directory "$work" --numeric-owner --xattrs --xattrs-include='*' --acls
shift 3
cp /etc/resolv.conf "$work/etc/resolv.conf"
mount -t proc proc "$work/proc"
export DEBIAN_FRONTEND=noninteractive
printf '#!/bin/sh\nexit 101\n' >"$work/usr/sbin/policy-rc.d"
chmod 755 "$work/usr/sbin/policy-rc.d"
chroot "$work" apt-get -q -o Acquire::Retries=5 update
chroot "$work" apt-get -q -o Acquire::Retries=5 --yes --no-install-recommends install "$@"
rm "$work/usr/sbin/policy-rc.d"
case " $* " in
  *systemd-resolved*) chroot "$work" systemctl --quiet enable systemd-networkd systemd-resolved ;;
esac
umount "$work/proc"
"""

# What the suite has of these packages
DOWNLOAD = """
mkdir "$work/var/cache/others"
mv "$work/etc/resolv.conf" "$work/etc/resolv.conf.own"
cp /etc/resolv.conf "$work/etc/resolv.conf"
chroot "$work" sh -euc '
  cd /var/cache/others
  apt-get -q -o Acquire::Retries=5 download $(apt-cache show --no-all-versions "$@" | sed -n "s/^Package: //p")
' download {}
mv "$work/etc/resolv.conf.own" "$work/etc/resolv.conf"
"""

END = """
case $(readlink "$work/etc/resolv.conf") in *systemd*) ;; *) rm -f "$work/etc/resolv.conf" ;; esac
rm -rf "$work"/var/cache/apt/*.bin "$work"/var/cache/apt/archives/*.deb "$work"/var/log/bootstrap.log
rm -rf "$work"/var/lib/apt/lists/* "$work"/usr/share/{doc,info,locale,man}/*
cp "$work/etc/machine-id" "$result/machine-id"
for key in "$work"/etc/ssh/ssh_host_*_key.pub; do ssh-keygen -l -f "$key"; done | cut -d' ' -f2 >"$result/host-keys"
tar --create --directory "$work" --numeric-owner --xattrs --xattrs-include='*' --acls \\
  --use-compress-program 'zstd -3 -T0 --quiet' --file "$result/image.tar.zst" .
umount "$work"
rmdir "$work"
"""


@dataclass(frozen=True)
class Debian:
    suite: str
    tarball: Path
    machine_id: str
    host_keys: frozenset[str]  # fingerprints


def debian(suite: str, flavour: str = "") -> Debian:
    """Return the image of one suite, from the cache if it is there."""
    base = [str(debian(suite).tarball), *FLAVOURS[flavour]] if flavour else []
    path = cached(CACHE / f"{_name(suite, flavour)}-{_key(flavour)}", _recipe(flavour), suite, *base)
    return Debian(
        suite,
        path / "image.tar.zst",
        (path / "machine-id").read_text().strip(),
        frozenset((path / "host-keys").read_text().split()),
    )


def debians(suites: Iterable[str]) -> dict[str, Debian]:
    """Return several images by suite; make two at a time."""
    names = sorted(set(suites))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(debian, names)))


def flavours(suite: str, names: Iterable[str]) -> dict[str, Debian]:
    """Return several flavours of one suite by name; make two at a time."""
    debian(suite)
    names = sorted(set(names))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda flavour: debian(suite, flavour), names)))


def _name(suite: str, flavour: str) -> str:
    return f"{suite}+{flavour}" if flavour else suite


def _recipe(flavour: str) -> str:
    return BEGIN + (FLAVOUR if flavour else SYSTEM) + _download(flavour) + END


def _download(flavour: str) -> str:
    return DOWNLOAD.format(" ".join(OTHERS[flavour])) if flavour in OTHERS else ""


def _key(flavour: str) -> str:
    recipe = BEGIN + SYSTEM + END + (FLAVOUR + " ".join(FLAVOURS[flavour]) if flavour else "") + _download(flavour)
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def cached(path: Path, script: str, *arguments: str) -> Path:
    """Return the directory `path`, NAME-KEY. If it does not exist, a bash script makes it in its own namespaces: it
    fills the directory that is its first argument, before `arguments`."""
    name = path.name.rpartition("-")[0]
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_name(f".{name}.lock")):
            if not path.is_dir():  # no other run has made it meanwhile
                _make(path, name, script, arguments)
    return path


def _make(path: Path, name: str, script: str, arguments: Sequence[str]) -> None:
    cache = path.parent.parent
    for other in [*path.parent.glob(f"{name}-*"), *path.parent.glob(f".{name}-*")]:
        if other.stat().st_mtime < time.time() - KEEP:  # a newer one may belong to another checkout
            shutil.rmtree(other)
    for _ in range(ATTEMPTS):
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=path.parent))
        try:
            done = subprocess.run(
                ["setpriv", "--pdeathsig", "KILL"]
                + ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
                + ["bash", "-euc", f'mount --bind "$1" {INSIDE}; shift; exec bash -c "$@"', "bash", str(cache), script]
                + ["debian", *(text.replace(f"{cache}/", f"{INSIDE}/") for text in (str(scratch), *arguments))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **_proxies()},
                text=True,
                errors="replace",
            )
            if done.returncode == 0:
                scratch.rename(path)
                return
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise RuntimeError(f"cannot make {name}:\n" + "\n".join(done.stdout.splitlines()[-30:]))


def _proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower() in ("http_proxy", "no_proxy")}


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(suites: list[str]) -> None:
    began = time.monotonic()
    for image in debians(suites or SUITES).values():
        print(f"{image.suite:10} {image.tarball.stat().st_size >> 20:4} MiB  {image.tarball}")
    print(f"{time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
