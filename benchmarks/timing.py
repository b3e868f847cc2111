"""Times of competitors that take turns, so that disturbances affect all of them alike."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no annotations

from benchmarks.cases import Run

SAMPLE_SECONDS = 0.005  # shorter calls are repeated up to this time, so that the clock does not matter
MOST_CALLS = 100
STEPS_BETWEEN_EVENTS = 20
NORMAL_95 = 1.96


class Interval(NamedTuple):
    """A mean difference, its confidence interval, and the median."""

    mean: float
    low: float  # of the 95 % confidence interval of the mean
    high: float
    median: float


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Returns the mean of second - first over pairs, with its normal 95 % interval: mean +- 1.96 s / sqrt(n).

    Args:
        first: One figure per pair; at least two.
        second: The other figure of each pair.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    half = NORMAL_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half, statistics.median(differences))


def warm_up(runs: Mapping[str, Run], *, steps: int) -> None:
    """Calls each competitor `steps` times."""
    for run in runs.values():
        for _ in range(steps):
            run()


def minima(runs: Mapping[str, Run], *, rounds: int) -> dict[str, float]:
    """Returns the minimum seconds per call on the CPU, by name.

    Args:
        runs: The competitors.
        rounds: Number of turns.
    """
    calls = {name: _calls_per_sample(run) for name, run in runs.items()}
    clocks = {name: _Wall(run, calls[name]) for name, run in runs.items()}
    return {name: min(seconds) for name, seconds in _interleaved(clocks, rounds).items()}


def gpu_medians(runs: Mapping[str, Run], *, rounds: int) -> dict[str, float]:
    """Returns the median seconds per call on the GPU, by name, from events around 20 calls.

    Args:
        runs: The competitors, warmed up.
        rounds: Number of turns.
    """
    clocks = {name: _Events(run) for name, run in runs.items()}
    return {name: statistics.median(seconds) for name, seconds in _interleaved(clocks, rounds).items()}


def host_medians(runs: Mapping[str, Run], *, rounds: int, calls: int) -> dict[str, float]:
    """Returns the median seconds until a call returns to the host, by name, starting from an idle GPU.

    Args:
        runs: The competitors, warmed up.
        rounds: Number of turns.
        calls: 1 is a host that has just woken up, which takes its time; more also wait where the GPU is slower.
    """
    clocks = {name: _Host(run, calls) for name, run in runs.items()}
    return {name: statistics.median(seconds) for name, seconds in _interleaved(clocks, rounds).items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limits torch, NumPy and scikit-learn to `count` threads inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def _interleaved(clocks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            seconds[name].append(clock())
    return seconds


def _calls_per_sample(run: Run) -> int:
    once = min(_Wall(run, 1)() for _ in range(2))
    return min(max(math.ceil(SAMPLE_SECONDS / once), 1), MOST_CALLS)


class _Wall:
    def __init__(self, run: Run, calls: int) -> None:
        self.run, self.calls = run, calls

    def __call__(self) -> float:
        self.run()  # not timed: caches and thread pools still belong to the previous competitor
        start = time.perf_counter()
        for _ in range(self.calls):
            self.run()
        return (time.perf_counter() - start) / self.calls


class _Events:
    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has not annotated it
        torch.cuda.synchronize()
        start.record()
        for _ in range(STEPS_BETWEEN_EVENTS):
            self.run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000 / STEPS_BETWEEN_EVENTS


class _Host:
    def __init__(self, run: Run, calls: int) -> None:
        self.run, self.calls = run, calls

    def __call__(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.run()
        return (time.perf_counter() - start) / self.calls
