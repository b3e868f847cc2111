"""`MixtureStats`: the estimator that a training loop keeps, around the pure functions of mixture_core."""

import os
from collections.abc import Mapping
from functools import partial
from types import EllipsisType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.context import active_step, as_step, register, update_compiled
from mixture_torch.files.recorder import Recorder
from mixture_torch.journal import NO_STATS, Journal
from mixture_torch.tracker import Tracker
from mixture_torch.update.arrivals import Report, as_count
from mixture_torch.update.batch import as_views
from mixture_torch.update.checkpoint import from_state_dict
from mixture_torch.update.precision import full_float32
from mixture_torch.update.ranks import is_main_rank
from mixture_torch.update.stats import NOTHING, StepStats
from mixture_torch.update.watch import OnAlarm
from mixture_torch.views import DEFAULTS, DISABLED, View, as_config, check_process


class MixtureStats(View):
    """Keeps a Gaussian mixture of the embeddings that it is given, and writes one row about it per step.

    It computes in float32, without gradients or autocast, and from its own random numbers: training is bit for bit the
    same with or without it. Greedy k-means++ chooses the first means once 4 K usable rows have been seen; until then,
    each step's statistics cover all rows so far.

    Args:
        K: Number of components.
        assigner: `kmeans_online`: each row belongs to its nearest mean; `label_supervised`: to its label.
        mode: What they cover. `ema`: an exponential window; `per_batch`: a batch; `label_supervised`: one with labels.
        ema_decay: Factor by which earlier weights are multiplied each step, in (0, 1).
        enabled: False makes all methods do nothing. If it is left out it is false, and the first `update` says so.
        is_main: Whether this process writes files; None is rank 0, or any process outside a process group.
        cross_rank: Whether the mixture is that of all ranks, which exchange embeddings (`gather` or true) or only sums
            (`reduce`; then R covers the rank's own embeddings).
        log_dir: Folder for the files; None writes none.
        existing: What becomes of the rows of earlier runs in `log_dir`, unless a checkpoint is loaded. `append`: new
            rows follow them; `aside`: they move to `superseded-N` files; `refuse`: the first `log_step` raises.
        store_scores: Whether to write responsibilities too.
        scores_mode: `append`: into one file; `per_step`: into one file per step.
        max_assign_iters: Lloyd iterations per step.
        seed: Seed of the estimator's own random numbers.
        strict: Raise, rather than warn, if rows are ignored, the disk fails or memory runs out.
        relocate: Move wasted components to where the mixture fits worst, once a window (k-means in `mode: ema` only).
        compile: On a GPU, replay steps as CUDA graphs, which takes the host much less time. No effect with `strict`.
        dim: D, if known beforehand, so that `state_dict` has its final shapes before the first update.
        extra: Whether to write `mixture_extra.csv`, snapshots and `mixture_last.pt`, and to watch for alarms.
        snapshot_every: Steps between two snapshots of the mixture; None takes one at each `flush`. `close` takes none.
        process_group: The ranks of `cross_rank` and `is_main`; None is the default group.
        on_alarm: Function to call with each alarm, a `mixture_core.alarms.Alarm`; None warns once for each kind.
        tracker: Function to call with the figures of each row, named as in `stats.scalars()`, and its step.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of range, or has no effect without another one.

    Example:
        >>> import torch
        >>> from mixture_torch import MixtureStats
        >>> estimator = MixtureStats(K=2, enabled=True)
        >>> stats = estimator.update(torch.cat([torch.zeros(30, 4), torch.ones(10, 4)]))
        >>> sorted(stats.pi.tolist()), round(float(stats.trace_B), 2)
        ([0.25, 0.75], 0.75)
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
        existing: Literal["append", "aside", "refuse"] = DEFAULTS.existing,
        store_scores: bool = DEFAULTS.store_scores,
        scores_mode: Literal["append", "per_step"] = DEFAULTS.scores_mode,
        max_assign_iters: int = DEFAULTS.max_assign_iters,
        seed: int = DEFAULTS.seed,
        strict: bool = DEFAULTS.strict,
        relocate: bool = DEFAULTS.relocate,
        compile: bool = DEFAULTS.compile,
        dim: int | None = DEFAULTS.dim,
        extra: bool = DEFAULTS.extra,
        snapshot_every: int | None = DEFAULTS.snapshot_every,
        process_group: Any = None,
        on_alarm: OnAlarm = None,
        tracker: Tracker = None,
    ) -> None:
        self._says_disabled = enabled is ...
        config = MixtureRuntimeConfig(
            K=K, assigner=assigner, mode=mode, ema_decay=ema_decay, enabled=False if enabled is ... else enabled,
            cross_rank=cross_rank, store_scores=store_scores, scores_mode=scores_mode, seed=seed, strict=strict,
            max_assign_iters=max_assign_iters, relocate=relocate, compile=compile, dim=dim, extra=extra,
            snapshot_every=snapshot_every, existing=existing,
        )  # fmt: skip
        check_process(config, log_dir=log_dir, is_main=is_main, on_alarm=on_alarm, tracker=tracker)
        writes = partial(is_main_rank, process_group) if is_main is None else partial(bool, is_main)
        kept = scores_mode if store_scores else None
        recorder = Recorder(log_dir, scores_mode=kept, existing=existing, writes=writes, strict=strict)
        super().__init__(config, is_main=is_main, process_group=process_group)
        self._journal = Journal(self, recorder, on_alarm=on_alarm, tracker=tracker)
        self._report: Report | None = None  # of the last update, if that was made on a GPU
        self._key = register(self)  # by which compiled code finds it

    @classmethod
    def from_config(
        cls,
        config: MixtureRuntimeConfig | Mapping[str, Any],
        *,
        log_dir: str | os.PathLike[str] | None = None,
        is_main: bool | None = None,
        process_group: Any = None,
        on_alarm: OnAlarm = None,
        tracker: Tracker = None,
    ) -> "MixtureStats":
        """Returns the estimator of a configuration; other arguments and errors are those of `MixtureStats`."""
        config = as_config(config)
        of_process = {"log_dir": log_dir, "is_main": is_main, "process_group": process_group, "on_alarm": on_alarm}
        return cls(**of_process, tracker=tracker, **attrs.asdict(config))

    def update(
        self, embeddings: Tensor, labels: Tensor | None = None, *, step: int | str | None = None, views: int = 1
    ) -> StepStats:
        """Returns the mixture after one more batch: pi, mu, Sigma, B, R and more, by key or attribute.

        The statistics are empty if the estimator is disabled, and in code that torch.compile traces: read `stats` after
        it. During a backward pass nothing is updated, because activation checkpointing runs the forward pass a second
        time. If memory runs out, the batch is skipped with a warning; with `cross_rank`, it raises if an exchange with
        other ranks has begun.

        Args:
            embeddings: (N, D) of any real type, tensor or NumPy array; N may vary and be 0. Rows with NaN or Inf are
                ignored and counted.
            labels: (N,) integers in [0, K), -1 or -100 to ignore a row; only read if responsibilities come from labels.
            step: The training step, a number or string. Calls with the same step are one batch, as in gradient
                accumulation. None means the step of the surrounding `activate`; without one, each call is a step.
            views: 2 if rows n and n + N/2 are two views of one sample, as in `torch.cat([z1, z2])`.

        Raises:
            TypeError: An argument is of the wrong type; the estimator is unchanged.
            ValueError: A shape or label is wrong, or a row is ignored and `strict` is set; the estimator is unchanged.
            RuntimeError: With `cross_rank`, the ranks are out of step, or memory ran out during an exchange. All ranks
                raise the error of any one rank.
        """
        if not self._config.enabled and not self._says_disabled:
            return NOTHING
        if torch.compiler.is_compiling():
            update_compiled(self._key, embeddings, labels if self._config.uses_labels else None, step, views)
            return NOTHING
        if not self._config.enabled:
            self._says_disabled = False
            self._journal.note("disabled", DISABLED)
            self._journal.say()
            return NOTHING
        if torch._C._current_graph_task_id() != -1:  # in a backward pass; torch has no public way to tell
            return self._stats
        problem: Exception | None = None  # of this rank alone: the others must be told
        try:
            self._journal.settle(but=0 if self._config.cross_rank == "reduce" else 1)
        except OSError as error:
            problem = error
        try:
            step, views = active_step(self) if step is None else as_step(step), as_views(views)
        except Exception as error:
            problem, step = error, None
        updated = self._mixture.update(embeddings, labels, views=views, token=step, problem=problem)
        if updated is not None:
            self._stats, self._report = updated.stats, updated.report
            if updated.report is not None:
                self._journal.reports.expect(updated.report, updated.report)
            self._journal.note_ignored(updated.n_ignored, updated.n_rows)
        self._journal.say()  # last, as a warning may be turned into an error
        return self._stats

    def log_step(self, *, step: int, epoch: int, stats: Mapping[str, Tensor] | None = None) -> None:
        """Appends a row to `mixture.csv` and, if set by `extra` and `store_scores`, to the other files.

        Does nothing if the estimator is disabled, on other ranks, or without a `log_dir`, a `tracker` and `on_alarm`.

        Args:
            step: The training step, at least 0.
            epoch: The epoch, at least 0.
            stats: What `update` returned; None is the last. Your own mapping needs `pi` and `B`, and `R` to store.

        Raises:
            TypeError: `step` or `epoch` is not an integer, or `stats` is not a mapping.
            ValueError: `step` or `epoch` is negative, `stats` lacks a key, a file in `log_dir` has another format,
                `existing` refuses its rows, or another process writes there.
            OSError: The row could not be written and `strict` is set; the row is kept and written with the next one.
        """
        if not self._config.enabled:
            return
        stats = self._stats if stats is None else stats
        if not isinstance(stats, Mapping):
            raise TypeError(f"`stats` must be what `update` returned, got {type(stats).__name__}.")
        step, epoch = as_count("step", step), as_count("epoch", epoch)
        if stats:
            self._journal.log(stats, self._report if stats is self._stats else None, step, epoch)
            self._journal.take_snapshot(self)
        elif not self._mixture.is_short:
            self._journal.note("no stats", NO_STATS)
        self._journal.say()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state_dict; the next `log_step` moves rows at or after its (epoch, step) to other files.

        Args:
            state_dict: From an estimator with the same K, D, mode and assigner.

        Raises:
            TypeError: It is not a mapping.
            ValueError: It is from another kind of estimator, incomplete or damaged; this one is unchanged.
        """
        self._journal.settle()
        with full_float32(None):
            D = self._mixture.progress.D or self._config.dim
            self._mixture.restart(from_state_dict(self._config.core, state_dict, D=D))
        self._stats, self._report = NOTHING, None
        self._journal.resume(self._mixture.progress.n_steps)
        self._journal.say()

    def flush(self) -> None:
        """Writes all that was logged to disk, and a snapshot unless `snapshot_every` is set; raises as `close` does."""
        self._journal.flush(self)
        self._journal.say()

    def close(self) -> None:
        """Writes all rows and, to `mixture_last.pt`, the state_dict, but no snapshot; `log_step` opens the files again.

        Raises:
            OSError: A file could not be written and `strict` is set; the rows are kept.
        """
        self._journal.close(self.state_dict)
        self._journal.say()

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
