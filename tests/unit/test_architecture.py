"""The rules that hold the modules together, read from their source."""

from __future__ import annotations

import ast
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from hookfiles import PYTHON_HOOKS

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "imageos"

# Lowest first: a module imports only from those before it. A new module goes as far up as it can.
ORDER = [
    *("node", "guests", "disks", "images", "backups"),
    # what everything stands on
    *("errors", "log", "outcome", "node.linux", "node.syscalls", "node.seccomp", "run"),
    *("node.mounts", "node.cgroup", "node.isolation"),
    # what Ganeti and the site say
    *("ganeti", "shellfiles", "settings", "cluster"),
    # disks and filesystems
    *("disks.layout", "disks.disk", "disks.superblock", "disks.filesystem"),
    # the guest's root, and what is in it
    *(
        "guests.sandbox",
        "guests.target",
        "guests.guest",
        "guests.hostkeys",
        "guests.hostname",
        "disks.discovery",
        "disks.grow",
    ),
    # the guest's network
    *("network", "network.files", "network.render", "guests.cloudinit", "network.backends"),
    # what makes it boot
    *("guests.bootconfig", "guests.esp", "guests.oldboot"),
    # images
    *(
        "images.web",
        "images.checksums",
        "images.cache",
        "images.fetch",
        "images.imagefile",
        "images.qcow2",
        "images.tarball",
        "images.dump",
        "images.diskimage",
        "images.imagetypes",
    ),
    # backups
    *("disks.ext", "disks.usage", "backups.stream", "backups.restore", "backups.legacy", "checks.wholeness"),
    # images made of instances
    *("guests.sealing", "images.capture"),
    # hooks: what one imports, and what runs them
    *("hook", "hooks"),
    # commands
    "commandline",
    *("commands", "commands.create", "commands.import_", "commands.export", "commands.rename", "commands.verify"),
    *("commands.mount_disks", "commands.umount_disks"),
    *("commands.ganeti_image", "commands.make_dump", "commands.make_qemu_img"),
    *("commands.install", "commands.uninstall"),
    *("checks", "checks.report", "checks.variants", "checks.programs", "checks.definition", "checks.kernel"),
    *("checks.node", "commands.doctor"),
    *("manual", "cli"),
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).replace(".__init__", ""): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
SOURCES = {**MODULES, **{f"hooks.d/{name}": path for name, path in PYTHON_HOOKS.items()}}
# What the standard library's own directories hold: sys.stdlib_module_names is new in Python 3.10.
STDLIB = {
    *sys.builtin_module_names,
    *(
        module.name
        for module in pkgutil.iter_modules([sysconfig.get_path("stdlib"), str(sysconfig.get_config_var("DESTSHARED"))])
    ),
}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(), filename=str(SOURCES[name]))


@cache
def imported(name: str) -> frozenset[str]:
    """Full names of the modules that a source imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            assert node.module
            # `from imageos import run` is a module, `from imageos.run import run` a function of it
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.partition(".")[2] in MODULES else node.module for name in names}
    return frozenset(found)


def own(name: str) -> set[str]:
    """The modules of the package that a source imports."""
    return {one.partition(".")[2] for one in imported(name) if one.startswith("imageos.")}


def dotted(node: ast.AST) -> str:
    """`os.path.join` of the node that says so."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def used(name: str) -> frozenset[str]:
    """Every name and attribute in a source, as `os.fork`."""
    return frozenset(dotted(node) for node in ast.walk(tree(name)) if isinstance(node, (ast.Attribute, ast.Name)))


def for_each(names: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """One test over all `names`: a test for each of them would cost the tier a second."""

    def decorate(test: Callable[[str], None]) -> Callable[[], None]:
        def over_all() -> None:
            for name in names:
                try:
                    test(name)
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from error

        over_all.__doc__ = test.__doc__
        return over_all

    return decorate


# The list


def test_every_module_has_its_place() -> None:
    assert len(ORDER) == len(set(ORDER))
    missing = set(MODULES) - set(ORDER)
    assert not missing, "put them into ORDER, as far up as their imports allow"


@for_each(MODULES)
def test_imports_only_from_before(name: str) -> None:
    before = ORDER[: ORDER.index(name)]
    assert own(name) <= set(before)


@for_each(PYTHON_HOOKS)
def test_hooks_import_only_what_is_for_them(name: str) -> None:
    assert own(f"hooks.d/{name}") <= set(ORDER[: ORDER.index("hook") + 1])


@for_each(SOURCES)
def test_only_the_standard_library(name: str) -> None:
    assert {one.partition(".")[0] for one in imported(name)} <= {"imageos", *STDLIB}


def test_nothing_of_pip_is_the_standard_library() -> None:
    assert {"pytest", "shiv", "pip"}.isdisjoint(STDLIB)


# Who may do what


STARTERS = ("fork", "forkpty", "system", "popen", "posix_spawn", "exec", "spawn")


@for_each(SOURCES)
def test_processes_are_started_in_one_place(name: str) -> None:
    if name != "run":
        assert not {"subprocess", "multiprocessing", "pty"} & imported(name)
        assert not {one for one in used(name) | imported(name) if one.endswith("ProcessPoolExecutor")}
    starts = {one for one in used(name) if one.startswith(tuple(f"os.{starter}" for starter in STARTERS))}
    assert starts <= ({"os.fork"} if name in ("node.isolation", "guests.sandbox") else set())


@for_each(SOURCES)
def test_no_command_is_text_for_a_shell(name: str) -> None:
    keywords = [node for node in ast.walk(tree(name)) if isinstance(node, ast.keyword)]
    assert not [one.value.lineno for one in keywords if one.arg == "shell"]


@for_each(SOURCES)
def test_system_calls_are_in_one_place(name: str) -> None:
    assert "ctypes" not in imported(name) or name == "node.linux"


@for_each(SOURCES)
def test_stdout_belongs_to_the_backup(name: str) -> None:
    """Messages go through log; only what was asked for (help, a report) is printed."""
    if name not in ("cli", "node.isolation") and not name.startswith("commands."):
        assert not {"print", "sys.stdout"} & used(name)


ROOTS = {"isolation.TARGET", "TARGET", "context.target"}
JOINS = ("os.path.join", "Path", "pathlib.Path", "PurePath")


@for_each(sorted(set(SOURCES) - {"node.isolation", "guests.sandbox", "guests.target"}))
def test_no_path_is_made_below_the_mounted_root(name: str) -> None:
    """A link of the guest's could lead it to the node: Target resolves the guest's paths."""
    if not ROOTS & used(name):
        return
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.JoinedStr, ast.BinOp)) or (isinstance(node, ast.Call) and dotted(node.func) in JOINS):
            parts = {dotted(one) for one in ast.walk(node)}
            assert not ROOTS & parts, f"{name}: line {node.lineno}"


@for_each(
    [
        *(f"hooks.d/{hook}" for hook in PYTHON_HOOKS),
        "guests.guest",
        "guests.hostname",
        "guests.cloudinit",
        "network",
        "network.backends",
    ]
)
def test_guest_is_reached_through_target_alone(name: str) -> None:
    """What changes a guest has no other means to open a file."""
    if name in SOURCES:
        assert not {"os", "os.path", "pathlib", "shutil", "io", "glob", "tempfile"} & imported(name)
        assert "open" not in used(name)


@for_each(SOURCES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(tree(name))


def test_names_of_test_modules_are_unique() -> None:
    """pytest imports them by their names, whatever the directory."""
    names = [path.name for path in (CHECKOUT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
