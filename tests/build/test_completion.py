"""The manual page and the completions, used by man, bash and zsh."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def output(*argv: object, text: str = "") -> str:
    done = subprocess.run([str(word) for word in argv], input=text, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_manual_page(imageos: Path) -> None:
    shown = output("groff", "-man", "-ww", "-Tascii", "-P-cbou", text=output(imageos, "--man"))
    assert "imageos - turn an image into a running Ganeti instance" in shown
    assert "install [-h] [--root DIR] [--os-dir DIR] [--bin-dir DIR]" in " ".join(shown.split())


def completed(imageos: Path, *words: str) -> set[str]:
    """Return bash's completions of the last of `words`."""
    script = """
        source /dev/stdin; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _imageos "$1" "${!#}" "${COMP_WORDS[COMP_CWORD-1]}"; printf '%s\\n' "${COMPREPLY[@]}"
    """
    return set(output("bash", "-c", script, "bash", *words, text=output(imageos, "--completion", "bash")).split())


def test_bash_completes(imageos: Path, tmp_path: Path) -> None:
    assert completed(imageos, "imageos", "inst") == {"install"}
    assert "create" not in completed(imageos, "imageos", "")
    assert completed(imageos, "imageos", "install", "--b") == {"--bin-dir"}
    assert completed(imageos, "/usr/sbin/imageos", "install", "--") == {"--root", "--os-dir", "--bin-dir", "--help"}
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    assert completed(imageos, "imageos", "install", "--root", f"{tmp_path}/") == {f"{tmp_path}/directory"}
    assert completed(imageos, "imageos", "variants", "f") == {"fetch"}
    assert completed(imageos, "imageos", "variants", "fetch", "--p") == {"--prune"}
    assert completed(imageos, "imageos", "ganeti-image", "-t", "") == {"tarball", "dump", "qemu-img"}


def test_bash_completes_the_tools(imageos: Path) -> None:
    assert completed(imageos, "make-dump", "--f") == {"--force"}
    assert completed(imageos, "/usr/sbin/ganeti-image", "--seal", "--type", "q") == {"qemu-img"}


ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1= fpath=(${(q)1} \\$fpath); autoload -U compinit; compinit -u -D; echo READ''Y"
zpty -r shell line '*READY*'
zpty -w -n shell "$2"$'\\t'
zpty -r shell line "*$3*"
"""


@pytest.mark.parametrize(
    ("typed", "offered"), [("imageos inst", "install"), ("imageos doctor --j", "--json"), ("make-dump --f", "--force")]
)
def test_zsh_completes(typed: str, offered: str, imageos: Path, tmp_path: Path) -> None:
    (tmp_path / "_imageos").write_text(output(imageos, "--completion", "zsh"))
    output("timeout", "60", "zsh", "-fc", ZSH, "zsh", tmp_path, typed, offered)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_syntax(shell: str, imageos: Path, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(output(imageos, "--completion", shell))
    output(shell, "-n", script)
