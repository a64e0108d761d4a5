"""The manual page imageos(8) and the completions of bash and zsh, rendered from the commands and their parsers."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from imageos import __version__, settings
from imageos.commands.install import SCRIPTS, TOOLS
from imageos.hooks import OS_DIR

INSTANCES = "/var/lib/ganeti/ssconf_instance_list"  # where every node has the names

FILES = (
    (settings.DEFAULTS_FILE, "settings of the site (shell)"),
    (f"{settings.SITE_DIR}/variants.list", "the variants that Ganeti offers"),
    (f"{settings.SITE_DIR}/variants/NAME.conf", "settings of a variant (shell)"),
    (f"{settings.SITE_DIR}/hooks/", "what is run when a guest is complete; optional hooks are off until executable"),
    (f"{settings.SITE_DIR}/networks/{{subnets,instances}}/", "static addresses"),
    (f"{settings.SITE_DIR}/overlays/", "files that are copied over a guest"),
    (f"{settings.CACHE_DIR}/", "images"),
    (f"{OS_DIR}/", "the OS definition"),
)


@dataclass(frozen=True)
class Command:
    """One command as the manual knows it; those that Ganeti calls have no parser."""

    name: str
    what: str
    about: str  # the docstring of its module
    parser: argparse.ArgumentParser | None

    @property
    def actions(self) -> list[argparse.Action]:
        known = self.parser._actions if self.parser else []
        return [action for action in known if action.help != argparse.SUPPRESS]

    @property
    def options(self) -> list[argparse.Action]:
        return [action for action in self.actions if action.option_strings]

    @property
    def arguments(self) -> list[argparse.Action]:
        return [action for action in self.actions if not action.option_strings]


# --- the manual page --------------------------------------------------------------------------------------


def page(commands: Iterable[Command]) -> str:
    """imageos(8) in the language of man(7)."""
    lines = [
        f'.TH IMAGEOS 8 "" "imageos {__version__}" "System Administration"',
        *(".nh", ".ad l"),
        *(".SH NAME", r"imageos \- turn an image into a running Ganeti instance"),
        *(".SH SYNOPSIS", r".B imageos", r".I COMMAND", r".RI [ ARGUMENT ...]", ".br"),
        *(r".B imageos \-\-help", ".br", r".B imageos \-\-version"),
        *(".SH DESCRIPTION", "An OS definition of Ganeti in one file.", "The file does the command that it is called"),
        *("as, through a symlink of that name, or the one that its first argument names.",),
        *(".SH COMMANDS",),
    ]
    for command in commands:
        lines += [f".SS {escape(synopsis(command))}", *paragraphs(command.about)]
        for action in shown(command):
            lines += item(term(action), help_of(action))
    lines += [
        *(".SH SETTINGS", f"From {escape(settings.DEFAULTS_FILE)}, the file of the variant, and where it says so, an"),
        *("OS parameter of the same name in lower case; the last has precedence.",),
    ]
    for name, entry in settings.TABLE.items():
        parameter = " (also an OS parameter)" if entry["parameter"] else ""
        default = f"; default {entry['default']}" if entry["default"] else ""
        lines += item(name.upper(), f"{entry['doc']}{default}{parameter}")
    lines += [".PP", "OS parameters that Ganeti reads itself, whatever the OS:"]
    lines += [line for name in settings.RESERVED for line in item(name, settings.describe(name))]
    lines += [".SH FILES", *(line for path, what in FILES for line in item(path, what))]
    lines += [".SH EXIT STATUS", *item("0", "done"), *item("1", "failed; the last line says why")]
    lines += [*item("2", "wrong usage"), *item("128+N", "ended by signal N")]
    lines += [".SH SEE ALSO", ".BR gnt-instance (8),", ".BR gnt-backup (8),", ".BR gnt-os (8),"]
    lines += [".BR ganeti-os-interface (7)"]
    return "\n".join(lines) + "\n"


def shown(command: Command) -> list[argparse.Action]:
    """What the page describes: all but --help, which every command has."""
    return [action for action in [*command.options, *command.arguments] if action.dest != "help"]


def synopsis(command: Command) -> str:
    return " ".join([command.name, *(form(action) for action in shown(command))])


def form(action: argparse.Action) -> str:
    """The action in the synopsis: `[--root DIR]`, `INSTANCE`."""
    words = [*action.option_strings[:1], *([value_of(action)] if takes_value(action) else [])]
    return " ".join(words) if action.required else f"[{' '.join(words)}]"


def term(action: argparse.Action) -> str:
    """How the action is written: `-i, --instance NAME`, or the name of an argument."""
    if not action.option_strings:
        return value_of(action)
    return ", ".join(action.option_strings) + (f" {value_of(action)}" if takes_value(action) else "")


def value_of(action: argparse.Action) -> str:
    if action.metavar:
        return str(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def help_of(action: argparse.Action) -> str:
    """Its help with `%(default)s` filled in, as argparse does."""
    return (action.help or "") % {**vars(action), "prog": "imageos"}


def paragraphs(about: str) -> list[str]:
    """A docstring without the `name: ` in front, in the language of man(7)."""
    text = re.sub(r"^[a-z-]+: ", "", textwrap.dedent(about).strip())
    blocks = [" ".join(block.split()) for block in text.split("\n\n")]
    return [line for block in blocks for line in (".PP", escape(block[0].upper() + block[1:]))]


def item(term: str, text: str) -> list[str]:
    return [".TP", f".B {escape(term)}", escape(text)]


def escape(text: str) -> str:
    """Text that roff takes as it stands."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


