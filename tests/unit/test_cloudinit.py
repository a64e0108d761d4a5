"""cloud-init's seed: in a version that the guest's cloud-init understands, and readable by root only."""

from __future__ import annotations

import json
import re

import pytest
from credentials import public_key
from support import recorded

from imageos import ganeti
from imageos.guests import cloudinit
from imageos.guests.target import Target
from imageos.network import RESOLV_CONF, Interface
from imageos.settings import Settings

INSTANCE = ganeti.instance(recorded("create-kvm-network"))
STATIC = Interface("eth0", "aa:00:00:c5:90:29", False, "198.51.100.2/24", "198.51.100.1", False, ("198.51.100.53",))
ROUTED = Interface("eth0", "aa:00:00:9a:16:b4", False, "192.0.2.60/32", "", True, ("192.0.2.53",), ("example.org",))


def network_config(target: Target, interface: Interface, *programs: str) -> dict[str, object]:
    for program in programs:
        target.write(f"/usr/sbin/{program}", "", mode=0o755)
    cloudinit.write_seed(target, INSTANCE, Settings(), [interface])
    return dict(json.loads(target.read(f"{cloudinit.SEED}/network-config") or ""))


@pytest.mark.parametrize(
    ("programs", "version"),
    [
        (["netplan"], 2),
        (["netplan", "NetworkManager"], 2),
        ([], 2),  # networkd
        (["NetworkManager"], 1),
        (["ifup"], 1),
        (["ifup", "netplan"], 1),
    ],
)
def test_version_that_the_guest_can_follow(target: Target, programs: list[str], version: int) -> None:
    assert network_config(target, STATIC, *programs)["version"] == version


def test_version_1(target: Target) -> None:
    assert network_config(target, STATIC, "ifup")["config"] == [
        {
            "type": "physical",
            "name": "eth0",
            "mac_address": "aa:00:00:c5:90:29",
            "subnets": [
                {
                    "type": "static",
                    "address": "198.51.100.2/24",
                    "gateway": "198.51.100.1",
                    "dns_nameservers": ["198.51.100.53"],
                }
            ],
        },
    ]


def test_version_1_has_a_gateway_for_everything_on_the_link(target: Target) -> None:
    """ifupdown adds the gateway with `onlink`; without a gateway, cloud-init 20.4 to 25.1 fails (KeyError)."""
    (only,) = cloudinit.version1([ROUTED])["config"]
    (subnet,) = only["subnets"]
    assert (subnet["address"], subnet["gateway"]) == ("192.0.2.60/32", "169.254.1.1")
    assert (subnet["dns_nameservers"], subnet["dns_search"]) == (["192.0.2.53"], ["example.org"])


def test_version_1_dhcp() -> None:
    (only,) = cloudinit.version1([Interface("eth1", "aa:00:00:00:00:02", True)])["config"]
    assert only["subnets"] == [{"type": "dhcp4"}]


def test_resolv_conf_where_nobody_writes_it(target: Target) -> None:
    network_config(target, ROUTED, "ifup")
    assert target.read("/etc/resolv.conf") == "search example.org\nnameserver 192.0.2.53\n"


@pytest.mark.parametrize("is_link", [True, False])
def test_resolv_conf_that_is_no_file(target: Target, is_link: bool) -> None:
    """A link to a file that only a running guest has, or a directory, as a container may leave it."""
    if is_link:
        target.symlink("../run/systemd/resolve/stub-resolv.conf", RESOLV_CONF)
    else:
        target.write(f"{RESOLV_CONF}/file", "")
    network_config(target, ROUTED, "ifup")
    assert target.read(RESOLV_CONF) == "search example.org\nnameserver 192.0.2.53\n"
    assert not target.exists("/run/systemd")


def test_resolv_conf_where_resolvconf_only_asks_a_resolved_that_is_off(target: Target) -> None:
    target.write("/usr/bin/resolvectl", "", mode=0o755)
    target.symlink("../bin/resolvectl", "/usr/sbin/resolvconf")
    network_config(target, ROUTED, "ifup")
    assert target.read(RESOLV_CONF) == "search example.org\nnameserver 192.0.2.53\n"


