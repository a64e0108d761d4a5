"""Files written into a guest: its name, its identity, its console; on small trees of several distributions."""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageos.errors import Failure
from imageos.guests import guest as system
from imageos.guests import hostname, personalize, services
from imageos.guests.target import Target

NAME = "inst1.example.org"
DEBIAN_HOSTS = """\
127.0.0.1\tlocalhost
127.0.1.1\told.example.net\told

# The following lines are desirable for IPv6 capable hosts
::1     localhost ip6-localhost ip6-loopback
"""
RHEL_HOSTS = """\
127.0.0.1   localhost localhost.localdomain localhost4 localhost4.localdomain4
::1         localhost localhost.localdomain localhost6 localhost6.localdomain6
"""
OS_RELEASE = {
    "debian": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
    "ubuntu": "NAME=Ubuntu\nID=ubuntu\nID_LIKE=debian\nUBUNTU_CODENAME=noble\n",
    "alpine": "ID=alpine\n",
    "rhel": 'NAME="Red Hat Enterprise Linux"\nID="rhel"\nID_LIKE="fedora"\n',
    "rocky": 'NAME="Rocky Linux"\nID="rocky"\nID_LIKE="rhel centos fedora"\n',
    "fedora": "ID=fedora\n",
    "leap": 'ID="opensuse-leap"\nID_LIKE="suse opensuse"\n',
    "tumbleweed": 'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n',
    "sles": 'ID="sles"\nID_LIKE="suse"\n',
    "micro": 'ID="sle-micro"\nID_LIKE="suse"\n',
    "misleading": "ID=other\nVARIANT_ID=rhel\nHOME_URL=https://fedora.example.org/\n",
}
FULL = {"rhel", "rocky", "fedora", "leap", "tumbleweed", "sles", "micro"}


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# The name


def test_hosts_of_debian() -> None:
    assert hostname.hosts(DEBIAN_HOSTS, NAME) == DEBIAN_HOSTS.replace(
        "127.0.1.1\told.example.net\told", "127.0.1.1\tinst1.example.org inst1"
    )


def test_hosts_of_rhel() -> None:
    first, second = RHEL_HOSTS.splitlines(keepends=True)
    assert hostname.hosts(RHEL_HOSTS, NAME) == f"{first}127.0.1.1\tinst1.example.org inst1\n{second}"


