"""What of the estimator goes to disk, on which rank, and when the files are complete."""

import operator
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.distributed import is_main_rank
from mixture_torch.writers import AppendScores, CsvWriter, PerStepScores

RECORDED = ("pi", "trace_B", "opnorm_B", "R")
Scores: TypeAlias = AppendScores | PerStepScores


class Recorder:
    """Writes a row per step, and the responsibilities where the configuration says so, on the main rank.

    Args:
        config: Says whether and how responsibilities are stored.
        log_dir: Folder for the files; None writes none.
        is_main: Whether this process writes; None is rank 0, or any process outside a process group.

    Raises:
        TypeError: `log_dir` or `is_main` is of the wrong type.
        ValueError: Responsibilities are to be stored nowhere.
    """

    def __init__(
        self, config: MixtureRuntimeConfig, *, log_dir: str | os.PathLike[str] | None, is_main: bool | None
    ) -> None:
        if is_main is not None and not isinstance(is_main, bool):
            raise TypeError(f"`is_main` must be true, false or None, got {is_main!r}.")
        if log_dir is not None and not isinstance(log_dir, (str, os.PathLike)):
            raise TypeError(f"`log_dir` must be a path or None, got {log_dir!r}.")
        if log_dir is None and config.enabled and config.store_scores and is_main is not False:
            raise ValueError("`log_dir` must be given where `store_scores` is true, got None.")
        self._config = config
        self._is_main = is_main
        # Absolute: the working directory may change before the first write.
        self._log_dir = None if log_dir is None else Path(log_dir).absolute()
        self._log: CsvWriter | None = None
        self._scores: Scores | None = None

    def record(self, stats: Mapping[str, Tensor], *, step: int, epoch: int) -> None:
        """Appends one step.

        Args:
            stats: What an update returned.
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
        if self._log_dir is None or not self._writes():
            return
        if self._log is None:
            self._log = self._open(self._log_dir)
        if self._scores is not None:  # first: a file that is not ours is refused before anything is written
            self._scores.append(step, epoch, stats["R"])
        self._log.append(step, epoch, len(stats["pi"]), _figures(stats))

    def flush(self) -> None:
        """Makes all files complete."""
        for writer in self._writers():
            writer.flush()

    def close(self) -> None:
        """Makes all files complete and closes them; a later `record` opens them again."""
        _close(self._writers(), os.getpid())

    def _open(self, log_dir: Path) -> CsvWriter:
        """Makes the writers at the first row: a process that writes none leaves the folder to those that do."""
        log = CsvWriter(log_dir)
        if self._config.store_scores:
            self._scores = AppendScores(log_dir) if self._config.scores_mode == "append" else PerStepScores(log_dir)
        # Whoever never calls `close` finds all files complete all the same.
        weakref.finalize(self, _close, [writer for writer in (log, self._scores) if writer is not None], os.getpid())
        return log

    def _writers(self) -> list[CsvWriter | Scores]:
        return [writer for writer in (self._log, self._scores) if writer is not None]

    def _writes(self) -> bool:
        """Decided at the first write: a process group often comes up later than the estimator."""
        if self._is_main is None:
            self._is_main = is_main_rank()
        return self._is_main


def _close(writers: list[CsvWriter | Scores], owner: int) -> None:
    """Closes the writers; a forked child, which has copies of them, leaves them to their owner."""
    if os.getpid() == owner:
        for writer in writers:
            writer.close()


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


def _figures(stats: Mapping[str, Tensor]) -> list[float]:
    """pi_min, pi_max, trace_B and opnorm_B; nan where no row was usable: an instrument does not repeat old readings."""
    if not stats["R"].any():
        return [float("nan")] * 4
    pi = stats["pi"]
    figures: list[float] = torch.stack([pi.min(), pi.max(), stats["trace_B"], stats["opnorm_B"]]).tolist()
    return figures
