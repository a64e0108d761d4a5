"""The system in a guest: its identity and its console.

What differs between distributions is found by looking at the guest's files, never at its name in the settings.
"""

from __future__ import annotations

import re
import uuid
from functools import partial

from imageos import log
from imageos.errors import Failure
from imageos.guests import cloudinit, distribution
from imageos.guests.services import OWN_UNITS, init, unit_file
from imageos.guests.target import Target, matches

# Directories that a kernel and a first process expect, should an image have left them out
MOUNT_POINTS = ("/dev", "/proc", "/sys", "/run")
# What tells one machine from another beside machine-id and host keys, and is made anew when it is missed
UNIQUE = (
    # seeds of random numbers
    *("/var/lib/systemd/random-seed", "/var/lib/urandom/random-seed", "/var/lib/misc/random-seed"),
    *("/boot/loader/random-seed", "/boot/efi/loader/random-seed", "/efi/loader/random-seed"),
    "/var/lib/seedrng/*",
    # keys
    *("/var/lib/systemd/credential.secret", "/var/lib/NetworkManager/secret_key"),
    *("/etc/salt/minion_id", "/etc/salt/pki/minion/minion.*"),
    # ids by which servers count machines, or tell one from another
    *("/var/lib/yum/uuid", "/etc/docker/key.json", "/var/lib/docker/engine-id", "/var/lib/mysql/auto.cnf"),
    *("/var/lib/zypp/AnonymousUniqueId", "/etc/insights-client/machine-id", "/var/lib/filebeat/meta.json"),
    *("/var/lib/netdata/registry/netdata.public.unique.id", "/opt/consul/node-id", "/var/lib/consul/node-id"),
    # leases, and the ids of DHCP clients
    *("/var/lib/dhcp/*", "/var/lib/dhclient/*", "/var/lib/dhcpcd/*", "/var/lib/dhcpcd5/*", "/etc/dhcpcd.duid"),
    *("/etc/dhcpcd.secret", "/var/lib/dhcpv6/dhcp6c_duid", "/var/lib/wicked/duid.xml", "/var/lib/wicked/iaid.xml"),
    *("/var/lib/NetworkManager/*.lease", "/var/lib/NetworkManager/*.leases", "/var/lib/systemd/network"),
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
    *("/var/lib/tailscale/tailscaled.state", "/var/lib/zerotier-one/identity.secret"),
    *("/var/lib/docker/swarm/*", "/etc/rancher/node/password", "/etc/kubernetes/kubelet.conf"),
    *("/etc/zypp/credentials.d/SCCcredentials", "/var/lib/ubuntu-advantage/private/machine-token.json"),
    *("/var/lib/tor/keys/ed25519_master_id_secret_key", "/var/lib/amazon/ssm/registration"),
)
# Files that tell what to open on the image's disk -> such a line. A boot waits for each.
OPENED = {
    "/etc/crypttab": r"^(?=[ \t]*[^#\s])",
    "/etc/mdadm/mdadm.conf": r"^(?=[ \t]*ARRAY\b)",
    "/etc/mdadm.conf": r"^(?=[ \t]*ARRAY\b)",
}
OFF = "# of the image's disk: "
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
    for path, line in OPENED.items():
        if target.is_file(path) and target.edit(path, partial(re.compile(line, re.MULTILINE).sub, OFF)):
            log.warning(f"the guest's {path} names what is on the image's disk only: these lines are comments now")


def enable_serial_console(target: Target, terminal: str, speed: int) -> None:
    """Start a login on the serial console, in whatever way the guest starts its terminals."""
    unit = unit_file(target, SERIAL_GETTY)
    if unit and init(target) in ("systemd", ""):
        target.symlink(unit, f"{OWN_UNITS}/getty.target.wants/serial-getty@{terminal}.service")
    elif target.is_file("/etc/inittab"):
        getty = target.which("agetty") or target.which("getty") or "/sbin/getty"
        target.edit("/etc/inittab", lambda text: inittab(text, terminal, speed, getty))
    else:
        log.warning("no login on the serial console: the guest has neither systemd nor /etc/inittab")
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
