"""The settings: the table in the contract, accepted values, precedence, and error messages."""

from __future__ import annotations

import os
import re

import pytest
from credentials import public_key
from given import CONTRACT, SECRET, given_values, load
from hypothesis import given
from hypothesis import strategies as st
from support import TESTS

from imageos import settings
from imageos.errors import Failure
from imageos.settings import Settings

# of "pw", as crypt_gensalt(3) and crypt(3) of libxcrypt 4.4 (Debian) make them
KEY = public_key("a")
HASHES = (
    "$y$j9T$gemBbTho6qvLJyBqNBIuc.$8TbU0luE.FoyCCgS7O1F49QiMyCXf7h0VqyNO1OryRA",
    "$gy$j9T$H.akrQWI/kD1EZckOcdwC/$YI6e/M5VZslvOWhirSRJEFsJ.YElusoaVvV.VQG/NA5",
    "$7$CU..../....wXPr2fbzb4BiBG2nUbSH7/$aNvYww1ixeYdXcyaulkETRVwddPHOscc2fhNAIw9YI5",
    "$2b$05$CW9Au7kfy0VEwgLJR3/nvu9fN1CHF.9qWlw1PMXZYCYdTzjRbsNuK",
    "$2a$05$e4W/P.tc2Ztb14q5jDw3f.G8tbwqLiLTOoU7XxyCEtqaI1Qdf.oGy",
    "$2y$05$A6TK2O3edxBKHsqknsmpf.I.1QzmvX/7X7274YS9UCF9giOFCFyhi",
    "$6$ZvkaisZzHaNl2MJT$pXy6CSM2Z9Qyj2Idp16jSjVYGB25PhxIywCXXKlP/PWRQQN7Jp7jVURdfFknzoRqIuT6ds.3KObbjJBBpXG3i0",
    "$5$Bunz0ubo2iXhxk1J$aBjfJj4Q.EObLXOdIwiYsjc9xKcKp6JSVeBramMfzc.",
    "$sha1$236380$cUSpw3b2jnxZx0t6Kjd.$D6u4MNOd32q8Xsd7n1ir1660P6G4",
    "$md5,rounds=57562$nJUcmEr9$$yog1kmLpB1rDXXjkUPHZC1",
    "$1$1I4diVb8$L65gB3a/djeye.HdAxGUG/",
    "$3$$8cc19b6a8cfeac299c2871c86b38de28",
    "_J9..6CMDrKs64ciHujg",
    "F2A.RGCWx5KvY",
)
RARE_HASHES = (  # without a salt, and with a longer one
    "$6$$" + "a" * 86,
    "$5$$" + "a" * 43,
    "$1$$ysVNzQc4CTMkp5daOdZ.3/",
    "$md5$abcdefghijkl$$CzYpwCMy9hE47ln.0tWp5.",
)
SECRETS = {"SSH_AUTHORIZED_KEYS", "ROOT_PASSWORD_HASH", "USER_DATA"}
YES_NO = ("CDINSTALL", "SWAP", "GROW", "NOMOUNT", "IMAGE_DEBUG")


def refused(**parameters: str) -> str:
    with pytest.raises(Failure) as raised:
        load(**parameters)
    return str(raised.value)


# The table


@pytest.mark.parametrize(("name", "default", "parameter"), CONTRACT)
def test_contract(name: str, default: str, parameter: bool) -> None:
    entry = settings.TABLE[name.lower()]
    assert entry.default == default
    assert entry.parameter is parameter
    assert Settings().variables()[name] == default
    assert (name.lower() in settings.PARAMETERS) is parameter


def test_nothing_but_the_contract() -> None:
    assert [name.upper() for name in settings.TABLE] == [name for name, _, _ in CONTRACT]


def test_secrets_are_marked() -> None:
    assert {name.upper() for name, entry in settings.TABLE.items() if entry.secret} == SECRETS


def test_descriptions_are_one_line_of_ascii() -> None:
    for entry in settings.TABLE.values():
        assert re.fullmatch(r"[ -~]{3,}", entry.doc)


