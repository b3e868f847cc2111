"""The mixture that an estimator keeps from update to update, on one rank or on several."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

import mixture_core
from mixture_core import MixtureState, StepStats
from mixture_core.inputs import usable_rows
from mixture_core.relocate import move
from mixture_core.sharded import Total, advance_share
from mixture_core.step import advance
from mixture_torch.batches import Batch, exchange, receive, together
from mixture_torch.checkpoint import SEEDING_ROWS, Standing
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.distributed import digest, other_ranks
from mixture_torch.graphs import Graphs
from mixture_torch.memory import ExactStats, Memory, Rows
from mixture_torch.precision import full_float32, may_wait
from mixture_torch.reports import Report

LARGE = 1e9  # bytes; a state beyond that says how large it is


class Updated(NamedTuple):
    """What came of an update."""

    stats: ExactStats  # as a reader gets them
    report: Report | None  # where it is still on its way
    n_rows: int | Tensor  # of this call, on all ranks that count


class Start(NamedTuple):
    """What a step starts from."""

    state: MixtureState
    waiting: Tensor | None = None  # (n, D) rows that go on waiting for more to start from
    anew: bool = False  # whether the state has seen no batch
    n_relocated: Tensor | None = None  # () components moved before this step; None if no move was due


class Accumulator:
    """Takes batches in, and keeps the mixture, the memory that it lives in, and the step that is under way.

    Args:
        config: The choices.
        process_group: The ranks to exchange with where `cross_rank` is on; None is the default group.
    """

    def __init__(self, config: MixtureRuntimeConfig, process_group: Any) -> None:
        self._config = config
        self._group = process_group
        self._is_scarcity_checked = False
        self.restart(Standing())

    def restart(self, standing: Standing) -> None:
        """Goes on from there."""
        self.standing = standing
        self._origin = _digest_of(standing.state)
        self._n_updates = 0  # since then
        self._memory, self._graphs = Memory(), Graphs(self._config.core)
        self._last: ExactStats | None = None
        self._token: object = None  # of the step that is under way
        self._early: list[Batch] = []  # its batches that came before there were enough rows to start from
        self._is_counted = False  # whether `n_steps` already counts that step, from its first part with a usable row on
        self._rows_of_steps: list[int | Tensor] = []  # until the first window has been checked

    def update(self, embeddings: Any, labels: Any, *, token: object, problem: Exception | None = None) -> Updated:
        """Returns what comes of one more batch; of one more part of the last one, where it has the same token.

        Args:
            embeddings: (N, D), tensor or NumPy array.
            labels: (N,) integers; only looked at where responsibilities come from labels.
            token: Which step it belongs to; None is one of its own.
            problem: Why there is no batch on this rank, which other ranks have to be told.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: A shape or a label is wrong, or `strict` and a row is ignored; here or on another rank.
        """
        continues = self._continues(token)
        updated = None if continues or problem is not None else self._replay(embeddings)
        if updated is None:
            with full_float32(embeddings):
                own = partial(self._receive, embeddings, labels, problem)
                updated = self._update(own, continues=continues)
        self._token = token
        return updated

    def skip(self, N: int, *, token: object) -> Updated | None:
        """Returns what comes of a batch none of whose rows counts; None before the first update.

        Args:
            N: Its rows.
            token: As in `update`.
        """
        (state, waiting, _), last = self.standing, self._last
        if state is None or last is None:
            return None
        with full_float32(last.moments.weight):
            count = last.moments.weight.new_zeros((), dtype=torch.int64)
            R = state.moments.weight.new_zeros(N, self._config.K)
            stats = StepStats(moments=state.moments, R=R, n_ignored=count + N)
            continues = self._continues(token)
            rows = self._rows(N, continues=continues)
            updated = self._commit(Start(state, waiting), state, stats, rows, None, continues=continues, idle=True)
        self._token = token
        return updated._replace(n_rows=N)

    def _continues(self, token: object) -> bool:
        return token is not None and token == self._token and self._last is not None

    def _rows(self, n_rows: int | Tensor, *, continues: bool) -> Rows:
        """The rows of the step that so many more belong to."""
        last = self._last
        if not continues or last is None:
            return Rows(n_rows)
        return Rows(last.rows.N + n_rows, (*last.rows.earlier, last.R), last.rows.n_ignored + last.n_ignored)

    def _replay(self, embeddings: Any) -> Updated | None:
        """What `update` does, where a graph that has been captured does it all."""
        config, (state, waiting, _) = self._config, self.standing
        if (
            self._is_due(continues=False)
            or not config.compile
            or config.uses_labels
            or config.cross_rank
            or config.strict
        ):
            return None
        if state is None or waiting is not None or not self._graphs.take(embeddings):
            return None
        N = embeddings.shape[0]
        work = self._memory.lend(state.moments.covariance, N=N)
        step = self._graphs.replay(state, embeddings, None, work)
        return (
            None
            if step is None
            else self._commit(Start(state), step.state, step.stats, Rows(N), step.report, continues=False)
        )

    def _receive(self, embeddings: Any, labels: Any, problem: Exception | None) -> Batch:
        if problem is not None:
            raise problem
        return receive(self._config, embeddings, labels, D=self.standing.D or self._config.dim)

    def _update(self, own: Callable[[], Batch], *, continues: bool) -> Updated:
        config, (state, waiting, n_steps) = self._config, self.standing
        ranks = other_ranks(self._group) if config.cross_rank else None
        if ranks is None:
            return self._take(own(), None, continues=continues)
        n_waiting = None if waiting is None else len(waiting)
        came = (self._origin, self._n_updates, n_steps, n_waiting, continues)
        shared = digest(config.core, config.cross_rank == "reduce", config.seed, config.strict, *came)
        like = None if state is None or waiting is not None else state.moments.mean
        batch = exchange(config, own, ranks=ranks, digest=shared, like=like)
        with together():
            return self._take(batch, ranks.total if config.cross_rank == "reduce" else None, continues=continues)

    def _take(self, batch: Batch, total: Total | None, *, continues: bool) -> Updated:
        start, early = self._start(batch.everyone, continues=continues), self._early if continues else []
        step = self._captured(start.state, batch) if start.state is self.standing.state and not continues else None
        state, stats, report = step or (*self._advance(start, batch, total, continues=continues), None)
        idle = step is None and _is_idle(stats, batch.n_rows)
        if idle and start.n_relocated is not None:  # it must not change the state: undo the move
            start = Start(to_device(cast(MixtureState, self.standing.state), batch.x.device))
            state, stats = self._advance(start, batch, total, continues=continues)
        if self._config.strict and (n_ignored := int(stats.n_ignored)):
            N = int(batch.n_rows)
            raise ValueError(f"`strict` expects every row to be usable, got {ignored(n_ignored, N)}.")
        rows = self._rows(batch.n_rows, continues=continues)
        self._early = []
        if start.waiting is not None:  # for its step's next part, by which the caller may have changed what is his
            own = batch._replace(x=batch.x.clone(), labels=None if batch.labels is None else batch.labels.clone())
            self._early = [*early, own]
        updated = self._commit(start, state, stats, rows, report, continues=continues, idle=idle)
        if updated.report is not None:
            updated.report.doubt(batch.doubts)
        return updated._replace(n_rows=batch.n_rows)

    def _captured(self, state: MixtureState, batch: Batch) -> Any:
        """The step from a graph that has been captured or now is; None where there is none."""
        if not (self._config.compile and batch.x.is_cuda) or self._config.strict or self._config.cross_rank == "reduce":
            return None
        work = self._memory.lend(state.moments.covariance, N=len(batch.x))
        return self._graphs.step(state, batch.x, batch.labels, work)

    def _advance(
        self, start: Start, batch: Batch, total: Total | None, *, continues: bool
    ) -> tuple[MixtureState, StepStats]:
        """One step; where it continues one that had to start anew, with that one's earlier batches before it."""
        early = self._early if continues and start.anew else []
        state, last = start.state, self._last
        for n, part in enumerate([*early, batch]):
            further: bool | Tensor = n > 0
            if continues and not early and last is not None:  # what is idle is no part: the step is yet to decay
                counts: Tensor = last.rows.n_ignored + last.n_ignored < last.rows.N
                further = counts if counts.is_cuda else bool(counts)  # for the CPU nobody waits
            work = self._memory.lend(state.moments.covariance, N=len(part.x))
            if total is None:
                state, stats = advance(state, part.x, part.labels, continues=further, work=work)
            else:
                state, stats = advance_share(state, part.x, part.labels, total=total, continues=further, work=work)
        return state, stats

    def _commit(
        self,
        start: Start,
        state: MixtureState,
        stats: StepStats,
        rows: Rows,
        report: Report | None,
        *,
        continues: bool,
        idle: bool = False,
    ) -> Updated:
        """Makes the step the estimator's, and returns its statistics for the reader."""
        # CUDA graphs know two memories: reuse the one from before the move, not the copy that `move` has made.
        old = start.state if start.n_relocated is None else cast(MixtureState, self.standing.state)
        shown = self._memory.hand_out(stats, rows, start.n_relocated, before=old.moments.covariance)
        if report is None and stats.moments.weight.is_cuda:
            report = Report.of(shown)
        if not self._is_scarcity_checked:
            if continues:
                self._rows_of_steps.pop()
            self._rows_of_steps.append(rows.N)
        is_counted = continues and self._is_counted
        counts = start.waiting is None and not idle and not is_counted
        self._is_counted = is_counted or counts
        self.standing, self._last = Standing(state, start.waiting, self.standing.n_steps + counts), shown
        self._n_updates += 1
        return Updated(shown, report, rows.N)

    def scarce_rows(self) -> int | None:
        """Returns the number of rows in the first whole window if it is too small for K, once; otherwise None."""
        steps = self._rows_of_steps
        if self._is_scarcity_checked or len(steps) < self._config.window:
            return None
        whole = steps if self._token is None else steps[:-1]  # a step with a token may have further parts
        whole = [N for N in whole if isinstance(N, Tensor) or N > 0]
        if len(whole) < self._config.window:
            return None
        self._is_scarcity_checked, self._rows_of_steps = True, []
        with may_wait():  # for a GPU, once, if ranks reduce
            n_rows = int(sum(whole))
        return n_rows if n_rows < SEEDING_ROWS * self._config.K else None

    def _is_due(self, *, continues: bool) -> bool:
        """Whether components may move now, before the first step of a new window."""
        n_steps, begun = self.standing.n_steps, continues and self._is_counted
        return self._config.relocates and not begun and n_steps > 0 and n_steps % self._config.window == 0

    def _start(self, x: Tensor, *, continues: bool) -> Start:
        """What the step starts from, given the rows of all ranks."""
        config, (state, waiting, _) = self._config, self.standing
        if state is not None and waiting is None:
            state = to_device(state, x.device)
            if not self._is_due(continues=continues):
                return Start(state)
            moved, n_relocated = move(state, lower=True)
            return Start(moved, n_relocated=n_relocated)
        if state is None:
            announce(config.K, x.shape[1])
        if config.uses_labels:
            return Start(mixture_core.init(config.core, x))
        with may_wait():  # for the GPU, once: how many rows there are decides whether to go on
            rows = x[usable_rows(x)]
            if state is not None and not len(rows):
                return Start(to_device(state, x.device), waiting)
            if waiting is not None:
                rows = torch.cat([waiting.to(x.device), rows])
            generator = torch.Generator(device="cpu").manual_seed(config.seed)
            state = mixture_core.init(config.core, rows, generator=generator)
        return Start(state, rows if len(rows) < SEEDING_ROWS * config.K else None, anew=True)


