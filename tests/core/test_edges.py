"""Shapes and sizes at the edge of what there is."""

import pytest
import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats, batch_moments, init, step
from mixture_core.testing import oracle_derived, oracle_step
from tests.core.common import assert_moments_close, gaussians
from tests.tolerances import FLOAT32, relative_error

SHAPES = [
    (0, 3, 4), (1, 3, 4), (1, 1, 1), (2, 3, 5), (5, 3, 5), (20, 1, 3), (20, 1, 1), (20, 2, 7), (20, 30, 3), (3, 30, 8),
    (7, 5, 1),
]  # fmt: skip  # N, D, K
MODES = [{"mode": "ema"}, {"mode": "per_batch"}, {"assigner": "label_supervised"}, {"mode": "label_supervised"}]


def steps(config: MixtureConfig, *batches: tuple[Tensor, Tensor]) -> tuple[MixtureState, StepStats, MixtureState]:
    """State and stats after some steps, and the oracle's state."""
    state = expected = init(config, batches[0][0])
    for x, labels in batches:
        state, stats = step(state, x, labels)
        expected, _ = oracle_step(expected, x, labels)
    return state, stats, expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
def test_steps_of_any_shape_equal_the_oracle(N: int, D: int, K: int, mode: dict[str, str]) -> None:
    x, labels, _ = gaussians(0, N=N + 8, D=D, K=K)
    config = MixtureConfig(K=K, **mode)
    state, stats, expected = steps(config, (x[:N], labels[:N]), (x[N:], labels[N:]), (0.9 * x[N:], labels[N:]))
    assert stats.R.shape == (8, K)
    assert_moments_close(state.moments, expected.moments, FLOAT32, scale=14.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1000.1])
def test_rows_that_coincide_have_no_variance(value: float, mode: dict[str, str]) -> None:
    x, labels = torch.full((17, 3), value), torch.arange(17) % 4
    _, stats, _ = steps(MixtureConfig(K=4, **mode), (x, labels), (x[:5], labels[:5]), (x, labels))
    unit = (FLOAT32 * value) ** 2  # rounding of the mean, squared
    assert stats.Sigma.abs().max() <= unit
    assert stats.trace_B <= unit
    assert (stats.mu[stats.pi > 0] - value).abs().max() <= FLOAT32 * abs(value)
    assert relative_error(stats.pi.sum(), torch.tensor(1.0)) <= FLOAT32


def test_single_component_has_nothing_between() -> None:
    x = gaussians(0, N=50, D=3, K=2).embeddings + 1000
    _, stats, _ = steps(MixtureConfig(K=1), (x, x), (x[:20], x))
    assert not stats.B.any()
    assert (float(stats.trace_B), float(stats.opnorm_B), stats.pi.tolist()) == (0.0, 0.0, [1.0])


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e6, 1e11])
@pytest.mark.parametrize("mode", MODES)
def test_steps_of_extreme_scale_equal_the_oracle(scale: float, mode: dict[str, str]) -> None:
    x, labels, _ = gaussians(0, N=60, D=5, K=4)
    x = x * scale
    config = MixtureConfig(K=4, **mode)
    _, stats, expected = steps(config, (x[:30], labels[:30]), (x[30:], labels[30:]))
    for name, value in oracle_derived(expected.moments).items():
        assert relative_error(stats[name], value) <= FLOAT32, name


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-20])
def test_rows_whose_squares_vanish_stay_finite(scale: float) -> None:
    x, labels, _ = gaussians(0, N=60, D=5, K=4)
    _, stats, _ = steps(MixtureConfig(K=4), (scale * x, labels), (scale * x, labels))
    assert all(value.isfinite().all() for value in stats.values())
    assert relative_error(stats.pi.sum(), torch.tensor(1.0)) <= FLOAT32


@pytest.mark.parametrize("value", [2e13, 3e38])
def test_rows_too_large_to_square_are_ignored(value: float) -> None:
    x = gaussians(0, N=60, D=5, K=4).embeddings
    state, _ = step(init(MixtureConfig(K=4), x), x)
    huge = x.clone()
    huge[7, 2] = value
    new, stats = step(state, huge)
    assert stats.n_ignored == 1
    assert_moments_close(new.moments, step(state, x[torch.arange(60) != 7])[0].moments, FLOAT32)


@pytest.mark.parametrize("value", [1e12, -1.7e13])
def test_rows_just_small_enough_to_square_give_finite_statistics(value: float) -> None:
    x = torch.full((4096, 64), value)
    x[::2] *= -1
    _, stats = step(init(MixtureConfig(K=2), x), x)
    assert stats.n_ignored == 0
    assert all(statistic.isfinite().all() for statistic in stats.values())
    assert relative_error(stats.trace_B, torch.tensor(64 * value**2)) <= FLOAT32


def test_weights_of_very_long_runs_stay_finite() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    config = MixtureConfig(K=2, ema_decay=0.999999)
    state, _ = step(init(config, x), x)
    heavy = Moments(weight=torch.tensor([1e30, 3e37]), mean=state.moments.mean, covariance=state.moments.covariance)
    _, stats = step(MixtureState(config=config, moments=heavy), x)
    assert all(value.isfinite().all() for value in stats.values())
    assert relative_error(stats.mu, heavy.mean) <= FLOAT32


@pytest.mark.parametrize("weight", [1e-45, 1e-40, 1e-30])
def test_components_of_vanishing_weight_take_the_new_rows(weight: float) -> None:
    config = MixtureConfig(K=2, assigner="label_supervised")
    faded = Moments(weight=torch.tensor([weight, 3.0]), mean=torch.ones(2, 2), covariance=torch.ones(2, 2, 2))
    x, labels = torch.randn(10, 2), torch.zeros(10, dtype=torch.int64)
    new = step(MixtureState(config=config, moments=faded), x, labels)[0].moments
    batch = batch_moments(x, torch.ones(10, 1))
    assert relative_error(new.mean[0], batch.mean[0]) <= FLOAT32
    assert relative_error(new.covariance[0], batch.covariance[0]) <= FLOAT32
    assert torch.equal(new.covariance[1], faded.covariance[1])
