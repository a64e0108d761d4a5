"""The settings in files, in the environment of hooks, and in the defaults file that is installed."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Union

import pytest
from given import CONTRACT, SECRET, SITE, given_values
from hypothesis import given
from hypothesis import strategies as st
from support import TESTS

from imageos import settings, shellfiles
from imageos.errors import Failure
from imageos.run import Command, Finished
from imageos.settings import Settings

# The files, with a function as the shell; the tiers with real disks run the real shell


Layer = Mapping[str, str]


@dataclasses.dataclass
class Shell:
    """A shell that answers with `layers`: each is what one file sets."""

    layers: Sequence[Layer]
    status: int = 0
    said: str = ""

    def pipeline(self, command: Command, **_: object) -> list[Finished]:
        assert command.private, "what the files set may be secret"
        assert command.env is not None
        values = {**command.env, "SHLVL": "1", "_": "/usr/bin/env"}
        printed = "".join(f"{name}={value}\0" for name, value in values.items()) + "\0"
        words = list(command.argv[command.argv.index(shellfiles._EVALUATE) + 2 :])
        for word, layer in zip(words, [*self.layers, None]):
            printed += re.sub(r'"\$\{VARIANTS_DIR:-(.*?)\}"', values.get("VARIANTS_DIR") or r"\1", word) + "\0"
            if layer is not None:
                values = {**values, **layer}
                printed += "".join(f"{name}={value}\0" for name, value in values.items()) + "\0"
        return [Finished(command.argv, self.status, printed.encode("utf-8", "surrogateescape"), self.said)]


Load = Callable[..., Settings]


@pytest.fixture
def with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return the settings when the files set `layers`."""
    defaults = tmp_path / "defaults"
    defaults.touch()

    def load(
        *layers: Layer, status: int = 0, said: str = "", environ: Layer | None = None, variant: str = ""
    ) -> Settings:
        monkeypatch.setattr(shellfiles, "pipeline", Shell(layers, status, said).pipeline)
        return settings.load_settings({"OS_VARIANT": variant, **(environ or {})}, str(defaults))

    return load


def test_last_word(with_files: Load) -> None:
    assert with_files({"SWAP_SIZE": "1"}).swap_size == 1
    assert with_files({"SWAP_SIZE": "1"}, {"SWAP_SIZE": "2"}, variant="v").swap_size == 2
    both = with_files({"SWAP_SIZE": "1"}, {"SWAP_SIZE": "2"}, variant="v", environ=given_values(swap_size="3"))
    assert both.swap_size == 3
    kept = with_files({"FILESYSTEM": "xfs"}, {"SWAP": "no"}, variant="v")
    assert (kept.filesystem, kept.swap) == ("xfs", False)


def test_empty_in_a_file_is_the_default(with_files: Load) -> None:
    assert with_files({"FILESYSTEM": "xfs", "BOOT_SIZE": ""}, {"FILESYSTEM": ""}, variant="v").filesystem == "ext3"


