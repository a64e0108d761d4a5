"""The manual page and the completions, as man, bash and zsh take them."""

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
    assert "install [--root DIR] [--os-dir DIR] [--bin-dir DIR]" in shown


def completed(imageos: Path, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
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


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_syntax(shell: str, imageos: Path, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(output(imageos, "--completion", shell))
    output(shell, "-n", script)
