"""What an estimator tells its user once a step's figures are on the host: rows of the log, errors and warnings."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from mixture_core.alarms import Alarm
from mixture_torch.files.recorder import Recorder, Row, warn_caller
from mixture_torch.files.snapshots import LAST_FILE
from mixture_torch.tracker import Outlet, Tracker
from mixture_torch.update.arrivals import Arrivals, Report
from mixture_torch.update.batch import ignored, settle
from mixture_torch.update.figures import Figures, check_loggable, responsibilities_of
from mixture_torch.update.precision import full_float32
from mixture_torch.update.ranks import text_of
from mixture_torch.update.snapshot import EXCESS_EVERY, snapshot
from mixture_torch.update.watch import OnAlarm, Watch
from mixture_torch.views import View

NO_STATS = (
    "`log_step` has nothing to log because there was no `update`; call `update`, use `activate` with a loss that feeds "
    "the estimator, or watch a layer that runs in training mode, `forwards` times a step. This warning comes once."
)


class Logged(NamedTuple):
    """A step that waits for its report."""

    row: Callable[[], Row]  # the same row if it is called again
    report: Report
    resumes: bool


class Told(NamedTuple):
    """A step whose row was written."""

    step: int
    figures: Figures
    alarms: tuple[Alarm, ...]


class Journal:
    """Writes and tracks rows and checks batches once figures are on the host, and watches the rows for alarms.

    When `owner` is garbage collected, its rows are written.
    """

    def __init__(self, owner: View, recorder: Recorder, *, on_alarm: OnAlarm, tracker: Tracker) -> None:
        self._recorder, self._extra = recorder, owner.config.extra
        self._notes = owner._mixture.notes  # warnings that the user has not seen yet
        self.reports: Arrivals[Report] = Arrivals(recorder.turn)  # of updates, whose batches are checked then
        self.rows: Arrivals[Logged] = Arrivals(recorder.turn)
        self._resumes = False  # whether the next row is the first one after a checkpoint was loaded
        self._noted: set[str] = set()
        self._watch, self._outlet = Watch(on_alarm, self.note), Outlet(tracker, self.note)
        self._has_reader = recorder.has_folder or on_alarm is not None or tracker is not None
        self._untold: deque[Told] = deque()
        self._done: Logged | None = None  # the last row that was written
        self._newest: Logged | None = None  # the last one with the figures that alarms rest on
        self._taken: Logged | None = None  # the same at the last snapshot
        self._axes: Tensor | None = None  # of the last snapshot
        self._n_steps = 0  # at the last snapshot or, if the folder has none, of the checkpoint that was loaded
        weakref.finalize(owner, _finish, self.rows, recorder)  # if nobody calls `close`

    def resume(self, n_steps: int) -> None:
        """Continues from a checkpoint at `n_steps`; the next row supersedes all rows at or after it."""
        self._resumes, self._n_steps, self._newest = True, n_steps, None
        self._recorder.existing = "append"

    def log(self, stats: Mapping[str, Tensor], report: Report | None, step: int, epoch: int) -> None:
        """Writes a row when its report is here; None makes a report of the statistics."""
        stores = self._recorder.scores_mode is not None
        check_loggable(stats, stores_scores=stores)
        if report is not None:
            report.step = step
        if self._has_reader and self._recorder.open():
            if report is None:
                with full_float32(stats["R"] if "R" in stats else stats["pi"]):
                    report = Report.of(stats, extra=self._extra)
            R = report.send(responsibilities_of(stats)) if stores else None
            row = cache(partial(_row, step, epoch, report, R, resumes=self._resumes))
            self.rows.expect(report, Logged(row, report, self._resumes))
        resumes, self._resumes = self._resumes, False
        self.settle(but=0 if resumes else 1)  # it reads when the last snapshot was taken

    def settle(self, *, but: int = 0) -> None:
        """Writes rows and checks updates, without waiting for the latest `but` of either."""
        try:
            self.rows.settle(self._write, but=but)
        finally:
            try:
                self.reports.settle(self._check, but=but)
            finally:
                self._tell()

    def take_snapshot(self, view: View, *, flushes: bool = False) -> None:
        """Writes a snapshot of an estimator's mixture if one is due and a row has been written since the last one."""
        every, progress = view.config.snapshot_every, view._mixture.progress
        if flushes != (every is None) or progress.n_steps == 0:
            return
        if every is not None and progress.n_steps // every == self._n_steps // every:  # not each step may be logged
            return
        self.settle()
        if self._newest is None or self._newest is self._taken or not self._recorder.is_ours:
            return
        row, N = self._newest.row(), self._newest.report.figures.N
        is_due = progress.n_steps // EXCESS_EVERY > self._n_steps // EXCESS_EVERY
        try:
            if (state := view.state) is None:  # after a checkpoint from before the first update
                return
            with full_float32(state.moments.weight):
                entry = snapshot(state, progress.pairs, N=N, before=self._axes, with_excess=is_due)
        except (MemoryError, RuntimeError) as error:  # no memory, or a decomposition that does not converge
            why = text_of(error).rstrip(".")
            self.note("snapshot", f"No snapshot could be taken at step {row.step}: {why}. Training goes on.")
            return
        self._taken, self._axes, self._n_steps = self._newest, entry["axes"], progress.n_steps
        self._watch.excess = entry["excess"]
        entry = {"step": row.step, "epoch": row.epoch, "n_steps": progress.n_steps, **entry}
        self._recorder.write_snapshot(entry)
        self._outlet.snapshot(entry)

    def flush(self, view: View) -> None:
        """Completes all files, with a snapshot if one is due."""
        self.take_snapshot(view, flushes=True)
        self.settle()
        self._recorder.flush()

    def close(self, state_dict: Callable[[], Mapping[str, Any]]) -> None:
        """Completes and closes all files; if a row was written, also writes what `state_dict` returns."""
        self.settle()
        last: Mapping[str, Any] | None = None
        try:
            last = state_dict() if self._extra and self._recorder.has_folder and self._recorder.is_ours else None
        except (MemoryError, RuntimeError) as error:
            self.note("last", f"`{LAST_FILE}` was not written: {text_of(error).rstrip('.')}.")
        self._recorder.close(last=last)

    def note(self, kind: str, text: str) -> None:
        """Keeps a warning for `say`, unless there was one of its kind."""
        if kind not in self._noted:
            self._noted.add(kind)
            self._notes.append(text)

    def note_ignored(self, n_ignored: int, N: int | Tensor, at: str = "") -> None:
        """Keeps a warning of ignored rows, if there are any."""
        if n_ignored:
            text = f"{ignored(n_ignored, int(N), at)}. This warning comes once; `n_ignored` counts the rows."
            self.note("ignored", text)

    def say(self) -> None:
        """Warns the caller of the estimator's method of all that was noted."""
        while self._notes:
            warn_caller(self._notes.pop(0))

    def _write(self, logged: Logged) -> None:
        row, figures = logged.row(), logged.report.figures
        self._recorder.write(row)
        if logged is self._done:  # it comes again after an interrupt
            return
        alarms = self._see(logged) if self._extra and figures.pi else ()
        self._done = logged
        self._untold.append(Told(row.step, figures, alarms))

    def _tell(self) -> None:
        """Calls the user's functions, without the lock of `settle`: they may wait for threads that need it."""
        while self._untold:
            try:
                told = self._untold.popleft()
            except IndexError:  # another thread was faster
                return
            self._outlet.row(told.figures, told.step)
            for alarm in told.alarms:
                self._watch.tell(alarm)
                self._outlet.alarm(alarm)

    def _see(self, logged: Logged) -> tuple[Alarm, ...]:
        """Returns the alarms that a row raises."""
        row, figures = logged.row(), logged.report.figures
        if logged.resumes:
            rows, snapshots = self._recorder.read(before=(row.epoch, row.step))
            self._watch.replay(rows, snapshots, D=logged.report.D)
            last = snapshots[-1] if snapshots else {}
            self._axes, self._n_steps = last.get("axes"), last.get("n_steps", self._n_steps)
        shared = {"step": row.step, "trace_B": row.trace_B, "opnorm_B": row.opnorm_B}
        alarms = self._watch.see(figures.extra | shared, D=logged.report.D)
        self._newest = logged  # before `on_alarm`, which may load a checkpoint
        return alarms

    def _check(self, report: Report) -> None:
        at = " at an update that was not logged" if report.step is None else f" at step {report.step}"
        for doubt in report.doubts:
            settle(doubt, at=at)
        self.note_ignored(report.figures.n_ignored, report.figures.N, at)


def _row(step: int, epoch: int, report: Report, R: Tensor | None, *, resumes: bool) -> Row:
    figures, extra = report.figures, None
    if figures.pi:
        values: Iterable[Any] = figures.extra.values()
        *scalars, pi, n, rel = values
        extra = (*scalars, *pi, *n, *rel)
    return Row(step, epoch, report.K, *figures[:4], R=R, resumes=resumes, extra=extra)


def _finish(rows: Arrivals[Logged], recorder: Recorder) -> None:
    """Does what `close` does, for an estimator that is gone; in a forked child, nothing."""
    if recorder.is_ours:
        try:
            rows.settle(lambda logged: recorder.write(logged.row()))
        finally:
            recorder.close(for_good=True)
