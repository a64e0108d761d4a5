"""The command line: find the command that is meant, and call it.

Import little at the top: `--version` and `--help` must be quick, and a command loads only what it needs.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from types import ModuleType

from imageos import __version__
from imageos.errors import Failure, Usage, nearest
from imageos.outcome import guard

# Name -> purpose. The module is imageos.commands.NAME; that of `import` is import_.
COMMANDS = {
    "create": "deploy an image on an instance's first disk (called by Ganeti)",
    "import": "restore one disk of an instance from a backup on stdin (called by Ganeti)",
    "export": "write a backup of one disk of an instance to stdout (called by Ganeti)",
    "rename": "give the guest the instance's new name (called by Ganeti)",
    "verify": "check settings, variant and OS parameters (called by Ganeti)",
    "mount-disks": "mount an instance's filesystems at /tmp/INSTANCE_root",
    "umount-disks": "unmount what mount-disks has mounted",
    "make-dump": "make a dump image of a stopped instance",
    "make-qemu-img": "make a disk image of a stopped instance",
    "ganeti-image": "make an image of a stopped instance: tarball, dump or disk image",
    "grow": "grow a stopped instance's filesystems to its disks",
    "install": "put the OS definition, defaults and hooks in place on this node",
    "uninstall": "remove what install has put in place and the site has not changed",
    "variants": "show, enable, fetch and try the variants of this node and of the catalog",
    "doctor": "say whether this node can deploy its variants",
}

# Options that print a file made by build.py. The packages install these files.
MANUALS: dict[tuple[str, ...], str] = {
    ("--man",): "imageos.8",
    ("--completion", "bash"): "imageos.bash",
    ("--completion", "zsh"): "imageos.zsh",
}

USAGE = "usage: imageos COMMAND [ARGUMENT...] | imageos --help | imageos --version"
OBJECTS = 10_000  # new ones until garbage is looked for: those that imports make, thousands, are none


def main() -> int:
    """Run the command that argv[0] or else the first argument names, and return its status."""
    _occupy_standard()
    gc.set_threshold(OBJECTS)
    status = guard(lambda: dispatch(sys.argv))
    return guard(_finish_stdout) or status


def _occupy_standard() -> None:
    """Let nothing that we open become stdin, stdout or stderr: messages would be written to the disk of a guest.

    As libc does for a setuid program, what takes the place of a closed one cannot be used.
    """
    for descriptor, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open("/dev/null", mode), True)  # the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w")


def _finish_stdout() -> int:
    """Write what is still to be printed; Python itself would not report in our way that it cannot."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            sys.stdout.close()  # at exit Python does not try again
        raise Failure(f"cannot print: {error.strerror}") from None
    return 0


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
    if name in ("--man", "--completion"):
        return print_manual(name, *arguments)
    if name not in COMMANDS:
        raise Usage(f"unknown command {name}{nearest(name, COMMANDS)}", hint=USAGE)
    from imageos.ganeti import SCRIPTS

    module = _load(name)
    if name in SCRIPTS:
        if arguments[:1] in (["--help"], ["-h"]):
            print(script_help(name, module), end="")
            return 0
        if arguments and [name, *arguments] != ["verify", "parameters"]:
            raise Usage(f"{name} takes no argument {arguments[-1]!r}", hint=f"imageos {name} --help")
    else:
        from imageos.node.programs import complete_path

        complete_path()
    return _run(module, arguments)


def script_help(name: str, module: ModuleType) -> str:
    argument = " parameters" if name == "verify" else ""
    about = (module.__doc__ or "").strip()
    elsewhere = "Everything else is in the environment: see ganeti-os-interface(7)."
    return f"usage: imageos {name}{argument}\n\n{about}\n\n{elsewhere}\n"


def print_manual(*arguments: str) -> int:
    from importlib import resources

    if arguments not in MANUALS:
        raise Usage(f"{arguments[0]}: wrong arguments", hint="imageos --man | imageos --completion bash|zsh")
    file = resources.files("imageos") / "manual" / MANUALS[arguments]
    if not file.is_file():
        raise Failure(f"{arguments[0]} works from the built file only", hint="./build.py, then dist/imageos")
    print(file.read_text(), end="")
    return 0


def overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "".join(f"  {name:<{width}}{purpose}\n" for name, purpose in COMMANDS.items())
    return f"""{USAGE}

Turns an image into a running Ganeti instance.

{commands}
The name of the file selects the command: create is usually a link to imageos.
imageos COMMAND --help describes a command, imageos --man | man -l - everything.
imageos --completion bash (or zsh) prints the shell's completion.
"""


def _load(name: str) -> ModuleType:
    from importlib import import_module

    from imageos.node.children import signals_held
    from imageos.node.isolation import handle_signals

    handle_signals()
    with signals_held():  # Python may lose an exception that a handler raises during an import
        return import_module("imageos.commands." + ("import_" if name == "import" else name.replace("-", "_")))


def _run(module: ModuleType, arguments: list[str]) -> int:
    from imageos.node.isolation import ignore_signals

    try:
        status: int = module.main(arguments)
        return status
    finally:
        ignore_signals()  # the command has ended: only messages are left to print
