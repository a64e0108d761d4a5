"""Evaluate the site's shell files (as all files in /etc/default are) in a shell, and return what they set.

A shell goes on after most mistakes, with a setting left as it was: another image would be deployed, or one that nobody
has signed. What the shell says is therefore read. A command that it does not find, what it cannot expand, and what it
complains of where the file handles no failure (by `||`, `if` and the like) is an error; all else is a warning.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from imageos import log
from imageos.errors import Failure, TimedOut
from imageos.node.programs import DEFAULT_PATH
from imageos.run import Command, Finished, Outside, pipeline

TIMEOUT = 60.0  # seconds that the files of one call may take
LONGEST = 1 << 20  # bytes that they may say and set
MOST_SAID = 20  # lines that are shown

# Print all variables, then for each file its path and all variables, and behind each of these an empty entry. Variables
# need not be exported: a file may say `set +a`. Output of the file goes to stderr, and so do our marks, which begin
# with \1: where a file begins, its path; where a failure is not handled, status, file and line. A file that ends with
# a failure, as `[ a = b ] && X=y` is one, is not ended by its own `set -e`. Check with `-n` first, so that no file with
# a syntax error runs half; it may switch extglob on. Without `-e`, bash 5.1 accepts an array that does not end. There
# is no function around `.`, because what a file declares would be local to it, and no `||` behind it, because all
# failures in the file would count as handled. A mark comes, too, before what may be no assignment, though it looks like
# one: with 1 behind it if it is in a subshell whose output goes where that of the file does, so that what it sets is
# lost. Of an array that has more than its first element, NAME[] is printed.
_EVALUATE = r"""
_imageos_out=8
_imageos_variables() { /usr/bin/env -0; }
if [ -n "${BASH_VERSION-}" ]; then
  eval 'exec {_imageos_out}>&1 {_imageos_err}>&2'
  unset BASH_EXECUTION_STRING  # this text, which is long
  set -E
  trap 'printf "\n\1%s\1%s\1%s\n" "$?" "${BASH_SOURCE[0]-}" "$LINENO" >&2; [ -n "${BASH_SOURCE[0]-}" ] || set +e' ERR
  declare -A _imageos_seen
  _imageos_depth=$BASH_SUBSHELL
  _imageos_look() {
    local command=${BASH_COMMAND%%$'\n'*} lost=0
    case $command in
      [A-Z]*=*|set\ [A-Z]*|export\ [A-Z]*|read\ *) ;;
      *) return ;;
    esac
    [ -z "${_imageos_seen["$1:$2:$command"]-}" ] || return 0  # a loop
    _imageos_seen["$1:$2:$command"]=1
    [ "$BASH_SUBSHELL" = "$_imageos_depth" ] || [ ! /dev/fd/1 -ef "/dev/fd/$_imageos_err" ] || lost=1
    printf '\n\1\1%s\1%s\1%s\1%s\n' "$1" "$2" "$lost" "${command:0:200}" >&"$_imageos_err"
  }
  printf -v _imageos_names ' "${!%s@}"' _ {A..Z} {a..z}  # compgen takes two more processes
  _imageos_variables() {
    local -
    set +u
    eval "set --$_imageos_names"
    for _imageos_word do
      if [ -n "${!_imageos_word+set}" ]; then printf '%s=%s\0' "$_imageos_word" "${!_imageos_word}"; fi
      case ${!_imageos_word@a} in
        *[aA]*) eval "printf '%s[]=%s\0' $_imageos_word \${#$_imageos_word[@]}" ;;
      esac
    done
  }
else
  exec 8>&1
