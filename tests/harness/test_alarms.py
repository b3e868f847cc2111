"""Alarms on SimCLR runs over the digits, with and without a fault: what is seen, how soon, and how often falsely.

The seeds are others than those from which the limits were chosen. Only with `pytest -n 0 -m slow -s`.
"""

import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mixture_core import MixtureConfig, MixtureState, StepStats, init, readings, relocate, step
from mixture_core.alarms import Alarm, AlarmState, Reading, observe
from mixture_core.null import excess
from mixture_torch.app.demo import EMBEDDING, LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY, make_encoder
from mixture_torch.app.digits import N_DIGITS, load_images, view
from mixture_torch.app.faults import FAULTS, unchanged, without_classes
from mixture_torch.app.training import Batch
from mixture_torch.losses import NTXentLoss

pytestmark = pytest.mark.slow

BATCH, BATCHES = 512, 3  # images per step, steps per epoch
SCHEDULE = 260  # steps of a whole run
FAULT = 140  # the first step of a fault
EVERY = 20  # steps from one excess to the next
CONFIG = MixtureConfig(K=N_DIGITS, ema_decay=0.9)


class Run(NamedTuple):
    """What was raised, and which components lost most of their rows to the fault."""

    seed: int
    alarms: tuple[Alarm, ...]
    emptied: tuple[int, ...]

    def named(self) -> set[int | None]:
        """The emptied components that an alarm named within 3 steps."""
        soon = [alarm for alarm in self.alarms if FAULT <= alarm.step < FAULT + 3 and alarm.kind == "composition"]
        return {alarm.component for alarm in soon} & set(self.emptied)

    def has(self, kind: str) -> bool:
        return kind in {alarm.kind for alarm in self.alarms}


def live(kind: str, seed: int, steps: int) -> Run:
    """A run; `kind` is the name of a fault or, for random classes that are gone, their number."""
    torch.set_num_threads(1)
    images, digits = load_images(torch.device("cpu"))
    chance, order = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(seed)
    gone = torch.randperm(N_DIGITS, generator=chance)[: int(kind) if kind.isdigit() else 0]
    change, onset = (without_classes(*gone.tolist()), FAULT) if kind.isdigit() else (FAULTS[kind].batch, 0)
    encoder, loss = make_encoder(seed=seed), NTXentLoss(TEMPERATURE)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=SCHEDULE)
    state, watch = None, AlarmState(D=EMBEDDING)
    alarms, emptied = list[Alarm](), tuple[int, ...]()
    for number in range(steps):
        if number % BATCHES == 0:
            epoch = torch.randperm(len(images), generator=order)[: BATCH * BATCHES].view(BATCHES, BATCH)
        rows = epoch[number % BATCHES]
        x = images[rows]
        batch = Batch(view(x, generator=chance), view(x, generator=chance), digits[rows])
        first, second, labels = (change if number >= onset else unchanged)(batch, x, chance)
        z1, z2 = (functional.normalize(half, dim=1) for half in encoder(torch.cat([first, second])).chunk(2))
        with torch.no_grad():
            z = torch.cat([z1, z2]).detach()
            state, stats, moved = estimate(state, z, number)
            if number == FAULT - 1:
                emptied = mostly(stats.R, labels.repeat(2), gone)
            is_known = number % EVERY == EVERY - 1 and not kind.isdigit()
            beyond = float(excess(state, len(z))) if is_known else math.nan
            watch, raised = observe(watch, reading(stats, number, moved, beyond))
            alarms += raised
        optimizer.zero_grad()
        loss(z1, z2).backward()
        optimizer.step()
        schedule.step()
    return Run(seed, tuple(alarms), emptied)


def estimate(state: MixtureState | None, z: Tensor, number: int) -> tuple[MixtureState, StepStats, int]:
    """The state after a step, and how many components moved."""
    state, moved = init(CONFIG, z) if state is None else state, torch.tensor(0)
    if number and number % CONFIG.window == 0:
        state, moved = relocate(state)
    return *step(state, z), int(moved)


def reading(stats: StepStats, number: int, moved: int, beyond: float) -> Reading:
    return Reading(
        step=number,
        n_rows=int(stats.R.sum()),
        n_relocated=moved,
        trace_B=float(stats.trace_B),
        opnorm_B=float(stats.opnorm_B),
        trace_T=float(readings.trace_T(stats.moments)),
        participation_ratio=float(stats.participation_ratio),
        pi=tuple(stats.pi.tolist()),
        n=tuple(stats.R.sum(dim=0).tolist()),
        excess=beyond,
    )


def mostly(R: Tensor, digits: Tensor, gone: Tensor) -> tuple[int, ...]:
    """The components most of whose rows are of classes that will be gone."""
    is_gone = torch.isin(digits, gone).float()
    return tuple((R.mT @ is_gone > 0.5 * R.sum(dim=0)).nonzero().flatten().tolist())


def all_of(kind: str, seeds: Iterable[int], *, steps: int) -> list[Run]:
    """The runs of these seeds, on two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(live, repeat(kind), seeds, repeat(steps)))


def test_classes_that_go_are_named_within_three_steps() -> None:
    """A single class that two components share is seen later, or not at all: each of them loses only a part."""
    found = {classes: all_of(str(classes), range(300, 305), steps=FAULT + 3) for classes in (3, 1)}
    for classes, runs in found.items():
        print(f"\n{classes} gone: named in {sum(bool(run.named()) for run in runs)} of {len(runs)} runs;", end=" ")
        print("components emptied and named:", [(run.emptied, sorted(map(str, run.named()))) for run in runs])
    assert all(run.named() for run in found[3])
    assert sum(bool(run.named()) for run in found[1]) >= 4


@pytest.mark.parametrize("kind", ["watermark", "no-augmentation"])
def test_run_without_structure_gets_its_verdict(kind: str) -> None:
    runs = all_of(kind, range(300, 305), steps=5 * EVERY)
    steps = [alarm.step for run in runs for alarm in run.alarms if alarm.kind == "no structure"]
    print(f"\n{kind}: no structure in {sum(run.has('no structure') for run in runs)} of {len(runs)} runs, at {steps}")
    assert all(run.has("no structure") for run in runs)


def test_healthy_runs_are_left_in_peace() -> None:
    runs = all_of("none", range(400, 420), steps=SCHEDULE)
    raised = [(run.seed, str(alarm)) for run in runs for alarm in run.alarms]
    print(f"\nhealthy: {len(raised)} false alarms in {len(runs)} runs", raised)
    assert len(raised) <= 1
    assert not any(run.has("no structure") for run in runs)