def test_hosts_that_are_empty() -> None:
    assert hostname.hosts("", NAME) == (
        "127.0.0.1\tlocalhost\n127.0.1.1\tinst1.example.org inst1\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    )


def test_hosts_with_many_lines_of_ours() -> None:
    begin = time.process_time()
    assert hostname.hosts("127.0.1.1\n" * 100_000, NAME) == "127.0.1.1\tinst1.example.org inst1\n"
    assert time.process_time() - begin < 5, "quadratic: minutes"


def test_hosts_of_a_name_without_a_domain() -> None:
    assert "127.0.1.1\tinst1\n" in hostname.hosts(DEBIAN_HOSTS, "inst1")


def test_hosts_without_localhost() -> None:
    assert hostname.hosts("# nothing\n192.0.2.1 router", NAME) == (
        "127.0.1.1\tinst1.example.org inst1\n# nothing\n192.0.2.1 router\n"
    )


def test_hosts_with_our_line_twice() -> None:
    text = "127.0.1.1 a\n192.0.2.1 router\n127.0.1.1 b\n#127.0.1.1 c\n127.0.1.10 d\n"
    assert hostname.hosts(text, NAME) == (
        "127.0.1.1\tinst1.example.org inst1\n192.0.2.1 router\n#127.0.1.1 c\n127.0.1.10 d\n"
    )


LINE = st.one_of(
    st.sampled_from(["127.0.0.1 localhost", "127.0.1.1 a", "  127.0.1.1\tb", "# 127.0.1.1", "::1 x", ""]),
    st.text("abc.0127: \t#", max_size=12),
)


@given(st.lists(LINE).map("\n".join))
def test_hosts_any(text: str) -> None:
    made = hostname.hosts(text, NAME)
    assert hostname.hosts(made, NAME) == made
    lines = made.splitlines()
    assert [line for line in lines if line.split()[:1] == ["127.0.1.1"]] == ["127.0.1.1\tinst1.example.org inst1"]
    if text:
        others = [line for line in text.splitlines() if line.split()[:1] != ["127.0.1.1"]]
        assert [line for line in lines if line.split()[:1] != ["127.0.1.1"]] == others


@pytest.mark.parametrize("release", OS_RELEASE)
def test_hostname(release: str, guest: Path, target: Target) -> None:
    tree(guest, {"etc/hostname": "template\n", "etc/hosts": RHEL_HOSTS, "usr/lib/os-release": OS_RELEASE[release]})
    (guest / "etc/os-release").symlink_to("../usr/lib/os-release")
    hostname.write(target, NAME)
    assert (guest / "etc/hostname").read_text() == ("inst1.example.org\n" if release in FULL else "inst1\n")
    assert (guest / "etc/hosts").read_text() == hostname.hosts(RHEL_HOSTS, NAME)


def test_hostname_of_an_unknown_system(guest: Path, target: Target) -> None:
    hostname.write(target, NAME)
    assert (guest / "etc/hostname").read_text() == "inst1\n"
    assert "127.0.1.1\tinst1.example.org inst1\n" in (guest / "etc/hosts").read_text()
    assert stat.S_IMODE((guest / "etc/hostname").stat().st_mode) == 0o644


# Unique files


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("etc/HOSTNAME", "image.example.net\n", "inst1.example.org\n"),
        ("etc/sysconfig/network", "NETWORKING=yes\nHOSTNAME=image\n", "NETWORKING=yes\nHOSTNAME=inst1.example.org\n"),
        ("etc/sysconfig/network", "NETWORKING=yes\n", "NETWORKING=yes\n"),
        ("etc/conf.d/hostname", '# a comment\nhostname="localhost"\n', '# a comment\nhostname="inst1"\n'),
        ("etc/conf.d/hostname", 'HOSTNAME="localhost"\n', 'HOSTNAME="inst1"\n'),
    ],
)
def test_hostname_of_older_systems(path: str, before: str, after: str, guest: Path, target: Target) -> None:
    (guest / path).parent.mkdir(parents=True, exist_ok=True)
    (guest / path).write_text(before)
    hostname.write(target, "inst1.example.org")
    assert (guest / path).read_text() == after


def test_machine_id_is_emptied(guest: Path, target: Target) -> None:
    tree(guest, {"etc/machine-id": "0123456789abcdef\n", "var/lib/dbus/machine-id": "0123456789abcdef\n"})
    system.forget_machine_id(target)
    assert (guest / "etc/machine-id").read_text() == ""
    assert not (guest / "var/lib/dbus/machine-id").exists()


def test_machine_id_where_dbus_links_to_it(guest: Path, target: Target) -> None:
    tree(guest, {"etc/machine-id": "0123456789abcdef\n"})
    (guest / "var/lib/dbus").mkdir(parents=True)
    (guest / "var/lib/dbus/machine-id").symlink_to("/etc/machine-id")
    system.forget_machine_id(target)
    assert (guest / "etc/machine-id").read_text() == ""
    assert os.listdir(guest / "var/lib/dbus") == []


@pytest.mark.parametrize("units", ["usr/lib/systemd/system", "lib/systemd/system"])
def test_machine_id_that_systemd_misses(units: str, guest: Path, target: Target) -> None:
    """The file must exist, because a guest with a read-only root cannot make it."""
    tree(guest, {f"{units}/serial-getty@.service": ""})
    system.forget_machine_id(target)
    assert (guest / "etc/machine-id").read_text() == ""
    assert stat.S_IMODE((guest / "etc/machine-id").stat().st_mode) == 0o444


