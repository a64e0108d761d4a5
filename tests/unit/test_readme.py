"""README.rst agrees with the code, and other tests run its commands."""

from __future__ import annotations

import ast
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
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.layout import MIB
from imageos.guests import cloudinit
from imageos.guests.target import Target
from imageos.hook import Hook
from imageos.images import diskimage, imagetypes
from imageos.network.backends import BACKENDS
from imageos.node import cgroup
from imageos.settings import Settings

README = readme.TEXT


def section(title: str, document: str = README) -> str:
    """Return the text under a heading, up to the next heading of its kind."""
    return re.split(r"\n\n[^\n]+\n-{3,}\n", document.split(f"\n{title}\n---", 1)[1])[0]


def rows(title: str, heading: str, document: str = README) -> Iterator[list[str]]:
    """Return the rows of the table under a title whose header begins with `heading`; join continued rows."""
    _, columns, text = re.split(
        rf"(?m)^(=+(?:  =+)+)\n{re.escape(heading)}.*\n\1\n", section(title, document), maxsplit=1
    )
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
    """Return the words that are set as code."""
    return " ".join(re.findall("``([^`]+)``", text)).split()


# Code blocks


def asked_for() -> list[str]:
    """Return the beginnings of blocks that the tests of all tiers use."""
    tests = [path.read_text() for path in (CHECKOUT / "tests").glob("*/test_*.py")]
    return [ast.literal_eval(f'"{start}"') for src in tests for _, start in re.findall(r"block\((['\"])(.+?)\1\)", src)]


@pytest.mark.parametrize("text", readme.blocks(), ids=lambda text: text.split("\n")[0][:30])
def test_each_block_is_done_by_a_test(text: str) -> None:
    assert [start for start in asked_for() if text.startswith(start)], text


def test_what_tests_ask_for_is_there() -> None:
    for start in asked_for():
        assert readme.block(start)


def test_the_two_commands() -> None:
    """A test runs the first on a bare Debian; CI runs the second on a separate machine."""
    demo, test = readme.block("sudo ./build.py demo").splitlines()
    assert demo.startswith("sudo ./build.py demo  ")
    assert test.startswith("sudo ./build.py test  ")
    for command in ("demo", "test"):
        assert f'"./build.py", "{command}"' in (CHECKOUT / ".ci/machines.py").read_text()


def test_overview() -> None:
    """The picture shows every command for an instance, and every hook."""
    words = set(re.findall(r"[\w-]+", readme.block("images: tarball")))
    assert set(cli.COMMANDS) - {"verify", "install", "uninstall", "variants", "doctor"} <= words
    assert set(HOOKS) <= words


def test_urls(tmp_path: Path) -> None:
    for line in readme.block("IMAGE_URL=https://images").splitlines():
        text = line.split()[0].partition("=")[2]
        assert settings.load_settings({"OSP_IMAGE_URL": text}, str(tmp_path / "none")).image_url == text


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """In lower case in the defaults file, they do not count as unknown settings."""
    set_there = dict(line.split("=", 1) for line in readme.block("http_proxy=").splitlines())
    warnings: list[str] = []
    monkeypatch.setattr(settings, "_evaluate_files", lambda *_: [("/etc/default/x", set_there)])
    assert settings.examine_settings({}, warn=warnings.append)[0].unknown == set_there
    assert warnings == []


# Tables


def test_headings() -> None:
    """The line under a heading is as long as the heading; a bad merge would break that."""
    lines = README.splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"(=|-|~){3,}|[<>|]{7}.*", line):
            assert len(lines[number - 1]) == len(line), f"line {number + 1}"


def in_table_of_settings() -> dict[str, list[str]]:
    """Return NAME -> cells, in groups: a group's title is in bold."""
    shown = [row for row in rows("Settings", "setting                  -O") if not row[0].startswith("**")]
    found = {name.strip("`"): cells for name, *cells in shown}
    assert len(found) == len(shown)
    return found