@pytest.mark.parametrize("helper", ["resolvconf", "resolved", "netplan alone"])
def test_resolv_conf_is_left_to_who_writes_it(target: Target, helper: str) -> None:
    target.write("/etc/resolv.conf", "theirs\n")
    if helper == "resolved":
        for directory in ("usr/lib/systemd/system", "etc/systemd/system/multi-user.target.wants"):
            target.write(f"{directory}/systemd-resolved.service", "[Service]\n")
    network_config(target, ROUTED, *{"resolvconf": ["ifup", "resolvconf"], "resolved": ["ifup"]}.get(helper, []))
    assert target.read("/etc/resolv.conf") == "theirs\n"


def test_nothing_counts_more_than_the_seed(target: Target) -> None:
    """An image's own source and name, and Ubuntu's installer, which leaves a network of its own."""
    target.write("/etc/cloud/ds-identify.cfg", "policy: enabled\ndatasource: Ec2\n")
    target.write(
        "/etc/cloud/cloud.cfg.d/50-source.cfg",
        "a: b\ndatasource:\n  NoCloud: {seedfrom: /there/}\nfqdn: t.example.org\n",
    )
    target.write("/etc/cloud/cloud.cfg.d/90-installer-network.cfg", "network: {version: 2}\n")
    target.write("/etc/cloud/cloud.cfg", "datasource: {Ec2: {strict_id: false}}\n")
    cloudinit.write_seed(target, INSTANCE, Settings(), ())
    assert target.read("/etc/cloud/ds-identify.cfg") == "policy: enabled\n"
    assert target.read("/etc/cloud/cloud.cfg.d/50-source.cfg") == "a: b\n"
    assert target.read("/etc/cloud/cloud.cfg") == "datasource: {Ec2: {strict_id: false}}\n"
    assert target.read("/etc/cloud/cloud.cfg.d/90-installer-network.cfg") == "network: {version: 2}\n"  # no NIC
    cloudinit.write_seed(target, INSTANCE, Settings(), [STATIC])
    assert target.read("/etc/cloud/cloud.cfg.d/90-installer-network.cfg") == ""


def test_file_behind_ours_is_read_before(target: Target) -> None:
    """The last of cloud.cfg.d counts; the other files of imageos stay where they are."""
    said = "datasource_list: [Ec2]\nvendor_data: {enabled: false}\n"
    directory = "/etc/cloud/cloud.cfg.d"
    for name in ("90_dpkg.cfg", "zz-imageos-user.cfg", "zzz.cfg", "zz-imagf.cfg", "zzz.txt"):
        target.write(f"{directory}/{name}", said)
    for _ in range(2):
        cloudinit.write_seed(target, INSTANCE, Settings(), ())
        names = [path.rpartition("/")[2] for path in target.glob(f"{directory}/*")]
        assert names == ["90_dpkg.cfg", "zz-image-zz-imagf.cfg", "zz-image-zzz.cfg", "zz-imageos.cfg", "zzz.txt"]
    assert target.read(f"{directory}/zz-image-zzz.cfg") == said


MENU, DEFAULT = "/boot/grub/grub.cfg", "/etc/default/grub.d/50-cloud.cfg"


@pytest.mark.parametrize(
    ("path", "text", "named"),
    [
        (MENU, "linux /vmlinuz root=UUID=1 ds=nocloud\\;s=http://me:secret@there/ quiet\n", "ds="),
        (MENU, "linux /vmlinuz root=UUID=1 'ds=nocloud;h=other' ci.ds=Ec2\n", "ds=, ci.ds="),
        (MENU, "linux /vmlinuz root=UUID=1 ci.datasource=Ec2 cc: {locale: C} end_cc\n", "ci.datasource=, cc:"),
        (MENU, "linux /vmlinuz root=UUID=1 cloud-config-url=http://there/\n", "cloud-config-url="),
        (DEFAULT, 'GRUB_CMDLINE_LINUX="quiet network-config=e30="\n', "network-config="),
        (DEFAULT, "export GRUB_CMDLINE_LINUX_DEFAULT+='ds=OpenStack'\n", "ds="),
        (DEFAULT, '# GRUB_CMDLINE_LINUX="ds=Ec2"\nGRUB_CMDLINE_LINUX="ds=nocloud rds=x network-config=disabled"\n', ""),
    ],
)
def test_command_line_that_counts_more_than_the_seed_is_named(
    target: Target, capfd: pytest.CaptureFixture[str], path: str, text: str, named: str
) -> None:
    target.write(path, text)
    cloudinit.write_seed(target, INSTANCE, Settings(), ())
    said = capfd.readouterr()
    warnings = [line for line in (said.out + said.err).splitlines() if "warning" in line]
    assert len(warnings) == bool(named) and all(f"the kernel's {named} more than" in line for line in warnings), said
    assert "secret" not in said.out + said.err