def install_init(guest: Path, name: str) -> None:
    tree(guest, {f"usr/lib/systemd/{name}" if name == "systemd" else f"usr/sbin/{name}": ""})
    (guest / "usr/sbin").mkdir(exist_ok=True)
    if name != "init":
        (guest / "usr/sbin/init").symlink_to("../lib/systemd/systemd" if name == "systemd" else name)
    (guest / "sbin").symlink_to("usr/sbin")


@pytest.mark.parametrize("init", ["init", "busybox", "openrc-init", "systemd"])
def test_init_is_what_sbin_init_is(init: str, guest: Path, target: Target) -> None:
    """systemd may be installed beside it. Another init makes no machine-id, and starts no service of systemd."""
    tree(guest, {"usr/lib/systemd/system/serial-getty@.service": "", "etc/inittab": SYSVINIT, "etc/machine-id": "x\n"})
    install_init(guest, init)
    system.forget_machine_id(target)
    system.enable_serial_console(target, "ttyS0", 38400)
    made = (guest / "etc/machine-id").read_text()
    assert made == "" if init == "systemd" else re.fullmatch("[0-9a-f]{32}\n", made)
    assert os.path.lexists(wanted(guest)) == (init == "systemd")
    assert ("ttyS0 vt100" in (guest / "etc/inittab").read_text()) == (init != "systemd")


