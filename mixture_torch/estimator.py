"""`MixtureStats`: the estimator that a training loop keeps, around the pure functions of mixture_core."""

import os
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

import mixture_core
from mixture_core import MixtureState
from mixture_core.grouped import complete_
from mixture_torch.accumulator import Accumulator, Updated, ignored, to_device
from mixture_torch.batches import as_plain_embeddings, is_out_of_memory, settle
from mixture_torch.checkpoint import SEEDING_ROWS, from_state_dict, to_state_dict
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.context import active_step, as_step
from mixture_torch.distributed import is_main_rank, text_of
from mixture_torch.files.recorder import Recorder, Row
from mixture_torch.precision import full_float32
from mixture_torch.update.arrivals import Arrivals, Logged, Report, as_count, check_loggable, responsibilities_of

DEFAULTS = MixtureRuntimeConfig()
CALLER = 3  # frames up from `update`, of which torch.compiler.disable takes one
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class MixtureStats:
    """Keeps a Gaussian mixture of the embeddings that it is fed, and writes a row about it per step.

    Everything is computed in float32, without gradients, outside autocast, and from random numbers of its own, so that
    a training run with it is bit for bit the run without it. The means start from greedy k-means++ once 4 K usable rows
    have come; until then every batch starts anew from the rows so far.

    Args:
        K: Number of components.
        assigner: `kmeans_online`: each row belongs to its nearest mean; `label_supervised`: to its label.
        mode: `ema`: statistics over an exponential window; `per_batch`: of each batch alone; `label_supervised`: of
            each batch alone, by labels.
        ema_decay: Factor by which the weight of earlier samples is multiplied each step, in (0, 1).
        enabled: False makes every method do nothing.
        is_main: Whether this process writes files; None is rank 0, or any process outside a process group.
        cross_rank: Whether the mixture is that of the embeddings of all ranks: `gather`, or true, has every rank gather
            and work on all of them; `reduce` has each work on its own, and add up sums, so that R is of its own too.
        log_dir: Folder for the files; None writes none.
        store_scores: Write the responsibilities too.
        scores_mode: `append`: all in one file; `per_step`: one file per step.
        max_assign_iters: Lloyd iterations per step.
        seed: Of the estimator's own random numbers.
        strict: Raise where rows would be ignored, where the disk fails, and where memory runs out.
        relocate: Move wasted components to where the mixture fits worst, once a window, with k-means in `mode: ema`.
        compile: On a GPU, replay steps as CUDA graphs, for each size of batch: a fraction of the host's time. Not where
            `strict` has to wait anyway.
        dim: D, where it is known beforehand: `state_dict` then has its final shapes before the first update, as those
            need that load in place.
        process_group: The ranks of `cross_rank` and `is_main`; None is the default group.

    Raises:
        TypeError: An option is of the wrong type; the message names it, what was expected and what came.
        ValueError: An option is out of range, or `store_scores` lacks a `log_dir`.
    """

    def __init__(
        self,
        *,
        K: int,
        assigner: Literal["kmeans_online", "label_supervised"] = DEFAULTS.assigner,
        mode: Literal["per_batch", "ema", "label_supervised"] = DEFAULTS.mode,
        ema_decay: float = DEFAULTS.ema_decay,
        enabled: bool = DEFAULTS.enabled,
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
        self._config = MixtureRuntimeConfig(
            K=K,
            assigner=assigner,
            mode=mode,
            ema_decay=ema_decay,
            enabled=enabled,
            cross_rank=cross_rank,
            store_scores=store_scores,
            scores_mode=scores_mode,
            max_assign_iters=max_assign_iters,
            seed=seed,
            strict=strict,
            relocate=relocate,
            compile=compile,
            dim=dim,
        )
        self._recorder = _recorder(self._config, log_dir, is_main, process_group)
        self._reports: Arrivals[Report] = Arrivals()
        self._logged: Arrivals[Logged[Row]] = Arrivals()
        weakref.finalize(self, _finish, self._logged, self._recorder)  # for whoever never calls `close`
        self._resumes = False  # whether the next row goes on from a checkpoint
        self._warned_of_no_stats = False
        self._accumulator = Accumulator(self._config, process_group)
        self._stats = NOTHING
        self._report: Report | None = None
        self._warned = False  # of ignored rows
        self._short = False  # of memory, and said so

    @classmethod
    def from_config(
        cls,
        config: MixtureRuntimeConfig,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        is_main: bool | None = None,
        process_group: Any = None,
    ) -> "MixtureStats":
        """Returns the estimator of a configuration.

        Args:
            config: From `MixtureRuntimeConfig.from_yaml`, `.from_mapping`, or made by hand.
            log_dir: Folder for the files.
            is_main: Whether this process writes them.
            process_group: The ranks of `cross_rank` and `is_main`.

        Raises:
            TypeError: `config` is something else, or another argument is of the wrong type.
            ValueError: `store_scores` lacks a `log_dir`.
        """
        if not isinstance(config, MixtureRuntimeConfig):
            raise TypeError(f"`config` must be a MixtureRuntimeConfig, got {config!r}.")
        return cls(log_dir=log_dir, is_main=is_main, process_group=process_group, **attrs.asdict(config))

    @property
    def config(self) -> MixtureRuntimeConfig:
        """All options but `log_dir` and `is_main`."""
        return self._config

    @property
    def enabled(self) -> bool:
        """Whether the estimator does anything."""
        return self._config.enabled

    @property
    def state(self) -> MixtureState | None:
        """What the next update starts from, as a copy; None before the first."""
        own = self._accumulator.standing.state
        if own is None:
            return None
        with full_float32(own.moments.weight):
            state: MixtureState = tree_map(torch.clone, own)
            complete_(state.moments.covariance)
        return state

    @property
    def stats(self) -> Mapping[str, Tensor]:
        """What the last update returned; empty before the first."""
        return self._stats

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has not annotated it
    def update(
        self, embeddings: Tensor, labels: Tensor | None = None, *, step: int | str | None = None
    ) -> Mapping[str, Tensor]:
        """Returns the mixture after one more batch: pi, mu, Sigma, B, R and more, by key or attribute.

        Where the estimator is disabled, the mapping is empty. During a backward pass, where activation checkpointing
        runs the forward pass a second time, nothing is updated and the last mapping is returned. Where memory runs out
        the batch counts for nothing, with a warning; with `cross_rank` only as long as the other ranks can be told.

        Args:
            embeddings: (N, D) of any real type, tensor or NumPy array; N may differ from step to step, and be 0. Rows
                with NaN or Inf are ignored and counted.
            labels: (N,) integers in [0, K), or -1 or -100 where a row is to be ignored; only looked at where
                responsibilities come from labels.
            step: Of the training, a number or a text that tells it from others. Calls with the same one, as gradient
                accumulation or several losses make them, bring parts of one batch: nothing decays in between. None is
                that of the `activate` around the call, or else a step of its own.

        Raises:
            TypeError: An argument is of the wrong type; the estimator is unchanged.
            ValueError: A shape or a label is wrong, or `strict` and a row is ignored; likewise.
            Exception: With `cross_rank`, any of these, here or on another rank; RuntimeError where memory runs out in
                the middle of an exchange.
        """
        if not self.enabled:
            return NOTHING
        if torch._C._current_graph_task_id() != -1:  # torch has no public way to tell that a backward pass is running
            return self._stats
        problem: Exception | None = None  # of this rank alone: the others have to hear of it
        try:
            self._settle(but=0 if self._config.cross_rank == "reduce" else 1)
        except OSError as error:
            problem = error
        try:
            step = active_step(self) if step is None else as_step(step)
        except Exception as error:
            problem, step = error, None
        try:
            updated = self._accumulator.update(embeddings, labels, token=step, problem=problem)
        except (MemoryError, RuntimeError) as error:
            if self._config.strict or not is_out_of_memory(error):
                raise
            return self._skip(embeddings, step, error)
        if updated.report is None:
            self._warn_of_ignored(int(updated.stats.n_ignored), int(updated.n_rows), stacklevel=CALLER)
        stats = self._show(updated)
        if (n_rows := self._accumulator.scarce_rows()) is not None:
            core = self._config.core
            warnings.warn(
                f"K={core.K} is too large: the first window, {core.window} steps, had {n_rows} rows, fewer than "
                f"4 K = {SEEDING_ROWS * core.K}. Use a smaller K, larger batches or a larger `ema_decay`.",
                stacklevel=CALLER,
            )
        return stats

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

    def assign(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns R, (N, K) float32: each row's nearest mean as it stands, or its label, with no update of anything.

        Args:
            embeddings: (N, D), tensor or NumPy array.
            labels: (N,) integers; only looked at where responsibilities come from labels.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: A shape is wrong, there has been no update, or the estimator is disabled and has no mixture.
        """
        state = self._accumulator.standing.state
        if state is None and not self.enabled:
            raise ValueError("`enabled` must be true for `assign`, got false: without it there is no mixture.")
        if state is None:
            raise ValueError("`assign` must come after `update`, got no mixture to assign to.")
        with full_float32(embeddings):
            x = as_plain_embeddings(embeddings)
            return mixture_core.assign(to_device(state, x.device), x, labels)

    def state_dict(self, *, dim: int | None = None) -> dict[str, Tensor | int | str]:
        """Returns all that a later run needs to go on, as plain tensors, ints and strings, with the same keys always.

        `torch.load` reads it back with its safe defaults. `torch.distributed.checkpoint` loads in place, and so needs
        the final shapes: give `dim` where it loads into an estimator that has had no update.

        Args:
            dim: D, for the shapes before the first update; None is the estimator's `dim`, and 0 without it.
        """
        with full_float32(None):
            return to_state_dict(self._config.core, self._accumulator.standing, dim=dim or self._config.dim)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state_dict.

        What was recorded at or after the (epoch, step) that is logged next is then superseded: it is moved to files of
        its own, so that the log of an interrupted run is the log of one that was not.

        Args:
            state_dict: From an estimator with the same K, D, mode and assigner.

        Raises:
            TypeError: It is no mapping.
            ValueError: It is from another kind of estimator, or incomplete; this one is unchanged.
        """
        self._settle()
        with full_float32(None):
            D = self._accumulator.standing.D or self._config.dim
            self._accumulator.restart(from_state_dict(self._config.core, state_dict, D=D))
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
        """Returns an estimator of the same options and mixture that writes no files, as a module's copy may hold."""
        copied = MixtureStats.from_config(self._config, is_main=False)
        copied.load_state_dict(self.state_dict())
        return copied

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled: in another process it would write to the same files."""
        raise TypeError(
            "A MixtureStats cannot be pickled, as it writes to its `log_dir`: make another one there, and give it this "
            "one's `state_dict()` by `load_state_dict`."
        )

    def _skip(self, embeddings: Any, step: int | str | None, error: Exception) -> Mapping[str, Tensor]:
        """Goes on as if no row had counted; this is an instrument, and the run is what matters."""
        if not self._short:
            self._short = True
            cause = text_of(error)
            warnings.warn(f"`update` ran out of memory and skips such batches: {cause}", stacklevel=CALLER)
        N = len(embeddings) if hasattr(embeddings, "__len__") else 0  # not so where another rank had no memory
        updated = self._accumulator.skip(N, token=step)
        return self._stats if updated is None else self._show(updated)

    def _show(self, updated: Updated) -> Mapping[str, Tensor]:
        self._stats, self._report = updated.stats, updated.report
        if updated.report is not None:
            self._reports.expect(updated.report)
        return self._stats

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
        if not (self._warned_of_no_stats or self._short):
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
