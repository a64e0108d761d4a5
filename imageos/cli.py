"""The command line: finds out which command is meant, calls it, and turns what it raises into an exit status.

Imports little: `--version` and `--help` must be quick, and a command loads only what it needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from imageos import __version__, log
from imageos.errors import Failure, Interrupted, Usage

# name -> what it is for. The module is imageos.commands.NAME.
COMMANDS = {
    "create": "deploy an image on an instance's first disk (called by Ganeti)",
    "verify": "check settings, variant and OS parameters (called by Ganeti)",
    "install": "put the OS definition, defaults and hooks in place on this node",
}

USAGE = "usage: imageos COMMAND [ARGUMENT...] | imageos --help | imageos --version"


def main() -> None:
    """Run the command that argv[0] names, or else the first argument, and exit."""
    sys.exit(guard(lambda: dispatch(sys.argv)))


def dispatch(argv: list[str]) -> int:
    name = os.path.basename(argv[0])
    arguments = argv[1:]
    if name not in COMMANDS:
        if not arguments:
            raise Usage(f"no command given\n{USAGE}")
        name, *arguments = arguments
    if name in ("--version", "-V"):
        print(f"imageos {__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print(overview(), end="")
        return 0
    if name not in COMMANDS:
        raise Usage(f"unknown command {name}{_nearest(name)}\n{USAGE}")
    return _load(name)(arguments)


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
                "imageos COMMAND --help says more of one.",
            ]
        )
        + "\n"
    )


def guard(call: Callable[[], int]) -> int:
    """The exit status of `call`; for what it raises, messages with the cause on the last line."""
    # Ganeti's umask is 077: what is made for a guest must be readable to its users.
    os.umask(0o022)
    try:
        return call()
    except Failure as failure:
        for line in failure.details:
            log.info(line)
        if failure.hint:
            log.info(f"hint: {failure.hint}")
        log.info(str(failure))
        return 2 if isinstance(failure, Usage) else 1
    except Interrupted as interrupted:
        from imageos.run import signal_name

        log.info(f"ended by {signal_name(interrupted.signum)}")
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        log.info("ended by SIGINT")
        return 130
    except OSError as error:
        log.debug(_traceback())
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        log.info(f"{where}{error.strerror or error}")
        return 1
    except Exception as error:
        log.info(_traceback())
        log.info(f"internal error, please report it with the lines above: {type(error).__name__}: {error}")
        return 1


def _load(name: str) -> Callable[[list[str]], int]:
    from importlib import import_module

    from imageos.isolation import handle_signals

    handle_signals()
    module = import_module("imageos.commands." + name.replace("-", "_"))
    command: Callable[[list[str]], int] = module.main
    return command


def _nearest(name: str) -> str:
    import difflib

    near: list[str] = difflib.get_close_matches(name, COMMANDS, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _traceback() -> str:
    import traceback

    return traceback.format_exc()
