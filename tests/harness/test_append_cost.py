"""The cost of logging a step does not depend on how many have been logged."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from mixture_torch import MixtureStats
from tests.harness.soak import steady_folder

N, K, D = 1024, 8, 32
LONGER = 64  # characters that numbers in a row of the log, and in names, may grow by
RISE = 1.5  # of a late step's time, relative to that of an early one
IO = Path("/proc/self/io")
modes = pytest.mark.parametrize("scores_mode", ["append", "per_step"])


class Logger:
    """Logs one step over and over.

    Args:
        log_dir: Its folder.
        scores_mode: How responsibilities are stored.
    """

    def __init__(self, log_dir: Path, scores_mode: Any) -> None:
        self.estimator = MixtureStats(K=K, enabled=True, log_dir=log_dir, store_scores=True, scores_mode=scores_mode)
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
        self.small = self.estimator.update(x[:K])
        self.estimator.update(x)
        self.steps = 0

    def log(self, stats: Any = None) -> float:
        """Logs a step, the last update's if nothing else is said, and returns the time in seconds."""
        start = time.perf_counter()
        self.estimator.log_step(step=self.steps, epoch=0, stats=stats)
        self.steps += 1
        return time.perf_counter() - start

    def age(self, steps: int) -> None:
        """Logs so many steps of few rows, which take less room."""
        for _ in range(steps):
            self.log(self.small)


def traffic() -> tuple[int, int]:
    """Bytes that this process has read and has written so far."""
    lines = dict(line.split(": ") for line in IO.read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


@pytest.mark.skipif(not IO.exists(), reason="bytes are counted by /proc")
@modes
def test_log_step_reads_and_writes_no_more_later_on(scores_mode: str, tmp_path: Path) -> None:
    logger, seen = Logger(tmp_path, scores_mode), [traffic()]
    for _ in range(200):
        logger.log()
        seen.append(traffic())
    moved = torch.tensor(seen).diff(dim=0)
    assert bool((moved[:, 1] >= 4 * N * K).all())  # what is counted is there
    assert bool((moved[10:] <= moved[10] + LONGER).all())


@pytest.mark.slow
@modes
@pytest.mark.parametrize("late", [900, 5000])
def test_late_log_step_takes_as_long_as_an_early_one(scores_mode: str, late: int) -> None:
    with steady_folder() as folder:
        old, young = Logger(Path(folder) / "old", scores_mode), Logger(Path(folder) / "young", scores_mode)
        old.age(late)
        young.age(10)
        # In turns: a time alone says more about who else is computing.
        before, after = zip(*[(young.log(), old.log()) for _ in range(100)], strict=True)
    early_ms, late_ms = 1e3 * median(before), 1e3 * median(after)
    print(f"\n{scores_mode}: log_step takes {early_ms:.3f} ms at steps 10-110, {late_ms:.3f} ms from step {late} on")
    assert late_ms <= RISE * early_ms
