"""The second life of dead components."""

import pytest
import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats, init, step
from tests.core.common import assert_moments_close, gaussians
from tests.tolerances import FLOAT32, relative_error


def state_of(config: MixtureConfig, weight: Tensor, mean: Tensor) -> MixtureState:
    K, D = mean.shape
    return MixtureState(
        config=config, moments=Moments(weight=weight, mean=mean, covariance=torch.eye(D).repeat(K, 1, 1))
    )


def far_and_dead(dead: int, **options: float | str) -> tuple[MixtureState, Tensor]:
    """A state whose last components are dead and far from the batch, and a batch."""
    x, _, means = gaussians(0, N=256, D=4, K=6)
    weight, mean = torch.full((6,), 50.0), means.clone()
    weight[6 - dead :], mean[6 - dead :] = 1e-3, 1e4
    return state_of(MixtureConfig(K=6, **options), weight, mean), x


def later_batch(means: Tensor, seed: int, N: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(means.shape[0], (N,), generator=generator)
    return means[labels] + torch.randn(N, means.shape[1], generator=generator)


def steps_until_all_found(first: Tensor, means: Tensor, limit: int) -> int:
    """How many steps it takes until every mean of the truth has a centroid nearby."""
    state = init(MixtureConfig(K=means.shape[0]), first)
    for t in range(limit):
        state, _ = step(state, first if t == 0 else later_batch(means, 1000 + t))
        nearest = (means[:, None] - state.moments.mean).norm(dim=2).amin(dim=1)
        # Means lie 13 or more apart: a centroid between two is 6 from either. Sampling moves one by sqrt(D) / 25.
        if nearest.max() < 4:
            return t + 1
    return limit + 1


# What moves


@pytest.mark.parametrize("dead", [1, 2, 4])
def test_at_most_one_component_moves_per_step(dead: int) -> None:
    state, x = far_and_dead(dead)
    moved = []
    for _ in range(dead + 2):
        before = state.moments.mean
        state, stats = step(state, x)
        jumped = ((state.moments.mean - before).norm(dim=1) > 1e3).sum()
        assert jumped == stats.n_revived
        moved.append(int(stats.n_revived))
    assert moved[:dead] == [1] * dead
    assert max(moved) == 1


def test_component_that_moved_has_neither_weight_nor_covariance() -> None:
    state, x = far_and_dead(1)
    new, stats = step(state, x)
    assert stats.n_revived == 1
    assert new.moments.weight[5] == 0
    assert not new.moments.covariance[5].any()


def test_component_that_moved_lies_inside_the_batch_and_attracts_rows() -> None:
    state, x = far_and_dead(1)
    state, _ = step(state, x)
    assert (state.moments.mean[5] >= x.amin(dim=0)).all()
    assert (state.moments.mean[5] <= x.amax(dim=0)).all()
    _, stats = step(state, x)
    assert stats.pi[5] > 0.01


def test_other_components_are_as_without_the_move() -> None:
    state, x = far_and_dead(1)
    still = MixtureState(config=MixtureConfig(K=6, revive_below=0), moments=state.moments)
    (new, stats), (expected, _) = step(state, x), step(still, x)
    assert stats.n_revived == 1
    for name in ("weight", "mean", "covariance"):
        assert torch.equal(getattr(new.moments, name)[:5], getattr(expected.moments, name)[:5])


@pytest.mark.parametrize("options", [{"revive_below": 0}, {"mode": "per_batch"}])
def test_nothing_moves_where_it_is_turned_off(options: dict[str, float | str]) -> None:
    state, x = far_and_dead(2, **options)
    new, stats = step(state, x)
    assert stats.n_revived == 0
    assert torch.equal(new.moments.mean[4:], state.moments.mean[4:])


def test_nothing_moves_under_labels() -> None:
    state, x = far_and_dead(2, assigner="label_supervised")
    _, stats = step(state, x, torch.zeros(256, dtype=torch.int64))
    assert stats.n_revived == 0


@pytest.mark.parametrize(("share", "moves"), [(0.0009, 1), (0.0011, 0)])
def test_threshold_is_the_share_revive_below_over_K(share: float, moves: int) -> None:
    # revive_below / K = 0.001; after the step the weights are 0.5 * 2000 and 1000 of rows.
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(10)
    weight[0], weight[1:9], weight[9] = 1000.0, 100.0, 4000.0 * share
    mean = torch.full((10, 2), 1e4)
    mean[0] = 0.0
    state = state_of(MixtureConfig(K=10, ema_decay=0.5, revive_below=0.01), weight, mean)
    _, stats = step(state, x)
    total = 0.5 * float(weight.sum()) + 1000
    assert (0.5 * 4000 * share / total < 0.001) == bool(moves)  # that the numbers of this test are right
    assert stats.n_revived == moves


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1000.1])
def test_nothing_moves_where_all_rows_coincide(value: float) -> None:
    x = torch.full((37, 3), value)
    state = init(MixtureConfig(K=4), x)
    for _ in range(5):
        state, stats = step(state, x)
        assert stats.n_revived == 0


