"""The moments of a batch, and what is derived from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureState, Moments, batch_moments, responsibilities_from_labels
from mixture_core.testing import Mixture, embeddings, mixtures, oracle_batch_moments, oracle_derived, states
from tests.core.common import (
    DERIVED,
    assert_moments_close,
    gaussians,
    soft,
    stack,
    unit_norm_mixtures,
)
from tests.tolerances import FAR_FROM_ZERO, FLOAT32, FLOAT64, relative_error


def one_hot(mixture: Mixture) -> Tensor:
    return responsibilities_from_labels(mixture.labels, mixture.means.shape[0])


def assert_derived_like_oracle(moments: Moments, expected: Moments, tolerance: float) -> None:
    for name, value in oracle_derived(expected).items():
        error = relative_error(getattr(moments, name), value)
        assert error < tolerance, (name, error)


# Against the oracle


@pytest.mark.parametrize(
    ("drawn", "tolerance"),
    [
        (mixtures(K=(2, 6)), FLOAT32),
        (mixtures(K=(2, 6), offset=1000.0), FAR_FROM_ZERO),
        (unit_norm_mixtures(), FAR_FROM_ZERO),
    ],
    ids=["random", "moved by 1000", "unit norm"],
)
@given(data=st.data())
def test_statistics_of_mixtures_equal_the_oracle(
    data: st.DataObject, drawn: st.SearchStrategy[Mixture], tolerance: float
) -> None:
    mixture = data.draw(drawn)
    R = one_hot(mixture)
    moments = batch_moments(mixture.embeddings, R)
    assert_derived_like_oracle(moments, oracle_batch_moments(mixture.embeddings, R), tolerance)


@given(mixtures(K=(2, 6)), st.data())
def test_statistics_under_soft_responsibilities_equal_the_oracle(mixture: Mixture, data: st.DataObject) -> None:
    x = mixture.embeddings
    R = one_hot(mixture) + 0.2 * data.draw(soft(N=x.shape[0], K=mixture.means.shape[0]))
    assert_derived_like_oracle(batch_moments(x, R), oracle_batch_moments(x, R), FLOAT32)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_covariances_of_tight_components_far_apart_equal_the_oracle(spread: float) -> None:
    # Classes that have collapsed, each onto a point of its own, as they do late in supervised training.
    mixture = gaussians(0, N=400, D=8, K=4, apart=1.0 / spread)
    x, R = mixture.embeddings * spread, one_hot(mixture)
    assert relative_error(batch_moments(x, R).Sigma, oracle_batch_moments(x, R).Sigma) < FLOAT32


def moments_of_two_points() -> Moments:
    """Of 2048 rows of 0.7 and as many of -0.7: float32 sums, one row after the other, are wrong in the fifth digit."""
    x = torch.full((4096, 3), 0.7)
    x[::2] *= -1
    return batch_moments(x, responsibilities_from_labels(torch.arange(4096) % 2, 2))


def test_means_of_a_large_batch_do_not_drift() -> None:
    moments = moments_of_two_points()
    assert relative_error(moments.mu, torch.tensor([[-0.7] * 3, [0.7] * 3])) < FLOAT32
    assert relative_error(moments.B, torch.full((3, 3), 0.49)) < FLOAT32


def test_covariances_of_a_large_batch_are_free_of_the_rounding_of_means() -> None:
    assert moments_of_two_points().Sigma.abs().max() < (0.1 * FLOAT32) ** 2


@given(embeddings(dtype=torch.float64, with_bad_rows=True), st.data())
def test_batch_moments_in_float64_equal_the_oracle(x: Tensor, data: st.DataObject) -> None:
    R = data.draw(soft(N=x.shape[0], K=3)).double()
    assert_moments_close(batch_moments(x, R), oracle_batch_moments(x, R), FLOAT64)


def test_rows_of_weight_1_in_two_components_count_for_both() -> None:
    x, R = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.ones(6, 2)
    assert_moments_close(batch_moments(x, R), oracle_batch_moments(x, R), FLOAT32)


# Properties of a batch's moments


@given(embeddings(N=(1, 32), with_bad_rows=True), st.data())
def test_batch_moments_with_bad_rows_are_those_without_them(x: Tensor, data: st.DataObject) -> None:
    R = data.draw(soft(N=x.shape[0], K=3))
    usable = (x.abs() < 1e13).all(dim=1)
    assert_moments_close(batch_moments(x, R), batch_moments(x[usable], R[usable]), FLOAT32)


# Derived quantities


@given(states())
def test_derived_quantities_of_a_state_equal_the_oracle(state: MixtureState) -> None:
    assert_derived_like_oracle(state.moments, state.moments, FLOAT32)


@given(states(K=4, D=3), states(K=4, D=3))
def test_derived_quantities_accept_leading_batch_dimensions(first: MixtureState, second: MixtureState) -> None:
    moments = first.moments, second.moments
    stacked = stack(stack(*moments), stack(*moments))
    for name in DERIVED:
        expected = torch.stack([getattr(m, name) for m in moments])
        assert relative_error(getattr(stacked, name), torch.stack([expected, expected])) <= FLOAT32, name


@pytest.mark.parametrize(("K", "D"), [(3, 5), (5, 3), (1, 4), (4, 1)])
def test_derived_quantities_without_weight_are_zero(K: int, D: int) -> None:
    moments = Moments(weight=torch.zeros(K), mean=torch.randn(K, D), covariance=torch.zeros(K, D, D))
    assert not any(getattr(moments, name).any() for name in ("pi", "B", "trace_B", "opnorm_B", "participation_ratio"))


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("D", [2, 8, 300])
def test_opnorm_of_nearly_equal_eigenvalues_equals_the_oracle(gap: float, D: int) -> None:
    # Four means on two axes: B has two eigenvalues, 1/2 and (1 - gap)^2 / 2.
    mean = torch.zeros(4, D)
    mean[0, 0], mean[1, 0], mean[2, 1], mean[3, 1] = 1.0, -1.0, 1.0 - gap, gap - 1.0
    moments = Moments(weight=torch.ones(4), mean=mean, covariance=torch.zeros(4, D, D))
    assert relative_error(moments.opnorm_B, oracle_derived(moments)["opnorm_B"]) <= FLOAT32


def test_what_is_derived_of_damaged_moments_is_nan_and_raises_nothing() -> None:
    mean = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    mean[1, 2] = float("nan")
    damaged = Moments(weight=torch.ones(3), mean=mean, covariance=torch.zeros(3, 5, 5))
    assert damaged.opnorm_B.isnan()
    assert damaged.trace_B.isnan()
