"""The new name replaces the old one wherever that is, and nothing else."""

from __future__ import annotations

import pytest

from imageos.guests import hostname
from imageos.guests.hostname import OWN, REPEATED
from imageos.guests.target import Target

OLD, NEW = "old.example.org", "new.example.net"


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("/etc/hostname", "old\n", "new\n"),
        ("/etc/hostname", "old.example.org", "new.example.net"),
        ("/etc/hostname", "# called old\n\nOLD\n", "# called old\n\nnew\n"),
        ("/etc/hostname", "older\n", None),
        ("/etc/hostname", "old.example.com\n", None),
        (
            "/etc/sysconfig/network",
            'NETWORKING=yes\nHOSTNAME="old.example.org"\n',
            'NETWORKING=yes\nHOSTNAME="new.example.net"\n',
        ),
        ("/etc/sysconfig/network", "HOSTNAME=old # old\n", "HOSTNAME=new # old\n"),
        ("/etc/sysconfig/network", "GATEWAYDEV=old\n", None),
        ("/etc/conf.d/hostname", "hostname='old'\n", "hostname='new'\n"),
        ("/etc/conf.d/hostname", 'HOSTNAME="old"\n', 'HOSTNAME="new"\n'),
        ("/etc/hosts", "127.0.1.1\told.example.org old # old\n", "127.0.1.1\tnew.example.net new # old\n"),
        ("/etc/hosts", "192.0.2.1 old-2 old.example.org.uk my.old xold\n", None),
        ("/etc/hosts", "#192.0.2.1 old\n", None),
        ("/etc/hosts", "192.0.2.1 old\r\n", "192.0.2.1 new\r\n"),
        ("/etc/mailname", "old.example.org\n", "new.example.net\n"),
        ("/etc/postfix/main.cf", "myhostname = old.example.org\nx = old\n", "myhostname = new.example.net\nx = old\n"),
        (
            "/etc/exim4/update-exim4.conf.conf",
            "dc_other_hostnames='old.example.org'\n",
            "dc_other_hostnames='new.example.net'\n",
        ),
        (
            "/etc/postfix/main.cf",
            "mydestination = $myhostname, old.example.org, old, localhost\nrelayhost = old\n",
            "mydestination = $myhostname, new.example.net, new, localhost\nrelayhost = old\n",
        ),
        (
            "/etc/exim4/update-exim4.conf.conf",
            "dc_other_hostnames='old.example.org;old:bold'\n",
            "dc_other_hostnames='new.example.net;new:bold'\n",
        ),
        (
            "/etc/postfix/main.cf",
            "mydestination = $myhostname,\n    old.example.org,\n\told, localhost\n relayhost = old\n",
            "mydestination = $myhostname,\n    new.example.net,\n\tnew, localhost\n relayhost = old\n",
        ),
        ("/etc/nullmailer/me", "old.example.org\n", "new.example.net\n"),
        ("/etc/mail/local-host-names", "localhost\nold.example.org\n", "localhost\nnew.example.net\n"),
        ("/etc/dma/dma.conf", "MAILNAME old.example.org\n", "MAILNAME new.example.net\n"),
        ("/etc/dma/dma.conf", "MAILNAME /etc/mailname\n", None),
        ("/etc/msmtprc", "domain old.example.org\nhost old\n", "domain new.example.net\nhost old\n"),
        ("/etc/salt/minion_id", "old.example.org", "new.example.net"),
        ("/etc/chef/client.rb", 'node_name "old.example.org"\n', 'node_name "new.example.net"\n'),
        ("/etc/zabbix/zabbix_agentd.d/*.conf", "Hostname=old.example.org\n", "Hostname=new.example.net\n"),
        (
            "/etc/icinga2/zones.conf",
            'object Zone "old" {\n  endpoints = [ "old" ]\n}\nobject Zone "older" {\n',
            'object Zone "new" {\n  endpoints = [ "new" ]\n}\nobject Zone "older" {\n',
        ),
        ("/etc/datadog-agent/datadog.yaml", "hostname: old\n", "hostname: new\n"),
        ("/etc/netdata/netdata.conf", "    hostname = old\n", "    hostname = new\n"),
        ("/etc/snmp/snmpd.conf", "sysName old\n", "sysName new\n"),
        ("/etc/machine-info", 'PRETTY_HOSTNAME="old"\n', 'PRETTY_HOSTNAME="new"\n'),
        ("/etc/machine-info", 'PRETTY_HOSTNAME="The old one"\n', None),
        ("/etc/puppet/puppet.conf", "[main]\ncertname = old.example.org\n", "[main]\ncertname = new.example.net\n"),
        ("/etc/salt/minion.d/*.conf", "id: old.example.org\n", "id: new.example.net\n"),
        ("/etc/zabbix/zabbix_agentd.conf", "Hostname=old\nServer=old\n", "Hostname=new\nServer=old\n"),
        ("/etc/telegraf/telegraf.conf", '  hostname = "old"\n', '  hostname = "new"\n'),
        ("/etc/collectd/collectd.conf", 'Hostname "old.example.org"\n', 'Hostname "new.example.net"\n'),
        ("/etc/munin/munin-node.conf", "host_name old\n", "host_name new\n"),
        ("/etc/icinga2/constants.conf", 'const NodeName = "old"\n', 'const NodeName = "new"\n'),
        ("/etc/ssmtp/ssmtp.conf", "hostname=old\nmailhub=old\n", "hostname=new\nmailhub=old\n"),
        ("/var/lib/cloud/data/previous-hostname", "old", "new"),
        (
            "/var/lib/cloud/data/set-hostname",
            '{\n "fqdn": "old.example.org",\n "hostname": "old"\n}\n',
            '{\n "fqdn": "new.example.net",\n "hostname": "new"\n}\n',
        ),
        ("/etc/dhcp/dhclient.conf", 'send host-name "old";\n', 'send host-name "new";\n'),
        ("/etc/dhcp/dhclient.conf", "send host-name = gethostname();\n", None),
        (
            "/etc/cloud/cloud.cfg.d/*.cfg",
            "hostname: old\nfqdn: 'old.example.org'\n",
            "hostname: new\nfqdn: 'new.example.net'\n",
        ),
        ("/etc/cloud/cloud.cfg.d/*.cfg", "preserve_hostname: true\nname: old\n", None),
        ("/var/lib/cloud/seed/*/meta-data", '{"local-hostname": "old"}\n', '{"local-hostname": "new"}\n'),
        ("/var/lib/cloud/seed/*/meta-data", "instance-id: old\n", None),
        ("/etc/sysconfig/network-scripts/ifcfg-*", "DHCP_HOSTNAME=old\n", "DHCP_HOSTNAME=new\n"),
    ],
)
def test_replace(path: str, before: str, after: str | None) -> None:
    pattern = {**OWN, **REPEATED}[path]
    assert hostname.replace(before, pattern, OLD, NEW) == (before if after is None else after)
    if after:
        assert hostname.replace(after, pattern, OLD, NEW) == after


