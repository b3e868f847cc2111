"""What of the estimator goes to disk, on which rank, when it has come from the device, and when files are complete."""

import operator
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mixture_core import StepStats
from mixture_core.moments import figures
from mixture_torch.batches import Doubt
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.distributed import is_main_rank
from mixture_torch.memory import Rows
from mixture_torch.precision import full_float32
from mixture_torch.writers import AppendScores, CsvWriter, PerStepScores

RECORDED = ("pi", "trace_B", "opnorm_B", "R")


class Report:
    """What the host has to know of one update; from a GPU it comes without anybody's waiting, a little later.

    Args:
        numbers: (6,) from `numbers_of`, on the host, or on the way there.
        K: Number of components.
        arrived: Recorded when all that is on the way has been sent; None where nothing is.
    """

    def __init__(self, numbers: Tensor, *, K: int, arrived: torch.cuda.Event | None = None) -> None:
        self.K = K
        self.step: int | None = None  # None until it is logged
        self.epoch = 0
        self.R: Tensor | None = None
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

    def log(self, step: int, epoch: int, R: Tensor | None) -> None:
        """Makes it a row of the log, with responsibilities (N, K) or without."""
        self.step, self.epoch = step, epoch
        if R is not None:
            self.R, self._arrived = _to_host(R), _sent(R)

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


class Recorder:
    """Writes a row per step, and the responsibilities where the configuration says so, on the main rank.

    Args:
        config: Says whether and how responsibilities are stored.
        log_dir: Folder for the files; None writes none.
        is_main: Whether this process writes; None is rank 0, or any process outside a process group.
        process_group: Whose rank 0; None is the default group.

    Raises:
        TypeError: `log_dir` or `is_main` is of the wrong type.
        ValueError: Responsibilities are to be stored nowhere.
    """

    def __init__(
        self,
        config: MixtureRuntimeConfig,
        *,
        log_dir: str | os.PathLike[str] | None,
        is_main: bool | None,
        process_group: Any = None,
    ) -> None:
        if is_main is not None and not isinstance(is_main, bool):
            raise TypeError(f"`is_main` must be true, false or None, got {is_main!r}.")
        if log_dir is not None and not isinstance(log_dir, (str, os.PathLike)):
            raise TypeError(f"`log_dir` must be a path or None, got {log_dir!r}.")
        if log_dir is None and config.enabled and config.store_scores and is_main is not False:
            raise ValueError("`log_dir` must be given where `store_scores` is true, got None.")
        self._config = config
        self._is_main = is_main
        self._group = process_group
        # Absolute: the working directory may change before the first write.
        self._log_dir = None if log_dir is None else Path(log_dir).absolute()
        self._files: _Files | None = None
        self._expected: deque[Report] = deque()

    def expect(self, report: Report) -> None:
        """Keeps a report that is still on its way."""
        self._expected.append(report)

    def arrivals(self, *, but: int = 0) -> Iterator[Report]:
        """Goes through the reports expected so far, as they arrive; those that are logged have been written.

        Args:
            but: How many of the latest not to wait for.

        Raises:
            OSError: A file could not be written.
            ValueError: A file is not ours.
        """
        while self._expected and (len(self._expected) > but or self._expected[0].is_here):
            report = self._expected.popleft()
            report.wait()
            if self._files is not None:
                self._files.write(report)
            yield report

    def record(self, stats: Mapping[str, Tensor], report: Report | None, *, step: int, epoch: int) -> None:
        """Appends one step, at once or as soon as its report has arrived.

        Args:
            stats: What an update returned.
            report: Of the same update, if it is expected.
            step: The training step, at least 0.
            epoch: The epoch, at least 0.

        Raises:
            TypeError: `step` or `epoch` is no integer.
            ValueError: One of them is negative, `stats` lack a figure, or a file is not ours.
            OSError: A file could not be written.
        """
        step, epoch = _as_count("step", step), _as_count("epoch", epoch)
        if missing := [key for key in RECORDED if key not in stats]:
            raise ValueError(f"`stats` must be what `update` returned, got a mapping without {', '.join(missing)}.")
        writes = self._log_dir is not None and self._writes()
        if report is None or report.step is not None:
            if not writes:
                return
            with full_float32(stats["R"]):
                report = Report.of(stats)
            self.expect(report)
        report.log(step, epoch, responsibilities_of(stats) if writes and self._config.store_scores else None)
        if self._files is None and writes:  # a process that writes no row leaves the folder to those that do
            self._files = _Files(self._config, cast(Path, self._log_dir))
            # Whoever never calls `close` finds all files complete all the same.
            weakref.finalize(self, _finish, self._files, self._expected)

    def resumed(self) -> None:
        pass

    def flush(self) -> None:
        """Makes all files complete."""
        if self._files is not None:
            self._files.flush()

    def close(self) -> None:
        """Makes all files complete and closes them; a later `record` opens them again."""
        if self._files is not None:
            self._files.close()

    def _writes(self) -> bool:
        """Decided at the first write: a process group often comes up later than the estimator."""
        if self._is_main is None:
            self._is_main = is_main_rank(self._group)
        return self._is_main


class _Files:
    """The files of one run folder."""

    def __init__(self, config: MixtureRuntimeConfig, log_dir: Path) -> None:
        self._log = CsvWriter(log_dir)
        self._scores: AppendScores | PerStepScores | None = None
        if config.store_scores:
            self._scores = AppendScores(log_dir) if config.scores_mode == "append" else PerStepScores(log_dir)
        self._writers = [writer for writer in (self._log, self._scores) if writer is not None]
        self._owner = os.getpid()

    def write(self, report: Report) -> None:
        """Appends a report that is here, if it is logged."""
        if report.step is None:
            return
        if self._scores is not None and report.R is not None:  # first: who is not ours is refused before any writing
            self._scores.append(report.step, report.epoch, report.R)
        self._log.append(report.step, report.epoch, report.K, report.figures)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    @property
    def are_ours(self) -> bool:
        """Whether this is the process that opened them, and not a forked child, which has copies of the writers."""
        return os.getpid() == self._owner

    def close(self) -> None:
        if self.are_ours:
            for writer in self._writers:
                writer.close()


def _finish(files: _Files, expected: deque[Report]) -> None:
    """What `close` does, for an estimator that is gone; a forked child leaves it to the process that it is from."""
    while expected and files.are_ours:
        report = expected.popleft()
        report.wait()
        files.write(report)
    files.close()


def _as_count(name: str, value: int) -> int:
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