def test_nothing_moves_towards_a_few_outliers() -> None:
    state, x = far_and_dead(1)
    x[:3] = torch.tensor([[500.0], [600.0], [-700.0]])
    new, stats = step(state, x)
    assert stats.n_revived == 1
    assert new.moments.mean[5].abs().max() < 50


def test_move_does_not_depend_on_the_order_of_rows() -> None:
    state, x = far_and_dead(1)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    assert_moments_close(step(state, x[order])[0].moments, step(state, x)[0].moments, FLOAT32)


def test_total_is_within_plus_between_after_a_move() -> None:
    state, x = far_and_dead(0)
    for seed in range(30):  # a component that is left by its rows, and moved when its weight is gone
        state, stats = step(state, x[x[:, 0] < 5] if seed > 5 else x)
    total = stats.Sigma.mul(stats.pi[:, None, None]).sum(dim=0) + stats.B
    m = stats.pi @ stats.mu
    by_definition = sum(
        p * (S + torch.outer(c - m, c - m)) for p, S, c in zip(stats.pi, stats.Sigma, stats.mu, strict=True)
    )
    assert relative_error(total, by_definition) <= FLOAT32
    assert relative_error(stats.pi.sum(), torch.tensor(1.0)) <= FLOAT32


# What a life with revivals looks like


def test_component_of_one_percent_keeps_its_place() -> None:
    generator = torch.Generator().manual_seed(0)
    _, _, means = gaussians(0, D=8, K=8)
    shares = torch.tensor([0.01] + [0.99 / 7] * 7)
    state = init(MixtureConfig(K=8), means)
    revived = 0
    for _ in range(200):
        labels = torch.multinomial(shares, 512, replacement=True, generator=generator)
        state, stats = step(state, means[labels] + torch.randn(512, 8, generator=generator))
        revived += int(stats.n_revived)
    rare = (state.moments.mean - means[0]).norm(dim=1).argmin()
    assert revived == 0
    assert (state.moments.mean[rare] - means[0]).norm() < 1
    assert 0.005 < stats.pi[rare] < 0.02


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_no_component_is_dead_50_steps_after_a_tiny_first_batch(rows: int) -> None:
    for seed in range(15):
        x, _, means = gaussians(seed)
        state, _ = step(init(MixtureConfig(K=8), x[:rows]), x[:rows])
        for t in range(49):
            state, stats = step(state, later_batch(means, t))
        assert stats.pi.min() > 0.01, seed


@pytest.mark.parametrize(("D", "distance"), [(16, 1e2), (16, 1e4), (16, 1e6), (256, 1e3)])
def test_clusters_are_all_found_within_50_steps_from_a_first_batch_with_far_outliers(D: int, distance: float) -> None:
    for seed in range(50 if D == 16 else 5):
        x, _, means = gaussians(seed, D=D)
        x[:3] = distance * torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
        assert steps_until_all_found(x, means, 50) <= 50, seed


def test_all_of_a_life_is_counted() -> None:
    stats: list[StepStats] = []
    state, x = far_and_dead(4)
    for _ in range(10):
        state, now = step(state, x)
        stats.append(now)
    assert sum(int(s.n_revived) for s in stats) >= 4
    assert all(s.n_revived.dtype == torch.int64 and s.n_revived.shape == () for s in stats)
    assert stats[-1].pi.min() > 0.01
