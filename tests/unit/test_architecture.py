"""The rules for the modules' dependencies, checked in their source."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path

from hookfiles import PYTHON_HOOKS

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "imageos"

# Lowest first: a module imports only from those before it. Put a new module as early in the list as possible.
ORDER = [
    *("node", "guests", "disks", "images", "backups"),
    # basis of all others
    *(
        "errors",
        "causes",
        "log",
        "node.limits",
        "outcome",
        "node.space",
        "node.linux",
        "node.lzo",
        "node.syscalls",
        "node.seccomp",
        "node.confinement",
        "node.programs",
        "node.children",
        "preload",
        "run",
    ),
    *("node.sysfs", "node.mounts", "node.cgroup", "node.isolation"),
    # input from Ganeti and the site
    *("ganeti", "shellfiles", "logins", "settings", "bytecode", "installation", "remote", "cluster"),
    # disks and filesystems
    *("disks.layout", "disks.blockdev", "disks.ext", "disks.superblock", "disks.ends", "disks.btrfs"),
    *("disks.filesystem", "disks.mounting", "disks.lvm", "disks.partitions", "disks.fstab"),
    # the guest's root, and what is in it
    *(
        "guests.sandbox",
        "guests.target",
        "guests.services",
        "guests.accounts",
        "guests.hostkeys",
        "guests.distribution",
        "disks.discovery",
        "disks.grow",
    ),
    # what makes it boot
    *("guests.bootconfig", "guests.esp", "guests.bootloaders", "guests.initramfs"),
    # the guest's network
    *("network", "network.files", "network.render", "guests.yaml", "guests.cloudboot", "network.stacked"),
    *("network.existing", "network.resolver", "network.scripts", "guests.cloudinit", "network.backends"),
    # its name and identity
    *("guests.guest", "guests.hostname"),
    # images
    *(
        "images.pages",
        "images.urls",
        "images.curl",
        "images.web",
        "images.checksums",
        "images.cache",
        "images.fetch",
        "images.imagefile",
        "images.words",
        "images.containers",
        "images.qcow2",
        "images.formats",
        "images.scratch",
        "images.tarball",
        "images.dumpfile",
        "images.restored",
        "images.dump",
        "images.wholeness",
        "images.archive",
        "images.diskimage",
        "images.preview",
        "images.imagetypes",
    ),
    # backups
    *("disks.usage", "backups.stream", "backups.restore", "backups.legacy"),
    # images made of instances
    *("guests.sealing", "images.capture"),
    # hooks: the module that they import, and the one that runs them
    *("hook", "hooks"),
    # a create
    *("request", "guests.personalize", "deployment"),
    # commands
    *("commandline", "images.instance"),
    *("commands", "commands.create", "commands.import_", "commands.export", "commands.rename", "commands.verify"),
    *("commands.mount_disks", "commands.umount_disks", "commands.grow"),
    *("commands.ganeti_image", "commands.make_dump", "commands.make_qemu_img"),
    *("commands.install", "commands.uninstall"),
    *("variants", "variants.record"),
    *("checks", "checks.report", "checks.variants", "checks.programs", "checks.definition", "checks.kernel"),
    *("checks.node", "commands.doctor"),
    *("variants.catalog", "variants.site", "variants.download", "variants.table"),
    *("variants.console", "variants.guestboot", "variants.journal", "variants.trial", "commands.variants"),
    "cli",
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).replace(".__init__", ""): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
SOURCES = {**MODULES, **{f"hooks.d/{name}": path for name, path in PYTHON_HOOKS.items()}}
# The standard library's own directories; sys.stdlib_module_names is new in Python 3.10.
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
    """Return the full names of all modules that a source imports."""
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            assert node.module
            # `from imageos import run` imports a module, `from imageos.run import run` a function of it
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.partition(".")[2] in MODULES else node.module for name in names}
    return frozenset(found)


def own(name: str) -> set[str]:
    """Return the modules of the package that a source imports."""
    return {module.partition(".")[2] for module in imported(name) if module.startswith("imageos.")}


def dotted(node: ast.AST) -> str:
    """Return `os.path.join` for the node of this expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def bound(name: str) -> dict[str, str]:
    """Return the full name for each imported name: `path` -> os.path after `from os import path`."""
    found: dict[str, str] = {}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found.update({item.asname or item.name.partition(".")[0]: item.name for item in node.names if item.asname})
            found.update({item.name.partition(".")[0]: item.name.partition(".")[0] for item in node.names})
        elif isinstance(node, ast.ImportFrom):
            found.update({item.asname or item.name: f"{node.module}.{item.name}" for item in node.names})
    return found