def test_settings() -> None:
    """The table has every setting, with its default and description, and whether it is an OS parameter."""
    shown = in_table_of_settings()
    assert shown.keys() == {name.upper() for name in settings.TABLE} | settings.RESERVED.keys()
    for name, entry in settings.TABLE.items():
        default = f" [{entry.default}]" if entry.default else ""
        assert shown[name.upper()] == ["yes" if entry.parameter else "no", entry.doc + default]


def test_parameters_of_ganeti() -> None:
    shown = in_table_of_settings()
    for name, entry in settings.RESERVED.items():
        assert shown[name] == ["yes", entry.doc]


def test_settings_that_others_read() -> None:
    """The text on a hook, and on cloud-init, names exactly those of the guest's settings that are in its source."""
    group = re.findall(r"(?m)^``(\w+)``", section("Settings").split("**guest**")[1].split("\n**")[0])
    assert len(group) > 7
    planning = inspect.getsource(network)  # both use it
    seed = section("Images").split("\ncloud-init\n~~~")[1].split("\n~~~")[0]
    texts = {inspect.getsource(cloudinit) + planning: seed}
    for hook, what in rows("Hooks", "hook            what it does"):
        source = (CHECKOUT / "hooks.d" / hook.strip("`")).read_text()
        texts[source + planning if "network.plan" in source else source] = what
    assert len(texts) == 1 + len(HOOKS)
    for source, text in texts.items():
        assert {name for name in group if f"settings.{name.lower()}" in source} == {*literals(text)} & {*group}, text


def test_commands() -> None:
    """Each is named where its use is described."""
    named = {*literals(README), *" ".join(readme.blocks()).split()}
    assert set(cli.COMMANDS) <= named


@pytest.mark.parametrize("command", ["mount-disks", "umount-disks", "make-qemu-img", "ganeti-image"])
def test_options_exist(command: str) -> None:
    """Every option after a command in the text exists."""
    modules = (ganeti_image, make_qemu_img, mount_disks, umount_disks)
    (help_text,) = (module.parser().format_help() for module in modules if module.parser().prog.split()[-1] == command)
    shown = re.findall(rf"(?m)(?:^    |``|imageos ){command} ([^`\n]*)", README)
    options = {word for text in shown for word in text.partition("#")[0].split() if word.startswith("-")}
    assert options
    for option in options:
        assert re.search(rf"(?m)(^|\s|\[){option}\b", help_text), option


def test_options_of_capturing() -> None:
    help_text = ganeti_image.parser().format_help()
    options = re.findall(r"(?m)^``(-[\w-]+)[^`]*``  ", section("Images"))
    assert len(options) == 5
    for option in options:
        assert f"\n  {option}" in help_text, option


def test_suffixes_of_images() -> None:
    """They are in the order in which imageos looks for them."""
    for name, files, _ in rows("Images", "IMAGE_TYPE"):
        suffixes = [word for word in literals(files) if word.startswith((".", "-"))]
        kind = imagetypes.IMAGE_TYPES[name.strip("`")]
        known = list(kind.suffixes)
        if not kind.deploy:  # the table has them without the compressions, which the text below it names
            known = list(dict.fromkeys(suffix for suffix in known if not suffix.endswith(diskimage.COMPRESSED[1:])))
        assert suffixes == (["-root.dump", "-boot.dump"] if name == "``dump``" else known), name
    assert [row[0].strip("`") for row in rows("Images", "IMAGE_TYPE")] == list(imagetypes.IMAGE_TYPES)


def test_partitions() -> None:
    """Every cell agrees with the plan."""
    for case, own, given in rows("Partitions", "``PARTITION_TABLE``"):
        table = "gpt" if "gpt" in case else "msdos"
        swap = 0 if "SWAP=no" in case else 8 * MIB
        for text, boot in ((own, 100 * MIB), (given, 0)):
            planned = layout.plan(table, 4 << 30, boot=boot, swap=swap, arch="x86_64", smallest_root=MIB)
            roles = [f"{part.number} {part.role}" for part in planned.partitions]
            if table == "gpt":
                assert roles[:2] == ["1 bios", "2 esp"] and text.startswith("BIOS boot, ESP")
            else:
                assert roles == text.replace("/boot", "boot").replace(" /", " root").split(", "), case


