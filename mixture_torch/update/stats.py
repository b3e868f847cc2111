"""The statistics of a step. They lie in memory that later steps overwrite, and are copied when first read."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar, NoReturn, Protocol

import attrs
import torch
from torch import Tensor

import mixture_core
from mixture_core import Moments
from mixture_core.absorb_cpu import Workspace, complete_
from mixture_core.pairs import Pairs
from mixture_core.pytrees import pytree
from mixture_torch.update.arrivals import Report
from mixture_torch.update.figures import Rows
from mixture_torch.update.precision import full_float32

SLACK = 4  # memory for rows is replaced if it is more than this many times too long


class Source(Protocol):
    """The results of a step by name: weight, mean, covariance (lower triangles only), R, n_ignored and counts."""

    def __getitem__(self, name: str) -> Tensor:
        """Returns a result."""


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
    def lower(self) -> Moments:
        """These moments, not copied if nobody has read them; then only the lower triangles are defined."""
        if "covariance" in self.__dict__ or "_source" not in self.__dict__:
            return self
        return Moments(**{name: self._source[name] for name in ("weight", "mean", "covariance")})

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


@attrs.frozen(eq=False, kw_only=True, repr=False, slots=False)
class _Fields(mixture_core.StepStats):
    n_relocated: Tensor


@pytree
class StepStats(_Fields):
    """The mixture after a step, and the assignment of the step's rows; read by attribute or by key.

    It holds pi (K,), mu (K, D), Sigma (K, D, D), B (D, D), R (N, K), and the scalars trace_B, opnorm_B,
    participation_ratio, n_ignored (rows) and n_relocated (components moved just before the step), and counts (K,), the
    rows in each component. It is empty, and false, before the first update and if the estimator is disabled.

    Example:
        >>> import torch
        >>> from mixture_torch import MixtureStats
        >>> stats = MixtureStats(K=2, enabled=True).update(torch.randn(64, 4))
        >>> stats.pi.shape, stats["B"].shape, bool(stats)
        (torch.Size([2]), torch.Size([4, 4]), True)
    """

    KEYS: ClassVar[tuple[str, ...]] = (*mixture_core.StepStats.KEYS, "n_relocated")
    # Both are missing in records that `tree_map` builds.
    rows: ClassVar[Rows]  # of the whole training step
    pairs: ClassVar[Pairs | None]  # statistics of pairs of views after it
    _source: ClassVar[Source]  # set on each record that `of` makes

    @classmethod
    def of(cls, source: Source, rows: Rows, n_relocated: Tensor | None, pairs: Pairs | None) -> "StepStats":
        """Returns statistics that are read from the source when they are first asked for."""
        stats = cls.__new__(cls)
        stats.__dict__.update(_source=source, rows=rows, pairs=pairs)
        if n_relocated is not None:
            stats.__dict__["n_relocated"] = n_relocated
        return stats

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy holds: everything but the source."""
        kept = {name: value for name, value in self.__dict__.items() if name in ("rows", "pairs")}
        return kept | {field.name: getattr(self, field.name) for field in attrs.fields(_Fields)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Becomes the copy."""
        self.__dict__.update(state)

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
    def counts(self) -> Tensor:
        """Number of rows of this call in each component, (K,); of all ranks with `cross_rank`."""
        return self._source["counts"]

    @cached_property
    def n_relocated(self) -> Tensor:
        """Number of components that were moved just before the step, () int64."""
        return _own(lambda: torch.zeros((), dtype=torch.int64, device=self._source["n_ignored"].device))

    def scalars(self) -> dict[str, float]:
        """Returns the figures of `mixture.csv` and `mixture_extra.csv` as floats, by the names of their columns.

        In a step without usable rows they are nan. On a GPU, the host waits for them.
        """
        with full_float32(self.R):
            report = Report.of(self, extra=True)
            report.wait()
        return report.figures.scalars


class _NoStats(StepStats):
    KEYS: ClassVar[tuple[str, ...]] = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"There is no `{name}` yet: the estimator has had no update, or it is disabled.")

    def __getitem__(self, key: str) -> NoReturn:
        raise KeyError(f"There is no {key!r} yet: the estimator has had no update, or it is disabled.")

    def scalars(self) -> dict[str, float]:
        return {}

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

    def hand_out(
        self, source: Source, rows: Rows, n_relocated: Tensor | None, pairs: Pairs | None, *, before: Tensor
    ) -> StepStats:
        """Returns the statistics for their reader; the next step may write to the memory of `before`."""
        stats = StepStats.of(source, rows, n_relocated, pairs)
        self._spare = before
        self._readers = [reader for reader in self._readers if reader[0] is before]
        self._readers.append((source["covariance"], weakref.ref(stats.moments)))
        return stats


def results_of(stats: mixture_core.StepStats) -> Source:
    """Returns the results of a step by name."""
    m = stats.moments
    results = {"weight": m.weight, "mean": m.mean, "covariance": m.covariance}
    return results | {"R": stats.R, "n_ignored": stats.n_ignored, "counts": stats.counts}


def is_idle(results: Source, n_rows: int | Tensor) -> bool:
    """Returns whether a batch has no usable row; on a GPU, for which the host does not wait, whether it has no row."""
    n_ignored = results["n_ignored"]
    if n_ignored.is_cuda:
        return isinstance(n_rows, int) and n_rows == 0
    return int(n_ignored) == int(n_rows)