def test_one_label() -> None:
    assert hostname.replace("127.0.1.1 old.example.org old\n", REPEATED["/etc/hosts"], "old", "new.example.net") == (
        "127.0.1.1 old.example.org new\n"
    )


def test_a_name_that_is_nowhere(target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    assert not hostname.rename(target, "old.example.org", "new.example.org")
    assert capfd.readouterr().err == (
        "imageos: the guest is not renamed to new.example.org: the name old.example.org is nowhere in it\n"
    )


# create: the name of the image

TEMPLATE = {
    "/etc/hostname": ("template\n", "new\n"),
    "/etc/mailname": ("template.example.org\n", "new.example.net\n"),
    "/etc/hosts": (
        "127.0.0.1 localhost\n127.0.1.1 template.example.org template\n192.0.2.9 template.example.org other\n",
        "127.0.0.1 localhost\n127.0.1.1\tnew.example.net new\n192.0.2.9\tother\n",
    ),
    "/etc/postfix/main.cf": ("myhostname = template.example.org\n", "myhostname = new.example.net\n"),
    "/etc/cloud/cloud.cfg.d/90_site.cfg": ("hostname: template\n", "hostname: new\n"),
    "/etc/dhcp/dhclient.conf": ('send host-name "template";\n', 'send host-name "new";\n'),
}


def test_write_replaces_the_name_of_the_image(target: Target) -> None:
    for path, (before, _) in TEMPLATE.items():
        target.write(path, before)
    hostname.write(target, NEW)
    assert {path: target.read(path) for path in TEMPLATE} == {path: after for path, (_, after) in TEMPLATE.items()}


@pytest.mark.parametrize("own", ["", "localhost\n", "localhost.localdomain\n"])
def test_write_replaces_no_name_that_all_have(own: str, target: Target) -> None:
    target.write("/etc/hostname", own)
    target.write("/etc/hosts", "127.0.0.1 localhost.localdomain localhost\n127.0.1.1 new.example.net new\n")
    target.write("/etc/mailname", "of-the-image\n")
    hostname.write(target, NEW)
    assert target.read("/etc/hosts") == "127.0.0.1 localhost.localdomain localhost\n127.0.1.1\tnew.example.net new\n"
    assert target.read("/etc/mailname") == "new.example.net\n"


def test_addresses_of_the_image(target: Target) -> None:
    """Another machine may have the address by which the image is known; the new name would lead there."""
    before = (
        "127.0.0.1 localhost\n192.0.2.9 t.example.org t # it\n::1 t localhost\n2001:db8::9 t other # x\n#192.0.2.9 t\n"
    )
    target.write("/etc/hostname", "t\n")
    target.write("/etc/hosts", before)
    hostname.write(target, NEW)
    assert target.read("/etc/hosts") == (
        "127.0.0.1 localhost\n127.0.1.1\tnew.example.net new\n::1 new localhost\n2001:db8::9\tother # x\n#192.0.2.9 t\n"
    )
    target.write("/etc/hosts", "192.0.2.10 new.example.net new\n")  # deployed again, from what was captured of it
    hostname.write(target, NEW)
    assert "192.0.2.10 new.example.net new\n" in (target.read("/etc/hosts") or "")


@pytest.mark.parametrize("is_renamed", [True, False])
def test_what_still_has_the_old_name(is_renamed: bool, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever it means there, the operator hears of it; not of comments, other names, keys or what cannot be text."""
    target.write("/etc/hostname", f"{OLD}\n")
    for name, text in {
        "site/deep/app.ini": f"a=b\nurl=https://{OLD.upper()}/x\n",
        "comment.conf": f"  # {OLD}\n; {OLD}\n",
        "others.conf": f"x{OLD} {OLD}.uk a.{OLD} {OLD}-2\n",
        "binary": f"\0{OLD}\n",
        "large": f"{OLD}\n" + "x" * 70_000,
        "last.conf": f"name={OLD}.",
        "ssh/ssh_host_rsa_key.pub": f"ssh-rsa AAAA root@{OLD}\n",
        "lvm/backup/vg0": f'creation_host = "{OLD}"\n',
    }.items():
        target.write(f"/etc/{name}", text)
    target.symlink("site/deep/app.ini", "/etc/link")
    if is_renamed:
        assert hostname.rename(target, OLD, NEW)
    else:
        hostname.write(target, NEW)
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    where = "/etc/last.conf, /etc/site/deep/app.ini"
    assert said == [f"imageos: warning: the old name {OLD} stays in {where}: what it means there is not known"]
