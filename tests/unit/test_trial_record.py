"""What is kept of the last trial of a variant."""

from __future__ import annotations

from pathlib import Path

import pytest

from imageos.variants import record
from imageos.variants.record import Trial, last_trial

NOON = 1796040000.0  # 2026-11-30


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "DIRECTORY", str(tmp_path / "trials"))
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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tried": "never"}', '{"tried": 1, "later": 2}', "\0", "[" * 9999])
def test_a_file_that_is_no_record_is_no_trial(directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "a.json").write_text(text)
    assert last_trial("a") is None