fi
exec 1>&2
_imageos_variables >&"$_imageos_out"; printf '\0' >&"$_imageos_out"
set -a
for _imageos_word in "$@"; do
  eval "_imageos_file=$_imageos_word"
  printf '\n\1%s\n' "$_imageos_file" >&2
  printf '%s\0' "$_imageos_file" >&"$_imageos_out"
  [ -f "$_imageos_file" ] || exit 102
  [ "$_imageos_file" = "${_imageos_right-}" ] ||
    "$0" -O extglob -en "$_imageos_file" 2>/dev/null || "$0" -en "$_imageos_file" || exit 101
  [ -z "${BASH_VERSION-}" ] || {
    trap '{ _imageos_look "${BASH_SOURCE[0]-}" "$LINENO"; } 2>/dev/null' DEBUG
    set -T
  }
  . "$_imageos_file"
  { set +vx; } 2>/dev/null
  [ -z "${BASH_VERSION-}" ] || { set +T; trap - DEBUG; }
  _imageos_variables >&"$_imageos_out"; printf '\0' >&"$_imageos_out"
done
_imageos_word=$(jobs -p)
[ -z "$_imageos_word" ] || kill $_imageos_word 2>/dev/null || :  # it may have ended
exit 0
"""
# The same in a process of its own for each call: behind what it prints, its status; behind what it says, a mark. The
# first argument is a file that most of them begin with. Nobody ends such a process with the shell: its time is limited.
_EVALUATE_EACH = rf"""
eval "_imageos_right=$1"
shift
"$0" -en "$_imageos_right" 2>/dev/null || _imageos_right=
for _imageos_call in "$@"; do
  (
    ulimit -t {TIMEOUT:.0f}
    eval "$_imageos_call"
    {_EVALUATE}
  )
  printf '\n\1%s\n\0' "$?"
  printf '\n\2\n' >&2
