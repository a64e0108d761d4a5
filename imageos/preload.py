"""Modules that a command needs later: they are imported while it waits for a program, when a processor is free."""

from __future__ import annotations

from importlib import import_module

_later: list[str] = []


def later(*modules: str) -> None:
    _later.extend(modules)


def load() -> None:
    """Import them; to be called with signals held, as Python may lose an exception that one raises in an import."""
    while _later:
        import_module(_later.pop(0))
