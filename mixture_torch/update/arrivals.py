"""The figures of updates on their way from the device to the host."""

import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mixture_core import StepStats
from mixture_core.moments import figures
from mixture_torch.update.batch import Doubt
from mixture_torch.update.stats import Rows

T = TypeVar("T")
SHAPES = {"pi": ("K",), "B": ("D", "D"), "R": ("N", "K"), "trace_B": (), "opnorm_B": ()}  # of what a row needs


class Report:
    """The figures of one update, and what may be wrong with its batch."""

    def __init__(self, numbers: Tensor, *, K: int, arrived: torch.cuda.Event | None = None) -> None:
        self.K = K
        self.step: int | None = None  # as which it was logged last
        self.doubts: list[Doubt] = []
        self._arrived = arrived  # recorded when all that is on the way has been sent; None if nothing is
        self._numbers = self.send(numbers)  # (6,) as in `numbers_of`

    @classmethod
    def of(cls, stats: Mapping[str, Tensor]) -> "Report":
        """Returns the report of what an update returned, on its way."""
        return cls(numbers_of(stats), K=len(stats.moments.weight if isinstance(stats, StepStats) else stats["pi"]))

    def doubt(self, doubts: Iterable[Doubt]) -> None:
        """Adds what may be wrong with the batch."""
        self.doubts += [Doubt(self.send(value), error) for value, error in doubts]

    def send(self, tensor: Tensor) -> Tensor:
        """Returns a copy on the host, which is complete when the report is here."""
        copied = tensor.to("cpu", non_blocking=True)
        if tensor.is_cuda:
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        return copied

    @property
    def is_here(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._arrived is None

    def wait(self) -> None:
        """Returns when everything is here."""
        if self._arrived is not None and not self._arrived.query():  # type: ignore[no-untyped-call]  # torch's
            self._arrived.synchronize()

    @property
    def figures(self) -> list[float]:
        """pi_min, pi_max, trace_B and opnorm_B; nan if no row of the step was usable."""
        return [float("nan")] * 4 if self.n_ignored == self.N else self._values[:4]

    @property
    def n_ignored(self) -> int:
        """How many rows of the step were ignored."""
        return int(self._values[4])

    @property
    def N(self) -> int:
        """How many rows the step had."""
        return int(self._values[5])

    @cached_property
    def _values(self) -> list[float]:
        values: list[float] = self._numbers.tolist()
        return values


class Arrivals(Generic[T]):
    """A queue of what is to be done when reports are here, first in, first out.

    Another thread or a signal handler may use it at any time: one call works on it, and nothing is lost.

    Args:
        turn: Returns the lock of the process that actions take, too. With a lock of its own, a signal handler that
            comes while its thread has the one lock could wait for the other for ever.
    """

    def __init__(self, turn: Callable[[], AbstractContextManager[Any]]) -> None:
        self._queue: deque[tuple[Report, T]] = deque()
        self._turn = turn
        self._is_busy = False

    def expect(self, report: Report, item: T) -> None:
        """Appends an item that waits for a report."""
        self._queue.append((report, item))

    def settle(self, act: Callable[[T], None], *, but: int = 0) -> None:
        """Calls `act` with each item, in order, and does not wait for the reports of the latest `but`.

        If `act` raises an error, that item is done, and the others stay; after an interrupt it is called again.
        """
        with self._turn():
            if self._is_busy:  # in the middle of another call, which goes on
                return
            try:
                self._is_busy = True
                while self._queue and (len(self._queue) > but or self._queue[0][0].is_here):
                    report, item = self._queue[0]
                    report.wait()
                    try:
                        act(item)
                    except Exception:
                        self._queue.popleft()
                        raise
                    self._queue.popleft()
            finally:
                self._is_busy = False


def numbers_of(stats: Mapping[str, Tensor]) -> Tensor:
    """Returns pi_min, pi_max, trace_B, opnorm_B, the number of ignored rows of the step and that of all, (6,)."""
    if isinstance(stats, StepStats):
        logged, n_ignored = figures(stats.moments), stats.n_ignored
    else:  # made by hand, or gone through a dict
        logged = _figures_of(stats)
        n_ignored = (stats["R"].sum(dim=1) == 0).sum() if "R" in stats else logged.new_zeros((), dtype=torch.int64)
    N, _, n_ignored_earlier = getattr(stats, "rows", None) or Rows(len(stats["R"]) if "R" in stats else 1)
    # Never from the host's memory to a GPU's, for which somebody would have to wait.
    n_rows = N if isinstance(N, Tensor) else n_ignored.new_full((), N)
    return torch.cat([logged, torch.stack([n_ignored + n_ignored_earlier, n_rows]).to(logged.dtype)])


def _figures_of(stats: Mapping[str, Tensor]) -> Tensor:
    pi = stats["pi"]
    trace_B = stats["trace_B"] if "trace_B" in stats else stats["B"].diagonal().sum()
    if "opnorm_B" in stats:
        opnorm_B = stats["opnorm_B"]
    else:  # the decomposition raises errors at NaN
        B = stats["B"].to(torch.float32)
        opnorm_B = torch.linalg.eigvalsh(B).amax() if bool(B.isfinite().all()) else B.sum() * torch.nan
    return torch.stack([figure.to(torch.float32) for figure in (pi.min(), pi.max(), trace_B, opnorm_B)])


def check_loggable(stats: Mapping[str, Tensor], *, stores_scores: bool) -> None:
    """Raises a ValueError if no row can be made of a mapping: of `pi` and `B`, or of `pi` and what derives from B."""
    if isinstance(stats, StepStats):
        return
    needed = ["pi"] if "trace_B" in stats and "opnorm_B" in stats else ["pi", "B"]
    if missing := [key for key in [*needed, *["R"] * stores_scores] if key not in stats]:
        raise ValueError(f"`stats` must be what `update` returned, got a mapping without {' and '.join(missing)}.")
    for key, shape in SHAPES.items():
        if key in stats and (key != "R" or stores_scores) and not _fits(value := stats[key], key):
            got = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`stats` must hold {key} as a dense tensor ({', '.join(shape)}), got {got}.")


def _fits(value: Any, key: str) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_complex():
        return False
    if value.ndim != len(SHAPES[key]) or (key == "B" and value.shape[0] != value.shape[1]):
        return False
    return key == "R" or value.numel() > 0


def responsibilities_of(stats: Mapping[str, Tensor]) -> Tensor:
    """Returns R of all rows of the step, (N, K), of whichever call they came with."""
    rows = getattr(stats, "rows", None)
    return torch.cat([*rows.earlier, stats["R"]]) if rows and rows.earlier else stats["R"]


def as_count(name: str, value: int) -> int:
    """Returns a step or an epoch as an integer, at least 0."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if count < 0:
        raise ValueError(f"`{name}` must be at least 0, got {count}.")
    if count >= 2**63:  # `read_log` could not read it back
        raise ValueError(f"`{name}` must be below 2^63, got {count}.")
    return count
