"""A long run in a process of its own, whose memory is nobody else's: `python -m tests.harness.soak '{"steps": 2000}'`.

Prints as JSON how much the memory has grown, what a step takes, and how much longer it takes than one of an estimator
that has just been made. The two take turns, step by step: a step's time alone says more about who else is computing.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixture_torch import MixtureStats

K, D = 8, 32
SIZES = (64, 48, 96, 64, 17, 80)  # rows of successive batches
WARM_UP = 1000  # steps after which memory has to stay what it is
TURNS = 102  # steps of each of two estimators that are compared
STATM = Path("/proc/self/statm")
MEMORY = Path("/dev/shm")


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def steady_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory, where there is one: a disk's time goes up and down with what others write to it."""
    return tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)


def begin(log_dir: str, scores_mode: Any, batches: list[Tensor]) -> tuple[MixtureStats, Callable[[], float]]:
    """An estimator with files, and what takes it one step on and returns how long that took, in seconds of the CPU."""
    estimator = MixtureStats(K=K, enabled=True, log_dir=log_dir, store_scores=True, scores_mode=scores_mode)
    steps = itertools.count()

    def advance() -> float:
        step = next(steps)
        start = time.thread_time()
        estimator.update(batches[step % len(SIZES)])
        estimator.log_step(step=step, epoch=0)
        return time.thread_time() - start

    return estimator, advance


def compare(old: Callable[[], float], young: Callable[[], float]) -> tuple[float, float]:
    """The median times of two that take turns."""
    times = [(old(), young()) for _ in range(TURNS)]
    first, second = zip(*times, strict=True)
    return statistics.median(first), statistics.median(second)


def soak(*, steps: int, scores_mode: str = "append", flush_every: int = 0, compare_every: int = 0) -> dict[str, Any]:
    """What became of a run.

    Args:
        steps: How long it is, about.
        scores_mode: Of the estimator.
        flush_every: Steps between flushes; 0 for none.
        compare_every: Steps between comparisons to another estimator; 0 for none.
    """
    generator = torch.Generator().manual_seed(0)
    centers = 5 * torch.randn(K, D, generator=generator)
    batches = [centers[torch.arange(N) % K] + torch.randn(N, D, generator=generator) for N in SIZES]
    pairs: list[tuple[float, float]] = []
    with steady_folder() as folder:
        estimator, advance = begin(folder, scores_mode, batches)
        for step in range(1, steps + 1):
            advance()
            if flush_every and step % flush_every == 0:
                estimator.flush()
            if compare_every and step % compare_every == 0:
                with steady_folder() as other:
                    young, advance_young = begin(other, scores_mode, batches)
                    advance_young()
                    pairs.append(compare(advance, advance_young))
                    young.close()
            if step == WARM_UP:
                before = resident()
        grown = resident() - before
        estimator.close()
    return {"grown": grown, "pairs": pairs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(soak(**json.loads(sys.argv[1]))))
