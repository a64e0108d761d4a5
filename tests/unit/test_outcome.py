"""How a command ends: exit status, hint, and the cause on the last line."""

from __future__ import annotations

import errno
import os
import resource
from typing import NoReturn
from zipimport import ZipImportError

import pytest

from imageos.errors import Failure, Interrupted, Usage, signal_name
from imageos.outcome import LONGEST, guard

Capture = pytest.CaptureFixture[str]


def raising(error: BaseException) -> int:
    def call() -> NoReturn:
        raise error

    return guard(call)


@pytest.mark.parametrize("status", [0, 1, 3])
def test_status_of_the_command(status: int, capfd: Capture) -> None:
    assert guard(lambda: status) == status
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "cause"),
    [
        (Failure("no such image"), 1, "no such image"),
        (Usage("no command given"), 2, "no command given"),
        (Interrupted(15), 143, "ended by SIGTERM"),
        (Interrupted(1), 129, "ended by SIGHUP"),
        (KeyboardInterrupt(), 130, "ended by SIGINT"),
        (OSError(errno.ENOSPC, "No space left on device", "/etc/x"), 1, "/etc/x: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", b"/etc/x"), 1, "/etc/x: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", 8), 1, "No space left on device"),
        (OSError("odd"), 1, "odd"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),
        (
            ZipImportError("bad local file header"),
            1,
            "imageos was replaced by another version while it started: call it again",
        ),
    ],
)
def test_cause_is_all_that_is_said(error: BaseException, status: int, cause: str, capfd: Capture) -> None:
    assert raising(error) == status
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == f"imageos: {cause}\n"


@pytest.mark.parametrize("number", [errno.EUCLEAN, errno.EBADMSG, errno.EIO])
def test_a_damaged_filesystem(number: int, capfd: Capture) -> None:
    assert raising(OSError(number, os.strerror(number), "/run/imageos/root/etc/fstab")) == 1
    *_, hint, cause = capfd.readouterr().err.splitlines()
    assert "hint: " in hint and "repair" in hint and cause.endswith(os.strerror(number))


def test_details_and_hint_come_before(capfd: Capture) -> None:
    assert raising(Failure("tar failed", hint="another image", details=["$ tar", "tar: bad"])) == 1
    assert capfd.readouterr().err.splitlines() == [
        "imageos: | $ tar",
        "imageos: | tar: bad",
        "imageos: hint: another image",
        "imageos: tar failed",
    ]


@pytest.mark.parametrize("error", [ValueError("oops"), AssertionError("oops"), KeyError("oops")])
def test_internal_error(error: Exception, capfd: Capture) -> None:
    assert raising(error) == 1
    *trace, last = capfd.readouterr().err.splitlines()
    assert "Traceback" in trace[0]
    assert last.startswith(f"imageos: internal error, please report it with the lines above: {type(error).__name__}: ")
    assert "oops" in last
    assert all(line.startswith("imageos: ") for line in trace)


@pytest.mark.parametrize(
    ("limit", "bound"), [(4 << 30, "its limit of 4 GiB"), (resource.RLIM_INFINITY, "the node has")]
)
def test_out_of_memory(limit: int, bound: str, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert raising(MemoryError()) == 1
    assert capfd.readouterr().err == f"imageos: imageos needs more memory than {bound}\n"


@pytest.mark.parametrize("error", [SystemError("returned NULL"), ImportError("x.so: failed to map segment from it")])
def test_out_of_memory_in_an_import(error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    """Python has these errors where a module does not fit under the limit. Without a limit they are of another kind."""
    limit = 20 << 20
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert raising(error) == 1
    assert capfd.readouterr().err.startswith("imageos: imageos needs more memory than its limit of 20 MiB")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert raising(error) == 1
    assert "internal error" in capfd.readouterr().err


def test_what_is_made_is_readable() -> None:
    """Ganeti's umask is 077."""
    os.umask(0o077)
    assert guard(lambda: os.umask(0o022)) == 0o022


def test_signal_name() -> None:
    assert signal_name(9) == "SIGKILL"
    assert signal_name(200) == "signal 200"


def test_no_handler_swallows_an_interruption() -> None:
    assert not issubclass(Interrupted, Exception)
    assert Interrupted(15).signum == 15


def test_ganeti_can_show_the_cause(capfd: Capture) -> None:
    assert raising(Failure("x" * 10_000, hint="y" * 10_000, details=["z" * 10_000])) == 1
    lines = capfd.readouterr().err.splitlines()
    assert [len(line) - len("imageos: ") for line in lines] == [LONGEST, LONGEST, LONGEST]
