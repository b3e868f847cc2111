"""Two views of each sample: alignment and LiDAR by their definitions, and standard errors that hold."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixture_core import (
    MixtureConfig,
    MixtureState,
    Moments,
    batch_moments,
    init,
    kmeans_plusplus,
    lloyd,
    pairs,
    readings,
    step,
)
from mixture_torch.app.digits import load_images, view
from tests.core.common import gaussians, stack
from tests.tolerances import FLOAT32, relative_error

K = 8


def lidar_of_rows(z: Tensor) -> Tensor:
    """LiDAR of (n, q, D) views, as section 3 of the paper defines it."""
    n, q, D = z.shape
    own = z.mean(dim=1)
    between = own.mT.cov(correction=1)
    away = (z - own[:, None]).reshape(-1, D)
    within = away.mT @ away / (n * (q - 1)) + 1e-4 * torch.eye(D, dtype=z.dtype)
    eigenvalues, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(eigenvalues**-0.5) @ vectors.mT
    p = torch.linalg.eigvalsh(root @ between @ root)
    p = p / p.sum() + 1e-7
    return torch.exp(-(p * p.log()).sum())


@pytest.mark.parametrize("D", [32, 128, 512])
def test_alignment_and_lidar_equal_their_definition_on_the_rows(D: int) -> None:
    x, _, _ = gaussians(0, N=6400, D=D, K=K, apart=4.0)
    generator = torch.Generator().manual_seed(1)
    z1, z2 = (x + 0.3 * torch.randn(6400, D, generator=generator) for _ in range(2))
    state, seen = init(MixtureConfig(K=K, ema_decay=1 - 1e-15), z1[:512]), pairs.none(K=K, D=D)
    for views in zip(z1.split(64), z2.split(64), strict=True):
        state, stats = step(state, torch.cat(views))
        seen = pairs.observe(seen, torch.cat(views), stats.R, stats.moments, decay=1.0)
    z = torch.stack([z1, z2], dim=1).double()
    assert relative_error(pairs.alignment(seen), (z[:, 0] - z[:, 1]).square().sum(dim=1).mean()) <= FLOAT32
    assert relative_error(pairs.lidar(state.moments, seen), lidar_of_rows(z)) <= FLOAT32


@pytest.mark.parametrize("assigner", ["label_supervised", "kmeans_online"])
def test_intervals_of_95_percent_hold_the_truth_95_times_in_100_on_digits(assigner: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images, _ = load_images(torch.device("cpu"))
    digits = torch.cat([view(images, generator=generator) for _ in range(2)]).flatten(1)
    x = digits @ torch.linalg.eigh(digits.mT @ digits).eigenvectors[:, -32:]
    R, _ = lloyd(x, kmeans_plusplus(x, K, generator=generator), iterations=20)
    config = MixtureConfig(K=K, assigner=assigner, ema_decay=0.8)
    start = MixtureState(config=config, moments=batch_moments(x, 1e-9 * R))

    def advance(state: MixtureState, seen: pairs.Pairs, rows: Tensor) -> tuple[MixtureState, pairs.Pairs, Tensor]:
        state, stats = step(state, x[rows], R.argmax(dim=1)[rows])
        seen = pairs.observe(seen, x[rows], stats.R, stats.moments, decay=0.8)
        figures = torch.cat([stats.pi, stats.trace_B[None], readings.share_B(stats.moments)[None]])
        return state, seen, torch.stack([figures, 1.96 * seen.standard_errors])

    state, seen, found = stack(*[start] * 100), stack(*[pairs.none(K=K, D=32)] * 100), []
    for _ in range(25):
        first = torch.randint(len(images), (100, 128), generator=generator)
        state, seen, figures = torch.func.vmap(advance)(state, seen, torch.cat([first, first + len(images)], dim=1))
        found.append(figures)
    figures, width = torch.stack(found[12::4]).flatten(end_dim=1).unbind(dim=1)
    covered = ((figures - figures.mean(dim=0)).abs() < width).double().mean(dim=0)
    if assigner == "kmeans_online":  # borders move from stream to stream, and with them the weights of these clusters
        covered = covered[K:]
    assert covered.min() >= 0.90
    assert covered.max() <= 0.98


def test_pair_with_an_ignored_row_does_not_count() -> None:
    x = torch.tensor([[0.0, 1.0], [3.0, 1.0], [5.0, 1.0], [1.0, 1.0], [torch.nan, 1.0], [6.0, 1.0]])
    _, stats = step(init(MixtureConfig(K=2), x), x)
    seen = pairs.observe(pairs.none(K=2, D=2), x, stats.R, stats.moments, decay=0.9)
    without = pairs.observe(pairs.none(K=2, D=2), x[[0, 2, 3, 5]], stats.R[[0, 2, 3, 5]], stats.moments, decay=0.9)
    for name in ("weight", "V", "squares"):
        torch.testing.assert_close(getattr(seen, name), getattr(without, name))


def test_further_part_of_a_step_adds_pairs_that_do_not_decay() -> None:
    x = gaussians(0, N=64, D=4, K=2).embeddings
    _, stats = step(init(MixtureConfig(K=2), x), x)
    whole = pairs.observe(pairs.none(K=2, D=4), x, stats.R, stats.moments, decay=0.9)
    parts = pairs.none(K=2, D=4)
    for rows, decay in ((torch.arange(16), 0.9), (torch.arange(16, 32), 1.0)):
        rows = torch.cat([rows, rows + 32])
        parts = pairs.observe(parts, x[rows], stats.R[rows], stats.moments, decay=decay)
    torch.testing.assert_close(parts.V, whole.V)
    assert float(parts.weight) == float(whole.weight) == 32


def test_odd_number_of_rows_is_refused() -> None:
    x = torch.randn(5, 2)
    _, stats = step(init(MixtureConfig(K=2), x), x)
    with pytest.raises(ValueError, match="even number of rows, got 5"):
        pairs.observe(pairs.none(K=2, D=2), x, stats.R, stats.moments, decay=0.9)


def test_lidar_of_fewer_pairs_than_dimensions_is_finite_at_any_scale() -> None:
    for scale in (1e-3, 1.0, 1e6):
        x = scale * torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
        state, stats = step(init(MixtureConfig(K=2), x), x)
        seen = pairs.observe(pairs.none(K=2, D=64), x, stats.R, stats.moments, decay=0.9)
        assert 1 <= float(pairs.lidar(state.moments, seen)) <= 64


def test_far_rows_leave_standard_errors_that_are_finite_for_ever() -> None:
    x = gaussians(0, N=64, D=8, K=K)[0]
    state, seen = init(MixtureConfig(K=K), x), pairs.none(K=K, D=8)
    for scale in (1.0, 1e12, 1.0):
        rows = torch.cat([scale * x[:1], x[1:]])
        state, stats = step(state, rows)
        seen = pairs.observe(seen, rows, stats.R, stats.moments, decay=0.95)
    assert seen.squares.isfinite().all()


@pytest.mark.parametrize("V", [torch.zeros(6, 6), torch.eye(6), torch.ones(6, 6)])
def test_lidar_has_finite_gradients_if_eigenvalues_are_equal(V: Tensor) -> None:
    x = gaussians(0, N=64, D=6, K=K)[0]
    moments = step(init(MixtureConfig(K=K), x), x)[1].moments

    def reading(V: Tensor) -> Tensor:
        return pairs.lidar(moments, pairs.Pairs(weight=torch.tensor(32.0), V=V, squares=torch.zeros(K + 2)))

    assert torch.func.grad(reading)(V).isfinite().all()


@pytest.mark.parametrize("case", ["a row is NaN", "one pair"])
def test_gradients_are_finite(case: str) -> None:
    x = gaussians(0, N=64, D=6, K=K)[0]
    state = init(MixtureConfig(K=K), x)

    def figures(x: Tensor) -> Tensor:
        _, stats = step(state, x)
        seen = pairs.observe(pairs.none(K=K, D=6), x, stats.R, stats.moments, decay=0.95)
        return pairs.alignment(seen) + seen.standard_errors.sum()

    rows = torch.cat([x[:1] * torch.nan, x[1:]]) if case == "a row is NaN" else x[:2]
    assert torch.func.grad(figures)(rows).isfinite().all()


def test_batches_of_one_pair_have_a_standard_error() -> None:
    x = gaussians(0, N=2000, D=6, K=K)[0]
    found = []
    for size in (2, 40):
        state, seen = init(MixtureConfig(K=K, ema_decay=1 - 1e-15), x), pairs.none(K=K, D=6)
        for rows in x.split(size):
            state, stats = step(state, rows)
            seen = pairs.observe(seen, rows, stats.R, stats.moments, decay=1.0)
        found.append(float(seen.standard_errors[K]))
    assert 0.8 <= found[0] / found[1] <= 1.25


def test_pairs_of_another_shape_are_refused() -> None:
    x = gaussians(0, N=20, D=6, K=K)[0]
    R = torch.eye(K)[torch.arange(20) % K]
    moments = Moments(weight=torch.ones(K), mean=x[:K], covariance=torch.zeros(K, 6, 6))
    with pytest.raises(ValueError, match=r"`R` must have shape \(20, 8\), as `moments` has K=8, got \(20, 2\)"):
        pairs.observe(pairs.none(K=K, D=6), x, R[:, :2], moments, decay=0.9)
    for K_, D in ((2, 6), (K, 1)):
        with pytest.raises(ValueError, match=r"`pairs` must have the K and D of `moments`, \(8, 6\), got"):
            pairs.observe(pairs.none(K=K_, D=D), x, R, moments, decay=0.9)