done
"""
_SHELL_OWN = re.compile(
    r"_|SHLVL|PWD|OLDPWD|PATH|IFS|PS4|REPLY|OPTIND|OPTARG|PIPESTATUS|FUNCNAME|MAPFILE|COPROC(_PID)?|"
    r"BASH_(?!ENV$)\w+|_imageos_\w+"
)

_MARK = re.compile("\1([^\1]*|[0-9]+\1[^\1]*\1[0-9]+|\1[^\1]*\1[0-9]+\1[01]\1.*)")

# What a shell says itself: bash and BusyBox with `line`, dash without it.
_COMPLAINT = re.compile(r"(\S.*?): (?:eval: )?(?:line )?([0-9]+): (.*)")
# After these the shell goes on without having done the line, and calls no trap; a here-document without its end has
# swallowed all lines that follow.
_LOST = re.compile(
    r".*(not found|readonly variable|bad substitution|invalid indirect expansion|substring expression < 0|"
    r"unbound variable|\(error token is .*\)|syntax error.*|unexpected EOF.*|here-document at line .*)"
)


class MissingFile(Failure):
    """A file to evaluate does not exist."""

    def __init__(self, what: str, path: str) -> None:
        super().__init__(f"{what} {path} is missing")
        self.path = path


class Said(NamedTuple):
    """A line that was said, or a failure that the file does not handle, while `main` was evaluated."""

    main: str
    file: str  # that, or one that it reads
    line: str  # empty: it is not known where
    text: str
    status: int = 0  # of a failure
    lost: bool = False  # it is a mistake: what the line should do is not done
    ours: bool = False  # the text quotes nothing

    def __str__(self) -> str:
        return ": ".join(word for word in (self.file, self.line and f"line {self.line}", self.text) if word)


class Rules(NamedTuple):
    # whether what was said of a file may hold a secret: its path, the text, and all variables, if they are known
    is_secret: Callable[[str, str, Mapping[str, str] | None], bool] = lambda _path, _text, _variables: False
    # what must not come out empty of a file in which something has failed
    vital: Collection[str] = ()
    settings: Collection[str] = ()  # each is one text
    warn: Callable[[str], None] = log.warning


def evaluate(
    what: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    rules: Rules | None = None,
    done: Finished | None = None,
) -> list[tuple[str, dict[str, str]]]:
    """Evaluate files in one shell, one after the other; return (path, variables that it set) of each.

    `words` are the paths as shell words, which may use variables of earlier files. They must not contain text from
    outside the site's files. Messages call the files `what`. `done`: as `run_each` returns it, if a shell was there.
    """
    if not words:
        return []
    rules = rules or Rules()
    shell, start = _shell(), _start(environment)
    done = done or _run([shell, "-c", _EVALUATE, shell, *words], start, what)
    entries = [block.split("\0") for block in done.stdout.decode("utf-8", "surrogateescape").split("\0\0")]
    at_first, evaluated, last = entries[0], entries[1:-1], entries[-1][0]
    path = last or (evaluated[-1][0] if evaluated else words[0])
    if done.status == 102:
        raise MissingFile(what, path)
    layers = []
    arrays: list[Said] = []
    before = _values(at_first)
    own = before.keys() - start.keys() - {"HOSTNAME"}  # they change by themselves
    for file, *variables in evaluated:
        after = _values(variables)
        layers.append((file, _set_by(before, after, own)))
        arrays += [
            _array(file, name, name in after) for name in sorted((_arrays(after) - _arrays(before)) & {*rules.settings})
        ]
        before = after
    is_whole = done.status == 0 and len(evaluated) == len(words)
    heard = [line for line in _heard(done.stderr, shell) if not line.ours or line.text.split()[0] in rules.settings]
    said = [*(_told(line, rules, before if is_whole else None) for line in heard), *arrays]
    if not is_whole:
        raise _ended(what, path, done.status, said)
    for file, values in layers:
        _check(what, file, values, said, rules)
    for line in _details(said):
        rules.warn(line)
    return layers


def run_each(calls: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> Sequence[Finished | None]:
    """Let one shell evaluate the files of several calls: (words, environment) of each. None: it did not come to an end.

    The environments have the same variables.
    """
    shell, first = _shell(), calls[0][1]
    scripts = [
        "\n".join([*(shlex.join(["export", f"{name}={value}"]) for name, value in environment.items() - first.items()),
                   shlex.join(["set", "--", *words])])
        for words, environment in calls
    ]  # fmt: skip
    try:
        done = _run([shell, "-c", _EVALUATE_EACH, shell, *calls[0][0][:1], *scripts], _start(first), "")
    except Failure:
        return [None] * len(calls)
    *printed, _ = re.split(rb"(?<![^\0])\n\x01([0-9]+)\n\0", done.stdout)
    *said, _ = done.stderr.split("\n\2\n")
    if not len(printed) // 2 == len(said) == len(calls):
        return [None] * len(calls)
    ends = zip(printed[::2], printed[1::2], said)
    return [Finished(done.argv, int(status), stdout, stderr) for stdout, status, stderr in ends]


def _shell() -> str:
    return shutil.which("bash", path=DEFAULT_PATH) or "/bin/sh"


def _start(environment: Mapping[str, str]) -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", DEFAULT_PATH), **environment}


def _values(variables: Iterable[str]) -> dict[str, str]:
    return dict(entry.partition("=")[::2] for entry in variables)


def _set_by(before: Mapping[str, str], after: Mapping[str, str], own: Collection[str]) -> dict[str, str]:
    """Return the variables that a file has set; what it has unset is empty."""
    # a function, which `set -a` exports, too, is no identifier in dash
    names = [name for name in {**before, **after} if name.isidentifier() and not _SHELL_OWN.fullmatch(name)]
    return {name: after.get(name, "") for name in names if name not in own and before.get(name) != after.get(name)}


def _run(argv: Sequence[str], start: Mapping[str, str], what: str) -> Finished:
    current = ""

    def follow(line: str) -> None:
        nonlocal current
        if re.match("\1[^\1]*$", line):
            current = line[1:]

    try:
        command = Command(argv, Outside.SETTINGS, env=start, cwd="/", private=True)
        return pipeline(command, timeout=TIMEOUT, longest=LONGEST, on_line=follow, leaves=True)[0]
    except TimedOut:
        raise Failure(
            f"{what} {current} does not come to an end: it was stopped after {TIMEOUT:.0f} s",
            hint=f"see what it waits for: bash -x {current}",
        ) from None
    except Failure:
        if not current:  # the shell itself
            raise
        raise Failure(f"{what} {current} prints or sets more than {log.size(LONGEST)}") from None


# --- what was said ---------------------------------------------------------------------------------------


def _heard(stderr: str, shell: str) -> Iterator[Said]:
    """Yield what was said, and each failure that was not handled: with a text if nothing else tells its place."""
    main = ""
    lines: list[Said] = []  # since the last mark
    for line in [*stderr.split("\n"), "\1"]:
        if line.startswith("\1\1") and _MARK.fullmatch(line):
            yield from _not_set(main, *line[2:].split("\1", 3))
        elif _MARK.fullmatch(line):
            status, file, number = [*line[1:].split("\1"), "", ""][:3]
            place = (file, number)
            yield from (said._replace(lost=said.lost or (said.file, said.line) == place) for said in lines)
            if not number:
                main = status
            elif file:  # not our own `.`
                yield _failed(main, file, number, int(status), lines)
            lines = []
        elif line.strip() and "_imageos_look" not in line:  # as `set -v` shows it
            lines.append(_line(main, line, shell))


def _line(main: str, line: str, shell: str) -> Said:
    match = _COMPLAINT.fullmatch(line)
    if not match:
        return Said(main, main, "", line)
    file, number, text = match.groups()
    if file == shell:  # dash says the file behind the line, or not at all
        file, text = main, text.removeprefix(f"{main}: ")
    if file != main and _is_program(os.path.join("/", file)):
        return Said(main, main, "", line)
    return Said(main, file, number, text, lost=bool(_LOST.fullmatch(text)) and not _is_meant(file, number, text))


def _is_program(path: str) -> bool:
    """Return whether what complains is a program that a file has started, and nothing that it has read."""
    if not os.path.isfile(path):
        return True
    if not os.access(path, os.X_OK):
        return False
    try:
        with open(path, "rb") as opened:
            return opened.read(2) == b"#!"
    except OSError:
        return True


def _is_meant(file: str, number: str, text: str) -> bool:
    """Return whether it is a warning, or a command is not found on a line that says what to do then."""
    if not re.fullmatch(r"[a-z0-9/][\w./+-]*: (command )?not found", text):
        return text.startswith("warning: ") and "here-document" not in text
    return bool(re.match(r"\s*(if|elif|while|until)\s|\s*!\s|.*\|\|", _line_of(file, number)))


def _line_of(file: str, number: str) -> str:
    try:
        with open(os.path.join("/", file), encoding="utf-8", errors="replace") as opened:
            return next(islice(opened, int(number) - 1, None), "")
    except OSError:
        return ""


# What a shell does without a word, and what it was meant to do
_NOT_SET = (
    (r"([A-Z]\w*)= .+", "a space is behind ="),
    (r"set ([A-Z]\w*)( ?=.*| \w+)", "`set` does not do that"),
    (r"export ([A-Z]\w*) [a-z0-9]\w*", "`export` wants ="),
)


def _arrays(variables: Mapping[str, str]) -> set[str]:
    """Return the names of those that are not one text."""
    counts = {name[:-2]: int(count) for name, count in variables.items() if name.endswith("[]")}
    return {name for name, count in counts.items() if count > (name in variables)}


def _array(file: str, name: str, has_first: bool) -> Said:
    counts = "only its first element counts" if has_first else "it has no first element"
    return Said(file, file, "", f"{name} is an array: {counts}", lost=not has_first, ours=True)


def _not_set(main: str, file: str, number: str, is_lost: str, command: str) -> Iterator[Said]:
    """Yield why this command, which may be cut off, does not give a variable its value; nothing if it does."""
    whys = [(match[1], why) for pattern, why in _NOT_SET if (match := re.fullmatch(pattern, command))]
    assigned = re.match(r"(?:export )?([A-Z]\w*)\+?=|read .*?\b([A-Z]\w*)$", command)
    if assigned and not whys:
        name, line, itself = assigned[1] or assigned[2], _line_of(file, number), re.escape(command)
        line = line if "#" in command else line.partition(" #")[0]
        if re.search(rf"{itself} ?&(?!&)", line):
            whys = [(name, "an & ends the command")]
        elif is_lost == "1" or re.search(rf"[^|]\|\s*{itself}|{itself}\s*;?\s*}}?\s*\|(?!\|)", line):
            whys = [(name, "it is in a subshell, made by ( or |")]
    for name, why in whys:
        yield Said(main, file, number, f"{name} is not set: {why}", lost="subshell" not in why, ours=True)


def _failed(main: str, file: str, number: str, status: int, lines: Sequence[Said]) -> Said:
    """Return a failure that was not handled, after these lines."""
    if any(said.line for said in lines):
        return Said(main, file, number, "", status)
    if status in (126, 127):  # also where the shell was told not to say so
        return Said(main, file, number, "a command is not found, or cannot be run", status, lost=True)
    return Said(main, file, number, f"the command failed with status {status}" if lines else "", status)


def _told(said: Said, rules: Rules, variables: Mapping[str, str] | None) -> Said:
    """Return it without a text that may hold a secret."""
    known = variables or ({} if said.line else None)  # the shell quotes no variable
    if said.status or said.ours or not rules.is_secret(said.file, said.text, known):
        return said
    return said._replace(text="(not shown, as it may tell a secret)" if said.line else "")


def _check(what: str, path: str, values: Mapping[str, str], said: Sequence[Said], rules: Rules) -> None:
    """Fail if the file has not done what it says."""
    said = [line for line in said if line.main == path]
    for line in said:
        if line.lost:
            raise Failure(f"{what} {line}", hint=_remedy(line), details=_details(said, str(line)))
    for name, value in values.items():
        if value.endswith("\r") and "\n" not in value:  # else it may be user-data for Windows
            raise Failure(f"{what} {path}: {name} ends in a carriage return", hint=_remedy(Said(path, path, "", "\r")))
    for failed in (line for line in said if line.status):
        empty = [name for name in rules.vital if values.get(name) == ""]
        if empty:
            raise Failure(
                f"{what} {path}: {empty[0]} is empty, as line {failed.line} failed with status {failed.status}",
                hint=f"mend that line, or take {empty[0]} out of the file",
                details=_details(said),
            )


def _details(said: Sequence[Said], cause: str = "") -> list[str]:
    lines = dict.fromkeys(str(line) for line in said if line.text)
    return [line for line in lines if line != cause][-MOST_SAID:]


def _ended(what: str, path: str, status: int, said: Sequence[Said]) -> Failure:
    """Return the failure of a file that is no shell, or ends the shell."""
    located = [line for line in said if line.line]
    if status == 101:  # bash names file and line in its first line, and quotes the text in the second
        line = located[0] if located else Said(path, path, "", "syntax error")
        return Failure(f"{what} {line}", hint=_remedy(line), details=_details(said, str(line)))
    if status and located and located[-1].status in (0, status):  # by `set -e`, `set -u`, ${name:?}
        last = located[-1]
        line = last if last.text else last._replace(text=f"the command failed with status {last.status}")
        return Failure(f"{what} {line}", hint=_remedy(line), details=_details(said, str(line)))
    return Failure(
        f"{what} {path}: it ended the shell with status {status}",
        hint="it is read by a shell: `return` ends a file, not `exit`",
        details=_details(said),
    )


def _remedy(line: Said) -> str:
    if "\r" in line.text or "\\r" in line.text:
        return f"the file has the line ends of Windows: sed -i 's/\\r$//' {line.file}"
    if "\ufeff" in line.text or "\\357\\273\\277" in line.text:
        return f"the file begins with a byte order mark: sed -i '1s/^\\xef\\xbb\\xbf//' {line.file}"
    if "an & ends" in line.text:
        return "put the value in single quotes"
    if "is an array" in line.text:
        return "a setting is one text: NAME='first second'"
    if line.ours or re.fullmatch(r"[A-Z][A-Z0-9_]*:+ .*not found", line.text):
        return "it is shell: NAME=value, without spaces around ="
    if "here-document" in line.text:
        return "the word that ends a here-document must stand alone in its line"
    if re.search("syntax error|unexpected EOF", line.text):
        return f"it is shell: bash -n {line.file} shows where it is wrong"
    return f"see line {line.line} of {line.file}"