def test_variables_of_hooks() -> None:
    """The table has all variables of a hook besides the settings and Ganeti's own."""
    context = hooks.Context(
        action="import",
        environ={},
        settings=Settings(),
        target="/mnt",
        loop=LoopDevice("/dev/loop0", -1, Disk("/dev/x", -1, 1 << 30, is_file=False), [], set()),
        volumes=(),
    )
    variables = set(hooks.variables(context)) - set(Settings().variables()) - {"LC_ALL", "PATH", "TMPDIR", "HOME"}
    shown = [name.partition(" ")[0].strip("`") for name, _ in rows("Hooks", "variable")]
    assert {*shown} - {"INSTANCE_NAME", "FILESYSTEM", "IMAGE_TYPE"} == variables - {"IMAGEOS_VOLUMES"}


def test_what_shell_hooks_find() -> None:
    shell = (CHECKOUT / "defaults/common.sh").read_text()
    set_there = set(re.findall(r"(?m)^(\w+)=", shell))
    text = section("Hooks").partition("In shell\n")[2]
    for name in ("MKDIR_P", "SCRIPT_NAME", "instance"):
        (row,) = re.findall(rf"``({name}\b[^`]*)``", text)
        assert set(row.split()) <= set_there


def test_what_rules_the_network() -> None:
    """They are in the order in which imageos looks for them."""
    assert [kind for kind, *_ in rows("Network of the guest", "what rules it")] == list(BACKENDS)


def test_last_lines() -> None:
    """The messages are in the code."""
    sources = [path.read_text() for path in (CHECKOUT / "imageos").rglob("*.py")]
    shown = [literal for text, _ in rows("When it fails", "last line") for literal in re.findall("``(.+?)``", text)]
    assert len(shown) > 10
    for message in shown:
        for words in re.split(r"[.]{3}|NAME", message):
            assert [source for source in sources if words.strip(" :,") in source], message


def test_what_doctor_looks_at() -> None:
    assert [area for area, _ in rows("Tools", "what it looks at")] == list(doctor.checks("/", ""))


def test_packages() -> None:
    there = {f"{path.parent.name}/" for path in (CHECKOUT / "imageos").glob("*/__init__.py")}
    holds = readme.CONTRIBUTING.split("``imageos/`` holds ")[1].split(".\n")[0]
    assert set(literals(holds)) == there


def test_numbers() -> None:
    assert f"({cgroup.PROCESSES} processes, {cgroup.MEMORY >> 30} GiB; version 2 or 1)" in README
    assert f"bytes ({stream.RUN >> 20} MiB at most)" in README
    assert set(filesystem.FILESYSTEMS) == {"ext2", "ext3", "ext4", "xfs", "btrfs"}


def test_commands_that_are_called_exist() -> None:
    code = [*re.findall(r"``([^`]+)``", README), *readme.blocks()]
    called = {command for text in code for command in re.findall(r"(?m)(?:^|[\s/])imageos ([a-z][a-z-]*)", text)}
    assert {"install", "doctor"} <= called <= set(cli.COMMANDS)


def test_what_hooks_find() -> None:
    """The text names every bundled hook, every member of Hook and its target, and every function for shell hooks."""
    text = section("Hooks")
    bundled = set(HOOKS)
    parts = set(Hook._fields)
    methods = {name for name in vars(Target) if not name.startswith("_")} - {"directory", "drop_preallocated"}
    functions = set(re.findall(r"^([a-z]\w*)\(\) \{", (CHECKOUT / "defaults/common.sh").read_text(), re.MULTILINE))
    assert len(functions) == 6
    words = set(re.findall(r"[\w-]+", " ".join(re.findall(r"``([^`]+)``", text))))
    assert bundled | parts | methods | functions <= words


def test_what_is_defended_is_proven() -> None:
    """The table has all tests of attacks; one of another directory has it before its name."""
    named = {name for name, _ in rows("Security", "in tests/faults", readme.CONTRIBUTING)}
    there = {path.stem.removeprefix("test_") for path in (CHECKOUT / "tests/faults").glob("test_*.py")}
    assert named == there | {"boot/panic"}
    assert (CHECKOUT / "tests/boot/test_panic.py").exists()
