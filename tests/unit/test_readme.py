"""README.rst says what the code does."""

import dataclasses
import re
from pathlib import Path

from imageos import cli, settings
from imageos.hook import Hook
from imageos.target import Target

CHECKOUT = Path(__file__).resolve().parents[2]
README = (CHECKOUT / "README.rst").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next of its kind."""
    return re.split(r"\n\n[^\n]+\n-{3,}\n", README.split(f"\n{title}\n---", 1)[1])[0]


def test_headings() -> None:
    """A line under a heading is as long as the heading: what is left of a merge is not."""
    lines = README.splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"(=|-|~){3,}|[<>|]{7}.*", line):
            assert len(lines[number - 1]) == len(line), f"line {number + 1}"


def test_settings() -> None:
    """The table has every setting, with its default, whether it is an OS parameter, and its description."""
    rows = re.findall(r"^``([A-Z_]+)`` +(.*)$", section("Settings"), re.MULTILINE)
    assert [name.lower() for name, _ in rows] == list(settings.TABLE)
    for name, rest in rows:
        entry = settings.TABLE[name.lower()]
        parameter = "yes" if entry["parameter"] else "no"
        assert rest.split(None, 1 if not entry["default"] else 2) == [
            *([entry["default"]] if entry["default"] else []),
            parameter,
            entry["doc"],
        ], name


def test_variables_of_hooks() -> None:
    text = section("Hooks")
    for name in ("TARGET", "BLOCKDEV", "DISK_DEV", "ROOT_DEV", "BOOT_DEV", "SWAP_DEV", "IMAGEOS", "IMAGEOS_ACTION"):
        assert f"``{name}``" in text
        assert f'"{name}"' in (Path(settings.__file__).parent / "hooks.py").read_text()


def test_the_two_commands() -> None:
    assert "sudo ./build.py demo" in section("Try it")
    assert "sudo ./build.py test" in section("Try it")


def test_commands_that_are_called_exist() -> None:
    for command in re.findall(r"(?:``|dist/)imageos ([a-z][a-z-]*)", README):
        assert command in cli.COMMANDS, command


def test_what_hooks_find() -> None:
    """Every bundled hook, everything of a Hook and its target, every function that a shell hook finds."""
    text = section("Hooks")
    bundled = {path.name for path in (CHECKOUT / "hooks.d").iterdir() if path.is_file()}
    parts = {field.name for field in dataclasses.fields(Hook)}
    methods = {name for name in vars(Target) if not name.startswith("_")} - {"directory"}
    functions = set(re.findall(r"^([a-z]\w*)\(\) \{$", (CHECKOUT / "defaults/common.sh").read_text(), re.MULTILINE))
    assert len(functions) == 6
    words = set(re.findall(r"[\w-]+", " ".join(re.findall(r"``([^`]+)``", text))))
    assert bundled | parts | methods | functions <= words


def test_what_is_defended_is_proven() -> None:
    """The tests that the table names exist, and hold tests."""
    named = re.findall(r"^     - ``(tests/\S+)``$", README, re.MULTILINE)
    assert len(named) > 10
    for path in named:
        assert "\ndef test_" in (CHECKOUT / path).read_text(), path
