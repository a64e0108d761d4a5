"""The site's files that are shell, as all in /etc/default are: the shell evaluates them and says what they set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence

from imageos.errors import Failure
from imageos.run import DEFAULT_PATH, Finished, pipeline

# For each file: its path and all variables (env -0), then an empty entry. What a file itself prints goes to stderr.
# `-n` first: a file with a syntax error must not be half executed; `-e`, or bash 5.1 has nothing against an array that
# does not end. No function around `.`: what a file
# declares would be local to it.
_EVALUATE = r"""
exec 3>&1 1>&2
set -a
for _imageos_word in "$@"; do
  eval "_imageos_file=$_imageos_word"
  printf '%s\0' "$_imageos_file" >&3
  [ -f "$_imageos_file" ] || exit 102
  "$0" -en "$_imageos_file" || exit 101
  . "$_imageos_file"
  /usr/bin/env -0 >&3; printf '\0' >&3
done
exit 0
"""
_SHELL_OWN = ("_", "SHLVL", "PWD", "OLDPWD", "PATH", "_imageos_file", "_imageos_word")


class MissingFile(Failure):
    """A file that is to be evaluated is not there."""

    def __init__(self, what: str, path: str) -> None:
        super().__init__(f"{what} {path} is missing")
        self.path = path


def evaluate(
    what: str,
    words: Sequence[str],
    given: Mapping[str, str],
    may_hold_secrets: Callable[[str], bool] = lambda _path: False,
) -> list[tuple[str, dict[str, str]]]:
    """(path, what it set) of files that one shell evaluates one after the other, with `given` in its environment.

    `words` are shell for the paths, and may use what earlier files set: never text from outside the site's files.
    `what` the files are is for messages.
    """
    if not words:
        return []
    shell = shutil.which("bash", path=DEFAULT_PATH) or "/bin/sh"
    start = {"PATH": os.environ.get("PATH", DEFAULT_PATH), **given}
    done = pipeline([[shell, "-c", _EVALUATE, shell, *words]], env=start, cwd="/", private=True, outside="settings")[0]
    entries = [block.split("\0") for block in done.stdout.decode("utf-8", "surrogateescape").split("\0\0")]
    evaluated, last = entries[:-1], entries[-1][0]
    if done.status != 0 or len(evaluated) < len(words):
        path = last or (evaluated[-1][0] if evaluated else words[0])
        raise _failure(what, path, done, may_hold_secrets(path))
    layers = []
    before: Mapping[str, str] = start
    for path, *variables in evaluated:
        after = dict(entry.partition("=")[::2] for entry in variables)
        changed = {name for name, value in after.items() if before.get(name) != value and name not in _SHELL_OWN}
        layers.append((path, {name: after[name] for name in after if name in changed}))
        before = after
    return layers


def _failure(what: str, path: str, done: Finished, secret: bool) -> Failure:
    if done.status == 102:
        return MissingFile(what, path)
    said = done.stderr.strip().splitlines()
    details = [] if secret else said  # the shell quotes what it does not understand
    reason = f"it ended the shell with status {done.status}"
    if done.status == 101:
        # bash names file and line in its first line, and quotes the text in the second
        reason = said[0].partition(path + ": ")[2] or said[0] if said else "syntax error"
        details = details[1:]
    return Failure(
        f"{what} {path}: {reason}", hint=f"it is shell: bash -n {path} shows where it is wrong", details=details
    )
