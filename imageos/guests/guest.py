"""The system in a guest: its identity and its console.

What differs between distributions is found by looking at the guest's files, never at its name in the settings.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from imageos import log
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.guests import cloudinit, distribution
from imageos.guests.services import OWN_UNITS, RUNIT, disable, init, unit_file
from imageos.guests.target import Target, matches

# Directories that a kernel and a first process expect, should an image have left them out
MOUNT_POINTS = ("/dev", "/proc", "/sys", "/run")
# What tells one machine from another beside machine-id and host keys, and is made anew when it is missed
UNIQUE = (
    # seeds of random numbers
    *("/var/lib/systemd/random-seed", "/var/lib/urandom/random-seed", "/var/lib/misc/random-seed"),
    *("/var/lib/random-seed", "/etc/random-seed"),  # Red Hat up to 6; Buildroot
    *("/boot/loader/random-seed", "/boot/efi/loader/random-seed", "/efi/loader/random-seed"),
    "/var/lib/seedrng/*",
    # keys
    *("/var/lib/systemd/credential.secret", "/var/lib/NetworkManager/secret_key"),
    *("/etc/salt/minion_id", "/etc/salt/pki/minion/minion.*"),
    *("/etc/venv-salt-minion/minion_id", "/etc/venv-salt-minion/pki/minion/minion.*"),
    *("/var/lib/zerotier-one/identity.secret", "/var/lib/zerotier-one/identity.public"),
    "/etc/cockpit/ws-certs.d/0-self-signed.*",
    # ids by which servers count machines, or tell one from another
    *("/etc/hostid", "/var/lib/whoopsie/whoopsie-id", "/etc/tenable_tag", "/etc/qualys/hostid"),
    *("/var/lib/yum/uuid", "/etc/docker/key.json", "/var/lib/docker/engine-id", "/var/lib/mysql/auto.cnf"),
    *("/var/lib/zypp/AnonymousUniqueId", "/etc/insights-client/machine-id", "/var/lib/glusterd/glusterd.info"),
    *(f"/var/lib/{name}beat/meta.json" for name in ("file", "metric", "audit", "packet", "heart")),
    *("/var/lib/netdata/registry/netdata.public.unique.id", "/opt/consul/node-id", "/var/lib/consul/node-id"),
    *(f"{data}/client/{name}-id" for data in ("/opt/nomad/data", "/var/lib/nomad") for name in ("client", "secret")),
    # leases, and the ids of DHCP clients
    *("/var/lib/dhcp/*", "/var/lib/dhclient/*", "/var/lib/dhcpcd/*", "/var/lib/dhcpcd5/*", "/etc/dhcpcd.duid"),
    *("/etc/dhcpcd.secret", "/var/lib/dhcpv6/dhcp6c_duid", "/var/lib/wicked/duid.xml", "/var/lib/wicked/iaid.xml"),
    *("/var/lib/NetworkManager/*.lease", "/var/lib/NetworkManager/*.leases", "/var/lib/systemd/network"),
    *("/var/lib/wicked/lease-*", "/var/db/dhcpcd/*", "/var/lib/dhcp3/*", "/var/lib/dibbler/client-duid"),
    # names of NVMe hosts
    *("/etc/nvme/hostid", "/etc/nvme/hostnqn"),
    # by which LVM and multipath tell the image's drives, and take no others
    *("/etc/lvm/devices/system.devices", "/etc/multipath/bindings", "/etc/multipath/wwids"),
)
# The same, but nobody makes them anew, and without them the guest does not do what it should
KEPT = (
    *("/etc/krb5.keytab", "/etc/pki/consumer/cert.pem", "/etc/chef/client.pem", "/etc/wireguard/*.conf"),
    *("/etc/puppetlabs/puppet/ssl/private_keys/*", "/etc/puppet/ssl/private_keys/*"),
    *("/var/lib/puppet/ssl/private_keys/*", "/var/ossec/etc/client.keys", "/var/lib/samba/private/secrets.tdb"),
    *("/var/lib/tailscale/tailscaled.state", "/etc/netbird/config.json", "/etc/nebula/host.key"),
    *("/root/.ssh/id_*[!b]", "/etc/letsencrypt/renewal/*.conf", "/etc/pki/tls/private/localhost.key"),
    *("/etc/openvpn/*.key", "/etc/openvpn/client/*.key", "/etc/ipsec.d/private/*", "/etc/zabbix/*.psk"),
    *("/var/lib/cfengine3/ppkeys/localhost.priv", "/var/cfengine/ppkeys/localhost.priv", "/etc/webmin/miniserv.pem"),
    *("/var/lib/icinga2/certs/*.key", "/var/lib/cmk-agent/registered_connections.json"),
    *("/etc/sysconfig/rhn/systemid", "/var/lib/landscape/client/broker.bpickle", "/var/lib/teleport/host_uuid"),
    *("/etc/pacman.d/gnupg/private-keys-v1.d/*", "/opt/CrowdStrike/falconstore"),
    # the engine ID, to which the keys of its users are bound
    *("/var/lib/snmp/snmpd.conf", "/var/net-snmp/snmpd.conf"),
    *("/var/lib/docker/swarm/*", "/etc/rancher/node/password", "/etc/kubernetes/kubelet.conf"),
    *("/etc/zypp/credentials.d/SCCcredentials", "/var/lib/ubuntu-advantage/private/machine-token.json"),
    *("/var/lib/tor/keys/ed25519_master_id_secret_key", "/var/lib/amazon/ssm/registration"),
)
# Configuration by which a DHCP server takes all for one machine -> such a line
CLIENT_IDS = {
    **dict.fromkeys(("/etc/systemd/networkd.conf", "/etc/systemd/networkd.conf.d/*.conf"), r"^(?=[ \t]*DUIDRawData\b)"),
    **dict.fromkeys(
        ("/etc/dhcp/dhclient.conf", "/etc/dhclient.conf"),
        r"^(?=[ \t]*send[ \t]+(?:dhcp-client-identifier|dhcp6\.client-id)[ \t]+[^=\s].*;[ \t]*$)",
    ),
    "/etc/dhcpcd.conf": r"^(?=[ \t]*clientid[ \t]+\S)",
}
OF_MACHINE = "# of the image's machine: "
# Files that tell what to open on the image's disk -> such a line. A boot waits for each.
OPENED = {
    "/etc/crypttab": r"^(?=[ \t]*[^#\s])",
    **dict.fromkeys(
        ("/etc/mdadm/mdadm.conf", "/etc/mdadm.conf", "/etc/mdadm/mdadm.conf.d/*", "/etc/mdadm.conf.d/*"),
        r"^(?=[ \t]*ARRAY\b)",
    ),
}
DEBCONF = "/var/cache/debconf/config.dat"
GRUB_DISK = re.compile(rb"^Name: grub-pc/install_devices\n(?:\S.*\n){0,4}?Value: .*/dev/disk/", re.MULTILINE)
OF_DISK = "# of the image's disk: "
# What a unit for a filesystem or for swap opens
OPENED_BY_UNIT = r"^[ \t]*What[ \t]*=[ \t]*(?:/dev/|(?:UUID|LABEL|PARTUUID|PARTLABEL|ID)=)"
POPULARITY_CONTEST = "/etc/popularity-contest.conf"
INITIATOR = "/etc/iscsi/initiatorname.iscsi"
SERIAL_GETTY = "serial-getty@.service"


def check_root(target: Target) -> None:
    """Fail if this cannot be the root of a system; make the mount points that every one needs."""
    if not distribution.is_system(target):
        raise Failure(
            "the image holds no Linux system: /etc or /bin is missing in its root",
            hint="make the tarball from within the system's root: tar --create ... -C ROOT .",
        )
    for directory in MOUNT_POINTS:
        target.mkdir(directory)


def forget_identity(target: Target) -> None:
    """Remove what no two instances may share, and the guest makes anew."""
    forget_machine(target)
    cloudinit.forget_instance(target)


def forget_machine(target: Target) -> None:
    """The same, but the guest's cloud-init has done its work already: not of a guest that goes on under a new name."""
    forget_machine_id(target)
    for pattern in UNIQUE:
        target.remove(pattern)
    if target.is_file(INITIATOR):
        # Debian's iscsid makes a name in the place of this line, others where there is no file
        target.remove(INITIATOR)
        if target.exists("/etc/debian_version"):
            target.write(INITIATOR, "GenerateName=yes\n", mode=0o600)
    if target.is_file(POPULARITY_CONTEST):
        own = rf'\g<1>"{uuid.uuid4().hex}"'
        target.edit(POPULARITY_CONTEST, lambda text: re.sub(r"^([ \t]*MY_HOSTID=).*", own, text, flags=re.MULTILINE))
    changed = comment_out(target, CLIENT_IDS, OF_MACHINE)
    if changed:
        log.info(f"DHCP: what names the image's machine is a comment now in {', '.join(changed)}")
    kept = [path for pattern in KEPT for path in target.glob(pattern)]
    if kept:
        log.warning(f"shared by all that is made of this, until somebody makes them anew: {log.few(kept)}")


