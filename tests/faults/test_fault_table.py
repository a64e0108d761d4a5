"""Let every external command of a command fail once, in several ways, at every call.

Expect exit status 1, the cause on the last line, a disarmed or unchanged disk, and no leftovers (the check after each
test). Once for each program, the same command must succeed right afterwards. The tables in `cases` list the
exceptions, with reasons.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import wrappers
from backups import is_disarmed
from cases import CASES, NOT_GROWN, Case, apart
from support import Node, Result, digest, partitions
from wrappers import Fault

# The guest on the disk decides whether these are needed, so that it is known only after the disk is written
LATE = ("e2fsck", "resize2fs", "xfs_growfs", "btrfs", "lvm")
MODES = ("fails", "killed at its end")


@pytest.mark.parametrize("name", CASES)
def test_every_program_fails_at_every_call(
    name: str, node: Node, sources: Path, small_tree: Path, ganeti: None, tmp_path: Path
) -> None:
    case = CASES[name]
    case.make_layout(sources, small_tree, tmp_path)
    calls, places = learn(case, node, sources, tmp_path / "learn")
    calls = {program: count for program, count in calls.items() if program in case.only or not case.only}
    assert calls, "it runs no program: it does not belong into this table"
    faults = [Fault(program, nth, mode) for program in calls for nth in range(1, calls[program] + 1) for mode in MODES]
    faults += [Fault(program, 0, "missing") for program in calls]
    firsts: dict[str, int] = {}  # program -> its first fault that ends the command
    for number, fault in enumerate(faults):
        if not case.tolerated.keys() & {str(fault), fault.program}:
            firsts.setdefault(fault.program, number)

    def attempt(number: int) -> list[str]:
        again = number in firsts.values()
        return list(problems(case, node, sources, tmp_path / str(number), faults[number], places, again))

    with ThreadPoolExecutor(case.at_once) as pool:
        found = [line for lines in pool.map(attempt, range(len(faults))) for line in lines]
    print(f"{name}: {len(faults)} faults: {calls}")
    assert not found, "\n".join(found)


def learn(case: Case, node: Node, sources: Path, work: Path) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Return the programs that a good run calls, and its partitions (start, size)."""
    here = apart(node, work)
    disk = case.disk(work / "disk", sources)
    with wrappers.recording(work / "path") as (path, called):
        case.call(here, disk, path).ok()
    return Counter(called), [(part.start, part.size) for part in partitions(disk)]


def problems(
    case: Case, node: Node, sources: Path, work: Path, fault: Fault, places: list[tuple[int, int]], again: bool
) -> Iterator[str]:
    """Return what is wrong; `again`: also check that the same call then works."""
    here = apart(node, work)
    disk = case.disk(work / "disk", sources)
    before = digest(disk)
    missing = fault.mode == "missing"
    if missing:
        result = case.call(here, disk, wrappers.without(work, fault.program))
    else:
        with wrappers.failing(work, fault) as path:
            result = case.call(here, disk, path)
    if case.tolerated.keys() & {str(fault), fault.program} and result.status == 0:
        reason = case.tolerated.get(str(fault)) or case.tolerated[fault.program]
        if reason == NOT_GROWN and not re.search(
            f"warning: the (root filesystem|ext4 on partition 1) .*{fault.program}", result.log
        ):
            yield f"{fault}: no warning\n{result.log}"
        disk.unlink()
        return
    yield from (f"{fault}: {problem}\n{result.log}" for problem in judge(result, fault))
    # import has restored everything by then, so the disk stays
    if (
        digest(disk) != before
        and not case.mounts
        and (case.reads_only or not ("restored disk" in result.log or is_disarmed(disk, [] if case.blind else places)))
    ):
        yield f"{fault}: the disk is neither disarmed nor as it was\n{result.log}"
    if missing and fault.program not in LATE and digest(disk) != before:
        yield f"{fault}: written to although a program is missing\n{result.log}"
    if again:
        good = case.call(here, disk, wrappers.PATH)
        if good.status or [(part.start, part.size) for part in partitions(disk)] != places:
            yield f"{fault}: then the same call fails\n{good.log}"
    disk.unlink()


def judge(result: Result, fault: Fault) -> Iterator[str]:
    if result.status != 1:
        yield f"status {result.status}"
    if fault.program not in result.last:
        yield "the last line does not name it"
    if "internal error" in result.log:
        yield "an internal error"
    if fault.mode == "missing" and "install" not in result.log:
        yield "no hint which package has it"
    if fault.mode == "fails" and "broken on purpose" not in result.log:
        yield "what the program said is not shown"


def test_programs_that_hang(node: Node, sources: Path, tmp_path: Path) -> None:
    """Programs that read the disk have a time limit; test all at once, since it is a minute."""
    hangs = [
        (name, Fault(program, 1, "hangs"))
        for name in ("create raw", "import", "export", "rename")
        for program in ("sfdisk", "blkid")
    ]

    def attempt(number: int) -> Result:
        name, fault = hangs[number]
        case, work = CASES[name], tmp_path / str(number)
        here = apart(node, work)
        with wrappers.failing(work, fault) as path:
            return case.call(here, case.disk(work / "disk", sources), path)

    with ThreadPoolExecutor(len(hangs)) as pool:
        for (name, fault), result in zip(hangs, pool.map(attempt, range(len(hangs)))):
            assert f"{fault.program} was ended: not finished after 60 s" in result.log, result.log
            assert result.status == (0 if name == "export" else 1), result.log
