"""The command line: finds out which command is meant, and calls it.

Imports little: `--version` and `--help` must be quick, and a command loads only what it needs.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from imageos import __version__
from imageos.errors import Usage
from imageos.outcome import guard

# name -> what it is for. The module is imageos.commands.NAME, of `import` import_.
COMMANDS = {
    "create": "deploy an image on an instance's first disk (called by Ganeti)",
    "import": "restore one disk of an instance from a backup on stdin (called by Ganeti)",
    "export": "write a backup of one disk of an instance to stdout (called by Ganeti)",
    "rename": "give the guest the instance's new name (called by Ganeti)",
    "verify": "check settings, variant and OS parameters (called by Ganeti)",
    "mount-disks": "mount an instance's filesystems at /tmp/INSTANCE_root",
    "umount-disks": "take away what mount-disks has mounted",
    "make-dump": "make a dump image of a stopped instance",
    "make-qemu-img": "make a disk image of a stopped instance",
    "ganeti-image": "make an image of a stopped instance: tarball, dump or disk image",
    "install": "put the OS definition, defaults and hooks in place on this node",
    "uninstall": "take away what install has put in place and the site has not changed",
    "doctor": "say whether this node can deploy its variants",
}

# Those that Ganeti calls: without arguments, but for `verify parameters`.
SCRIPTS = ("create", "import", "export", "rename", "verify")

MANUALS = ("--man", "--completion")

USAGE = "usage: imageos COMMAND [ARGUMENT...] | imageos --help | imageos --version"


def main() -> None:
    """Run the command that argv[0] names, or else the first argument, and exit."""
    sys.exit(guard(lambda: dispatch(sys.argv)))


def dispatch(argv: list[str]) -> int:
    name = os.path.basename(argv[0])
    arguments = argv[1:]
    if name not in COMMANDS:
        if not arguments:
            raise Usage("no command given", hint=USAGE)
        name, *arguments = arguments
    if name in ("--version", "-V"):
        print(f"imageos {__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print(overview(), end="")
        return 0
    if name == "--os-release" and len(arguments) == 1:  # for common.sh
        from imageos.guests import distribution

        print(distribution.shell_variables(arguments[0]), end="")
        return 0
    if name in MANUALS:
        return print_manual(name, arguments)
    if name not in COMMANDS:
        raise Usage(f"unknown command {name}{_nearest(name)}", hint=USAGE)
    module = _load(name)
    if name in SCRIPTS:
        if arguments[:1] in (["--help"], ["-h"]):
            print(script_help(name, module), end="")
            return 0
        if arguments and [name, *arguments] != ["verify", "parameters"]:
            raise Usage(f"{name} takes no argument {arguments[-1]!r}", hint=f"imageos {name} --help")
    return _run(module, arguments)


def script_help(name: str, module: ModuleType) -> str:
    argument = " parameters" if name == "verify" else ""
    about = (module.__doc__ or "").strip()
    elsewhere = "Everything else is in the environment: see ganeti-os-interface(7)."
    return f"usage: imageos {name}{argument}\n\n{about}\n\n{elsewhere}\n"


def print_manual(name: str, arguments: list[str]) -> int:
    """What the packages install: the manual page, or the completion of a shell."""
    from imageos import manual

    modules = {one: _load(one) for one in COMMANDS}
    commands = [
        manual.Command(one, what, modules[one].__doc__ or "", getattr(modules[one], "parser", lambda: None)())
        for one, what in COMMANDS.items()
    ]
    if [name, *arguments] == ["--man"]:
        print(manual.page(commands), end="")
    elif name == "--completion" and arguments in (["bash"], ["zsh"]):
        print(manual.completion(arguments[0], commands), end="")
    else:
        raise Usage(f"{name}: wrong arguments", hint="imageos --man | imageos --completion bash|zsh")
    return 0


def overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{what}" for name, what in COMMANDS.items()]
    return (
        "\n".join(
            [
                USAGE,
                "",
                "Turns an image into a running Ganeti instance.",
                "",
                *lines,
                "",
                "The file does the command that it is called as: create is usually a link to imageos.",
                "imageos COMMAND --help says more of one, imageos --man | man -l - everything.",
                "imageos --completion bash (or zsh) prints the shell's completion.",
            ]
        )
        + "\n"
    )


def _load(name: str) -> ModuleType:
    from importlib import import_module

    from imageos.node.isolation import handle_signals
    from imageos.run import signals_held

    handle_signals()
    with signals_held():  # what is raised where Python imports may be lost
        return import_module("imageos.commands." + ("import_" if name == "import" else name.replace("-", "_")))


def _run(module: ModuleType, arguments: list[str]) -> int:
    from imageos.node.isolation import ignore_signals

    try:
        status: int = module.main(arguments)
        return status
    finally:
        ignore_signals()  # it has ended, in one way or the other: only words are left


def _nearest(name: str) -> str:
    import difflib

    near: list[str] = difflib.get_close_matches(name, COMMANDS, 1)
    return f" (did you mean {near[0]}?)" if near else ""
