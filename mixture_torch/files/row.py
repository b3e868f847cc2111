"""A logged step on its way to the files."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mixture_torch.files.disk import GrowingFile

Mode = Literal["append", "per_step"]


@dataclass(eq=False)
class Row:
    """A logged step, whose numbers are all known, and how far it is written."""

    step: int
    epoch: int
    K: int
    pi_min: float
    pi_max: float
    trace_B: float
    opnorm_B: float
    R: Tensor | None = None  # (N, K) responsibilities to store; None once they are
    resumes: bool = False  # whether earlier rows at this (epoch, step) or later are still to be superseded
    extra: tuple[float, ...] | None = None  # what `mixture_extra.csv` has of it after step and epoch; None for no row
    # What follows is for the run folder.
    scores_mode: Mode | None = None
    kept_bytes: int = 0  # of a copy of R
    ends: dict[GrowingFile, int] = field(default_factory=dict)  # where files ended before the row
    number: int = 0  # of the files for what it supersedes, once they are begun
    moved: int = 0  # entries of responsibilities in them

    def lacks(self, file: GrowingFile) -> bool:
        """Returns whether the row is not in an open file yet; an interrupt may have come right after the write."""
        before = self.ends[file] = min(self.ends.get(file, file.end), file.end)
        return file.end == before

    def keep(self, R: Tensor) -> int:
        """Copies the responsibilities, as their owner may change them, and returns the bytes of the copy."""
        self.R = R.detach().to("cpu", torch.float32, copy=True)
        self.kept_bytes = self.R.nbytes
        return self.kept_bytes
