"""Modules that a command needs later: they are imported while it waits for a program, when a processor is free."""

from __future__ import annotations

from importlib import import_module

from imageos.node.children import signals_held

_later: list[str] = []


def later(*modules: str) -> None:
    _later.extend(modules)


def load() -> None:
    """Import them. Signals wait, as Python may lose an exception that one raises in an import."""
    with signals_held():
        while _later:
            import_module(_later.pop(0))