def _is_idle(stats: StepStats, n_rows: int | Tensor) -> bool:
    """Whether a batch has no usable row; on a GPU, for which nobody waits, whether it has no row."""
    if stats.n_ignored.is_cuda:
        return isinstance(n_rows, int) and n_rows == 0
    return int(stats.n_ignored) == int(n_rows)


def announce(K: int, D: int) -> None:
    """Says how large the state is going to be, if it is large."""
    if (size := 4 * K * (1 + D + D * D)) > LARGE:
        warnings.warn(
            f"The mixture of K = {K} components of D = {D} takes {size / 1e9:.1f} GB, and as much again for the next "
            "step; a smaller K, or a projection to fewer dimensions, takes less.",
            stacklevel=2,
        )


def ignored(count: int, N: int) -> str:
    """Returns what to say of rows that were ignored."""
    return f"{count} of {N} rows ignored (NaN, infinite, beyond 1.8e13, or labelled to be ignored)"


def _digest_of(state: MixtureState | None) -> int:
    parts = () if state is None else (state.moments.weight, state.moments.mean, state.residual)
    return digest(*(part.cpu().numpy().tobytes() for part in parts))


def to_device(state: MixtureState, device: torch.device) -> MixtureState:
    """Returns the state on a device."""
    if state.moments.weight.device == device:
        return state
    moved: MixtureState = tree_map(lambda tensor: tensor.to(device), state)
    return moved