def test_sizes_that_depend_on_others() -> None:
    assert Settings().with_sizes(256).swap_size == 256
    assert Settings(swap_size=7).with_sizes(256).swap_size == 7
    assert Settings().with_sizes(256).boot_size == 100
    assert Settings(partition_table="gpt").with_sizes(256).boot_size == 512
    assert Settings(partition_table="gpt", boot_size=9).with_sizes(256).boot_size == 9


# Accepted values


@pytest.mark.parametrize("name", YES_NO)
@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), ("1", True), ("true", True), ("YES", True), ("no", False), ("0", False), ("False", False)],
)
def test_yes_or_no(name: str, text: str, value: bool) -> None:
    assert getattr(load(**{name: text}), name.lower()) is value


@pytest.mark.parametrize(
    ("name", "text", "accepted"),
    [
        ("swap", "maybe", "yes or no"),
        ("cdinstall", "y", "yes or no"),
        ("swap_size", "1G", "a whole number of MiB, at least 1"),
        ("swap_size", "-1", "a whole number of MiB, at least 1"),
        ("swap_size", "1.5", "a whole number of MiB, at least 1"),
        ("swap_size", "\u0661", "a whole number of MiB, at least 1"),
        ("boot_size", "1" * 10, "a whole number of MiB, at least 1"),
        ("filesystem", "zfs", "one of ext2, ext3, ext4, xfs, btrfs"),
        ("filesystem", "EXT4", "one of ext2, ext3, ext4, xfs, btrfs"),
        ("partition_table", "bsd", "one of msdos, gpt"),
        ("image_type", "iso", "one of tarball, dump, qemu, raw, qcow2"),
        ("image_name", "../../etc/shadow", "a name without / that does not begin with a dot"),
        ("image_name", "a/b", "a name without / that does not begin with a dot"),
        ("image_name", "/etc/shadow", "a name without / that does not begin with a dot"),
        ("image_name", "..", "a name without / that does not begin with a dot"),
        ("image_name", ".hidden", "a name without / that does not begin with a dot"),
        ("image_name", "a\nb", "a name without / that does not begin with a dot"),
        ("overlay", "../..", "a name without / that does not begin with a dot"),
        ("overlay", ".", "a name without / that does not begin with a dot"),
        ("arch", "../x86", "an architecture, such as x86_64"),
        ("arch", "x86 64", "an architecture, such as x86_64"),
        ("kernel_args", "quiet\nsplash", "one line of text"),
        ("kernel_args", "quiet\x1b[2J", "one line of text"),
        ("dns_servers", "192.0.2.1\n192.0.2.2", "one line of text"),
        ("image_url", "ftp://example.org/", "a URL that begins with http:// or https://"),
        ("image_url", "file:///etc/shadow", "a URL that begins with http:// or https://"),
        ("image_url", "http://", "a URL that begins with http:// or https://"),
        ("image_url", "https:///etc", "a URL that begins with http:// or https://"),
        ("image_url", "https://example.org/a\tb", "a URL that begins with http:// or https://"),
        ("dns_servers", "192.0.2.1, 192.0.2.2", "IP addresses, separated by spaces"),
        ("dns_servers", "dns.example.org", "IP addresses, separated by spaces"),
        ("dns_servers", "fe80::1%eth0", "IP addresses, separated by spaces"),
        *(
            (name, text, "DNS domains, separated by spaces")
            for name in ("dns_search", "dns_domain")
            for text in (
                "example.org, example.net",
                "a..b",
                ".org",
                "-a.org",
                "a" * 64,
                "http://example.org",
                "a.b.c." * 50,
            )
        ),
        *(
            (
                "image_checksum",
                text,
                "sha256:HEX, sha512:HEX, no, or the checksum file: its URL, or its name beside the image",
            )
            for text in (
                *("md5:00", "sha256:abc", "sha512:" + "0" * 64, "SHA256:" + "0" * 64, "0" * 64, "A" * 128, "NO", "yes"),
                *("../SHA256SUMS", "a/b", "/etc/SHA256SUMS", "..", ".sums", "a\nb", "a\x1bb", "ftp://example.org/sums"),
                *("file:///etc/shadow", "http://", "https:///sums", "https://example.org/a\tb", "//example.org/sums"),
            )
        ),
    ],
)
def test_refused(name: str, text: str, accepted: str) -> None:
    """The message names the setting, its value and source, and the accepted values."""
    assert refused(**{name: text}) == (
        f"{name.upper()}={text!r} as OS parameter {name} is not accepted: it must be {accepted}"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("swap_size", "1"),
        ("filesystem", "btrfs"),
        ("image_name", "debian-12.5"),
        ("image_name", "a..b"),
        ("arch", "aarch64"),
        ("kernel_args", "console=tty0 quiet\tsplash='a b'"),
        ("image_url", "http://example.org"),
        ("image_url", "HTTPS://example.org/my images/a.img"),
        ("image_url", "https://[2001:db8::1]:8080/images/debian-12-x86_64.tar.zst?x=1"),
        ("dns_search", "example.org sub.example.org. _tcp.a"),
        ("image_checksum", "no"),
        ("image_checksum", "sha256:" + "0aF" * 21 + "0"),
        ("image_checksum", "sha512:" + "0" * 128),
        ("image_checksum", "SHA256SUMS"),
        ("image_checksum", "debian 12.qcow2.sha256"),
        ("image_checksum", "https://example.org:8443/debian/SHA256SUMS?x=1"),
        ("user_data", "#cloud-config\npackages: [vim]\n"),
        ("ssh_authorized_keys", f"{public_key('a')}\n{public_key('b')}\n"),
        ("root_password_hash", "$6$rounds=5000$a./b$" + "x" * 86),
        ("root_password_hash", "*"),
        ("root_password_hash", "!"),
        ("root_password_hash", "!!"),
        *(("root_password_hash", text) for text in HASHES),
        *(("root_password_hash", f"!{text}") for text in HASHES),  # usermod -L
        *(("root_password_hash", text) for text in ("!*", "*0", "*NP*", "!locked")),
    ],
)
def test_accepted(name: str, text: str) -> None:
    assert load(**{name: text}).variables()[name.upper()] == text