def test_menu_that_is_there_counts_more_than_what_the_next_will_have(
    target: Target, capfd: pytest.CaptureFixture[str]
) -> None:
    target.write(DEFAULT, "GRUB_CMDLINE_LINUX=ds=Ec2\n")
    target.write(MENU, "linux /vmlinuz root=UUID=1\n")
    cloudinit.write_seed(target, INSTANCE, Settings(), ())
    assert "warning" not in "".join(capfd.readouterr())


def test_what_keeps_root_out_of_a_guest_with_cloud_init(
    target: Target, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Target, "run", lambda _self, _argv: "permitrootlogin no\n")
    settings = Settings(ssh_authorized_keys=public_key("me@home"))
    cloudinit.write_seed(target, INSTANCE, settings, ())
    assert "warning" not in capfd.readouterr().err
    target.write("/usr/sbin/sshd", "", mode=0o755)
    cloudinit.write_seed(target, INSTANCE, settings, [STATIC])
    assert "root's keys are of no use: sshd has PermitRootLogin no" in capfd.readouterr().err


def test_users_of_the_last_instance(target: Target) -> None:
    """An image that was captured of an instance does not make its user, whose key may be anybody's."""
    target.write(cloudinit.USERS, '#cloud-config\n{"users": [{"name": "tenant"}]}\n')
    cloudinit.forget_instance(target)
    assert not target.exists(cloudinit.USERS)


@pytest.mark.parametrize("is_given", [True, False])
def test_passwords_that_expire(is_given: bool, target: Target) -> None:
    """sshd would refuse root's key, too."""
    config = "chpasswd:\n  list: |\n    root:secret\na: b\n"
    target.write("/etc/cloud/cloud.cfg.d/50.cfg", config)
    cloudinit.write_seed(target, INSTANCE, Settings(ssh_authorized_keys=public_key("me@home") if is_given else ""), ())
    assert target.read("/etc/cloud/cloud.cfg.d/50.cfg") == ("a: b\n" if is_given else config)


