"""Verdicts on changes: shares of the batch and variances that jumped at nearly the same step have one cause."""

import attrs
import numpy as np
import numpy.typing as npt

from mixture_core.alarms import GAP, LASTING, SCALARS, WINDOW
from mixture_torch.report.run import Run
from mixture_torch.report.verdict import Grade, Raised, Verdict, components_of, listed, named

SOON = 3  # rows over which figures after a change are averaged
LOST = 0.5  # a component has lost its samples if less than this part of its earlier share remains
MOST_GONE = 0.4  # part of the batch; if more goes, the embeddings changed, not the data
CROWDED = 0.5  # part of the batch in one component
MOVED = 0.25  # part of the batch that changes its component if the embeddings change
MOST_LISTED = 5  # shares in a sentence
NAMES = {"trace_T": "total variance", "share_B": "share of the variance between components"}
CHECK = "The embeddings changed abruptly: check the learning rate, the loss and the inputs from this step on."
Shares = npt.NDArray[np.float64]


@attrs.frozen(kw_only=True, eq=False)
class Change:
    """Changes that began together.

    Attributes:
        row: The row of `mixture_extra.csv` at which the first begins.
        since: The step of this row.
        last: The last step of the log.
        changed: The components whose share changed.
        before: (K,) shares of the batch in the 40 rows before the change.
        after: The same in the first three rows of the change; of each component that changed, of its own change.
        now: The same in the last 20 rows of the log.
        n_rows: Mean batch size before and after.
        scalars: Before, after and now, of trace_T and share_B if they changed.
    """

    row: int
    since: int
    last: int
    changed: tuple[int, ...]
    before: Shares
    after: Shares
    now: Shares
    n_rows: tuple[float, float]
    scalars: dict[str, tuple[float, float, float]]

    @classmethod
    def of(cls, run: Run, group: list[Raised]) -> "Change":
        """Returns the change that a group of alarms is about."""
        assert run.extra is not None
        extra, row = run.extra, group[0].row
        n_rows = (extra["n_rows"] - extra["n_ignored"]).astype(float)
        earlier, later = slice(max(row - WINDOW, 0), max(row - GAP, 1)), slice(row, row + SOON)
        latest = slice(max(row, len(n_rows) - LASTING), None)

        def share(rows: slice) -> Shares:
            n: Shares = extra["n"][rows][n_rows[rows] > 0].sum(axis=0)
            return n / max(float(n.sum()), 1.0)

        def mean(column: npt.NDArray[np.float64], rows: slice) -> float:
            usable = column[rows][n_rows[rows] > 0]
            return float(usable.mean()) if len(usable) else float("nan")

        begins = {one.alarm.kind: one.row for one in reversed(group) if one.alarm.kind in SCALARS}
        after = share(later)
        for one in reversed(group):  # a component may have changed some rows after the first
            if (k := one.alarm.component) is not None:
                after[k] = share(slice(one.row, one.row + SOON))[k]
        return cls(
            row=row,
            since=group[0].alarm.since,
            last=int(extra["step"][-1]),
            changed=components_of(group),
            before=share(earlier),
            after=after,
            now=share(latest),
            n_rows=(mean(n_rows, earlier), mean(n_rows, later)),
            scalars={
                name: (mean(extra[name], earlier), mean(extra[name], slice(at, at + SOON)), mean(extra[name], latest))
                for name, at in sorted(begins.items(), reverse=True)
            },
        )

    @property
    def lost(self) -> tuple[int, ...]:
        """Components that lost most of their samples."""
        return tuple(k for k in self.changed if self.after[k] < LOST * self.before[k])

    def verdict(self) -> Verdict:
        """Returns the verdict on this change."""
        fullest = int(self.after.argmax())
        if fullest in self.changed and self.after[fullest] > max(CROWDED, 2 * self.before[fullest]):
            return self._crowd(fullest)
        if self._is_loss():
            return self._loss()
        if float(np.maximum(self.after - self.before, 0).sum()) > MOVED:
            return self._move()
        return self._jump() if self.scalars else self._composition()

    def _is_loss(self) -> bool:
        """Whether samples have gone, rather than moved to other components.

        If a group goes, the shares of all others grow by the same factor. A component has gained samples if its share
        exceeds that by more than two standard deviations.
        """
        lost = list(self.lost)
        if not lost or len(lost) > len(self.before) // 2:
            return False
        gone = float((self.before - self.after)[lost].sum())
        rest = self.before / (1 - gone)
        noise = 2 * np.sqrt(rest / max(SOON * self.n_rows[1], 1))
        return gone < MOST_GONE and float(np.maximum(self.after - rest - noise, 0).sum()) < LOST * gone

    def _crowd(self, k: int) -> Verdict:
        title = f"At step {self.since}, most samples fell into component {k}"
        text = f"{self._shares((k,))}; {self._extent()}"
        return self._verdict("wrong", "abrupt change", (k,), title, text, self._later((k,)), check=CHECK)

    def _move(self) -> Verdict:
        title = f"At step {self.since}, samples moved to other components"
        moved = 100 * float(np.maximum(self.after - self.before, 0).sum())
        text = f"{moved:.0f} % of the batch moved; {self._extent()}"
        return self._verdict("wrong", "abrupt change", self.changed, title, text, check=CHECK)

    def _loss(self) -> Verdict:
        lost, others = self.lost, tuple(k for k in self.changed if k not in self.lost)
        whose, its, when = ("A group of samples has", "its", f"at step {self.since}")
        if len(lost) > 1:
            whose, its, when = ("Groups of samples have", "their", f"from step {self.since} on")
        title = f"{whose} gone: {named(lost).lower()} lost most of {its} samples {when}"
        text = [f"{self._shares(lost)}, and no other component gained as much, so these samples are missing."]
        before, after = self.n_rows
        if abs(after / before - 1) > 0.02:
            text.append(f"The batch has {after:.0f} rows instead of {before:.0f}.")
        if others:
            text.append(f"{named(others)} changed with it.")
        check = "Check the data: is a class, a source or a file no longer read?"
        return self._verdict("wrong", "group gone", lost, title, *text, self._later(lost), check=check)

    def _jump(self) -> Verdict:
        kind = next(iter(self.scalars))
        before, after, _ = self.scalars[kind]
        title = f"The {NAMES[kind]} {'rose' if after > before else 'fell'} suddenly at step {self.since}"
        text = [f"{named(self.changed)} changed with it."] if self.changed else []
        check = "Check the learning rate, the loss and the data at that step."
        return self._verdict("changed", kind, self.changed, title, *text, check=check)

    def _composition(self) -> Verdict:
        what = "a different share" if len(self.changed) == 1 else "different shares"
        if self._is_back(self.changed):
            title = f"{named(self.changed)} had {what} of the batch from step {self.since} on"
        else:
            have = "has" if len(self.changed) == 1 else "have"
            title = f"{named(self.changed)} {have} had {what} of the batch since step {self.since}"
        text, check = (f"{self._shares(self.changed)}.", self._later(self.changed)), "Check the data from this step on."
        return self._verdict("changed", "composition", self.changed, title, *text, check=check)

    def _verdict(
        self, level: Grade, kind: str, components: tuple[int, ...], title: str, *text: str, check: str
    ) -> Verdict:
        variances = [
            f"The {NAMES[name]} went from {before:.4g} to {after:.4g}; at the end of the log it is {now:.4g}."
            for name, (before, after, now) in self.scalars.items()
        ]
        return Verdict(
            level=level,
            kind=kind,
            components=components,
            since=self.since,
            title=title,
            text=" ".join([*text, *variances, check]),
        )

    def _extent(self) -> str:
        return f"{len(self.changed)} of {len(self.before)} components changed."

    def _shares(self, components: tuple[int, ...]) -> str:
        pairs = [f"{self.before[k]:.3f} to {self.after[k]:.3f}" for k in components[:MOST_LISTED]]
        return f"{'Its share' if len(components) == 1 else 'Their shares'} of the batch went from {listed(pairs)}"

    def _later(self, components: tuple[int, ...]) -> str:
        """The shares at the end of the log: "again" if they are back."""
        shares = listed(f"{self.now[k]:.3f}" for k in components[:MOST_LISTED])
        now = f"it is {shares}" if len(components) == 1 else f"they are {shares}"
        return f"At the end of the log, step {self.last}, {now}{' again' if self._is_back(components) else ''}."

    def _is_back(self, components: tuple[int, ...]) -> bool:
        """Whether shares are closer to what they were than half their change."""
        off, most = np.abs(self.now - self.before), 0.5 * np.abs(self.after - self.before)
        return bool((off <= most)[list(components)].all())
