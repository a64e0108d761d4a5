"""The hook `interfaces`: trees of the distributions after create, and the real programs that read its files."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import trees
from support import HANGS, SITE, TESTS, Node, mounted, partitions, run

from imageos.guests.target import opened

MakeDisk = Callable[..., Path]
GOLDEN = Path(__file__).parent / "golden"
UNIT = "[Service]\n"
X = "#!/bin/sh\n"


# Distributions


def enabled(*services: str) -> dict[str, str]:
    """Return units, and what `systemctl enable` adds."""
    directories = ("usr/lib/systemd/system", "etc/systemd/system/multi-user.target.wants")
    return {f"{directory}/{service}.service": UNIT for directory in directories for service in services}


NM = {**enabled("NetworkManager"), "usr/sbin/NetworkManager": X}
UDEV = {"usr/lib/udev/rules.d/80-net-setup-link.rules": ""}
WIRED = "[connection]\nid=Wired\ntype=ethernet\ninterface-name=enp1s0\n"
GENERATORS = "usr/lib/systemd/system-generators"
NETPLAN = {"usr/sbin/netplan": X, f"{GENERATORS}/netplan": X}
CLOUD_INIT = {
    "usr/bin/cloud-init": X,
    "etc/cloud/cloud.cfg": "users: [default]\n",
    f"{GENERATORS}/cloud-init-generator": X,
    "usr/lib/systemd/system/cloud-init-local.service": UNIT,
    "etc/systemd/system/cloud-init.target.wants/cloud-init-local.service": UNIT,
}
DISTRIBUTIONS: dict[str, dict[str, str]] = {
    "fedora": {
        **trees.SYSTEMD, **NM, **UDEV,
        "etc/os-release": "ID=fedora\nVERSION_ID=42\n",
        "etc/NetworkManager/system-connections/enp1s0.nmconnection": WIRED,
    },
    "rhel9": {
        **trees.SYSTEMD, **NM, **UDEV,
        "etc/os-release": 'ID="rhel"\nID_LIKE="fedora"\nVERSION_ID="9.4"\n',
        "etc/sysconfig/network-scripts/readme-ifcfg-rh.txt": "",
        "etc/sysconfig/network-scripts/ifcfg-enp1s0": "DEVICE=enp1s0\nBOOTPROTO=dhcp\n",
    },
    "rhel8": {
        **trees.SYSTEMD, **NM, **UDEV,
        "etc/os-release": 'ID="rhel"\nID_LIKE="fedora"\nVERSION_ID="8.10"\n',
        "etc/sysconfig/network": "# Created by anaconda\nGATEWAY=192.0.2.254\n",
        "etc/sysconfig/network-scripts/ifcfg-enp1s0": "DEVICE=enp1s0\nBOOTPROTO=dhcp\n",
    },
    "rhel6": {
        **trees.SYSVINIT, **UDEV,
        "etc/redhat-release": "CentOS release 6.10 (Final)\n",
        "etc/os-release": "",
        "etc/sysconfig/network": "NETWORKING=yes\nHOSTNAME=image.example.net\n",
        "etc/init.d/network": X,
        "etc/rc3.d/S10network": X,
        "etc/rc2.d/S10network": X,
        "etc/sysconfig/network-scripts/ifcfg-eth0": "DEVICE=eth0\nHWADDR=52:54:00:12:34:56\nBOOTPROTO=dhcp\n",
        "etc/udev/rules.d/70-persistent-net.rules": "of the image\n",
    },
    "opensuse": {
        **trees.SYSTEMD, **UDEV,
        "etc/os-release": 'ID="opensuse-leap"\nID_LIKE="suse opensuse"\nVERSION_ID="15.6"\n',
        "etc/sysconfig/network/ifcfg-lo": "IPADDR=127.0.0.1/8\n",
        "etc/sysconfig/network/ifcfg-eth0": "BOOTPROTO='dhcp'\nSTARTMODE='auto'\n",
        "etc/sysconfig/network/routes": "default 192.0.2.254 - -\n",
        "etc/sysconfig/network/config": '# a comment\nNETCONFIG_DNS_STATIC_SERVERS=""\nNETCONFIG_DNS_POLICY="auto"\n',
        **enabled("wicked"),
        "usr/sbin/ifup": X,
    },
    "arch": {
        **trees.SYSTEMD, **UDEV,
        "etc/os-release": "ID=arch\n",
        **enabled("systemd-networkd", "systemd-resolved"),
        "etc/systemd/network/20-ethernet.network": "[Match]\nName=en*\n[Network]\nDHCP=yes\n",
    },
    "alpine": {
        **trees.OPENRC,
        "etc/os-release": "ID=alpine\nVERSION_ID=3.20.0\n",
        "etc/network/interfaces": "auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n",
        "etc/init.d/networking": X,
        "etc/runlevels/boot/hostname": X,
        "sbin/ifup": X,
        "sbin/udhcpc": X,
    },
    "gentoo": {
        **trees.OPENRC, **UDEV,
        "etc/os-release": "ID=gentoo\n",
        "etc/conf.d/hostname": '# Set to the hostname of this machine\nhostname="localhost"\n',
        "etc/conf.d/net": 'config_enp1s0="dhcp"\n',
        "etc/init.d/net.lo": X,
        "etc/init.d/net.enp1s0": X,
        "etc/runlevels/default/net.enp1s0": X,
    },
    "ubuntu": {
        **trees.SYSTEMD, **UDEV,
        "etc/os-release": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n',
        **NETPLAN, **enabled("systemd-networkd", "systemd-resolved"),
        "etc/netplan/50-cloud-init.yaml": "network:\n  version: 2\n  ethernets:\n    ens3: {dhcp4: true}\n",
    },
    "ubuntu-cloud": {
        **trees.SYSTEMD, **UDEV,
        "etc/os-release": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n',
        **NETPLAN, **CLOUD_INIT, **enabled("systemd-networkd", "systemd-resolved"),
        "etc/netplan/50-cloud-init.yaml": "network:\n  version: 2\n  ethernets:\n    ens3: {dhcp4: true}\n",
    },
}  # fmt: skip
# NIC 0 has an address in a gnt-network, NIC 1 uses DHCP
NICS = {"NIC_1_IP": "", "NIC_1_MODE": "bridged", "OSP_DNS_SEARCH": "example.org"}
# Files that create itself writes
NOT_OURS = re.compile(
    r"etc/(fstab|hosts|machine-id|inittab|securetty|shadow|ssh/.*|cloud/.*|default/.*)|boot/.*|lost\+found/.*"
    r"|etc/systemd/system/getty.*|var/lib/cloud/seed/nocloud/(meta|user|vendor)-data|.autorelabel"
)


@pytest.fixture
def node(node: Node) -> Node:
    (SITE / "hooks/interfaces").chmod(0o755)
    return node


@pytest.fixture
def deployed(node: Node, disk: MakeDisk, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Deploy a distribution; return its files and links afterwards."""

    def make(name: str, **overrides: object) -> dict[str, str]:
        tree = tree_of(name, tmp_path / name)
        trees.tarball(tree, node.images / f"{name}-{trees.ARCH}.tar.gz")
        target = disk()
        node.create(target, env="create-kvm-network", OSP_IMAGE_NAME=name, **{**NICS, **overrides}).ok()
        with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
            return contents(guest)

    return make


