"""The small hooks of hooks.d, and the hook in README.rst, called on trees of several distributions."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import readme
from credentials import HASH, public_key
from hookfiles import hook_module
from hypothesis import given
from hypothesis import strategies as st
from support import recorded

from imageos import ganeti, logins
from imageos.errors import Failure
from imageos.guests import accounts, cloudinit
from imageos.guests.target import Target
from imageos.hook import Hook
from imageos.network import render
from imageos.settings import Settings

KEY, OTHER = public_key("me@home"), public_key("you@home", "ssh-rsa")
SHADOW = "daemon:*:19000:0:99999:7:::\nroot:*:19001:0:99999:7:::\nrooted:!:1::::::\n"
PASSWD = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\n"


def hook(
    target: Target,
    settings: Settings | None = None,
    action: str = "create",
    nics: bool = True,
    environ: dict[str, str] | None = None,
) -> Hook:
    instance = ganeti.instance({**recorded("create-kvm-network"), **({} if nics else {"NIC_COUNT": "0"})})
    return Hook(action, target, settings or Settings(), instance, "/dev/loop7", (), (), environ or {})


def put(root: Path, files: dict[str, str], mode: int = 0o644) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def content(root: Path) -> dict[str, object]:
    """Return every file with its text, and every link with its target."""
    return {
        str(path.relative_to(root)): path.readlink() if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


# ssh


def ssh(target: Target, action: str = "create", **values: str) -> None:
    hook_module("ssh").main(hook(target, Settings(**values), action))


def test_ssh_keys_of_root(guest: Path, target: Target) -> None:
    put(guest, {"etc/passwd": PASSWD})
    ssh(target, ssh_authorized_keys=f"{KEY}\n\n  {OTHER}\r\n")
    keys = guest / "root/.ssh/authorized_keys"
    assert keys.read_text() == f"{KEY}\n{OTHER}\n"
    assert [mode(keys), mode(keys.parent), mode(guest / "root")] == [0o600, 0o700, 0o700]


def test_ssh_keys_are_added_once(guest: Path, target: Target) -> None:
    put(guest, {"etc/passwd": PASSWD})
    put(guest, {"root/.ssh/authorized_keys": f"# of the image\n{OTHER}"}, mode=0o640)
    for _ in range(2):
        ssh(target, ssh_authorized_keys=f"{KEY}\n{OTHER}\n")
        assert (guest / "root/.ssh/authorized_keys").read_text() == f"# of the image\n{OTHER}\n{KEY}\n"
    assert mode(guest / "root/.ssh/authorized_keys") == 0o640


def test_ssh_keys_go_to_the_home_of_root(guest: Path, target: Target) -> None:
    put(guest, {"etc/passwd": "toor:x:0:0::/t:/bin/sh\nroot:x:0:0:root:/var/roothome:/bin/sh\n"})
    ssh(target, ssh_authorized_keys=KEY)
    assert (guest / "var/roothome/.ssh/authorized_keys").read_text() == f"{KEY}\n"


def test_ssh_keys_in_a_guest_without_passwd(guest: Path, target: Target) -> None:
    ssh(target, ssh_authorized_keys=KEY)
    assert (guest / "root/.ssh/authorized_keys").read_text() == f"{KEY}\n"


def test_ssh_keys_in_a_guest_without_sshd(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """For one with cloud-init, create says what keeps root out, but not this: user-data may install sshd."""
    put(guest, {"etc/passwd": PASSWD, "etc/cloud/cloud.cfg": ""})
    target.write("/usr/bin/cloud-init", "", mode=0o755)
    ssh(target, ssh_authorized_keys=KEY)
    assert "the guest has no sshd" in capfd.readouterr().err


def test_ssh_keys_stay_in_the_guest(guest: Path, target: Target, tmp_path: Path) -> None:
    outside = tmp_path / "node"
    outside.mkdir()
    put(guest, {"etc/passwd": PASSWD})
    (guest / "root").symlink_to(outside)
    ssh(target, ssh_authorized_keys=KEY)
    assert list(outside.iterdir()) == []
    assert target.read(f"{outside}/.ssh/authorized_keys") == f"{KEY}\n"


@pytest.mark.parametrize("old", ["*", "!", "!!", "", "$6$of$the-image", "!$6$of$the-image"])
def test_ssh_password(old: str, guest: Path, target: Target) -> None:
    put(guest, {"etc/passwd": PASSWD})
    put(guest, {"etc/shadow": SHADOW.replace("root:*", f"root:{old}")}, mode=0o640)
    for _ in range(2):
        ssh(target, root_password_hash=HASH)
        assert (guest / "etc/shadow").read_text() == SHADOW.replace("root:*", f"root:{HASH}")
    assert mode(guest / "etc/shadow") == 0o640
    assert (guest / "etc/passwd").read_text() == PASSWD


def test_ssh_password_counts(guest: Path, target: Target) -> None:
    """A hash in /etc/passwd, instead of x, would be used instead of that in /etc/shadow."""
    put(guest, {"etc/passwd": PASSWD.replace("root:x", "root:"), "etc/shadow": SHADOW})
    ssh(target, root_password_hash=HASH)
    assert (guest / "etc/passwd").read_text() == PASSWD


@pytest.mark.parametrize("shadow", [None, "", "daemon:*:19000::::::\n", "rooted:*:1::::::\n"])
def test_ssh_password_has_no_place(shadow: str | None, guest: Path, target: Target) -> None:
    put(guest, {"etc/passwd": PASSWD, **({} if shadow is None else {"etc/shadow": shadow})})
    with pytest.raises(Failure, match="^the guest's /etc/shadow has no line for root$") as raised:
        ssh(target, root_password_hash=HASH)
    assert "pwconv" in str(raised.value.hint)


def test_ssh_without_settings_changes_nothing(guest: Path, target: Target) -> None:
    put(guest, {"etc/passwd": PASSWD, "etc/shadow": SHADOW, "etc/ssh/ssh_host_rsa_key": "made by create"})
    before = content(guest)
    ssh(target)
    ssh(target, "rename")
    assert content(guest) == before


def test_ssh_replaces_host_keys_on_import(guest: Path, target: Target) -> None:
    put(
        guest, {"etc/ssh/ssh_host_rsa_key": "old", "etc/ssh/ssh_host_ed25519_key.pub": "old", "etc/ssh/sshd_config": ""}
    )
    ssh(target, "import")
    assert list(content(guest)) == ["etc/ssh/sshd_config"]


def test_ssh_says_no_secret(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    put(guest, {"etc/passwd": PASSWD, "etc/shadow": SHADOW})
    ssh(target, root_password_hash=HASH, ssh_authorized_keys=KEY)
    said = capfd.readouterr().err
    assert "root has 1 key; a password" in said
    assert HASH not in said and KEY.split()[1] not in said


@given(st.lists(st.sampled_from(["root", "daemon", "rooted", "", "#root"]), max_size=5), st.booleans())
def test_ssh_changes_one_field(names: Sequence[str], newline: bool) -> None:
    text = "\n".join(f"{name}:old:1:2" for name in names) + ("\n" if newline else "")
    changed = accounts.with_field(text, 1, "new")
    place = names.index("root") if "root" in names else None
    expected = [f"{name}:{'new' if number == place else 'old'}:1:2" for number, name in enumerate(names)]
    assert changed == "\n".join(expected) + ("\n" if newline else "")


# overlays


def test_overlays(guest: Path, target: Target, tmp_path: Path) -> None:
    put(tmp_path / "overlays/web", {"etc/motd": "of the site\n", "srv/.hidden": "x"})
    put(guest, {"etc/motd": "of the image\n", "etc/issue": "stays"})
    settings = Settings(overlay="web", overlays_dir=str(tmp_path / "overlays"))
    for _ in range(2):
        hook_module("overlays").main(hook(target, settings))
        assert content(guest) == {"etc/motd": "of the site\n", "etc/issue": "stays", "srv/.hidden": "x"}


def test_overlays_without_an_overlay(guest: Path, target: Target) -> None:
    hook_module("overlays").main(hook(target))
    assert content(guest) == {}


def test_overlays_that_is_missing(target: Target, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=f"^cannot read {tmp_path}/web: No such file or directory$"):
        hook_module("overlays").main(hook(target, Settings(overlay="web", overlays_dir=str(tmp_path))))


# zz_ddns

DHCLIENT = "option rfc3442 code 121 = array of unsigned integer 8;\nsend host-name = gethostname();\nrequest routers;\n"
DDNS = {
    "debian": (
        {"etc/dhcp/dhclient.conf": DHCLIENT},
        {"etc/dhcp/dhclient.conf": DHCLIENT.replace("= gethostname()", '"inst1"')},
    ),
    "ancestor": (  # it appended a line each time
        {"etc/dhcp3/dhclient.conf": "request routers;\nsend host-name image;\nsend host-name old;"},
        {"etc/dhcp3/dhclient.conf": 'request routers;\nsend host-name "inst1";\n'},
    ),
    "commented": (
        {"etc/dhcp/dhclient.conf": '#send host-name "andare.fugue.com";\n'},
        {"etc/dhcp/dhclient.conf": '#send host-name "andare.fugue.com";\nsend host-name "inst1";\n'},
    ),
    "redhat": (
        {
            "etc/sysconfig/network-scripts/ifcfg-eth0": "DEVICE=eth0\nDHCP_HOSTNAME=image.example.net\n",
            "etc/sysconfig/network-scripts/ifcfg-lan1": "DEVICE=lan1",
            "etc/sysconfig/network-scripts/ifcfg-lo": "DEVICE=lo\n",
        },
        {
            "etc/sysconfig/network-scripts/ifcfg-eth0": "DEVICE=eth0\nDHCP_HOSTNAME=inst1\n",
            "etc/sysconfig/network-scripts/ifcfg-lan1": "DEVICE=lan1\nDHCP_HOSTNAME=inst1\n",
            "etc/sysconfig/network-scripts/ifcfg-lo": "DEVICE=lo\n",
        },
    ),
    "dhcpcd with sections": (
        {"etc/dhcpcd.conf": "duid\ninterface eth1\nnogateway\n"},
        {"etc/dhcpcd.conf": "duid\nhostname\ninterface eth1\nnogateway\n"},
    ),
    "dhcpcd of interfaces": (
        {"etc/dhcpcd.conf": f"duid\n{render.DHCPCD_SECTIONS}\ninterface eth1\n"},
        {"etc/dhcpcd.conf": f"duid\nhostname\n{render.DHCPCD_SECTIONS}\ninterface eth1\n"},
    ),
    "dhcpcd": ({"etc/dhcpcd.conf": "#hostname\nduid\n"}, {"etc/dhcpcd.conf": "#hostname\nduid\nhostname\n"}),
}


@pytest.mark.parametrize("kind", DDNS)
def test_ddns(kind: str, guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    before, after = DDNS[kind]
    put(guest, before)
    for action in ("create", "rename", "import"):
        hook_module("zz_ddns").main(hook(target, action=action))
        assert content(guest) == after
    assert "warning" not in capfd.readouterr().err


def test_ddns_with_many_lines() -> None:
    begin = time.process_time()
    assert hook_module("zz_ddns").with_line("hostname\n" * 30_000, r"hostname", "hostname") == "hostname\n"
    assert time.process_time() - begin < 3, "quadratic: much more"


def test_ddns_of_many_files(target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """A line of the log for each name could fill the node's disk."""
    for number in range(100):
        target.write(f"/etc/sysconfig/network-scripts/ifcfg-{number}", "")
    hook_module("zz_ddns").main(hook(target))
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.endswith("and 92 more\n")


