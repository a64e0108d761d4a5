"""Signals become an exception that no code swallows. The tiers with real disks test namespaces."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from imageos.errors import Failure, Interrupted
from imageos.node import children, isolation, linux


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*children.SIGNALS, signal.SIGCHLD)}
    isolation.handle_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_first_signal_interrupts(number: signal.Signals) -> None:
    with pytest.raises(Interrupted) as raised:
        signal.raise_signal(number)
    assert raised.value.signum == number


def test_cleaning_up_is_not_interrupted() -> None:
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)
    for number in children.SIGNALS:
        signal.raise_signal(number)


def test_children_are_ours_to_bury() -> None:
    """A caller that ignores SIGCHLD has its programs ignore it, too: the kernel would tell nobody how a child ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    isolation.handle_signals()
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_namespaces_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Failure, match="^this needs root$") as raised:
        isolation.enter()
    assert raised.value.hint == "run it with sudo"


def test_signal_waits_while_the_process_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ignores what a handler raises in fork, so that the command would continue."""
    waiting: set[int] = set()

    def fork() -> int:
        signal.raise_signal(signal.SIGTERM)  # in this thread: a worker of pytest-xdist has others
        waiting.update(signal.sigpending())
        raise OSError(0, "no processes any more")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(linux, "unshare", lambda flags: None)
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(Interrupted):
        isolation.enter()
    assert waiting == {signal.SIGTERM}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
