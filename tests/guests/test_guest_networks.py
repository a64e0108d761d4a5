"""The network of a booted guest, asked from inside: what rules it, beside whom, and what is planned.

One image of each suite holds every program, and each test enables a few: so what is only installed never counts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import booted
import pytest
from booted import LEASES, MACS, OFFERED, SET
from credentials import public_key
from debian import debian
from hookfiles import hook_module
from support import HANGS, recorded, run

from imageos import ganeti, logins
from imageos.guests import accounts, cloudboot, cloudinit, guest, hostname
from imageos.guests.target import opened
from imageos.hook import Hook
from imageos.network import backends, files, plan
from imageos.network.render import LINK_GATEWAY
from imageos.settings import Settings

SUITES = ("bookworm", "trixie")
# Program -> patterns of the links that enable it
LINKS = {
    "cloud-init": ("cloud-init.target.wants/cloud-init*", "cloud-init.target.wants/cloud-config.service"),
    "NetworkManager": ("*.wants/NetworkManager*", "dbus-org.freedesktop.nm-dispatcher.service"),
    "networkd": ("*.wants/systemd-network*", "dbus-org.freedesktop.network1.service"),
    "connman": ("*.wants/connman*",),
    "dhcpcd": ("*.wants/dhcpcd.service",),
    "ifupdown": ("*.wants/networking.service",),
    "resolved": ("*.wants/systemd-resolved.service", "dbus-org.freedesktop.resolve1.service"),
}
# Program -> its scripts for another init than systemd
SCRIPTS = {
    "cloud-init": ("cloud-*",),
    "connman": ("connman", "dbus"),
    "dhcpcd": ("dhcpcd",),
    "ifupdown": ("networking",),
}
ALWAYS_OFF = ("*.wants/report-facts.service", "*.wants/ssh*.service", "*.wants/apt-daily*", "*.wants/e2scrub*")
# netplan matches the permanent MAC, which a NIC here has not; so what it has generated is changed
GENERATE = """#!/bin/bash
(exec -a "$0" /usr/libexec/netplan/generate.real "$@") || exit
sed -i s/PermanentMACAddress/MACAddress/ /run/systemd/network/*.network 2>/dev/null
exit 0
"""
STATIC = {
    "NIC_0_IP": "192.0.2.10",
    "NIC_0_NETWORK_SUBNET": "192.0.2.0/24",
    "NIC_0_NETWORK_GATEWAY": "192.0.2.1",
}
SIX = {"NIC_0_NETWORK_SUBNET6": "2001:db8::/64", "NIC_0_NETWORK_GATEWAY6": "2001:db8::1"}
ADDRESS6 = "2001:db8::a800:ff:fe00:1/64"
DNS = "192.0.2.53 2001:db8::53"
GATEWAY = ("192.0.2.1", MACS[0])


@dataclass(frozen=True)
class Plan:
    nics: Mapping[str, str]
    dns: str
    addresses: Sequence[Sequence[str]]  # of each NIC
    routes: frozenset[tuple[str, str]]
    who: str = SET


PLANS = {
    "static": Plan(STATIC, DNS, [["192.0.2.10/24"]], frozenset([GATEWAY])),
    "dhcp": Plan({}, "", [[f"{LEASES[0]}/24"]], frozenset([GATEWAY]), OFFERED),
    "dhcp-dns": Plan({}, DNS, [[f"{LEASES[0]}/24"]], frozenset([GATEWAY])),
    "dual": Plan({**STATIC, **SIX}, DNS, [["192.0.2.10/24", ADDRESS6]], frozenset([GATEWAY, ("2001:db8::1", MACS[0])])),
    "routed": Plan(
        {"NIC_0_IP": "203.0.113.9", "NIC_0_MODE": "routed"},
        "192.0.2.53",
        [["203.0.113.9/32"]],
        frozenset([("", MACS[0])]),
    ),
    "two": Plan(STATIC, DNS, [["192.0.2.10/24"], [f"{LEASES[1]}/24"]], frozenset([GATEWAY])),
    "none": Plan({}, DNS, [], frozenset(), ""),
}


@dataclass(frozen=True)
class Image:
    """What is enabled, and what the image says."""

    enabled: tuple[str, ...]
    rules: str
    files: Mapping[str, str] = field(default_factory=dict)  # `-> ` is a link
    names: tuple[str, ...] = ("ens13", "ens14")  # of the NICs
    without: tuple[str, ...] = ()  # programs that are removed
    suites: tuple[str, ...] = SUITES
    packages: tuple[str, ...] = ()  # that are installed; with `-` at its end: removed before


STUB, PLAIN = "-> ../run/systemd/resolve/stub-resolv.conf", "nameserver 192.0.2.99\n"
HOTPLUG = "auto lo\niface lo inet loopback\n\nauto eth0\nallow-hotplug eth0\niface eth0 inet dhcp\n"
DHCP_NETWORK = "[Match]\nName=e*\n[Network]\nDHCP=yes\n"
PROFILE = "[connection]\nid=Wired\nuuid=6f1f5be0-5b5a-4c1c-8d3a-000000000001\ntype=ethernet\n[ipv4]\nmethod=auto\n"
STALE = {
    "etc/NetworkManager/system-connections/Wired.nmconnection": PROFILE,
    "var/lib/NetworkManager/timestamps": "[timestamps]\n6f1f5be0-5b5a-4c1c-8d3a-000000000001=1790000000\n",
}
COMMENT = (
    "# Use renderer: NetworkManager on desktops\nnetwork:\n  ethernets:\n    e: {dhcp4: true, match: {name: e*}}\n"
)
# A bridge of the image over our NIC, and what it says of that
BRIDGE_OF_NETPLAN = {
    "etc/netplan/50.yaml": "network:\n  ethernets: {eth0: {}}\n",
    "etc/netplan/60.yaml": "network:\n  bridges:\n    br0:\n      interfaces: [eth0]\n      dhcp4: true\n",
}
CONTROLLER = "6f1f5be0-5b5a-4c1c-8d3a-000000000002"
BRIDGE_OF_NM = {
    "etc/NetworkManager/system-connections/port": PROFILE.replace("[ipv4]", f"controller={CONTROLLER}\n[ipv4]"),
    "etc/NetworkManager/system-connections/br0": f"[connection]\nid=br0\nuuid={CONTROLLER}\ntype=bridge\n"
    "interface-name=br0\n[ipv4]\nmethod=manual\naddress1=192.0.2.77/24,192.0.2.1\n",
}
STATIC_OF_DHCPCD = "nodev\noption domain_name_servers\nnohook resolv.conf\nallowinterfaces br0\ninterface eth0\n" + (
    "static ip_address=192.0.2.88/24\nstatic routers=192.0.2.254\n"
)
# What keeps a program from a NIC or from DNS servers that are set, as forums advise it
SITE_OF_NM = {
    "etc/NetworkManager/conf.d/50-site.conf": "[keyfile]\npath=/etc/NetworkManager/site\n[global-dns-domain-*]\n"
    "servers=192.0.2.99\n[device-wired]\nmatch-device=type:ethernet\nmanaged=0\n",
    "etc/NetworkManager/system-connections/Wired": PROFILE.replace("type=ethernet\n", "[ethernet]\n").replace(
        "method=auto", "method=manual\naddress1=192.0.2.77/24"
    ),
    "etc/resolv.conf": PLAIN,
}
SITE_OF_RESOLVED = {
    "etc/systemd/resolved.conf.d/dns.conf": "[Resolve]\nDNS=192.0.2.99\nDomains=~.\n",
    "etc/resolv.conf": STUB,
}
WAITS = "-> /usr/lib/systemd/system/systemd-networkd-wait-online"
SITE_OF_NETWORKD = {
    **SITE_OF_RESOLVED,
    "etc/systemd/system/multi-user.target.wants/systemd-networkd-wait-online.service": f"{WAITS}.service",
    "etc/systemd/system/network-online.target.wants/systemd-networkd-wait-online@ens3.service": f"{WAITS}@.service",
    "etc/systemd/system/systemd-networkd-wait-online@.service.d/soon.conf": "[Service]\nTimeoutStartSec=9\n",
    "etc/systemd/system/systemd-networkd-wait-online.service.d/one.conf": "[Service]\nExecStart=\n"
    "ExecStart=/usr/lib/systemd/systemd-networkd-wait-online --interface=ens3 --timeout=9\n",
}
SITE_OF_IFUPDOWN = {
    **SITE_OF_RESOLVED,
    "etc/default/networking": 'EXCLUDE_INTERFACES="eth0"\n',
    "etc/sysctl.d/99-ipv6.conf": "net.ipv6.conf.all.disable_ipv6 = 1\nnet.ipv6.conf.default.disable_ipv6 = 1\n",
}
ETH = ("eth0", "eth1")
NETPLAN = {"usr/libexec/netplan/generate": GENERATE}
NETPLAN_FOR_NM = {**NETPLAN, "etc/netplan/01.yaml": "network:\n  renderer: 'NetworkManager' # x\n"}
OTHER_SOURCES = {
    "etc/cloud/ds-identify.cfg": "datasource: Ec2\n",
    "etc/cloud/cloud.cfg.d/90-source.cfg": "datasource: {NoCloud: {seedfrom: /nowhere/}}\n",
    "etc/cloud/cloud.cfg.d/91-network.cfg": "network: {version: 2, ethernets: {eth0: {dhcp4: true}}}\n",
    "etc/cloud/cloud.cfg.d/zzz-last.cfg": "datasource_list: [Ec2]\n",
}
OTHER_INIT = ("systemd-sysv-", "sysvinit-core", "initscripts", "insserv")
SYSVINIT, OPENRC = (*OTHER_INIT, "startpar", "sysv-rc"), (*OTHER_INIT, "libeinfo1", "librc1", "openrc")
NO_NETPLAN = {"etc/systemd/system-generators/netplan": "-> /dev/null"}
# The package ifupdown-ng leaves that to the administrator
STARTED = {
    "etc/systemd/system/multi-user.target.wants/networking.service": "-> /usr/lib/systemd/system/networking.service"
}
INTERFACES = {**NO_NETPLAN, "etc/network/interfaces": HOTPLUG}
IMAGES = {
    "ifupdown": Image(("ifupdown",), "ifupdown", INTERFACES, ETH),
    "ifupdown-resolved": Image(("ifupdown", "resolved"), "ifupdown", {**NO_NETPLAN, "etc/resolv.conf": STUB}, ETH),
    "ifupdown-networkd": Image(
        ("ifupdown", "networkd"),
        "networkd",
        {**NO_NETPLAN, "etc/network/interfaces": HOTPLUG, "etc/resolv.conf": STUB},
        ETH,
    ),
    "networkd": Image(
        ("networkd", "resolved"), "networkd", {**NO_NETPLAN, "etc/systemd/network/00.network": DHCP_NETWORK}
    ),
    "networkd-plain": Image(("networkd", "resolved"), "networkd", {**NO_NETPLAN, "etc/resolv.conf": PLAIN}),
    "networkd-dhcpcd": Image(("networkd", "dhcpcd"), "networkd", {**NO_NETPLAN, "etc/resolv.conf": STUB}),
    "networkd-connman": Image(
        ("networkd", "resolved", "connman"), "networkd", {**NO_NETPLAN, "etc/resolv.conf": PLAIN}
    ),
    "NetworkManager": Image(("NetworkManager",), "NetworkManager", {**NO_NETPLAN, **STALE, "etc/resolv.conf": STUB}),
    "NetworkManager-networkd": Image(
        ("NetworkManager", "networkd"),
        "NetworkManager",
        {**NO_NETPLAN, "etc/systemd/network/20.network": DHCP_NETWORK, "etc/resolv.conf": PLAIN},
    ),
    "NetworkManager-ifupdown": Image(
        ("NetworkManager", "ifupdown"), "NetworkManager", {**NO_NETPLAN, "etc/network/interfaces": HOTPLUG}, ETH
    ),
    "NetworkManager-site": Image(
        ("NetworkManager", "resolved"), "NetworkManager", {**NO_NETPLAN, **SITE_OF_NM}, ETH, suites=("trixie",)
    ),
    "networkd-site": Image(
        ("networkd", "resolved"), "networkd", {**NO_NETPLAN, **SITE_OF_NETWORKD}, suites=("trixie",)
    ),
    "ifupdown-site": Image(
        ("ifupdown", "resolved"), "ifupdown", {**NO_NETPLAN, **SITE_OF_IFUPDOWN}, ETH, suites=("trixie",)
    ),
    "netplan-bridge": Image(
        ("networkd", "resolved"), "netplan", {**NETPLAN, **BRIDGE_OF_NETPLAN}, ETH, suites=("trixie",)
    ),
    "NetworkManager-bridge": Image(
        ("NetworkManager",), "NetworkManager", {**NO_NETPLAN, **BRIDGE_OF_NM}, ETH, suites=("trixie",)
    ),
    "dhcpcd-static": Image(
        ("dhcpcd",), "dhcpcd", {**NO_NETPLAN, "etc/dhcpcd.conf": STATIC_OF_DHCPCD}, ETH, suites=("trixie",)
    ),
    "netplan": Image(("networkd", "resolved"), "netplan", {**NETPLAN, "etc/netplan/50.yaml": COMMENT}, ETH),
    "netplan-ifupdown": Image(
        ("networkd", "resolved", "ifupdown"), "netplan", {**NETPLAN, "etc/network/interfaces": HOTPLUG}, ETH
    ),
    "netplan-NetworkManager": Image(("NetworkManager",), "netplan", NETPLAN_FOR_NM, ETH),
    "dhcpcd": Image(("dhcpcd",), "dhcpcd", {**NO_NETPLAN, "etc/resolv.conf": STUB}, ETH),
    "cloud-init-off": Image(
        ("cloud-init", "networkd", "resolved"),
        "netplan",
        {**NETPLAN, "etc/cloud/cloud-init.disabled": "", "etc/netplan/50-cloud-init.yaml": COMMENT},
        ETH,
    ),
    "connman": Image(("connman",), "connman", {**NO_NETPLAN, "etc/resolv.conf": PLAIN}, ETH),
    "ifupdown-dhcpcd": Image(
        ("ifupdown",), "ifupdown", {**NO_NETPLAN, "etc/network/interfaces": HOTPLUG}, ETH, ("dhclient",)
    ),
    "ifupdown2": Image(("ifupdown",), "ifupdown", INTERFACES, ETH, packages=("ifupdown-", "ifupdown2")),
    "ifupdown-ng": Image(
        ("ifupdown",), "ifupdown", {**INTERFACES, **STARTED}, ETH, packages=("ifupdown-", "ifupdown-ng")
    ),
    "sysvinit": Image(("ifupdown",), "ifupdown", INTERFACES, ETH, packages=SYSVINIT),
    "sysvinit-connman": Image(("connman",), "connman", INTERFACES, ETH, packages=SYSVINIT),
    "openrc": Image(("ifupdown",), "ifupdown", INTERFACES, ETH, packages=OPENRC),
    "openrc-dhcpcd": Image(("dhcpcd",), "dhcpcd", INTERFACES, ETH, packages=OPENRC),
    "cloud-init-ifupdown": Image(("cloud-init", "ifupdown"), "cloud-init", NO_NETPLAN, ETH),
    "cloud-init-netplan": Image(
        ("cloud-init", "networkd", "resolved"), "cloud-init", {**NETPLAN, **OTHER_SOURCES}, ETH
    ),
    "cloud-init-netplan-NetworkManager": Image(("cloud-init", "NetworkManager"), "cloud-init", NETPLAN_FOR_NM, ETH),
    "cloud-init-networkd": Image(("cloud-init", "networkd", "resolved"), "networkd", NO_NETPLAN, ETH),
    "cloud-init-NetworkManager": Image(("cloud-init", "NetworkManager"), "NetworkManager", NO_NETPLAN, ETH),
}
LIKE_IFUPDOWN = ("ifupdown2", "ifupdown-ng", "sysvinit", "openrc")
OF_THESE = ("dhcp", "dual", "routed", "two", "none")
EVERY_PLAN = ("ifupdown", "networkd", "NetworkManager", "netplan", "dhcpcd", *LIKE_IFUPDOWN)
# Plan "two" is a static NIC and one with DHCP
IN_TWO = ("connman", *(name for name in IMAGES if name.startswith("cloud-init-") and name != "cloud-init-off"))
# The others are asked for what differs there.
CELLS = {
    *((name, "static") for name in IMAGES if name not in (*IN_TWO, *LIKE_IFUPDOWN, "dhcpcd-static", "ifupdown-site")),
    *((name, plan) for name in EVERY_PLAN for plan in PLANS if name not in LIKE_IFUPDOWN or plan in OF_THESE),
    *((name, "two") for name in IN_TWO),
    *(
        (name, "dual")
        for name in ("cloud-init-ifupdown", "cloud-init-netplan", "cloud-init-netplan-NetworkManager", "connman")
    ),
    *((name, "routed") for name in ("cloud-init-ifupdown", "connman")),
    *((name, "none") for name in ("cloud-init-ifupdown", "cloud-init-netplan", "cloud-init-networkd", "connman")),
    ("dhcpcd-static", "dhcp"),
    ("ifupdown-site", "dual"),
    ("ifupdown-dhcpcd", "dhcp"),
} - {(name, "none") for name in ("sysvinit", "openrc")}  # which do not say whether anything has failed
TESTS = sorted((suite, name, planned) for name, planned in CELLS for suite in IMAGES[name].suites)


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Return a function that returns the tree of an image, without a kernel. Tests must not change it.

    No parameter: for each of its values pytest would make the tree anew in each test.
    """
    top = tmp_path_factory.mktemp("guests")

    def unpack(suite: str) -> Path:
        tree = top / suite
        if not tree.exists():
            tree.mkdir()
            without = ("--exclude=./boot/*", "--exclude=./usr/lib/modules/*")
            run("tar", "-xf", debian(suite, "networks").tarball, "-C", tree, *without)
        return tree

    yield unpack
    shutil.rmtree(top)


@pytest.fixture
def tree(request: pytest.FixtureRequest, unpacked: Callable[[str], Path], tmp_path: Path) -> Iterator[Path]:
    """Return a layer over the image of the suite that is the parameter."""
    root = tmp_path / "root"
    root.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", tmp_path)
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={unpacked(request.param)},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    run("mount", "-t", "overlay", "-o", layers, "overlay", root)
    yield root
    run("umount", root)
    run("umount", tmp_path)


def prepare(tree: Path, image: Image) -> None:
    """Enable what the image says, and nothing else; write its files."""
    if image.packages:
        install(tree, image.packages)
    off = [pattern for name, patterns in LINKS.items() if name not in image.enabled for pattern in patterns]
    links = [f"systemd/system/{pattern}" for pattern in (*off, *ALWAYS_OFF)]
    scripts = [script for name, names in SCRIPTS.items() if name not in image.enabled for script in names]
    links += [f"{directory}{script}" for script in scripts for directory in ("rc?.d/S??", "runlevels/*/")]
    for pattern in links:
        for path in (tree / "etc").glob(pattern.rstrip("*") + "*"):  # else a link to nothing is not found
            path.unlink()
    (tree / "etc/resolv.conf").unlink(missing_ok=True)
    (tree / "etc/cloud/cloud.cfg.d/50_locale.cfg").write_text("locale: false\n")  # the image has none
    if (tree / "etc/dhcpcd.conf").exists():
        with (tree / "etc/dhcpcd.conf").open("a") as conf:
            conf.write("nodev\n")  # no udev here that it could wait for
    if (tree / "usr/libexec/netplan").exists():
        (tree / "usr/libexec/netplan/generate").rename(tree / "usr/libexec/netplan/generate.real")
    for program in image.without:
        (tree / "usr/sbin" / program).unlink()
    if (tree / "etc/inittab").exists():
        calm(tree, [script for name in image.enabled for script in SCRIPTS.get(name, ())])
    for name, text in image.files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text[3:])
        else:
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o600 if "NetworkManager" in name else 0o644)