def test_ddns_of_a_client_that_needs_no_help(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    put(guest, {"usr/sbin/NetworkManager": ""})
    hook_module("zz_ddns").main(hook(target))
    assert list(content(guest)) == ["usr/sbin/NetworkManager"]
    assert "warning" not in capfd.readouterr().err


def test_ddns_without_a_client(target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    hook_module("zz_ddns").main(hook(target))
    assert "warning: the guest has no DHCP client" in capfd.readouterr().err


def test_ddns_without_a_network(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    put(guest, {"etc/dhcp/dhclient.conf": DHCLIENT})
    hook_module("zz_ddns").main(hook(target, nics=False))
    assert (guest / "etc/dhcp/dhclient.conf").read_text() == DHCLIENT
    assert capfd.readouterr().err == ""


# cloud-init

CONFIG = "etc/cloud/cloud.cfg.d/99_ganeti.cfg"


@pytest.fixture
def cloud(guest: Path) -> Path:
    put(guest, {"usr/bin/cloud-init": "#!/bin/sh\n"}, mode=0o755)
    (guest / "etc/cloud").mkdir(parents=True)
    return guest


def configured(cloud: Path, target: Target, settings: Settings | None = None, **environ: str) -> dict[str, object]:
    hook_module("cloud-init").main(hook(target, settings, environ=environ))
    first, _, rest = (cloud / CONFIG).read_text().partition("\n")
    assert first == "#cloud-config"
    return dict(json.loads(rest))


def test_cloud_init_user(cloud: Path, target: Target) -> None:
    assert configured(cloud, target, CINIT_USER="admin", CINIT_SSH_KEY=f"{KEY}\n{OTHER}\n") == {
        "disable_root": False,
        "ssh_pwauth": False,
        "groups": ["admin"],
        "users": [
            {
                "name": "admin",
                "primary_group": "admin",
                "groups": ["wheel", "adm", "systemd-journal"],
                "sudo": ["ALL=(ALL) NOPASSWD:ALL"],
                "shell": "/bin/bash",
                "lock_passwd": True,
                "ssh_authorized_keys": [KEY, OTHER],
            }
        ],
    }


def test_cloud_init_user_without_bash_or_sudo(cloud: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """As Alpine: sshd lets nobody in whose shell is not there."""
    target.write("/bin/sh", "")
    assert '"shell": "/bin/sh"' in json.dumps(configured(cloud, target, CINIT_USER="admin"))
    assert "the guest has no sudo: admin cannot become root" in capfd.readouterr().err
    for program in ("/bin/bash", "/usr/bin/sudo"):
        target.write(program, "", mode=0o755)
    assert '"shell": "/bin/bash"' in json.dumps(configured(cloud, target, CINIT_USER="admin"))
    assert capfd.readouterr().err == ""


def test_cloud_init_user_beside_root(cloud: Path, target: Target) -> None:
    """The seed's users, with root's password, replace those of the configuration."""
    seed = f"{cloudinit.SEED}/vendor-data"
    target.write(seed, cloudinit.vendor_data(Settings(root_password_hash="$6$a$b")), mode=0o600)
    for _ in range(2):
        users = configured(cloud, target, CINIT_USER="admin", CINIT_SSH_KEY=KEY)["users"]
        root = {"name": "root", "lock_passwd": False, "hashed_passwd": "$6$a$b"}
        assert json.loads((target.read(seed) or "").partition("\n")[2])["users"] == [*users, root]  # type: ignore
    assert (cloud / seed[1:]).stat().st_mode & 0o777 == 0o600


def test_cloud_init_user_with_another_seed(cloud: Path, target: Target) -> None:
    target.write(f"{cloudinit.SEED}/vendor-data", "#cloud-config\nusers: []\n")
    configured(cloud, target, CINIT_USER="admin")
    assert target.read(f"{cloudinit.SEED}/vendor-data") == "#cloud-config\nusers: []\n"


@pytest.mark.parametrize(
    "seed",
    ["1", "null", '{"users": 1}', '{"users": [1, "x", {"uid": 0}, [{}]]}', "[" * 100_000],
    ids=lambda seed: seed[:19],
)
def test_cloud_init_user_with_a_seed_that_makes_no_sense(seed: str, cloud: Path, target: Target) -> None:
    """On import it is that of the backup."""
    target.write(cloudinit.VENDOR_DATA, f"#cloud-config\n{seed}\n")
    configured(cloud, target, CINIT_USER="admin")
    text = target.read(cloudinit.VENDOR_DATA) or ""
    assert text == f"#cloud-config\n{seed}\n" or json.loads(text.partition("\n")[2])["users"][0]["name"] == "admin"


def test_cloud_init_resolv_conf(cloud: Path, target: Target) -> None:
    settings = Settings(dns_servers="192.0.2.1 2001:db8::1", dns_search="example.org example.net")
    assert configured(cloud, target, settings, CINIT_MANAGE_RESOLV_CONF="yes") == {
        "disable_root": False,
        "ssh_pwauth": False,
        "manage_resolv_conf": True,
        "resolv_conf": {
            "nameservers": ["192.0.2.1", "2001:db8::1"],
            "searchdomains": ["example.org", "example.net"],
            "domain": "example.org",
            "options": {"rotate": True, "timeout": 1},
        },
    }


def test_cloud_init_without_settings(cloud: Path, target: Target) -> None:
    assert configured(cloud, target, CINIT_MANAGE_RESOLV_CONF="no") == {"disable_root": False, "ssh_pwauth": False}


@pytest.mark.parametrize("name", ["CINIT_DISABLE_ROOT", "CINIT_SSH_PWAUTH"])
def test_cloud_init_logins(name: str, cloud: Path, target: Target) -> None:
    """Also where the seed says the contrary of root, because it has keys."""
    seed = f"{cloudinit.SEED}/vendor-data"
    target.write(seed, cloudinit.vendor_data(Settings(ssh_authorized_keys=KEY)))
    key = name.partition("_")[2].lower()
    for value, expected in (("no", False), ("", False), ("yes", True)):
        config = configured(cloud, target, None, **{name: value})
        assert config == {"disable_root": False, "ssh_pwauth": False, key: expected}
        in_seed = json.loads((target.read(seed) or "").partition("\n")[2])
        assert in_seed["disable_root"] is config["disable_root"]
    with pytest.raises(Failure, match=f"^{name}='on' is not accepted: it must be yes or no$"):
        configured(cloud, target, None, **{name: "on"})


def test_cloud_init_without_root(cloud: Path, target: Target) -> None:
    """create has put keys with options into root's file, where cloud-init would leave them."""
    limited = f'from="192.0.2.1" {KEY}'
    settings = Settings(ssh_authorized_keys=f"{limited}\n")
    accounts.authorize(target, logins.authorized_keys(f"{limited}\n{OTHER}\n"))
    configured(cloud, target, settings, CINIT_DISABLE_ROOT="yes")
    assert target.read("/root/.ssh/authorized_keys") == f"{OTHER}\n"


@pytest.mark.parametrize("name", ["Admin", "a b", "a:b", "-a", "a\nb", "../a"])
def test_cloud_init_user_with_a_wrong_name(name: str, cloud: Path, target: Target) -> None:
    with pytest.raises(Failure, match="^CINIT_USER=.* is not the name of a user$"):
        configured(cloud, target, CINIT_USER=name)
    assert not (cloud / CONFIG).exists()


def test_cloud_init_is_missing(guest: Path, target: Target) -> None:
    with pytest.raises(Failure, match="^the guest has no cloud-init$") as raised:
        hook_module("cloud-init").main(hook(target))
    assert "chmod -x /etc/ganeti/instance-image/hooks/cloud-init" in str(raised.value.hint)


def test_nothing_known_starts_ifupdown(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """Its init is none of those that are known, as CirrOS' is."""
    for name in ("sbin/ifup", "etc/network/interfaces"):
        (guest / name).parent.mkdir(parents=True, exist_ok=True)
        (guest / name).touch(0o755)
    hook_module("interfaces").main(hook(target))
    assert "nothing that is known here starts ifupdown when the guest boots" in capfd.readouterr().err
    assert "iface eth0" in (guest / "etc/network/interfaces").read_text()


def test_nothing_configures_the_network(guest: Path, target: Target) -> None:
    with pytest.raises(Failure, match="nothing that could configure its network: cloud-init, netplan, ") as raised:
        hook_module("interfaces").main(hook(target))
    assert "chmod -x /etc/ganeti/instance-image/hooks/interfaces" in str(raised.value.hint)


# The hook in README.rst


def test_example_of_the_readme(guest: Path, target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    example = ModuleType("example")
    exec(readme.block("#!/usr/bin/env python3"), example.__dict__)
    example.main(hook(target))
    assert "This is inst1.example.org" in (guest / "etc/motd").read_text()
    assert "imageos: " in capfd.readouterr().err
    with pytest.raises(Failure):
        example.main(hook(target, nics=False))
