"""Where the covariances live: two memories that take turns, and copies for whoever reads them."""

import weakref
from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch import Tensor

from mixture_core import Moments, StepStats
from mixture_core.grouped import Workspace, complete_
from mixture_core.pytrees import pytree
from mixture_torch.precision import full_float32


class Triangle:
    """Covariances, (K, D, D), whose lower triangle is right; completed, in memory of their own, when they are read.

    Args:
        lower: The covariances.
    """

    def __init__(self, lower: Tensor) -> None:
        self._lower: Tensor | None = lower
        self._whole: Tensor | None = None

    def leave(self) -> None:
        """Goes to memory of its own, before what it has is written to."""
        if self._lower is not None:
            self._lower = self._lower.clone()

    def read(self) -> Tensor:
        """Returns the covariances, symmetric to the bit."""
        if self._lower is not None:
            with full_float32(self._lower):
                self._whole, self._lower = complete_(self._lower.clone()), None
        return cast(Tensor, self._whole)


@pytree
class ExactMoments(Moments):
    """Moments whose covariance is completed when it is read, and that are derived in full float32 in any context."""

    @property
    def covariance(self) -> Tensor:
        """Component covariances, (K, D, D)."""
        held: Tensor | Triangle = self.__dict__["covariance"]
        return held.read() if isinstance(held, Triangle) else held

    @covariance.setter
    def covariance(self, value: Tensor | Triangle) -> None:
        self.__dict__["covariance"] = value

    @property
    def B(self) -> Tensor:
        """Between-component covariance, (D, D)."""
        with full_float32(self.weight):
            return super().B

    @property
    def opnorm_B(self) -> Tensor:
        """Operator norm of B, ()."""
        with full_float32(self.weight):
            return super().opnorm_B

    @property
    def participation_ratio(self) -> Tensor:
        """Number of directions in use, ()."""
        with full_float32(self.weight):
            return super().participation_ratio


Reference: TypeAlias = Callable[[], Triangle | None]


def _nobody() -> Triangle | None:
    return None


class Memory:
    """Two memories for the covariances, of which each step writes to the other: fresh pages cost more than arithmetic.

    The new covariances never overwrite those that they come from, so that a step that breaks off leaves the state. Who
    holds statistics from two steps ago keeps them: they go to memory of their own before theirs is written to.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None
        self._rows: Tensor | None = None
        self._reader_of_spare: Reference = _nobody
        self._reader: Reference = _nobody

    def lend(self, like: Tensor, *, N: int) -> Workspace:
        """Returns memory for a step of N rows: for covariances like these, and another one than theirs."""
        spare, reader = self._spare, self._reader_of_spare()
        if spare is None or spare.shape != like.shape or spare.device != like.device:
            spare = torch.empty_like(like)
        elif reader is not None:
            reader.leave()
        if self._rows is None or self._rows.device != like.device or self._rows.shape[1] < Workspace.length(like, N=N):
            self._rows = Workspace.rows_for(like, N=N)
        return Workspace(spare, self._rows)

    def hand_out(self, stats: StepStats, *, before: Tensor) -> StepStats:
        """Returns the statistics for a reader.

        Args:
            stats: Of the step; of their covariance only the lower triangle is right.
            before: The covariances that the step came from, whose memory is for the next step.
        """
        m = stats.moments
        triangle = Triangle(m.covariance)
        self._spare, self._reader_of_spare, self._reader = before, self._reader, weakref.ref(triangle)
        moments = ExactMoments(weight=m.weight, mean=m.mean, covariance=cast(Tensor, triangle))
        return StepStats(moments=moments, R=stats.R, n_ignored=stats.n_ignored, n_revived=stats.n_revived)
