"""The image's ssh host keys are removed. tests/disk/test_create_guest.py tests that real ones are made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imageos.errors import Failure
from imageos.guests import hostkeys, sealing
from imageos.guests.target import Target

KEYS = dict.fromkeys((f"etc/ssh/ssh_host_{kind}_key" for kind in ("rsa", "dsa", "ecdsa", "ed25519")), "the image's")
KEYS.update({f"{name}.pub": "the image's" for name in KEYS})


def image(guest: Path) -> None:
    for name, text in {**KEYS, "etc/ssh/sshd_config": "", "usr/bin/ssh-keygen": ""}.items():
        (guest / name).parent.mkdir(parents=True, exist_ok=True)
        (guest / name).write_text(text)
    (guest / "usr/bin/ssh-keygen").chmod(0o755)


def test_all_are_replaced(guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    image(guest)
    there: dict[str, str] = {}

    def keygen(_self: Target, argv: list[str]) -> None:
        assert argv == ["/usr/bin/ssh-keygen", "-A"]
        there.update((path.name, path.read_text()) for path in (guest / "etc/ssh").iterdir())

    monkeypatch.setattr(Target, "run", keygen)
    hostkeys.replace(target, lambda: hostkeys.Key("private", "public"))
    assert there == {"sshd_config": "", "ssh_host_rsa_key": "private", "ssh_host_rsa_key.pub": "public"}
    hostkeys.replace(target)
    assert os.listdir(guest / "etc/ssh") == ["sshd_config"]


def test_node_without_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostkeys, "available", lambda program: program != "ssh-keygen")
    with hostkeys.rsa_made_meanwhile("inst1") as rsa:
        assert rsa() is None


def test_guest_without_ssh(guest: Path, target: Target) -> None:
    """Do not wait for keys that the guest does not need."""
    hostkeys.replace(target, lambda: pytest.fail("asked for a key"))
    assert os.listdir(guest) == []


@pytest.mark.parametrize("ahead", [False, True])
def test_guest_whose_keygen_fails(
    ahead: bool, guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_self: Target, _argv: list[str]) -> None:
        raise Failure("ssh-keygen failed (exit status 1)")

    image(guest)
    monkeypatch.setattr(Target, "run", fail)
    hostkeys.replace(target, lambda: hostkeys.Key("private", "public") if ahead else None)
    but = " but one of RSA" if ahead else ""
    assert f"no ssh host keys{but}: ssh-keygen failed" in capfd.readouterr().err
    left = {"ssh_host_rsa_key", "ssh_host_rsa_key.pub"} if ahead else set()
    assert set(os.listdir(guest / "etc/ssh")) == {"sshd_config", *left}


def test_keys_of_dropbear(
    guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its daemon gets keys of every type that it knows; the initramfs those that it has, and a word to the operator."""
    for name in ("etc/dropbear/dropbear_rsa_host_key", "etc/dropbear/initramfs/dropbear_ecdsa_host_key"):
        (guest / name).parent.mkdir(parents=True, exist_ok=True)
        (guest / name).write_text("the image's")
    (guest / "usr/bin").mkdir(parents=True)
    (guest / "usr/bin/dropbearkey").write_text("")
    (guest / "usr/bin/dropbearkey").chmod(0o755)

    def keygen(_self: Target, argv: list[str]) -> None:
        _, _, kind, _, file = argv
        if kind == "ed25519":
            raise Failure("unknown type")
        (guest / file[1:]).write_text(f"a new key of {kind}")

    monkeypatch.setattr(Target, "run", keygen)
    hostkeys.replace(target)
    assert {path.name: path.read_text() for path in (guest / "etc/dropbear").glob("*key")} == {
        "dropbear_rsa_host_key": "a new key of rsa",
        "dropbear_ecdsa_host_key": "a new key of ecdsa",
    }
    inner = guest / "etc/dropbear/initramfs"
    assert [path.read_text() for path in inner.iterdir()] == ["a new key of ecdsa"]
    assert "update-initramfs -u" in capfd.readouterr().err


def test_keys_of_dropbear_of_any_name(guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take a program of the guest, which may take minutes."""
    for number in range(50):
        target.write(f"/etc/dropbear/initramfs/dropbear_{number}_host_key", "the image's")
    target.write("/usr/bin/dropbearkey", "", mode=0o755)
    ran: list[list[str]] = []
    monkeypatch.setattr(Target, "run", lambda _self, argv: ran.append(argv))
    hostkeys.replace(target)
    assert [argv[2] for argv in ran] == ["rsa", "ecdsa", "ed25519"]
    assert os.listdir(guest / "etc/dropbear/initramfs") == []


def test_keys_of_dropbear_that_cannot_be_made(guest: Path, target: Target) -> None:
    (guest / "etc/dropbear").mkdir(parents=True)
    (guest / "etc/dropbear/dropbear_rsa_host_key").write_text("the image's")
    hostkeys.replace(target)  # it makes them itself, with -R
    assert os.listdir(guest / "etc/dropbear") == []


@pytest.mark.parametrize("has_maker", [True, False])
def test_certificate_of_debian(
    has_maker: bool, guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(Target, "run", lambda _self, argv: ran.append(argv))
    if has_maker:
        target.write("/usr/sbin/make-ssl-cert", "", mode=0o755)
    hostkeys.replace(target)
    assert ran == []
    target.write(hostkeys.SNAKEOIL, "of the image")
    hostkeys.replace(target)
    wanted = ["/usr/sbin/make-ssl-cert", "generate-default-snakeoil", "--force-overwrite"]
    assert ran == ([wanted] if has_maker else [])
    assert ("is that of the image" in capfd.readouterr().err) == (not has_maker)


def test_keys_elsewhere(guest: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """sshd's configuration names them; each is made anew, of its type, and a sealed image has none."""
    image(guest)
    named = {"/srv/keys/first": "ecdsa-sha2-nistp256 AAAA image", "/etc/ssh/keys/my_rsa": "", "/srv/keys/last": ""}
    for path, public in named.items():
        target.write(path, "the image's")
        if public:
            target.write(f"{path}.pub", public)
    target.write("/etc/ssh/sshd_config", "HostKey /srv/keys/first\n#HostKey /x\nHostKey /etc/ssh/ssh_host_rsa_key\n")
    target.write("/etc/ssh/sshd_config.d/a.conf", ' hostkey "/etc/ssh/keys/my_rsa"\nHostKey /srv/keys/last\n')
    ran: list[list[str]] = []
    monkeypatch.setattr(Target, "run", lambda _self, argv: ran.append(argv))
    hostkeys.replace(target)
    *made, last = ran
    assert {words[-1]: words[words.index("-t") + 1] for words in made} == dict(
        zip(named, ("ecdsa", "rsa", "ed25519"))
    ) and last[1:] == ["-A"]
    assert not any(target.exists(path) or target.exists(f"{path}.pub") for path in named)
    target.write("/srv/keys/last", "of a template")
    sealing.seal(target)
    assert not target.exists("/srv/keys/last")
    target.write("/etc/ssh/sshd_config", "".join(f"HostKey /srv/{number}\n" for number in range(20_000)))
    assert len(hostkeys.elsewhere(target)) < 20
