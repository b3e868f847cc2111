"""The excess share between components: 0 for one Gaussian, more for clusters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, init, relocate, step
from mixture_core.null import excess
from tests.core.common import gaussians


def estimate(draw: Callable[[], Tensor], *, steps: int = 100) -> MixtureState:
    config = MixtureConfig(K=8)
    state = init(config, draw())
    for n in range(steps):
        if n and n % config.window == 0:
            state, _ = relocate(state)
        state, _ = step(state, draw())
    return state


@pytest.mark.parametrize("power", [0.0, -0.5], ids=["isotropic", "power law"])
@pytest.mark.parametrize(("D", "seeds"), [(2, 3), (16, 1), (128, 1)])
def test_one_gaussian_has_no_excess(D: int, seeds: int, power: float) -> None:
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        spread = torch.arange(1, D + 1) ** power
        state = estimate(lambda s=spread, g=generator: 3 + s * torch.randn(512, len(s), generator=g))
        found.append(float(excess(state, 512, generator=generator, shadows=2)))
    # In two dimensions k-means has several good places to stay, whose shares differ by .002 of .8, or .01 of 1 - .8.
    assert abs(sum(found) / len(found)) <= 0.01


@pytest.mark.parametrize(("D", "apart"), [(16, 2.0), (128, 3.0)])
def test_clusters_have_excess(D: int, apart: float) -> None:
    seeds = iter(range(10**6))
    means = gaussians(0, D=D, apart=apart).means

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        return means[torch.randint(8, (512,), generator=generator)] + torch.randn(512, D, generator=generator)

    assert float(excess(estimate(draw), 512, shadows=2)) > 0.02


def test_labels_without_meaning_have_no_excess() -> None:
    generator = torch.Generator().manual_seed(0)
    config = MixtureConfig(K=4, assigner="label_supervised")
    x = torch.randn(2000, 8, generator=generator)
    state, _ = step(init(config, x), x, torch.randint(4, (2000,), generator=generator))
    assert abs(float(excess(state, 2000, steps=5))) <= 0.01


@pytest.mark.parametrize("assigner", ["kmeans_online", "label_supervised"])
def test_mixture_without_weight_has_no_excess(assigner: str) -> None:
    state = init(MixtureConfig(K=2, assigner=assigner), torch.zeros(0, 2))
    assert excess(state, 10).isnan()


@pytest.mark.parametrize("options", [{"N": 2.5}, {"N": "10"}, {"N": True}, {"N": 10, "steps": 3.0}])
def test_counts_that_are_no_integers_are_refused(options: dict[str, Any]) -> None:
    state = init(MixtureConfig(K=2), torch.randn(10, 2))
    with pytest.raises(TypeError, match=r"^`N`, `shadows` and `steps` must be integers, got .*\.$"):
        excess(state, **options)


def test_counts_below_1_are_refused() -> None:
    state = init(MixtureConfig(K=2), torch.randn(10, 2))
    with pytest.raises(ValueError, match="must be at least 1, got 0, 4 and 120"):
        excess(state, 0)
