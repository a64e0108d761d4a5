"""The hooks of the checkout, as files that build.py packs and as modules."""

from __future__ import annotations

from pathlib import Path, PurePath
from types import ModuleType

from build import is_source

CHECKOUT = Path(__file__).resolve().parents[1]
# Without files that editors and Python leave there
HOOKS = {
    path.name: path
    for path in sorted((CHECKOUT / "hooks.d").iterdir())
    if path.is_file() and is_source(PurePath("hooks.d", path.name))
}
PYTHON_HOOKS = {name: path for name, path in HOOKS.items() if "python3" in path.read_text().partition("\n")[0]}


def hook_module(name: str) -> ModuleType:
    """Return a hook as a module, not by importlib, which would write its bytecode to hooks.d."""
    module = ModuleType(f"hook_{name.replace('-', '_')}")
    module.__file__ = str(HOOKS[name])
    exec(compile(HOOKS[name].read_text(), HOOKS[name], "exec", dont_inherit=True), module.__dict__)
    return module
