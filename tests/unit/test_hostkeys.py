"""The guest's ssh host keys: what becomes of the image's. That real ones are made: tests/disk/test_create_guest.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imageos.errors import Failure
from imageos.guests import hostkeys
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
    """Nobody waits for a key that nobody wants."""
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