def tree_of(name: str, top: Path) -> Path:
    tree = trees.guest(top, DISTRIBUTIONS[name])
    for path, text in DISTRIBUTIONS[name].items():
        (tree / path).chmod(0o755 if text == X else 0o644)
    return tree


def contents(top: Path) -> dict[str, str]:
    found = {}
    for path in sorted(top.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(top))] = f"-> {os.readlink(path)}\n"
        elif path.is_file() and path.stat().st_size < 1 << 16:
            found[str(path.relative_to(top))] = path.read_text(errors="replace")
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return the changes of the hook to a tree as one text."""
    text = ""
    for path in sorted(before.keys() | after.keys()):
        if NOT_OURS.fullmatch(path) or path.startswith("var/") and "seed/nocloud/" not in path:
            continue
        if path not in after:
            text += f"#### {path}: removed\n"
        elif before.get(path) != after[path]:
            text += f"#### {path}\n{after[path]}"
    return text


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(name: str, deployed: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    after = deployed(name)
    text = changes(contents(tmp_path / name), after)
    assert text == (GOLDEN / name).read_text()


def test_site_files(node: Node, deployed: Callable[..., dict[str, str]]) -> None:
    """As with ganeti-instance-image: shell files, the subnet's after the instance's."""
    networks = SITE / "networks"
    node.write(networks / "instances/inst1.example.org", "ADDRESS=203.0.113.7\nSUBNET=vlan$((40 + 2))\n")
    node.write(networks / "subnets/vlan42", 'NETMASK=255.255.255.0\nGATEWAY=${ADDRESS%.*}.1\nDNS_SERVERS="192.0.2.1"\n')
    found = deployed("ubuntu")["etc/netplan/10-imageos.yaml"]
    assert '"203.0.113.7/24"' in found and '"via": "203.0.113.1"' in found and '"192.0.2.1"' in found
    assert "198.51.100.2" not in found


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ("ADDRESS=203.0.113.7\nSUBNET=other\n", "subnets/other"),
        ("ADDRESS=203.0.113.7\n", "names a subnet that has no file"),
        ("SUBNET=lan\n", "does not set ADDRESS"),
        ("ADDRESS=203.0.113.700\nSUBNET=lan\n", "203.0.113.700/24 is not an IPv4 address"),
        ("ADDRESS='unterminated\n", "network file /etc/ganeti/instance-image/networks/instances/inst1.example.org"),
    ],
)
def test_site_files_that_are_wrong(instance: str, message: str, node: Node, disk: MakeDisk) -> None:
    node.write(SITE / "networks/instances/inst1.example.org", instance)
    node.write(SITE / "networks/subnets/lan", "NETMASK=24\nGATEWAY=203.0.113.1\n")
    target = disk()
    node.create(target, env="create-kvm-network").failed(message)
    assert target.stat().st_blocks == 0, "found before the first write"


@pytest.mark.parametrize("mistake", ["file", "tag"])
def test_a_mistake_fails_only_what_needs_it(mistake: str, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """Here the hook is off: a guest with cloud-init gets its network by the seed, any other from nobody."""
    (SITE / "hooks/interfaces").chmod(0o644)
    tags = {"NIC_0_NETWORK_TAGS": "dns:nonsense"} if mistake == "tag" else {}
    if mistake == "file":
        node.write(SITE / "networks/instances/inst1.example.org", "ADDRESS=203.0.113.700\nSUBNET=lan\n")
        node.write(SITE / "networks/subnets/lan", "NETMASK=24\n")
    said = "203.0.113.700/24 is not an IPv4 address" if mistake == "file" else "DNS server 'nonsense'"
    result = node.create(disk(), env="create-kvm-network", **tags).ok()
    assert [line for line in result.lines if "warning" in line and said in line and "is off" in line], result.log
    trees.tarball(tree_of("ubuntu-cloud", tmp_path / "tree"), node.images / f"cloud-{trees.ARCH}.tar.gz")
    node.create(disk(), env="create-kvm-network", OSP_IMAGE_NAME="cloud", **tags).failed(said)


def test_guest_without_any_network_program(node: Node, disk: MakeDisk) -> None:
    node.create(disk(), env="create-kvm-network").failed("interfaces", "nothing that could configure its network")


def test_instance_without_nics(node: Node, disk: MakeDisk) -> None:
    assert "has no NIC" in node.create(disk(), NIC_COUNT="0").ok().log


def test_rename_and_once_more(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """RENAME_HOOKS names the hook: it uses the files of the new name; a second run changes nothing."""
    node.defaults("RENAME_HOOKS=interfaces")
    trees.tarball(tree_of("ubuntu-cloud", tmp_path / "tree"), node.images / f"cloud-{trees.ARCH}.tar.gz")
    target = disk()
    node.create(target, env="create-kvm-network", OSP_IMAGE_NAME="cloud", **NICS).ok()
    node.write(SITE / "networks/instances/new.example.org", "ADDRESS=203.0.113.7\nSUBNET=lan\n")
    node.write(SITE / "networks/subnets/lan", "NETMASK=24\nGATEWAY=203.0.113.1\n")
    seen = []
    for _ in range(2):
        given = node.environment(target, env="create-kvm-network", **NICS, INSTANCE_NAME="new.example.org")
        node.call("rename", {**given, "OLD_INSTANCE_NAME": "inst1.example.org"}).ok()
        with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
            seen.append(contents(guest))
    assert "203.0.113.7/24" in seen[0]["var/lib/cloud/seed/nocloud/network-config"]
    assert "boot-new-instance, boot" in seen[0]["etc/cloud/cloud.cfg.d/99-imageos-network.cfg"]
    assert seen[0] == seen[1]


def test_a_resolv_conf_that_nobody_may_change(disk: MakeDisk, tmp_path: Path) -> None:
    """Forums advise it, against programs that write there."""
    guest = disk(16)
    run("mkfs.ext4", "-q", guest)
    with mounted(guest, tmp_path / "guest", None, "rw") as top:
        (top / "etc/ssh").mkdir(parents=True)
        for name in ("resolv.conf", "ssh/key"):
            (top / "etc" / name).write_text("of the image")
        run("chattr", "+i", top / "etc/resolv.conf", top / "etc/ssh/key")
        with opened(str(top)) as target:
            target.write("/etc/resolv.conf", "nameserver 192.0.2.53\n")
            target.remove("/etc/ssh/*")
        assert (top / "etc/resolv.conf").read_text() == "nameserver 192.0.2.53\n"
        assert os.listdir(top / "etc/ssh") == []


# Programs that read the files


# Results of the golden plans: addresses of eth0, and its default routes
OUTCOME = {
    "static-and-dhcp": ({"192.0.2.10/24"}, {"via 192.0.2.1"}),
    "routed": ({"192.0.2.10/32"}, {"scope link"}),
    "gateway-on-link": ({"203.0.113.9/32"}, {"via 192.0.2.1"}),
    "ipv6": ({"192.0.2.10/24", "2001:db8::a800:ff:fe00:1/64"}, {"via 192.0.2.1", "via 2001:db8::1"}),
    "ipv6-on-link": ({"192.0.2.10/24", "2001:db8::9/128"}, {"via 192.0.2.1", "via 2001:db8:f::1"}),
    "ipv6-link-local": ({"192.0.2.10/24", "2001:db8::a800:ff:fe00:1/64"}, {"via 192.0.2.1", "via fe80::1"}),
}
# A namespace with the first NIC; $1 is the tree of a Debian, the commands that configure the NIC follow
NAMESPACE = """
set -e
exec 2>&1
mount -t tmpfs tmpfs /run
cd "$1"
mount -t tmpfs tmpfs run
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys  # read-only: nobody waits for udev
ip link add eth0 address aa:00:00:00:00:01 type veth peer name peer
ip link set peer up
sysctl -q net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.eth0.accept_dad=0
"""
REPORT = """
echo REPORT
ip -o addr show dev eth0 scope global
ip -4 route show default; ip -6 route show default
"""
NETWORKD = """
mkdir -p run/systemd/netif
chroot . chown systemd-network: /run/systemd/netif
chmod a+r FROM/*.network
# a veth has no permanent address
sed -i s/PermanentMACAddress/MACAddress/ FROM/*.network
chroot . /lib/systemd/systemd-networkd >/run/log 2>&1 & networkd=$!
tries=3000
defaults() { { ip -4 route show default; ip -6 route show default; } 2>/dev/null | grep -c default; }
until [ "$(defaults)" = "$2" ] && ! ip addr show dev eth0 | grep -q tentative; do
  sleep 0.1
  tries=$((tries - 1)); [ $tries -gt 0 ] || break
done
kill $networkd
grep -v 'state file\\|Could not create' /run/log || true
"""
PROGRAMS = {
    "networkd": NETWORKD.replace("FROM", "etc/systemd/network"),
    "netplan": "chroot . /usr/libexec/netplan/generate\n" + NETWORKD.replace("FROM", "run/systemd/network"),
    "ifupdown": "mkdir -p run/network\nchroot . ifup --verbose eth0\n",
}


def golden(backend: str, plan: str) -> dict[str, str]:
    """Return path -> text of one plan in the golden files."""
    text = (TESTS / "unit/golden" / backend).read_text()
    return dict(re.findall(rf"^#### {plan}: (\S+)\n(.*?)(?=^####|\Z)", text, re.MULTILINE | re.DOTALL))


def give(tree: Path, files: Mapping[str, str], clear: str) -> None:
    for path in tree.glob(clear):
        path.unlink()
    for name, text in files.items():
        path = tree / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def in_namespace(tree: Path, commands: str, *arguments: str) -> str:
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c"]
        + [NAMESPACE + commands, "namespace", str(tree), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("plan", OUTCOME)
@pytest.mark.parametrize("backend", PROGRAMS)
def test_the_program_does_what_was_planned(backend: str, plan: str, debians: Callable[[str], Path]) -> None:
    tree = debians(backend)
    files = golden(backend, plan)
    give(tree, files, "etc/systemd/network/*.network" if backend == "networkd" else "etc/netplan/*.yaml")
    addresses, routes = OUTCOME[plan]
    output = in_namespace(tree, PROGRAMS[backend] + REPORT, str(len(routes)))
    before, report = output.split("REPORT\n")
    assert set(re.findall(r" inet6? (\S+)", report)) == addresses, output
    defaults = [line for line in report.splitlines() if line.startswith("default")]
    assert len(defaults) == len(routes), output
    assert all(any(word in line for line in defaults) for word in routes), output
    assert not re.search(r"Unknown|[Ii]nvalid|ignoring|Error", before), output


@pytest.mark.parametrize("plan", OUTCOME)
def test_network_manager_reads_its_files(plan: str, debians: Callable[[str], Path]) -> None:
    """nmcli loads a keyfile and prints how it understood it: nothing may be lost."""
    files = golden("NetworkManager", plan)
    assert files
    for path, text in files.items():
        argv = ["chroot", str(debians("network-manager")), "nmcli", "--offline", "connection", "modify"]
        done = subprocess.run([*argv, "connection.zone", ""], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), path
        given = {line for line in text.splitlines() if "=" in line}
        assert given <= set(done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize("plan", OUTCOME)
@pytest.mark.parametrize("renderer", ["netplan", "networkd", "eni"])
def test_cloud_init_reads_its_seed(renderer: str, plan: str, debians: Callable[[str], Path]) -> None:
    tree = debians("cloud-init")
    (text,) = golden("cloud-init-version-1" if renderer == "eni" else "cloud-init", plan).values()
    (tree / "tmp/config").write_text(text)
    output = in_namespace(
        tree,
        "chroot . cloud-init devel net-convert --network-data /tmp/config --kind yaml --directory /tmp/out"
        f" --distro debian --output-kind {renderer} --mac eth0,aa:00:00:00:00:01\n"
        "cat $(find tmp/out -type f)\nrm -r tmp/out",
    )
    addresses, routes = OUTCOME[plan]
    for word in [*addresses, *(route.split()[1] for route in routes if route.startswith("via"))]:
        assert word in output
