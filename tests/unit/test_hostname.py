"""Where the old name stands, and only there, the new one is put."""

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
