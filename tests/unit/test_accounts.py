"""Root's account: keys with their options, and what in the guest would keep root out."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from credentials import HASH, public_key

from imageos import logins
from imageos.errors import Failure
from imageos.guests import accounts
from imageos.guests.target import Directory, Target

KEY, OTHER = public_key("me@home"), public_key("you@home", "ssh-rsa")
LIMITED = f'from="192.0.2.0/24",no-pty {KEY}'
KEYS = logins.authorized_keys(KEY)
TODAY = 20_000
SSHD = "permitrootlogin without-password\npubkeyauthentication yes\nauthorizedkeysfile .ssh/authorized_keys\n"


def with_keys(text: str, *lines: str) -> list[str]:
    return accounts.with_keys(text, logins.authorized_keys("\n".join(lines))).splitlines()


@pytest.mark.parametrize("old", [KEY, f"{KEY.rpartition(' ')[0]} another comment", f'from="*" {KEY}', f"no-pty\t{KEY}"])
def test_the_same_key_with_other_options_gives_way(old: str) -> None:
    """sshd takes the first line that lets in."""
    assert with_keys(f"# {KEY}\n{old}\n{OTHER}\n", LIMITED) == [f"# {KEY}", OTHER, LIMITED]
    assert with_keys(f"{LIMITED}\n{OTHER}", LIMITED) == [LIMITED, OTHER]


def test_one_key_with_two_sets_of_options() -> None:
    assert with_keys("", LIMITED, f'from="198.51.100.7" {KEY}') == [LIMITED, f'from="198.51.100.7" {KEY}']


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("*:19000:0:99999:7:::", "*:19000:0:99999:7:::"),
        ("*:0:0:99999:7:::", "*:20000:0:99999:7:::"),  # passwd -e
        ("*:19000:0:90:7:::", "*:20000:0:90:7:::"),  # older than its maximum
        ("*:19950:0:90:7:::", "*:19950:0:90:7:::"),
        ("*:19000:0:99999:7::19500:", "*:19000:0:99999:7:::"),  # expired
        ("*:19000:0:99999:7::1:", "*:19000:0:99999:7:::"),
        ("*:19000:0:99999:7::30000:", "*:19000:0:99999:7::30000:"),
        ("!:19000::::::", "*:19000::::::"),
        (f"!{HASH}:19000::::::", "*:19000::::::"),
        (f"{HASH}:::::::", f"{HASH}:::::::"),
        ("*:19000:0:-1:7:::", "*:19000:0::7:::"),  # PAM takes what is negative for long ago
        ("*:-1:-1:-1:-1:-1:-1:", "*:::::::"),
        ("*:x:0:99999999999:7:::", "*:x:0:99999999999:7:::"),
        ("*", "*"),
    ],
)
def test_root_is_admitted(before: str, after: str) -> None:
    others = "daemon:!:0:0:1:7::1:\n"
    assert accounts.admitted(f"{others}root:{before}\n{others}", TODAY) == f"{others}root:{after}\n{others}"


@pytest.mark.parametrize(
    ("links", "made"),
    [
        ({}, ""),
        ({"root": "/home/root"}, "/home/root"),
        ({"root": "home/../srv/root"}, "/srv/root"),
        ({"root": "/a", "a": "b"}, "/b"),
        ({"root/.ssh": "/srv/keys"}, "/srv/keys"),
        ({"root/.ssh": "../../../srv/keys"}, "/srv/keys"),
        ({"root": "/home", "home/.ssh": "keys"}, "/home/keys"),
        ({"root": "/a/b", "a": "/c"}, "/c/b"),
        ({"root": "a/b", "a": "../../c/d", "c": "e"}, "/e/d/b"),
    ],
)
def test_directories_that_are_links_to_nothing(
    links: dict[str, str], made: str, guest: Path, target: Target, capfd: pytest.CaptureFixture[str]
) -> None:
    """What they lead to is made, inside the guest."""
    for name, link in links.items():
        path = guest / name
        path.parent.mkdir(exist_ok=True)
        if link == "/home":
            (guest / "home").mkdir()
        path.symlink_to(link)
    accounts.authorize(target, logins.authorized_keys(KEY))
    assert target.read("/root/.ssh/authorized_keys") == f"{KEY}\n"
    said = capfd.readouterr().err
    assert ("which the image does not have: it is made" in said) == bool(made)
    assert not made or (guest / made.lstrip("/")).stat().st_mode & 0o777 == 0o700


def test_directory_that_cannot_be(guest: Path, target: Target) -> None:
    (guest / "root").symlink_to("root")
    with pytest.raises(Failure, match="the guest's /root: Too many levels of symbolic links"):
        accounts.authorize(target, logins.authorized_keys(KEY))


def test_directory_too_deep(guest: Path, target: Target) -> None:
    """Each level would be a directory of the guest."""
    (guest / "root").symlink_to("/a" * 50)
    with pytest.raises(Failure, match="the guest's /root: Too many levels of symbolic links"):
        accounts.authorize(target, logins.authorized_keys(KEY))


def test_today_is_a_day_of_shadow(target: Target) -> None:
    target.write("/etc/shadow", "root:*:0:0:99999:7:::\n")
    assert accounts.admit(target) and not accounts.admit(target)
    (changed,) = [int(accounts.field(target.read("/etc/shadow") or "", accounts.CHANGED))]
    assert changed == int(time.time()) // 86400


def sshd_that_says(text: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "run", lambda _self, _argv: text)
    target.write("/usr/sbin/sshd", "linked to libwrap.so.0", mode=0o755)
    target.write("/usr/lib/systemd/system/ssh.service", "[Service]\n")
    target.write("/etc/systemd/system/multi-user.target.wants/ssh.service", "")


def test_addresses_on_which_sshd_listens(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the machine that the image was made of."""
    sshd_that_says(f"{SSHD}listenaddress 192.0.2.77:22\nlistenaddress [2001:db8::7]:22\n", target, monkeypatch)
    said = ["sshd listens on 192.0.2.77, [2001:db8::7] only (ListenAddress)"]
    assert accounts.obstacles(target, KEYS, "", ["192.0.2.10"]) == said
    assert accounts.obstacles(target, KEYS, "", ["192.0.2.77"]) == []
    sshd_that_says(f"{SSHD}listenaddress [::]:22\nlistenaddress 0.0.0.0:22\n", target, monkeypatch)
    assert accounts.obstacles(target, KEYS, "", ["192.0.2.10"]) == []


