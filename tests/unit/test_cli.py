"""The command line: the choice of the command."""

from __future__ import annotations

from types import ModuleType

import pytest

from imageos import __version__, cli
from imageos.errors import Usage

# The contract
EVERY_COMMAND = {
    *("create", "import", "export", "rename", "verify"),
    *("mount-disks", "umount-disks", "make-dump", "make-qemu-img", "ganeti-image", "grow"),
    *("install", "uninstall", "variants", "doctor"),
}

Calls = list[tuple[str, list[str]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Collect the called commands with their arguments."""
    made: Calls = []

    def load(name: str) -> ModuleType:
        def command(arguments: list[str]) -> int:
            made.append((name, arguments))
            return 7

        module = ModuleType(name, f"{name}: does nothing.")
        module.__dict__["main"] = command
        return module

    monkeypatch.setattr(cli, "_load", load)
    return made


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        (["create"], ("create", [])),
        (["/usr/share/ganeti/os/image/create"], ("create", [])),
        (["./verify", "parameters"], ("verify", ["parameters"])),
        (["imageos", "create"], ("create", [])),
        (["/tmp/imageos-1.0", "install", "--root", "/x"], ("install", ["--root", "/x"])),
        (["/a name", "verify"], ("verify", [])),
        (["install", "--help"], ("install", ["--help"])),
    ],
)
def test_command_by_name_or_argument(argv: list[str], call: tuple[str, list[str]], calls: Calls) -> None:
    assert cli.dispatch(argv) == 7
    assert calls == [call]


@pytest.mark.parametrize("argv", [["create", "verify"], ["imageos", "export", "x"], ["verify", "parameters", "x"]])
def test_scripts_take_no_arguments(argv: list[str], calls: Calls) -> None:
    """Ignoring an option could overwrite a disk."""
    with pytest.raises(Usage, match="takes no argument"):
        cli.dispatch(argv)
    assert calls == []


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_a_script(option: str, capfd: pytest.CaptureFixture[str], calls: Calls) -> None:
    assert cli.dispatch(["create", option]) == 0
    assert capfd.readouterr().out.startswith("usage: imageos create\n\ncreate: does nothing.\n")
    assert calls == []


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option: str, capfd: pytest.CaptureFixture[str], calls: Calls) -> None:
    assert cli.dispatch(["imageos", option]) == 0
    assert capfd.readouterr() == (f"imageos {__version__}\n", "")
    assert calls == []


@pytest.mark.parametrize("option", ["--help", "-h", "help"])
def test_help_names_every_command(option: str, capfd: pytest.CaptureFixture[str], calls: Calls) -> None:
    assert cli.dispatch(["imageos", option]) == 0
    shown = capfd.readouterr().out
    assert calls == []
    for name, purpose in cli.COMMANDS.items():
        assert f"  {name} " in shown
        assert purpose in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["imageos"], "no command given"),
        (["anything"], "no command given"),
        (["imageos", "creat"], "unknown command creat (did you mean create?)"),
        (["imageos", "frobnicate"], "unknown command frobnicate"),
        (["imageos", "--frobnicate"], "unknown command --frobnicate"),
        (["imageos", ""], "unknown command "),
    ],
)
def test_usage(argv: list[str], message: str, calls: Calls) -> None:
    with pytest.raises(Usage) as raised:
        cli.dispatch(argv)
    assert message in str(raised.value).splitlines()
    assert calls == []


@pytest.mark.parametrize("argv", [["imageos"], ["imageos", "creat"]])
def test_cause_is_last(argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert cli.main() == 2
    assert " command" in capfd.readouterr().err.splitlines()[-1].partition("usage:")[0]


def test_status_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    monkeypatch.setattr("sys.argv", ["create"])
    assert cli.main() == 7


def test_commands_are_those_of_the_contract() -> None:
    assert set(cli.COMMANDS) == EVERY_COMMAND


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handled = []
    monkeypatch.setattr("imageos.node.isolation.handle_signals", lambda: handled.append(True))
    module = cli._load(name)
    assert handled == [True]
    assert callable(module.main)
    assert module.__name__.rpartition(".")[2].rstrip("_").replace("_", "-") == name
    assert (module.__doc__ or "").startswith(f"{name}: ")