def install(tree: Path, packages: Sequence[str]) -> None:
    """Install packages that lie in the tree, as its own dpkg does. No conflict and no dependency counts."""
    policy = tree / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")  # start and stop nothing
    policy.chmod(0o755)
    others = "var/cache/others"
    added = [f"/{path.relative_to(tree)}" for name in packages for path in (tree / others).glob(f"{name}*_*.deb")]
    removed = [name[:-1] for name in packages if name.endswith("-")]
    run("chroot", tree, "dpkg", "--force-all", "--purge", *removed)
    run("chroot", tree, "dpkg", "--force-all", "--install", *added)
    policy.unlink()


def calm(tree: Path, programs: Sequence[str]) -> None:
    """Leave of sysvinit's scripts and terminals only what starts these: the others are for a whole machine."""
    kept = ("rc", "rcS", "functions.sh", ".*", *programs)
    for script in (tree / "etc/init.d").iterdir():
        if not any(fnmatchcase(script.name, pattern) for pattern in kept):
            comments = [] if script.is_symlink() else re.findall("^#(?!!).*", script.read_text(), re.MULTILINE)
            script.unlink()  # may be a link out of the tree
            script.write_text("\n".join(["#!/bin/sh", *comments, ""]))  # they say what it is needed for
            script.chmod(0o755)
    inittab = tree / "etc/inittab"
    lines = inittab.read_text().splitlines()
    inittab.write_text("".join(f"{line}\n" for line in lines if ":respawn:" not in line))


