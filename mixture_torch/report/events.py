"""Events: changes of shares and variances that began at nearly the same step, and so have one cause."""

from collections.abc import Iterable, Iterator

import attrs
import numpy as np
import numpy.typing as npt

from mixture_core.alarms import CHANGES, GAP, LASTING, WINDOW, Alarm
from mixture_torch.report.run import Run

SOON = 3  # rows over which the share after a change is averaged
LOST = 0.5  # a component has lost its samples if less than this part of its earlier share remains
MOST_GONE = 0.4  # part of the batch; if more goes, the embeddings changed, not the data
CROWDED = 0.5  # part of the batch in one component
Shares = npt.NDArray[np.float64]


@attrs.frozen(kw_only=True, eq=False)
class Event:
    """Changes that began together.

    Attributes:
        since: The first step of the change.
        alarms: The alarms raised, earliest first.
        before: (K,) shares of the batch in the 40 rows before the change.
        after: The same in the first three rows of the change.
        now: The same in the last 20 rows of the log.
        n_rows: Mean batch size before and after.
        scalars: Before, after and now, for trace_T and share_B if they changed.
        last: Last step of the log.
    """

    since: int
    alarms: tuple[Alarm, ...]
    before: Shares
    after: Shares
    now: Shares
    n_rows: tuple[float, float]
    scalars: dict[str, tuple[float, float, float]]
    last: int

    @property
    def changed(self) -> tuple[int, ...]:
        """Components whose share changed."""
        return tuple(sorted({alarm.component for alarm in self.alarms if alarm.component is not None}))

    @property
    def lost(self) -> tuple[int, ...]:
        """Components that lost most of their samples."""
        return tuple(k for k in self.changed if self.after[k] < LOST * self.before[k])

    @property
    def crowded(self) -> int | None:
        """The component that suddenly holds most of the batch, if any."""
        k = int(self.after.argmax())
        is_new = self.after[k] > CROWDED and self.after[k] > 2 * self.before[k]
        return k if is_new and k in self.changed else None

    @property
    def moved(self) -> float:
        """Part of the batch that moved to another component."""
        return float(np.maximum(self.after - self.before, 0).sum())

    @property
    def is_loss(self) -> bool:
        """Whether samples have gone, rather than moved to other components.

        If a group goes, the shares of all others grow by the same factor. A component has gained samples if its share
        exceeds that by more than two standard deviations.
        """
        if not self.lost or len(self.lost) > len(self.before) // 2:
            return False
        lost = list(self.lost)
        gone = float((self.before - self.after)[lost].sum())
        rest = self.before / (1 - gone)
        noise = 2 * np.sqrt(rest / max(SOON * self.n_rows[1], 1))
        return gone < MOST_GONE and float(np.maximum(self.after - rest - noise, 0).sum()) < LOST * gone


def events_of(run: Run) -> Iterator[Event]:
    """Yields the events of a run: each holds the changes that began within 44 rows of its first one."""
    extra = run.extra
    if extra is None:
        return
    group: list[Alarm] = []
    for alarm in sorted((alarm for alarm in run.alarms if alarm.kind in CHANGES), key=lambda alarm: alarm.since):
        if group and row_of(run, alarm.since) > row_of(run, group[0].since) + WINDOW:
            yield _event(run, group)
            group = []
        group.append(alarm)
    if group:
        yield _event(run, group)


def row_of(run: Run, step: int) -> int:
    """Returns the row of `mixture_extra.csv` that has a step."""
    assert run.extra is not None
    return int(np.searchsorted(run.extra["step"], step))


def _event(run: Run, alarms: list[Alarm]) -> Event:
    assert run.extra is not None
    extra, row = run.extra, row_of(run, alarms[0].since)
    n_rows = (extra["n_rows"] - extra["n_ignored"]).astype(float)
    earlier, later = slice(max(row - WINDOW, 0), max(row - GAP, 1)), slice(row, row + SOON)
    latest = slice(max(row, len(n_rows) - LASTING), None)

    def share(rows: slice) -> Shares:
        n = extra["n"][rows][n_rows[rows] > 0]
        total: Shares = n.sum(axis=0)
        return total / max(float(n.sum()), 1.0)

    def mean(column: npt.NDArray[np.float64], rows: slice) -> float:
        usable = column[rows][n_rows[rows] > 0]
        return float(usable.mean()) if len(usable) else float("nan")

    kinds = {alarm.kind: row_of(run, alarm.step) for alarm in reversed(alarms) if alarm.component is None}
    return Event(
        since=alarms[0].since,
        alarms=tuple(alarms),
        before=share(earlier),
        after=share(later),
        now=share(latest),
        n_rows=(mean(n_rows, earlier), mean(n_rows, later)),
        scalars={
            kind: (mean(extra[kind], earlier), float(extra[kind][kinds[kind]]), mean(extra[kind], latest))
            for kind in ("trace_T", "share_B")
            if kind in kinds
        },
        last=int(extra["step"][-1]),
    )


def listed(words: Iterable[object]) -> str:
    """Returns words as a list in English."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def named(components: tuple[int, ...]) -> str:
    """Returns the components as the subject of a sentence."""
    if len(components) > 6:
        return f"{len(components)} components ({', '.join(map(str, components[:5]))} and others)"
    return f"Component{'s' if len(components) > 1 else ''} {listed(components)}"
