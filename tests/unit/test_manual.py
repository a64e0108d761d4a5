"""The manual page and the completions, made from the real commands."""

from __future__ import annotations

import argparse
import re

import pytest
import shtab

import manual
from imageos import cli, ganeti, settings
from imageos.errors import Failure, Usage
from imageos.installation import TOOLS

TYPED = [name for name in cli.COMMANDS if name not in ganeti.SCRIPTS]
# Each parser by what is typed: `variants enable` has one of its own
WITH_ACTIONS = {
    part.prog.replace("imageos ", "") if name not in TOOLS else name: part
    for name in cli.COMMANDS
    for part in manual.parts(manual.command_parser(name))
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "999")


def test_page_has_every_command_and_setting() -> None:
    lines = manual.page().splitlines()
    described = [line for line in lines if line.startswith(".SS ")]
    assert described == [rf".SS \fBimageos {name}\fR".replace("-", r"\-") for name in WITH_ACTIONS]
    for name in (*settings.TABLE, *settings.RESERVED):
        shown = name.upper() if name in settings.TABLE else name
        assert f".B {manual.escape(shown)}" in lines
    headings = re.findall(r"(?m)^\.SH[ \n](.*)", "\n".join(lines))
    expected = "NAME, SYNOPSIS, DESCRIPTION, OPTIONS, COMMANDS, SETTINGS, FILES, EXIT STATUS, SEE ALSO"
    assert headings == expected.split(", ")  # man-pages(7)
    assert all(line.isascii() for line in lines)


@pytest.mark.parametrize("name", [name for name in WITH_ACTIONS if name not in ganeti.SCRIPTS])
def test_page_describes_every_option_and_argument(name: str) -> None:
    """It shows their help with the defaults filled in."""
    _, _, text = manual.page().partition(f".SS \\fBimageos {name}\\fR\n".replace("-", r"\-"))
    part = text.partition("\n.S")[0]
    for action in WITH_ACTIONS[name]._actions:
        is_list = isinstance(action, argparse._SubParsersAction)  # each of them is a section
        if "--help" not in action.option_strings and action.help != argparse.SUPPRESS and not is_list:
            for word in action.option_strings or [str(action.metavar)]:
                assert rf"\fB{manual.escape(word)}\fR" in part, word
            assert manual.escape((action.help or "") % vars(action)) in part


def test_text_does_not_begin_as_a_request() -> None:
    """roff would take a line that begins with a dot or a quote for a request."""
    known = {"TH", "SH", "SS", "TP", "B", "I", "RI", "BR", "br", "nh", "ad", "RS", "RE", "PP"}
    requests = {line[1:].split()[0] for line in manual.page().splitlines() if line.startswith((".", "'"))}
    assert requests == known


@pytest.mark.parametrize(
    ("text", "escaped"),
    [(".TH", r"\&.TH"), ("'tis", r"\&'tis"), ("--man", r"\-\-man"), ("a\\b", r"a\eb"), ("plain. text", "plain. text")],
)
def test_roff_takes_text_as_it_stands(text: str, escaped: str) -> None:
    assert manual.escape(text) == escaped


def test_values_are_completed() -> None:
    actions = {action.dest: action for action in manual.command_parser("ganeti-image")._actions}
    found = [vars(actions[name]).get("complete") for name in ("image_dir", "instance", "name")]
    assert found == [shtab.DIRECTORY, manual.COMPLETIONS["INSTANCE"], None]


def test_zsh_completes_the_tools_too() -> None:
    text = manual.zsh(shtab.complete(manual.parser(TYPED), "zsh"))
    assert text.startswith("#compdef imageos mount-disks ")
    assert manual.ZSH_TOOLS in text, "shtab's script is not what it was"


def test_checkout_has_no_page() -> None:
    with pytest.raises(Failure, match="the built file only"):
        cli.dispatch(["imageos", "--man"])


@pytest.mark.parametrize("arguments", [["--man", "x"], ["--completion"], ["--completion", "fish"]])
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(Usage, match="wrong arguments"):
        cli.dispatch(["imageos", *arguments])


@pytest.mark.parametrize("name", TYPED)
def test_wrong_options_of_every_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They look like all other errors: prefix, hint, the cause last."""
    words = [name, "enable"] if name == "variants" else [name]
    monkeypatch.setattr("sys.argv", [*words, "x", "-tdump", "-ix", "y", "--frobnicate"])
    assert cli.main() == 2
    shown = capfd.readouterr()
    hint, cause = shown.err.splitlines()
    typed = name if name in TOOLS else f"imageos {name}"
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
    for part in manual.parts(module.parser()):
        for action in part._actions:
            assert action.help, f"{part.prog} {action.dest} has no help"
