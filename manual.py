#!/usr/bin/env python3
"""usage: manual.py DIRECTORY

Write there the manual page imageos(8) and the completions of bash and zsh, from the commands and their parsers.
build.py runs it by the Python of .venv, which has argparse-manpage and shtab.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from imageos import __version__, cli, ganeti, settings
from imageos.installation import OS_DIR, TOOLS
from imageos.settings import Entry

SYNOPSIS = r""".nh
.ad l
.B imageos
.I COMMAND
.RI [ ARGUMENT ...]
.br
.B imageos \-\-help
.br
.B imageos \-\-version"""
ABOUT = """\
An OS definition of Ganeti in one file. The name of the file, or of a symlink to it, selects the command; if this is not
the name of a command, the first argument does. Ganeti calls create, import, export, rename and verify."""
SETTINGS = f"""\
They come from {settings.DEFAULTS_FILE}, the file of the variant, and, where it says so, an OS parameter of the same
name in lower case. A later source has precedence."""
FILES = (
    (settings.DEFAULTS_FILE, "settings of the site (shell)"),
    (f"{settings.SITE_DIR}/variants.list", "the variants that Ganeti offers"),
    (f"{settings.SITE_DIR}/variants/NAME.conf", "settings of a variant (shell)"),
    (f"{settings.SITE_DIR}/hooks/", "hooks that run when a guest is complete; optional ones are off until executable"),
    (f"{settings.SITE_DIR}/networks/{{subnets,instances}}/", "static addresses"),
    (f"{settings.SITE_DIR}/overlays/", "files that are copied over a guest"),
    (f"{settings.CACHE_DIR}/", "images"),
    (f"{OS_DIR}/", "the OS definition"),
)
STATUS = (
    ("0", "done"),
    ("1", "failed; the last line says why"),
    ("2", "wrong usage"),
    ("128+N", "ended by signal N"),
)
SEE_ALSO = ".BR gnt\\-instance (8),\n.BR gnt\\-backup (8),\n.BR gnt\\-os (8),\n.BR ganeti\\-os\\-interface (7)"

# Those of the catalog, in sections, and those in the list
VARIANTS = (
    rf"sed -n 's/^\[\(.*\)]$/\1/p; /^[A-Za-z0-9._-]*$/p' {OS_DIR}/catalog.conf {settings.SITE_DIR}/*.{{conf,list}}"
)
# By the name of an argument; every node has the list of instances
COMPLETIONS = {
    "DIR": shtab.DIRECTORY,
    "IMAGE_DIR": shtab.DIRECTORY,
    "INSTANCE": shtab.cmd("cat /var/lib/ganeti/ssconf_instance_list 2>/dev/null"),
    "VARIANT": shtab.cmd(f"{VARIANTS} 2>/dev/null"),
}

# A tool's name is a command of imageos.
BASH_TOOLS = f"""
_imageos() {{
  if [[ ${{1##*/}} != imageos ]]; then
    COMP_WORDS=(imageos "${{1##*/}}" "${{COMP_WORDS[@]:1}}")
    COMP_CWORD=$((COMP_CWORD + 1))
  fi
  _shtab_imageos
}}
complete -o bashdefault -F _imageos imageos {" ".join(TOOLS)}
"""
ZSH_TOOLS = """\
if [[ $service != imageos ]]; then
  words=(imageos "${words[1]:t}" "${(@)words[2,-1]}")
  (( CURRENT += 1 ))
fi
typeset -A opt_args
"""


def main(directory: Path) -> None:
    os.environ.update(COLUMNS="999", NO_COLOR="1")  # the same bytes on every terminal
    typed = [name for name in cli.COMMANDS if name not in ganeti.SCRIPTS]
    (directory / "imageos.8").write_text(page())
    (directory / "imageos.bash").write_text(shtab.complete(parser(typed), "bash") + BASH_TOOLS)
    (directory / "imageos.zsh").write_text(zsh(shtab.complete(parser(typed), "zsh")))


def parser(names: Collection[str], described: bool = True) -> argparse.ArgumentParser:
    """Return one parser for all commands. The manual page shows only their long descriptions: `described` is False."""
    whole = argparse.ArgumentParser("imageos", description=ABOUT)
    whole.add_argument("--version", action="version", version=__version__, help="print the version")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND")
    for name in names:
        commands.add_parser(name, **({"help": cli.COMMANDS[name]} if described else {}))  # type: ignore[arg-type]
        commands.choices[name] = command_parser(name)
    return whole


def command_parser(name: str) -> argparse.ArgumentParser:
    module = cli._load(name)
    made: argparse.ArgumentParser
    if hasattr(module, "parser"):
        made = module.parser()
    else:  # Ganeti calls it
        raw = argparse.RawDescriptionHelpFormatter
        about = (module.__doc__ or "").partition(": ")[2]
        made = argparse.ArgumentParser(f"imageos {name}", description=about, formatter_class=raw, add_help=False)
    for part in parts(made):
        for action in part._actions:
            if str(action.metavar) in COMPLETIONS:
                action.complete = COMPLETIONS[str(action.metavar)]  # type: ignore[attr-defined]
    return made


def parts(whole: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return a command's parser, and those of its actions."""
    actions = [action for action in whole._actions if isinstance(action, argparse._SubParsersAction)]
    return [whole, *(part for action in actions for part in action.choices.values())]


def page() -> str:
    """Return imageos(8) in the language of man(7)."""
    facts = {
        "project_name": "imageos",
        "version": __version__,
        "manual_section": 8,
        "manual_title": "System Administration",
        "description": "turn an image into a running Ganeti instance",
        "date": " ",  # none: every build must give the same page
    }
    manual = Manpage(parser(cli.COMMANDS, described=False), facts, format="single-commands-section")
    manual.add_section("synopsis", "=", SYNOPSIS)
    table = [(name.upper(), setting(entry)) for name, entry in settings.TABLE.items()]
    reserved = [(name, entry.doc) for name, entry in settings.RESERVED.items()]
    also = "\n.PP\nOS parameters that Ganeti reads itself, whatever the OS:\n"
    manual.add_section("settings", "=", f"{SETTINGS}\n{items(table)}{also}{items(reserved)}")
    manual.add_section("files", "=", items(FILES))
    manual.add_section("exit status", "=", items(STATUS))
    manual.add_section("see also", "=", SEE_ALSO)
    return str(manual)


def setting(entry: Entry) -> str:
    default = f"; default {entry.default}" if entry.default else ""
    return f"{entry.doc}{default}{' (also an OS parameter)' if entry.parameter else ''}"


def items(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f".TP\n.B {escape(term)}\n{escape(text)}" for term, text in pairs)


def escape(text: str) -> str:
    """Escape text that roff must print as it is."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


def zsh(text: str) -> str:
    """Extend shtab's completion of imageos to the tools."""
    text = text.replace("#compdef imageos\n", f"#compdef imageos {' '.join(TOOLS)}\n")
    return text.replace("typeset -A opt_args\n", ZSH_TOOLS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
