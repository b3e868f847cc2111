"""What the host has to know of an update, and how it comes from the device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mixture_core import StepStats
from mixture_core.moments import figures
from mixture_torch.backlog import Row


class Report:
    """What the host has to know of one update; from a GPU it comes without anybody's waiting, a little later.

    Args:
        numbers: (5,) from `numbers_of`, on the host, or on the way there.
        N: Rows of the update.
        K: Number of components.
        arrived: Recorded when all that is on the way has been sent; None where nothing is.
    """

    def __init__(self, numbers: Tensor, *, N: int, K: int, arrived: torch.cuda.Event | None = None) -> None:
        self.N, self.K = N, K
        self.row: Row | None = None  # None until it is logged
        self._numbers, self._arrived = numbers, arrived
        self._wrong_label: Tensor | None = None
        self._values: list[float] = []

    @classmethod
    def of(cls, stats: Mapping[str, Tensor]) -> "Report":
        """Returns the report of an update, sent off.

        Args:
            stats: What the update returned.
        """
        N, K = stats["R"].shape
        return cls(_to_host(numbers_of(stats)), N=N, K=K, arrived=_sent(stats["R"]))

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

    def doubt(self, label: Tensor) -> None:
        """Adds a label that may be wrong, () int64, as in `Batch`."""
        self._wrong_label, self._arrived = _to_host(label), _sent(label)

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
        """How many rows were ignored."""
        return int(self._read()[4])

    def _read(self) -> list[float]:
        if not self._values:
            self._values = self._numbers.tolist()
        return self._values

    @property
    def wrong_label(self) -> int | None:
        """A label that may be wrong, as in `Batch`."""
        return None if self._wrong_label is None else int(self._wrong_label)


def numbers_of(stats: Mapping[str, Tensor]) -> Tensor:
    """Returns pi_min, pi_max, trace_B, opnorm_B, and how many rows were ignored, (5,)."""
    if isinstance(stats, StepStats):
        logged, n_ignored = figures(stats.moments), stats.n_ignored
    else:  # `stats` that went through a dict
        pi = stats["pi"]
        logged = torch.stack([pi.min(), pi.max(), stats["trace_B"], stats["opnorm_B"]])
        n_ignored = (stats["R"].sum(dim=1) == 0).sum()
    return torch.cat([logged, n_ignored.to(logged.dtype)[None]])


def _sent(tensor: Tensor) -> torch.cuda.Event | None:
    """Tells when all copies to the host that have been started so far are there; None for a tensor that is there."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, which is there when the device has come so far: pinned memory, nobody waits."""
    return tensor.to("cpu", non_blocking=True)
