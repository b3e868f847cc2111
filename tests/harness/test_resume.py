"""A training run that is killed and resumed, over and over, leaves the files of one that never was."""

import random
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch.files.shards import save
from tests.harness.disks import Disk, Instant
from tests.harness.folders import EMPTY, Record, Step, found, loaded, recorded, writer
from tests.harness.processes import Child, assert_all_reported_is_there, is_killed, needs_fork
from tests.wrapper.samples import contents, mixture

pytestmark = [needs_fork, pytest.mark.filterwarnings("ignore")]

STEPS = 14
AN_EPOCH = 5  # steps
A_CHECKPOINT = 4  # steps
LONGEST = 100  # calls that change the disk, of a process

MODES = ("ema", "per_batch", "label_supervised")
ASSIGNERS = ("kmeans_online", "label_supervised")
SCORES_MODES = ("append", "per_step")
KINDS = [
    {"mode": mode, "assigner": assigner, "scores_mode": scores_mode}
    for mode, assigner, scores_mode in product(MODES, ASSIGNERS, SCORES_MODES)
]


def train(
    report: Callable[[int], None], *, folder: Path, options: dict[str, Any], killed_at: Instant | None = None
) -> None:
    """Trains from the last checkpoint to the end, unless it is killed before."""
    checkpoint = folder.with_suffix(".pt")
    with Disk(killed_at, is_killed).under():
        estimator = writer(folder, **options)
        if not checkpoint.exists():
            save(checkpoint, {"mixture": estimator.state_dict(), "step": 0})
        last = torch.load(checkpoint)
        estimator.load_state_dict(last["mixture"])
        report(last["step"])
        for step in range(last["step"], STEPS):
            estimator.update(*batch(step))
            estimator.log_step(step=step, epoch=step // AN_EPOCH)
            report(step)
            if step % A_CHECKPOINT == A_CHECKPOINT - 1:
                estimator.flush()
                save(checkpoint, {"mixture": estimator.state_dict(), "step": step + 1})
        estimator.close()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and labels of a step; the first ones are too few to start from."""
    return mixture(2 + step % 2, seed=step)


def uninterrupted(folder: Path, options: dict[str, Any]) -> list[Record]:
    """Trains without a kill, and returns what was to be recorded."""
    train(lambda _: None, folder=folder, options=options)
    estimator = writer(folder / "unused", **options)
    stats = [estimator.update(*batch(step)) for step in range(STEPS)]
    return [recorded(of, step=step, epoch=step // AN_EPOCH) for step, of in enumerate(stats)]


def kill_and_resume(place: Path, options: dict[str, Any], seed: int) -> int:
    """Kills and resumes until the run has ended, compares the files, and returns how often it was killed."""
    folder, scores_mode, draw = place / "run", options["scores_mode"], random.Random(str((options, seed)))
    records = uninterrupted(place / "uninterrupted", options)
    holds, kills, was_killed = EMPTY, 0, True
    while was_killed:
        instant = Instant(draw.randrange(LONGEST), draw.choice([0, 0, 1, 50]))
        child = Child(partial(train, folder=folder, options=options, killed_at=instant))
        first = child.report()
        steps, was_killed = child.ends()
        start = 0 if first is None else first
        *done, possible = (
            Step(records[step], resumed=step == start) if step < STEPS else None
            for step in range(start, start + len(steps) + 1)
        )
        holds = assert_all_reported_is_there(folder, holds, done, possible, scores_mode=scores_mode)
        kills += was_killed
    main = {name: data for name, data in contents(folder).items() if "superseded" not in name}
    assert main == contents(place / "uninterrupted")
    assert loaded(folder, scores_mode) == found(place / "uninterrupted").entries == [each.entry for each in records]
    assert holds.rows == [each.row for each in records]
    return kills


@pytest.mark.parametrize("options", KINDS[::5], ids=lambda options: "-".join(options.values()))
def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    assert kill_and_resume(tmp_path, options, 0)


@pytest.mark.slow
def test_many_resumed_runs_leave_the_files_of_uninterrupted_ones(tmp_path: Path) -> None:
    kills = 0
    for number, options in enumerate(KINDS):
        for seed in range(5):
            place = tmp_path / f"{number}-{seed}"
            place.mkdir()
            kills += kill_and_resume(place, options, seed)
    print(f"\n{kills} kills in {5 * len(KINDS)} runs that were resumed, files that differ: 0")
