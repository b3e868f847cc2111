"""What of the estimator goes to disk, on which rank, and when it has come from the device."""

import operator
import os
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mixture_core import StepStats
from mixture_torch.backlog import Row
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.folder import RunFolder, run_folder
from mixture_torch.readers import is_matrix
from mixture_torch.reports import Report, responsibilities_of
from mixture_torch.superseding import Superseding
from mixture_torch.update.precision import full_float32
from mixture_torch.update.ranks import is_main_rank

RECORDED = ("pi", "trace_B", "opnorm_B", "R")


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
        self._folder: RunFolder | None = None
        self._user = object()  # stands for this one in the folder, which must not keep it alive
        self._resumed = False
        self._expected: deque[Report] = deque()

    def expect(self, report: Report) -> None:
        """Keeps a report that is still on its way."""
        self._expected.append(report)

    def arrivals(self, *, but: int = 0) -> Iterator[Report]:
        """Goes through the reports expected so far, as they arrive; those that are logged have been written.

        Args:
            but: How many of the latest not to wait for.

        Raises:
            OSError: `strict`, and a row could not be written; it is kept.
        """
        while self._expected and (len(self._expected) > but or self._expected[0].is_here):
            report = self._expected[0]
            report.wait()
            if self._folder is not None and self._folder.is_ours:
                _write(self._folder, report, strict=self._config.strict)
            self._expected.popleft()
            yield report

    def resumed(self) -> None:
        """Has the next row supersede what was recorded at its place or behind it: it goes on from a checkpoint."""
        self._resumed = True

    def record(self, stats: Mapping[str, Tensor], report: Report | None, *, step: int, epoch: int) -> None:
        """Appends one step, at once or as soon as its report has arrived.

        Args:
            stats: What an update returned.
            report: Of the same update, if it is expected.
            step: The training step, at least 0.
            epoch: The epoch, at least 0.

        Raises:
            TypeError: `step` or `epoch` is no integer.
            ValueError: One of them is negative, `stats` lack a figure, a file is not ours, or another process has the
                folder.
        """
        step, epoch = _as_count("step", step), _as_count("epoch", epoch)
        if missing := [key for key in RECORDED if key not in stats]:
            raise ValueError(f"`stats` must be what `update` returned, got a mapping without {', '.join(missing)}.")
        if not isinstance(stats, StepStats) and not is_matrix(stats["R"]):  # one would be found out at the disk alone
            raise ValueError(f"`stats` must hold R as a dense tensor (N, K), got {_shape_of(stats['R'])}.")
        writes = self._log_dir is not None and self._writes()
        if writes:  # a process that writes no row leaves the folder to those that do
            self._open(cast(Path, self._log_dir))
        if report is None or report.step is not None:
            if not writes:
                return
            with full_float32(stats["R"]):
                report = Report.of(stats)
            self.expect(report)
        row = Row(step=step, epoch=epoch, K=report.K, scores_mode=self._config.scores_mode)
        if writes and self._config.store_scores:
            row.R = responsibilities_of(stats)
        if self._resumed:
            row.superseding = Superseding()
        report.log(row)
        self._resumed = False

    def flush(self) -> None:
        """Makes all files complete.

        Raises:
            OSError: `strict`, and something could not be written; it is kept.
        """
        if self._folder is not None and self._folder.is_ours:
            self._folder.flush(strict=self._config.strict)

    def close(self) -> None:
        """Makes all files complete and closes them; a later `record` opens them again.

        Raises:
            OSError: `strict`, and something could not be written; it is kept.
        """
        if self._folder is not None and self._folder.is_ours:
            self._folder.leave(self._user, strict=self._config.strict)

    def _open(self, log_dir: Path) -> None:
        if self._folder is None or not self._folder.is_ours:
            if self._folder is not None:  # we are a forked child: what is expected here is our parent's
                self._expected = deque()
            folder = run_folder(log_dir)
            # Whoever never calls `close` finds all files complete all the same.
            weakref.finalize(self, _finish, folder, self._expected, self._user)
            self._folder = folder
        self._folder.join(self._user, self._config.scores_mode if self._config.store_scores else None)

    def _writes(self) -> bool:
        """Decided at the first write: a process group often comes up later than the estimator."""
        if self._is_main is None:
            self._is_main = is_main_rank(self._group)
        return self._is_main


def _write(folder: RunFolder, report: Report, *, strict: bool) -> None:
    if report.row is not None:
        report.row.figures = report.figures
        folder.write(report.row, strict=strict)


def _finish(folder: RunFolder, expected: deque[Report], user: object) -> None:
    """What `close` does, for an estimator that is gone; a forked child leaves it to the process that it is from."""
    if not folder.is_ours:
        return
    try:
        while expected:
            report = expected.popleft()
            report.wait()
            _write(folder, report, strict=False)
    finally:
        folder.leave(user, for_good=True)


def _shape_of(value: object) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


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
