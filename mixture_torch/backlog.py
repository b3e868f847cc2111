"""Rows on their way into the run folder, in their order, and how much memory those may take that cannot be written."""

from collections import deque
from typing import Literal

import attrs
import torch
from torch import Tensor

from mixture_torch.superseding import Superseding

Mode = Literal["append", "per_step"]
MOST_KEPT = 2**30  # bytes of responsibilities: a full disk must not take the run's memory


class Once:
    """Tells whether something has been appended to a file already, though an interrupt came right behind the write."""

    def __init__(self) -> None:
        self._begun_at: int | None = None

    def is_in(self, end: int) -> bool:
        """Returns whether the file has grown since this was asked first.

        Args:
            end: Bytes in the file.
        """
        if self._begun_at is None or end < self._begun_at:
            self._begun_at = end
        return end > self._begun_at


@attrs.define(eq=False, kw_only=True)
class Row:
    """A logged step."""

    step: int
    epoch: int
    K: int
    R: Tensor | None = None  # (N, K) to be stored; None when they are, or are not to be
    scores_mode: Mode = "append"
    superseding: Superseding | None = None  # where it goes on from a checkpoint; None when that is done
    figures: list[float] = attrs.field(factory=list)  # pi_min, pi_max, trace_B and opnorm_B
    scores: Once = attrs.field(factory=Once)
    log: Once = attrs.field(factory=Once)
    is_kept: bool = False
    is_written: bool = False
    kept_bytes: int = 0  # of a copy of R, where it could not be written

    @property
    def position(self) -> tuple[int, int]:
        """Where in the run it belongs."""
        return self.epoch, self.step


class Backlog:
    """The rows that are still to be written, first in, first out, each kept once.

    Rows are always kept; of responsibilities that could not be written, up to `MOST_KEPT`.
    """

    def __init__(self) -> None:
        self._rows: deque[Row] = deque()
        self._kept_bytes = 0
        self.dropped = 0  # entries of responsibilities for which there was no room, until somebody has been told

    def keep(self, row: Row) -> None:
        """Puts a row behind the others, unless it has been kept before."""
        if not row.is_kept:
            row.is_kept = True
            self._rows.append(row)

    @property
    def first(self) -> Row | None:
        """The row to be written next, None where all are."""
        while self._rows and self._rows[0].is_written:
            self._rows.popleft()
        return self._rows[0] if self._rows else None

    @property
    def rows(self) -> int:
        """How many rows are still to be written."""
        return sum(not row.is_written for row in self._rows)

    @property
    def entries(self) -> int:
        """How many entries of responsibilities are still to be written."""
        return sum(row.R is not None for row in self._rows)

    def stored(self, row: Row) -> None:
        """Says that the responsibilities of a row have been written."""
        row.R = None
        self._kept_bytes -= row.kept_bytes

    def hold(self, row: Row) -> None:
        """Makes responsibilities that could not be written a copy of their own, or drops them where there is no room.

        Whoever has them may change them before they can be written.
        """
        if row.R is None or row.kept_bytes:
            return
        size = row.R.numel() * torch.float32.itemsize
        if self._kept_bytes + size > MOST_KEPT:
            row.R = None
            self.dropped += 1
        else:
            row.R = row.R.detach().to("cpu", torch.float32, copy=True)
            row.kept_bytes = size
            self._kept_bytes += size