def forget_machine_id(target: Target) -> None:
    """Have the guest make a new machine-id when it boots; DHCP leases and journals are tied to it.

    Only systemd makes one of an empty file.
    """
    is_systemd = init(target) in ("systemd", "")
    if target.exists("/etc/machine-id") or (is_systemd and unit_file(target, SERIAL_GETTY)):
        target.write("/etc/machine-id", "" if is_systemd else uuid.uuid4().hex + "\n", mode=0o444)
    target.remove("/var/lib/dbus/machine-id")


def forget_disk(target: Target) -> None:
    """Have a guest on new filesystems open nothing of the disk that its image was on: encrypted devices, RAID."""
    for path in comment_out(target, OPENED, OF_DISK):
        log.warning(f"the guest's {path} names what is on the image's disk only: these lines are comments now")
    if GRUB_DISK.search(_debconf(target)):
        log.warning("grub-pc will ask on which disk it is, at its next upgrade in the guest: dpkg-reconfigure grub-pc")
    for path in (path for kind in ("mount", "swap") for path in target.glob(f"{OWN_UNITS}/*.{kind}")):
        unit = path.rpartition("/")[2]
        units = (unit, re.sub(r"\.mount$", ".automount", unit))
        if matches(target, path, OPENED_BY_UNIT) and disable(target, units):
            log.warning(f"the guest's {path} names what is on the image's disk only: it is disabled")


