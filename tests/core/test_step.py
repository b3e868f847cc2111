"""One step of the estimator: which responsibilities, which moments, which state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, batch_moments, init, step
from mixture_core.testing import Mixture, embeddings, labels, mixtures, oracle_derived, oracle_step, states
from tests.core.common import assert_moments_close, assert_same_bits, gaussians, unit_norm_mixtures
from tests.tolerances import FAR_FROM_ZERO, FLOAT32, FLOAT64, relative_error

NAN = float("nan")
UNUSABLE_BATCHES = [
    torch.zeros(0, 3),
    torch.full((4, 3), NAN),
    torch.full((1, 3), float("inf")),
    -1e30 * torch.ones(2, 3),
]
MODES = [
    {"mode": "ema"},
    {"mode": "per_batch"},
    {"mode": "ema", "assigner": "label_supervised"},
    {"mode": "per_batch", "assigner": "label_supervised"},
    {"mode": "label_supervised"},
]


def warm(config: MixtureConfig, *, D: int = 3) -> MixtureState:
    """A state after three steps, of width D."""
    x, own, _ = gaussians(7, N=90, D=D, K=config.K)
    state = init(config, x[:30])
    for rows in (slice(0, 30), slice(30, 60), slice(60, 90)):
        state, _ = step(state, x[rows], own[rows])
    return state


# Against the oracle


@given(states(D=3, dtype=torch.float64), embeddings(D=3, dtype=torch.float64, with_bad_rows=True), st.data())
def test_step_from_any_state_equals_the_oracle(state: MixtureState, x: Tensor, data: st.DataObject) -> None:
    given_labels = data.draw(labels(N=x.shape[0], K=state.config.K))
    new, stats = step(state, x, given_labels)
    expected, expected_stats = oracle_step(state, x, given_labels)
    assert torch.equal(stats.R, expected_stats.R)
    assert stats.n_ignored == expected_stats.n_ignored
    assert_moments_close(new.moments, expected.moments, FLOAT64)


@pytest.mark.parametrize("mode", MODES)
@given(mixture=mixtures(N=30, K=(2, 5)))
def test_step_after_step_equals_the_oracle(mode: dict[str, str], mixture: Mixture) -> None:
    x, own, means = mixture
    state = expected = init(MixtureConfig(K=means.shape[0], **mode), x[:10])
    for rows in (slice(0, 10), slice(10, 12), slice(12, 30)):
        state, stats = step(state, x[rows], own[rows])
        expected, expected_stats = oracle_step(expected, x[rows], own[rows])
        assert torch.equal(stats.R, expected_stats.R.float())
        assert_moments_close(state.moments, expected.moments, FLOAT32, scale=10.0)


@given(unit_norm_mixtures())
def test_steps_of_unit_norm_rows_of_small_spread_equal_the_oracle(mixture: Mixture) -> None:
    x, _, means = mixture
    state = expected = init(MixtureConfig(K=means.shape[0]), x)
    for rows in (x, x[::2], x[1::3]):
        state, stats = step(state, rows)
        expected, expected_stats = oracle_step(expected, rows)
        assert torch.equal(stats.R, expected_stats.R.float())
    for name, value in oracle_derived(expected.moments).items():
        assert relative_error(stats[name], value) < FAR_FROM_ZERO, name


# The modes


@given(mixtures(K=(2, 5)), st.sampled_from(MODES))
def test_first_step_reads_the_batch_alone(mixture: Mixture, mode: dict[str, str]) -> None:
    x, own, means = mixture
    _, stats = step(init(MixtureConfig(K=means.shape[0], **mode), x), x, own)
    batch = batch_moments(x, stats.R)
    occupied = batch.weight > 0
    assert torch.equal(stats.moments.weight, batch.weight)
    assert torch.equal(stats.mu[occupied], batch.mean[occupied])
    assert relative_error(stats.Sigma, batch.covariance) <= FLOAT32


@pytest.mark.parametrize("mode", MODES[1:4:2] + MODES[4:])
def test_modes_that_do_not_average_forget_the_steps_before(mode: dict[str, str]) -> None:
    x, own, _ = gaussians(1, N=40, D=3, K=3)
    config = MixtureConfig(K=3, **mode)
    fresh = init(config, x)
    old = MixtureState(config=config, moments=warm(config).moments)
    if not config.uses_labels:  # the centroids are remembered: give both the same
        weight, covariance = fresh.moments.weight, fresh.moments.covariance
        fresh = MixtureState(
            config=config, moments=Moments(weight=weight, mean=old.moments.mean, covariance=covariance)
        )
    assert_same_bits(step(old, x, own)[0].moments, step(fresh, x, own)[0].moments)


@pytest.mark.parametrize("mode", [MODES[1], *MODES[3:]])
def test_component_without_rows_in_a_mode_that_does_not_average_keeps_its_mean_under_k_means_alone(
    mode: dict[str, str],
) -> None:
    state = warm(config := MixtureConfig(K=3, **mode))
    own = state.moments.mean[1] + torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    new = step(state, own, torch.ones(20, dtype=torch.int64))[0].moments
    assert new.weight.tolist() == [0.0, 20.0, 0.0]
    assert torch.equal(new.mean[[0, 2]], 0 * new.mean[[0, 2]] if config.uses_labels else state.moments.mean[[0, 2]])
    assert not new.covariance[[0, 2]].any()


# Rows that are ignored


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", UNUSABLE_BATCHES)
def test_batch_without_a_usable_row_leaves_the_state(mode: dict[str, str], batch: Tensor) -> None:
    state = warm(MixtureConfig(K=4, **mode))
    new, stats = step(state, batch, torch.zeros(batch.shape[0], dtype=torch.int64))
    assert_same_bits(new.moments, state.moments)
    assert_same_bits(stats.moments, state.moments)
    assert int(stats.n_ignored) == batch.shape[0]
    assert torch.equal(stats.R, torch.zeros(batch.shape[0], 4))


@given(embeddings(N=(1, 16), D=3, scale=10.0, with_bad_rows=True), st.sampled_from(MODES), st.data())
def test_bad_rows_count_for_nothing_but_n_ignored(x: Tensor, mode: dict[str, str], data: st.DataObject) -> None:
    state = warm(MixtureConfig(K=4, **mode))
    own = data.draw(labels(N=x.shape[0], K=4, with_ignored=False))
    usable = (x.abs() < 1e13).all(dim=1)
    new, stats = step(state, x, own)
    expected, expected_stats = step(state, x[usable], own[usable])
    assert stats.n_ignored == (~usable).sum()
    assert torch.equal(stats.R[usable], expected_stats.R)
    assert not stats.R[~usable].any()
    assert_moments_close(new.moments, expected.moments, FLOAT32, scale=10.0)


@pytest.mark.parametrize("label", [-1, -100, -2, 3, 10**12, -(2**63)])
def test_labels_outside_the_components_are_ignored(label: int) -> None:
    state = warm(MixtureConfig(K=3, assigner="label_supervised"))
    x = torch.randn(4, 3)
    new, stats = step(state, x, torch.tensor([0, label, 2, label]))
    expected, _ = step(state, x[[0, 2]], torch.tensor([0, 2]))
    assert stats.n_ignored == 2
    assert_moments_close(new.moments, expected.moments, FLOAT32)


# init


def test_init_is_centroids_without_weight() -> None:
    x, _, _ = gaussians(0)
    moments = init(MixtureConfig(K=8), x).moments
    assert not moments.weight.any()
    assert not moments.covariance.any()
    assert (moments.mean[:, None] - x).abs().amax(dim=2).amin(dim=1).max() < FLOAT32 * x.abs().max()  # rows of x


def test_init_follows_the_generator() -> None:
    x = gaussians(0).embeddings
    means = [init(MixtureConfig(), x, generator=torch.Generator().manual_seed(s)).moments.mean for s in (1, 1, 2)]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])