def deploy(tree: Path, nics: Mapping[str, str], count: int, dns: str, keys: str = "") -> str:
    """Make the tree an instance's own, as `create` does with the hook `interfaces`; return the ruling program."""
    given = {name: text for name, text in recorded("create-kvm-network").items() if not name.startswith("NIC_")}
    given["NIC_COUNT"] = str(count)
    for number in range(count):
        given[f"NIC_{number}_MAC"], given[f"NIC_{number}_MODE"] = MACS[number], "bridged"
        given[f"NIC_{number}_IP"] = ""
    instance = ganeti.instance({**given, **nics})
    settings = Settings(dns_servers=dns, ssh_authorized_keys=keys)
    with opened(str(tree)) as target:
        hostname.write(target, instance.name)
        guest.forget_identity(target)
        if cloudboot.runs(target):
            cloudinit.write_seed(target, instance, settings, plan(instance, settings, files.read(instance, settings)))
        hook_module("interfaces").main(Hook("create", target, settings, instance, "/dev/loop7", (), (), {}))
        return backends.find(target)


@pytest.mark.parametrize(
    ("tree", "name", "planned"),
    [pytest.param(*cell, id="-".join(cell)) for cell in TESTS],
    indirect=["tree"],
)
def test_network(name: str, planned: str, tree: Path) -> None:
    image, wanted = IMAGES[name], PLANS[planned]
    prepare(tree, image)
    assert deploy(tree, wanted.nics, len(wanted.addresses), wanted.dns) == image.rules
    seen = booted.boot(tree, image.names[: len(wanted.addresses)], sum(map(len, wanted.addresses)))
    print(seen.log)  # shown if the test fails
    assert seen.addresses == {mac: frozenset(addresses) for mac, addresses in zip(MACS, wanted.addresses)}
    assert {("" if gateway == LINK_GATEWAY else gateway, mac) for gateway, mac in seen.routes} == wanted.routes
    assert seen.who == wanted.who
    assert seen.state == "running"


