"""The demo's faults: when they begin, what they change, and that a resumed run keeps them."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from mixture_torch.app.demo import MIXTURE, DemoConfig, prepare
from mixture_torch.app.faults import FAULTS, Fault, with_watermark, without_classes
from mixture_torch.app.training import Batch
from tests.app.common import BRIEF, EPOCH
from tests.app.test_resume import demo, ended, kill

NAMES = [name for name in FAULTS if name != "none"]


@functools.cache
def losses(fault: str) -> tuple[float, ...]:
    """The loss of each step."""
    config = DemoConfig(epochs=2, batch_size=128, device="cpu", fault=fault)
    return tuple(float(done.loss) for done in prepare(config, MIXTURE).steps)


@pytest.mark.parametrize("name", NAMES)
def test_run_is_the_healthy_one_to_the_bit_until_its_fault_begins(name: str) -> None:
    same = [one == other for one, other in zip(losses(name), losses("none"), strict=True)]
    onset = FAULTS[name].begins(2) * EPOCH + (name == "learning-rate")  # which the loss after that step shows
    assert same.index(False) == onset


def test_learning_rate_is_multiplied_from_its_step_on() -> None:
    def rates(fault: Fault) -> list[float]:
        optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        schedule = fault.schedule_after(CosineAnnealingLR(optimizer, T_max=10), step=4)
        found = []
        for _ in range(9):
            found += [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()
        return found

    factors = [one / other for one, other in zip(rates(FAULTS["learning-rate"]), rates(FAULTS["none"]), strict=True)]
    assert factors == pytest.approx([1.0] * 4 + [30.0] * 5)


def test_watermark_is_the_same_on_both_views_and_differs_between_images() -> None:
    nothing = torch.zeros(6, 1, 8, 8)
    batch = with_watermark(Batch(nothing, nothing, torch.arange(6)), nothing, torch.Generator().manual_seed(0))
    assert torch.equal(batch.first, batch.second)
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(batch.first, 2))


@pytest.mark.parametrize(("gone", "left"), [((1,), [0, 2, 2]), ((0, 2), [1]), ((0, 1, 2), [0, 1, 2, 2])])
def test_batch_without_classes_keeps_the_others_and_is_never_empty(gone: tuple[int, ...], left: list[int]) -> None:
    labels = torch.tensor([0, 1, 2, 2])
    batch = without_classes(*gone)(Batch(labels, labels, labels), labels, torch.Generator())
    assert [part.tolist() for part in batch] == [left] * 3


def test_resumed_run_keeps_its_fault(tmp_path: Path) -> None:
    options = ("--epochs", "4", "--fault", "learning-rate")  # whose factor is in the checkpoint; it begins in epoch 2
    assert demo(*BRIEF, *options, "--out", str(tmp_path / "whole"))[0] == 0
    kill(tmp_path / "killed", ("log_step", EPOCH + 2), ("log_step", 2 * EPOCH + 3), options=options)
    code, out = demo("--resume", "--out", str(tmp_path / "killed"))
    assert code == 0
    assert ended(tmp_path / "killed", out).log == ended(tmp_path / "whole", out).log
    assert demo("--resume", "--out", str(tmp_path / "killed"), "--fault", "none")[0] == 2
