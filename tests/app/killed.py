"""The command line in a process that is killed at a given instant: `python -m tests.app.killed log_step 6 demo`."""

import os
import signal
import sys
from typing import Any

import torch

from mixture_torch import MixtureStats
from mixture_torch.__main__ import main

INSTANTS = {"log_step": MixtureStats, "replace": os}  # whose method or function it is


def run_until(name: str, call: int, arguments: list[str]) -> None:
    """Runs a command, and kills this process when it calls a function for that many times, before it does anything."""
    torch.set_num_threads(1)
    owner = INSTANTS[name]
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, counted)
    main(arguments)


if __name__ == "__main__":
    run_until(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
