"""Right at every scale: groups far apart, long windows far from 0, and millions of rows."""

import pytest
import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, assign, batch_moments, decay, init, lloyd, merge, step
from mixture_core.absorb import absorb
from mixture_core.assign import _Rows
from tests.core.common import gaussians
from tests.core.test_sharded import Together
from tests.tolerances import FLOAT32, relative_error

OF_THE_SPREAD = 5e-4  # at an offset of 1e4 half of float32's last digit is 4.9e-4


# Groups of clusters far apart


def groups(distance: float, D: int, *, apart: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of two groups of four Gaussians of standard deviation 1, and the means, float32."""
    x, _, means = gaussians(seed, N=2048, D=D, K=4, apart=apart)
    generator = torch.Generator().manual_seed(seed)
    far = torch.randn(D, generator=generator)
    shift = (far / far.norm() * distance) * torch.randint(2, (len(x), 1), generator=generator)
    return (x.double() + shift).float(), torch.cat([means, (means.double() + far / far.norm() * distance).float()])


def assert_nearest(R: Tensor, x: Tensor, means: Tensor) -> None:
    """Each row's mean is the nearest one in float64, or one that float32 cannot tell from it."""
    distance = (x.double()[:, None] - means.double()).square().sum(dim=2)
    chosen = distance.gather(1, R.argmax(dim=1)[:, None])[:, 0]
    assert (
        float((chosen / distance.min(dim=1).values - 1).max()) <= 2 * torch.finfo(torch.float32).eps * x.shape[1] ** 0.5
    )


@pytest.mark.parametrize("apart", [2.0, 10.0])
@pytest.mark.parametrize("D", [16, 128])
@pytest.mark.parametrize("distance", [1e2, 1e4, 1e7])
def test_rows_of_groups_far_apart_belong_to_their_nearest_mean(distance: float, D: int, apart: float) -> None:
    x, means = groups(distance, D, apart=apart)
    moments = Moments(weight=torch.ones(8), mean=means, covariance=torch.zeros(8, D, D))
    state = MixtureState(config=MixtureConfig(K=8, max_assign_iters=1), moments=moments)
    assert_nearest(assign(state, x), x, means)
    assert_nearest(step(state, x)[1].R, x, means)
    assert_nearest(lloyd(x, means, iterations=1)[0], x, means)
    assert_nearest(torch.func.vmap(lambda rows: assign(state, rows))(x[None])[0], x, means)


@pytest.mark.parametrize("D", [16, 128])
@pytest.mark.parametrize("distance", [1e3, 1e5])
def test_groups_far_apart_are_seeded_and_refined_as_near_ones_are(distance: float, D: int) -> None:
    x, means = groups(distance, D, apart=14.0)
    _, centroids = lloyd(x, init(MixtureConfig(K=8), x).moments.mean, iterations=4)
    assert torch.cdist(means, centroids, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values.max() < 2


def test_means_of_groups_far_apart_are_right_to_the_last_digit() -> None:
    x, _ = groups(1e5, 16, apart=10.0)
    index = torch.arange(len(x)) % 3
    found = _Rows(x, None).exact_means(index, x[:4])
    exact = torch.stack([x[index == k].double().mean(dim=0) for k in range(3)])
    assert relative_error(found[:3], exact) <= torch.finfo(torch.float32).eps
    assert torch.equal(found[3], x[3])


# Long windows far from 0


@pytest.mark.parametrize(("ema_decay", "steps"), [(0.95, 200), (0.9999, 2000)])
def test_mean_and_covariance_follow_a_shift_far_from_zero(ema_decay: float, steps: int) -> None:
    D, generator = 4, torch.Generator().manual_seed(0)
    config = MixtureConfig(K=1, ema_decay=ema_decay)
    x = 1e4 + torch.randn(64, D, generator=generator)
    state = init(config, x)
    exact: Moments | None = None
    for n in range(steps):
        x = 1e4 + 2 * (n >= steps // 2) + torch.randn(64, D, generator=generator)
        state, _ = step(state, x)
        batch = batch_moments(x.double(), torch.ones(64, 1, dtype=torch.float64))
        exact = batch if exact is None else merge(decay(exact, ema_decay), batch)
    assert exact is not None
    assert float((state.moments.mean.double() - exact.mean).abs().max()) <= OF_THE_SPREAD
    assert relative_error(state.moments.covariance, exact.covariance) <= OF_THE_SPREAD
    assert float((state.moments.mean.double() + state.residual - exact.mean).abs().max()) <= OF_THE_SPREAD / 10


# Many rows


@pytest.mark.parametrize(("N", "D", "K"), [(1_000_000, 8, 1), (4_000_000, 1, 1), (4_000_000, 2, 4)])
def test_covariance_of_millions_of_rows_is_exact(N: int, D: int, K: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, index = torch.randn(N, D, generator=generator) + 3, torch.randint(K, (N,), generator=generator)
    x += index[:, None]
    config = MixtureConfig(K=K, assigner="label_supervised")
    state, _ = step(init(config, x), x, index)
    for k in range(K):
        rows = x[index == k].double()
        assert state.moments.weight[k] == len(rows)
        assert relative_error(state.moments.mean[k], rows.mean(dim=0)) <= FLOAT32
        assert relative_error(state.moments.covariance[k], rows.mT.cov(correction=0).reshape(D, D)) <= FLOAT32


@pytest.mark.parametrize("D", [1, 8, 130])
def test_rows_that_change_a_heavy_history_by_little_are_not_rounded_away(D: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16_384, D, generator=generator)
    history = Moments(weight=torch.tensor([1e7]), mean=torch.zeros(1, D), covariance=torch.eye(D)[None])
    both, _ = absorb(history, torch.zeros(1, D), x, torch.zeros(len(x), dtype=torch.int64), plain=True)
    batch = batch_moments(x.double(), torch.ones(len(x), 1, dtype=torch.float64))
    exact = merge(torch.utils._pytree.tree_map(Tensor.double, history), batch)
    assert float((both.covariance - exact.covariance).abs().max()) <= FLOAT32 / 5


# Ranks


@pytest.mark.parametrize(("offset", "spread"), [(1e4, 1.0), (1.0, 1e-4)])
def test_shares_far_from_zero_equal_one_step(offset: float, spread: float) -> None:
    x, _, _ = gaussians(0, N=4000, D=8, K=4)
    point = torch.nn.functional.normalize(torch.ones(8), dim=0) * offset
    x = point + spread * x
    together = alone = init(MixtureConfig(K=4), x[:400])
    for batch in x.split(400):
        alone, _ = step(alone, batch)
        together = Together(together, batch, [150, 250]).states[0]
    for name in ("pi", "mean", "covariance", "trace_B", "opnorm_B", "participation_ratio"):
        assert relative_error(getattr(together.moments, name), getattr(alone.moments, name)) <= FLOAT32, name
