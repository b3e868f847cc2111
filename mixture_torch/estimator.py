"""`MixtureStats`: the estimator that a training loop keeps, around the pure functions of mixture_core."""

import os
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from types import EllipsisType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.context import active_step, as_step, register, update_compiled
from mixture_torch.files.recorder import Recorder, Row
from mixture_torch.update.arrivals import Arrivals, Logged, Report, as_count, check_loggable, responsibilities_of
from mixture_torch.update.batch import ignored, settle
from mixture_torch.update.checkpoint import from_state_dict
from mixture_torch.update.mixture import Updated
from mixture_torch.update.precision import full_float32
from mixture_torch.update.ranks import is_main_rank
from mixture_torch.update.stats import NOTHING, StepStats
from mixture_torch.views import DEFAULTS, DISABLED, View

CALLER = 3  # frames up from a method that is called by a public one


class MixtureStats(View):
    """Keeps a Gaussian mixture of the embeddings that it is given, and writes one row about it per step.

    It computes in float32, without gradients, outside autocast, and from its own random numbers, so that training is
    bit for bit the same with it and without it. Means are seeded by greedy k-means++ once 4 K usable rows have come;
    until then each batch starts anew from all rows so far.

    Args:
        K: Number of components.
        assigner: `kmeans_online`: each row belongs to its nearest mean; `label_supervised`: to its label.
        mode: `ema`: statistics over an exponential window; `per_batch`: of each batch alone; `label_supervised`: of
            each batch alone, by labels.
        ema_decay: Factor by which earlier weights are multiplied each step, in (0, 1).
        enabled: False makes all methods do nothing. If it is left out it is false, and the first `update` says so.
        is_main: Whether this process writes files; None is rank 0, or any process outside a process group.
        cross_rank: Whether the mixture is that of all ranks: `gather` or true: each rank gathers all embeddings;
            `reduce`: only sums are exchanged, and R is of the rank's own embeddings.
        log_dir: Folder for the files; None writes none.
        store_scores: Whether to write responsibilities too.
        scores_mode: `append`: into one file; `per_step`: into one file per step.
        max_assign_iters: Lloyd iterations per step.
        seed: Seed of the estimator's own random numbers.
        strict: Raise if rows would be ignored, the disk fails, or memory runs out.
        relocate: Move wasted components to where the mixture fits worst, once a window (k-means in `mode: ema` only).
        compile: On a GPU, replay steps as CUDA graphs, which takes the host much less time. No effect with `strict`.
        dim: D, if known beforehand, so that `state_dict` has its final shapes before the first update.
        process_group: The ranks of `cross_rank` and `is_main`; None is the default group.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of range, or `store_scores` lacks a `log_dir`.

    Example:
        >>> import torch
        >>> from mixture_torch import MixtureStats
        >>> estimator = MixtureStats(K=2, enabled=True)
        >>> stats = estimator.update(torch.cat([torch.zeros(30, 4), torch.ones(10, 4)]))
        >>> sorted(stats.pi.tolist()), round(float(stats.trace_B), 2)
        ([0.25, 0.75], 0.75)
        >>> estimator
        MixtureStats(K=2, enabled=True; D=4, 1 update)
    """

    def __init__(
        self,
        *,
        K: int,
        assigner: Literal["kmeans_online", "label_supervised"] = DEFAULTS.assigner,
        mode: Literal["per_batch", "ema", "label_supervised"] = DEFAULTS.mode,
        ema_decay: float = DEFAULTS.ema_decay,
        enabled: bool | EllipsisType = ...,
        is_main: bool | None = None,
        cross_rank: bool | Literal["gather", "reduce"] = DEFAULTS.cross_rank,
        log_dir: str | os.PathLike[str] | None = None,
        store_scores: bool = DEFAULTS.store_scores,
        scores_mode: Literal["append", "per_step"] = DEFAULTS.scores_mode,
        max_assign_iters: int = DEFAULTS.max_assign_iters,
        seed: int = DEFAULTS.seed,
        strict: bool = DEFAULTS.strict,
        relocate: bool = DEFAULTS.relocate,
        compile: bool = DEFAULTS.compile,
        dim: int | None = DEFAULTS.dim,
        process_group: Any = None,
    ) -> None:
        self._says_disabled = enabled is ...
        config = MixtureRuntimeConfig(
            K=K, assigner=assigner, mode=mode, ema_decay=ema_decay, enabled=False if enabled is ... else enabled,
            cross_rank=cross_rank, store_scores=store_scores, scores_mode=scores_mode, seed=seed, strict=strict,
            max_assign_iters=max_assign_iters, relocate=relocate, compile=compile, dim=dim,
        )  # fmt: skip
        self._recorder = _recorder(config, log_dir, is_main, process_group)
        super().__init__(config, is_main=is_main, process_group=process_group)
        self._reports: Arrivals[Report] = Arrivals()
        self._logged: Arrivals[Logged[Row]] = Arrivals()
        weakref.finalize(self, _finish, self._logged, self._recorder)  # if nobody calls `close`
        self._resumes = False  # whether the next row is the first one after a checkpoint was loaded
        self._warned_of_no_stats = False
        self._key = register(self)  # by which compiled code finds it
        self._report: Report | None = None
        self._warned = False  # of ignored rows

    @classmethod
    def from_config(
        cls,
        config: MixtureRuntimeConfig,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        is_main: bool | None = None,
        process_group: Any = None,
    ) -> "MixtureStats":
        """Returns the estimator of a configuration; other arguments and errors are those of `MixtureStats`."""
        if not isinstance(config, MixtureRuntimeConfig):
            raise TypeError(f"`config` must be a MixtureRuntimeConfig, got {config!r}.")
        return cls(log_dir=log_dir, is_main=is_main, process_group=process_group, **attrs.asdict(config))

    def update(self, embeddings: Tensor, labels: Tensor | None = None, *, step: int | str | None = None) -> StepStats:
        """Returns the mixture after one more batch: pi, mu, Sigma, B, R and more, by key or attribute.

        The statistics are empty if the estimator is disabled, and in code that torch.compile traces: read `stats` after
        it. Nothing is updated in a backward pass, in which activation checkpointing runs the forward pass again. If
        memory runs out, the batch is skipped with a warning; with `cross_rank`, only if other ranks can be told.

        Args:
            embeddings: (N, D) of any real type, tensor or NumPy array; N may differ from step to step, and be 0. Rows
                with NaN or Inf are ignored and counted.
            labels: (N,) integers in [0, K), or -1 or -100 for rows to ignore; not used unless responsibilities come
                from labels.
            step: The training step, a number or a text. Calls with the same one bring parts of one batch, as in
                gradient accumulation: nothing decays in between. None is the step of `activate`, or one of its own.

        Raises:
            TypeError: An argument is of the wrong type; the estimator is unchanged.
            ValueError: A shape or a label is wrong, or `strict` and a row is ignored; the estimator is unchanged.
            Exception: With `cross_rank`, also errors of other ranks, and RuntimeError if an exchange fails.
        """
        if not self.enabled and not self._says_disabled:
            return NOTHING
        if torch.compiler.is_compiling():
            update_compiled(self._key, embeddings, labels if self._config.uses_labels else None, step)
            return NOTHING
        if not self.enabled:
            self._says_disabled = False
            warnings.warn(DISABLED, stacklevel=2)
            return NOTHING
        if torch._C._current_graph_task_id() != -1:  # in a backward pass; torch has no public way to tell
            return self._stats
        problem: Exception | None = None  # of this rank alone: the others must be told
        try:
            self._settle(but=0 if self._config.cross_rank == "reduce" else 1)
        except OSError as error:
            problem = error
        try:
            step = active_step(self) if step is None else as_step(step)
        except Exception as error:
            problem, step = error, None
        updated = self._mixture.update(embeddings, labels, token=step, problem=problem)
        if updated is not None:
            self._show(updated)
            if updated.n_ignored:
                self._warn_of_ignored(updated.n_ignored, int(updated.n_rows), stacklevel=2)
        while self._mixture.notes:  # last, as a warning may be turned into an error
            warnings.warn(self._mixture.notes.pop(0), stacklevel=2)
        return self._stats

    def log_step(self, *, step: int, epoch: int, stats: Mapping[str, Tensor] | None = None) -> None:
        """Appends one row to `mixture.csv` and, with `store_scores`, the responsibilities to their file.

        Does nothing if the estimator is disabled or has no `log_dir`, on other ranks than the main one, and, with one
        warning, if there has been no `update`.

        Args:
            step: The training step, at least 0.
            epoch: The epoch, at least 0.
            stats: What `update` returned; None is the last. A mapping made by hand needs `pi` and `B`, and `R` if
                responsibilities are stored.

        Raises:
            TypeError: `step` or `epoch` is no integer, or `stats` no mapping.
            ValueError: One of them is negative, `stats` lack something, a file in `log_dir` is not ours, or another
                process writes there.
            OSError: `strict`, and the row could not be written; it is kept, and written with the next.
        """
        if not self.enabled:
            return
        stats = self._stats if stats is None else stats
        if not isinstance(stats, Mapping):
            raise TypeError(f"`stats` must be what `update` returned, got {type(stats).__name__}.")
        step, epoch = as_count("step", step), as_count("epoch", epoch)
        if not stats:
            self._warn_of_no_stats()
            return
        check_loggable(stats, stores_scores=self._recorder.scores_mode is not None)
        report = self._report if stats is self._stats else None
        if report is not None:
            report.step = step
        if self._recorder.open():  # a process that writes no row leaves the folder to those that do
            self._expect_row(stats, report, step, epoch)
        self._resumes = False
        self._settle(but=1)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state_dict; the next `log_step` moves rows at or after its (epoch, step) to other files.

        Args:
            state_dict: From an estimator with the same K, D, mode and assigner.

        Raises:
            TypeError: It is not a mapping.
            ValueError: It is from another kind of estimator, incomplete or damaged; this one is unchanged.
        """
        self._settle()
        with full_float32(None):
            D = self._mixture.progress.D or self._config.dim
            self._mixture.restart(from_state_dict(self._config.core, state_dict, D=D))
        self._stats, self._report = NOTHING, None
        self._resumes = True

    def flush(self) -> None:
        """Makes all files complete: `mixture_scores.pt` holds all that was logged.

        Raises:
            OSError: `strict`, and a file could not be written; the rows are kept.
        """
        self._settle()
        self._recorder.flush()

    def close(self) -> None:
        """Makes all files complete and closes them; a later `log_step` opens them again.

        Raises:
            OSError: `strict`, and a file could not be written; the rows are kept.
        """
        self._settle()
        self._recorder.close()

    def __enter__(self) -> "MixtureStats":
        """Returns the estimator."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self.close()

    def __deepcopy__(self, _: object) -> "MixtureStats":
        """Returns an estimator with the same options and mixture that writes no files, for copies of modules."""
        copied = MixtureStats.from_config(self._config, is_main=False)
        copied.load_state_dict(self.state_dict())
        return copied

    def _show(self, updated: Updated) -> None:
        self._stats, self._report = updated.stats, updated.report
        if updated.report is not None:
            self._reports.expect(updated.report)

    def _expect_row(self, stats: Mapping[str, Tensor], report: Report | None, step: int, epoch: int) -> None:
        if report is None:
            with full_float32(stats["R"] if "R" in stats else stats["pi"]):
                report = Report.of(stats)
        R = responsibilities_of(stats) if self._recorder.scores_mode else None
        self._logged.expect(Logged(report, R, partial(Row, step, epoch, report.K, resumes=self._resumes)))

    def _settle(self, *, but: int = 0) -> None:
        """Writes what has been logged and says what there is to say, except for that many of the latest updates."""
        try:
            self._logged.settle(partial(_write, self._recorder), but=but)
        finally:
            self._reports.settle(self._check, but=but)

    def _check(self, report: Report) -> None:
        """Raises or warns about what is wrong with the batch of an update that has arrived."""
        at = "an update that was not logged" if report.step is None else f"step {report.step}"
        for doubt in report.doubts:
            settle(doubt, at=at)
        self._warn_of_ignored(report.n_ignored, report.N, stacklevel=CALLER + 2, at=at)

    def _warn_of_no_stats(self) -> None:
        if not (self._warned_of_no_stats or self._mixture.is_short):
            self._warned_of_no_stats = True
            warnings.warn(
                "`log_step` has nothing to log, as there was no `update`; feed the estimator by `update`, or by "
                "`activate` and a loss that knows it. This is said once.",
                stacklevel=CALLER,
            )

    def _warn_of_ignored(self, n_ignored: int, N: int, *, stacklevel: int, at: str = "") -> None:
        if n_ignored and not self._warned:
            self._warned = True
            said = f"{ignored(n_ignored, N)}{at and ' at '}{at}; said once, `n_ignored` counts them."
            warnings.warn(said, stacklevel=stacklevel + 1)


def _recorder(
    config: MixtureRuntimeConfig, log_dir: str | os.PathLike[str] | None, is_main: bool | None, group: Any
) -> Recorder:
    """The recorder of an estimator with these arguments."""
    if is_main is not None and not isinstance(is_main, bool):
        raise TypeError(f"`is_main` must be true, false or None, got {is_main!r}.")
    if log_dir is None and config.enabled and config.store_scores and is_main is not False:
        raise ValueError("`log_dir` must be given if `store_scores` is true, got None.")
    scores_mode = config.scores_mode if config.store_scores else None
    writes = partial(is_main_rank, group) if is_main is None else partial(bool, is_main)
    return Recorder(log_dir, scores_mode=scores_mode, writes=writes, strict=config.strict)


def _write(recorder: Recorder, logged: Logged[Row]) -> None:
    recorder.write(logged.row)


def _finish(logged: Arrivals[Logged[Row]], recorder: Recorder) -> None:
    """Does what `close` does, for an estimator that is gone; in a forked child, nothing."""
    if recorder.is_ours:
        try:
            logged.settle(partial(_write, recorder))
        finally:
            recorder.close(for_good=True)