@pytest.mark.parametrize(
    "text",
    [
        *("$6$salt:0:0", "$6$sa lt$hash", "$6$salt$hash\n", "$6$salt$h\nroot::0"),
        *(":", " ", "$6$salt$ha\u00dfh", "$6$salt$ha\x7fsh", "\t"),
        *("$7$".ljust(385, "x"), "!" * 385, "*:", "!\n", "*\x1b[2J"),
        *("$6$salt$hash", "$y$j9T$salt$hash", "$2b$12$hash", "!$6$salt$hash", "!./of-a-hash"),
        *(text[:-1] for text in HASHES),  # not all of it copied
        *(f"{text}x" for text in HASHES),
        *("secret", "correct-horse", "$6", "$6$", "$$a", "=5000/x.y", "x", "P@ssw0rd123"),
    ],
)
def test_password_that_is_no_hash(text: str) -> None:
    assert refused(root_password_hash=text) == (
        "ROOT_PASSWORD_HASH=(secret) as OS parameter root_password_hash is not accepted: "
        "it must be a whole hash as `openssl passwd -6` prints it, or * for none; "
        "in a file it has to be in single quotes, as in double quotes the shell replaces $6 and all that follows a $"
    )


@pytest.mark.parametrize("text", [*RARE_HASHES, "!left-2024", "*-", "!!2024-01-31"])
def test_rare_hash(text: str) -> None:
    assert load(root_password_hash=text).root_password_hash == text


@pytest.mark.parametrize("text", [*HASHES, *RARE_HASHES])
def test_a_hash_in_double_quotes(text: str) -> None:
    """The shell has nothing for $6 and $a, and leaves what is between: never what is taken for a hash."""
    left = re.sub(r"\$([0-9]|[A-Za-z_]\w*)", "", text)
    assert left == text or "single quotes" in refused(root_password_hash=left)


