"""The manual page and the completions: made from the commands as they are."""

from __future__ import annotations

import argparse

import pytest

from imageos import cli, manual, settings
from imageos.commands import install
from imageos.errors import Usage
from imageos.manual import Command


def example() -> Command:
    options = argparse.ArgumentParser(prog="make-thing")
    options.add_argument("-t", "--type", required=True, choices=["tarball", "dump"], help="type: [what] it's")
    options.add_argument("--dry-run", action="store_true", help="change nothing")
    options.add_argument("-d", "--dir", default="/srv", metavar="DIR", help="where to (default: %(default)s)")
    options.add_argument("--secret", help=argparse.SUPPRESS)
    options.add_argument("instance", metavar="INSTANCE", help="name of the instance")
    options.add_argument("image_dir", metavar="IMAGE_DIR", nargs="?", help="directory")
    return Command("make-thing", "make it: a thing", "make-thing: make a thing.\n\n.It is\nmade.\n", options)


SCRIPT = Command("create", "deploy it", "create: deploy it.", None)


def test_synopsis() -> None:
    assert manual.synopsis(example()) == "make-thing -t tarball|dump [--dry-run] [-d DIR] INSTANCE [IMAGE_DIR]"
    assert manual.synopsis(SCRIPT) == "create"


def test_page_describes_every_option_and_argument() -> None:
    page = manual.page([SCRIPT, example()])
    lines = page.splitlines()
    assert r".B \-d, \-\-dir DIR" in lines
    assert "where to (default: /srv)" in lines
    assert ".B INSTANCE" in lines
    assert r".B imageos \-\-help" in lines
    assert "show this help message" not in page
    assert "secret" not in page
    assert r"\&.It is made." in lines
    assert "Make a thing." in lines


def test_page_has_every_command_and_setting(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["imageos", "--man"]) == 0
    lines = capfd.readouterr().out.splitlines()
    described = {line.split()[1] for line in lines if line.startswith(".SS ")}
    assert described == {manual.escape(name) for name in cli.COMMANDS}
    for name in settings.TABLE:
        assert f".B {name.upper()}" in lines
    assert {rf".B {manual.escape(name)}" for name in settings.RESERVED} <= set(lines)
    headings = [line.removeprefix(".SH ") for line in lines if line.startswith(".SH ")]
    expected = "NAME, SYNOPSIS, DESCRIPTION, COMMANDS, SETTINGS, FILES, EXIT STATUS, SEE ALSO"
    assert headings == expected.split(", ")  # man-pages(7)
    assert all(line.isascii() for line in lines)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [(".TH", r"\&.TH"), ("'tis", r"\&'tis"), ("--man", r"\-\-man"), ("a\\b", r"a\eb"), ("plain. text", "plain. text")],
)
def test_roff_takes_text_as_it_stands(text: str, escaped: str) -> None:
    assert manual.escape(text) == escaped


def test_bash() -> None:
    text = manual.bash([SCRIPT, example()])
    assert "compgen -W 'make-thing --help --version'" in text, "what only Ganeti calls is not offered"
    assert "words='-h --help -t --type --dry-run -d --dir'" in text
    assert "-t|--type) mapfile -t COMPREPLY < <(compgen -W 'tarball dump'" in text
    assert "-d|--dir) mapfile -t COMPREPLY < <(compgen -d" in text
    assert manual.INSTANCES in text


def test_zsh() -> None:
    text = manual.zsh([SCRIPT, example()])
    assert text.startswith("#compdef imageos mount-disks")
    assert r"'-t[type\: \[what\] it'\''s]:type:(tarball dump)'" in text
    assert "'--dry-run[change nothing]'" in text
    assert "'--dir[where to (default\\: /srv)]:directory:_files -/'" in text
    assert "'2:directory:_files -/'" in text


@pytest.mark.parametrize("arguments", [["--man", "x"], ["--completion"], ["--completion", "fish"]])
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(Usage, match="wrong arguments"):
        cli.dispatch(["imageos", *arguments])


TYPED = [name for name in cli.COMMANDS if name not in cli.SCRIPTS]


@pytest.mark.parametrize("name", TYPED)
def test_wrong_options_of_every_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They look as every other error does: prefix, hint, the cause last."""
    monkeypatch.setattr("sys.argv", [name, "x", "-tdump", "-ix", "y", "--frobnicate"])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 2
    shown = capfd.readouterr()
    hint, cause = shown.err.splitlines()
    typed = name if name in install.TOOLS else f"imageos {name}"
    assert hint.startswith(f"imageos: hint: usage: {typed} [-h] ")
    assert cause.startswith(f"imageos: {typed}: unrecognized arguments: ") and cause.endswith("--frobnicate")
    assert shown.out == ""


@pytest.mark.parametrize("name", TYPED)
def test_help_of_every_command(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.dispatch(["imageos", name, "--help"])
    assert raised.value.code == 0
    shown = capfd.readouterr().out
    module = cli._load(name)
    first = (module.__doc__ or "").partition("\n\n")[0].partition(": ")[2]
    assert " ".join(first.split()).rstrip(".") in " ".join(shown.split()), "it says what the command is for"
    for action in module.parser()._actions:
        assert action.help, f"{name} {action.dest} has no help"