@pytest.mark.parametrize(
    ("deny", "allow", "is_denied"),
    [
        ("ALL: ALL\n", "", True),
        ("# x\nsshd, vsftpd : ALL : spawn x\n", "", True),
        ("#ALL: ALL\n", "", False),
        ("vsftpd: ALL\n", "", False),
        ("ALL: ALL EXCEPT 192.0.2.0/24\n", "", False),
        ("ALL: 198.51.100.7\n", "", False),
        ("ALL: ALL\n", "sshd: 192.0.2.0/24\n", False),
        ("ALL EXCEPT vsftpd: ALL\n", "", True),
        ("ALL EXCEPT vsftpd, sshd: ALL\n", "", False),
        ("sshd: 192.0.2.1\n" * 80_000, "", False),  # of DenyHosts
    ],
)
def test_wrappers(deny: str, allow: str, is_denied: bool, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    sshd_that_says(SSHD, target, monkeypatch)
    target.write("/etc/hosts.deny", deny)
    target.write("/etc/hosts.allow", allow)
    assert accounts.obstacles(target, KEYS) == ["the guest's /etc/hosts.deny has its sshd refuse all"] * is_denied
    target.write("/usr/sbin/sshd", "of Red Hat", mode=0o755)
    assert accounts.obstacles(target, KEYS) == []


def test_key_that_is_too_short_or_too_old(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = base64.b64encode(
        b"".join(len(f).to_bytes(4, "big") + f for f in (b"ssh-rsa", b"\3", b"\0\xff" + bytes(127)))
    )
    keys = logins.authorized_keys(f'ssh-rsa {blob.decode()}\nexpiry-time="20200101" {KEY}\n')
    for least, said in (
        ("requiredrsasize 2048\n", ["sshd wants 2048 or more"]),
        (f"requiredrsasize {'9' * 5000}\n", []),  # of an image that lies
        ("", []),
    ):
        sshd_that_says(SSHD + least, target, monkeypatch)
        first, *others = accounts.obstacles(target, keys)
        assert first == "a key of root's has expired: expiry-time"
        assert [other.rpartition(": ")[2] for other in others] == said


def test_shell_that_is_not_there(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    sshd_that_says(SSHD, target, monkeypatch)
    target.write("/etc/passwd", "root:x:0:0:root:/root:/bin/zsh\n")
    said = "root's shell is /bin/zsh, which the guest does not have: nobody gets in"
    assert accounts.obstacles(target, KEYS) == [said]
    target.write("/bin/zsh", "", mode=0o755)
    assert accounts.obstacles(target, KEYS) == []
    target.write("/etc/passwd", "root:x:0:0:root:/root:/run/current-system/sw/bin/bash\n")
    assert accounts.obstacles(target, KEYS) == []


@pytest.mark.parametrize(
    ("library", "content", "unknown"),
    [
        ("usr/lib/x86_64-linux-gnu/libcrypt.so.1", "$y$ $6$ $1$", ["$2b$"]),  # libxcrypt has all; a test needs one less
        ("lib64/libcrypt-2.17.so", "$6$ $5$ $1$", []),  # not by this name
        ("usr/lib64/libcrypt.so.1", "$6$ $5$ $1$", ["$y$", "$2b$"]),  # glibc's own, up to RHEL 7 and Debian 10
        ("lib/ld-musl-x86_64.so.1", "", ["$y$"]),
    ],
)
def test_hash_that_the_guest_does_not_know(library: str, content: str, unknown: list[str], target: Target) -> None:
    target.write(f"/{library}", content)
    hashes = {"$y$": "$y$j9T$x$y", "$2b$": "$2b$10$xyz", "$6$": HASH, "": "abcdefghijklM"}
    found = [mark for mark, value in hashes.items() if not accounts.knows_hash(target, value)]
    assert found == unknown
    for mark in unknown:
        said = accounts.obstacles(target, [], hashes[mark])
        assert f"the guest's crypt(3) does not know hashes that begin with {mark}" in said


@pytest.mark.parametrize(
    ("keys", "password", "said"),
    [
        ([KEY], "", "1 key"),
        ([LIMITED, OTHER], HASH, "2 keys, one only from 192.0.2.0/24; a password"),
        ([f"no-pty {KEY}", OTHER], "*", "2 keys, 1 with options; no password"),
        ([], HASH, "a password"),
    ],
)
def test_report(keys: list[str], password: str, said: str) -> None:
    assert accounts.describe(logins.authorized_keys("\n".join(keys)), password) == said


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("", ""),
        ("permitrootlogin no", "PermitRootLogin no"),
        ("permitrootlogin forced-commands-only", "PermitRootLogin forced-commands-only"),
        ("pubkeyauthentication no", "PubkeyAuthentication no"),
        ("authorizedkeysfile none", "AuthorizedKeysFile none"),
        ("authorizedkeysfile /etc/ssh/keys/%u", ""),
        ("authenticationmethods publickey,password", "AuthenticationMethods publickey,password"),
        ("authenticationmethods any", ""),
        ("pubkeyacceptedalgorithms ssh-ed25519,rsa-sha2-512", ""),
        ("authenticationmethods password publickey", ""),
        ("authorizedkeysfile .ssh/authorized_keys2 %h/.ssh/authorized_keys", ""),
        ("allowusers admin\nallowusers backup", "AllowUsers admin backup"),
        ("allowusers admin\nallowusers ro*@192.0.2.*", ""),
        ("denyusers root", "DenyUsers root"),
        ("denygroups adm", ""),
        ("allowgroups ssh", "AllowGroups ssh"),
    ],
)
def test_what_sshd_refuses(setting: str, reason: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    keyword = setting.partition(" ")[0]
    said = "".join(f"{line}\n" for line in SSHD.splitlines() if line.split()[0] != keyword) + setting
    monkeypatch.setattr(Target, "run", lambda _self, _argv: said)
    target.write("/usr/sbin/sshd", "", mode=0o755)
    target.write("/usr/lib/systemd/system/ssh.service", "[Service]\n")
    target.write("/etc/systemd/system/multi-user.target.wants/ssh.service", "")
    expected = [f"root's keys are of no use: sshd has {reason}"] if reason else []
    assert accounts.obstacles(target, KEYS) == expected


@pytest.mark.parametrize("name", ["pubkeyacceptedalgorithms", "pubkeyacceptedkeytypes"])
def test_type_of_key_that_a_policy_forbids(name: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "run", lambda _self, _argv: f"{SSHD}{name} rsa-sha2-256,ecdsa-sha2-nistp256\n")
    target.write("/usr/sbin/sshd", "", mode=0o755)
    *_, said = accounts.obstacles(target, logins.authorized_keys(f"{KEY}\n{OTHER}"))
    assert said == "root's keys of type ssh-ed25519 are of no use: sshd's PubkeyAcceptedAlgorithms lack it"


def test_guest_without_a_way_in(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Target, _argv: list[str]) -> str:
        raise Failure("sshd failed: Bad configuration option: Permit")

    target.write("/etc/passwd", "root:x:0:0:root:/root:/usr/sbin/nologin\n")
    shell = "root's shell is /usr/sbin/nologin, which lets nobody in"
    assert accounts.obstacles(target, []) == [shell]
    assert accounts.obstacles(target, KEYS) == [shell, "the guest has no sshd: root's keys are of no use"]
    monkeypatch.setattr(Target, "run", fail)
    target.write("/usr/sbin/sshd", "", mode=0o755)
    _, start, configuration = accounts.obstacles(target, KEYS)
    assert "does not start its sshd" in start and "Bad configuration option" in configuration


@pytest.mark.parametrize("permitted", ["yes", "without-password"])
def test_password_for_the_console(permitted: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"permitrootlogin {permitted}\npasswordauthentication yes\n"
    monkeypatch.setattr(Target, "run", lambda _self, _argv: said)
    target.write("/usr/sbin/sshd", "", mode=0o755)
    target.write("/usr/lib/systemd/system/ssh.service", "[Service]\n")
    target.write("/etc/systemd/system/multi-user.target.wants/ssh.service", "")
    found = accounts.obstacles(target, [])
    assert found == ([] if permitted == "yes" else ["root's password is for the console: sshd takes none from root"])


@pytest.mark.parametrize(
    ("value", "file"),
    [
        ("/etc/ssh/keys/%u", "/etc/ssh/keys/root"),
        ("%h/keys", "/root/keys"),
        ("none", "/root/.ssh/authorized_keys"),
        ("/etc/ssh/%U.%%.keys .ssh/authorized_keys", "/root/.ssh/authorized_keys"),
    ],
)
def test_keys_go_where_sshd_looks(value: str, file: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "run", lambda _self, _argv: f"authorizedkeysfile {value}\n")
    target.write("/usr/sbin/sshd", "", mode=0o755)
    target.write("/etc/ssh/sshd_config", "Include /etc/ssh/sshd_config.d/*.conf\n# AuthorizedKeysFile x\n")
    target.write("/etc/ssh/sshd_config.d/keys.conf", f" authorizedkeysFile {value}\n")
    assert accounts.authorize(target, KEYS) == file
    assert target.read(file) == f"{KEY}\n"


def test_file_that_others_may_change(guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are not root's here."""
    status = Directory.status
    monkeypatch.setattr(
        Directory, "status", lambda self, name: SimpleNamespace(st_mode=status(self, name).st_mode, st_uid=0, st_gid=0)
    )
    accounts.authorize(target, KEYS)
    assert accounts.changeable_by_others(target) == ""
    (guest / "root").chmod(0o770)
    assert accounts.changeable_by_others(target) == "/root"
    target.write("/etc/debian_version", "12.0\n")
    assert accounts.changeable_by_others(target) == ""
    (guest / "root/.ssh/authorized_keys").chmod(0o602)
    assert accounts.changeable_by_others(target) == "/root/.ssh/authorized_keys"


@pytest.mark.parametrize(
    ("line", "arguments", "said"),
    [
        (KEY, "", []),
        (f'restrict,command="x" {KEY}', "-s", []),
        (LIMITED, "", ["dropbear refuses a key with an option that it does not know: from"]),
        (KEY, "-s -w", ["root's keys are of no use: dropbear has the option -w"]),
    ],
)
def test_what_dropbear_refuses(line: str, arguments: str, said: list[str], target: Target) -> None:
    target.write("/usr/sbin/dropbear", "", mode=0o755)
    target.write("/etc/default/dropbear", f'#DROPBEAR_EXTRA_ARGS="-w"\nDROPBEAR_EXTRA_ARGS="{arguments}"\n')
    keys = logins.authorized_keys(line)
    assert (
        accounts.obstacles(target, keys)
        == [*said[:1], "the guest does not start its dropbear when it boots"][:: -1 if "-w" in arguments else 1]
    )


def test_keys_that_would_go_to_dev_null(guest: Path, target: Target) -> None:
    """Some images link root's file there, so that nobody gets in with a key."""
    (guest / "root/.ssh").mkdir(parents=True)
    (guest / "root/.ssh/authorized_keys").symlink_to("/dev/null")
    accounts.authorize(target, logins.authorized_keys(KEY))
    assert (guest / "root/.ssh/authorized_keys").read_text() == f"{KEY}\n"
    assert not (guest / "dev").exists()
