"""Rows that cannot be used, and batches without a row that can."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixture_torch import read_log
from tests.wrapper.samples import bits, estimator, mixture, unchanged, update_quietly

NAN, INF = float("nan"), float("inf")
BAD = [NAN, INF, -INF, 1e30]
LABELLED = {"assigner": "label_supervised"}


def spoiled(value: float = NAN, *, row: int = 7) -> Tensor:
    x, _ = mixture()
    x[row, 2] = value
    return x


def test_bad_rows_are_warned_about_once() -> None:
    wrapper = estimator()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            wrapper.update(spoiled(row=step))
    assert [str(warning.message).split(";")[0].split(" (")[0] for warning in caught] == ["1 of 60 rows were ignored"]


def test_warning_points_at_the_line_that_called_update() -> None:
    with pytest.warns(UserWarning, match="rows were ignored") as caught:
        estimator().update(spoiled())
    assert caught[0].filename == __file__


def test_ignored_labels_mean_nothing_to_kmeans() -> None:
    x, labels = mixture()
    assert int(estimator().update(x, torch.full_like(labels, -1))["n_ignored"]) == 0


IDLE = {
    "no row": lambda: (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    "NaN": lambda: (torch.full((5, 4), NAN), torch.zeros(5, dtype=torch.int64)),
    "one Inf a row": lambda: (torch.eye(4) / (1 - torch.eye(4)), torch.zeros(4, dtype=torch.int64)),
}
idle = pytest.mark.parametrize("batch", [make() for make in IDLE.values()], ids=IDLE.keys())
KINDS = [{}, LABELLED, {"mode": "per_batch"}, {"mode": "label_supervised"}, {"K": 30}]


@idle
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_idle_batch_leaves_the_state_and_the_stats_to_the_bit(
    batch: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    wrapper = estimator(**options)
    stats = bits(wrapper.update(*mixture()))
    before = bits(wrapper.state_dict())
    after = bits(update_quietly(wrapper, *batch))
    assert bits(wrapper.state_dict()) == before
    own = ("R", "n_ignored", "n_relocated", "counts")  # of the batch, not of the mixture
    assert {key: value for key, value in after.items() if key not in own} == {
        key: value for key, value in stats.items() if key not in own
    }


@idle
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_idle_batch_at_the_very_first_leaves_no_trace(batch: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    wrapper, expected = estimator(**options), estimator(**options)
    update_quietly(wrapper, *batch)
    for step in range(3):
        x, labels = mixture(seed=step)
        assert bits(wrapper.update(x, labels)) == bits(expected.update(x, labels))


@idle
def test_idle_batch_has_nan_for_figures(batch: tuple[Tensor, Tensor], tmp_path: Any) -> None:
    wrapper = estimator(log_dir=tmp_path)
    for step, embeddings in enumerate((batch[0], mixture()[0], batch[0], mixture()[0])):
        update_quietly(wrapper, embeddings)
        wrapper.log_step(step=step, epoch=0)
    log = read_log(tmp_path)
    for column in ("pi_min", "pi_max", "trace_B", "opnorm_B"):
        assert np.isnan(log[column]).tolist() == [True, False, True, False]


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("value", BAD)
def test_strict_refuses_a_bad_row(value: float, first: bool) -> None:
    wrapper = estimator(strict=True)
    if not first:
        wrapper.update(mixture()[0])
    with unchanged(wrapper), pytest.raises(ValueError, match=r"^`strict` is set, but 1 of 60 rows were ignored .*\.$"):
        wrapper.update(spoiled(value))


def test_strict_refuses_an_ignored_label() -> None:
    wrapper, (x, labels) = estimator(strict=True, **LABELLED), mixture()
    wrapper.update(x, labels)
    labels[3] = -1
    with unchanged(wrapper), pytest.raises(ValueError, match=r"^`strict` is set, but 1 of 60 rows were ignored .*\.$"):
        wrapper.update(x, labels)
