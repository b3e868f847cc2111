"""Long runs: a step costs what it cost at the start, in time and in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from tests.harness.soak import STATM

ROOT = Path(__file__).parents[2]
MEMORY = 8 * 2**20  # bytes that a run may grow after its first 1,000 steps
RISE = 1.05  # of a step's time, relative to that of a new estimator
RUNS: dict[str, dict[str, Any]] = {
    "append": {"steps": 20_000, "compare_every": 500},
    "append, flushed": {"steps": 20_000, "compare_every": 500, "flush_every": 1000},
    "per_step": {"steps": 2_000, "compare_every": 50, "scores_mode": "per_step"},
}

needs_statm = pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc")


def soak(**options: Any) -> dict[str, Any]:
    """Runs it in a process of its own."""
    command = [sys.executable, "-m", "tests.harness.soak", json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@needs_statm
def test_memory_stays_what_it_is_after_the_first_steps() -> None:
    assert soak(steps=1500)["grown"] < MEMORY


@needs_statm
@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_long_run_stays_as_light_as_it_was(options: dict[str, Any]) -> None:
    found = soak(**options)
    old, young = np.array(found["pairs"]).T
    ratio, quarter = old / young, len(old) // 4
    slope, _ = np.polyfit(np.arange(len(ratio)) / len(ratio), ratio, 1)
    rise = median(ratio[-quarter:]) / median(ratio[:quarter])
    print(
        f"\n{options}: {1e3 * old.min():.2f} ms of CPU a step, {rise - 1:+.1%} in the last quarter, "
        f"{slope:+.1%} by a linear fit, {found['grown'] / 2**20:+.2f} MiB after step 1,000"
    )
    assert rise < RISE
    assert found["grown"] < MEMORY