def test_the_readme_names_every_kind_of_hash() -> None:
    readme = (TESTS.parent / "README.rst").read_text()
    (named,) = re.findall(r"It may be any of crypt\(5\).*?``(\$.*?)``", readme, re.DOTALL)
    forms = {re.match(r"\$[a-z0-9]+\$?", text) for text in HASHES}
    assert set(named.split()) == {match[0] for match in forms if match}
    assert {text[0] for text in HASHES if not text.startswith("$")} == {"_", "F"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ab" * 20, "AB" * 20),
        ("0x" + "AB" * 20, "AB" * 20),
        ("ABAB " * 5 + " " + " ABAB" * 5, "AB" * 20),  # as gpg prints them
        (f"{'AB' * 20}  {'CD' * 20}", f"{'AB' * 20} {'CD' * 20}"),
        ("AB" * 19, None),
        ("ABABABAB", None),
    ],
)
def test_fingerprints_as_people_write_them(text: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(Failure, match="IMAGE_SIGNER.* must be fingerprints of keys"):
            settings.parse_setting("image_signer", text, "here")
    else:
        assert settings.parse_setting("image_signer", text, "here") == value


def test_password_in_a_url() -> None:
    for name in ("image_url", "image_checksum"):
        for text in ("ftp://user:password@example.org/a.qcow2", "ftp://example.org/a.qcow2?token=secret"):
            assert f"{name.upper()}=(secret)" in refused(**{name: text})


def test_keys_are_lines_of_text() -> None:
    assert load(ssh_authorized_keys=f"{KEY}\r\n\n# me\n{KEY}\n").ssh_authorized_keys == f"{KEY}\r\n\n# me\n{KEY}\n"
    for text in (f"{KEY}\x1b[2J", f"{KEY}\rB", "\x00"):
        assert "(secret)" in refused(ssh_authorized_keys=text)


@given(
    st.sampled_from(["image_name", "overlay", "image_checksum"]),
    st.text(alphabet=st.characters() | st.sampled_from("./\0\n"), min_size=1),
)
def test_accepted_names_stay_in_their_directory(name: str, text: str) -> None:
    try:
        accepted = getattr(load(**{name: text}), name)
    except Failure:
        return
    inside = os.path.normpath(f"/directory/{accepted}")
    assert os.path.dirname(inside) == "/directory"
    assert "\0" not in accepted


@given(st.sampled_from(sorted(settings.PARAMETERS)), st.text())
def test_no_parameter_is_an_internal_error(name: str, text: str) -> None:
    result, problems = settings.examine_settings(given_values(**{name: text}), "/nonexistent")
    assert isinstance(result, Settings)
    assert all(isinstance(problem, Failure) for problem in problems)


@pytest.mark.parametrize("text", ["0", "-5", "10 s", ""])
def test_timeout(text: str) -> None:
    if not text:
        assert settings.settings_from_variables({"GUEST_TIMEOUT": text}).guest_timeout == 600
        return
    with pytest.raises(Failure, match="a whole number of seconds, at least 1"):
        settings.settings_from_variables({"GUEST_TIMEOUT": text})


@pytest.mark.parametrize("name", [name for name, default, _ in CONTRACT if name.endswith("_DIR")])
def test_directories_are_absolute(name: str) -> None:
    assert getattr(settings.settings_from_variables({name: "/x"}), name.lower()) == "/x"
    with pytest.raises(Failure, match="an absolute path"):
        settings.settings_from_variables({name: "x"})


# OS parameters


def test_parameter_wins_over_built_in() -> None:
    result = load(filesystem="xfs", swap="no", boot_size="12")
    assert (result.filesystem, result.swap, result.boot_size) == ("xfs", False, 12)
    assert result.partition_table == "msdos"


@pytest.mark.parametrize("name", settings.PARAMETERS)
def test_empty_parameter_is_the_default(name: str) -> None:
    assert load(**{name: ""})._replace(arch="") == Settings()


@pytest.mark.parametrize("name", [name for name, _, parameter in CONTRACT if not parameter])
def test_what_is_the_sites_only(name: str) -> None:
    assert refused(**{name: "/etc"}) == f"{name} cannot be set by an OS parameter (OSP_{name})"


def test_what_ganeti_reads_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """Ganeti makes OSP_OS_IMAGE of os-image; its first version with it kept the dash."""
    for variable in ("OSP_OS_IMAGE", "OSP_OS-IMAGE"):
        environment = {variable: "/srv/x.img", "OSP_OS_INSTALL_PACKAGE": "", "OSP_IMAGE_NAME": "x"}
        assert settings.reserved_parameters(environment) == {"os-image": "'/srv/x.img'"}
        assert settings.unknown_parameters({**environment, "OSP_OS_PACKAGE": "x"}) == []
        assert settings.load_settings(environment, "/nonexistent").image_name == "x"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        *((text, True) for text in ("", "/x", "http://host/x", "https://host/?x", "ftp://host/x/y", "ftps://host/x y")),
        *((text, False) for text in ("x", "file:///x", "http:///x", "https://host", "ftp://host/", "/x\ny", " /x")),
    ],
)
def test_os_image_is_what_ganeti_takes_for_one(text: str, fits: bool) -> None:
    problems = settings.examine_settings({"OSP_OS_IMAGE": text}, "/nonexistent")[1]
    beginning = f"os-image={text!r} as OS parameter os-image is not accepted: it must be "
    assert [str(problem).startswith(beginning) for problem in problems] == ([] if fits else [True])