@pytest.mark.parametrize("directory", services.RUNIT)
def test_console_of_runit(directory: str, guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """As of Void and Debian, beside what other inits have left."""
    tree(guest, {"usr/lib/systemd/system/serial-getty@.service": "", "etc/inittab": SYSVINIT, "etc/machine-id": "x\n"})
    tree(guest, {f"{directory[1:]}/sshd/run": ""})
    install_init(guest, "runit-init")
    assert services.is_enabled(target, "sshd") and not services.is_enabled(target, "cron")
    system.enable_serial_console(target, "ttyS0", 38400)
    assert "no /etc/sv/agetty-ttyS0" in capfd.readouterr().err
    (guest / "etc/sv/agetty-ttyS0").mkdir(parents=True)
    system.enable_serial_console(target, "ttyS0", 38400)
    assert os.readlink(guest / f"{directory[1:]}/agetty-ttyS0") == "/etc/sv/agetty-ttyS0"
    assert not os.path.lexists(wanted(guest)) and (guest / "etc/inittab").read_text() == SYSVINIT


def test_no_machine_id_where_nobody_wants_one(guest: Path, target: Target) -> None:
    system.forget_machine_id(target)
    assert os.listdir(guest) == []


def test_identity_is_forgotten(guest: Path, target: Target) -> None:
    seeds = ("var/lib/systemd/random-seed", "var/lib/urandom/random-seed", "var/lib/misc/random-seed")
    tree(guest, {"etc/machine-id": "x", "var/lib/cloud/seed/nocloud/meta-data": "instance-id: seeded\n"})
    tree(guest, dict.fromkeys((*seeds, "var/lib/seedrng/seed.credit"), "seed"))
    names = (
        *("var/lib/dhcp/dhclient.leases", "etc/dhcpcd.duid", "etc/nvme/hostnqn", "etc/salt/pki/minion/minion.pem"),
        *("etc/lvm/devices/system.devices", "boot/loader/random-seed", "var/lib/consul/node-id"),
        *("var/lib/wicked/duid.xml", "var/lib/dhcpv6/dhcp6c_duid", "var/lib/mysql/auto.cnf", "etc/docker/key.json"),
        *("var/lib/random-seed", "etc/hostid", "var/lib/glusterd/glusterd.info", "var/lib/metricbeat/meta.json"),
        *("opt/nomad/data/client/client-id", "etc/venv-salt-minion/minion_id", "var/lib/whoopsie/whoopsie-id"),
        *("var/lib/zerotier-one/identity.secret", "etc/cockpit/ws-certs.d/0-self-signed.key"),
        *("var/lib/wicked/lease-eth0.xml", "var/db/dhcpcd/duid", "etc/tenable_tag"),
    )
    tree(guest, dict.fromkeys((*names, "var/lib/systemd/network/id", "etc/iscsi/initiatorname.iscsi"), "the image's"))
    tree(guest, {f"var/lib/cloud/{name}": "" for name in ("data/instance-id", "instances/i-1/boot-finished")})
    (guest / "var/lib/cloud/instance").symlink_to("instances/i-1")
    system.forget_identity(target)
    left = {str(path.relative_to(guest)) for path in guest.rglob("*") if not path.is_dir()}
    assert left == {"etc/machine-id", "var/lib/cloud/seed/nocloud/meta-data"}


@pytest.mark.parametrize("is_debian", [True, False])
def test_name_of_the_iscsi_initiator(is_debian: bool, guest: Path, target: Target) -> None:
    """Debian's iscsid wants the file, and makes a name; others make the file."""
    tree(guest, {"etc/iscsi/initiatorname.iscsi": "InitiatorName=iqn.the-image\n", "etc/machine-id": ""})
    if is_debian:
        tree(guest, {"etc/debian_version": "12\n"})
    system.forget_machine(target)
    assert target.read("/etc/iscsi/initiatorname.iscsi") == ("GenerateName=yes\n" if is_debian else None)


def test_id_of_popularity_contest(guest: Path, target: Target) -> None:
    """Its cron job does nothing without one."""
    text = '# config\nPARTICIPATE="yes"\n{}\nDAY="3"\n'
    tree(guest, {"etc/popularity-contest.conf": text.format('MY_HOSTID="0123456789abcdef0123456789abcdef"')})
    system.forget_machine(target)
    made = target.read("/etc/popularity-contest.conf") or ""
    assert re.fullmatch(text.format('MY_HOSTID="([0-9a-f]{32})"'), made) and "0123456789abcdef" not in made


def test_disk_of_the_image(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    crypttab = "# <target>\n{0}swap /dev/vda3 /dev/urandom swap\n\n{0}data UUID=1 none luks\n"
    mdadm = "HOMEHOST <system>\n{}ARRAY /dev/md0 UUID=2\n"
    tree(guest, {"etc/crypttab": crypttab.format(""), "etc/mdadm/mdadm.conf": mdadm.format("")})
    for said in (2, 0):
        system.forget_disk(target)
        assert (guest / "etc/crypttab").read_text() == crypttab.format(system.OF_DISK)
        assert (guest / "etc/mdadm/mdadm.conf").read_text() == mdadm.format(system.OF_DISK)
        assert capfd.readouterr().err.count("image's disk only") == said


@pytest.mark.parametrize(
    ("unit", "what", "is_of_disk"),
    [
        ("data.mount", "/dev/disk/by-uuid/1", True),
        ("dev-vdb2.swap", " /dev/vdb2", True),
        ("data.mount", "LABEL=data", True),
        ("data.mount", "server:/export", False),
        ("tmp.mount", "tmpfs", False),
    ],
)
def test_units_that_open_the_disk_of_the_image(
    unit: str, what: str, is_of_disk: bool, guest: Path, target: Target, capfd: pytest.CaptureFixture[str]
) -> None:
    """A boot waits for them as for an entry of fstab."""
    units = "etc/systemd/system"
    tree(guest, {f"{units}/{unit}": f"[X]\nWhat ={what}\n", f"{units}/multi-user.target.wants/other.service": ""})
    link = guest / f"{units}/local-fs.target.requires/{unit}"
    link.parent.mkdir()
    link.symlink_to(f"/{units}/{unit}")
    for said in (is_of_disk, False):
        system.forget_disk(target)
        assert link.is_symlink() != is_of_disk
        assert ("it is disabled" in capfd.readouterr().err) == said
    assert (guest / f"{units}/{unit}").exists() and (guest / f"{units}/multi-user.target.wants/other.service").exists()


@pytest.mark.parametrize(
    ("value", "is_asked"), [("/dev/disk/by-id/ata-QEMU_1", True), ("/dev/vda", False), ("", False)]
)
def test_disk_of_grub_in_debconf(
    value: str, is_asked: bool, guest: Path, target: Target, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its next upgrade would fail where nobody can answer."""
    of_efi = "Name: grub-efi/install_devices\nTemplate: x\nValue: /dev/disk/by-id/a\n\n"
    text = f"Name: grub-pc/install_devices\nTemplate: x\nValue: {value}\nOwners: grub-pc\n\n{of_efi}"
    tree(guest, {"var/cache/debconf/config.dat": text})
    system.forget_disk(target)
    assert ("dpkg-reconfigure grub-pc" in capfd.readouterr().err) == is_asked


@pytest.mark.parametrize(
    ("path", "line", "is_literal"),
    [
        ("etc/systemd/networkd.conf", "DUIDRawData=00:01", True),
        ("etc/systemd/networkd.conf.d/10-id.conf", " DUIDRawData = 00:01", True),
        ("etc/systemd/networkd.conf", "DUIDType=vendor", False),
        ("etc/dhcp/dhclient.conf", 'send dhcp-client-identifier "image";', True),
        ("etc/dhcp/dhclient.conf", "send dhcp-client-identifier 1:aa:0:0:0:0:1;", True),
        ("etc/dhcp/dhclient.conf", "send dhcp-client-identifier = hardware;", False),
        ("etc/dhcpcd.conf", "clientid 01:aa", True),
        ("etc/dhcpcd.conf", "clientid", False),
    ],
)
def test_ids_of_dhcp_clients_in_configuration(
    path: str, line: str, is_literal: bool, guest: Path, target: Target
) -> None:
    """With one id, all clones get one lease; the client's own, of the MAC or the machine-id, differ."""
    tree(guest, {path: f"# first\n{line}\nlast\n", "etc/machine-id": ""})
    for _ in range(2):
        system.forget_machine(target)
        mark = system.OF_MACHINE if is_literal else ""
        assert (guest / path).read_text() == f"# first\n{mark}{line}\nlast\n"


def test_fstab_of_the_image(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """What names no disk of the image stays; what does is named, also where other files say so."""
    kept = "tmpfs /srv tmpfs size=1M 0 0\nserver:/export /mnt nfs _netdev 0 0\n//s/x /x cifs ro 0 0\n"
    kept += "/swapfile none swap sw 0 0\n/swap\\040file none swap sw 0 0\n"
    gone = "/dev/sr0 /media udf noauto 0 0\n/gone none swap sw 0 0\n/data/srv /srv2 none bind 0 0\n"
    gone += "share /host 9p trans=virtio 0 0\ntank/a /a zfs defaults 0 0\nUUID=0000-1111-2222 /data ext4 defaults 0 2\n"
    gone += "UUID=root-1111-2222 /home btrfs subvol=home 0 0\n"
    old = f"# of the image\nUUID=root-1111-2222 / btrfs subvol=root 0 0\n{kept}{gone}"
    tree(
        guest,
        {"etc/fstab": old, "swapfile": "", "swap file": "", "etc/a/disk.conf": "x=/dev/disk/by-uuid/0000-1111-2222\n"},
    )
    tree(guest, {"etc/b.conf": "# 0000-1111-2222\n", "etc/c.conf": "0000-1111-22223\n"})
    personalize.replace_fstab(target, ())
    lines = (target.read("/etc/fstab") or "").splitlines()
    assert [line for line in lines if not line.startswith("#")] == kept.splitlines()
    assert capfd.readouterr().err.splitlines() == [
        "imageos: warning: the image's disk, which the guest does not have, is named in /etc/a/disk.conf",
        "imageos: warning: the guest mounts /data no more: the image's fstab has that on a disk of its own",
    ]


def test_identity_that_nobody_makes_anew(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    usual = ("etc/krb5.keytab", "etc/wireguard/wg0.conf", "var/ossec/etc/client.keys", "root/.ssh/id_ed25519")
    names = (*usual, "etc/letsencrypt/renewal/a.conf", "etc/sysconfig/rhn/systemid", "var/lib/snmp/snmpd.conf")
    tree(guest, {**dict.fromkeys(names, "secret"), "root/.ssh/id_ed25519.pub": "public"})
    system.forget_machine(target)
    assert "shared by all that is made of this" in (said := capfd.readouterr().err) and "secret" not in said
    assert ".pub" not in said
    assert all(f"/{name}" in said and (guest / name).read_text() == "secret" for name in names)
    for name in names:
        (guest / name).unlink()
    system.forget_machine(target)
    assert capfd.readouterr().err == ""


# The console

SYSVINIT = """\
id:2:initdefault:
si::sysinit:/etc/init.d/rcS
1:2345:respawn:/sbin/getty 38400 tty1
#T0:23:respawn:/sbin/getty -L ttyS0 9600 vt100
#T1:23:respawn:/sbin/getty -L ttyS1 9600 vt100
"""
SYSVINIT_DONE = """\
id:2:initdefault:
si::sysinit:/etc/init.d/rcS
1:2345:respawn:/sbin/getty 38400 tty1
#T1:23:respawn:/sbin/getty -L ttyS1 9600 vt100
S0:2345:respawn:/sbin/getty -L 38400 ttyS0 vt100
"""
BUSYBOX = """\
::sysinit:/sbin/openrc sysinit
tty1::respawn:/sbin/getty 38400 tty1
#ttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100
::ctrlaltdel:/sbin/reboot
"""
BUSYBOX_DONE = """\
::sysinit:/sbin/openrc sysinit
tty1::respawn:/sbin/getty 38400 tty1
::ctrlaltdel:/sbin/reboot
ttyS0::respawn:/sbin/getty -L 38400 ttyS0 vt100
"""


def inittab(text: str, terminal: str = "ttyS0", speed: int = 38400) -> str:
    return system.inittab(text, terminal, speed, "/sbin/getty")


@pytest.mark.parametrize(("text", "done"), [(SYSVINIT, SYSVINIT_DONE), (BUSYBOX, BUSYBOX_DONE)])
def test_inittab(text: str, done: str) -> None:
    assert inittab(text) == done
    assert inittab(done) == done


@pytest.mark.parametrize("text", [SYSVINIT, BUSYBOX])
def test_inittab_with_another_speed(text: str) -> None:
    assert inittab(inittab(text), speed=115200) == inittab(text, speed=115200)


@pytest.mark.parametrize(
    "line",
    [
        "co:2345:respawn:/sbin/agetty ttyS0 19200 vt100-nav",
        "s0:12345:respawn:/sbin/agetty 115200 ttyS0 vt100",
        "T0:23:respawn:/sbin/getty -L ttyS0 115200 vt100",
        "#T0:23:respawn:/sbin/getty -L ttyS0 9600 vt100",
        "# S0:2345:respawn:/sbin/getty ttyS0",
    ],
)
def test_inittab_has_one_line_for_the_terminal(line: str) -> None:
    assert inittab(f"id:3:initdefault:\n{line}\n") == (
        "id:3:initdefault:\nS0:2345:respawn:/sbin/getty -L 38400 ttyS0 vt100\n"
    )


# In busybox's syntax the first field is the terminal; the command need not name it.
@pytest.mark.parametrize(
    "line", ["ttyS0::respawn:/sbin/getty -L 115200 -", "ttyS0::askfirst:-/bin/sh", "ttyS0::respawn:-/bin/ash"]
)
def test_busybox_inittab_has_one_line_for_the_terminal(line: str) -> None:
    assert inittab(f"::sysinit:/etc/init.d/rcS\n{line}\n") == (
        "::sysinit:/etc/init.d/rcS\nttyS0::respawn:/sbin/getty -L 38400 ttyS0 vt100\n"
    )


@pytest.mark.parametrize(
    "line", ["T1:23:respawn:/sbin/getty -L ttyS1 9600", "a0:23:respawn:/sbin/getty ttyS01", "x:2:wait:/bin/ttyS0-setup"]
)
def test_inittab_leaves_others_alone(line: str) -> None:
    assert line in inittab(f"id:3:initdefault:\n{line}\n").splitlines()


FIELD = st.text("abS012ty# /", max_size=8)


@given(st.lists(st.one_of(st.tuples(FIELD, FIELD, FIELD, FIELD).map(":".join), FIELD, st.just("id:2:initdefault:"))))
def test_inittab_any(lines: list[str]) -> None:
    made = inittab("\n".join(lines))
    assert inittab(made) == made
    assert made.count(":respawn:/sbin/getty -L 38400 ttyS0 vt100\n") == 1


def wanted(guest: Path) -> Path:
    return guest / "etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service"


@pytest.mark.parametrize("units", ["usr/lib/systemd/system", "lib/systemd/system"])
def test_console_of_systemd(units: str, guest: Path, target: Target) -> None:
    tree(guest, {f"{units}/serial-getty@.service": "", "etc/inittab": SYSVINIT, "etc/securetty": "tty1\n"})
    for _ in range(2):
        system.enable_serial_console(target, "ttyS0", 38400)
    assert os.readlink(wanted(guest)) == f"/{units}/serial-getty@.service"
    assert (guest / "etc/inittab").read_text() == SYSVINIT
    assert (guest / "etc/securetty").read_text() == "tty1\nttyS0\n"


def test_console_of_systemd_that_was_masked(guest: Path, target: Target) -> None:
    tree(guest, {"usr/lib/systemd/system/serial-getty@.service": ""})
    wanted(guest).parent.mkdir(parents=True)
    wanted(guest).symlink_to("/dev/null")
    system.enable_serial_console(target, "ttyS0", 38400)
    assert os.readlink(wanted(guest)) == "/usr/lib/systemd/system/serial-getty@.service"


@pytest.mark.parametrize("getty", [None, "sbin/getty", "sbin/agetty"])
def test_console_of_an_inittab(getty: str | None, guest: Path, target: Target) -> None:
    tree(guest, {"etc/inittab": SYSVINIT})
    if getty:
        tree(guest, {getty: ""})
        (guest / getty).chmod(0o755)
    system.enable_serial_console(target, "ttyS0", 115200)
    expected = f"S0:2345:respawn:/{getty or 'sbin/getty'} -L 115200 ttyS0 vt100"
    assert (guest / "etc/inittab").read_text().splitlines()[-1] == expected
    assert not (guest / "etc/systemd").exists()
    assert not (guest / "etc/securetty").exists()


def test_console_of_neither(target: Target, guest: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (guest / "etc").mkdir()
    system.enable_serial_console(target, "ttyS0", 38400)
    assert "neither systemd nor /etc/inittab" in capfd.readouterr().err
    assert os.listdir(guest / "etc") == []


# The root as a whole


@pytest.mark.parametrize("directories", [[], ["etc"], ["bin"], ["usr/bin"], ["system", "home"]])
def test_no_system(directories: list[str], guest: Path, target: Target) -> None:
    for name in directories:
        (guest / name).mkdir(parents=True)
    with pytest.raises(Failure, match="holds no Linux system") as raised:
        system.check_root(target)
    assert raised.value.hint


@pytest.mark.parametrize("programs", ["bin", "usr/bin"])
def test_mount_points_are_made(programs: str, guest: Path, target: Target) -> None:
    for name in ("etc", programs, "proc"):
        (guest / name).mkdir(parents=True)
    (guest / "proc").chmod(0o555)
    system.check_root(target)
    modes = {name: stat.S_IMODE((guest / name).stat().st_mode) for name in ("dev", "proc", "sys", "run")}
    assert modes == {"dev": 0o755, "proc": 0o555, "sys": 0o755, "run": 0o755}


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("SELINUX=enforcing\nSELINUXTYPE=targeted\n", True),
        ("# comment\nSELINUX=permissive \n", True),
        ("SELINUX=disabled\n", False),
        ("#SELINUX=enforcing\n", False),
        ("SELINUX=enforcing-not\n", False),
        ("", False),
        (None, False),
    ],
)
def test_relabelling(text: str | None, asked: bool, guest: Path, target: Target) -> None:
    if text is not None:
        tree(guest, {"etc/selinux/config": text})
    system.request_relabel(target)
    assert (guest / ".autorelabel").exists() is asked
