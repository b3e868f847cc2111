"""A run that is written down beforehand, and what its folder should hold at every moment of it."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.harness.disks import Disk, Instant
from tests.harness.folders import EMPTY, Contents, Place, Step, found, logged, sample, writer

Happening = Callable[[Path, str, str, Instant], None]  # folder, scenario, scores_mode, instant
Operation = Place | str  # a step that is logged, or something else to do

SCENARIOS: dict[str, list[Operation]] = {
    "in order": [
        *[*((0, step) for step in range(6)), "flush", (1, 6), (1, 7), (1, 8), "close", "reopen"],
        *["resume", (0, 4), (0, 5), "flush", (1, 6), "close"],
    ],
    "out of order": [
        *[*((0, step) for step in range(6)), "flush", (1, 6), (1, 7), (0, 8), "close", "reopen"],
        *["resume", (1, 6), (1, 7), "close"],
    ],
    "begun anew": [
        *[*((0, step) for step in range(6)), "flush", (1, 6), (1, 7), "close", "aside", (0, 0), (0, 1), "flush"],
        *[(1, 4), "close", (1, 5), "close", "aside", (0, 4), "close"],
    ],
}
scenarios = pytest.mark.parametrize(
    ("scenario", "scores_mode"), [(scenario, mode) for scenario in SCENARIOS for mode in ("append", "per_step")]
)


class Run:
    """An estimator that does one thing after another, and what it has logged.

    Args:
        folder: The run folder.
        scores_mode: How responsibilities are stored.
        was: What is in the folder.
    """

    def __init__(self, folder: Path, scores_mode: str, was: Contents = EMPTY) -> None:
        self.folder = folder
        self.logged: list[Step] = []
        self.logging: Step | None = None
        self.flushed = 0  # of those it has logged
        self._scores_mode = scores_mode
        self._was = was
        self._resumed = self._aside = False
        self.estimator = writer(folder, scores_mode)

    def does(self, operations: Sequence[Operation]) -> None:
        """Does all."""
        for operation in operations:
            if isinstance(operation, tuple):
                self._log(*operation)
            elif operation == "resume":
                self.estimator.load_state_dict(self.estimator.state_dict())
                self._resumed = True
            elif operation in ("reopen", "aside"):
                self._aside = operation == "aside"
                existing = "aside" if self._aside else "append"
                self.estimator = writer(self.folder, self._scores_mode, existing=existing)
            else:
                getattr(self.estimator, operation)()
                self.flushed = len(self.logged)

    def holds(self, steps: Sequence[Step] | None = None) -> Contents:
        """Returns what should be in the folder after these steps; None are those that it has logged."""
        holds = self._was
        for step in self.logged if steps is None else steps:
            holds = logged(holds, step, scores_mode=self._scores_mode)
        return holds

    def _log(self, epoch: int, step: int) -> None:
        value = sum(map(len, self._was)) + len(self.logged) + (self.logging is not None)  # different from all others
        stats, record = sample(value, step=step, epoch=epoch)
        self.logging = Step(record, self._resumed, self._aside)
        self.estimator.log_step(step=step, epoch=epoch, stats=stats)
        self.logged.append(self.logging)
        self.logging, self._resumed, self._aside = None, False, False


def instants(folder: Path, scenario: str, scores_mode: str) -> list[Instant]:
    """Every one in a scenario that nothing happens in."""
    with Disk().under() as disk:
        run = Run(folder, scores_mode)
        run.does(SCENARIOS[scenario])
    assert found(folder) == run.holds()
    return disk.instants()


def at_every_instant(happens: Happening, folder: Path, scenario: str, scores_mode: str, *, step: int = 1) -> int:
    """Lets something happen at every instant, or every so-manieth, and returns at how many."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = instants(folder / "undisturbed", scenario, scores_mode)[::step]
    for instant in chosen:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            happens(Path(place), scenario, scores_mode, instant)
    return len(chosen)
