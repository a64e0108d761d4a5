"""README.rst says what the code does; what it tells to do is done by tests."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import readme
from hookfiles import HOOKS
from readme import CHECKOUT

from imageos import cli, hooks, network, settings
from imageos.backups import stream
from imageos.commands import doctor, ganeti_image, make_qemu_img, mount_disks, umount_disks
from imageos.disks import filesystem, layout
from imageos.disks.disk import Attached, Device
from imageos.disks.layout import MIB
from imageos.guests import cloudinit
from imageos.guests.target import Target
from imageos.hook import Hook
from imageos.images import imagetypes
from imageos.network.backends import BACKENDS
from imageos.node import cgroup
from imageos.settings import Settings

README = readme.TEXT


def section(title: str) -> str:
    """The text under a heading, up to the next of its kind."""
    return re.split(r"\n\n[^\n]+\n-{3,}\n", README.split(f"\n{title}\n---", 1)[1])[0]


def rows(title: str, heading: str) -> Iterator[list[str]]:
    """The rows of the table under a title whose header begins with `heading`: cells, those of continued rows joined."""
    _, columns, text = re.split(rf"(?m)^(=+(?:  =+)+)\n{re.escape(heading)}.*\n\1\n", section(title), maxsplit=1)
    starts = [match.start() for match in re.finditer("=+", columns)]
    found: list[list[str]] = []
    for line in text.partition(f"\n{columns}")[0].splitlines():
        cells = [line[start:end].strip() for start, end in itertools.zip_longest(starts, starts[1:])]
        if cells[0]:
            found.append(cells)
        else:
            found[-1] = [f"{before} {more}".strip() for before, more in zip(found[-1], cells)]
    yield from found


def literals(text: str) -> list[str]:
    """The words that are set as code."""
    return " ".join(re.findall("``([^`]+)``", text)).split()


# Code blocks


def asked_for() -> list[str]:
    """The beginnings of blocks that the tests of all tiers ask for."""
    tests = [path.read_text() for path in (CHECKOUT / "tests").glob("*/test_*.py")]
    return [ast.literal_eval(f'"{start}"') for one in tests for _, start in re.findall(r"block\((['\"])(.+?)\1\)", one)]


@pytest.mark.parametrize("text", readme.blocks(), ids=lambda text: text.split("\n")[0][:30])
def test_each_block_is_done_by_a_test(text: str) -> None:
    assert [start for start in asked_for() if text.startswith(start)], text


def test_what_tests_ask_for_is_there() -> None:
    for start in asked_for():
        assert readme.block(start)


def test_the_two_commands() -> None:
    """The first is done on a bare Debian; the second is what CI does on a machine of its own."""
    demo, test = readme.block("sudo ./build.py demo").splitlines()
    assert demo.startswith("sudo ./build.py demo  ")
    assert test.startswith("sudo ./build.py test  ")
    for command in ("demo", "test"):
        assert f'"./build.py", "{command}"' in (CHECKOUT / ".ci/machines.py").read_text()


def test_overview() -> None:
    """The picture shows every command that does something with an instance, and every hook."""
    words = set(re.findall(r"[\w-]+", readme.block("images: tarball")))
    assert set(cli.COMMANDS) - {"verify", "install", "uninstall", "doctor"} <= words
    assert set(HOOKS) <= words


def test_urls(tmp_path: Path) -> None:
    for line in readme.block("IMAGE_URL=https://images").splitlines():
        text = line.split()[0].partition("=")[2]
        assert settings.load({"OSP_IMAGE_URL": text}, str(tmp_path / "none")).image_url == text


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """In lower case in the defaults file, they are no settings that nobody knows."""
    set_there = dict(line.split("=", 1) for line in readme.block("http_proxy=").splitlines())
    warnings: list[str] = []
    monkeypatch.setattr(settings, "_evaluate_files", lambda *_: [("/etc/default/x", set_there)])
    assert settings.examine({}, warn=warnings.append)[0].unknown == set_there
    assert warnings == []


# Tables


def test_headings() -> None:
    """A line under a heading is as long as the heading: what is left of a merge is not."""
    lines = README.splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"(=|-|~){3,}|[<>|]{7}.*", line):
            assert len(lines[number - 1]) == len(line), f"line {number + 1}"


def test_settings() -> None:
    """The table has every setting, with its default, whether it is an OS parameter, and its description."""
    shown = list(rows("Settings", "setting                  default"))
    assert [name.strip("`").lower() for name, *_ in shown] == list(settings.TABLE)
    for (_, *cells), entry in zip(shown, settings.TABLE.values()):
        assert cells == [entry["default"], "yes" if entry["parameter"] else "no", entry["doc"]]


def test_parameters_of_ganeti() -> None:
    shown = [(name.strip("`"), text) for name, text in rows("Settings", "OS parameter            of Ganeti")]
    assert shown == [(name, entry["doc"]) for name, entry in settings.RESERVED.items()]


def test_settings_that_others_read() -> None:
    """In the hook's own source, in that of cloud-init's seed, or in that of the network, which both take."""
    planning = inspect.getsource(network)
    seed = inspect.getsource(cloudinit) + planning
    for names, hook, is_in_seed in rows("Settings", "setting                                          hook"):
        source = "" if hook == "none" else (CHECKOUT / "hooks.d" / hook.strip("`")).read_text()
        if "network.plan" in source:
            source += planning
        for name in literals(names):
            assert (hook == "none") != (f"settings.{name.lower()}" in source), name
            assert (is_in_seed == "yes") == (f"settings.{name.lower()}" in seed), name


def test_commands() -> None:
    assert {name.strip("`"): text for name, text in rows("Tools", "command")} == cli.COMMANDS


@pytest.mark.parametrize("command", ["mount-disks", "umount-disks", "make-qemu-img", "ganeti-image"])
def test_options_exist(command: str) -> None:
    """Every option that the text shows behind a command."""
    modules = (ganeti_image, make_qemu_img, mount_disks, umount_disks)
    (known,) = (one.parser().format_help() for one in modules if one.parser().prog.split()[-1] == command)
    shown = re.findall(rf"(?m)(?:^    |``|imageos ){command} ([^`\n]*)", README)
    options = {word for text in shown for word in text.partition("#")[0].split() if word.startswith("-")}
    assert options
    for option in options:
        assert re.search(rf"(?m)(^|\s|\[){option}\b", known), option


def test_options_of_capturing() -> None:
    known = ganeti_image.parser().format_help()
    options = re.findall(r"(?m)^``(-[\w-]+)[^`]*``  ", section("Images"))
    assert len(options) == 5
    for option in options:
        assert f"\n  {option}" in known, option


def test_suffixes_of_images() -> None:
    """In the order in which they are looked for."""
    for name, files, _ in rows("Images", "IMAGE_TYPE"):
        suffixes = [word for word in literals(files) if word.startswith((".", "-"))]
        kind = imagetypes.IMAGE_TYPES[name.strip("`")]
        assert suffixes == (["-root.dump", "-boot.dump"] if name == "``dump``" else list(kind.suffixes)), name
    assert [row[0].strip("`") for row in rows("Images", "IMAGE_TYPE")] == list(imagetypes.IMAGE_TYPES)


def test_partitions() -> None:
    """Every cell is what is planned."""
    for case, own, given in rows("Partitions", "``PARTITION_TABLE``"):
        table = "gpt" if "gpt" in case else "msdos"
        swap = 0 if "SWAP=no" in case else 8 * MIB
        for text, boot in ((own, 100 * MIB), (given, 0)):
            planned = layout.plan(table, 4 << 30, boot=boot, swap=swap, arch="x86_64", smallest_root=MIB)
            roles = [f"{one.number} {one.role}" for one in planned.partitions]
            if table == "gpt":
                assert roles[:2] == ["1 bios", "2 esp"] and text.startswith("BIOS boot, ESP")
            else:
                assert roles == text.replace("/boot", "boot").replace(" /", " root").split(", "), case


def test_variables_of_hooks() -> None:
    """All that a hook gets besides the settings and what Ganeti sets."""
    context = hooks.Context(
        action="import",
        environ={},
        settings=Settings(),
        target="/mnt",
        device=Device("/dev/x", -1, 1 << 30, is_file=False),
        disk=Attached("/dev/loop0", -1, 1 << 30),
        volumes=(),
    )
    known = set(hooks.variables(context)) - set(Settings().variables()) - {"LC_ALL", "PATH", "TMPDIR", "HOME"}
    shown = [name.partition(" ")[0].strip("`") for name, _ in rows("Hooks", "variable")]
    assert {*shown} - {"INSTANCE_NAME", "FILESYSTEM", "IMAGE_TYPE"} == known - {"IMAGEOS_VOLUMES"}


def test_what_shell_hooks_find() -> None:
    shell = (CHECKOUT / "defaults/common.sh").read_text()
    set_there = set(re.findall(r"(?m)^(\w+)=", shell))
    text = section("Hooks").partition("In shell\n")[2]
    for name in ("MKDIR_P", "SCRIPT_NAME", "instance"):
        (row,) = re.findall(rf"(?m)^``({name}.*?)``", text)
        assert set(row.split()) <= set_there


def test_what_rules_the_network() -> None:
    """In the order in which it is looked for."""
    assert [kind for kind, *_ in rows("Network of the guest", "what rules it")] == list(BACKENDS)


def test_what_doctor_looks_at() -> None:
    areas = re.findall(r'report\.on\("(.+)"\)', Path(doctor.__file__).read_text())
    assert [area for area, _ in rows("Tools", "what it looks at")] == list(dict.fromkeys(areas))


def test_packages() -> None:
    there = {f"{path.parent.name}/" for path in (CHECKOUT / "imageos").glob("*/__init__.py")}
    assert {name.strip("`") for name, _ in rows("Development", "``imageos/``")} == there


def test_numbers() -> None:
    assert f"({cgroup.PROCESSES} processes, {cgroup.MEMORY >> 30} GiB; version 2 or 1)" in README
    assert f"bytes ({stream.RUN >> 20} MiB at most)" in README
    assert set(filesystem.FILESYSTEMS) == {"ext2", "ext3", "ext4", "xfs", "btrfs"}


def test_commands_that_are_called_exist() -> None:
    code = [*re.findall(r"``([^`]+)``", README), *readme.blocks()]
    called = {command for text in code for command in re.findall(r"(?m)(?:^|[\s/])imageos ([a-z][a-z-]*)", text)}
    assert {"install", "doctor"} <= called <= set(cli.COMMANDS)


def test_what_hooks_find() -> None:
    """Every bundled hook, everything of a Hook and its target, every function that a shell hook finds."""
    text = section("Hooks")
    bundled = set(HOOKS)
    parts = {field.name for field in dataclasses.fields(Hook)}
    methods = {name for name in vars(Target) if not name.startswith("_")} - {"directory", "drop_preallocated"}
    functions = set(re.findall(r"^([a-z]\w*)\(\) \{", (CHECKOUT / "defaults/common.sh").read_text(), re.MULTILINE))
    assert len(functions) == 6
    words = set(re.findall(r"[\w-]+", " ".join(re.findall(r"``([^`]+)``", text))))
    assert bundled | parts | methods | functions <= words


def test_what_is_defended_is_proven() -> None:
    """The tests that the table names exist, and hold tests."""
    named = re.findall(r"^     - ``(tests/\S+)``$", README, re.MULTILINE)
    assert len(named) > 10
    for path in named:
        assert "\ndef test_" in (CHECKOUT / path).read_text(), path
