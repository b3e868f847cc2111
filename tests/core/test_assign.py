"""Responsibilities from k-means and from labels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, assign, lloyd, responsibilities_from_labels
from mixture_core.testing import Mixture, labels, mixtures, oracle_lloyd, oracle_nearest
from tests.core.common import gaussians, unit_norm_mixtures
from tests.tolerances import FLOAT64, relative_error


def index(R: Tensor) -> Tensor:
    """Which component each row belongs to, -1 where to none."""
    return torch.where(R.sum(dim=1) > 0, R.argmax(dim=1), -1)


def state_at(means: Tensor) -> MixtureState:
    K, D = means.shape
    return MixtureState(
        config=MixtureConfig(K=K),
        moments=Moments(weight=means.new_ones(K), mean=means, covariance=means.new_zeros(K, D, D)),
    )


# Nearest centroids


@given(mixtures())
def test_assignments_of_random_mixtures_equal_the_oracle(mixture: Mixture) -> None:
    x, _, means = mixture
    assert torch.equal(index(assign(state_at(means), x)), oracle_nearest(x, means))


@given(unit_norm_mixtures(scale=1e-4))
def test_assignments_of_unit_norm_rows_of_spread_1e_minus_4_equal_the_oracle(mixture: Mixture) -> None:
    x, _, means = mixture
    assert torch.equal(index(assign(state_at(means), x)), oracle_nearest(x, means))


def test_assignments_of_a_collapsed_batch_beside_centroids_left_behind_equal_the_oracle() -> None:
    collapsed = gaussians(2, N=64, D=8, K=4)
    x, means = 1.0 + 1e-4 * collapsed.embeddings, 1.0 + 1e-4 * collapsed.means
    means = torch.cat([means, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 30])
    assert torch.equal(index(assign(state_at(means), x)), oracle_nearest(x, means))


@pytest.mark.parametrize("outlier", [1e4, 1e6, 1e8, 1e12])
def test_assignments_beside_an_outlier_equal_the_oracle(outlier: float) -> None:
    x, _, means = gaussians(0)
    x[0] = outlier
    expected = oracle_nearest(x, means)
    assert torch.equal(index(assign(state_at(means), x))[1:], expected[1:])


@pytest.mark.parametrize("centroids", [[1.0, 3.0], [3.0, 1.0], [3.0, 1.0, 3.0, 1.0]])
def test_tie_between_centroids_goes_to_the_lowest_index(centroids: list[float]) -> None:
    R, _ = lloyd(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor(centroids)[:, None], iterations=1)
    assert index(R).tolist() == [centroids.index(1.0), 0, centroids.index(3.0)]


@pytest.mark.parametrize(("K", "D", "N"), [(2, 3, 64), (9, 16, 513), (17, 33, 64), (33, 16, 2), (33, 128, 513)])
def test_tie_between_equal_centroids_goes_to_the_lowest_index(K: int, D: int, N: int) -> None:
    generator = torch.Generator().manual_seed(K * D * N)
    x, point = torch.randn(N, D, generator=generator), torch.randn(1, D, generator=generator)
    R, _ = lloyd(x, point.expand(K, D).clone(), iterations=1)
    assert (index(R) == 0).all()


# Lloyd iterations


@given(mixtures(K=(1, 5), D=4, separation=4.0, dtype=torch.float64), st.integers(1, 5), st.data())
def test_lloyd_equals_the_oracle(mixture: Mixture, iterations: int, data: st.DataObject) -> None:
    x = mixture.embeddings
    start = x[data.draw(st.lists(st.integers(0, x.shape[0] - 1), min_size=1, max_size=6, unique=True))]
    R, centroids = lloyd(x, start, iterations=iterations)
    expected_R, expected = oracle_lloyd(x, start, iterations=iterations)
    assert torch.equal(R, expected_R)
    assert relative_error(centroids, expected) <= FLOAT64


def test_lloyd_leaves_a_centroid_without_rows_where_it_was() -> None:
    far = torch.tensor([[1e6 / 3, -1e-6 / 3]])
    _, centroids = lloyd(torch.randn(20, 2), torch.cat([torch.zeros(1, 2), far]), iterations=3)
    assert torch.equal(centroids[1:], far)


def test_lloyd_leaves_a_centroid_that_lost_its_rows_where_it_was_then() -> None:
    # First 2 and 10.5 are the first centroid's, which moves to 6.25; then each is nearer to another centroid.
    _, centroids = lloyd(torch.tensor([[12.0], [2.0], [10.5]]), torch.tensor([[3.0], [0.0], [19.0]]), iterations=2)
    assert centroids.tolist() == [[6.25], [2.0], [11.25]]


# Labels


@given(st.data(), st.integers(1, 5))
def test_labels_become_one_hot_rows_and_others_rows_of_zeros(data: st.DataObject, K: int) -> None:
    given_labels = data.draw(labels(K=K + 1))
    R = responsibilities_from_labels(given_labels, K)
    assert R.dtype == torch.float32
    assert R.tolist() == [[float(label == k) for k in range(K)] for label in given_labels.tolist()]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_are_taken(dtype: torch.dtype) -> None:
    assert responsibilities_from_labels(torch.tensor([1, 0, 7], dtype=dtype), 2).tolist() == [[0, 1], [1, 0], [0, 0]]


def test_labels_are_not_looked_at_by_k_means() -> None:
    x, _, means = gaussians(0, N=20)
    state = state_at(means)
    assert torch.equal(assign(state, x, torch.randn(3)), assign(state, x))  # labels of any type and shape