@pytest.mark.parametrize(
    ("user_data", "parsed", "said"),
    [
        ("#cloud-config\nruncmd: [x]\n", "\n", ""),
        ("#cloud-config\nusers:\n- name: x\n bad\n", "line 4, column 2\n", "no YAML with keys: .*: line 4, column 2"),
        ("#cloud-config\nusers:\n- name: x\n", "\n", "ROOT_PASSWORD_HASH has no effect"),
        # a Python that tells what it was given
        ("#cloud-config\npassword: secret\n", "secret\n", "no YAML with keys: .* all of it$"),
        ("#cloud-config-archive\n- type: text/x-shellscript\n", None, ""),
        ("#!/bin/sh\r\ntrue\r\n", None, "end as on Windows"),
        ("#!/bin/sh\ntrue\n", None, ""),
    ],
)
def test_user_data_without_effect(
    user_data: str,
    parsed: str | None,
    said: str,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def run(_self: Target, _argv: list[str], input: str) -> str:
        assert parsed is not None and input == user_data
        return parsed

    monkeypatch.setattr(Target, "run", run)
    target.write("/usr/bin/python3", "", mode=0o755)
    cloudinit.warn_of_user_data(target, Settings(user_data=user_data, root_password_hash="$6$x"))
    warnings = capfd.readouterr().err
    assert re.search(said, warnings) if said else warnings == ""


def test_network_manager_refuses_no_profile_of_netplan(target: Target) -> None:
    """It refuses one with an IPv6 server and an IPv6 that is ignored, as netplan writes it without these words."""
    target.write("/etc/netplan/01-network-manager-all.yaml", "network: {renderer: NetworkManager}\n")
    assert network_config(target, STATIC, "netplan")["ethernets"]["eth0"]["dhcp6"] is True  # type: ignore[index]


def test_root_password() -> None:
    head, _, text = cloudinit.vendor_data(Settings(root_password_hash="$6$salt$hash")).partition("\n")
    assert head == "#cloud-config"
    root = {"name": "root", "lock_passwd": False, "hashed_passwd": "$6$salt$hash"}
    assert json.loads(text)["users"] == ["default", root]
    assert "users" not in json.loads(cloudinit.vendor_data(Settings()).partition("\n")[2])


def test_seed_of_the_image_is_replaced(target: Target) -> None:
    """The image's files may be readable by all, and would stay so."""
    for name in ("user-data", "network-config"):
        target.write(f"{cloudinit.SEED}/{name}", "of the image\n", mode=0o644)
    cloudinit.write_seed(target, INSTANCE, Settings(user_data="#!/bin/sh\nsecret\n"), ())
    assert not target.exists(f"{cloudinit.SEED}/network-config")
    assert target._mode(f"{cloudinit.SEED}/user-data") == 0o100600


# keys

KEY, LIMITED = public_key("free"), f'from="192.0.2.1" {public_key("limited")}'


def seeded(target: Target, user_data: str = "", keys: str = f"{LIMITED}\n{KEY}\n") -> dict[str, object]:
    target.write("/etc/shadow", "root:!:0:0:99999:7:::\n", mode=0o640)
    cloudinit.write_seed(target, INSTANCE, Settings(ssh_authorized_keys=keys, user_data=user_data), ())
    return dict(json.loads(target.read(f"{cloudinit.SEED}/meta-data") or ""))


def test_keys_with_options_go_where_cloud_init_leaves_them(target: Target) -> None:
    assert seeded(target)["public-keys"] == [KEY]
    assert target.read("/root/.ssh/authorized_keys") == f"{LIMITED}\n"
    config = json.loads((target.read(cloudinit.DEFAULT_USER) or "").partition("\n")[2])
    assert config == {"system_info": {"default_user": {"ssh_authorized_keys": [LIMITED]}}}
    assert target._mode(cloudinit.DEFAULT_USER) == 0o100600
    assert (target.read("/etc/shadow") or "").startswith("root:*:2")
    assert seeded(target, keys=KEY)["public-keys"] == [KEY]
    assert not target.exists(cloudinit.DEFAULT_USER)


@pytest.mark.parametrize(
    ("user_data", "is_disabled"),
    [
        ("#cloud-config\ndisable_root: true\n", True),
        ('#cloud-config\n{"users": [], "disable_root": true}\n', True),
        ('#cloud-config\n{"disable_root": true}\n', True),
        ("#cloud-config\n# disable_root: true\ndisable_root: false\n", False),
    ],
)
def test_user_data_may_disable_root(user_data: str, is_disabled: bool, target: Target) -> None:
    seeded(target, user_data)
    assert target.exists("/root/.ssh/authorized_keys") != is_disabled


# a new name


@pytest.mark.parametrize("is_seeded", [True, False])
def test_rename_without_another_instance(is_seeded: bool, target: Target) -> None:
    """Its seed is read again; of another data source, the configuration has the name."""
    seed = seeded(target)
    known = seed["instance-id"] if is_seeded else "iid-of-aws"
    cache = f"{cloudinit.INSTANCES}/{known}/{cloudinit.CACHE}"
    target.write("/var/lib/cloud/data/instance-id", f"{known}\n")
    cloudinit.rename(target, "new.example.net")
    assert not target.exists(cloudinit.NAME)  # it has not run
    target.write(cache, "")
    cloudinit.rename(target, "new.example.net")
    assert target.exists(cache) != is_seeded
    named = json.loads((target.read(cloudinit.NAME) or "\n{}").partition("\n")[2])
    assert named == ({} if is_seeded else {"hostname": "new", "fqdn": "new.example.net"})
    cloudinit.forget_instance(target)
    assert not target.exists(cloudinit.NAME)


@pytest.mark.parametrize(
    ("user_data", "is_known"),
    [
        ("#cloud-config\n{}", True),
        ("\n  #Cloud-Config\n{}", True),
        ("#!/bin/sh\n", True),
        ("From: me\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n", True),
        ("users: []\n", False),
        ("# a comment\n#cloud-config\n", False),
    ],
)
def test_user_data_that_cloud_init_knows(user_data: str, is_known: bool) -> None:
    assert cloudinit.is_known(user_data) == is_known


def test_servers_that_network_manager_would_refuse() -> None:
    """It refuses a profile with an IPv6 server and no IPv6 address."""
    servers = ("192.0.2.53", "2001:db8::53")
    interface = Interface("eth0", "aa:00:00:00:00:01", False, "192.0.2.10/24", dns=servers)

    def given(interface: Interface, for_network_manager: bool) -> object:
        return cloudinit.version1([interface], for_network_manager)["config"][0]["subnets"][0]["dns_nameservers"]

    assert given(interface, for_network_manager=False) == list(servers)
    assert given(interface, for_network_manager=True) == ["192.0.2.53"]
    assert given(interface._replace(address6="2001:db8::1/64"), for_network_manager=True) == list(servers)