# --- completions ------------------------------------------------------------------------------------------


def completion(shell: str, commands: Sequence[Command]) -> str:
    return {"bash": bash, "zsh": zsh}[shell](commands)


def bash(commands: Sequence[Command]) -> str:
    cases = []
    for command in commands:
        words = " ".join(one for action in command.options for one in action.option_strings)
        values = [
            f"        {'|'.join(action.option_strings)}) {bash_value(action)}; return ;;"
            for action in command.options
            if takes_value(action)
        ]
        positional = bash_value(command.arguments[0]) if command.arguments else ":"
        cases += [f"    {command.name})", f"      words='{words}'", f"      argument() {{ {positional}; }}"]
        cases += ['      case "$before" in', *values, "      esac", "      ;;"] if values else ["      ;;"]
    return "\n".join(
        [
            "# bash completion of imageos(8)",
            "_imageos() {",
            '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${1##*/}" words',
            '  if [ "$command" = imageos ]; then',
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f"""      mapfile -t COMPREPLY < <(compgen -W '{names(commands)} --help --version' -- "$word")""",
            "      return",
            "    fi",
            '    command="${COMP_WORDS[1]}"',
            "  fi",
            '  case "$command" in',
            *cases,
            "    *) return ;;",
            "  esac",
            '  if [[ "$word" == -* ]]; then',
            """    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")""",
            "  else",
            "    argument",
            "  fi",
            "  unset -f argument",
            "}",
            f"complete -F _imageos imageos {' '.join(TOOLS)}",
            "",
        ]
    )


def bash_value(action: argparse.Action) -> str:
    """The command that completes the value of an action."""
    if action.choices:
        source = f"-W '{' '.join(map(str, action.choices))}'"
    elif value_of(action).endswith("DIR"):
        source = "-d"
    elif value_of(action) == "INSTANCE":
        source = f'-W "$(cat {INSTANCES} 2>/dev/null)"'
    else:
        return ":"
    return f'mapfile -t COMPREPLY < <(compgen {source} -- "$word")'


def zsh(commands: Sequence[Command]) -> str:
    cases = []
    for command in commands:
        specs = [zsh_option(action, one) for action in command.options for one in action.option_strings]
        specs += [f"'{number}:{zsh_value(action)}'" for number, action in enumerate(command.arguments, 1)]
        cases += [f"    {command.name})", *([f"      _arguments {' '.join(specs)}"] if specs else []), "      ;;"]
    described = " ".join(f"'{one.name}:{zsh_escape(one.what)}'" for one in commands)
    return "\n".join(
        [
            f"#compdef imageos {' '.join(TOOLS)}",
            "_imageos() {",
            '  local command="${words[1]:t}" commands',
            '  if [[ "$command" = imageos ]]; then',
            "    if (( CURRENT == 2 )); then",
            f"      commands=({described})",
            "      _describe command commands",
            "      return",
            "    fi",
            "    shift words",
            "    (( CURRENT -= 1 ))",
            '    command="${words[1]}"',
            "  fi",
            '  case "$command" in',
            *cases,
            "  esac",
            "}",
            '_imageos "$@"',
            "",
        ]
    )


def zsh_option(action: argparse.Action, option: str) -> str:
    value = f":{zsh_value(action)}" if takes_value(action) else ""
    return f"'{option}[{zsh_escape(help_of(action))}]{value}'"


def zsh_value(action: argparse.Action) -> str:
    name = value_of(action)
    if action.choices:
        return f"{action.dest}:({' '.join(map(str, action.choices))})"
    if name.endswith("DIR"):
        return "directory:_files -/"
    return f"instance:($(cat {INSTANCES} 2>/dev/null))" if name == "INSTANCE" else f"{name.lower()}:"


def zsh_escape(text: str) -> str:
    return re.sub(r"([\[\]:\\])", r"\\\1", text).replace("'", "'\\''")


def names(commands: Iterable[Command]) -> str:
    """The commands that somebody types."""
    return " ".join(command.name for command in commands if command.name not in SCRIPTS)
