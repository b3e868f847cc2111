"""Several calls of `update` in one step: gradient accumulation, and several losses."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixture_torch import NTXentLoss, activate, read_log, read_scores
from tests.wrapper.samples import all_bits, assert_close, estimator, mixture

LABELLED = {"assigner": "label_supervised"}
KINDS: dict[str, dict[str, Any]] = {
    "kmeans ema": {},
    "kmeans per_batch": {"mode": "per_batch"},
    "labels ema": LABELLED,
    "labels per_batch": {**LABELLED, "mode": "per_batch"},
    "labels alone": {"mode": "label_supervised"},
    "waiting": {"K": 30},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
FIGURES = ("pi", "mu", "Sigma", "B", "trace_B", "opnorm_B")


def parts(step: int, count: int = 3, N: int = 60) -> list[tuple[Tensor, Tensor]]:
    """The batch of a step in unequal parts, the last but one of which is empty."""
    x, labels = mixture(N, seed=step)
    sizes = [N - 5, 0, 5][:count]
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


@pytest.mark.parametrize("options", [KINDS[kind] for kind in KINDS if kind != "waiting"], ids=str)
def test_parts_of_a_step_are_its_batch(options: dict[str, Any]) -> None:
    whole, split = estimator(**options), estimator(**options)
    for step in range(4):
        expected = whole.update(*mixture(seed=step))
        for part in parts(step):
            stats = split.update(*part, step=step)
        assert_close(stats, {key: expected[key] for key in FIGURES}, 1e-5)


@pytest.mark.parametrize(
    ("tokens", "weight"),
    [
        ([None] * 3, 60 * 1.75),
        ([0, 1, 0], 60 * 1.75),
        ([0, None, 0], 60 * 1.75),
        ([0] * 3, 180),
        (["epoch 1, step 7"] * 2, 120),
        ([10**20] * 2, 120),
        ([np.int64(3), 3], 120),
    ],
    ids=str,
)
def test_calls_with_the_same_step_in_a_row_are_one_step(tokens: list[Any], weight: float) -> None:
    wrapper = estimator(ema_decay=0.5)
    for token in tokens:
        wrapper.update(mixture()[0], step=token)
    assert wrapper.state is not None
    assert float(wrapper.state.moments.weight.sum()) == weight


@pytest.mark.parametrize("spell", ["stats", "none"])
@kinds
def test_log_step_records_all_rows_of_the_step(options: dict[str, Any], spell: str, tmp_path: Path) -> None:
    with estimator(**options, log_dir=tmp_path, store_scores=True) as wrapper:
        R = []
        for step in range(3):
            found = [wrapper.update(*part, step=step) for part in parts(step)]
            wrapper.log_step(step=step, epoch=0, stats=found[-1] if spell == "stats" else None)
            R.append(torch.cat([stats["R"] for stats in found]))
    assert [torch.equal(entry["responsibilities"], rows) for entry, rows in zip(read_scores(tmp_path), R, strict=True)]
    assert [len(entry["responsibilities"]) for entry in read_scores(tmp_path)] == [60] * 3


def test_figures_of_a_step_are_nan_only_where_all_its_rows_are_ignored(tmp_path: Path) -> None:
    bad = torch.full((5, 4), float("nan"))
    with estimator(log_dir=tmp_path) as wrapper:
        for step, batches in enumerate([[mixture()[0], bad], [bad, mixture()[0]], [bad, bad]]):
            for batch in batches:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".* rows were ignored")
                    wrapper.update(batch, step=step)
            wrapper.log_step(step=step, epoch=0)
    assert np.isnan(read_log(tmp_path)["trace_B"]).tolist() == [False, False, True]


def test_refused_part_leaves_the_step_as_it_was() -> None:
    wrapper, expected = estimator(**LABELLED), estimator(**LABELLED)
    first, _, last = parts(0)
    for part in (first, last):
        expected.update(*part, step=0)
    wrapper.update(*first, step=0)
    with pytest.raises(ValueError, match="labels"):
        wrapper.update(last[0], last[1] + 7, step=0)
    wrapper.update(*last, step=0)
    assert all_bits(wrapper) == all_bits(expected)


def test_active_step_is_that_of_every_call_inside() -> None:
    wrapper, criterion = estimator(ema_decay=0.5), NTXentLoss()
    z1, z2 = mixture(20, seed=1)[0], mixture(20, seed=2)[0]
    for step in range(2):
        with activate(wrapper, step=step):
            criterion(z1, z2)
            criterion(z2, z1)
    assert wrapper.state is not None
    assert float(wrapper.state.moments.weight.sum()) == 80 * 1.5


@pytest.mark.parametrize("step", [1.5, True, [1], torch.tensor(1)])
def test_step_of_another_type_is_refused(step: Any) -> None:
    wrapper = estimator()
    with pytest.raises(TypeError, match=r"^`step` must be an integer, a text or None, got "):
        wrapper.update(mixture()[0], step=step)
    assert wrapper.state is None


def test_rows_that_wait_are_the_estimators_own() -> None:
    wrapper, expected, buffer = estimator(K=5), estimator(K=5), torch.empty(10, 4)
    for seed in range(2):
        batch = mixture(10, seed=seed)[0]
        expected.update(batch, step=0)
        wrapper.update(buffer.copy_(batch), step=0)
    assert all_bits(wrapper) == all_bits(expected)


def test_step_that_begins_without_a_row_moves_dead_components_all_the_same() -> None:
    moved = {}
    for first in (None, torch.zeros(0, 2)):
        wrapper, moved[first is None] = estimator(K=2, ema_decay=0.05), 0  # a window of 2 steps
        wrapper.update(mixture(40, K=2, D=2)[0])
        for step in range(6):
            if first is not None:
                moved[False] += int(wrapper.update(first, step=step)["n_relocated"])
            one_cluster = mixture(80, K=2, D=2, seed=step)[0][::2]
            moved[first is None] += int(wrapper.update(one_cluster, step=step)["n_relocated"])
    assert moved[True] == moved[False] > 0
