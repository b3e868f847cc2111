"""What the tests of the run folder share: a recorder without an estimator, faults of the disk, other processes."""

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch import read_log
from mixture_torch.files.recorder import Recorder, Row

ROOT = Path(__file__).parents[2]
HEADER = b"step,epoch,K,pi_min,pi_max,trace_B,opnorm_B\n"
Place = tuple[int, int]  # (epoch, step)


class Writer(Recorder):
    """A recorder that writes, with responsibilities if a `scores_mode` is given."""

    resumes = False  # whether the next row goes on from a checkpoint
    K: int | None = None  # of rows in `mixture_extra.csv`, if there are to be any

    def __init__(
        self,
        log_dir: Path,
        scores_mode: Any = None,
        *,
        existing: Any = "append",
        strict: bool = False,
        resumes: bool = False,
    ) -> None:
        super().__init__(log_dir, scores_mode=scores_mode, existing=existing, writes=lambda: True, strict=strict)
        self.resumes = resumes

    def log(self, *places: Place | int, value: float = 0.0, N: int = 4) -> None:
        """Writes rows of one value; a number is a step of epoch 0."""
        for place in places:
            epoch, step = place if isinstance(place, tuple) else (0, place)
            self.open()
            R = None if self.scores_mode is None else torch.full((N, 3), 1.0 + value)
            extra = None if self.K is None else extra_of(self.K, value)
            one, self.resumes = Row(step, epoch, self.K or 3, 0.25, 0.5, value, value, R, self.resumes, extra), False
            self.write(one)


def extra_of(K: int, value: float = 0.0) -> tuple[float, ...]:
    """The figures that `Writer.log` adds to a row of K components."""
    return 64, 1, 0, *[value] * 5, *(0.25 + k for k in range(K)), *(16 + k for k in range(K)), *[value] * K


def extra_line(place: Place | int, K: int, value: float = 0.0) -> bytes:
    """The line that `Writer.log` leaves in `mixture_extra.csv`."""
    epoch, step = place if isinstance(place, tuple) else (0, place)
    return (",".join(f"{number:.9g}" for number in (step, epoch, *extra_of(K, value))) + "\n").encode()


def line(place: Place | int, value: float = 0.0) -> bytes:
    """The line that `Writer.log` leaves in the log."""
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


def process(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """Starts a script in a process of its own, with `Writer` at hand."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom tests.files.recording import *\n"
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(script: str, *arguments: object) -> tuple[str, str, int]:
    """Runs such a script, and returns what it printed, what it complained about, and its exit status."""
    with process(script, *arguments) as started:
        out, err = started.communicate(timeout=60)
    return out, err, started.returncode
