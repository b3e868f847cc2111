"""Where the means start: all clusters are found, whatever comes first, and one seed for everything does no harm."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixture_torch import MixtureStats
from tests.wrapper.samples import bits, estimator, mixture

K, D, SEEDS = 8, 16, 20
Draw = Callable[[int], tuple[Tensor, Tensor]]


def clusters(*, share: float = 1 / K) -> Draw:
    """Rows of eight Gaussians of standard deviation 1 from torch's own generator; the first has that share of them.

    The means are 28 standard deviations from each other on average.
    """
    means = 5 * torch.randn(K, D)
    weights = torch.tensor([share] + [(1 - share) / (K - 1)] * (K - 1))

    def draw(N: int) -> tuple[Tensor, Tensor]:
        labels = torch.multinomial(weights, N, replacement=True)
        return means[labels] + torch.randn(N, D), labels

    return draw


def finds_all(wrapper: MixtureStats, draw: Draw) -> bool:
    """Whether every cluster has a component of its own, and every component a cluster."""
    x, labels = draw(512)
    counts = torch.zeros(K, K).index_add_(0, labels, wrapper.assign(x))
    return bool(((counts > 0).sum(dim=0) == 1).all() and ((counts > 0).sum(dim=1) == 1).all())


def seeds_that_fail(start: Callable[[MixtureStats, Draw], None], *, steps: int, batch: int) -> list[int]:
    """Seeds for which clusters are missed; as users do, the data and the estimator have the same one."""
    failed = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        draw, wrapper = clusters(), MixtureStats(K=K, enabled=True, seed=seed)
        start(wrapper, draw)
        for _ in range(steps - 1):
            wrapper.update(draw(batch)[0])
        if not finds_all(wrapper, draw):
            failed.append(seed)
    return failed


def start_with(rows: int) -> Callable[[MixtureStats, Draw], None]:
    def start(wrapper: MixtureStats, draw: Draw) -> None:
        wrapper.update(draw(rows)[0])

    return start


def start_with_outliers(wrapper: MixtureStats, draw: Draw) -> None:
    x, _ = draw(512)
    x[:3] = 1000 * torch.randn(3, D)
    wrapper.update(x)


def test_all_clusters_are_found_from_the_first_batch_on() -> None:
    assert seeds_that_fail(start_with(512), steps=1, batch=0) == []


@pytest.mark.parametrize("rows", [1, 8])
def test_all_clusters_are_found_within_50_steps_of_a_small_first_batch(rows: int) -> None:
    assert seeds_that_fail(start_with(rows), steps=50, batch=64) == []


def test_all_clusters_are_found_within_50_steps_of_three_far_outliers() -> None:
    assert seeds_that_fail(start_with_outliers, steps=50, batch=64) == []


def test_component_of_one_percent_keeps_its_place() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        draw, wrapper = clusters(share=0.01), MixtureStats(K=K, enabled=True, seed=seed)
        wrapper.update(draw(1024)[0])
        place = wrapper.stats["pi"].argmin()
        pi, moved = [], 0
        for _ in range(200):
            stats = wrapper.update(draw(128)[0])
            pi.append(float(stats["pi"][place]))
            moved += int(stats["n_relocated"])
        assert (moved, finds_all(wrapper, draw)) == (0, True)
        assert 0.007 < sum(pi) / len(pi) < 0.013


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_batches_that_are_always_small_still_start(rows: int) -> None:
    wrapper = MixtureStats(K=K, enabled=True)
    weights = [float(update(wrapper, rows, step).sum()) for step in range(-(-4 * K // rows) + 1)]
    assert weights[:-1] == [rows] * (len(weights) - 1)  # every batch starts anew
    assert weights[-1] == pytest.approx(rows * 1.95)


def update(wrapper: MixtureStats, rows: int, seed: int) -> Tensor:
    wrapper.update(mixture(rows, K=K, D=D, seed=seed)[0])
    return wrapper.state.moments.weight


def test_rows_that_wait_are_all_seeded_from() -> None:
    x, _ = mixture(4 * K, K=K, D=D, apart=50.0)
    wrapper = MixtureStats(K=K, enabled=True)
    for row in x:
        wrapper.update(row[None])
    assert sorted(wrapper.assign(x).sum(dim=0).tolist()) == [4.0] * K


def test_seeding_does_not_depend_on_the_steps_before_it() -> None:
    x, _ = mixture(200, K=8, D=16, apart=1.0)
    after_bad_rows, at_once = estimator(K=8), estimator(K=8)
    with pytest.warns(UserWarning, match="ignored"):
        after_bad_rows.update(x * float("nan"))
    assert bits(after_bad_rows.update(x)) == bits(at_once.update(x))
