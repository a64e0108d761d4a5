"""The hooks of the checkout: the files that build.py packs, and each as a module."""

from __future__ import annotations

from pathlib import Path, PurePath
from types import ModuleType

from build import is_source

CHECKOUT = Path(__file__).resolve().parents[1]
# Not what editors and Python leave beside them
HOOKS = {
    path.name: path
    for path in sorted((CHECKOUT / "hooks.d").iterdir())
    if path.is_file() and is_source(PurePath("hooks.d", path.name))
}
PYTHON_HOOKS = {name: path for name, path in HOOKS.items() if "python3" in path.read_text().partition("\n")[0]}


def hook_module(name: str) -> ModuleType:
    """A hook as a module. Not through importlib, which would leave its bytecode in hooks.d."""
    module = ModuleType(f"hook_{name.replace('-', '_')}")
    module.__file__ = str(HOOKS[name])
    exec(compile(HOOKS[name].read_text(), HOOKS[name], "exec", dont_inherit=True), module.__dict__)
    return module
