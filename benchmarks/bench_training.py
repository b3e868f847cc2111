"""The time that the estimator adds to a step of SimCLR training."""

import importlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import cases
from benchmarks.cases import Settings
from benchmarks.pages import NONE, Table, milliseconds, present
from benchmarks.timing import paired_interval
from mixture_torch import MixtureStats, NTXentLoss, activate

TITLE = "Training"
MODELS = ("resnet50", "resnet18")
MIXTURES = ((8, 128), (64, 128), (8, 2048))  # K, D
PUBLIC = {("resnet50", 8, 128): 44, ("resnet50", 64, 128): 223, ("resnet50", 8, 2048): 328}  # % of a step on an H100
WITHOUT = "without"


class Job(NamedTuple):
    """A network to train, and for how long."""

    model: str
    K: int
    D: int
    batch: int  # images, with two views each
    pixels: int
    pairs: int  # at least
    seconds: float


def tables(settings: Settings) -> list[Table]:
    """Returns one table, or a sentence if torchvision is missing."""
    title = "A step of SimCLR, bfloat16 autocast, with and without the estimator"
    if not present("torchvision"):
        return [Table(title=title, remarks=("Not measured: torchvision is not installed.",))]
    remarks: tuple[str, ...] = (
        "Steps with and without take turns on the same network, in the order A B B A, each waited for at its end. "
        "Added: the mean of the paired differences over the median step without, and the 95 % interval of that mean.",
        "Public implementation: what one added to a ResNet-50 step on an H100, as told to us, not measured here.",
    )
    if settings.device.type == "cuda" and not settings.quick:
        jobs = [Job(model, K, D, 256, 224, 60, settings.training_seconds) for model in MODELS for K, D in MIXTURES]
    else:
        jobs = [Job("resnet18", 8, 128, 8, 32, 4, 0.0)]
        remarks += ("Too small to say anything of training as it is done: it only shows that this runs.",)
    return [
        Table(
            title=title,
            header=_header(jobs[0]),
            rows=tuple(row for job in jobs for row in _rows(settings, job)),
            remarks=remarks,
        )
    ]


def _header(job: Job) -> tuple[str, ...]:
    step = f"step without, ms ({job.batch} images, {job.pixels} px)"
    added = "added, % (mean)", "95 % interval", "added, % (median)"
    return ("network", "K", "D", "compiled", "pairs", step, *added, "public implementation, %")


def _rows(settings: Settings, job: Job) -> list[tuple[str, ...]]:
    torch.manual_seed(0)
    train = Training(job, settings.device)
    with tempfile.TemporaryDirectory() as root, ExitStack() as files:
        steps: dict[str, Callable[[], None]] = {WITHOUT: partial(train.step, None)}
        for compiled in [False, True] if settings.device.type == "cuda" else [False]:
            estimator = cases.make_estimator(job.K, Path(root) / str(compiled), compile=compiled)
            files.enter_context(estimator)
            steps["yes" if compiled else NONE] = partial(train.step, estimator)
        seconds = in_palindromes(steps, pairs=job.pairs, seconds=job.seconds, warmups=settings.warmups)
    return [_row(job, name, seconds[WITHOUT], figures) for name, figures in seconds.items() if name != WITHOUT]


def _row(job: Job, compiled: str, without: list[float], with_it: list[float]) -> tuple[str, ...]:
    step, added = statistics.median(without), paired_interval(without, with_it)
    mean, low, high, median = (f"{100 * seconds / step:.2f}" for seconds in added)
    public = str(PUBLIC.get((job.model, job.K, job.D), NONE))
    what = job.model, str(job.K), str(job.D), compiled, str(len(without))
    return (*what, milliseconds(step), mean, f"{low} to {high}", median, public)


class Training:
    """A network in training on random images.

    Args:
        job: The network and its batch.
        device: Of the training.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        models = importlib.import_module("torchvision.models")
        network = getattr(models, job.model)()
        width = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, job.D))
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)
        images = torch.randn(2 * job.batch, 3, job.pixels, job.pixels, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        self.criterion = NTXentLoss()
        self.device = device
        self._steps = itertools.count()

    def step(self, estimator: MixtureStats | None) -> None:
        """Takes one step and waits for it; an estimator is fed and writes its row."""
        self.optimizer.zero_grad()
        with activate(estimator), torch.autocast(self.device.type, dtype=torch.bfloat16):
            z1, z2 = self.network(self.images).chunk(2)
            loss = self.criterion(z1, z2)
        loss.backward()
        self.optimizer.step()
        if estimator is not None:
            estimator.log_step(step=next(self._steps), epoch=0)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def in_palindromes(
    steps: Mapping[str, Callable[[], None]], *, pairs: int, seconds: float, warmups: int
) -> dict[str, list[float]]:
    """Returns the seconds of each step by name. The order A B B A spreads a drift evenly.

    Args:
        steps: Functions that take turns.
        pairs: Least number of times each is timed.
        seconds: Least duration.
        warmups: Calls of each before the clock starts.
    """
    for step in steps.values():
        for _ in range(warmups):
            step()
    measured: dict[str, list[float]] = {name: [] for name in steps}
    there = list(steps.items())
    begin = time.perf_counter()
    for turn in itertools.count():
        if turn >= pairs and time.perf_counter() - begin >= seconds:
            return measured
        for name, step in there if turn % 2 == 0 else reversed(there):
            start = time.perf_counter()
            step()
            measured[name].append(time.perf_counter() - start)
    raise AssertionError("unreachable: counting has no end")
