"""A process that is killed at a random instant loses no row whose `log_step` had returned."""

import random
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from tests.harness.folders import EMPTY, Step, sample, writer
from tests.harness.processes import Child, assert_all_reported_is_there, needs_fork

pytestmark = needs_fork

LIVES = 10  # in one folder
AN_EPOCH = 50  # steps
LONGEST = 0.03  # seconds that a process may log
modes = pytest.mark.parametrize("scores_mode", ["append", "per_step"])


class Life(NamedTuple):
    """A process that logs as fast as it can until it is killed."""

    folder: Path
    scores_mode: str
    number: int  # no other in this folder has it
    first: int  # step
    resumed: bool

    def logs(self, step: int) -> tuple[dict[str, Tensor], Step]:
        """What it logs as a step, and what is to be found of it."""
        stats, record = sample(1_000_000 * self.number + step, step=step, epoch=step // AN_EPOCH)
        return stats, Step(record, self.resumed and step == self.first)

    def goes_on(self, report: Callable[[int], None]) -> None:
        """Goes on for ever."""
        estimator = writer(self.folder, self.scores_mode)
        if self.resumed:
            estimator.load_state_dict(estimator.state_dict())
        for step in count(self.first):
            estimator.log_step(step=step, epoch=step // AN_EPOCH, stats=self.logs(step)[0])
            report(step)
            if step % 7 == 6:
                estimator.flush()

    def is_killed(self, after: float) -> list[int]:
        """Kills it so many seconds after its first row, and returns the steps whose `log_step` had returned."""
        child = Child(self.goes_on)
        first = child.report()  # however long the process takes to come to it
        time.sleep(after)
        child.kill()
        steps = [first, *child.ends()[0]]
        assert steps == list(range(self.first, self.first + len(steps)))
        return steps


def kill(folder: Path, scores_mode: str, kills: int) -> int:
    """Kills processes that go on behind each other or from an earlier step, and returns how many rows they logged."""
    draw = random.Random(f"{scores_mode} {kills}")
    rows, holds = 0, EMPTY
    for place in range(kills):
        number = place % LIVES
        if number == 0:
            holds = EMPTY
        behind = max((row[0][1] + 1 for row in holds.rows), default=0)
        resumed = draw.random() < 0.3
        first = max(0, behind - draw.randrange(12)) if resumed else behind
        life = Life(folder / str(place // LIVES), scores_mode, number, first, resumed)
        steps = life.is_killed(draw.uniform(0, LONGEST))
        *done, possible = (life.logs(step)[1] for step in [*steps, first + len(steps)])
        holds = assert_all_reported_is_there(life.folder, holds, done, possible, scores_mode=scores_mode)
        rows += len(steps)
    return rows


@modes
def test_kill_loses_no_row(tmp_path: Path, scores_mode: str) -> None:
    assert kill(tmp_path, scores_mode, 15)


@pytest.mark.slow
@modes
def test_many_kills_lose_no_row(tmp_path: Path, scores_mode: str) -> None:
    rows = kill(tmp_path, scores_mode, 200)
    print(f"\n200 kills of a process that writes {scores_mode} survived, rows logged: {rows}, rows lost: 0")