@pytest.mark.parametrize("tree", SUITES, indirect=True)
def test_name_and_logins_by_cloud_init(tree: Path, tmp_path: Path) -> None:
    """Options of a key count for root and the default user alike; a name of the image's does not."""
    keys = {"free": "", "near": 'from="192.0.2.1" ', "far": 'from="198.51.100.7" '}
    for name in keys:
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    lines = [f"{options}{(tmp_path / f'{name}.pub').read_text()}" for name, options in keys.items()]
    prepare(tree, IMAGES["cloud-init-networkd"])
    named = "hostname: image\nfqdn: image.example.com\nmanage_etc_hosts: true\n"
    (tree / "etc/cloud/cloud.cfg.d/60-name.cfg").write_text(named)
    of_image = "datasource_list: [None]\nchpasswd: {expire: true, list: ['root:secret', 'debian:secret']}\n"
    (tree / "etc/cloud/cloud.cfg.d/zz_site.cfg").write_text(
        of_image
    )  # sorts last; who has to change a password, is out
    deploy(tree, STATIC, 1, DNS, "".join(lines))
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes -o IdentitiesOnly=yes"
    ask = f"""
        for _ in $(seq 300); do inside systemctl is-active --quiet ssh && break; sleep 0.1; done
        echo; echo "name $(inside hostname --fqdn)"
        for user in root debian; do for key in {" ".join(keys)}; do
          ssh -n -F none {options} -i {tmp_path}/$key $user@192.0.2.10 true && echo "let in $user $key" || true
        done; done
    """
    seen = booted.boot(tree, ETH[:1], 1, ask)
    print(seen.log)
    said = re.findall("^(?:name|let in) .*", seen.log, re.MULTILINE)
    lets_in = [f"let in {user} {key}" for user in ("root", "debian") for key in ("free", "near")]
    assert said == ["name inst1.example.org", *lets_in]


