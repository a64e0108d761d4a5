"""Modules that a command imports late."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import imageos
from imageos import ganeti, preload
from imageos.commands import create, verify
from imageos.node import isolation
from imageos.node.children import SIGNALS


class Looked(Exception):
    """A module is looked for."""


class Finder:
    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name in ("imageos.deployment", "imageos.hooks"):
            raise Looked(signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize("command", [create, verify], ids=["create", "verify"])
def test_signals_wait_where_no_shell_has_run(monkeypatch: pytest.MonkeyPatch, command: ModuleType) -> None:
    """Python may lose an exception that a handler raises during an import."""
    main: Callable[[list[str]], int] = command.main
    settings = SimpleNamespace(with_sizes=lambda _memory: SimpleNamespace(cdinstall=False))
    monkeypatch.setattr(ganeti, "instance", lambda _environ: SimpleNamespace(memory=0))
    monkeypatch.setattr(ganeti, "check_api", lambda _environ: None)
    monkeypatch.setattr(isolation, "enter", lambda: None)
    monkeypatch.setattr(preload, "_later", [])
    monkeypatch.setattr(create, "load_settings", lambda _environ: settings)
    monkeypatch.setattr(create, "reserved_parameters", lambda _environ: {})
    monkeypatch.setattr(verify, "examine_settings", lambda _environ: (settings, []))
    for name in ("deployment", "hooks"):
        monkeypatch.delitem(sys.modules, f"imageos.{name}", raising=False)
        monkeypatch.delattr(sys.modules["imageos"], name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(Looked) as looked:
        main([])
    assert looked.value.args[0] >= {*SIGNALS}


def test_what_is_called_preloaded() -> None:
    late: set[str] = set()
    early: set[str] = set()
    for path in Path(imageos.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for package, names in re.findall(r"from (imageos[\w.]*) import ([\w, ]+)  # late: preloaded", text):
            late |= {f"{package}.{name}" for name in names.split(", ")}
        for names in re.findall(r"preload\.later\((.+)\)", text):
            early |= {*re.findall(r'"([\w.]+)"', names)}
    assert late and late <= early
