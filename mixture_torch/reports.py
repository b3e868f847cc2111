"""What the host has to know of an update, and how it comes from the device."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mixture_core import StepStats
from mixture_core.moments import figures
from mixture_torch.backlog import Row
from mixture_torch.update.batch import Doubt
from mixture_torch.update.stats import Rows


class Report:
    """What the host has to know of one update; from a GPU it comes without anybody's waiting, a little later.

    Args:
        numbers: (6,) from `numbers_of`, on the host, or on the way there.
        K: Number of components.
        arrived: Recorded when all that is on the way has been sent; None where nothing is.
    """

    def __init__(self, numbers: Tensor, *, K: int, arrived: torch.cuda.Event | None = None) -> None:
        self.K = K
        self.row: Row | None = None  # None until it is logged
        self.doubts: list[Doubt] = []
        self._numbers, self._arrived = numbers, arrived
        self._values: list[float] = []

    @classmethod
    def of(cls, stats: Mapping[str, Tensor]) -> "Report":
        """Returns the report of an update, sent off.

        Args:
            stats: What the update returned.
        """
        numbers = numbers_of(stats)
        return cls(_to_host(numbers), K=stats["R"].shape[1], arrived=_sent(numbers))

    def log(self, row: Row) -> None:
        """Makes it this row of the log, whose responsibilities are sent off; its figures come with the rest."""
        if row.R is not None:
            R, row.R = row.R, _to_host(row.R)
            self._arrived = _sent(R)
        self.row = row

    @property
    def step(self) -> int | None:
        """The step that it is logged as."""
        return None if self.row is None else self.row.step

    def doubt(self, doubts: Iterable[Doubt]) -> None:
        """Adds what may be wrong with the batch."""
        for value, refuse in doubts:
            self.doubts.append(Doubt(_to_host(value), refuse))
            self._arrived = _sent(value)

    @property
    def is_here(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._arrived is None

    def wait(self) -> None:
        """Returns when everything is here."""
        if self._arrived is not None and not self._arrived.query():  # type: ignore[no-untyped-call]  # torch has not annotated it
            self._arrived.synchronize()

    @property
    def figures(self) -> list[float]:
        """pi_min, pi_max, trace_B and opnorm_B; nan where no row was usable: no instrument repeats old readings."""
        return [float("nan")] * 4 if self.n_ignored == self.N else self._read()[:4]

    @property
    def n_ignored(self) -> int:
        """How many rows of the step were ignored."""
        return int(self._read()[4])

    @property
    def N(self) -> int:
        """How many rows the step had."""
        return int(self._read()[5])

    def _read(self) -> list[float]:
        if not self._values:
            self._values = self._numbers.tolist()
        return self._values


def numbers_of(stats: Mapping[str, Tensor]) -> Tensor:
    """Returns pi_min, pi_max, trace_B, opnorm_B, and how many rows of the step were ignored and there are, (6,)."""
    if isinstance(stats, StepStats):
        logged, n_ignored = figures(stats.moments), stats.n_ignored
    else:  # `stats` that went through a dict
        pi = stats["pi"]
        logged = torch.stack([pi.min(), pi.max(), stats["trace_B"], stats["opnorm_B"]])
        n_ignored = (stats["R"].sum(dim=1) == 0).sum()
    N, _, n_ignored_earlier = getattr(stats, "rows", None) or Rows(len(stats["R"]))
    # Never from the host's memory to a GPU's, for which somebody would have to wait.
    n_rows = N if isinstance(N, Tensor) else n_ignored.new_full((), N)
    return torch.cat([logged, torch.stack([n_ignored + n_ignored_earlier, n_rows]).to(logged.dtype)])


def responsibilities_of(stats: Mapping[str, Tensor]) -> Tensor:
    """Returns R of all rows of the step, (N, K), of whichever call they came with."""
    rows = getattr(stats, "rows", None)
    return torch.cat([*rows.earlier, stats["R"]]) if rows and rows.earlier else stats["R"]


def _sent(tensor: Tensor) -> torch.cuda.Event | None:
    """Tells when all copies to the host that have been started so far are there; None for a tensor that is there."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, which is there when the device has come so far: pinned memory, nobody waits."""
    return tensor.to("cpu", non_blocking=True)
