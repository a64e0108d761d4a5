"""Read YAML of a guest: netplan's files and cloud-init's configuration, as far as questions to these go.

It knows comments, quotes, blocks and braces, so JSON too, but neither anchors nor tags nor the types of scalars. All is
read in one pass, and no text makes it fail: what it does not understand has no keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

Path = tuple[str, ...]
DEEPEST = 64  # keys, items or braces within each other
# It is matched at every token, never searched: blanks before what is no token would be read again from each of them
TOKEN = re.compile(
    r"""(?:
      (?P<mark>[{}\[\],])
    | "(?P<double>(?:[^"\\]|\\.)*)"
    | '(?P<single>(?:[^']|'')*)'
    | (?P<colon>:)
    | (?P<plain>[^\s{}\[\],:"'](?:[^{}\[\],:]|:(?=[^\s,{}\[\]]))*)
    )""",
    re.VERBOSE | re.DOTALL,
)
KEY = re.compile(
    r"""(?:
      "([^"\\]*)"
    | '([^']*)'
    | ([^\s"'{}\[\]#&*!|>%@`,:](?:[^\s:]|:(?=\S)|[ \t]+(?=[^\s:#]))*)
    )[ \t]*:(?=\s|$)""",
    re.VERBOSE,
)
DASHES = re.compile(r"(?:-[ \t]+)*")
PROPERTIES = re.compile(r"(?:[&!]\S*(?:[ \t]+|$)){0,2}")  # an anchor, a tag
BLANKS = re.compile(r"\s*")
BLOCK_SCALAR = re.compile(r"[|>][-+0-9]*$")


def scalars(text: str) -> dict[Path, str]:
    """Return every scalar by the keys that lead to it. An item of a list has the key `-`; of several the last counts.

    A key without a value, or with an empty list or mapping, leads to an empty text.
    """
    found: dict[Path, str] = {}
    above: list[tuple[int, str]] = []  # indentation and key of what is open
    for indent, line in _lines(text):
        is_item = line == "-" or line.startswith("- ")
        # the items of a list may be as far left as its key
        while above and (above[-1][0] > indent or (above[-1][0] == indent and (not is_item or above[-1][1] == "-"))):
            above.pop()
        rest = line
        while (rest == "-" or rest.startswith("- ")) and len(above) < DEEPEST:
            above.append((indent, "-"))
            stripped = rest[1:].lstrip()
            indent += len(rest) - len(stripped)
            rest = stripped
        name, rest = _key_and_value(rest)
        if name is not None:
            above.append((indent, name))
        path = tuple(name for _, name in above)
        if rest[:1] in ("{", "["):
            found.update(_flow(path, rest))
        else:
            found[path] = _unquoted(rest)
    return found


def _key_and_value(text: str) -> tuple[str | None, str]:
    """Split what follows the dashes of a line; without a key it is all value. Anchors and tags are dropped."""
    key = None if text[:1] in ("{", "[") else KEY.match(text)
    value = text[key.end() :].strip() if key else text
    value = PROPERTIES.sub("", value, 1)
    return (next(group for group in key.groups() if group is not None) if key else None), value


def has(found: dict[Path, str], *path: str) -> bool:
    """Return whether keys lead to anything."""
    return any(keys[: len(path)] == path for keys in found)


def without(text: str, key: str) -> str:
    """Return a text without a key of its top level, and what is below it."""
    kept, is_dropped = [], False
    for line in text.splitlines(keepends=True):
        name = KEY.match(line)
        if line.strip() and not line[0].isspace() and line[0] not in "#-":
            is_dropped = bool(name and key in name.groups())
        if not is_dropped:
            kept.append(line)
    return _without_in_json("".join(kept), key)


def _without_in_json(text: str, key: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines or not lines[0].lstrip().startswith("{"):
        return text
    try:
        document = json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return text
    comments = "".join(f"{line}\n" for line in text.splitlines() if line.startswith("#"))  # cloud-init asks for its own
    return comments + json.dumps({name: value for name, value in document.items() if name != key}, indent=2) + "\n"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield indentation and content of each line without comments; one line for braces over several."""
    open_braces, parts, start, skipped, quote = 0, [""], 0, -1, ""
    for raw in text.lstrip("\ufeff").splitlines():
        indent = len(raw) - len(raw.lstrip(" "))
        if skipped >= 0 and (indent > skipped or not raw.strip()):
            continue  # the text of a block scalar
        skipped = -1
        line, depth, quote = _without_comment(raw, quote if open_braces else "")
        line = line.strip()
        if not open_braces:
            if line.startswith("--- "):
                line = line[4:].lstrip()
            if not line or line.startswith(("---", "...", "%")):
                continue
            parts, start = [], indent
            _, value = _key_and_value(DASHES.sub("", line, 1))
            if value[:1] not in ("{", "["):
                if BLOCK_SCALAR.match(value):
                    skipped, line = indent, line[: -len(value)].rstrip()
                yield start, line
                continue
        parts.append(line)
        open_braces += depth
        if open_braces <= 0:
            open_braces = 0
            yield start, " ".join(parts)
    if open_braces:
        yield start, " ".join(parts)


def _without_comment(line: str, quote: str) -> tuple[str, int, str]:
    """Return a line without its comment, how many more braces it opens than it closes, and a quote that stays open.

    `quote`: one that the line before has left open.
    """
    depth, before = 0, " "
    for position, character in enumerate(line):
        if quote:
            is_escaped = quote == '"' and before == "\\"
            quote = "" if character == quote and not is_escaped else quote
            before = "" if is_escaped else character
            continue
        if character == "#" and before in " \t":
            return line[:position], depth, ""
        if character in "\"'" and before in " \t{[,:-":
            quote = character
        depth += (character in "{[") - (character in "}]")
        before = character
    return line, depth, quote


def _flow(path: Path, text: str) -> dict[Path, str]:
    """Return the scalars of a mapping or list in braces."""
    found: dict[Path, str] = {path: ""}
    above: list[str] = []  # for each open brace, `{` or `[`
    keys: list[str] = []
    word: str | None = None
    for token in _tokens(text):
        mark = token["mark"]
        if mark and mark in "{[" and len(above) < DEEPEST:
            above.append(mark)
            keys.append("-" if mark == "[" else "")
            word = None
        elif token["colon"] and above and above[-1] == "{" and word is not None:
            keys[-1], word = word, None
            found[(*path, *keys)] = ""
        elif mark:
            if word is not None and above:
                last = keys if above[-1] == "[" or keys[-1] else [*keys[:-1], word]
                found[(*path, *last)] = word if last is keys else ""
            word = None
            if mark != "," and above:
                above.pop()
                keys.pop()
            elif above and above[-1] == "{":
                keys[-1] = ""
        elif not token["colon"]:
            word = next(token[kind] for kind in ("double", "single", "plain") if token[kind] is not None).strip()
    return found


def _tokens(text: str) -> Iterator[re.Match[str]]:
    place = 0
    while place < len(text):
        blanks = BLANKS.match(text, place)
        place = blanks.end() if blanks else place
        token = TOKEN.match(text, place)
        if token:
            yield token
        place = token.end() if token else place + 1


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text
