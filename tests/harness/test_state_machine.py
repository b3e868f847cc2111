"""Whatever is done to an estimator in whatever order, its files are what a simple model says."""

import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from mixture_torch import MixtureStats
from tests.harness.disks import CHANGES, refuses
from tests.harness.folders import EMPTY, Contents, Record, Step, found, loaded, logged, recorded, writer
from tests.wrapper.samples import mixture

SEEDS = 3
AN_EPOCH = 4  # steps


def batch(seed: int, step: int) -> Tensor:
    """Embeddings of a step of a training run; the first ones are too few to start from."""
    return mixture(2 + step % 2, seed=1000 * seed + step)[0]


@functools.cache
def uninterrupted(seed: int) -> tuple[MixtureStats, list[Record]]:
    """A training run that writes nothing and is never interrupted, and what its steps should leave."""
    return MixtureStats(K=3, enabled=True), []


def record_of(seed: int, step: int) -> Record:
    """What a step of a training run should leave, whatever happened before it."""
    estimator, records = uninterrupted(seed)
    while len(records) <= step:
        place = len(records)
        records.append(recorded(estimator.update(batch(seed, place)), step=place, epoch=place // AN_EPOCH))
    return records[step]


class Training(RuleBasedStateMachine):
    """A training run, what happens to it, and what should be in its folder.

    A killed process leaves its folder behind and nothing else. So the folder is copied as it is, and the estimator that
    goes on in the copy shares nothing with the one that was killed.
    """

    scores_mode = "append"
    rules_run = 0

    def __init__(self) -> None:
        super().__init__()
        self._root = Path(tempfile.mkdtemp())
        self._refusal: pytest.MonkeyPatch | None = None
        self._lives = 0
        self._holds: Contents = EMPTY
        self._kept: list[Step] = []  # that could not be written yet
        self._checkpoints: list[tuple[dict[str, Any], int, int]] = []  # state_dict, seed and step
        self._begin(0)

    @property
    def _folder(self) -> Path:
        return self._root / str(self._lives)

    def _begin(self, seed: int) -> None:
        self._estimator = writer(self._folder, self.scores_mode)
        self._seed, self._step, self._resumed, self._is_open = seed, 0, False, False

    def _written(self) -> None:
        """Takes what was kept for written, where the disk takes anything."""
        if self._refusal is None:
            for step in self._kept:
                self._holds = logged(self._holds, step, scores_mode=self.scores_mode)
            self._kept = []

    def _recover(self) -> None:
        if self._refusal is not None:
            self._refusal.undo()
            self._refusal = None

    @initialize()
    def first_checkpoint(self) -> None:
        self.save()

    @rule(count=st.integers(1, 4))
    def train(self, count: int) -> None:
        for _ in range(count):
            self._estimator.update(batch(self._seed, self._step))
            self._estimator.log_step(step=self._step, epoch=self._step // AN_EPOCH)
            self._kept.append(Step(record_of(self._seed, self._step), self._resumed))
            self._step, self._resumed, self._is_open = self._step + 1, False, True
            self._written()

    @rule()
    def update_without_log_step(self) -> None:
        self._estimator.update(batch(self._seed, self._step))
        self._step += 1

    @rule()
    def save(self) -> None:
        self._checkpoints.append((self._estimator.state_dict(), self._seed, self._step))

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        state_dict, self._seed, self._step = data.draw(st.sampled_from(self._checkpoints))
        self._estimator.load_state_dict(state_dict)
        self._resumed = True

    @rule()
    def flush(self) -> None:
        self._estimator.flush()
        if self._is_open:
            self._written()
            self._assert_loads()

    @rule()
    def close(self) -> None:
        self._estimator.close()
        if self._is_open:
            self._written()
            self._assert_loads()

    @rule(seed=st.integers(0, SEEDS - 1), resumes=st.booleans(), data=st.data())
    def reopen(self, seed: int, resumes: bool, data: st.DataObject) -> None:
        """A process ends and another one begins, with a checkpoint or without."""
        self.close()
        self._begin(seed)  # what the disk has not taken is lost with the process, which says so
        if self._kept:
            gc.collect()  # or the estimator would write it when it is collected, after the disk has recovered
        self._kept = []
        if resumes:
            self.load(data)

    @rule(seed=st.integers(0, SEEDS - 1), resumes=st.booleans(), data=st.data())
    def kill(self, seed: int, resumes: bool, data: st.DataObject) -> None:
        self._recover()
        left, killed = self._folder, self._estimator
        self._lives += 1
        if left.exists():
            shutil.copytree(left, self._folder)
        self._begin(seed)
        self._kept = []
        killed.close()
        if resumes:
            self.load(data)

    @precondition(lambda self: self._refusal is None)
    @rule()
    def disk_refuses(self) -> None:
        self._refusal = pytest.MonkeyPatch()
        for name in set(CHANGES) - {"close"}:
            self._refusal.setattr(os, name, lambda *_, **__: refuses())

    @precondition(lambda self: self._refusal is not None)
    @rule()
    def disk_takes_again(self) -> None:
        self._recover()

    @invariant()
    def files_are_what_the_model_says(self) -> None:
        type(self).rules_run += 1
        assert found(self._folder) == self._holds

    def teardown(self) -> None:
        self._recover()
        self._estimator.close()
        if self._is_open:
            self._written()
        assert found(self._folder) == self._holds
        shutil.rmtree(self._root)

    def _assert_loads(self) -> None:
        if self._refusal is None and self._holds.rows:
            assert loaded(self._folder, self.scores_mode) == self._holds.entries


class TrainingPerStep(Training):
    """The same, with a file for each step's responsibilities."""

    scores_mode = "per_step"
    rules_run = 0


machines = pytest.mark.parametrize("machine", [Training, TrainingPerStep])


@machines
@pytest.mark.filterwarnings("ignore")
def test_files_are_what_a_simple_model_says(machine: type[Training]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=25))


@pytest.mark.slow
@machines
@pytest.mark.filterwarnings("ignore")
def test_files_are_what_a_simple_model_says_at_length(machine: type[Training]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=50, derandomize=False))
    print(f"\n{machine.rules_run} states of {machine.scores_mode} compared with the model, differences: 0")