def test_wrong_value_names_the_file(with_files: Load, tmp_path: Path) -> None:
    with pytest.raises(Failure) as raised:
        with_files({"FILESYSTEM": "zfs"})
    assert str(raised.value).startswith(f"FILESYSTEM='zfs' in {tmp_path}/defaults is not accepted: it must be one of ")
    with pytest.raises(Failure, match=f"in {SITE}/variants/v.conf is not accepted"):
        with_files({}, {"FILESYSTEM": "zfs"}, variant="v")
    with pytest.raises(Failure, match="in /srv/variants/v.conf is not accepted"):
        with_files({"VARIANTS_DIR": "/srv/variants"}, {"FILESYSTEM": "zfs"}, variant="v")


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ('USER_DATA="#cloud-config\nruncmd: [echo $HOME]\n"\n', "HOME"),
        ('  export USER_DATA="#!/bin/sh\ncp ${1} ${name} x"', "1"),
        ('USER_DATA="#!/bin/sh\nexit $?"', "?"),
        ('USER_DATA="#cloud-config\nfqdn: $INSTANCE_NAME\nname: ${site}"', ""),
        ("USER_DATA='#!/bin/sh\necho $HOME'", ""),
        ('USER_DATA="#!/bin/sh\necho \\$HOME costs 5$"', ""),
        ('USER_DATA="$(cat /srv/$file)"', ""),
        ('data=$(cat /srv/a)\nUSER_DATA="$data"\nunset data\n', ""),
        ('if true; then lines[0]=x; fi\nUSER_DATA="$lines"\n', ""),
        ('USER_DATA="#!/bin/sh\nname=x\necho $name"', "name"),
        ('# name\nUSER_DATA="$name"\n', "name"),
        ('USER_DATA="${DATA:-#!/bin/sh}"', ""),
        ('# USER_DATA="$HOME"\nOTHER="$HOME"', ""),
    ],
)
def test_double_quotes_lose_what_begins_with_a_dollar(text: str, lost: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    known = {"INSTANCE_NAME": "inst1", "site": "x"}
    problems = settings._lost_in_quotes(f"{tmp_path}/file", "USER_DATA", known)
    reason = f"USER_DATA in {tmp_path}/file is in double quotes, in which the shell replaces ${lost}"
    assert [str(problem) for problem in problems] == ([reason] if lost else [])
    assert all("single quotes" in str(problem.hint) for problem in problems)


def test_wrong_secret_in_a_file(with_files: Load) -> None:
    with pytest.raises(Failure) as raised:
        with_files({"ROOT_PASSWORD_HASH": f"{SECRET}\n"})
    assert SECRET not in str(raised.value)


def test_unknown_setting(with_files: Load, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One warning, for any number of files; hooks get the variable."""
    result = with_files(
        {"IMAGE_NAM": "a", "CINIT_USER": "b", "helper": "c", "SITE_SPECIAL": "d", "TARBALL_COMPRESS": "pigz"},
        {"IMAGE_NAM": "e", "CINIT_SSH_PWAUT": "no"},
        variant="v",
    )
    others = {"CINIT_USER": "b", "helper": "c", "SITE_SPECIAL": "d", "TARBALL_COMPRESS": "pigz"}
    others["CINIT_SSH_PWAUT"] = "no"
    assert result.unknown == {"IMAGE_NAM": "e", **others}
    assert {name: result.variables()[name] for name in result.unknown} == result.unknown
    assert capfd.readouterr().err.splitlines() == [
        f"imageos: warning: unknown setting IMAGE_NAM in {tmp_path}/defaults (did you mean IMAGE_NAME?)",
        f"imageos: warning: unknown setting SITE_SPECIAL in {tmp_path}/defaults",
        f"imageos: warning: unknown setting CINIT_SSH_PWAUT in {SITE}/variants/v.conf (did you mean CINIT_SSH_PWAUTH?)",
    ]


def test_setting_in_small_letters(with_files: Load, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A helper variable is none: the file reads it, or sets the setting itself, too."""
    with_files({"image_name": "a", "boot_size": "100", "BOOT_SIZE": "100", "nomount": "yes"}, {"image_name": "a"})
    (tmp_path / "defaults").write_text("IMAGE_DIR=/images/$image_name-${arch}\n")
    with_files({"image_name": "a", "arch": "b"})
    assert capfd.readouterr().err.splitlines() == [
        f"imageos: warning: unknown setting image_name in {tmp_path}/defaults (did you mean IMAGE_NAME?)",
        f"imageos: warning: unknown setting nomount in {tmp_path}/defaults (did you mean NOMOUNT?)",
    ]


def test_signer_without_a_keyring(with_files: Load, capfd: pytest.CaptureFixture[str]) -> None:
    signer = {"IMAGE_SIGNER": "A" * 40, "IMAGE_SIGNED_NAME": "a-*.qcow2"}
    with_files({"IMAGE_KEYRING": "/keys.gpg", **signer})
    assert capfd.readouterr().err == ""
    with_files({"IMAGE_KEYRING": "/keys.gpg", **signer}, {"IMAGE_KEYRING": ""}, variant="v")
    said = "has no effect: without IMAGE_KEYRING no signature is asked for"
    assert capfd.readouterr().err.splitlines() == [f"imageos: warning: {name} {said}" for name in signer]


def test_what_the_hooks_read_is_known() -> None:
    """Every variable of the ancestor that a hook reads; no other begins with CINIT_."""
    source = "".join(path.read_text() for path in (TESTS.parent / "hooks.d").iterdir())
    assert {*re.findall(r"\bCINIT_\w+", source)} == {*settings.HOOK_VARIABLES}


def test_ganetis_variables_are_not_settings(with_files: Load, capfd: pytest.CaptureFixture[str]) -> None:
    result = with_files({"INSTANCE_NAME": "changed"}, environ={"INSTANCE_NAME": "inst1"})
    assert result.unknown == {}
    assert capfd.readouterr().err == ""


def test_text_of_a_file_survives(with_files: Load) -> None:
    text = "a=b\n'quoted' \udcff \u20ac"
    assert with_files({"USER_DATA": text}).user_data == text


@pytest.mark.parametrize("status", [0, 3, -9])
def test_file_that_ends_the_shell(status: int, with_files: Load, tmp_path: Path) -> None:
    with pytest.raises(Failure) as raised:
        with_files(status=status, said="no such command\n")
    assert str(raised.value) == f"settings file {tmp_path}/defaults: it ended the shell with status {status}"
    assert raised.value.details == ("no such command",)


def test_shell_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed at once, or could not write."""
    monkeypatch.setattr(shellfiles, "pipeline", lambda *_, **__: [Finished([], -9, b"", "")])
    with pytest.raises(Failure, match="file /etc/one: it ended the shell with status -9"):
        shellfiles.evaluate("file", ["/etc/one", "/etc/other"], {})


def test_syntax_error(with_files: Load, tmp_path: Path) -> None:
    said = f"{tmp_path}/defaults: line 3: unexpected EOF while looking for matching `\"'\nsecond line\n"
    with pytest.raises(Failure) as raised:
        with_files(status=101, said=said)
    assert str(raised.value) == (
        f"settings file {tmp_path}/defaults: line 3: unexpected EOF while looking for matching `\"'"
    )
    assert f"bash -n {tmp_path}/defaults" in str(raised.value.hint)


def test_variant_without_a_file(with_files: Load) -> None:
    with pytest.raises(Failure) as raised:
        with_files({}, status=102, variant="nosuch")
    assert str(raised.value) == f"variant nosuch has no file {SITE}/variants/nosuch.conf"
    assert "variants.list" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["../../etc/shadow", "a/b", "..", ".a", "a b", "a;b", "$(id)", "a\n"])
def test_variant_is_a_name(name: str) -> None:
    with pytest.raises(Failure, match="is not the name of a variant"):
        settings.load_settings({"OS_VARIANT": name}, "/nonexistent")


@pytest.mark.parametrize("kind", ["directory", "dangling link"])
def test_defaults_file_that_is_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "defaults"
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(Failure, match="is not a regular file"):
        settings.load_settings({}, str(path))


# For hooks


Value = Union[str, int, bool, None]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"swap_size": 12, "boot_size": 3, "swap": False, "cdinstall": True},
        {"filesystem": "btrfs", "partition_table": "gpt", "image_type": "qcow2", "arch": "aarch64"},
        {"image_name": "debian-12", "overlay": "web", "kernel_args": "a b='c d'", "guest_timeout": 5},
        {"user_data": "#cloud-config\n\u20ac\udcff\n", "root_password_hash": SECRET, "image_dir": "/srv/images"},
    ],
)
def test_hooks_find_the_same(values: dict[str, Value]) -> None:
    result = Settings(**values)
    text = result.variables()
    assert all(isinstance(value, str) for value in text.values())
    assert settings.settings_from_variables(text) == result


@given(st.text(st.characters(exclude_characters="\0")), st.integers(1, 10**9 - 1), st.booleans())
def test_hooks_find_the_same_text(text: str, number: int, flag: bool) -> None:
    result = Settings(user_data=text, swap_size=number, grow=flag)
    assert settings.settings_from_variables(result.variables()) == result


def test_only_the_settings_of_an_environment() -> None:
    assert settings.settings_from_variables({"PATH": "/bin", "OSP_SWAP": "no", "swap": "no"}) == Settings()


# The installed file


ASSIGNMENT = re.compile(r"(# )?([A-Z_]+)=(.*)")


def assignments() -> list[tuple[bool, str, str]]:
    """Return (is in effect, setting, value as the shell reads it) of the text of the defaults file."""
    found = [ASSIGNMENT.fullmatch(line) for line in settings.defaults_file().splitlines()]
    return [(not match[1], match[2], "".join(shlex.split(match[3]))) for match in found if match]


def test_defaults_file_names_every_setting_once() -> None:
    assert [name for _, name, _ in assignments()] == [name for name, _, _ in CONTRACT]


def test_defaults_file_sets_only_what_is_better_than_built_in() -> None:
    assert [(name, value) for active, name, value in assignments() if active] == [("FILESYSTEM", "ext4")]


def test_defaults_file_shows_the_defaults() -> None:
    built_in = {name: default for name, default, _ in CONTRACT}
    assert {name: value for active, name, value in assignments() if not active} == {
        name: default for name, default in built_in.items() if name != "FILESYSTEM"
    }


def test_defaults_file_is_comments_and_assignments() -> None:
    text = settings.defaults_file()
    assert text.isascii()
    assert text.endswith("\n")
    for line in text.splitlines():
        assert not line or line.startswith("# ") or ASSIGNMENT.fullmatch(line)
    for name in settings.PARAMETERS:
        assert f"; OS parameter {name}\n" in text
