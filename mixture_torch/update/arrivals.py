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
from mixture_core.pairs import Pairs
from mixture_torch.update.batch import Doubt
from mixture_torch.update.figures import Figures, numbers_of, pair_numbers

T = TypeVar("T")


class Report:
    """The figures of one update, and what may be wrong with its batch."""

    def __init__(self, numbers: Tensor, *, K: int, D: int, arrived: torch.cuda.Event | None = None) -> None:
        self.K, self.D = K, D
        self.step: int | None = None  # as which it was logged last
        self.doubts: list[Doubt] = []
        self._arrived = arrived  # recorded when all that is on the way has been sent; None if nothing is
        self._numbers = self.send(numbers)  # as in `numbers_of`
        self._pairs: Tensor | None = None  # (2,)

    @classmethod
    def of(cls, stats: Mapping[str, Tensor], *, extra: bool) -> "Report":
        """Sends the figures of what an update returned to the host; `extra` is as in `numbers_of`."""
        K, D = stats.moments.mean.shape if isinstance(stats, StepStats) else (len(stats["pi"]), 0)
        report = cls(numbers_of(stats, extra=extra), K=K, D=D)
        report.add_pairs(getattr(stats, "pairs", None))
        return report

    def add_pairs(self, pairs: Pairs | None) -> None:
        """Adds the standard error of trace_B and the alignment, if there have been pairs of views."""
        if pairs is not None:
            self._pairs = self.send(pair_numbers(pairs))

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
        if self._arrived is not None and not self._arrived.query():  # type: ignore[no-untyped-call]  # torch has not annotated it
            self._arrived.synchronize()

    @cached_property
    def figures(self) -> Figures:
        """The figures of the step; call `wait` before."""
        return Figures.of(self._numbers, self._pairs)


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
