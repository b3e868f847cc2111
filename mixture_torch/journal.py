"""What an estimator tells its user once a step's figures are on the host: rows of the log, errors and warnings."""

import weakref
from collections.abc import Callable, Mapping
from functools import cache, partial

from torch import Tensor

from mixture_torch.files.recorder import Recorder, Row, warn_caller
from mixture_torch.update.arrivals import Arrivals, Report, check_loggable, responsibilities_of
from mixture_torch.update.batch import ignored, settle
from mixture_torch.update.precision import full_float32


class Journal:
    """Takes rows and checks from the device to the files and to the user.

    When `owner` is collected, its rows are written. `notes` are warnings that the user has not been given yet.
    """

    def __init__(self, owner: object, recorder: Recorder, notes: list[str]) -> None:
        self._recorder, self._notes = recorder, notes
        self._reports: Arrivals[Report] = Arrivals(recorder.turn)
        self.rows: Arrivals[Callable[[], Row]] = Arrivals(recorder.turn)
        self.resumes = False  # whether the next row is the first one after a checkpoint was loaded
        self._noted: set[str] = set()
        weakref.finalize(owner, _finish, self.rows, recorder)  # if nobody calls `close`

    def expect(self, report: Report) -> None:
        """Checks the batch of an update when its report is here."""
        self._reports.expect(report, report)

    def log(self, stats: Mapping[str, Tensor], report: Report | None, step: int, epoch: int) -> None:
        """Writes a row when its report is here; None makes a report of the statistics."""
        stores = self._recorder.scores_mode is not None
        check_loggable(stats, stores_scores=stores)
        if report is not None:
            report.step = step
        if self._recorder.open():  # a process that writes no row leaves the folder to those that do
            if report is None:
                with full_float32(stats["R"] if "R" in stats else stats["pi"]):
                    report = Report.of(stats)
            R = report.send(responsibilities_of(stats)) if stores else None
            row = partial(Row, step, epoch, report.K, R=R, resumes=self.resumes)
            self.rows.expect(report, cache(lambda: row(*report.figures)))  # the same row if it is asked for again
        self.resumes = False
        self.settle(but=1)

    def settle(self, *, but: int = 0) -> None:
        """Writes rows and checks updates, without waiting for the latest `but` of either."""
        try:
            self.rows.settle(partial(_write, self._recorder), but=but)
        finally:
            self._reports.settle(self._check, but=but)

    def flush(self) -> None:
        """Completes all files."""
        self.settle()
        self._recorder.flush()

    def close(self) -> None:
        """Completes and closes all files."""
        self.settle()
        self._recorder.close()

    def note(self, kind: str, text: str) -> None:
        """Keeps a warning for `say`, unless there was one of its kind."""
        if kind not in self._noted:
            self._noted.add(kind)
            self._notes.append(text)

    def note_ignored(self, n_ignored: int, N: int, at: str = "") -> None:
        """Keeps a warning of ignored rows, if there are any."""
        if n_ignored:
            text = f"{ignored(n_ignored, N, at)}. This warning comes once; `n_ignored` counts the rows."
            self.note("ignored", text)

    def say(self) -> None:
        """Gives the warnings that were kept to the caller of a public method of the estimator."""
        while self._notes:
            warn_caller(self._notes.pop(0))

    def _check(self, report: Report) -> None:
        at = " at an update that was not logged" if report.step is None else f" at step {report.step}"
        for doubt in report.doubts:
            settle(doubt, at=at)
        self.note_ignored(report.n_ignored, report.N, at)


def _write(recorder: Recorder, row: Callable[[], Row]) -> None:
    recorder.write(row())


def _finish(rows: Arrivals[Callable[[], Row]], recorder: Recorder) -> None:
    """Does what `close` does, for an estimator that is gone; in a forked child, nothing."""
    if recorder.is_ours:
        try:
            rows.settle(partial(_write, recorder))
        finally:
            recorder.close(for_good=True)
