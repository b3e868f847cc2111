"""Losses and updates inside torch.compile: one graph, the same numbers, and nothing of the compiler at import."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixture_torch import MixtureStats, NTXentLoss, activate
from tests.tolerances import FLOAT32
from tests.wrapper.samples import all_bits, assert_close, estimator, mixture

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> None:
    torch._dynamo.reset()


class Model(nn.Module):
    """A projection and its loss, which updates the active estimator, and perhaps one of its own."""

    def __init__(self, own: MixtureStats | None = None) -> None:
        super().__init__()
        self.layer, self.criterion, self.own = nn.Linear(4, 4, bias=False), NTXentLoss(), own
        nn.init.eye_(self.layer.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None, step: Any = None) -> Tensor:
        """Returns the loss of two views of x."""
        z = self.layer(x)
        if self.own is not None:
            self.own.update(z, labels, step=step)
        loss: Tensor = self.criterion(z, z + x.sin(), labels)
        return loss


def run(model: Model, forward: Any, active: MixtureStats | None, *, steps: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """Losses and gradients of some steps."""
    found = []
    for n, step in enumerate(steps):
        model.zero_grad()
        with activate(active):
            loss = forward(*mixture(seed=n), step)
        loss.backward()
        assert model.layer.weight.grad is not None
        found.append((loss.detach(), model.layer.weight.grad.clone()))
    return found


def assert_same_training(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    for (loss, gradient), (wanted, its_gradient) in zip(found, expected, strict=True):
        assert_close({"loss": loss, "gradient": gradient}, {"loss": wanted, "gradient": its_gradient}, FLOAT32)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "eager") for kind in ("none", "active", "labels", "own", "disabled")),
        ("active", "aot_eager"),
        ("own", "inductor"),
    ],
)
def test_compiled_model_is_the_eager_one(kind: str, backend: str) -> None:
    found = []
    for is_compiled in (False, True):
        options: dict[str, Any] = {"assigner": "label_supervised"} if kind == "labels" else {}
        wrapper = estimator(enabled=kind != "disabled", **options)
        model = Model(wrapper if kind in ("own", "disabled") else None)
        forward = torch.compile(model, fullgraph=True, backend=backend) if is_compiled else model
        active = wrapper if kind in ("active", "labels") else None
        found.append((run(model, forward, active, steps=[0, 1, 2]), wrapper))
    (expected, eager), (losses, compiled) = found
    assert_same_training(losses, expected)
    assert compiled._mixture.n_updates == eager._mixture.n_updates == (0 if kind in ("none", "disabled") else 3)
    assert_close(compiled.stats, eager.stats, FLOAT32)


@pytest.mark.parametrize("steps", [[0, 0, 1, 1], ["a", "a", "b", "b"], [None] * 4], ids=str)
def test_steps_of_a_compiled_update_are_those_given(steps: list[Any]) -> None:
    eager, compiled = estimator(ema_decay=0.5), estimator(ema_decay=0.5)
    run(model := Model(eager), model, None, steps=steps)
    run(model := Model(compiled), torch.compile(model, fullgraph=True, backend="eager"), None, steps=steps)
    assert all_bits(compiled) == all_bits(eager)


def test_estimator_is_found_when_the_compiled_loss_runs() -> None:
    loss, (x, _) = torch.compile(NTXentLoss(), fullgraph=True, backend="eager"), mixture()
    first, second = estimator(), estimator()
    loss(x, x + 1)
    for wrapper in (first, second):
        with activate(wrapper):
            loss(x, x + 1)
    loss(x, x + 2)
    assert [wrapper._mixture.n_updates for wrapper in (first, second)] == [1, 1]
    assert first.stats.R.shape == (120, 3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compiled_checkpointed_forward_pass_counts_once(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    wrapper = estimator()
    model = Model(wrapper)
    forward = torch.compile(model, backend="aot_eager")
    checkpoint(forward, mixture()[0].requires_grad_(), use_reentrant=use_reentrant).backward()
    assert wrapper._mixture.n_updates == 1


def test_faults_of_a_compiled_update_are_raised() -> None:
    wrapper = estimator(dim=7)
    forward = torch.compile(Model(wrapper), fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"^`embeddings` must have shape \(N, 7\), got \(60, 4\)"):
        forward(mixture()[0])


def test_import_does_not_import_the_compiler() -> None:
    script = "import sys, mixture_torch; print('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.split() == ["False", "False"]
