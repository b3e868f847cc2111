"""A training run is the same to the bit with and without the estimator."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_torch import MixtureStats, NTXentLoss, activate
from tests.wrapper.samples import all_bits, bits, estimator, mixture

STEPS = 12


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 6))


def train(wrapper: MixtureStats | None, *, autocast: bool = False) -> dict[str, Any]:
    """Trains a small network that draws global random numbers; returns its weights, loss and generators."""
    torch.manual_seed(0)
    np.random.seed(0)  # the global generator is the point
    random.seed(0)
    model, loss = network(), NTXentLoss(0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        images, labels = torch.randn(24, 8), torch.randint(3, (24,))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), activate(wrapper):
            value = loss(model(images + 0.1 * torch.randn_like(images)), model(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if wrapper is not None:
            wrapper.log_step(step=step, epoch=0)
    ends = {"torch": torch.get_rng_state(), "numpy": str(np.random.get_state()), "python": str(random.getstate())}
    return bits(model.state_dict()) | bits(ends) | {"loss": value.item()}


ESTIMATORS: dict[str, Callable[[Path], MixtureStats]] = {
    "kmeans": lambda path: estimator(),
    "labels": lambda path: estimator(assigner="label_supervised"),
    "waiting": lambda path: estimator(K=30),
    "storing": lambda path: estimator(mode="per_batch", log_dir=path, store_scores=True),
    "storing per step": lambda path: estimator(log_dir=path, store_scores=True, scores_mode="per_step"),
    "tracking": lambda path: estimator(tracker=lambda scalars, step: scalars.clear()),
    "disabled": lambda path: estimator(enabled=False, log_dir=path),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_training_ends_in_the_same_bits(make: Callable[[Path], MixtureStats], autocast: bool, tmp_path: Path) -> None:
    with make(tmp_path) as wrapper:
        assert train(wrapper, autocast=autocast) == train(None, autocast=autocast)


def forward(wrapper: MixtureStats, x: Tensor, weight: Tensor) -> Tensor:
    """A part of a model that feeds the estimator, as a loss inside a checkpointed block does."""
    with activate(wrapper):
        return NTXentLoss(0.5)(x @ weight, x @ weight.cos())


Run = Callable[[MixtureStats, Tensor, Tensor], Tensor]
PLAIN: Run = forward
CHECKPOINTED: dict[str, Run] = {
    "reentrant": lambda wrapper, x, weight: checkpoint(forward, wrapper, x, weight, use_reentrant=True),
    "not reentrant": lambda wrapper, x, weight: checkpoint(forward, wrapper, x, weight, use_reentrant=False),
    "nested": lambda wrapper, x, weight: checkpoint(
        lambda *inner: checkpoint(forward, *inner, use_reentrant=False), wrapper, x, weight, use_reentrant=False
    ),
}
checkpointed = pytest.mark.parametrize("run", CHECKPOINTED.values(), ids=CHECKPOINTED.keys())


def steps(run: Run) -> tuple[MixtureStats, list[Tensor]]:
    wrapper, weight, gradients = estimator(), torch.eye(4), []
    for step in range(4):
        weight = weight.detach().requires_grad_()
        run(wrapper, mixture(seed=step)[0], weight).backward()
        gradients.append(weight.grad)
    return wrapper, gradients


@checkpointed
def test_checkpointed_forward_updates_once_and_keeps_its_gradients(run: Run) -> None:
    (wrapper, gradients), (expected, plain) = steps(run), steps(PLAIN)
    assert all_bits(wrapper) == all_bits(expected)
    assert [gradient.tolist() for gradient in gradients] == [gradient.tolist() for gradient in plain]


@pytest.mark.parametrize("updates", [0, 1])
def test_update_in_a_hook_of_the_backward_pass_is_skipped(updates: int) -> None:
    wrapper, x, found = estimator(), mixture()[0].requires_grad_(), []
    for _ in range(updates):
        wrapper.update(x)
    last = dict(wrapper.stats)
    x.register_hook(lambda gradient: found.append(bits(wrapper.update(gradient))))
    before = all_bits(wrapper)
    x.square().sum().backward()
    assert found == [bits(last)]
    assert all_bits(wrapper) == before


def test_update_after_a_backward_pass_that_raised_counts() -> None:
    def fail(gradient: Tensor) -> None:
        raise KeyError

    wrapper, (x, _) = estimator(), mixture()
    x.requires_grad_().register_hook(fail)
    with pytest.raises(KeyError):
        x.square().sum().backward()
    assert wrapper.update(x)
