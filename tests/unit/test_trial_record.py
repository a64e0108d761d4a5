"""What is kept of the last trial of a variant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imageos.variants import record
from imageos.variants.record import Trial, last_trial

NOON = 1796040000.0  # 2026-11-30


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "TRIALS", str(tmp_path / "trials"))
    return tmp_path / "trials"


@pytest.mark.parametrize(
    "trial, shown",
    [
        (Trial(NOON, "/images/a.img", NOON - 86400 * 2), "tried on 2026-11-30 with the image of 2026-11-28: ok"),
        (Trial(NOON, problem="no image"), "tried on 2026-11-30: no image"),
        (Trial(NOON, "/a", NOON, "uefi", "hangs"), "tried by UEFI on 2026-11-30 with the image of 2026-11-30: hangs"),
    ],
)  # fmt: skip
def test_a_trial_that_is_kept_is_read_and_shown(trial: Trial, shown: str) -> None:
    assert last_trial("debian-12") is None
    record.keep("debian-12", Trial(1.0, problem="the one before"))
    record.keep("debian-12", trial)
    assert last_trial("debian-12") == trial
    assert last_trial("debian") is None
    assert str(trial) == shown


def test_what_is_no_file_is_no_trial(directory: Path) -> None:
    directory.mkdir()
    os.mkfifo(directory / "fifo.json")
    (directory / "loop.json").symlink_to("loop.json")
    assert last_trial("fifo") is last_trial("loop") is last_trial("a/b") is None


def test_a_trial_is_kept_in_a_file_of_its_own(directory: Path, tmp_path: Path) -> None:
    """A link there is replaced, not followed; and what cannot be kept is no failure."""
    directory.mkdir()
    (tmp_path / "other").write_text("site's own")
    (directory / "a.json").symlink_to(tmp_path / "other")
    record.keep("a", Trial(NOON))
    assert (tmp_path / "other").read_text() == "site's own"
    assert last_trial("a") == Trial(NOON)
    (directory / "b.json").mkdir()
    record.keep("b", Trial(NOON))
    assert sorted(path.name for path in directory.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tried": "never"}', '{"tried": 1, "later": 2}', "\0", "[" * 9999])
def test_a_file_that_is_no_record_is_no_trial(directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "a.json").write_text(text)
    assert last_trial("a") is None
