"""What the tests of the run folder share: recorders without an estimator, faults of the disk, other processes."""

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.readers import read_log
from mixture_torch.recorder import Recorder
from mixture_torch.reports import Report, numbers_of

ROOT = Path(__file__).parents[2]
HEADER = b"step,epoch,K,pi_min,pi_max,trace_B,opnorm_B\n"
Place = tuple[int, int]  # (epoch, step)


def recorder(log_dir: Path, **options: Any) -> Recorder:
    """A recorder of three components that writes, unless the options say otherwise."""
    config = MixtureRuntimeConfig(**{"K": 3, "enabled": True, **options})
    return Recorder(config, log_dir=log_dir, is_main=True)


def stats(value: float = 0.0, N: int = 4) -> dict[str, Tensor]:
    """What an update would return, as far as it is recorded, with responsibilities of one value."""
    pi, number = torch.tensor([0.25, 0.25, 0.5]), torch.tensor(value)
    return {"pi": pi, "trace_B": number, "opnorm_B": number, "R": torch.full((N, 3), 1.0 + value)}


def log(one: Recorder, *places: Place | int, value: float = 0.0, N: int = 4) -> None:
    """Records steps as `log_step` does; a number is a step of epoch 0."""
    for place in places:
        epoch, step = place if isinstance(place, tuple) else (0, place)
        one.record(stats(value, N), None, step=step, epoch=epoch)
        settle(one)


class Later:
    """Of a report that comes when somebody waits for it, as from a GPU."""

    def query(self) -> bool:
        """Not yet."""
        return False

    def synchronize(self) -> None:
        """Now."""


def log_later(one: Recorder, step: int) -> None:
    """Records a step of epoch 0 whose report is on its way, and which has its number for a value."""
    given = stats(float(step))
    report = Report(numbers_of(given), K=3, arrived=Later())  # type: ignore[arg-type]
    one.expect(report)
    one.record(given, report, step=step, epoch=0)


def settle(one: Recorder) -> None:
    """Writes what has come."""
    for _ in one.arrivals(but=1):
        pass


def row(place: Place | int, value: float = 0.0) -> bytes:
    """The line that `log` leaves in the log."""
    epoch, step = place if isinstance(place, tuple) else (0, place)
    return f"{step},{epoch},3,0.25,0.5,{value:.9g},{value:.9g}\n".encode()


def places(log_dir: Path) -> list[Place]:
    """Where in the run the rows of a log belong."""
    found = read_log(log_dir)
    return list(zip(found["epoch"].tolist(), found["step"].tolist(), strict=True))


@contextmanager
def said() -> Iterator[list[str]]:
    """Collects what is warned about in its block."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


@contextmanager
def broken(call: str, code: int = errno.ENOSPC) -> Iterator[None]:
    """Has a call of `os` fail in its block."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        yield


def in_child(action: Callable[[], object]) -> int:
    """Does something in a forked child, and returns its exit status: 0, or 1 where it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def process(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """Starts a script in a process of its own, with `recorder` and `log` at hand."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom tests.wrapper.recording import *\n"
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(script: str, *arguments: object) -> tuple[str, str, int]:
    """Runs such a script, and returns what it printed, what it complained about, and its exit status."""
    with process(script, *arguments) as started:
        out, err = started.communicate(timeout=60)
    return out, err, started.returncode
