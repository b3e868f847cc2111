"""The strategies draw what they promise, and the oracle is right where a hand can follow."""

import importlib
import sys

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats
from mixture_core.testing import (
    Mixture,
    embeddings,
    labels,
    mixtures,
    oracle_batch_moments,
    oracle_derived,
    oracle_lloyd,
    oracle_merge,
    oracle_nearest,
    oracle_step,
    states,
)
from tests.core.common import assert_moments_close
from tests.tolerances import FLOAT64, relative_error

NAN = float("nan")


# Strategies


@given(embeddings(N=(2, 5), D=3, scale=0.1, offset=50.0, dtype=torch.float64))
def test_embeddings_are_of_the_sizes_and_where_they_should_be(x: Tensor) -> None:
    assert x.dtype == torch.float64
    assert x.shape[1] == 3
    assert 2 <= x.shape[0] <= 5
    assert (x - 50).abs().max() < 1


def test_embeddings_can_be_empty_repeated_and_bad() -> None:
    find(embeddings(), lambda x: x.shape[0] == 0)
    find(embeddings(D=4), lambda x: x.shape[0] > 1 and bool((x[0] == x[1]).all()))
    for bad in (torch.isnan, torch.isposinf, torch.isneginf):
        find(embeddings(with_bad_rows=True), lambda x, bad=bad: bool(bad(x).any()))


@given(mixtures(N=(1, 20), scale=0.5, separation=6.0, offset=-3.0, dtype=torch.float64))
def test_mixtures_are_as_separated_as_promised(mixture: Mixture) -> None:
    x, own, means = mixture
    between = (means[:, None] - means).norm(dim=2) + 1e9 * torch.eye(means.shape[0])
    assert between.min() >= 3.0 * (1 - FLOAT64)
    assert (x - means[own]).norm(dim=1).max() <= 0.5 * (1 + FLOAT64)
    assert torch.equal(oracle_nearest(x, means), own)


@given(labels(N=(3, 9), K=2), labels(K=3, with_ignored=False))
def test_labels_are_components_or_to_be_ignored(own: Tensor, others: Tensor) -> None:
    assert own.dtype == torch.int64
    assert 3 <= own.shape[0] <= 9
    assert set(own.tolist()) <= {0, 1, -1, -100}
    assert set(others.tolist()) <= {0, 1, 2}


@given(states(K=3, D=2, scale=2.0, dtype=torch.float64))
def test_states_are_states(state: MixtureState) -> None:
    m = state.moments
    assert (m.weight.shape, m.mean.shape, m.covariance.shape) == ((3,), (3, 2), (3, 2, 2))
    assert state.config.K == 3
    assert (m.weight >= 0).all()
    assert torch.equal(m.covariance, m.covariance.mT)
    assert torch.linalg.eigvalsh(m.covariance).min() > -FLOAT64


def test_states_cover_every_config_and_empty_components() -> None:
    for options in (
        {"mode": "ema"},
        {"mode": "per_batch"},
        {"mode": "label_supervised"},
        {"assigner": "label_supervised"},
    ):
        find(states(), lambda state, wanted=options: all(getattr(state.config, k) == v for k, v in wanted.items()))
    find(states(), lambda state: bool((state.moments.weight == 0).any()))


def test_missing_hypothesis_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "mixture_core.testing")
    with pytest.raises(ImportError) as raised:
        importlib.import_module("mixture_core.testing")
    message = "`mixture_core.testing` needs hypothesis: pip install 'mixture-diagnostics[testing]'."
    assert str(raised.value) == message


# The oracle


def test_oracle_nearest_by_hand() -> None:
    x = torch.tensor([[0.0], [2.0], [1.0], [NAN], [float("inf")], [1e14], [9.0]])
    assert oracle_nearest(x, torch.tensor([[2.0], [0.0], [2.0]])).tolist() == [1, 0, 0, -1, -1, -1, 0]
    assert oracle_nearest(x.double(), torch.tensor([[2.0], [0.0]])).tolist() == [1, 0, 0, -1, -1, 0, 0]


def test_oracle_batch_moments_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [NAN, 1.0], [8.0, 8.0]])
    R = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0], [5.0, 5.0, 5.0], [0.0, 2.0, 0.0]])
    moments = oracle_batch_moments(x, R)
    assert moments.weight.tolist() == [4.0, 2.0, 0.0]
    assert moments.mean.tolist() == [[1.0, 0.0], [8.0, 8.0], [0.0, 0.0]]
    assert moments.covariance[0].tolist() == [[3.0, 0.0], [0.0, 0.0]]  # (3 * 1 + 1 * 9) / 4
    assert not moments.covariance[1:].any()


@given(embeddings(N=(1, 12), D=2, dtype=torch.float64), st.integers(0, 12))
def test_oracle_merge_is_the_batch_of_both(x: Tensor, cut: int) -> None:
    R = torch.linspace(0.1, 2, x.shape[0])[:, None].double()
    parts = oracle_batch_moments(x[:cut], R[:cut]), oracle_batch_moments(x[cut:], R[cut:])
    assert_moments_close(oracle_merge(*parts), oracle_batch_moments(x, R), FLOAT64)


def test_oracle_derived_by_hand() -> None:
    moments = Moments(
        weight=torch.tensor([1.0, 3.0]),
        mean=torch.tensor([[0.0, 0.0], [4.0, 0.0]]),
        covariance=torch.eye(2).repeat(2, 1, 1),
    )
    derived = oracle_derived(moments)
    assert derived["pi"].tolist() == [0.25, 0.75]
    assert derived["B"].tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert (float(derived["trace_B"]), float(derived["opnorm_B"])) == (3.0, 3.0)
    assert relative_error(derived["participation_ratio"], torch.tensor(25 / 17)) < 1e-7  # (4 + 1)^2 / (4^2 + 1)


def test_oracle_lloyd_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [9.0], [11.0]])
    R, centroids = oracle_lloyd(x, torch.tensor([[0.0], [2.0], [50.0]]), iterations=2)
    assert R.argmax(dim=1).tolist() == [0, 0, 1, 1]
    assert centroids.tolist() == [[0.5], [10.0], [50.0]]


def test_oracle_step_by_hand() -> None:
    config = MixtureConfig(K=2, assigner="label_supervised", ema_decay=0.5)
    moments = Moments(
        weight=torch.tensor([2.0, 4.0]), mean=torch.tensor([[0.0], [5.0]]), covariance=torch.ones(2, 1, 1)
    )
    state = MixtureState(config=config, moments=moments)
    new, stats = oracle_step(state, torch.tensor([[2.0], [NAN], [7.0]]), torch.tensor([0, 0, -1]))
    assert isinstance(stats, StepStats)
    assert new.moments.weight.tolist() == [2.0, 2.0]
    assert new.moments.mean.tolist() == [[1.0], [5.0]]
    assert new.moments.covariance.flatten().tolist() == [1.5, 1.0]  # ((1 + 1^2) + (0 + 1^2)) / 2
    assert int(stats.n_ignored) == 2
