"""Where k-means starts from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import kmeans_plusplus
from mixture_core.testing import embeddings
from tests.core.common import gaussians
from tests.tolerances import FLOAT32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_row_of(centroids: Tensor, x: Tensor, tolerance: float = FLOAT32) -> Tensor:
    """Which centroids are rows of x, (K,) bool, up to the rounding of x about its mean."""
    differences = (centroids[:, None] - x[None]).abs().amax(dim=2).amin(dim=1)
    return differences <= tolerance * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (10_000.0, 1.0), (1.0, 1e-5)])
def test_kmeans_plusplus_finds_eight_of_eight_separated_clusters_for_50_seeds(offset: float, scale: float) -> None:
    found = []
    for seed in range(50):
        x, labels, _ = gaussians(seed)
        x = offset + scale * x
        centroids = kmeans_plusplus(x, 8, generator=seeded(seed))
        rows = (centroids[:, None] - x[None]).square().sum(dim=2).argmin(dim=1)
        found.append(labels[rows].unique().numel())
    assert found == [8] * 50


@given(embeddings(N=(1, 32), with_bad_rows=True), st.integers(1, 6), st.integers(0, 99))
def test_kmeans_plusplus_returns_usable_rows(x: Tensor, K: int, seed: int) -> None:
    usable = x[(x.abs() < 1e13).all(dim=1)]
    centroids = kmeans_plusplus(x, K, generator=seeded(seed))
    assert centroids.shape == (K, x.shape[1])
    assert is_row_of(centroids, usable).all() if len(usable) else not centroids.any()


def test_kmeans_plusplus_draws_no_bad_row_from_a_batch_with_few_good_ones() -> None:
    # The middle of the four corners, where bad rows would be if 0 took their place, halves the distances best.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x = torch.cat([corners, torch.full((60, 2), float("nan"))])
    for seed in range(10):
        assert is_row_of(kmeans_plusplus(x, 3, generator=seeded(seed)), corners).all()


def test_kmeans_plusplus_takes_every_distinct_row_before_any_twice() -> None:
    points = torch.arange(5.0)[:, None] * 10
    for seed in range(20):
        x = points[torch.randint(5, (100,), generator=seeded(seed))]
        centroids = kmeans_plusplus(x, 7, generator=seeded(seed))
        assert is_row_of(points, centroids).all(), seed


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.full((5, 3), float("nan")), torch.full((5, 3), 1e20)])
def test_kmeans_plusplus_without_a_usable_row_returns_zeros(x: Tensor) -> None:
    assert torch.equal(kmeans_plusplus(x, 4, generator=seeded(0)), torch.zeros(4, 3))


def test_kmeans_plusplus_draws_one_number_whatever_the_batch() -> None:
    after = []
    for N, K in ((10, 2), (500, 8), (3, 8)):
        generator = seeded(0)
        kmeans_plusplus(torch.randn(N, 4), K, generator=generator)
        after.append(generator.get_state())
    assert all(torch.equal(state, after[0]) for state in after)


def test_kmeans_plusplus_is_not_misled_by_the_generator_that_made_the_data() -> None:
    # Draws from the same stream as the labels would repeat the numbers that chose each row's component.
    for seed in range(20):
        generator = seeded(seed)
        means = torch.randn(8, 16, generator=generator)
        labels = torch.randint(8, (512,), generator=seeded(seed))
        x = 14 * means / means.norm(dim=1, keepdim=True)
        x = x[labels] + torch.randn(512, 16, generator=generator)
        centroids = kmeans_plusplus(x, 8, generator=seeded(seed))
        rows = (centroids[:, None] - x[None]).square().sum(dim=2).argmin(dim=1)
        assert labels[rows].unique().numel() == 8, seed
