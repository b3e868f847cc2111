"""The mixture that an estimator keeps from update to update, on one rank or on several."""

from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mixture_core
from mixture_core.inputs import usable_rows
from mixture_core.relocate import move
from mixture_core.shares import Total, advance_share
from mixture_core.step import advance
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.reports import Report
from mixture_torch.update.batch import Batch, exchange, ignored, receive, together
from mixture_torch.update.checkpoint import SEEDING_ROWS, LowerState, Progress, to_device
from mixture_torch.update.cuda_graphs import Graphs
from mixture_torch.update.precision import full_float32, may_wait, outside_transforms, unwrapped
from mixture_torch.update.ranks import Ranks, digest, other_ranks
from mixture_torch.update.stats import Memory, Rows, Source, StepStats, source_of

LARGE = 1e9  # bytes; the user is told the size of a larger state


class Updated(NamedTuple):
    """The outcome of an update."""

    stats: StepStats
    report: Report | None  # what the host must know of it, if it is still on its way from a GPU
    n_rows: int | Tensor  # of this call, on all ranks that count


class Part(Enum):
    """What a call of `update` is to its training step."""

    FIRST = auto()  # the step begins: earlier weights decay
    FURTHER = auto()  # more rows of the same step: nothing decays in between


class _Outcome(NamedTuple):
    """A step that has been computed, before it becomes the estimator's."""

    state: LowerState
    results: Source
    before: Tensor  # (K, D, D) memory that the next step may write to
    waiting: Tensor | None = None  # (n, D) rows to seed means from, if there are too few so far
    n_relocated: Tensor | None = None  # () components moved before the step; None if no move was due
    report: Report | None = None
    is_idle: bool = False  # no row was usable


