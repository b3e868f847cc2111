"""`MixtureStats`: the estimator that a training loop keeps, around the pure functions of mixture_core."""

import os
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

import mixture_core
from mixture_core import MixtureState, StepStats
from mixture_core.grouped import complete_
from mixture_core.inputs import usable_rows
from mixture_core.step import advance
from mixture_torch.batches import as_plain_embeddings, receive, refuse
from mixture_torch.checkpoint import from_state_dict, to_state_dict
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.graphs import Graphs
from mixture_torch.memory import Memory
from mixture_torch.precision import full_float32, may_wait
from mixture_torch.recorder import Recorder
from mixture_torch.reports import Report

DEFAULTS = MixtureRuntimeConfig()
CALLER = 3  # frames up from `update`, of which torch.compiler.disable takes one
SEEDING_ROWS = 4  # times K: with fewer rows, k-means++ misses components
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
        ema_decay: What a step leaves of the weight of earlier samples, in (0, 1).
        enabled: False makes every method do nothing.
        is_main: Whether this process writes files; None is rank 0, or any process outside a process group.
        cross_rank: Gather the embeddings of all ranks before each update.
        log_dir: Folder for the files; None writes none.
        store_scores: Write the responsibilities too.
        scores_mode: `append`: all in one file; `per_step`: one file per step.
        max_assign_iters: Lloyd iterations per step.
        seed: Of the estimator's own random numbers.
        strict: Raise where rows would be ignored.
        revive_below: Share, times K, under which a component counts as dead and is moved; 0 turns that off.
        compile: On a GPU, replay steps as CUDA graphs, for each size of batch: a fraction of the host's time. Not where
            `strict` has to wait anyway.

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
        cross_rank: bool = DEFAULTS.cross_rank,
        log_dir: str | os.PathLike[str] | None = None,
        store_scores: bool = DEFAULTS.store_scores,
        scores_mode: Literal["append", "per_step"] = DEFAULTS.scores_mode,
        max_assign_iters: int = DEFAULTS.max_assign_iters,
        seed: int = DEFAULTS.seed,
        strict: bool = DEFAULTS.strict,
        revive_below: float = DEFAULTS.revive_below,
        compile: bool = DEFAULTS.compile,
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
            revive_below=revive_below,
            compile=compile,
        )
        self._recorder = Recorder(self._config, log_dir=log_dir, is_main=is_main)
        self._state: MixtureState | None = None
        self._waiting: Tensor | None = None  # (n, D) rows that came before there were enough to start from
        self._stats = NOTHING
        self._report: Report | None = None
        self._memory = Memory()
        self._graphs = Graphs(self._config.core)
        self._warned = False

    @classmethod
    def from_config(
        cls,
        config: MixtureRuntimeConfig,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        is_main: bool | None = None,
    ) -> "MixtureStats":
        """Returns the estimator of a configuration.

        Args:
            config: From `MixtureRuntimeConfig.from_yaml`, `.from_mapping`, or made by hand.
            log_dir: Folder for the files.
            is_main: Whether this process writes them.

        Raises:
            TypeError: `config` is something else, or another argument is of the wrong type.
            ValueError: `store_scores` lacks a `log_dir`.
        """
        if not isinstance(config, MixtureRuntimeConfig):
            raise TypeError(f"`config` must be a MixtureRuntimeConfig, got {config!r}.")
        return cls(log_dir=log_dir, is_main=is_main, **attrs.asdict(config))

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
        if self._state is None:
            return None
        with full_float32(self._state.moments.weight):
            state: MixtureState = tree_map(torch.clone, self._state)
            complete_(state.moments.covariance)
        return state

    @property
    def stats(self) -> Mapping[str, Tensor]:
        """What the last update returned; empty before the first."""
        return self._stats

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has not annotated it
    def update(self, embeddings: Tensor, labels: Tensor | None = None) -> Mapping[str, Tensor]:
        """Returns the mixture after one more batch: pi, mu, Sigma, B, R and more, by key or attribute.

        Where the estimator is disabled, the mapping is empty. During a backward pass, where activation checkpointing
        runs the forward pass a second time, nothing is updated and the last mapping is returned.

        Args:
            embeddings: (N, D) of any real type, tensor or NumPy array; N may differ from step to step, and be 0. Rows
                with NaN or Inf are ignored and counted.
            labels: (N,) integers in [0, K), or -1 or -100 where a row is to be ignored; only looked at where
                responsibilities come from labels.

        Raises:
            TypeError: An argument is of the wrong type; the estimator is unchanged.
            ValueError: A shape or a label is wrong, or `strict` and a row is ignored; likewise.
        """
        if not self.enabled:
            return NOTHING
        if torch._C._current_graph_task_id() != -1:  # torch has no public way to tell that a backward pass is running
            return self._stats
        self._settle(but=1)
        return self._replay(embeddings) or self._update(embeddings, labels)

    def log_step(self, *, step: int, epoch: int, stats: Mapping[str, Tensor] | None = None) -> None:
        """Appends one row to `mixture.csv`, and the responsibilities to their file where `store_scores` says so.

        Does nothing where the estimator is disabled, without a `log_dir`, and on other ranks than the main one.

        Args:
            step: The training step, at least 0.
            epoch: The epoch, at least 0.
            stats: What `update` returned; None is the last.

        Raises:
            TypeError: `step` or `epoch` is no integer, or `stats` no mapping.
            ValueError: One of them is negative, or there has been no update.
            OSError: The row could not be written.
        """
        if not self.enabled:
            return
        stats = self._stats if stats is None else stats
        if not isinstance(stats, Mapping):
            raise TypeError(f"`stats` must be what `update` returned, got {type(stats).__name__}.")
        if not stats:
            raise ValueError("`log_step` must come after `update`, got no statistics to log.")
        report = self._report if stats is self._stats else None
        self._recorder.record(stats, report, step=step, epoch=epoch)
        self._settle(but=1)

    def assign(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns R, (N, K) float32: each row's nearest mean as it stands, or its label, with no update of anything.

        Args:
            embeddings: (N, D), tensor or NumPy array.
            labels: (N,) integers; only looked at where responsibilities come from labels.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: A shape is wrong, or there has been no update.
        """
        if self._state is None:
            raise ValueError("`assign` must come after `update`, got no mixture to assign to.")
        with full_float32(embeddings):
            x = as_plain_embeddings(embeddings)
            return mixture_core.assign(_to_device(self._state, x.device), x, labels)

    def state_dict(self) -> dict[str, Tensor | int | str]:
        """Returns all that a later run needs to go on, as plain tensors, ints and strings, with the same keys always.

        `torch.load` reads it back with its safe defaults.
        """
        return to_state_dict(self._config.core, self.state, self._waiting)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state_dict.

        Args:
            state_dict: From an estimator with the same K, mode and assigner.

        Raises:
            ValueError: It is from another kind of estimator, or incomplete; this one is unchanged.
        """
        with full_float32(None):
            self._state, self._waiting = from_state_dict(self._config.core, state_dict)
        self._memory, self._graphs = Memory(), Graphs(self._config.core)
        self._stats = NOTHING

    def flush(self) -> None:
        """Makes all files complete: `mixture_scores.pt` holds all that was logged.

        Raises:
            OSError: A file could not be written.
        """
        self._settle()
        self._recorder.flush()

    def close(self) -> None:
        """Makes all files complete and closes them; a later `log_step` opens them again.

        Raises:
            OSError: A file could not be written.
        """
        self._settle()
        self._recorder.close()

    def __enter__(self) -> "MixtureStats":
        """Returns the estimator."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self.close()

    def _replay(self, embeddings: Tensor) -> StepStats | None:
        """What `update` does, where a graph that has been captured does it all."""
        if not self._config.compile or self._config.uses_labels or self._config.cross_rank or self._config.strict:
            return None
        if self._state is None or self._waiting is not None or not self._graphs.take(embeddings):
            return None
        work = self._memory.lend(self._state.moments.covariance, N=embeddings.shape[0])
        step = self._graphs.replay(self._state, embeddings, None, work)
        return None if step is None else self._commit(self._state, None, *step)

    def _update(self, embeddings: Tensor, labels: Tensor | None) -> StepStats:
        with full_float32(embeddings):
            D = None if self._state is None else self._state.moments.mean.shape[1]
            x, labels, wrong_label = receive(self._config, embeddings, labels, D=D)
            start, waiting = self._start(x)
            work = self._memory.lend(start.moments.covariance, N=len(x))
            step = None
            if self._config.compile and x.is_cuda and start is self._state and not self._config.strict:
                step = self._graphs.step(start, x, labels, work)
            state, stats, report = step or (*advance(start, x, labels, work=work), None)
            if self._config.strict and (n_ignored := int(stats.n_ignored)):
                raise ValueError(f"`strict` expects every row to be usable, got {_ignored(n_ignored, len(x))}.")
            if x.is_cuda and report is None:
                report = Report.of(stats)
            if report is not None and wrong_label is not None:
                report.doubt(wrong_label)
            shown = self._commit(start, waiting, state, stats, report)
        if report is None:
            self._warn_of_ignored(int(stats.n_ignored), len(x), stacklevel=CALLER + 1)
        return shown

    def _commit(
        self, start: MixtureState, waiting: Tensor | None, state: MixtureState, stats: StepStats, report: Report | None
    ) -> StepStats:
        """Makes the step the estimator's, and returns its statistics for the reader."""
        shown = self._memory.hand_out(stats, before=start.moments.covariance)
        self._state, self._waiting, self._stats, self._report = state, waiting, shown, report
        if report is not None:
            self._recorder.expect(report)
        return shown

    def _settle(self, *, but: int = 0) -> None:
        """Writes what has been logged and says what there is to say, but for that many of the latest updates."""
        for report in self._recorder.arrivals(but=but):
            at = "an update that was not logged" if report.step is None else f"step {report.step}"
            if report.wrong_label is not None:
                refuse(report.wrong_label, self._config.K, at=at)
            self._warn_of_ignored(report.n_ignored, report.N, stacklevel=CALLER, at=at)

    def _warn_of_ignored(self, n_ignored: int, N: int, *, stacklevel: int, at: str = "") -> None:
        if n_ignored and not self._warned:
            self._warned = True
            said = f"{_ignored(n_ignored, N)}{at and ' at '}{at}; said once, `n_ignored` counts them."
            warnings.warn(said, stacklevel=stacklevel + 1)

    def _start(self, x: Tensor) -> tuple[MixtureState, Tensor | None]:
        """The state that this batch's step starts from, and the rows that go on waiting for more to start from."""
        state, waiting = self._state, self._waiting
        if state is not None and waiting is None:
            return _to_device(state, x.device), None
        if self._config.uses_labels:
            return mixture_core.init(self._config.core, x), None
        with may_wait():  # for the GPU, once: how many rows there are decides whether to go on
            rows = x[usable_rows(x)]
            if state is not None and not len(rows):
                return _to_device(state, x.device), waiting
            if waiting is not None:
                rows = torch.cat([waiting.to(x.device), rows])
            generator = torch.Generator(device="cpu").manual_seed(self._config.seed)
            state = mixture_core.init(self._config.core, rows, generator=generator)
        return state, rows if len(rows) < SEEDING_ROWS * self._config.K else None


def _to_device(state: MixtureState, device: torch.device) -> MixtureState:
    if state.moments.weight.device == device:
        return state
    moved: MixtureState = tree_map(lambda tensor: tensor.to(device), state)
    return moved


def _ignored(count: int, N: int) -> str:
    return f"{count} of {N} rows ignored (NaN, infinite, beyond 1.8e13, or labelled to be ignored)"
