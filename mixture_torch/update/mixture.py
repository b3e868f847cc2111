"""The mixture that an estimator keeps from update to update, on one rank or on several."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

import mixture_core
from mixture_core.pairs import Pairs, accumulate, from_sums, none, pair_sums, repeated
from mixture_core.relocate import move
from mixture_core.sharded import Total, advance_share
from mixture_core.step import advance
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.update.arrivals import Report
from mixture_torch.update.batch import Batch, exchange, ignored, receive
from mixture_torch.update.checkpoint import LowerState, Progress, to_device
from mixture_torch.update.cuda_graphs import Graphs
from mixture_torch.update.figures import Rows
from mixture_torch.update.precision import full_float32, outside_transforms, unwrapped
from mixture_torch.update.ranks import is_out_of_memory, other_ranks, text_of, together
from mixture_torch.update.seeding import FirstWindow, seed, size_note
from mixture_torch.update.stats import Memory, Source, StepStats, is_idle, results_of

PAIRS_EVERY = 10  # steps: to observe pairs takes nearly as long as a step


class Updated(NamedTuple):
    """The outcome of an update."""

    stats: StepStats
    report: Report | None  # what the host must know of it, if that is still on its way from a GPU
    n_rows: int | Tensor  # of this call, on all ranks that count
    n_ignored: int  # rows of this call; 0 if only the report knows


class _Outcome(NamedTuple):
    """A computed step that has not been committed."""

    state: LowerState
    results: Source
    report: Report | None  # of a replayed step
    before: Tensor  # (K, D, D) memory that the next step may write to
    is_idle: bool = False  # no row was usable
    waiting: Tensor | None = None  # (n, D) rows to seed means from, if there are too few so far
    n_relocated: Tensor | None = None  # () components moved before the step; None if no move was due
    pairs: Pairs | None = None  # of all views so far


class Mixture:
    """Takes batches; owns the state, its memory and the current training step."""

    def __init__(self, config: MixtureRuntimeConfig, process_group: Any) -> None:
        self._config, self._core, self._group = config, config.core, process_group
        self._relocation_window = config.window if config.relocates else 0
        self._replays = config.compile and not (config.uses_labels or config.cross_rank or config.strict)
        self._captures = config.compile and not config.strict and config.cross_rank != "reduce"
        self._first_window = FirstWindow(config)
        self.notes: list[str] = []  # warnings that the user has not been given yet
        self.is_short = False  # memory has run out before, and the user is told once
        self.restart(Progress())

    def restart(self, progress: Progress) -> None:
        """Goes on from a checkpoint, or from nothing."""
        self.progress = progress
        self.n_updates = 0  # since then
        self._origin = progress.digest
        self._memory = Memory()
        self._graphs = Graphs(self._core, extra=self._config.extra, say=self.notes.append)
        self._last: StepStats | None = None
        self._token: object = None  # of the training step that is under way
        self._early: list[Batch] = []  # its batches so far, while there are too few rows to seed means from
        self._is_counted = False  # whether `n_steps` counts it already, since one of its rows was usable
        self._was_together = False  # whether there has been an update with other ranks

    def update(
        self, embeddings: Any, labels: Any, *, views: int, token: object, problem: Exception | None
    ) -> Updated | None:
        """Returns the outcome of one more batch; None if memory ran out before there were any statistics.

        The same `token` as before makes this batch a further part of its training step; None is never the same. Below,
        `so_far` holds the statistics of the parts before it; None if it begins a step, at which earlier weights decay.
        `problem` is an error that this rank has instead of a batch, and that other ranks must be told.
        """
        if torch._C._are_functorch_transforms_active():
            with outside_transforms():
                return self.update(unwrapped(embeddings), unwrapped(labels), views=views, token=token, problem=problem)
        so_far = self._last if token is not None and token == self._token else None
        updated: Updated | None = None
        if self._replays and so_far is None and problem is None and not self._is_move_due(so_far):
            updated = self._replay(embeddings, views)
        if updated is None:
            with full_float32(embeddings):
                try:
                    updated = self._update(embeddings, labels, views, problem, so_far)
                except (MemoryError, RuntimeError) as error:
                    if self._config.strict or not is_out_of_memory(error):
                        raise
                    updated = self._skip(embeddings, so_far, error)
        if updated is None:
            return None
        self._token = token
        if not self._first_window.is_over:
            N, is_further = updated.stats.rows.N, so_far is not None
            self.notes += self._first_window.add(N, is_further=is_further, may_grow=token is not None)
        return updated

    def _is_move_due(self, so_far: StepStats | None) -> bool:
        """Whether components may move now, before the first usable rows of a new window."""
        n_steps, window = self.progress.n_steps, self._relocation_window
        has_begun = so_far is not None and self._is_counted
        return window > 0 and n_steps > 0 and n_steps % window == 0 and not has_begun

    def _replay(self, embeddings: Any, views: int) -> Updated | None:
        """The whole update by a captured graph; None if there is none for this batch, or if it has pairs of views."""
        state, waiting = self.progress.state, self.progress.waiting
        if views == 2 or state is None or waiting is not None or not self._graphs.take(embeddings):
            return None
        N, before = embeddings.shape[0], state.moments.covariance
        replayed = self._graphs.replay(state, embeddings, None, self._memory.lend(before, N=N))
        return replayed and self._commit(_Outcome(*replayed, before, pairs=self.progress.pairs), None, N)

    def _update(
        self, embeddings: Any, labels: Any, views: int, problem: Exception | None, so_far: StepStats | None
    ) -> Updated:
        config, (state, waiting, n_steps, _) = self._config, self.progress
        D = config.dim if state is None else state.moments.mean.shape[1]

        def own() -> Batch:
            if problem is not None:
                raise problem
            return receive(config, embeddings, labels, D=D, views=views)

        ranks = other_ranks(self._group, was_together=self._was_together) if config.cross_rank else None
        if ranks is None:
            return self._take(own(), so_far, None)
        self._was_together = True
        reduces, n_waiting = config.cross_rank == "reduce", None if waiting is None else len(waiting)
        same = config.seed, config.strict, self._origin, self.n_updates, n_steps, n_waiting, so_far is None, views
        like = None if state is None or waiting is not None else state.moments.mean
        batch = exchange(config, own, ranks=ranks, same=(self._core, reduces, same), like=like)
        with together():
            return self._take(batch, so_far, ranks.total if reduces else None)

    def _take(self, batch: Batch, so_far: StepStats | None, total: Total | None) -> Updated:
        """Computes the step and makes it the estimator's."""
        early = [] if so_far is None else self._early
        state = self.progress.state if self.progress.waiting is None else None
        outcome = self._seed(early, batch, total) if state is None else self._go_on(state, batch, so_far, total)
        if self._config.strict and (n_ignored := int(outcome.results["n_ignored"])):
            raise ValueError(f"`strict` is set, but {ignored(n_ignored, int(batch.n_rows))}.")
        outcome = outcome._replace(pairs=self._pairs(outcome, batch, so_far, total))
        updated = self._commit(outcome, so_far, batch.n_rows)
        self._early = []
        if outcome.waiting is not None:  # copied, since the caller may overwrite the batch before the step's next part
            labels = None if batch.labels is None else batch.labels.clone()
            self._early = [*early, batch._replace(x=batch.x.clone(), labels=labels)]
        if updated.report is not None:
            updated.report.doubt(batch.doubts)
        return updated

    def _seed(self, early: list[Batch], batch: Batch, total: Total | None) -> _Outcome:
        """Computes the step from newly seeded means; all parts of the step are processed again."""
        progress = self.progress
        if progress.state is None:
            self.notes += size_note(self._config.K, batch.everyone.shape[1])
        state, waiting = seed(self._config, progress, batch.everyone)
        before, is_anew = state.moments.covariance, waiting is None or waiting is not progress.waiting
        for each in (*early, batch) if is_anew else (batch,):
            state, results = self._advance(state, each, True, total)  # new means have no weight to decay
        return _Outcome(state, results, None, before, is_idle(results, batch.n_rows), waiting)

    def _go_on(self, state: LowerState, batch: Batch, so_far: StepStats | None, total: Total | None) -> _Outcome:
        """Computes the step from the state, after a relocation if one is due."""
        kept = to_device(state, batch.x.device)
        start, n_relocated, before = kept, None, kept.moments.covariance
        if self._is_move_due(so_far):
            start, n_relocated = move(kept, lower=True)  # type: ignore[assignment]  # it keeps to lower triangles
        if self._captures and batch.x.is_cuda and start is state and so_far is None:
            work = self._memory.lend(before, N=len(batch.x))
            if (replayed := self._graphs.step(start, batch.x, batch.labels, work)) is not None:
                return _Outcome(*replayed, before)
        continues = _continues(so_far)
        new, results = self._advance(start, batch, continues, total)
        idle = is_idle(results, batch.n_rows)
        if idle and start is not kept:  # a step without a usable row leaves the state: undo the move
            n_relocated = None
            new, results = self._advance(kept, batch, continues, total)
        return _Outcome(new, results, None, before, idle, n_relocated=n_relocated)

    def _advance(
        self, state: LowerState, batch: Batch, continues: bool | Tensor, total: Total | None
    ) -> tuple[LowerState, Source]:
        work = self._memory.lend(state.moments.covariance, N=batch.x.shape[0])
        core_step = advance if total is None else partial(advance_share, total=total)
        new, stats = core_step(state, batch.x, batch.labels, continues=continues, work=work)
        return LowerState(new), results_of(stats)

    def _pairs(self, outcome: _Outcome, batch: Batch, so_far: StepStats | None, total: Total | None) -> Pairs | None:
        """Returns the statistics of pairs of views after the step, the same on all ranks."""
        earlier, moments, config = self.progress.pairs, outcome.state.moments, self._core
        number = self.progress.n_steps + (so_far is None or not self._is_counted)  # of the step, from 1
        gap = PAIRS_EVERY if number > PAIRS_EVERY and config.averages else 1
        if not batch.sizes or outcome.is_idle or outcome.waiting is not None or number % gap:
            return earlier
        sums = pair_sums(batch.by_view(batch.x), batch.by_view(outcome.results["R"]), moments)
        own = from_sums(sums if total is None else total(sums), K=config.K)
        before = tree_map(lambda tensor: tensor.to(sums.device), earlier or none(K=config.K, D=len(own.V)))
        decay = config.ema_decay if config.averages else 0.0
        # A batch without a usable pair decays nothing: on a GPU, the host cannot tell it from an idle one.
        factor = torch.where((own.weight == 0) | _continues(so_far), 1.0, decay**gap)
        return accumulate(before, repeated(own, steps=gap, decay=decay), decay=factor.to(sums.dtype))

    def _skip(self, embeddings: Any, so_far: StepStats | None, error: Exception) -> Updated | None:
        """Returns the outcome of a batch without usable rows: an instrument must not end the run that it watches."""
        if not self.is_short:
            self.is_short = True
            self.notes.append(f"`update` ran out of memory and skips such batches: {text_of(error)}")
        state, waiting, _, pairs = self.progress
        if state is None or self._last is None:
            return None
        N = len(embeddings) if hasattr(embeddings, "__len__") else 0  # another rank may be the one without memory
        weight, K = state.moments.weight, self._config.K
        R, n_ignored = weight.new_zeros(1, K).expand(N, K), weight.new_full((), N, dtype=torch.int64)
        self._early = [] if so_far is None else self._early
        nothing = mixture_core.StepStats(moments=state.moments, R=R, n_ignored=n_ignored)
        before = state.moments.covariance
        outcome = _Outcome(state, results_of(nothing), None, before, True, waiting, pairs=pairs)
        return self._commit(outcome, so_far, N)._replace(report=None, n_ignored=0)  # the user hears of memory

    def _commit(self, outcome: _Outcome, so_far: StepStats | None, n_rows: int | Tensor) -> Updated:
        """Makes the step the estimator's, and returns its statistics for the reader."""
        is_counted = so_far is not None and self._is_counted
        counts = outcome.waiting is None and not outcome.is_idle and not is_counted
        n_steps = self.progress.n_steps + counts
        rows = Rows(n_rows, n_steps=n_steps)
        if so_far is not None:
            N, earlier, n_ignored, members, _ = so_far.rows
            n_ignored, members = n_ignored + so_far.n_ignored, members + so_far.counts
            rows = Rows(N + n_rows, (*earlier, so_far.R), n_ignored, members, n_steps)
        stats = self._memory.hand_out(outcome.results, rows, outcome.n_relocated, outcome.pairs, before=outcome.before)
        report = outcome.report
        if report is not None:
            report.add_pairs(outcome.pairs)
        elif outcome.state.moments.weight.is_cuda:
            report = Report.of(stats, extra=self._config.extra)
        self._is_counted = is_counted or counts
        self.progress = Progress(outcome.state, outcome.waiting, n_steps, outcome.pairs)
        self._last = stats
        self.n_updates += 1
        return Updated(stats, report, n_rows, int(outcome.results["n_ignored"]) if report is None else 0)


def _continues(so_far: StepStats | None) -> bool | Tensor:
    """Whether earlier weights have decayed in this step already, as they do at its first usable row."""
    if so_far is None:
        return False
    usable = so_far.rows.n_ignored + so_far.n_ignored < so_far.rows.N
    return usable if usable.is_cuda else bool(usable)