class Mixture:
    """Takes batches in, and keeps the state, the memory that it lives in, and the training step that is under way.

    Args:
        config: The choices.
        process_group: The ranks to exchange with if `cross_rank` is on; None is the default group.
    """

    def __init__(self, config: MixtureRuntimeConfig, process_group: Any) -> None:
        self._config, self._core, self._group = config, config.core, process_group
        self._window, self._relocates, self._by_labels = config.window, config.relocates, config.uses_labels
        self._replays = config.compile and not (self._by_labels or config.cross_rank or config.strict)
        self._captures = config.compile and not config.strict and config.cross_rank != "reduce"
        self._sizes: list[int | Tensor] | None = []  # rows of each step, until the first window has been checked
        self.notes: list[str] = []  # warnings that the user has not been given yet
        self.restart(Progress())

    def restart(self, progress: Progress) -> None:
        """Goes on from a checkpoint, or from nothing."""
        self.progress = progress
        self._origin = progress.digest
        self.n_updates = 0  # since then
        self._memory, self._graphs = Memory(), Graphs(self._core, self.notes.append)
        self._last: StepStats | None = None
        self._token: object = None  # of the training step that is under way
        self._early: list[Batch] = []  # its batches so far, while there are too few rows to seed means from
        self._is_counted = False  # whether `n_steps` counts it already, as one of its rows was usable
        self._was_together = False  # whether an update has been made with other ranks

    def update(self, embeddings: Any, labels: Any, *, token: object, problem: Exception | None = None) -> Updated:
        """Returns the outcome of one more batch.

        Args:
            embeddings: (N, D), tensor or NumPy array.
            labels: (N,) integers; ignored unless responsibilities come from labels.
            token: Names the training step; the same token as before makes the batch a further part of that step. None
                is a step of its own.
            problem: An error that this rank has instead of a batch, and that other ranks must be told.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: A shape or a label is wrong, or `strict` and a row is ignored; here or on another rank.
            RuntimeError: Ranks are out of step, or their process group is gone.
        """
        if torch._C._are_functorch_transforms_active():
            with outside_transforms():
                return self.update(unwrapped(embeddings), unwrapped(labels), token=token, problem=problem)
        part = self._part(token)
        is_due = self._relocates and self._is_due(part)
        updated = None
        if self._replays and part is Part.FIRST and problem is None and not is_due:
            updated = self._replay(embeddings)
        if updated is None:
            with full_float32(embeddings):
                updated = self._update(embeddings, labels, problem, part, is_due)
        self._token = token
        if self._sizes is not None:
            self._check_window()
        return updated

    def skip(self, N: int, *, token: object) -> Updated | None:
        """Returns the outcome of a batch none of whose rows counts; None before the first update.

        Args:
            N: Rows of the batch.
            token: As in `update`.
        """
        (state, waiting, _), last, part = self.progress, self._last, self._part(token)
        if state is None or last is None:
            return None
        with full_float32(m := state.moments.weight):
            results = source_of(
                mixture_core.StepStats(
                    moments=state.moments,
                    R=m.new_zeros(N, self._config.K),
                    n_ignored=m.new_full((), N, dtype=torch.int64),
                )
            )
            self._early = self._early if part is Part.FURTHER else []
            outcome = _Outcome(state, results, state.moments.covariance, waiting, is_idle=True)
            updated = self._commit(outcome, part, N)
        self._token = token
        return updated

    def _part(self, token: object) -> Part:
        is_further = token is not None and self._last is not None and token == self._token
        return Part.FURTHER if is_further else Part.FIRST

    def _is_due(self, part: Part) -> bool:
        """Whether components may move now, before the first usable rows of a new window."""
        n_steps, has_begun = self.progress.n_steps, part is Part.FURTHER and self._is_counted
        return n_steps > 0 and n_steps % self._window == 0 and not has_begun

    def _replay(self, embeddings: Any) -> Updated | None:
        """The whole update by a captured graph; None if there is none for this batch."""
        state, waiting, _ = self.progress
        if state is None or waiting is not None or not self._graphs.take(embeddings):
            return None
        N, before = embeddings.shape[0], state.moments.covariance
        step = self._graphs.replay(state, embeddings, None, self._memory.lend(before, N=N))
        if step is None:
            return None
        return self._commit(_Outcome(step.state, step.results, before, report=step.report), Part.FIRST, N)

    def _update(self, embeddings: Any, labels: Any, problem: Exception | None, part: Part, is_due: bool) -> Updated:
        config, (state, waiting, n_steps) = self._config, self.progress
        D = config.dim if state is None else state.moments.mean.shape[1]
        ranks = self._other_ranks() if config.cross_rank else None
        if ranks is None:
            if problem is not None:
                raise problem
            return self._take(receive(config, embeddings, labels, D=D), part, is_due, None)

        def own() -> Batch:
            if problem is not None:
                raise problem
            return receive(config, embeddings, labels, D=D)

        reduces, n_waiting = config.cross_rank == "reduce", None if waiting is None else len(waiting)
        came = (self._origin, self.n_updates, n_steps, n_waiting, part is Part.FURTHER)
        shared = digest(self._core, reduces, config.seed, config.strict, *came)
        like = None if state is None or waiting is not None else state.moments.mean
        batch = exchange(config, own, ranks=ranks, digest=shared, like=like)
        with together():
            return self._take(batch, part, is_due, ranks.total if reduces else None)

    def _other_ranks(self) -> Ranks | None:
        ranks = other_ranks(self._group)
        if ranks is None and self._was_together:
            raise RuntimeError(
                "`cross_rank` is on, but the process group of the earlier updates has been destroyed; to go on alone, "
                "load the state_dict into an estimator without `cross_rank`."
            )
        self._was_together = ranks is not None
        return ranks

    def _take(self, batch: Batch, part: Part, is_due: bool, total: Total | None) -> Updated:
        """Computes the step and makes it the estimator's."""
        state, waiting, _ = self.progress
        early = self._early if part is Part.FURTHER else []
        if state is None or waiting is not None:
            outcome = self._seed(state, waiting, early, batch, total)
        else:
            outcome = self._go_on(state, batch, part, is_due, total)
        if self._config.strict and (n_ignored := int(outcome.results["n_ignored"])):
            raise ValueError(f"`strict` expects every row to be usable, got {ignored(n_ignored, int(batch.n_rows))}.")
        updated = self._commit(outcome, part, batch.n_rows)
        self._early = []
        if outcome.waiting is not None:  # copied, since the caller may overwrite the batch before the step's next part
            labels = None if batch.labels is None else batch.labels.clone()
            self._early = [*early, batch._replace(x=batch.x.clone(), labels=labels)]
        if updated.report is not None:
            updated.report.doubt(batch.doubts)
        return updated

    def _seed(
        self, state: LowerState | None, waiting: Tensor | None, early: list[Batch], batch: Batch, total: Total | None
    ) -> _Outcome:
        """The step from means that are seeded from all rows so far, and so with all parts of the step once more."""
        config, x = self._config, batch.everyone
        if state is None:
            self.notes += _size_note(config.K, x.shape[1])
        if self._by_labels:
            start, early = LowerState(mixture_core.init(self._core, x)), []
        else:
            with may_wait():  # once: the number of rows decides whether to seed again
                rows = x[usable_rows(x)]
                if state is not None and not len(rows):
                    start, early = to_device(state, x.device), []
                else:
                    rows = rows if waiting is None else torch.cat([waiting.to(x.device), rows])
                    generator = torch.Generator(device="cpu").manual_seed(config.seed)
                    start = LowerState(mixture_core.init(self._core, rows, generator=generator))
                    waiting = rows if len(rows) < SEEDING_ROWS * config.K else None
        state = start
        for each in (*early, batch):  # new means have no weight to decay
            state, stats = self._advance(state, each, True, total)
        is_idle = _is_idle(stats.n_ignored, batch.n_rows)
        return _Outcome(state, source_of(stats), start.moments.covariance, waiting, is_idle=is_idle)

    def _go_on(self, state: LowerState, batch: Batch, part: Part, is_due: bool, total: Total | None) -> _Outcome:
        """The step from the state, with components moved before it if that is due."""
        kept = to_device(state, batch.x.device)
        start, n_relocated, before = kept, None, kept.moments.covariance
        if is_due:
            moved, n_relocated = move(kept, lower=True)
            start = LowerState(moved)
        if self._captures and batch.x.is_cuda and start is state and part is Part.FIRST:
            work = self._memory.lend(before, N=len(batch.x))
            if (step := self._graphs.step(start, batch.x, batch.labels, work)) is not None:
                return _Outcome(step.state, step.results, before, n_relocated=n_relocated, report=step.report)
        continues = part is Part.FURTHER and self._has_usable_rows()
        new, stats = self._advance(start, batch, continues, total)
        is_idle = _is_idle(stats.n_ignored, batch.n_rows)
        if is_idle and start is not kept:  # a step without a usable row leaves the state: undo the move
            n_relocated = None
            new, stats = self._advance(kept, batch, continues, total)
        return _Outcome(new, source_of(stats), before, n_relocated=n_relocated, is_idle=is_idle)

    def _advance(
        self, state: LowerState, batch: Batch, continues: bool | Tensor, total: Total | None
    ) -> tuple[LowerState, mixture_core.StepStats]:
        work = self._memory.lend(state.moments.covariance, N=batch.x.shape[0])
        if total is None:
            new, stats = advance(state, batch.x, batch.labels, continues=continues, work=work)
        else:
            new, stats = advance_share(state, batch.x, batch.labels, total=total, continues=continues, work=work)
        return LowerState(new), stats

    def _has_usable_rows(self) -> bool | Tensor:
        """Whether the step that is under way has a usable row, and earlier weights have decayed; a tensor on a GPU."""
        last = self._last
        assert last is not None
        assert last.rows is not None
        usable: Tensor = last.rows.n_ignored + last.n_ignored < last.rows.N
        return usable if usable.is_cuda else bool(usable)

    def _commit(self, outcome: _Outcome, part: Part, n_rows: int | Tensor) -> Updated:
        """Makes the step the estimator's, and returns its statistics for the reader."""
        rows, last = Rows(n_rows), self._last
        if part is Part.FURTHER and last is not None and last.rows is not None:
            N, earlier, n_ignored = last.rows
            rows = Rows(N + n_rows, (*earlier, last.R), n_ignored + last.n_ignored)
        stats = self._memory.hand_out(outcome.results, rows, outcome.n_relocated, before=outcome.before)
        report = outcome.report
        if report is None and outcome.state.moments.weight.is_cuda:
            report = Report.of(stats)
        is_counted = part is Part.FURTHER and self._is_counted
        counts = outcome.waiting is None and not outcome.is_idle and not is_counted
        self._is_counted = is_counted or counts
        self.progress, self._last = Progress(outcome.state, outcome.waiting, self.progress.n_steps + counts), stats
        self.n_updates += 1
        if self._sizes is not None:
            if part is Part.FURTHER:
                self._sizes.pop()
            self._sizes.append(rows.N)
        return Updated(stats, report, n_rows)

    def _check_window(self) -> None:
        """Notes, once, that the first whole window had too few rows for K."""
        sizes, window, K = self._sizes or [], self._window, self._config.K
        if len(sizes) < window:
            return
        whole = sizes if self._token is None else sizes[:-1]  # a step with a token may have further parts
        whole = [N for N in whole if isinstance(N, Tensor) or N > 0]
        if len(whole) < window:
            return
        self._sizes = None
        with may_wait():  # once, if ranks reduce on GPUs
            n_rows = int(sum(whole))
        if n_rows < SEEDING_ROWS * K:
            self.notes.append(
                f"K={K} is too large: the first window, {window} steps, had {n_rows} rows, fewer than 4 K = "
                f"{SEEDING_ROWS * K}. Use a smaller K, larger batches or a larger `ema_decay`."
            )


def _is_idle(n_ignored: Tensor, n_rows: int | Tensor) -> bool:
    """Whether a batch has no usable row; on a GPU, for which the host does not wait, whether it has no row."""
    if n_ignored.is_cuda:
        return isinstance(n_rows, int) and n_rows == 0
    return int(n_ignored) == int(n_rows)


def _size_note(K: int, D: int) -> list[str]:
    """A note on the size of the state, if it is large."""
    if (size := 4 * K * (1 + D + D * D)) <= LARGE:
        return []
    return [
        f"The mixture of K = {K} components of D = {D} takes {size / 1e9:.1f} GB, and each step as much again; a smaller "
        "K, or a projection to fewer dimensions, takes less."
    ]