def meant(name: str, node: ast.AST) -> str:
    """Like `dotted`, but return the full name of the import, whatever its local name is."""
    first, dot, rest = dotted(node).partition(".")
    return bound(name).get(first, first) + dot + rest


@cache
def used(name: str) -> frozenset[str]:
    """Return all names and attributes in a source, as `os.fork`, also those imported directly."""
    nodes = [node for node in ast.walk(tree(name)) if isinstance(node, (ast.Attribute, ast.Name))]
    return frozenset({*(meant(name, node) for node in nodes), *bound(name).values()})


def for_each(names: Collection[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """Make one test over all `names`; a test for each would cost the tier a second."""

    def decorate(test: Callable[[str], None]) -> Callable[[], None]:
        def over_all() -> None:
            assert names
            for name in names:
                try:
                    test(name)
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from error

        over_all.__doc__ = test.__doc__
        return over_all

    return decorate


# The list of modules


def test_every_module_has_its_place() -> None:
    assert len(ORDER) == len(set(ORDER))
    missing = set(MODULES) - set(ORDER)
    assert not missing, "put them into ORDER, as far up as their imports allow"


@for_each(MODULES)
def test_imports_only_from_before(name: str) -> None:
    before = ORDER[: ORDER.index(name)]
    assert own(name) <= set(before)


@for_each([name for name in MODULES if name != "cli"])
def test_commands_lend_nothing(name: str) -> None:
    assert not {module for module in own(name) if module.startswith("commands.")}


@for_each(PYTHON_HOOKS)
def test_hooks_import_only_what_is_for_them(name: str) -> None:
    assert own(f"hooks.d/{name}") <= set(ORDER[: ORDER.index("hook") + 1])


@for_each(SOURCES)
def test_only_the_standard_library(name: str) -> None:
    assert {module.partition(".")[0] for module in imported(name)} <= {"imageos", *STDLIB}


def test_nothing_of_pip_is_the_standard_library() -> None:
    assert {"pytest", "shiv", "pip"}.isdisjoint(STDLIB)


# Restricted modules and calls


CALLS_LIBRARIES = ("node.linux", "node.lzo")
FORKING = ("node.children", "node.isolation", "node.confinement", "guests.sandbox")
STARTERS = ("fork", "forkpty", "system", "popen", "posix_spawn", "exec", "spawn")


@for_each(SOURCES)
def test_processes_are_started_in_one_place(name: str) -> None:
    assert not {"subprocess", "multiprocessing", "pty"} & imported(name)
    assert not {word for word in used(name) | imported(name) if word.endswith("ProcessPoolExecutor")}
    starts = {word for word in used(name) if word.startswith(tuple(f"os.{starter}" for starter in STARTERS))}
    may = {"os.fork"} if name in FORKING else set()
    assert starts <= may | ({"os.execve"} if name == "node.children" else set())


@for_each(SOURCES)
def test_no_command_is_text_for_a_shell(name: str) -> None:
    keywords = [node for node in ast.walk(tree(name)) if isinstance(node, ast.keyword)]
    assert not [keyword.value.lineno for keyword in keywords if keyword.arg == "shell"]


@for_each(SOURCES)
def test_system_calls_are_in_one_place(name: str) -> None:
    assert "ctypes" not in imported(name) or name in CALLS_LIBRARIES


@for_each(SOURCES)
def test_stdout_belongs_to_the_backup(name: str) -> None:
    """Messages go through log; only requested output (help, a report) goes to stdout."""
    if name not in ("cli", "node.isolation") and not name.startswith("commands."):
        assert not {"print", "sys.stdout"} & used(name)


# The only receivers of the path of the mounted root, unchanged, with the reason. Code that makes a path from it could
# follow a link of the guest to the node; Target resolves the guest's paths.
ROOT = "imageos.node.isolation.TARGET"
GIVEN_THE_ROOT = {
    "_inside": "finds where below it the guest's filesystems are mounted",
    "imageos.disks.mounting.writing_back": "has the kernel begin to write",
    "imageos.guests.target.opened": "makes a Target of it",
    "imageos.guests.target.opened_system": "makes a Target of it",
    "imageos.guests.sandbox.devices": "mounts a /dev there, while hooks run",
    "imageos.node.linux.copy_mounts": "shows it elsewhere",
    "imageos.run.Command": "is where the operator's shell begins",
    "imageos.hooks.Context": "tells hooks",
    "os.mkdir": "makes the place",
    "request.deploy": "unpacks an image there",
    "imageos.node.confinement.Room": "shows it to tar and find, and nothing else",
    "TARGET": "hooks get it as that variable",
}


def is_root(name: str, node: ast.AST) -> bool:
    """Return True for the path of the mounted root: the constant, the hooks' variable, or a Context's field."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == "TARGET":
        return isinstance(node.ctx, ast.Load)
    if not isinstance(node, (ast.Attribute, ast.Name)) or not isinstance(node.ctx, ast.Load):
        return False
    full = meant(name, node)
    return full in (ROOT, "TARGET") or (full.endswith(".target") and full.partition(".")[0] not in ("hook", "imageos"))


def receiver(name: str, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    """Return what this value is passed to unchanged: a function, a program, or a key."""
    parent = parents[node]
    if isinstance(parent, ast.keyword):
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.Call) and node is not parent.func:
        return meant(name, parent.func)
    if isinstance(parent, ast.List) and isinstance(parent.elts[0], ast.Constant):
        return str(parent.elts[0].value)
    if isinstance(parent, ast.Dict) and node in parent.values:
        key = parent.keys[parent.values.index(node)]  # type: ignore[arg-type]
        return str(key.value) if isinstance(key, ast.Constant) else ""
    return ""


def receivers(name: str) -> Iterator[tuple[str, int]]:
    """Yield which receivers in a source get the mounted root, with the line."""
    parents = {child: node for node in ast.walk(tree(name)) for child in ast.iter_child_nodes(node)}
    for node in parents:
        if is_root(name, node):
            yield receiver(name, node, parents), getattr(node, "lineno", 0)


@for_each(SOURCES)
def test_no_path_is_made_below_the_mounted_root(name: str) -> None:
    assert not [f"line {line}: {who}" for who, line in receivers(name) if who not in GIVEN_THE_ROOT]
    assert ROOT not in bound(name).values(), "say isolation.TARGET"


def test_who_is_given_the_mounted_root_exists() -> None:
    assert {who for name in SOURCES for who, _ in receivers(name)} == set(GIVEN_THE_ROOT)


# Access to files of the node

# Modules of the standard library that open no files by name, or no files that anybody can choose.
HARMLESS = {
    *(
        "__future__",
        "argparse",
        "array",
        "base64",
        "bisect",
        "collections",
        "collections.abc",
        "concurrent.futures",
        "configparser",
    ),
    *("contextlib", "enum", "html", "math", "zlib"),
    *("ctypes", "difflib", "errno", "fcntl", "fnmatch", "functools", "gc", "hashlib"),
    *("ipaddress", "itertools", "json", "mmap", "re", "resource", "secrets", "select", "selectors"),
    *("shlex", "signal", "socket", "stat", "struct", "sys", "textwrap", "time", "traceback"),
    *("types", "typing", "urllib.parse", "uuid", "zipimport", "zlib"),
    *("importlib.util", "py_compile"),
}
# Harmless names of other modules, and names in every source.
NEVER = {
    *("sys.modules", "argparse.FileType", "eval", "exec", "compile", "globals", "__import__", "__builtins__"),
    *("ctypes.CDLL", "ctypes.PyDLL", "ctypes.cdll", "ctypes.pythonapi", "zipimport.zipimporter"),
}
# Names that take a path, by what they do with it.
TOUCHES = {
    "looks": {
        *("os.access", "os.getxattr", "os.listdir", "os.listxattr", "os.lstat", "os.readlink", "os.scandir", "os.stat"),
        *("os.statvfs", "os.walk", "os.path.exists", "os.path.getsize", "os.path.isdir", "os.path.isfile"),
        *("os.path.islink", "os.path.ismount", "os.path.lexists", "os.path.realpath", "glob.glob", "shutil.which"),
    },
    "opens": {"open", "os.open", "zipfile.ZipFile", "imageos.node.linux.forget_btrfs", "imageos.node.linux.scan_btrfs"},
    "changes": {
        "compileall.compile_dir",
        *(
            "os.chmod",
            "os.chown",
            "os.link",
            "os.makedirs",
            "os.mkdir",
            "os.mkfifo",
            "os.mknod",
            "os.rename",
            "os.rmdir",
        ),
        *("os.setxattr", "os.symlink", "os.unlink", "os.utime"),
    },
    "temporary": {
        *("tempfile.NamedTemporaryFile", "tempfile.TemporaryDirectory", "tempfile.TemporaryFile", "tempfile.mkdtemp"),
    },
    "starts": {"os.execve"},
    "mounts": {
        *("os.chdir", "os.fchdir", "os.chroot", "imageos.node.linux.mount", "imageos.node.linux.umount"),
        *("imageos.node.linux.copy_mounts", "imageos.node.linux.place_mounts", "imageos.node.linux.restrict_mounts"),
        *("imageos.node.linux.enter_mount_view", "imageos.node.linux.shut_down_filesystem"),
    },
    "resolves": {"imageos.node.linux.open_in_root"},  # inside a directory, as if that were the root
    "loads": {"importlib.import_module", "importlib.resources"},
}
# Names of the same modules that take no path: for descriptors, processes, text. Constants are in capitals.
TAKES_NO_PATH = {
    *(
        "os._exit",
        "os.close",
        "os.closerange",
        "os.dup",
        "os.dup2",
        "os.set_blocking",
        "os.set_inheritable",
        "os.environ",
        "os.fchmod",
        "os.fchown",
        "os.fdopen",
        "os.fork",
    ),
    "os.getcwd",
    *("os.fsdecode", "os.fsencode", "os.fstat", "os.fstatvfs", "os.fsync", "os.ftruncate", "os.get_terminal_size"),
    *(
        "os.geteuid",
        "os.getpid",
        "os.isatty",
        "os.kill",
        "os.killpg",
        "os.setpgrp",
        "os.lseek",
        "os.major",
        "os.makedev",
        "os.memfd_create",
        "os.minor",
    ),
    *("os.pidfd_open", "os.pipe", "os.posix_fadvise", "os.pread", "os.preadv", "os.pwrite", "os.read", "os.readv"),
    *(
        "os.setsid",
        "os.stat_result",
        "os.statvfs_result",
        "os.strerror",
        "os.umask",
        "os.uname",
        "os.urandom",
        "os.wait",
        "os.waitid",
        "os.waitpid",
    ),
    *("os.write", "os.writev", "os.devnull", "os.path.abspath", "os.path.basename", "os.path.commonpath"),
    *("glob.escape", "os.path.dirname", "os.path.join", "os.path.normpath", "os.path.samestat", "os.path.split"),
    *(
        "shutil.copyfileobj",
        "io.BufferedReader",
        "io.BytesIO",
        "io.RawIOBase",
        "bz2.BZ2Decompressor",
        "zipfile.BadZipFile",
        "zipfile.ZipInfo",
    ),
}
JUDGED = ("os", "os.path", "bz2", "compileall", "glob", "shutil", "tempfile", "io", "importlib", "zipfile")

# Every source that accesses files of the node by name: how, and which. All others get open files or text, and access
# the guest through Target only.
MAY_TOUCH = {
    "node.cgroup": ("looks opens changes", "the kernel's directories of groups"),
    "node.isolation": ("looks opens changes mounts", "its own tmpfs, and what it mounts there; the processes in /proc"),
    "node.linux": ("opens mounts", "another view of mounts; device nodes by which the kernel is asked"),
    "node.sysfs": ("looks opens", "/sys"),
    "node.mounts": ("looks opens changes resolves", "/proc/self/mountinfo, its device nodes; the mount point in /tmp"),
    "node.space": ("looks", "how much of a filesystem is free"),
    "preload": ("loads", "our own modules, early"),
    "node.children": ("starts mounts", "a program, in the directory that it is to begin in"),
    "node.confinement": ("looks opens changes mounts", "the root of a confined program, before it starts"),
    "node.programs": ("looks opens", "programs in PATH, and the first line of a hook"),
    "shellfiles": ("looks opens", "the shell; the line of a site's file that it complains of"),
    "settings": ("looks opens", "the site's files, that tell what went wrong in which line"),
    "remote": ("opens", "what Ganeti tells every node"),
    "cluster": ("looks opens changes", "our marks in /run"),
    "disks.blockdev": ("looks opens mounts", "disks and loop devices"),
    "disks.lvm": ("opens temporary", "its configuration of lvm2"),
    "disks.grow": ("opens", "the partition that was mounted, to make the kernel read it again"),
    "disks.btrfs": ("looks opens mounts", "devices, and what the kernel knows of them"),
    "disks.filesystem": ("looks", "what the node's xfsprogs has"),
    "disks.mounting": (
        "looks opens changes temporary mounts resolves",
        "devices and their superblocks; where they are mounted",
    ),
    "guests.sandbox": ("looks opens changes mounts resolves", "the root of a confined program, before it starts"),
    "guests.target": ("looks opens changes resolves", "the guest's files, from a descriptor of its root"),
    "guests.hostkeys": ("opens changes temporary", "keys that were made in a directory of ours"),
    "guests.esp": ("looks opens changes temporary", "a directory of ours that mcopy copies"),
    "guests.bootloaders": ("opens", "the disk, so that GRUB Legacy reads what was written to its partitions"),
    "network.files": ("looks", "the site's files of networks"),
    "images.cache": ("looks opens changes", "the cache"),
    "images.capture": ("looks opens changes", "the directory of images; volumes"),
    "images.checksums": ("opens temporary", "images and keyrings; what gpgv reads"),
    "images.dump": ("looks opens changes", "what restore(8) has left in the root; a pipe"),
    "images.fetch": ("looks changes", "the cache"),
    "images.imagefile": ("looks opens", "images; how full the guest's filesystems are"),
    "images.imagetypes": ("looks", "which image is there"),
    "images.tarball": ("looks", "which of the guest's filesystems is full"),
    "images.scratch": ("temporary", "what must be whole before it can be read"),
    "images.diskimage": ("changes", "the cache, if it is not there yet"),
    "images.preview": ("opens temporary", "how the partitions of an image begin; a copy of its disk"),
    "images.wholeness": ("opens", "an open dump, again"),
    "backups.legacy": ("looks temporary", "a dump, put aside until all of it is there"),
    "hooks": ("looks opens", "the site's hooks, and processes that they leave"),
    "bytecode": ("looks opens changes temporary", "the archive beside the program; a directory of its own"),
    "installation": ("looks opens loads", "what is in place on the node"),
    "commands.install": ("looks opens changes", "what it puts in place on the node"),
    "commands.uninstall": ("looks changes", "what install has put in place"),
    "commands.mount_disks": ("looks changes mounts", "the mount point in /tmp"),
    "commands.umount_disks": ("looks opens mounts", "the mount point in /tmp, and who is there"),
    "checks.definition": ("looks", "what install has put in place"),
    "checks.kernel": ("looks opens", "what the kernel can do"),
    "checks.node": ("looks", "/sys, and how full the node's filesystems are"),
    "checks.programs": ("looks", "programs in PATH"),
    "checks.variants": ("looks opens", "the site's variants and hooks"),
    "variants.catalog": ("opens", "the catalog"),
    "variants.site": ("looks opens changes", "the files of variants, and their list"),
    "variants.table": ("looks", "how large the downloads are"),
    "variants.guestboot": ("looks opens changes temporary", "KVM and UEFI; its pipes, and a copy of its variables"),
    "variants.journal": ("opens temporary", "a copy of the guest's journal"),
    "variants.trial": ("looks opens changes", "the scratch disk"),
    "variants.record": ("opens changes", "the results of trials"),
    "cli": ("opens loads", "the module of the command that is called; /dev/null, where a descriptor is closed"),
}


def outermost(name: str) -> Iterator[str]:
    """Yield every name that a source reads, with all its attributes: `os.path.join`, but not also `os.path`."""
    inner = {id(node.value) for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load) and id(node) not in inner:
            yield meant(name, node)


def touches(name: str) -> set[str]:
    """Return the ways in which a source accesses files of the node."""
    known = used(name)
    return {way for way, names in TOUCHES.items() if names & known}


@for_each(SOURCES)
def test_files_of_the_node_are_touched_by_few(name: str) -> None:
    ways, _ = MAY_TOUCH.get(name, ("", ""))
    assert touches(name) == set(ways.split()), "MAY_TOUCH says otherwise"


@for_each(SOURCES)
def test_what_touches_files_is_known(name: str) -> None:
    """Every name in use is on a list, so that this test knows whether it takes a path; no way hides a name."""
    external = {module for module in imported(name) if not module.startswith("imageos")}
    assert external <= HARMLESS | set(JUDGED), "is it harmless?"
    assert "*" not in {full_name.rpartition(".")[2] for full_name in bound(name).values()}
    assert name in CALLS_LIBRARIES or not used(name) & NEVER - ({"exec", "compile"} if name == "hooks" else set())
    for word in outermost(name):
        assert word not in (*JUDGED, "imageos.node.linux"), f"{word} is handed on: what becomes of it is not seen"
    known = TAKES_NO_PATH.union(*TOUCHES.values())
    for word in used(name):
        module, _, last = word.rpartition(".")
        if module in JUDGED and word not in JUDGED and last != last.upper():
            assert word in known, f"does {word} take a path?"


def test_lists_of_what_touches_files_are_right() -> None:
    """Every name on the lists exists: a misspelt one would have no effect."""
    for name in (*HARMLESS, *JUDGED, "importlib.resources"):
        importlib.import_module(name)
    for names in (*TOUCHES.values(), TAKES_NO_PATH, NEVER - {"__builtins__"}):
        for name in names:
            module, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(module or "builtins"), last), name
    assert set(MAY_TOUCH) <= set(SOURCES)
    assert {way for ways, _ in MAY_TOUCH.values() for way in ways.split()} == set(TOUCHES)


@for_each(SOURCES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(tree(name))


def test_names_of_test_modules_are_unique() -> None:
    """pytest imports them by name, without the directory."""
    names = [path.name for path in (CHECKOUT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
