"""The cost of logging a step does not depend on how many have been logged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch import MixtureStats

N, K, D = 1024, 8, 32
LONGER = 64  # characters that numbers in a row of the log, and in names, may grow by
IO = Path("/proc/self/io")


def traffic() -> tuple[int, int]:
    """Bytes that this process has read and has written so far."""
    lines = dict(line.split(": ") for line in IO.read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


@pytest.mark.skipif(not IO.exists(), reason="bytes are counted by /proc")
@pytest.mark.parametrize("scores_mode", ["append", "per_step"])
def test_log_step_reads_and_writes_no_more_later_on(scores_mode: Any, tmp_path: Path) -> None:
    estimator = MixtureStats(K=K, enabled=True, log_dir=tmp_path, store_scores=True, scores_mode=scores_mode)
    estimator.update(torch.randn(N, D, generator=torch.Generator().manual_seed(0)))
    seen = [traffic()]
    for step in range(200):
        estimator.log_step(step=step, epoch=0)
        seen.append(traffic())
    moved = torch.tensor(seen).diff(dim=0)
    assert bool((moved[:, 1] >= 4 * N * K).all())  # what is counted is there
    assert bool((moved[10:] <= moved[10] + LONGER).all())