def test_a_password_in_os_image_is_not_shown() -> None:
    given = {"OSP_OS_IMAGE": f"gopher://user:{SECRET}@host/x"}
    assert settings.reserved_parameters(given) == {"os-image": "(secret)"}
    assert SECRET not in str(settings.examine_settings(given, "/nonexistent")[1])


def test_unknown_parameter_is_warned_about(capfd: pytest.CaptureFixture[str]) -> None:
    load(image_nam="debian-12", zzz="1")
    assert capfd.readouterr().err.splitlines() == [
        "imageos: warning: unknown OS parameter image_nam (did you mean image_name?)",
        "imageos: warning: unknown OS parameter zzz",
    ]


def test_all_problems_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    environment = given_values(swap="maybe", filesystem="zfs", image_dir="/x")
    result, problems = settings.examine_settings(environment, "/nonexistent")
    assert len(problems) == 3
    assert result.filesystem == "ext3"
    with pytest.raises(Failure) as raised:
        settings.load_settings(environment, "/nonexistent")
    told = [*capfd.readouterr().err.splitlines(), f"imageos: {raised.value}"]
    assert told == [f"imageos: {problem}" for problem in problems]


@pytest.mark.parametrize(
    ("machine", "arch"), [("x86_64", "x86_64"), ("i686", "x86"), ("i386", "x86"), ("aarch64",) * 2]
)
def test_arch_of_the_node(machine: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.uname", lambda: os.uname_result(("Linux", "node", "6.1", "#1", machine)))
    assert load().arch == arch
    assert load(arch="sparc").arch == "sparc"


# Secrets


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_secrets_are_never_shown(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    environment = {**given_values(**{name: f"{SECRET}\0\n", f"{name}_typo": SECRET}), "OSP_IMAGE_DEBUG": "yes"}
    _, problems = settings.examine_settings(environment, "/nonexistent")
    assert [SECRET in str(problem) for problem in problems] == [False]
    assert f"{name}=(secret)" in str(problems[0])
    given = {"SSH_AUTHORIZED_KEYS": public_key(SECRET)}.get(name, SECRET)
    settings.load_settings({**environment, f"OSP_{name}": given}, "/nonexistent")
    assert SECRET not in capfd.readouterr().err
