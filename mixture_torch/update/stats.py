"""The statistics of a step. They lie in memory that later steps overwrite, and are copied when first read."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import ClassVar, NamedTuple, NoReturn, Protocol

import attrs
import torch
from torch import Tensor

import mixture_core
from mixture_core import Moments
from mixture_core.absorb_cpu import Workspace, complete_
from mixture_core.pytrees import pytree
from mixture_torch.update.precision import full_float32

SLACK = 4  # memory for rows is replaced if it is more than this many times too long


class Source(Protocol):
    """The results of a step by name: weight, mean, covariance (lower triangles only), R and n_ignored."""

    def __getitem__(self, name: str) -> Tensor:
        """Returns a result."""


class Rows(NamedTuple):
    """The rows of a training step, which `update` may have received in several calls."""

    N: int | Tensor  # rows of all calls so far, on all ranks
    earlier: tuple[Tensor, ...] = ()  # R of the earlier calls
    n_ignored: int | Tensor = 0  # ignored rows of the earlier calls


@pytree
class ExactMoments(Moments):
    """Moments that belong to the reader, and whose derived quantities are computed in full float32 in any context."""

    _source: ClassVar[Source]  # set on each record that `of` makes

    @classmethod
    def of(cls, source: Source) -> "ExactMoments":
        """Returns moments that are copied from the source when they are first read."""
        moments = cls.__new__(cls)
        moments.__dict__["_source"] = source
        return moments

    @cached_property
    def weight(self) -> Tensor:
        """Number of samples of each component, (K,)."""
        return _own(self._source["weight"].clone)

    @cached_property
    def mean(self) -> Tensor:
        """Component means, (K, D)."""
        return _own(self._source["mean"].clone)

    @cached_property
    def covariance(self) -> Tensor:
        """Component covariances, (K, D, D), symmetric to the bit."""
        lower = self._source["covariance"]
        return _own(lambda: complete_(lower.clone()))

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


@attrs.frozen(eq=False, kw_only=True, repr=False, slots=False, getstate_setstate=True)
class _Fields(mixture_core.StepStats):
    n_relocated: Tensor


@pytree
class StepStats(_Fields):
    """The mixture after a step, and the assignment of the step's rows; read by attribute or by key.

    It holds pi (K,), mu (K, D), Sigma (K, D, D), B (D, D), R (N, K), and the scalars trace_B, opnorm_B,
    participation_ratio, n_ignored (rows) and n_relocated (components moved just before the step). It is empty, and
    false, before the first update and if the estimator is disabled.

    Example:
        >>> import torch
        >>> from mixture_torch import MixtureStats
        >>> stats = MixtureStats(K=2, enabled=True).update(torch.randn(64, 4))
        >>> stats.pi.shape, stats["B"].shape, bool(stats)
        (torch.Size([2]), torch.Size([4, 4]), True)
    """

    KEYS: ClassVar[tuple[str, ...]] = (*mixture_core.StepStats.KEYS, "n_relocated")
    rows: ClassVar[Rows]  # of the whole training step; missing in records that `tree_map` builds
    _source: ClassVar[Source]  # set on each record that `of` makes

    @classmethod
    def of(cls, source: Source, rows: Rows, n_relocated: Tensor | None) -> "StepStats":
        """Returns statistics that are read from the source when they are first asked for."""
        stats = cls.__new__(cls)
        stats.__dict__.update(_source=source, rows=rows)
        if n_relocated is not None:
            stats.__dict__["n_relocated"] = n_relocated
        return stats

    @cached_property
    def moments(self) -> Moments:
        """Weight, mean and covariance of each component after the step."""
        return ExactMoments.of(self._source)

    @cached_property
    def R(self) -> Tensor:
        """Responsibilities of the rows of this call, (N, K)."""
        return self._source["R"]

    @cached_property
    def n_ignored(self) -> Tensor:
        """Number of rows of this call that were ignored, () int64."""
        return self._source["n_ignored"]

    @cached_property
    def n_relocated(self) -> Tensor:
        """Number of components that were moved just before the step, () int64."""
        return _own(lambda: torch.zeros((), dtype=torch.int64, device=self._source["n_ignored"].device))


class _NoStats(StepStats):
    KEYS: ClassVar[tuple[str, ...]] = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"There is no `{name}` yet: the estimator has had no update, or it is disabled.")

    def __getitem__(self, key: str) -> NoReturn:
        raise KeyError(f"There is no {key!r} yet: the estimator has had no update, or it is disabled.")

    def __repr__(self) -> str:
        return "StepStats()"

    def __reduce__(self) -> str:
        return "NOTHING"


NOTHING: StepStats = _NoStats.__new__(_NoStats)  # what `update` returns if the estimator is disabled


def _own(make: Callable[[], Tensor]) -> Tensor:
    """A tensor that can take part in gradients, even if it is first read in inference mode."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        return make()


class Memory:
    """Two memories for the covariances, which steps write to in turn: new memory would cost more than the arithmetic.

    A step never overwrites the covariances that it starts from, so that a step that fails leaves the state as it was.
    Statistics of earlier steps that somebody still holds are copied before their memory is overwritten.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None
        self._rows: Tensor | None = None
        self._readers: list[tuple[Tensor, weakref.ref[Moments]]] = []  # who may yet read each memory

    def lend(self, like: Tensor, *, N: int) -> Workspace:
        """Returns memory for a step of N rows, other than that of the covariances that it starts from, `like`."""
        spare = self._spare
        if spare is None or spare is like or spare.shape != like.shape or spare.device != like.device:
            spare = torch.empty_like(like)
        for memory, reader in self._readers:
            if memory is spare and (moments := reader()) is not None:
                moments.weight, moments.covariance  # noqa: B018  # copies them, and all results of a replayed step
        length, rows = Workspace.length(like, N=N), self._rows
        if rows is None or rows.device != like.device or not length <= rows.shape[1] <= SLACK * length:
            rows = self._rows = Workspace.rows_for(like, N=N)
        return Workspace(spare, rows)

    def hand_out(self, source: Source, rows: Rows, n_relocated: Tensor | None, *, before: Tensor) -> StepStats:
        """Returns the statistics for their reader; the next step may write to the memory of `before`."""
        stats = StepStats.of(source, rows, n_relocated)
        self._spare = before
        self._readers = [reader for reader in self._readers if reader[0] is before]
        self._readers.append((source["covariance"], weakref.ref(stats.moments)))
        return stats