@pytest.mark.parametrize("tree", SUITES, indirect=True)
def test_sshd_says_what_keeps_root_out(tree: Path) -> None:
    """The guest's own sshd is asked, where /run is empty; nothing is booted."""
    (tree / "etc/ssh/sshd_config.d/site.conf").write_text(
        "AuthorizedKeysFile /etc/ssh/keys/%u\nAuthenticationMethods publickey,password\n"
    )
    keys = logins.authorized_keys(public_key("me@home"))
    with opened(str(tree), timeout=HANGS) as target:
        assert accounts.authorize(target, keys) == "/etc/ssh/keys/root"
        said = accounts.obstacles(target, keys)
    assert said == ["root's keys are of no use: sshd has AuthenticationMethods publickey,password"]


@pytest.mark.parametrize("planned", [name for name in PLANS if name != "none"])
@pytest.mark.parametrize("tree", SUITES, indirect=True)
def test_network_manager_reads_what_netplan_writes(planned: str, tree: Path) -> None:
    """It refuses a whole profile for one word that it does not know; nothing is booted."""
    wanted = PLANS[planned]
    prepare(tree, IMAGES["netplan-NetworkManager"])
    deploy(tree, wanted.nics, len(wanted.addresses), wanted.dns)
    profiles = "run/NetworkManager/system-connections"
    read = f'for file in {profiles}/*; do chroot . nmcli --offline connection modify connection.zone "" <$file; done'
    said = run(
        *("unshare", "--mount", "bash", "-euc"),
        f'cd "$1"\nmount -t tmpfs tmpfs run\nchroot . netplan generate 2>&1\n{read} 2>&1',
        *("bash", tree),
    )
    assert said.count("[connection]") == len(wanted.addresses) and "rror" not in said, said
    keys = ("address", "gateway", "route", "dns=")
    lines = [line for line in said.splitlines() if line.startswith(keys) and not line.startswith("address-data")]
    values = [value for line in lines for value in re.split("[=,;]", line)]
    static = {one for addresses in wanted.addresses for one in addresses if not one.startswith(LEASES)}
    gateways = {gateway for gateway, _ in wanted.routes if gateway and static}
    assert {*static, *gateways, *wanted.dns.split()} <= set(values), said
    assert said.count("ignore-auto-dns=true") == (2 * len(wanted.addresses) if wanted.dns else 0)  # of IPv4 and IPv6
