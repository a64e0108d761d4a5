"""Run the linters with the configuration in ruff.toml and setup.cfg."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hookfiles import PYTHON_HOOKS

CHECKOUT = Path(__file__).resolve().parents[2]
PRODUCT = ["imageos", "build.py", "manual.py", "packages.py", *(f"hooks.d/{name}" for name in PYTHON_HOOKS)]
# mypy accepts only one module of a name, so each directory with a conftest.py needs its own run
TYPED_TESTS = ["unit", "lint"]


def lint(tool: str, *arguments: str) -> None:
    """Run a linter from pytest's environment, without leaving files in the checkout."""
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    if done.returncode:
        pytest.fail(f"{tool} {' '.join(arguments)}\n{done.stdout}", pytrace=False)


@pytest.mark.parametrize("paths", [PRODUCT, ["tests", ".ci"]], ids=["product", "tests"])
def test_ruff_check(paths: list[str]) -> None:
    lint("ruff", "check", "--no-cache", "--quiet", *paths)


@pytest.mark.parametrize("paths", [PRODUCT, ["tests", ".ci"]], ids=["product", "tests"])
def test_ruff_format(paths: list[str]) -> None:
    lint("ruff", "format", "--no-cache", "--quiet", "--diff", *paths)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--cache-dir={tmp_path_factory.mktemp('mypy')}"


def test_mypy(cache: str) -> None:
    lint("mypy", cache, "--scripts-are-modules", *PRODUCT)


@pytest.mark.parametrize("tier", TYPED_TESTS)
def test_mypy_of_tests(tier: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # conftest.py puts `tests` into sys.path; modules from there have their own rules
    monkeypatch.setenv("MYPYPATH", f"{CHECKOUT}:{CHECKOUT}/tests")
    lint(
        "mypy",
        cache,
        "--follow-imports=silent",
        *(str(path) for path in sorted((CHECKOUT / "tests" / tier).glob("*.py"))),
    )