def _debconf(target: Target) -> bytes:
    with suppress(Failure):
        return target.read_bytes(DEBCONF, 16 * MIB) or b""
    return b""


def comment_out(target: Target, lines: Mapping[str, str], mark: str) -> list[str]:
    """Put `mark` before the lines of files (pattern of the path -> of a line's begin); return the changed files."""
    return [
        path
        for paths, line in lines.items()
        for path in target.glob(paths)
        if target.is_file(path) and target.edit(path, partial(re.compile(line, re.MULTILINE).sub, mark))
    ]


def enable_serial_console(target: Target, terminal: str, speed: int) -> None:
    """Start a login on the serial console, in whatever way the guest starts its terminals."""
    unit, kind = unit_file(target, SERIAL_GETTY), init(target)
    supervised = next(filter(target.is_dir, (f"/etc/sv/{getty}-{terminal}" for getty in ("agetty", "getty"))), "")
    if unit and kind in ("systemd", ""):
        target.symlink(unit, f"{OWN_UNITS}/getty.target.wants/serial-getty@{terminal}.service")
    elif kind == "runit" and supervised:
        directory = next(filter(target.is_dir, RUNIT), RUNIT[-1])
        target.symlink(supervised, f"{directory}/{supervised.rpartition('/')[2]}")
    elif target.is_file("/etc/inittab") and kind != "runit":
        getty = target.which("agetty") or target.which("getty") or "/sbin/getty"
        target.edit("/etc/inittab", lambda text: inittab(text, terminal, speed, getty))
    else:
        lacks = f"runit, but no /etc/sv/agetty-{terminal}" if kind == "runit" else "neither systemd nor /etc/inittab"
        log.warning(f"no login on the serial console: the guest has {lacks}")
    if target.is_file("/etc/securetty"):
        target.append_line("/etc/securetty", terminal)


def inittab(text: str, terminal: str, speed: int, getty: str) -> str:
    """Return the text of /etc/inittab with exactly one getty on `terminal`: sysvinit's syntax or busybox's."""
    # Only sysvinit has run levels (inittab(5)); in busybox's the first field is the terminal.
    sysvinit = re.search(r"^[^#:\n]*:[^:\n]*:initdefault:", text, re.MULTILINE)
    start = f"{getty} -L {speed} {terminal} vt100"
    line = f"S{terminal[-1]}:2345:respawn:{start}" if sysvinit else f"{terminal}::respawn:{start}"
    others = [
        line
        for line in text.splitlines()
        if not re.match(rf"#?\s*(?!\s)({terminal}:|[^:]*:[^:]*:respawn:.*\b{terminal}\b)", line)
    ]
    return "\n".join([*others, line]) + "\n"


def request_relabel(target: Target) -> None:
    """Have a guest with SELinux label everything when it boots: what we wrote has no label."""
    if matches(target, "/etc/selinux/config", r"^SELINUX=(enforcing|permissive)\s*$"):
        target.touch("/.autorelabel")
