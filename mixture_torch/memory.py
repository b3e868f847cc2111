"""Where a step's results live: in memory that takes turns; and what is handed out of it, copied when it is read."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import attrs
import torch
from torch import Tensor

from mixture_core import Moments, StepStats
from mixture_core.absorb_cpu import Workspace, complete_
from mixture_core.pytrees import pytree
from mixture_torch.precision import full_float32


class Later(Protocol):
    """A tensor that nobody has asked for yet."""

    def read(self) -> Tensor:
        """Returns it, in memory of its own."""


class _Read:
    """A field of a record that holds a tensor or what it will be read from."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, record: Any, owner: type | None = None) -> Any:
        if record is None:  # asked of the class
            return self
        value: Tensor | Later = record.__dict__[self._name]
        return value if isinstance(value, Tensor) else value.read()

    def __set__(self, record: Any, value: Tensor | Later) -> None:
        record.__dict__[self._name] = value


class Triangle:
    """Covariances, (K, D, D), whose lower triangle is right; completed, in memory of their own, when they are read.

    Args:
        lower: The covariances.
    """

    def __init__(self, lower: Tensor) -> None:
        self._lower: Tensor | None = lower
        self._whole: Tensor = lower

    def leave(self) -> None:
        """Goes to memory of its own, before what it has is written to."""
        if (lower := self._lower) is not None:
            self._lower = lower.clone()

    def read(self) -> Tensor:
        """Returns the covariances, symmetric to the bit."""
        if self._lower is not None:
            with full_float32(self._lower):
                self._whole, self._lower = complete_(self._lower.clone()), None
        return self._whole


class Own:
    """A tensor of the reader's own, made when it is first read.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._tensor: Tensor | None = None

    def read(self) -> Tensor:
        """Returns it, always the same."""
        if self._tensor is None:
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                self._tensor = self._make()
        return self._tensor


@pytree
class ExactMoments(Moments):
    """Moments that are derived in full float32 whatever context they are read in."""

    weight = _Read("weight")
    mean = _Read("mean")
    covariance = _Read("covariance")

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


SLACK = 4  # times the memory that rows take may be kept for them


class Rows(NamedTuple):
    """The rows of a step, of which statistics tell the last call's."""

    N: int | Tensor  # rows of all calls so far, and of all ranks
    earlier: tuple[Tensor, ...] = ()  # R of the calls before
    n_ignored: int | Tensor = 0  # of the calls before


@pytree
@attrs.frozen(eq=False, kw_only=True, repr=False, slots=False, getstate_setstate=True)
class ExactStats(StepStats):
    """Statistics whose moments are exact."""

    n_relocated: Tensor  # () int64: components that were moved just before this step
    rows: ClassVar[Rows]  # not one of the statistics, and gone in what `tree_map` makes of them

    KEYS: ClassVar[tuple[str, ...]] = (*StepStats.KEYS, "n_relocated")


# After attrs, which would take a descriptor in the class body for a default.
for _name in ("R", "n_ignored", "n_relocated"):
    setattr(ExactStats, _name, _Read(_name))


class Memory:
    """Two memories for the covariances, of which each step writes to the other: fresh pages cost more than arithmetic.

    The new covariances never overwrite those that they come from, so that a step that breaks off leaves the state. Who
    holds statistics from two steps ago keeps them: they go to memory of their own before theirs is written to.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None
        self._rows: Tensor | None = None
        self._readers: dict[int, weakref.WeakSet[Triangle]] = {}  # of each of the two, by its id

    def lend(self, like: Tensor, *, N: int) -> Workspace:
        """Returns memory for a step of N rows: for covariances like these, and another one than theirs."""
        spare = self._spare
        if spare is None or spare is like or spare.shape != like.shape or spare.device != like.device:
            spare = torch.empty_like(like)
        for reader in self._readers.pop(id(spare), ()):
            reader.leave()
        length, rows = Workspace.length(like, N=N), self._rows
        if rows is None or rows.device != like.device or not length <= rows.shape[1] <= SLACK * length:
            self._rows = rows = Workspace.rows_for(like, N=N)
        return Workspace(spare, rows)

    def hand_out(self, stats: StepStats, rows: Rows, n_relocated: Tensor | None, *, before: Tensor) -> ExactStats:
        """Returns the statistics for a reader.

        Args:
            stats: Of the step; of their covariance only the lower triangle is right, and the rest may come `Later`.
            rows: Of the step.
            n_relocated: Components that were moved before the step, (); None is 0.
            before: The covariances that the step came from, whose memory is for the next step.
        """
        m = stats.moments
        triangle: Any = Triangle(m.covariance)
        # So that what readers do to it does not reach the state; what comes later is a copy already.
        weight, mean = (Own(value.clone) if isinstance(value, Tensor) else value for value in (m.weight, m.mean))
        self._spare = before
        self._readers = {
            id(memory): self._readers.get(id(memory), weakref.WeakSet()) for memory in (before, m.covariance)
        }
        self._readers[id(m.covariance)].add(triangle)
        moments = ExactMoments(weight=cast(Tensor, weight), mean=cast(Tensor, mean), covariance=triangle)
        # Made only if somebody reads it: no kernel launch per step.
        zero: Any = Own(partial(torch.zeros, (), dtype=torch.int64, device=m.covariance.device))
        moved = zero if n_relocated is None else n_relocated
        shown = ExactStats(moments=moments, R=stats.R, n_ignored=stats.n_ignored, n_relocated=moved)
        object.__setattr__(shown, "rows", rows)
        return shown
