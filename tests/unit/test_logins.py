"""Keys and passwords: what sshd(8) and crypt(5) accept is accepted, everything else refused, and never quoted."""

from __future__ import annotations

import time

import pytest
from credentials import public_key
from hypothesis import given
from hypothesis import strategies as st

from imageos import logins

KEY = public_key("me@home")
KIND, BLOB, _ = KEY.split()
RIGHT = [
    *(KEY, f"{KIND} {BLOB}", f"  {KIND}\t{BLOB}  a comment of words\r", public_key("x", "sk-ssh-ed25519@openssh.com")),
    *(f"restrict {KEY}", f"RESTRICT,no-PTY,X11-forwarding\t{KEY}", f"no-touch-required {KEY}"),
    f'from="192.0.2.0/24,!198.51.100.7,*.example.org,2001:db8::/32,10.0.?.1" {KEY}',
    f'command="echo \\"$SSH_ORIGINAL_COMMAND\\", AAAA # \\\\x",no-pty,from="192.0.2.7" {KEY}',
    f'environment="A=b c",expiry-time="20301231",permitopen="a:1",permitopen="b:2",tunnel="0" {KEY}',
    f'cert-authority,principals="a,b" {KEY}',
    f'permitopen="[::1]:*",permitlisten="8080",permitlisten="*:65535",expiry-time="203012312359Z" {KEY}',
]
WRONG = {
    "ssh-ed25519": "is no key",
    "ssh-ed25519 AAAA": "not of the type",
    "secret": "is no key",
    f"{KIND} {BLOB[:-8]} me": "cut off",
    f"{KIND} {BLOB[:-1]} me": "cut off",
    f"{KIND} {BLOB}AAAA me": "cut off",
    f"{KIND} AAAA{BLOB[4:20]}-{BLOB[21:]}": "cut off",
    f"{KIND} me@home {BLOB}": "not of the type",
    f"ssh-rsa {BLOB}": "not of the type ssh-rsa",
    f"{BLOB} me": "is no key",
    f'form="192.0.2.0/24" {KEY}': "does not know",
    f"restricted {KEY}": "does not know",
    f"no-restrict {KEY}": "does not know",
    f'pty="1" {KEY}': "does not know",
    f"from=192.0.2.0/24 {KEY}": "without double quotes",  # what is left of it in double quotes
    f"command {KEY}": "without double quotes",
    f"from='192.0.2.0/24' {KEY}": "without double quotes",
    f'from="192.0.2.0/24 {KEY}': "quotes that do not end",
    f'from="192.0.2.0/24"restrict {KEY}': "no comma",
    f"restrict, {KEY}": "does not know",
    f'from="a",from="b" {KEY}': "twice",
    f'from="" {KEY}': "empty pattern",
    f'from="192.0.2.1/24" {KEY}': "a network in from=",
    f'from="192.0.2.0/255.255.255.0" {KEY}': "a network in from=",
    f'from="192.0.2.0/24", {KEY}': "does not know",
    f'from="192.0.2.1, 192.0.2.2" {KEY}': "blanks in from=",
    f'from="!192.0.2.1,!*.example.org" {KEY}': "nothing but exceptions",
    f'environment="A" {KEY}': "a value of the option environment",
    f'expiry-time="tomorrow" {KEY}': "a value of the option expiry-time",
    f'permitopen="host" {KEY}': "a value of the option permitopen",
    f'permitopen="host:65536" {KEY}': "a value of the option permitopen",
    f'permitlisten="abc" {KEY}': "a value of the option permitlisten",
    f'tunnel="tun0" {KEY}': "a value of the option tunnel",
    f'principals="root" {KEY}': "principals without cert-authority",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAAWEA me": "cut off",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "is a private key",
    "/root/.ssh/id_ed25519.pub": "is the name of a file",
    "~/.ssh/id_ed25519.pub": "is the name of a file",
    "SHA256:jFlRw5BvvTd6qSvLgG5Tq6m0b0k2vQJ0N1M4p8HkqzE": "is no key",
    f"{KEY}\x1b[2J": "control characters",
    f"{KIND} {BLOB}= me": "cut off",
    public_key("x", "ssh-ed25519-cert-v01@openssh.com"): "is a certificate: the key that signs",
}


@pytest.mark.parametrize("line", RIGHT)
def test_key(line: str) -> None:
    (key,) = logins.authorized_keys(f"# a comment\n\n{line}\n")
    assert key.line == line.strip() and key.line.split(key.options or None, 1)[-1]
    assert key.blob in line and (key.options == "" or line.strip().startswith(key.options))


@pytest.mark.parametrize("line", WRONG)
def test_line_without_a_key(line: str) -> None:
    with pytest.raises(ValueError, match=rf"^public keys, .*; line 2 .*{WRONG[line]}") as raised:
        logins.authorized_keys(f"{KEY}\n{line}\n")
    assert BLOB not in str(raised.value)


def test_options() -> None:
    (key,) = logins.authorized_keys(f'no-pty,from="192.0.2.0/24,*.example.org" {KEY}')
    assert key.options == 'no-pty,from="192.0.2.0/24,*.example.org"'
    assert (key.sources, key.blob) == ("192.0.2.0/24,*.example.org", BLOB)


@pytest.mark.parametrize(
    ("until", "is_over"),
    [("20260101", True), ("20260102", False), ("202601011159", True), ("202601011201Z", False), ("20270101", False)],
)
def test_time_that_is_over(until: str, is_over: bool) -> None:
    (key,) = logins.authorized_keys(f'expiry-time="{until}" {KEY}')
    assert logins.has_expired(key, time.strptime("2026-01-01 12:00", "%Y-%m-%d %H:%M")) == is_over


@pytest.mark.parametrize(
    ("text", "mark"),
    [("$6$x$y", "$6$"), ("!$y$j9T$x", "$y$"), ("$md5,rounds=1$x", "$md5"), ("_ab", "_"), ("ab", ""), ("*", "")],
)
def test_mark_of_a_hash(text: str, mark: str) -> None:
    assert logins.prefix(text) == mark


@given(st.text() | st.text(alphabet='",=\\ aA/-.0#').map(lambda text: f"{text} {KEY}"))
def test_any_text_is_judged(text: str) -> None:
    try:
        keys = logins.authorized_keys(text)
    except ValueError:
        return
    assert all(key.line in text and key.blob in key.line for key in keys)


@pytest.mark.parametrize(("text", "can"), [("*", False), ("!", False), ("!$6$x", False), ("", False), ("$6$x", True)])
def test_password_that_admits(text: str, can: bool) -> None:
    assert logins.admits(text) == can
