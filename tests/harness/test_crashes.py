"""A process that dies or is interrupted at any call that changes the disk loses no row."""

import shutil
from pathlib import Path

import pytest

from tests.harness.disks import FOR_GOOD, Died, Disk, Instant, dies, interrupts
from tests.harness.folders import Step, assert_nothing_lost, found, loaded
from tests.harness.runs import SCENARIOS, Happening, Operation, Run, at_every_instant, scenarios

pytestmark = pytest.mark.filterwarnings("ignore")  # what is said is not what is asked here

GO_ON: list[list[Operation]] = [
    [(2, 20), (2, 21), "flush", (2, 22), "close"],
    ["resume", (0, 3), (0, 4), "flush", (2, 22), "close"],
]


def crash(folder: Path, scenario: str, scores_mode: str, instant: Instant) -> None:
    """Dies at an instant, and goes on in both ways."""
    run = Run(folder / "run", scores_mode)
    with Disk(instant, dies, lasts=FOR_GOOD).under(), pytest.raises(Died):
        run.does(SCENARIOS[scenario])
    for number, operations in enumerate(GO_ON):
        left = folder / f"left-{number}"  # what is there when all that was in memory is gone
        left.mkdir()
        if run.folder.exists():
            shutil.copytree(run.folder, left, dirs_exist_ok=True)
        now = assert_nothing_lost(left, run.holds(), run.logging, scores_mode=scores_mode)
        after = Run(left, scores_mode, now)
        with Disk().under():
            after.does(operations)
        assert found(left) == after.holds()
        assert loaded(left, scores_mode) == after.holds().entries
    with Disk().under():
        run.does(["close"])


def interrupt(folder: Path, scenario: str, scores_mode: str, instant: Instant) -> None:
    """Has Ctrl-C at an instant, and goes on with the same estimator; the step may be known to it or not."""
    run = Run(folder / "run", scores_mode)
    with Disk(instant, interrupts).under():
        with pytest.raises(KeyboardInterrupt):
            run.does(SCENARIOS[scenario])
        before, broken_off = list(run.logged), run.logging
        run.does(GO_ON[0])
    possible = [run.holds()]
    if broken_off is not None:
        later = [Step(step.record) for step in run.logged[len(before) :]]
        possible.append(run.holds([*before, broken_off, *later]))
        if broken_off.aside:  # before the estimator knew the step
            possible.append(run.holds([*before, later[0]._replace(aside=True), *later[1:]]))
    assert found(run.folder) in possible
    assert loaded(run.folder, scores_mode) == found(run.folder).entries


@scenarios
def test_crash_at_some_calls_loses_no_row(tmp_path: Path, scenario: str, scores_mode: str) -> None:
    assert at_every_instant(crash, tmp_path, scenario, scores_mode, step=31)


@scenarios
def test_interrupt_at_some_calls_loses_no_row(tmp_path: Path, scenario: str, scores_mode: str) -> None:
    assert at_every_instant(interrupt, tmp_path, scenario, scores_mode, step=31)


@pytest.mark.slow
@pytest.mark.parametrize("happens", [crash, interrupt])
def test_any_call_may_be_the_last_and_no_row_is_lost(tmp_path: Path, happens: Happening) -> None:
    count = 0
    for scenario in SCENARIOS:
        for scores_mode in ("append", "per_step"):
            count += at_every_instant(happens, tmp_path / scenario / scores_mode, scenario, scores_mode)
    print(f"\n{count} {happens.__name__} points survived, rows lost: 0")
